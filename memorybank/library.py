"""A library: a bank that its users keep and edit, in a folder of its own that can be copied anywhere.

    <library>/
      state-SSSSSS/            what the library held after its S-th edit
        manifest.json            settings: what it was compiled with, its parts; inputs: fingerprints of all pieces
        removed.bin              <i8, ascending: numbers of the documents that were taken out since
      text-SSSSSS-PPPP/        a segment, made for state S                      (segment.py)
      vectors-SSSSSS-PPPP/     its search vectors                               (vectors.py)
      records-SSSSSS-PPPP/     its records, a generation of the segment         (store.py, writer.py)
      index-SSSSSS-0000/       lists over the vectors of some parts, if they are many  (index_store.py)
      codec-SSSSSS-0000/       the quantiser of the records, if they have one   (quantizer.py)

Every piece is published by one rename and never changes; a state names the three pieces of each of its parts, its
indexes and its codec, by fingerprint. An index names the vectors that it was built from; those that none names are
searched exactly, and what is gone is kept from being found by a bitmap. An edit makes the pieces it needs, then
publishes the next state, again by one rename. A reader keeps the state it opened; the newest is the one of the largest
number, whatever the clocks say. Nothing points out of the folder.

Invariants: a document that was removed is found by no search and its references cannot be read; a library of other
weights, layout, tokenizer, codec or embedder than expected is refused by the setting's name; a piece that is missing,
cut short, foreign or damaged is refused by its name, at the latest when the block in question is read.

Not here: how states come about (edits.py), verification (soundness.py).
"""

import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.files import MANIFEST, Manifest, hold, open_manifest
from data.references import Citation
from memorybank import index_store, quantizer, segment, store, vectors
from memorybank.config import BankContext, IndexConfig, IndexKind
from memorybank.index import Block, IdSet
from memorybank.index_store import BankIndex, open_lists
from memorybank.segment import Segment, Segments
from memorybank.store import Generation, differences
from memorybank.vectors import Vectors

KIND, VERSION = "library", 1
REMOVED = "removed.bin"
STATE = re.compile(r"state-(\d{6,})")
PIECE = re.compile(r"(text|vectors|records|index|codec)-(\d{6,})-(\d{4,})")
"""Names of pieces: what it is, the state that it was made for, its part of it."""
_FORMATS = {
    "text": (segment.KIND, segment.VERSION),
    "vectors": (vectors.KIND, vectors.VERSION),
    "records": (store.KIND, store.VERSION),
    "index": (index_store.KIND, index_store.VERSION),
    "codec": (quantizer.KIND, quantizer.VERSION),
}

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class LibrarySettings:
    """What all records and vectors of a library were made with: everything by which it may be refused."""

    layout: Mapping[str, Any]
    """ModelConfig.layout(): what gives a record's numbers their meaning."""
    weights: str
    """Hash of the weights."""
    lineage: str
    """The run that trained them."""
    step: int
    """Their step in that run."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    codec: str
    """Codec.name."""
    embedder: str
    """Embedder.name."""
    context: str = BankContext.reference.value
    """What a reference saw when it was encoded, a `BankContext`."""
    window_tokens: int | None = None
    """Tokens of a window in context `document`."""
    index: Mapping[str, Any] = field(default_factory=lambda: stated_index(IndexConfig()))
    """What was asked of the search index: `IndexConfig` as plain JSON."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Pieces that serve several parts."""

    indexes: tuple[str, ...] = ()
    codec: str | None = None

    @property
    def pieces(self) -> tuple[str, ...]:
        """Names of their folders."""
        return self.indexes + (() if self.codec is None else (self.codec,))

    def codec_folders(self, library: Path) -> list[Path]:
        """Where the quantiser of a library's records stands; nowhere, if their codec is none."""
        return [] if self.codec is None else [library / self.codec]


