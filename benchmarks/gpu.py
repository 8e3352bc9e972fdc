"""Everything about speed on one GPU, in ten minutes at most: correctness, then `memory3 bench`, then one table.

    python -m benchmarks.gpu                 # on a GPU: `base`, and layers of the paper's 2.4B model
    python -m benchmarks.gpu --smallest      # the same parts at the smallest sizes, on any machine

Parts run one after the other, each in a process of its own; what does not fit into the time is named and left out. The
paper's model is whole; of its warmup step, MFU is that of micro-batches that fill the GPU. Written to
`benchmarks/results/gpu/`: what each part writes, and `gpu.md`, the table.

The smallest form runs in a test, on a CPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data.files import write_atomic
from launch import build
from launch.bench_attention import Problem
from launch.devices import DEVICES, device_here
from launch.timing import machine
from model.attention import fast_attention, reference_attention
from model.config import ModelConfig
from model.memory import MemoryBatch, ReferenceBatch
from model.transformer import Memory3LM

_SECONDS = 550
_PAPER = ["model=paper_2b4", "model.prefix_ids=[1,2,3,4]"]
_LAYERS = ["model.num_layers=2", "model.num_memory_layers=1", "model.vocab_size=32768"]
"""Attention is the same in every layer."""
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
    """

    name: str
    subject: str
    settings: list[str]


def parts(*, smallest: bool, peak_tflops: float | None) -> list[Part]:
    """What is measured, the most important first."""
    if smallest:
        rows = ["warmup.rows_per_step=2", "warmup.micro_rows=1"]
        subjects = {"attention": [], "step": rows, "compile": [], "loader": rows}
        return [Part("tiny", subject, _TINY + more) for subject, more in subjects.items()]
    peak = [] if peak_tflops is None else [f"logging.peak_tflops={peak_tflops:g}"]
    base, paper = ["model=base", "model.prefix_ids=[1,2,3,4]", *peak], [*_PAPER, *peak]
    rows = ["warmup.rows_per_step=32", "warmup.micro_rows=32"]
    return [
        Part(
            "paper",
            "step",
            [*paper, "model.num_memory_layers=0", "warmup.rows_per_step=64", "warmup.micro_rows=4"],
        ),
        Part("paper", "compile", paper),
        Part("base", "compile", base),
        Part("base", "generate", [*base, "model.compile=false"]),
        Part("paper-memory", "step", [*paper, "warmup.rows_per_step=8", "warmup.micro_rows=2"]),
        Part("paper", "attention", [*paper, *_LAYERS]),
        Part("base", "step", [*base, *rows]),
        Part("base", "attention", [*base, *_LAYERS]),
        Part("base", "loader", [*base, *rows]),
    ]


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
    ends = time.monotonic() + _SECONDS
    table = Table(
        "part", "what", "value", "target", "", title=f"One GPU: {machine(device)}", title_justify="left"
    )
    failed = False
    for what, error, limit in correctness(device):
        failed |= error > limit
        table.add_row("correct", what, f"{error:.1e}", f"≤ {limit:g}", _verdict(error <= limit))
    name, _ = device_here()
    peak = DEVICES[name].tflops if device.type == "cuda" and name != "cpu" else None
    for part in parts(smallest=arguments.smallest, peak_tflops=peak):
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
    """Yield what is compared with the plain definition, the relative error, and what it may be."""
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
        for heads, kept in ((64, 8), (80, 8), (64, 32), (80, 128)):
            config = ModelConfig(
                row_tokens=512,
                num_heads=4,
                num_kv_heads=2,
                head_size=heads,
                tokens_kept=kept,
                prefix_ids=[1, 2, 3],
            )
            problem = Problem.random(config, places=5, dtype=dtype, device=device)
            ours, theirs = (
                problem.side(each, problem.window)() for each in (fast_attention, reference_attention)
            )
            assert isinstance(ours, list)
            assert isinstance(theirs, list)
            kind = str(dtype).removeprefix("torch.")
            yield (
                f"attention, head size {heads}, {kept} tokens kept, {kind}, and its gradients",
                _error(ours, theirs),
                limit,
            )
    if device.type == "cuda":
        yield "a compiled model's gradients in bfloat16, online memory", _compiled(device), 5e-2
    yield "live memory and the same memory from a bank, bitwise", _live_and_stored(device), 0.0


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
