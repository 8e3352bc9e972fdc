"""Stopping on a signal, with nothing lost.

    SIGTERM, SIGINT, SIGUSR1, SIGHUP     what torchrun, terminals, SLURM and terminals that are closed send

While updates are made, a signal is only noted: all ranks agree after the update, publish a checkpoint and end. At all
other times (reading, searching, compiling a bank, saving the last checkpoint of an epoch) what was published is all
there is to keep, finished shards included, so that the process ends at once, from a thread of its own: a main thread
that waits in a collective, or searches, cannot delay it. More signals change nothing.

Not here: publishing (`checkpoint`), agreeing (`loop`), forwarding signals to ranks (`launch.agent`).
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, Thread

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOPPED = tuple(128 + number for number in SIGNALS)
"""Exit codes of a process that a signal stopped, as shells count them, with nothing lost."""


def heeds_hangup() -> bool:
    """Whether SIGHUP ends this process: not so under `nohup`, whose wish a handler would undo."""
    return signal.getsignal(signal.SIGHUP) != signal.SIG_IGN


def end_with_parent() -> None:
    """Have SIGTERM come when the process that started this one is gone, even if it was killed (Linux alone)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


class StoppedError(Exception):
    """The run stops because a signal asked for it; its checkpoint is published."""


class Stop:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._deferred = False
        self._lock = Lock()
        self._leave: Callable[[int], None] = lambda number: None

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells count; of SIGTERM where another rank's signal stopped this one."""
        return 128 + (self._signal or signal.SIGTERM)

    def listen(self, leave: Callable[[int], None]) -> None:
        """Begin to listen; called once, in the main thread.

        Args:
            leave: Ends the process with an exit code.
        """
        self._leave = leave
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or heeds_hangup():
                # The interpreter itself writes the number into the pipe.
                signal.signal(number, lambda *_: None)
        Thread(target=self._watch, args=(reader,), name="stop", daemon=True).start()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal is noted, and is acted upon at the end at the latest."""
        self._act_or(deferred=True)
        try:
            yield
        except BaseException:
            self._deferred = False
            raise
        self._act_or(deferred=False)

    def _act_or(self, *, deferred: bool) -> None:
        with self._lock:
            if self.requested:
                self._leave(self.exit_code)
            self._deferred = deferred

    def _watch(self, reader: int) -> None:
        while True:
            number = os.read(reader, 1)[0]
            if number not in SIGNALS:
                continue
            with self._lock:
                self._signal = self._signal or number
                if not self._deferred:
                    self._leave(self.exit_code)
