"""Documents to rows: a pure plan, made without reading a token.

The documents of a plan are laid end to end; the stream is cut into rows of T tokens. Row i holds the tokens
[i*T, i*T + T]: T inputs and, one later, T targets, so neighbouring rows share one token and every token but
the stream's first is predicted once. Rows are never padded; what is left at the end, less than a row, is
dropped. Rows are consumed in a shuffled order.

Not here: which documents (`order`), reading (`loader`).
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from data.order import Numbers, scrambled


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Rows over a stream of documents.

    Attributes:
        documents: Numbers of the documents in stream order, shape (n,); a document may come again.
        starts: Where each begins in the stream, and the stream's end, shape (n + 1,).
        row_order: The row that each position of the order consumes, shape (num_rows,); a row may come again.
        row_tokens: T.
    """

    documents: Numbers
    starts: Numbers
    row_order: Numbers
    row_tokens: int

    @property
    def num_rows(self) -> int:
        return len(self.row_order)

    def again(self, num_rows: int) -> Self:
        """The same rows in the same order, again and again until there are `num_rows` positions."""
        return replace(self, row_order=np.resize(self.row_order, num_rows))

    def pieces(self, position: int) -> list[tuple[int, int, int]]:
        """What the row at a position of the order is made of: (document, first token, one after its last)."""
        first = int(self.row_order[position]) * self.row_tokens
        end = first + self.row_tokens + 1
        begin, last = self._span(first, end)
        return [
            (
                int(self.documents[i]),
                max(first, int(self.starts[i])) - int(self.starts[i]),
                min(end, int(self.starts[i + 1])) - int(self.starts[i]),
            )
            for i in range(begin, last)
        ]

    def documents_of_row(self, position: int) -> Numbers:
        """The documents of which the row at a position holds a token, ascending, without repetition."""
        first = int(self.row_order[position]) * self.row_tokens
        begin, last = self._span(first, first + self.row_tokens + 1)
        return np.unique(self.documents[begin:last])

    def finished(self, num_positions: int) -> Numbers:
        """The documents whose last token is a target of a row among the first `num_positions` of the order.

        Ascending, without repetition.
        """
        consumed = np.zeros(self.num_rows + 1, dtype=np.bool_)  # and one for the dropped tail
        consumed[self.row_order[:num_positions]] = True
        last_tokens = self.starts[1:] - 1
        rows = np.minimum(np.maximum(last_tokens - 1, 0) // self.row_tokens, self.num_rows)
        return np.unique(self.documents[consumed[rows]])

    def _span(self, first: int, end: int) -> tuple[int, int]:
        begin = int(np.searchsorted(self.starts, first, side="right")) - 1
        return begin, int(np.searchsorted(self.starts, end, side="left"))


def pack(
    documents: Numbers, lengths: Numbers, row_tokens: int, *, seed: int, num_rows: int | None = None
) -> RowPlan:
    """Plans rows over documents in the order given.

    Args:
        documents: Their numbers, in stream order.
        lengths: Tokens of every document, by its number.
        row_tokens: T.
        seed: Of the order in which the rows are consumed.
        num_rows: Rows of the plan; None takes all that the documents fill.

    Raises:
        ValueError: There are too few tokens for one row, or for `num_rows`.
    """
    starts = np.concatenate([[0], np.cumsum(lengths[documents])]).astype(np.int64)
    filled = (int(starts[-1]) - 1) // row_tokens
    num_rows = filled if num_rows is None else num_rows
    if not 1 <= num_rows <= filled:
        raise ValueError(
            f"{len(documents)} documents with {int(starts[-1])} tokens are less than {max(1, num_rows)} rows "
            f"of {row_tokens} + 1 tokens; give more text, or set model.row_tokens lower"
        )
    row_order = np.argsort(scrambled(seed, np.arange(num_rows)), kind="stable").astype(np.int64)
    return RowPlan(np.asarray(documents, dtype=np.int64), starts, row_order, row_tokens)
