"""What a run reports: JSON lines always; TensorBoard and wandb, which mirror them, when asked.

`metrics.jsonl` holds each step once: a resumed run cuts off the lines after its checkpoint and goes on. Every line
names its stage and step; a validation says which tokens, query mode and filter its losses cover. A line with an
`event` (`resumed`, `restarted`, `stopped`, `crashed`, `rollback`) tells what happened to the run, and is never cut off,
not even by a resume from an older checkpoint, which knows nothing of it. A mirror has the same names and never disturbs
training; the stage is a folder in TensorBoard, and stands before the name in wandb (`warmup/loss`).
Not here: what is measured (`loop`, `evaluate`), the live view (`terminal`).
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Protocol, Self

from data.files import write_atomic
from train.config import STAGES

log = logging.getLogger(__name__)

_MIRROR_SECONDS = 60
"""A mirror whose server is gone gets this long to start, and this long to finish."""


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
    """One JSON object a line; complete lines only are ever read back.

    Attributes:
        steps_cut: Finished updates that were cut off: the run repeats them.
    """

    def __init__(self, path: Path, *, stage: str, step: int) -> None:
        """Open for appending after (`stage`, `step`); what a killed run wrote beyond is cut off."""
        self._path = path
        self.steps_cut = _cut(path, stage, step)
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


class Mirror:
    """A sink that may fail: what goes wrong is said once, and the run goes on without it.

    Args:
        name: What it is called in a warning.
        start: Opens the sink.
    """

    def __init__(self, name: str, start: Callable[[], Sink]) -> None:
        self._name = name
        self._sink: Sink | None = None
        try:
            self._sink = start()
        except Exception as problem:  # a third party's outage must not stop a run
            self._give_up("is off", problem)

    def log(self, values: Mapping[str, Any]) -> None:
        if self._sink is not None:
            try:
                self._sink.log(values)
            except Exception as problem:
                self._give_up("went quiet", problem)

    def rewind(self, stage: str, step: int) -> None:
        if self._sink is not None:
            try:
                self._sink.rewind(stage, step)
            except Exception as problem:
                self._give_up("could not go back", problem)

    def close(self) -> None:
        """Flush, for no longer than a minute: a server that is gone must not keep a finished run."""
        if self._sink is not None and not _within_a_minute(partial(self._close, self._sink)):
            self._give_up("was left behind", f"it did not finish within {_MIRROR_SECONDS} s")

    def _close(self, sink: Sink) -> None:
        try:
            sink.close()
        except Exception as problem:
            self._give_up("did not finish", problem)

    def _give_up(self, what: str, why: object) -> None:
        self._sink = None
        log.warning("%s %s: %s; metrics.jsonl has everything", self._name, what, why)


class Wandb:
    """A wandb run of the run folder's id: the same after every resume.

    Offline where there is no key, or where the server does not answer at the start: `wandb sync` brings it up later.
    `WANDB_MODE` decides otherwise.
    """

    def __init__(self, run: Path, *, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        def start(mode: Any) -> Any:
            return wandb.init(
                project=project,
                dir=str(run),
                id=_run_id(run),
                name=run.name,
                resume="allow",
                config=dict(config),
                mode=mode,
                settings=wandb.Settings(init_timeout=_MIRROR_SECONDS),
            )

        mode = os.environ.get("WANDB_MODE", "online")
        try:
            if "WANDB_MODE" not in os.environ and not wandb_account().has_key:
                mode = "offline"
            self._run = start(mode)
        except Exception as problem:
            if mode == "offline":
                raise
            log.warning("wandb is offline: %s; `wandb sync` brings %s/wandb up later", problem, run)
            _within_a_minute(wandb.teardown)  # its service holds the id of the run that did not start
            self._run = start("offline")
        for stage in STAGES:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def log(self, values: Mapping[str, Any]) -> None:
        self._run.log({f"{values['stage']}/{name}": number for name, number in _numbers(values)})

    def rewind(self, stage: str, step: int) -> None:
        return None  # wandb keeps what it has; the line that tells of the rollback follows

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files below `<run>/tensorboard/`, a folder for each stage; what a resumed stage repeats is hidden."""

    def __init__(self, run: Path, *, stage: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run / "tensorboard"
        self._open = SummaryWriter
        self._resumed = (stage, step)
        self._writers: dict[str, Any] = {}

    def log(self, values: Mapping[str, Any]) -> None:
        stage = values["stage"]
        if stage not in self._writers:
            resumed, step = self._resumed
            purge = step + 1 if stage == resumed and step else None
            self._writers[stage] = self._open(str(self._folder / stage), purge_step=purge)
        for name, number in _numbers(values):
            self._writers[stage].add_scalar(name, number, values["step"], walltime=values["time"])

    def rewind(self, stage: str, step: int) -> None:
        if stage in self._writers:
            self._writers.pop(stage).close()
        self._resumed = (stage, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


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
    """All complete lines of a `metrics.jsonl`.

    Raises:
        ValueError: A line is no JSON object; the file and the line are named.
    """
    lines = []
    for number, text in enumerate(_complete_lines(path), start=1):
        try:
            line = json.loads(text)
        except ValueError as problem:
            raise ValueError(f"{path}, line {number} is not JSON ({problem}); delete that line") from problem
        lines.append(line)
    return lines


def _complete_lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [line for line in lines if line.endswith("\n")]


def _cut(path: Path, stage: str, step: int) -> int:
    """Keep events and the complete lines up to (`stage`, `step`); return how many updates were cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return 0
    kept, steps_cut = [], 0
    for text in _complete_lines(path):
        line = json.loads(text)
        if "event" in line or _position(line) <= (STAGES.index(stage), step):
            kept.append(text)
        else:
            steps_cut += "loss" in line
    write_atomic(path, "".join(kept).encode())
    return steps_cut


def _position(line: Mapping[str, Any]) -> tuple[int, int]:
    return STAGES.index(line["stage"]), int(line["step"])


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line by their names; those of a list have a number behind its name."""
    for name, value in values.items():
        if isinstance(value, list):
            yield from ((f"{name}/{place}", item) for place, item in enumerate(value))
        elif isinstance(value, int | float):
            yield name, value


@dataclass(frozen=True, slots=True)
class WandbAccount:
    """Where wandb would log to.

    Attributes:
        server: Its URL.
        has_key: Whether wandb has credentials for it, and is not told to stay offline.
    """

    server: str
    has_key: bool


def wandb_account() -> WandbAccount:
    """What wandb itself makes of its variables, its settings files and netrc; it asks nobody, and says nothing.

    Raises:
        Exception: Whatever wandb raises of a setting or a key that it does not take.
    """
    import wandb

    try:
        server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
        return WandbAccount(server, wandb.login(prompt=False, verify=False))
    finally:
        wandb.teardown()  # what is set up next is not silent


def _within_a_minute(action: Callable[[], None]) -> bool:
    """Do it for no longer than a mirror gets, and say whether it was done; what goes on after that is left behind."""
    acting = Thread(target=action, daemon=True)
    acting.start()
    acting.join(_MIRROR_SECONDS)
    return not acting.is_alive()


def _run_id(run: Path) -> str:
    """The wandb id of a run folder: made once, the same after every resume."""
    path = run / "wandb-id"
    if not path.exists():
        write_atomic(path, os.urandom(6).hex().encode())
    return path.read_text()
