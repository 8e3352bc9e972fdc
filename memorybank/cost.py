"""What a bank costs in bytes and look-ups, beside what the paper counts: pure arithmetic on sizes, no torch.

The paper's model (section 1.3, appendix A) counts the operations of writing and reading knowledge, and
`model.flops.knowledge_cost` holds it. Here stands what is stored, and what the paper leaves out (its Remark 9):
the bytes that move, the embedding of queries, and the search.

Invariants: a memory's bytes are those of its keys and values, as in the paper; the positions of its kept tokens,
which our records hold too (`record`), are stated apart. Every figure is computed, none measured: a time is bytes
or operations divided by the rate that `Hardware` states, so nothing overlaps and nothing waits.

Not here: operations of the model (`model.flops`), the codecs themselves (`codec`), the table and the picture
(`launch.cost`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log2, sqrt

from memorybank.config import STAGES, VECTOR_SIZES, EmbedderKind
from memorybank.record import MemoryShape
from model.config import ModelConfig
from model.flops import knowledge_cost, text_token_flops


def _code_bytes(stages: Sequence[tuple[int, int]], size: int) -> int:
    """Return the bytes of a quantiser's code, whole bytes for each stage; the vector's size plays no part."""
    return sum(-(-parts * bits // 8) for parts, bits in stages)


CODECS: Mapping[str, Callable[[int], int]] = {
    "bfloat16": lambda size: 2 * size,
    "float16": lambda size: 2 * size,
    "float8": lambda size: size,
    "int8": lambda size: size + 2,
    "int4": lambda size: -(-size // 2) + 2,
} | {kind.name: partial(_code_bytes, stages) for kind, stages in STAGES.items()}
"""Bytes of one vector of so many numbers, as codec.py and quantizer.py write it (a test compares)."""


@dataclass(frozen=True, slots=True)
class EmbedderSize:
    """What a query costs an embedder: numbers of a search vector, and weights that every token meets."""

    vector_size: int
    weights: int


EMBEDDERS: Mapping[str, EmbedderSize] = {
    "static": EmbedderSize(VECTOR_SIZES[EmbedderKind.static], 0),
    "minilm": EmbedderSize(VECTOR_SIZES[EmbedderKind.minilm], 6 * 12 * 384**2),
    "bge-m3": EmbedderSize(1024, 24 * 12 * 1024**2),
}
"""wordllama's table, all-MiniLM-L6-v2, and BGE-M3, the paper's: layers x 12 x width^2 each."""


_ID_BYTES = 8
_CHECKSUM_BYTES = 12
"""A checksum's digits in a manifest."""
_MANIFEST_BYTES = 1024
"""The rest of it, and the header of the ids."""

PROBES = 64
"""Lists of an inverted file that a query visits."""


def memory_bytes(config: ModelConfig, codec: str = "bfloat16") -> int:
    """Return the bytes of one memory's keys and values (paper: 450,560 in bfloat16, 39,424 with pq).

    Raises:
        ValueError: The codec is unknown.
    """
    if codec not in CODECS:
        raise ValueError(f"codec={codec} is unknown; choose one of {', '.join(CODECS)}")
    shape = MemoryShape.of(config)
    return 2 * shape.num_kept * CODECS[codec](shape.head_size)


def position_bytes(config: ModelConfig) -> int:
    """Return the bytes by which our records name a memory's kept tokens, which the paper does not count."""
    return MemoryShape.of(config).record_bytes(0)


def generation_bytes(config: ModelConfig, references: int, *, vector_bytes: int) -> int:
    """Return the bytes of a generation's files: records, ids, and a manifest with a checksum for every MiB.

    Args:
        config: Sizes.
        references: That have a record.
        vector_bytes: Of a key, and of a value.
    """
    files = references * (MemoryShape.of(config).record_bytes(vector_bytes) + _ID_BYTES)
    return files + _MANIFEST_BYTES + files * _CHECKSUM_BYTES // 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """What a reference's keys and values take after a step of sparsification, or in a codec."""

    name: str
    bytes_per_reference: int


def sparsification(config: ModelConfig) -> list[Stored]:
    """Return the steps from all keys and values to a memory, bfloat16 (paper: 2 x 5 x 16 = 160 times less)."""
    numbers = 2 * config.reference_tokens * config.head_size
    everything = numbers * config.num_layers * config.num_heads
    in_layers = numbers * config.num_memory_layers * config.num_heads
    in_heads = numbers * config.num_memory_layers * config.num_kv_heads
    bytes_per_number = 2
    return [
        Stored("all layers, heads and tokens", everything * bytes_per_number),
        Stored(f"{config.num_memory_layers} of {config.num_layers} layers", in_layers * bytes_per_number),
        Stored(f"{config.num_kv_heads} of {config.num_heads} heads", in_heads * bytes_per_number),
        Stored(f"{config.tokens_kept} of {config.reference_tokens} tokens", memory_bytes(config)),
    ]


