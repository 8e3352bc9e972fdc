"""One rank of a run: reads the frozen configuration of a run folder, trains both stages, or goes on where it stopped.

Started by `launch.agent`, as `python -m launch.worker RUN_FOLDER`, or by `launch.joined`. Exit codes: 0 done, 1 a
crash, 2 a mistake of the user (or a full disk), 3 training diverged beyond help, 128 + n stopped by signal n, with
nothing lost.
Not here: composing the configuration (`launch.compose`), what a stage does (`train.run`).
"""

import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from data.files import write_atomic
from launch import build, rank_memory
from launch.compose import load_config
from launch.config import RunConfig
from launch.lock import one_of_ranks
from launch.watchdog import PULSES
from train import distributed
from train.checkpoint import Checkpoint, Checkpoints, cannot_write
from train.divergence import HopelessError
from train.history import History
from train.metrics import JsonLines, Metrics, Mirror, Sink, TensorBoard, Wandb, read_metrics
from train.run import run_stage
from train.state import RunState
from train.stopping import Stop, StoppedError, end_with_parent
from train.terminal import view

log = logging.getLogger(__name__)

_GRACE_SECONDS = 3
"""A rank that failed because it lost its peers is ended within this time, and only the first cause is shown."""


DIVERGED = 3


def main(
    run: Path,
    *,
    say: Callable[[BaseException], None] | None = None,
    meeting: distributed.Meeting | None = None,
) -> int:
    """Train what the run folder's configuration asks for.

    Args:
        run: The run's folder.
        say: Takes what a user has to know of an early end; by default `launch.agent`, which says it once for all
            ranks.
        meeting: Where these ranks met, if another launcher started them.

    Returns:
        The exit code.
    """
    stop = Stop()
    stop.listen(leave)
    if meeting is None:  # another launcher's ranks are its own to end
        end_with_parent()

    def work() -> int:
        try:
            with one_of_ranks(run):
                _run(run, stop, meeting)
        except StoppedError as stopped:
            log.info("%s, and published a checkpoint", stopped)
            return stop.exit_code
        return 0

    return reported(work, say=say, stop=stop)


def reported(
    work: Callable[[], int], *, say: Callable[[BaseException], None] | None = None, stop: Stop | None = None
) -> int:
    """Do a rank's work, and return its exit code; arguments and what is said are those of `main`.

    A rank that lost another has no traceback to show, but a line: the other is why, and this one may be on a machine
    where nothing else is known of it.
    """
    say = say or get_error_handler().record_exception
    try:
        return work()
    except (ValueError, HopelessError) as problem:
        say(problem)
        return DIVERGED if isinstance(problem, HopelessError) else 2
    except Exception as problem:
        if cannot_write(problem):
            said = f"{problem}; what was published is as it was: make room, and the same command goes on"
            say(ValueError(said))
            return 2
        is_lost = distributed.lost_a_peer(problem)
        if not (is_lost and stop is not None and stop.requested):
            time.sleep(_GRACE_SECONDS)
        if is_lost:
            first_words = re.split(r"\. |\n", str(problem))[0]
            say(ValueError(f"lost another rank, whose own launcher says why: {first_words}"))
            return 1
        say(problem)
        raise


def _run(run: Path, stop: Stop, meeting: distributed.Meeting | None) -> None:
    config = load_config(run / "config.yaml")
    watchdog = config.watchdog
    threads, timeout_seconds = config.engine.threads_per_rank, _timeout_seconds(config)
    ranks = distributed.start(threads=threads, timeout_seconds=timeout_seconds, meeting=meeting)
    if (pulses := os.environ.get(PULSES)) is not None:
        ranks.pulse.show(
            Path(pulses),
            run / "stacks" / f"rank-{ranks.rank}.txt",
            rank=ranks.rank,
            batch_seconds=watchdog.batch_seconds,
            phase_seconds=watchdog.phase_seconds,
            has_gpu=ranks.device.type == "cuda",
        )
    logging.basicConfig(format="%(message)s")
    logging.getLogger().setLevel(logging.INFO if ranks.is_first else logging.ERROR)
    try:
        build.quiet_third_parties()
        _train(run, config, ranks, stop)
        ranks.barrier()  # nobody leaves while a peer still speaks to it
    finally:
        distributed.stop()


def _train(run: Path, config: RunConfig, ranks: distributed.Ranks, stop: Stop | None = None) -> None:
    context = build.context(config)
    aside = ranks.aside(timeout_seconds=_timeout_seconds(config)) if config.saving.asynchronous else None
    checkpoints = context.checkpoints(run, ranks=ranks, aside=aside)
    newest = checkpoints.newest()
    if newest is None:
        _refuse_a_new_beginning(run)
        log.info("no checkpoint in %s: starting from the beginning", run)
    elif _is_finished(config, newest.state):
        log.info(
            "%s is finished, its last checkpoint is %s: nothing is left to train", run, newest.folder.name
        )
        return
    else:
        log.info("resuming from %s", newest.folder)
        if ranks.is_first:
            _restore_wandb_id(run, newest)
    position = _start(config, newest)
    with _metrics(run, config, newest, ranks) as metrics:
        for name in config.stages:
            if _is_behind(position, name):
                continue
            with rank_memory.explained(config, name):
                _train_stage(name, run, context, checkpoints, newest, metrics, ranks, stop)


