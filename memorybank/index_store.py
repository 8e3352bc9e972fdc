"""The published index of a bank's search vectors: built once, opened often, edited without a rebuild.

    <folder>/
      manifest.json   settings: the plan, and a hash of the ids; inputs: vectors, embedder;
                      extra: recall against exact search, as measured when it was built
      search.json     {lists_read, rerank}
      index.faiss, sizes.bin, lists.bin   (index_lists.py)
      query_ids.bin, queries.bin          i8 and float32: what recall was measured with, and the references that
                                          it was taken from

An exact index has no files of its own: it reads the vectors where they are. The vectors themselves belong to
the bank; an index is opened over them. What the bank added since has greater ids and is searched exactly, what
it removed is never found; building again folds both in. It can be built again without an embedder, since it keeps the
queries.

Invariants: an index that misses the recall it was asked for is not published; it is refused over other vectors
than its own; damage is refused by the file's name.

Not here: where vectors come from (embedder.py), which index suits (index_plan.py).
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from data.files import Manifest, is_finished, open_manifest, publishing, write_atomic, write_json_atomic
from memorybank.config import IndexKind
from memorybank.index import (
    SPAN_BYTES,
    Block,
    Blocks,
    Found,
    Ids,
    IdSet,
    Vectors,
    merged,
    ordered,
    search_spans,
)
from memorybank.index_lists import LISTS, SIZES, TRAINED, InvertedLists, write_lists
from memorybank.index_plan import IndexPlan

log = logging.getLogger(__name__)

KIND, VERSION = "search-index", 2
SEARCH = "search.json"
QUERY_IDS, QUERIES = "query_ids.bin", "queries.bin"
CANDIDATES = 64
"""Results that recall is measured in: what retrieval fetches before it filters."""
_QUERIES_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class Listed:
    """Some of a bank's vectors in lists."""

    lists: InvertedLists
    rerank: int = 1
    """Candidates that the lists give per result, scored by their whole vectors."""


