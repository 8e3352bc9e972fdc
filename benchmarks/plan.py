"""Compare what `memory3 plan` says with real DeepSpeed ranks and with the files of a real run.

    python -m benchmarks.plan --out benchmarks/results/plan.md --run RUN_FOLDER

Memory: every case starts its ranks. Each becomes an idle process first: libraries are loaded, and a model of the same
shapes, but of two layers, has taken a step, so that kernels are compiled, and was let go; and one of nearly no bytes,
since DeepSpeed holds the parameters of the last engine until another is built. Then the engine of the case is built and
takes steps; halfway it validates, where it reads memories, and saves, as a run does. The growth is the largest resident
set from there on (VmHWM, reset through clear_refs) over the idle one, of the rank that grew most. It is measured twice:
with `MALLOC_MMAP_THRESHOLD_=65536`, which makes glibc give freed blocks back to the kernel, so that tensors alone are
counted, in two steps; and as runs are, where the resident set also holds the heap's gaps, in a dozen.

Files: the sizes of all checkpoints and generations of a run folder, against the plan of its own configuration: of each
generation for the number of references that it holds, and the number that was expected before.
"""

import argparse
import gc
import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from data.prepare import prepared_sizes  # noqa: E402
from launch.compose import compose_config, load_config  # noqa: E402
from launch.config import RunConfig  # noqa: E402
from launch.forecast import forecast  # noqa: E402
from launch.planning import stage_memory, vector_bytes  # noqa: E402
from launch.units import binary  # noqa: E402
from memorybank.cost import generation_bytes  # noqa: E402
from memorybank.store import Generation  # noqa: E402
from model.config import Init, ModelConfig  # noqa: E402
from model.flops import count_parameters  # noqa: E402
from train.config import MemorySource, StageConfig  # noqa: E402
from train.footprint import RankMemory, checkpoint_bytes  # noqa: E402

if TYPE_CHECKING:
    from train.distributed import Ranks
    from train.engine import ModelInput, Snapshot

STEPS = 12
"""A heap has most of its gaps by then: one rank of `nano` held 378 MiB after 16 updates and after 60."""
_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: overrides of the configuration, and the stage that is trained."""

    stage: str
    overrides: tuple[str, ...]

    def config(self) -> RunConfig:
        return compose_config(["experiment=quick", *self.overrides])


def cases() -> Iterator[Case]:
    """Three sizes, both stages, with and without recomputing; for the smallest one what else users change."""
    recomputing = "model.activation_checkpointing=true"
    for stage in ("warmup", "continual"):
        for model, ranks, rows in (("nano", 2, 8), ("micro", 1, 4), ("small", 1, 2)):
            case = _overrides(stage, model, ranks, rows)
            yield Case(stage, case)
            yield Case(stage, (*case, recomputing))
    for ranks, rows, accumulate in ((1, 8, 1), (2, 2, 1), (2, 2, 4)):
        yield Case("warmup", _overrides("warmup", "nano", ranks, rows, accumulate))
    plain = _overrides("warmup", "nano", 2, 8)
    yield Case("warmup", (*plain, "saving.asynchronous=false"))
    yield Case("warmup", (*_overrides("warmup", "nano", 1, 8), "engine.precision=fp32"))
    for zero_stage in (0, 2, 3):
        yield Case("warmup", (*plain, f"engine.zero_stage={zero_stage}"))
        yield Case("warmup", (*plain, f"engine.zero_stage={zero_stage}", recomputing))
    yield Case("continual", (*_overrides("continual", "nano", 2, 8), "continual.memory.source=online"))


def _overrides(stage: str, model: str, ranks: int, rows: int, accumulate: int = 1) -> tuple[str, ...]:
    return (
        f"model={model}",
        f"engine.num_ranks={ranks}",
        f"{stage}.micro_rows={rows}",
        f"{stage}.rows_per_step={rows * ranks * accumulate}",
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """What ranks grew by, tensors alone and with the heap's gaps, and what was planned."""

    case: Case
    planned: RankMemory
    tensors: int
    resident: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="run folder whose files are compared"
    )
    parser.add_argument("--only", default="", help="cases whose overrides hold this text")
    parser.add_argument("--out", type=Path, help="Markdown file")
    arguments = parser.parse_args(argv)
    lines = [*_files(arguments.run), *_memory(arguments.only)]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    return 0


