"""`memory3 bank audit`: which part of what rows read repeats the rows themselves, and what gain comes from it.

Once with the filters as configured, and once without any, neither by document nor by overlap: the difference is what
they prevent. Memories are compiled with the newest weights as they are read, and kept (`memorybank.cold`); nothing else
is written into the run.
Not here: the audit itself (`train.audit`).
"""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from data.documents import Split
from data.files import write_json_atomic
from launch import build
from launch.opened import OpenedRun, open_run
from memorybank.bank import BankReader
from memorybank.config import QueryMode
from memorybank.pool import fresh_slots, window_slots
from train.arms import Pattern
from train.audit import Audit, Gain, audit
from train.evaluate import Setting, TextSet
from train.rows import in_bank, plan_epoch
from train.texts import text_of

Ids = NDArray[np.int64]
TRAIN = "train"


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows of an audit, and how the run reads in them.

    Attributes:
        text: The rows.
        bank_ids: References that may be read.
        limit: Largest overlap that the filter lets pass.
        pattern: Pattern of the slots.
    """

    text: TextSet
    bank_ids: Ids
    limit: float
    pattern: Pattern


@dataclass(frozen=True, slots=True)
class FilterAudit:
    """An audit with its filter.

    Attributes:
        filter: What was refused.
        refused_own_document: Candidates refused because the row holds a token of their document.
        refused_overlap: Candidates refused because the row overlaps them by more than the limit.
        exhausted: References that chunks looked for when no candidate was left.
        audit: What was read, and what it gained.
    """

    filter: str
    refused_own_document: int
    refused_overlap: int
    exhausted: int
    audit: Audit


def run(arguments: argparse.Namespace) -> int:
    """Audit, print the tables, and write the JSON when asked to."""
    build.quiet_third_parties()
    opened = open_run(arguments.run, arguments.root)
    continual = opened.config.continual
    if continual is None or continual.memory is None:
        raise ValueError(
            f"{opened.folder} reads no memory (continual.memory is null): audit a run that does, such as its arm M"
        )
    if arguments.rows is not None and arguments.rows < 1:
        raise ValueError(f"--rows {arguments.rows} is below 1; set 1 or more")
    query = continual.memory.query if arguments.query is None else QueryMode[arguments.query]
    rows = row_set(opened, arguments.split, arguments.rows or opened.config.evaluation.text_rows)
    audits = audit_filters(opened, rows, query)
    about = {
        "run": opened.config.run,
        "step": opened.step,
        "split": arguments.split,
        "rows": len(rows.text.tokens_MT1),
        "query": query.name,
        "pattern": rows.pattern.name,
        "references": len(rows.bank_ids),
    }
    console = Console(width=max(Console().width, 100))
    console.print(
        "{run}, step {step}: {rows} {split} rows, query {query}, {pattern} pattern, {references:,} references".format(
            **about
        ),
        soft_wrap=True,
    )
    for found in audits:
        console.print(_table(found))
    if arguments.output is not None:
        write_json_atomic(
            Path(arguments.output),
            {"format": "memory3-audit", "version": 1, **about, "audits": [asdict(found) for found in audits]},
        )
        print(f"results: {arguments.output}")
    return 0


def row_set(opened: OpenedRun, split: str, num_rows: int) -> RowSet:
    """Held-out rows, read as at inference, or the first rows of the run's last bank epoch, as in training.

    Raises:
        ValueError: The run has not reached its continual stage, or the split holds less than a row.
    """
    config, shards = opened.config, opened.context.prepared.shards
    if split != TRAIN:
        return RowSet(
            opened.context.held_out(Split(split), num_rows),
            opened.bank_ids,
            config.retrieval.overlap_evaluation,
            Pattern.inference,
        )
    state, history = opened.checkpoint.state, opened.checkpoint.history
    stage = config.continual
    if state.stage != "continual" or stage is None:
        raise ValueError(
            f"{opened.folder} has not reached its continual stage, so no bank epoch has rows to audit; go on "
            "training it with `memory3 pretrain`, or give --split validation"
        )
    planned = plan_epoch(
        shards,
        state.stage,
        stage,
        history,
        source_weights={label: source.weight for label, source in config.data.sources.items()},
        row_tokens=config.model.row_tokens,
        epoch=state.epoch,
        epoch_step=state.epoch_step,
        seed=config.seed,
    )
    document_of = opened.context.prepared.references.document_of
    return RowSet(
        text_of(shards, planned.plan, num_rows=num_rows),
        np.flatnonzero(in_bank(shards.corpus, history.finished)[document_of]).astype(np.int64),
        config.retrieval.overlap_training,
        Pattern.training,
    )


def audit_filters(opened: OpenedRun, rows: RowSet, query: QueryMode) -> list[FilterAudit]:
    """Audit what the rows read with the filters as configured, and without any.

    Args:
        opened: The run.
        rows: Its rows.
        query: Whose text retrieves.
    """
    config, context = opened.config, opened.context
    references, retrieval = context.prepared.references, config.retrieval
    embedder = context.embedder()
    unfiltered = replace(
        context, config=replace(config, retrieval=replace(retrieval, allow_own_document=True))
    )
    search = context.search(embedder)
    index = search.index(rows.bank_ids)
    inference = rows.pattern is Pattern.inference
    found = [
        how.neighbours(
            rows.text.tokens_MT1[:, :-1].numpy(),
            rows.text.row_documents,
            index,
            k=retrieval.fresh if inference else 1,
            limit=limit,
        )
        for how, limit in ((search, rows.limit), (unfiltered.search(embedder), None))
    ]
    read = [
        fresh_slots(each.ids_MCk, query)
        if inference
        else window_slots(each.ids_MCk[:, :, 0], query, window=retrieval.window)
        for each in found
    ]
    records, codec = opened.records(None)
    audits = audit(
        opened.engine,
        rows.text,
        read,
        Setting(
            label="M",
            reader=BankReader(records, codec),
            batch_rows=config.evaluation.batch_rows,
        ),
        content_tokens=references.content_tokens,
        samples=config.evaluation.bootstrap_samples,
        seed=config.evaluation.seed,
    )
    own = "" if retrieval.allow_own_document else "no document of the row, "
    filters = (f"as configured: {own}overlap ≤ {rows.limit:.2f}", "off")
    return [
        FilterAudit(filter, each.refused_own_document, each.refused_overlap, each.exhausted, result)
        for filter, each, result in zip(filters, found, audits, strict=True)
    ]


def _table(found: FilterAudit) -> Table:
    result = found.audit
    filled = result.slots - result.empty
    table = Table(
        "overlap with the row",
        "slots",
        "share of filled",
        "chunks",
        "gain, nats/token",
        "95 % over rows",
        title=f"filter {found.filter}",
        caption=(
            f"{result.empty / result.slots:.1%} of {result.slots:,} slots are empty; {found.exhausted:,} times no "
            f"candidate was left. Refused: {found.refused_own_document:,} of the row's own documents, "
            f"{found.refused_overlap:,} for their overlap. A chunk counts where "
            "the largest overlap among its references lies."
        ),
        title_justify="left",
        caption_justify="left",
    )
    for bucket in result.buckets:
        table.add_row(
            f"{bucket.low:.0%} to {bucket.high:.0%}",
            f"{bucket.slots:,}",
            f"{bucket.slots / filled:.1%}" if filled else "",
            *_gain_cells(bucket.gain),
        )
    table.add_section()
    table.add_row("reads nothing", "", "", *_gain_cells(result.unread))
    table.add_row("all", f"{filled:,}", "", *_gain_cells(result.overall))
    return table


def _gain_cells(gain: Gain) -> tuple[str, str, str]:
    interval = "" if gain.low is None else f"{gain.low:+.3f} to {gain.high:+.3f}"
    return f"{gain.chunks:,}", "" if gain.nats is None else f"{gain.nats:+.4f}", interval
