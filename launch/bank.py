"""`memory3 bank ACTION`: the life of a bank that its users keep, one function per action.

Not here: what a bank is (`memorybank.library`), how it changes (`memorybank.edits`), whether it is sound
(`memorybank.soundness`), what a change would cost (`launch.estimate`), `audit` and `inspect` (modules of these names).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import replace as with_fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from data.config import SourceConfig, SourceKind
from data.documents import Document, Use
from data.files import MANIFEST, fingerprint, hash_files
from data.sources import read_json_lines
from launch import audit, estimate, inspect
from launch import build as builders
from launch.compose import load_config
from launch.launchers import run_here
from launch.opened import OpenedRun, allow_maps, library_folder, open_run
from launch.units import counted
from memorybank import embedder as embedders
from memorybank import soundness
from memorybank.cold import opened_stores
from memorybank.config import BankContext, CodecKind
from memorybank.edits import Documents, Editor, Known, Told
from memorybank.library import Library
from memorybank.segment import CutDocument
from memorybank.store import Generation
from memorybank.team import ALONE, Team
from train.generations import needed_by
from train.rows import in_bank
from train.stopping import STOPPED

Ids = NDArray[np.int64]
_DELETE = "delete it if it is not needed"


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for."""
    if "ranks" in arguments:
        if arguments.ranks < 1:
            raise ValueError(f"--ranks {arguments.ranks} is below 1; set 1 or more")
        return edit(arguments, ALONE) if arguments.ranks == 1 or arguments.dry_run else _on_ranks(arguments)
    builders.quiet_third_parties()
    allow_maps()
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "remove": remove,
        "compact": compact,
        "verify": verify,
        "stat": stat,
        "search": search,
        "fetch": fetch,
        "audit": audit.run,
        "inspect": inspect.run,
    }
    with _unwritten():
        return actions[arguments.action](arguments)


def edit(arguments: argparse.Namespace, team: Team) -> int:
    """Do what compiles memories, which several processes may share: each calls this."""
    builders.quiet_third_parties()
    allow_maps()
    edits = {"build": build, "add": add, "replace": replace, "refresh": refresh}
    with _unwritten():
        return edits[arguments.action](arguments, team)


def build(arguments: argparse.Namespace, team: Team) -> int:
    """Make a bank of everything that may be read with the run's newest checkpoint."""
    opened, editor = _opened(arguments, team)
    if arguments.dry_run:
        code = _print_estimate(estimate.of_build(opened, editor))
    else:
        documents = corpus_documents(opened, editor)
        code = _edit(editor, lambda editor: editor.build(documents))
    if team.rank == 0:
        print(_share_of_corpus(opened), end="")
    return code


def add(arguments: argparse.Namespace, team: Team) -> int:
    """Put in documents."""
    return _put(arguments, team, lambda editor, documents: editor.add(documents))


def replace(arguments: argparse.Namespace, team: Team) -> int:
    """Put in documents, and take out those of the same ids."""
    return _put(arguments, team, lambda editor, documents: editor.replace(documents))


def remove(arguments: argparse.Namespace) -> int:
    """Take out documents by id, or all of a source."""
    folder = _folder(arguments)
    if bool(arguments.documents) == bool(arguments.source):
        raise ValueError("name the documents to remove by their ids, or all of a source by --source LABEL")
    with Library.open(folder) as library:
        if arguments.source:
            numbers = library.of_source(arguments.source)
            if len(numbers) == 0:
                raise ValueError(
                    f"bank {folder} holds nothing of source {arguments.source!r}; it has {', '.join(library.sources())}"
                )
        else:
            documents = list(dict.fromkeys(arguments.documents))
            numbers = library.document_numbers(documents)
            for document_id, number in zip(documents, numbers.tolist(), strict=True):
                if number < 0:
                    raise ValueError(f"bank {folder} holds no document {document_id!r}; nothing was removed")
        num_references = len(library.of_documents(numbers))
    Editor(folder=folder).remove(numbers)
    where = f" --root {arguments.root}" * (arguments.root != "runs")
    where += f" --bank {arguments.bank}" * (arguments.bank is not None)
    print(
        f"removed {counted(len(numbers), 'document')} of {counted(num_references, 'reference')}: no search finds "
        "them from now on\n"
        f"their bytes are deleted by `memory3 bank compact {arguments.run}{where}`; what the model learnt from them in "
        "training, and the prepared corpus, are not the bank's"
    )
    return 0