def _memory(only: str) -> Iterator[str]:
    yield "| stage | overrides | tensors planned | found | ratio | resident planned | found | ratio |"
    yield "|---|---|---|---|---|---|---|---|"
    for case in cases():
        if only not in " ".join((case.stage, *case.overrides)):
            continue
        done = measure(case)
        line = (
            f"| {case.stage} | {' '.join(case.overrides)} | {binary(done.planned.total)} | {binary(done.tensors)} | "
            f"{done.planned.total / done.tensors:.3f} | {binary(done.planned.resident)} | {binary(done.resident)} | "
            f"{done.planned.resident / done.resident:.3f} |"
        )
        print(line, file=sys.stderr, flush=True)
        yield line


def measure(case: Case) -> Measured:
    """Run a case on its ranks, twice."""
    config = case.config()
    stage: StageConfig = getattr(config, case.stage)
    planned = stage_memory(config, stage, zero_stage=config.engine.zero_stage, cpu=True)
    tensors = _grown(case, {_THRESHOLD: "65536"}, steps=2)
    resident = _grown(case, {}, steps=STEPS)
    return Measured(case, planned, tensors, resident)


def _grown(case: Case, variables: Mapping[str, str], *, steps: int) -> int:
    """Return by how much the rank grew that grew most."""
    os.environ.pop(_THRESHOLD, None)  # glibc reads it when a process starts
    os.environ |= variables
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers, processes = [], []
    for rank in range(case.config().engine.num_ranks):
        answer, told = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(case, rank, port, steps, told), daemon=True)
        process.start()
        told.close()
        answers.append(answer)
        processes.append(process)
    found: list[int] = [answer.recv() for answer in answers]
    for process in processes:
        process.join()
    return max(found)


