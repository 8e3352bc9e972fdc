"""What the bank epochs of a stage will read, before a run begins: how many chunks ask, among how many references.

Which documents an epoch draws, and which are finished when it begins, is a pure function of corpus, settings and seed,
as long as training does not diverge and nobody stops it for good. What the chunks find is known only once they have
searched, which takes the embedder: until then the number of references that they find is an estimate, and `most` its
bound.
Invariants: documents are counted by array operations alone; no text is read, no torch.
Not here: which rows come (`rows`), what they ask for (`neighbours`), the search (`continual`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.packing import RowPlan
from data.references import References
from data.shards import TokenShards
from train.config import MemorySource, StageConfig
from train.history import History
from train.neighbours import EpochSearch
from train.rows import EpochRows, plan_epoch

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
        asking: Chunks that are searched for: those of its distinct rows, and of the validation.
        chunks: Of these, those that ask for the references which are compiled: of its rows only where training reads
            the bank.
        expected: References that these are estimated to find; None = without a prepared corpus.
        found: References that they do find; None = the search was not made yet.
    """

    stage: str
    epoch: int
    steps: int
    references: int | None
    asking: int
    chunks: int
    expected: int | None
    found: int | None = None

    @property
    def most(self) -> int:
        """The most references that can be found, a chunk one: their number where it is known."""
        if self.found is not None:
            return self.found
        return self.chunks if self.references is None else min(self.references, self.chunks)

    @property
    def likely(self) -> int | None:
        """The references that are found, or estimated to be."""
        return self.expected if self.found is None else self.found


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
    stage: StageConfig,
    asked: EpochSearch,
    *,
    steps: int,
    chunk_tokens: int,
    found: int | None = None,
) -> BankEpoch:
    """Return what an epoch will compile.

    Args:
        references: All of the prepared corpus.
        stage: Its settings; it reads memory.
        asked: What the epoch searches.
        steps: Updates.
        chunk_tokens: Tokens of a chunk.
        found: By its search, where that was made.
    """
    assert stage.memory is not None
    plans = [asked.validation, asked.rows]
    chunks = [len(np.unique(plan.row_order)) * (plan.row_tokens // chunk_tokens) for plan in plans]
    compiled = 1 if stage.memory.source is MemorySource.online else 2
    num_documents = references.shards.num_documents
    tokens_D = np.concatenate([_tokens_read(plan, num_documents) for plan in plans[:compiled]])
    return BankEpoch(
        stage=asked.stage,
        epoch=asked.epoch,
        steps=steps,
        references=len(asked.ids),
        asking=sum(chunks),
        chunks=sum(chunks[:compiled]),
        expected=round(references_found(tokens_D / chunk_tokens, len(asked.ids))),
        found=found,
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


def _tokens_read(plan: RowPlan, num_documents: int) -> NDArray[np.float64]:
    """(documents,): the most tokens that one occurrence of each document has in a plan's rows."""
    taken = np.zeros(int(plan.row_order.max()) + 1)
    taken[plan.row_order] = plan.row_tokens
    edges = plan.row_tokens * np.arange(len(taken) + 1)
    tokens = np.diff(np.interp(plan.starts, edges, np.concatenate([[0], np.cumsum(taken)])))
    most = np.zeros(num_documents)
    np.maximum.at(most, plan.documents, tokens)
    return most
