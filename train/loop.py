"""The loop of an epoch, in the order of time.

It counts optimizer updates only; what an update is made of belongs to the engine, what a batch is given to the stage.
Not here: how an epoch is opened (`continual`), how a run is put together (`launch.build`).
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from train.engine import Engine
from train.inputs import StepInputs
from train.metrics import Metrics
from train.schedule import Schedule
from train.stages import Stage
from train.state import RunState

Validate = Callable[[RunState], dict[str, Any]]
Save = Callable[[RunState], None]


def train_epoch(
    engine: Engine,
    stage: Stage,
    inputs: Iterator[StepInputs],
    schedule: Schedule,
    state: RunState,
    *,
    last_step: int,
    metrics: Metrics,
    validate: Validate,
    save: Save,
    peak_tokens_per_second: float | None = None,
    max_skipped: int = 20,
) -> RunState:
    """Train up to `last_step` finished updates of the stage and return where that leaves the run.

    Args:
        engine: Makes the updates.
        stage: Says what the rows of a step read.
        inputs: What this rank's steps are given, from the state's cursor on.
        schedule: What happens at which step.
        state: Where the run stands.
        last_step: The epoch's last update, counted in the stage.
        metrics: Where each step is reported, once.
        validate: Reads held-out text.
        save: Publishes a checkpoint.
        peak_tokens_per_second: What the devices' stated peak would make of the text's operations; None: MFU is not
            reported.
        max_skipped: Updates in a row without a finite gradient that end the run.

    Raises:
        FloatingPointError: After `max_skipped` skipped updates in a row.
    """
    skipped_in_a_row = 0
    collected = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle of a step stalls every rank
    try:
        while state.step < last_step:
            started = time.perf_counter()
            given = next(inputs)
            fetched = time.perf_counter()
            lr = schedule.learning_rate(state.step)
            result = engine.train_step(given.micro, lr=lr)
            state = state.after(result, cursor=given.cursor)
            ended = time.perf_counter()
            rate = result.tokens / (ended - started)
            reads = stage.reads(state.cursor)
            metrics.log(
                stage=state.stage,
                step=state.step,
                num_steps=schedule.num_steps,
                epoch=state.epoch,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=lr,
                skipped=result.skipped,
                tokens=state.tokens,
                tokens_per_second=rate,
                mfu=None if peak_tokens_per_second is None else rate / peak_tokens_per_second,
                seconds_data=fetched - started,
                seconds_update=ended - fetched,
                generation=state.generation,
                generation_age=None if state.generation is None else state.step - state.epoch_step,
                **({} if reads is None else asdict(reads)),
                **({} if given.reading is None else asdict(given.reading)),
            )
            skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
            if skipped_in_a_row >= max_skipped:
                raise FloatingPointError(
                    f"{skipped_in_a_row} updates in a row had no finite gradient ({state.stage}, step {state.step}); "
                    f"lower {state.stage}.peak_lr (now {schedule.peak_lr}) and resume from an earlier checkpoint"
                )
            if schedule.validates(state.step):
                metrics.log(stage=state.stage, step=state.step, **validate(state))
            if schedule.saves(state.step):
                save(state)
            if state.step % 100 == 0:
                gc.collect()
    finally:
        if collected:
            gc.enable()
    return state
