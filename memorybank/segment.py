"""A part of a library that never changes: documents, their text, and the references they were cut into.

    <library>/text-SSSSSS-PPPP/      made for state S, its part P
      manifest.json    settings: origin (of the documents), part, reference_tokens, pad_id, vocab_size;
                       inputs: tokenizer
      documents.jsonl  one document a line: id, title, source, licence, text
      documents.bin    `DOCUMENTS` rows, one per document
      sources.json     labels of the sources
      hashes.bin       <u8, ascending: hashes of the ids
      by_hash.bin      <u4: the document row of each hash
      numbers.bin      <i8, ascending: the number of each reference
      references.bin   `REFERENCES` rows, one per reference
      tokens.bin       title line and tokens of each reference; uint16, or uint32 for a large vocabulary

A document's number is that of its first reference; its references stand together, in the order of its text, and
have consecutive numbers. Numbers are given once: a document that is put in again has others.

Invariants: a segment points nowhere else, not even into the corpus it came from; nothing but small tables is ever
read whole, and those are maps.

`Segments` are several, read by the numbers of their references.

Not here: search vectors (vectors.py), records (store.py), which segments make a library (library.py).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.corpus import hash_id
from data.documents import Document, Split, Use
from data.files import Manifest, MappedFile, is_finished, publishing, write_atomic, write_json_atomic, writing
from data.references import Citation, Cutter
from data.shards import token_dtype
from data.tokenizer import Tokenizer

KIND, VERSION = "segment", 1
DOCUMENTS = np.dtype(
    [
        ("begin", "<u8"),  # first byte of its line
        ("bytes", "<u8"),  # of its line
        ("first", "<u4"),  # row of its first reference
        ("references", "<u4"),
        ("source", "<u2"),  # in sources.json
    ]
)
REFERENCES = np.dtype(
    [
        ("document", "<u4"),  # row of its document
        ("begin", "<u8"),  # first token
        ("length", "<u2"),  # tokens, title line included
        ("title", "<u2"),  # tokens of the title line
        ("char_begin", "<u4"),  # span in the characters of the document's text
        ("char_end", "<u4"),
    ]
)

Ids = NDArray[np.int64]
Tokens = NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class Passage:
    """A reference of a document: its tokens, title line first, and the characters of the text it covers."""

    tokens: Tokens
    title: int
    char_begin: int
    char_end: int


@dataclass(frozen=True, slots=True)
class CutDocument:
    """A document with the references it was cut into."""

    document: Document
    passages: Sequence[Passage]


class DocumentCutter:
    """Documents to references: the tokenizer of a corpus, and the rules by which its documents were cut."""

    def __init__(self, tokenizer: Tokenizer, reference_tokens: int) -> None:
        """Cut into references of at most `reference_tokens` tokens, title line included."""
        self._tokenizer = tokenizer
        self._cutter = Cutter(tokenizer, reference_tokens)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self.fingerprint = tokenizer.fingerprint
        self.settings = {
            "reference_tokens": reference_tokens,
            "pad_id": tokenizer.pad_id,
            "vocab_size": tokenizer.vocab_size,
        }
        """What a segment states of how it was cut."""

    def cut(self, document: Document, tokens: Tokens | None = None, title_length: int = 0) -> CutDocument:
        """Cut a document.

        Args:
            document: with its text.
            tokens: all of it, where known: <s>, title line, text.
            title_length: tokens of that title line.

        Raises:
            ValueError: the document has no text.
        """
        if tokens is None:
            title_tokens = self._tokenizer.encode(f"{document.title}\n") if document.title else []
            text_tokens = self._tokenizer.encode(document.text)
            tokens = np.array([self._tokenizer.bos_id, *title_tokens, *text_tokens], self._dtype)
            title_length = len(title_tokens)
        passages = []
        for row in self._cutter.cut(tokens, title_length):
            title = int(row["title"])
            line = tokens[:0]
            if title:  # one that was cut short keeps its newline
                line = np.append(tokens[1:title], np.array(self._tokenizer.newline_id, tokens.dtype))
            content = tokens[int(row["begin"]) : int(row["end"])]
            span = int(row["char_begin"]), int(row["char_end"])
            passages.append(Passage(np.concatenate([line, content]), title, *span))
        if not passages:
            raise ValueError(f"document {document.id!r} has no text: a bank holds text; leave it out")
        return CutDocument(document, passages)


def write_segment(
    folder: Path,
    documents: Iterator[tuple[int, CutDocument]],
    *,
    tokenizer: str,
    settings: Mapping[str, Any],
    max_references: int,
) -> None:
    """Publish the next documents as a segment: as many as reach `max_references`, or all that are left.

    A segment that stands there already, of the same settings, is left as it is: its documents are drawn all the same.

    Args:
        folder: of the segment.
        documents: their numbers, ascending, and themselves; left where the segment ends.
        tokenizer: its fingerprint.
        settings: all that decides which documents come, besides reference_tokens, pad_id and vocab_size.
        max_references: the segment ends with the document that reaches it.
    """
    identity: dict[str, Any] = {
        "kind": KIND,
        "version": VERSION,
        "settings": {**settings, "max_references": max_references},
        "inputs": {"tokenizer": tokenizer},
    }
    if is_finished(folder, **identity):
        num_references = 0
        while num_references < max_references and (found := next(documents, None)) is not None:
            num_references += len(found[1].passages)
        return
    with publishing(folder, **identity) as work:
        _write_files(work, documents, token_dtype(settings["vocab_size"]), max_references)


def _write_files(
    work: Path,
    documents: Iterator[tuple[int, CutDocument]],
    dtype: np.dtype[np.unsignedinteger],
    max_references: int,
) -> None:
    document_rows: list[tuple[int, ...]] = []
    reference_rows: list[tuple[int, ...]] = []
    numbers: list[int] = []
    hashes: list[int] = []
    sources: dict[str, int] = {}
    num_bytes = num_tokens = 0
    with writing(work / "documents.jsonl") as lines, writing(work / "tokens.bin") as tokens:
        while len(numbers) < max_references and (found := next(documents, None)) is not None:
            number, (document, passages) = found[0], (found[1].document, found[1].passages)
            line = _line(document)
            lines.write(line)
            source = sources.setdefault(document.source, len(sources))
            document_rows.append((num_bytes, len(line), len(numbers), len(passages), source))
            hashes.append(hash_id(document.id))
            num_bytes += len(line)
            for passage in passages:
                length = len(passage.tokens)
                tokens.write(passage.tokens.astype(dtype, copy=False).tobytes())
                span = (passage.char_begin, passage.char_end)
                reference_rows.append((len(document_rows) - 1, num_tokens, length, passage.title, *span))
                num_tokens += length
            numbers.extend(range(number, number + len(passages)))
    hashed = np.array(hashes, np.uint64)
    by_hash = np.argsort(hashed, kind="stable")
    write_atomic(work / "documents.bin", np.array(document_rows, DOCUMENTS).tobytes())
    write_atomic(work / "references.bin", np.array(reference_rows, REFERENCES).tobytes())
    write_atomic(work / "numbers.bin", np.array(numbers, np.int64).tobytes())
    write_atomic(work / "hashes.bin", hashed[by_hash].tobytes())
    write_atomic(work / "by_hash.bin", by_hash.astype("<u4").tobytes())
    write_json_atomic(work / "sources.json", list(sources))


def _line(document: Document) -> bytes:
    names = ("id", "title", "source", "licence", "text")
    return (json.dumps({name: getattr(document, name) for name in names}, ensure_ascii=False) + "\n").encode()


class Segment:
    """A published segment, opened for reading; rows count its documents, or its references, from 0."""

    def __init__(self, manifest: Manifest) -> None:
        """Wrap an opened manifest."""
        self.manifest = manifest
        self.folder = manifest.folder
        self.fingerprint = manifest.fingerprint
        self.reference_tokens = int(manifest.settings["reference_tokens"])
        self._pad_id = int(manifest.settings["pad_id"])
        self._dtype = token_dtype(int(manifest.settings["vocab_size"]))
        self.num_documents = self._rows_of("documents.bin", DOCUMENTS)
        self.num_references = self._rows_of("references.bin", REFERENCES)
        if (
            not self.num_references
            == self._rows_of("numbers.bin", np.dtype(np.int64))
            >= self.num_documents
            == self._rows_of("hashes.bin", np.dtype(np.uint64))
        ):
            raise ValueError(
                f"{self.folder}: its tables do not fit together; restore it with `memory3 bank fetch`"
            )

    def __len__(self) -> int:
        return self.num_references

    @cached_property
    def numbers(self) -> Ids:
        """The number of each reference, ascending."""
        return self._mapped("numbers.bin").read_all().view(np.int64)

    @cached_property
    def documents(self) -> NDArray[np.void]:
        """`DOCUMENTS` rows."""
        return self._mapped("documents.bin").read_all().view(DOCUMENTS)

    @cached_property
    def references(self) -> NDArray[np.void]:
        """`REFERENCES` rows."""
        return self._mapped("references.bin").read_all().view(REFERENCES)

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """Hashes of the documents' ids, ascending."""
        return self._mapped("hashes.bin").read_all().view(np.uint64)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Labels of the sources."""
        return tuple(json.loads(self.manifest.text("sources.json")))

    @property
    def document_numbers(self) -> Ids:
        """The number of each document, ascending."""
        numbers: Ids = self.numbers[self.documents["first"]]
        return numbers

    def document(self, row: int) -> Document:
        """A document, its text included."""
        found = self.documents[row]
        line = self._mapped("documents.jsonl").read(int(found["begin"]), int(found["bytes"]))
        return _document(bytes(line))

    def find(self, document_id: str) -> list[int]:
        """The rows of all documents with this id (one, unless a library removed it and took it in again)."""
        wanted = np.uint64(hash_id(document_id))
        first, last = np.searchsorted(self.hashes, wanted), np.searchsorted(self.hashes, wanted, "right")
        return [row for row in self._by_hash(int(first), int(last)) if self.document(row).id == document_id]

    def repeated_ids(self) -> Iterator[str]:
        """Yield ids that stand here more than once."""
        for place in np.flatnonzero(self.hashes[1:] == self.hashes[:-1]).tolist():
            one, other = (self.document(row).id for row in self._by_hash(place, place + 2))
            if one == other:
                yield one

    def shared_ids(self, other: "Segment") -> Iterator[tuple[str, int, int]]:
        """Yield every id that stands in both, with its document's row here and there."""
        common = np.flatnonzero(np.isin(self.hashes, other.hashes))
        for place in common.tolist():
            (row,) = self._by_hash(place, place + 1)
            document_id = self.document(row).id
            for other_row in other.find(document_id):
                yield document_id, row, other_row

    def tokens(self, row: int) -> tuple[Tokens, int]:
        """The tokens of a reference, title line first, and how many of them the title line is."""
        found = self.references[row]
        size = self._dtype.itemsize
        content = self._mapped("tokens.bin").read(size * int(found["begin"]), size * int(found["length"]))
        return content.view(self._dtype), int(found["title"])

    def padded(self, rows: Sequence[int] | Ids) -> tuple[Ids, Ids, Ids]:
        """tokens_NR padded to `reference_tokens`, lengths_N, titles_N of references."""
        tokens_NR = np.full((len(rows), self.reference_tokens), self._pad_id, np.int64)
        lengths_N, titles_N = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        for place, row in enumerate(rows):
            tokens, titles_N[place] = self.tokens(int(row))
            lengths_N[place] = len(tokens)
            tokens_NR[place, : len(tokens)] = tokens
        return tokens_NR, lengths_N, titles_N

    def bounds(self, rows: Ids) -> tuple[Ids, Ids]:
        """The row of the first reference of each one's document, and the one after its last."""
        of = self.documents[self.references["document"][rows]]
        firsts = of["first"].astype(np.int64)
        return firsts, firsts + of["references"]

    def sizes(self, rows: Ids) -> tuple[Ids, Ids]:
        """The tokens of title lines, and of the text behind them."""
        found = self.references[rows]
        titles = found["title"].astype(np.int64)
        return titles, found["length"] - titles

    def passage(self, first: int, last: int) -> Ids:
        """The tokens of a document's references `first` to `last` as one text behind one title line."""
        found = [self.tokens(row) for row in range(first, last + 1)]
        title_line = found[0][0][: found[0][1]]
        return np.concatenate([title_line, *(tokens[title:] for tokens, title in found)]).astype(np.int64)

    def citation(self, row: int) -> tuple[Citation, str]:
        """Where a reference comes from, and the text it covers, without its title line."""
        found = self.references[row]
        document = self._cached_document(int(found["document"]))
        begin, end = int(found["char_begin"]), int(found["char_end"])
        cited = Citation(document.id, begin, end, document.title, document.source, document.licence)
        return cited, document.text[begin:end]

    def text(self, row: int) -> str:
        """Title line and text of a reference: what is embedded."""
        cited, text = self.citation(row)
        return f"{cited.title}\n{text}" if cited.title else text

    def cut_document(self, row: int) -> tuple[int, CutDocument]:
        """A document's number, and the document as it was cut."""
        found = self.documents[row]
        first, count = int(found["first"]), int(found["references"])
        passages = []
        for reference in range(first, first + count):
            tokens, title = self.tokens(reference)
            span = self.references[reference]
            passages.append(Passage(tokens, title, int(span["char_begin"]), int(span["char_end"])))
        return int(self.numbers[first]), CutDocument(self.document(row), passages)

    def _by_hash(self, first: int, last: int) -> list[int]:
        rows: list[int] = self._mapped("by_hash.bin").read(4 * first, 4 * (last - first)).view("<u4").tolist()
        return rows

    def _cached_document(self, row: int) -> Document:
        # References of a document are read in a row.
        if self._last is None or self._last[0] != row:
            self._last = (row, self.document(row))
        return self._last[1]

    _last: tuple[int, Document] | None = None

    def _mapped(self, name: str) -> MappedFile:
        if name not in self._files:
            self._files[name] = self.manifest.mapped(name)
        return self._files[name]

    @cached_property
    def _files(self) -> dict[str, MappedFile]:
        return {}

    def _rows_of(self, name: str, dtype: np.dtype[Any]) -> int:
        return self._mapped(name).size // dtype.itemsize


