"""A stage turns rows into what the model is given: the only place where warmup and continual training differ.

Not here: which rows come (`rows`), which references a chunk found (`continual`), the update (`engine`).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data.batch import TokenBatch
from data.files import fingerprint
from memorybank.config import QueryMode
from memorybank.pool import window_slots
from model.memory import MemoryBatch, ReferenceBatch
from train.config import MemorySource
from train.engine import ModelInput

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reads:
    """What the chunks of a step's rows read, over all ranks.

    Attributes:
        empty_slots: Share of the slots that hold nothing.
        distinct_references: References read, each counted once.
        retrieval_score: Mean score of the references that the chunks found; None when they found none.
    """

    empty_slots: float
    distinct_references: int
    retrieval_score: float | None


class Stage(Protocol):
    """What the loop asks of a stage."""

    def reads(self, cursor: int) -> Reads | None:
        """What the step reads that ends at this cursor; None: its rows read no memory."""
        ...

    def model_input(self, batch: TokenBatch) -> ModelInput:
        """Attach to a batch what its chunks read."""
        ...


class Reader(Protocol):
    """References in, memories (or references to encode) out: a bank, or the references themselves."""

    def batch(self, ids_BCK: Ids, device: torch.device | str = "cpu") -> MemoryBatch | ReferenceBatch:
        """What chunks with these references read, decoded on the device that reads it."""
        ...


class PlainStage:
    """Rows alone: warmup, and the control arm."""

    def reads(self, cursor: int) -> None:
        return None

    def model_input(self, batch: TokenBatch) -> ModelInput:
        return ModelInput(batch.inputs, batch.targets)


class MemoryStage:
    """Rows with memories in the training pattern: one reference per chunk, shared by a window (paper, 5.4).

    Args:
        neighbours_MC: The reference that each chunk of each planned row found; -1 is empty.
        scores_MC: Their scores.
        query: Whether a chunk reads what its own text found.
        window: Chunks whose references a chunk reads.
        bank: Reads compiled memories; None when every step is online.
        online: Hands over references to be encoded with gradient; None when no step is online.
        online_share: Share of the steps that are online when both are there.
        rows_per_step: Rows of one update: all micro-batches of an update read memory from the same place.
        seed: Decides which steps are online.
        device: Where memories are decoded.
    """

    def __init__(
        self,
        neighbours_MC: Ids,
        scores_MC: Scores,
        *,
        query: QueryMode,
        window: int,
        bank: Reader | None,
        online: Reader | None,
        online_share: float,
        rows_per_step: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        assert bank is not None or online is not None
        self._neighbours_MC = neighbours_MC
        self._scores_MC = scores_MC
        self._query = query
        self._window = window
        self._bank = bank
        self._online = online
        self._online_share = online_share
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._device = device

    def model_input(self, batch: TokenBatch) -> ModelInput:
        ids_BC = self._neighbours_MC[list(batch.positions)]
        reader = self._reader(batch.positions[0] // self._rows_per_step)
        memory = reader.batch(window_slots(ids_BC, self._query, window=self._window), self._device)
        return ModelInput(batch.inputs, batch.targets, memory)

    def reads(self, cursor: int) -> Reads:
        step = slice(cursor - self._rows_per_step, cursor)
        found_BC = self._neighbours_MC[step]
        ids_BCK = window_slots(found_BC, self._query, window=self._window)
        scores = self._scores_MC[step][found_BC >= 0]
        return Reads(
            empty_slots=float((ids_BCK < 0).mean()),
            distinct_references=len(np.unique(ids_BCK[ids_BCK >= 0])),
            retrieval_score=float(scores.mean()) if len(scores) else None,
        )

    def _reader(self, epoch_step: int) -> Reader:
        if self._bank is None or self._online is None:
            reader = self._bank or self._online
            assert reader is not None
            return reader
        return (
            self._online if is_online(epoch_step, share=self._online_share, seed=self._seed) else self._bank
        )


def is_online(step: int, *, share: float, seed: int) -> bool:
    """Whether a step of a mixed stage encodes its references: the same on every rank, after every resume."""
    return int(fingerprint([seed, "online", step]), 16) % 10_000 < share * 10_000


def reads_bank(source: MemorySource) -> bool:
    """Whether training reads compiled memories."""
    return source is not MemorySource.online


def encodes_online(source: MemorySource) -> bool:
    """Whether training encodes references inside its steps."""
    return source is not MemorySource.bank
