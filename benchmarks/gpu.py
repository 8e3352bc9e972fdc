"""Everything about speed on one GPU, in ten minutes at most: correctness, then `memory3 bench`, then one table.

    python -m benchmarks.gpu                 # on a GPU: `base`, the paper's layers, and its 2.4B model
    python -m benchmarks.gpu --smallest      # the same parts at the smallest sizes, on any machine

Parts run one after the other, each in a process of its own, the small ones first; each has its share of the time and
what those before it left. What does not fit is named and left out. `layers` are eight of the paper's layers, `paper` is
its whole model, warmup alone: MFU is that of micro-batches that fill the GPU. Written to `benchmarks/results/gpu/`:
what each part writes, and `gpu.md`, the table.

The smallest form runs in a test, on a CPU.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self, cast

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from data.files import write_atomic
from launch import build
from launch.bench_attention import Problem
from launch.devices import DEVICES, device_here
from launch.timing import machine
from model.attention import PrefixKeys, fast_attention, reference_attention
from model.config import ModelConfig
from model.memory import MemoryBatch, ReferenceBatch
from model.transformer import Memory3LM
from train import distributed
from train.config import EngineConfig, OptimConfig
from train.engine import DeepSpeedEngine, ModelInput

_SECONDS = 570
_CORRECT_SECONDS = 60
_BASE = ["model=base", "model.prefix_ids=[1,2,3,4]"]
_PAPER = ["model=paper_2b4", "model.prefix_ids=[1,2,3,4]"]
_LAYERS = [*_PAPER, "model.num_layers=8", "model.num_memory_layers=4", "model.vocab_size=32768"]
"""Eight layers of the paper's model: each is what it is among forty-four."""
_SHAPES = ((64, 8, 512), (80, 8, 512), (64, 32, 512), (80, 128, 512), (64, 8, 500), (80, 32, 389))
"""Head size, tokens kept, tokens of a row: whole chunks of 64, and others."""
_TINY = [
    "model=nano", "model.init=normal", "model.num_layers=2", "model.num_memory_layers=1", "model.width=64",
    "model.ffn_width=64", "model.num_heads=2", "model.head_size=32", "model.row_tokens=128", "model.vocab_size=128",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One call of `memory3 bench`.

    Attributes:
        name: Of its folder of results.
        subject: What is measured.
        settings: At which size.
        seconds: Its share of the time; what it leaves is the next one's.
    """

    name: str
    subject: str
    settings: list[str]
    seconds: int


def parts(*, smallest: bool, peak_tflops: float | None) -> list[Part]:
    """What is measured, the small first, the whole 2.4B model last."""
    if smallest:
        rows = ["warmup.rows_per_step=2", "warmup.micro_rows=1"]
        subjects = {"attention": [], "step": rows, "compile": [], "generate": [], "loader": rows}
        return [Part("tiny", subject, _TINY + more, _SECONDS) for subject, more in subjects.items()]
    peak = [] if peak_tflops is None else [f"logging.peak_tflops={peak_tflops:g}"]
    eager = ["model.compile=false"]
    found = [
        Part("layers", "attention", _LAYERS, 40),
        Part("base", "attention", _BASE, 35),
        Part("layers", "loader", [*_LAYERS, *_rows(step=8, micro=8)], 35),
        Part("layers", "compile", _LAYERS, 30),
        Part("base", "compile", _BASE, 30),
        Part("layers", "generate", [*_LAYERS, *eager], 45),
        Part("base", "generate", [*_BASE, *eager], 45),
        Part("layers", "step", [*_LAYERS, *_rows(step=16, micro=8)], 65),
        Part("base", "step", [*_BASE, *_rows(step=32, micro=32)], 85),
        Part("paper", "step", [*_PAPER, "model.num_memory_layers=0", *_rows(step=64, micro=4)], 100),
    ]
    return [replace(part, settings=[*part.settings, *peak]) for part in found]


def _rows(*, step: int, micro: int) -> list[str]:
    return [f"warmup.rows_per_step={step}", f"warmup.micro_rows={micro}"]


def main(argv: list[str] | None = None) -> int:
    """Run everything that fits into the time; exit code 1 if something is not correct or failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smallest", action="store_true", help="the smallest sizes, on any machine")
    parser.add_argument("--output", default="benchmarks/results/gpu", help="folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not arguments.smallest and not torch.cuda.is_available():
        print(
            "gpu: PyTorch finds no GPU here; `memory3 doctor` says why, or give --smallest", file=sys.stderr
        )
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(arguments.output)
    ends = time.monotonic() + _CORRECT_SECONDS
    table = Table(
        "part", "what", "value", "target", "", title=f"One GPU: {machine(device)}", title_justify="left"
    )
    failed = False
    for what, error, limit in correctness(device):
        failed |= error > limit
        table.add_row("correct", what, f"{error:.1e}", f"≤ {limit:g}", _verdict(error <= limit))
    name, _ = device_here()
    peak = DEVICES[name].tflops if device.type == "cuda" and name in DEVICES else None
    for part in parts(smallest=arguments.smallest, peak_tflops=peak):
        ends += part.seconds
        left = ends - time.monotonic()
        found = _run(part, folder / part.name, seconds=left) if left > 0 else "no time left"
        if isinstance(found, str):
            failed = True
            table.add_row(part.name, part.subject, found)
            continue
        for figure in found["figures"]:
            target = "" if figure["target"] is None else f"{figure['target']:g}"
            value = f"{figure['value']:,.4g} {figure['unit']}".strip()
            table.add_row(part.name, figure["what"], value, target, _verdict(figure["met"]))
    console = Console(width=150, record=True)
    console.print(table)
    console.print(f"commit {build.code().get('commit', 'none')}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "gpu.md", f"```\n{console.export_text()}```\n".encode())
    return int(failed)


def correctness(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Yield what is compared with the plain definition in float64, the relative error (or a count), and its limit."""
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        for heads, kept, tokens in _SHAPES:
            config = ModelConfig(
                row_tokens=512,
                num_heads=4,
                num_kv_heads=2,
                head_size=heads,
                tokens_kept=kept,
                prefix_ids=[1, 2, 3],
            )
            rounded = Problem.random(config, places=5, dtype=dtype, device=device)
            found = []
            for attention, precise in ((fast_attention, dtype), (reference_attention, torch.float64)):
                problem = _cut(rounded, tokens, precise)
                found.append(cast(list[torch.Tensor], problem.side(attention, problem.window)()))
            kind = str(dtype).removeprefix("torch.")
            yield (
                f"attention and its gradients: {tokens} tokens, head size {heads}, {kept} kept, {kind}",
                _error(*found),
                limit,
            )
    if device.type == "cuda":
        yield "a compiled model's gradients in bfloat16, online memory", _compiled(device), 5e-2
    yield "live memory and the same memory from a bank, bitwise", _live_and_stored(device), 0.0
    with ProcessPoolExecutor(1, get_context("spawn")) as aside:  # ranks leave their mark on a process
        yield "waits for the device while a step is queued", aside.submit(waits_of_a_step).result(), 0.0


def _cut(problem: Problem, tokens: int, dtype: torch.dtype) -> Problem:
    """Return the first tokens of a problem's rows, of which the last chunk may be short, and all that they read."""

    def leaf(values: torch.Tensor) -> torch.Tensor:
        return values.detach().to(dtype).requires_grad_()

    assert problem.prefix is not None
    read = problem.window
    return replace(
        problem,
        q_BTHE=leaf(problem.q_BTHE[:, :tokens]),
        k_BTGE=leaf(problem.k_BTGE[:, :tokens]),
        v_BTGE=leaf(problem.v_BTGE[:, :tokens]),
        prefix=PrefixKeys(*map(leaf, problem.prefix)),
        window=replace(read, k_NGSE=leaf(read.k_NGSE), v_NGSE=leaf(read.v_NGSE)),
        grad_BTHE=problem.grad_BTHE[:, :tokens].to(dtype),
    )


def _error(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> float:
    """Return the largest relative error of some tensors."""
    return max(
        float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, theirs, strict=True)
    )


def _compiled(device: torch.device) -> float:
    """Return the error of what is trained with, beside the plain definition in float32.

    All tokens of a reference are kept: which ones are would be another choice where two weigh nearly the same.
    """
    config = ModelConfig(
        num_layers=3,
        num_memory_layers=2,
        row_tokens=256,
        prefix_ids=[1, 2, 3],
        reference_tokens=16,
        tokens_kept=16,
    )
    tokens = torch.randint(0, config.vocab_size, (2, 257), device=device)
    references = ReferenceBatch(
        torch.randint(0, config.vocab_size, (8, config.reference_tokens), device=device),
        torch.full((8,), config.reference_tokens, device=device),
        torch.zeros(8, dtype=torch.int64, device=device),
        torch.arange(8, device=device).view(2, 4, 1),
    )
    found: list[list[torch.Tensor]] = []
    weights: dict[str, torch.Tensor] = {}
    for dtype, attention, compiled in (
        (torch.bfloat16, fast_attention, True),
        (torch.float32, reference_attention, False),
    ):
        torch.manual_seed(0)
        model = Memory3LM(replace(config, compile=compiled), attention).to(device, dtype)
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        loss = model(tokens[:, :-1], targets_BT=tokens[:, 1:], memory=references)
        loss.sum.backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    return _error(*found)


def _live_and_stored(device: torch.device) -> float:
    from memorybank import codecs
    from memorybank.config import CodecKind
    from memorybank.record import MemoryShape

    config = ModelConfig(num_layers=3, num_memory_layers=2, row_tokens=256, prefix_ids=[1, 2, 3])
    torch.manual_seed(0)
    model = Memory3LM(config).to(torch.bfloat16).to(device).eval()
    codec = codecs.of_kind(CodecKind.model, MemoryShape.of(config), torch.bfloat16)
    tokens = torch.randint(0, config.vocab_size, (8, config.reference_tokens), device=device)
    with torch.no_grad():
        live = model.encode(tokens, torch.full((8,), config.reference_tokens, device=device))
        stored = codec.decode(codec.encode(live).cpu().to(device))
        slots = torch.arange(8, device=device).view(2, 4, 1)
        rows = tokens.view(2, -1)[:, :256]
        logits = [model(rows, memory=MemoryBatch(pool, slots)) for pool in (live, stored)]
    return float((logits[0] - logits[1]).abs().max())


class Waits(TorchDispatchMode):
    """Counts what makes the CPU wait for the device: values that it reads or makes, and DeepSpeed's `synchronize`.

    On a GPU PyTorch tells of the calls of CUDA's that wait, but of no copy that was asked not to, and does so all the
    same: from pages that may move, or of what does not lie in one piece.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self._told = warnings.catch_warnings(record=True)

    def __enter__(self) -> Self:
        from deepspeed.accelerator import get_accelerator

        self._accelerator = get_accelerator()
        self._accelerator.synchronize = self._counted
        if torch.cuda.is_available():
            self._warnings = self._told.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)  # type: ignore[no-untyped-call]
        del self._accelerator.synchronize
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
            self._told.__exit__(*problem)
            self.count += sum("synchronizing CUDA operation" in str(each.message) for each in self._warnings)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        if not torch.cuda.is_available():
            self.count += function in (aten._local_scalar_dense.default, aten.lift_fresh.default)
        elif function is aten._to_copy.default and args[0].is_cpu:
            stays = args[0].is_pinned() and args[0].is_contiguous()
            self.count += torch.device(kwargs.get("device") or "cpu").type == "cuda" and not stays
        return function(*args, **kwargs)

    def _counted(self, *_: Any) -> None:
        self.count += 1


def waits_of_a_step() -> float:
    """Return how often an update of two micro-batches, which encode references, makes the CPU wait."""
    ranks = distributed.start(threads=torch.get_num_threads())
    config = ModelConfig(
        num_layers=2, num_memory_layers=1, width=128, ffn_width=128, row_tokens=128, prefix_ids=[1, 2, 3]
    )
    # Two rows: what is read of them does not lie in one piece.
    tokens = torch.randint(0, config.vocab_size, (2, 129))
    lengths = torch.full((4,), 32)
    references = ReferenceBatch(
        tokens[:, :64].reshape(4, 32), lengths, torch.zeros_like(lengths), torch.arange(4).view(2, 2, 1)
    )
    micro = ModelInput(tokens[:, :-1], tokens[:, 1:], references)
    try:
        engine = DeepSpeedEngine(
            Memory3LM(config),
            optim=OptimConfig(),
            engine=EngineConfig(),
            rows_per_step=4 * ranks.world_size,
            micro_rows=2,
            ranks=ranks,
        )
        for _ in range(3):  # DeepSpeed's timers begin at the third step
            engine.train_step([micro, micro], lr=1e-3)
        with Waits() as waits:
            told = engine.queue_step((micro.to(ranks.device) for _ in range(2)), lr=1e-3)
        assert not told().skipped
    finally:
        distributed.stop()
    return float(waits.count)


def _run(part: Part, folder: Path, *, seconds: float) -> dict[str, Any] | str:
    """Return what a part found, or why it found nothing."""
    command = [sys.executable, "-m", "launch.cli", "bench", part.subject, "--output", str(folder.absolute())]
    try:
        done = subprocess.run(
            [*command, "--rounds", "5", *part.settings],
            cwd=Path(__file__).resolve().parents[1],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "no time left"
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
    found: dict[str, Any] = json.loads((folder / f"bench_{part.subject}.json").read_text())
    return found


def _verdict(met: bool | None) -> str:
    return {None: "", True: "met", False: "missed"}[met]


if __name__ == "__main__":
    sys.exit(main())