def _rank(case: Case, rank: int, port: int, steps: int, told: Connection) -> None:
    config = case.config()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(config.engine.num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    warnings.simplefilter("ignore")
    from train import distributed

    ranks = distributed.start(threads=1)
    layers = max(2, min(config.model.num_memory_layers, 1) + 1)
    few = replace(config, model=replace(config.model, num_layers=layers, num_memory_layers=1))
    _steps(few, case.stage, ranks, 1)
    _steps(replace(few, model=_least(few.model)), case.stage, ranks, 1)
    gc.collect()
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")
    idle = _status("VmRSS")
    _steps(config, case.stage, ranks, steps)
    told.send(_status("VmHWM") - idle)
    ranks.barrier()
    distributed.stop()


def _least(model: ModelConfig) -> ModelConfig:
    """A model of nearly no bytes: DeepSpeed holds the last engine's parameters until another engine is built."""
    return replace(
        model,
        vocab_size=64,
        width=64,
        num_heads=1,
        num_kv_heads=1,
        ffn_width=64,
        row_tokens=2 * model.chunk_tokens,
        init=Init.normal,
    )


def _steps(config: RunConfig, name: str, ranks: "Ranks", steps: int) -> None:
    """Build the engine of a stage, and take steps on random tokens, which read memories as a bank would give them."""
    import torch

    from model.transformer import Memory3LM
    from train.engine import DeepSpeedEngine

    stage: StageConfig = getattr(config, name)
    torch.manual_seed(0)
    engine = DeepSpeedEngine(
        Memory3LM(config.model),
        optim=config.optim,
        engine=config.engine,
        rows_per_step=stage.rows_per_step,
        micro_rows=stage.micro_rows,
        ranks=ranks,
    )
    accumulate = stage.rows_per_step // (stage.micro_rows * ranks.world_size)
    inputs = cycle([_input(config, stage) for _ in range(3)])  # as many as there are at a time
    with TemporaryDirectory() as folder, ThreadPoolExecutor(1) as aside:
        for step in range(steps):
            engine.train_step(islice(inputs, accumulate), lr=1e-3)
            if step == (steps - 1) // 2:
                if stage.memory is not None:
                    engine.token_losses(next(inputs))
                    engine.attention_shares(next(inputs))
                copy = config.saving.asynchronous
                written = aside.submit(_write, engine.snapshot(copy=copy), Path(folder))
                if not copy:
                    written.result()


def _write(snapshot: "Snapshot", folder: Path) -> None:
    from safetensors.torch import save_file

    snapshot.write(folder)
    save_file(dict(snapshot.weights), folder / "model.safetensors")


def _input(config: RunConfig, stage: StageConfig) -> "ModelInput":
    import torch

    from model.memory import ExplicitMemory, MemoryBatch, ReferenceBatch
    from train.engine import ModelInput

    model, rows = config.model, stage.micro_rows
    tokens_BT1 = torch.randint(3, model.vocab_size, (rows, model.row_tokens + 1))
    memory: MemoryBatch | ReferenceBatch | None = None
    if stage.memory is not None:
        chunks, window = model.row_tokens // model.chunk_tokens, config.retrieval.window
        own_BC = torch.arange(rows * chunks).view(rows, chunks, 1)
        back_K = torch.arange(window)
        slots_BCK = torch.where(torch.arange(chunks)[:, None] >= back_K, own_BC - back_K, -1)
        if stage.memory.source is MemorySource.online:
            tokens_NR = torch.randint(3, model.vocab_size, (rows * chunks, model.reference_tokens))
            lengths_N = torch.full((rows * chunks,), model.reference_tokens)
            memory = ReferenceBatch(tokens_NR, lengths_N, torch.zeros_like(lengths_N), slots_BCK)
        else:
            shape = (rows * chunks, model.num_memory_layers, model.num_kv_heads, model.tokens_kept)
            k, v = (torch.randn(*shape, model.head_size, dtype=torch.bfloat16) for _ in range(2))
            index = torch.arange(model.tokens_kept).expand(shape).contiguous()
            memory = MemoryBatch(ExplicitMemory(k, v, index), slots_BCK)
    return ModelInput(tokens_BT1[:, :-1], tokens_BT1[:, 1:], memory)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _give_back() -> None:
    """Have glibc give what is free at the top of its heap back, so that an idle process is small."""
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _files(runs: Sequence[Path]) -> Iterator[str]:
    if not runs:
        return
    yield "| files | planned | found | planned / found |"
    yield "|---|---|---|---|"
    for run in runs:
        config = load_config(run / "config.yaml")
        for folder in sorted((run / "checkpoints").iterdir()):
            planned = checkpoint_bytes(
                count_parameters(config.model).total,
                zero_stage=config.engine.zero_stage,
                precision=config.engine.precision,
                num_documents=_documents(folder),
            )
            yield _compared(folder, planned)
        for folder in sorted((run / "bank").glob("generation-*")):
            generation = Generation.open(folder)
            planned = generation_bytes(config.model, len(generation), vector_bytes=vector_bytes(config))
            yield _compared(folder, planned)
    yield ""
    yield "| bank epoch | may be read | chunks | found | expected | expected / found | at most |"
    yield "|---|---|---|---|---|---|---|"
    for run in runs:
        config = load_config(run / "config.yaml")
        sizes = prepared_sizes(config.data, Path(config.paths.root) / "prepared")
        for epoch in (sizes and forecast(config, sizes)) or []:
            folder = run / "bank" / f"generation-{epoch.stage}-{epoch.epoch:04d}"
            if folder.exists() and epoch.expected is not None:
                found = len(Generation.open(folder))
                before = replace(epoch, found=None)
                yield (
                    f"| {run.name}/{folder.name} | {epoch.references:,} | {epoch.chunks:,} | {found:,} | "
                    f"{epoch.expected:,} | {epoch.expected / found:.3f} | {before.most:,} |"
                )
    yield ""


def _documents(checkpoint: Path) -> int:
    import numpy as np

    return len(np.load(checkpoint / "drawn.npy", mmap_mode="r"))


def _compared(folder: Path, planned: int) -> str:
    found = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"| {folder.parent.parent.name}/{folder.name} | {planned:,} | {found:,} | {planned / found:.4f} |"


if __name__ == "__main__":
    sys.exit(main())
