"""How long training stands still for a checkpoint: written at once, and written while training goes on.

    python benchmarks/checkpoint_save.py --out benchmarks/results/checkpoint_save.json
    python benchmarks/checkpoint_save.py --ranks 2 model=small model.row_tokens=128

Both are taken in turns, in one run, from the same engine (DeepSpeed, bfloat16, ZeRO-1, on CPU), with updates between
them; medians over the rounds. The stall is the time that `Checkpoints.save` takes, waiting for the one before not
included: the benchmark waits for that itself, and reports the time until publication apart. Updates during a save are
compared with updates without one, since both take the same cores: on a GPU they would not.

    stall ratio        asynchronous stall / synchronous stall               target: <= 0.10
    verification       bytes of a checkpoint / seconds of `data.files.verify`, from the page cache   target: >= 1 GB/s
    lost to contention seconds of the updates during a save - as many times the median of those without one
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

from benchmarks.origin import commit, cpu  # noqa: E402
from data.files import open_manifest, verify  # noqa: E402
from launch.compose import compose_config, laid_over  # noqa: E402
from model.transformer import Memory3LM  # noqa: E402
from train import distributed  # noqa: E402
from train.checkpoint import KIND, VERSION, Checkpoints, Retention, Saved  # noqa: E402
from train.engine import DeepSpeedEngine, ModelInput  # noqa: E402
from train.history import History  # noqa: E402
from train.state import RunState  # noqa: E402

_ROWS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks, and write what the first one measured."""
    arguments = _parser().parse_args(argv)
    if "RANK" in os.environ:
        return _rank(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory(dir=arguments.folder) as folder:
        command = [sys.executable, __file__, *(argv or sys.argv[1:]), "--folder", folder]
        common = {
            "WORLD_SIZE": str(arguments.ranks),
            "LOCAL_WORLD_SIZE": str(arguments.ranks),
            "MASTER_PORT": str(port),
        }
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ
                | common
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"},
                cwd=REPOSITORY,
            )
            for rank in range(arguments.ranks)
        ]
        if any(code := [rank.wait() for rank in ranks]):
            raise RuntimeError(f"ranks ended with {code}")
        measured = json.loads((Path(folder) / "measured.json").read_text())
    result = {
        "command": f"python benchmarks/checkpoint_save.py --ranks {arguments.ranks} --rounds {arguments.rounds} "
        + " ".join(arguments.overrides),
        "commit": commit(),
        "machine": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        **measured,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(render(result), encoding="utf-8")
    print(render(result))
    return 0


def measure(run: Path, ranks: distributed.Ranks, *, rounds: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Save in turns, synchronously and asynchronously, with updates between; figures in seconds."""
    config = compose_config(laid_over(["experiment=quick", "continual=null"], overrides))
    torch.manual_seed(0)
    engine = DeepSpeedEngine(
        Memory3LM(config.model),
        optim=config.optim,
        engine=config.engine,
        rows_per_step=_ROWS * ranks.world_size,
        micro_rows=_ROWS,
        ranks=ranks,
    )
    aside = ranks.aside()
    history = History.empty(1000)
    generator = torch.Generator().manual_seed(ranks.rank)
    rows = torch.randint(3, 100, (_ROWS, config.model.row_tokens + 1), generator=generator)
    micro = ModelInput(rows[:, :-1], rows[:, 1:])
    step = 0

    def update() -> float:
        nonlocal step
        step += 1
        started = time.perf_counter()
        engine.train_step([micro], lr=1e-4)
        return time.perf_counter() - started

    def saved(checkpoints: Checkpoints) -> tuple[Saved, list[float]]:
        """Save, and make updates until it is published on every rank."""
        ranks.barrier()
        checkpoints.save(engine, RunState("warmup", step=step), history, history.finished, keep=False)
        told, during = checkpoints.saved(), []
        while ranks.any(not told):
            during.append(update())
            told += checkpoints.saved()
        return told[0], during

    ways = {
        name: Checkpoints(run, inputs={}, retention=Retention(last=1, best=0), ranks=ranks, aside=group)
        for name, group in (("synchronous", None), ("asynchronous", aside))
    }
    update()
    for checkpoints in ways.values():  # memory is touched for the first time
        saved(checkpoints)
        update()
    stalls: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    quiet, lost, rates, size = [], [], [], 0
    for _ in range(rounds):
        for name, checkpoints in ways.items():
            quiet += [update() for _ in range(3)]
            found, during = saved(checkpoints)
            stalls[name].append(found.seconds_stalled)
            seconds[name].append(found.seconds)
            if name == "asynchronous":
                lost.append(sum(during) - len(during) * median(quiet))
            if ranks.is_first:
                manifest = open_manifest(found.folder, kind=KIND, version=VERSION)
                size = sum(file.bytes for file in manifest.files.values())
                started = time.perf_counter()
                assert verify(found.folder) == []
                rates.append(size / (time.perf_counter() - started))
            ranks.barrier()
    return {
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
        "checkpoint_bytes": size,
        "ranks": ranks.world_size,
        "rounds": rounds,
        "stall_synchronous": median(stalls["synchronous"]),
        "stall_asynchronous": median(stalls["asynchronous"]),
        "stall_ratio": median(stalls["asynchronous"]) / median(stalls["synchronous"]),
        "published_synchronous": median(seconds["synchronous"]),
        "published_asynchronous": median(seconds["asynchronous"]),
        "lost_to_contention": median(lost),
        "update": median(quiet),
        "verify_bytes_per_second": median(rates) if rates else None,
        "stalls": stalls,
    }


def render(result: dict[str, Any]) -> str:
    """The result as a page."""
    rows = [
        ("a synchronous save: training stands still", f"{result['stall_synchronous']:.3f} s"),
        ("an asynchronous save: training stands still", f"{result['stall_asynchronous']:.3f} s"),
        ("ratio (target <= 0.10)", f"{result['stall_ratio']:.3f}"),
        ("an asynchronous save is published after", f"{result['published_asynchronous']:.3f} s"),
        ("updates meanwhile take longer by, in all", f"{result['lost_to_contention']:.3f} s"),
        ("verification (target >= 1 GB/s)", f"{result['verify_bytes_per_second'] / 1e9:.2f} GB/s"),
    ]
    machine = result["machine"]
    return "\n".join(
        [
            "# Saving a checkpoint",
            "",
            f"`{result['command']}`, commit `{result['commit']}`, {machine['cpu']}, {machine['cores']} cores. "
            f"{result['parameters'] / 1e6:.1f}M parameters, {result['checkpoint_bytes'] / 1e6:,.0f} MB a checkpoint, "
            f"{result['ranks']} ranks, bfloat16, ZeRO-1, an update of {result['update']:.3f} s; medians of "
            f"{result['rounds']} rounds, both ways in turns.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
        ]
    )


def _rank(arguments: argparse.Namespace) -> int:
    ranks = distributed.start(threads=1)
    folder: Path = arguments.folder
    measured = measure(folder, ranks, rounds=arguments.rounds, overrides=arguments.overrides)
    if ranks.is_first:
        (folder / "measured.json").write_text(json.dumps(measured))
    ranks.barrier()
    distributed.stop()
    sys.stdout.flush()
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are written; the system's temporary folder"
    )
    parser.add_argument("--out", type=Path, help="where the result goes, .json; a page beside it, .md")
    parser.add_argument(
        "overrides", nargs="*", help="settings of the model: model=small model.row_tokens=128"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