def refresh(arguments: argparse.Namespace, team: Team) -> int:
    """Compile all memories with the newest weights."""
    _, editor = _opened(arguments, team)
    if arguments.dry_run:
        with Library.open(editor.folder) as library:
            return _print_estimate(estimate.of_refresh(library, editor))
    return _edit(editor, lambda editor: editor.refresh())


def compact(arguments: argparse.Namespace) -> int:
    """Rewrite the bank without what was removed, delete what is older, and say who else still holds it."""
    folder = _folder(arguments)
    with Library.open(folder) as library:
        if arguments.dry_run:
            return _print_estimate(estimate.of_compact(library))
        removed = _removed_ids(library)
    before = _bytes_in(folder)
    with _bars() as told:
        number = Editor(folder=folder, told=told).compact()
    after = _bytes_in(folder)
    print(f"{folder}: state {number}, {decimal(before)} -> {decimal(after)}")
    for line in _elsewhere(arguments, removed):
        print(line)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Check the bank, repair it if asked, or search it for a document that should be gone."""
    folder = _folder(arguments)
    if arguments.absent is not None:
        return _verify_absent(arguments, folder)
    if arguments.text is not None:
        raise ValueError("--text is searched for beside a document; name that too, by --absent DOC")
    if arguments.sample < 0:
        raise ValueError(f"--sample {arguments.sample} is below 0; set 0 to compare none")
    editor = Editor(folder=folder)
    if arguments.sample or arguments.fix:
        _, editor = _opened(arguments, ALONE)

    def problems() -> list[soundness.Problem]:
        with _bars("bytes") as told:
            return soundness.verify(
                folder,
                editor.compiler,
                sample=arguments.sample,
                progress=lambda total, done: told("hashing", total, done, 1),
            )

    found = problems()
    for problem in found:
        print(problem)
    if found and arguments.fix:
        with _bars() as told:
            made = soundness.repair(with_fields(editor, told=told), found)
        print(f"made anew: {', '.join(made) or 'nothing'}")
        found = problems()
        for problem in found:
            print(f"still: {problem}")
    print(f"{folder}: {counted(len(found), 'problem') if found else 'sound'}")
    return int(bool(found))


def stat(arguments: argparse.Namespace) -> int:
    """Describe the bank, and list the generations that training compiled and what cold start kept."""
    run_folder, folder = builders.run_folder(arguments.run, arguments.root), _folder(arguments)
    generations = _compiled_in_training(run_folder)
    there = next(folder.glob("state-*/" + MANIFEST), None) is not None
    if not there and arguments.bank is None and not generations.row_count:
        raise ValueError(
            f"{run_folder / 'bank'} holds no bank; make one with `memory3 bank build {arguments.run}`"
        )
    wide = Console(width=max(Console().width, 120))  # names and hashes in full, in a pipe too
    if there or arguments.bank is not None:
        with Library.open(folder) as library:
            wide.print(_described(library))
    if generations.row_count:
        wide.print(generations)
    return 0


def search(arguments: argparse.Namespace) -> int:
    """Show what a text retrieves."""
    config = builders.frozen_config(arguments.run, arguments.root)
    embedder = embedders.build(config.retrieval.embedder)
    if not arguments.text.strip():
        raise ValueError("the text to search for is empty")
    if arguments.k is not None and arguments.k < 1:
        raise ValueError(f"-k {arguments.k} is below 1; set 1 or more")
    with Library.open(_folder(arguments), expect={"embedder": embedder.name}) as library:
        scores, ids = library.search(embedder.embed([arguments.text]), arguments.k or config.retrieval.fresh)
        for score, number in zip(scores[0].tolist(), ids[0].tolist(), strict=True):
            if number >= 0:
                cited = library.describe(number)
                text = library.text(number).removeprefix(f"{cited.title}\n")
                print(
                    f"{score:.3f}  {cited.title} [{cited.document}, characters {cited.begin} to {cited.end}; "
                    f"{cited.source}]\n       {' '.join(text.split())[:200]}"
                )
    return 0


def fetch(arguments: argparse.Namespace) -> int:
    """Bring a bank into another folder."""
    with _bars("pieces") as told:
        number, copied = soundness.fetch(Path(arguments.source), Path(arguments.target), told=told)
    print(f"{arguments.target}: state {number}; {counted(copied, 'missing piece')} copied")
    return 0


def corpus_documents(opened: OpenedRun, editor: Editor) -> Documents:
    """The documents of a run's corpus that its newest checkpoint may read."""
    assert editor.compiler is not None
    shards, cutter = opened.context.prepared.shards, editor.compiler.cutter
    numbers = np.unique(opened.context.prepared.references.document_of[opened.bank_ids])

    def read() -> Iterator[CutDocument]:
        for number in numbers.tolist():
            yield cutter.cut(shards.document(number), shards.tokens(number), shards.title_length(number))

    embedder = editor.compiler.embedder
    if editor.team.rank == 0:
        opened.context.reference_vectors(embedder)  # where they are not there, one process makes them
    editor.team.barrier()
    corpus = opened.context.prepared.references.fingerprint
    origin = {"references": corpus, "documents": fingerprint(numbers.tolist())}
    return Documents(origin, read, Known(opened.context.reference_vectors(embedder), opened.bank_ids))


