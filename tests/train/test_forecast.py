"""What bank epochs will read, against a count of the very rows, document by document."""

from collections import Counter

import numpy as np
import pytest

from data.documents import Split
from data.packing import RowPlan, pack
from tests.support.train import continual_config, prepared, stage_config
from train.config import MemorySource, StageConfig
from train.forecast import BankEpoch, StageEpoch, bank_epoch, read_at, references_found, stage_epochs
from train.history import History
from train.neighbours import epoch_search
from train.rows import in_bank

REFERENCES = prepared().references
SHARDS = prepared().shards
ROW_TOKENS, CHUNK_TOKENS, VALIDATION_ROWS = 128, 32, 5


def epochs(name: str, stage: StageConfig, history: History) -> list[StageEpoch]:
    weights = {"factbook": 1.0}
    return list(
        stage_epochs(SHARDS, name, stage, history, source_weights=weights, row_tokens=ROW_TOKENS, seed=3)
    )


def warmed_up() -> History:
    warmup = stage_config(steps=30, rows_per_step=8)
    return History.of_read(read_at(epochs("warmup", warmup, History.empty(SHARDS.num_documents)), warmup, 30))


def asked(stage: StageConfig, epoch: StageEpoch, *, found: int | None = None) -> BankEpoch:
    search = epoch_search(
        REFERENCES, "continual", epoch.epoch, epoch.history, epoch.rows.plan, validation_rows=VALIDATION_ROWS
    )
    return bank_epoch(
        REFERENCES, stage, search, steps=epoch.rows.steps, chunk_tokens=CHUNK_TOKENS, found=found
    )


def longest(plan: RowPlan, positions: range) -> Counter[int]:
    """The most tokens of each document that one occurrence of it has as inputs of these positions' rows."""
    found: Counter[int] = Counter()
    for row in {int(plan.row_order[position]) for position in positions}:
        for token in range(row * plan.row_tokens, (row + 1) * plan.row_tokens):
            found[int(np.searchsorted(plan.starts, token, side="right")) - 1] += 1
    most: Counter[int] = Counter()
    for occurrence, tokens in found.items():
        document = int(plan.documents[occurrence])
        most[document] = max(most[document], tokens)
    return most


@pytest.mark.parametrize("source", [MemorySource.bank, MemorySource.online])
def test_chunks_and_references_are_those_of_the_rows(source: MemorySource) -> None:
    stage = continual_config(steps=6, rows_per_step=4, epoch_steps="3")
    assert stage.memory is not None
    stage.memory.source = source
    planned = epochs("continual", stage, warmed_up())
    assert [(epoch.epoch, epoch.step) for epoch in planned] == [(0, 0), (1, 3)]
    held_out = pack(
        SHARDS.held_out(Split.validation, row_tokens=ROW_TOKENS), SHARDS.lengths(), ROW_TOKENS, seed=0
    )
    for epoch in planned:
        allowed = in_bank(SHARDS.corpus, epoch.history.finished)
        may_read = sum(bool(allowed[document]) for document in REFERENCES.document_of)
        plan = epoch.rows.plan
        rows = range(plan.num_rows) if source is MemorySource.bank else range(0)
        tokens = [*longest(plan, rows).values(), *longest(held_out, range(VALIDATION_ROWS)).values()]
        found = asked(stage, epoch)
        assert found.references == may_read > 0
        assert found.chunks == (len(rows) + VALIDATION_ROWS) * ROW_TOKENS // CHUNK_TOKENS
        assert found.expected == round(references_found(np.array(tokens) / CHUNK_TOKENS, may_read))
        assert 0 < found.expected <= found.most == min(found.chunks, may_read)
        assert found.likely == found.expected
        known = asked(stage, epoch, found=7)
        assert known.most == known.likely == 7
    assert planned[1].history.finished.sum() > planned[0].history.finished.sum()


def test_rows_that_come_again_ask_once() -> None:
    stage = continual_config(steps=6, rows_per_step=4, epoch_steps="6", max_rows=3)
    [epoch] = epochs("continual", stage, warmed_up())
    assert asked(stage, epoch).chunks == (3 + VALIDATION_ROWS) * ROW_TOKENS // CHUNK_TOKENS


def test_what_was_read_before_the_decay_is_counted_within_an_epoch() -> None:
    stage = stage_config(steps=8, rows_per_step=4, epoch_steps="4")
    planned = epochs("warmup", stage, History.empty(SHARDS.num_documents))
    expected = planned[1].history.after(planned[1].rows.plan, 2 * 4).finished
    np.testing.assert_array_equal(read_at(planned, stage, 6), expected)
    np.testing.assert_array_equal(read_at(planned, stage, 4), planned[1].history.finished)
    assert not read_at(planned, stage, 0).any()
    assert expected.sum() > planned[1].history.finished.sum()


def test_chunks_find_fewer_references_the_fewer_there_are_and_the_longer_their_documents() -> None:
    alone = references_found(np.ones(1000), 10**9)
    assert alone == pytest.approx(1000, rel=1e-5)
    assert references_found(np.full(10, 100.0), 10**9) == pytest.approx(10 * 100**0.91, rel=1e-5)
    assert references_found(np.full(4000, 0.25), 10**9) == pytest.approx(alone)  # parts of documents
    assert references_found(np.ones(1000), 1000) == pytest.approx(500)
    assert references_found(np.ones(10**6), 1000) == pytest.approx(1000, rel=2e-3)  # all, and not more
    assert references_found(np.ones(1000), 0) == 0
