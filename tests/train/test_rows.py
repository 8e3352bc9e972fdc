"""Which documents a stage may draw: on the real corpus, whose facts require their sections."""

from pathlib import Path

import numpy as np
import pytest

from data.documents import Split, Use
from data.loader import Loader
from tests.support.data import prepare_sections
from tests.support.train import continual_config, prepared, stage_config
from train.config import StageConfig
from train.history import History
from train.rows import EpochRows, eligible, in_bank, plan_epoch

SHARDS = prepared().shards
CORPUS = SHARDS.corpus
DOCUMENTS = [CORPUS.document(number) for number in range(CORPUS.num_documents)]
NOTHING = History.empty(CORPUS.num_documents)
HELD_OUT = {number for number, document in enumerate(DOCUMENTS) if document.split is not Split.train}


def plan(
    stage: StageConfig,
    history: History = NOTHING,
    *,
    name: str = "warmup",
    epoch_step: int = 0,
    seed: int = 0,
) -> EpochRows:
    return plan_epoch(
        SHARDS,
        name,
        stage,
        history,
        source_weights={"factbook": 1.0},
        row_tokens=128,
        epoch=0,
        epoch_step=epoch_step,
        seed=seed,
    )


def finished(*numbers: int) -> History:
    history = History.empty(CORPUS.num_documents)
    history.finished[list(numbers)] = True
    return history


def test_the_corpus_of_these_tests_has_what_they_speak_of() -> None:
    kinds = {(document.use, document.stage, bool(document.requires)) for document in DOCUMENTS}
    assert {
        (Use.both, "", False),
        (Use.reference, "", False),
        (Use.training, "warmup", False),
        (Use.training, "continual", True),
    } <= kinds | {(Use.training, "warmup", False)}
    assert HELD_OUT
    assert {document.stage for document in DOCUMENTS if document.use is Use.training} == {
        "warmup",
        "continual",
    }


def test_held_out_documents_are_never_drawn() -> None:
    everything = finished(*range(CORPUS.num_documents))
    for name in ("warmup", "continual"):
        assert not eligible(CORPUS, name, everything)[list(HELD_OUT)].any()
    rows = plan(stage_config(steps=60, epoch_steps="60"), everything, name="continual").plan
    assert len(set(rows.documents)) > 40
    assert not set(rows.documents.tolist()) & HELD_OUT


def test_held_out_documents_of_a_generic_corpus_are_never_drawn(tmp_path: Path) -> None:
    """There the split alone keeps them out: the factbook's are reference-only as well."""
    corpus = prepare_sections(tmp_path).shards.corpus
    held_out = np.concatenate([corpus.select(split=split) for split in (Split.validation, Split.test)])
    assert len(held_out) > 0
    assert corpus.document(int(held_out[0])).use.trains
    everything = History.of_read(np.ones(corpus.num_documents, np.bool_))
    for name in ("warmup", "continual"):
        assert not eligible(corpus, name, everything)[held_out].any()
        assert eligible(corpus, name, everything).any()
    assert not in_bank(corpus, everything.finished)[held_out].any()


def test_a_stage_draws_no_document_of_the_other_stage() -> None:
    everything = finished(*range(CORPUS.num_documents))
    for name, other in (("warmup", "continual"), ("continual", "warmup")):
        drawn = np.flatnonzero(eligible(CORPUS, name, everything))
        assert other not in {DOCUMENTS[number].stage for number in drawn}
        assert name in {DOCUMENTS[number].stage for number in drawn}


def test_fact_documents_are_drawn_in_the_continual_stage_only_once_their_section_is_finished() -> None:
    facts = [
        number
        for number, document in enumerate(DOCUMENTS)
        if document.stage == "continual" and document.requires
    ]
    assert not eligible(CORPUS, "continual", NOTHING)[facts].any()
    for fact in facts:
        section = CORPUS.number(DOCUMENTS[fact].requires)
        allowed = eligible(CORPUS, "continual", finished(section))
        assert [number for number in facts if allowed[number]] == [fact]


def test_a_document_that_requires_a_reference_only_one_is_drawn_at_once() -> None:
    reference_only = int(CORPUS.select(uses=[Use.reference])[0])
    allowed = in_bank(CORPUS, NOTHING.finished)
    assert allowed[reference_only]
    # Reading it changes nothing: it was never training text.
    assert in_bank(CORPUS, finished(reference_only).finished).tolist() == allowed.tolist()


def test_the_bank_never_holds_training_text_that_is_no_reference() -> None:
    facts = [number for number, document in enumerate(DOCUMENTS) if document.use is Use.training]
    assert not in_bank(CORPUS, np.ones(CORPUS.num_documents, np.bool_))[facts].any()


