"""What a change of a bank would write, and how long it would take here: `memory3 bank ... --dry-run`.

Bytes follow from the formats; times from a batch of real references that is embedded and compiled for the purpose.
Not here: the changes themselves (`memorybank.edits`).
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.filesize import decimal

from launch.opened import OpenedRun
from memorybank.edits import Compiler, Documents, Editor, compaction
from memorybank.library import Library
from memorybank.segment import CutDocument

INDEX = "exact search over memory-mapped vectors"
_COPIED_BYTES_PER_SECOND = 200e6
"""Reading, hashing and writing on one core; used for the estimate alone."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What would be written, and for how long one would wait."""

    folder: Path
    documents: int
    references: int
    text_bytes: int
    vector_bytes: int
    record_bytes: int
    seconds: float
    codec: str
    note: str = ""

    def lines(self) -> Iterator[tuple[str, str]]:
        """Names and values, for people."""
        yield "documents", f"{self.documents:,}"
        yield "references", f"{self.references:,}"
        for name, size in (
            ("text and tables", self.text_bytes),
            ("search vectors", self.vector_bytes),
            ("records", self.record_bytes),
            ("to be written", self.text_bytes + self.vector_bytes + self.record_bytes),
        ):
            yield name, decimal(size)
        there = next(
            path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists()
        )
        yield "free on that disk", decimal(shutil.disk_usage(there).free)
        yield "time, about", f"{self.seconds:,.0f} s"
        yield "codec", self.codec
        yield "index", INDEX
        if self.note:
            yield "note", self.note


def of_build(opened: OpenedRun, editor: Editor) -> Estimate:
    """What a bank of all that the run may read would take."""
    compiler = _compiler(editor)
    prepared = opened.context.prepared
    ids = opened.bank_ids
    documents = np.unique(prepared.references.document_of[ids])
    sample = [
        compiler.cutter.cut(prepared.shards.document(int(number))) for number in documents[: compiler.batch]
    ]
    texts = int(prepared.shards.table["bytes"][documents].sum())
    return _of(editor, len(documents), len(ids), texts + _table_bytes(len(documents), len(ids)), sample)


def of_documents(documents: Documents, editor: Editor) -> Estimate:
    """What documents from files would take; all of them are read and cut."""
    sample = list(islice(documents.read(), _compiler(editor).batch))
    num_documents = num_references = num_bytes = 0
    for cut in documents.read():
        num_documents += 1
        num_references += len(cut.passages)
        num_bytes += len(cut.document.text.encode())
    if not sample:
        raise ValueError("there are no documents to put in; give files that hold some")
    table = _table_bytes(num_documents, num_references)
    return _of(editor, num_documents, num_references, num_bytes + table, sample)


def of_refresh(library: Library, editor: Editor) -> Estimate:
    """What compiling all records anew would take."""
    compiler = _compiler(editor)
    ids = library.live_ids(0)[: compiler.batch]
    tokens_NR, lengths_N, titles_N = library.tokens(ids)
    seconds = _seconds_per_reference(
        compiler, torch.from_numpy(tokens_NR), torch.from_numpy(lengths_N), torch.from_numpy(titles_N)
    )
    count = len(library)
    return Estimate(
        library.folder,
        library.num_documents,
        count,
        0,
        0,
        count * compiler.codec.record_bytes,
        count * seconds,
        compiler.codec.name,
        "text and search vectors stay",
    )


def of_compact(library: Library) -> Estimate:
    """What copying the segments that hold removed documents, or are small, would take."""
    sizes = library.bytes_by_kind()
    there = sum(part.references for part in library.parts)
    count = sum(
        library.live_ids(place).size
        for group in compaction(library)
        for place in group
        if len(group) > 1 or library.live_ids(place).size < library.parts[place].references
    )
    text, vectors, records = (int(sizes[what] * count / there) for what in ("text", "vectors", "records"))
    return Estimate(
        library.folder,
        library.num_documents,
        count,
        text,
        vectors,
        records,
        (text + vectors + records) / _COPIED_BYTES_PER_SECOND,
        library.settings.codec,
        f"{1 - len(library) / there:.1%} of the references were removed; nothing is encoded",
    )


def _of(
    editor: Editor, documents: int, references: int, text_bytes: int, sample: Sequence[CutDocument]
) -> Estimate:
    compiler = _compiler(editor)
    passages = [passage for cut in sample for passage in cut.passages][: compiler.batch]
    width = int(compiler.cutter.settings["reference_tokens"])
    tokens_NR = torch.full((compiler.batch, width), int(compiler.cutter.settings["pad_id"]))
    lengths_N, titles_N = (
        torch.ones(compiler.batch, dtype=torch.long),
        torch.zeros(compiler.batch, dtype=torch.long),
    )
    for row in range(compiler.batch):
        passage = passages[row % len(passages)]
        lengths_N[row], titles_N[row] = len(passage.tokens), passage.title
        tokens_NR[row, : len(passage.tokens)] = torch.from_numpy(passage.tokens.astype(np.int64))
    seconds = _seconds_per_reference(compiler, tokens_NR, lengths_N, titles_N)
    texts = [cut.document.text[: 4 * width] for cut in sample]
    compiler.embedder.embed(texts[:1])
    started = time.perf_counter()
    compiler.embedder.embed(texts)
    seconds += (time.perf_counter() - started) / len(texts)
    return Estimate(
        editor.folder,
        documents,
        references,
        text_bytes,
        references * compiler.embedder.size * 4,
        references * compiler.codec.record_bytes,
        references * seconds,
        compiler.codec.name,
    )


def _seconds_per_reference(
    compiler: Compiler, tokens_NR: torch.Tensor, lengths_N: torch.Tensor, titles_N: torch.Tensor
) -> float:
    compiler.codec.encode(
        compiler.encode(tokens_NR, lengths_N, titles_N)
    )  # kernels are chosen, pages touched
    started = time.perf_counter()
    compiler.codec.encode(compiler.encode(tokens_NR, lengths_N, titles_N)).cpu()
    return (time.perf_counter() - started) / len(tokens_NR)


def _table_bytes(documents: int, references: int) -> int:
    """Tokens (128 of two bytes), and the tables' rows; JSON's own signs and the ids not counted."""
    return documents * 38 + references * (256 + 32)


def _compiler(editor: Editor) -> Compiler:
    assert editor.compiler is not None
    return editor.compiler
