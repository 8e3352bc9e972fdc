from dataclasses import fields

import numpy as np
import pytest

from data.references import References
from memorybank import neighbours
from memorybank.config import QueryMode
from memorybank.neighbours import Neighbours, find
from memorybank.overlap import overlap
from memorybank.pool import fresh_slots, window_slots
from tests.support.memorybank import embedder, index_of, tokenizer

ROW, CHUNK = 256, 64


def row_of(passages: References, *documents: int) -> np.ndarray:
    """The tokens of these documents' references, one after the other, cut to a row."""
    tokens = [
        token
        for document in documents
        for id in np.flatnonzero(passages.document_of == document).tolist()
        for token in passages.content_tokens(id)
    ]
    return np.array(tokens[:ROW])


def queries(*rows: np.ndarray) -> np.ndarray:
    chunks = [
        tokenizer().decode(row[begin : begin + CHUNK].tolist())
        for row in rows
        for begin in range(0, ROW, CHUNK)
    ]
    return embedder().embed(chunks).reshape(len(rows), ROW // CHUNK, -1)


def search(
    passages: References, rows: list[np.ndarray], documents: list[np.ndarray], **changes: object
) -> Neighbours:
    settings = {"k": 3, "limit": 0.9, "candidates": 64} | changes
    return find(queries(*rows), documents, rows, index_of(passages), passages, **settings)


def test_no_reference_of_a_document_in_the_row_is_read(passages: References) -> None:
    rows = [row_of(passages, 0, 1), row_of(passages, 5, 6)]
    documents = [np.array([0, 1]), np.array([5, 6])]
    found = search(passages, rows, documents)
    for row in range(2):
        assert not np.isin(passages.document_of[found.ids_MCk[row]], documents[row]).any()
    assert found.refused_own_document > 0
    # allowed, the paper's way, the row's own text is what it finds first
    own = search(passages, rows, documents, allow_own_document=True, limit=None)
    assert own.refused_own_document == 0
    assert np.isin(passages.document_of[own.ids_MCk[0, 0, 0]], [0, 1])


def test_forbidden_passages_never_come_back(passages: References) -> None:
    """With nothing but the row's own document in the index every slot stays empty."""
    only = np.flatnonzero(passages.document_of == 3)
    row = row_of(passages, 3)
    found = find(queries(row), [np.array([3])], [row], index_of(passages, only), passages, k=2, limit=0.9)
    assert (found.ids_MCk == -1).all()
    assert np.isneginf(found.scores_MCk).all()
    assert found.exhausted == found.ids_MCk.size
    assert (found.refused_own_MC == len(only)).all()


def test_too_few_candidates_leave_slots_empty(passages: References) -> None:
    two = np.array([1, 2])
    row = row_of(passages, 20)
    found = find(queries(row), [np.array([20])], [row], index_of(passages, two), passages, k=5, limit=0.9)
    assert (np.sort(found.ids_MCk[..., :2]) == two).all()
    assert (found.ids_MCk[..., 2:] == -1).all()


def test_near_copies_in_other_documents_are_refused_and_counted(passages: References) -> None:
    """The row's document is taken for another one: then only the overlap filter stands between."""
    row = row_of(passages, 4)
    stranger = [np.array([-7])]
    without = search(passages, [row], stranger, limit=None)
    filtered = search(passages, [row], stranger)
    assert (passages.document_of[without.ids_MCk[0, :, 0]] == 4).any()
    shares = [overlap(row, passages.content_tokens(id)) for id in np.unique(filtered.ids_MCk).tolist()]
    assert max(shares) <= 0.9
    changed = (filtered.ids_MCk != without.ids_MCk).any(axis=2)
    assert changed.any()
    assert (filtered.refused_overlap_MC[changed] > 0).all()
    assert (filtered.refused_overlap_MC[~changed] == 0).all()


def test_equals_the_definition(passages: References) -> None:
    row, document = row_of(passages, 2), np.array([17])
    limit, candidates = 0.3, 12
    found = search(passages, [row], [document], limit=limit, candidates=candidates)
    _, ids = index_of(passages).search(queries(row)[0], len(passages))
    share = {id: overlap(row, passages.content_tokens(id)) for id in np.unique(ids).tolist()}
    for chunk in range(ROW // CHUNK):
        passing = [
            id
            for id in ids[chunk].tolist()
            if passages.document_of[id] not in document and share[id] <= limit
        ]
        assert found.ids_MCk[0, chunk].tolist() == (passing + [-1] * 3)[:3]
    assert found.refused_overlap > 0


def test_a_long_text_whose_nearest_references_are_all_its_own_reads_others(
    passages: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few candidates are looked at first, and however few searches are made at once."""
    rows, documents = [row_of(passages, 0, 1), row_of(passages, 5, 6)], [np.array([0, 1]), np.array([5, 6])]
    enough = search(passages, rows, documents, candidates=len(passages))
    monkeypatch.setattr(neighbours, "_DEEPER_RESULTS", 8)
    few = search(passages, rows, documents, candidates=3)
    for field in fields(Neighbours):
        assert np.array_equal(getattr(few, field.name), getattr(enough, field.name))
    assert (few.ids_MCk[0] >= 0).all()
    assert (few.refused_own_MC >= 3).any()


def test_in_previous_mode_a_chunk_decides_nothing_for_itself_or_those_before_it(passages: References) -> None:
    """Searched with real vectors, without the overlap filter (which sees the whole row)."""
    row, document = row_of(passages, 2), np.array([2])
    changed = row.copy()
    changed[2 * CHUNK : 3 * CHUNK] = row_of(passages, 11)[:CHUNK]
    a, b = (search(passages, [tokens], [document], k=1, limit=None).ids_MCk for tokens in (row, changed))
    assert (a[0, 2] != b[0, 2]).any()
    for before, after in (
        (window_slots(a[..., 0], QueryMode.previous), window_slots(b[..., 0], QueryMode.previous)),
        (fresh_slots(a, QueryMode.previous), fresh_slots(b, QueryMode.previous)),
    ):
        assert (before[:, :3] == after[:, :3]).all()
        assert (before[:, 3] != after[:, 3]).any()


def test_a_chunk_without_text_finds_nothing(passages: References) -> None:
    row = row_of(passages, 2)
    vectors = queries(row)
    vectors[0, 1] = 0
    found = find(vectors, [np.array([2])], [row], index_of(passages), passages, k=2)
    assert (found.ids_MCk[0, 1] == -1).all()
    assert (found.ids_MCk[0, 0] >= 0).all()


def test_rows_must_come_with_their_documents(passages: References) -> None:
    row = row_of(passages, 2)
    with pytest.raises(ValueError, match="1 rows"):
        find(queries(row), [], None, index_of(passages), passages, k=1)
