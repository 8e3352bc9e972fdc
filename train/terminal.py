"""What a run shows while it trains: a live view of four lines on a terminal, elsewhere plain lines now and then.

Both are made of the lines of `metrics.jsonl` alone, in the order in which they are written, and of a clock.
Not here: what is measured (`loop`, `run`), the page that is made afterwards (`launch.report`).
"""

import io
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)

_ARMS = ("none", "memory", "shuffled")


class Status:
    """Where a run stands, as its lines told it.

    Args:
        now: Seconds since the epoch; until a checkpoint is published its age counts from here.
    """

    def __init__(self, now: float) -> None:
        self.values: dict[str, Any] = {}
        self._saved: float | None = None
        self._begun = (now, 0)

    def take(self, values: Mapping[str, Any]) -> None:
        """Take one line of metrics."""
        if values["stage"] != self.values.get("stage"):
            kept = {key: self.values[key] for key in ("skips",) if key in self.values}
            self.values = kept
            self._begun = (values["time"], values["step"])
        self.values.update(values)
        if values.get("skipped"):
            self.values["skips"] = self.values.get("skips", 0) + 1
        if values.get("checkpoint"):
            self._saved = values["time"]

    @property
    def num_steps(self) -> int:
        """Steps of the stage."""
        return int(self.values.get("num_steps", 0))

    def seconds_left(self) -> float | None:
        """How long the stage still takes if it goes on as it did since this process began, epochs' edges included."""
        began, first = self._begun
        steps = self.values["step"] - first
        if steps <= 0 or not self.num_steps:
            return None
        return float((self.values["time"] - began) / steps * (self.num_steps - self.values["step"]))

    def training(self) -> list[tuple[str, str]]:
        """Labels and values of the last step."""
        v = self.values
        shown = [
            ("loss", f"{v['loss']:.3f}"),
            ("grad norm", f"{v['grad_norm']:.2f}"),
            ("lr", f"{v['lr']:.2e}"),
        ]
        shown.append(("tokens/s", f"{v['tokens_per_second']:,.0f}"))
        if v.get("mfu") is not None:
            shown.append(("MFU", f"{v['mfu']:.1%}"))
        if v.get("matmul_share") is not None:
            shown.append(("of matmul", f"{v['matmul_share']:.0%}"))
        if v.get("skips"):
            shown.append(("skipped", str(v["skips"])))
        return shown

    def memory(self) -> list[tuple[str, str]]:
        """Labels and values of what is read, and of the last validation."""
        v = self.values
        shown = []
        if v.get("generation") is not None:
            shown.append(
                ("bank", f"{v['generation'].removeprefix('generation-')}, {v['generation_age']} steps old")
            )
        if v.get("memory_attention") is not None:
            shown.append(("attention on memory", f"{v['memory_attention']:.1%}"))
        return shown

    def held_out(self) -> list[tuple[str, str]]:
        """Labels and values of the last validation."""
        losses = [(arm, self.values.get(f"validation_{arm}")) for arm in _ARMS]
        has_memory = self.values.get("validation_memory") is not None
        names = {"none": "held-out, no memory" if has_memory else "held-out"}
        return [(names.get(arm, arm), f"{loss:.3f}") for arm, loss in losses if loss is not None]

    def safety(self, now: float) -> list[tuple[str, str]]:
        """Label and age of the last good checkpoint: what a crash at this moment would cost."""
        age = "none yet" if self._saved is None else f"{_clock(now - self._saved)} ago"
        return [("checkpoint", age)]

    def left(self) -> str:
        """When the stage ends."""
        seconds = self.seconds_left()
        return "" if seconds is None else f"stage ends in {_clock(seconds)}"

    def line(self, now: float) -> str:
        """A step, in one plain line."""
        parts = [*self.training(), *self.memory(), *self.safety(now), ("", self.left())]
        return self._plain(parts)

    def validation_line(self) -> str:
        """A validation, in one plain line."""
        return self._plain(self.held_out())

    def _plain(self, parts: list[tuple[str, str]]) -> str:
        words = [f"{label} {value}".strip() for label, value in parts]
        head = f"{self.values['stage']} {self.values['step']}/{self.num_steps}"
        return " · ".join([head, *filter(None, words)])


class LiveView:
    """Four lines at the foot of a terminal; what is logged meanwhile scrolls above them."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._status = Status(time.time())
        self._live = Live(
            get_renderable=self.render, console=self._console, refresh_per_second=2, transient=False
        )
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def log(self, values: Mapping[str, Any]) -> None:
        self._status.take(values)
        if "loss" in values and not self._live.is_started:
            self._live.start()
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler):
                    self._streams.append((handler, handler.setStream(sys.stderr)))

    def rewind(self, stage: str, step: int) -> None:
        return None

    def close(self) -> None:
        self._live.stop()
        for handler, stream in self._streams:
            handler.setStream(stream)

    def render(self) -> Group:
        """The view at this moment."""
        status = self._status
        if "loss" not in status.values:
            return Group()
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column()
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        head.add_row(
            Text(status.values["stage"], style="bold"),
            ProgressBar(
                total=status.num_steps,
                completed=status.values["step"],
                complete_style="cyan",
                finished_style="green",
            ),
            Text(f"{status.values['step']:,}/{status.num_steps:,}  {status.left()}"),
        )
        rows = (status.training(), status.memory(), [*status.held_out(), *status.safety(time.time())])
        return Group(head, *(_labelled(row) for row in rows if row))


class PlainLines:
    """A line every so many steps, at the end of a stage and for each validation, where there is no terminal."""

    def __init__(self, every: int, console: Console | None = None) -> None:
        self._every = every
        self._console = console or Console()
        self._status = Status(time.time())

    def log(self, values: Mapping[str, Any]) -> None:
        self._status.take(values)
        if "loss" in values and (values["step"] % self._every == 0 or values["step"] == values["num_steps"]):
            self._print(self._status.line(values["time"]))
        if "validation_none" in values:
            self._print(self._status.validation_line())

    def rewind(self, stage: str, step: int) -> None:
        return None

    def close(self) -> None:
        pass

    def _print(self, line: str) -> None:
        try:
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)
        except SystemExit:  # rich's answer to a closed pipe; from now on its console is silent
            log.warning(
                "nobody reads the lines of this run any more; it goes on, and metrics.jsonl has them all"
            )


def view(line_every: int, console: Console | None = None) -> LiveView | PlainLines:
    """The live view on a terminal that lines can be drawn over on; elsewhere, TERM=dumb too, plain lines."""
    console = console or Console()
    if isinstance(console.file, io.TextIOWrapper):
        console.file.reconfigure(errors="replace")  # not every terminal has every letter, and none ends a run
    is_live = console.file.isatty() and not console.is_dumb_terminal
    return LiveView(console) if is_live else PlainLines(line_every, console)


def _labelled(parts: list[tuple[str, str]]) -> Text:
    text = Text(overflow="fold")
    for label, value in parts:
        text.append(f"{label} ", style="dim")
        text.append(value, style="bold red" if label == "skipped" else "")
        text.append("   ")
    text.rstrip()
    return text


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
