"""`memory3 pretrain`: compose, check, freeze into the run folder, start the ranks.

Not here: what a rank does (`launch.worker`).
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from launch.compose import compose_config, differences, load_config, save_config, to_yaml
from launch.config import Resume, RunConfig
from launch.lock import only_user

log = logging.getLogger(__name__)

_MAY_CHANGE = (
    "experiment",
    "resume",
    "paths.",
    "logging.",
    "saving.",
    "evaluation.",
    "engine.threads_per_rank",
    "bank.cache_mib",
    "bank.cold_gib",
    "data.num_workers",
)
"""Keys that a resumed run may change: they decide nothing about what is trained."""


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
    folder.mkdir(parents=True, exist_ok=True)
    with only_user(folder):
        freeze(config, folder)
        return _start_ranks(config, folder)


def freeze(config: RunConfig, folder: Path) -> None:
    """Write config.yaml into the run folder, filled in with what the tokenizer decides.

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


def _start_ranks(config: RunConfig, folder: Path) -> int:
    command = [sys.executable, "-m", "launch.agent", str(folder), str(config.engine.num_ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.engine.threads_per_rank)}
    package_root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    ranks = subprocess.Popen(command, env=environment, close_fds=False)
    previous = signal.signal(signal.SIGTERM, lambda *_: ranks.terminate())
    try:
        code = ranks.wait()
    except KeyboardInterrupt:
        ranks.terminate()
        code = ranks.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code not in (0, _USER_ERROR):
        log.error(
            "the run ended early (exit code %d); the same command goes on at its newest checkpoint", code
        )
    return code
