"""What looks for references when a bank epoch begins, and what it finds: a published artefact of the run.

Both follow from corpus, settings and rows; the model's weights have no part in it. So whoever has the embedder may
search long before the epoch is trained (`memory3 plan --search`): the run finds what was published. No torch.
Not here: the search itself (`memorybank.search`), compiling what was found (`continual`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.documents import Split
from data.files import Manifest, is_finished, open_manifest, publishing, read_manifest
from data.packing import RowPlan
from data.references import References
from memorybank.config import RetrievalConfig
from train.config import MemorySource
from train.history import History
from train.rows import held_out_plan, in_bank

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]
_KIND, _VERSION = "neighbours", 3


@dataclass(frozen=True, slots=True)
class EpochSearch:
    """Which rows look for references, among which.

    Attributes:
        stage: "warmup" or "continual".
        epoch: Its number in the stage.
        ids: References that may be read, ascending.
        rows: Of the epoch.
        validation: The rows that each validation reads.
    """

    stage: str
    epoch: int
    ids: Ids
    rows: RowPlan
    validation: RowPlan

    def folder(self, run: Path) -> Path:
        """Where what is found is published in a run's folder."""
        return run / "neighbours" / f"{self.stage}-{self.epoch:04d}"

    def settings(self, retrieval: RetrievalConfig, *, chunk_tokens: int) -> dict[str, Any]:
        """Everything, beside the prepared corpus, that decides what is found."""
        digest = sha256(self.ids.tobytes())
        for plan in (self.rows, self.validation):
            for part in (plan.documents, plan.starts, plan.row_order):
                digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        return {
            "epoch": self.epoch,
            "rows_and_references": digest.hexdigest()[:16],
            "row_tokens": self.rows.row_tokens,
            "chunk_tokens": chunk_tokens,
            "candidates": retrieval.candidates,
            "overlap_training": retrieval.overlap_training,
            "overlap_evaluation": retrieval.overlap_evaluation,
            "allow_own_document": retrieval.allow_own_document,
            "embedder": asdict(retrieval.embedder) | {"kind": retrieval.embedder.kind.name},
            "index": asdict(retrieval.index) | {"kind": retrieval.index.kind.name},
        }


@dataclass(frozen=True, slots=True)
class EpochNeighbours:
    """What the rows of a bank epoch, and the validation beside it, found.

    Attributes:
        training_MC: One reference per chunk of the epoch's rows, -1 is empty.
        scores_MC: Their retrieval scores, -inf where empty.
        validation_MC: The same for the validation rows.
        report: Counts of references searched, chunks that asked and stayed empty, candidates refused, and distinct
            references found.
    """

    training_MC: Ids
    scores_MC: Scores
    validation_MC: Ids
    report: Mapping[str, int]

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

    def publish(self, folder: Path, *, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """The inverse of `open`."""
        with publishing(
            folder, kind=_KIND, version=_VERSION, settings=settings, inputs=inputs, extra=self.report
        ) as work:
            np.save(work / "training.npy", self.training_MC)
            np.save(work / "scores.npy", self.scores_MC)
            np.save(work / "validation.npy", self.validation_MC)

    def read_ids(self, source: MemorySource) -> Ids:
        """The distinct references that the epoch's generation holds; none where nothing was found."""
        read = (
            [self.validation_MC, self.training_MC]
            if _compiles_all(source, self.report)
            else [self.validation_MC]
        )
        return distinct(*read)


def epoch_search(
    references: References,
    stage: str,
    epoch: int,
    history: History,
    rows: RowPlan,
    *,
    validation_rows: int,
) -> EpochSearch:
    """What an epoch searches that begins with this history and has these rows.

    Raises:
        ValueError: The validation split holds less than a row.
    """
    validation = held_out_plan(references.shards, Split.validation, row_tokens=rows.row_tokens)
    return EpochSearch(
        stage=stage,
        epoch=epoch,
        ids=readable(references, history),
        rows=rows,
        validation=replace(validation, row_order=validation.row_order[:validation_rows]),
    )


def readable(references: References, history: History) -> Ids:
    """The references that may be read in an epoch that begins with this history, ascending."""
    allowed = in_bank(references.shards.corpus, history.finished)
    return np.flatnonzero(allowed[references.document_of]).astype(np.int64)


def is_published(folder: Path, *, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Whether a folder holds what this very search found."""
    return is_finished(folder, kind=_KIND, version=_VERSION, settings=settings, inputs=inputs)


def published_size(
    folder: Path, source: MemorySource, *, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> int | None:
    """How many references an epoch's generation will hold; None where its search was not made yet."""
    if not is_published(folder, settings=settings, inputs=inputs):
        return None
    report = read_manifest(folder).extra
    return int(report["found" if _compiles_all(source, report) else "found_by_validation"])


def distinct(*found: Ids) -> Ids:
    """The references in these arrays, ascending, each once."""
    ids = np.unique(np.concatenate([part.ravel() for part in found]))
    return ids[ids >= 0]


def _compiles_all(source: MemorySource, report: Mapping[str, int]) -> bool:
    """Whether a generation holds what training found, too: where training reads it, or validation found nothing."""
    return source is not MemorySource.online or not report["found_by_validation"]


def _checked(manifest: Manifest, name: str) -> NDArray[Any]:
    """An array of an artefact, whose bytes are compared with their checksums."""
    array: NDArray[Any] = np.load(BytesIO(manifest.mapped(name).read_all().data), allow_pickle=False)
    return array
