"""A trained run, opened for reading: its newest checkpoint, and the bank that may be read with it.

`evaluate`, `generate` and `bank` all begin here.
Not here: what they do with it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from launch import build
from launch.compose import load_config
from launch.config import RunConfig
from memorybank.edits import Compiler
from memorybank.library import Library
from memorybank.segment import DocumentCutter
from memorybank.store import Generation, GenerationSettings
from memorybank.writer import compile_generation
from train.checkpoint import Checkpoint
from train.engine import InferenceEngine
from train.rows import in_bank

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """A run's newest checkpoint, ready to compute.

    Attributes:
        folder: The run folder.
        config: Its frozen configuration.
        context: The prepared corpus and what is built on it.
        checkpoint: The newest verified checkpoint.
        engine: Its weights.
    """

    folder: Path
    config: RunConfig
    context: build.Context
    checkpoint: Checkpoint
    engine: InferenceEngine

    @property
    def bank_ids(self) -> Ids:
        """References that may be read: of all documents finished by the checkpoint, and reference-only ones."""
        references = self.context.prepared.references
        allowed = in_bank(references.shards.corpus, self.checkpoint.read)
        return np.flatnonzero(allowed[references.document_of]).astype(np.int64)

    @property
    def step(self) -> int:
        """Steps of the checkpoint's stage."""
        return self.checkpoint.state.step

    def compile(self, ids: Ids, name: str, *, progress: Callable[[int], None] | None = None) -> Generation:
        """A generation of these weights; one that stands there already is reused."""
        context = self.context
        settings = GenerationSettings(
            layout=self.config.model.layout(),
            weights=self.engine.weights_hash(),
            lineage=self.config.run,
            step=self.step,
            references=context.inputs["references"],
            tokenizer=context.inputs["tokenizer"],
        )
        folder = self.folder / "bank" / name
        compile_generation(
            self.engine.encode,
            context.prepared.references,
            ids,
            context.codec(),
            folder,
            settings=settings,
            progress=progress,
        )
        return Generation.open(folder, expect=asdict(settings))

    def compiler(self) -> Compiler:
        """What compiles a library with these weights."""
        prepared = self.context.prepared
        return Compiler(
            encode=self.engine.encode,
            codec=self.context.codec(),
            embedder=self.context.embedder(),
            cutter=DocumentCutter(prepared.tokenizer, prepared.references.reference_tokens),
            layout=self.config.model.layout(),
            weights=self.engine.weights_hash(),
            lineage=self.config.run,
            step=self.step,
        )

    def library(self, folder: str, *, embedder: str, stale: bool) -> Library:
        """A library to read with these weights.

        Args:
            folder: Where it stands; empty for the run's own.
            embedder: Name of the embedder that searches.
            stale: Whether one of other weights is accepted.

        Raises:
            ValueError: It is missing or damaged, of another layout, tokenizer, codec or embedder, or stale and not
                allowed to be.
        """
        expected = {
            "layout": self.config.model.layout(),
            "tokenizer": self.context.inputs["tokenizer"],
            "codec": self.context.codec().name,
            "embedder": embedder,
        }
        if not stale:
            expected["weights"] = self.engine.weights_hash()
        return Library.open(library_folder(self.folder, folder), expect=expected)


def library_folder(run: Path, given: str | None) -> Path:
    """Where the library of a run stands: where `--bank` says, or in the run's own folder."""
    return Path(given) if given else run / "bank" / "library"


def open_run(run: str, root: str) -> OpenedRun:
    """Open a run by folder or name.

    Raises:
        ValueError: There is no such run, or it has no checkpoint that passes verification.
    """
    folder = build.run_folder(run, root)
    config = load_config(folder / "config.yaml")
    config.paths.root = root
    context = build.context(config)
    checkpoint = context.checkpoints(folder).newest()
    if checkpoint is None:
        raise ValueError(f"{folder} has no checkpoint yet; train it with `memory3 pretrain` first")
    return OpenedRun(folder, config, context, checkpoint, context.inference_engine(checkpoint))
