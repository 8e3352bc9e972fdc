"""From a checked configuration to the objects of a run: build lines only, each a constructor call.

Not here: anything worth a test of its own.
"""

import difflib
import logging
import os
import subprocess
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from data.documents import Split
from data.prepare import Prepared, open_prepared
from data.references import ReferenceSource
from launch.compose import load_config
from launch.config import RunConfig
from launch.devices import DEVICES, device_here
from memorybank import embedder as embedders
from memorybank.embedder import Embedder, VectorCache
from memorybank.search import RowSearch
from memorybank.vectors import Vectors, compile_vectors
from model.flops import text_token_flops
from model.transformer import Memory3LM
from train.checkpoint import Checkpoint, Checkpoints, Retention
from train.config import Precision, StageConfig
from train.continual import BankEpochs
from train.distributed import Ranks
from train.engine import DeepSpeedEngine, InferenceEngine
from train.evaluate import TextSet
from train.loop import PeakSpeed
from train.metrics import Metrics
from train.probes import search_probes
from train.products import products_rate
from train.run import Parts
from train.schedule import schedule_of
from train.stopping import Stop
from train.texts import held_out_rows
from train.tracing import Tracing


@dataclass(slots=True)
class Context:
    """What all commands on one configuration share."""

    config: RunConfig
    prepared: Prepared

    def checkpoints(
        self, run: Path, *, ranks: Ranks | None = None, aside: Ranks | None = None
    ) -> Checkpoints:
        saving = self.config.saving
        return Checkpoints(
            run,
            inputs=self.prepared.inputs,
            retention=Retention(last=saving.keep_last, every=saving.keep_every, best=saving.keep_best),
            ranks=ranks,
            aside=aside,
            origin=None if ranks is None or not ranks.is_first else code(),
        )

    def embedder(self) -> Embedder:
        return embedders.build(self.config.retrieval.embedder, device=_device())

    def vectors(self, embedder: Embedder) -> VectorCache:
        return VectorCache(prepared_folder(self.config) / "vectors", embedder)

    def reference_vectors(
        self, embedder: Embedder, *, progress: Callable[[int], None] = lambda _: None
    ) -> Vectors:
        """The search vectors of all prepared references; those that are not there yet are made."""
        references = self.prepared.references
        folder = prepared_folder(self.config) / "vectors" / f"references-{embedder.name}"
        compile_vectors(self.vectors(embedder), references, folder, progress=progress)
        return Vectors.open(folder)

    def search(self, embedder: Embedder, references: ReferenceSource | None = None) -> RowSearch:
        return RowSearch(
            self.prepared.tokenizer,
            references or self.prepared.references,
            self.vectors(embedder).vectors,
            lambda: self.reference_vectors(embedder),
            self.config.retrieval,
            chunk_tokens=self.config.model.chunk_tokens,
            folder=prepared_folder(self.config) / "indexes",
        )

    def hit_shares(self) -> dict[str, tuple[int, float, float]]:
        """By relation: validation probes, and the shares whose first, or one of whose first few, references hold
        the answer, when all references may be read.
        """
        prepared = self.prepared
        embedder = self.embedder()
        everything = prepared.references.of_documents(prepared.shards.corpus.select(refers=True))
        probes = [probe for probe in prepared.probes if probe.split is Split.validation]
        if not probes:
            return {}
        found = search_probes(
            probes,
            prepared.tokenizer,
            prepared.shards.corpus,
            prepared.references,
            self.vectors(embedder).vectors,
            self.search(embedder).index(everything),
            self.config.retrieval,
        )
        return found.hit_shares()

    @property
    def dtype(self) -> torch.dtype:
        """The type the model computes in."""
        return training_dtype(self.config)

    def model(self) -> Memory3LM:
        """A model with fresh weights, the same for the same seed."""
        torch.manual_seed(self.config.seed)
        return Memory3LM(self.config.model)

    def held_out(self, split: Split, num_rows: int) -> TextSet:
        return held_out_rows(
            self.prepared.shards, split, num_rows=num_rows, row_tokens=self.config.model.row_tokens
        )

    def inference_engine(self, checkpoint: Checkpoint) -> InferenceEngine:
        # Prompts and probes have lengths of their own, each of which would be compiled anew.
        model = Memory3LM(replace(self.config.model, compile=False)).to(self.dtype)
        model.load_state_dict(checkpoint.weights())
        return InferenceEngine(model.to(_device()))

    def branch_point(self, run: Path, config: RunConfig, ranks: Ranks) -> Checkpoint:
        """The warmup checkpoint that the continual stage starts from: the last one before the decay."""
        source, warmup = branch_source(run, config)
        return self.checkpoints(source, ranks=ranks).of("warmup", warmup.steps - warmup.decay_steps)

    def parts(
        self,
        name: str,
        stage: StageConfig,
        run: Path,
        *,
        ranks: Ranks,
        checkpoints: Checkpoints,
        metrics: Metrics,
        weights: Checkpoint | None,
        stop: Stop | None = None,
    ) -> Parts:
        """Everything a stage needs."""
        config = self.config
        model = self.model()
        if weights is not None:
            model.load_state_dict(weights.weights())
        engine = DeepSpeedEngine(
            model,
            optim=config.optim,
            engine=config.engine,
            rows_per_step=stage.rows_per_step,
            micro_rows=stage.micro_rows,
            ranks=ranks,
        )
        epochs = None
        if stage.memory is not None:
            epochs = BankEpochs(
                run,
                references=self.prepared.references,
                search=self.search(self.embedder()) if ranks.is_first else None,
                retrieval=config.retrieval,
                inputs=self.prepared.inputs,
                model=config.model,
                codec=config.codec,
                dtype=self.dtype,
                bank=config.bank,
                keep_generations=config.saving.keep_generations,
                ranks=ranks,
            )
        return Parts(
            name=name,
            config=stage,
            schedule=schedule_of(
                stage, save_every=config.saving.every_steps, validate_every=config.logging.validate_every
            ),
            engine=engine,
            shards=self.prepared.shards,
            source_weights={label: source.weight for label, source in config.data.sources.items()},
            references=self.prepared.references,
            epochs=epochs,
            window=config.retrieval.window,
            overlap_limit=config.retrieval.overlap_evaluation,
            validation=self.held_out(Split.validation, config.logging.validation_rows),
            checkpoints=checkpoints,
            metrics=metrics,
            ranks=ranks,
            row_tokens=config.model.row_tokens,
            peak=self._peak(stage, ranks),
            cache_bytes=config.bank.cache_mib << 20,
            seed=config.seed,
            divergence=config.divergence,
            tracing=Tracing(
                run / "profile",
                name,
                steps=config.logging.profile_steps,
                snapshot=config.logging.memory_snapshot,
            )
            if config.logging.profile_steps and ranks.is_first
            else None,
            stop=stop or Stop(),
        )

    def _peak(self, stage: StageConfig, ranks: Ranks) -> PeakSpeed:
        """What all devices would train on at their nominal peak, where one is known, and at that of the products."""
        model, flops = self.config.model, text_token_flops(self.config.model)
        tokens, dtype = stage.micro_rows * model.row_tokens, training_dtype(self.config)
        measured = products_rate(model, tokens=tokens, dtype=dtype, device=ranks.device)
        products = ranks.world_size * measured / flops.causal
        nominal = nominal_tflops(self.config, has_gpu=ranks.device.type == "cuda")
        if nominal is None:
            return PeakSpeed(products)
        tflops = ranks.world_size * nominal
        peak = tflops * 1e12
        return PeakSpeed(products, palm=peak / flops.palm, causal=peak / flops.causal, tflops=tflops)


