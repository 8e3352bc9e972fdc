"""Starting a run again after a crash (`supervise=true`): with back-off, up to a limit, and not where it is of no use.

A crash repeats when the same cause comes after the same update twice, unless a rank was killed from outside; a mistake
of the user, training that diverged and a signal that asked for the end are final at once. Everything else is tried
again from the newest whole checkpoint, `supervision.max_restarts` times in a row without a newer one. Every end before
the run was done, supervised or not, and what follows from it is an event in the run's `metrics.jsonl`: `stopped` where
a signal asked for it, else `crashed`.

Not here: how ranks are started (`launch.pretrain`), which checkpoint is taken (`train.checkpoint`), what torchrun
could restart by itself: nothing, it is not asked to.
"""

import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from launch.config import RunConfig, SupervisionConfig
from train.config import STAGES
from train.metrics import JsonLines, read_metrics
from train.stopping import STOPPED

log = logging.getLogger(__name__)

FAILURE = "failure.json"
"""Where the agent writes the first cause of a failure, in the run folder."""

_FINAL = {
    2: "it is a mistake, a lack of room or damage that the last line names: mend it first",
    3: "training diverged more often than it may: look into it first",
    **dict.fromkeys(STOPPED, "a signal asked for it"),
}


@dataclass(frozen=True, slots=True)
class End:
    """How the ranks ended.

    Attributes:
        code: Exit code.
        cause: The line that was said of it.
        stage: Where the run was.
        step: Its last reported update.
        checkpoint: The newest published one.
        from_outside: Whether a rank was killed by somebody (`launch.agent`), which says nothing of what comes next.
    """

    code: int
    cause: str
    stage: str
    step: int
    checkpoint: str | None
    from_outside: bool = False

    def repeats(self, other: "End") -> bool:
        """Whether it is the same crash at the same place; numbers (addresses, seconds, ports) may differ."""
        return not self.from_outside and (self.stage, self.step, self.code, _plain(self.cause)) == (
            other.stage, other.step, other.code, _plain(other.cause),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows.

    Attributes:
        wait_seconds: Pause before the ranks are started again; None: they are not.
        reason: Why.
    """

    wait_seconds: float | None
    reason: str


_UNSUPERVISED = Verdict(None, "the same command goes on (supervise=false)")


def judge(ends: Sequence[End], config: SupervisionConfig) -> Verdict:
    """Say what follows on the last of a run's ends, oldest first."""
    last = ends[-1]
    if last.code in _FINAL:
        return Verdict(None, _FINAL[last.code])
    if any(last.repeats(end) for end in ends[:-1]):
        where = f"after update {last.step} of the {last.stage} stage"
        return Verdict(None, f"the same crash {where} for the second time: it will repeat")
    tries = sum(1 for _ in takewhile(lambda end: end.checkpoint == last.checkpoint, reversed(ends)))
    if tries > config.max_restarts:
        return Verdict(
            None, f"{config.max_restarts} restarts (supervision.max_restarts) brought no newer checkpoint"
        )
    wait = min(config.backoff_seconds * 2 ** (tries - 1), config.max_backoff_seconds)
    return Verdict(wait, f"restart {tries} of {config.max_restarts} without a newer checkpoint")


def run(start: Callable[[], int], folder: Path, config: RunConfig) -> int:
    """Start the ranks until they end well, or until it is of no use; the last exit code."""
    ends: list[End] = []
    while True:
        (folder / FAILURE).unlink(missing_ok=True)
        code = start()
        if code == 0:
            return code
        ends.append(_end(folder, code, supervised=config.supervise))
        verdict = judge(ends, config.supervision) if config.supervise else _UNSUPERVISED
        _record(folder, ends[-1], verdict)
        if not config.supervise:
            return code
        if verdict.wait_seconds is None:
            log.error("not started again: %s", verdict.reason)
            return code
        log.warning("starting again in %.0f s: %s", verdict.wait_seconds, verdict.reason)
        time.sleep(verdict.wait_seconds)


def _end(folder: Path, code: int, *, supervised: bool) -> End:
    path, failure = folder / "metrics.jsonl", folder / FAILURE
    steps = [line for line in read_metrics(path) if "loss" in line] if path.exists() else []
    stage, step = (steps[-1]["stage"], steps[-1]["step"]) if steps else ("warmup", 0)
    said = json.loads(failure.read_text(encoding="utf-8")) if failure.exists() else {}
    published = _published(folder) if supervised else []  # what it imports takes seconds
    return End(
        code,
        said.get("cause") or (signal.Signals(code - 128).name if code in STOPPED else f"exit code {code}"),
        stage,
        step,
        published[-1] if published else None,
        said.get("from_outside", False),
    )


def _published(folder: Path) -> list[str]:
    from train.checkpoint import entries

    return [entry.folder.name for entry in entries(folder) if entry.problem is None]


def _record(folder: Path, end: End, verdict: Verdict) -> None:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return  # nothing was begun: the next start is the first
    line = {
        "stage": end.stage,
        "step": end.step,
        "event": "stopped" if end.code in STOPPED else "crashed",
        "code": end.code,
        "cause": end.cause,
        "checkpoint": end.checkpoint,
        "restarted_after": verdict.wait_seconds,
        "reason": verdict.reason,
        "time": time.time(),
    }
    # A line that a kill has torn goes, all others stay, those of updates that a resumed run repeats too.
    lines = JsonLines(path, stage=STAGES[-1], step=sys.maxsize)
    lines.log(line)
    lines.close()


def _plain(cause: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "#", cause)