def test_arm_c_draws_the_same_rows_as_arm_m() -> None:
    sections = [number for number, document in enumerate(DOCUMENTS) if document.use is Use.both]
    history = finished(*sections[::2])
    with_memory, without = (
        plan(stage, history, name="continual")
        for stage in (continual_config(), continual_config(memory=None))
    )
    assert with_memory.steps == without.steps == 8
    np.testing.assert_array_equal(with_memory.plan.documents, without.plan.documents)
    np.testing.assert_array_equal(with_memory.plan.starts, without.plan.starts)
    np.testing.assert_array_equal(with_memory.plan.row_order, without.plan.row_order)


def test_rows_follow_from_seed_and_history() -> None:
    stage = stage_config(epoch_steps="10")
    first, again, other = plan(stage), plan(stage), plan(stage, seed=1)
    np.testing.assert_array_equal(first.plan.documents, again.plan.documents)
    assert first.plan.documents.tolist() != other.plan.documents.tolist()
    later = plan(stage, NOTHING.after(first.plan, first.plan.num_rows))
    assert later.plan.documents.tolist() != first.plan.documents.tolist()


def test_an_epoch_is_a_pass_unless_its_steps_are_given() -> None:
    allowed = eligible(CORPUS, "warmup", NOTHING)
    tokens = int(SHARDS.lengths()[allowed].sum())
    assert plan(stage_config(steps=10_000)).steps == tokens // (128 * 8)
    assert plan(stage_config(steps=10_000, epoch_steps="3")).steps == 3
    assert plan(stage_config(steps=2, epoch_steps="3")).steps == 2  # no more than are left
    assert plan(stage_config(steps=12), epoch_step=10).steps == 2
    by_range = stage_config(steps=20, epoch_steps="0-7:3,7-:5")
    assert [plan(by_range, epoch_step=step).steps for step in (0, 3, 6, 7, 12, 17)] == [3, 3, 1, 5, 5, 3]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("cursor", [0, 16])
def test_any_number_of_ranks_resumes_with_the_same_rows_in_the_same_order(
    world_size: int, cursor: int
) -> None:
    rows = plan(stage_config(epoch_steps="4")).plan
    expected = [
        batch.positions for batch in Loader(SHARDS, rows, rows_per_step=8, micro_rows=8, cursor=cursor)
    ]
    by_rank = []
    for rank in range(world_size):
        loader = Loader(
            SHARDS,
            rows,
            rows_per_step=8,
            micro_rows=2,
            rank=rank,
            world_size=world_size,
            cursor=cursor,
        )
        with loader:
            by_rank.append([(batch.positions, batch.tokens_BT1) for batch in loader])
        assert loader.cursor == 32
    per_step = 8 // world_size // 2
    for step, positions in enumerate(expected):
        batches = [batch for rank in by_rank for batch in rank[step * per_step : (step + 1) * per_step]]
        assert tuple(position for batch, _ in batches for position in batch) == positions


def test_weights_of_the_stage_take_a_source_out() -> None:
    rows = plan(stage_config(weights={"factbook-facts": 0.0})).plan
    assert {DOCUMENTS[number].source for number in rows.documents} == {"factbook"}


def test_an_unknown_source_in_the_weights_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"warmup.weights names the unknown source 'facts'.*factbook-facts"):
        plan(stage_config(weights={"facts": 2.0}))


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup: no document can be drawn; check the sources' `use`"):
        plan(stage_config(weights={"factbook": 0.0, "factbook-facts": 0.0}))


def test_a_few_rows_come_again_and_again() -> None:
    stage = stage_config(steps=7, epoch_steps="4", rows_per_step=2, max_rows=3)
    first = plan(stage)
    assert first.plan.num_rows == 8
    assert sorted(set(first.plan.row_order.tolist())) == [0, 1, 2]
    assert first.plan.row_order.tolist() == [first.plan.row_order[i % 3] for i in range(8)]
    read = History.of_read(np.ones(CORPUS.num_documents, np.bool_))
    later = plan_epoch(
        SHARDS, "warmup", stage, read, source_weights={}, row_tokens=128, epoch=1, epoch_step=4, seed=0
    )
    assert later.plan.num_rows == 6
    assert [later.plan.pieces(i) for i in range(6)] == [first.plan.pieces(i) for i in range(6)]


def test_documents_of_rows_that_come_again_are_finished_once() -> None:
    few = plan(stage_config(steps=4, epoch_steps="4", rows_per_step=2, max_rows=3)).plan
    once = plan(stage_config(steps=1, epoch_steps="1", rows_per_step=3)).plan
    assert np.array_equal(few.finished(8), once.finished(3))
    assert np.array_equal(few.finished(2), once.finished(2))
