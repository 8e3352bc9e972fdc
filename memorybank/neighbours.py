"""For every chunk of every row, the references it may read: search wide, then refuse, then take the best.

Of the candidates of a chunk, in the order of their scores, are refused (1) every reference of a document of
which the row holds a token, and (2) every reference that the row overlaps by more than the limit (paper,
section 4.4, with t = the whole row). The next that passes is taken. A chunk whose slots are not filled is searched
again, twice as deep each time, until they are or the index gives no more: then a slot stays empty (-1), and a refused
reference never comes back. So a long text, whose nearest references are all its own, reads others' all the same.

Not here: how chunks share what they found (pool.py) and the overlap itself (overlap.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from data.references import ReferenceSource
from memorybank.index import SearchIndex
from memorybank.overlap import exceeds

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]
_DEEPER_RESULTS = 1 << 22
"""Results of deeper searches held at once: some 100 MB."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What the chunks of M rows found, and what was refused on the way."""

    ids_MCk: Ids
    """References in the order of their scores; -1 = empty."""
    scores_MCk: Vectors
    """Inner products; -inf = empty."""
    refused_own_MC: Ids
    """Better candidates refused because the row holds a token of their document."""
    refused_overlap_MC: Ids
    """Better candidates refused because the row overlaps them."""

    @property
    def refused_own_document(self) -> int:
        """All refusals for the document's sake."""
        return int(self.refused_own_MC.sum())

    @property
    def refused_overlap(self) -> int:
        """All refusals for the overlap's sake."""
        return int(self.refused_overlap_MC.sum())

    @property
    def exhausted(self) -> int:
        """Slots left empty because no candidate was left."""
        return int((self.ids_MCk < 0).sum())


def find(
    query_vectors_MCX: Vectors,
    row_documents: Sequence[Ids],
    row_tokens: Sequence[Sequence[int] | NDArray[np.integer]] | None,
    index: SearchIndex,
    references: ReferenceSource,
    *,
    k: int,
    candidates: int = 64,
    limit: float | None = None,
    allow_own_document: bool = False,
) -> Neighbours:
    """Return the k best references that each chunk may read.

    Args:
        query_vectors_MCX: one search vector per chunk; a zero vector (no text) finds nothing.
        row_documents: for each row the numbers of the documents of which it holds a token.
        row_tokens: for each row the tokens that references are compared with; None compares nothing.
        index: search vectors of the references, under their numbers.
        references: documents and tokens of the references.
        k: references per chunk.
        candidates: references searched per chunk at first.
        limit: largest overlap that passes; None lets all pass.
        allow_own_document: lets references of the row's own documents pass.
    """
    num_rows, num_chunks, size = query_vectors_MCX.shape
    if len(row_documents) != num_rows or (row_tokens is not None and len(row_tokens) != num_rows):
        raise ValueError(f"{num_rows} rows of queries, but documents or tokens of another number of rows")
    scores, ids = index.search(query_vectors_MCX.reshape(-1, size), candidates)
    scores_MCc = scores.reshape(num_rows, num_chunks, candidates)
    ids_MCc = ids.reshape(num_rows, num_chunks, candidates).copy()
    ids_MCc[~query_vectors_MCX.any(axis=2)] = -1

    found = Neighbours(
        ids_MCk=np.full((num_rows, num_chunks, k), -1, np.int64),
        scores_MCk=np.full((num_rows, num_chunks, k), -np.inf, np.float32),
        refused_own_MC=np.zeros((num_rows, num_chunks), np.int64),
        refused_overlap_MC=np.zeros((num_rows, num_chunks), np.int64),
    )
    compares = row_tokens is not None and limit is not None
    for row in range(num_rows):
        ids_Cc = ids_MCc[row]
        # -1 looks up the last reference's document: harmless, since an empty candidate ends the search.
        own_Cc = np.isin(references.documents_of(ids_Cc), row_documents[row]) & (not allow_own_document)
        overlaps: dict[int, bool] = {}
        for chunk in range(num_chunks):
            taken = 0
            for place, id in enumerate(ids_Cc[chunk].tolist()):
                if taken == k or id < 0:
                    break
                if own_Cc[chunk, place]:
                    found.refused_own_MC[row, chunk] += 1
                    continue
                if compares and id not in overlaps:
                    assert row_tokens is not None
                    assert limit is not None
                    overlaps[id] = exceeds(row_tokens[row], references.content_tokens(id), limit)
                if overlaps.get(id, False):
                    found.refused_overlap_MC[row, chunk] += 1
                    continue
                found.ids_MCk[row, chunk, taken] = id
                found.scores_MCk[row, chunk, taken] = scores_MCc[row, chunk, place]
                taken += 1

    unfilled = np.argwhere((found.ids_MCk[..., -1] < 0) & (ids_MCc[..., -1] >= 0))
    at_once = max(1, _DEEPER_RESULTS // (2 * candidates))
    for begin in range(0, len(unfilled), at_once):
        rows, chunks = unfilled[begin : begin + at_once].T
        deeper = find(
            query_vectors_MCX[rows, chunks][:, None],
            [row_documents[row] for row in rows],
            None if row_tokens is None else [row_tokens[row] for row in rows],
            index,
            references,
            k=k,
            candidates=2 * candidates,
            limit=limit,
            allow_own_document=allow_own_document,
        )
        for field in fields(Neighbours):
            getattr(found, field.name)[rows, chunks] = getattr(deeper, field.name)[:, 0]
    return found
