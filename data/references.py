"""References: documents cut into pieces of at most 128 tokens, each beginning with its document's title line.

An artefact folder (`files`) that stands beside ``corpus`` and ``shards``; it holds spans, no text and no
tokens:

    references/
      table.bin   `REFERENCES` rows in the order of the documents, and within one in the order of its text

A reference reads: title line, then the document's tokens [begin, end). A title line of more than half a
reference is cut to half, and keeps its newline. The pieces of a document are contiguous: together they are
its text, whole. A piece ends before a line or a word where one begins among its last tokens, and never within
a character.

Not here: search vectors, memories (`memorybank`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.corpus import USES, Numbers
from data.files import Manifest, open_manifest, write_atomic
from data.shards import TokenShards
from data.tokenizer import Tokenizer

KIND = "references"
VERSION = 1
REFERENCES = np.dtype(
    [
        ("document", "<i8"),
        ("begin", "<u4"),  # tokens of the document: the piece's first
        ("end", "<u4"),  # and the one after its last
        ("char_begin", "<u4"),  # the same span in the characters of the document's text
        ("char_end", "<u4"),
        ("title", "<u2"),  # tokens of the title line, newline included
    ]
)
_NEVER, _CHARACTER, _WORD, _LINE = range(4)
# A piece gives up so many of its tokens, if it has to, to end before a line, a word, a character.
_SEARCHES = ((_LINE, 32), (_WORD, 16), (_CHARACTER, 4))


@dataclass(frozen=True, slots=True)
class Citation:
    """Where a reference comes from: its document's id, the characters of its text, title, source, licence."""

    document: str
    begin: int
    end: int
    title: str
    source: str
    licence: str


