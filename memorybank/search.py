"""Neighbours of whole sets of rows: chunks -> text -> search vectors -> index -> filters.

Search vectors do not depend on the model's weights, so all of this is known before anything is compiled.
Not here: the filters (`neighbours`), retrieval while generating (`retriever`).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from data.references import ReferenceSource
from data.tokenizer import Tokenizer
from memorybank.config import RetrievalConfig
from memorybank.index import ExactIndex, SearchIndex
from memorybank.neighbours import Neighbours, find

Ids = NDArray[np.int64]
Embed = Callable[[Sequence[str]], NDArray[np.float32]]


class RowSearch:
    """Searches references for rows of tokens.

    Args:
        tokenizer: Turns chunks back into text.
        references: What is searched.
        embed: Texts to unit vectors, usually `VectorCache.vectors`.
        retrieval: Candidates and filters.
        chunk_tokens: Tokens of a chunk.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        references: ReferenceSource,
        embed: Embed,
        retrieval: RetrievalConfig,
        *,
        chunk_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._references = references
        self._embed = embed
        self._retrieval = retrieval
        self._chunk_tokens = chunk_tokens

    def index(self, ids: Ids) -> ExactIndex:
        """An index over some references."""
        vectors_NX = self._embed([self._references.text(int(id)) for id in ids])
        index = ExactIndex(vectors_NX.shape[1])
        index.add(ids, vectors_NX)
        return index

    def neighbours(
        self,
        rows_MT: NDArray[np.integer],
        row_documents: Sequence[Ids],
        index: SearchIndex,
        *,
        k: int,
        limit: float | None,
    ) -> Neighbours:
        """The k references that each chunk's own text retrieves, after the filters.

        Args:
            rows_MT: Inputs of the rows; T need not be a multiple of the chunk.
            row_documents: Documents of which each row holds a token.
            index: Over the references that may be read.
            k: References per chunk.
            limit: Largest overlap with the whole row that passes; None passes all.
        """
        num_rows, num_tokens = rows_MT.shape
        bounds = range(0, num_tokens, self._chunk_tokens)
        texts = [
            self._tokenizer.decode(row[begin : begin + self._chunk_tokens].tolist())
            for row in rows_MT
            for begin in bounds
        ]
        vectors_MCX = self._embed(texts).reshape(num_rows, len(bounds), -1)
        return find(
            vectors_MCX,
            row_documents,
            list(rows_MT),
            index,
            self._references,
            k=k,
            candidates=self._retrieval.candidates,
            limit=limit,
            allow_own_document=self._retrieval.allow_own_document,
        )
