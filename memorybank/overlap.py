"""The leakage filter of the paper (section 4.4, Eq. 6): how much of a reference a text already holds.

    overlap(t, r) = LCS(t, r) / |r|

where LCS is the longest common token subsequence, not necessarily contiguous, whose matches in the text
span at most 2|r| positions: ``|i_N - i_1| <= 2|r|``. `overlap` is this definition, slow and plain;
`exceeds` answers the only question that retrieval asks, and `num_exceeded` the one that an audit asks; both
agree with it (property tests).

Not here: which references are compared with which text (neighbours.py), and title lines, which the
caller leaves out of the reference's tokens.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

Tokens = Sequence[int] | NDArray[np.integer]


def overlap(text: Tokens, reference: Tokens) -> float:
    """Return the share of the reference's tokens that stand in the text, in order, within the span.

    The definition, one window of the text after the other: O(|t| |r|^2). An empty reference overlaps nothing.
    """
    text, reference = list(text), list(reference)
    if not reference:
        return 0.0
    window = _window(len(reference))
    firsts = range(max(1, len(text) - window + 1))
    return max(_common(text[first : first + window], reference) for first in firsts) / len(reference)


def exceeds(text: Tokens, reference: Tokens, limit: float) -> bool:
    """Return whether ``overlap(text, reference) > limit``.

    Two bit-parallel bounds settle almost every pair: the subsequence without the span rule, and pieces of
    the text that hold all windows beginning in their first half. The rest is searched window by window.
    """
    num_reference = len(reference)
    if num_reference == 0:
        return limit < 0
    needed = max(0, int(limit * num_reference))
    while needed <= num_reference and needed / num_reference <= limit:
        needed += 1
    if needed == 0:
        return True
    # One character per token: rapidfuzz compares strings without hashing every element.
    t, r = _characters(text), _characters(reference)
    window = _window(num_reference)
    if LCSseq.similarity(t, r, score_cutoff=needed) < needed:
        return False
    last = len(t) - window
    if last <= 0:
        return True
    for begin in range(0, last + 1, window):
        if LCSseq.similarity(t[begin : begin + 2 * window], r, score_cutoff=needed) < needed:
            continue  # every window that starts in [begin, begin + window) lies in this piece
        for first in range(begin, min(begin + window, last + 1)):
            if LCSseq.similarity(t[first : first + window], r, score_cutoff=needed):
                return True
    return False


def num_exceeded(text: Tokens, reference: Tokens, limits: Sequence[float]) -> int:
    """Return how many of the limits, which ascend, ``overlap(text, reference)`` exceeds."""
    return bisect_left(limits, True, key=lambda limit: not exceeds(text, reference, limit))


def _window(num_reference: int) -> int:
    """Return the number of positions in a span ``|i_N - i_1| <= 2|r|``."""
    return 2 * num_reference + 1


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common subsequence, by the textbook recurrence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _characters(tokens: Tokens) -> str:
    return np.asarray(tokens, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
