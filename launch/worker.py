"""One rank of a run: reads the frozen configuration of a run folder, trains both stages, or goes on where it stopped.

Started by `launch.agent`: `python -m launch.worker RUN_FOLDER`.
Not here: composing the configuration (`launch.compose`), what a stage does (`train.run`).
"""

import logging
import os
import sys
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from launch import build
from launch.compose import load_config
from launch.config import RunConfig
from launch.lock import one_of_ranks
from train import distributed
from train.checkpoint import Checkpoint
from train.metrics import JsonLines, Metrics, Mirror, Sink, TensorBoard, Wandb
from train.run import run_stage
from train.state import History, RunState
from train.terminal import LiveView, PlainLines

log = logging.getLogger(__name__)

_GRACE_SECONDS = 3
"""A rank that failed because it lost its peers is ended within this time, and only the first cause is shown."""


def main(run: Path) -> int:
    """Train what the run folder's configuration asks for.

    Returns:
        0, or 2 after a mistake of the user, which `launch.agent` says once for all ranks.
    """
    try:
        with one_of_ranks(run):
            _run(run)
    except ValueError as problem:
        get_error_handler().record_exception(problem)
        return 2
    except Exception as problem:
        time.sleep(_GRACE_SECONDS)
        get_error_handler().record_exception(problem)
        raise
    return 0


def _run(run: Path) -> None:
    config = load_config(run / "config.yaml")
    ranks = distributed.start(threads=config.engine.threads_per_rank)
    logging.basicConfig(level=logging.INFO if ranks.is_first else logging.ERROR, format="%(message)s")
    try:
        build.quiet_third_parties()
        _train(run, config, ranks)
        ranks.barrier()  # nobody leaves while a peer still speaks to it
    finally:
        distributed.stop()


def _train(run: Path, config: RunConfig, ranks: distributed.Ranks) -> None:
    context = build.context(config)
    checkpoints = context.checkpoints(run, ranks=ranks)
    newest = checkpoints.newest()
    if newest is None:
        log.info("no checkpoint in %s: starting from the beginning", run)
    elif _is_finished(config, newest.state):
        log.info(
            "%s is finished, its last checkpoint is %s: nothing is left to train", run, newest.folder.name
        )
        return
    else:
        log.info("resuming from %s", newest.folder)
    position = _start(config, newest)
    with _metrics(run, config, newest, ranks) as metrics:
        for name in ("warmup", "continual"):
            stage = getattr(config, name)
            if stage is None or _is_behind(position, name):
                continue
            resumed = newest if newest is not None and newest.state.stage == name else None
            source = None
            if resumed is None and name == "continual":
                source = context.branch_point(run, config)
                if ranks.is_first:
                    log.info("continual stage branches from %s", source.folder)
            parts = context.parts(
                name, stage, run, ranks=ranks, checkpoints=checkpoints, metrics=metrics, weights=source
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
        sinks.append(LiveView() if sys.stdout.isatty() else PlainLines(chosen.line_every))
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
            steps_repeated=lines.steps_cut,
        )
    return metrics


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and closed by now. An ordinary exit also destroys the libraries' globals, and gloo's threads
    # have been seen to abort a finished rank there ("terminate called without an active exception").
    os._exit(code)
