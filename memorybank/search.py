"""Neighbours of whole sets of rows: chunks -> text -> search vectors -> index -> filters.

Search vectors do not depend on the model's weights, so all of this is known before anything is compiled, and an
index depends on the references alone, not on the run or on what was indexed before. The references' vectors stay on
disk (`vectors`), and are read by map.
Not here: the filters (`neighbours`), retrieval while generating (`retriever`).
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.references import ReferenceSource
from data.tokenizer import Tokenizer
from memorybank.config import IndexKind, RetrievalConfig
from memorybank.index import SearchIndex
from memorybank.index_plan import plan_index
from memorybank.index_store import BankIndex, build_index, open_index
from memorybank.neighbours import Neighbours, find
from memorybank.vectors import Vectors

Ids = NDArray[np.int64]
Embed = Callable[[Sequence[str]], NDArray[np.float32]]


class RowSearch:
    """Searches references for rows of tokens.

    Args:
        tokenizer: Turns chunks back into text.
        references: What is searched.
        embed: Texts to unit vectors, usually `VectorCache.vectors`.
        vectors: Opens the search vectors of all references.
        retrieval: Candidates, filters and the kind of index.
        chunk_tokens: Tokens of a chunk.
        folder: Where indexes that are too large for an exact search are published.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        references: ReferenceSource,
        embed: Embed,
        vectors: Callable[[], Vectors],
        retrieval: RetrievalConfig,
        *,
        chunk_tokens: int,
        folder: Path,
    ) -> None:
        self._tokenizer = tokenizer
        self._references = references
        self._embed = embed
        self._vectors = vectors
        self._retrieval = retrieval
        self._chunk_tokens = chunk_tokens
        self._folder = folder

    def index(self, ids: Ids) -> SearchIndex:
        """An index over some references, ids ascending, of the kind that suits their number.

        One with lists is published, and opened again by whoever needs the same. Its recall is measured with what
        training asks with: chunks of the documents, taken from a sample of the references.
        """
        vectors, config = self._vectors(), self._retrieval.index
        plan = plan_index(len(ids), vectors.size, config)
        blocks = vectors.blocks_of(ids)
        if plan.kind is IndexKind.exact:
            return BankIndex(blocks)
        chosen = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
        folder = self._folder / f"{plan.kind.name}-{vectors.embedder}-{chosen}"
        inputs = {"references": self._references.fingerprint, "embedder": vectors.embedder}
        asked = ids[:: max(1, len(ids) // 1000)][:1000]
        queries = self._queries(asked)
        build_index(
            folder, blocks, plan, queries=queries, query_ids=asked, inputs=inputs, recall=config.recall
        )
        return open_index(folder, blocks, inputs=inputs)

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

    def _queries(self, ids: Ids) -> NDArray[np.float32]:
        """Search vectors of chunks within references."""
        chunks = [self._references.content_tokens(int(id))[-self._chunk_tokens :] for id in ids]
        return self._embed([self._tokenizer.decode(chunk) for chunk in chunks])
