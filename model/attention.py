"""Causal grouped-query attention in which a row also reads the prefix and its chunks' memories.

For every token there is one softmax over [prefix | memories of the token's chunk | context up to the token].
Three functions of one signature compute it:

- ``reference_attention``: plain einsum, dense; the meaning of the others, and alone with a document mask.
- ``blocked_attention``: a block of queries at a time, one softmax over all its keys. Made of batched matrix
  products, it takes 0.55 (T = 512) to 0.75 (T = 2048) of the time of the library's flash kernel on a core with
  AVX512-BF16, forward and backward. On a CPU such a product of bfloat16 is bfloat16, and so scores are rounded before
  the softmax: where they reach 40, the output's relative error is 1.7e-2 in place of the kernel's 0.2e-2 to 0.6e-2.
- ``merged_attention`` (``model/attention_cuda.py``): context by the library's kernel, the rest by a Triton kernel,
  merged exactly through their log-sum-exps.

``fast_attention`` takes the best one for the device. None of the fast ones holds anything of the size
T x (T + memories). Empty slots and missing tokens are masked and never read; slot -1 is not "the last one".

Not here: projections and positions (queries and keys arrive rotated), the cache of generation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 64
"""Queries at a time in ``blocked_attention``; 64 and 128 are equally fast, larger ones leave the cache."""


class PrefixKeys(NamedTuple):
    """Keys and values of the prefix at one layer, shared by all rows."""

    k_PGE: Tensor
    v_PGE: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class MemoryKeys:
    """The memories that the chunks of a batch may read at one layer."""

    k_NGSE: Tensor
    v_NGSE: Tensor
    kept_NGS: Tensor
    """bool; False where a short reference left nothing."""
    slots_BCK: Tensor
    """Rows of the pool that a chunk reads; -1 = empty."""
    chunk_tokens: int
    """Q; the last chunk of a row may be shorter."""


class AttentionShares(NamedTuple):
    """Where attention goes, float32: means over query heads, which together are one.

    Of one layer; ``Memory3LM.attention_shares`` stacks those of the memory layers in front.
    """

    prefix_BT: Tensor
    memory_BTK: Tensor
    """On each slot of the token's chunk."""
    context_BT: Tensor


