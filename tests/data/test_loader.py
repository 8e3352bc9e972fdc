"""One global order: any number of ranks reads the same rows, and a resumed run goes on exactly."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from data.batch import TokenBatch
from data.documents import Split
from data.loader import Loader, read_rows
from data.packing import RowPlan, pack
from data.prepare import Prepared
from tests.support.data import prepare_sections

ROW_TOKENS = 64


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare_sections(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def plan(prepared: Prepared) -> RowPlan:
    documents = prepared.shards.corpus.select(split=Split.train, trains=True)
    return pack(documents, prepared.shards.lengths(), ROW_TOKENS, seed=0)


def steps(
    prepared: Prepared, plan: RowPlan, *, world_size: int, micro_rows: int, cursor: int = 0
) -> Iterator[torch.Tensor]:
    """The rows of each step, put together from all ranks."""
    loaders = [
        Loader(
            prepared.shards,
            plan,
            rows_per_step=8,
            micro_rows=micro_rows,
            rank=rank,
            world_size=world_size,
            cursor=cursor,
        )
        for rank in range(world_size)
    ]
    try:
        while True:
            rows = []
            for loader in loaders:
                for _ in range(8 // world_size // micro_rows):
                    rows.append(next(loader).tokens_BT1)
            assert len({loader.cursor for loader in loaders}) == 1
            yield torch.cat(rows)
    except StopIteration:
        pass
    finally:
        for loader in loaders:
            loader.close()


def test_rows_hold_the_stream(prepared: Prepared, plan: RowPlan) -> None:
    stream = np.concatenate([prepared.shards.tokens(int(document)) for document in plan.documents])
    batch = read_rows(prepared.shards, plan, tuple(range(plan.num_rows)), documents=True)
    assert batch.tokens_BT1.dtype == torch.int64
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    documents = np.repeat(plan.documents, np.diff(plan.starts))
    assert batch.documents_BT1 is not None
    for position in range(plan.num_rows):
        begin = int(plan.row_order[position]) * ROW_TOKENS
        assert batch.tokens_BT1[position].tolist() == stream[begin : begin + ROW_TOKENS + 1].tolist()
        assert batch.documents_BT1[position].tolist() == documents[begin : begin + ROW_TOKENS + 1].tolist()


def test_every_world_size_sees_the_same_rows_in_the_same_order(prepared: Prepared, plan: RowPlan) -> None:
    one = list(steps(prepared, plan, world_size=1, micro_rows=8))
    assert len(one) == plan.num_rows // 8
    for world_size, micro_rows in ((1, 2), (2, 4), (2, 1), (4, 2)):
        other = list(steps(prepared, plan, world_size=world_size, micro_rows=micro_rows))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_resumed_at_another_world_size_goes_on_exactly(prepared: Prepared, plan: RowPlan) -> None:
    everything = list(steps(prepared, plan, world_size=1, micro_rows=8))
    rest = list(steps(prepared, plan, world_size=4, micro_rows=1, cursor=3 * 8))
    assert all(torch.equal(a, b) for a, b in zip(everything[3:], rest, strict=True))


def test_cursor_counts_what_was_consumed_not_what_was_read_ahead(prepared: Prepared, plan: RowPlan) -> None:
    with Loader(
        prepared.shards, plan, rows_per_step=8, micro_rows=2, world_size=2, rank=1, prefetch=4
    ) as loader:
        assert loader.cursor == 0
        positions = [next(loader).positions]
        assert loader.cursor == 0, "half a step was consumed"
        positions.append(next(loader).positions)
        assert loader.cursor == 8
        assert positions == [(4, 5), (6, 7)]
        next(loader)
        next(loader)
        assert loader.cursor == 16


def test_a_step_that_is_not_whole_is_left(prepared: Prepared, plan: RowPlan) -> None:
    size = plan.num_rows // 2 + 1
    with Loader(prepared.shards, plan, rows_per_step=size, micro_rows=size) as loader:
        assert len(list(loader)) == 1
        assert loader.cursor == size
        assert list(loader) == []


def test_documents_come_only_when_asked_for(prepared: Prepared, plan: RowPlan) -> None:
    with Loader(prepared.shards, plan, rows_per_step=2, micro_rows=2) as loader:
        assert next(loader).documents_BT1 is None
    with Loader(prepared.shards, plan, rows_per_step=2, micro_rows=2, documents=True) as loader:
        documents = next(loader).documents_BT1
        assert documents is not None
        assert sorted(set(documents[0].tolist())) == plan.documents_of_row(0).tolist()


def test_what_fails_in_the_thread_is_raised_where_the_batch_is_wanted(
    prepared: Prepared, plan: RowPlan
) -> None:
    longer = RowPlan(plan.documents + 10_000, plan.starts, plan.row_order, plan.row_tokens)
    with Loader(prepared.shards, longer, rows_per_step=2, micro_rows=2) as loader:
        with pytest.raises(IndexError):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_closing_ends_the_thread(prepared: Prepared, plan: RowPlan) -> None:
    loader = Loader(prepared.shards, plan, rows_per_step=2, micro_rows=2, prefetch=1)
    assert isinstance(next(loader), TokenBatch)
    assert any(thread.name == "loader" for thread in threading.enumerate())
    loader.close()
    loader.close()
    assert not any(thread.name == "loader" for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(loader)


def test_impossible_divisions_are_refused(prepared: Prepared, plan: RowPlan) -> None:
    with pytest.raises(
        ValueError, match=r"6 rows per step cannot be divided among 4 ranks .* a multiple of 4"
    ):
        Loader(prepared.shards, plan, rows_per_step=6, micro_rows=1, world_size=4)
    with pytest.raises(ValueError, match="a multiple of 6"):
        Loader(prepared.shards, plan, rows_per_step=8, micro_rows=3, world_size=2)
    with pytest.raises(ValueError, match="cursor 3 lies within a step of 2 rows"):
        Loader(prepared.shards, plan, rows_per_step=2, micro_rows=2, cursor=3)
