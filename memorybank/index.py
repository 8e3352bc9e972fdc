"""Search vectors in, nearest references out: exact inner product.

Invariants: ids are the references' own numbers, never positions; a place without result holds -1 and -inf;
equal scores are ordered by id; a search over blocks holds one block in memory, however many there are.

Not here: what a vector means (embedder.py), which results may be read (neighbours.py), and indexes that are too
large for an exact search (index_plan.py, index_lists.py, index_store.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


class Rows(Protocol):
    """Vectors (n, X) in float32 or float16: an array, a memory map, or what reads them when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice | Ids, /) -> NDArray[np.floating]: ...


Block = tuple[Ids, Rows]
"""Ids (n,), and their vectors."""
Found = tuple[Vectors, Ids]
"""Scores and ids, both (n, k), best first."""

SPAN_BYTES = 32 << 20
"""Vectors that a search over blocks compares at a time."""

SCORES = 1 << 23
"""Scores that it holds at a time."""


class SearchIndex(Protocol):
    """What retrieval needs of an index."""

    def search(self, queries: Vectors, k: int) -> Found: ...


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
        check_block(ids, vectors, self.size)
        self._index.add_with_ids(
            np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(ids, np.int64)
        )

    def search(self, queries: Vectors, k: int) -> Found:
        """Return the scores and ids, both of shape (n, k), best first; -1 and -inf where there is no more."""
        share_threads()
        return ordered(*self._index.search(np.ascontiguousarray(queries, np.float32), k))


