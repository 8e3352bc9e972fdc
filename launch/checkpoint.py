"""`memory3 checkpoint ACTION`: what a run has published, whether it is whole, what may go, and what others can load.

Not here: what a checkpoint is (`train.checkpoint`), what an export is (`train.export`).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from data.files import MANIFEST, delete_artefact, hold
from launch import build
from launch.compose import load_config
from launch.lock import only_user
from launch.opened import run_context
from train import generations
from train.checkpoint import (
    CONFIG,
    Checkpoint,
    Entry,
    GoneError,
    Retention,
    damage,
    delete,
    entries,
    leftovers,
    reasons_to_keep,
)
from train.export import export as publish_export

DAMAGED = 1


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "list": show,
        "verify": verify,
        "prune": prune,
        "export": export,
    }
    return actions[arguments.action](arguments)


def show(arguments: argparse.Namespace) -> int:
    """List what is there, by sizes alone."""
    folder, found = _entries(arguments)
    reasons = reasons_to_keep(found, _retention(folder, arguments))
    if arguments.json:
        print(json.dumps([_plain(entry, reasons[entry.folder]) for entry in found], indent=1))
        return 0
    table = Table("checkpoint", "tokens", "validation", "bytes", "ranks", "generation", "why it stays")
    for entry in found:
        state = entry.state
        if state is None:
            table.add_row(entry.folder.name, "", "", "", "", "", "damaged; see `memory3 checkpoint verify`")
            continue
        validation = "" if state.validation is None else f"{state.validation:.4f}"
        why = ", ".join(reasons[entry.folder]) or "-"
        table.add_row(
            entry.folder.name, f"{state.tokens:,}", validation, decimal(entry.size), str(entry.ranks),
            state.generation or "", why,
        )  # fmt: skip
    Console(width=max(Console().width, 160)).print(table)
    for path in leftovers(folder):
        print(
            f"{path.name}: unfinished: a run that trains is at it, or its next save sweeps it, or `memory3 checkpoint "
            "prune`"
        )
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Read every byte, compare it with its hash, and look for the generation that is named."""
    folder, found = _entries(arguments)
    damaged = 0
    for entry in _chosen(found, arguments.checkpoint):
        try:
            hold(entry.folder)
            problem = damage(entry.folder)
        except (FileNotFoundError, GoneError):
            print(f"{entry.folder.name}: gone meanwhile: its run, which trains, has published newer ones")
            continue
        damaged += problem is not None
        print(f"{entry.folder.name}: {problem or f'whole, {decimal(entry.size)}'}")
        if problem is None and entry.state is not None and entry.state.generation is not None:
            missing = _generation_problem(folder, entry)
            if missing is not None:
                print(f"  {missing}")
    if damaged:
        print(
            "a run passes damaged checkpoints over and resumes at the newest whole one; "
            "restore them from a copy, or delete their folders"
        )
        return DAMAGED
    return 0


