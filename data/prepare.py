"""Text to everything that training reads: corpus, tokenizer, token shards, references.

    <root>/<data.name>/
      corpus/  tokenizer/  shards/  references/     artefacts (`files`), each with its manifest
    <root>/.datasets/                               what `datasets` keeps; may be deleted

Each is made from those before it. One that is finished, with equal settings and inputs, is reused; one that
was being made when the process died goes on at the shard where it stopped. Shards are made by worker
processes, each on its own.

Not here: search vectors and indices (`memorybank`), which rows a stage draws (`train`).
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from data import corpus, references, shards, sources
from data.config import DataConfig, SourceConfig, check
from data.corpus import Corpus
from data.documents import Probe, Split
from data.files import MANIFEST, hash_files, is_finished, open_manifest, publishing, write_atomic
from data.references import Cutter, References
from data.shards import TokenShards
from data.tokenizer import Tokenizer, train

logger = logging.getLogger(__name__)

TOKENIZER_KIND = "tokenizer"
TOKENIZER_VERSION = 1
TOKENIZER_FILE = "tokenizer.model"

_VERSIONS = {
    corpus.KIND: corpus.VERSION,
    TOKENIZER_KIND: TOKENIZER_VERSION,
    shards.KIND: shards.VERSION,
    references.KIND: references.VERSION,
}
_COUNTED = {
    "records": "records",
    "documents": "documents",
    "probes": "probes",
    "vocab_size": "pieces in the vocabulary",
    "tokens": "tokens",
    "references": "references",
}
"""What is said of an artefact that was made: keys of its manifest's extra, in words."""
_TRAINING_BYTES = 1 << 30  # of a larger corpus the tokenizer sees every n-th document

Task = Callable[[int], None]
"""Makes one shard."""

