"""References to the batches that the model encodes: each by itself, or its document first and then split.

In context `document` a document is read in windows: its title line, as every reference begins with it, and
behind it so many whole references as fit into `window_tokens`. Windows begin with a reference and advance by
at most half their room, by more only where the next reference would not fit otherwise; a reference is taken
from the first window that holds it whole, where most text stands before it:

    references     | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |        title t, room for four references
    window 0      t| 0   1   2   3 |                        gives 0 1 2 3
    window 1              t| 2   3   4   5 |                gives 4 5
    window 2                      t| 4   5   6   7 |        gives 6 7

Batches hold rows of about equal length, so that little of them is padding.

Invariants: a reference has the same tokens in either context, at the same places in the shared span; of a
document of one reference both make the same batch; what a reference gives does not depend on anything behind
it, nor on anything before its window; batches are a pure function of the references asked for, and all of
them full: the last one is filled up with repetitions that count for nothing.

Not here: the encoding itself (`model.transformer`) and what becomes of it (`writer`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.references import ReferenceTokens
from model.memory import Places

Ids = NDArray[np.int64]

LANES = 16
"""Rows are padded to a multiple of so many tokens: a CPU's kernels add up whole vectors of numbers, and what is left
over in another order. So a reference gives the same bits beside longer ones as alone."""


@runtime_checkable
class Passages(ReferenceTokens, Protocol):
    """Documents cut into references: of a corpus (`data.references`), a library (`segment`), a prompt (`past`)."""

    @property
    def reference_tokens(self) -> int:
        """Most tokens of a reference, its title line included."""

    def bounds(self, ids: Ids) -> tuple[Ids, Ids]:
        """The first reference of each one's document, and the one after its last."""

    def passage(self, first: int, last: int) -> Ids:
        """The tokens of a document's references `first` to `last` as one text behind one title line."""


class Window(NamedTuple):
    """References of a document, by their place in it: its text begins with `begin`, it gives `taken` to `end`."""

    begin: int
    taken: int
    end: int