def _put(arguments: argparse.Namespace, team: Team, edit: Callable[[Editor, Documents], int]) -> int:
    _, editor = _opened(arguments, team)
    documents = _file_documents(arguments, editor)
    if arguments.dry_run:
        return _print_estimate(estimate.of_documents(documents, editor))
    return _edit(editor, lambda editor: edit(editor, documents))


def _file_documents(arguments: argparse.Namespace, editor: Editor) -> Documents:
    assert editor.compiler is not None
    cutter, files = editor.compiler.cutter, [Path(file) for file in arguments.files]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} does not exist, or is no file; give files of JSON lines")
    source = SourceConfig(
        kind=SourceKind.jsonl,
        id_field=arguments.id_field,
        title_field=arguments.title_field,
        text_field=arguments.text_field,
        licence=arguments.licence or "",
        use=Use.reference,
    )
    hashes = hash_files({str(number): file for number, file in enumerate(files)})
    stated = {**asdict(source), "kind": source.kind.value, "use": source.use.value, "label": arguments.source}
    origin = {"files": fingerprint(list(hashes.values())), "source": fingerprint(stated)}
    label = arguments.source or "replaced"
    if arguments.source is not None and arguments.licence is not None:
        return Documents(origin, lambda: map(cutter.cut, read_json_lines(files, label, source)))
    with Library.open(editor.folder) as library:
        origin["replaced"] = library.fingerprint

    def read() -> Iterator[CutDocument]:
        with Library.open(editor.folder) as library:
            for document in read_json_lines(files, label, source):
                yield cutter.cut(_like_the_old(document, library, arguments))

    return Documents(origin, read)


def _like_the_old(document: Document, library: Library, arguments: argparse.Namespace) -> Document:
    """The document with the source and the licence of the one that it replaces, where no other are given."""
    (number,) = library.document_numbers([document.id]).tolist()
    if number < 0:  # which the edit refuses
        return document
    old = library.describe(number)
    return with_fields(
        document,
        source=old.source if arguments.source is None else arguments.source,
        licence=old.licence if arguments.licence is None else arguments.licence,
    )


def _on_ranks(arguments: argparse.Namespace) -> int:
    config = builders.frozen_config(arguments.run, arguments.root)
    program, told = f"memory3 bank {arguments.action}", json.dumps(vars(arguments))
    code = run_here(program, "launch.bank_worker", told, num_ranks=arguments.ranks, config=config)
    if code in STOPPED:
        print(f"{program}: stopped; the same command goes on after the last whole shard", file=sys.stderr)
    return code


@contextmanager
def _unwritten() -> Iterator[None]:
    try:
        yield
    except OSError as problem:  # the disk is full, or may not be written
        raise ValueError(
            f"{problem}; the bank is as it was before: when that is mended, the same command goes on where it stopped"
        ) from problem


