"""Parameters and floating-point operations, counted from the structure alone (paper appendix A).

A multiplication and an addition are two operations; norms, activations, softmaxes and rotary positions are
left out, as everywhere. The backward pass counts twice the forward pass. Importable without torch.
Not here: measured times (``launch/bench.py``), bytes (``memorybank/cost.py``).
"""

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Exact numbers of parameters, part by part."""

    attention: int
    """The four projections of all layers."""
    feed_forward: int
    norms: int
    embedding: int
    head: int

    @property
    def non_embedding(self) -> int:
        """Blocks and norms; what sizes are quoted in."""
        return self.attention + self.feed_forward + self.norms

    @property
    def total(self) -> int:
        """All of them."""
        return self.non_embedding + self.embedding + self.head


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Return the numbers of parameters of ``Memory3LM(config)``; memory adds none."""
    layers, vocabulary = config.num_layers, config.vocab_size * config.width
    return ParameterCount(
        attention=layers * _attention_weights(config),
        feed_forward=layers * _ffn_weights(config),
        norms=(2 * layers + 1) * config.width,
        embedding=vocabulary,
        head=vocabulary,
    )


@dataclass(frozen=True, slots=True)
class TokenFlops:
    """Forward and backward pass of one text token, without memory."""

    palm: float
    """Every score of the T x T matrix counted, the convention of published MFU figures."""
    causal: float
    """Only the scores that a causal kernel has to compute."""


def text_token_flops(config: ModelConfig) -> TokenFlops:
    """Return ``6 * (non-embedding + head) + 12 * L * d * T`` and the count with half the second term."""
    parameters = count_parameters(config)
    products = 6.0 * (parameters.non_embedding + parameters.head)
    scores = 12.0 * config.num_layers * _heads_width(config) * config.row_tokens
    return TokenFlops(products + scores, products + scores / 2)


def reference_encode_flops(config: ModelConfig) -> float:
    """Return the forward pass that writes one full reference, selection included (paper: 0.308 TFLOP)."""
    layers, tokens = config.num_memory_layers, config.reference_tokens
    if not layers:
        return 0.0
    attention = layers * (tokens * _attention_weights(config) + tokens**2 * _heads_width(config))
    ffn = (layers - 1) * tokens * _ffn_weights(config)
    return 2.0 * (attention + ffn) + _selection_flops(config)


def memory_read_flops(config: ModelConfig) -> float:
    """Return the forward pass of one chunk's reading of one memory (paper: 1.44e-4 TFLOP)."""
    pairs = config.chunk_tokens * config.tokens_kept
    return 4.0 * config.num_memory_layers * pairs * _heads_width(config)


@dataclass(frozen=True, slots=True)
class KnowledgeCost:
    """What one reference costs as parameters, as memory, and as text before the question, in FLOPs."""

    implicit_write: float
    """One training step on it; reading is free at best."""
    explicit_write: float
    explicit_read: float
    text_read: float
    """A lower bound; writing is free."""

    @property
    def best_uses(self) -> tuple[float, float]:
        """Between which numbers of uses memory is the cheapest of the three."""
        return (
            self.explicit_write / (self.text_read - self.explicit_read),
            (self.implicit_write - self.explicit_write) / self.explicit_read,
        )


def knowledge_cost(config: ModelConfig) -> KnowledgeCost:
    """Return the paper's cost model; at its shape 2.24, 0.308, 1.44e-4 and 0.624 TFLOP."""
    tokens, layers, width = config.reference_tokens, config.num_layers, _heads_width(config)
    text_read = 2.0 * (
        layers
        * (tokens * _attention_weights(config) + 2 * tokens * (tokens / 2 + config.chunk_tokens) * width)
        + (layers - 1) * tokens * _ffn_weights(config)
    )
    return KnowledgeCost(
        implicit_write=tokens * 3 * _text_forward(config),
        explicit_write=reference_encode_flops(config),
        explicit_read=memory_read_flops(config),
        text_read=text_read,
    )


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Floating-point operations of one training step, forward and backward, by purpose."""

    text: float
    """The rows' tokens in all layers, without memory, causal scores."""
    head: float
    """Their projection to the vocabulary."""
    memory_read: float
    """Scores and sums over the memories that chunks read."""
    encode: float
    """Writing the references' memories, selection included."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.text + self.head + self.memory_read + self.encode


def step_flops(
    config: ModelConfig,
    *,
    rows: int,
    slots_filled: int = 0,
    references_encoded: int = 0,
    encode_gradient: bool = False,
) -> StepFlops:
    """Return the cost of a step: warmup with the defaults, from the bank, or online.

    Args:
        config: Sizes.
        rows: Rows of the step.
        slots_filled: Slots, over all chunks of these rows, that name a memory.
        references_encoded: Distinct references encoded for it: in the step (online), or its share of an
            epoch's compilation (bank).
        encode_gradient: Whether their gradient is computed too (online); the selection has none.
    """
    tokens = rows * config.row_tokens
    encoded = reference_encode_flops(config)
    if encode_gradient:
        encoded += 2 * (encoded - _selection_flops(config))
    return StepFlops(
        text=3 * tokens * (_text_forward(config) - _head_forward(config)),
        head=3 * tokens * _head_forward(config),
        memory_read=3 * slots_filled * memory_read_flops(config),
        encode=references_encoded * encoded,
    )


def _text_forward(config: ModelConfig) -> float:
    """Return the forward pass of one text token in a causal row, output head included."""
    weights = config.num_layers * (_attention_weights(config) + _ffn_weights(config))
    scores = config.num_layers * config.row_tokens * _heads_width(config)
    return 2.0 * (weights + scores) + _head_forward(config)


def _head_forward(config: ModelConfig) -> float:
    return 2.0 * config.vocab_size * config.width


def _selection_flops(config: ModelConfig) -> float:
    """Return the scores that rank one reference's tokens: all pairs, in every memory layer."""
    return 2.0 * config.num_memory_layers * config.reference_tokens**2 * _heads_width(config)


def _heads_width(config: ModelConfig) -> int:
    return config.num_heads * config.head_size


def _attention_weights(config: ModelConfig) -> int:
    """Return the weights of one layer's four projections."""
    return 2 * config.width * config.head_size * (config.num_heads + config.num_kv_heads)


def _ffn_weights(config: ModelConfig) -> int:
    return 3 * config.width * config.ffn_width
