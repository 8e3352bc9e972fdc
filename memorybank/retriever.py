"""Search while generating: what a chunk's text finds, and the memories it then reads.

Not here: the search for whole rows in training and evaluation (neighbours.py), which this calls for single
queries, and when a chunk is complete (model/generate.py).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data.references import ReferenceSource
from data.tokenizer import Tokenizer
from memorybank.bank import BankReader
from memorybank.embedder import Embedder
from memorybank.index import SearchIndex
from memorybank.neighbours import Neighbours, find
from model.memory import MemoryBatch

Ids = NDArray[np.int64]


class Search(Protocol):
    """What finds references for texts: a `Retriever`, or one that also knows a past (`past`)."""

    def search(self, texts: Sequence[str]) -> Ids:
        """Return the references found, (n, k), best first; -1 = none left."""


class Retriever:
    """Texts to the references they find."""

    def __init__(
        self,
        embedder: Embedder,
        index: SearchIndex,
        references: ReferenceSource,
        *,
        k: int = 5,
        candidates: int = 64,
        limit: float | None = None,
    ) -> None:
        """Search `index`, made of vectors of `embedder`; `limit` is the largest overlap that passes."""
        self._embedder = embedder
        self._index = index
        self._references = references
        self._k = k
        self._candidates = candidates
        self._limit = limit

    def search(
        self,
        texts: Sequence[str],
        *,
        k: int | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
        exclude_documents: Sequence[Ids] | None = None,
    ) -> Ids:
        """Return the references found, (n, k), best first; -1 = none left. Arguments: see `neighbours`."""
        found = self.neighbours(texts, k=k, tokens=tokens, exclude_documents=exclude_documents)
        return found.ids_MCk[:, 0]

    def neighbours(
        self,
        texts: Sequence[str],
        *,
        k: int | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
        exclude_documents: Sequence[Ids] | None = None,
    ) -> Neighbours:
        """Return what was found with its scores, and what was refused, one row of one chunk per text.

        Args:
            texts: one query each; an empty one finds nothing.
            k: references per text, if not the retriever's own number.
            tokens: for each text, what references must not overlap (question and answer, say).
            exclude_documents: for each text, documents whose references are refused.
        """
        none = [np.zeros(0, np.int64)] * len(texts)
        return find(
            self._embedder.embed(texts)[:, None, :],
            none if exclude_documents is None else exclude_documents,
            tokens,
            self._index,
            self._references,
            k=k or self._k,
            candidates=self._candidates,
            limit=self._limit,
        )


class RetrievedMemory:
    """A source of memories for `model.generate`: each chunk reads what its text retrieves."""

    def __init__(
        self,
        retriever: Search,
        tokenizer: Tokenizer,
        reader: BankReader,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Search with `retriever` and read from `reader` (a generation, or a cold start)."""
        self.retriever = retriever
        self._tokenizer = tokenizer
        self.reader = reader
        self._device = device
        self.references_read: dict[int, list[list[int]]] = {}
        """For each row of the batch, the references of each of its queries, in the order of time."""

    def read(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> MemoryBatch | None:
        """Return the memories that the chunks' texts retrieve, slots (B, 1, K); None when none found any."""
        texts = [self._tokenizer.decode(list(chunk)) for chunk in chunks]
        ids_BK = self.retriever.search(texts)
        for row, ids_K in zip(rows, ids_BK, strict=True):
            self.references_read.setdefault(row, []).append(ids_K[ids_K >= 0].tolist())
        if (ids_BK < 0).all():
            return None
        return self.reader.batch(ids_BK[:, None, :], self._device)
