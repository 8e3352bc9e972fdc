"""A stage from beginning to end, epoch by epoch; what a resumed run calls as well.

    while steps are left:  plan rows -> open the epoch (grow, search, compile) -> train -> publish a checkpoint

When training diverges the stage goes back to the newest checkpoint before the bad updates, publishes it again with the
rows that it will pass over, and goes on: a kill at any time then resumes the same way.
Not here: a single epoch's loop (`loop`), assembling the parts from a configuration (`launch.build`).
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

from data.loader import Loader
from data.packing import RowPlan
from data.references import References
from data.shards import TokenShards
from memorybank.bank import OnlineReader
from memorybank.cache import CachedRecords
from memorybank.store import Generation
from train.arms import Arm, Bank, Pattern, Reading, text_readings
from train.checkpoint import Checkpoints
from train.config import DivergenceConfig, StageConfig
from train.continual import BankEpochs
from train.distributed import Ranks
from train.divergence import DivergedError, HopelessError
from train.engine import Engine
from train.evaluate import Setting, TextSet, memory_attention, validation_losses
from train.history import History
from train.inputs import InputsAhead, StepInputs
from train.loop import PeakSpeed, collector_at_rest, train_epoch
from train.metrics import Metrics
from train.neighbours import epoch_search
from train.rows import plan_epoch
from train.schedule import Schedule, epoch_begins
from train.stages import MemoryStage, PlainStage, Reader, Stage, encodes_online, reads_bank
from train.state import RunState
from train.stopping import Stop, StoppedError
from train.tracing import Tracing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a stage is made of; assembled by `launch.build`."""

    name: str
    config: StageConfig
    schedule: Schedule
    engine: Engine
    shards: TokenShards
    source_weights: Mapping[str, float]
    references: References
    epochs: BankEpochs | None
    window: int
    overlap_limit: float
    validation: TextSet
    checkpoints: Checkpoints
    metrics: Metrics
    ranks: Ranks
    row_tokens: int
    peak: PeakSpeed | None
    cache_bytes: int
    seed: int
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    tracing: Tracing | None = None
    stop: Stop = field(default_factory=Stop)


def run_stage(parts: Parts, state: RunState, history: History) -> tuple[RunState, History]:
    """Train a stage from where the run stands to its end.

    Args:
        parts: Everything the stage needs.
        state: Position; at step 0 for a new stage.
        history: What had been read when the state's epoch began.

    Returns:
        The position at the end, and the history then.

    Raises:
        StoppedError: A signal asked for it; a checkpoint is published.
        HopelessError: Training diverged too often, or not one update was made.
    """
    schedule = parts.schedule
    if parts.config.memory is not None and (begins := epoch_begins(parts.config)):
        log.info(
            "%s: %d bank epochs in %d steps (epoch_steps=%s), each compiled anew",
            parts.name,
            len(begins),
            schedule.num_steps,
            parts.config.epoch_steps,
        )
    while True:
        try:
            state, history = _train_to_end(parts, state, history)
        except DivergedError as problem:
            state, history = _go_back(parts, problem)
            continue
        if state.skipped >= state.step:
            raise HopelessError(
                f"not one of the {state.step} updates of the {parts.name} stage was made: no gradient was finite; "
                f"lower {parts.name}.peak_lr (now {parts.schedule.peak_lr:g}), or look into the data"
            )
        return state, history


def _train_to_end(parts: Parts, state: RunState, history: History) -> tuple[RunState, History]:
    schedule = parts.schedule
    while True:
        rows = plan_epoch(
            parts.shards,
            parts.name,
            parts.config,
            history,
            source_weights=parts.source_weights,
            row_tokens=parts.row_tokens,
            epoch=state.epoch,
            epoch_step=state.epoch_step,
            seed=parts.seed,
        )
        last_step = state.epoch_step + rows.steps
        if state.step < last_step:
            state = _train(parts, rows.plan, state, history, last_step)
        history = history.after(rows.plan, state.cursor)
        if state.step >= schedule.num_steps:
            return state, history
        state = state.next_epoch()


