"""`memory3 pretrain`: compose, check, freeze into the run folder, start the ranks.

Not here: who starts them (`launch.launchers`), ranks that are there already (`launch.joined`), what a rank does
(`launch.worker`).
"""

import argparse
import logging
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launch import launchers, preflight, rank_memory, slurm, supervise
from launch.compose import compose_config, differences, load_config, save_config, to_yaml
from launch.config import LauncherKind, Resume, RunConfig
from launch.lock import is_in_use, only_user, wait_for_ranks
from train.announced import announced
from train.stopping import STOPPED

log = logging.getLogger(__name__)

_MAY_CHANGE = (
    "experiment",
    "resume",
    "paths.",
    "launcher.",
    "logging.",
    "saving.",
    "divergence.",
    "watchdog.",
    "supervise",
    "supervision.",
    "evaluation.",
    "engine.threads_per_rank",
    "engine.num_ranks",
    "warmup.micro_rows",
    "continual.micro_rows",
    "bank.cache_mib",
    "bank.cold_gib",
    "data.num_workers",
)
"""Keys that a resumed run may change: they decide nothing about what is trained on, nor in which order."""

_SIZES = ("num_layers", "width", "num_heads", "num_kv_heads", "head_size", "ffn_width")
"""Keys of the model that give weights their shapes; the vocabulary is the corpus's, which checkpoints are bound to."""

_USER_ERROR = 2


def run(arguments: argparse.Namespace) -> int:
    """Compose, and print or train."""
    rank = announced()
    if arguments.multirun:
        from launch import grid

        if rank is not None:
            raise ValueError("-m starts runs of its own; give the command without torchrun or deepspeed")
        return grid.run(arguments)
    if rank is not None and not arguments.cfg:
        from launch import joined

        return joined.run(arguments, rank)
    config = compose_config(arguments.overrides)
    if arguments.cfg:
        print(to_yaml(config), end="")
        return 0
    if config.launcher.kind is not LauncherKind.slurm:
        return _prepare_and_train(arguments, config)
    if config.launcher.slurm.submit:
        return submit(config, arguments)
    try:
        signal.signal(signal.SIGUSR1, _end_of_time)
        code = _prepare_and_train(arguments, config)
    except _EndOfTime:
        code = 128 + signal.SIGUSR1
    if slurm.asks_for_requeue(code, config):
        slurm.requeue()
    return code


def _prepare_and_train(arguments: argparse.Namespace, config: RunConfig) -> int:
    if not arguments.no_prepare:
        from launch import prepare

        prepare.ensure(config)
        # Before there is a run folder, which would hold these settings.
        prepare.refuse_without_validation(config)
    return pretrain(config)


class _EndOfTime(BaseException):  # nothing on the way may catch it
    """SIGUSR1 came before there were ranks to hand it to."""


