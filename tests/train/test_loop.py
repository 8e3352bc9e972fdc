import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.train import CountingEngine
from train.config import DivergenceConfig
from train.divergence import DivergedError, Health
from train.engine import ModelInput, StepResult
from train.inputs import BankReading, StepInputs
from train.loop import PeakSpeed, collector_at_rest, train_epoch
from train.metrics import JsonLines, Metrics, read_metrics
from train.schedule import Schedule
from train.stages import PlainStage
from train.state import RunState

SCHEDULE = Schedule(
    num_steps=8, peak_lr=1.0, final_lr=0.0, ramp_steps=2, decay_steps=2, save_every=3, validate_every=4
)
HEALTHY = Health()


class Trained:
    """One call of the loop, and what it did."""

    def __init__(
        self,
        folder: Path,
        engine: CountingEngine,
        *,
        first: int = 0,
        last_step: int = 8,
        health: Health = HEALTHY,
        stopping: Callable[[], bool] = lambda: False,
        reading: BankReading | None = None,
        peak: PeakSpeed | None = None,
    ) -> None:
        self.reading = reading
        self.validated: list[int] = []
        self.saved: list[int] = []
        self.handed_out = 2 * 2 * first
        self.path = folder / "metrics.jsonl"
        with Metrics([JsonLines(self.path, stage="warmup", step=first)]) as metrics:
            self.state = train_epoch(
                engine,
                PlainStage(),
                self.inputs(),
                SCHEDULE,
                RunState("warmup", step=first, cursor=self.handed_out, health=health),
                last_step=last_step,
                metrics=metrics,
                validate=lambda state: self.validated.append(state.step) or {"validation_none": 1.5},
                save=lambda state: self.saved.append(state.step),
                divergence=DivergenceConfig(patience=3, window_steps=4),
                stopping=stopping,
                peak=peak,
            )

    def inputs(self) -> Iterator[StepInputs]:
        while True:
            rows = [torch.full((2, 5), self.handed_out + first) for first in (0, 2)]
            self.handed_out += 4
            micro = [ModelInput(tokens[:, :-1], tokens[:, 1:]) for tokens in rows]
            yield StepInputs(iter(micro), self.handed_out, reading=self.reading)


def test_counts_updates_and_gives_each_its_micro_batches_and_its_rate(tmp_path: Path) -> None:
    engine = CountingEngine()
    done = Trained(tmp_path, engine)
    assert done.state == RunState(
        "warmup", step=8, cursor=32, tokens=8 * 2 * 2 * 4, validation=1.5, health=Health(losses=(1.0,) * 4)
    )
    assert [len(inputs) for inputs in engine.inputs] == [2] * 8
    first_tokens = [int(micro.tokens_BT[0, 0]) for inputs in engine.inputs for micro in inputs]
    assert first_tokens == list(range(0, 32, 2))
    assert engine.rates == [SCHEDULE.learning_rate(step) for step in range(8)]


def test_validates_and_saves_when_the_schedule_says_so(tmp_path: Path) -> None:
    done = Trained(tmp_path, CountingEngine())
    assert done.validated == [4, 8]
    assert done.saved == [3, 6, 8]


def test_goes_on_from_a_state_and_reports_each_step_once(tmp_path: Path) -> None:
    Trained(tmp_path, CountingEngine(), last_step=5)
    done = Trained(tmp_path, CountingEngine(), first=3)
    lines = read_metrics(done.path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in lines if "validation_none" in line] == [4, 8]


def test_a_line_splits_the_step_into_data_retrieving_computing_and_update(tmp_path: Path) -> None:
    line = read_metrics(Trained(tmp_path, CountingEngine()).path)[0]
    assert {"loss", "grad_norm", "lr", "tokens", "tokens_per_second", "generation_age"} <= line.keys()
    assert line["seconds_data"] >= 0
    assert line["seconds_compute"] >= 0
    assert line["seconds_retrieve"] == 0.0
    assert line["seconds_update"] == 0.0


def test_mfu_is_told_by_both_formulas_where_a_peak_is_known_and_beside_the_products_always(
    tmp_path: Path,
) -> None:
    peak = PeakSpeed(products=1e9, palm=2e9, causal=4e9, tflops=0.4)
    line = read_metrics(Trained(tmp_path, CountingEngine(), peak=peak).path)[0]
    assert line["mfu"] == line["tokens_per_second"] / 2e9
    assert line["mfu_causal"] == line["mfu"] / 2
    assert line["matmul_share"] == line["tokens_per_second"] / 1e9
    assert line["peak_tflops"] == 0.4
    unknown = read_metrics(Trained(tmp_path / "unknown", CountingEngine(), peak=PeakSpeed(1e9)).path)[0]
    assert (unknown["mfu"], unknown["mfu_causal"], unknown["peak_tflops"]) == (None, None, None)
    assert unknown["matmul_share"] > 0
    assert read_metrics(Trained(tmp_path / "none", CountingEngine()).path)[0]["mfu_causal"] is None


def test_a_line_says_how_memories_came_from_the_bank(tmp_path: Path) -> None:
    reading = BankReading(cache_hit_rate=0.25, bytes_read=300)
    line = read_metrics(Trained(tmp_path, CountingEngine(), reading=reading).path)[0]
    assert (line["cache_hit_rate"], line["bytes_read"]) == (0.25, 300)
    without = read_metrics(Trained(tmp_path / "plain", CountingEngine()).path)[0]
    assert not {"cache_hit_rate", "bytes_read"} & without.keys()