def prune(arguments: argparse.Namespace) -> int:
    """Delete what no rule keeps, generations of the bank included, and what interrupted saves left.

    Never the last whole checkpoint, nor what is being read.
    """
    folder, found = _entries(arguments)
    reasons = reasons_to_keep(found, _retention(folder, arguments))
    doomed = [entry for entry in found if not reasons[entry.folder]]
    keep = load_config(folder / CONFIG).saving.keep_generations
    swept = leftovers(folder)
    size = decimal(sum(entry.size for entry in doomed))
    if arguments.dry_run:
        for entry in found:
            why = reasons[entry.folder]
            print(f"{entry.folder.name}: {'stays: ' + ', '.join(why) if why else 'goes'}")
        for path in swept:
            print(f"{path.name}: goes, unfinished")
        old = generations.outdated(folder, last=keep, without=[entry.folder for entry in doomed])
        for path in old:
            print(f"{path.relative_to(folder)}: goes, no checkpoint that stays names it")
        print(
            f"{len(doomed)} checkpoints and {size}, and {len(old)} generations would go; nothing was deleted"
        )
        return 0
    with only_user(folder):
        for stage in sorted({entry.stage for entry in doomed}):
            _refuse_without_a_whole_one(found, reasons, stage)
        gone = [entry for entry in doomed if delete(entry.folder)]
        for path in leftovers(folder):
            delete_artefact(path)
        old = generations.sweep(folder, last=keep)
    print(f"{len(gone)} checkpoints went, {decimal(sum(entry.size for entry in gone))}")
    for path in old:
        print(f"{path.relative_to(folder)} went: no checkpoint names it")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Bring a checkpoint's weights, sizes and tokenizer into a folder of their own."""
    folder = _run_folder(arguments)
    context = run_context(arguments.run, arguments.root)
    checkpoints = context.checkpoints(folder)
    checkpoint: Checkpoint | None
    if arguments.checkpoint is None:
        checkpoint = checkpoints.newest()
        if checkpoint is None:
            raise ValueError(f"{folder} has no checkpoint yet; train it with `memory3 pretrain` first")
    else:
        (entry,) = _chosen(entries(folder), arguments.checkpoint)
        checkpoint = checkpoints.open(entry.folder)
    target = Path(arguments.target)
    publish_export(
        checkpoint,
        target,
        model=context.config.model,
        tokenizer=context.prepared.tokenizer.path,
        config=folder / CONFIG,
        inputs=context.prepared.inputs,
    )
    print(
        f"{checkpoint.folder} -> {target}: model.safetensors, config.json, tokenizer.model\n"
        f"memory3 generate {target} --root {arguments.root} --prompt ...; in Python: train.export.load_exported"
    )
    return 0


def _entries(arguments: argparse.Namespace) -> tuple[Path, list[Entry]]:
    folder = _run_folder(arguments)
    found = entries(folder)
    if not found:
        raise ValueError(f"{folder} has no checkpoint yet; train it with `memory3 pretrain` first")
    return folder, found


def _run_folder(arguments: argparse.Namespace) -> Path:
    folder = build.existing_run(arguments.run, arguments.root)
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} is an export: it holds no checkpoints; name the run it was made from")
    return folder


def _chosen(found: list[Entry], name: str | None) -> list[Entry]:
    chosen = [entry for entry in found if name in (None, entry.folder.name)]
    if not chosen:
        raise ValueError(
            f"there is no checkpoint {name!r}; there are " + ", ".join(e.folder.name for e in found)
        )
    return chosen


def _retention(folder: Path, arguments: argparse.Namespace) -> Retention:
    """The run's own rules, where the command line gives no others."""
    saving = load_config(folder / CONFIG).saving
    asked = {key: getattr(arguments, f"keep_{key}", None) for key in ("last", "every", "best")}
    own = {"last": saving.keep_last, "every": saving.keep_every, "best": saving.keep_best}
    retention = Retention(**(own | {key: value for key, value in asked.items() if value is not None}))
    for key, least in (("last", 1), ("every", 1), ("best", 0)):
        value = getattr(retention, key)
        if value is not None and value < least:
            raise ValueError(f"--keep-{key} {value} is below {least}; set {least} or more")
    return retention


def _refuse_without_a_whole_one(found: list[Entry], reasons: dict[Path, list[str]], stage: str) -> None:
    staying = [entry.folder for entry in found if entry.stage == stage and reasons[entry.folder]]
    if all(damage(path) is not None for path in reversed(staying)):
        raise ValueError(
            f"none of the {stage} checkpoints that would stay is whole ({', '.join(path.name for path in staying)}); "
            "nothing was deleted: restore one from a copy, or raise --keep-last"
        )


def _generation_problem(folder: Path, entry: Entry) -> str | None:
    assert entry.state is not None
    path = folder / "bank" / str(entry.state.generation) / MANIFEST
    if not path.exists():
        return f"{path.parent} is missing: the bank epoch cannot be resumed in its middle"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError):
        return f"{path} is damaged: the bank epoch cannot be resumed in its middle"
    if found != entry.state.generation_fingerprint:
        return f"{path.parent} is {found}, but {entry.state.generation_fingerprint} is named: it was replaced since"
    return None


def _plain(entry: Entry, why: list[str]) -> dict[str, object]:
    return {
        "checkpoint": entry.folder.name,
        "folder": str(entry.folder),
        "bytes": entry.size,
        "ranks": entry.ranks,
        "problem": entry.problem,
        "kept": why,
        "state": None if entry.state is None else asdict(entry.state),
    }
