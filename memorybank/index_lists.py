"""Inverted lists: vectors coded shard by shard, merged on disk, and searched list by list.

    index.faiss       the trained index without its lists: centroids (and the graph over them), codebooks
    sizes.bin         uint64: vectors in each list
    lists.bin         list after list: its codes, then its ids (int64); faiss maps it as it is
    shard-NNNNN.bin   while building: sizes (as above), then codes, then ids, both in the order of the lists

Invariants: within a list vectors stand in the order of their ids, and shards are cut at fixed places, so that the
bytes do not depend on interruptions (nor on the cut, but where two centroids are equally near to the last bit);
coding holds one shard in memory and merging one range of lists; a search touches no byte that was not checked.

Not here: which lists there are (index_plan.py), the artefact around these files (index_store.py).
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from data.files import write_atomic, writing
from memorybank.config import IndexKind
from memorybank.index import Blocks, Found, Ids, Vectors, has_gpus, merged, nothing, share_threads
from memorybank.index_plan import IndexPlan

TRAINED, SIZES, LISTS = "index.faiss", "sizes.bin", "lists.bin"
BUCKET_BYTES = 256 << 20
"""Lists that a large batch searches, or that are merged, at a time."""
_SEED = 1234

Sizes = NDArray[np.uint64]


def write_lists(
    work: Path, blocks: Blocks, plan: IndexPlan, *, progress: Callable[[int], None] | None = None
) -> None:
    """Train, code and merge into `work`, going on after what an earlier life finished.

    Args:
        work: the artefact's work folder.
        blocks: the vectors, in ids' order.
        plan: lists and codes.
        progress: told how many vectors each shard settled.
    """
    share_threads()
    if not (work / TRAINED).is_file():
        write_atomic(work / TRAINED, faiss.serialize_index(_trained(blocks, plan)).data)
    shards = [
        (work / f"shard-{number:05d}.bin", begin, min(begin + plan.shard_vectors, len(blocks)))
        for number, begin in enumerate(range(0, len(blocks), plan.shard_vectors))
    ]
    if not (work / LISTS).is_file():
        index = faiss.deserialize_index(np.fromfile(work / TRAINED, np.uint8))
        for path, begin, end in shards:
            if not path.is_file():
                _write_shard(path, index, blocks, begin, end)
            if progress is not None:
                progress(end - begin)
        _merge(work, [_Shard(path, plan) for path, _, _ in shards], plan)
    for path, _, _ in shards:
        path.unlink(missing_ok=True)


class InvertedLists:
    """Lists on disk, memory-mapped; a query reads the `num_read` whose centroids are nearest."""

    def __init__(
        self,
        trained: NDArray[np.uint8],
        sizes: Sizes,
        path: Path,
        *,
        num_read: int,
        check: Callable[[int, int], object] = lambda offset, length: None,
    ) -> None:
        """Open what `write_lists` wrote.

        Args:
            trained: the bytes of index.faiss.
            sizes: vectors in each list.
            path: lists.bin.
            num_read: lists that a query reads.
            check: called with offset and length of bytes of lists.bin before they are first read.
        """
        self.num_read = num_read
        self._index = faiss.deserialize_index(trained)
        self._check = check
        row_bytes = self._index.code_size + 8
        self._ends = np.cumsum(sizes.astype(np.int64)) * row_bytes
        self._begins = self._ends - sizes.astype(np.int64) * row_bytes
        self._checked = sizes == 0
        lists = faiss.OnDiskInvertedLists()
        lists.nlist, lists.code_size = len(sizes), self._index.code_size
        lists.filename, lists.totsize, lists.read_only = str(path), int(self._ends[-1]), True
        lists.lists.resize(len(sizes))
        lists.set_all_lists_sizes(faiss.swig_ptr(np.ascontiguousarray(sizes)))
        lists.do_mmap()
        self._index.replace_invlists(lists, True)
        lists.this.disown()
        self._index.ntotal = int(sizes.sum())

    @property
    def num_lists(self) -> int:
        """All lists."""
        return len(self._begins)

    def search(self, queries: Vectors, k: int, *, selector: object | None = None) -> Found:
        """Return scores (by the codes) and ids, (n, k), in no order among equals; -1 where there is no more.

        A batch that reads every list about once goes through them in the order of the file, `BUCKET_BYTES` at
        a time, for all queries at once: what is larger than the memory is then read from disk once.

        Args:
            queries: (n, X).
            k: results per query.
            selector: faiss's IDSelector of what may be found.
        """
        share_threads()
        queries = np.ascontiguousarray(queries, np.float32)
        coarse, lists = self._index.quantizer.search(queries, self.num_read)
        if not self._visits_all(lists):
            return self._scan(queries, k, lists, coarse, selector)
        best = nothing(len(queries), k)
        for low, high in _ranges(self._ends - self._begins, BUCKET_BYTES):
            inside = (lists >= low) & (lists < high)
            rows = np.flatnonzero(inside.any(axis=1))
            if len(rows):
                own = np.where(inside[rows], lists[rows], -1)
                found = self._scan(queries[rows], k, own, coarse[rows], selector)
                best[0][rows], best[1][rows] = merged((best[0][rows], best[1][rows]), found)
        return best

    def _visits_all(self, lists: Ids) -> bool:
        return bool(lists.size >= self.num_lists and self._ends[-1] > BUCKET_BYTES)

    def _scan(self, queries: Vectors, k: int, lists: Ids, coarse: Vectors, selector: object | None) -> Found:
        """Compare each query with the vectors of its lists (-1 is none)."""
        for number in np.unique(lists[lists >= 0]).tolist():
            if not self._checked[number]:
                begin, end = int(self._begins[number]), int(self._ends[number])
                self._check(begin, end - begin)
                self._checked[number] = True
        scores, ids = nothing(len(queries), k)
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=lists.shape[1])
        arrays = [np.ascontiguousarray(array) for array in (queries, lists, coarse)]
        pointers = [faiss.swig_ptr(array) for array in (*arrays, scores, ids)]
        self._index.search_preassigned_c(len(queries), pointers[0], k, *pointers[1:], False, parameters)
        return scores, ids


class _Shard:
    """A finished shard, memory-mapped."""

    def __init__(self, path: Path, plan: IndexPlan) -> None:
        self.sizes = np.fromfile(path, np.uint64, count=plan.lists).astype(np.int64)
        self.begins = np.concatenate([[0], np.cumsum(self.sizes)])
        num, offset = int(self.begins[-1]), 8 * plan.lists
        self.codes = np.memmap(path, np.uint8, "r", offset, (num, plan.code_bytes))
        self.ids = np.memmap(path, "<i8", "r", offset + num * plan.code_bytes, (num,))


def _trained(blocks: Blocks, plan: IndexPlan) -> faiss.Index:
    """Return an index of the plan's kind with centroids and codes, trained on an even, seeded sample."""
    n, count = len(blocks), plan.training_vectors
    shift = np.random.default_rng(_SEED).random(count)
    positions = np.arange(n) if count == n else ((np.arange(count) + shift) * (n / count)).astype(np.int64)
    index = faiss.index_factory(plan.size, plan.factory, faiss.METRIC_INNER_PRODUCT)
    if has_gpus():
        index.clustering_index = clustering = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(plan.size))
    index.cp.seed = _SEED
    if plan.kind is IndexKind.ivf_pq:
        # A tenth of faiss's default effort: 64 instead of 256 vectors per codeword, 10 instead of 25 rounds.
        index.pq.cp.seed, index.pq.cp.max_points_per_centroid, index.pq.cp.niter = _SEED, 64, 10
    index.train(blocks.at(positions))
    if has_gpus():
        index.clustering_index = None
        del clustering
    return index


