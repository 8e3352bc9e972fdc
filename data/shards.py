"""Token shards: the tokens of every document, memory-mapped and checked.

An artefact folder (`files`) that stands beside its ``corpus`` and mirrors it shard by shard:

    shards/
      tokens-00000.bin   the tokens of the shard's documents, one after the other, little-endian; uint16, or
                         uint32 when the vocabulary has more than 65,536 pieces
      table.bin          `TOKENS` rows, one per document

A document's tokens are ``<s>``, then those of its title line (title and newline, if it has a title), then
those of its text. Invariants: no document is empty, none is cut; equal corpus and tokenizer give equal bytes.

Not here: rows (`packing`), references (`references`), attributes of documents (`corpus`).
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.corpus import Corpus, Numbers, Table
from data.documents import Document, Split
from data.files import Manifest, MappedFile, open_manifest, write_atomic
from data.tokenizer import Tokenizer

KIND = "shards"
VERSION = 1
TOKENS = np.dtype(
    [
        ("begin", "<u8"),  # first token of the document in its shard
        ("length", "<u8"),  # tokens, <s> included
        ("title", "<u4"),  # tokens of the title line, newline included; 0 without a title
    ]
)
_BATCH = 256  # documents encoded at once


class TokenShards:
    """The tokens of a corpus's documents, by document number."""

    def __init__(self, manifest: Manifest, corpus: Corpus) -> None:
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.corpus = corpus
        self.vocab_size: int = manifest.extra["vocab_size"]
        self._dtype = token_dtype(self.vocab_size)
        self._tokens = manifest.mapped("table.bin").read_all().view(TOKENS)
        self._lengths = self._tokens["length"].astype(np.int64)
        self._lengths.flags.writeable = False
        self._shards: dict[int, MappedFile] = {}

    @classmethod
    def open(cls, folder: Path) -> "TokenShards":
        """Opens the artefact `folder` and the corpus beside it.

        Raises:
            ValueError: One is not there, damaged, or made from another corpus.
        """
        corpus = Corpus.open(folder.parent / "corpus")
        return cls(
            open_manifest(folder, kind=KIND, version=VERSION, inputs={"corpus": corpus.fingerprint}), corpus
        )

    @property
    def num_documents(self) -> int:
        return len(self._tokens)

    @property
    def table(self) -> Table:
        """The documents' attributes, `corpus.TABLE` rows."""
        return self.corpus.table

    def lengths(self) -> Numbers:
        """Tokens of each document, <s> included, shape (num_documents,)."""
        return self._lengths

    def title_length(self, document: int) -> int:
        """Tokens of the title line, newline included; they follow <s>."""
        return int(self._tokens["title"][document])

    def tokens(self, document: int, begin: int = 0, end: int | None = None) -> NDArray[np.unsignedinteger]:
        """The tokens [begin, end) of a document, all of them by default; a read-only view.

        Raises:
            ValueError: The span leaves the document, or the shard is damaged.
        """
        length = int(self._lengths[document])
        end = length if end is None else end
        if not 0 <= begin <= end <= length:
            raise ValueError(f"document {document} has {length} tokens, not {begin} to {end}")
        shard = int(self.table["shard"][document])
        if shard not in self._shards:
            self._shards[shard] = self.manifest.mapped(_shard_name(shard))
        size = self._dtype.itemsize
        first = int(self._tokens["begin"][document]) + begin
        return self._shards[shard].read(first * size, (end - begin) * size).view(self._dtype)

    def held_out(self, split: Split, *, row_tokens: int) -> Numbers:
        """The documents of a held-out split.

        Raises:
            ValueError: The split holds less than a row.
        """
        documents = self.corpus.select(split=split)
        if int(self._lengths[documents].sum()) <= row_tokens:
            raise ValueError(
                f"the {split.value} split holds {len(documents)} of {self.num_documents} documents, less than one row "
                f"of {row_tokens} tokens; set data.{split.value}_fraction higher than it is (0.1, say), or give more "
                "documents: each belongs to one split, whole, so that a long one has to be cut into several"
            )
        return documents

    def document(self, number: int) -> Document:
        """The document of that number, with its text."""
        return self.corpus.document(number)

    def number(self, document_id: str) -> int:
        """The number of the document with that id; ValueError when there is none."""
        return self.corpus.number(document_id)


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """How tokens are stored."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def has_shard(work: Path, shard: int) -> bool:
    """Whether `write_shard` finished this shard, perhaps in an earlier life."""
    return (work / _part_name(shard)).is_file()


def write_shard(work: Path, shard: int, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
    """Encodes the documents of one corpus shard into the work folder."""
    dtype = token_dtype(tokenizer.vocab_size)
    rows: list[tuple[int, int, int]] = []
    pieces: list[NDArray[np.unsignedinteger]] = []
    begin = 0
    for batch in _batches(documents):
        titles = tokenizer.encode_batch(
            [f"{document.title}\n" if document.title else "" for document in batch]
        )
        texts = tokenizer.encode_batch([document.text for document in batch])
        for title, text in zip(titles, texts, strict=True):
            tokens = np.array([tokenizer.bos_id, *title, *text], dtype=dtype)
            rows.append((begin, len(tokens), len(title)))
            pieces.append(tokens)
            begin += len(tokens)
    content = np.concatenate(pieces) if pieces else np.empty(0, dtype)
    write_atomic(work / _shard_name(shard), content.tobytes())
    write_atomic(work / _part_name(shard), np.array(rows, dtype=TOKENS).tobytes())


def finish(work: Path, num_shards: int) -> int:
    """Completes a work folder whose shards are all written, and returns the number of tokens."""
    parts = [work / _part_name(shard) for shard in range(num_shards)]
    table = np.frombuffer(b"".join(part.read_bytes() for part in parts), dtype=TOKENS)
    write_atomic(work / "table.bin", table.tobytes())
    for part in parts:
        part.unlink()
    return int(table["length"].sum())


def _shard_name(shard: int) -> str:
    return f"tokens-{shard:05d}.bin"


def _part_name(shard: int) -> str:
    return f"part-{shard:05d}.bin"


def _batches(documents: Iterable[Document]) -> Iterable[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
