"""Signs of life of a rank, for the watchdog that its launcher keeps (`launch.watchdog`).

    beat       wherever work gets on: a micro-batch of training, of validation, of a compilation
    phase      what the rank is busy with, and for how long it may do so without a beat
    record     RANK.json, written by a thread: pid, phase, time of the last beat, whether the main thread waits for
               other ranks, and where it is

A rank that waits in a collective is none that hangs: it waits for the one that does. So a record says which of the
two its main thread does, by its stack. SIGUSR2 makes a rank write the stacks of all its threads, even one that holds
the interpreter in an endless loop.

Not here: judging records, and ending ranks (`launch.watchdog`).
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

STACKS = signal.SIGUSR2
"""The signal that makes a rank write its stacks."""
_OWN = str(Path(__file__).resolve().parents[1])
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_KERNELS = ("/torch/", "/deepspeed/", "/model/", "/train/engine.py")
"""Where a process with a GPU may wait for its device, in which kernels and collectives of all ranks queue up."""
_PERIOD_SECONDS = 1.0


class Pulse:
    """Of one rank; it counts nothing until `show` was called, and costs nothing either."""

    def __init__(self) -> None:
        self._beat = time.monotonic()
        self._phase = "start"
        self._batch_seconds = self._phase_seconds = self._limit = float("inf")

    def beat(self) -> None:
        """Say that work got on."""
        self._beat = time.monotonic()

    @contextmanager
    def batches(self, phase: str) -> Iterator[None]:
        """A phase that consists of batches, each of which ends with a beat."""
        with self._within(phase, self._batch_seconds):
            yield

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """A phase in the middle of which nothing can be said."""
        with self._within(phase, self._phase_seconds):
            yield

    def show(
        self,
        folder: Path,
        stacks: Path,
        *,
        rank: int,
        batch_seconds: float,
        phase_seconds: float,
        has_gpu: bool = False,
    ) -> None:
        """Begin to write records; called once, in the main thread.

        Args:
            folder: Of the records of all ranks of this machine.
            stacks: The file that stacks are appended to when the signal comes.
            rank: Of this process.
            batch_seconds: How long a batch may take.
            phase_seconds: How long a phase without batches may take, the start included.
            has_gpu: Whether the main thread may have to wait for a device, and with it for other ranks.
        """
        stacks.parent.mkdir(parents=True, exist_ok=True)
        # Open for as long as the process lives: the handler can open nothing.
        descriptor = os.open(stacks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        faulthandler.register(STACKS, file=descriptor, all_threads=True)
        self._batch_seconds, self._phase_seconds = batch_seconds, phase_seconds
        self._limit = phase_seconds
        path, period = folder / f"{rank}.json", min(_PERIOD_SECONDS, batch_seconds / 4)
        constant = {"rank": rank, "pid": os.getpid(), "batch_seconds": batch_seconds, "stacks": str(stacks)}
        main = threading.get_ident()

        def write() -> None:
            work = path.with_suffix(".tmp")
            while True:
                record = {**constant, **self._record(main, has_gpu=has_gpu)}
                try:
                    work.write_text(json.dumps(record), encoding="utf-8")
                    work.replace(path)
                except FileNotFoundError:  # the launcher is gone, and its folder with it
                    return
                time.sleep(period)

        threading.Thread(target=write, name="pulse", daemon=True).start()

    def _record(self, main: int, *, has_gpu: bool) -> dict[str, Any]:
        frame = sys._current_frames()[main]
        waits_for_device = has_gpu and any(part in frame.f_code.co_filename for part in _KERNELS)
        return {
            "phase": self._phase,
            "limit": self._limit,
            "beat": self._beat,
            "waiting": waits_for_device or _waits(frame),
            "where": _where(frame),
            "written": time.monotonic(),
        }

    @contextmanager
    def _within(self, phase: str, limit: float) -> Iterator[None]:
        before = self._phase, self._limit
        self._begin(phase, limit)
        try:
            yield
        finally:
            self._begin(*before)

    def _begin(self, phase: str, limit: float) -> None:
        self.beat()
        self._phase, self._limit = phase, limit
        self.beat()  # a record written in between has the old phase, or the new one, and is fresh with either


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """A stack, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _waits(frame: FrameType) -> bool:
    """Whether a stack stands in a collective."""
    return any(part in each.f_code.co_filename for each in _frames(frame) for part in _COLLECTIVES)


def _where(frame: FrameType) -> str:
    """The innermost line of this project on a stack."""
    own = (each for each in _frames(frame) if each.f_code.co_filename.startswith(_OWN))
    found = next(own, frame)
    name = found.f_code.co_filename.removeprefix(_OWN + "/")
    return f"{name}:{found.f_lineno} ({found.f_code.co_name})"