def _train_stage(
    name: str,
    run: Path,
    context: build.Context,
    checkpoints: Checkpoints,
    newest: Checkpoint | None,
    metrics: Metrics,
    ranks: distributed.Ranks,
    stop: Stop | None,
) -> None:
    config = context.config
    resumed = newest if newest is not None and newest.state.stage == name else None
    source = None
    if resumed is None and name == "continual":
        source = context.branch_point(run, config, ranks)
        if ranks.is_first:
            log.info("continual stage branches from %s", source.folder)
    parts = context.parts(
        name,
        getattr(config, name),
        run,
        ranks=ranks,
        checkpoints=checkpoints,
        metrics=metrics,
        weights=source,
        stop=stop,
    )
    if resumed is not None:
        parts.engine.load(resumed.folder)
        state, history = resumed.state, resumed.history
    elif source is not None:
        state = RunState(stage=name, tokens=source.state.tokens)
        history = History.of_read(source.read)
    else:
        state, history = RunState(stage=name), History.empty(context.prepared.shards.num_documents)
    run_stage(parts, state, history)


def _timeout_seconds(config: RunConfig) -> int:
    """How long a collective may wait: for the longest phase of another rank, which a watchdog names before."""
    longest = max(config.watchdog.phase_seconds, config.watchdog.batch_seconds)
    return round(3 * longest if PULSES in os.environ else longest)


def _refuse_a_new_beginning(run: Path) -> None:
    """A run that has published checkpoints and has none now does not begin anew unless it is asked to."""
    path = run / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    published = [line["checkpoint"] for line in lines if "checkpoint" in line and "event" not in line]
    if published:
        raise ValueError(
            f"{run} published {published[-1]}, and {run / 'checkpoints'} holds none now; restore it from a copy, or "
            f"begin anew: set run=NAME to a new folder, or delete {path}"
        )


def _restore_wandb_id(run: Path, newest: Checkpoint) -> None:
    known = newest.origin().get("wandb")
    if known is not None and not (run / "wandb-id").exists():
        write_atomic(run / "wandb-id", known.encode())


def _start(config: RunConfig, newest: Checkpoint | None) -> RunState:
    if newest is not None:
        return newest.state
    return RunState(stage="warmup" if config.warmup is not None else "continual")


def _is_finished(config: RunConfig, position: RunState) -> bool:
    last = "warmup" if config.continual is None else "continual"
    stage = getattr(config, last)
    return position.stage == last and position.step >= stage.steps


def _is_behind(position: RunState, name: str) -> bool:
    return name == "warmup" and position.stage == "continual"


def _metrics(run: Path, config: RunConfig, newest: Checkpoint | None, ranks: distributed.Ranks) -> Metrics:
    """All sinks; a run that was here before says so in its first line."""
    if not ranks.is_first:
        return Metrics([])
    position, path = _start(config, newest), run / "metrics.jsonl"
    goes_on = path.exists()
    lines = JsonLines(path, stage=position.stage, step=position.step)
    sinks: list[Sink] = [lines]
    chosen = config.logging
    if chosen.progress:
        sinks.append(view(chosen.line_every, later_steps=later_steps(config)))
    if chosen.tensorboard:
        sinks.append(
            Mirror("TensorBoard", lambda: TensorBoard(run, stage=position.stage, step=position.step))
        )
    if chosen.wandb:
        about = {"run": config.run, "seed": config.seed}
        sinks.append(Mirror("wandb", lambda: Wandb(run, project=chosen.wandb_project, config=about)))
    metrics = Metrics(sinks)
    if goes_on:
        metrics.log(
            stage=position.stage,
            step=position.step,
            event="restarted" if newest is None else "resumed",
            checkpoint=None if newest is None else newest.folder.name,
            checkpoint_time=None if newest is None else newest.published,
            steps_repeated=lines.steps_cut,
        )
    return metrics


def later_steps(config: RunConfig) -> dict[str, float]:
    """For each stage the rows of the stages after it, in steps of its own."""
    rows = {name: stage.steps * stage.rows_per_step for name, stage in config.stages.items()}
    later = {name: sum(list(rows.values())[place + 1 :]) for place, name in enumerate(rows)}
    return {name: later[name] / stage.rows_per_step for name, stage in config.stages.items()}


def leave(code: int) -> None:
    """End this process.

    Everything that counts is written and closed. An ordinary exit also destroys the libraries' globals, and gloo's
    threads have been seen to abort a finished rank there ("terminate called without an active exception").
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
