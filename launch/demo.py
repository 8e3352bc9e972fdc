"""`memory3 demo`: the whole story on the World Factbook, from raw documents to what memory bought.

prepare -> warmup -> arm M (continual stage with its memory bank) and arm C (the same rows without) -> evaluation of
both -> the table, three completions side by side, one picture, and the paths of everything. A demo that was stopped
goes on where it was.
Not here: any of these steps (one module each).
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.compose import compose_config, laid_over
from launch.config import RunConfig

if TYPE_CHECKING:
    from launch.opened import OpenedRun

_REFERENCE_TOKENS_PER_SECOND = 9_000
_TRAINING_TOKENS_PER_SECOND = 5_500
_EVALUATION_SECONDS = 90
"""Measured on two AVX512-BF16 cores; used for the estimate alone."""


def run(arguments: argparse.Namespace) -> int:
    """Run everything; exit code 0 once the table stands."""
    main = compose_config(laid_over(["experiment=demo"], arguments.overrides))
    started = time.monotonic()
    print(_estimate(main), flush=True)

    from launch import arms, prepare

    prepare.ensure(main)
    code = arms.train_arms(main)
    if code:
        return code

    from data.documents import Split
    from data.files import write_atomic
    from launch import build, evaluate, report

    build.quiet_third_parties()
    print("\n== evaluation on the validation half of the held-out countries", flush=True)
    opened = arms.open_arms(main)
    text = evaluate.render_results(
        [arms.evaluate_arms(opened, Split.validation)],
        samples=main.evaluation.bootstrap_samples,
        headline=evaluate.headline(opened[0].context),
    )
    folder = opened[0].folder
    write_atomic(folder / "table.md", text.encode())
    print(f"\n{text}")
    _print_completions(opened)
    report.draw_losses([("M", folder), ("C", opened[1].folder)], folder / "losses.png")
    print("\nEverything that was made:")
    for label, path in (
        ("tokenizer, shards, references, search vectors", build.prepared_folder(main)),
        ("arm M: checkpoints, bank, metrics.jsonl", folder),
        ("arm C: the control", opened[1].folder),
        ("this table", folder / "table.md"),
        ("loss curves of both stages", folder / "losses.png"),
    ):
        print(f"  {label:<48}{path}")
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def _estimate(config: RunConfig) -> str:
    """What will be done and how long it takes, stated before anything is."""
    from launch.build import prepared_folder

    assert config.warmup is not None
    assert config.continual is not None
    row = config.model.row_tokens
    warmup = config.warmup.steps * config.warmup.rows_per_step * row
    continual = config.continual.steps * config.continual.rows_per_step * row
    seconds = (warmup + 2 * continual) / _TRAINING_TOKENS_PER_SECOND + _EVALUATION_SECONDS
    if not (prepared_folder(config) / "references").exists():
        seconds += 22_600 * 128 / _REFERENCE_TOKENS_PER_SECOND
    resumed = " (a run was begun here: it goes on)" if (Path(config.paths.root) / config.run).exists() else ""
    return (
        f"demo: {warmup / 1e6:.1f}M tokens of warmup, then {continual / 1e6:.1f}M tokens for each of two arms, with "
        f"memory (M) and without (C), on {config.engine.num_ranks} ranks\n"
        f"estimated time: {seconds / 60:.0f} minutes on two AVX512-BF16 cores; this machine has {os.cpu_count()} cores"
        f"{resumed}"
    )


def _print_completions(opened: Sequence["OpenedRun"]) -> None:
    from data.documents import Split
    from launch.generate import Sampling, complete, memory_of, print_references

    main, control = opened
    probes = [probe for probe in main.context.prepared.probes if probe.split is Split.validation]
    chosen = {probe.relation: probe for probe in reversed(probes)}
    sampling = Sampling(max_new_tokens=24)
    memory = memory_of(main)
    print("\n== three completions side by side, on questions about countries that no arm was trained on")
    for probe in list(chosen.values())[:3]:
        print(f"\n{probe.question}   (the answer is{probe.answer})")
        memory.references_read.clear()
        for label, run, source in (
            ("C", control, None),
            ("M without memory", main, None),
            ("M with memory", main, memory),
        ):
            (completion,) = complete(run, [probe.question], sampling, source)
            print(
                f"  {label:<18}{completion.text.strip().splitlines()[0] if completion.text.strip() else ''}"
            )
            print_references(completion)
