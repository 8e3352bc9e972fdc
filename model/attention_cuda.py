"""``merged_attention``: the fast attention of half precision on CUDA.

The context is read by the library's kernel, which also returns its log-sum-exp. A Triton kernel then reads prefix and
memories, for some tokens and a group of heads at a time, straight from the pool, and merges both in place:

    s = q k^T / sqrt(E), empty places -inf      l = logaddexp(l_context, logsumexp(s))
    out = exp(l_context - l) out_context + exp(s - l) v

The gradient of a softmax needs only the merged ``out`` and ``l``: given these, the library's backward kernel returns
the exact gradients of the context, and a second Triton kernel adds what the other keys contribute. Statistics are
at least float32. What was merged can be merged with more keys, so many are read some at a time, a launch each: a
tile fits on a chip whatever is kept of a reference. Either direction is one operator, opaque to torch.compile, which
fuses what stands around it.

With ``TRITON_INTERPRET=1`` all of this runs on a CPU as well, slowly: that is how it is tested without a GPU.
Not here: the definition, CPUs (``model/attention.py``).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (Triton's language has no types)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.attention import MemoryKeys, PrefixKeys, reference_attention

_TILE = 64
"""Tokens that a program reads for at a time, at most."""
_READ = 64 * 128
"""Numbers of keys that a program reads at a time, at most: 128 keys of 64, 64 of 80 (padded to 128)."""


def merged_attention(
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    v_BTGE: Tensor,
    *,
    prefix: PrefixKeys | None = None,
    memory: MemoryKeys | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Attend by the library's kernel, merged with prefix and memories by log-sum-exp."""
    if documents_BT is not None:
        return reference_attention(
            q_BTHE, k_BTGE, v_BTGE, prefix=prefix, memory=memory, documents_BT=documents_BT
        )
    tokens = _TILE
    pool: tuple[Tensor | None, ...] = (None, None, None, None)
    if memory is not None and len(memory.k_NGSE) > 0:
        tokens = memory.chunk_tokens
        pool = (memory.k_NGSE, memory.v_NGSE, memory.kept_NGS, memory.slots_BCK)
    out_BTHE: Tensor = _merged(q_BTHE, k_BTGE, v_BTGE, *(prefix or (None, None)), *pool, tokens)[0]
    return out_BTHE


