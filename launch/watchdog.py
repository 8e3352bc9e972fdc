"""The watchdog over the ranks of one machine: which of them hangs, the stacks of all, and the end of that one.

It lives in the process above the ranks (`launch.agent`), or in one beside them where another launcher started them
(`beside`), and reads what they say of themselves (`train.pulse`). A rank hangs when its last beat is older than its
phase allows and it does not wait for other ranks, or when it is stopped (SIGSTOP) for longer than a batch may take, in
whatever phase. Where every rank waits, for one on another machine or for a device, twice the time is allowed, and
nobody is named.

Not here: signs of life (`train.pulse`), what follows (`launch.agent`, `launch.supervise`).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from train.pulse import STACKS

PULSES = "MEMORY3_PULSES"
"""Names the folder of the ranks' records in their environment; without it nobody watches."""
_PERIOD_SECONDS = 0.5
_STALE_SECONDS = 10.0
"""A rank whose record is older does not run: it is stopped, or holds the interpreter."""
_DUMP_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Sign:
    """The last record of a rank.

    Attributes:
        rank: Its number.
        pid: Its process.
        phase: What it is busy with.
        where: The innermost line of this project that it executes.
        silent: Seconds since its last beat.
        stale: Seconds since the record was written.
        limit: How long it may be silent in this phase.
        batch_seconds: How long a batch may take.
        waiting: Whether it waits for other ranks.
        stopped: Whether the kernel says that it is stopped.
        stacks: The file that it writes stacks to.
    """

    rank: int
    pid: int
    phase: str
    where: str
    silent: float
    stale: float
    limit: float
    batch_seconds: float
    waiting: bool
    stopped: bool
    stacks: str


@dataclass(frozen=True, slots=True)
class Hang:
    """What the watchdog found.

    Attributes:
        rank: The one that hangs; None when it cannot be told.
        says: What happened, in a sentence.
    """

    rank: int | None
    says: str


def judge(signs: Sequence[Sign]) -> Hang | None:
    """Say which rank hangs, if one does; the one that has been silent for longest."""
    for sign in sorted(signs, key=lambda sign: -sign.silent):
        if sign.stopped and sign.silent > sign.batch_seconds:
            return Hang(
                sign.rank, f"rank {sign.rank} has been stopped for {sign.silent:.0f} s, in {sign.phase}"
            )
        waits = sign.waiting and sign.stale < _STALE_SECONDS
        if sign.silent > sign.limit and not waits:
            return Hang(
                sign.rank,
                f"rank {sign.rank} hangs: {sign.silent:.0f} s in {sign.phase} without getting on, at {sign.where}",
            )
    if signs and all(sign.silent > 2 * sign.limit for sign in signs):
        least = min(sign.silent for sign in signs)
        return Hang(
            None, f"all ranks of this machine have waited for others, or for a device, for {least:.0f} s"
        )
    return None


class Watchdog:
    """Watches from a thread, until it found something or is closed.

    Args:
        records: Folder of the ranks' records.
        say: Is told what was found before anything is ended.
    """

    def __init__(self, records: Path, *, say: Callable[[Hang], None] = lambda hang: None) -> None:
        self.found: Hang | None = None
        self._records = records
        self._say = say
        self._end = Event()
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, once it has finished what it may be doing to a rank."""
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        since = looked = time.monotonic()
        while not self._end.wait(_PERIOD_SECONDS):
            now = time.monotonic()
            if (
                now - looked > _STALE_SECONDS
            ):  # this process was stopped itself, and so may the ranks have been
                since = now
            looked = now
            signs = [sign for path in self._records.glob("*.json") if (sign := _read(path, now, since))]
            hang = judge(signs)
            if hang is not None:
                self.found = hang
                _dump(signs, hang)
                self._say(hang)
                _end(signs, hang)
                return


def beside(records: Path, run: Path) -> None:
    """Watch from a process of its own, which ends with this one: for ranks that another launcher started.

    Args:
        records: Folder of the ranks' records, which goes in the end.
        run: The run's folder, for what is said.
    """
    above = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [above, os.environ.get("PYTHONPATH")]))
    subprocess.Popen(
        [sys.executable, "-m", "launch.watchdog", str(records), str(run), str(os.getpid())],
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # what ends or stops the ranks' group does not reach it
    )


def main(records: Path, run: Path, rank: int) -> None:
    """Watch for as long as a rank lives."""

    def say(hang: Hang) -> None:
        print(f"memory3 pretrain: {hang.says}; {stacks_in(run)}", file=sys.stderr, flush=True)

    watchdog = Watchdog(records, say=say)
    while os.getppid() == rank:
        time.sleep(_PERIOD_SECONDS)
    watchdog.close()
    shutil.rmtree(records, ignore_errors=True)


def stacks_in(run: Path) -> str:
    """Where to look further."""
    return f"the stacks of all ranks are in {run / 'stacks'}"


def _read(path: Path, now: float, since: float) -> Sign | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        state = Path(f"/proc/{record['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:  # the rank is gone, which is torchrun's affair
        return None
    silent, stale = (now - max(record.pop(name), since) for name in ("beat", "written"))
    return Sign(**record, silent=silent, stale=stale, stopped=state == "T")


def _dump(signs: Sequence[Sign], hang: Hang) -> None:
    """Make every rank write its stacks; a stopped one does when it goes on, for a moment."""
    for sign in signs:
        with Path(sign.stacks).open("a", encoding="utf-8") as file:
            file.write(
                f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} rank {sign.rank} (pid {sign.pid}); {hang.says}\n"
            )
        _send(sign.pid, STACKS)
    time.sleep(_DUMP_SECONDS)


def _end(signs: Sequence[Sign], hang: Hang) -> None:
    guilty = [sign.pid for sign in signs if hang.rank in (sign.rank, None)]
    for sign in signs:
        if sign.stopped:
            _send(sign.pid, signal.SIGCONT)
            time.sleep(_DUMP_SECONDS)
    for pid in guilty:
        _send(pid, signal.SIGKILL)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
