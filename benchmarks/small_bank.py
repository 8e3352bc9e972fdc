"""The bank that the campaign damages, and whose edits it kills: two segments, a quantiser, lists over the vectors.

Every document of a run's corpus is in it, but for one that was removed.
Not here: the trials (`benchmarks.campaign`), damage (`benchmarks.corruptions`).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.files import fingerprint
from launch.opened import OpenedRun, open_run
from memorybank.config import CodecKind, IndexConfig, IndexKind
from memorybank.edits import KEPT_STATES, Documents, Editor, sweep
from memorybank.library import Library
from memorybank.segment import CutDocument

EDITS: dict[str, Callable[[OpenedRun, Editor], int]] = {
    "replace": lambda opened, editor: editor.replace(_documents(opened, range(1, 9))),
    "compact": lambda opened, editor: editor.compact(),
}
"""What is killed, by the names of the commands."""


def build(run: Path, folder: Path) -> None:
    """Make it with a run's newest weights."""
    opened = open_run(run.name, str(run.parent))
    editor = _editor(opened, folder, CodecKind.pq16x8)
    number = opened.context.prepared.shards.num_documents
    editor.build(_documents(opened, range(number // 2)))
    editor.add(_documents(opened, range(number // 2, number)))
    editor.remove(np.array([0]))


def edit(name: str, run: Path, folder: Path) -> None:
    """Make one of `EDITS`, unless it was made; then only what the next one would begin with."""
    opened = open_run(run.name, str(run.parent))
    with Library.open(folder) as library:
        made = library.action == name
    if made:
        sweep(folder, kept=1 if name == "compact" else KEPT_STATES)
    else:
        EDITS[name](opened, _editor(opened, folder))


def _editor(opened: OpenedRun, folder: Path, codec: CodecKind | None = None) -> Editor:
    compiler = replace(opened.compiler(folder, codec), index=IndexConfig(kind=IndexKind.ivf_flat))
    return Editor(folder=folder, compiler=compiler)


def _documents(opened: OpenedRun, numbers: range) -> Documents:
    shards, cutter = opened.context.prepared.shards, opened.compiler(opened.folder).cutter

    def read() -> Iterator[CutDocument]:
        for number in numbers:
            yield cutter.cut(shards.document(number), shards.tokens(number), shards.title_length(number))

    return Documents({"numbers": fingerprint([numbers.start, numbers.stop])}, read)
