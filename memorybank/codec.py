"""Memories to records and back.

A `Codec` lays a record out (record.py) and leaves each vector, one key or one value, to a `VectorCoder`:

    coder            bytes of a vector of E numbers           what stands in them
    Floats           E * size of the type                     the numbers, in that type
    Integers(8)      E + 2                                    int8 numbers, then their scale, bfloat16
    Integers(4)      E / 2 + 2                                numbers + 8, two a byte, the first one low; then the scale
    ProductQuantizer of quantizer.py                          codes

Invariants: `decode(encode(memory))` is the memory itself for `Floats` of the model's own type, and as near as
`relative_errors` measures otherwise; which tokens were kept survives exactly; all of it runs on the device that holds
the memory or the records.

Not here: the product quantisers (quantizer.py), which codec a bank has (codecs.py), where records lie (store.py).
"""

from typing import Protocol

import torch
from torch import Tensor

from memorybank.record import NO_TOKEN, MemoryShape
from model.memory import ExplicitMemory


class VectorCoder(Protocol):
    """A way to keep single vectors of one head as bytes."""

    @property
    def name(self) -> str:
        """Identifies the bytes' meaning."""

    @property
    def vector_bytes(self) -> int:
        """Bytes per vector."""

    def encode(self, vectors_ME: Tensor) -> Tensor:
        """Return uint8 (M, vector_bytes), on the vectors' device."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors (M, E) of uint8 codes (M, vector_bytes), on the codes' device."""


class Floats:
    """Keeps numbers in one floating-point type; beyond the range of float8 they become its largest."""

    def __init__(self, dtype: torch.dtype, head_size: int) -> None:
        """Keep vectors of `head_size` numbers as `dtype`."""
        self.name = str(dtype).removeprefix("torch.")
        self.vector_bytes = head_size * dtype.itemsize
        self._dtype = dtype
        self._head_size = head_size

    def encode(self, vectors_ME: Tensor) -> Tensor:
        """Return uint8 (M, vector_bytes)."""
        if self._dtype.itemsize == 1:  # float8 knows no infinity: what is too large would become NaN
            limit = torch.finfo(self._dtype).max
            vectors_ME = vectors_ME.clamp(-limit, limit)
        return vectors_ME.to(self._dtype).contiguous().view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors in the coder's type."""
        # Made flat, and so contiguous: codes need not begin at a multiple of the number's size.
        return codes.reshape(-1).view(self._dtype).view(len(codes), self._head_size)


