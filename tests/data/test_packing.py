import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packing import RowPlan, pack


def stream(plan: RowPlan) -> list[tuple[int, int]]:
    """(document, token) at every place of the stream, put together from the rows."""
    rows = sorted(range(plan.num_rows), key=lambda position: plan.row_order[position])
    tokens: list[tuple[int, int]] = []
    for position in rows:
        row = [(document, i) for document, begin, end in plan.pieces(position) for i in range(begin, end)]
        assert len(row) == plan.row_tokens + 1, "rows are never padded"
        assert not tokens or tokens[-1] == row[0], "neighbouring rows share one token"
        tokens += row if not tokens else row[1:]
    return tokens


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20),
    row_tokens=st.integers(1, 16),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_rows_tile_the_stream(lengths: list[int], row_tokens: int, seed: int, data: st.DataObject) -> None:
    documents = np.array(data.draw(st.permutations(range(len(lengths)))))
    if sum(lengths) <= row_tokens:
        with pytest.raises(ValueError, match="less than 1 rows of"):
            pack(documents, np.array(lengths), row_tokens, seed=seed)
        return
    plan = pack(documents, np.array(lengths), row_tokens, seed=seed)
    everything = [(int(document), i) for document in documents for i in range(lengths[document])]
    read = stream(plan)
    assert read == everything[: len(read)]
    assert len(everything) - len(read) < row_tokens
    assert sorted(plan.row_order) == list(range(plan.num_rows))
    for position in range(plan.num_rows):
        pieces = plan.pieces(position)
        assert plan.documents_of_row(position).tolist() == sorted({document for document, _, _ in pieces})
    for count in range(plan.num_rows + 1):
        targets = {
            place
            for position in range(count)
            for place in [(d, i) for d, b, e in plan.pieces(position) for i in range(b, e)][1:]
        }
        # The stream's first token is nobody's target: it is read with the first row.
        if 0 in plan.row_order[:count]:
            targets.add(everything[0])
        finished = [
            document for document in range(len(lengths)) if (document, lengths[document] - 1) in targets
        ]
        assert plan.finished(count).tolist() == finished


def test_documents_drawn_twice_are_told_apart_by_place() -> None:
    plan = pack(np.array([1, 0, 1]), np.array([4, 4]), 4, seed=0)
    assert plan.starts.tolist() == [0, 4, 8, 12]
    assert plan.num_rows == 2
    position = int(np.flatnonzero(plan.row_order == 1)[0])
    assert plan.pieces(position) == [(0, 0, 4), (1, 0, 1)]
    assert plan.finished(0).tolist() == []


def test_number_of_rows_can_be_given() -> None:
    documents, lengths = np.arange(10), np.full(10, 10)
    assert pack(documents, lengths, 10, seed=0, num_rows=4).num_rows == 4
    assert pack(documents, lengths, 10, seed=0).num_rows == 9
    with pytest.raises(ValueError, match="less than 10 rows of 10"):
        pack(documents, lengths, 10, seed=0, num_rows=10)


def test_order_is_shuffled_by_the_seed() -> None:
    documents, lengths = np.arange(100), np.full(100, 10)
    first, again, other = (pack(documents, lengths, 10, seed=seed).row_order for seed in (0, 0, 1))
    assert (first == again).all()
    assert not (first == other).all()
    assert not (first == np.sort(first)).all()
