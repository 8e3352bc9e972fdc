import json
from pathlib import Path

import numpy as np

from data.packing import pack
from train.engine import StepResult
from train.history import History
from train.state import RunState

LENGTHS = np.array([5, 7, 9, 4, 6, 8], np.int64)


def test_an_update_moves_step_cursor_and_counts() -> None:
    state = RunState("warmup", step=3, cursor=12, tokens=100, skipped=1)
    after = state.after(StepResult(2.0, 40, 1.0, skipped=True), cursor=16)
    assert after == RunState("warmup", step=4, cursor=16, tokens=140, skipped=2)


def test_the_next_epoch_begins_where_this_one_ended_without_its_generation() -> None:
    state = RunState("continual", step=8, epoch=1, epoch_step=4, cursor=16, tokens=9, generation="g")
    begun = state.next_epoch()
    assert (begun.step, begun.epoch, begun.epoch_step, begun.cursor, begun.tokens) == (8, 2, 8, 0, 9)
    assert begun.generation is None
    assert begun.generation_fingerprint is None


def test_state_survives_json() -> None:
    state = RunState("continual", 7, 2, 4, 12, 1000, 3, "generation-continual-0002", "abc")
    assert RunState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_history_survives_a_folder(tmp_path: Path) -> None:
    history = History(np.arange(13) % 3 == 0, np.arange(13).astype(np.uint16))  # 13: no multiple of a byte
    history.save(tmp_path)
    loaded = History.load(tmp_path)
    np.testing.assert_array_equal(loaded.finished, history.finished)
    np.testing.assert_array_equal(loaded.drawn, history.drawn)
    assert loaded.finished.dtype == np.bool_


def test_finished_is_what_lay_in_consumed_rows_and_drawn_is_the_whole_plan() -> None:
    plan = pack(np.array([0, 2, 4, 2]), LENGTHS, 8, seed=0)  # ends at 5, 14, 20, 29: three rows of 8
    before = History.empty(6)
    half = before.after(plan, 1)
    consumed_row = int(plan.row_order[0])
    # The targets of row r are the tokens r*8+1 .. r*8+8; the last tokens of the documents are 4, 13, 19 and 28.
    expected = {0: {0}, 1: {2}, 2: {4}}[consumed_row]
    assert set(np.flatnonzero(half.finished)) == expected
    assert set(np.flatnonzero(before.after(plan, 3).finished)) == {0, 2, 4}
    assert before.after(plan, 3).drawn.tolist() == [1, 0, 2, 0, 1, 0]
    assert not before.finished.any()  # a new history; the old one stays
    assert not before.drawn.any()


def test_a_branching_stage_has_read_everything_and_drawn_nothing() -> None:
    history = History.of_read(np.array([True, False, True]))
    assert history.finished.tolist() == [True, False, True]
    assert history.drawn.tolist() == [0, 0, 0]
