"""The bank epochs of the continual stage: grow, search, compile.

At the beginning of an epoch the bank may hold the references of every document finished so far, and those of
reference-only sources. The neighbours of the epoch's rows are searched among them, and the references that these rows
and the validation will read are compiled with the current weights, on all ranks, into a new generation.
Neighbours and generation are published artefacts: a killed run finds them, or the whole shards it had finished.
Not here: which rows the epoch has (`rows`), training on it (`loop`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.files import Manifest, is_finished, open_manifest, publishing
from data.references import References
from memorybank import codecs, store
from memorybank.bank import BankReader, Records
from memorybank.config import BankConfig, CodecConfig, RetrievalConfig
from memorybank.record import MemoryShape
from memorybank.search import RowSearch
from memorybank.store import Generation, GenerationSettings
from memorybank.writer import batch_for, compile_generation
from model.config import ModelConfig
from train.distributed import Ranks
from train.engine import Engine
from train.generations import sweep
from train.history import History
from train.rows import in_bank

log = logging.getLogger(__name__)

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]
_KIND, _VERSION = "neighbours", 2


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that will look for references.

    Attributes:
        tokens_MT: Inputs.
        documents: For each row, the documents of which it holds a token.
    """

    tokens_MT: NDArray[np.int64]
    documents: Sequence[Ids]


@dataclass(frozen=True, slots=True)
class EpochNeighbours:
    """What the rows of a bank epoch, and the validation beside it, found.

    Attributes:
        training_MC: One reference per chunk of the epoch's rows, -1 is empty.
        scores_MC: Their retrieval scores, -inf where empty.
        validation_MC: The same for the validation rows.
        report: Counts of references searched, slots filled and candidates refused.
    """

    training_MC: Ids
    scores_MC: Scores
    validation_MC: Ids
    report: dict[str, int]

    @classmethod
    def open(cls, folder: Path, *, inputs: Mapping[str, str]) -> "EpochNeighbours":
        """Read what was published.

        Raises:
            ValueError: It is missing, damaged, or was made from other inputs.
        """
        manifest = open_manifest(folder, kind=_KIND, version=_VERSION, inputs=inputs)
        return cls(
            _checked(manifest, "training.npy"),
            _checked(manifest, "scores.npy"),
            _checked(manifest, "validation.npy"),
            dict(manifest.extra),
        )

    def read_ids(self, *, training: bool) -> Ids:
        """The distinct references that will be read, with or without those of training."""
        parts = [self.validation_MC.ravel()] + ([self.training_MC.ravel()] if training else [])
        ids = np.unique(np.concatenate(parts))
        return ids[ids >= 0]


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

    def bank_ids(self, history: History) -> Ids:
        """The references that may be read in an epoch that begins with this history, ascending."""
        allowed = in_bank(self._references.shards.corpus, history.finished)
        return np.flatnonzero(allowed[self._references.document_of]).astype(np.int64)

    def neighbours(
        self, stage: str, epoch: int, history: History, rows: Rows, validation: Rows
    ) -> EpochNeighbours:
        """Search once, on rank 0, and let every rank read what was published."""
        folder = self._run / "neighbours" / f"{stage}-{epoch:04d}"
        ids = self.bank_ids(history)
        digest = sha256(ids.tobytes() + rows.tokens_MT.tobytes() + validation.tokens_MT.tobytes())
        settings = {
            "epoch": epoch,
            "rows_and_references": digest.hexdigest()[:16],
            "candidates": self._retrieval.candidates,
            "overlap_training": self._retrieval.overlap_training,
            "overlap_evaluation": self._retrieval.overlap_evaluation,
            "allow_own_document": self._retrieval.allow_own_document,
            "index": asdict(self._retrieval.index) | {"kind": self._retrieval.index.kind.name},
        }
        if self._ranks.is_first and not is_finished(
            folder, kind=_KIND, version=_VERSION, settings=settings, inputs=self._inputs
        ):
            with self._ranks.alone():
                self._publish_neighbours(folder, settings, ids, rows, validation)
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
            ids=self.bank_ids(history),
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

    def _publish_neighbours(
        self, folder: Path, settings: dict[str, object], ids: Ids, rows: Rows, validation: Rows
    ) -> None:
        assert self._search is not None
        index = self._search.index(ids)
        found = [
            self._search.neighbours(part.tokens_MT, part.documents, index, k=1, limit=limit)
            for part, limit in (
                (rows, self._retrieval.overlap_training),
                (validation, self._retrieval.overlap_evaluation),
            )
        ]
        training = found[0]
        report = {
            "references": len(ids),
            "chunks": int(training.ids_MCk.size),
            "empty": training.exhausted,
            "refused_own_document": training.refused_own_document,
            "refused_overlap": training.refused_overlap,
        }
        with publishing(
            folder, kind=_KIND, version=_VERSION, settings=settings, inputs=self._inputs, extra=report
        ) as work:
            np.save(work / "training.npy", training.ids_MCk[:, :, 0])
            np.save(work / "scores.npy", training.scores_MCk[:, :, 0])
            np.save(work / "validation.npy", found[1].ids_MCk[:, :, 0])


def _checked(manifest: Manifest, name: str) -> NDArray[Any]:
    """An array of an artefact, whose bytes are compared with their checksums."""
    array: NDArray[Any] = np.load(BytesIO(manifest.mapped(name).read_all().data), allow_pickle=False)
    return array
