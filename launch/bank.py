"""`memory3 bank`: compile a run's whole bank with its newest weights, or describe its generations.

Not here: how a generation is written and read (`memorybank`), the audit (`launch.audit`).
"""

import argparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from launch import audit, build, inspect
from launch.opened import open_run
from memorybank.config import CodecConfig, CodecKind
from memorybank.store import Generation

REFRESHED = "generation-refreshed"


def run(arguments: argparse.Namespace) -> int:
    """Refresh or describe."""
    build.quiet_third_parties()
    match arguments.action:
        case "refresh":
            return refresh(arguments)
        case "audit":
            return audit.run(arguments)
        case "inspect":
            return inspect.run(arguments)
        case _:
            return stat(arguments)


def refresh(arguments: argparse.Namespace) -> int:
    """Compile every reference that may be read, with the newest weights."""
    opened = open_run(arguments.run, arguments.root)
    ids = opened.bank_ids
    chosen = None
    if arguments.separate and arguments.codec is None:
        raise ValueError(
            "--separate says nothing without --codec; name a quantiser: --codec pq16x8 --separate"
        )
    if arguments.codec is not None:
        chosen = CodecConfig(kind=CodecKind[arguments.codec], separate=arguments.separate)
    codec = opened.codec(chosen)
    with Progress(
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("references"),
        TimeRemainingColumn(),
    ) as progress:
        task = progress.add_task("", total=len(ids))
        generation = opened.compile(
            ids, REFRESHED, codec=codec, progress=lambda done: progress.advance(task, done)
        )
    print(
        f"{generation.folder}: {len(generation):,} memories of {generation.record_bytes:,} bytes "
        f"({codec.memory_bytes:,} of keys and values), codec {codec.name}"
    )
    return 0


def stat(arguments: argparse.Namespace) -> int:
    """List the generations of a run."""
    folder = build.run_folder(arguments.run, arguments.root) / "bank"
    table = Table("generation", "step", "memories", "bytes each", "MB", "codec", "weights", title=str(folder))
    for path in sorted(folder.glob("generation-*")):
        if path.suffix == ".partial":
            continue
        generation = Generation.open(path)
        size = len(generation) * generation.record_bytes
        table.add_row(
            path.name,
            str(generation.settings.step),
            f"{len(generation):,}",
            f"{generation.record_bytes:,}",
            f"{size / 1e6:,.1f}",
            generation.codec,
            generation.settings.weights,
        )
    if not table.row_count:
        raise ValueError(
            f"{folder} holds no generation; make one with `memory3 bank refresh {arguments.run}`"
        )
    wide = max(Console().width, 120)  # names and hashes in full, in a pipe too
    Console(width=wide).print(table)
    return 0
