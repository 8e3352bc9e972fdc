"""Damage to every kind of file that a run, or a reader of its bank, reads.

An `Artefact` says what can be damaged, how it is read, and what sees damage when everything is hashed. Copies are hard
links, and damage replaces files, so that the originals stay as they are.
Not here: which of it is done, and what counts as found (`benchmarks.campaign`).
"""

import hashlib
import io
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import small_bank
from benchmarks.kill_and_resume import newest_checkpoint
from data import files
from data.prepare import open_prepared
from launch import build
from launch.config import RunConfig
from launch.opened import run_context
from memorybank import codecs, soundness
from memorybank.config import IndexConfig, IndexKind
from memorybank.index_plan import plan_index
from memorybank.index_store import build_index, open_index
from memorybank.library import Library
from memorybank.record import MemoryShape
from memorybank.store import Generation
from memorybank.vectors import Vectors
from train.checkpoint import Checkpoints
from train.neighbours import EpochNeighbours

DAMAGES = ("flip", "truncate", "delete", "swap", "zero", "extend")


class Passed(Exception):
    """A damaged checkpoint was passed over; by name, as it should be, or in silence."""


def _hashed(folder: Path) -> bool:
    try:
        return bool(files.verify(folder))
    except (ValueError, FileNotFoundError):
        return True


@dataclass(frozen=True, slots=True)
class Artefact:
    """Something that can be damaged.

    Attributes:
        name: What it is.
        root: The folder that is copied.
        folder: The artefact in it, relative.
        read: Reads all that is read of a copy of the root; a digest of it.
        must_refuse: Whether any damage has to be refused, rather than damage to what is read.
        seen: Whether a verification of everything sees the damage.
    """

    name: str
    root: Path
    folder: str
    read: Callable[[Path], str]
    must_refuse: bool = False
    seen: Callable[[Path], bool] = _hashed


def of_run(run: Path, config: RunConfig) -> list[Artefact]:
    """The newest checkpoint of a run; with a continual stage, the newest generation and neighbours, too."""
    inputs = build.context(config).prepared.inputs
    newest = str(newest_checkpoint(run).relative_to(run))
    found = [
        Artefact("checkpoint", run, newest, lambda copy: _checkpoint(copy, newest, inputs), must_refuse=True)
    ]
    if config.continual is not None:
        generation, searched = (
            max((run / part).glob(f"{name}continual-????"))
            for part, name in (("bank", "generation-"), ("neighbours", ""))
        )
        found.append(Artefact("bank", generation, ".", _generation))
        found.append(Artefact("neighbours", searched, ".", lambda copy: _neighbours(copy, inputs)))
    return found


def of_corpus(root: Path, config: RunConfig, work: Path) -> list[Artefact]:
    """A prepared corpus, and search over it; lists are made in the work folder."""
    prepared = build.prepared_folder(config)
    names = ("corpus", "tokenizer", "shards", "references")
    found = [
        Artefact(name, root, f"prepared/{prepared.name}/{name}", lambda copy: _corpus(copy, config))
        for name in names
    ]
    (vectors,) = (prepared / "vectors").glob("references-*")
    found.append(Artefact("vectors", vectors, ".", _vectors))
    index = work / "index"
    if not index.exists():
        _build_index(vectors, index)
    found.append(Artefact("index", index, ".", lambda copy: _search(copy, vectors)))
    return found


def of_library(run: Path, folder: Path) -> list[Artefact]:
    """A bank that users edit, made with a run's weights (`benchmarks.small_bank`); each of its files as likely."""
    if not folder.exists():
        small_bank.build(run, folder)
    context = run_context(run.name, str(run.parent))
    shape, embedder = MemoryShape.of(context.config.model), context.embedder()
    queries = embedder.embed(["The harbour of", "a list of names", "import"])

    def read(copy: Path) -> str:
        with Library.open(copy) as library:
            ids = library.live_ids()
            codec = codecs.named(library.settings.codec, shape, library.codec_folders)
            memory = codec.decode(library.read(ids))
            cited = [library.describe(int(id)) for id in ids]
            numbers = library.document_numbers([each.document for each in cited])
            parts: list[Any] = [ids, *library.tokens(ids), library.read_vectors(ids), cited, numbers]
            parts += [
                memory.k_NLGSE.float().numpy(),
                memory.v_NLGSE.float().numpy(),
                memory.index_NLGS.numpy(),
            ]
            parts += [[library.text(int(id)) for id in ids], library.sources(), library.settings]
            return _digest(*parts, *library.search(queries, 5))

    return [Artefact("library", folder, ".", read, seen=lambda copy: bool(soundness.verify(copy)))]


