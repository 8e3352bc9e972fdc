"""Records in RAM: those read most recently stay, in a fixed number of bytes.

Adjacent chunks, and the rows of neighbouring steps, often read the same references (paper, section 3.1). The cache
keeps records as they are on disk, not decoded, so that a quantiser's compression counts here too.

Invariants: what is read is what the source holds, whatever was read before; the bytes are bounded from the beginning,
and taken as records come in.

Not here: reading ahead (`train.inputs`); the cache belongs to one thread.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memorybank.store import Generation

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReadCounts:
    """What was asked of a cache.

    Attributes:
        held: Records that it had.
        missed: Records that were read from the bank's files.
        bytes_read: Bytes of these.
    """

    held: int = 0
    missed: int = 0
    bytes_read: int = 0

    def since(self, before: "ReadCounts") -> "ReadCounts":
        """What was asked after `before`."""
        return ReadCounts(
            self.held - before.held, self.missed - before.missed, self.bytes_read - before.bytes_read
        )


class CachedRecords:
    """Records of a generation, the last ones read in RAM (`bank.Records`)."""

    def __init__(self, generation: Generation, *, max_bytes: int) -> None:
        """Keep at most `max_bytes` of records; less than a record's bytes keep none."""
        capacity = min(max_bytes // generation.record_bytes, len(generation))
        self.counts = ReadCounts()
        """What was asked so far."""
        self._generation = generation
        self._kept = torch.empty((capacity, generation.record_bytes), dtype=torch.uint8)
        self._place_of: OrderedDict[int, int] = OrderedDict()  # the least recently read first

    def read(self, ids_N: Ids) -> Tensor:
        """Return the records of distinct references, uint8 (N, record_bytes), on the CPU."""
        ids = ids_N.tolist()
        places_N = np.array([self._place_of.get(id, -1) for id in ids], np.int64)
        held_N = places_N >= 0
        records = torch.empty((len(ids), self._kept.shape[1]), dtype=torch.uint8)
        records[torch.from_numpy(held_N)] = self._kept[torch.from_numpy(places_N[held_N])]
        for id in ids_N[held_N].tolist():
            self._place_of.move_to_end(id)
        missed = ids_N[~held_N]
        made_bytes = len(missed) * self._kept.shape[1]
        if len(missed):
            made = self._generation.read(missed)
            records[torch.from_numpy(~held_N)] = made
            self._keep(missed, made)
        before = self.counts
        self.counts = ReadCounts(
            before.held + int(held_N.sum()), before.missed + len(missed), before.bytes_read + made_bytes
        )
        return records

    def _keep(self, ids_N: Ids, records: Tensor) -> None:
        count = min(len(ids_N), len(self._kept))
        places = []
        for id in ids_N[len(ids_N) - count :].tolist():
            place = len(self._place_of)
            if place == len(self._kept):
                _, place = self._place_of.popitem(last=False)
            self._place_of[id] = place
            places.append(place)
        self._kept[places] = records[len(ids_N) - count :]
