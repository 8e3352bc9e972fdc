"""Batches over one global order: sliced by rank, read ahead, resumed exactly at any world size.

A step consumes the positions [cursor, cursor + rows_per_step) of the plan. Rank r takes the r-th of
world_size equal, contiguous slices of them, in micro-batches. So the rows of a step, and their order, are the
same whatever the number of ranks; and the cursor, rows consumed by the whole run, says everything about where
a run stands.

Invariants: the cursor counts what was handed out, not what was read ahead, and moves when a step's last
micro-batch is handed out; rows at the end that fill no step are left.

Not here: the plan (`packing`), several passes (the stage plans each anew).
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np
import torch

from data.ahead import ReadAhead
from data.batch import TokenBatch
from data.packing import RowPlan
from data.shards import TokenShards


class Loader:
    """Iterates over a rank's micro-batches; a context manager that ends its thread."""

    def __init__(
        self,
        shards: TokenShards,
        plan: RowPlan,
        *,
        rows_per_step: int,
        micro_rows: int,
        rank: int = 0,
        world_size: int = 1,
        cursor: int = 0,
        prefetch: int = 2,
        documents: bool = False,
    ) -> None:
        """Starts reading ahead.

        Args:
            shards: Where the tokens are.
            plan: The rows and their order.
            rows_per_step: Rows that all ranks together consume in one step.
            micro_rows: Rows of one micro-batch of one rank.
            rank: Of this process.
            world_size: How many ranks there are.
            cursor: Positions consumed before; a multiple of `rows_per_step`.
            prefetch: Batches to read ahead.
            documents: Whether batches say which document each token is of.

        Raises:
            ValueError: The rows of a step cannot be divided so, or the cursor lies within a step.
        """
        if micro_rows < 1 or rows_per_step < 1 or rows_per_step % (world_size * micro_rows):
            raise ValueError(
                f"{rows_per_step} rows per step cannot be divided among {world_size} ranks in micro-batches "
                f"of {micro_rows}; make the rows per step a multiple of {world_size * micro_rows}"
            )
        if cursor % rows_per_step:
            raise ValueError(
                f"the cursor {cursor} lies within a step of {rows_per_step} rows; resume with the rows per "
                "step that the run began with"
            )
        self.cursor = cursor
        """Positions of the plan consumed by the whole run."""
        self.rows_per_step = rows_per_step
        self._micro_rows = micro_rows
        self._rows_per_rank = rows_per_step // world_size
        self._rank = rank
        self._shards = shards
        self._plan = plan
        self._documents = documents
        self._ahead = ReadAhead(self._batches(cursor), depth=prefetch, name="loader")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenBatch:
        """The next micro-batch; StopIteration when no whole step is left."""
        batch, self.cursor = next(self._ahead)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the reading; may be called again."""
        self._ahead.close()

    def _batches(self, cursor: int) -> Iterator[tuple[TokenBatch, int]]:
        """Each micro-batch of this rank, with the cursor once it is consumed."""
        while cursor + self.rows_per_step <= self._plan.num_rows:
            begin = cursor + self._rank * self._rows_per_rank
            end = begin + self._rows_per_rank
            for first in range(begin, end, self._micro_rows):
                positions = tuple(range(first, first + self._micro_rows))
                last = first + self._micro_rows == end
                yield (
                    read_rows(self._shards, self._plan, positions, documents=self._documents),
                    (cursor + self.rows_per_step if last else cursor),
                )
            cursor += self.rows_per_step


def read_rows(
    shards: TokenShards, plan: RowPlan, positions: tuple[int, ...], *, documents: bool = False
) -> TokenBatch:
    """The rows at these positions of the plan."""
    shape = (len(positions), plan.row_tokens + 1)
    tokens_BT1 = np.empty(shape, dtype=np.int64)
    documents_BT1 = np.empty(shape, dtype=np.int64) if documents else None
    for b, position in enumerate(positions):
        at = 0
        for document, begin, end in plan.pieces(position):
            tokens_BT1[b, at : at + end - begin] = shards.tokens(document, begin, end)
            if documents_BT1 is not None:
                documents_BT1[b, at : at + end - begin] = document
            at += end - begin
        assert at == plan.row_tokens + 1
    return TokenBatch(
        torch.from_numpy(tokens_BT1),
        positions,
        None if documents_BT1 is None else torch.from_numpy(documents_BT1),
    )
