"""A trained run, opened for reading: its newest checkpoint, and the bank that may be read with it.

`evaluate`, `generate` and `bank` all begin here.
Not here: what they do with it.
"""

import logging
import resource
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.files import MANIFEST
from launch import build
from launch.config import RunConfig
from memorybank import codecs
from memorybank.bank import Records
from memorybank.codec import Codec
from memorybank.cold import ColdRecords, ColdStart
from memorybank.config import STAGES, BankConfig, BankContext, CodecConfig, CodecKind, check_bank, check_codec
from memorybank.edits import Compiler
from memorybank.library import Library, state_numbers
from memorybank.record import MemoryShape
from memorybank.segment import DocumentCutter
from memorybank.store import GenerationSettings
from train.checkpoint import Checkpoint
from train.engine import InferenceEngine
from train.rows import in_bank

log = logging.getLogger(__name__)

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
    def bank(self) -> Path:
        """Folder of its generations and of their codecs."""
        return self.folder / "bank"

    @property
    def shape(self) -> MemoryShape:
        """The shape of its memories."""
        return MemoryShape.of(self.config.model)

    @property
    def window_tokens(self) -> int | None:
        """Tokens of a document that are encoded at once; None = each reference by itself."""
        return self.config.bank.window_tokens(self.config.model)

    @property
    def settings(self) -> GenerationSettings:
        """What a generation of these weights is made from."""
        return GenerationSettings(
            layout=self.config.model.layout(),
            weights=self.engine.weights_hash(),
            lineage=self.config.run,
            step=self.step,
            references=self.context.prepared.inputs["references"],
            tokenizer=self.context.prepared.inputs["tokenizer"],
            context=self.config.bank.context.value,
            window_tokens=self.window_tokens,
        )

    def codec(self, config: CodecConfig | None = None) -> Codec:
        """The codec that these weights write with, the run's own by default; a quantiser is fitted when first needed.

        Raises:
            ValueError: It does not suit the model, or there are too few references to fit it.
        """
        config = config or self.config.codec
        check_codec(config, self.shape.head_size)
        return codecs.obtain(
            config,
            self.shape,
            self.context.dtype,
            self.bank,
            encode=self.engine.encode,
            references=self.context.prepared.references,
            ids=self.bank_ids,
            settings=self.settings,
        )

    def codec_of(self, library: Library) -> Codec:
        """The codec that a library's memories were written with."""
        return codecs.named(library.settings.codec, self.shape, library.codec_folders)

    def cold_start(self) -> tuple[ColdStart, Codec]:
        """Memories of the run's own references, encoded when first read and kept below `bank`; their codec."""
        codec, kept = self.codec(), None
        max_bytes = int(self.config.bank.cold_gib * 2**30)
        if max_bytes:
            try:
                kept = ColdRecords.obtain(self.bank, self.settings, codec, max_bytes=max_bytes)
            except OSError as problem:
                log.warning("memories that are encoded now are not kept: %s", problem)
        references = self.context.prepared.references
        return ColdStart(kept, self.engine.encode, references, codec, window_tokens=self.window_tokens), codec

    def records(self, library: Library | None) -> tuple[Records, Codec]:
        """Records of a library, or of the run's own references (`cold_start`); their codec."""
        return self.cold_start() if library is None else (library, self.codec_of(library))

    def compiler(
        self, library: Path, kind: CodecKind | None = None, context: BankContext | None = None
    ) -> Compiler:
        """What compiles a library with these weights.

        Args:
            library: Its folder; what stands there keeps its codec and its context.
            kind: Another codec than that, or than the run's.
            context: Another context than that, or than the run's.

        Raises:
            ValueError: The codec, or the context, does not suit the model.
        """
        codec, stands = self.config.codec, bool(state_numbers(library))
        if context is not None:
            check_bank(BankConfig(context=context), self.config.model)
        if kind is not None:
            codec = CodecConfig(kind=kind, separate=codec.separate and kind in STAGES)
            check_codec(codec, self.shape.head_size)
        prepared = self.context.prepared
        return Compiler(
            encode=self.engine.encode,
            codec=None if kind is None and stands else codec,
            context=context or (None if stands else self.config.bank.context),
            row_tokens=self.config.model.row_tokens,
            shape=self.shape,
            dtype=self.context.dtype,
            index=self.config.retrieval.index,
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
            ValueError: It is missing or damaged, of another layout, tokenizer or embedder, or stale and not allowed
                to be.
        """
        allow_maps()
        expected = {
            "layout": self.config.model.layout(),
            "tokenizer": self.context.prepared.inputs["tokenizer"],
            "embedder": embedder,
        }
        if not stale:
            expected["weights"] = self.engine.weights_hash()
        return Library.open(library_folder(self.folder, folder), expect=expected)


def allow_maps() -> None:
    """Let the process open as many files as it may: every map holds one, and a large bank has thousands."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def library_folder(run: Path, given: str | None) -> Path:
    """Where the library of a run stands: where `--bank` says, or in the run's own folder."""
    return Path(given) if given else run / "bank" / "library"


def open_run(run: str, root: str) -> OpenedRun:
    """Open a run by folder or name, or an export (`train.export`) by folder.

    Raises:
        ValueError: There is no such run, or it has no checkpoint that passes verification.
    """
    folder = build.run_folder(run, root)
    context = run_context(run, root)
    checkpoints = context.checkpoints(folder)
    is_export = (folder / MANIFEST).exists()
    checkpoint = checkpoints.open(folder) if is_export else checkpoints.newest()
    if checkpoint is None:
        raise ValueError(f"{folder} has no checkpoint yet; train it with `memory3 pretrain` first")
    return OpenedRun(folder, context.config, context, checkpoint, context.inference_engine(checkpoint))


def run_context(run: str, root: str) -> build.Context:
    """What a run, by folder or name, was made from: its frozen configuration and its prepared corpus."""
    config = build.frozen_config(run, root)
    config.paths.root = root
    return build.context(config)