def _edit(editor: Editor, edit: Callable[[Editor], int]) -> int:
    if editor.team.rank != 0:
        edit(editor)
        return 0
    with _bars() as told:
        number = edit(with_fields(editor, told=told))
    with Library.open(editor.folder) as library:
        print(
            f"{editor.folder}: state {number}, {counted(library.num_documents, 'document')}, "
            f"{counted(len(library), 'memory', 'memories')} of {library.record_bytes:,} bytes"
        )
    return 0


def _share_of_corpus(opened: OpenedRun) -> str:
    """A line that says why a bank of the corpus does not hold all of its references; empty if it does."""
    references = opened.context.prepared.references
    corpus, total, now = references.shards.corpus, len(references), len(opened.bank_ids)
    in_the_end = in_bank(corpus, np.ones(corpus.num_documents, np.bool_))[references.document_of]
    unread, held_out = int(in_the_end.sum()) - now, total - int(in_the_end.sum())
    others = [f"{unread:,} are of documents that training has not read to their end yet"] * bool(unread)
    others += [f"{held_out:,} of documents that are held out"] * bool(held_out)
    return f"{now:,} of {total:,} references of the corpus; {', '.join(others)}\n" if others else ""


def _opened(arguments: argparse.Namespace, team: Team) -> tuple[OpenedRun, Editor]:
    opened = open_run(arguments.run, arguments.root)
    folder, codec = library_folder(opened.folder, arguments.bank), getattr(arguments, "codec", None)
    context = getattr(arguments, "context", None)
    compiler = opened.compiler(
        folder, None if codec is None else CodecKind[codec], None if context is None else BankContext[context]
    )
    return opened, Editor(folder=folder, compiler=compiler, team=team)


def _folder(arguments: argparse.Namespace) -> Path:
    """Where the bank stands; one outside the run's folder needs no run."""
    find = builders.run_folder if arguments.bank else builders.existing_run
    return library_folder(find(arguments.run, arguments.root), arguments.bank)


def _verify_absent(arguments: argparse.Namespace, folder: Path) -> int:
    with _bars("bytes") as told:
        total = _bytes_in(folder)
        found = soundness.find_document(
            folder,
            arguments.absent,
            text=arguments.text,
            progress=lambda done: told("searching", total, done, 1),
        )
    for place in found:
        print(f"found: {place}")
    if not found:
        print(f"{folder}: document {arguments.absent!r} is in none of its files ({decimal(total)} searched)")
    for line in _elsewhere(arguments, [arguments.absent]):
        print(line)
    return int(bool(found))


def _elsewhere(arguments: argparse.Namespace, document_ids: list[str]) -> Iterator[str]:
    """Name what holds documents outside the bank: it is not the bank's, and stays."""
    run_folder = builders.run_folder(arguments.run, arguments.root)
    if not document_ids or not (run_folder / "config.yaml").exists():
        return
    config = load_config(run_folder / "config.yaml")
    config.paths.root = arguments.root
    try:
        prepared = builders.context(config).prepared
    except ValueError:
        yield "the prepared corpus is not here, so that training's generations cannot be searched"
        return
    references = prepared.references
    numbers = references.document_numbers(document_ids)
    ids = references.of_documents(numbers[numbers >= 0])
    if len(ids) == 0:
        return
    yield (
        f"the prepared corpus {prepared.folder} (its text, tokens and vector cache), which is training's, not the "
        f"bank's, holds {int((numbers >= 0).sum()):,} of these documents"
    )
    for generation in _generations(run_folder):
        path, held = generation.folder, int(generation.has(ids).sum())
        if held:
            needed = ", ".join(needed_by(run_folder, path.name))
            advice = (
                f"training resumes with it at {needed}: keep it as long as you keep these"
                if needed
                else _DELETE
            )
            yield f"{path}, a generation of training, holds {held:,} of their memories; {advice}"
    for kept in opened_stores(run_folder / "bank"):
        held = int(kept.has(ids).sum())
        if held:
            yield f"{kept.folder}, kept by cold start, holds {held:,} of their memories; {_DELETE}"


