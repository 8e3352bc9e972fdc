"""The matrix products of a model, timed: the bound that a step's operations are compared with.

A device's nominal rate says little about the shapes of a model; the products of one layer and of the head, forward and
backward, without attention's, are what its steps could reach if they did nothing else.
Not here: the operations of a step (`model.flops`), whole steps (`launch.bench_step`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.loss import TOKENS_AT_A_TIME

_SECONDS = 0.3
"""Products are repeated for so long, at least."""


@dataclass(frozen=True, slots=True)
class Products:
    """The matrix products of one layer and of the head, forward and backward, for a micro-batch.

    Attributes:
        run: Queues all of them.
        flops: Their operations.
    """

    run: Callable[[], None]
    flops: float


def products(model: ModelConfig, *, tokens: int, dtype: torch.dtype, device: torch.device) -> Products:
    """Make random operands and return their products; the random numbers of a run are left alone."""
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_size
    shapes = [
        (model.width, heads, tokens),
        (model.num_heads * model.head_size, model.width, tokens),
        (model.width, 2 * model.ffn_width, tokens),
        (model.ffn_width, model.width, tokens),
        (model.width, model.vocab_size, min(tokens, TOKENS_AT_A_TIME)),
    ]
    generator = torch.Generator(device).manual_seed(0)

    def operand(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    operands = [
        (operand(count, size_in), operand(size_out, size_in), operand(count, size_out))
        for size_in, size_out, count in shapes
    ]

    def run() -> None:
        for x, weight, grad in operands:
            x @ weight.T
            grad @ weight
            grad.T @ x

    return Products(run, sum(6.0 * count * size_in * size_out for size_in, size_out, count in shapes))


def products_rate(model: ModelConfig, *, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Time the products on this rank's device and return FLOP/s; a fraction of a second."""
    timed = products(model, tokens=tokens, dtype=dtype, device=device)
    timed.run()  # kernels are chosen at the first call
    times: list[float] = []
    while sum(times) < _SECONDS:
        _wait(device)
        started = time.perf_counter()
        timed.run()
        _wait(device)
        times.append(time.perf_counter() - started)
    return timed.flops / sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