class BankIndex:
    """The search index of a bank: lists for some of its vectors, if it has any, the others exactly."""

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        listed: Sequence[Listed] = (),
        exact: Sequence[range] | None = None,
        removed: IdSet | None = None,
    ) -> None:
        """Search `blocks`, whose vectors are each in one of `listed` or among `exact`.

        Args:
            blocks: ids and vectors, ids ascending through all of them.
            listed: lists of some of the vectors.
            exact: positions of those that are in none; None is all.
            removed: what is not found; everything in the lists that is not in the blocks has to be here.
        """
        self._blocks = Blocks(blocks)
        self._listed = listed
        self._exact = [range(len(self._blocks))] if exact is None else exact
        self._removed = removed

    def __len__(self) -> int:
        """Vectors, those that were removed included."""
        return len(self._blocks)

    def search(self, queries: Vectors, k: int) -> Found:
        """Return scores and ids, (n, k), best first; -1 and -inf where there is no more.

        Any number of queries: vectors and lists are gone through once for all of them (lists: for each 262,144),
        with the best k of each query kept.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        spans = chain.from_iterable(self._blocks.spans(span.start, span.stop) for span in self._exact)
        best = search_spans(spans, queries, k, removed=self._removed)
        for listed in self._listed:
            for begin in range(0, len(queries), _QUERIES_AT_ONCE):
                part = slice(begin, begin + _QUERIES_AT_ONCE)
                found = self._search_lists(listed, queries[part], k)
                best[0][part], best[1][part] = merged((best[0][part], best[1][part]), found)
        return best

    def _search_lists(self, listed: Listed, queries: Vectors, k: int) -> Found:
        selector = None
        if self._removed is not None:
            selector = faiss.IDSelectorNot(faiss.IDSelectorBitmap(self._removed.bits))
        scores, ids = listed.lists.search(queries, k * listed.rerank, selector=selector)
        if listed.rerank > 1:
            scores = true_scores(self._blocks, queries, ids)
        return ordered(scores, ids)


def build_index(
    folder: Path,
    blocks: Sequence[Block],
    plan: IndexPlan,
    *,
    queries: Vectors,
    inputs: Mapping[str, str],
    query_ids: Ids,
    recall: float = 0.95,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Build and publish an index; one that stands there already is left, an interrupted one goes on.

    The lists are trained on a sample of the vectors; a query then reads the fewest lists with which `queries`
    reach the recall.

    Args:
        folder: where it shall stand.
        blocks: ids and vectors (float32 or float16, usually memory maps), ids ascending through all of them.
        plan: `plan_index` of their number.
        queries: a thousand or so real search vectors, (n, X), that recall is measured with.
        query_ids: the references whose text they were made of, (n,).
        inputs: fingerprints of the vectors and the name of their embedder.
        recall: share of the exact five best that has to be found.
        progress: told how many vectors each finished shard coded.

    Raises:
        ValueError: vectors of another number or size than planned, ids that do not ascend, no queries, or a
            recall that is not reached even by reading all lists.
    """
    vectors = Blocks(blocks)
    if (len(vectors), vectors.size) != (plan.num_vectors, plan.size):
        raise ValueError(
            f"{folder}: planned for {plan.num_vectors:,} vectors of {plan.size} numbers, but there are "
            f"{len(vectors):,} of {vectors.size}; plan it for these"
        )
    settings = {
        **asdict(plan),
        "kind": plan.kind.name,
        "last_id": vectors.last_id,
        "ids": _hash_of_ids(blocks),
    }
    del settings["rerank"]  # of the search: it may be changed without building anew
    if _stands(folder, settings, inputs, recall):
        return
    log.info("search index: %s", plan.describe())
    report: dict[str, Any] = {"recall_at_5": 1.0, "recall_at_64": 1.0, "recall_wanted": recall}
    with publishing(
        folder, kind=KIND, version=VERSION, settings=settings, inputs=inputs, extra=report
    ) as work:
        if plan.kind is IndexKind.exact:
            return
        if not len(queries):
            raise ValueError(f"{folder}: recall cannot be measured without queries; give a thousand or so")
        write_lists(work, vectors, plan, progress=progress)
        lists = InvertedLists(
            np.fromfile(work / TRAINED, np.uint8),
            np.fromfile(work / SIZES, np.uint64),
            work / LISTS,
            num_read=1,
        )
        index = BankIndex(blocks, listed=[Listed(lists, plan.rerank)], exact=[])
        report |= _tune(index, lists, vectors, queries, recall)
        log.info(
            "search index: reads %d of %d lists; recall@5 %.4f, recall@64 %.4f over %d queries",
            report["lists_read"],
            plan.lists,
            report["recall_at_5"],
            report["recall_at_64"],
            len(queries),
        )
        if report["recall_at_5"] < recall:
            raise ValueError(
                f"{folder}: recall@5 is {report['recall_at_5']:.3f} with all lists read, and {recall} is wanted; "
                "set retrieval.index.kind=ivf_flat, a larger retrieval.index.code_bytes, or a lower "
                "retrieval.index.recall (what is built so far is kept)"
            )
        write_json_atomic(work / SEARCH, {"lists_read": report["lists_read"], "rerank": plan.rerank})
        write_atomic(work / QUERY_IDS, query_ids.astype("<i8").tobytes())
        write_atomic(work / QUERIES, queries.astype("<f4").tobytes())


def open_index(
    folder: Path,
    blocks: Sequence[Block],
    *,
    removed: IdSet | None = None,
    inputs: Mapping[str, str] | None = None,
) -> BankIndex:
    """Open a published index over the vectors of its bank.

    Args:
        folder: the artefact.
        blocks: the vectors it was built from, followed by those added since.
        removed: references that are found no more.
        inputs: fingerprints that it must have been made from; None accepts any.

    Raises:
        ValueError: not there, damaged, or made from other vectors.
    """
    manifest = open_manifest(folder, kind=KIND, version=VERSION, inputs=inputs)
    settings = manifest.settings
    vectors, last_id = Blocks(blocks), int(settings["last_id"])
    found = vectors.begin_after(last_id)
    if found != settings["num_vectors"] or vectors.size != settings["size"]:
        raise ValueError(
            f"{folder} was built from {settings['num_vectors']:,} vectors of {settings['size']} numbers up to id "
            f"{last_id}, but there are {found:,} of {vectors.size}; build it anew"
        )
    if settings["kind"] == IndexKind.exact.name:
        return BankIndex(blocks, removed=removed)
    return BankIndex(
        blocks, listed=[open_lists(manifest)], exact=[range(found, len(vectors))], removed=removed
    )


