"""The cache of a batch that decodes: allocated once, read without being copied.

    memory layers    | memories, J = K * S places | prefix, P | context ... | future |
    other layers                                  | prefix, P | context ... | future |

Rows stand in places, of which the first `len(decoder)` are taken: a step costs what its rows cost, and a row that
ends leaves its place to another prompt, or to the last row. Prefix and context lie in blocks of keys, each of
them contiguous over all rows, because that is what a batched matrix product reads without making a copy; a block
that is partly future is computed whole, and masked. For every row there is one softmax over memories, prefix and
context, as in ``model/attention.py``, which prompts go through.

Not here: which memories a row reads and when, and which token comes next (``model/generate.py``).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from model.memory import MemoryBatch
from model.rope import Rotation, rotate
from model.transformer import Block, Memory3LM

BLOCK = 64
"""Keys of a block on a CPU: larger ones compute more of the future, smaller ones make more calls."""
BLOCK_BESIDE = 256
"""On any other device, where calls cost more than keys (not measured)."""

Places = list[int] | slice


class Decoder:
    """Rows that are decoded together, each at its own length and with its own memories."""

    def __init__(self, model: Memory3LM, *, rows: int, capacity: int) -> None:
        """Take `rows` places of `capacity` tokens each, the prefix not counted."""
        config, weight = model.config, model.embedding.weight
        G, E = config.num_kv_heads, config.head_size
        self._model = model
        self._prefix = model.encode_prefix(config.num_layers)
        self._turns = model.rotation(config.context_start, capacity)
        block = BLOCK if weight.device.type == "cpu" else BLOCK_BESIDE
        num_blocks = -(-(config.num_prefix + capacity) // block)
        self._keys = weight.new_zeros(2, config.num_layers, num_blocks, rows, G, block, E)
        """Keys, then values, of prefix and context. Zeros, since what is masked is multiplied all the same."""
        self._read = weight.new_zeros(2, config.num_memory_layers, rows, G, 0, E)
        """Keys, then values, of memories."""
        self._bias = weight.new_full((config.num_memory_layers + 1, rows, G, num_blocks * block), -torch.inf)
        """0 where a row may read, -inf elsewhere; behind the memory layers' one for all others, (.., J + keys)."""
        self._at_B = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        """Where each row's next token goes."""
        self._lengths: list[int] = []
        for layer, shared in enumerate(self._prefix):
            if shared is not None:
                for kept, x_PGE in zip(self._keys[:, layer], shared, strict=True):
                    _write(kept, 0, x_PGE.expand(rows, -1, -1, -1))
        self._bias[..., : config.num_prefix] = 0

    def __len__(self) -> int:
        """Number of rows, which stand in the first places."""
        return len(self._lengths)

    def put(
        self, places: Sequence[int], prompts: Sequence[Sequence[int]], memory: MemoryBatch | None
    ) -> None:
        """Let prompts take places, up to the last token of each, which is the one to be appended next.

        Args:
            places: Of each prompt: taken ones, and those that follow them.
            prompts: At least a token each; they are filled up to the longest.
            memory: What the chunks of the longest read, and the rows from now on; None = nothing.
        """
        config, device, at = self._model.config, self._at_B.device, _span(places)
        lengths = [len(prompt) - 1 for prompt in prompts]
        self._lengths += [0] * (max(places) + 1 - len(self._lengths))
        for place, length in zip(places, lengths, strict=True):
            self._lengths[place] = length
        self._at_B[at] = torch.tensor(lengths, device=device)
        J, P, T = self._read.shape[4], config.num_prefix, max(lengths)
        future = torch.arange(self._bias.shape[3] - J - P, device=device) >= self._at_B[at].unsqueeze(1)
        bias = torch.zeros_like(future, dtype=self._bias.dtype).masked_fill_(future, -torch.inf)
        self._bias[:, at, :, J + P :] = bias[:, None]
        chunk_B = torch.tensor(lengths, device=device) // config.chunk_tokens
        if memory is not None:
            own_B1K = memory.slots_BCK[torch.arange(len(lengths), device=device), chunk_B].unsqueeze(1)
            self.read(places, MemoryBatch(memory.pool, own_B1K))
            num_chunks = -(-T // config.chunk_tokens)
            memory = MemoryBatch(memory.pool, memory.slots_BCK[:, :num_chunks])
        else:
            self.read(places, None)
        if T:
            self._encode(at, [[*prompt[:-1], *[0] * (T + 1 - len(prompt))] for prompt in prompts], memory)

    def read(self, places: Sequence[int], memory: MemoryBatch | None) -> None:
        """Let some rows read other memories from now on, ``slots_BCK`` with C = 1; None = none."""
        at = _span(places)
        self._bias[:, at, :, : self._read.shape[4]] = -torch.inf
        if memory is None or not len(memory.pool.k_NLGSE) or not self._read.shape[1]:
            return
        pool, slots_BK = memory.pool, memory.slots_BCK[:, 0]
        rows_BK = slots_BK.clamp(min=0)
        kept = (pool.index_NLGS[rows_BK] >= 0) & (slots_BK >= 0)[..., None, None, None]
        J = slots_BK.shape[1] * kept.shape[-1]
        self._make_room(J)
        for read, x_NLGSE in zip(self._read, (pool.k_NLGSE, pool.v_NLGSE), strict=True):
            x_LBGJE = x_NLGSE[rows_BK].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
            read[:, at, :, :J] = x_LBGJE.to(read.dtype)
        kept_LBGJ = kept.permute(2, 0, 3, 1, 4).flatten(3, 4)
        bias = torch.zeros_like(kept_LBGJ, dtype=self._bias.dtype).masked_fill_(~kept_LBGJ, -torch.inf)
        self._bias[:-1, at, :, :J] = bias

    def drop(self, place: int) -> None:
        """End a row; the last row takes its place."""
        last = len(self) - 1
        if place != last:
            self._keys[:, :, :, place] = self._keys[:, :, :, last]
            self._read[:, :, place] = self._read[:, :, last]
            self._bias[:, place] = self._bias[:, last]
            self._at_B[place] = self._at_B[last]
            self._lengths[place] = self._lengths[last]
        self._lengths.pop()

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Append a token to every row; return their hidden states after the last block, (B, D)."""
        B, P, J = len(self), self._model.config.num_prefix, self._read.shape[4]
        at_B = self._at_B[:B]
        rows, G, size = self._keys.shape[3:6]
        row_B = torch.arange(B, device=at_B.device)
        self._bias[:, row_B, :, J + P + at_B] = 0
        block_B, offset_B = (P + at_B) // size, (P + at_B) % size
        head_BG = (block_B * rows + row_B)[:, None] * G + torch.arange(G, device=at_B.device)
        place_BG = head_BG * size + offset_B[:, None]
        turn = Rotation(*(table[at_B, None] for table in self._turns))
        used = (P + max(self._lengths)) // size + 1
        hidden = self._model.embedding(tokens_B[:, None])
        for layer, block in enumerate(self._model.blocks):
            attend = partial(self._attend, layer=layer, place=place_BG.flatten(), used=used)
            hidden, _, _ = block(hidden, turn, attention=attend)
        at_B += 1
        self._lengths = [length + 1 for length in self._lengths]
        return hidden[:, 0]  # type: ignore[no-any-return]

    def _encode(self, places: Places, tokens: list[list[int]], memory: MemoryBatch | None) -> None:
        """Compute keys and values of whole rows."""
        model, last = self._model, self._model.config.num_layers - 1
        tokens_BT = torch.tensor(tokens, device=self._at_B.device)
        turn = Rotation(*(table[: tokens_BT.shape[1]] for table in self._turns))
        reads = model.memory_keys(memory, tokens_BT.shape[1])
        hidden = model.embedding(tokens_BT)
        for layer, (block, prefix, read) in enumerate(zip(model.blocks, self._prefix, reads, strict=True)):
            if layer < last:
                hidden, k, v = block(hidden, turn, attention=model.attention, prefix=prefix, memory=read)
            else:  # nothing is predicted here, so that nothing but keys and values is missing
                _, k, v = cast(Block, block).project(hidden)
                k = rotate(k, turn)
            for kept, x_BTGE in zip(self._keys[:, layer], (k, v), strict=True):
                _write(kept, model.config.num_prefix, x_BTGE, places)

    def _attend(
        self,
        q_B1HE: Tensor,
        k_B1GE: Tensor,
        v_B1GE: Tensor,
        *,
        layer: int,
        place: Tensor,
        used: int,
        **_: Any,
    ) -> Tensor:
        """Attend like an ``AttentionFunction``, to the cache, after appending to it."""
        B, _one, _H, E = q_B1HE.shape
        G = k_B1GE.shape[2]
        for kept, x_B1GE in zip(self._keys[:, layer], (k_B1GE, v_B1GE), strict=True):
            kept.view(-1, E).index_copy_(0, place, x_B1GE.reshape(-1, E))
        k_parts, v_parts = (
            [block.flatten(0, 1) for block in kept[:used, :B]] for kept in self._keys[:, layer]
        )
        has_memory, first = layer < self._read.shape[1], self._read.shape[4]
        if has_memory and first:
            k_parts, v_parts = (
                [read.flatten(0, 1), *parts]
                for read, parts in zip(self._read[:, layer, :B], (k_parts, v_parts), strict=True)
            )
            first = 0
        q = q_B1HE.reshape(B * G, -1, E) * E**-0.5
        scores = torch.cat([torch.bmm(q, k.transpose(1, 2)) for k in k_parts], dim=-1)
        end = first + scores.shape[-1]
        bias_BGJ = self._bias[layer if has_memory else -1, :B, :, first:end]
        scores.view(B, G, -1, end - first).add_(bias_BGJ.unsqueeze(2))
        weights = torch.split(scores.softmax(-1), [k.shape[1] for k in k_parts], dim=-1)
        out = torch.bmm(weights[0], v_parts[0])
        for weight, v in zip(weights[1:], v_parts[1:], strict=True):
            out.baddbmm_(weight, v)
        return out.view(q_B1HE.shape)

    def _make_room(self, places: int) -> None:
        """Have at least so many places for memories: more only where a source offers more slots than before."""
        missing = places - self._read.shape[4]
        if missing > 0:
            self._read = torch.nn.functional.pad(self._read, (0, 0, 0, missing))
            J = self._read.shape[4] - missing
            memories, others = self._bias[..., :J], self._bias[..., J:]
            room = memories.new_full((*memories.shape[:-1], missing), -torch.inf)
            self._bias = torch.cat([memories, room, others], dim=-1)


def _span(places: Sequence[int]) -> Places:
    """Return neighbouring places as a slice: what is indexed by a list is copied element by element."""
    first, last = places[0], places[-1]
    return slice(first, last + 1) if list(places) == list(range(first, last + 1)) else list(places)


def _write(kept: Tensor, begin: int, x_BTGE: Tensor, places: Places = slice(None)) -> None:
    """Write tokens of some places into their blocks (blocks, rows, G, keys of a block, E), from a key's number on."""
    size, end = kept.shape[3], begin + x_BTGE.shape[1]
    for number in range(begin // size, -(-end // size)):
        low, high = max(begin, number * size), min(end, (number + 1) * size)
        block = x_BTGE[:, low - begin : high - begin].transpose(1, 2)
        kept[number, places, :, low - number * size : high - number * size] = block