class IdSet:
    """Ids as a bitmap: an eighth of a byte for each that there could be, however many there are."""

    def __init__(self, bound: int) -> None:
        """Make an empty set of ids below `bound`."""
        self.bits = np.zeros(bound // 8 + 1, np.uint8)
        """What faiss's IDSelectorBitmap reads."""

    def add(self, ids: Ids) -> None:
        """Put in ids below the bound."""
        np.bitwise_or.at(self.bits, ids // 8, (1 << (ids % 8)).astype(np.uint8))

    def add_range(self, begin: int, end: int) -> None:
        """Put in all ids of [begin, end)."""
        first, last = min(-(-begin // 8), end // 8), end // 8
        self.bits[first:last] = 255
        self.add(np.arange(begin, min(8 * first, end)))
        self.add(np.arange(max(8 * last, begin), end))

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        """Return for each id below the bound whether it is in here."""
        found: NDArray[np.bool_] = (self.bits[ids // 8] >> (ids % 8).astype(np.uint8) & 1).astype(np.bool_)
        return found


class Blocks:
    """Vectors in blocks, under numbers that ascend through all of them; nothing is copied or held.

    Ascending numbers are looked up in place, and a vector that was added later has a greater number than all
    that were there: an index over the first ones knows what it lacks.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        """Take blocks as they are; ValueError when their shapes or the order of their first ids are wrong."""
        self._blocks: list[Block] = []
        self._begins: list[int] = [0]
        for ids, vectors in blocks:
            self._append(ids, vectors)
        self._firsts = np.array([ids[0] for ids, _ in self._blocks], np.int64)

    def __len__(self) -> int:
        return self._begins[-1]

    @property
    def size(self) -> int:
        """Numbers in a vector; 0 when there is no block."""
        return self._blocks[0][1].shape[1] if self._blocks else 0

    @property
    def last_id(self) -> int:
        """The greatest id; -1 when there is none."""
        return int(self._blocks[-1][0][-1]) if self._blocks else -1

    def _append(self, ids: Ids, vectors: Rows) -> None:
        check_block(ids, vectors, self.size or vectors.shape[1])
        if not len(ids):
            return
        if ids[0] <= self.last_id:
            raise ValueError(
                f"a block of vectors begins with id {ids[0]} after id {self.last_id}: ids have to ascend, and "
                "an id is never given twice"
            )
        self._blocks.append((ids, vectors))
        self._begins.append(len(self) + len(ids))

    def begin_after(self, id: int) -> int:
        """Return the position of the first id greater than `id`."""
        number = int(np.searchsorted(self._firsts, id, side="right")) - 1
        if number < 0:
            return 0
        return self._begins[number] + int(np.searchsorted(self._blocks[number][0], id, side="right"))

    def spans(
        self, begin: int = 0, end: int | None = None, *, rows: int | None = None
    ) -> Iterator[tuple[Ids, Vectors]]:
        """Yield ids and float32 vectors of the positions [begin, end), at most `rows` at a time.

        Raises:
            ValueError: ids within a block do not ascend.
        """
        end = len(self) if end is None else end
        rows = rows or max(1, SPAN_BYTES // (4 * max(self.size, 1)))
        for (ids, vectors), first in zip(self._blocks, self._begins, strict=False):
            for low in range(max(begin - first, 0), min(end - first, len(ids)), rows):
                high = min(low + rows, end - first, len(ids))
                span = np.ascontiguousarray(ids[low:high], np.int64)
                if (np.diff(span) <= 0).any():
                    raise ValueError(
                        f"ids of a block of vectors do not ascend between {span[0]} and {span[-1]}: sort them"
                    )
                yield span, np.ascontiguousarray(vectors[low:high], np.float32)

    def at(self, positions: Ids) -> Vectors:
        """Return the vectors at ascending positions, (n, X)."""
        found = np.empty((len(positions), self.size), np.float32)
        bounds = np.searchsorted(positions, self._begins)
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            low, high = bounds[number : number + 2]
            found[low:high] = self._blocks[number][1][positions[low:high] - self._begins[number]]
        return found

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        """Return for each id whether it has a vector, (n,)."""
        return self._find(ids)[1]

    def of(self, ids: Ids) -> Vectors:
        """Return the vectors of ids, (n, X), in the order asked for.

        Raises:
            ValueError: an id has no vector.
        """
        positions, present = self._find(ids)
        if not present.all():
            raise ValueError(
                f"{(~present).sum()} of {len(ids)} ids have no search vector (first: {ids[~present][0]}): the "
                "index was made from other vectors; build it anew"
            )
        distinct, places = np.unique(positions, return_inverse=True)
        return self.at(distinct)[places]

    def _find(self, ids: Ids) -> tuple[Ids, NDArray[np.bool_]]:
        positions, present = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.bool_)
        block_of = np.searchsorted(self._firsts, ids, side="right") - 1
        for number in np.unique(block_of[block_of >= 0]).tolist():
            own, rows = self._blocks[number][0], np.flatnonzero(block_of == number)
            places = np.minimum(np.searchsorted(own, ids[rows]), len(own) - 1)
            present[rows] = own[places] == ids[rows]
            positions[rows] = self._begins[number] + places
        return positions, present


def check_block(ids: Ids, vectors: Rows, size: int) -> None:
    """Raise ValueError when the vectors are not `size` numbers for each id."""
    if vectors.shape != (len(ids), size):
        raise ValueError(
            f"{len(ids)} ids need vectors of shape ({len(ids)}, {size}), got {vectors.shape}: "
            "were they made by another embedder?"
        )


def search_spans(
    spans: Iterable[tuple[Ids, Vectors]], queries: Vectors, k: int, *, removed: IdSet | None = None
) -> Found:
    """Return the exact best of vectors that pass by once, however many queries there are.

    Args:
        spans: ids and vectors, `Blocks.spans` for example; each is compared with all queries.
        queries: (n, X).
        k: results per query.
        removed: ids that are not found.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    best = nothing(len(queries), k)
    for span_ids, span_vectors in spans:
        ids, vectors = span_ids, span_vectors
        if removed is not None:
            kept = ~removed.has(ids)
            if not kept.all():
                ids, vectors = ids[kept], vectors[kept]
        if len(ids):
            scores, places = _nearest(queries, vectors, k)
            best = merged(best, (scores, np.where(places < 0, -1, ids[places])))
    return best


def nothing(num_queries: int, k: int) -> Found:
    """Return the result of a search that finds nothing."""
    return np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), -1, np.int64)


def ordered(scores: Vectors, ids: Ids) -> Found:
    """Return results best first, equal scores by id, empty places last with -1 and -inf."""
    scores = np.where(ids < 0, -np.inf, scores).astype(np.float32)
    order = np.lexsort((ids, -scores), axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def merged(one: Found, other: Found) -> Found:
    """Return the best of two results for the same queries, as many as each has."""
    k = one[0].shape[1]
    scores, ids = ordered(
        np.concatenate([one[0], other[0]], axis=1), np.concatenate([one[1], other[1]], axis=1)
    )
    return scores[:, :k], ids[:, :k]


def share_threads() -> None:
    """Give faiss, which has its own OpenMP pool, the share of the machine that torch was given."""
    faiss.omp_set_num_threads(torch.get_num_threads())


def compile_options() -> str:
    """Return the instructions that this faiss was built for, in its own words."""
    return str(faiss.get_compile_options()).strip()


def has_gpus() -> bool:
    """Return whether this faiss was built for GPUs and sees one."""
    return bool(getattr(faiss, "get_num_gpus", lambda: 0)())


def _nearest(queries: Vectors, vectors: Vectors, k: int) -> Found:
    """Return scores and positions; on the GPUs where there are any (not measured, nor tested on one)."""
    if has_gpus():
        index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(vectors.shape[1]))
        index.add(vectors)
        scores, places = index.search(queries, k)
        return scores, places
    scores, places = nothing(len(queries), k)
    compared, tile, most = _tensor(vectors).T, max(1, SCORES // len(vectors)), min(k, len(vectors))
    for begin in range(0, len(queries), tile):
        best = (_tensor(queries[begin : begin + tile]) @ compared).topk(most)
        scores[begin : begin + tile, :most], places[begin : begin + tile, :most] = best
    return scores, places


def _tensor(array: Vectors) -> torch.Tensor:
    """Return the array as a tensor; only what may not be written, which torch refuses, is copied."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
