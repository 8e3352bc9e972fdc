"""How much of a reference has to be kept: answer loss against the tokens that each head keeps, with the same weights.

    python -m benchmarks.tokens_kept RUN --root ROOT --output benchmarks/results/tokens_kept

The run's final weights compile the references that probes of held-out countries read, keeping more tokens per key/value
head than it was trained with; nothing is trained again, and every arm reads the same references. Relations of the
headline; differences are paired, with 95 % intervals over countries.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch

from benchmarks.origin import made_by
from data.documents import Split
from data.files import write_atomic
from launch import build
from launch.evaluate import HeldOut, headline, held_out_readings
from launch.opened import OpenedRun, open_run
from memorybank.bank import BankReader
from memorybank.cold import ColdStart
from memorybank.cost import memory_bytes
from train.arms import Arm
from train.evaluate import ArmResult, Setting, evaluate_probes
from train.statistics import Floats, Interval, group_sums, mean_interval, paired_interval

mpl.use("agg")
import matplotlib.pyplot as plt

ARMS = (Arm.none, Arm.memory, Arm.shuffled, Arm.oracle)
SAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured with one number of kept tokens.

    Attributes:
        kept: Tokens per key/value head and memory layer.
        bytes: Of one memory in the run's own type.
        losses: Nats per answer token of each arm, averaged over probes.
        gains: Loss of the other arms less that with memory.
    """

    kept: int
    bytes: int
    losses: dict[Arm, Interval]
    gains: dict[Arm, Interval]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder, or its name below --root")
    parser.add_argument("--root", default="runs", help="default: %(default)s")
    parser.add_argument(
        "--kept", nargs="+", type=int, default=[8, 16, 32, 64, 128], help="default: %(default)s"
    )
    parser.add_argument(
        "--split", choices=["validation", "test"], default="validation", help="default: %(default)s"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="path without ending: .md, .json and .png are written"
    )
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    build.quiet_third_parties()
    torch.set_num_threads(1)
    opened, split = open_run(arguments.run, arguments.root), Split(arguments.split)
    held_out, relations = held_out_readings(opened, split), headline(opened.context)
    trained = opened.config.model.tokens_kept
    rows = [measure(opened, held_out, relations, kept) for kept in arguments.kept]
    probes = sum(probe.relation in relations for probe in held_out.probes.probes)
    text = "\n".join(
        [
            f"# Tokens kept of a reference: {split.value} half",
            "",
            made_by("tokens_kept", given),
            "",
            f"Run `{opened.folder.name}`, step {opened.step}, trained with {trained} kept tokens per head; the others "
            f"it meets for the first time. {probes} probes of {', '.join(relations)}.",
            "",
            "| kept | bytes a memory | no memory | memory | shuffled | oracle | none - memory | shuffled - memory |",
            "|---|---|---|---|---|---|---|---|",
            *(_line(row) for row in rows),
            "",
        ]
    )
    write_atomic(arguments.output.with_suffix(".md"), text.encode())
    stored = [
        {"kept": row.kept, "bytes": row.bytes, **{arm.name: value.mean for arm, value in row.losses.items()}}
        for row in rows
    ]
    write_atomic(arguments.output.with_suffix(".json"), json.dumps(stored, indent=1).encode())
    draw(rows, arguments.output.with_suffix(".png"))
    print(text)
    return 0


def measure(opened: OpenedRun, held_out: HeldOut, relations: Sequence[str], kept: int) -> Row:
    """Evaluate the probes with memories of so many kept tokens."""
    model = opened.config.model
    model.tokens_kept = opened.engine.model.config.tokens_kept = kept
    codec, prepared = opened.codec(), opened.context.prepared
    records = ColdStart(None, opened.engine.encode, prepared.references, codec)
    results = evaluate_probes(
        opened.engine.model,
        held_out.probes,
        [reading for reading in held_out.probe_readings if reading.arm in ARMS],
        Setting(label="M", reader=BankReader(records, codec), batch_rows=opened.config.evaluation.batch_rows),
        tokenizer=prepared.tokenizer,
        reference_tokens=lambda _: [],
        row_tokens=model.row_tokens,
        answer_tokens=1,
    )
    found = {result.arm: _sums(result, relations) for result in results}
    sums, counts = found[Arm.memory]
    return Row(
        kept,
        memory_bytes(model),
        {arm: mean_interval(*value, samples=SAMPLES) for arm, value in found.items()},
        {
            arm: paired_interval(found[arm][0], sums, counts, samples=SAMPLES)
            for arm in (Arm.none, Arm.shuffled)
        },
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the losses against the tokens that are kept."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm in ARMS:
        low, mean, high = (
            [getattr(row.losses[arm], name) for row in rows] for name in ("low", "mean", "high")
        )
        axes.plot([row.kept for row in rows], mean, marker="o", label=arm.value)
        if arm is Arm.memory:
            axes.fill_between([row.kept for row in rows], low, high, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks([row.kept for row in rows], [str(row.kept) for row in rows])
    axes.set_xlabel("tokens kept per head (of at most 128)")
    axes.set_ylabel("nats per answer token, held-out countries")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _sums(result: ArmResult, relations: Sequence[str]) -> tuple[Floats, Floats]:
    items = [item for item in result.items if item.relation in relations]  # type: ignore[union-attr]
    _, sums, counts = group_sums([item.loss / item.tokens for item in items], [item.unit for item in items])
    return sums, counts


def _line(row: Row) -> str:
    losses = [f"{row.losses[arm].mean:.3f}" for arm in ARMS]
    gains = [f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" for gain in row.gains.values()]
    return f"| {' | '.join([str(row.kept), f'{row.bytes:,}', *losses, *gains])} |"


if __name__ == "__main__":
    sys.exit(main())
