import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order import draw, scrambled

LENGTHS = np.random.default_rng(0).integers(1, 300, size=400)
NEVER = np.zeros(400, dtype=np.int64)
FIRST, SECOND = np.arange(300), np.arange(300, 400)


def test_tokens_follow_the_weights_everywhere() -> None:
    drawn = draw([FIRST, SECOND], [3.0, 1.0], LENGTHS, NEVER, num_rows=300, row_tokens=128, seed=0)
    assert LENGTHS[drawn].sum() >= 300 * 128 + 1
    assert LENGTHS[drawn[:-1]].sum() < 300 * 128 + 1
    for part in np.array_split(drawn, 4):
        share = LENGTHS[part[part >= 300]].sum() / LENGTHS[part].sum()
        assert share == pytest.approx(0.25, abs=0.05)


def test_drawing_again_takes_those_drawn_least() -> None:
    times = NEVER.copy()
    seen = np.zeros(400, dtype=np.int64)
    for seed in range(6):
        drawn = draw([FIRST], [1.0], LENGTHS, times, num_rows=100, row_tokens=128, seed=seed)
        np.add.at(times, drawn, 1)
        seen = times[FIRST]
        assert seen.max() - seen.min() <= 1
    assert seen.min() >= 1


def test_a_small_source_comes_again_in_another_order() -> None:
    drawn = draw([np.arange(5)], [1.0], LENGTHS, NEVER, num_rows=40, row_tokens=128, seed=0)
    passes = [drawn[i : i + 5] for i in range(0, len(drawn) - 5, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_pure_and_seeded() -> None:
    times = NEVER.copy()
    first = draw([FIRST, SECOND], [1.0, 0.0], LENGTHS, times, num_rows=20, row_tokens=64, seed=1)
    assert (times == 0).all()
    assert set(first) <= set(FIRST)
    again = draw([FIRST[::-1], SECOND], [1.0, 0.0], LENGTHS, times, num_rows=20, row_tokens=64, seed=1)
    assert (first == again).all(), "the order of the candidates does not matter"
    other = draw([FIRST, SECOND], [1.0, 0.0], LENGTHS, times, num_rows=20, row_tokens=64, seed=2)
    assert not np.array_equal(first, other)


def test_hash_is_the_same_forever() -> None:
    assert scrambled(0, np.array([0, 1, -1])).tolist() == GOLDEN
    assert len(np.unique(scrambled(7, np.arange(10_000)))) == 10_000


GOLDEN = [12035550249420947055, 627405149472732430, 3303439293501059696]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=2, max_size=30),
    weight=st.floats(0.01, 1),
    num_rows=st.integers(1, 20),
    row_tokens=st.integers(1, 40),
)
def test_there_is_always_enough(lengths: list[int], weight: float, num_rows: int, row_tokens: int) -> None:
    tokens = np.array(lengths)
    numbers = np.arange(len(tokens))
    drawn = draw(
        [numbers[:1], numbers[1:]],
        [weight, 1.0],
        tokens,
        np.zeros_like(tokens),
        num_rows=num_rows,
        row_tokens=row_tokens,
        seed=0,
    )
    assert tokens[drawn].sum() >= num_rows * row_tokens + 1
    assert tokens[drawn[:-1]].sum() < num_rows * row_tokens + 1


def test_nothing_to_draw_is_refused() -> None:
    empty = np.empty(0, dtype=np.int64)
    with pytest.raises(ValueError, match=r"source 1 \(weight 2\) has no document"):
        draw([FIRST, empty], [1.0, 2.0], LENGTHS, NEVER, num_rows=1, row_tokens=8, seed=0)
    with pytest.raises(ValueError, match="every source has weight 0"):
        draw([FIRST], [0.0], LENGTHS, NEVER, num_rows=1, row_tokens=8, seed=0)