class Segments:
    """The references of segments by number, whether or not a state names them (`windows.Passages`)."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        """Take segments whose numbers ascend through all of them."""
        self._segments = segments
        self._begins = np.cumsum([0, *map(len, segments)])
        self._firsts = np.array([int(of.numbers[0]) for of in segments], np.int64)
        self.reference_tokens = segments[0].reference_tokens

    def __len__(self) -> int:
        return int(self._begins[-1])

    def ids(self, rows: Ids) -> Ids:
        """The numbers of rows, which count the references through all segments."""
        places = np.searchsorted(self._begins, rows, side="right") - 1
        found = [
            self._segments[place].numbers[row - self._begins[place]]
            for place, row in zip(places.tolist(), rows.tolist(), strict=True)
        ]
        return np.array(found, np.int64)

    def locate(self, ids: Ids) -> tuple[Ids, Ids]:
        """The segment of each reference and its row there, in the shape of `ids`; -1 where there is none."""
        places = np.searchsorted(self._firsts, ids, side="right") - 1
        rows = np.full(ids.shape, -1, np.int64)
        for place in np.unique(places[places >= 0]).tolist():
            mine = places == place
            numbers = self._segments[place].numbers
            found = np.minimum(np.searchsorted(numbers, ids[mine]), len(numbers) - 1)
            rows[mine] = np.where(numbers[found] == ids[mine], found, -1)
        return np.where(rows >= 0, places, -1), rows

    def tokens(self, ids: Sequence[int] | Ids) -> tuple[Ids, Ids, Ids]:
        """The tokens of references: tokens_NR padded, lengths_N, titles_N."""
        asked = np.asarray(ids, np.int64)
        tokens_NR = np.zeros((len(asked), self.reference_tokens), np.int64)
        lengths_N, titles_N = np.zeros(len(asked), np.int64), np.zeros(len(asked), np.int64)
        for of, mine, rows in self._each(asked):
            tokens_NR[mine], lengths_N[mine], titles_N[mine] = of.padded(rows)
        return tokens_NR, lengths_N, titles_N

    def bounds(self, ids: Ids) -> tuple[Ids, Ids]:
        """The first reference of each one's document, and the one after its last."""
        firsts_N, ends_N = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        for of, mine, rows in self._each(ids):
            firsts, ends = of.bounds(rows)
            firsts_N[mine] = of.numbers[firsts]
            ends_N[mine] = firsts_N[mine] + ends - firsts
        return firsts_N, ends_N

    def sizes(self, ids: Ids) -> tuple[Ids, Ids]:
        """The tokens of title lines, and of the text behind them."""
        titles_N, lengths_N = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        for of, mine, rows in self._each(ids):
            titles_N[mine], lengths_N[mine] = of.sizes(rows)
        return titles_N, lengths_N

    def passage(self, first: int, last: int) -> Ids:
        """The tokens of a document's references `first` to `last` as one text behind one title line."""
        of, row = self._one(first)
        return of.passage(row, row + last - first)

    def content(self, id: int) -> str:
        """The text of a reference without its title line."""
        of, row = self._one(id)
        return of.citation(row)[1]

    def _each(self, ids: Ids) -> Iterator[tuple[Segment, NDArray[np.bool_], Ids]]:
        """Yield each segment that holds some of the references, which these are, and their rows."""
        places, rows = self.locate(ids)
        assert (places >= 0).all(), "references that are there"
        for place in np.unique(places).tolist():
            mine = places == place
            yield self._segments[place], mine, rows[mine]

    def _one(self, id: int) -> tuple[Segment, int]:
        ((of, _, rows),) = self._each(np.array([id]))
        return of, int(rows[0])


def _document(line: bytes) -> Document:
    return Document(**json.loads(line), split=Split.train, use=Use.reference)