@dataclass(frozen=True, slots=True)
class Part:
    """A segment with its vectors and records, as a state names them."""

    text: str
    vectors: str
    records: str
    first: int
    """Number of its first reference; all its numbers lie below the next part's."""
    documents: int
    references: int

    @property
    def pieces(self) -> tuple[str, str, str]:
        """Names of its folders."""
        return self.text, self.vectors, self.records


def settings_of(state: Manifest) -> LibrarySettings:
    """Return what the records and vectors of a state were made with."""
    found = {**state.settings, **state.inputs}
    names = (field.name for field in fields(LibrarySettings))
    return LibrarySettings(**{name: found[name] for name in names if name in found})


def shared_of(state: Manifest) -> Shared:
    """Return the pieces of a state that serve several parts; older states name one index, or none."""
    found = state.settings.get("shared", {})
    indexes = found.get("indexes", [found[key] for key in ("index",) if found.get(key)])
    return Shared(tuple(indexes), found.get("codec"))


def stated_index(config: IndexConfig) -> dict[str, Any]:
    """Return a configuration of the search index as a state keeps it."""
    return {**asdict(config), "kind": config.kind.name}


def asked_index(stated: Mapping[str, Any]) -> IndexConfig:
    """Return the configuration of the search index that a state keeps."""
    return IndexConfig(**{**stated, "kind": IndexKind[stated["kind"]]})


def open_piece(folder: Path) -> Manifest:
    """Open a piece by what its name says it is."""
    kind, version = _FORMATS[folder.name.split("-")[0]]
    return open_manifest(folder, kind=kind, version=version)


def state_folder(folder: Path, number: int) -> Path:
    """Return where a state stands."""
    return folder / f"state-{number:06d}"


def piece_folder(folder: Path, what: str, number: int, part: int) -> Path:
    """Return where a piece stands: `what` is text, vectors, records, index or codec."""
    return folder / f"{what}-{number:06d}-{part:04d}"


def state_numbers(folder: Path) -> list[int]:
    """Return the numbers of all published states, ascending.

    One without a manifest is damaged when it is newer than all others; else it is half swept, and does not count.
    """
    if not folder.is_dir():
        return []
    found = sorted(
        (int(match[1]), (path / MANIFEST).is_file())
        for path in folder.iterdir()
        if (match := STATE.fullmatch(path.name))
    )
    newest = max((number for number, whole in found if whole), default=0)
    return [number for number, whole in found if whole or number > newest]


def lists_some(index: Manifest, inputs: Mapping[str, str]) -> bool:
    """Return whether an index was built from vectors of a state (its `inputs`), and from no others of these names."""
    there = [name for name in index.inputs if name in inputs]
    return bool(there) and all(index.inputs[name] == inputs[name] for name in there)


def index_blocks(segments: Iterable[Segment], vectors: Iterable[Vectors]) -> list[Block]:
    """Return the search vectors of segments, by their references' numbers, as an index takes them."""
    return [
        (of.numbers[rows], block)
        for of, found in zip(segments, vectors, strict=True)
        for rows, block in found.blocks()
    ]


def to_name(changes: Iterable[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any, str]]:
    """What a bank was made with otherwise, each with what to do; another tokenizer first: the rest follows from it."""
    remedies = {
        "tokenizer": "its texts were cut by that one: make another bank with `memory3 bank build RUN --bank FOLDER`"
    }
    compile_it = "compile it for these weights with `memory3 bank refresh`"
    ordered = sorted(changes, key=lambda change: change[0] not in remedies)
    return [(*change, remedies.get(change[0], compile_it)) for change in ordered]


def _open_state(folder: Path, state: Path) -> Manifest:
    try:
        if not (state / MANIFEST).is_file():
            raise ValueError(f"{state / MANIFEST} is missing")
        manifest = open_manifest(state, kind=KIND, version=VERSION)
        manifest.mapped(REMOVED).read_all()
    except ValueError as problem:
        raise ValueError(
            f"{problem}. This is a state of a bank: do not delete it, since what was removed would come back; restore "
            f"it from a copy with `memory3 bank fetch COPY {folder}`"
        ) from problem
    return manifest