@torch.library.custom_op("memory3::merged_attention", mutates_args=())
def _merged(
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    v_BTGE: Tensor,
    prefix_k_PGE: Tensor | None,
    prefix_v_PGE: Tensor | None,
    pool_k_NGSE: Tensor | None,
    pool_v_NGSE: Tensor | None,
    kept_NGS: Tensor | None,
    slots_BCK: Tensor | None,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Return the output, contiguous, and the log-sum-exp (B, H, T), at least float32."""
    out_BTHE, lse_BHT = _context(q_BTHE, k_BTGE, v_BTGE)
    if prefix_k_PGE is not None or pool_k_NGSE is not None:
        extra = _Extra(
            q_BTHE, k_BTGE, prefix_k_PGE, prefix_v_PGE, pool_k_NGSE, pool_v_NGSE, kept_NGS, slots_BCK, chunk_tokens
        )  # fmt: skip
        for first in extra.firsts:
            _merge[extra.grid](
                q_BTHE, out_BTHE, lse_BHT, *extra.tensors, *q_BTHE.stride()[:3], *extra.strides,
                *extra.sizes, first, **extra.constants, num_warps=4,
            )  # fmt: skip
    return out_BTHE, lse_BHT


@_merged.register_fake
def _(q_BTHE: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, H = q_BTHE.shape[:3]
    return q_BTHE.new_empty(q_BTHE.shape), q_BTHE.new_empty(
        (B, H, T), dtype=torch.promote_types(q_BTHE.dtype, torch.float32)
    )


@torch.library.custom_op("memory3::merged_attention_backward", mutates_args=())
def _merged_backward(
    grad_BTHE: Tensor,
    out_BTHE: Tensor,
    lse_BHT: Tensor,
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    v_BTGE: Tensor,
    prefix_k_PGE: Tensor | None,
    prefix_v_PGE: Tensor | None,
    pool_k_NGSE: Tensor | None,
    pool_v_NGSE: Tensor | None,
    kept_NGS: Tensor | None,
    slots_BCK: Tensor | None,
    chunk_tokens: int,
    wants_pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, of the prefix and of the pool; empty ones for what is not there."""
    grad_BTHE = grad_BTHE.contiguous()
    grads = _context_backward(grad_BTHE, q_BTHE, k_BTGE, v_BTGE, out_BTHE, lse_BHT)
    others = [q_BTHE.new_empty(0) for _ in range(4)]
    if prefix_k_PGE is None and pool_k_NGSE is None:
        return *grads, *others  # type: ignore[return-value]
    extra = _Extra(
        q_BTHE, k_BTGE, prefix_k_PGE, prefix_v_PGE, pool_k_NGSE, pool_v_NGSE, kept_NGS, slots_BCK, chunk_tokens
    )  # fmt: skip
    parts = [
        q_BTHE.new_empty(*extra.grid, extra.keys, q_BTHE.shape[3], dtype=lse_BHT.dtype) for _ in range(2)
    ]
    for first in extra.firsts:
        _merge_backward[extra.grid](
            q_BTHE, grad_BTHE, out_BTHE, lse_BHT, grads[0], *parts, *extra.tensors, *q_BTHE.stride()[:3],
            *extra.strides, *extra.sizes, first, **extra.constants, num_warps=extra.warps_backward,
        )  # fmt: skip
    P = extra.prefix
    if prefix_k_PGE is not None:
        others[:2] = (_to_prefix(part[:, :, :, :P], q_BTHE.dtype) for part in parts)
    if wants_pool:
        assert pool_k_NGSE is not None
        assert slots_BCK is not None
        others[2:] = (_to_pool(part[:, :, :, P:], pool_k_NGSE, slots_BCK) for part in parts)
    return *grads, *others  # type: ignore[return-value]


@_merged_backward.register_fake
def _(
    grad_BTHE: Tensor,
    out_BTHE: Tensor,
    lse_BHT: Tensor,
    q_BTHE: Tensor,
    k_BTGE: Tensor,
    v_BTGE: Tensor,
    prefix_k_PGE: Tensor | None,
    prefix_v_PGE: Tensor | None,
    pool_k_NGSE: Tensor | None,
    *more: Any,
) -> tuple[Tensor, ...]:
    wants_pool = more[-1]
    return (
        *(x.new_empty(x.shape) for x in (q_BTHE, k_BTGE, v_BTGE)),
        *(q_BTHE.new_empty(0 if prefix_k_PGE is None else prefix_k_PGE.shape) for _ in range(2)),
        *(
            q_BTHE.new_empty(pool_k_NGSE.shape if wants_pool and pool_k_NGSE is not None else 0)
            for _ in range(2)
        ),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:-1])
    ctx.chunk_tokens = inputs[-1]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_BTHE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    _out, _lse, *inputs = ctx.saved_tensors
    wants_pool = ctx.needs_input_grad[5]
    grads = _merged_backward(grad_BTHE, *ctx.saved_tensors, ctx.chunk_tokens, wants_pool)
    has_prefix = inputs[3] is not None
    there = [True] * 3 + [has_prefix] * 2 + [wants_pool] * 2
    return *(grad if has else None for grad, has in zip(grads, there, strict=True)), None, None, None


_merged.register_autograd(_backward, setup_context=_setup)


def _plans_kernels(q_BTHE: Tensor) -> bool:
    """Whether cuDNN reads the context: from Hopper on its kernels are the fastest, but each new shape is planned."""
    return (
        q_BTHE.shape[1] % _TILE == 0
        and q_BTHE.shape[3] % 8 == 0
        and torch.cuda.get_device_capability(q_BTHE.device) >= (9, 0)
    )


def _context(*context: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the library's kernel reads of the context, (B, T, H, E), and the log-sum-exp, (B, H, T)."""
    heads_first = [x.transpose(1, 2) for x in context]
    aten = torch.ops.aten
    if context[0].device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, True)
    elif _plans_kernels(context[0]):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, True, False)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*heads_first, 0.0, True, False)
    return out.transpose(1, 2).contiguous(), lse.view(lse.shape[:3]).contiguous()


def _context_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> list[Tensor]:
    """Return the gradients of q, k and v, contiguous, given output and log-sum-exp of all that was read."""
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    aten, length = torch.ops.aten, q.shape[2]
    if q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, True)
    elif _plans_kernels(q.transpose(1, 2)):
        no_dropout = torch.empty((), dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse.unsqueeze(-1),
            no_dropout,
            no_dropout,
            None,
            None,
            None,
            length,
            length,
            0.0,
            True,
        )
    else:
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, length, length, 0.0, True, no_dropout, no_dropout
        )
    return [x.transpose(1, 2).contiguous() for x in grads]


