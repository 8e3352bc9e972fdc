"""`memory3 prepare`: everything that precedes training, and what retrieval can find before any of it.

Corpus, tokenizer, token shards and references are made by `data.prepare`; search vectors of all references follow.
It ends with the share of validation probes whose first, and first five, references hold the answer.
Not here: the formats (`data`, `memorybank`).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launch.compose import compose_config, load_config
from launch.config import RunConfig

if TYPE_CHECKING:
    from launch.build import Context


def run(arguments: argparse.Namespace) -> int:
    """Prepare, and print what was made."""
    config = compose_config(arguments.overrides)
    ensure(config)
    return 0


def ensure(config: RunConfig) -> None:
    """Make what is missing; what stands there with equal settings is reused.

    Raises:
        ValueError: The text cannot be used, or would take the place of the text that a run was trained on.
    """
    from rich.progress import Progress

    from data.prepare import prepare
    from launch import build

    build.quiet_third_parties()
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        prepared = prepare(
            config.data, build.prepared_root(config), progress=progress, replacing=_unless_needed(config)
        )
    context = build.context(config)
    embed_references(context)
    tokens = int(prepared.shards.lengths().sum())
    print(
        f"{prepared.folder}: {prepared.shards.num_documents:,} documents, {tokens:,} tokens, "
        f"{len(prepared.references):,} references",
        flush=True,  # before what the ranks say
    )
    if prepared.probes:
        report_retrieval(context)


def refuse_without_validation(config: RunConfig) -> None:
    """Training validates: refuse what is prepared where it holds out less than a row for that.

    Raises:
        ValueError: It does; the message says what to change.
    """
    from data.documents import Split
    from launch import build

    shards = build.context(config).prepared.shards
    shards.held_out(Split.validation, row_tokens=config.model.row_tokens)


def _unless_needed(config: RunConfig) -> Callable[[Path], None]:
    """What refuses to replace a corpus that trained runs read: nothing could be asked of them any more."""

    def replacing(folder: Path) -> None:
        runs = _readers(config)
        if runs:
            raise ValueError(
                f"{folder} is not what these settings and this text make of it, and runs of {config.paths.root} were "
                f"trained with it: {', '.join(runs)}; give this corpus a place of its own, data.name=NAME, or delete "
                f"{folder.parent} if they are to be read no more"
            )

    return replacing


def _readers(config: RunConfig) -> list[str]:
    """Runs with checkpoints that can read the prepared corpus as it is."""
    from data.prepare import prepared_sizes
    from launch import build

    found = []
    for path in sorted(Path(config.paths.root).glob("*/config.yaml")):
        if not any(path.parent.glob("checkpoints/*/manifest.json")):
            continue
        try:
            data = load_config(path).data
        except ValueError:  # of another version
            continue
        if data.name == config.data.name and prepared_sizes(data, build.prepared_root(config)) is not None:
            found.append(path.parent.name)
    return found


def embed_references(context: "Context") -> None:
    """Make the search vectors, with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("search vectors"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not sys.stdout.isatty(),
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