class Ahead(CountingEngine):
    """Tells in which order updates are queued and waited for."""

    runs_ahead = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.said: list[str] = []

    def queue_step(self, inputs: object, *, lr: float) -> Callable[[], StepResult]:
        tell, number = super().queue_step(inputs, lr=lr), self.updates
        self.said.append(f"queued {number}")

        def told() -> StepResult:
            self.said.append(f"told {number}")
            return tell()

        return told


def test_an_update_is_queued_before_the_last_one_is_waited_for_unless_weights_are_looked_at(
    tmp_path: Path,
) -> None:
    engine = Ahead()
    done = Trained(tmp_path, engine, last_step=5)  # saves after 3, validates after 4
    first = ["queued 1", "queued 2", "told 1", "queued 3", "told 2", "told 3"]
    assert engine.said == [*first, "queued 4", "told 4", "queued 5", "told 5"]
    assert (done.validated, done.saved) == ([4], [3, 5])


@pytest.mark.parametrize("passed_over", [(), ((2, 4), (6, 7)), ((0, 2),)])
def test_running_ahead_changes_nothing_but_the_order(
    passed_over: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    skips, health = frozenset({2, 3}), Health(passed_over=passed_over)
    plain, ahead = (
        Trained(tmp_path / kind.__name__, kind(skips=skips), health=health)
        for kind in (CountingEngine, Ahead)
    )
    assert ahead.state == plain.state
    assert (ahead.saved, ahead.validated) == (plain.saved, plain.validated)
    timeless = [
        [
            {key: value for key, value in line.items() if key != "time" and "second" not in key}
            for line in read_metrics(done.path)
        ]
        for done in (plain, ahead)
    ]
    assert timeless[0] == timeless[1]


def test_each_update_is_told_its_own_time_whatever_was_queued_in_between(tmp_path: Path) -> None:
    class Slow(Ahead):
        def queue_step(self, inputs: object, *, lr: float) -> Callable[[], StepResult]:
            time.sleep(0.02)
            return super().queue_step(inputs, lr=lr)

    lines = read_metrics(Trained(tmp_path, Slow(), last_step=5).path)
    assert [line["seconds_compute"] > 0.019 for line in lines if "loss" in line] == [True] * 5


def test_who_is_to_stop_waits_for_what_is_queued_and_queues_no_more(tmp_path: Path) -> None:
    engine = Ahead()
    asked = iter([True, True])
    done = Trained(tmp_path, engine, stopping=lambda: next(asked))
    assert engine.said == ["queued 1", "queued 2", "told 1", "told 2"]
    assert (done.state.step, done.saved) == (2, [2])


def test_updates_without_finite_gradient_are_left_out_and_too_many_in_a_row_diverge(tmp_path: Path) -> None:
    done = Trained(tmp_path, CountingEngine(skips=frozenset({2, 3, 5, 6})))
    assert done.state.skipped == 4
    with pytest.raises(
        DivergedError, match=r"no finite gradient, 3 bad updates in a row \(update 4\)"
    ) as found:
        Trained(tmp_path, CountingEngine(skips=frozenset({2, 3, 4})))
    assert found.value.window(DivergenceConfig(margin_steps=1)) == (0, 5)


def test_rows_that_are_passed_over_move_the_step_and_make_no_update(tmp_path: Path) -> None:
    engine = CountingEngine()
    done = Trained(tmp_path, engine, health=Health(passed_over=((2, 4), (6, 7))))
    assert done.state.step == 8
    assert done.state.cursor == 32
    assert done.state.skipped == 3
    assert engine.rates == [SCHEDULE.learning_rate(step) for step in (0, 1, 4, 5, 7)]
    assert [int(inputs[0].tokens_BT[0, 0]) for inputs in engine.inputs] == [0, 4, 16, 20, 28]
    lines = read_metrics(done.path)
    assert [line["step"] for line in lines if line.get("passed_over")] == [3, 4, 7]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 5, 6, 8]
    assert done.saved == [3, 6, 8]


def test_a_rollback_may_lower_the_rate(tmp_path: Path) -> None:
    engine = CountingEngine()
    Trained(tmp_path, engine, health=Health(lr_factor=0.5))
    assert engine.rates == [SCHEDULE.learning_rate(step) / 2 for step in range(8)]


@pytest.mark.parametrize(("asked_after", "saved"), [(2, [2]), (3, [3])])
def test_stopping_publishes_once_and_ends_after_the_update(
    asked_after: int, saved: list[int], tmp_path: Path
) -> None:
    asked = iter([*[False] * (asked_after - 1), True])
    done = Trained(tmp_path, CountingEngine(), stopping=lambda: next(asked))
    assert done.state.step == asked_after
    assert done.saved == saved


def test_the_end_of_an_epoch_is_saved_whatever_the_schedule_says(tmp_path: Path) -> None:
    assert Trained(tmp_path, CountingEngine(), last_step=5).saved == [3, 5]


def test_a_state_knows_the_validation_loss_of_its_weights(tmp_path: Path) -> None:
    assert Trained(tmp_path, CountingEngine(), last_step=4).state.validation == 1.5
    assert Trained(tmp_path, CountingEngine(), last_step=5).state.validation is None


def test_the_collector_rests_and_what_is_there_by_then_is_not_looked_at_again() -> None:
    frozen = gc.get_freeze_count()
    with collector_at_rest():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > frozen
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
