"""`memory3 bank`: compiling everything with the newest weights, and describing what there is."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from launch.opened import open_run
from memorybank import quantizer
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


def test_refresh_with_a_quantiser_is_read_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "_ROUNDS", 2)
    monkeypatch.setattr(quantizer, "_OPQ_ROUNDS", 1)
    root = shutil.copytree(trained().root, tmp_path / "runs")
    done = within("bank", "refresh", "m", "--root", str(root), "--codec", "residual2x8_pq8x8", "--separate")
    assert done.code == 0, done.err
    # 8 entries, each of two vectors of 10 bytes and one kept token.
    generation = Generation.open(root / "m/bank/generation-refreshed")
    assert generation.record_bytes == 8 * (2 * 10 + 1)
    assert "memories of 168 bytes (160 of keys and values), codec OPQ16_64,Residual2x8,PQ8x8:" in done.out
    reading = ("--bank", "generation-refreshed", "--max-new-tokens", "4")
    done = within("generate", "m", "--root", str(root), "--prompt", "The import statement", *reading)
    assert done.code == 0, done.err
    (folder,) = (root / "m/bank").glob("codec-residual2x8_pq8x8-separate-*")
    shutil.rmtree(folder)
    done = within("generate", "m", "--root", str(root), "--prompt", "The import statement", *reading)
    assert done.code == 2
    assert f"written with the codec {generation.codec}, which is not there (found: none)" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--codec", "residual2x14_pq8x10"],
            "codec.kind=residual2x14_pq8x10 needs 16,384 vectors to be trained",
        ),
        (["--separate"], "--separate says nothing without --codec"),
        (["--codec", "int8", "--separate"], "codec.kind=int8 learns nothing from keys or values"),
    ],
)
def test_codecs_that_cannot_be_had_are_refused(options: list[str], message: str) -> None:
    done = within("bank", "refresh", "m", "--root", str(trained().root), *options)
    assert done.code == 2
    assert message in done.err
    assert not list((trained().main / "bank").glob("codec-*"))
