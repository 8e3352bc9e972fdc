"""Which index for how many vectors, and what it will cost: a pure function.

Invariant: a plan that `plan_index` returns can be built: enough vectors for its training, code bytes that
divide the vector.

Not here: building it (index_store.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memorybank.config import IndexConfig, IndexKind, check_code_bytes

EXACT_UP_TO = 250_000
FLAT_UP_TO = 10_000_000
"""Largest numbers of vectors for which `auto` chooses the exact index, and whole vectors in lists."""
_TRAINING_PER_LIST = 40
_TRAINING_PER_CODE = 40
"""Vectors per centroid; faiss asks for 39."""
_HNSW_FROM_LISTS = 65_536
_SHARD_BYTES = 512 << 20
_ID_BYTES = 8
_HNSW_LINK_BYTES = 4 * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexPlan:
    """An index before it is built."""

    kind: IndexKind
    """exact, ivf_flat or ivf_pq."""
    num_vectors: int
    size: int
    """Numbers in a vector."""
    lists: int = 0
    """Inverted lists."""
    hnsw: bool = False
    """Whether the lists' centroids are found through a graph instead of one by one."""
    code_bytes: int = 0
    """Bytes of a vector in its list."""
    training_vectors: int = 0
    """Vectors that centroids and codes are trained on."""
    rerank: int = 1
    """Candidates fetched per result and scored anew by their whole vectors."""
    shard_vectors: int = 0
    """Vectors that are coded, and kept, at a time."""

    @property
    def factory(self) -> str:
        """The index in the words of faiss."""
        if self.kind is IndexKind.exact:
            return "Flat"
        codes = f"PQ{self.code_bytes}" if self.kind is IndexKind.ivf_pq else "Flat"
        return f"IVF{self.lists}{'_HNSW32' if self.hnsw else ''},{codes}"

    @property
    def disk_bytes(self) -> int:
        """Bytes of the lists on disk, memory-mapped (exact: none beyond the vectors themselves)."""
        return self.num_vectors * (self.code_bytes + _ID_BYTES) if self.lists else 0

    @property
    def memory_bytes(self) -> int:
        """Anonymous memory of the opened index: the centroids, and the graph over them."""
        return self.lists * (4 * self.size + 8 + (_HNSW_LINK_BYTES if self.hnsw else 0))

    @property
    def build_bytes(self) -> int:
        """Anonymous memory that building takes: the training sample, or a shard's codes twice."""
        shard = 2 * self.shard_vectors * (self.code_bytes + _ID_BYTES)
        return self.memory_bytes + max(4 * self.size * self.training_vectors, shard)

    def describe(self) -> str:
        """Return the choice and its cost in a sentence."""
        if self.kind is IndexKind.exact:
            return f"exact search over {self.num_vectors:,} vectors of {self.size} numbers, read in place"
        held = (
            f"coded in {self.code_bytes} bytes, {self.rerank} candidates per result re-ranked by whole vectors"
            if self.kind is IndexKind.ivf_pq
            else "whole"
        )
        return (
            f"{self.factory}: {self.num_vectors:,} vectors, {held}, in {self.lists:,} lists"
            f"{' found through a graph' if self.hnsw else ''}; {_gb(self.disk_bytes)} on disk, "
            f"{_gb(self.memory_bytes)} of memory, trained on {self.training_vectors:,} vectors, building takes "
            f"{_gb(self.build_bytes)} of memory"
        )


def plan_index(
    num_vectors: int, size: int, config: IndexConfig, *, key: str = "retrieval.index"
) -> IndexPlan:
    """Return the index for `num_vectors` of `size` numbers.

    Raises:
        ValueError: the kind that `config` asks for cannot be trained on so few vectors, or its code bytes do
            not divide the vectors.
    """
    kind = config.kind
    if kind is IndexKind.auto:
        kind = (
            IndexKind.exact
            if num_vectors <= EXACT_UP_TO
            else IndexKind.ivf_flat
            if num_vectors <= FLAT_UP_TO
            else IndexKind.ivf_pq
        )
    if kind is IndexKind.exact:
        return IndexPlan(kind=kind, num_vectors=num_vectors, size=size)
    coded = kind is IndexKind.ivf_pq
    needed = _TRAINING_PER_CODE * 256 if coded else _TRAINING_PER_LIST
    if num_vectors < needed:
        raise ValueError(
            f"{key}.kind={kind.name} needs at least {needed:,} vectors to be trained on, and there are "
            f"{num_vectors:,}: set {key}.kind=auto"
        )
    code_bytes = 4 * size
    if coded:
        code_bytes = config.code_bytes or max(n for n in range(1, max(size // 4, 1) + 1) if size % n == 0)
        check_code_bytes(code_bytes, size, key=key)
    lists = _num_lists(num_vectors)
    training = max(_TRAINING_PER_LIST * lists, needed)
    return IndexPlan(
        kind=kind,
        num_vectors=num_vectors,
        size=size,
        lists=lists,
        hnsw=lists >= _HNSW_FROM_LISTS,
        code_bytes=code_bytes,
        training_vectors=min(training, num_vectors),
        rerank=4 if coded else 1,
        shard_vectors=min(_SHARD_BYTES // (code_bytes + _ID_BYTES), num_vectors),
    )


def folded(listed: Sequence[int], unlisted: int) -> list[int] | None:
    """Return which of a bank's indexes are built anew as one with the vectors that none lists; None: none is built.

    Vectors that no index lists are searched exactly: up to so many as `auto` would search exactly anyway. One that is
    built takes in all that are at most twice as large as what is in it so far. So each index of a bank is more than
    twice as large as the next smaller one: n vectors are in at most log2(n / 250,000) + 1 of them, and each vector is
    coded at most log1.5(n / 250,000) + 1 times in the bank's life.

    Args:
        listed: vectors of each index.
        unlisted: vectors of no index.

    Returns:
        places in `listed`.
    """
    if unlisted <= EXACT_UP_TO:
        return None
    places: list[int] = []
    for place in sorted(range(len(listed)), key=listed.__getitem__):
        if listed[place] > 2 * unlisted:
            break
        places.append(place)
        unlisted += listed[place]
    return places


def _num_lists(num_vectors: int) -> int:
    """The power of two nearest 4 sqrt(n) up to 1e6; beyond, what faiss's guidelines state; never too many to train."""
    if num_vectors <= 1_000_000:
        wanted: int = 2 ** round(math.log2(4 * math.sqrt(num_vectors)))
    else:
        wanted = 65_536 if num_vectors <= 10_000_000 else 262_144 if num_vectors <= 100_000_000 else 1_048_576
    most: int = 2 ** int(math.log2(num_vectors // _TRAINING_PER_LIST))
    return min(wanted, most)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
