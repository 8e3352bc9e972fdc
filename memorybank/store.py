"""Records on disk: a generation is the bank as compiled by one set of weights.

    <bank>/generation-<name>/
      manifest.json        settings: layout, context, window_tokens, lineage, step, codec, record_bytes,
                             num_records, ids (hash), records_per_shard, batch;
                             inputs (hashes): weights, references, tokenizer
      ids.npy              int64, ascending: the reference numbers that have a record, in the records' order
      records-NNNNN.bin    `records_per_shard` records each (fewer in the last), nothing between them

Invariants: a generation is published once, by writer.py, and never changes; it is refused, by the name of the
setting, when it was compiled by other weights or for another layout, tokenizer or codec than expected; each
MiB is checked against its checksum when it is first touched; a reference without record is an error, never
another reference's memory.

Not here: how records are made (writer.py), and what their bytes mean (record.py, codec.py).
"""

import io
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.files import Manifest, hold, open_manifest
from memorybank.config import BankContext

MAKE_ANEW = (
    "a bank that you keep is compiled anew by `memory3 bank refresh`, a generation of training after deleting it, "
    "from a checkpoint of an earlier bank epoch"
)
KIND, VERSION = "generation", 2
IDS = "ids.npy"

Ids = NDArray[np.int64]


def records_file(shard: int) -> str:
    """Return the name of a shard of records."""
    return f"records-{shard:05d}.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """What a generation was compiled from: everything by which it may later be refused."""

    layout: Mapping[str, Any]
    """ModelConfig.layout(): what gives a record's numbers their meaning."""
    weights: str
    """Hash of the weights."""
    lineage: str
    """The run that trained them."""
    step: int
    """Their step in that run."""
    references: str
    """Fingerprint of the references."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    context: str = BankContext.reference.value
    """What a reference saw when it was encoded, a `BankContext`; manifests without it are of `reference`."""
    window_tokens: int | None = None
    """Tokens of a window in context `document`."""


class Generation:
    """A published generation, opened for reading; safe to share between threads."""

    def __init__(self, manifest: Manifest) -> None:
        """Wrap an opened manifest; use `Generation.open`."""
        self.folder = manifest.folder
        self.fingerprint = manifest.fingerprint
        self.codec = str(manifest.settings["codec"])
        self.record_bytes = int(manifest.settings["record_bytes"])
        self.settings = GenerationSettings(
            layout=manifest.settings["layout"],
            lineage=manifest.settings["lineage"],
            step=manifest.settings["step"],
            context=manifest.settings.get("context", BankContext.reference.value),
            window_tokens=manifest.settings.get("window_tokens"),
            **manifest.inputs,
        )
        self.ids: Ids = _mapped_array(manifest.mapped(IDS).read_all())
        self.batch = int(manifest.settings["batch"])
        self.records_per_shard = int(manifest.settings["records_per_shard"])
        num_shards = -(-len(self.ids) // self.records_per_shard)
        self._shards = [manifest.mapped(records_file(shard)) for shard in range(num_shards)]
        num_bytes = sum(shard.size for shard in self._shards)
        if not len(self.ids) == manifest.settings["num_records"] == num_bytes / self.record_bytes:
            raise ValueError(
                f"{self.folder}: {manifest.settings['num_records']} records of {self.record_bytes} bytes are "
                f"stated, but {len(self.ids)} ids and {num_bytes} bytes found; {MAKE_ANEW}"
            )

    @classmethod
    def open(cls, folder: Path, *, expect: Mapping[str, Any] | None = None) -> "Generation":
        """Open a generation, refusing by name what was not expected; it is not swept for as long as it is open.

        Args:
            folder: `<bank>/generation-<name>`.
            expect: values that settings must have: any of layout, context, window_tokens, codec, weights,
                lineage, step, references, tokenizer.

        Raises:
            ValueError: no such generation, damaged, or another one than expected.
        """
        manifest = open_manifest(folder, kind=KIND, version=VERSION)
        found = {"context": BankContext.reference.value, **manifest.settings, **manifest.inputs}
        for key, is_value, expected in differences(found, expect or {}):
            raise ValueError(
                f"generation {folder}: {key} is {is_value}, but {expected} is expected; {MAKE_ANEW}"
            )
        descriptor = hold(folder)
        generation = cls(manifest)
        weakref.finalize(generation, os.close, descriptor)
        return generation

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id: int) -> bool:
        return bool(self.has(np.array([id]))[0])

    def has(self, ids_N: Ids) -> NDArray[np.bool_]:
        """Return for each reference whether it has a record, (N,)."""
        return self._find(ids_N)[1]

    def read(self, ids_N: Ids) -> Tensor:
        """Return the records of references, uint8 (N, record_bytes), in the order asked for.

        Raises:
            ValueError: a reference has no record, or a block of bytes is damaged.
        """
        positions_N, present_N = self._find(ids_N)
        missing = ids_N[~present_N]
        if len(missing):
            raise ValueError(
                f"generation {self.folder} holds no memory of {len(missing)} of {len(ids_N)} references "
                f"(first: {missing[0]}); {MAKE_ANEW}"
            )
        records = np.empty((len(ids_N), self.record_bytes), np.uint8)
        shards_N, places_N = np.divmod(positions_N, self.records_per_shard)
        for shard in np.unique(shards_N).tolist():
            mine = shards_N == shard
            records[mine] = self._shards[shard].rows(places_N[mine], self.record_bytes)
        return torch.from_numpy(records)

    def _find(self, ids_N: Ids) -> tuple[Ids, NDArray[np.bool_]]:
        """Return where each reference's record stands, and whether it does."""
        positions_N = np.minimum(np.searchsorted(self.ids, ids_N), len(self.ids) - 1)
        return positions_N, self.ids[positions_N] == ids_N


def _mapped_array(content: NDArray[np.uint8]) -> Ids:
    """Return the numbers of a one-dimensional .npy file without reading them into memory."""
    file = io.BytesIO(content[:4096].tobytes())
    np.lib.format.read_magic(file)
    (length,), _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.int64 or file.tell() + 8 * length != len(content):
        raise ValueError(f"{IDS} does not hold {length} numbers of type int64")
    return content[file.tell() :].view(np.int64)


def differences(found: Any, expected: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the key, the value found and the value expected of every difference; keys of mappings by dots."""
    if isinstance(expected, Mapping):
        found = found if isinstance(found, Mapping) else {}
        # What was compiled with a setting that nobody expects is another layout, too; not so at the top.
        for name in [*expected, *(found.keys() - expected.keys() if key else ())]:
            path = f"{key}.{name}" if key else name
            yield from differences(found.get(name), expected.get(name), path)
    elif found != (list(expected) if isinstance(expected, tuple) else expected):
        yield key, found, expected
