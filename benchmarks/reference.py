"""The reference experiment: both arms, several seeds, one table.

    python -m benchmarks.reference --seeds 0 1 2 --split test --output benchmarks/results/reference

Each seed shares one warmup between its arms; split, tokenizer and search vectors are shared by all seeds. The relations
of the headline are decided on validation probes. Runs that were stopped go on; finished ones are not repeated.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.origin import made_by
from data.documents import Split
from data.files import write_atomic
from launch import arms, build, evaluate, prepare, report
from launch.compose import compose_config, laid_over
from train.evaluate import to_json


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, and write the table, the results and the picture of the first seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument(
        "--split", choices=["validation", "test"], default="validation", help="default: %(default)s"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="path without ending: .md, .json and .png are written"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for memory3 pretrain")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    build.quiet_third_parties()
    results, minutes = [], []
    for seed in arguments.seeds:
        base = compose_config(laid_over(["experiment=reference"], [*arguments.overrides, f"seed={seed}"]))
        base.run = f"{base.run}-seed{seed}"
        prepare.ensure(base)
        started = time.monotonic()
        code = arms.train_arms(base)
        if code:
            return code
        opened = arms.open_arms(base)
        results.append(arms.evaluate_arms(opened, Split(arguments.split)))
        minutes.append((time.monotonic() - started) / 60)
    text = evaluate.render_results(results, samples=10_000, headline=evaluate.headline(opened[0].context))
    head = (
        f"# Reference experiment, {arguments.split} half\n\n"
        f"{made_by('reference', given)}; "
        f"minutes per seed: {', '.join(f'{m:.0f}' for m in minutes)}\n\n"
    )
    stem = arguments.output
    write_atomic(stem.with_suffix(".md"), (head + text).encode())
    per_seed = [
        {"seed": seed, **to_json(found)} for seed, found in zip(arguments.seeds, results, strict=True)
    ]
    write_atomic(stem.with_suffix(".json"), json.dumps(per_seed).encode())
    first = f"{compose_config(laid_over(['experiment=reference'], arguments.overrides)).run}-seed{arguments.seeds[0]}"
    root = base.paths.root
    folders = [
        (label, build.run_folder(first + ending, root)) for label, ending in (("M", ""), ("C", "-control"))
    ]
    report.draw_losses(folders, stem.with_suffix(".png"))
    print(head + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
