"""Attention that reads memory, forward and backward: against the library's kernel without any, and with a dense mask.

Two patterns of one row: training's, where each chunk finds one reference and reads those of a window; and inference's,
where each chunk reads as many of its own, so that a row reads five times as many memories. The dense mask is what one
would write first: all memories of the row before its context, one boolean mask, the library's kernel.
Not here: exactness (tests/model/test_attention.py).
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.build import training_dtype
from launch.chart import Chart, Look, Series
from launch.config import RunConfig
from launch.timing import Bench, Conditions, Figure, Side, Times, interleaved, ratio
from launch.units import binary
from memorybank.config import QueryMode
from memorybank.pool import window_slots
from model.attention import (
    AttentionFunction,
    MemoryKeys,
    PrefixKeys,
    fast_attention,
)
from model.config import ModelConfig

DEFAULTS = ["model=small", "model.row_tokens=2048", "model.prefix_ids=[1,2,3,4]"]
PAPER_HEAD_SIZE = 80
"""Kernels are tuned for 64, 96 and 128."""
_AGAINST_KERNEL = {"cpu": 1.15, "cuda": 1.35}
_AGAINST_MASK = 2.5


@dataclass(frozen=True, slots=True)
class Problem:
    """Random queries, keys, values and memories of some rows; all of them want their gradients."""

    q_BTHE: Tensor
    k_BTGE: Tensor
    v_BTGE: Tensor
    prefix: PrefixKeys | None
    window: MemoryKeys
    """One reference per chunk, shared by a window of chunks."""
    fresh: MemoryKeys
    """As many references of each chunk's own."""
    grad_BTHE: Tensor

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        *,
        places: int,
        dtype: torch.dtype,
        device: torch.device,
        rows: int | None = None,
    ) -> "Problem":
        """Make the tensors for a model's shape and `places` slots a chunk.

        Of one row, on a GPU of eight: less would measure how fast a CPU asks for kernels.
        """
        rows = rows or (1 if device.type == "cpu" else 8)
        generator = torch.Generator(device).manual_seed(0)

        def leaf(*shape: int) -> Tensor:
            made = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
            return made.to(dtype).requires_grad_()

        H, G, E, T = config.num_heads, config.num_kv_heads, config.head_size, config.row_tokens
        chunks = T // config.chunk_tokens

        def memory(count: int, slots_1CK: Tensor) -> MemoryKeys:
            kept = torch.ones(rows * count, G, config.tokens_kept, dtype=torch.bool, device=device)
            k, v = (leaf(rows * count, G, config.tokens_kept, E) for _ in range(2))
            own_BCK = slots_1CK + count * torch.arange(rows)[:, None, None]
            slots_BCK = torch.where(slots_1CK < 0, -1, own_BCK)
            return MemoryKeys(k, v, kept, slots_BCK.to(device), config.chunk_tokens)

        found = window_slots(torch.arange(chunks)[None].numpy(), QueryMode.own, window=places)
        prefix = PrefixKeys(*(leaf(config.num_prefix, G, E) for _ in range(2))) if config.num_prefix else None
        return cls(
            leaf(rows, T, H, E),
            leaf(rows, T, G, E),
            leaf(rows, T, G, E),
            prefix,
            memory(chunks, torch.from_numpy(found)),
            memory(chunks * places, torch.arange(chunks * places).view(1, chunks, places)),
            leaf(rows, T, H, E).detach(),
        )

    def side(self, attention: AttentionFunction, memory: MemoryKeys | None) -> Side:
        """Forward and backward of a function that reads prefix and memory."""
        wanted = [self.q_BTHE, self.k_BTGE, self.v_BTGE, *(self.prefix or ())]
        wanted += [memory.k_NGSE, memory.v_NGSE] if memory else []
        return partial(
            self._both,
            lambda: attention(self.q_BTHE, self.k_BTGE, self.v_BTGE, prefix=self.prefix, memory=memory),
            wanted,
        )

    def kernel(self) -> Side:
        """Forward and backward of the library's kernel over the context alone: on a GPU the fastest that it has."""
        context = [self.q_BTHE, self.k_BTGE, self.v_BTGE]

        def attend() -> Tensor:
            if context[0].device.type == "cpu":
                return _sdpa(*context, is_causal=True)
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                return _sdpa(*context, is_causal=True)

        return partial(self._both, attend, context)

    def dense(self, memory: MemoryKeys) -> Side:
        """Forward and backward of the library's kernel over prefix, all memories and context, with a mask."""
        mask_TJ = self.mask(memory)
        return self._over_all(memory, lambda q, k, v: _sdpa(q, k, v, mask_TJ=mask_TJ))

    def flex(self, memory: MemoryKeys, *, compiled: bool = True) -> Side:
        """Forward and backward of FlexAttention over prefix, all memories and context: a mask that skips blocks."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        attend = torch.compile(flex_attention) if compiled else flex_attention
        mask_TJ = self.mask(memory)
        tokens, keys = mask_TJ.shape
        blocks = create_block_mask(
            lambda _, __, token, key: mask_TJ[token, key],
            None,
            None,
            tokens,
            keys,
            device=str(mask_TJ.device),
        )

        def kernel(q_BTHE: Tensor, k_BJGE: Tensor, v_BJGE: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BJGE, v_BJGE))
            out_BHTE: Tensor = attend(q, k, v, block_mask=blocks, enable_gqa=True)
            return out_BHTE.transpose(1, 2)

        return self._over_all(memory, kernel)

    def mask(self, memory: MemoryKeys) -> Tensor:
        """Return what each token of a row may read of prefix, its memories and context, bool (T, J)."""
        prefix = 0 if self.prefix is None else len(self.prefix.k_PGE)
        T, device = self.q_BTHE.shape[1], self.q_BTHE.device
        N, S = len(memory.k_NGSE) // len(self.q_BTHE), memory.k_NGSE.shape[2]
        reads_CN = torch.zeros(memory.slots_BCK.shape[1], N + 1, dtype=torch.bool, device=device)
        reads_CN.scatter_(
            1, memory.slots_BCK[0] % (N + 1), True
        )  # an empty slot is the last column, and dropped
        reads_TN = reads_CN[:, :N].repeat_interleave(memory.chunk_tokens, dim=0)[:T]
        everything = torch.ones(T, prefix, dtype=torch.bool, device=device)
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        return torch.cat([everything, reads_TN.repeat_interleave(S, dim=1), causal], dim=1)

    def _over_all(self, memory: MemoryKeys, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Side:
        """A kernel over one sequence of keys a row: the prefix, every memory of the row, the context."""
        rows = len(self.q_BTHE)
        before = self.prefix or PrefixKeys(self.k_BTGE[0, :0], self.v_BTGE[0, :0])
        pools = (memory.k_NGSE, memory.v_NGSE)

        def attend() -> Tensor:
            k, v = (
                torch.cat(
                    [
                        prefix.expand(rows, -1, -1, -1),
                        pool.view(rows, -1, *pool.shape[1:]).transpose(2, 3).flatten(1, 2),
                        own,
                    ],
                    dim=1,
                )
                for prefix, pool, own in zip(before, pools, (self.k_BTGE, self.v_BTGE), strict=True)
            )
            return kernel(self.q_BTHE, k, v)

        wanted = [self.q_BTHE, self.k_BTGE, self.v_BTGE, *(self.prefix or ()), *pools]
        return partial(self._both, attend, wanted)

    def _both(self, attend: Callable[[], Tensor], wanted: list[Tensor]) -> list[Tensor]:
        out = attend()
        return [out.detach(), *torch.autograd.grad(out, wanted, self.grad_BTHE)]


def measure(config: RunConfig, conditions: Conditions) -> Bench:
    """Time all functions at the model's row length and head size, and what decides at others."""
    model, places, dtype = config.model, config.retrieval.window, training_dtype(config)
    problem = Problem.random(model, places=places, dtype=dtype, device=conditions.device)
    half = Problem.random(
        replace(model, row_tokens=model.row_tokens // 2), places=places, dtype=dtype, device=conditions.device
    )
    flex = (
        {"FlexAttention, fresh memories": problem.flex(problem.fresh)}
        if conditions.device.type == "cuda"
        else {}
    )
    times = interleaved(
        {
            "kernel without memory": problem.kernel(),
            "ours without memory": problem.side(fast_attention, None),
            "ours": problem.side(fast_attention, problem.window),
            "dense mask": problem.dense(problem.window),
            "ours, fresh memories": problem.side(fast_attention, problem.fresh),
            "dense mask, fresh memories": problem.dense(problem.fresh),
            **flex,
        },
        conditions,
    )
    kernel, ours = times["kernel without memory"], times["ours"]
    fresh, masked = times["ours, fresh memories"], times["dense mask, fresh memories"]
    distinct = len(problem.fresh.k_NGSE) // len(problem.q_BTHE)
    read = (model.row_tokens + 1) / 2 + model.num_prefix + places * model.tokens_kept
    in_mask = model.row_tokens + model.num_prefix + distinct * model.tokens_kept
    other, other_times = _paper_heads(model, places, dtype, conditions)
    return Bench(
        shape={
            "rows": f"{len(problem.q_BTHE)} of {model.row_tokens} tokens",
            "heads": f"{model.num_heads}/{model.num_kv_heads} of {model.head_size}",
            "read by a chunk": f"{places} x {model.tokens_kept} tokens and a prefix of {model.num_prefix}",
            "type": str(dtype).removeprefix("torch."),
        },
        times=[*times.values(), *other_times],
        figures=[
            ratio(
                "ours with memory / library's kernel without",
                ours,
                kernel,
                target=_AGAINST_KERNEL[conditions.device.type],
                note="forward and backward; a reference per chunk, shared by a window",
            ),
            ratio("ours with memory / ours without", ours, times["ours without memory"]),
            ratio(
                "dense mask / ours, fresh memories",
                masked,
                fresh,
                target=_AGAINST_MASK,
                at_least=True,
                note=f"{distinct} distinct memories; keys in the mask / keys that a token reads, on average: "
                f"{in_mask / read:.1f}",
            ),
            *_room(problem, half),
            *(ratio(f"{name} / ours", times[name], fresh) for name in flex),
            ratio("dense mask / ours, a reference per chunk", times["dense mask"], ours),
            *other,
        ],
        charts=[_over_lengths(model, places, dtype, conditions)],
    )


def peak_bytes(run: Side, device: torch.device) -> int:
    """Return the most bytes of tensors that a side holds beyond those that are there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Held() as held:
        run()
    return int(held.most)


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of what operators return, while it lives; not what lives within one operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            self._count(given, made=False)
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            self._count(made, made=True)
        return out

    def _count(self, value: object, *, made: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key, size = id(storage), storage.nbytes() if made else 0
        if key in self._known:
            return

        def forget(_: object) -> None:
            del self._known[key]
            self._now -= size

        self._known[key] = weakref.ref(storage, forget)
        self._now += size
        self.most = max(self.most, self._now)


def _room(problem: Problem, half: Problem) -> list[Figure]:
    """How much room ours and the dense mask take, forward and backward."""
    device = problem.q_BTHE.device
    dense = peak_bytes(problem.dense(problem.fresh), device) + problem.mask(problem.fresh).nbytes
    ours, ours_half = (peak_bytes(each.side(fast_attention, each.fresh), device) for each in (problem, half))
    return [
        Figure(
            "room of ours, twice as long a row with twice as many memories",
            (ours / ours_half,),
            target=2.1,
            note="most bytes of tensors at a time; what grows with tokens x memories would make it 4",
        ),
        Figure(
            "room of the dense mask / ours",
            (dense / ours,),
            note=f"{binary(dense)}, the mask itself included, and {binary(ours)}",
        ),
    ]


def _paper_heads(
    model: ModelConfig, places: int, dtype: torch.dtype, conditions: Conditions
) -> tuple[list[Figure], list[Times]]:
    """Ours at the paper's head size."""
    heads = f"heads of {PAPER_HEAD_SIZE}"
    problem = Problem.random(
        replace(model, head_size=PAPER_HEAD_SIZE), places=places, dtype=dtype, device=conditions.device
    )
    kernel, ours = interleaved(
        {
            f"kernel without memory, {heads}": problem.kernel(),
            f"ours, {heads}": problem.side(fast_attention, problem.window),
        },
        conditions,
    ).values()
    return [ratio(f"ours with memory / library's kernel without, {heads}", ours, kernel)], [kernel, ours]


def _over_lengths(model: ModelConfig, places: int, dtype: torch.dtype, conditions: Conditions) -> Chart:
    """Time over the row's length."""
    lengths = [
        model.row_tokens // part for part in (8, 4, 2, 1) if model.row_tokens // part >= model.chunk_tokens
    ]
    points: dict[str, list[tuple[float, float]]] = {}
    for tokens in lengths:
        problem = Problem.random(
            replace(model, row_tokens=tokens), places=places, dtype=dtype, device=conditions.device
        )
        sides = {
            "ours, with memory": problem.side(fast_attention, problem.fresh),
            "library's kernel, without": problem.kernel(),
            "dense mask, with memory": problem.dense(problem.fresh),
        }
        for name, times in interleaved(sides, conditions).items():
            points.setdefault(name, []).append((tokens, times.seconds))
    return Chart(
        "Forward and backward, fresh memories",
        "tokens of a row",
        "seconds",
        [
            Series(name, line, colour=number, look=Look.dots)
            for number, (name, line) in enumerate(points.items())
        ],
        is_log=True,
    )


def _sdpa(
    q_BTHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor, *, mask_TJ: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTGE, v_BTGE))
    out_BHTE = scaled_dot_product_attention(q, k, v, attn_mask=mask_TJ, is_causal=is_causal, enable_gqa=True)
    return out_BHTE.transpose(1, 2)
