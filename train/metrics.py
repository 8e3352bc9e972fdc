"""What a run reports: JSON lines always, a live progress bar, wandb when asked.

`metrics.jsonl` holds each step once: a resumed run cuts off the lines after its checkpoint and goes on. Every line
names its stage and step; a validation says which tokens, query mode and filter its losses cover.
Not here: what is measured (`loop`, `evaluate`).
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.files import write_atomic

log = logging.getLogger(__name__)

_STAGE_ORDER = {"warmup": 0, "continual": 1}


class Sink(Protocol):
    """Something that takes metrics."""

    def log(self, values: Mapping[str, Any]) -> None:
        """Take one line of metrics."""
        ...

    def rewind(self, stage: str, step: int) -> None:
        """Forget what came after a step that the run goes back to."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class JsonLines:
    """One JSON object a line; complete lines only are ever read back."""

    def __init__(self, path: Path, *, stage: str, step: int) -> None:
        """Open for appending after (`stage`, `step`); what a killed run wrote beyond is cut off."""
        self._path = path
        _cut(path, stage, step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def rewind(self, stage: str, step: int) -> None:
        self._file.close()
        _cut(self._path, stage, step)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


class ProgressBar:
    """The live line of a stage: loss, tokens per second, time left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:>7,.0f} tokens/s"),
            TimeRemainingColumn(),
        )
        self._task: Any = None
        self._stage = ""

    def log(self, values: Mapping[str, Any]) -> None:
        if "loss" not in values:
            return
        if values["stage"] != self._stage:
            self._stage = values["stage"]
            self._task = self._progress.add_task(
                self._stage, total=values["num_steps"], completed=values["step"] - 1, loss=0.0, rate=0.0
            )
            self._progress.start()
        self._progress.update(
            self._task, completed=values["step"], loss=values["loss"], rate=values["tokens_per_second"]
        )

    def rewind(self, stage: str, step: int) -> None:
        return None

    def close(self) -> None:
        self._progress.stop()


class Wandb:
    """Mirrors the metrics; never disturbs training: every failure is logged once and the mirror goes quiet."""

    def __init__(self, run: Path, *, project: str, config: Mapping[str, Any]) -> None:
        self._run: Any = None
        try:
            import wandb

            mode: Any = "online" if os.environ.get("WANDB_API_KEY") else "offline"
            self._run = wandb.init(
                project=project,
                dir=str(run),
                id=_run_id(run),
                name=run.name,
                resume="allow",
                config=dict(config),
                mode=os.environ.get("WANDB_MODE", mode),
            )
        except Exception as problem:  # a third party's outage must not stop a run
            log.warning("wandb is off: %s; metrics.jsonl has everything", problem)

    def log(self, values: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        stage = values["stage"]
        try:
            self._run.log({f"{stage}/{name}": value for name, value in values.items() if name != "stage"})
        except Exception as problem:
            log.warning("wandb went quiet: %s", problem)
            self._run = None

    def rewind(self, stage: str, step: int) -> None:
        return None  # wandb keeps what it has; the line that tells of the rollback follows

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class Metrics:
    """All sinks of rank 0; on other ranks it has none."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def log(self, **values: Any) -> None:
        """Send one line to every sink; `stage` and `step` are among the values."""
        values = {**values, "time": time.time()}
        for sink in self._sinks:
            sink.log(values)

    def rewind(self, stage: str, step: int) -> None:
        """Forget what came after a step that the run goes back to."""
        for sink in self._sinks:
            sink.rewind(stage, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in _complete_lines(path)]


def _complete_lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [line for line in lines if line.endswith("\n")]


def _cut(path: Path, stage: str, step: int) -> None:
    """Keep the complete lines up to (`stage`, `step`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        end = (_STAGE_ORDER[stage], step)
        kept = [line for line in _complete_lines(path) if _position(json.loads(line)) <= end]
        write_atomic(path, "".join(kept).encode())


def _position(line: Mapping[str, Any]) -> tuple[int, int]:
    return _STAGE_ORDER[line["stage"]], int(line["step"])


def _run_id(run: Path) -> str:
    """The wandb id of a run folder: made once, the same after every resume."""
    path = run / "wandb-id"
    if not path.exists():
        write_atomic(path, os.urandom(6).hex().encode())
    return path.read_text()
