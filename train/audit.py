"""What memory's gain is made of: the references that rows read, by how much of each the row already holds.

A reference that repeats the row is no knowledge but the answer itself, so a gain that comes from it pretends. Every
slot is sorted into a bucket by the overlap of its reference with the whole row (`memorybank.overlap`, paper Eq. 6),
and every chunk by the largest overlap among the references it reads. A chunk's gain is its loss without memory less
its loss with memory, over the same targets.

    retrieved ids --audit--> per bucket: slots, chunks, gain

Invariants: buckets are (0, 20], (20, 40] ... (80, 100] percent, the first with its 0; every filled slot stands in
one of them, and every chunk in one of them or among the unread; no gradient.

Not here: retrieval and its filters (`memorybank`), the tables (`launch.audit`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from memorybank.overlap import num_exceeded
from train.evaluate import Scorer, Setting, TextSet, target_losses
from train.statistics import Floats, Interval, mean_interval

Ids = NDArray[np.int64]
LIMITS = (0.2, 0.4, 0.6, 0.8)
"""Overlaps at which a bucket ends and the next begins."""


@dataclass(frozen=True, slots=True)
class Gain:
    """How much memory lowered the loss of some chunks.

    Attributes:
        chunks: How many there are.
        nats: Loss without memory less loss with memory, per token; None without chunks.
        low: Lower end of the 95 % interval over rows; None when fewer than two rows have such chunks.
        high: Upper end, likewise.
    """

    chunks: int
    nats: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Bucket:
    """References of like overlap.

    Attributes:
        low: Overlap above which it begins; 0 belongs to the first.
        high: Overlap up to which it goes.
        slots: Filled slots whose reference overlaps its row so much.
        gain: Of the chunks the largest of whose overlaps it is.
    """

    low: float
    high: float
    slots: int
    gain: Gain


@dataclass(frozen=True, slots=True)
class Audit:
    """One way of retrieving, audited.

    Attributes:
        slots: All slots of all chunks.
        empty: Those without a reference.
        buckets: By overlap, ascending.
        unread: Gain of the chunks that read nothing: theirs comes from what the chunks before them read.
        overall: Gain of all chunks.
    """

    slots: int
    empty: int
    buckets: tuple[Bucket, ...]
    unread: Gain
    overall: Gain


def audit(
    scorer: Scorer,
    rows: TextSet,
    read: Sequence[Ids],
    setting: Setting,
    *,
    content_tokens: Callable[[int], Sequence[int]],
    samples: int = 2000,
    seed: int = 0,
) -> list[Audit]:
    """Return one audit for each way of reading the same rows.

    Args:
        scorer: Gives losses.
        rows: The rows.
        read: The references of each way, (M, C, K), -1 is empty.
        setting: Hands out memories; its limit is not applied.
        content_tokens: Tokens of a reference without its title line.
        samples: Resamples of the rows behind an interval.
        seed: Of the resampling.
    """
    tokens_MT, targets_MT = rows.tokens_MT1[:, :-1], rows.tokens_MT1[:, 1:]
    plain_MT = target_losses(scorer, tokens_MT, targets_MT, None, setting)
    audits = []
    for ids_MCK in read:
        memory_MT = target_losses(scorer, tokens_MT, targets_MT, ids_MCK, setting)
        gains_MCQ = (plain_MT - memory_MT).reshape(*ids_MCK.shape[:2], -1)
        buckets_MCK = bucketed(tokens_MT.numpy(), ids_MCK, content_tokens)
        audits.append(_sorted_out(gains_MCQ, buckets_MCK, samples=samples, seed=seed))
    return audits


def bucketed(tokens_MT: Ids, ids_MCK: Ids, content_tokens: Callable[[int], Sequence[int]]) -> Ids:
    """Return the bucket of each slot's reference against its whole row, (M, C, K); -1 for an empty slot."""
    buckets_MCK = np.full_like(ids_MCK, -1)
    for row, ids_CK, buckets_CK in zip(tokens_MT, ids_MCK, buckets_MCK, strict=True):
        for id in np.unique(ids_CK[ids_CK >= 0]).tolist():
            buckets_CK[ids_CK == id] = num_exceeded(row, content_tokens(id), LIMITS)
    return buckets_MCK


def _sorted_out(gains_MCQ: Floats, buckets_MCK: Ids, *, samples: int, seed: int) -> Audit:
    largest_MC = buckets_MCK.max(axis=2)

    def gain(chosen_MC: NDArray[np.bool_]) -> Gain:
        chunks_M = chosen_MC.sum(axis=1)
        if not chunks_M.any():
            return Gain(0, None, None, None)
        sums_M = (gains_MCQ.sum(axis=2) * chosen_MC).sum(axis=1)
        counts_M = chunks_M * gains_MCQ.shape[2]
        found = mean_interval(sums_M, counts_M, samples=samples, seed=seed)
        return Gain(int(chunks_M.sum()), found.mean, *_ends(found))

    edges = (0.0, *LIMITS, 1.0)
    return Audit(
        slots=buckets_MCK.size,
        empty=int((buckets_MCK < 0).sum()),
        buckets=tuple(
            Bucket(low, high, int((buckets_MCK == number).sum()), gain(largest_MC == number))
            for number, (low, high) in enumerate(pairwise(edges))
        ),
        unread=gain(largest_MC < 0),
        overall=gain(np.ones_like(largest_MC, dtype=np.bool_)),
    )


def _ends(interval: Interval) -> tuple[float | None, float | None]:
    """Return both ends; None where a single row left nothing to resample."""
    return (None, None) if np.isnan(interval.low) else (interval.low, interval.high)