class AttentionFunction(Protocol):
    """Attend from every token of B rows."""

    def __call__(
        self,
        q_BTHE: Tensor,
        k_BTGE: Tensor,
        v_BTGE: Tensor,
        *,
        prefix: PrefixKeys | None = None,
        memory: MemoryKeys | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Return what every token reads, (B, T, H, E).

        Args:
            q_BTHE: Queries, rotated.
            k_BTGE: Keys, rotated; query head h reads key/value head ``h * G // H``.
            v_BTGE: Values.
            prefix: Read by all tokens.
            memory: Read by the tokens of the chunks whose slots name it.
            documents_BT: Document of every token: the context is then read within a document only.
        """
        ...


def fast_attention(
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    v_BTGE: Tensor,
    *,
    prefix: PrefixKeys | None = None,
    memory: MemoryKeys | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Attend by the fastest function there is: merged for half precision on CUDA, blocked otherwise."""
    if q_BTHE.device.type == "cuda" and q_BTHE.dtype in (torch.bfloat16, torch.float16):
        from model.attention_cuda import (
            merged_attention as attend,
        )  # Triton comes with PyTorch for CUDA alone
    else:
        attend = blocked_attention
    return attend(q_BTHE, k_BTGE, v_BTGE, prefix=prefix, memory=memory, documents_BT=documents_BT)


def blocked_attention(
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    v_BTGE: Tensor,
    *,
    prefix: PrefixKeys | None = None,
    memory: MemoryKeys | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Attend a block of queries at a time, with one softmax over all that the block may read."""
    if documents_BT is not None:
        return reference_attention(
            q_BTHE, k_BTGE, v_BTGE, prefix=prefix, memory=memory, documents_BT=documents_BT
        )
    if prefix is not None:
        k_BTGE, v_BTGE = (
            torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=1)
            for shared, own in zip(prefix, (k_BTGE, v_BTGE), strict=True)
        )
    return _attend(_BlockedAttention, (q_BTHE, k_BTGE, v_BTGE), None, memory)


def reference_attention(
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    v_BTGE: Tensor,
    *,
    prefix: PrefixKeys | None = None,
    memory: MemoryKeys | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Attend by plain einsum over dense scores: the definition, slow and large."""
    H, G = q_BTHE.shape[2], k_BTGE.shape[2]
    on_prefix, on_memory, on_context = _weights(q_BTHE, k_BTGE, prefix, memory, documents_BT)
    dtype = v_BTGE.dtype
    v_BTHE = v_BTGE.repeat_interleave(H // G, dim=2)
    out_BTHE = torch.einsum("bhts,bshe->bthe", on_context.to(dtype), v_BTHE)
    if prefix is not None:
        v_PHE = prefix.v_PGE.repeat_interleave(H // G, dim=1)
        out_BTHE = out_BTHE + torch.einsum("bhtp,phe->bthe", on_prefix.to(dtype), v_PHE)
    if memory is not None:
        v_BCKHSE = _read(memory.v_NGSE, memory.slots_BCK).repeat_interleave(H // G, dim=3)
        weights = _in_chunks(on_memory.transpose(1, 2), memory)
        weights = weights.view(*weights.shape[:-1], -1, v_BCKHSE.shape[-2])
        read = torch.einsum("bcqhks,bckhse->bcqhe", weights.to(dtype), v_BCKHSE)
        out_BTHE = out_BTHE + read.flatten(1, 2)[:, : q_BTHE.shape[1]]
    return out_BTHE


@torch.no_grad()
def attention_shares(
    q_BTHE: Tensor, k_BTGE: Tensor, *, prefix: PrefixKeys | None, memory: MemoryKeys | None
) -> AttentionShares:
    """Return where the attention of every token goes; dense, like ``reference_attention``."""
    on_prefix, on_memory, on_context = _weights(q_BTHE, k_BTGE, prefix, memory, None)
    places = 0 if memory is None else memory.slots_BCK.shape[2]
    on_slots = on_memory.reshape(*on_memory.shape[:-1], places, -1) if places else on_memory.unsqueeze(-1)
    prefix_BT, memory_BTK, context_BT = (
        part.sum(-1).float().mean(1) for part in (on_prefix, on_slots, on_context)
    )
    return AttentionShares(prefix_BT, memory_BTK, context_BT)


def _weights(
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    prefix: PrefixKeys | None,
    memory: MemoryKeys | None,
    documents_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the softmax's three parts: (B, H, T, P), (B, H, T, K * S), (B, H, T, T), at least float32."""
    B, T, H, E = q_BTHE.shape
    group = H // k_BTGE.shape[2]
    stats = torch.promote_types(q_BTHE.dtype, torch.float32)
    q = q_BTHE.to(stats) * E**-0.5
    visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if documents_BT is not None:
        visible = (visible & (documents_BT[:, :, None] == documents_BT[:, None, :])).unsqueeze(1)
    k_BTHE = k_BTGE.to(stats).repeat_interleave(group, dim=2)
    on_context = torch.einsum("bthe,bshe->bhts", q, k_BTHE).masked_fill(~visible, -torch.inf)
    on_prefix = on_memory = on_context.new_empty(B, H, T, 0)
    if prefix is not None:
        k_PHE = prefix.k_PGE.to(stats).repeat_interleave(group, dim=1)
        on_prefix = torch.einsum("bthe,phe->bhtp", q, k_PHE)
    if memory is not None:
        k_BCKHSE = _read(memory.k_NGSE.to(stats), memory.slots_BCK).repeat_interleave(group, dim=3)
        there_BCKHS = _readable(memory).repeat_interleave(group, dim=3)
        scores = torch.einsum("bcqhe,bckhse->bcqhks", _in_chunks(q, memory), k_BCKHSE)
        scores = scores.masked_fill(~there_BCKHS.transpose(2, 3).unsqueeze(2), -torch.inf)
        on_memory = scores.flatten(-2).flatten(1, 2)[:, :T].transpose(1, 2)
    sizes = [on_prefix.shape[-1], on_memory.shape[-1], T]
    weights = torch.cat([on_prefix, on_memory, on_context], dim=-1).softmax(-1)
    on_prefix, on_memory, on_context = torch.split(weights, sizes, dim=-1)
    return on_prefix, on_memory, on_context


def _in_chunks(x_BT: Tensor, memory: MemoryKeys) -> Tensor:
    """Cut dimension 1 into chunks, (B, C, Q, ...), padding the last one with zeros."""
    missing = memory.slots_BCK.shape[1] * memory.chunk_tokens - x_BT.shape[1]
    padded = torch.nn.functional.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (0, missing))
    return padded.view(len(x_BT), -1, memory.chunk_tokens, *x_BT.shape[2:])


def _read(pool_N: Tensor, slots_BCK: Tensor) -> Tensor:
    """Return the pool's rows that the slots name, (B, C, K, ...); for an empty one some row, to be masked."""
    rows = pool_N.index_select(0, slots_BCK.clamp(min=0).flatten())
    return rows.view(*slots_BCK.shape, *pool_N.shape[1:])


def _readable(memory: MemoryKeys) -> Tensor:
    """Return which places of the slots hold something: bool, (B, C, K, G, S)."""
    return _read(memory.kept_NGS, memory.slots_BCK) & (memory.slots_BCK >= 0)[..., None, None]


def _extra_keys(
    prefix: PrefixKeys | None, memory: MemoryKeys | None, rows: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return what is read beside the context: the prefix, then the slots of the chunk; J = P + K * S places.

    Returns:
        ``k_BGCJE``, ``v_BGCJE`` (C = 1 without memory: all tokens read the same), and ``bias_BGCJ``: 0, or
        -inf where there is nothing; None if all places are filled.
    """
    if memory is None:
        if prefix is None:
            return None, None, None
        k, v = (shared.transpose(0, 1)[None, :, None].expand(rows, -1, 1, -1, -1) for shared in prefix)
        return k.contiguous(), v.contiguous(), None
    C = memory.slots_BCK.shape[1]
    k, v = (
        _read(pool, memory.slots_BCK).permute(0, 3, 1, 2, 4, 5).flatten(3, 4)
        for pool in (memory.k_NGSE, memory.v_NGSE)
    )
    bias = torch.zeros(k.shape[:-1], dtype=k.dtype, device=k.device)
    bias.masked_fill_(~_readable(memory).permute(0, 3, 1, 2, 4).flatten(3, 4), -torch.inf)
    if prefix is not None:
        k, v = (
            torch.cat([shared.transpose(0, 1)[None, :, None].expand(rows, -1, C, -1, -1), own], dim=3)
            for shared, own in zip(prefix, (k, v), strict=True)
        )
        bias = torch.nn.functional.pad(bias, (len(prefix.k_PGE), 0))
    return k, v, bias


def _attend(
    function: type[torch.autograd.Function],
    context: tuple[Tensor, ...],
    prefix: PrefixKeys | None,
    memory: MemoryKeys | None,
) -> Tensor:
    """Gather the extra keys and fill the last chunk up; causality keeps the filling from being read."""
    tokens = context[0].shape[1]
    if memory is not None and len(memory.k_NGSE) == 0:
        memory = None
    if memory is not None and memory.slots_BCK.shape[1] > 1 and tokens % memory.chunk_tokens:
        missing = memory.slots_BCK.shape[1] * memory.chunk_tokens - tokens
        context = tuple(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) for x in context)
    extra = _extra_keys(prefix, memory, rows=len(context[0]))
    out_BTHE: Tensor = function.apply(*context, *extra)  # type: ignore[no-untyped-call]
    return out_BTHE[:, :tokens]


def _grouped_rows(x_BTHE: Tensor, kv_heads: int) -> Tensor:
    """Return (B * G, T * M, E), contiguous: the M heads of a group stand together, token by token."""
    B, T, H, E = x_BTHE.shape
    grouped = x_BTHE.reshape(B, T, kv_heads, H // kv_heads, E).transpose(1, 2)
    return grouped.reshape(B * kv_heads, -1, E).contiguous()


def _ungrouped(rows: Tensor, shape: torch.Size, kv_heads: int) -> Tensor:
    """Undo ``_grouped_rows``."""
    B, T, H, E = shape
    return rows.view(B, kv_heads, T, H // kv_heads, E).transpose(1, 2).reshape(B, T, H, E)


def _extra_scores(q_rows: Tensor, k_BGCJE: Tensor | None, bias_BGCJ: Tensor | None) -> Tensor:
    """Return the scores of all queries with the extra keys of their chunk, (B * G, T * M, J)."""
    if k_BGCJE is None:
        return q_rows.new_empty(*q_rows.shape[:2], 0)
    k = k_BGCJE.flatten(0, 2)
    scores = torch.bmm(q_rows.view(len(k), -1, k.shape[2]), k.transpose(1, 2))
    if bias_BGCJ is not None:
        scores += bias_BGCJ.flatten(0, 2).unsqueeze(1)
    return scores.view(*q_rows.shape[:2], -1)


class _BlockedAttention(torch.autograd.Function):
    """Query t reads the keys up to its own, which are the last T; the prefix's may stand before them.

    Saves queries, keys and values; the backward pass computes the probabilities once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHE: Tensor,
        k_BTGE: Tensor,
        v_BTGE: Tensor,
        k_BGCJE: Tensor | None,
        v_BGCJE: Tensor | None,
        bias_BGCJ: Tensor | None,
    ) -> Tensor:
        G, E = k_BTGE.shape[2:]
        q = _grouped_rows(q_BTHE, G) * E**-0.5
        k, v = _grouped_rows(k_BTGE, G), _grouped_rows(v_BTGE, G)
        ctx.save_for_backward(q, k, v, k_BGCJE, v_BGCJE, bias_BGCJ)
        ctx.shape = q_BTHE.shape
        extra_scores = _extra_scores(q, k_BGCJE, bias_BGCJ)
        on_extra = torch.empty_like(extra_scores)
        out = torch.empty_like(q)
        for block in _blocks(ctx.shape[1], q, k):
            weights = block.weights(q, k, extra_scores)
            on_context, on_extra[:, block.rows] = block.parts(weights)
            out[:, block.rows] = torch.bmm(on_context, v[:, : block.end])
        if v_BGCJE is not None:
            v_extra = v_BGCJE.flatten(0, 2)
            out.view(len(v_extra), -1, E).baddbmm_(on_extra.view(len(v_extra), -1, v_extra.shape[1]), v_extra)
        return _ungrouped(out, ctx.shape, G)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHE: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, k_BGCJE, v_BGCJE, bias_BGCJ = ctx.saved_tensors
        B, _, _, E = ctx.shape
        G = len(k) // B
        grad = _grouped_rows(grad_BTHE, G)
        extra_scores = _extra_scores(q, k_BGCJE, bias_BGCJ)
        towards_extra = _extra_scores(grad, v_BGCJE, None)
        on_extra, grad_extra = torch.empty_like(extra_scores), torch.empty_like(extra_scores)
        grad_q = torch.empty_like(q)
        stats = torch.promote_types(k.dtype, torch.float32)
        grad_k, grad_v = (torch.zeros_like(x, dtype=stats) for x in (k, v))
        for block in _blocks(ctx.shape[1], q, k):
            weights = block.weights(q, k, extra_scores)
            block_grad = grad[:, block.rows]
            towards = torch.bmm(block_grad, v[:, : block.end].transpose(1, 2))
            towards = block.joined(towards, towards_extra)
            grad_scores = torch._softmax_backward_data(towards, weights, -1, weights.dtype)
            on_context, on_extra[:, block.rows] = block.parts(weights)
            grad_context, grad_extra[:, block.rows] = block.parts(grad_scores)
            grad_v[:, : block.end] += torch.bmm(on_context.transpose(1, 2), block_grad)
            grad_k[:, : block.end] += torch.bmm(grad_context.transpose(1, 2), q[:, block.rows])
            grad_q[:, block.rows] = torch.bmm(grad_context, k[:, : block.end])
        grad_k_extra = grad_v_extra = None
        if k_BGCJE is not None:
            k_extra = k_BGCJE.flatten(0, 2)
            chunks, places, _ = k_extra.shape
            q_chunks, grad_chunks = q.view(chunks, -1, E), grad.view(chunks, -1, E)
            on_extra, grad_extra = on_extra.view(chunks, -1, places), grad_extra.view(chunks, -1, places)
            grad_q.view(chunks, -1, E).baddbmm_(grad_extra, k_extra)
            grad_k_extra = torch.bmm(grad_extra.transpose(1, 2), q_chunks).view_as(k_BGCJE)
            grad_v_extra = torch.bmm(on_extra.transpose(1, 2), grad_chunks).view_as(k_BGCJE)
        grad_k, grad_v = (x.to(k.dtype).view(B, G, -1, E).transpose(1, 2) for x in (grad_k, grad_v))
        grad_q = _ungrouped(grad_q.mul_(E**-0.5), ctx.shape, G)
        return grad_q, grad_k, grad_v, grad_k_extra, grad_v_extra, None


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Some tokens' queries, M rows a token, and the keys up to the last of these tokens."""

    rows: slice
    end: int
    """Number of keys."""
    future: Tensor
    """-inf where a row's token is earlier than a token of the block, for the block's own keys."""

    def weights(self, q: Tensor, k: Tensor, extra_scores: Tensor) -> Tensor:
        """Return the softmax over context and extra keys, in this order."""
        scores = torch.bmm(q[:, self.rows], k[:, : self.end].transpose(1, 2))
        scores[:, :, -self.future.shape[1] :] += self.future
        return self.joined(scores, extra_scores).softmax(-1)

    def joined(self, context: Tensor, extra: Tensor) -> Tensor:
        return torch.cat([context, extra[:, self.rows]], dim=-1) if extra.shape[-1] else context

    def parts(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Undo ``joined``; the first part is contiguous, as the products that follow would make it anyway."""
        return both[:, :, : self.end].contiguous(), both[:, :, self.end :]


def _blocks(tokens: int, q_rows: Tensor, k: Tensor) -> Iterator[_Block]:
    group = q_rows.shape[1] // tokens
    before = k.shape[1] - tokens
    size = min(QUERY_BLOCK, tokens)
    future = torch.full((size, size), -torch.inf, dtype=k.dtype, device=k.device).triu(1)
    future = future.repeat_interleave(group, dim=0)
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        rows = slice(start * group, end * group)
        yield _Block(rows, before + end, future[: (end - start) * group, : end - start])
