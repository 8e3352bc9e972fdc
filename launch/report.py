"""`memory3 report`: one table from the evaluations of several runs and seeds, and the picture of their losses.

Not here: evaluating (`launch.evaluate`), what the table's columns mean (`train.evaluate`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launch.build import quiet_third_parties, run_folder
from launch.evaluate import headline, read_results, render_results
from launch.opened import run_context
from train.evaluate import ArmResult
from train.metrics import read_metrics

_SMOOTH = 10


def run(arguments: argparse.Namespace) -> int:
    """Print the table of one or more seeds, each `M` or `M=C`."""
    quiet_third_parties()
    pairs = [_pair(text) for text in arguments.runs]
    seeds = [pair_results(*pair, arguments.root, arguments.split) for pair in pairs]
    print(render_results(seeds, headline=headline(run_context(pairs[0][0], arguments.root))))
    return 0


def pair_results(main: str, control: str | None, root: str, split: str) -> list[ArmResult]:
    """The results of a run, and of its matched control beside it."""
    results = read_results(run_folder(main, root), split)
    return results if control is None else [*results, *read_results(run_folder(control, root), split)]


def draw_losses(runs: Sequence[tuple[str, Path]], path: Path) -> None:
    """Draw the loss curves of both stages of several runs, over tokens, into a PNG.

    Args:
        runs: Labels and run folders, the one with the warmup first.
        path: The picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1, 1.2])
    arms = {"none": "no memory", "memory": "memory", "shuffled": "shuffled"}
    for number, (label, folder) in enumerate(runs):
        lines = read_metrics(folder / "metrics.jsonl")
        for axis, stage in zip(axes, ("warmup", "continual"), strict=True):
            steps = [line for line in lines if line["stage"] == stage and "loss" in line]
            tokens = [line["tokens"] / 1e6 for line in steps]
            if steps:
                axis.plot(
                    tokens,
                    _smoothed([line["loss"] for line in steps]),
                    f"C{number}-",
                    lw=1,
                    alpha=0.6,
                    label=f"{label} training",
                )
            at = {line["step"]: line["tokens"] / 1e6 for line in steps}
            checks = [line for line in lines if line["stage"] == stage and "validation_none" in line]
            for style, (arm, name) in zip(("o-", "s--", "^:"), arms.items(), strict=True):
                points = [
                    (at[line["step"]], line[f"validation_{arm}"])
                    for line in checks
                    if f"validation_{arm}" in line and line["step"] in at
                ]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        f"C{number}{style}",
                        ms=4,
                        label=f"{label} held-out, {name}",
                    )
    for axis, stage in zip(axes, ("warmup", "continual"), strict=True):
        axis.set(title=stage, xlabel="tokens trained on (millions)", ylabel="loss (nats per token)")
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize=7, framealpha=0.9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pair(text: str) -> tuple[str, str | None]:
    main, _, control = text.partition("=")
    return main, control or None


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running mean of the last few values."""
    return [
        sum(values[max(0, i + 1 - _SMOOTH) : i + 1]) / len(values[max(0, i + 1 - _SMOOTH) : i + 1])
        for i in range(len(values))
    ]
