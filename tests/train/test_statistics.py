"""`train.statistics`: means by hand, intervals against closed forms, pairing, seeds."""

import math

import numpy as np
import pytest

from train.statistics import group_sums, mean_interval, paired_interval


def test_group_sums_by_hand():
    units, sums, counts = group_sums([1.0, 2.0, 4.0], ["b", "a", "b"], counts=[1, 1, 3])
    assert units == ["a", "b"]
    assert sums.tolist() == [2.0, 5.0]
    assert counts.tolist() == [1.0, 4.0]
    assert group_sums([1.0, 2.0, 4.0], ["b", "a", "b"])[2].tolist() == [1.0, 2.0]


def test_the_mean_weighs_units_by_their_counts():
    assert mean_interval([2.0, 6.0], [1, 3]).mean == pytest.approx(8 / 4)


def test_the_mean_over_seeds_weighs_seeds_equally():
    assert mean_interval([[2.0, 2.0], [4.0, 4.0]], [[1, 1], [1, 1]]).mean == pytest.approx(3.0)


def test_width_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(size=200)
    interval = mean_interval(values, np.ones(200), samples=20_000)
    half = 1.96 * values.std() / math.sqrt(200)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        interval = mean_interval(rng.normal(size=60), np.ones(60), samples=500, seed=trial)
        covered += interval.low <= 0.0 <= interval.high
    assert 0.90 <= covered / 200 <= 0.98


def test_pairing_removes_what_the_arms_share():
    rng = np.random.default_rng(2)
    hardness, counts = rng.normal(scale=3.0, size=100), np.ones(100)
    ours, theirs = hardness + rng.normal(scale=0.1, size=100), hardness + 0.5
    paired = paired_interval(theirs, ours, counts)
    alone = mean_interval(theirs, counts)
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)
    assert paired.low > 0.0


def test_seeds_are_resampled_jointly():
    """Seeds share their units: twice the same seed is no more certain than once, independent noise is."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=80)
    once, twice = mean_interval(values, np.ones(80)), mean_interval([values] * 2, np.ones((2, 80)))
    assert (once.low, once.high) == pytest.approx((twice.low, twice.high))
    noisy = mean_interval(rng.normal(size=(4, 80)), np.ones((4, 80)))
    assert noisy.high - noisy.low < 0.75 * (once.high - once.low)


def test_clusters_widen_the_interval():
    """Ten units of 30 equal items are ten observations, not 300."""
    values = np.random.default_rng(4).normal(size=10)
    items, units = np.repeat(values, 30), np.repeat([f"u{n}" for n in range(10)], 30)
    _, sums, counts = group_sums(items, units.tolist())
    clustered, naive = mean_interval(sums, counts), mean_interval(items, np.ones(300))
    assert clustered.high - clustered.low > 3 * (naive.high - naive.low)


def test_the_seed_decides():
    values, counts = np.arange(10.0), np.ones(10)
    assert mean_interval(values, counts, seed=5) == mean_interval(values, counts, seed=5)
    assert mean_interval(values, counts, seed=5) != mean_interval(values, counts, seed=6)


def test_units_without_count_do_not_matter():
    assert mean_interval([1.0, 0.0, 3.0], [1, 0, 1]) == mean_interval([1.0, 3.0], [1, 1])


def test_a_single_unit_has_no_interval():
    interval = mean_interval([3.0], [2])
    assert interval.mean == 1.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_impossible_input_is_refused():
    with pytest.raises(ValueError, match="nothing was evaluated"):
        mean_interval([], [])
    with pytest.raises(ValueError, match="shape"):
        mean_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="same items"):
        mean_interval([[1.0, 2.0], [1.0, 2.0]], [[1, 1], [1, 0]])
