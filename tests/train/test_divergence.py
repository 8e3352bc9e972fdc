"""What counts as divergence, and which rows are passed over."""

import json
from dataclasses import asdict, replace

import pytest

from train.config import DivergenceConfig
from train.divergence import DivergedError, Health
from train.engine import StepResult

CONFIG = DivergenceConfig(window_steps=8, patience=3, spike_nats=0.5, spike_sigmas=6.0, margin_steps=1)
NAN, INF = float("nan"), float("inf")


def result(loss: float, *, norm: float = 0.5, skipped: bool = False) -> StepResult:
    return StepResult(loss, 100, norm, skipped)


def after(losses: list[float], config: DivergenceConfig = CONFIG) -> Health:
    health = Health()
    for step, loss in enumerate(losses, start=1):
        health = health.after(result(loss), config)
        health.judge(step, result(loss), config)
    return health


def steady(count: int) -> list[float]:
    return [2.0 + 0.02 * (-1) ** step for step in range(count)]


def test_an_ordinary_run_is_healthy() -> None:
    falling = [7 * 0.97**step + 0.3 * (-1) ** step for step in range(200)]
    assert after(falling).bad == 0
    assert len(after(falling).losses) == CONFIG.window_steps


def test_a_spike_that_lasts_makes_the_run_go_back() -> None:
    assert after([*steady(20), 2.6, 2.6]).bad == 2
    with pytest.raises(
        DivergedError, match=r"loss 2.700 stands out, 3 bad updates in a row \(update 23\)"
    ) as found:
        after([*steady(20), 2.6, 2.9, 2.7])
    assert found.value.window(CONFIG) == (19, 24)  # updates 21 to 23, counted from 1, and one on either side


def test_a_spike_that_ends_is_borne_and_does_not_count_as_good() -> None:
    health = after([*steady(20), 9.0, 9.0, 2.0])
    assert health.bad == 0
    assert max(health.losses) < 3


@pytest.mark.parametrize(
    "losses",
    [
        [*steady(20), *[2.4] * 5],  # less than spike_nats above
        [*steady(6), *[9.0] * 2],  # nothing to compare with yet
        [2.0 + 0.5 * (step % 5) for step in range(30)] + [4.6] * 5,  # 6 sigmas of such noise are more
    ],
    ids=["small", "early", "noisy"],
)
def test_what_does_not_stand_out_is_no_spike(losses: list[float]) -> None:
    assert after(losses).bad == 0


def test_spikes_may_be_ignored() -> None:
    assert after([*steady(20), *[9.0] * 5], replace(CONFIG, spike_nats=None)).bad == 0


@pytest.mark.parametrize("bad", [result(NAN), result(INF), result(2.0, norm=INF), result(2.0, norm=NAN)])
def test_numbers_that_reached_the_weights_make_the_run_go_back_at_once(bad: StepResult) -> None:
    health = Health().after(bad, CONFIG)
    with pytest.raises(DivergedError, match="reached the weights"):
        health.judge(7, bad, CONFIG)


def test_a_norm_that_nobody_kept_is_no_bad_one() -> None:
    unknown = StepResult(2.0, 100, None, skipped=False)
    assert Health().after(unknown, CONFIG).bad == 0
    Health().judge(1, unknown, CONFIG)


def test_left_out_updates_are_borne_up_to_the_patience() -> None:
    bad, health = result(NAN, norm=NAN, skipped=True), Health()
    for step in (1, 2):
        health = health.after(bad, CONFIG)
        health.judge(step, bad, CONFIG)
    health = health.after(bad, CONFIG)
    with pytest.raises(DivergedError, match="no finite gradient, 3 bad updates in a row"):
        health.judge(3, bad, CONFIG)


def test_the_window_does_not_begin_before_the_stage() -> None:
    assert DivergedError(2, Health(bad=2), "").window(CONFIG) == (0, 3)


def test_going_back_takes_the_losses_of_then_and_keeps_what_was_decided_since() -> None:
    then = Health(losses=(1.0, 2.0), bad=1)
    now = Health(losses=(3.0,), bad=3, rollbacks=1, lr_factor=0.5, passed_over=((1, 2),))
    back = now.back_at(then, (5, 9), replace(CONFIG, lr_factor=0.5))
    assert back == Health((1.0, 2.0), 1, 2, 0.25, ((1, 2), (5, 9)))
    assert [step for step in range(12) if back.passes_over(step)] == [1, 5, 6, 7, 8]


def test_health_survives_json() -> None:
    health = Health((1.5, 2.25), 2, 1, 0.5, ((3, 7),))
    assert Health.from_json(json.loads(json.dumps(asdict(health)))) == health
