"""Which rows an epoch trains on: a pure function of the corpus, the stage's settings, the history and a seed.

A stage draws documents of the training split that belong to it. In the continual stage a document that requires
another is drawn only once that other is in the bank: it was finished before the epoch began, or is reference-only.
Arm C draws the same rows as arm M, since nothing here asks whether memory is read.
Not here: how documents become rows (`data.packing`), how sources are mixed (`data.order`), reading rows (`texts`). No
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.corpus import Corpus
from data.documents import Split, Use
from data.files import fingerprint
from data.order import draw
from data.packing import RowPlan, pack
from data.shards import TokenShards
from train.config import StageConfig
from train.history import History
from train.schedule import epoch_end

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EpochRows:
    """The rows of one epoch.

    Attributes:
        plan: Documents, rows and their order.
        steps: Updates of the epoch; the plan holds at least their rows.
    """

    plan: RowPlan
    steps: int


def in_bank(corpus: Corpus, finished: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(documents,) bool: what the bank may hold once `finished` documents have been read.

    Documents of reference sources: those that are training text too once they are finished, others always.
    """
    allowed = np.zeros(corpus.num_documents, dtype=np.bool_)
    allowed[corpus.select(split=Split.train, refers=True, trains=True)] = True
    allowed &= finished
    allowed[corpus.select(uses=[Use.reference])] = True
    return allowed


def eligible(corpus: Corpus, stage: str, history: History) -> NDArray[np.bool_]:
    """(documents,) bool: what a stage may draw in an epoch that begins with this history."""
    allowed = np.zeros(corpus.num_documents, dtype=np.bool_)
    allowed[corpus.select(split=Split.train, trains=True, stage=stage)] = True
    if stage == "continual":
        requires = corpus.table["requires"]
        allowed &= (requires < 0) | in_bank(corpus, history.finished)[np.maximum(requires, 0)]
    return allowed


def plan_epoch(
    shards: TokenShards,
    stage_name: str,
    stage: StageConfig,
    history: History,
    *,
    source_weights: Mapping[str, float],
    row_tokens: int,
    epoch: int,
    epoch_step: int,
    seed: int,
) -> EpochRows:
    """The rows of the epoch that begins with this history, after `epoch_step` updates of the stage.

    Raises:
        ValueError: When the stage's weights name an unknown source, or nothing can be drawn.
    """
    corpus, lengths = shards.corpus, shards.lengths()
    unknown = sorted(set(stage.weights) - set(corpus.sources))
    if unknown:
        raise ValueError(
            f"{stage_name}.weights names the unknown source {unknown[0]!r}; the prepared corpus has "
            + ", ".join(corpus.sources)
        )
    allowed = eligible(corpus, stage_name, history)
    sources: list[Ids] = []
    shares: list[float] = []
    for number, label in enumerate(corpus.sources):
        documents = np.flatnonzero(allowed & (corpus.table["source"] == number))
        weight = stage.weights.get(label, source_weights.get(label, 1.0))
        if len(documents) and weight > 0:
            sources.append(documents)
            shares.append(weight * float(lengths[documents].sum()))
    if not sources:
        raise ValueError(
            f"{stage_name}: no document can be drawn; check the sources' `use` and `weight`, and "
            f"{stage_name}.weights={dict(stage.weights)}"
        )
    end = epoch_end(stage, epoch_step)
    if end is None:
        tokens = sum(int(lengths[documents].sum()) for documents in sources)
        end = min(epoch_step + max(1, tokens // (row_tokens * stage.rows_per_step)), stage.steps)
    steps = end - epoch_step
    num_rows = distinct = steps * stage.rows_per_step
    drawn = history.drawn.astype(np.int64)
    if stage.max_rows is not None:  # every epoch draws the first one's
        distinct, drawn, epoch = min(stage.max_rows, num_rows), np.zeros_like(drawn), 0
    draw_seed = int(fingerprint([seed, stage_name, epoch]), 16) % 2**31
    documents = draw(
        sources, shares, lengths, drawn, num_rows=distinct, row_tokens=row_tokens, seed=draw_seed
    )
    plan = pack(documents, lengths, row_tokens, num_rows=distinct, seed=draw_seed)
    return EpochRows(plan.again(num_rows), steps)


def held_out_plan(shards: TokenShards, split: Split, *, row_tokens: int) -> RowPlan:
    """All rows of a held-out split: the same for every run on a corpus.

    Raises:
        ValueError: The split holds less than a row.
    """
    return pack(shards.held_out(split, row_tokens=row_tokens), shards.lengths(), row_tokens, seed=0)
