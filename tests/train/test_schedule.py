import itertools
import re

import pytest

from tests.support.train import stage_config
from train.schedule import EpochRange, Schedule, epoch_begins, epoch_end, epoch_ranges, schedule_of


def schedule(**changes: int | float) -> Schedule:
    settings: dict[str, int | float] = {
        "num_steps": 20,
        "peak_lr": 1.0,
        "final_lr": 0.1,
        "ramp_steps": 4,
        "decay_steps": 8,
        "save_every": 6,
        "validate_every": 5,
    }
    return Schedule(**(settings | changes))  # type: ignore[arg-type]


def test_ramp_is_linear_and_begins_above_zero() -> None:
    assert [schedule().learning_rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_plateau_lasts_until_the_branch_point() -> None:
    assert schedule().branch_step == 12
    assert {schedule().learning_rate(step) for step in range(4, 12)} == {1.0}


def test_decay_is_linear_and_would_reach_the_final_rate_one_step_after_the_last() -> None:
    rates = [schedule().learning_rate(step) for step in range(11, 21)]
    assert rates[-1] == pytest.approx(0.1)
    drops = [before - after for before, after in itertools.pairwise(rates)]
    assert drops == pytest.approx([0.1] * 9)


def test_without_ramp_and_decay_the_rate_is_constant() -> None:
    plain = schedule(ramp_steps=0, decay_steps=0)
    assert {plain.learning_rate(step) for step in range(20)} == {1.0}
    assert plain.branch_step == 20


def test_saves_at_its_interval_at_the_branch_point_and_at_the_end() -> None:
    assert [step for step in range(1, 21) if schedule().saves(step)] == [6, 12, 18, 20]
    assert [step for step in range(1, 21) if schedule(decay_steps=7).saves(step)] == [6, 12, 13, 18, 20]


def test_validates_at_its_interval_and_at_the_end() -> None:
    assert [step for step in range(1, 21) if schedule(num_steps=18).validates(step)] == [5, 10, 15, 18, 20]


def test_follows_the_stage_settings() -> None:
    made = schedule_of(
        stage_config(peak_lr=0.5, final_lr=0.25, ramp_steps=3, decay_steps=5), save_every=6, validate_every=7
    )
    assert made == Schedule(20, 0.5, 0.25, 3, 5, 6, 7)


def test_bank_epochs_have_the_length_of_their_range_and_end_with_it() -> None:
    stage = stage_config(steps=2100, epoch_steps="0-250:100,250-1000:300,1000-:500")
    assert epoch_begins(stage) == [0, 100, 200, 250, 550, 850, 1000, 1500, 2000]
    ends = [epoch_end(stage, begin) for begin in epoch_begins(stage)]
    assert ends == [100, 200, 250, 550, 850, 1000, 1500, 2000, 2100]


def test_one_number_is_a_range_of_its_own_and_null_a_pass_over_the_rows() -> None:
    for same in ("8", "0-:8", " 0-20:8 ", "0-8:8,8-900:8"):
        assert epoch_begins(stage_config(steps=20, epoch_steps=same)) == [0, 8, 16]
    assert epoch_ranges("0-8:2,8-:4", num_steps=20, key="k") == [EpochRange(0, 8, 2), EpochRange(8, None, 4)]
    passes = stage_config(steps=20, epoch_steps=None)
    assert epoch_end(passes, 0) is None
    assert epoch_begins(passes) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("0-10:5,12-:5", "'12-:5' leaves out the steps from 10; let it begin at 10"),
        ("5-:5", "'5-:5' leaves out the steps from 0; let it begin at 0"),
        ("0-10:5,8-:5", "'8-:5' overlaps the range before it; let it begin at 10"),
        ("0-10:5,5", "'5' is not BEGIN-END:STEPS in whole numbers; write for example 0-1000:100,1000-:500"),
        ("0-ten:5", "'0-ten:5' is not BEGIN-END:STEPS in whole numbers"),
        ("often", "'often' is not BEGIN-END:STEPS in whole numbers"),
        ("0-10:2.5", "'0-10:2.5' is not BEGIN-END:STEPS in whole numbers"),
        ("", "'' is not BEGIN-END:STEPS in whole numbers"),
        ("0-:5,10-:5", "the range before '10-:5' has no end; let it end at 10, where this one begins"),
        ("0-10:5,10-10:5", "'10-10:5' holds no step; let it end above 10"),
        ("0-10:5", "ends at step 10 of 20; leave out the last end: 0-:5"),
        ("0-10:0,10-:5", "is below 1; set null for one pass over the rows"),
        ("0", "is below 1; set null for one pass over the rows"),
        ("-3", "is below 1; set null for one pass over the rows"),
    ],
)
def test_ranges_that_do_not_cover_the_stage_once_are_refused(given: str, said: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"continual.epoch_steps={given}")) as refused:
        epoch_ranges(given, num_steps=20, key="continual.epoch_steps")
    assert said in str(refused.value)
