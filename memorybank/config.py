"""What a user may choose about the bank and retrieval from it: plain dataclasses, which are also the Hydra schema.

Invariants: nothing heavy is imported here (``--help`` reads this module), and every cross-field rule
lives in `check_embedder`, `check_retrieval` and `check_bank`.

Not here: the shape of a memory (model/config.py) and the schedule of generations (train/config.py).
"""

from dataclasses import dataclass, field
from enum import Enum

from model.config import ModelConfig


class EmbedderKind(Enum):
    """Where search vectors come from."""

    static = "static"
    minilm = "minilm"
    folder = "folder"


class QueryMode(Enum):
    """Which chunk's text searches for a chunk: its own (the paper), or the one before it."""

    own = "own"
    previous = "previous"


class BankContext(Enum):
    """What a reference sees of its document when it is encoded."""

    reference = "reference"
    document = "document"


@dataclass(kw_only=True, slots=True)
class BankConfig:
    """How the bank's memories are made."""

    context: BankContext = BankContext.reference
    """reference: each by itself, as in the paper's runs; document: with its document's text before it in sight."""

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


def check_bank(config: BankConfig, model: ModelConfig, *, key: str = "bank") -> None:
    """Raise ValueError, naming the key below `key`, when the settings cannot be used with a model."""
    if config.context is BankContext.document and model.row_tokens < model.reference_tokens:
        raise ValueError(
            f"{key}.context=document reads documents in windows of model.row_tokens={model.row_tokens} tokens, which "
            f"hold no reference of model.reference_tokens={model.reference_tokens}: set {key}.context=reference, or "
            f"model.row_tokens to {model.reference_tokens} or more"
        )