def cut_windows(lengths_N: Ids, room: int) -> list[Window]:
    """Return the windows of a document.

    Args:
        lengths_N: Tokens of its references, title lines not counted; none exceeds `room`.
        room: Tokens of text in a window.
    """
    ends_N = np.cumsum(lengths_N)
    begins_N = ends_N - lengths_N
    windows: list[Window] = []
    begin = taken = 0
    while taken < len(lengths_N):
        end = int(np.searchsorted(ends_N, begins_N[begin] + room, side="right"))
        windows.append(Window(begin, taken, end))
        if end < len(lengths_N):
            half = int(np.searchsorted(begins_N, begins_N[begin] + room // 2, side="right")) - 1
            begin = max(half, int(np.searchsorted(begins_N, ends_N[end] - room)))
        taken = end
    return windows


@dataclass(frozen=True, slots=True)
class EncodeBatch:
    """What the model encodes at once.

    Attributes:
        positions_N: Positions, among the references asked for, of those that count: the first rows of what
            comes out; rows beyond them only fill up.
        arguments: Makes the arguments of `Memory3LM.encode`.
    """

    positions_N: Ids
    arguments: Callable[[], Sequence[Any]]


def cut_batches(
    references: ReferenceTokens, ids_N: Ids, *, batch: int, window_tokens: int | None
) -> list[EncodeBatch]:
    """Return the batches that encode some references.

    Args:
        references: Their tokens; in context `document`, `Passages`.
        ids_N: The references, distinct and ascending.
        batch: References encoded at once; in context `document`, windows of about as many tokens.
        window_tokens: Tokens of a window, the title line included; None = each reference by itself.
    """
    if window_tokens is None:
        lengths_N = sum(references.sizes(ids_N))
        return [
            EncodeBatch(counted, partial(alone, references, ids_N[filled]))
            for counted, filled in _full(np.argsort(lengths_N, kind="stable"), batch)
        ]
    assert isinstance(references, Passages)
    parts = _parts(references, ids_N, window_tokens)
    order = np.array(sorted(range(len(parts)), key=lambda part: (parts[part].tokens, part)), np.int64)
    return [
        EncodeBatch(
            np.concatenate([parts[part].positions_N for part in counted]),
            partial(_in_documents, references, ids_N, [parts[part] for part in filled]),
        )
        for counted, filled in _full(order, max(1, batch * references.reference_tokens // window_tokens))
    ]


@dataclass(frozen=True, slots=True)
class _Part:
    """A window as far as the last reference that is wanted of it.

    Attributes:
        first: The reference that its text begins with.
        positions_N: Those that it gives, by their positions among the references asked for.
        begins_N: Where the text of each begins in the window.
        tokens: Of the window, its title line included.
    """

    first: int
    positions_N: Ids
    begins_N: Ids
    tokens: int


def _parts(passages: Passages, ids_N: Ids, window_tokens: int) -> list[_Part]:
    parts = []
    firsts_N, ends_N = passages.bounds(ids_N)
    _, starts = np.unique(firsts_N, return_index=True)
    for wanted_N in np.split(np.arange(len(ids_N)), starts[1:]):
        first, end = int(firsts_N[wanted_N[0]]), int(ends_N[wanted_N[0]])
        titles_n, lengths_n = passages.sizes(np.arange(first, end))
        ends_n = int(titles_n[0]) + np.cumsum(lengths_n)
        wanted_n = ids_N[wanted_N] - first
        for begin, taken, last in cut_windows(lengths_n, window_tokens - int(titles_n[0])):
            given = (wanted_n >= taken) & (wanted_n < last)
            if given.any():
                before = int(ends_n[begin] - lengths_n[begin] - titles_n[0])
                begins = (ends_n - lengths_n)[wanted_n[given]] - before
                tokens = int(ends_n[wanted_n[given][-1]]) - before
                parts.append(_Part(first + begin, wanted_N[given], begins, tokens))
    return parts


def _full(items: Ids, batch: int) -> Iterator[tuple[Ids, Ids]]:
    """Yield the items in batches, and each batch as it is filled up with the first items."""
    filled = np.resize(items, batch * -(-len(items) // batch))
    for begin in range(0, len(items), batch):
        yield items[begin : begin + batch], filled[begin : begin + batch]


def alone(references: ReferenceTokens, ids_N: Ids) -> tuple[Tensor, Tensor, Tensor]:
    """Return what encodes each reference by itself: tokens_NR no wider than it takes, lengths_N, titles_N."""
    tokens_NR, lengths_N, titles_N = references.tokens(ids_N)
    tokens_NR = tokens_NR[:, : _padded(int(lengths_N.max()))]
    return torch.from_numpy(tokens_NR), torch.from_numpy(lengths_N), torch.from_numpy(titles_N)


def _padded(tokens: int) -> int:
    return -(-tokens // LANES) * LANES


def _in_documents(
    passages: Passages, ids_N: Ids, parts: Sequence[_Part]
) -> tuple[Tensor, Tensor, Tensor, Places]:
    tokens_BT = torch.zeros((len(parts), _padded(max(part.tokens for part in parts))), dtype=torch.int64)
    for row, part in enumerate(parts):
        last = int(ids_N[part.positions_N[-1]])
        tokens_BT[row, : part.tokens] = torch.from_numpy(passages.passage(part.first, last))
    titles_N, lengths_N = passages.sizes(ids_N[np.concatenate([part.positions_N for part in parts])])
    row_N = np.repeat(np.arange(len(parts)), [len(part.positions_N) for part in parts])
    places = Places(
        torch.from_numpy(row_N), torch.from_numpy(np.concatenate([part.begins_N for part in parts]))
    )
    return tokens_BT, torch.from_numpy(titles_N + lengths_N), torch.from_numpy(titles_N), places
