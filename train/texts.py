"""Rows as texts to be evaluated: their tokens, and the documents of these.

Not here: which rows training has (`rows`), reading them with and without memory (`evaluate`).
"""

import numpy as np

from data.documents import Split
from data.loader import read_rows
from data.packing import RowPlan
from data.shards import TokenShards
from train.evaluate import TextSet
from train.rows import held_out_plan


def held_out_rows(shards: TokenShards, split: Split, *, num_rows: int, row_tokens: int) -> TextSet:
    """Rows of a held-out split: the same for every run on a corpus, as many as there are up to `num_rows`.

    Raises:
        ValueError: The split holds less than a row.
    """
    return text_of(shards, held_out_plan(shards, split, row_tokens=row_tokens), num_rows=num_rows)


def text_of(shards: TokenShards, plan: RowPlan, *, num_rows: int) -> TextSet:
    """The first rows of a plan, as many as there are up to `num_rows`, with the documents of their tokens."""
    batch = read_rows(shards, plan, tuple(range(min(num_rows, plan.num_rows))), documents=True)
    assert batch.documents_BT1 is not None
    numbers = batch.documents_BT1.numpy()
    names = {int(number): shards.document(int(number)).id for number in np.unique(numbers)}
    return TextSet(batch.tokens_BT1, numbers, names)
