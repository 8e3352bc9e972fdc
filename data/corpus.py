"""The corpus on disk: every document of every source, numbered, with its text and its attributes.

An artefact folder (`files`), beside those made from it:

    corpus/
      documents-00000.jsonl   one document a line, all fields; a shard is a span of records of one source
      table.bin               `TABLE` rows, one per document, in the order of the numbers
      ids.bin                 `ID` rows sorted by hash: from an id to its number
      names.json              {"sources": [label], "groups": [name]}
      probes.jsonl            one probe a line

Invariants: numbers run from 0 in the order of the shards; ids are unique; a document that another one
requires is there. Texts are read from the memory-mapped shards when asked for, never all kept.

Not here: tokens (`shards`), where documents come from (`sources`).
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.documents import Document, Probe, Split, Use
from data.files import Manifest, MappedFile, open_manifest, write_atomic, write_json_atomic, writing

KIND = "corpus"
VERSION = 1
SPLITS = tuple(Split)
USES = tuple(Use)
STAGES = ("", "warmup", "continual")

TABLE = np.dtype(
    [
        ("shard", "<u4"),
        ("begin", "<u8"),  # first byte of its line in the shard
        ("bytes", "<u8"),  # of its line
        ("source", "<u2"),  # in names.json
        ("split", "u1"),  # in SPLITS
        ("use", "u1"),  # in USES
        ("stage", "u1"),  # in STAGES
        ("requires", "<i8"),  # number of a document, -1 = none
        ("group", "<i8"),  # in names.json, -1 = none
    ]
)
ID = np.dtype([("hash", "<u8"), ("number", "<i8")])
Table = NDArray[np.void]
Numbers = NDArray[np.int64]


class Corpus:
    """A finished corpus."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.table: Table = manifest.mapped("table.bin").read_all().view(TABLE)
        names = json.loads(manifest.text("names.json"))
        self.sources: tuple[str, ...] = tuple(names["sources"])
        self.groups: tuple[str, ...] = tuple(names["groups"])
        self._ids = manifest.mapped("ids.bin").read_all().view(ID)
        self._shards: dict[int, MappedFile] = {}

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Opens the artefact `folder`.

        Raises:
            ValueError: It is not there, or damaged.
        """
        return cls(open_manifest(folder, kind=KIND, version=VERSION))

    @property
    def num_documents(self) -> int:
        return len(self.table)

    @property
    def num_shards(self) -> int:
        return sum(name.startswith("documents-") for name in self.manifest.files)

    def document(self, number: int) -> Document:
        """The document of that number, its text included."""
        row = self.table[number]
        return _parse(self._shard(int(row["shard"])).read(int(row["begin"]), int(row["bytes"])))

    def documents(self, shard: int) -> Iterator[Document]:
        """The documents of one shard, in order."""
        return (self.document(number) for number in self.numbers(shard))

    def number(self, document_id: str) -> int:
        """The number of the document with that id.

        Raises:
            ValueError: There is none.
        """
        number = self._number(document_id)
        if number is None:
            raise ValueError(f"{self.manifest.folder}: there is no document {document_id!r}")
        return number

    def __contains__(self, document_id: str) -> bool:
        return self._number(document_id) is not None

    def numbers(self, shard: int) -> range:
        """The numbers of a shard's documents."""
        first, last = np.searchsorted(self.table["shard"], [shard, shard + 1])
        return range(int(first), int(last))

    def select(
        self,
        *,
        split: Split | None = None,
        trains: bool = False,
        refers: bool = False,
        uses: Sequence[Use] = USES,
        stage: str | None = None,
        source: str | None = None,
    ) -> Numbers:
        """The numbers of all documents that meet every condition given, ascending.

        Args:
            split: Of that split.
            trains: Only those that may be training text.
            refers: Only those that may be references.
            uses: Of one of these uses.
            stage: Only those that this stage may draw.
            source: Of that source.
        """
        table = self.table
        chosen = np.isin(table["use"], [USES.index(use) for use in uses])
        if split is not None:
            chosen &= table["split"] == SPLITS.index(split)
        if trains:
            chosen &= np.isin(table["use"], [i for i, use in enumerate(USES) if use.trains])
        if refers:
            chosen &= np.isin(table["use"], [i for i, use in enumerate(USES) if use.refers])
        if stage is not None:
            chosen &= (table["stage"] == 0) | (table["stage"] == STAGES.index(stage))
        if source is not None:
            chosen &= table["source"] == self.sources.index(source)
        return np.flatnonzero(chosen).astype(np.int64)

    def probes(self) -> list[Probe]:
        """All probes, of both held-out splits."""
        return [
            Probe(**{**record, "split": Split(record["split"])})
            for record in map(json.loads, self.manifest.text("probes.jsonl").split("\n")[:-1])
        ]

    def _number(self, document_id: str) -> int | None:
        wanted = hash_id(document_id)
        first = int(np.searchsorted(self._ids["hash"], np.uint64(wanted)))
        for row in self._ids[first:]:
            if int(row["hash"]) != wanted:
                break
            if self.document(int(row["number"])).id == document_id:
                return int(row["number"])
        return None

    def _shard(self, shard: int) -> MappedFile:
        if shard not in self._shards:
            self._shards[shard] = self.manifest.mapped(_shard_name(shard))
        return self._shards[shard]