class ReferenceTokens(Protocol):
    """What encoding asks of references."""

    def tokens(self, ids: Sequence[int] | Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """tokens_NR padded, title lines included, without <s>; lengths_N; titles_N: tokens of the title lines."""

    def sizes(self, ids: Numbers) -> tuple[Numbers, Numbers]:
        """The tokens of title lines, and of the text behind them; both (N,)."""


class ReferenceSource(ReferenceTokens, Protocol):
    """What readers ask of references, by number, wherever they lie: in a prepared corpus, in a bank."""

    fingerprint: str

    def documents_of(self, ids: Numbers) -> Numbers:
        """The document of each reference, in the shape of `ids`; any number for -1."""

    def of_documents(self, documents: Numbers) -> Numbers:
        """The ids of all references of these documents, ascending."""

    def document_numbers(self, ids: Sequence[str]) -> Numbers:
        """The numbers of documents by id; -1 where there is none."""

    def content_tokens(self, reference: int) -> list[int]:
        """The tokens without the title line."""

    def text(self, reference: int) -> str:
        """Title line and text."""

    def describe(self, reference: int) -> Citation:
        """Where the reference comes from."""


class References:
    """All references of a corpus, by number."""

    def __init__(self, manifest: Manifest, shards: TokenShards) -> None:
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.shards = shards
        self.reference_tokens: int = manifest.settings["reference_tokens"]
        self.pad_id: int = manifest.extra["pad_id"]
        self._newline_id: int = manifest.extra["newline_id"]
        self._table = manifest.mapped("table.bin").read_all().view(REFERENCES)
        self.document_of: Numbers = self._table["document"].astype(np.int64)
        """Document number of each reference, ascending, shape (N,)."""
        self.document_of.flags.writeable = False
        self._document = lru_cache(maxsize=16)(shards.document)  # references of a document are read in a row

    @classmethod
    def open(cls, folder: Path) -> "References":
        """Opens the artefact `folder` and the shards and corpus beside it.

        Raises:
            ValueError: One is not there, damaged, or made from others.
        """
        shards = TokenShards.open(folder.parent / "shards")
        return cls(
            open_manifest(folder, kind=KIND, version=VERSION, inputs={"shards": shards.fingerprint}), shards
        )

    def __len__(self) -> int:
        return len(self._table)

    def documents_of(self, ids: Numbers) -> Numbers:
        """The document of each reference, in the shape of `ids`; any number for -1."""
        return self.document_of[ids]

    def document_numbers(self, ids: Sequence[str]) -> Numbers:
        """The numbers of documents by id; -1 where there is none."""
        corpus = self.shards.corpus
        return np.array([corpus.number(id) if id in corpus else -1 for id in ids], np.int64)

    def of_documents(self, documents: Numbers) -> Numbers:
        """The ids of all references of these documents, ascending."""
        return np.flatnonzero(np.isin(self.document_of, documents)).astype(np.int64)

    def tokens(self, ids: Sequence[int] | Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """The tokens of references, title lines included, without <s>.

        Returns:
            tokens_NR padded with the pad id to R = `reference_tokens`, lengths_N, and titles_N: how many of a
            reference's first tokens are its title line.
        """
        rows = self._table[np.asarray(ids, dtype=np.int64)]
        tokens_NR = np.full((len(rows), self.reference_tokens), self.pad_id, dtype=np.int64)
        titles_N = rows["title"].astype(np.int64)
        lengths_N = titles_N + rows["end"] - rows["begin"]
        for row, title, length, out in zip(
            rows, titles_N.tolist(), lengths_N.tolist(), tokens_NR, strict=True
        ):
            document = int(row["document"])
            out[:title] = self._title_tokens(document, title)
            out[title:length] = self.shards.tokens(document, int(row["begin"]), int(row["end"]))
        return tokens_NR, lengths_N.astype(np.int64), titles_N

    def bounds(self, ids: Sequence[int] | Numbers) -> tuple[Numbers, Numbers]:
        """The first reference of each one's document, and the one after its last; both (N,)."""
        documents = self.document_of[np.asarray(ids, dtype=np.int64)]
        return np.searchsorted(self.document_of, documents), np.searchsorted(
            self.document_of, documents, side="right"
        )

    def sizes(self, ids: Numbers) -> tuple[Numbers, Numbers]:
        """The tokens of references: of their title lines, and of the text behind them; both (N,)."""
        rows = self._table[ids]
        return rows["title"].astype(np.int64), (rows["end"] - rows["begin"]).astype(np.int64)

    def passage(self, first: int, last: int) -> Numbers:
        """The tokens of a document's references `first` to `last` as one text behind one title line."""
        begin, end = self._table[first], self._table[last]
        document = int(begin["document"])
        title = self._title_tokens(document, int(begin["title"]))
        text = self.shards.tokens(document, int(begin["begin"]), int(end["end"]))
        return np.concatenate([title, text.astype(np.int64)])

    def content_tokens(self, reference: int) -> list[int]:
        """The tokens without the title line: what the overlap filter compares."""
        row = self._table[reference]
        tokens = self.shards.tokens(int(row["document"]), int(row["begin"]), int(row["end"]))
        content: list[int] = tokens.tolist()
        return content

    def text(self, reference: int) -> str:
        """Title line and text, for embedding and for people."""
        row = self._table[reference]
        document = self._document(int(row["document"]))
        text = document.text[int(row["char_begin"]) : int(row["char_end"])]
        return f"{document.title}\n{text}" if document.title else text

    def describe(self, reference: int) -> Citation:
        """Where the reference comes from."""
        row = self._table[reference]
        document = self._document(int(row["document"]))
        return Citation(
            document.id,
            int(row["char_begin"]),
            int(row["char_end"]),
            document.title,
            document.source,
            document.licence,
        )

    def _title_tokens(self, document: int, length: int) -> Numbers:
        """A title line of that many tokens, which ends with a newline though the title be cut."""
        if not length:
            return np.empty(0, np.int64)
        title = self.shards.tokens(document, 1, length).astype(np.int64)
        return np.append(title, self._newline_id)


class Cutter:
    """Cuts documents; holds what has to be known of the tokenizer's pieces."""

    def __init__(self, tokenizer: Tokenizer, reference_tokens: int) -> None:
        self._characters = tokenizer.characters()
        self._begins_word = tokenizer.begins_word()
        self._newline_id = tokenizer.newline_id
        self._reference_tokens = reference_tokens

    def cut(self, tokens: NDArray[np.unsignedinteger], title_length: int) -> NDArray[np.void]:
        """The references of one document, `REFERENCES` rows whose "document" is left 0.

        Args:
            tokens: All of the document: <s>, title line, text.
            title_length: Tokens of the title line.
        """
        title = min(title_length, self._reference_tokens // 2)
        room = self._reference_tokens - title
        text_begin = 1 + title_length
        text = tokens[text_begin:]
        positions = np.concatenate([[0], np.cumsum(self._characters[text])])
        cuts = self._cuts(text)
        rows, begin = [], 0
        while begin < len(text):
            end = min(begin + room, len(text))
            if end < len(text):
                end = _best_cut(cuts, begin, end)
            rows.append((0, text_begin + begin, text_begin + end, positions[begin], positions[end], title))
            begin = end
        return np.array(rows, dtype=REFERENCES)

    def _cuts(self, text: NDArray[np.unsignedinteger]) -> NDArray[np.int8]:
        """How well a piece may end before each token: never, within a word, before a word, before a line."""
        cuts = np.where(
            self._begins_word[text], _WORD, np.where(self._characters[text] > 0, _CHARACTER, _NEVER)
        )
        cuts[1:][text[:-1] == self._newline_id] = _LINE  # the newline stays with the line it ends
        return cuts.astype(np.int8)


def _best_cut(cuts: NDArray[np.int8], begin: int, end: int) -> int:
    """Where a piece from `begin` ends that may hold the tokens up to `end`."""
    for kind, tokens_given_up in _SEARCHES:
        first = max(begin + 1, end - tokens_given_up)
        found = np.flatnonzero(cuts[first : end + 1] >= kind)
        if len(found):
            return first + int(found[-1])
    return end


def has_shard(work: Path, shard: int) -> bool:
    """Whether `write_shard` finished this shard, perhaps in an earlier life."""
    return (work / _part_name(shard)).is_file()


def write_shard(work: Path, shard: int, shards: TokenShards, cutter: Cutter) -> None:
    """Cuts the documents of one shard that may be references."""
    pieces = [np.empty(0, dtype=REFERENCES)]
    for document in shards.corpus.numbers(shard):
        if USES[shards.table["use"][document]].refers:
            rows = cutter.cut(shards.tokens(document), shards.title_length(document))
            rows["document"] = document
            pieces.append(rows)
    write_atomic(work / _part_name(shard), np.concatenate(pieces).tobytes())


def finish(work: Path, num_shards: int) -> int:
    """Completes a work folder whose shards are all written, and returns the number of references."""
    parts = [work / _part_name(shard) for shard in range(num_shards)]
    content = b"".join(part.read_bytes() for part in parts)
    write_atomic(work / "table.bin", content)
    for part in parts:
        part.unlink()
    return len(content) // REFERENCES.itemsize


def _part_name(shard: int) -> str:
    return f"part-{shard:05d}.bin"
