"""`train.arms`: derangements, slot masks, no leakage of the row's own documents, the oracle, hits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorybank.config import QueryMode
from memorybank.pool import fresh_slots, window_slots
from train.arms import (
    Arm,
    Bank,
    Pattern,
    derangement,
    fold,
    hits,
    holders,
    probe_readings,
    randomised,
    reference_ids,
    shuffled,
    text_readings,
)

ROWS, CHUNKS, FRESH = 12, 8, 5


def bank(num_references=400, per_document=10):
    return Bank(ids=np.arange(num_references), document_of=np.arange(num_references) // per_document)


def retrieved(seed, documents):
    """Ids as retrieval gives them: distinct within a chunk, repeating across chunks, not of own documents."""
    rng = np.random.default_rng(seed)
    ids = np.full((len(documents), CHUNKS, FRESH), -1, np.int64)
    for row, own in enumerate(documents):
        near = rng.choice(np.flatnonzero(~np.isin(bank().document_of, own)), size=12, replace=False)
        for chunk in range(CHUNKS):
            found = rng.integers(0, FRESH + 1)
            ids[row, chunk, :found] = rng.choice(near, size=found, replace=False)
    return ids


def packed_documents(seed=0):
    """Neighbouring rows share a document, as packed rows do."""
    rng = np.random.default_rng(seed)
    first = rng.permutation(40)[: ROWS + 1]
    return [first[row : row + 2].astype(np.int64) for row in range(ROWS)]


def leaks(ids, documents):
    return any(
        np.isin(bank().document_of[row[row >= 0]], own).any() for row, own in zip(ids, documents, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 25), st.floats(0.4, 1.0), st.integers(0, 5))
def test_derangement_takes_from_allowed_rows_once_each(num_rows, density, seed):
    allowed = np.random.default_rng(seed).random((num_rows, num_rows)) < density
    donors = derangement(allowed, seed=seed)
    rows = np.flatnonzero(donors >= 0)
    assert (donors[rows] != rows).all()
    assert allowed[rows, donors[rows]].all()
    assert len(set(donors[rows].tolist())) == len(rows)


@pytest.mark.parametrize("num_rows", [2, 3, 50, 300])
def test_derangement_is_complete_where_only_neighbours_are_excluded(num_rows):
    row = np.arange(num_rows)
    apart = num_rows > 10
    allowed = np.abs(row[:, None] - row[None]) > apart
    donors = derangement(allowed, seed=0)
    assert sorted(donors.tolist()) == row.tolist()
    assert (np.abs(donors - row) > apart).all()


def test_derangement_is_fixed_by_the_seed():
    allowed = np.ones((30, 30), bool)
    assert (derangement(allowed, seed=1) == derangement(allowed, seed=1)).all()
    assert (derangement(allowed, seed=1) != derangement(allowed, seed=2)).any()


def test_a_row_that_can_take_from_none_has_no_donor():
    assert derangement(np.ones((1, 1), bool), seed=0).tolist() == [-1]
    allowed = np.ones((5, 5), bool)
    allowed[2] = False
    donors = derangement(allowed, seed=0)
    assert donors[2] == -1
    assert (np.delete(donors, 2) >= 0).all()


def test_shuffled_by_hand():
    """Row 0 takes from row 1: 31 is read, own reference and gap filled at random, an empty slot stays."""
    ids = np.array([[[50, 51, 52, -1]], [[31, 5, -1, 33]]])
    documents = [np.array([0]), np.array([9])]
    swapped = shuffled(ids, np.array([1, -1]), documents, bank(), seed=0)
    assert swapped[0, 0, 0] == 31
    assert swapped[0, 0, 3] == -1
    assert swapped[0, 0, 1] not in (-1, 5)
    assert swapped[0, 0, 2] != -1
    assert (swapped[1, 0] >= 0).tolist() == [True, True, False, True]
    assert not leaks(swapped, documents)


@pytest.mark.parametrize("query", list(QueryMode))
@pytest.mark.parametrize("pattern", list(Pattern))
def test_every_text_arm_reads_in_the_slots_of_memory_and_never_its_own_documents(query, pattern):
    documents = packed_documents()
    readings = text_readings(retrieved(1, documents), documents, bank(), seed=0, window=5, random_query=query)
    chosen = {r.arm: r.ids_MCK for r in readings if (r.query, r.pattern) == (query, pattern)}
    assert set(chosen) == {Arm.memory, Arm.shuffled, Arm.random}
    for ids in chosen.values():
        assert ((ids >= 0) == (chosen[Arm.memory] >= 0)).all()
        assert not leaks(ids, documents)
        in_order = np.sort(ids, axis=2)
        assert not ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0)).any()
    for wrong in (Arm.shuffled, Arm.random):
        assert (chosen[wrong] != chosen[Arm.memory])[chosen[Arm.memory] >= 0].mean() > 0.9


def test_memory_is_what_was_retrieved():
    documents = packed_documents()
    ids = retrieved(1, documents)
    by_mode = {
        (r.query, r.pattern): r
        for r in text_readings(ids, documents, bank(), seed=0, window=3)
        if r.arm is Arm.memory
    }
    assert len(by_mode) == 4
    for query in QueryMode:
        assert (by_mode[query, Pattern.inference].ids_MCK == fresh_slots(ids, query)).all()
        windows = window_slots(ids[:, :, 0], query, window=3)
        assert (by_mode[query, Pattern.training].ids_MCK == windows).all()


def test_shuffled_text_is_chunk_by_chunk_that_of_one_row_without_a_common_document():
    documents = packed_documents()
    full = np.maximum(retrieved(2, documents), 0)
    full[:] = np.arange(200, 200 + FRESH) + FRESH * np.arange(ROWS)[:, None, None]
    far = Bank(bank().ids, bank().document_of + 1000)  # no reference is of a row's document
    readings = text_readings(full, documents, far, seed=3, window=5)
    fresh = {r.arm: r for r in readings if (r.query, r.pattern) == (QueryMode.own, Pattern.inference)}
    for row in range(ROWS):
        donor = (fresh[Arm.shuffled].ids_MCK[row, 0, 0] - 200) // FRESH
        assert (fresh[Arm.shuffled].ids_MCK[row] == full[donor]).all()
        assert not np.isin(documents[row], documents[donor]).any()
    assert fresh[Arm.shuffled].note == ""


def test_random_repeats_itself_where_memory_does():
    documents = packed_documents()
    ids = retrieved(4, documents)
    drawn = randomised(ids, documents, bank(), seed=0)
    for row in range(ROWS):
        pairs = set(zip(ids[row].ravel().tolist(), drawn[row].ravel().tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_random_is_uniform_over_the_rest_of_the_bank():
    ids = np.zeros((4000, 1, 1), np.int64)
    drawn = randomised(ids, [np.array([0])] * 4000, bank(50), seed=0)
    counts = np.bincount(drawn.ravel(), minlength=50)
    assert (counts[:10] == 0).all()
    assert counts[10:].min() > 60
    assert counts[10:].max() < 145


def test_no_memory_stands_once_and_random_only_where_asked():
    documents = packed_documents()
    readings = text_readings(retrieved(1, documents), documents, bank(), seed=0, window=5)
    assert [r.arm for r in readings].count(Arm.none) == 1
    assert all(r.arm is not Arm.random for r in readings)
    light = text_readings(
        retrieved(1, documents), documents, bank(), seed=0, window=5,
        queries=[QueryMode.own], patterns=[Pattern.training],
    )  # fmt: skip
    assert [r.arm for r in light] == [Arm.none, Arm.memory, Arm.shuffled]


def test_a_lone_row_reads_random_references_and_says_so():
    documents = packed_documents()[:1]
    readings = text_readings(retrieved(1, documents), documents, bank(), seed=0, window=5)
    notes = {r.note for r in readings if r.arm is Arm.shuffled}
    assert notes == {"1 of 1 rows had none to take from and read random references"}


def test_an_exhausted_bank_leaves_slots_empty():
    tiny = Bank(np.arange(12), bank().document_of)
    drawn = randomised(np.arange(4).reshape(1, 1, 4) + 20, [np.array([0])], tiny, seed=0)
    assert sorted(drawn.ravel().tolist()) == [-1, -1, 10, 11]


def probes_of(num_countries=6, relations=("capital", "area")):
    """Country c has document c, and is asked for each relation; its references are c*10 to c*10 + 9."""
    groups = [f"country {c}" for c in range(num_countries) for _ in relations]
    names = [relation for _ in range(num_countries) for relation in relations]
    documents = [np.array([c]) for c in range(num_countries) for _ in relations]
    ids = np.array(
        [
            [c * 10 + r, c * 10 + r + 2, 300 + c, 5, -1]
            for c in range(num_countries)
            for r in range(len(relations))
        ]
    )
    return groups, names, documents, ids


def test_probe_arms():
    groups, names, documents, ids = probes_of()
    # References of other documents hold the answer too: 355, and 1, the lowest.
    holding = [
        np.array([355, 1, *(own * 10 + 4), *(own * 10 + 3)]) if own[0] else np.array([355])
        for own in documents
    ]
    readings = {
        r.arm: r
        for r in probe_readings(
            ids, documents, bank(), relations=names, groups=groups, holding=holding, seed=0
        )
    }
    assert list(readings) == [Arm.none, Arm.memory, Arm.shuffled, Arm.random, Arm.oracle, Arm.rag]
    assert readings[Arm.none].ids_MCK is None
    assert (readings[Arm.memory].ids_MCK[:, 0] == ids).all()
    assert (readings[Arm.rag].ids_MCK[:, 0] == ids[:, :3]).all()
    assert "lower bound" in readings[Arm.rag].note
    oracle = readings[Arm.oracle].ids_MCK
    assert oracle.shape == (len(ids), 1, 1)
    assert oracle.ravel().tolist() == [own[0] * 10 + 3 if own[0] else -1 for own in documents]
    for arm in (Arm.shuffled, Arm.random):
        wrong = readings[arm].ids_MCK
        assert ((wrong[:, 0] >= 0) == (ids >= 0)).all()
        assert not leaks(wrong, documents)
    for probe, slots in enumerate(readings[Arm.shuffled].ids_MCK[:, 0]):
        donor = next(p for p, theirs in enumerate(ids) if theirs[0] == slots[0])
        assert names[donor] == names[probe]
        assert groups[donor] != groups[probe]
        assert slots[2] == ids[donor, 2]


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_probes_leave_their_country(seed):
    groups, names, documents, ids = probes_of(num_countries=3, relations=("capital", "capital", "area"))
    empty = [np.empty(0, np.int64)] * len(ids)
    swapped = probe_readings(
        ids, documents, bank(), relations=names, groups=groups, holding=empty, seed=seed
    )[2].ids_MCK
    assert (swapped[:, 0, 2] != ids[:, 2]).all()


def test_what_fills_a_gap_does_not_stand_in_the_row_already():
    ids = np.array([[[30, 31, 32, 33]], [[10, 11, 12, -1]]])
    documents = [np.array([3]), np.array([9])]
    few = Bank(np.arange(10, 14), bank().document_of)
    for seed in range(5):
        swapped = shuffled(ids, np.array([1, 0]), documents, few, seed=seed)
        assert sorted(swapped[0, 0].tolist()) == [10, 11, 12, 13]


def test_a_relation_of_one_country_reads_random_references_and_says_so():
    groups, names, documents, ids = probes_of(num_countries=1)
    empty = [np.empty(0, np.int64)] * 2
    readings = probe_readings(ids, documents, bank(), relations=names, groups=groups, holding=empty, seed=0)
    assert readings[2].arm is Arm.shuffled
    assert readings[2].note.startswith("2 of 2 probes")
    assert ((readings[2].ids_MCK >= 0) == (ids[:, None] >= 0)).all()


def test_everything_is_decided_by_the_seed():
    documents = packed_documents()
    ids = retrieved(1, documents)

    def read(seed):
        readings = text_readings(ids, documents, bank(), seed=seed, window=5, random_query=QueryMode.own)
        return [r.ids_MCK for r in readings if r.arm in (Arm.shuffled, Arm.random)]

    assert all((a == b).all() for a, b in zip(read(0), read(0), strict=True))
    assert any((a != b).any() for a, b in zip(read(0), read(1), strict=True))


def test_reference_ids_are_what_the_bank_must_hold():
    groups, names, documents, ids = probes_of()
    holding = [own * 10 + 4 for own in documents]
    readings = probe_readings(ids, documents, bank(), relations=names, groups=groups, holding=holding, seed=0)
    wanted = {i for r in readings[1:5] for i in r.ids_MCK.ravel().tolist() if i >= 0}
    assert reference_ids(readings).tolist() == sorted(wanted)
    assert reference_ids([readings[0], readings[5]]).size == 0


def test_holding_and_hits():
    texts = {1: "The capital is  Saint\nJohn's.", 2: "saint john's", 3: "St. John's", 4: "none"}
    held = holders(
        [" Saint John's", "nowhere"], [np.array([4, 1, 2, 3]), np.array([1, 4])], texts.__getitem__
    )
    assert [ids.tolist() for ids in held] == [[1, 2], []]
    found = np.array([[4, 2, -1], [1, -1, -1]])
    assert hits(found, held, first=1).tolist() == [False, False]
    assert hits(found, held, first=5).tolist() == [True, False]
    assert fold("  A\n b ") == "a b"