def _removed_ids(library: Library) -> list[str]:
    found = []
    for of in library.segments:
        rows = np.flatnonzero(np.isin(of.document_numbers, library.removed))
        found += [of.document(row).id for row in rows.tolist()]
    return found


def _generations(run_folder: Path) -> Iterator[Generation]:
    """What training compiled and has not swept."""
    for path in sorted((run_folder / "bank").glob(f"generation-*/{MANIFEST}")):
        if path.parent.suffix == ".partial":
            continue
        try:
            yield Generation.open(path.parent)
        except (ValueError, FileNotFoundError):
            if path.exists():  # else the run, which trains, has swept it meanwhile
                raise


def _compiled_in_training(run_folder: Path) -> Table:
    table = Table(
        "generation",
        "step",
        "memories",
        "bytes each",
        "MB",
        "codec",
        "weights",
        title=f"of training, and of cold start: {run_folder / 'bank'}",
    )
    for generation in _generations(run_folder):
        size = len(generation) * generation.record_bytes
        table.add_row(
            generation.folder.name,
            str(generation.settings.step),
            f"{len(generation):,}",
            f"{generation.record_bytes:,}",
            f"{size / 1e6:,.1f}",
            generation.codec,
            generation.settings.weights,
        )
    for kept in opened_stores(run_folder / "bank"):
        table.add_row(
            kept.folder.name,
            str(kept.settings["step"]),
            f"{len(kept):,}",
            f"{kept.record_bytes:,}",
            f"{len(kept) * kept.record_bytes / 1e6:,.1f}",
            kept.settings["codec"],
            kept.settings["weights"],
        )
    return table


def _described(library: Library) -> Table:
    there = sum(part.references for part in library.parts)
    table = Table("bank", str(library.folder), title=f"state {library.number}, by {library.action}")
    for name, value in (
        ("documents", f"{library.num_documents:,}"),
        ("references", f"{len(library):,}"),
        ("removed, not yet compacted", f"{1 - len(library) / there:.1%}"),
        ("segments", f"{len(library.parts):,}"),
        ("index", estimate.index_of(library)),
        *((f"bytes of {what}", decimal(size)) for what, size in library.bytes_by_kind().items()),
        ("bytes per record", f"{library.record_bytes:,}"),
        ("codec", library.settings.codec),
        ("context", _context(library)),
        ("embedder", library.settings.embedder),
        ("compiled by", f"{library.settings.lineage}, step {library.settings.step}"),
        ("weights", library.settings.weights),
        ("sources", ", ".join(library.sources())),
    ):
        table.add_row(name, value)
    return table


def _context(library: Library) -> str:
    window = library.settings.window_tokens
    return library.settings.context + ("" if window is None else f", in windows of {window:,} tokens")


def _print_estimate(found: estimate.Estimate) -> int:
    for name, value in found.lines():
        print(f"{name:<28}{value}")
    return 0


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class _Rate(ProgressColumn):
    """How many a second, once there was a second to measure, and the bytes done, unless they are what is counted."""

    def render(self, task: Task) -> Text:
        size = int(task.fields["size"])
        rate = round(task.speed) if task.speed and (task.elapsed or 0) > 1 else 0
        if size == task.completed:  # bytes
            return Text(f"{decimal(rate)}/s" if rate else "")
        return Text(" ".join([f"{rate:,}/s"] * bool(rate) + [decimal(size)]))


@contextmanager
def _bars(unit: str = "references") -> Iterator[Told]:
    """A bar for each kind of work, as it begins."""
    tasks: dict[str, tuple[int, int]] = {}
    amount = [DownloadColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amount,
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

    def told(what: str, total: int, done: int, size: int) -> None:
        if not tasks:
            progress.start()
        if what not in tasks:
            tasks[what] = (int(progress.add_task(what, total=total or None, size=0)), 0)
        task, so_far = tasks[what]
        tasks[what] = (task, so_far + done * size)
        progress.update(TaskID(task), advance=done, size=so_far + done * size)

    try:
        yield told
    finally:
        if tasks:  # else an empty line would stand before what is refused
            progress.stop()