def in_codecs(config: ModelConfig) -> list[Stored]:
    """Return what a memory takes in each codec."""
    return [Stored(codec, memory_bytes(config, codec)) for codec in CODECS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Rates by which bytes and operations become seconds: sustained ones, to be stated by whoever asks."""

    disk_gb_per_second: float = 3.0
    """Where the bank lies; one NVMe drive."""
    bus_gb_per_second: float = 25.0
    """Host to device; PCIe 4 x16."""
    memory_gb_per_second: float = 200.0
    """Host memory, which a search reads."""
    device_tflops: float = 150.0
    """Sustained TFLOP/s of the device that runs model and embedder."""

    def check(self) -> None:
        """Raise ValueError, naming the option, when a rate is not above 0."""
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0; set a positive rate")


@dataclass(frozen=True, slots=True)
class Work:
    """Something that is done once per chunk.

    Attributes:
        name: What is done.
        flops: Its operations.
        bytes: The bytes that move for it.
        seconds: How long it takes by itself.
    """

    name: str
    flops: float
    bytes: float
    seconds: float


def chunk_work(
    config: ModelConfig,
    *,
    references: int,
    codec: str,
    embedder: str,
    fresh: int,
    hardware: Hardware,
) -> list[Work]:
    """Return what one chunk of generated text costs, part by part: compute, memory traffic, search.

    The worst case: no reference is met twice, nothing is cached, and each query searches alone (a batch of
    queries shares what an exact search reads). The inverted file has `default_lists` lists of uncompressed
    vectors and a flat coarse quantiser, of which a query visits `PROBES`.

    Args:
        config: Sizes.
        references: References of the bank.
        codec: One of `CODECS`.
        embedder: One of `EMBEDDERS`.
        fresh: Memories that a chunk reads.
        hardware: Rates.

    Raises:
        ValueError: Codec or embedder is unknown.
    """
    if embedder not in EMBEDDERS:
        raise ValueError(f"embedder={embedder} is unknown; choose one of {', '.join(EMBEDDERS)}")
    size = EMBEDDERS[embedder]
    memories = fresh * (memory_bytes(config, codec) + position_bytes(config))
    lists = default_lists(references)
    visited = lists + min(PROBES, lists) * references / lists

    def computed(name: str, flops: float) -> Work:
        return Work(name, flops, 0.0, flops / (hardware.device_tflops * 1e12))

    def moved(name: str, gb_per_second: float) -> Work:
        return Work(name, 0.0, memories, memories / (gb_per_second * 1e9))

    def searched(name: str, vectors: float) -> Work:
        num_bytes = 4.0 * vectors * size.vector_size
        seconds = num_bytes / (hardware.memory_gb_per_second * 1e9)  # two operations a number: bytes decide
        return Work(name, 2.0 * vectors * size.vector_size, num_bytes, seconds)

    return [
        computed(
            "the model on the chunk as a prompt", config.chunk_tokens * text_token_flops(config).causal / 3
        ),
        computed(f"attending to {fresh} memories", fresh * knowledge_cost(config).explicit_read),
        moved(f"{fresh} memories from disk", hardware.disk_gb_per_second),
        moved(f"{fresh} memories to the device", hardware.bus_gb_per_second),
        computed("embedding the query", 2.0 * size.weights * config.chunk_tokens),
        searched("search, exact", references),
        searched(f"search, {min(PROBES, lists)} of {lists:,} lists", visited),
    ]


def default_lists(references: int) -> int:
    """Return the lists of an inverted file over so many references: a power of two near 16 sqrt(n)."""
    return 2 ** round(log2(16 * sqrt(references))) if references > 256 else 1


@dataclass(frozen=True, slots=True)
class Writing:
    """What compiling a whole bank costs.

    Attributes:
        flops: Operations of the model.
        compute_seconds: On the device.
        bytes: Of all records, positions included.
        disk_seconds: Writing them.
    """

    flops: float
    compute_seconds: float
    bytes: int
    disk_seconds: float


def writing(config: ModelConfig, *, references: int, codec: str, hardware: Hardware) -> Writing:
    """Return what compiling so many references costs; every update of the weights asks for it anew."""
    flops = references * knowledge_cost(config).explicit_write
    num_bytes = references * (memory_bytes(config, codec) + position_bytes(config))
    return Writing(
        flops,
        flops / (hardware.device_tflops * 1e12),
        num_bytes,
        num_bytes / (hardware.disk_gb_per_second * 1e9),
    )
