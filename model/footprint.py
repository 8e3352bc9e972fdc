"""The bytes that a micro-batch takes beside the weights, counted from the structure: what autograd keeps, and the rest.

The forward pass keeps, for every token and layer, what the backward pass of `model.transformer.Block` reads again; a
test compares with what autograd really keeps. Importable without torch.
Invariants: everything is an upper bound that a full micro-batch reaches: every chunk has a reference of its own, of
full length. The prefix, a few tokens shared by all rows, is left out.
Not here: weights, gradients and optimizer (``train/footprint.py``), operations (``model/flops.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass

from model.config import ModelConfig

TOKENS_AT_A_TIME = 512
"""Tokens whose logits exist at once in training on a CPU (`model.loss`; a test compares)."""
TOKENS_AT_A_TIME_BESIDE = 4096
"""The same on a GPU."""
QUERY_BLOCK = 64
"""Queries at a time in attention on a CPU (`model.attention`; a test compares)."""


@dataclass(frozen=True, slots=True)
class MicroBatchBytes:
    """What one micro-batch takes on its device, in bytes.

    Attributes:
        activations: Kept from the forward to the backward pass, encoded references included.
        memories: The pool of memories that it reads, before attention copies them.
        working: Temporaries at the moment when they and all activations exist at once.
        validation: Temporaries of a validation of as many rows, when no activations are kept.
        hidden: Hidden states between blocks, of encoded references as well; kept or not.
    """

    activations: int
    memories: int
    working: int
    validation: int
    hidden: int


def micro_batch_bytes(
    config: ModelConfig,
    *,
    rows: int,
    number_bytes: int,
    references_read: int = 0,
    encoded_online: bool = False,
    cpu: bool = False,
) -> MicroBatchBytes:
    """Return what one forward and backward pass takes.

    Args:
        config: Sizes.
        rows: Rows of the micro-batch.
        number_bytes: Of a parameter and an activation: 2 in bfloat16.
        references_read: References in a chunk's slots (K); 0 = no memory.
        encoded_online: Whether they are encoded in the step, with gradient, instead of being read from the bank.
        cpu: Whether it runs on a CPU: attention block by block instead of flash.
    """
    tokens, chunks = rows * config.row_tokens, rows * (config.row_tokens // config.chunk_tokens)
    layers, memory_layers = config.num_layers, config.num_memory_layers if references_read else 0
    read = chunks * references_read * config.tokens_kept * config.num_kv_heads
    # On a CPU keys, values and the mask are copied for each chunk; a GPU reads the pool.
    keys_read = read * (2 * config.head_size + 1) if cpu else 0
    block = _compiled_block if config.compile and not cpu else _block
    if config.activation_checkpointing:
        kept = layers * tokens * config.width + block(config, tokens) + min(memory_layers, 1) * keys_read
    else:
        kept = layers * block(config, tokens) + memory_layers * keys_read
    kept += tokens * (config.width + 1)  # the last norm
    hidden = layers * tokens * config.width
    pool = 0
    if references_read:
        num_kept = chunks * config.num_memory_layers * config.num_kv_heads * config.tokens_kept
        pool = num_kept * (2 * config.head_size * number_bytes + 8)
    if references_read and encoded_online:
        reference_tokens = chunks * config.reference_tokens
        kept += _references(config, reference_tokens, block)
        hidden += memory_layers * reference_tokens * config.width
    return MicroBatchBytes(
        activations=kept * number_bytes,
        memories=pool,
        working=max(
            _loss_bytes(config, tokens, number_bytes, cpu=cpu),
            _backward_bytes(config, rows, number_bytes, cpu=cpu),
        ),
        validation=_validation_bytes(config, rows, references_read) if references_read else 0,
        hidden=hidden * number_bytes,
    )


def _block(config: ModelConfig, tokens: int) -> int:
    """Return the numbers that one block keeps: two norms, attention, feed-forward network."""
    heads, kv_heads = (num * config.head_size for num in (config.num_heads, config.num_kv_heads))
    norms = 2 * (2 * config.width + 1)  # normed, scale, and scaled, which the projection behind it reads
    attention = 2 * heads + 2 * kv_heads  # queries, output; keys, values
    feed_forward = 4 * config.ffn_width  # gate, up, silu(gate), their product
    return tokens * (norms + attention + feed_forward)


def _compiled_block(config: ModelConfig, tokens: int) -> int:
    """Return the same of a compiled block, which computes norms and gates again (`KEPT` of `model.transformer`)."""
    heads, kv_heads = (num * config.head_size for num in (config.num_heads, config.num_kv_heads))
    projected = heads + 2 * kv_heads  # of which values are a part
    attention = projected + 2 * heads + kv_heads  # queries and keys in their places, output
    return tokens * (2 * config.width + attention + 2 * config.ffn_width)


def _references(config: ModelConfig, tokens: int, block: Callable[[ModelConfig, int], int]) -> int:
    """Return the numbers kept of references that are encoded with gradient; the last layer stops at its keys."""
    before = config.num_memory_layers - 1
    last = tokens * (2 * config.width + 1)
    if config.activation_checkpointing:
        return (before + 1) * tokens * config.width
    return before * block(config, tokens) + last


def _loss_bytes(config: ModelConfig, tokens: int, number_bytes: int, *, cpu: bool) -> int:
    """Return the temporaries of the loss: hidden states and their gradient, the head's gradient, some logits."""
    head = config.vocab_size * config.width
    at_a_time = TOKENS_AT_A_TIME if cpu else TOKENS_AT_A_TIME_BESIDE
    logits = min(at_a_time, tokens) * config.vocab_size
    hidden = 2 * tokens * config.width * number_bytes
    upcast = 4 if cpu and number_bytes < 4 else 0  # a CPU adds bfloat16 to float32 through a copy
    product = head * (number_bytes + upcast)
    added_up = head * 4 if tokens > at_a_time else 0
    return hidden + added_up + logits * number_bytes + product


def _backward_bytes(config: ModelConfig, rows: int, number_bytes: int, *, cpu: bool) -> int:
    """Return the temporaries of the last block's backward pass, beyond what it has freed by then."""
    tokens = rows * config.row_tokens
    heads, kv_heads = (num * config.head_size for num in (config.num_heads, config.num_kv_heads))
    head = (
        2 * config.vocab_size * config.width * number_bytes
    )  # the output head's gradient, and it times the loss's
    feed_forward = tokens * (2 * config.width + 5 * config.ffn_width) * number_bytes
    freed = tokens * (4 * config.ffn_width + 2 * config.width) * number_bytes
    scores = 0
    if cpu:
        block = min(QUERY_BLOCK, config.row_tokens)
        scores = 5 * rows * config.num_heads * block * config.row_tokens * number_bytes
    attention = (
        tokens * ((2 * config.width + 3 * heads + 2 * kv_heads) * number_bytes + 8 * kv_heads) + scores
    )
    return head + max(feed_forward, attention - freed)


def _validation_bytes(config: ModelConfig, rows: int, references_read: int) -> int:
    """Return what `Memory3LM.attention_shares` holds at once: three float32 copies of all of a layer's weights."""
    keys = config.row_tokens + references_read * config.tokens_kept
    return 3 * rows * config.num_heads * config.row_tokens * keys * 4
