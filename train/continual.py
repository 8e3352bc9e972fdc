"""The bank epochs of the continual stage: grow, search, compile.

At the beginning of an epoch the bank may hold the references of every document finished so far, and those of
reference-only sources. The neighbours of the epoch's rows are searched among them, and the references that these rows
and the validation will read are compiled with the current weights, on all ranks, into a new generation.
Neighbours and generation are published artefacts: a killed run finds them, or the whole shards it had finished.
Not here: which rows the epoch has (`rows`), what they ask for (`neighbours`), training on it (`loop`).
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data.files import open_manifest
from data.loader import read_rows
from data.packing import RowPlan
from data.references import References
from data.shards import TokenShards
from memorybank import codecs, store
from memorybank.bank import BankReader, Records
from memorybank.config import BankConfig, CodecConfig, RetrievalConfig
from memorybank.neighbours import Neighbours
from memorybank.record import MemoryShape
from memorybank.search import RowSearch
from memorybank.store import Generation, GenerationSettings
from memorybank.writer import batch_for, compile_generation
from model.config import ModelConfig
from train.distributed import Ranks
from train.engine import Engine
from train.generations import sweep
from train.history import History
from train.neighbours import EpochNeighbours, EpochSearch, distinct, is_published, readable

Ids = NDArray[np.int64]


class BankEpochs:
    """Opens bank epochs of one run.

    Args:
        run: The run folder; its name is the lineage of the generations.
        references: All references of the prepared corpus.
        search: Finds neighbours; None on all ranks but the first.
        retrieval: The filters' limits.
        inputs: Fingerprints of what neighbours and generations are made from.
        model: Its layout decides the meaning of a record.
        codec: Memories to records; a quantiser is trained anew in every epoch, on what the bank then may hold.
        dtype: The type the model computes in.
        bank: In which context references are encoded.
        keep_generations: So many newest ones stay, whether or not a checkpoint names them.
        ranks: All processes compile.
    """

    def __init__(
        self,
        run: Path,
        *,
        references: References,
        search: RowSearch | None,
        retrieval: RetrievalConfig,
        inputs: dict[str, str],
        model: ModelConfig,
        codec: CodecConfig,
        dtype: torch.dtype,
        bank: BankConfig,
        keep_generations: int,
        ranks: Ranks,
    ) -> None:
        self._run = run
        self._references = references
        self._search = search
        self._retrieval = retrieval
        self._inputs = inputs
        self._model = model
        self._codec = codec
        self._dtype = dtype
        self._shape = MemoryShape.of(model)
        self._bank = bank
        self._keep_generations = keep_generations
        self._ranks = ranks

    def neighbours(self, asked: EpochSearch) -> EpochNeighbours:
        """Search once, on rank 0, and let every rank read what was published."""
        folder = asked.folder(self._run)
        settings = asked.settings(self._retrieval, chunk_tokens=self._model.chunk_tokens)
        if self._ranks.is_first and not is_published(folder, settings=settings, inputs=self._inputs):
            assert self._search is not None
            with self._ranks.alone():
                found = search_epoch(asked, self._search, self._references.shards, self._retrieval)
                found.publish(folder, settings=settings, inputs=self._inputs)
        self._ranks.barrier()
        return EpochNeighbours.open(folder, inputs=self._inputs)

    def compile(self, engine: Engine, ids: Ids, history: History, *, name: str, step: int) -> Generation:
        """Compile references with the current weights; a collective. A finished generation is opened again.

        Args:
            engine: The weights.
            ids: What the epoch will read.
            history: Decides what the bank may hold, of which a quantiser's training sample is drawn.
            name: Of the generation.
            step: Of the weights.
        """
        self.sweep()
        bank = self._run / "bank"
        settings = GenerationSettings(
            layout=self._model.layout(),
            weights=engine.weights_hash(),
            lineage=self._run.name,
            step=step,
            references=self._inputs["references"],
            tokenizer=self._inputs["tokenizer"],
            context=self._bank.context.value,
            window_tokens=self._bank.window_tokens(self._model),
        )
        codec = codecs.obtain(
            self._codec,
            self._shape,
            self._dtype,
            bank,
            encode=engine.encode,
            references=self._references,
            ids=readable(self._references, history),
            settings=settings,
            team=self._ranks,
            alone=self._ranks.alone,
        )
        with self._ranks.pulse.batches("the compilation of a bank"):
            compile_generation(
                engine.encode,
                self._references,
                ids,
                codec,
                bank / name,
                settings=settings,
                team=self._ranks,
                batch=batch_for(self._ranks.device),
            )
        return Generation.open(bank / name, expect=asdict(settings) | {"codec": codec.name})

    def reader(self, generation: Generation, records: Records | None = None) -> BankReader:
        """Read a generation, directly or through a cache, with the codec that it states."""
        folders = codecs.folders_of(generation.settings.weights, self._run / "bank")
        codec = codecs.named(generation.codec, self._shape, folders)
        return BankReader(records or generation, codec)

    def reopen(self, name: str, fingerprint: str) -> Generation:
        """The generation that a checkpoint names, and no other.

        Raises:
            ValueError: It is missing, damaged, or another one.
        """
        expected = {"layout": self._model.layout(), "context": self._bank.context.value}
        if Path(name).name != name:
            raise ValueError(f"the checkpoint names the generation {name!r}, which is no folder's name")
        folder = self._run / "bank" / name
        try:
            open_manifest(folder, kind=store.KIND, version=store.VERSION)
        except ValueError as problem:
            raise ValueError(
                f"{problem}. The checkpoint reads this very generation: restore it from a copy, or delete the "
                "checkpoints that name it (`memory3 checkpoint list`): an earlier one compiles it anew"
            ) from problem
        generation = Generation.open(folder, expect=expected)
        if generation.fingerprint != fingerprint:
            raise ValueError(
                f"{generation.folder} has the fingerprint {generation.fingerprint}, but the checkpoint names "
                f"{fingerprint}: the generation was replaced since; restore it, or resume from a checkpoint of an "
                "earlier bank epoch (delete the later ones)"
            )
        return generation

    def sweep(self) -> None:
        """Delete the generations that neither a checkpoint nor the rule keeps; on the first rank."""
        if self._ranks.is_first:
            sweep(self._run, last=self._keep_generations)


def search_epoch(
    asked: EpochSearch, search: RowSearch, shards: TokenShards, retrieval: RetrievalConfig
) -> EpochNeighbours:
    """Find what the rows of an epoch, and those of its validation, may read."""
    index = search.index(asked.ids)

    def found_by(plan: RowPlan, limit: float) -> Neighbours:
        batch = read_rows(shards, plan, tuple(range(plan.num_rows)))
        documents = [plan.documents_of_row(position) for position in batch.positions]
        return search.neighbours(batch.inputs.numpy(), documents, index, k=1, limit=limit)

    training = found_by(asked.rows, retrieval.overlap_training)
    validation = found_by(asked.validation, retrieval.overlap_evaluation)
    report = {
        "references": len(asked.ids),
        "chunks": int(training.ids_MCk.size),
        "empty": training.exhausted,
        "refused_own_document": training.refused_own_document,
        "refused_overlap": training.refused_overlap,
        "found": len(distinct(training.ids_MCk, validation.ids_MCk)),
        "found_by_validation": len(distinct(validation.ids_MCk)),
    }
    return EpochNeighbours(
        training.ids_MCk[:, :, 0], training.scores_MCk[:, :, 0], validation.ids_MCk[:, :, 0], report
    )
