"""What the steps of an epoch are given, made ahead.

While a micro-batch is computed, a thread gathers the records that the next rows read, through a cache, and decodes them
on the device.

Invariants: inputs are those that the stage would make when they are asked for, bit for bit; the cursor counts what was
handed out, not what was made ahead. On a GPU the thread queues its copies and its decoding on the stream that trains:
they are in order by construction, short beside a micro-batch, and wait for nothing (`model.transfer.sent`).

Not here: which references a row reads (`stages`), the rows (`data.loader`).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from data.ahead import ReadAhead
from data.loader import Loader
from memorybank.cache import CachedRecords, ReadCounts
from train.engine import ModelInput
from train.stages import Stage


@dataclass(frozen=True, slots=True)
class BankReading:
    """How a step's memories came from the bank, on this rank.

    Attributes:
        cache_hit_rate: Share of the records that the cache held; None when none were read.
        bytes_read: Bytes of the records that it did not hold.
    """

    cache_hit_rate: float | None
    bytes_read: int


@dataclass(slots=True)
class StepInputs:
    """What a step is given.

    Attributes:
        micro: Its micro-batches on this rank, handed out one at a time: those that follow are made in the meantime.
            What stands below is known when there are no more.
        cursor: Rows of the plan consumed by the whole run once the step is done.
        seconds_waited: Time that was waited for the micro-batches.
        seconds_retrieve: What of it was waited for what the rows read; the rest was for the rows.
        reading: None for a stage that reads no bank.
    """

    micro: Iterator[ModelInput]
    cursor: int = 0
    seconds_waited: float = 0.0
    seconds_retrieve: float = 0.0
    reading: BankReading | None = None


@dataclass(frozen=True, slots=True)
class _Made:
    """A micro-batch; when its memories began to be read, and what was asked of the cache by then, itself included."""

    inputs: ModelInput
    cursor: int
    begun: float
    counts: ReadCounts | None


class InputsAhead:
    """Iterates over steps; a context manager that ends its thread, to be left before the loader's."""

    def __init__(
        self,
        stage: Stage,
        batches: Loader,
        *,
        accumulate: int,
        cache: CachedRecords | None,
        depth: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Starts making inputs.

        Args:
            stage: Attaches memories to rows.
            batches: Micro-batches of this rank.
            accumulate: Micro-batches of a step.
            cache: What the stage reads the bank through; None when it reads none.
            depth: Micro-batches that are ready, at most, beside the one in the making.
            device: Where they are put.
        """
        self._stage = stage
        self._batches = batches
        self._accumulate = accumulate
        self._device = device
        self._cache = cache
        self._counted = ReadCounts()
        self._ahead = ReadAhead(self._make(), depth=depth, name="memories")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepInputs:
        """The step that follows; the one before must have been handed out whole."""
        step = StepInputs(iter(()))
        step.micro = self._hand_out(step, self._await(step))
        return step

    def _hand_out(self, step: StepInputs, made: _Made) -> Iterator[ModelInput]:
        yield made.inputs
        for _ in range(1, self._accumulate):
            made = self._await(step)
            yield made.inputs
        step.cursor = made.cursor
        if made.counts is not None:
            read, self._counted = made.counts.since(self._counted), made.counts
            asked_for = read.held + read.missed
            step.reading = BankReading(read.held / asked_for if asked_for else None, read.bytes_read)

    def _await(self, step: StepInputs) -> _Made:
        asked = time.perf_counter()
        made = next(self._ahead)
        got = time.perf_counter()
        step.seconds_waited += got - asked
        # While this waited, the thread fetched the rows first; from then on, it read their memories.
        step.seconds_retrieve += max(0.0, got - max(asked, made.begun))
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead.close()

    def _make(self) -> Iterator[_Made]:
        for batch in self._batches:
            begun = time.perf_counter()
            inputs = self._stage.model_input(batch).to(self._device)
            yield _Made(
                inputs, self._batches.cursor, begun, None if self._cache is None else self._cache.counts
            )
