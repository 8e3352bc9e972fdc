import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorybank.overlap import exceeds, num_exceeded, overlap

tokens = st.lists(st.integers(0, 5), max_size=14)


def test_a_text_overlaps_itself_wholly() -> None:
    text = [5, 7, 5, 9]
    assert overlap(text, text) == 1
    assert exceeds(text, text, 0.99)
    assert not exceeds(text, text, 1.0)


def test_definition_by_hand() -> None:
    assert overlap([1, 9, 2, 9, 3], [1, 2, 3]) == 1
    assert overlap([3, 2, 1], [1, 2, 3]) == pytest.approx(1 / 3)
    assert overlap([], [1]) == 0
    assert overlap([1], []) == 0


@pytest.mark.parametrize(("gap", "expected"), [(3, 1.0), (4, 0.5)])
def test_matches_further_apart_than_twice_the_reference_do_not_count(gap: int, expected: float) -> None:
    text = [1] + [0] * gap + [2]  # i_N - i_1 = gap + 1, allowed up to 2 * 2
    assert overlap(text, [1, 2]) == expected
    assert exceeds(text, [1, 2], 0.9) is (expected > 0.9)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.integers(0, 5), max_size=40), reference=tokens, limit=st.floats(-0.1, 1.1))
def test_fast_filter_equals_the_definition(text: list[int], reference: list[int], limit: float) -> None:
    assert exceeds(text, reference, limit) == (overlap(text, reference) > limit)


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.integers(0, 5), max_size=40),
    reference=tokens,
    limits=st.lists(st.floats(0, 1), max_size=5).map(sorted),
)
def test_limits_exceeded_are_counted(text: list[int], reference: list[int], limits: list[float]) -> None:
    found = overlap(text, reference)
    assert num_exceeded(text, reference, limits) == sum(found > limit for limit in limits)


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.integers(0, 3), max_size=40), reference=tokens, share=st.integers(0, 14))
def test_equal_at_the_limit_itself(text: list[int], reference: list[int], share: int) -> None:
    limit = share / max(1, len(reference))
    assert exceeds(text, reference, limit) == (overlap(text, reference) > limit)


def test_equal_at_real_sizes() -> None:
    """Rows of 512 with a scattered, a compact and a stretched copy of a reference of 30 tokens."""
    rng = random.Random(0)
    for stretch in (1, 2, 3, 10):
        row = [rng.randrange(4096) for _ in range(512)]
        reference = [rng.randrange(4096) for _ in range(30)]
        begin = rng.randrange(512 - 30 * stretch)
        row[begin : begin + 30 * stretch : stretch] = reference
        for limit in (0.5, 2 / 3, 0.9):
            assert exceeds(row, reference, limit) == (overlap(row, reference) > limit)


def test_token_numbers_that_are_surrogate_code_points_are_compared_too() -> None:
    assert exceeds([0xD800, 0xDFFF], [0xD800, 0xDFFF], 0.9)
