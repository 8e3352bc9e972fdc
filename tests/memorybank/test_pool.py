import numpy as np
import pytest

from memorybank.config import QueryMode
from memorybank.pool import distinct, fresh_slots, window_slots


def test_own_window_reads_the_chunk_and_those_before_it() -> None:
    slots = window_slots(np.array([[10, 11, 12, 13]]), QueryMode.own, window=3)
    assert slots.tolist() == [[[-1, -1, 10], [-1, 10, 11], [10, 11, 12], [11, 12, 13]]]


def test_previous_window_never_reads_what_its_own_text_found() -> None:
    slots = window_slots(np.array([[10, 11, 12, 13]]), QueryMode.previous, window=3)
    assert slots.tolist() == [[[-1, -1, -1], [-1, -1, 10], [-1, 10, 11], [10, 11, 12]]]


@pytest.mark.parametrize("query", list(QueryMode))
def test_windows_longer_than_the_row(query: QueryMode) -> None:
    slots = window_slots(np.array([[4, 5]]), query, window=5)
    assert slots.shape == (1, 2, 5)
    assert set(slots[0, 1].tolist()) == ({-1, 4, 5} if query is QueryMode.own else {-1, 4})


def test_a_reference_found_twice_is_read_once() -> None:
    slots = window_slots(np.array([[7, 7, 8, 7]]), QueryMode.own, window=4)
    assert slots[0, 3].tolist() == [7, -1, 8, -1]


def test_fresh_slots() -> None:
    ids = np.array([[[1, 2], [3, 3], [5, -1]]])
    assert fresh_slots(ids, QueryMode.own).tolist() == [[[1, 2], [3, -1], [5, -1]]]
    assert fresh_slots(ids, QueryMode.previous).tolist() == [[[-1, -1], [1, 2], [3, -1]]]


def test_previous_mode_is_causal() -> None:
    """What chunk c finds changes no slot of chunks 0..c."""
    before = np.arange(6)[None]
    after = before.copy()
    after[0, 3] = 99
    a = window_slots(before, QueryMode.previous)
    b = window_slots(after, QueryMode.previous)
    assert (a[:, :4] == b[:, :4]).all()
    assert (a[:, 4] != b[:, 4]).any()


def test_pool_holds_each_reference_once_and_empty_slots_stay_empty() -> None:
    ids = np.array([[[30, -1], [10, 30]], [[-1, -1], [20, 10]]])
    distinct_ids, slots = distinct(ids)
    assert distinct_ids.tolist() == [10, 20, 30]
    assert slots.tolist() == [[[2, -1], [0, 2]], [[-1, -1], [1, 0]]]


def test_no_reference_at_all() -> None:
    distinct_ids, slots = distinct(np.full((2, 3, 5), -1))
    assert distinct_ids.shape == (0,)
    assert (slots == -1).all()


def test_no_empty_slot_at_all() -> None:
    distinct_ids, slots = distinct(np.array([[[0, 3]]]))
    assert distinct_ids.tolist() == [0, 3]
    assert slots.tolist() == [[[0, 1]]]
