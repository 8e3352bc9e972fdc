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

    @property
    def window_tokens(self) -> int | None:
        """Tokens of a document that are encoded at once; None = each reference by itself."""
        return self.config.bank.window_tokens(self.config.model)

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
            context=self.config.bank.context.value,
            window_tokens=self.window_tokens,
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

    def generation(self, name: str, *, stale: bool) -> Generation:
        """A generation of this run by name.

        Args:
            name: Its folder below `bank/`.
            stale: Whether one of other weights is accepted.

        Raises:
            ValueError: It is missing, of another corpus, layout or context, or stale and not allowed to be.
        """
        expected = {
            "layout": self.config.model.layout(),
            "context": self.config.bank.context.value,
            "window_tokens": self.window_tokens,
            "references": self.context.inputs["references"],
            "tokenizer": self.context.inputs["tokenizer"],
        }
        if not stale:
            expected["weights"] = self.engine.weights_hash()
        return Generation.open(self.folder / "bank" / name, expect=expected)


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
