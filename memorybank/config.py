"""What a user may choose about retrieval and the bank's bytes: plain dataclasses, which are also the Hydra schema.

Invariants: nothing heavy is imported here (``--help`` reads this module), and every cross-field rule
lives in `check_embedder`, `check_retrieval` and `check_codec`.

Not here: the shape of a memory (model/config.py) and the schedule of generations (train/config.py).
"""

from dataclasses import dataclass, field
from enum import Enum


class EmbedderKind(Enum):
    """Where search vectors come from."""

    static = "static"
    minilm = "minilm"
    folder = "folder"


class QueryMode(Enum):
    """Which chunk's text searches for a chunk: its own (the paper), or the one before it."""

    own = "own"
    previous = "previous"


class CodecKind(Enum):
    """How keys and values are kept in the bank; bytes for a vector of E numbers, E = 80 in the paper."""

    model = "model"
    """The type the model computes in, 2 E bytes in bfloat16: memories are read as they were written."""
    float16 = "float16"
    """2 E bytes."""
    float8 = "float8"
    """E bytes: float8_e4m3fn, without scale."""
    int8 = "int8"
    """E + 2 bytes: one scale per vector."""
    int4 = "int4"
    """E / 2 + 2 bytes: one scale per vector."""
    pq16x8 = "pq16x8"
    """16 bytes: a product quantiser that 256 vectors can train."""
    residual2x8_pq8x8 = "residual2x8_pq8x8"
    """10 bytes: two stages; 256 vectors can train it."""
    residual2x14_pq8x10 = "residual2x14_pq8x10"
    """14 bytes: the paper's quantiser, which needs 16,384 vectors, and should get 638,976."""


STAGES: dict[CodecKind, list[tuple[int, int]]] = {
    CodecKind.pq16x8: [(16, 8)],
    CodecKind.residual2x8_pq8x8: [(2, 8), (8, 8)],
    CodecKind.residual2x14_pq8x10: [(2, 14), (8, 10)],
}
"""The stages of the quantisers: into how many parts a vector is cut, and the bits of a part's code."""


@dataclass(kw_only=True, slots=True)
class CodecConfig:
    """How memories become bytes."""

    kind: CodecKind = CodecKind.model
    """model, float16, float8, int8, int4, pq16x8, residual2x8_pq8x8, or residual2x14_pq8x10 (the paper)."""
    separate: bool = False
    """Whether keys and values have a quantiser each, instead of one for both (the paper, it seems)."""


@dataclass(kw_only=True, slots=True)
class EmbedderConfig:
    """The network, or table, that turns text into search vectors."""

    kind: EmbedderKind = EmbedderKind.minilm
    """static: wordllama's table (tests); minilm: all-MiniLM-L6-v2; folder: a sentence-transformers folder."""
    path: str | None = None
    """Folder of the weights, for kind `folder` only."""
    batch_size: int = 64
    """Texts embedded at once."""


@dataclass(kw_only=True, slots=True)
class RetrievalConfig:
    """How references are found, and which of them may be read."""

    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    """Text to search vectors."""
    candidates: int = 64
    """References searched per chunk before filtering."""
    fresh: int = 5
    """References that a chunk reads at inference, all found by one query."""
    window: int = 5
    """Chunks whose references a chunk reads in training, one reference each."""
    overlap_training: float = 0.9
    """A reference is refused in training when more than this share of it stands, in order, in the row."""
    overlap_evaluation: float = 2 / 3
    """The same share in evaluation."""
    allow_own_document: bool = False
    """Whether a row may read references of a document of which it holds a token (the paper allows it)."""


def check_embedder(config: EmbedderConfig, *, key: str = "retrieval.embedder") -> None:
    """Raise ValueError, naming the key below `key`, when the settings cannot be used."""
    if config.kind is EmbedderKind.folder and not config.path:
        raise ValueError(
            f"{key}.path is missing: set it to a sentence-transformers folder, or {key}.kind=minilm"
        )
    if config.kind is not EmbedderKind.folder and config.path:
        raise ValueError(
            f"{key}.path={config.path} is not read by {key}.kind={config.kind.name}: set {key}.kind=folder"
        )
    if config.batch_size < 1:
        raise ValueError(f"{key}.batch_size={config.batch_size}: set it to 1 or more")


def check_retrieval(config: RetrievalConfig, *, key: str = "retrieval") -> None:
    """Raise ValueError, naming the key below `key`, when the settings cannot be used."""
    check_embedder(config.embedder, key=f"{key}.embedder")
    for name in ("fresh", "window"):
        if getattr(config, name) < 1:
            raise ValueError(f"{key}.{name}={getattr(config, name)}: set it to 1 or more")
    if config.candidates < config.fresh:
        raise ValueError(
            f"{key}.candidates={config.candidates} is less than {key}.fresh={config.fresh}: "
            f"set {key}.candidates to {config.fresh} or more (64 leaves room for refusals)"
        )
    for name in ("overlap_training", "overlap_evaluation"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{key}.{name}={getattr(config, name)}: set it to a share between 0 and 1")


def check_codec(config: CodecConfig, head_size: int, *, key: str = "codec") -> None:
    """Raise ValueError, naming the key below `key`, when vectors of `head_size` numbers cannot be kept so."""
    if config.kind not in STAGES:
        if config.separate:
            raise ValueError(
                f"{key}.separate=true, but {key}.kind={config.kind.name} learns nothing from keys or values: "
                f"set {key}.separate=false, or {key}.kind to {', '.join(kind.name for kind in STAGES)}"
            )
        return
    parts = max(parts for parts, _ in STAGES[config.kind])
    if head_size % parts:
        raise ValueError(
            f"{key}.kind={config.kind.name} cuts vectors into {parts} parts, and model.head_size={head_size} is "
            f"no multiple of {parts}: set {key}.kind=int8 or int4"
        )
