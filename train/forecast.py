"""What the bank epochs of a stage will read, before a run begins: how many chunks ask, among how many references.

Which documents an epoch draws, and which are finished when it begins, is a pure function of corpus, settings and seed,
as long as training does not diverge and nobody stops it for good. What the chunks find is known only once they have
searched, which takes the embedder: the number of references that they find is an estimate, and `most` its bound.
Invariants: documents are counted by array operations alone; no text is read, no torch.
Not here: which rows come (`rows`), the search (`continual`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.documents import Split
from data.packing import RowPlan
from data.references import References
from data.shards import TokenShards
from train.config import MemorySource, StageConfig
from train.history import History
from train.rows import EpochRows, held_out_plan, in_bank, plan_epoch

_DOCUMENT_EXPONENT = 0.91
"""Chunks of a document of n find as much as n to this power that have nothing to do with each other."""


@dataclass(frozen=True, slots=True)
class BankEpoch:
    """What an epoch of a stage with memory will compile.

    Attributes:
        stage: "warmup" or "continual".
        epoch: Its number in the stage.
        steps: Updates.
        references: That may be read when it begins; None = not known.
        chunks: That ask for the references which are compiled: those of its distinct rows, where training reads the
            bank, and of the validation.
        expected: References that these are estimated to find; None = without a prepared corpus.
    """

    stage: str
    epoch: int
    steps: int
    references: int | None
    chunks: int
    expected: int | None

    @property
    def most(self) -> int:
        """The most references that can be found: a chunk finds one."""
        return self.chunks if self.references is None else min(self.references, self.chunks)


@dataclass(frozen=True, slots=True)
class StageEpoch:
    """An epoch of a stage, with memory or without.

    Attributes:
        epoch: Its number in the stage.
        step: Updates before it.
        history: At its beginning.
        rows: Its rows.
    """

    epoch: int
    step: int
    history: History
    rows: EpochRows


def stage_epochs(
    shards: TokenShards,
    name: str,
    stage: StageConfig,
    history: History,
    *,
    source_weights: Mapping[str, float],
    row_tokens: int,
    seed: int,
) -> Iterator[StageEpoch]:
    """Yield the epochs of a stage that begins with this history, as `run.run_stage` goes through them.

    Raises:
        ValueError: As `plan_epoch`.
    """
    step = epoch = 0
    while step < stage.steps:
        rows = plan_epoch(
            shards,
            name,
            stage,
            history,
            source_weights=source_weights,
            row_tokens=row_tokens,
            epoch=epoch,
            epoch_step=step,
            seed=seed,
        )
        yield StageEpoch(epoch, step, history, rows)
        history = history.after(rows.plan, rows.steps * stage.rows_per_step)
        step += rows.steps
        epoch += 1


def read_at(epochs: Sequence[StageEpoch], stage: StageConfig, step: int) -> NDArray[np.bool_]:
    """(documents,) bool: what a stage has finished after so many steps, from its epochs."""
    of = next(of for of in epochs if step <= of.step + of.rows.steps)
    return of.history.after(of.rows.plan, (step - of.step) * stage.rows_per_step).finished


def bank_epoch(
    references: References,
    name: str,
    stage: StageConfig,
    epoch: StageEpoch,
    *,
    chunk_tokens: int,
    validation_rows: int,
) -> BankEpoch:
    """Return what an epoch will compile.

    Args:
        references: All of the prepared corpus.
        name: Of the stage.
        stage: Its settings; it reads memory.
        epoch: The epoch.
        chunk_tokens: Tokens of a chunk.
        validation_rows: Rows that each validation reads, at most.

    Raises:
        ValueError: The validation split holds less than a row.
    """
    assert stage.memory is not None
    shards, plan = references.shards, epoch.rows.plan
    validation = held_out_plan(shards, Split.validation, row_tokens=plan.row_tokens)
    read = [(validation, np.unique(validation.row_order[:validation_rows]))]
    if stage.memory.source is not MemorySource.online:
        read.append((plan, np.unique(plan.row_order)))
    allowed = in_bank(shards.corpus, epoch.history.finished)
    may_read = int(np.count_nonzero(allowed[references.document_of]))
    tokens_D = np.concatenate([_tokens_read(rows, taken, shards.num_documents) for rows, taken in read])
    return BankEpoch(
        stage=name,
        epoch=epoch.epoch,
        steps=epoch.rows.steps,
        references=may_read,
        chunks=sum(len(taken) for _, taken in read) * (plan.row_tokens // chunk_tokens),
        expected=round(references_found(tokens_D / chunk_tokens, may_read)),
    )


def references_found(chunks_D: NDArray[np.float64], references: int) -> float:
    """Return how many distinct references chunks will find, one each: an estimate, where no one has searched.

        m = sum of n_d^0.91 over documents,   found = m / (1 + m / references)

    Chunks of one document find fewer than as many, since they are about the same; and some references are found more
    often than others: 1 / (1 + x) of them are never found where all would be found x times on average, as if their
    rates of being found were exponentially distributed. Both constants are those that came nearest on five corpora,
    with documents from 80 to 8,000 tokens (`benchmarks/results/plan.md`).

    Args:
        chunks_D: Chunks of each document that ask; a text that comes again asks once.
        references: That may be read.
    """
    if not references:
        return 0.0
    asked = float(np.sum(np.where(chunks_D > 1, chunks_D**_DOCUMENT_EXPONENT, chunks_D)))
    return asked / (1 + asked / references)


def _tokens_read(plan: RowPlan, rows: NDArray[np.int64], num_documents: int) -> NDArray[np.float64]:
    """(documents,): the most tokens that one occurrence of each document has in these rows."""
    taken = np.zeros(int(plan.row_order.max()) + 1)
    taken[rows] = plan.row_tokens
    edges = plan.row_tokens * np.arange(len(taken) + 1)
    tokens = np.diff(np.interp(plan.starts, edges, np.concatenate([[0], np.cumsum(taken)])))
    most = np.zeros(num_documents)
    np.maximum.at(most, plan.documents, tokens)
    return most
