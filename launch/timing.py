"""Sides of a comparison, timed in turn, and the figures that follow.

Every figure is a ratio of two sides that ran in the same process within the same minutes: a round runs each side once,
the next round in the opposite order, and what is told is the median of the rounds' own ratios, with its quartiles.
So a slower clock or a busy neighbour moves both sides of a ratio and leaves the ratio nearly alone.

Not here: what is timed (`launch.bench_*`), tables and pictures (`launch.bench`).
"""

import gc
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from launch.chart import Chart

Side = Callable[[], object]

LEAST_ROUNDS = 5
"""Fewer make no median."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under which a benchmark runs.

    Attributes:
        rounds: How often each side runs.
        device: Where.
    """

    rounds: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class Times:
    """Of one side, in seconds, round by round.

    Attributes:
        name: What was timed.
        wall: As a clock on the wall tells it.
        cpu: CPU time of the process, all of its threads.
    """

    name: str
    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Median of the wall."""
        return median(self.wall)

    def plus(self, other: "Times", *, share: float = 1.0, name: str | None = None) -> "Times":
        """Both one after the other, of `other` only a share: what is amortised over several of these."""
        return Times(
            name or f"{self.name} + {share:.3g} {other.name}",
            tuple(a + share * b for a, b in zip(self.wall, other.wall, strict=True)),
            tuple(a + share * b for a, b in zip(self.cpu, other.cpu, strict=True)),
        )


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured number, and what it should be.

    Attributes:
        what: What it is; for a ratio both sides, and what they are scaled by.
        rounds: Its value, round by round.
        unit: Empty for a ratio.
        target: What is to be reached; None: it is told, not judged.
        at_least: Whether more is better.
        cpu: The same, by CPU time.
        note: How it is counted.
    """

    what: str
    rounds: tuple[float, ...]
    unit: str = ""
    target: float | None = None
    at_least: bool = False
    cpu: float | None = None
    note: str = ""

    @property
    def value(self) -> float:
        """Median of the rounds."""
        return median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which half of the rounds lie."""
        if len(self.rounds) == 1:
            return self.rounds[0], self.rounds[0]
        low, _, high = quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(frozen=True, slots=True)
class Bench:
    """What one benchmark found.

    Attributes:
        shape: What was computed: sizes, types, rows.
        times: All sides.
        figures: Ratios and rates of them.
        charts: Drawn beside the figures.
        findings: Anything else that is worth a line: where the time goes, what a bound is.
    """

    shape: Mapping[str, Any]
    times: Sequence[Times]
    figures: Sequence[Figure]
    charts: Sequence[Chart] = ()
    findings: Sequence[str] = field(default_factory=tuple)


def interleaved(
    sides: Mapping[str, Side], conditions: Conditions, *, warm: int = 1, repeats: int = 1
) -> dict[str, Times]:
    """Time sides in turn.

    Args:
        sides: What to run, by name; each leaves the next run of any side as it found it.
        conditions: How often, and where.
        warm: Runs of each side before the first round, not timed.
        repeats: Runs of each side in a round, whose mean counts: for what is over in a few milliseconds.
    """
    for _ in range(warm):
        for run in sides.values():
            run()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    names = list(sides)
    collected = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(conditions.rounds):
            for name in names if number % 2 == 0 else reversed(names):
                found[name].append(_timed(sides[name], repeats, conditions.device))
    finally:
        if collected:
            gc.enable()
    return {
        name: Times(name, *(tuple(part) for part in zip(*rounds, strict=True)))
        for name, rounds in found.items()
    }


def ratio(
    what: str,
    ours: Times,
    against: Times,
    *,
    scale: float = 1.0,
    target: float | None = None,
    at_least: bool = False,
    by_cpu: bool = False,
    note: str = "",
) -> Figure:
    """Return `scale` times the ratio of two sides of the same rounds, by the clock on the wall or by CPU time."""
    wall, cpu = (
        tuple(scale * a / b for a, b in zip(left, right, strict=True))
        for left, right in ((ours.wall, against.wall), (ours.cpu, against.cpu))
    )
    rounds = cpu if by_cpu else wall
    return Figure(what, rounds, target=target, at_least=at_least, cpu=median(cpu), note=note)


def rate(
    what: str,
    times: Times,
    *,
    amount: float,
    unit: str,
    target: float | None = None,
    note: str = "",
) -> Figure:
    """Return how much of something a side does in a second; by CPU time, in a second of one core."""
    return Figure(
        what,
        tuple(amount / seconds for seconds in times.wall),
        unit=unit,
        target=target,
        at_least=True,
        cpu=amount / median(times.cpu),
        note=note,
    )


def machine(device: torch.device) -> str:
    """Name the device that computes, and the threads where it is a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''} on {os.cpu_count()} cores"


def _timed(run: Side, repeats: int, device: torch.device) -> tuple[float, float]:
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    bf16 = any("avx512_bf16" in line for line in lines if line.startswith("flags"))
    return f"{name}, AVX512-BF16" if bf16 else name