def _train(parts: Parts, plan: RowPlan, state: RunState, history: History, last_step: int) -> RunState:
    epoch = _open_epoch(parts, plan, state, history)
    if epoch.generation is not None:
        state = replace(
            state,
            generation=epoch.generation.folder.name,
            generation_fingerprint=epoch.generation.fingerprint,
        )
    config, ranks = parts.config, parts.ranks

    def save(now: RunState) -> None:
        read = history.after(plan, now.cursor).finished
        keep = now.step in (parts.schedule.branch_step, parts.schedule.num_steps)
        with ranks.pulse.phase("a checkpoint"):
            parts.checkpoints.save(parts.engine, now, history, read, keep=keep)

    def stopping() -> bool:
        _tell_saved(parts)
        return ranks.any(parts.stop.requested)

    def validate(now: RunState) -> dict[str, Any]:
        started = time.perf_counter()
        setting = Setting(label=parts.name, reader=epoch.reader, batch_rows=config.micro_rows, ranks=ranks)
        losses = validation_losses(parts.engine, parts.validation, epoch.readings, setting)
        attention = memory_attention(parts.engine, parts.validation, epoch.readings, setting)
        return {
            **{f"validation_{arm.name}": loss for arm, loss in losses.items()},
            "memory_attention": sum(attention) / len(attention) if attention else None,
            "memory_attention_layers": attention,
            "validation_tokens": parts.validation.tokens_MT1[:, 1:].numel(),
            "query": None if config.memory is None else config.memory.query.name,
            "pattern": None if config.memory is None else "training",
            "overlap_limit": None if config.memory is None else parts.overlap_limit,
            "generation_age": None if epoch.generation is None else now.step - now.epoch_step,
            "seconds_validation": time.perf_counter() - started,
        }

    batches = Loader(
        parts.shards,
        plan,
        rows_per_step=config.rows_per_step,
        micro_rows=config.micro_rows,
        rank=ranks.rank,
        world_size=ranks.world_size,
        cursor=state.cursor,
    )
    accumulate = config.rows_per_step // (config.micro_rows * ranks.world_size)
    ahead = InputsAhead(epoch.stage, batches, accumulate=accumulate, cache=epoch.cache, device=ranks.device)
    with ExitStack() as opened:
        opened.enter_context(parts.stop.deferred())
        opened.enter_context(ranks.pulse.batches(f"an update of the {parts.name} stage"))
        opened.enter_context(collector_at_rest())
        opened.enter_context(batches)
        inputs: Iterator[StepInputs] = opened.enter_context(ahead)
        if parts.tracing is not None:
            inputs = opened.enter_context(closing(parts.tracing.around(inputs)))
        state = train_epoch(
            parts.engine,
            epoch.stage,
            inputs,
            parts.schedule,
            state,
            last_step=last_step,
            metrics=parts.metrics,
            validate=validate,
            save=save,
            divergence=parts.divergence,
            peak=parts.peak,
            stopping=stopping,
        )
        _finish_saving(parts)
        if state.step < last_step:
            raise StoppedError(f"stopped after {state.step} steps of the {parts.name} stage")
    return state


def _tell_saved(parts: Parts) -> None:
    published = parts.checkpoints.saved()
    if published and parts.epochs is not None:
        parts.epochs.sweep()
    for saved in published:
        parts.metrics.log(
            stage=saved.state.stage,
            step=saved.state.step,
            checkpoint=saved.folder.name,
            seconds_checkpoint=saved.seconds_stalled,
            seconds_published=saved.seconds,
        )


def _finish_saving(parts: Parts) -> None:
    with parts.ranks.pulse.phase("a checkpoint"):
        parts.checkpoints.finish()
    _tell_saved(parts)


def _go_back(parts: Parts, problem: DivergedError) -> tuple[RunState, History]:
    """Load the newest checkpoint before the bad updates, and publish it with what will be passed over; a collective.

    Later ones are deleted first: a kill in between resumes before the bad updates, and meets them once more.
    """
    config, name = parts.divergence, parts.name
    remedy = f"lower {name}.peak_lr (now {parts.schedule.peak_lr:g}), or look into the rows of these updates"
    _finish_saving(parts)
    first, last = problem.window(config)
    if problem.health.rollbacks >= config.max_rollbacks:
        raise HopelessError(
            f"{name} stage: {problem}, after {problem.health.rollbacks} rollbacks "
            f"(divergence.max_rollbacks={config.max_rollbacks}); {remedy}"
        )
    checkpoint = parts.checkpoints.before(name, first)
    if checkpoint is None:
        raise HopelessError(
            f"{name} stage: {problem}, and there is no {name} checkpoint before update {first + 1} to go back to; "
            f"{remedy}, or lower saving.every_steps"
        )
    parts.engine.load(checkpoint.folder)
    health = problem.health.back_at(checkpoint.state.health, (first, last), config)
    state = replace(checkpoint.state, health=health)
    log.warning(
        "%s: going back to %s, and passing over the rows of updates %d to %d; learning rate x %g (rollback %d of %d)",
        problem, checkpoint.folder.name, first + 1, last, health.lr_factor, health.rollbacks, config.max_rollbacks,
    )  # fmt: skip
    parts.checkpoints.withdraw_after(state)
    parts.metrics.rewind(state.stage, state.step)
    parts.metrics.log(
        stage=state.stage,
        step=state.step,
        event="rollback",
        checkpoint=checkpoint.folder.name,
        reason=problem.reason,
        rollback=health.rollbacks,
        diverged_at=problem.step,
        steps_undone=problem.step - state.step,
        passed_over_first=first + 1,
        passed_over_last=last,
        rows_passed_over=(min(last, parts.schedule.num_steps) - first) * parts.config.rows_per_step,
        lr_factor=health.lr_factor,
    )
    parts.checkpoints.save(parts.engine, state, checkpoint.history, checkpoint.read, keep=checkpoint.keep)
    _finish_saving(parts)
    return state, checkpoint.history


