"""Decoding with a cache, reading new memories at every chunk boundary.

The boundaries are a row's multiples of ``chunk_tokens``. Each chunk of a prompt, also a partial last one,
reads what its own tokens retrieve; generated tokens complete that chunk and read its memories; after that,
each chunk reads what the chunk before it retrieved (paper section 3.1). A prompt that ends at a boundary
hands its last chunk's memories on, which are what that chunk retrieves. Context keys are never recomputed.

Not here: how a chunk's text becomes memories (``memorybank/retriever.py`` implements ``MemorySource``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from model.memory import ExplicitMemory, MemoryBatch
from model.rope import rotation
from model.transformer import Memory3LM


class MemorySource(Protocol):
    """Where generation gets memories from."""

    def read(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> MemoryBatch | None:
        """Return what some rows read from now on.

        Args:
            rows: Their numbers in the batch.
            chunks: For each, the tokens of the chunk that queries.

        Returns:
            A batch with ``slots_BCK`` of B = len(rows) and C = 1; None = nothing for any of them.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class FixedMemory:
    """The same memories for all chunks of a row, whatever it says: a probe's references."""

    pool: ExplicitMemory
    slots_BK: Tensor
    """Rows of the pool that each row of the batch reads; -1 = empty."""

    def read(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> MemoryBatch:
        """Return the rows' memories."""
        return MemoryBatch(self.pool, self.slots_BK[list(rows)].unsqueeze(1))


@torch.no_grad()
def generate(
    model: Memory3LM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_id: int | None = None,
    memory: MemorySource | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the stop token.

    Args:
        model: The model, with its prefix.
        prompts: Token ids, each of any length from one.
        max_new_tokens: Per prompt, the stop token not counted.
        stop_id: Token that ends a row; None = none does.
        memory: Where memories come from; None = no memory.
        temperature: 0 = the most probable token.
        top_p: Sample among the most probable tokens that together have at least this probability.
        seed: Of the sampling.

    Raises:
        ValueError: for an empty prompt, or settings out of range.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token: begin it with <s>")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}: set temperature >= 0 and top_p above 0, at most 1"
        )
    rows = [list(prompt) for prompt in prompts]
    chunk_tokens = model.config.chunk_tokens
    decoder = Decoder(model, rows=len(rows), capacity=max(map(len, rows)) + max_new_tokens)
    hidden_BD = _read_prompts(decoder, rows, memory, chunk_tokens)
    generator = torch.Generator(device=hidden_BD.device).manual_seed(seed)
    alive = set(range(len(rows)))
    for step in range(max_new_tokens):
        logits_BV = model.head(model.norm(hidden_BD))
        sampled = _sample(logits_BV, temperature, top_p, generator).tolist()
        alive -= {row for row in alive if sampled[row] == stop_id}
        for row in alive:
            rows[row].append(sampled[row])
        if not alive or step + 1 == max_new_tokens:
            break
        at = [len(row) - 1 for row in rows]
        entering = [row for row in alive if at[row] % chunk_tokens == 0 and at[row] > len(prompts[row])]
        if memory is not None and entering:
            entering.sort()
            chunks = [rows[row][at[row] - chunk_tokens : at[row]] for row in entering]
            decoder.read(entering, memory.read(entering, chunks))
        tokens_B1 = torch.tensor([row[-1:] for row in rows], device=hidden_BD.device)
        hidden_BD = decoder.advance(tokens_B1, torch.tensor(at, device=hidden_BD.device))[:, 0]
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


class Decoder:
    """The cache of a batch of rows: prefix, the current chunk's memories, and the context so far.

    Per layer one buffer of keys and one of values, (B, G, J + capacity, E): in front the J = P + K * S keys
    that are not context.
    """

    def __init__(self, model: Memory3LM, *, rows: int, capacity: int) -> None:
        config = model.config
        self.model = model
        self.capacity = capacity
        weight = model.embedding.weight
        empty = weight.new_zeros(rows, config.num_kv_heads, capacity, config.head_size)
        self._buffers = [
            (empty.clone(), empty.clone())
            if shared is None
            else (_behind(shared.k_PGE, empty), _behind(shared.v_PGE, empty))
            for shared in model.encode_prefix(config.num_layers)
        ]
        self._bias_LBGJ = weight.new_zeros(
            config.num_memory_layers, rows, config.num_kv_heads, config.num_prefix
        )

    def read(self, rows: Sequence[int], memory: MemoryBatch | None) -> None:
        """Let some rows read other memories from now on; None = none."""
        P = self.model.config.num_prefix
        self._bias_LBGJ[:, list(rows), :, P:] = -torch.inf
        if memory is None or not len(memory.pool.k_NLGSE):
            return
        slots_BK = memory.slots_BCK[:, 0]
        read = memory.pool.k_NLGSE[slots_BK.clamp(min=0)], memory.pool.v_NLGSE[slots_BK.clamp(min=0)]
        kept = memory.pool.index_NLGS[slots_BK.clamp(min=0)] >= 0
        kept &= (slots_BK >= 0)[:, :, None, None, None]
        k_LBGJE, v_LBGJE = (part.permute(2, 0, 3, 1, 4, 5).flatten(3, 4) for part in read)
        places = k_LBGJE.shape[3]
        self._make_room(P + places)
        for layer, (keys, values) in enumerate(self._buffers[: len(self._bias_LBGJ)]):
            keys[list(rows), :, P : P + places] = k_LBGJE[layer].to(keys.dtype)
            values[list(rows), :, P : P + places] = v_LBGJE[layer].to(values.dtype)
        bias = torch.zeros(k_LBGJE.shape[:-1], dtype=self._bias_LBGJ.dtype, device=k_LBGJE.device)
        bias.masked_fill_(~kept.permute(2, 0, 3, 1, 4).flatten(3, 4), -torch.inf)
        self._bias_LBGJ[:, list(rows), :, P : P + places] = bias

    def advance(self, tokens_Bt: Tensor, start_B: Tensor) -> Tensor:
        """Append t tokens to each row, from its place `start_B` on; return their hidden states, (B, t, D).

        What stands in the cache from a row's place on is overwritten, so tokens that only fill a row up may
        be appended and forgotten.
        """
        config = self.model.config
        at_Bt = start_B[:, None] + torch.arange(tokens_Bt.shape[1], device=tokens_Bt.device)
        weight = self.model.embedding.weight
        turn = rotation(
            config.context_start + at_Bt,
            head_size=config.head_size,
            base=config.rope_base,
            dtype=weight.dtype,
        )
        seen = torch.arange(int(at_Bt.max()) + 1, device=tokens_Bt.device)
        future = torch.zeros(
            len(at_Bt), 1, at_Bt.shape[1], len(seen), dtype=weight.dtype, device=weight.device
        )
        future.masked_fill_((seen > at_Bt[..., None]).unsqueeze(1), -torch.inf)
        hidden = self.model.embedding(tokens_Bt)
        for layer, block in enumerate(self.model.blocks):
            hidden, _, _ = block(
                hidden, turn, attention=partial(self._attend, layer=layer, at_Bt=at_Bt, future=future)
            )
        return hidden  # type: ignore[no-any-return]

    def _attend(
        self,
        q_BTHE: Tensor,
        k_BTGE: Tensor,
        v_BTGE: Tensor,
        *,
        layer: int,
        at_Bt: Tensor,
        future: Tensor,
        **_: Any,
    ) -> Tensor:
        """Attend like an ``AttentionFunction``, to the cache, after appending to it."""
        keys, values = self._buffers[layer]
        front = keys.shape[2] - self.capacity
        row = torch.arange(len(at_Bt), device=at_Bt.device)[:, None]
        keys[row, :, front + at_Bt] = k_BTGE
        values[row, :, front + at_Bt] = v_BTGE
        end = front + future.shape[-1]
        B, T, H = q_BTHE.shape[:3]
        if layer < len(self._bias_LBGJ):
            group = H // k_BTGE.shape[2]
            front_bias = (
                self._bias_LBGJ[layer].repeat_interleave(group, dim=1).unsqueeze(2).expand(B, H, T, front)
            )
        else:
            front_bias = future.new_zeros(B, H, T, front)
        bias = torch.cat([front_bias, future.expand(B, H, T, -1)], dim=-1)
        attended = functional.scaled_dot_product_attention(
            q_BTHE.transpose(1, 2), keys[:, :, :end], values[:, :, :end], attn_mask=bias, enable_gqa=True
        )
        return attended.transpose(1, 2)

    def _make_room(self, front: int) -> None:
        """Widen the front of the memory layers' buffers to at least `front` keys."""
        missing = front - self._bias_LBGJ.shape[-1]
        if missing <= 0:
            return
        old = self._bias_LBGJ.shape[-1]
        for layer in range(len(self._bias_LBGJ)):
            keys, values = self._buffers[layer]
            room = keys.new_zeros(*keys.shape[:2], missing, keys.shape[3])
            self._buffers[layer] = (
                torch.cat([keys[:, :, :old], room, keys[:, :, old:]], dim=2),
                torch.cat([values[:, :, :old], room, values[:, :, old:]], dim=2),
            )
        self._bias_LBGJ = functional.pad(self._bias_LBGJ, (0, missing), value=-torch.inf)


def _behind(prefix_PGE: Tensor, empty_BGTE: Tensor) -> Tensor:
    return torch.cat([prefix_PGE.transpose(0, 1).expand(len(empty_BGTE), -1, -1, -1), empty_BGTE], dim=2)


def _read_prompts(
    decoder: Decoder, prompts: list[list[int]], memory: MemorySource | None, chunk_tokens: int
) -> Tensor:
    """Append all prompts, chunk by chunk, and return the hidden state of each one's last token, (B, D)."""
    device = decoder.model.embedding.weight.device
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    longest = max(map(len, prompts))
    chosen: Tensor | None = None
    for start in range(0, longest, chunk_tokens):
        end = min(start + chunk_tokens, longest)
        own = [prompt[start:end] for prompt in prompts]
        reading = [row for row, chunk in enumerate(own) if chunk]
        if memory is not None:
            decoder.read(reading, memory.read(reading, [own[row] for row in reading]))
        filled = torch.tensor([chunk + [0] * (end - start - len(chunk)) for chunk in own], device=device)
        hidden_BTD = decoder.advance(filled, torch.full_like(last, start))
        here = (start <= last) & (last < end)
        ends = hidden_BTD[torch.arange(len(prompts), device=device), (last - start).clamp(0, end - start - 1)]
        chosen = ends if chosen is None else torch.where(here[:, None], ends, chosen)
    assert chosen is not None
    return chosen


def _sample(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    probabilities, order = (logits_BV.float() / temperature).softmax(-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    drawn = torch.multinomial(probabilities.masked_fill(before >= top_p, 0), 1, generator=generator)
    return order.gather(1, drawn).squeeze(1)