def _end_of_time(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise _EndOfTime


def submit(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Hand the same command to SLURM.

    Raises:
        ValueError: The run trains, or waits in the queue, already.
    """
    folder = folder_of(config)
    name = slurm.job_name(folder)
    queued = slurm.Queue(name).jobs()
    if queued:
        raise ValueError(
            f"{folder} has job {queued[None]} already; wait for it, or end it: scancel --name={name}"
        )
    if is_in_use(folder):
        raise ValueError(f"{folder} is in use by a run; wait for it, or set run=NAME")
    command = [sys.executable, "-m", "launch.cli", "pretrain"]
    command += ["--no-prepare"] if arguments.no_prepare else []
    command += [*arguments.overrides, "launcher.slurm.submit=false"]
    job = slurm.submit(folder, slurm.script(config, folder, shlex.join(command)))
    print(f"job {job} trains {folder}; it says how it goes in {folder}/slurm-{job}.out")
    return 0


def pretrain(config: RunConfig) -> int:
    """Train in the run folder that the configuration names, and return the ranks' exit code.

    Raises:
        ValueError: The folder is in use by another process, or holds a run of another configuration.
    """
    folder = folder_of(config)
    with only_user(folder):
        make_ready(config, folder)
        code = supervise.run(lambda: _train(config, folder), folder, config)
    if code in STOPPED:
        log.info("the run was stopped (exit code %d); the same command goes on where it was", code)
    elif code not in (0, _USER_ERROR) and not config.supervise:
        log.error(
            "the run ended early (exit code %d); the same command goes on at its newest checkpoint, and "
            "supervise=true does so by itself",
            code,
        )
    return code


def _train(config: RunConfig, folder: Path) -> int:
    code = launchers.run_agents(config, folder)
    wait_for_ranks(folder)  # of an agent that was killed: they publish a checkpoint first
    return code


def folder_of(config: RunConfig) -> Path:
    """The run's folder, which can be written.

    Raises:
        ValueError: It cannot.
    """
    folder = Path(config.paths.root) / config.run
    preflight.write_rate(folder)
    return folder


def make_ready(config: RunConfig, folder: Path) -> None:
    """Fill the configuration in, see whether it can be trained, and freeze it into the run folder.

    Raises:
        ValueError: The folder holds a run of another configuration, there is nothing to branch from, too little room,
            or a corpus that training refuses.
    """
    check_branch(config, folder)
    fill_in(config)
    refuse_other_run(config, folder)
    preflight.check(config, folder)
    rank_memory.check(config)
    save_config(config, folder / "config.yaml")


def check_branch(config: RunConfig, folder: Path) -> None:
    """Look for what the continual stage branches from, unless it has branched already.

    Raises:
        ValueError: There is no such run, it has no checkpoint to branch from, or its network has another size.
    """
    if config.continual is None or config.continual.branch_from is None:
        return
    from launch.build import branch_source
    from train.checkpoint import folder_of as checkpoint_of
    from train.checkpoint import newest_of

    if newest_of(folder, "continual") is not None:
        return
    source, warmup = branch_source(folder, config)
    named = f"continual.branch_from={config.continual.branch_from}"
    constant = warmup.steps - warmup.decay_steps
    if not checkpoint_of(source, "warmup", constant).is_dir():
        newest = newest_of(source, "warmup")
        raise ValueError(
            f"{named}: {source} has no warmup checkpoint of step {constant}, "
            + ("where its decay begins" if warmup.decay_steps else "its last one")
            + (f" (its newest is {newest.name})" if newest is not None else "")
            + "; finish that warmup, or name a run that has one"
        )
    network = load_config(source / "config.yaml").model
    for key in _SIZES:
        theirs, ours = getattr(network, key), getattr(config.model, key)
        if theirs != ours:
            raise ValueError(
                f"model.{key}={ours}, but {named}, and {source} was trained with {theirs}; set model.{key}={theirs}, "
                "or name a run of the same size"
            )


def fill_in(config: RunConfig) -> None:
    """Fill in what the tokenizer decides."""
    from data.prepare import open_prepared
    from launch.build import prepared_root

    prepared = open_prepared(config.data, prepared_root(config))
    config.model.prefix_ids = list(prepared.tokenizer.prefix_ids)
    config.model.vocab_size = prepared.tokenizer.vocab_size


def refuse_other_run(config: RunConfig, folder: Path) -> None:
    """Refuse a filled-in configuration that cannot go on with what stands in its folder.

    Raises:
        ValueError: The folder holds a run of another configuration, or any run where `resume=never`.
    """
    path = folder / "config.yaml"
    if path.exists():
        if config.resume is Resume.never:
            raise ValueError(
                f"{folder} was used before and resume=never; set run=NAME to a new one, or resume=auto"
            )
        changed = [
            row for row in differences(load_config(path), config) if not row[0].startswith(_MAY_CHANGE)
        ]
        if changed:
            lines = "".join(f"\n  {key}: {old!r} -> {new!r}" for key, old, new in changed)
            raise ValueError(
                f"{folder} holds a run of another configuration:{lines}\nset run=NAME to a new folder, or give these "
                "keys their old values to resume"
            )
