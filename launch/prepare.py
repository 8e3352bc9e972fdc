"""`memory3 prepare`: everything that precedes training, and what retrieval can find before any of it.

Corpus, tokenizer, token shards and references are made by `data.prepare`; search vectors of all references follow.
It ends with the share of validation probes whose first, and first five, references hold the answer.
Not here: the formats (`data`, `memorybank`).
"""

import argparse
from typing import TYPE_CHECKING

from launch.compose import compose_config
from launch.config import RunConfig

if TYPE_CHECKING:
    from launch.build import Context


def run(arguments: argparse.Namespace) -> int:
    """Prepare, and print what was made."""
    config = compose_config(arguments.overrides)
    ensure(config)
    return 0


def ensure(config: RunConfig) -> None:
    """Make what is missing; what stands there with equal settings is reused."""
    from rich.progress import Progress

    from data.prepare import prepare
    from launch import build

    build.quiet_third_parties()
    with Progress(transient=True) as progress:
        prepared = prepare(config.data, build.prepared_root(config), progress=progress)
    context = build.context(config)
    embed_references(context)
    tokens = int(prepared.shards.lengths().sum())
    print(
        f"{prepared.folder}: {prepared.shards.num_documents:,} documents, {tokens:,} tokens, "
        f"{len(prepared.references):,} references"
    )
    if prepared.probes:
        report_retrieval(context)


def embed_references(context: "Context") -> None:
    """Make the search vectors, with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("search vectors"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ) as progress:
        task = progress.add_task("", total=len(context.prepared.references))
        context.reference_vectors(context.embedder(), progress=lambda done: progress.advance(task, done))


def report_retrieval(context: "Context") -> None:
    """Print, per relation, the share of validation probes whose first, and first five, references hold the answer."""
    from rich.console import Console
    from rich.table import Table

    from train.evaluate import HIT_LIMIT

    shares = context.hit_shares()
    num_references = context.config.retrieval.fresh
    table = Table(
        "relation", "probes", "first holds", f"first {num_references} hold", "", title="validation probes"
    )
    for relation, (count, first, five) in shares.items():
        note = "" if five >= HIT_LIMIT else f"below {HIT_LIMIT:.0%}: in the tables, not in the headline"
        table.add_row(relation, str(count), f"{first:.0%}", f"{five:.0%}", note)
    Console().print(table)
