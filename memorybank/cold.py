"""Cold start: a reference is encoded when it is first read, and its record is kept on disk (paper, section 3.1).

    <bank>/cold-<weights>-<fingerprint of the manifest>/
      manifest.json   settings: those of a generation, codec, record_bytes, batch
      records.bin     records, one behind the other, in the order in which they were first read
      entries.bin     for each record 16 bytes: `ENTRY`

Both binary files only grow, under a lock that one process holds at a time. Records are on disk before the entries that
name them are written: a process that dies on the way leaves bytes that no entry names, or part of an entry, and the
next writer writes over them.

Invariants: a record is read only through a whole entry, and equals its checksum at every read; a store is of one set of
weights, layout, codec, context and references, which its name states; a reference stands in it once.

Growth: a record for each distinct reference that these weights ever read, never more than `bank build` would write, up
to a limit; what is beyond it is encoded whenever it is read. Whoever begins a store deletes those of other weights that
no process has open, so that a run has one.

Not here: banks that are compiled before they are read (store.py, library.py).
"""

import fcntl
import json
import logging
import os
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.files import MANIFEST, delete_artefact, fingerprint, hold, is_held, write_json_atomic
from data.references import ReferenceTokens
from memorybank.codec import Codec
from memorybank.store import GenerationSettings
from memorybank.writer import Encode, encode_records

log = logging.getLogger(__name__)

KIND, VERSION = "cold", 1
RECORDS, ENTRIES = "records.bin", "entries.bin"
ENTRY = np.dtype([("reference", "<i8"), ("record_crc32", "<u4"), ("entry_crc32", "<u4")])
"""The reference of a record, its checksum, and that of the twelve bytes before."""
BATCH = 16
"""References encoded at once; batches are full, so that what is kept does not depend on who asked for it with whom."""
KEPT_AT_ONCE = 256
"""References encoded between two appends: what a kill costs at most."""

Ids = NDArray[np.int64]


