"""Whether the memory of this machine suffices for a run: asked before it starts, and explained when it did not.

Every figure is an estimate of `launch.planning`, the one that `memory3 plan` prints; no torch.
Invariants: a run is refused only when weights and optimizer alone, which are exact, exceed all the memory
there is; everything less certain is a warning.
Not here: the formulas (`train.footprint`, `model.footprint`), what fits elsewhere (`memory3 plan`).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.compose import load_config
from launch.config import LauncherKind, RunConfig
from launch.devices import available_here, device_memory_here, memory_here
from launch.planning import USABLE, stage_memory
from launch.units import binary
from train.config import StageConfig
from train.footprint import RankMemory

log = logging.getLogger(__name__)

_SAID = ("DefaultCPUAllocator", "CUDA out of memory", "not enough memory", "can't allocate memory")
"""Words of the allocators that raise a RuntimeError."""


def check(config: RunConfig) -> None:
    """Compare what the ranks of this machine will hold with its memory, where they run on it.

    Raises:
        ValueError: The state of training alone is larger than all of it.
    """
    if config.launcher.kind is not LauncherKind.local:
        return
    device = device_memory_here()
    total = memory_here() // config.engine.num_ranks if device is None else device
    free = available_here() // config.engine.num_ranks if device is None else device
    for name, stage in config.stages.items():
        taken = _taken(config, stage)
        # How many parameters ZeRO-3 gathers at a time is not known.
        state = taken.masters + taken.moments + (taken.parameters if config.engine.zero_stage < 3 else 0)
        if state > total:
            raise ValueError(
                f"{name}: weights and optimizer of a rank take {binary(state)}, and it has "
                f"{binary(total)}; raise engine.zero_stage (now {config.engine.zero_stage}) or engine.num_ranks, or "
                "choose a smaller model: `memory3 plan` says what fits"
            )
        if taken.resident > free * USABLE:
            log.warning(
                "%s: a rank may take %s, and %s are free for it (%s); %s", name, binary(taken.resident), binary(free),
                _largest(taken), suggestion(config, name, round(free * USABLE)),
            )  # fmt: skip


def suggestion(config: RunConfig, name: str, limit: int | None = None) -> str:
    """Return what to set for a stage to take less: a smaller micro-batch, of which the same rows consist.

    Args:
        config: The run's.
        name: Of the stage.
        limit: Bytes that a rank may take; None, or one that it keeps already: the next smaller micro-batch.
    """
    stage: StageConfig = getattr(config, name)
    now = stage.micro_rows
    smaller = [rows for rows in range(now - 1, 0, -1) if now % rows == 0]
    if not smaller:
        return (
            f"{name}.micro_rows is 1 already: set model.activation_checkpointing=true, or raise engine.zero_stage or "
            "engine.num_ranks; `memory3 plan` says what fits"
        )
    totals = {rows: _taken(config, stage, micro_rows=rows).resident for rows in smaller}
    found = next((rows for rows in smaller if limit is not None and totals[rows] <= limit), smaller[0])
    return f"set {name}.micro_rows={found} (now {now}): the same rows in the same order, and {binary(totals[found])}"


@contextmanager
def explained(config: RunConfig, name: str) -> Iterator[None]:
    """Within, what an allocator raises says what takes most, and what to set.

    Raises:
        ValueError: Memory ran out in this stage.
    """
    try:
        yield
    except Exception as problem:
        if not _ran_out(problem):
            raise
        first = str(problem).strip().partition("\n")[0] or type(problem).__name__
        taken = _taken(config, getattr(config, name))
        raise ValueError(
            f"out of memory in the {name} stage: {first}; a rank takes about {binary(taken.resident)} "
            f"({_largest(taken)}); {suggestion(config, name)}"
        ) from problem


def explain_kill(run: Path, *, by_kernel: bool) -> str:
    """Return what follows on "was ended by SIGKILL": whether memory was the reason, what takes most, what to set.

    Args:
        run: The run folder.
        by_kernel: Whether the kernel has killed for want of memory meanwhile.
    """
    config = load_config(run / "config.yaml")
    name, taken = max(
        ((name, _taken(config, stage)) for name, stage in config.stages.items()),
        key=lambda each: each[1].resident,
    )
    why = (
        "the kernel has ended processes meanwhile for want of memory"
        if by_kernel
        else "if nobody sent that, the kernel did, for want of memory"
    )
    return (
        f"; {why}: in the {name} stage a rank takes about {binary(taken.resident)} ({_largest(taken)}); "
        f"{suggestion(config, name)}"
    )


def kernel_kills(counters: Path = Path("/proc/vmstat")) -> int:
    """Return how many processes the kernel has ended for want of memory since it started; 0 where it does not say."""
    try:
        lines = counters.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _ran_out(problem: BaseException) -> bool:
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem) for words in _SAID)


def _taken(config: RunConfig, stage: StageConfig, *, micro_rows: int | None = None) -> RankMemory:
    cpu = device_memory_here() is None
    return stage_memory(
        config, stage, zero_stage=config.engine.zero_stage, cpu=cpu, micro_rows=micro_rows or stage.micro_rows
    )


def _largest(taken: RankMemory) -> str:
    parts = sorted(taken.parts().items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {binary(size)}" for name, size in parts[:3])
