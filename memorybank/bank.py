"""From the slots that chunks read to what the model takes: from records, or from the references themselves.

Invariants: a reference is read or encoded once per batch, however many chunks read it; what `BankReader`
hands out equals, bit for bit, what the model would encode itself with the same weights, device and batch
composition, when the codec keeps the model's own type.

Not here: which slots a chunk has (pool.py, neighbours.py).
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.references import ReferenceSource
from memorybank.codec import Codec
from memorybank.pool import distinct
from memorybank.windows import alone
from model.memory import MemoryBatch, ReferenceBatch
from model.transfer import sent

Ids = NDArray[np.int64]


class Records(Protocol):
    """A place that hands out records: a generation, a library, a cache, or `cold.ColdStart`."""

    def read(self, ids_N: Ids) -> Tensor:
        """Return the records, uint8 (N, record_bytes), on the CPU."""


class BankReader:
    """Memories from records, decoded on the device that reads them."""

    def __init__(self, records: Records, codec: Codec) -> None:
        """Read `records`, written with `codec`."""
        self._records = records
        self._codec = codec

    def batch(self, ids_BCK: Ids, device: torch.device | str = "cpu") -> MemoryBatch:
        """Return the pool of the distinct references, and the slots into it; -1 stays empty."""
        ids_N, slots_BCK = distinct(ids_BCK)
        pool = self._codec.decode(sent(self._records.read(ids_N), device))
        return MemoryBatch(pool=pool, slots_BCK=sent(slots_BCK, device))


class OnlineReader:
    """References to be encoded inside the forward pass, with gradient."""

    def __init__(self, references: ReferenceSource) -> None:
        """Read the tokens of `references`."""
        self._references = references

    def batch(self, ids_BCK: Ids, device: torch.device | str = "cpu") -> ReferenceBatch:
        """Return the tokens of the distinct references, and the slots into them; -1 stays empty."""
        ids_N, slots_BCK = distinct(ids_BCK)
        if len(ids_N) == 0:
            # No slot reads it, but every rank's forward then makes the same collective calls (ZeRO-3).
            ids_N = np.zeros(1, np.int64)
        tokens_NR, lengths_N, titles_N = alone(self._references, ids_N)
        return ReferenceBatch(tokens_NR, lengths_N, titles_N, slots_BCK).to(device)
