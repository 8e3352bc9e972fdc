"""What a user may choose about retrieval and the bank's bytes: plain dataclasses, which are also the Hydra schema.

Invariants: nothing heavy is imported here (``--help`` reads this module), and every cross-field rule
lives in `check_embedder`, `check_index`, `check_retrieval`, `check_codec` and `check_bank`.

Not here: the shape of a memory (model/config.py) and the schedule of generations (train/config.py).
"""

import json
import logging
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from model.config import ModelConfig

log = logging.getLogger(__name__)


class EmbedderKind(Enum):
    """Where search vectors come from."""

    static = "static"
    minilm = "minilm"
    folder = "folder"


VECTOR_SIZES = {EmbedderKind.static: 256, EmbedderKind.minilm: 384}
"""Numbers of a search vector, of the embedders that are known by name."""


class QueryMode(Enum):
    """Which chunk's text searches for a chunk: its own (the paper), or the one before it."""

    own = "own"
    previous = "previous"


class IndexKind(Enum):
    """How references are searched; auto chooses by their number."""

    auto = "auto"
    exact = "exact"
    ivf_flat = "ivf_flat"
    ivf_pq = "ivf_pq"


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


class BankContext(Enum):
    """What a reference sees of its document when it is encoded."""

    reference = "reference"
    document = "document"


@dataclass(kw_only=True, slots=True)
class BankConfig:
    """How the bank's memories are made."""

    context: BankContext = BankContext.reference
    """reference: each by itself, as in the paper's runs; document: with its document's text before it in sight."""
    cache_mib: int = 256
    """RAM of each rank for the records that its training steps read last; 0 keeps none. Decides nothing but speed."""
    cold_gib: float = 64.0
    """Disk for memories that commands encode when they first read them (cold start); what is beyond is not kept."""

    def window_tokens(self, model: ModelConfig) -> int | None:
        """Tokens of a document that are encoded at once: those of a row; None = each reference by itself."""
        return model.row_tokens if self.context is BankContext.document else None


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
class IndexConfig:
    """The index over the references' search vectors."""

    kind: IndexKind = IndexKind.auto
    """auto: exact up to 250,000 references, ivf_flat (whole vectors in lists) to 1e7, ivf_pq (codes) beyond."""
    recall: float = 0.95
    """Share of the exact five best that the index has to find; it reads as many lists as that takes."""
    code_bytes: int | None = None
    """Bytes of a vector in kind `ivf_pq`; the default holds four of its numbers in each."""


@dataclass(kw_only=True, slots=True)
class RetrievalConfig:
    """How references are found, and which of them may be read."""

    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    """Text to search vectors."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """Search vectors to references."""
    candidates: int = 64
    """References searched per chunk before filtering; more for one of a long text, whose nearest are its own."""
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


def vector_size(config: EmbedderConfig) -> int | None:
    """Return the numbers of a search vector; None when only the weights of a folder that is not here would tell."""
    if config.kind is not EmbedderKind.folder:
        return VECTOR_SIZES[config.kind]
    described = Path(config.path or "") / "config.json"
    if not described.is_file():
        return None
    size = json.loads(described.read_text(encoding="utf-8")).get("hidden_size")
    return size if isinstance(size, int) else None


def check_index(config: IndexConfig, size: int | None, *, key: str = "retrieval.index") -> None:
    """Raise ValueError, naming the key below `key`, when the settings cannot be used; warn of a low recall.

    Args:
        config: the settings.
        size: numbers of a search vector; None where they are not known yet.
        key: what messages begin with.
    """
    if not 0 < config.recall <= 1:
        raise ValueError(f"{key}.recall={config.recall}: set it to a share between 0 and 1 (0.95)")
    if config.recall < 0.95:
        log.warning(
            "%s.recall=%s is below 0.95: references that an exact search finds will be missed",
            key,
            config.recall,
        )
    if config.code_bytes is not None and config.code_bytes < 1:
        raise ValueError(f"{key}.code_bytes={config.code_bytes}: set it to 1 or more, or leave it out")
    if config.code_bytes is not None and config.kind not in (IndexKind.auto, IndexKind.ivf_pq):
        raise ValueError(
            f"{key}.code_bytes={config.code_bytes} is not read by {key}.kind={config.kind.name}: leave it out"
        )
    if config.code_bytes is not None and size is not None:
        check_code_bytes(config.code_bytes, size, key=key)


def check_code_bytes(code_bytes: int, size: int, *, key: str = "retrieval.index") -> None:
    """Raise ValueError, naming the key below `key`, when search vectors of `size` numbers have no codes so long."""
    if size % code_bytes:
        raise ValueError(
            f"{key}.code_bytes={code_bytes} does not divide the embedder's {size} numbers: set it to a divisor, or "
            "leave it out"
        )


def check_retrieval(config: RetrievalConfig, *, key: str = "retrieval") -> None:
    """Raise ValueError, naming the key below `key`, when the settings cannot be used."""
    check_embedder(config.embedder, key=f"{key}.embedder")
    check_index(config.index, vector_size(config.embedder), key=f"{key}.index")
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


def check_bank(config: BankConfig, model: ModelConfig, *, key: str = "bank") -> None:
    """Raise ValueError, naming the key below `key`, when the settings cannot be used with a model."""
    for name in ("cache_mib", "cold_gib"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{key}.{name}={getattr(config, name)} is below 0: set 0 to keep nothing")
    if config.context is BankContext.document and model.row_tokens < model.reference_tokens:
        raise ValueError(
            f"{key}.context=document reads documents in windows of model.row_tokens={model.row_tokens} tokens, which "
            f"hold no reference of model.reference_tokens={model.reference_tokens}: set {key}.context=reference, or "
            f"model.row_tokens to {model.reference_tokens} or more"
        )