class ColdRecords:
    """Records that were kept, opened for reading and appending; not to be shared between threads."""

    def __init__(self, folder: Path, *, max_bytes: int = 0) -> None:
        """Open what stands in `folder`; use `ColdRecords.obtain` for writing.

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: It holds none, or it is damaged.
        """
        self.folder = folder
        descriptors = [hold(folder)]  # before anything is read: from now on nobody deletes it
        self.close = weakref.finalize(self, _close, descriptors)
        try:
            stored = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self.settings: dict[str, Any] = stored["settings"]
            self.record_bytes = int(self.settings["record_bytes"])
            format_ = (stored["kind"], stored["version"])
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise ValueError(
                f"{folder / MANIFEST} cannot be read ({problem!r}); {_remedy(folder)}"
            ) from problem
        if format_ != (KIND, VERSION):
            raise ValueError(f"{folder} is {format_}, but {(KIND, VERSION)} is read here; {_remedy(folder)}")
        self._capacity = max_bytes // self.record_bytes
        for name in (RECORDS, ENTRIES):
            descriptors.append(os.open(folder / name, os.O_RDWR))
        _, self._records, self._entries = descriptors
        self._known_N = np.empty(0, ENTRY)
        self._order_N = np.empty(0, np.int64)
        self._refresh()

    @classmethod
    def obtain(
        cls, bank: Path, settings: GenerationSettings, codec: Codec, *, max_bytes: int
    ) -> "ColdRecords":
        """Open the store of some weights below `bank`, or begin it; those of other weights then go.

        Raises:
            OSError: It cannot be written.
        """
        stated = {**asdict(settings), "codec": codec.name, "record_bytes": codec.record_bytes, "batch": BATCH}
        identity = json.loads(json.dumps({"kind": KIND, "version": VERSION, "settings": stated}))
        mine = f"{KIND}-{settings.weights}-"
        folder = bank / f"{mine}{fingerprint(identity)}"
        if not (folder / MANIFEST).exists():
            for other in stores(bank):
                if not other.name.startswith(mine) and not is_held(other):
                    log.info("%s is of other weights, and nobody reads it: deleted", other)
                    delete_artefact(other)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / RECORDS).open("ab") as records, (folder / ENTRIES).open("ab") as entries:
                fcntl.flock(entries, fcntl.LOCK_EX)
                if not (folder / MANIFEST).exists():  # nobody else began it meanwhile
                    records.truncate(0)
                    entries.truncate(0)
                    write_json_atomic(folder / MANIFEST, identity)
        try:
            opened = cls(folder, max_bytes=max_bytes)
        except (ValueError, FileNotFoundError):
            if (folder / MANIFEST).exists():
                raise
            # A process of other weights has just deleted it, before it was held.
            return cls.obtain(bank, settings, codec, max_bytes=max_bytes)
        if opened.settings != identity["settings"]:
            raise ValueError(f"{folder / MANIFEST} is not what the folder is named after; {_remedy(folder)}")
        return opened

    def __len__(self) -> int:
        return len(self._known_N)

    @property
    def room(self) -> int:
        """Records that may still be kept."""
        return max(0, self._capacity - len(self))

    def has(self, ids_N: Ids) -> NDArray[np.bool_]:
        """Return for each reference whether its record is kept, (N,)."""
        return self._rows(ids_N) >= 0

    def read(self, ids_N: Ids) -> Tensor:
        """Return the records of references that are kept, uint8 (N, record_bytes).

        Raises:
            ValueError: A record differs from its checksum.
        """
        records = np.empty((len(ids_N), self.record_bytes), np.uint8)
        for out, row in zip(records, self._rows(ids_N).tolist(), strict=True):
            assert row >= 0
            content = os.pread(self._records, self.record_bytes, row * self.record_bytes)
            if zlib.crc32(content) != self._known_N[row]["record_crc32"]:
                raise ValueError(
                    f"{self.folder / RECORDS}: record {row}, of reference {self._known_N[row]['reference']}, is "
                    f"damaged: its checksum differs from the one in {ENTRIES}; {_remedy(self.folder)}"
                )
            out[:] = np.frombuffer(content, np.uint8)
        return torch.from_numpy(records)

    def keep(self, ids_N: Ids, make: Callable[[Ids], Tensor]) -> None:
        """Append the records of references that nobody kept so far; one process at a time makes them.

        Args:
            ids_N: Distinct references.
            make: Encodes those that are missing.

        Raises:
            OSError: They cannot be written; what was kept before is as it was.
        """
        with self._only_writer():
            missing = ids_N[~self.has(ids_N)]
            if len(missing):
                records = make(missing).contiguous().numpy()
                entries = np.zeros(len(missing), ENTRY)
                entries["reference"] = missing
                entries["record_crc32"] = [zlib.crc32(record.data) for record in records]
                entries["entry_crc32"] = [_entry_crc32(entry) for entry in entries]
                _write_from(self._records, len(self) * self.record_bytes, records.tobytes())
                _write_from(self._entries, len(self) * ENTRY.itemsize, entries.tobytes())
                self._refresh()

    def _rows(self, ids_N: Ids) -> Ids:
        """Return where each reference's record stands; -1 where it is not kept."""
        if not len(self):
            return np.full(len(ids_N), -1, np.int64)
        places_N = np.searchsorted(self._known_N["reference"], ids_N, sorter=self._order_N)
        rows_N = self._order_N[np.minimum(places_N, len(self) - 1)]
        return np.where(self._known_N["reference"][rows_N] == ids_N, rows_N, -1)

    def _refresh(self) -> None:
        """Learn of what was appended, by others too."""
        begin = len(self) * ENTRY.itemsize
        content = os.pread(self._entries, max(0, os.fstat(self._entries).st_size - begin), begin)
        entries = np.frombuffer(content[: len(content) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)
        whole = [_entry_crc32(entry) == entry["entry_crc32"] for entry in entries]
        count = whole.index(False) if False in whole else len(whole)
        if count < len(whole):
            log.warning(
                "%s: %d entries from entry %d on are not whole and count for nothing; what they named is encoded again",
                self.folder / ENTRIES,
                len(whole) - count,
                len(self) + count,
            )
        if count:
            self._known_N = np.concatenate([self._known_N, entries[:count]])
            self._order_N = np.argsort(self._known_N["reference"], kind="stable")

    @contextmanager
    def _only_writer(self) -> Iterator[None]:
        """Wait for the lock, which the kernel frees when its holder dies; then learn of what was appended meanwhile."""
        fcntl.flock(self._entries, fcntl.LOCK_EX)
        try:
            self._refresh()
            yield
        finally:
            fcntl.flock(self._entries, fcntl.LOCK_UN)


class ColdStart:
    """Records of references, encoded when first read and kept (`bank.Records`).

    References pass through the codec in either case, so that a warm and a cold start read the same numbers.
    """

    def __init__(
        self,
        kept: ColdRecords | None,
        encode: Encode,
        references: ReferenceTokens,
        codec: Codec,
        *,
        window_tokens: int | None = None,
    ) -> None:
        """Encode what is not kept, in the context that the store's settings state; None keeps nothing."""
        self._kept = kept
        self._encode = encode
        self._references = references
        self._codec = codec
        self._window_tokens = window_tokens
        self._said_full = False

    def compile(self, ids_N: Ids, *, progress: Callable[[int], None] = lambda _: None) -> None:
        """Encode and keep what will be read, as far as there is room.

        Args:
            ids_N: Any references.
            progress: Is told how many more of the distinct ones are settled.
        """
        if self._kept is None:
            return
        ids_N = np.unique(ids_N)
        missing_N = ids_N[~self._kept.has(ids_N)]
        progress(len(ids_N) - len(missing_N))
        for begin in range(0, len(missing_N), KEPT_AT_ONCE):
            part = missing_N[begin : begin + KEPT_AT_ONCE]
            try:
                self._kept.keep(part[: self._kept.room], self._made)
            except OSError as problem:
                raise ValueError(
                    f"{self._kept.folder} cannot be written: {problem}; make room, or delete it: its memories are "
                    "encoded again when they are next read"
                ) from problem
            progress(len(part))
            if not self._kept.room and not self._kept.has(part).all():
                self._say_full(self._kept)
                return

    def read(self, ids_N: Ids) -> Tensor:
        """Return the records of references, uint8 (N, record_bytes), on the CPU."""
        self.compile(ids_N)
        kept_N = np.zeros(len(ids_N), np.bool_) if self._kept is None else self._kept.has(ids_N)
        records = torch.empty((len(ids_N), self._codec.record_bytes), dtype=torch.uint8)
        if self._kept is not None:
            records[torch.from_numpy(kept_N)] = self._kept.read(ids_N[kept_N])
        if not kept_N.all():
            others_n, inverse = np.unique(ids_N[~kept_N], return_inverse=True)
            records[torch.from_numpy(~kept_N)] = self._made(others_n)[torch.from_numpy(inverse)]
        return records

    def _made(self, ids_N: Ids) -> Tensor:
        return encode_records(
            self._encode, self._references, ids_N, self._codec, batch=BATCH, window_tokens=self._window_tokens
        )

    def _say_full(self, kept: ColdRecords) -> None:
        if not self._said_full:
            self._said_full = True
            log.warning(
                "%s is full with %s memories: what it lacks is encoded whenever it is read; raise bank.cold_gib in the "
                "run's config.yaml, or make a bank with `memory3 bank build`",
                kept.folder,
                f"{len(kept):,}",
            )


def stores(bank: Path) -> list[Path]:
    """Folders of all stores below `bank`, of whatever weights."""
    return sorted(path.parent for path in bank.glob(f"{KIND}-*/{MANIFEST}"))


def opened_stores(bank: Path) -> Iterator[ColdRecords]:
    """All stores below `bank`; damaged ones are named and passed over, as are those that go meanwhile."""
    for folder in stores(bank):
        try:
            yield ColdRecords(folder)
        except (ValueError, FileNotFoundError) as problem:
            if (folder / MANIFEST).exists():
                log.warning("%s", problem)


def _entry_crc32(entry: Any) -> int:
    return zlib.crc32(entry.tobytes()[:12])


def _write_from(descriptor: int, offset: int, content: bytes) -> None:
    """Write over whatever stands from `offset` on; it is on disk when this returns."""
    os.ftruncate(descriptor, offset)
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
    os.fsync(descriptor)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _remedy(folder: Path) -> str:
    return f"delete {folder}: its memories are encoded again when they are next read"
