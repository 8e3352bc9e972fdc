"""What the first steps of a stage take, operation by operation: torch's profiler around the loop.

    <run>/profile/<stage>.json.gz       a trace, for Perfetto or chrome://tracing; memory stands in it
    <run>/profile/<stage>.txt           the operations that take most time
    <run>/profile/<stage>-memory.pickle what CUDA's allocator held, and who asked for it: pytorch.org/memory_viz

The first rank's alone. A step that is traced is slower; what it computes is the same.
Not here: the seconds of every step (`loop`), which are always written.
"""

import logging
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)

_SKIPPED_STEPS = 2
"""Steps before the trace: libraries load and allocators fill in the first ones."""
_ROWS = 30
_T = TypeVar("_T")


class Tracing:
    """Traces some steps of a stage, once."""

    def __init__(self, folder: Path, name: str, *, steps: int, snapshot: bool) -> None:
        """Nothing is traced yet.

        Args:
            folder: Takes the files.
            name: The stage's.
            steps: How many.
            snapshot: Whether CUDA's allocator is recorded, too.
        """
        self._folder = folder
        self._name = name
        self._steps = steps
        self._snapshot = snapshot and torch.cuda.is_available()

    def around(self, steps: Iterator[_T]) -> Generator[_T, None, None]:
        """Hand out what the steps of an epoch are given, and trace what is done between; to be closed at its end."""
        running: profile | None = None
        try:
            for number, given in enumerate(steps):
                if self._steps and number == _SKIPPED_STEPS:
                    running = self._start()
                yield given
                if running is not None and number == _SKIPPED_STEPS + self._steps - 1:
                    self._stop(running)
                    running = None
        finally:
            if running is not None:
                self._stop(running)

    def _start(self) -> profile:
        if self._snapshot:
            torch.cuda.memory._record_memory_history()
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        running = profile(activities=activities, record_shapes=True, profile_memory=True)
        running.start()
        return running

    def _stop(self, running: profile) -> None:
        running.stop()
        self._steps = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._name}.json.gz"
        running.export_chrome_trace(str(path))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=by, row_limit=_ROWS)
        (self._folder / f"{self._name}.txt").write_text(table)
        if self._snapshot:
            snapshot = str(self._folder / f"{self._name}-memory.pickle")
            torch.cuda.memory._dump_snapshot(snapshot)  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
        log.info("%s: steps traced into %s", self._name, path)