def open_lists(manifest: Manifest) -> Listed:
    """Return the lists of an opened index that has some."""
    search = json.loads(manifest.text(SEARCH))
    lists = InvertedLists(
        manifest.mapped(TRAINED).read_all(),
        manifest.mapped(SIZES).read_all().view(np.uint64),
        manifest.folder / LISTS,
        num_read=search["lists_read"],
        check=manifest.mapped(LISTS).read,
    )
    return Listed(lists, search["rerank"])


def queries_of(manifest: Manifest) -> tuple[Ids, Vectors]:
    """Return what an index's recall was measured with: references, and a query made of each."""
    ids = manifest.mapped(QUERY_IDS).read_all().view(np.int64)
    return ids, manifest.mapped(QUERIES).read_all().view("<f4").reshape(len(ids), -1)


def true_scores(blocks: Blocks, queries: Vectors, ids: Ids) -> Vectors:
    """Return the inner products of queries (n, X) with the whole vectors of ids (n, k); -inf for -1."""
    scores = np.full(ids.shape, -np.inf, np.float32)
    at_once = max(1, SPAN_BYTES // (4 * blocks.size * ids.shape[1]))
    for begin in range(0, len(queries), at_once):
        part = slice(begin, begin + at_once)
        rows, places = np.nonzero(ids[part] >= 0)
        distinct, inverse = np.unique(ids[part][rows, places], return_inverse=True)
        vectors = blocks.of(distinct)[inverse]
        scores[part][rows, places] = np.einsum("nx,nx->n", queries[part][rows], vectors)
    return scores


def _stands(folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, str], recall: float) -> bool:
    finished = is_finished(folder, kind=KIND, version=VERSION, settings=settings, inputs=inputs)
    return finished and (open_manifest(folder, kind=KIND, version=VERSION).extra["recall_at_5"] >= recall)


def _tune(
    index: BankIndex, lists: InvertedLists, blocks: Blocks, queries: Vectors, wanted: float
) -> dict[str, Any]:
    """Set the fewest lists to read that reach the recall, all if none does; return what was measured."""
    exact, _ = search_spans(blocks.spans(), queries, CANDIDATES)

    def recalls(num_read: int) -> tuple[float, float]:
        lists.num_read = num_read
        ids = index.search(queries, CANDIDATES)[1]
        scores = true_scores(blocks, queries, ids)
        return _recall(scores, exact, 5), _recall(scores, exact, CANDIDATES)

    too_few, enough = 0, 1
    while enough < lists.num_lists and recalls(enough)[0] < wanted:
        too_few, enough = enough, min(2 * enough, lists.num_lists)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if recalls(middle)[0] >= wanted else (middle, enough)
    at_5, at_64 = recalls(enough)
    return {
        "lists_read": enough,
        "recall_at_5": round(at_5, 6),
        "recall_at_64": round(at_64, 6),
        "queries": len(queries),
    }


def _recall(scores: Vectors, exact: Vectors, k: int) -> float:
    """Return the share of the exact k best that was found; of equal vectors, any counts."""
    there = np.isfinite(exact[:, :k])
    last = np.where(there, exact[:, :k], np.inf).min(axis=1, keepdims=True)
    return float(((scores[:, :k] >= last - 1e-6) & there).sum() / max(there.sum(), 1))


def _hash_of_ids(blocks: Sequence[Block]) -> str:
    digest = hashlib.sha256()
    for ids, _ in blocks:
        digest.update(np.ascontiguousarray(ids, np.int64).data)
    return digest.hexdigest()[:16]
