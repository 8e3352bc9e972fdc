"""The loop of an epoch, in the order of time.

It counts optimizer updates only; what an update is made of belongs to the engine, what a batch is given to the stage.
Not here: how an epoch is opened (`continual`), how a run is put together (`launch.build`).
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from train.config import DivergenceConfig
from train.engine import Engine, StepResult
from train.inputs import StepInputs
from train.metrics import Metrics
from train.schedule import Schedule
from train.stages import Stage
from train.state import RunState

Validate = Callable[[RunState], dict[str, Any]]
Save = Callable[[RunState], None]


@dataclass(frozen=True, slots=True)
class PeakSpeed:
    """Tokens per second if the devices did nothing but the text's operations.

    Attributes:
        products: At the measured rate of the model's matrix products, by the operations of a causal kernel.
        palm: At the nominal peak, by the PaLM formula: every score of the T x T matrix counts; None: no peak is known.
        causal: At the nominal peak, by the operations of a causal kernel.
        tflops: The nominal peak itself, of all devices together, in TFLOP/s.
    """

    products: float
    palm: float | None = None
    causal: float | None = None
    tflops: float | None = None


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
    divergence: DivergenceConfig,
    peak: PeakSpeed | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> RunState:
    """Train up to `last_step` finished updates of the stage and return where that leaves the run.

    A checkpoint is published when the schedule says so, at `last_step`, and before an early return. Where updates are
    made on a device, the next one is queued before one is waited for, unless somebody looks at the weights between
    them; what they are does not depend on it. To be called with the `collector_at_rest`.

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
        divergence: When training counts as gone wrong.
        peak: What the devices could make of the text's operations; None: no share of it is reported.
        stopping: Whether to return early; a collective, asked after every step.

    Raises:
        DivergedError: The updates since the last good one are not to be kept.
    """
    queued: deque[_Queued] = deque()
    stopped = False
    while state.step < last_step and not (stopped and not queued):
        while not stopped and len(queued) <= engine.runs_ahead:
            step = state.step + len(queued)
            if step == last_step or (queued and (schedule.validates(step) or schedule.saves(step))):
                break  # somebody looks at the weights first
            queued.append(_queue(engine, inputs, schedule, state, step))
        update = queued.popleft()
        if update.tell is None:
            state = state.passing_over(cursor=update.given.cursor)
            metrics.log(stage=state.stage, step=state.step, passed_over=True)
        else:
            asked = time.perf_counter()
            result = update.tell()
            seconds = update.seconds + time.perf_counter() - asked
            health = state.health.after(result, divergence)
            state = state.after(result, cursor=update.given.cursor, health=health)
            rate = result.tokens / seconds
            reads = stage.reads(state.cursor)
            given = update.given
            metrics.log(
                stage=state.stage,
                step=state.step,
                num_steps=schedule.num_steps,
                epoch=state.epoch,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=update.lr,
                skipped=result.skipped,
                tokens=state.tokens,
                tokens_per_second=rate,
                mfu=_share(rate, peak.palm if peak else None),
                mfu_causal=_share(rate, peak.causal if peak else None),
                peak_tflops=peak.tflops if peak else None,
                matmul_share=_share(rate, peak.products if peak else None),
                seconds_data=given.seconds_waited - given.seconds_retrieve,
                seconds_retrieve=given.seconds_retrieve,
                seconds_compute=max(0.0, seconds - given.seconds_waited - result.seconds_update),
                seconds_update=result.seconds_update,
                generation=state.generation,
                generation_age=None if state.generation is None else state.step - state.epoch_step,
                **({} if reads is None else asdict(reads)),
                **({} if given.reading is None else asdict(given.reading)),
            )
            state.health.judge(state.step, result, divergence)
        stopped = stopping()
        if schedule.validates(state.step) and not stopped:
            measured = validate(state)
            metrics.log(stage=state.stage, step=state.step, **measured)
            loss = measured.get("validation_memory", measured["validation_none"])
            state = replace(state, validation=loss)
        if schedule.saves(state.step) or state.step == last_step or (stopped and not queued):
            save(state)
        if state.step % 100 == 0:
            gc.collect()
    return state


@dataclass(frozen=True, slots=True)
class _Queued:
    """An update on its way.

    Attributes:
        given: What it reads.
        lr: Its learning rate.
        seconds: What it took to queue, what it reads included: with the wait for it, its share of the run's time,
            whatever was queued in between.
        tell: Waits for it and tells of it; None: its rows are passed over.
    """

    given: StepInputs
    lr: float
    seconds: float
    tell: Callable[[], StepResult] | None


def _queue(
    engine: Engine, inputs: Iterator[StepInputs], schedule: Schedule, state: RunState, step: int
) -> _Queued:
    """Queue the update that follows `step` finished or queued ones."""
    began = time.perf_counter()
    given = next(inputs)
    lr = schedule.learning_rate(step) * state.health.lr_factor
    tell = None
    if state.health.passes_over(step):
        for _ in given.micro:
            pass  # rows come in their order
    else:
        tell = engine.queue_step(given.micro, lr=lr)
    return _Queued(given, lr, time.perf_counter() - began, tell)


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Keep Python's garbage collector from stalling a step, and with it every rank; `train_epoch` calls it at times."""
    collects = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there now stays, and need not be looked at again
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()


def _share(rate: float, peak: float | None) -> float | None:
    return None if peak is None else rate / peak
