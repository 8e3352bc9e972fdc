"""A text's own past as memories: what lies before its last row is cut, encoded as one document, and searched.

    tokens --PastReferences--> references without title --compile_past--> Past (records and search vectors in RAM)

`WithPast` lets chunks read the past beside a bank: both are searched, and the best of both are read; a past
of no more references than a chunk may read is read whole. The past's references are numbered behind the
bank's, so that one pool of slots serves both.

Invariants: a past is encoded in windows (`windows`), and only by itself: the row that reads it is not seen;
its records pass through the codec, as the bank's do.

Not here: where the past ends and the row begins (`launch.generate`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.references import Citation, Cutter
from data.tokenizer import Tokenizer
from memorybank.bank import Records
from memorybank.codec import Codec
from memorybank.embedder import Embedder
from memorybank.index import ExactIndex
from memorybank.retriever import Retriever
from memorybank.writer import Encode, encode_records

Ids = NDArray[np.int64]


class PastReferences:
    """The references of one text without title (`windows.Passages`)."""

    def __init__(self, tokens: Sequence[int], tokenizer: Tokenizer, *, reference_tokens: int) -> None:
        """Cut `tokens`, without <s>, as documents are cut."""
        self.reference_tokens = reference_tokens
        self._tokenizer = tokenizer
        self._tokens = np.asarray(tokens, np.int64)
        document = np.concatenate([[tokenizer.bos_id], self._tokens]).astype(np.uint32)
        self._table = Cutter(tokenizer, reference_tokens).cut(document, 0)

    def __len__(self) -> int:
        return len(self._table)

    def tokens(self, ids: Sequence[int] | Ids) -> tuple[Ids, Ids, Ids]:
        """The padded tokens of references, their lengths, and no title lines."""
        ids = np.asarray(ids, np.int64)
        titles_N, lengths_N = self.sizes(ids)
        tokens_NR = np.full((len(ids), self.reference_tokens), self._tokenizer.pad_id, np.int64)
        for row, (id, length) in enumerate(zip(ids.tolist(), lengths_N.tolist(), strict=True)):
            tokens_NR[row, :length] = self.passage(id, id)
        return tokens_NR, lengths_N, titles_N

    def bounds(self, ids: Ids) -> tuple[Ids, Ids]:
        """All references are of one document."""
        return np.zeros(len(ids), np.int64), np.full(len(ids), len(self))

    def sizes(self, ids: Ids) -> tuple[Ids, Ids]:
        """No tokens of title lines, and those of the text."""
        rows = self._table[ids]
        return np.zeros(len(ids), np.int64), (rows["end"] - rows["begin"]).astype(np.int64)

    def passage(self, first: int, last: int) -> Ids:
        """The tokens of the references `first` to `last`."""
        passage: Ids = self._tokens[self._table["begin"][first] - 1 : self._table["end"][last] - 1]
        return passage

    def text(self, id: int) -> str:
        """The text of a reference, for embedding."""
        return self._tokenizer.decode(self.passage(id, id).tolist())

    def describe(self, id: int) -> Citation:
        """Where a reference stands in the text."""
        row = self._table[id]
        return Citation(
            "prompt", int(row["char_begin"]), int(row["char_end"]), "earlier in the prompt", "", ""
        )


@dataclass(frozen=True, slots=True)
class Past:
    """A past, compiled.

    Attributes:
        references: Its references.
        records: Their memories, uint8 (N, record_bytes).
        index: Their search vectors, by number.
    """

    references: PastReferences
    records: Tensor
    index: ExactIndex


def compile_past(
    references: PastReferences,
    encode: Encode,
    codec: Codec,
    embedder: Embedder,
    *,
    window_tokens: int | None,
    batch: int = 8,
) -> Past:
    """Encode and embed the references of a past; arguments as of `writer.encode_records`."""
    ids = np.arange(len(references))
    records = encode_records(encode, references, ids, codec, batch=batch, window_tokens=window_tokens)
    index = ExactIndex(embedder.size)
    index.add(ids, embedder.embed([references.text(id) for id in ids.tolist()]))
    return Past(references, records, index)


class WithPast:
    """A past beside a bank, or alone: searched like a `Retriever`, and read like the bank's records."""

    def __init__(
        self,
        past: Past,
        embedder: Embedder,
        *,
        k: int = 5,
        first_id: int = 0,
        bank: tuple[Retriever, Records] | None = None,
    ) -> None:
        """Number the past's references from `first_id` on, which no reference of the bank has; find `k` in all."""
        self._past = past
        self._embedder = embedder
        self._k = k
        self._first_id = first_id
        self._bank = bank

    def search(self, texts: Sequence[str]) -> Ids:
        """Return what each text finds, (n, k), best first; -1 = none left, or nothing to search for."""
        vectors_nX = self._embedder.embed(texts)
        scores, ids = self._past.index.search(vectors_nX, self._k)
        ids = np.where(ids < 0, -1, ids + self._first_id)
        if self._bank is not None:
            found = self._bank[0].neighbours(texts)
            bank_scores, bank_ids = found.scores_MCk[:, 0], found.ids_MCk[:, 0]
            if len(self._past.references) <= self._k:
                scores = np.where(ids < 0, -np.inf, np.inf)
            scores, ids = np.hstack([scores, bank_scores]), np.hstack([ids, bank_ids])
            order = np.argsort(-scores, axis=1, kind="stable")[:, : self._k]
            ids = np.take_along_axis(ids, order, axis=1)
        ids[~vectors_nX.any(axis=1)] = -1
        return ids

    def read(self, ids_N: Ids) -> Tensor:
        """Return the records of both, uint8 (N, record_bytes)."""
        ours = ids_N >= self._first_id
        records = torch.empty((len(ids_N), self._past.records.shape[1]), dtype=torch.uint8)
        records[torch.from_numpy(ours)] = self._past.records[torch.from_numpy(ids_N[ours] - self._first_id)]
        if not ours.all():
            assert self._bank is not None
            records[torch.from_numpy(~ours)] = self._bank[1].read(ids_N[~ours])
        return records