def has_shard(work: Path, shard: int) -> bool:
    """Whether `write_shard` finished this shard, perhaps in an earlier life."""
    return (work / _part_name(shard)).is_file()


def write_shard(work: Path, shard: int, documents: Iterable[Document]) -> None:
    """Writes one shard of texts into the work folder, and beside it what `finish` needs to know of them."""
    rows, ids, groups, requires = [], [], [], []
    begin = 0
    with writing(work / _shard_name(shard)) as file:
        for document in documents:
            if document.stage not in STAGES:
                raise ValueError(
                    f"document {document.id!r}: its stage {document.stage!r} is none of {STAGES}"
                )
            line = (json.dumps(asdict(document), ensure_ascii=False, default=_plain) + "\n").encode()
            file.write(line)
            row = np.zeros((), dtype=TABLE)
            row["shard"], row["begin"], row["bytes"] = shard, begin, len(line)
            row["split"], row["use"] = SPLITS.index(document.split), USES.index(document.use)
            row["stage"] = STAGES.index(document.stage)
            rows.append(row)
            ids.append(hash_id(document.id))
            groups.append(document.group)
            requires.append(document.requires)
            begin += len(line)
    part = io.BytesIO()
    np.savez(
        part,
        table=np.array(rows, dtype=TABLE),
        ids=np.array(ids, dtype=np.uint64),
        groups=np.array(groups, dtype=np.str_),
        requires=np.array(requires, dtype=np.str_),
    )
    write_atomic(work / _part_name(shard), part.getvalue())


def finish(work: Path, *, shards: Sequence[str], probes: Sequence[Probe]) -> int:
    """Completes a work folder whose shards are all written, and returns the number of documents.

    Args:
        work: The folder given to `write_shard`.
        shards: The source of each shard.
        probes: Stored beside the documents.

    Raises:
        ValueError: No documents, two with one id, or one that requires, or is asked about, but is not there.
    """
    sources = list(dict.fromkeys(shards))
    tables, hashes = [], []
    required: dict[int, str] = {}
    group_numbers: dict[str, int] = {}
    count = 0
    for shard, source in enumerate(shards):
        with np.load(work / _part_name(shard)) as part:
            table, groups, requires = part["table"].copy(), part["groups"].tolist(), part["requires"].tolist()
            hashes.append(part["ids"])
        table["source"] = sources.index(source)
        table["group"] = [
            group_numbers.setdefault(group, len(group_numbers)) if group else -1 for group in groups
        ]
        required.update({count + i: wanted for i, wanted in enumerate(requires) if wanted})
        tables.append(table)
        count += len(table)
    if count == 0:
        raise ValueError("the corpus is empty: no record is left; give sources with text, or lower min_chars")
    table = np.concatenate(tables)
    ids = np.zeros(count, dtype=ID)
    ids["hash"], ids["number"] = np.concatenate(hashes), np.arange(count)
    ids.sort(order=["hash", "number"])

    def document(number: int) -> Document:
        with (work / _shard_name(int(table[number]["shard"]))).open("rb") as file:
            file.seek(int(table[number]["begin"]))
            return _parse(file.read(int(table[number]["bytes"])))

    def number(document_id: str, asker: str) -> int:
        first = int(np.searchsorted(ids["hash"], np.uint64(hash_id(document_id))))
        if first < count and int(ids["hash"][first]) == hash_id(document_id):
            return int(ids["number"][first])
        raise ValueError(f"{asker} needs the document {document_id!r}, which is not in the corpus; add it")

    for i in np.flatnonzero(ids["hash"][1:] == ids["hash"][:-1]):
        one, other = document(int(ids["number"][i])), document(int(ids["number"][i + 1]))
        if one.id == other.id:
            raise ValueError(
                f"two documents have the id {one.id!r} (sources {one.source!r} and {other.source!r}); "
                "ids must be unique: choose another id_field, or leave it null to number the records"
            )
    table["requires"] = -1
    for asker, wanted in required.items():
        table["requires"][asker] = number(wanted, document(asker).id)
    for probe in probes:
        number(probe.document, f"the probe {probe.id!r}")
    write_atomic(work / "table.bin", table.tobytes())
    write_atomic(work / "ids.bin", ids.tobytes())
    write_json_atomic(work / "names.json", {"sources": sources, "groups": list(group_numbers)})
    lines = (json.dumps(asdict(probe), ensure_ascii=False, default=_plain) + "\n" for probe in probes)
    write_atomic(work / "probes.jsonl", "".join(lines).encode())
    for shard in range(len(shards)):
        (work / _part_name(shard)).unlink()
    return count


def _shard_name(shard: int) -> str:
    return f"documents-{shard:05d}.jsonl"


def _part_name(shard: int) -> str:
    return f"part-{shard:05d}.npz"


def hash_id(document_id: str) -> int:
    """64 bits of a document's id, by which it is looked up; the id itself is compared afterwards."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "little")


def _plain(value: object) -> Any:
    assert isinstance(value, Enum)
    return value.value


def _parse(line: bytes | NDArray[np.uint8]) -> Document:
    record = json.loads(bytes(line))
    return Document(**{**record, "split": Split(record["split"]), "use": Use(record["use"])})
