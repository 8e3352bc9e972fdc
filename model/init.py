"""Initial weights: normal with one standard deviation, and, where asked for, with heads that can look up.

The output projections of attention and feed-forward get ``std / sqrt(2 * num_layers)``, so that the
residual stream's variance does not grow with depth (GPT-2). The paper is silent.
Not here: the seed; the caller sets torch's.
"""

import math

import torch
from torch import Tensor, nn

from model.config import Init, ModelConfig
from model.layers import RMSNorm

_TOKEN_NORM = 4.0  # of an embedding, so that what a token is outlasts what the blocks add to it
_CONSTANT_NORM = 2.0  # of the direction that all embeddings share, which positions alone need
_NORMAL_SHARE = 0.3  # what is left of the normal weights where a pattern is laid over them
_POSITION = 5.7  # size of a turning pair in queries and keys that look at the token before
_MATCH = 1.5  # weight of what queries and keys compare
_WRITE = (1.0, 2.0)  # weight into the residual stream: of the token before, of the copied token
_READ_OUT = 0.3  # weight of the copied token in the output head


def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Fill every parameter of `model` in place, in the order in which it names them."""
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            into_residual = name.endswith((".out", ".down"))
            std = config.init_std / math.sqrt(2 * config.num_layers) if into_residual else config.init_std
            nn.init.normal_(module.weight, std=std)
    if config.init is Init.induction:
        _add_induction_heads(model, config)


@torch.no_grad()
def _add_induction_heads(model: nn.Module, config: ModelConfig) -> None:
    """Lay induction heads (Olsson et al. 2022) over the normal weights.

    Layer 0's first group of heads looks at the token before, by position alone, and notes what it is. In the other
    memory layers one head looks for tokens whose predecessor is the present token, in its context and in its memories,
    and copies what it finds to where the output head reads it. Each part of the residual stream that this needs is a
    slice of one random orthonormal basis: a constant, the token before, the copied token, and the token itself, which
    fills the rest. Everything stays free to learn.
    """
    size, group = config.head_size, config.num_heads // config.num_kv_heads
    embedding, head = model.get_parameter("embedding.weight"), model.get_parameter("head.weight")
    rest = config.width - 1 - size // 2 - size
    basis, _ = torch.linalg.qr(torch.randn(config.width, config.width, device=embedding.device))
    constant, before, copied, token = basis.split([1, size // 2, size, rest])
    embedding.copy_(
        torch.randn(len(embedding), rest, device=token.device) @ token * (_TOKEN_NORM / math.sqrt(rest))
    )
    embedding.add_(_CONSTANT_NORM * constant)

    queries, keys, values, out = _heads(model, config, 0)
    fast = torch.arange(size // 8, device=embedding.device)
    angle = config.rope_base ** (-2 * fast / size)
    seen = math.sqrt(config.width) * _CONSTANT_NORM / math.hypot(_CONSTANT_NORM, _TOKEN_NORM)
    for rows, turned in [(keys[:1], 0 * angle), (queries[:group], -angle)]:
        rows.mul_(_NORMAL_SHARE)
        rows[:, fast] += _POSITION / seen * turned.cos()[:, None] * constant
        rows[:, fast + size // 2] += _POSITION / seen * turned.sin()[:, None] * constant
    values[0, : size // 2] = token[: size // 2]
    out[0, :, : size // 2] = _WRITE[0] * before.T

    # The slow pairs: what they compare survives a distance.
    pairs = torch.arange(size // 4, size // 2, device=embedding.device)
    slow = torch.cat([pairs, pairs + size // 2])
    for layer in range(1, config.num_memory_layers):
        queries, keys, values, out = _heads(model, config, layer)
        query = config.num_heads - group
        for rows, compared in [(queries[query], token[: size // 2]), (keys[-1], before)]:
            rows.mul_(_NORMAL_SHARE)
            rows[slow] += _MATCH * compared
        values[-1] = token[:size]
        out[query] = _WRITE[1] * copied.T
    head.add_(_READ_OUT * embedding @ token[:size].T @ copied)


def _heads(model: nn.Module, config: ModelConfig, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of a block's weights by head: queries, keys and values (heads, E, D), output (heads, D, E)."""
    qkv = model.get_parameter(f"blocks.{layer}.qkv.weight").view(-1, config.head_size, config.width)
    sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    queries, keys, values = torch.split(qkv, sizes)
    out = model.get_parameter(f"blocks.{layer}.out.weight").view(
        config.width, config.num_heads, config.head_size
    )
    return queries, keys, values, out.transpose(0, 1)
