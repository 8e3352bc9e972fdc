"""The description of one network: its sizes, its memory layers and what a record of it means.

``ModelConfig`` is also a Hydra schema: plain fields only, and importable without torch.
Not here: the network itself (``model/transformer.py``), its costs (``model/flops.py``).
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Selection(Enum):
    """How the tokens that a reference keeps are ranked (paper section 3.1)."""

    softmax = "softmax"
    """By the attention probability that a token receives: the paper's definition."""
    exp = "exp"
    """By the unnormalised exponential of the scores: what the paper's runs used."""


class Init(Enum):
    """How weights begin; the paper is silent."""

    normal = "normal"
    """Normally distributed."""
    induction = "induction"
    """The same, with heads that look up and copy from the first step: for runs too short to grow them."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Sizes of a ``Memory3LM``; runs take them from a file, `model=nano` where none is chosen."""

    vocab_size: int = 4096
    """Number of token ids."""
    num_layers: int = 8
    """Transformer blocks."""
    width: int = 256
    """Size of the residual stream."""
    num_heads: int = 4
    """Query heads of a layer."""
    num_kv_heads: int = 2
    """Key/value heads of a layer; each serves num_heads / num_kv_heads query heads."""
    head_size: int = 64
    """Numbers per head; even, because rotary positions turn pairs."""
    ffn_width: int = 256
    """Width of the gated feed-forward network; the paper takes that of the residual stream."""
    num_memory_layers: int = 4
    """The first so many layers write and read memories; 0 = a plain transformer."""
    row_tokens: int = 512
    """Tokens of a training row (T), the prefix not counted."""
    chunk_tokens: int = 64
    """Tokens of a chunk, which share the memories they read."""
    reference_tokens: int = 128
    """Positions that every reference occupies, all of them the same ones."""
    tokens_kept: int = 8
    """Tokens of a reference that each key/value head of a memory layer keeps."""
    prefix_ids: list[int] = field(default_factory=list)
    """Token ids of `<s>Reference:`, which stand before references and rows; empty = no prefix."""
    rope_base: float = 1e4
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    init: Init = Init.normal
    """How weights begin: `normal`, or `induction`, with heads that can look up."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream get less."""
    selection: Selection = Selection.softmax
    """How the kept tokens are ranked."""
    select_title: bool = True
    """Whether the tokens of a reference's title line may be kept."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    compile: bool = False
    """Compile each block with torch.compile: on GPUs it fuses what stands between the matrix products."""

    @property
    def num_prefix(self) -> int:
        """Number of prefix tokens (p)."""
        return len(self.prefix_ids)

    @property
    def context_start(self) -> int:
        """Position of a row's first token, with memory or without: p + reference_tokens."""
        return self.num_prefix + self.reference_tokens

    def layout(self) -> dict[str, Any]:
        """Return, as JSON-able values, all settings that decide what a stored memory means."""
        return {
            "prefix_ids": list(self.prefix_ids),
            "rope_base": float(self.rope_base),
            "context_start": self.context_start,
            "reference_tokens": self.reference_tokens,
            "tokens_kept": self.tokens_kept,
            "selection": self.selection.value,
            "select_title": self.select_title,
            "memory_layers": self.num_memory_layers,
            "kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
            "chunk_tokens": self.chunk_tokens,
        }

    def check(self) -> None:
        """Refuse impossible sets of sizes.

        Raises:
            ValueError: naming the key, its value, and what to set instead.
        """
        for key in (
            "vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_size", "ffn_width",
            "row_tokens", "chunk_tokens", "reference_tokens", "tokens_kept",
        ):  # fmt: skip
            self._require(getattr(self, key) >= 1, key, "set a positive number")
        for key in ("rope_base", "norm_eps", "init_std"):
            self._require(getattr(self, key) > 0, key, "set a positive number")
        self._require(self.head_size % 2 == 0, "head_size", "set an even number: rotary positions turn pairs")
        self._require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"set a divisor of model.num_heads={self.num_heads}",
        )
        self._require(
            0 <= self.num_memory_layers <= self.num_layers,
            "num_memory_layers",
            f"set 0 to model.num_layers={self.num_layers}",
        )
        self._require(
            self.tokens_kept <= self.reference_tokens,
            "tokens_kept",
            f"set at most model.reference_tokens={self.reference_tokens}",
        )
        self._require(
            self.row_tokens % self.chunk_tokens == 0,
            "row_tokens",
            f"set a multiple of model.chunk_tokens={self.chunk_tokens}",
        )
        self._require(
            self.init is Init.normal or self.head_size % 4 == 0,
            "init",
            f"set normal, or a model.head_size (now {self.head_size}) that 4 divides: induction heads halve its pairs",
        )
        self._require(
            self.init is Init.normal or 2 * self.width > 5 * self.head_size,
            "init",
            f"set normal, or a model.width above {5 * self.head_size // 2}: induction heads need that many directions",
        )
        self._require(
            all(0 <= token < self.vocab_size for token in self.prefix_ids),
            "prefix_ids",
            f"set ids of the tokenizer, 0 to model.vocab_size - 1 = {self.vocab_size - 1}",
        )

    def _require(self, holds: bool, key: str, remedy: str) -> None:
        if not holds:
            value = getattr(self, key)
            said = value.name if isinstance(value, Enum) else repr(value)
            raise ValueError(f"model.{key}={said}: {remedy}")
