"""Small models and random inputs for tests."""

from typing import Any

import torch
from torch import Tensor

from model.attention import AttentionFunction, fast_attention
from model.config import ModelConfig
from model.memory import ReferenceBatch
from model.transformer import Memory3LM


def tiny_config(**changes: Any) -> ModelConfig:
    """A model of 3 layers, 2 of them memory layers, with chunks of 8 and references of 12 tokens."""
    settings: dict[str, Any] = {
        "vocab_size": 50,
        "num_layers": 3,
        "width": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "ffn_width": 16,
        "num_memory_layers": 2,
        "row_tokens": 32,
        "chunk_tokens": 8,
        "reference_tokens": 12,
        "tokens_kept": 3,
        "prefix_ids": [1, 7, 9],
        "init_std": 0.3,
    }
    return ModelConfig(**(settings | changes))


def tiny_model(
    *,
    attention: AttentionFunction = fast_attention,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **changes: Any,
) -> Memory3LM:
    """A ``Memory3LM`` of ``tiny_config`` with seeded weights."""
    torch.manual_seed(seed)
    return Memory3LM(tiny_config(**changes), attention).to(dtype)


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = 50) -> Tensor:
    """Seeded token ids, none of them below 3."""
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_references(rows: int, chunks: int, *, places: int = 2, seed: int = 0) -> ReferenceBatch:
    """Six references of 1 to 12 tokens (some shorter than what is kept), in slots of which some are empty."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([12, 1, 7, 2, 12, 5])
    slots = torch.randint(-1, len(lengths), (rows, chunks, places), generator=generator)
    return ReferenceBatch(random_tokens(6, 12, seed=seed + 1), lengths, lengths.clamp(max=2), slots)
