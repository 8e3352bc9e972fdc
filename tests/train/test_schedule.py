import itertools

import pytest

from tests.support.train import stage_config
from train.schedule import Schedule, schedule_of


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
