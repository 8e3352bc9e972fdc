"""`memory3 pretrain`: compose, check, freeze into the run folder, start the ranks.

Not here: what a rank does (`launch.worker`).
"""

import argparse
import logging
from pathlib import Path

from launch import preflight
from launch.compose import compose_config, differences, load_config, save_config, to_yaml
from launch.config import Resume, RunConfig
from launch.lock import only_user
from launch.ranks import run_ranks
from train.stopping import STOPPED

log = logging.getLogger(__name__)

_MAY_CHANGE = (
    "experiment",
    "resume",
    "paths.",
    "logging.",
    "saving.",
    "divergence.",
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


_USER_ERROR = 2


def run(arguments: argparse.Namespace) -> int:
    """Compose, and print or train."""
    config = compose_config(arguments.overrides)
    if arguments.cfg:
        print(to_yaml(config), end="")
        return 0
    if not arguments.no_prepare:
        from launch import prepare

        prepare.ensure(config)
    return pretrain(config)


def pretrain(config: RunConfig) -> int:
    """Train in the run folder that the configuration names, and return the ranks' exit code.

    Raises:
        ValueError: The folder is in use by another process, or holds a run of another configuration.
    """
    folder = Path(config.paths.root) / config.run
    preflight.write_rate(folder)
    with only_user(folder):
        num_references = freeze(config, folder)
        preflight.check(config, folder, num_references=num_references)
        return _start_ranks(config, folder)


def freeze(config: RunConfig, folder: Path) -> int:
    """Write config.yaml into the run folder, filled in with what the tokenizer decides.

    Returns:
        The references of the prepared corpus.

    Raises:
        ValueError: The folder holds a run of another configuration.
    """
    from data.prepare import open_prepared
    from launch.build import prepared_root

    prepared = open_prepared(config.data, prepared_root(config))
    config.model.prefix_ids = list(prepared.tokenizer.prefix_ids)
    config.model.vocab_size = prepared.tokenizer.vocab_size
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
    save_config(config, path)
    return len(prepared.references)


def _start_ranks(config: RunConfig, folder: Path) -> int:
    worker, engine = ["-m", "launch.worker", str(folder)], config.engine
    code = run_ranks("memory3 pretrain", worker, num_ranks=engine.num_ranks, threads=engine.threads_per_rank)
    if code in STOPPED:
        log.info("the run was stopped (exit code %d); the same command goes on where it was", code)
    elif code not in (0, _USER_ERROR):
        log.error(
            "the run ended early (exit code %d); the same command goes on at its newest checkpoint", code
        )
    return code
