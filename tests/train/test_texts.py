"""Rows of held-out text, on the real corpus."""

import numpy as np
import pytest

from data.documents import Split
from tests.support.train import prepared
from train.texts import held_out_rows

SHARDS = prepared().shards


def test_held_out_rows_hold_documents_of_their_split_alone() -> None:
    rows = held_out_rows(SHARDS, Split.validation, num_rows=6, row_tokens=128)
    assert rows.tokens_MT1.shape == (6, 129)
    splits = {SHARDS.document(int(number)).split for number in np.unique(rows.documents_MT1)}
    assert splits == {Split.validation}
    again = held_out_rows(SHARDS, Split.validation, num_rows=6, row_tokens=128)
    assert rows.tokens_MT1.equal(again.tokens_MT1)


def test_a_split_of_less_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"less than one row.*data.validation_fraction"):
        held_out_rows(SHARDS, Split.validation, num_rows=1, row_tokens=1_000_000)
