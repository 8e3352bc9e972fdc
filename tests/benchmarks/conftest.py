"""A run of seconds with memory, and facts of seven held-out territories: what the benchmarks read."""

from pathlib import Path

import pytest

from tests.support.spawn import spawn
from tests.support.train import (
    COUNTRIES,
    continual_config,
    model_config,
    prepared,
    prepared_root,
    run_config,
    stage_config,
    train,
    two_ranks,
)
from train.config import EngineConfig, LoggingConfig

HELD_OUT = ("er", "gk", "ls", "mi", "vc", "ws")


@pytest.fixture(scope="session")
def run() -> Path:
    """The folder of a trained run."""
    root = prepared_root((*COUNTRIES, *HELD_OUT))
    spawn(_trained, root, world_size=1)
    return root / "m"


def _trained(root: Path) -> None:
    prefixes = prepared(root).tokenizer.prefix_ids
    with two_ranks() as ranks:
        train(
            run_config(
                root,
                "m",
                model=model_config(num_layers=3, num_memory_layers=2, row_tokens=256, prefix_ids=prefixes),
                engine=EngineConfig(num_ranks=1),
                warmup=stage_config(steps=4, rows_per_step=4),
                continual=continual_config(steps=4, epoch_steps="2"),
                logging=LoggingConfig(progress=False, validate_every=4, validation_rows=4),
            ),
            ranks,
        )
