"""`memory3 bank`: compiling everything with the newest weights, and describing what there is."""

import shutil
from pathlib import Path

import numpy as np

from launch.opened import open_run
from memorybank.store import Generation
from tests.support.launch import trained, within


def test_refresh_compiles_all_that_may_be_read_and_evaluate_accepts_it(tmp_path: Path) -> None:
    root = shutil.copytree(trained().root, tmp_path / "runs")
    done = within("bank", "refresh", "m", "--root", str(root))
    assert done.code == 0, done.err
    opened = open_run("m", str(root))
    generation = Generation.open(root / "m/bank/generation-refreshed")
    assert np.array_equal(generation.ids, opened.bank_ids)
    assert generation.settings.weights == opened.engine.weights_hash()
    assert generation.settings.step == 4
    assert f"{len(generation):,} memories of {generation.record_bytes:,} bytes" in done.out
    reading = ("--bank", "generation-refreshed", "--max-new-tokens", "4")
    done = within("generate", "m", "--root", str(root), "--prompt", "The import statement", *reading)
    assert done.code == 0, done.err
    assert "memories of generation-refreshed, compiled 0 steps before these weights" in done.out


def test_stat_lists_every_generation_with_its_age_and_size() -> None:
    done = within("bank", "stat", "m", "--root", str(trained().root))
    assert done.code == 0
    for path in (trained().main / "bank").glob("generation-*"):
        generation = Generation.open(path)
        (line,) = [line for line in done.out.splitlines() if path.name in line]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1:4] == [
            str(generation.settings.step), f"{len(generation):,}", f"{generation.record_bytes:,}",
        ]  # fmt: skip
        assert cells[-1] == generation.settings.weights


def test_run_without_a_bank_is_refused_with_the_command() -> None:
    done = within("bank", "stat", "c", "--root", str(trained().root))
    assert done.code == 2
    assert done.err == (
        f"memory3 bank: {trained().control}/bank holds no generation; make one with `memory3 bank refresh c`\n"
    )
