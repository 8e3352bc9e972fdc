"""What happened in a run, read back from `metrics.jsonl`, and `config.yaml` where it is there.

A run may be half finished, may have lost the end of its last line, may have seen its warmup stage only.
Not here: writing the lines (`train.metrics`), drawing them (`launch.report_page`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from launch.chart import Point
from launch.compose import read_settings
from train.config import STAGES
from train.metrics import read_metrics
from train.stopping import STOPPED

Line = dict[str, Any]

SECONDS = ("data", "retrieve", "compute", "update", "search", "compile", "validation", "checkpoint")
"""What the time of a stage goes to."""

OTHER = "between steps"
"""Time between two lines of one process of which no key tells what it went to."""


@dataclass(frozen=True, slots=True)
class RunLog:
    """The lines of a run.

    Attributes:
        label: Its name.
        folder: Its folder.
        lines: Every complete line, in the order of writing.
        settings: Its frozen configuration, flat; empty where there is none.
    """

    label: str
    folder: Path
    lines: Sequence[Line]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "RunLog":
        """Read a run's lines.

        Raises:
            ValueError: There are none.
        """
        path = folder / "metrics.jsonl"
        if not path.exists():
            raise ValueError(
                f"{path} does not exist: name a run that `memory3 pretrain` began, or its folder"
            )
        config = folder / "config.yaml"
        settings = read_settings(config) if config.exists() else {}
        return cls(folder.resolve().name, folder, read_metrics(path), settings)

    @property
    def stages(self) -> list[str]:
        """The stages that took a step, in the order of time."""
        return [stage for stage in STAGES if self.steps(stage)]

    def steps(self, stage: str) -> list[Line]:
        """The lines of a stage's steps."""
        return [line for line in self.lines if line["stage"] == stage and "loss" in line]

    @property
    def last(self) -> Line | None:
        """The line of the last step; None before the first."""
        return next((line for line in reversed(self.lines) if "loss" in line), None)

    def validations(self, stage: str) -> list[Line]:
        """The lines of a stage's validations."""
        return [line for line in self.lines if line["stage"] == stage and "validation_none" in line]

    @property
    def validation(self) -> Line | None:
        """The last validation of all; None before the first."""
        return next((line for line in reversed(self.lines) if "validation_none" in line), None)

    @property
    def epochs(self) -> list[Line]:
        """The lines in which a bank was compiled, one for each bank epoch."""
        return [line for line in self.lines if "bank_references" in line]

    @property
    def events(self) -> list[Line]:
        """What happened to the run, in the order of time."""
        return [line for line in self.lines if "event" in line]

    @property
    def resumes(self) -> list[Line]:
        """How often the run was started again."""
        return [line for line in self.events if line["event"] in ("resumed", "restarted")]

    @property
    def recoveries(self) -> list[Line]:
        """The starts after a crash, or after a kill that nobody told of: updates had to be repeated then."""
        found = []
        end: Line | None = None
        for event in self.events:
            if event["event"] in ("stopped", "crashed"):
                end = event
            elif event["event"] in ("resumed", "restarted"):
                if event.get("steps_repeated") if end is None else not _is_stop(end):
                    found.append(event)
                end = None
        return found

    @property
    def rollbacks(self) -> list[Line]:
        """How often training diverged and went back."""
        return [line for line in self.events if line["event"] == "rollback"]

    @property
    def passed_over(self) -> list[Line]:
        """The steps whose rows were passed over after a rollback: they made no update."""
        return [line for line in self.lines if line.get("passed_over")]

    @property
    def skipped(self) -> list[Line]:
        """The steps that were left out because a gradient was not finite."""
        return [line for line in self.lines if line.get("skipped")]

    def points(self, lines: Sequence[Line], key: str) -> list[Point]:
        """The values of a key over the tokens that the run had trained on, where both are known."""
        tokens = {(line["stage"], line["step"]): line["tokens"] for line in self.lines if "tokens" in line}
        found = ((tokens.get((line["stage"], line["step"])), line.get(key)) for line in lines)
        return [(float(x), float(y)) for x, y in found if x is not None and y is not None]

    def tokens_per_second(self, stage: str) -> float | None:
        """The median over a stage's steps; None without any."""
        rates = [line["tokens_per_second"] for line in self.steps(stage)]
        return median(rates) if rates else None

    def seconds(self, stage: str) -> dict[str, float]:
        """What the time of a stage went to, the largest share of it untold by older runs' lines."""
        lines = [line for line in self.lines if line["stage"] == stage]
        told = dict.fromkeys(SECONDS, 0.0)
        for line in lines:
            for name, seconds in spent(line).items():
                told[name] += seconds
        gaps = sum(_gap(before, line) for before, line in pairwise(self.lines) if line["stage"] == stage)
        return {name: seconds for name, seconds in (told | {OTHER: gaps}).items() if seconds > 0.001}

    def hours(self) -> float:
        """How long the run was at work; the time between a crash and its resume is left out."""
        return sum(sum(self.seconds(stage).values()) for stage in STAGES) / 3600


def _is_stop(end: Line) -> bool:
    """Whether a signal ended the run; older runs have the exit code alone."""
    return end["event"] == "stopped" or end.get("code") in STOPPED


def spent(line: Line) -> dict[str, float]:
    """What a line says that time went to."""
    return {
        "data": line.get("seconds_data", 0.0),
        "retrieve": line.get("seconds_retrieve", 0.0),
        "compute": line.get("seconds_compute", 0.0),
        "update": line.get("seconds_update", 0.0),
        "search": line.get("bank_seconds_search", 0.0),
        "compile": line.get("bank_seconds_compile", 0.0),
        "validation": line.get("seconds_validation", 0.0),
        "checkpoint": line.get("seconds_checkpoint", 0.0),
    }


def _gap(before: Line, line: Line) -> float:
    """Seconds from a line to the next of which the next does not tell what they went to.

    Before a rollback the run was at work, on updates whose lines are gone; before any other event it was not there.
    """
    if line.get("event", "rollback") != "rollback":
        return 0.0
    return max(0.0, float(line["time"] - before["time"]) - sum(spent(line).values()))


def different_settings(logs: Sequence[RunLog]) -> Iterator[tuple[str, list[Any]]]:
    """Yield every key whose value differs among runs, with the values; names of runs and paths are left out."""
    for key in sorted({key for log in logs for key in log.settings}):
        values = [log.settings.get(key) for log in logs]
        if key != "run" and not key.startswith("paths.") and any(value != values[0] for value in values):
            yield key, values


def are_seeds(logs: Sequence[RunLog]) -> bool:
    """Whether runs differ in nothing but their seeds, and in what decides nothing."""
    harmless = ("seed", "experiment", "resume", "continual.branch_from", "logging.", "saving.")
    return all(key.startswith(harmless) for key, _ in different_settings(logs))