class Library:
    """One state of a library, opened for reading; it lasts for as long as this is open.

    Serves `data.references.ReferenceSource` and `memorybank.bank.Records`; ids are the library's reference numbers.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Wrap an opened state; use `Library.open`."""
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        stated = manifest.settings
        self.number = int(stated["number"])
        self.action = str(stated["action"])
        self.parts = [Part(**part) for part in stated["parts"]]
        self.next_reference = int(stated["next_reference"])
        """The number that the next reference gets."""
        self.record_bytes = int(stated["record_bytes"])
        self.settings = settings_of(manifest)
        self.removed: Ids = manifest.mapped(REMOVED).read_all().view(np.int64)
        self.segments = [Segment(self._piece(part.text)) for part in self.parts]
        self._texts = Segments(self.segments)
        self._vectors = [Vectors(self._piece(part.vectors)) for part in self.parts]
        self._records = [Generation(self._piece(part.records)) for part in self.parts]
        self._firsts = np.array([part.first for part in self.parts], np.int64)
        self.shared = shared_of(manifest)
        self.indexes = [self._piece(name) for name in self.shared.indexes]
        """The search indexes, each over some of the parts; no part is in two."""
        for index in self.indexes:
            if not lists_some(index, manifest.inputs):
                raise ValueError(
                    f"{index.folder} was built from other vectors than those of {manifest.folder}; "
                    "build it anew with `memory3 bank verify --fix`"
                )
        if self.shared.codec is not None:
            self._piece(self.shared.codec)
        self._refuse_mixed_pieces()

    @classmethod
    def open(
        cls, folder: Path, *, number: int | None = None, expect: Mapping[str, Any] | None = None
    ) -> "Library":
        """Open the newest state of a library, or that of a number.

        Args:
            folder: of the library.
            number: of a state.
            expect: values that settings must have (`LibrarySettings`).

        Raises:
            ValueError: there is none, a piece is damaged, or it was made with something else than expected.
        """
        while True:
            numbers = state_numbers(folder)
            if not numbers or number not in (None, *numbers):
                what = f"state {number} of a bank" if numbers else "bank"
                raise ValueError(f"there is no {what} in {folder}; make one with `memory3 bank build RUN`")
            chosen = number or numbers[-1]
            state = state_folder(folder, chosen)
            if state.is_symlink():
                raise ValueError(
                    f"{state} is a symbolic link, and a bank holds folders only; put the folder in its place"
                )
            try:
                descriptor = hold(state)
            except FileNotFoundError:  # swept between the two lines: there is a newer one
                continue
            try:
                library = cls(folder, _open_state(folder, state))
            except BaseException as problem:
                os.close(descriptor)
                standing = state_numbers(folder)
                # Swept meanwhile, since there is a newer one?
                swept = chosen not in (standing if number else standing[-1:])
                if not (swept and isinstance(problem, ValueError | OSError)):
                    raise
                continue
            library.close = weakref.finalize(library, os.close, descriptor)
            break
        found = asdict(library.settings)
        for key, is_value, expected, remedy in to_name(differences(found, expect or {})):
            library.close()
            raise ValueError(f"bank {folder}: {key} is {is_value}, but {expected} is expected; {remedy}")
        return library

    close: Callable[[], object]
    """Lets go of the state: it may be swept then. What was not read before may be gone."""

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """References that can be found."""
        count = 0
        for place, part in enumerate(self.parts):
            count += part.references - len(self._removed_ids(place))
        return count

    @property
    def num_documents(self) -> int:
        """Documents that can be found."""
        return sum(part.documents for part in self.parts) - len(self.removed)

    def live_ids(self, part: int | None = None) -> Ids:
        """Return the numbers of all references that can be found, or of those of one part."""
        places = range(len(self.parts)) if part is None else [part]
        found = [np.zeros(0, np.int64)]
        for place in places:
            numbers, removed = self.segments[place].numbers, self._removed_ids(place)
            found.append(np.setdiff1d(numbers, removed, assume_unique=True) if len(removed) else numbers)
        return np.concatenate(found)

    def live_documents(self, part: int) -> Ids:
        """Return the rows of all documents of a part that can be found."""
        return np.flatnonzero(~self.were_removed(self.segments[part].document_numbers))

    def without(self, removed: Ids) -> tuple[list[Part], Ids]:
        """Return the parts that still hold a document when these are removed, and what is removed from them."""
        bounds = [*self._firsts.tolist(), self.next_reference]
        parts, kept = [], [np.zeros(0, np.int64)]
        for place, part in enumerate(self.parts):
            first, last = np.searchsorted(removed, bounds[place : place + 2])
            if last - first < part.documents:
                parts.append(part)
                kept.append(removed[first:last])
        return parts, np.concatenate(kept)

    def were_removed(self, documents: Ids) -> NDArray[np.bool_]:
        """Return for each number of a document whether it was taken out, in the shape of `documents`."""
        if not len(self.removed):
            return np.zeros(documents.shape, np.bool_)
        # `removed` ascends, and is looked into: np.isin would go through all of it, for every chunk that is read.
        places = np.minimum(np.searchsorted(self.removed, documents), len(self.removed) - 1)
        found: NDArray[np.bool_] = self.removed[places] == documents
        return found

    def is_live(self, ids: Ids) -> NDArray[np.bool_]:
        """Return for each reference whether it is there and was not removed."""
        places, rows = self._texts.locate(ids)
        return (places >= 0) & ~self.were_removed(self._documents_at(places, rows))

    # -- ReferenceSource

    def documents_of(self, ids: Ids) -> Ids:
        """The number of each reference's document, in the shape of `ids`; -1 for what is not there."""
        return self._documents_at(*self._texts.locate(ids))

    def of_documents(self, documents: Ids) -> Ids:
        """The ids of all references of these documents, ascending; of those that can be found."""
        found = [np.zeros(0, np.int64)]
        for document in np.setdiff1d(documents, self.removed):
            (place,), (row,) = self._texts.locate(np.array([document]))
            if place >= 0:
                of = self.segments[place]
                count = int(of.documents[int(of.references[int(row)]["document"])]["references"])
                found.append(np.arange(document, document + count))
        return np.concatenate(found)

    def document_numbers(self, ids: Sequence[str]) -> Ids:
        """The numbers of documents by id; -1 where there is none that can be found."""
        return np.array([next(iter(self._numbers_of(id)), -1) for id in ids], np.int64)

    def of_source(self, label: str) -> Ids:
        """The numbers of all documents of a source that can be found, ascending."""
        found = [np.zeros(0, np.int64)]
        for of in self.segments:
            if label in of.sources:
                found.append(of.document_numbers[of.documents["source"] == of.sources.index(label)])
        return np.setdiff1d(np.concatenate(found), self.removed)

    def sources(self) -> list[str]:
        """Labels of all sources, sorted."""
        return sorted({label for of in self.segments for label in of.sources})

    def tokens(self, ids: Sequence[int] | Ids) -> tuple[Ids, Ids, Ids]:
        """The tokens of references: tokens_NR padded, lengths_N, titles_N."""
        asked = np.asarray(ids, np.int64)
        self._found(asked)
        return self._texts.tokens(asked)

    def sizes(self, ids: Ids) -> tuple[Ids, Ids]:
        """The tokens of title lines, and of the text behind them; both (N,)."""
        self._found(ids)
        return self._texts.sizes(ids)

    def content_tokens(self, reference: int) -> list[int]:
        """The tokens of a reference without its title line."""
        place, row = self._found_one(reference)
        tokens, title = self.segments[place].tokens(row)
        content: list[int] = tokens[title:].tolist()
        return content

    def text(self, reference: int) -> str:
        """Title line and text of a reference."""
        place, row = self._found_one(reference)
        return self.segments[place].text(row)

    def describe(self, reference: int) -> Citation:
        """Where a reference comes from."""
        place, row = self._found_one(reference)
        return self.segments[place].citation(row)[0]

    # -- Records, and search

    def read(self, ids_N: Ids) -> Tensor:
        """Return the records of references, uint8 (N, record_bytes), in the order asked for.

        Raises:
            ValueError: a reference is not there or was removed, or a block of bytes is damaged.
        """
        places, _ = self._found(ids_N)
        records = torch.empty((len(ids_N), self.record_bytes), dtype=torch.uint8)
        for place in np.unique(places).tolist():
            mine = places == place
            records[torch.from_numpy(mine)] = self._records[place].read(ids_N[mine])
        return records

    def read_vectors(self, ids_N: Ids) -> Floats:
        """Return the search vectors of references, (N, X)."""
        places, rows = self._found(ids_N)
        found = np.empty((len(ids_N), self._vectors[0].size), np.float32)
        for place in np.unique(places).tolist():
            mine = places == place
            found[mine] = self._vectors[place].read(rows[mine])
        return found

    def search(self, queries: Floats, k: int) -> tuple[Floats, Ids]:
        """Return the scores and ids, both (n, k), best first, of what can be found; -1 and -inf for no more.

        Exact, where there is no index; else the best of the lists' and the exact best of what is in none.
        """
        return self._opened_index.search(queries, k)

    def generation(self, part: int) -> Generation:
        """The records of a part."""
        return self._records[part]

    def vectors(self, part: int) -> Vectors:
        """The search vectors of a part."""
        return self._vectors[part]

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes on disk of text, vectors and records, this state's alone."""
        sums = dict.fromkeys(("text", "vectors", "records", "index", "codec"), 0)
        for name in self.piece_names():
            files = (file for file in (self.folder / name).iterdir() if file.is_file())
            sums[name.split("-")[0]] += sum(file.stat().st_size for file in files)
        return sums

    def piece_names(self) -> set[str]:
        """Names of all pieces of this state."""
        return {name for part in self.parts for name in part.pieces}.union(self.shared.pieces)

    @property
    def codec_folders(self) -> list[Path]:
        """Where the quantiser of the records stands; nowhere, if their codec is none."""
        return self.shared.codec_folders(self.folder)

    @property
    def num_listed(self) -> list[int]:
        """Vectors in each index, those that are gone included."""
        return [int(index.settings["num_vectors"]) for index in self.indexes]

    @property
    def unlisted(self) -> list[Part]:
        """The parts that are in no index."""
        listed = {name for index in self.indexes for name in index.inputs}
        return [part for part in self.parts if part.vectors not in listed]

    @cached_property
    def _opened_index(self) -> BankIndex:
        blocks = index_blocks(self.segments, self._vectors)
        begins = np.cumsum([0, *(part.references for part in self.parts)]).tolist()
        unlisted = self.unlisted
        exact = [
            range(begin, begin + part.references)
            for begin, part in zip(begins, self.parts, strict=False)
            if part in unlisted
        ]
        listed = [open_lists(index) for index in self.indexes]
        return BankIndex(blocks, listed=listed, exact=exact, removed=self._gone)

    @cached_property
    def _gone(self) -> IdSet | None:
        """What a search must not find: removed references, and in indexes those of parts that are gone."""
        gone = IdSet(self.next_reference)
        for place in range(len(self.parts)):
            gone.add(self._removed_ids(place))
        if self.indexes:
            begin = 0
            for of in self.segments:
                gone.add_range(begin, max(int(of.numbers[0]), begin))
                begin = int(of.numbers[-1]) + 1
            gone.add_range(begin, self.next_reference)
        return gone if gone.bits.any() else None

    def _numbers_of(self, document_id: str) -> Iterator[int]:
        for of in self.segments:
            for row in of.find(document_id):
                number = int(of.numbers[of.documents[row]["first"]])
                if not self.were_removed(np.array([number]))[0]:
                    yield number

    def _removed_ids(self, place: int) -> Ids:
        """The references of a part that belong to documents that were removed, ascending."""
        of, bounds = self.segments[place], [*self._firsts.tolist(), self.next_reference]
        first, last = np.searchsorted(self.removed, bounds[place : place + 2])
        removed = self.removed[first:last]
        if not len(removed):
            return np.zeros(0, np.int64)
        counts = of.documents["references"][np.searchsorted(of.document_numbers, removed)].astype(np.int64)
        # A document's references have consecutive numbers.
        begins = np.repeat(removed - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        ids: Ids = begins + np.arange(counts.sum())
        return ids

    def _documents_at(self, places: Ids, rows: Ids) -> Ids:
        documents = np.full(places.shape, -1, np.int64)
        for place in np.unique(places[places >= 0]).tolist():
            mine, of = places == place, self.segments[place]
            documents[mine] = of.numbers[of.documents["first"][of.references["document"][rows[mine]]]]
        return documents

    def _found(self, ids: Ids) -> tuple[Ids, Ids]:
        places, rows = self._texts.locate(ids)
        gone = (places < 0) | self.were_removed(self._documents_at(places, rows))
        if gone.any():
            raise ValueError(
                f"bank {self.folder}: {int(gone.sum())} of {len(ids)} references are not there, or were removed "
                f"(first: {ids[gone][0]})"
            )
        return places, rows

    def _found_one(self, reference: int) -> tuple[int, int]:
        places, rows = self._found(np.array([reference]))
        return int(places[0]), int(rows[0])

    def _refuse_mixed_pieces(self) -> None:
        """Refuse parts whose vectors or records were made of another text, or records made with other settings."""
        made_with = {name: getattr(self.settings, name) for name in ("weights", "context", "window_tokens")}
        restore = f"restore it from a copy with `memory3 bank fetch COPY {self.folder}`"
        for part, text, found, records in zip(
            self.parts, self.segments, self._vectors, self._records, strict=True
        ):
            made_of = {found.segment, records.settings.references, text.fingerprint}
            if len(made_of) > 1 or (len(text), text.num_documents) != (part.references, part.documents):
                raise ValueError(
                    f"{self.manifest.folder}: {', '.join(part.pieces)} do not belong together; {restore}"
                )
            for key, is_value, stated in differences(asdict(records.settings), made_with):
                raise ValueError(
                    f"{records.folder}: its {key} is {is_value}, but {stated} is that of {self.manifest.folder}; "
                    f"{restore}"
                )

    def _piece(self, name: str) -> Manifest:
        folder = self.folder / name
        if not PIECE.fullmatch(name):
            raise ValueError(
                f"{self.manifest.folder / MANIFEST} names the piece {name!r}, which is no piece's name; restore it "
                f"from a copy with `memory3 bank fetch COPY {self.folder}`"
            )
        if folder.is_symlink():
            raise ValueError(
                f"{folder} is a symbolic link, and a bank holds folders only; put the folder in its place"
            )
        try:
            manifest = open_piece(folder)
        except ValueError as problem:
            raise ValueError(f"{problem}; for a bank: `memory3 bank verify --fix`") from problem
        if manifest.fingerprint != self.manifest.inputs[name]:
            raise ValueError(
                f"{folder} is not the piece that state {self.number} names: its fingerprint is {manifest.fingerprint}, "
                f"and {self.manifest.inputs[name]} is named; see `memory3 bank verify`"
            )
        return manifest