@dataclass(frozen=True, slots=True)
class _Epoch:
    """An opened epoch: what its rows and its validation read; steps alone read through the cache."""

    stage: Stage
    reader: Reader
    readings: list[Reading]
    generation: Generation | None
    cache: CachedRecords | None = None


def _open_epoch(parts: Parts, plan: RowPlan, state: RunState, history: History) -> _Epoch:
    """Grow, search and compile; without memory there is nothing to open."""
    online = OnlineReader(parts.references)
    memory = parts.config.memory
    if memory is None or parts.epochs is None:
        return _Epoch(PlainStage(), online, [Reading(Arm.none)], None)
    started = time.perf_counter()
    neighbours = parts.epochs.neighbours(
        epoch_search(
            parts.references,
            parts.name,
            state.epoch,
            history,
            plan,
            validation_rows=len(parts.validation.tokens_MT1),
        )
    )
    searched = time.perf_counter()
    ids = neighbours.read_ids(memory.source)
    if not len(ids):
        log.warning(
            "bank epoch %d reads no memory: of %d references none was found by its rows; a longer warmup finishes "
            "more documents, whose references may then be read",
            state.epoch,
            neighbours.report["references"],
        )
        return _Epoch(PlainStage(), online, [Reading(Arm.none)], None)
    if state.generation is not None and state.generation_fingerprint is not None:
        generation = parts.epochs.reopen(state.generation, state.generation_fingerprint)
    else:
        generation = parts.epochs.compile(
            parts.engine,
            ids,
            history,
            name=f"generation-{state.stage}-{state.epoch:04d}",
            step=state.epoch_step,
        )
        # At the first step that reads it: a resumed run that compiles it anew has cut this line off.
        parts.metrics.log(
            stage=state.stage,
            step=state.step + 1,
            epoch=state.epoch,
            **{f"bank_{key}": value for key, value in neighbours.report.items()},
            bank_compiled=len(ids),
            bank_seconds_search=searched - started,
            bank_seconds_compile=time.perf_counter() - searched,
        )
    log.info(
        "bank epoch %d: %s references may be read, %s of %s chunks found one; the generation of step %d holds %s",
        state.epoch,
        f"{neighbours.report['references']:,}",
        f"{neighbours.report['chunks'] - neighbours.report['empty']:,}",
        f"{neighbours.report['chunks']:,}",
        generation.settings.step,
        f"{len(generation):,}",
    )
    cache = CachedRecords(generation, max_bytes=parts.cache_bytes) if reads_bank(memory.source) else None
    stage = MemoryStage(
        neighbours.training_MC,
        neighbours.scores_MC,
        query=memory.query,
        window=parts.window,
        bank=None if cache is None else parts.epochs.reader(generation, cache),
        online=online if encodes_online(memory.source) else None,
        online_share=memory.online_share,
        rows_per_step=parts.config.rows_per_step,
        seed=parts.seed * 1_000_003 + state.epoch,  # other steps of every epoch
        device=parts.ranks.device,
    )
    readings = text_readings(
        neighbours.validation_MC[:, :, None],
        parts.validation.row_documents,
        Bank(ids, parts.references.document_of),
        seed=0,
        window=parts.window,
        queries=[memory.query],
        patterns=[Pattern.training],
    )
    return _Epoch(stage, parts.epochs.reader(generation), readings, generation, cache)
