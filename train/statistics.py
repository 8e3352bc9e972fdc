"""Means with bootstrap intervals, over units that are independent of each other (documents, countries).

A mean is a ratio ``sum of unit sums / sum of unit counts``: tokens weigh equally in text, probes in facts.
Units are resampled, never tokens or probes; a paired difference resamples both arms together, and several
seeds are resampled jointly, so that the interval is that of the mean over seeds.

Not here: what is measured, and which arms are compared (`evaluate`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the interval around it.

    Attributes:
        mean: The estimate from all units.
        low: Lower end; nan when a single unit leaves nothing to resample.
        high: Upper end, likewise.
    """

    mean: float
    low: float
    high: float


def group_sums(
    values: ArrayLike, units: Sequence[str], *, counts: ArrayLike | None = None
) -> tuple[list[str], Floats, Floats]:
    """Return the distinct units, ascending, and the sum of values and of counts of each.

    Args:
        values: One number per item, already multiplied by its count.
        units: The unit that each item belongs to.
        counts: The weight of each item; None weighs every item 1.
    """
    names, of = np.unique(np.asarray(units, dtype=str), return_inverse=True)
    weights = None if counts is None else np.asarray(counts, np.float64)
    sums = np.bincount(of, weights=np.asarray(values, np.float64), minlength=len(names))
    total = np.bincount(of, weights=weights, minlength=len(names))
    return names.tolist(), sums.astype(np.float64), total.astype(np.float64)


def mean_interval(
    sums: ArrayLike, counts: ArrayLike, *, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the mean over units and its percentile interval.

    Args:
        sums: Sum of each unit, (units,), or (seeds, units): the mean over seeds is then the estimate.
        counts: Count behind each sum, of the same shape.
        samples: Resamples of the units.
        seed: Seed of the resampling.
        level: Share of the resamples inside the interval.
    """
    sums, counts = np.atleast_2d(np.asarray(sums, np.float64)), np.atleast_2d(np.asarray(counts, np.float64))
    if sums.shape != counts.shape:
        raise ValueError(f"sums of shape {sums.shape} need counts of that shape, got {counts.shape}")
    present = (counts > 0).all(axis=0)
    if not np.array_equal(present, (counts > 0).any(axis=0)):
        raise ValueError(
            "a unit was counted in one seed and not in another: evaluate all seeds on the same items"
        )
    sums, counts = sums[:, present], counts[:, present]
    num_units = sums.shape[1]
    if num_units == 0:
        raise ValueError("no unit with a count: nothing was evaluated")
    mean = float((sums.sum(axis=1) / counts.sum(axis=1)).mean())
    if num_units == 1:
        return Interval(mean, float("nan"), float("nan"))
    draws = np.random.default_rng(seed).multinomial(
        num_units, np.full(num_units, 1 / num_units), size=samples
    )
    means = ((draws @ sums.T) / (draws @ counts.T)).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def paired_interval(
    sums: ArrayLike,
    baseline_sums: ArrayLike,
    counts: ArrayLike,
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the mean difference ``sums - baseline_sums`` over the same items, as `mean_interval` does."""
    difference = np.asarray(sums, np.float64) - np.asarray(baseline_sums, np.float64)
    return mean_interval(difference, counts, samples=samples, seed=seed, level=level)
