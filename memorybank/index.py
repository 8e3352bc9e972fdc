"""Search vectors in, nearest references out: exact inner product, with faiss.

Invariants: ids are the references' own numbers, never positions; a place without result holds -1; equal
scores are ordered by id, so that a result depends on nothing but the vectors.

Not here: what a vector means (embedder.py) and which results may be read (neighbours.py).
"""

from typing import Protocol

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


class SearchIndex(Protocol):
    """What retrieval needs of an index."""

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]: ...


class ExactIndex:
    """Exhaustive inner-product search; with unit vectors, cosine similarity."""

    def __init__(self, size: int) -> None:
        """Make an empty index of vectors of `size` numbers."""
        self.size = size
        self._index = faiss.IndexIDMap(faiss.IndexFlatIP(size))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add vectors of shape (n, X) under distinct, non-negative ids of shape (n,)."""
        if vectors.shape != (len(ids), self.size):
            raise ValueError(
                f"{len(ids)} ids need vectors of shape ({len(ids)}, {self.size}), got {vectors.shape}: "
                "were they made by another embedder?"
            )
        self._index.add_with_ids(
            np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(ids, np.int64)
        )

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        """Return the scores and ids, both of shape (n, k), best first; -1 and -inf where there is no more."""
        # faiss has its own OpenMP pool: it takes the share of the machine that torch was given.
        faiss.omp_set_num_threads(torch.get_num_threads())
        scores, ids = self._index.search(np.ascontiguousarray(queries, np.float32), k)
        scores = np.where(ids < 0, -np.inf, scores).astype(np.float32)
        order = np.lexsort((ids, -scores), axis=1)
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
