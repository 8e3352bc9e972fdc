"""Real references, embedder and model, small: what the tests of memorybank/ and of its users share."""

import atexit
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from data.config import DataConfig, SourceConfig, SourceKind
from data.factbook import load
from data.files import CHECKSUM, fingerprint
from data.prepare import Prepared, prepare
from data.references import References
from data.tokenizer import Tokenizer
from memorybank import codecs, quantizer
from memorybank.codec import Codec
from memorybank.config import CodecConfig, CodecKind
from memorybank.edits import Compiler, Documents
from memorybank.embedder import StaticEmbedder
from memorybank.index import ExactIndex
from memorybank.record import MemoryShape
from memorybank.segment import DocumentCutter
from memorybank.store import GenerationSettings
from memorybank.team import Team
from model.config import ModelConfig
from model.transformer import Memory3LM

VOCABULARY = 1024


@cache
def prepared() -> Prepared:
    """Return 24 raw country sections of the factbook with everything made of them."""
    folder = TemporaryDirectory(prefix="memorybank-")
    atexit.register(folder.cleanup)
    raw = [document for document in load().documents if document.use.refers]
    lines = [
        json.dumps({"id": document.id, "title": document.title, "text": document.text})
        for document in raw[:: len(raw) // 24][:24]
    ]
    file = Path(folder.name) / "sections.jsonl"
    file.write_text("\n".join(lines))
    source = SourceConfig(kind=SourceKind.jsonl, path=str(file), title_field="title", id_field="id")
    config = DataConfig(name="sections", sources={"sections": source}, vocab_size=VOCABULARY, num_workers=1)
    return prepare(config, Path(folder.name))


def references() -> References:
    """Return the references of `prepared`, title lines included."""
    return prepared().references


def tokenizer() -> Tokenizer:
    """Return the tokenizer of `prepared`."""
    return prepared().tokenizer


@cache
def embedder() -> StaticEmbedder:
    """Return the static embedder."""
    return StaticEmbedder()


def index_of(references: References, ids: np.ndarray | None = None) -> ExactIndex:
    """Return an index over references (all, or those given), by their texts."""
    ids = np.arange(len(references)) if ids is None else ids
    index = ExactIndex(embedder().size)
    index.add(ids, embedder().embed([references.text(int(id)) for id in ids]))
    return index


def model_config() -> ModelConfig:
    """Return a model of 4 layers, 2 of them memory layers, for `tokenizer`."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=4,
        width=128,
        num_heads=4,
        num_kv_heads=2,
        head_size=64,
        ffn_width=128,
        num_memory_layers=2,
        row_tokens=256,
        prefix_ids=tokenizer().prefix_ids,
    )


def model(dtype: torch.dtype = torch.bfloat16, *, seed: int = 0) -> Memory3LM:
    """Return an untrained model of `model_config`."""
    torch.manual_seed(seed)
    return Memory3LM(model_config()).to(dtype).eval()


def codec(dtype: torch.dtype = torch.bfloat16) -> Codec:
    """Return the codec of `model`'s memories."""
    return codecs.of_kind(CodecKind.model, MemoryShape.of(model_config()), dtype)


def settings(**changes: object) -> GenerationSettings:
    """Return what a generation of `model` is made from, with changes."""
    stated = {
        "layout": model_config().layout(),
        "weights": "w0",
        "lineage": "run",
        "step": 7,
        "references": "r0",
        "tokenizer": "t0",
    }
    return GenerationSettings(**(stated | changes))


@dataclass(slots=True)
class Thread:
    """A rank that is a thread of this process (`memorybank.team`)."""

    rank: int
    world_size: int
    meeting: threading.Barrier
    told: list[Any]

    def barrier(self) -> None:
        self.meeting.wait(120)

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            self.told[:] = [value]
        self.barrier()
        (found,) = self.told
        self.barrier()
        return found


def on_ranks(world_size: int, function: Callable[[Team], None]) -> None:
    """Call ``function(team)`` in one thread per rank; the first error is raised here."""
    barrier, told = threading.Barrier(world_size), list[Any]()
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            function(Thread(rank, world_size, barrier, told))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def late_on_rank_1(monkeypatch: pytest.MonkeyPatch, place: object, *names: str) -> None:
    """Let the host of rank 1 (`on_ranks`) see nothing when it looks with these functions of a module or class."""

    def hidden(real: Callable[..., bool]) -> Callable[..., bool]:
        return lambda *given, **named: threading.current_thread().name != "rank 1" and real(*given, **named)

    for name in names:
        monkeypatch.setattr(place, name, hidden(getattr(place, name)))


def compiler(*, seed: int = 0, **changes: object) -> Compiler:
    """Return what compiles a library with `model(seed=seed)`, in small shards."""
    network = model(seed=seed)
    given = {
        "encode": network.encode,
        "codec": CodecConfig(),
        "row_tokens": model_config().row_tokens,
        "shape": MemoryShape.of(model_config()),
        "dtype": torch.bfloat16,
        "embedder": embedder(),
        "cutter": DocumentCutter(tokenizer(), references().reference_tokens),
        "layout": model_config().layout(),
        "weights": f"w{seed}",
        "lineage": "run",
        "step": seed,
        "batch": 4,
        "records_per_shard": 8,
    }
    return Compiler(**(given | changes))  # type: ignore[arg-type]


def texts(first: int, last: int, **changes: str) -> Documents:
    """Return raw sections of the factbook on their way into a library, with fields changed."""
    cutter = DocumentCutter(tokenizer(), references().reference_tokens)
    corpus = references().shards.corpus
    documents = [replace(corpus.document(number), **changes) for number in range(first, last)]  # type: ignore[arg-type]
    return Documents({"origin": fingerprint([first, last, changes])}, lambda: map(cutter.cut, documents))


def hashes(folder: Path) -> dict[str, str]:
    """What every file below a folder holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rewritten(manifest: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change a manifest and give it the fingerprint that its content now has, as older ones without a checksum."""
    stored = json.loads(manifest.read_text())
    stored.pop(CHECKSUM, None)
    change(stored)
    named = {key: stored[key] for key in ("kind", "version", "settings", "inputs")}
    stored["fingerprint"] = fingerprint(
        {**named, "files": {name: entry["sha256"] for name, entry in stored["files"].items()}}
    )
    manifest.write_text(json.dumps(stored))


@contextmanager
def few_rounds() -> Iterator[None]:
    """Quantisers are trained with few rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer, "_ROUNDS", 2)
        patch.setattr(quantizer, "_OPQ_ROUNDS", 1)
        yield
