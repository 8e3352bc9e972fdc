"""The bytes of a micro-batch against what autograd really keeps."""

from dataclasses import replace

import pytest
import torch

from model import attention, footprint, loss
from model.config import ModelConfig
from model.footprint import micro_batch_bytes
from model.memory import ExplicitMemory, MemoryBatch, ReferenceBatch
from model.transformer import Memory3LM

ROWS, WINDOW = 4, 5
CONFIG = ModelConfig(
    vocab_size=640,
    num_layers=4,
    width=128,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    ffn_width=160,
    num_memory_layers=2,
    row_tokens=256,
)


def memory(kind: str) -> MemoryBatch | ReferenceBatch | None:
    chunks = CONFIG.row_tokens // CONFIG.chunk_tokens
    own_BC1 = torch.arange(ROWS * chunks).view(ROWS, chunks, 1)
    back_K = torch.arange(WINDOW)
    slots_BCK = torch.where(torch.arange(chunks)[:, None] >= back_K, own_BC1 - back_K, -1)
    if kind == "bank":
        shape = (ROWS * chunks, CONFIG.num_memory_layers, CONFIG.num_kv_heads, CONFIG.tokens_kept)
        k, v = (torch.randn(*shape, CONFIG.head_size, dtype=torch.bfloat16) for _ in range(2))
        return MemoryBatch(ExplicitMemory(k, v, torch.arange(8).expand(shape).contiguous()), slots_BCK)
    if kind == "online":
        lengths_N = torch.full((ROWS * chunks,), CONFIG.reference_tokens)
        tokens_NR = torch.randint(3, 640, (ROWS * chunks, CONFIG.reference_tokens))
        return ReferenceBatch(tokens_NR, lengths_N, torch.zeros_like(lengths_N), slots_BCK)
    return None


def kept_bytes(config: ModelConfig, kind: str) -> int:
    """What the forward pass keeps beside the weights, the loss's two gradients not counted."""
    model = Memory3LM(config).bfloat16()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens_BT1 = torch.randint(3, config.vocab_size, (ROWS, config.row_tokens + 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens_BT1[:, :-1], targets_BT=tokens_BT1[:, 1:], memory=memory(kind))
    assert loss.count == ROWS * config.row_tokens
    gradients = 2 * config.width * (ROWS * config.row_tokens + config.vocab_size)
    return sum(size for place, size in kept.items() if place not in weights) - gradients


def planned(config: ModelConfig, kind: str) -> int:
    return micro_batch_bytes(
        config,
        rows=ROWS,
        number_bytes=2,
        references_read=0 if kind == "none" else WINDOW,
        encoded_online=kind == "online",
        cpu=True,
    ).activations


@pytest.mark.parametrize("kind", ["none", "bank", "online"])
def test_activations_are_those_that_autograd_keeps(kind: str) -> None:
    assert planned(CONFIG, kind) == pytest.approx(kept_bytes(CONFIG, kind), rel=0.015)


@pytest.mark.parametrize("kind", ["none", "online"])
def test_recomputing_keeps_the_inputs_of_blocks_and_one_block_at_a_time(kind: str) -> None:
    config = replace(CONFIG, activation_checkpointing=True)
    read = (planned(CONFIG, "bank") - planned(CONFIG, "none")) // CONFIG.num_memory_layers
    one_block = planned(replace(CONFIG, num_layers=3), "none") - planned(
        replace(CONFIG, num_layers=2), "none"
    )
    recomputed = one_block + (read if kind == "online" else 0)
    assert planned(config, kind) - recomputed == pytest.approx(kept_bytes(config, kind), rel=0.02)


def test_the_pool_is_as_large_as_its_tensors() -> None:
    batch = memory("bank")
    assert isinstance(batch, MemoryBatch)
    tensors = (batch.pool.k_NLGSE, batch.pool.v_NLGSE, batch.pool.index_NLGS)
    found = micro_batch_bytes(CONFIG, rows=ROWS, number_bytes=2, references_read=WINDOW).memories
    assert found == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("recomputed", [False, True])
def test_hidden_states_are_those_of_every_layer_whether_kept_or_not(recomputed: bool) -> None:
    config = replace(CONFIG, activation_checkpointing=recomputed)
    text, online = (
        micro_batch_bytes(
            config, rows=ROWS, number_bytes=2, references_read=read, encoded_online=read > 0
        ).hidden
        for read in (0, WINDOW)
    )
    assert text == 2 * config.num_layers * ROWS * config.row_tokens * config.width
    references = ROWS * (config.row_tokens // config.chunk_tokens)
    assert online - text == 2 * config.num_memory_layers * references * config.reference_tokens * config.width


def test_pieces_are_as_large_as_those_of_loss_and_attention() -> None:
    assert footprint.TOKENS_AT_A_TIME == loss.TOKENS_AT_A_TIME
    assert footprint.TOKENS_AT_A_TIME_BESIDE == loss.TOKENS_AT_A_TIME_BESIDE
    assert footprint.QUERY_BLOCK == attention.QUERY_BLOCK