def _write_shard(path: Path, index: faiss.Index, blocks: Blocks, begin: int, end: int) -> None:
    """Code the vectors of the positions [begin, end) and write them in the order of the lists."""
    num, done = end - begin, 0
    lists, ids = np.empty(num, np.int64), np.empty(num, np.int64)
    codes = np.empty((num, index.code_size), np.uint8)
    for span_ids, vectors in blocks.spans(begin, end):
        part = slice(done, done + len(span_ids))
        ids[part] = span_ids
        lists[part] = index.quantizer.search(vectors, 1)[1][:, 0]
        pointers = [faiss.swig_ptr(array) for array in (vectors, lists[part], codes[part])]
        index.encode_vectors(len(span_ids), *pointers)
        done = part.stop
    order = np.argsort(lists, kind="stable")
    with writing(path) as file:
        file.write(np.bincount(lists, minlength=index.nlist).astype(np.uint64).data)
        for rows in np.array_split(order, max(1, codes.nbytes // BUCKET_BYTES)):
            file.write(codes[rows].data)
        file.write(ids[order].data)


def _merge(work: Path, shards: list[_Shard], plan: IndexPlan) -> None:
    """Write lists.bin and sizes.bin of all shards, reading each from its beginning to its end."""
    sizes = np.sum([shard.sizes for shard in shards], axis=0)
    write_atomic(work / SIZES, sizes.astype(np.uint64).data)
    with writing(work / LISTS) as file:
        for low, high in _ranges(sizes * (plan.code_bytes + 8), BUCKET_BYTES // 4):
            spans = [(shard, slice(shard.begins[low], shard.begins[high])) for shard in shards]
            lists = np.concatenate([np.repeat(np.arange(low, high), s.sizes[low:high]) for s in shards])
            order = np.argsort(lists, kind="stable")
            codes = np.concatenate([shard.codes[rows] for shard, rows in spans])[order]
            ids = np.concatenate([shard.ids[rows] for shard, rows in spans])[order]
            bounds = np.concatenate([[0], np.cumsum(sizes[low:high])]).tolist()
            for begin, end in pairwise(bounds):
                file.write(codes[begin:end].data)
                file.write(ids[begin:end].data)


def _ranges(sizes: Ids, limit: int) -> Iterator[tuple[int, int]]:
    """Cut lists of these many bytes into ranges of at most `limit` bytes, or of one list."""
    ends, low = np.cumsum(sizes), 0
    while low < len(sizes):
        before = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + limit, side="right")))
        yield low, high
        low = high
