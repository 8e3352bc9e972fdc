"""Completing prompts with memory, beside completing them without: the paper's protocol (section 7.4).

A batch of prompts of two chunks, and as many new tokens: every row retrieves three times. References are found by exact
search with query vectors that were computed before (embedding is no part of it), other ones in every round, so that no
record is read twice: records come from a generation's files, which the operating system holds in memory and whose
checksums were compared once. Beside it: records from the cache in RAM; and the model without memory that reads as many
references as text before each prompt, found by one search.

Weights, tokens, search vectors and the memories' numbers are random; all of them have the sizes of real ones.
Not here: whether what is generated is right (tests/model/test_generate.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from data.references import References
from data.tokenizer import Tokenizer
from launch.bench_corpus import REFERENCES_PER_DOCUMENT, write_corpus
from launch.bench_step import generation_settings, where_time_goes
from launch.build import training_dtype
from launch.config import RunConfig
from launch.timing import Bench, Conditions, Figure, Side, Times, interleaved, rate, ratio
from memorybank import codecs
from memorybank.bank import BankReader, Records
from memorybank.cache import CachedRecords
from memorybank.config import CodecKind
from memorybank.cost import EMBEDDERS
from memorybank.index_store import BankIndex
from memorybank.record import MemoryShape
from memorybank.retriever import RetrievedMemory, Retriever
from memorybank.store import Generation
from memorybank.writer import compile_generation
from model.config import ModelConfig
from model.generate import generate
from model.memory import ExplicitMemory
from model.transformer import Memory3LM

DEFAULTS = ["model=small", "model.prefix_ids=[1,2,3,4]"]

ROWS = 32
REFERENCES = 100_000
_OF_WITHOUT = 0.90
_CHUNKS = (2, 1)
"""Of a row, which search at once: those of its prompt, then the only one of its own that is read."""

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


def measure(config: RunConfig, conditions: Conditions) -> Bench:
    """Time a batch of completions, with memory and without, and what memory adds."""
    model_config, device, dtype = config.model, conditions.device, training_dtype(config)
    torch.manual_seed(0)
    model = Memory3LM(model_config).to(dtype).to(device).eval()
    tokens = 2 * model_config.chunk_tokens
    prompts = torch.randint(model_config.vocab_size, (ROWS, tokens)).tolist()
    fresh = config.retrieval.fresh
    text = torch.randint(model_config.vocab_size, (ROWS, fresh * model_config.reference_tokens)).tolist()
    with TemporaryDirectory(prefix="memory3-bench-") as name:
        bank = _Bank.made(Path(name), config, dtype, runs=conditions.rounds + 2)
        cache = CachedRecords(bank.generation, max_bytes=1 << 31)
        codec = codecs.of_kind(CodecKind.model, MemoryShape.of(model_config), dtype)
        runs = count()

        def complete(rows: Sequence[Sequence[int]], memory: RetrievedMemory | None = None) -> None:
            generate(model, rows, max_new_tokens=tokens, batch=ROWS, memory=memory)

        def reading(records: Records, run: int) -> RetrievedMemory:
            reader = BankReader(records, codec)
            return RetrievedMemory(bank.retriever(run), cast(Tokenizer, _Texts()), reader, device=device)

        def as_text() -> None:
            bank.retriever(0).search([""] * ROWS)
            complete([[*before, *prompt] for before, prompt in zip(text, prompts, strict=True)])

        def search() -> None:
            retriever = bank.retriever(0)
            for chunks in _CHUNKS:
                retriever.search([""] * (ROWS * chunks))

        def read() -> None:
            reader = BankReader(bank.generation, codec)
            for ids_nk in bank.found(0):
                reader.batch(ids_nk[:, None], device)

        sides: dict[str, Side] = {
            "without memory": lambda: complete(prompts),
            "with memory": lambda: complete(prompts, reading(bank.generation, next(runs))),
            "with memory, records in the cache": lambda: complete(prompts, reading(cache, 0)),
            "references as text": as_text,
            "its searches alone": search,
            "its records alone": read,
        }
        times = interleaved(sides, conditions)
        profiles = [where_time_goes(name, sides[name]) for name in ("without memory", "with memory")]
    return Bench(
        shape={
            "rows": f"{ROWS} of {tokens} tokens in and {tokens} out",
            "retrievals": f"{sum(_CHUNKS)} a row of {fresh} of {REFERENCES:,} references, exact",
            "type": str(dtype).removeprefix("torch."),
            "record": f"{codec.record_bytes:,} bytes",
        },
        times=list(times.values()),
        figures=figures(list(times.values()), made=ROWS * tokens, by_cpu=device.type == "cpu"),
        findings=profiles,
    )


def figures(times: Sequence[Times], *, made: int, by_cpu: bool) -> list[Figure]:
    """Return what the times of the sides tell.

    Args:
        times: Of all sides, in their order.
        made: Tokens that a run generates.
        by_cpu: Judge CPU times: on a CPU no side waits for anything but other processes.
    """
    without, with_memory, cached, text, searches, records = times
    compare = partial(ratio, by_cpu=by_cpu)
    return [
        compare(
            "tokens/s with memory / without",
            without,
            with_memory,
            target=_OF_WITHOUT,
            at_least=True,
            note="searches, records and reading included; embedding not; on a CPU by its time, since no side waits",
        ),
        compare("tokens/s with memory, records in the cache / without", without, cached),
        compare("tokens/s with references as text / without", without, text),
        rate("without memory", without, amount=made, unit="tokens/s"),
        rate("with memory", with_memory, amount=made, unit="tokens/s"),
        rate("references as text", text, amount=made, unit="tokens/s"),
        compare("its searches alone / without memory", searches, without),
        compare("its records alone / without memory", records, without),
    ]


class _Texts:
    """In the place of a tokenizer: what is searched with was embedded before."""

    def decode(self, ids: Sequence[int]) -> str:
        return ""


class _Queries:
    """An embedder that knows its vectors, in the order in which they will be asked for."""

    name = "computed before"

    def __init__(self, vectors: Iterator[Vectors], size: int) -> None:
        self._vectors = vectors
        self.size = size

    def embed(self, texts: Sequence[str]) -> Vectors:
        return np.stack([next(self._vectors) for _ in texts])


@dataclass(frozen=True, slots=True)
class _Bank:
    """References with random vectors, and records of those that will be found."""

    references: References
    index: BankIndex
    generation: Generation
    queries: Vectors
    """Of every run, one after the other."""
    found_ids: Ids
    """What they find."""
    k: int
    candidates: int

    @classmethod
    def made(cls, folder: Path, config: RunConfig, dtype: torch.dtype, *, runs: int) -> "_Bank":
        model, size = config.model, EMBEDDERS["minilm"].vector_size
        rng = np.random.default_rng(0)
        references = write_corpus(folder, model, documents=REFERENCES // REFERENCES_PER_DOCUMENT)
        vectors = _unit(rng.standard_normal((REFERENCES, size), np.float32))
        index = BankIndex([(np.arange(REFERENCES), vectors)])
        queries = _unit(rng.standard_normal((runs * ROWS * sum(_CHUNKS), size), np.float32))
        k, candidates = config.retrieval.fresh, config.retrieval.candidates
        found = index.search(queries, k)[1]
        compile_generation(
            lambda tokens_NR, *_: _memories(len(tokens_NR), model, dtype),
            references,
            np.unique(found),
            codecs.of_kind(CodecKind.model, MemoryShape.of(model), dtype),
            folder / "generation-random",
            settings=generation_settings(model, references),
        )
        generation = Generation.open(folder / "generation-random")
        generation.read(generation.ids)  # compares all checksums
        return cls(references, index, generation, queries, found, k, candidates)

    def retriever(self, run: int) -> Retriever:
        """What searches with the vectors of a run."""
        embedder = _Queries(iter(self.queries[_of(run)]), self.queries.shape[1])
        return Retriever(embedder, self.index, self.references, k=self.k, candidates=self.candidates)

    def found(self, run: int) -> list[Ids]:
        """The references that each search of a run finds."""
        return np.split(self.found_ids[_of(run)], np.cumsum([ROWS * chunks for chunks in _CHUNKS])[:-1])


def _of(run: int) -> slice:
    """Where the searches of a run stand."""
    each = ROWS * sum(_CHUNKS)
    return slice(run * each, (run + 1) * each)


def _memories(number: int, model: ModelConfig, dtype: torch.dtype) -> ExplicitMemory:
    kept = (number, model.num_memory_layers, model.num_kv_heads, model.tokens_kept)
    k, v = (torch.randn(*kept, model.head_size).to(dtype) for _ in "kv")
    return ExplicitMemory(k, v, torch.arange(model.tokens_kept).expand(kept))


def _unit(vectors: Vectors) -> Vectors:
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