Making = Callable[[str, Mapping[str, str], Mapping[str, Any]], AbstractContextManager[Path | None]]
"""`_making` for one config: kind, inputs and extra to the work folder of an artefact."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that was made of a corpus."""

    folder: Path
    tokenizer: Tokenizer
    shards: TokenShards
    references: References
    probes: list[Probe]

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints, which checkpoints, banks and searches are bound to."""
        return {
            "shards": self.shards.fingerprint,
            "references": self.references.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
        }


def prepare(
    config: DataConfig,
    root: Path,
    *,
    progress: Progress | None = None,
    replacing: Callable[[Path], None] = lambda _: None,
) -> Prepared:
    """Makes what is missing of a corpus's artefacts, and opens them all.

    Args:
        config: What to prepare.
        root: The folder that holds all corpora.
        progress: Where bars are shown.
        replacing: Is told of each finished artefact whose place another one will take; may refuse, by raising.

    Raises:
        ValueError: The config or the text cannot be used; the message says what to change.
    """
    check(config)
    making = partial(_making, config, root, replacing)
    _prepare_corpus(config, root, progress, making)
    _prepare_tokenizer(config, root, making)
    _prepare_shards(config, root, progress, making)
    _prepare_references(config, root, progress, making)
    return open_prepared(config, root)


@dataclass(frozen=True, slots=True)
class PreparedSizes:
    """How large a prepared corpus is.

    Attributes:
        documents: Of all splits and uses.
        tokens: Of all documents.
        references: Cut from them.
        vocab_size: Of its tokenizer.
        num_bytes: Of the four artefacts.
    """

    documents: int
    tokens: int
    references: int
    vocab_size: int
    num_bytes: int


def prepared_sizes(config: DataConfig, root: Path) -> PreparedSizes | None:
    """The sizes of a prepared corpus, by its manifests alone; None when it is not prepared with these settings."""
    folder = root / config.name
    for kind, settings in _settings(config).items():
        if not is_finished(folder / kind, kind=kind, version=_VERSIONS[kind], settings=settings):
            return None
    manifests = {
        kind: open_manifest(folder / kind, kind=kind, version=version) for kind, version in _VERSIONS.items()
    }
    return PreparedSizes(
        documents=int(manifests[corpus.KIND].extra["documents"]),
        tokens=int(manifests[shards.KIND].extra["tokens"]),
        references=int(manifests[references.KIND].extra["references"]),
        vocab_size=int(manifests[shards.KIND].extra["vocab_size"]),
        num_bytes=sum(entry.bytes for manifest in manifests.values() for entry in manifest.files.values()),
    )


def open_prepared(config: DataConfig, root: Path) -> Prepared:
    """Opens the artefacts of a corpus; the sources themselves are not needed.

    Raises:
        ValueError: Something is not prepared, was prepared with other settings, or is damaged.
    """
    folder = root / config.name
    remedy = (
        "run `memory3 prepare` with all settings of the run, or name the folder in which it and its corpus lie: "
        "--root, paths.root"
    )
    for kind, settings in _settings(config).items():
        if not is_finished(folder / kind, kind=kind, version=_VERSIONS[kind], settings=settings):
            state = "was prepared with other settings" if (folder / kind).exists() else "is not prepared"
            raise ValueError(f"{folder / kind} {state}; {remedy}")
    tokenizer = open_manifest(folder / TOKENIZER_KIND, kind=TOKENIZER_KIND, version=TOKENIZER_VERSION)
    tokenizer.mapped(TOKENIZER_FILE).read_all()  # sentencepiece reads the file by itself
    opened = References.open(folder / references.KIND)
    made_with = opened.shards.manifest.inputs["tokenizer"]
    if made_with != tokenizer.fingerprint:
        raise ValueError(
            f"{folder / shards.KIND} was made with the tokenizer {made_with}, but the one beside it is "
            f"{tokenizer.fingerprint}; {remedy}"
        )
    return Prepared(
        folder,
        Tokenizer(tokenizer.folder / TOKENIZER_FILE),
        opened.shards,
        opened,
        opened.shards.corpus.probes(),
    )


def _settings(config: DataConfig) -> dict[str, dict[str, Any]]:
    """Of each artefact, in the order of their making, the settings that decide its content."""
    if config.tokenizer_model is None:
        tokenizer: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "character_coverage": config.character_coverage,
        }
    else:
        tokenizer = {"model": Path(config.tokenizer_model).name}
    return {
        corpus.KIND: {
            "sources": [[label, _source_settings(source)] for label, source in config.sources.items()],
            "validation_fraction": config.validation_fraction,
            "test_fraction": config.test_fraction,
            "split_seed": config.split_seed,
            "documents_per_shard": config.documents_per_shard,
            "relations": list(config.relations),
        },
        TOKENIZER_KIND: tokenizer,
        shards.KIND: {},
        references.KIND: {"reference_tokens": config.reference_tokens},
    }


def _source_settings(source: SourceConfig) -> dict[str, Any]:
    """Not the path, since the content is hashed, nor the weight, which decides at training time."""
    settings = {key: value for key, value in asdict(source).items() if key not in ("path", "weight")}
    return {**settings, "kind": source.kind.value, "use": source.use.value}


@contextmanager
def _making(
    config: DataConfig,
    root: Path,
    replacing: Callable[[Path], None],
    kind: str,
    inputs: Mapping[str, str],
    extra: Mapping[str, Any],
) -> Iterator[Path | None]:
    """The work folder of an artefact, or None when it is finished."""
    folder = root / config.name / kind
    identity: dict[str, Any] = {
        "kind": kind,
        "version": _VERSIONS[kind],
        "settings": _settings(config)[kind],
        "inputs": inputs,
    }
    if is_finished(folder, **identity):
        logger.info("%s: reused %s", kind, folder)
        yield None
        return
    if (folder / MANIFEST).is_file():
        replacing(folder)
    with publishing(folder, **identity, extra=extra) as work:
        yield work
    counts = ", ".join(f"{extra[key]:,} {noun}" for key, noun in _COUNTED.items() if key in extra)
    logger.info("%s: made %s%s", kind, folder, f": {counts}" if counts else "")


def _prepare_corpus(config: DataConfig, root: Path, progress: Progress | None, making: Making) -> None:
    inputs = sources.content_fingerprints(config)
    extra: dict[str, Any] = {}
    with making(corpus.KIND, inputs, extra) as work:
        if work is None:
            return
        opened, probes = sources.open_sources(config, root / ".datasets", inputs)
        spans = [
            (place, begin, min(begin + config.documents_per_shard, source.num_records))
            for place, source in enumerate(opened)
            for begin in range(0, source.num_records, config.documents_per_shard)
        ]
        todo = [shard for shard in range(len(spans)) if not corpus.has_shard(work, shard)]
        with _bar(progress, "documents", len(spans), todo) as advance:
            _run(partial(_corpus_task, work, opened, spans), todo, config.num_workers, advance)
        labels = [opened[place].label for place, _, _ in spans]
        extra["records"] = sum(source.num_records for source in opened)
        extra["documents"] = corpus.finish(work, shards=labels, probes=probes)
        extra["probes"] = len(probes)


def _prepare_tokenizer(config: DataConfig, root: Path, making: Making) -> None:
    stored = Corpus.open(root / config.name / corpus.KIND)
    existing = None if config.tokenizer_model is None else Path(config.tokenizer_model)
    inputs = {"corpus": stored.fingerprint} if existing is None else {"model": hash_files({"": existing})[""]}
    with making(TOKENIZER_KIND, inputs, {}) as work:
        if work is None:
            return
        if existing is None:
            model = train(
                _training_texts(stored), config.vocab_size, character_coverage=config.character_coverage
            )
        else:
            model = existing.read_bytes()
        write_atomic(work / TOKENIZER_FILE, model)
        Tokenizer(work / TOKENIZER_FILE)  # refuses a model that cannot be used


def _training_texts(stored: Corpus) -> Iterator[str]:
    """Texts of the train split, of a large corpus every n-th."""
    numbers = stored.select(split=Split.train)
    step = 1 + int(stored.table["bytes"][numbers].sum()) // _TRAINING_BYTES
    return (stored.document(int(number)).training_text for number in numbers[::step])


def _prepare_shards(config: DataConfig, root: Path, progress: Progress | None, making: Making) -> None:
    folder = root / config.name
    stored = Corpus.open(folder / corpus.KIND)
    tokenizer = open_manifest(folder / TOKENIZER_KIND, kind=TOKENIZER_KIND, version=TOKENIZER_VERSION)
    inputs = {"corpus": stored.fingerprint, "tokenizer": tokenizer.fingerprint}
    extra: dict[str, Any] = {}
    with making(shards.KIND, inputs, extra) as work:
        if work is None:
            return
        num_shards = stored.num_shards
        todo = [shard for shard in range(num_shards) if not shards.has_shard(work, shard)]
        with _bar(progress, "tokens", num_shards, todo) as advance:
            _run(partial(_shards_task, work, folder), todo, config.num_workers, advance)
        extra["vocab_size"] = Tokenizer(tokenizer.folder / TOKENIZER_FILE).vocab_size
        extra["tokens"] = shards.finish(work, num_shards)


def _prepare_references(config: DataConfig, root: Path, progress: Progress | None, making: Making) -> None:
    folder = root / config.name
    opened = TokenShards.open(folder / shards.KIND)
    tokenizer = Tokenizer(folder / TOKENIZER_KIND / TOKENIZER_FILE)
    extra: dict[str, Any] = {"pad_id": tokenizer.pad_id, "newline_id": tokenizer.newline_id}
    with making(references.KIND, {"shards": opened.fingerprint}, extra) as work:
        if work is None:
            return
        num_shards = opened.corpus.num_shards
        todo = [shard for shard in range(num_shards) if not references.has_shard(work, shard)]
        task = partial(_references_task, work, folder, config.reference_tokens)
        with _bar(progress, "references", num_shards, todo) as advance:
            _run(task, todo, config.num_workers, advance)
        extra["references"] = references.finish(work, num_shards)


def _corpus_task(work: Path, opened: Sequence[sources.Source], spans: Sequence[tuple[int, int, int]]) -> Task:
    def make(shard: int) -> None:
        place, begin, end = spans[shard]
        corpus.write_shard(work, shard, opened[place].documents(begin, end))

    return make


def _shards_task(work: Path, folder: Path) -> Task:
    stored = Corpus.open(folder / corpus.KIND)
    tokenizer = Tokenizer(folder / TOKENIZER_KIND / TOKENIZER_FILE)
    return lambda shard: shards.write_shard(work, shard, stored.documents(shard), tokenizer)


def _references_task(work: Path, folder: Path, reference_tokens: int) -> Task:
    opened = TokenShards.open(folder / shards.KIND)
    cutter = Cutter(Tokenizer(folder / TOKENIZER_KIND / TOKENIZER_FILE), reference_tokens)
    return lambda shard: references.write_shard(work, shard, opened, cutter)


@contextmanager
def _bar(
    progress: Progress | None, label: str, num_shards: int, todo: Sequence[int]
) -> Iterator[Callable[[], None]]:
    """What to call after each shard, so that its bar advances."""
    done = num_shards - len(todo)
    if done:
        logger.info("%s: going on after %d of %d shards", label, done, num_shards)
    if progress is None:
        yield lambda: None
    else:
        bar = progress.add_task(label, total=num_shards, completed=done)
        yield lambda: progress.advance(bar)


def _run(
    factory: Callable[[], Task], todo: Sequence[int], num_workers: int, advance: Callable[[], None]
) -> None:
    """Makes shards with the task that `factory()` sets up, here or in worker processes."""
    workers = min(num_workers, len(todo) // 2)  # one shard is not worth the start of a process
    if workers <= 1:
        task = factory()
        for shard in todo:
            task(shard)
            advance()
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(factory,))
    try:
        for future in as_completed([pool.submit(_work, shard) for shard in todo]):
            future.result()
            advance()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, perhaps for want of memory; run it again, which goes on where it "
            "stopped, with data.num_workers or data.documents_per_shard lower"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_task: Task | None = None  # of a worker process


def _start_worker(factory: Callable[[], Task]) -> None:
    global _task  # noqa: PLW0603
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # A worker holds both ends of its queue, and would wait forever for a parent that was killed.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _task = factory()


def _work(shard: int) -> None:
    assert _task is not None
    _task(shard)