def corrupt(path: Path, files: Sequence[Path], rng: random.Random) -> str:
    """Damage a file so that its bytes differ, and say how; files are hard links, so that others stay as they are."""
    content = path.read_bytes()
    others = [other for other in files if other.read_bytes() != content]
    kinds = [
        kind
        for kind in DAMAGES
        if (content or kind in ("delete", "extend", "swap")) and (others or kind != "swap")
    ]
    while True:
        kind = rng.choice(kinds)
        place, length = rng.randrange(max(1, len(content))), rng.randrange(1, 4096)
        new: bytes | None
        match kind:
            case "flip":
                new = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
            case "truncate":
                new = content[:place]
            case "zero":
                end = min(len(content), place + length)
                new = content[:place] + bytes(end - place) + content[end:]
            case "extend":
                new = content + rng.randbytes(length)
            case "swap":
                other = rng.choice(others)
                new = other.read_bytes()
                _replace(other, content)
            case _:
                new = None
        if new == content:
            continue
        path.unlink() if new is None else _replace(path, new)
        with_what = f" with {other.name}" if kind == "swap" else ""
        return f"{kind} {path.name}{with_what}"


def _replace(path: Path, content: bytes) -> None:
    work = path.with_name(path.name + ".new")
    work.write_bytes(content)
    work.replace(path)


def _checkpoint(run: Path, damaged: str, inputs: dict[str, str]) -> str:
    """What a run resumes from: it must not be the damaged one."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("train.checkpoint").addHandler(handler)
    try:
        found = Checkpoints(run, inputs=inputs).newest()
    finally:
        logging.getLogger("train.checkpoint").removeHandler(handler)
    if found is not None and found.folder == run / damaged:
        return "used"
    if Path(damaged).name not in said.getvalue():
        raise Passed("passed over without a word")
    raise Passed("passed over by name")


def _generation(folder: Path) -> str:
    generation = Generation.open(folder)
    return _digest(
        generation.ids, generation.read(generation.ids).numpy(), generation.codec, generation.settings.step
    )


def _neighbours(folder: Path, inputs: dict[str, str]) -> str:
    found = EpochNeighbours.open(folder, inputs=inputs)
    return _digest(found.training_MC, found.scores_MC, found.validation_MC, found.report)


def _corpus(root: Path, config: RunConfig) -> str:
    prepared = open_prepared(config.data, root / "prepared")
    shards, references = prepared.shards, prepared.references
    parts: list[Any] = [prepared.tokenizer.encode("The harbour of"), shards.vocab_size, shards.lengths()]
    for number in range(shards.num_documents):
        parts += [shards.tokens(number), str(shards.document(number))]
    parts += [*references.tokens(range(len(references)))]
    parts += [references.text(number) for number in range(len(references))]
    return _digest(*parts)


def _vectors(folder: Path) -> str:
    vectors = Vectors.open(folder)
    return _digest(vectors.read(np.arange(len(vectors))), vectors.embedder, vectors.segment)


def _build_index(folder: Path, index: Path) -> None:
    vectors = Vectors.open(folder)
    numbers = np.arange(len(vectors))
    asked = IndexConfig(kind=IndexKind.ivf_flat)
    build_index(
        index,
        vectors.blocks_of(numbers),
        plan_index(len(vectors), vectors.size, asked),
        queries=vectors.read(numbers[:64]),
        query_ids=numbers[:64],
        inputs={"vectors": vectors.fingerprint},
    )


def _search(index: Path, folder: Path) -> str:
    vectors = Vectors.open(folder)
    opened = open_index(index, vectors.blocks_of(np.arange(len(vectors))))
    return _digest(*opened.search(vectors.read(np.arange(len(vectors))), 5))


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(
            np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else repr(part).encode()
        )
    return digest.hexdigest()
