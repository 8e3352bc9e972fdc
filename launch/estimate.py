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

from data.files import Manifest
from launch.opened import OpenedRun
from memorybank import codecs, quantizer
from memorybank.codec import Codec
from memorybank.config import STAGES
from memorybank.edits import Compiler, Documents, Editor, compaction
from memorybank.index_plan import folded, plan_index
from memorybank.library import Library, asked_index, state_numbers
from memorybank.segment import CutDocument

_COPIED_BYTES_PER_SECOND = 200e6
"""Reading, hashing and writing on one core; used for the estimate alone."""
_WINDOWED = 1.55
"""Tokens of all windows (512 each) of the factbook's documents, relative to those of its references."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What would be written, and for how long one would wait."""

    folder: Path
    documents: int
    references: int
    text_bytes: int
    vector_bytes: int
    index_bytes: int
    record_bytes: int
    seconds: float
    codec: str
    index: str
    note: str = ""

    def lines(self) -> Iterator[tuple[str, str]]:
        """Names and values, for people."""
        yield "documents", f"{self.documents:,}"
        yield "references", f"{self.references:,}"
        for name, size in (
            ("text and tables", self.text_bytes),
            ("search vectors", self.vector_bytes),
            ("search index", self.index_bytes),
            ("records", self.record_bytes),
            ("to be written", self.text_bytes + self.vector_bytes + self.index_bytes + self.record_bytes),
        ):
            yield name, decimal(size)
        there = next(
            path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists()
        )
        yield "free on that disk", decimal(shutil.disk_usage(there).free)
        yield "time, about", f"{self.seconds:,.0f} s"
        yield "codec", self.codec
        yield "index", self.index
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
    compiler = _compiler(editor).like(library.settings)
    ids = library.live_ids(0)[: compiler.batch]
    tokens_NR, lengths_N, titles_N = library.tokens(ids)
    name, record_bytes, codec = _codec(editor)
    seconds = _seconds_per_reference(
        compiler, codec, torch.from_numpy(tokens_NR), torch.from_numpy(lengths_N), torch.from_numpy(titles_N)
    )
    count = len(library)
    return Estimate(
        library.folder,
        library.num_documents,
        count,
        0,
        0,
        0,
        count * record_bytes,
        count * seconds,
        name,
        index_of(library),
        ", ".join(["text, search vectors and index stay", *_windowed(compiler)]),
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
    kept = bool(library.indexes) and not len(library.removed)
    plan = plan_index(len(library), library.vectors(0).size, asked_index(library.settings.index))
    index = 0 if kept else plan.disk_bytes
    return Estimate(
        library.folder,
        library.num_documents,
        count,
        text,
        vectors,
        index,
        records,
        (text + vectors + index + records) / _COPIED_BYTES_PER_SECOND,
        library.settings.codec,
        index_of(library) if kept else plan.describe(),
        f"{1 - len(library) / there:.1%} of the references were removed; nothing is encoded",
    )


def _of(
    editor: Editor, documents: int, references: int, text_bytes: int, sample: Sequence[CutDocument]
) -> Estimate:
    compiler = _compiler(editor)
    if state_numbers(editor.folder):
        with Library.open(editor.folder) as library:
            compiler = compiler.like(library.settings)
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
    name, record_bytes, codec = _codec(editor)
    seconds = _seconds_per_reference(compiler, codec, tokens_NR, lengths_N, titles_N)
    texts = [cut.document.text[: 4 * width] for cut in sample]
    compiler.embedder.embed(texts[:1])
    started = time.perf_counter()
    compiler.embedder.embed(texts)
    seconds += (time.perf_counter() - started) / len(texts)
    index_bytes, index = _grown_index(editor, references)
    uncounted = ["fit the codec"] * (codec is None) + ["build the index"] * (index_bytes > 0)
    return Estimate(
        editor.folder,
        documents,
        references,
        text_bytes,
        references * compiler.embedder.size * 4,
        index_bytes,
        references * record_bytes,
        references * seconds,
        name,
        index,
        ", ".join([*(f"the time to {what} is not counted" for what in uncounted), *_windowed(compiler)]),
    )


def index_of(library: Library) -> str:
    """The search indexes of a library in words: lists and their recall, and what is searched exactly."""
    unlisted = sum(part.references for part in library.unlisted)
    exact = f"{unlisted:,} memory-mapped vectors searched exactly"
    return "\n".join(
        [*map(_lists_of, library.indexes), *([exact] if unlisted or not library.indexes else [])]
    )


def _lists_of(index: Manifest) -> str:
    settings, found = index.settings, index.extra
    return (
        f"{settings['kind']} over {settings['num_vectors']:,}: {settings['lists']:,} lists, {found['lists_read']:,} "
        f"read; recall@5 {found['recall_at_5']:.3f}, recall@64 {found['recall_at_64']:.3f} over {found['queries']:,} "
        "queries"
    )


def _grown_index(editor: Editor, references: int) -> tuple[int, str]:
    """Bytes that the index of a bank with so many more references would take, and its description."""
    compiler, unlisted = _compiler(editor), references
    listed: list[int] = []
    if state_numbers(editor.folder):
        with Library.open(editor.folder) as library:
            listed, unlisted = (
                library.num_listed,
                references + sum(part.references for part in library.unlisted),
            )
    if listed:
        places = folded(listed, unlisted)
        if places is None:
            return 0, "stays as it is; what is put in is searched exactly"
        unlisted += sum(listed[place] for place in places)
    plan = plan_index(unlisted, compiler.embedder.size, compiler.index)
    return plan.disk_bytes, plan.describe()


def _codec(editor: Editor) -> tuple[str, int, Codec | None]:
    """Name, bytes of a record, and the codec itself unless it has yet to be fitted."""
    compiler, config = _compiler(editor), _compiler(editor).codec
    if config is None:
        with Library.open(editor.folder) as library:
            name, weights = library.settings.codec, library.settings.weights
            codec = codecs.named(name, compiler.shape, library.codec_folders)
            is_fitted = library.shared.codec is None or weights == compiler.weights
        return name, codec.record_bytes, codec if is_fitted else None
    if config.kind not in STAGES:
        codec = codecs.of_kind(config.kind, compiler.shape, compiler.dtype)
        return codec.name, codec.record_bytes, codec
    name = quantizer.factory(config.kind, compiler.shape.head_size)
    return f"{name}, fitted first", compiler.shape.record_bytes(quantizer.vector_bytes(config.kind)), None


def _seconds_per_reference(
    compiler: Compiler,
    codec: Codec | None,
    tokens_NR: torch.Tensor,
    lengths_N: torch.Tensor,
    titles_N: torch.Tensor,
) -> float:
    def made() -> None:
        memory = compiler.encode(tokens_NR, lengths_N, titles_N)
        if codec is not None:
            codec.encode(memory).cpu()

    made()  # kernels are chosen, pages touched
    started = time.perf_counter()
    made()
    seconds = (time.perf_counter() - started) / len(tokens_NR)
    return seconds if compiler.window_tokens is None else seconds * _WINDOWED


def _windowed(compiler: Compiler) -> Iterator[str]:
    if compiler.window_tokens is not None:
        yield (
            f"documents are read in windows of {compiler.window_tokens:,} tokens that overlap: {_WINDOWED} times "
            "the tokens, as in the factbook"
        )


def _table_bytes(documents: int, references: int) -> int:
    """Tokens (128 of two bytes), and the tables' rows; JSON's own signs and the ids not counted."""
    return documents * 38 + references * (256 + 32)


def _compiler(editor: Editor) -> Compiler:
    assert editor.compiler is not None
    return editor.compiler
