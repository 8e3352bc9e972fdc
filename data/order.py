"""Which documents are drawn, and in which order: a pure function of weights, lengths, past draws and a seed.

Each source gets tokens in proportion to its weight. Within a source the documents drawn least often come
first, those drawn equally often in an order that a hash of (seed, document, times drawn) gives; sources are
interleaved so that every stretch of the stream holds them in proportion. The hash is written out here, so the
order is the same with every version of every library.

Not here: rows (`packing`), which documents are eligible (the stage that draws).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


def draw(
    sources: Sequence[Numbers],
    weights: Sequence[float],
    lengths: Numbers,
    times_drawn: Numbers,
    *,
    num_rows: int,
    row_tokens: int,
    seed: int,
) -> Numbers:
    """Documents in stream order with at least `num_rows * row_tokens + 1` tokens, as few as that takes.

    Args:
        sources: Of each source, the numbers of the documents that may be drawn.
        weights: Of each source; 0 draws nothing from it.
        lengths: Tokens of every document, by its number.
        times_drawn: How often each document was drawn before, by its number; not changed.
        num_rows: How many rows the stream shall fill.
        row_tokens: T.
        seed: Of the order.

    Raises:
        ValueError: A source with weight has no documents, or no source has weight.
    """
    total_weight = sum(weights)
    if not total_weight > 0:
        raise ValueError("nothing can be drawn: every source has weight 0; give one a weight above 0")
    total = num_rows * row_tokens + 1
    drawn, progress = [], []
    for place, (eligible, weight) in enumerate(zip(sources, weights, strict=True)):
        if weight == 0:
            continue
        if len(eligible) == 0:
            raise ValueError(
                f"source {place} (weight {weight:g}) has no document that may be drawn; set its weight to 0"
            )
        budget = -(-total * weight // total_weight)
        documents = _draw_source(eligible, lengths, times_drawn, budget, seed)
        ends = np.cumsum(lengths[documents])
        drawn.append(documents)
        # The share of its budget that a source has spent when a document begins.
        progress.append((ends - lengths[documents]) / budget)
    documents = np.concatenate(drawn)[np.argsort(np.concatenate(progress), kind="stable")]
    needed = int(np.searchsorted(np.cumsum(lengths[documents]), total)) + 1
    return documents[:needed]


def scrambled(*values: int | Numbers) -> NDArray[np.uint64]:
    """A 64-bit hash of integers or arrays of them, element by element (splitmix64 steps)."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            state = (state ^ np.asarray(value, dtype=np.int64).astype(np.uint64)) + np.uint64(
                0x9E3779B97F4A7C15
            )
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.atleast_1d(state)


def _draw_source(
    eligible: Numbers, lengths: Numbers, times_drawn: Numbers, budget: float, seed: int
) -> Numbers:
    """Documents of one source with at least `budget` tokens; each pass draws those drawn least often."""
    times = times_drawn[eligible].copy()
    drawn: list[Numbers] = []
    tokens = 0
    while tokens < budget:
        fewest = times.min()
        least = np.flatnonzero(times == fewest)
        documents = eligible[least]
        documents = documents[np.lexsort((documents, scrambled(seed, documents, int(fewest))))]
        ends = tokens + np.cumsum(lengths[documents])
        documents = documents[: int(np.searchsorted(ends, budget)) + 1]
        drawn.append(documents)
        tokens += int(lengths[documents].sum())
        times[least] += 1
    return np.concatenate(drawn)
