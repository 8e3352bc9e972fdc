"""Memories to records and back.

Invariant: `decode(encode(memory))` is the memory itself for `DtypeCodec` when the model computes in that
type, and within the codec's stated error otherwise; decoding runs on the device that holds the records.

Not here: the order of the bytes (record.py) and where records lie (store.py).
"""

from typing import Protocol

import torch
from torch import Tensor

from memorybank.record import MemoryShape
from model.memory import ExplicitMemory


class Codec(Protocol):
    """A way to keep memories as bytes."""

    @property
    def name(self) -> str:
        """Identifies the bytes' meaning: generations of another codec are refused by it."""

    @property
    def record_bytes(self) -> int:
        """Bytes per memory."""

    def fit(self, sample: ExplicitMemory) -> None:
        """Learn from memories what the codec needs to know; nothing, for most."""

    def encode(self, memory: ExplicitMemory) -> Tensor:
        """Return uint8 records, (N, record_bytes), on the memory's device."""

    def decode(self, records: Tensor) -> ExplicitMemory:
        """Return the memories of uint8 records, (N, record_bytes), on the records' device."""


class DtypeCodec:
    """Keeps keys and values as numbers of one floating-point type: exact in the model's own type."""

    def __init__(self, shape: MemoryShape, dtype: torch.dtype = torch.bfloat16) -> None:
        """Make a codec for memories of `shape`."""
        self._shape = shape
        self._dtype = dtype
        self.name = str(dtype).removeprefix("torch.")
        self.record_bytes = shape.record_bytes(dtype.itemsize)

    def fit(self, sample: ExplicitMemory) -> None:
        """Learn nothing: a floating-point type has no parameters."""

    def encode(self, memory: ExplicitMemory) -> Tensor:
        """Return uint8 records, (N, record_bytes)."""
        parts = (
            memory.k_NLGSE.to(self._dtype),
            memory.v_NLGSE.to(self._dtype),
            memory.index_NLGS.to(torch.int16),
        )
        return torch.cat([part.contiguous().flatten(1).view(torch.uint8) for part in parts], dim=1)

    def decode(self, records: Tensor) -> ExplicitMemory:
        """Return the memories, keys and values in the codec's type."""
        if records.shape[1] != self.record_bytes:
            raise ValueError(
                f"records of {records.shape[1]} bytes, but codec {self.name} makes {self.record_bytes}: "
                "they were written for another model or codec; compile them anew with `memory3 bank refresh`"
            )
        shape = self._shape
        num_index_bytes = 2 * shape.num_kept
        num_vector_bytes = (self.record_bytes - num_index_bytes) // 2
        k, v = records[:, :num_vector_bytes], records[:, num_vector_bytes:-num_index_bytes]
        index = records[:, -num_index_bytes:]
        kept_NLGS = (len(records), shape.num_layers, shape.num_kv_heads, shape.tokens_kept)
        # Made flat, and so contiguous: records need not begin at a multiple of the number's size.
        return ExplicitMemory(
            k_NLGSE=k.reshape(-1).view(self._dtype).view(*kept_NLGS, shape.head_size),
            v_NLGSE=v.reshape(-1).view(self._dtype).view(*kept_NLGS, shape.head_size),
            index_NLGS=index.reshape(-1).view(torch.int16).view(kept_NLGS).long(),
        )