class Integers:
    """Keeps numbers as multiples of their vector's scale, its largest magnitude over 127 (8 bits) or 7 (4 bits)."""

    def __init__(self, bits: int, head_size: int) -> None:
        """Keep vectors of `head_size` numbers, an even number, with 8 or 4 bits each."""
        assert bits in (4, 8)
        assert head_size % 2 == 0
        self.name = f"int{bits}"
        self.vector_bytes = head_size * bits // 8 + 2
        self._bits = bits
        self._largest = 2 ** (bits - 1) - 1

    def encode(self, vectors_ME: Tensor) -> Tensor:
        """Return uint8 (M, vector_bytes)."""
        x = vectors_ME.float()
        scale_M1 = (x.abs().amax(1, keepdim=True) / self._largest).to(torch.bfloat16)
        # A scale of zero means a vector of zeros. The scale as stored decides, so that its rounding costs nothing.
        steps = (x / scale_M1.float().clamp(min=torch.finfo(torch.float32).tiny)).round_()
        steps = steps.clamp_(-self._largest, self._largest).to(torch.int8)
        if self._bits == 4:
            nibbles = (steps + 8).view(torch.uint8)
            steps = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        return torch.cat([steps.view(torch.uint8), scale_M1.view(torch.uint8)], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors in float32."""
        scale_M1 = codes[:, -2:].reshape(-1).view(torch.bfloat16).float()[:, None]
        steps = codes[:, :-2]
        if self._bits == 8:
            return steps.contiguous().view(torch.int8) * scale_M1
        return (torch.stack([steps & 15, steps >> 4], dim=2).flatten(1).float() - 8) * scale_M1


class Codec:
    """A way to keep memories as bytes: a coder for keys, and one for values."""

    def __init__(
        self,
        shape: MemoryShape,
        keys: VectorCoder,
        values: VectorCoder | None = None,
        *,
        name: str | None = None,
    ) -> None:
        """Make a codec for memories of `shape`.

        Args:
            shape: of a memory.
            keys: the coder of keys, and of values unless these have their own.
            values: the coder of values, with as many bytes a vector.
            name: identifies the bytes' meaning; the coder's own name when there is but one.
        """
        assert values is None or (name is not None and values.vector_bytes == keys.vector_bytes)
        self._shape = shape
        self._coders = (keys, values or keys)
        self.name = name or keys.name
        """Identifies the bytes' meaning: a generation is read with the codec of this name only."""
        self.vector_bytes = keys.vector_bytes
        """Bytes of a key, and of a value."""
        self.memory_bytes = shape.memory_bytes(keys.vector_bytes)
        """Bytes of a memory's keys and values: what the paper counts."""
        self.record_bytes = shape.record_bytes(keys.vector_bytes)
        """Bytes of a record."""

    def encode(self, memory: ExplicitMemory) -> Tensor:
        """Return uint8 records, (N, record_bytes), on the memory's device."""
        num = len(memory.index_NLGS)
        parts = [
            coder.encode(x_NLGSE.reshape(-1, self._shape.head_size)).reshape(num, self.memory_bytes // 2)
            for coder, x_NLGSE in zip(self._coders, (memory.k_NLGSE, memory.v_NLGSE), strict=True)
        ]
        index = memory.index_NLGS
        parts.append(index.masked_fill(index < 0, NO_TOKEN).flatten(1).to(torch.uint8))
        return torch.cat(parts, dim=1)

    def decode(self, records: Tensor) -> ExplicitMemory:
        """Return the memories of uint8 records, (N, record_bytes), on the records' device."""
        if records.shape[1] != self.record_bytes:
            raise ValueError(
                f"records of {records.shape[1]} bytes, but codec {self.name} makes {self.record_bytes}: "
                "they were written for another model or codec; read them with the run that compiled them"
            )
        shape = self._shape
        kept_NLGS = (len(records), shape.num_layers, shape.num_kv_heads, shape.tokens_kept)
        half = self.memory_bytes // 2
        k_NLGSE, v_NLGSE = (
            coder.decode(part.reshape(-1, half // shape.num_kept)).view(*kept_NLGS, shape.head_size)
            for coder, part in zip(
                self._coders, torch.split(records[:, : 2 * half], half, dim=1), strict=True
            )
        )
        index = records[:, 2 * half :].reshape(kept_NLGS).long()
        return ExplicitMemory(k_NLGSE, v_NLGSE, index.masked_fill(index == NO_TOKEN, -1))


def relative_errors(codec: Codec, memory: ExplicitMemory) -> tuple[list[float], list[float]]:
    """Return, layer by layer, the error of keys and of values: its squares' sum over that of the vectors themselves.

    Places that a short reference left empty do not count.
    """
    decoded = codec.decode(codec.encode(memory))
    kept_NLGS1 = (memory.index_NLGS >= 0)[..., None]

    def errors(x_NLGSE: Tensor, y_NLGSE: Tensor) -> list[float]:
        x, y = (z.double() * kept_NLGS1 for z in (x_NLGSE, y_NLGSE))
        others = (0, 2, 3, 4)
        shares: list[float] = ((x - y).square().sum(others) / x.square().sum(others)).tolist()
        return shares

    return errors(memory.k_NLGSE, decoded.k_NLGSE), errors(memory.v_NLGSE, decoded.v_NLGSE)