def nominal_tflops(config: RunConfig, *, has_gpu: bool) -> float | None:
    """The peak of one rank's device in TFLOP/s: as stated, its maker's, or, of a CPU, that of the rank's threads.

    None: a GPU that `DEVICES` does not know.
    """
    stated, precision = config.logging.peak_tflops, config.engine.precision
    if stated is not None:
        return stated
    if not has_gpu:
        return DEVICES["cpu"].peak(precision) * config.engine.threads_per_rank
    name, _ = device_here()
    return DEVICES[name].peak(precision) if name in DEVICES and name != "cpu" else None


def branch_source(run: Path, config: RunConfig) -> tuple[Path, StageConfig]:
    """The folder of the run whose warmup the continual stage starts from, and that warmup.

    Raises:
        ValueError: There is no such run, or it had no warmup.
    """
    stage = config.continual
    assert stage is not None
    if stage.branch_from is None:
        source = run
    else:
        source = run_folder(stage.branch_from, config.paths.root)
        if not (source / "config.yaml").exists():
            near = nearest_run(stage.branch_from, config.paths.root)
            raise ValueError(
                f"continual.branch_from={stage.branch_from}: {source} is not a run folder; "
                + (f"did you mean continual.branch_from={near}?" if near else "name a run that was warmed up")
            )
    warmup = load_config(source / "config.yaml").warmup
    if warmup is None:
        raise ValueError(
            f"continual.branch_from={stage.branch_from}: {source} has no warmup stage; name the run that has"
        )
    return source, warmup


def training_dtype(config: RunConfig) -> torch.dtype:
    """The type that a run with this configuration computes in."""
    return torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32


def context(config: RunConfig) -> Context:
    """Open the prepared corpus of a configuration."""
    return Context(config, open_prepared(config.data, prepared_root(config)))


def prepared_root(config: RunConfig) -> Path:
    """Folder of all prepared corpora."""
    return Path(config.paths.root) / "prepared"


def prepared_folder(config: RunConfig) -> Path:
    """Folder of this configuration's prepared corpus."""
    return prepared_root(config) / config.data.name


def run_folder(run: str, root: str) -> Path:
    """A run given as a folder, or as its name below the root; it may not be there."""
    path = Path(run)
    return path if (path / "config.yaml").exists() else Path(root) / run


def existing_run(run: str, root: str) -> Path:
    """The folder of a run that was begun, by folder or name.

    Raises:
        ValueError: There is no such run; the message names the nearest.
    """
    folder = run_folder(run, root)
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        near = nearest_run(run, root)
        advice = f"did you mean {near}?" if near else f"list runs with `ls {folder.parent}`"
        raise ValueError(f"{folder} is not a run folder; {advice}")
    return folder


def frozen_config(run: str, root: str) -> RunConfig:
    """The configuration of a run, by folder or name.

    Raises:
        ValueError: There is no such run; the message names the nearest.
    """
    return load_config(existing_run(run, root) / "config.yaml")


def nearest_run(run: str, root: str) -> str | None:
    """The name of the run below the root that is spelt nearly so."""
    runs = [path.parent.name for path in Path(root).glob("*/config.yaml")]
    return next(iter(difflib.get_close_matches(run, runs, n=1)), None)


def code() -> dict[str, str]:
    """What computes: versions of this package, of what it stands on, and the commit where there is one."""
    versions = {}
    for name in ("memory3-pretrain", "torch", "deepspeed"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    here = Path(__file__).resolve().parent.parent
    if (here / ".git").exists():
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here, capture_output=True, text=True, check=False,
        )  # fmt: skip
        versions["commit"] = described.stdout.strip()
    return versions


def quiet_third_parties() -> None:
    """Keep the terminal for what this project says."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    for name in ("DeepSpeed", "transformers", "torch", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
