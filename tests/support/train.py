"""A small corpus of the real factbook, a tiny model, and runs of both stages: what the tests of train/ share."""

import atexit
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from data import factbook, sources
from data.config import DataConfig, SourceConfig, SourceKind
from data.prepare import Prepared, open_prepared, prepare
from launch import worker
from launch.compose import save_config
from launch.config import PathsConfig, RunConfig
from memorybank.config import EmbedderConfig, EmbedderKind, RetrievalConfig
from model.config import ModelConfig
from train import distributed
from train.config import EngineConfig, LoggingConfig, MemoryConfig, SavingConfig, StageConfig
from train.engine import Engine, ModelInput, Snapshot, StepResult
from train.schedule import epoch_begins
from train.state import RunState

COUNTRIES = ("at", "ax", "ay", "bq", "bv", "ck", "cr", "dx", "hm", "ip", "kq", "mq", "pf", "pg", "tl", "wq")
VOCABULARY = 600


def data_config() -> DataConfig:
    """The factbook's settings, for a small vocabulary."""
    return DataConfig(
        name="factbook",
        sources={"factbook": SourceConfig(kind=SourceKind.factbook)},
        vocab_size=VOCABULARY,
        documents_per_shard=40,
        num_workers=1,
    )


@cache
def prepared_root(codes: Collection[str] = COUNTRIES) -> Path:
    """A folder with some small territories of the factbook, prepared: sections, facts, and those that are held out."""
    folder = TemporaryDirectory(prefix="memory3-train-")
    atexit.register(folder.cleanup)
    root = Path(folder.name)
    countries = [country for country in factbook._read_countries() if country.code in codes]
    sources._load_factbook.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factbook, "_read_countries", lambda: countries)
        prepare(data_config(), root / "prepared")
    sources._load_factbook.cache_clear()
    return root


def prepared(root: Path | None = None) -> Prepared:
    """The prepared corpus, opened."""
    return open_prepared(data_config(), (root or prepared_root()) / "prepared")


def model_config(**changes: Any) -> ModelConfig:
    """Two layers, one of them a memory layer; two chunks a row."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_layers": 2,
        "width": 64,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_size": 32,
        "ffn_width": 64,
        "num_memory_layers": 1,
        "row_tokens": 128,
        "chunk_tokens": 32,
        "prefix_ids": [1, 7, 9],
    }
    return ModelConfig(**(settings | changes))


def stage_config(**changes: Any) -> StageConfig:
    """Twenty steps of two micro-batches on each of two ranks."""
    settings: dict[str, Any] = {
        "steps": 20,
        "rows_per_step": 8,
        "micro_rows": 2,
        "peak_lr": 3e-3,
        "ramp_steps": 2,
    }
    return StageConfig(**(settings | changes))


def run_config(root: Path, run: str, **changes: Any) -> RunConfig:
    """A run on the small corpus; every checkpoint is kept."""
    settings: dict[str, Any] = {
        "run": run,
        "paths": PathsConfig(root=str(root)),
        "model": model_config(prefix_ids=prepared(root).tokenizer.prefix_ids),
        "data": data_config(),
        "retrieval": RetrievalConfig(embedder=EmbedderConfig(kind=EmbedderKind.static), candidates=8),
        "engine": EngineConfig(num_ranks=2),
        "warmup": stage_config(),
        "saving": SavingConfig(every_steps=10, keep_last=100),
        "logging": LoggingConfig(progress=False, validate_every=10, validation_rows=4),
    }
    return RunConfig(**(settings | changes))


def continual_config(**changes: Any) -> StageConfig:
    """Twenty steps with memory, in bank epochs of eight."""
    return stage_config(**({"epoch_steps": "8", "rows_per_step": 4, "memory": MemoryConfig()} | changes))


def train(config: RunConfig, ranks: distributed.Ranks) -> Path:
    """Train, or resume, a run in this process; the folder."""
    folder = Path(config.paths.root) / config.run
    if ranks.is_first:
        folder.mkdir(exist_ok=True)
        save_config(config, folder / "config.yaml")
    ranks.barrier()
    worker._train(folder, config, ranks)
    return folder


def resume(config: RunConfig, checkpoint: str, ranks: distributed.Ranks) -> Path:
    """Copy a finished run without what came after a checkpoint, and go on from there; the copy's folder.

    Only the metrics stay whole, as a killed run might have written some more of them. Neighbours and generations of
    later epochs are taken away. The copy has the run's name, below a root of its own.
    """
    root = Path(config.paths.root)
    other = resumed_root(root, config.run, checkpoint)
    if ranks.is_first:
        shutil.copytree(root / config.run, other / config.run)
        (other / "prepared").symlink_to(root / "prepared")
        stage, step = checkpoint.rsplit("-", 1)
        for later in (other / config.run / "checkpoints").iterdir():
            if later.name > f"{stage}-{int(step):08d}":
                shutil.rmtree(later)
        begins = [0] if config.continual is None else epoch_begins(config.continual)
        for artefact in [*(other / config.run).glob("bank/*"), *(other / config.run).glob("neighbours/*")]:
            if begins[int(artefact.name[-4:])] >= int(step):
                shutil.rmtree(artefact)
    ranks.barrier()
    return train(replace(config, paths=PathsConfig(root=str(other))), ranks)


def resumed_root(root: Path, run: str, checkpoint: str) -> Path:
    """Where `resume` puts its copy."""
    return root / f"{run}-from-{checkpoint}"


@contextmanager
def two_ranks() -> Iterator[distributed.Ranks]:
    """Join the group that `spawn` announced; warnings of third parties are theirs."""
    from launch.build import quiet_third_parties

    ranks = distributed.start(threads=1, timeout_seconds=600)
    quiet_third_parties()
    try:
        yield ranks
    finally:
        distributed.stop()


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


class CountingEngine(Engine):
    """An engine without a model: its weights count its updates, and its losses come from a list."""

    runs_ahead = False

    def __init__(self, *, losses: list[float] | None = None, skips: frozenset[int] = frozenset()) -> None:
        self.updates = 0
        self.rates: list[float] = []
        self.inputs: list[list[ModelInput]] = []
        self._losses = losses
        self._skips = skips

    def queue_step(self, inputs: Any, *, lr: float) -> Callable[[], StepResult]:
        self.updates += 1
        self.rates.append(lr)
        self.inputs.append(list(inputs))
        loss = 1.0 if self._losses is None else self._losses[self.updates - 1]
        tokens = sum(micro.targets_BT.numel() for micro in self.inputs[-1])
        result = StepResult(loss, tokens, 0.5, self.updates in self._skips)
        return lambda: result

    def weights(self) -> dict[str, Tensor]:
        return {"updates": torch.tensor([self.updates])}

    def snapshot(self, *, copy: bool) -> Snapshot:
        updates = torch.tensor([self.updates])

        def write(folder: Path) -> None:
            (folder / "engine").mkdir(exist_ok=True)
            torch.save({"updates": updates}, folder / "engine" / "state.pt")

        return Snapshot({"updates": updates}, write)

    def load(self, folder: Path) -> None:
        self.updates = int(torch.load(folder / "engine" / "state.pt", weights_only=True)["updates"])

    def token_losses(self, inputs: ModelInput) -> Tensor:
        return torch.ones(inputs.targets_BT.shape)

    def attention_shares(self, inputs: ModelInput) -> Any:
        raise NotImplementedError

    def encode(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def weights_hash(self) -> str:
        return f"weights {self.updates}"


def state(step: int, *, stage: str = "warmup", **changes: Any) -> RunState:
    """A position."""
    return RunState(stage=stage, step=step, cursor=step, **changes)