def _to_prefix(part_BCGPE: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up the gradients of the prefix, which all tokens read; (P, G, E)."""
    return part_BCGPE.sum((0, 1)).transpose(0, 1).to(dtype).contiguous()


def _to_pool(part_BCGJE: Tensor, pool_NGSE: Tensor, slots_BCK: Tensor) -> Tensor:
    """Add up, for each memory of the pool, the gradients of all places that read it."""
    N, G, S, E = pool_NGSE.shape
    B, C, K = slots_BCK.shape
    reads = part_BCGJE.reshape(B, C, -1, G, K, S, E).sum(2).transpose(2, 3).flatten(0, 2)
    sums = reads.new_zeros(N + 1, G, S, E)  # the last row takes what empty slots would have read: zeros
    sums.index_add_(0, slots_BCK.flatten() % (N + 1), reads)
    return sums[:N].to(pool_NGSE.dtype)


class _Extra:
    """What the two Triton kernels are told: P keys of the prefix, and K * S of a chunk's memories.

    Attributes:
        keys: How many there are in all.
        firsts: The first key of each launch.
    """

    def __init__(
        self,
        q_BTHE: Tensor,
        k_BTGE: Tensor,
        prefix_k_PGE: Tensor | None,
        prefix_v_PGE: Tensor | None,
        pool_k_NGSE: Tensor | None,
        pool_v_NGSE: Tensor | None,
        kept_NGS: Tensor | None,
        slots_BCK: Tensor | None,
        chunk_tokens: int,
    ) -> None:
        B, T, H, E = q_BTHE.shape
        G = k_BTGE.shape[2]
        self.prefix = 0 if prefix_k_PGE is None else len(prefix_k_PGE)
        S, C, K = 0, -(-T // chunk_tokens), 0
        strides = [0, 0, 0]
        prefixes = [q_BTHE if x is None else x.contiguous() for x in (prefix_k_PGE, prefix_v_PGE)]
        pool = [q_BTHE] * 4
        if slots_BCK is not None:
            assert pool_k_NGSE is not None
            assert pool_v_NGSE is not None
            assert kept_NGS is not None
            S, (_, C, K) = pool_k_NGSE.shape[2], slots_BCK.shape
            inner = [_inner_contiguous(x) for x in (pool_k_NGSE, pool_v_NGSE, kept_NGS)]
            strides = [x.stride(0) for x in inner]
            pool = [*inner[:2], inner[2].view(torch.uint8), slots_BCK.contiguous()]
        tile = min(_TILE, max(16, triton.next_power_of_2(chunk_tokens)))
        size = max(16, triton.next_power_of_2(E))
        self.keys = self.prefix + K * S
        at_a_time = max(16, min(_READ // size, triton.next_power_of_2(self.keys)))
        self.firsts = range(0, self.keys, at_a_time)
        self.warps_backward = 8 if at_a_time * size > 64 * 64 else 4
        self.grid = (B, C * -(-chunk_tokens // tile), G)
        self.tensors = [*prefixes, *pool]
        self.strides = strides
        self.sizes = [T, chunk_tokens, E**-0.5]
        self.constants: dict[str, Any] = {
            "G": G,
            "M": H // G,
            "E": E,
            "P": self.prefix,
            "K": K,
            "S": S,
            "TILE": tile,
            "TILES": -(-chunk_tokens // tile),
            "KEYS": at_a_time,
            "SIZE": size,
            "STATS": tl.float64 if q_BTHE.dtype is torch.float64 else tl.float32,
        }


def _inner_contiguous(x_N: Tensor) -> Tensor:
    """Return a tensor whose rows are contiguous each, as those of one layer of a pool are."""
    return x_N if len(x_N) == 0 or x_N[0].is_contiguous() else x_N.contiguous()


@triton.jit
def _extra_keys(
    prefix_k, prefix_v, pool_k, pool_v, kept, slots, stride_k, stride_v, stride_kept, chunk, group, first, e,
    G: tl.constexpr, E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, S: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Return keys and values of prefix and a chunk's memories from the first on, (KEYS, SIZE), and which are there."""
    j = first + tl.arange(0, KEYS)
    there = j < P
    at = (j * G + group)[:, None] * E + e[None, :]
    mask = there[:, None] & (e < E)[None, :]
    k = tl.load(prefix_k + at, mask=mask, other=0.0)
    v = tl.load(prefix_v + at, mask=mask, other=0.0)
    if K > 0:
        place = j - P
        slot = tl.load(slots + chunk * K + place // S, mask=(place >= 0) & (place < K * S), other=-1)
        token = group * S + place % S
        read = slot >= 0
        read = read & (tl.load(kept + slot * stride_kept + token, mask=read, other=0) != 0)
        mask = read[:, None] & (e < E)[None, :]
        at = token[:, None] * E + e[None, :]
        k += tl.load(pool_k + slot[:, None] * stride_k + at, mask=mask, other=0.0)
        v += tl.load(pool_v + slot[:, None] * stride_v + at, mask=mask, other=0.0)
        there = there | read
    return k, v, there


@triton.jit
def _merge(
    q, out, lse, prefix_k, prefix_v, pool_k, pool_v, kept, slots, stride_b, stride_t, stride_h,
    stride_k, stride_v, stride_kept, tokens, chunk_tokens, scale, first,
    G: tl.constexpr, M: tl.constexpr, E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Merge what TILE tokens read of prefix and memories into `out` and `lse`, for the M heads of a group."""
    row, tile, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    chunk, start = tile // TILES, (tile % TILES) * TILE + tl.arange(0, TILE)
    t = chunk * chunk_tokens + start
    inside = (start < chunk_tokens) & (t < tokens)
    e = tl.arange(0, SIZE)
    mask = inside[:, None] & (e < E)[None, :]
    k, v, there = _extra_keys(
        prefix_k, prefix_v, pool_k, pool_v, kept, slots, stride_k, stride_v, stride_kept,
        row * (tl.num_programs(1) // TILES) + chunk, group, first, e, G, E, P, K, S, KEYS,
    )  # fmt: skip
    for m in range(M):
        head = group * M + m
        at_q = q + row * stride_b + t[:, None] * stride_t + head * stride_h + e[None, :]
        at_out = out + ((row * tokens + t[:, None]) * (G * M) + head) * E + e[None, :]
        at_lse = lse + (row * (G * M) + head) * tokens + t
        queries = tl.load(at_q, mask=mask, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee", out_dtype=STATS) * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        context = tl.load(at_lse, mask=inside, other=0.0)
        most = tl.maximum(context, tl.max(scores, 1))
        weights = tl.exp(scores - most[:, None])
        of_context = tl.exp(context - most)
        total = of_context + tl.sum(weights, 1)
        read = tl.dot(weights.to(v.dtype), v, input_precision="ieee", out_dtype=STATS)
        merged = (tl.load(at_out, mask=mask, other=0.0) * of_context[:, None] + read) / total[:, None]
        tl.store(at_out, merged.to(out.dtype.element_ty), mask=mask)
        tl.store(at_lse, most + tl.log(total), mask=inside)


@triton.jit
def _merge_backward(
    q, grad, out, lse, grad_q, part_k, part_v, prefix_k, prefix_v, pool_k, pool_v, kept, slots,
    stride_b, stride_t, stride_h, stride_k, stride_v, stride_kept, tokens, chunk_tokens, scale, first,
    G: tl.constexpr, M: tl.constexpr, E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Add to `grad_q` what comes through a tile's keys, and write those keys' gradients, of TILE tokens' reading."""
    row, tile, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    chunk, start = tile // TILES, (tile % TILES) * TILE + tl.arange(0, TILE)
    t = chunk * chunk_tokens + start
    inside = (start < chunk_tokens) & (t < tokens)
    e = tl.arange(0, SIZE)
    mask = inside[:, None] & (e < E)[None, :]
    k, v, there = _extra_keys(
        prefix_k, prefix_v, pool_k, pool_v, kept, slots, stride_k, stride_v, stride_kept,
        row * (tl.num_programs(1) // TILES) + chunk, group, first, e, G, E, P, K, S, KEYS,
    )  # fmt: skip
    sum_k = tl.zeros([KEYS, SIZE], STATS)
    sum_v = tl.zeros([KEYS, SIZE], STATS)
    for m in range(M):
        head = group * M + m
        at_q = q + row * stride_b + t[:, None] * stride_t + head * stride_h + e[None, :]
        at = ((row * tokens + t[:, None]) * (G * M) + head) * E + e[None, :]
        queries = tl.load(at_q, mask=mask, other=0.0)
        grads = tl.load(grad + at, mask=mask, other=0.0)
        through_out = tl.sum(grads.to(STATS) * tl.load(out + at, mask=mask, other=0.0), 1)
        total = tl.load(lse + (row * (G * M) + head) * tokens + t, mask=inside, other=float("inf"))
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee", out_dtype=STATS) * scale
        weights = tl.where(there[None, :], tl.exp(scores - total[:, None]), 0.0)
        towards = tl.dot(grads, tl.trans(v), input_precision="ieee", out_dtype=STATS)
        grad_scores = (weights * (towards - through_out[:, None]) * scale).to(k.dtype)
        sum_v += tl.dot(tl.trans(weights.to(v.dtype)), grads, input_precision="ieee", out_dtype=STATS)
        sum_k += tl.dot(tl.trans(grad_scores), queries, input_precision="ieee", out_dtype=STATS)
        through = tl.dot(grad_scores, k, input_precision="ieee", out_dtype=STATS)
        both = tl.load(grad_q + at, mask=mask, other=0.0) + through
        tl.store(grad_q + at, both.to(grad_q.dtype.element_ty), mask=mask)
    j = first + tl.arange(0, KEYS)
    at = (((row * tl.num_programs(1) + tile) * G + group) * (P + K * S) + j[:, None]) * E + e[None, :]
    mask = (j < P + K * S)[:, None] & (e < E)[None, :]
    tl.store(part_k + at, sum_k, mask=mask)
    tl.store(part_v + at, sum_v, mask=mask)
