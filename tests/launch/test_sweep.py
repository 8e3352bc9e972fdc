"""Sweeps: what their trials come to, and what kills, failures and a second start change about it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import sweep
from launch.compose import CONF, compose_config
from launch.explain import unknown_choice
from launch.space import Numbers, Value, read_space
from launch.study import Row, Study
from launch.sweep_report import objective
from launch.trial import TrialRun
from tests.support.launch import corpus_settings, memory3, prepared_root, topics, trained_corpus, within
from tests.support.sweep import RATES, SPACE, control, losses, starts

REPOSITORY = Path(__file__).parents[2]


def rows(root: Path, *, like: str = RATES) -> list[Row]:
    """What the journal of a sweep says."""
    space = read_space([*SPACE, like] if like == RATES else [*SPACE, RATES, like])
    return Study(root / "s", space.swept, seed=0, settle_steps=2).rows()


def rate(values: dict[str, Value]) -> float:
    return float(values["warmup.peak_lr"])


def test_a_sweep_trains_prunes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert control(tmp_path, 12) == 0
    said = capsys.readouterr().out
    ended = rows(tmp_path)
    assert [row.number for row in ended] == list(range(12))
    assert {row.state for row in ended} == {"finished", "pruned"}
    for row in ended:
        curve = losses(rate(row.values))
        run = tmp_path / f"s-{row.number:03d}"
        assert row.loss in (curve if row.state == "pruned" else curve[-1:])
        assert 1e-4 <= rate(row.values) <= 1e-1
        assert starts(run) == 1
        assert not (run / "trial-exit").exists() or row.state == "finished"
    best = min((row for row in ended if row.state == "finished"), key=lambda row: row.loss or 0)
    lines = said.splitlines()
    assert lines[0].startswith("# Sweep s: 12 of 12 trials (")
    assert lines[2].startswith("Loss: held-out text, validation half, 8,192 tokens, without memory, nats per token, at the end")
    assert lines[6].startswith(f"| {best.number} | {best.loss:.4f} | {rate(best.values):.4g} | finished |")
    assert "apart (PED-ANOVA): `warmup.peak_lr` 100%." in said
    assert f"warmup.peak_lr={rate(best.values)}" in lines[-3]
    assert (tmp_path / "s/report.md").read_text() in said
    assert (tmp_path / "s/report.png").read_bytes().startswith(b"\x89PNG")

    assert control(tmp_path, 12) == 0  # nothing is left to do
    assert rows(tmp_path) == ended
    assert all(starts(tmp_path / f"s-{row.number:03d}") == 1 for row in ended)
    assert control(tmp_path, 13) == 0  # and it can be made longer
    assert rows(tmp_path)[:12] == ended
    assert len(rows(tmp_path)) == 13


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Eight trials that nobody killed."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert control(root, 8) == 0
    return rows(root)


@pytest.mark.parametrize(
    ("kills", "seed"), [(5, 1), pytest.param(20, 2, marks=pytest.mark.slow)]
)
def test_a_killed_controller_repeats_nothing(
    kills: int, seed: int, undisturbed: list[Row], tmp_path: Path
) -> None:
    moments = random.Random(seed)
    command = [sys.executable, "-m", "tests.support.sweep", "control", str(tmp_path), "8"]
    environment = {**os.environ, "STEP_SECONDS": "0.05"}
    for _ in range(kills):
        controller = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
        number = moments.randrange(6)
        _wait_for(lambda number=number: (tmp_path / f"s-{number:03d}").exists() or controller.poll() is not None)
        time.sleep(moments.random() * 0.3)
        controller.kill()
        controller.wait()
    assert subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode == 0
    assert rows(tmp_path) == undisturbed
    assert [starts(tmp_path / f"s-{row.number:03d}") for row in undisturbed] == [1] * 8
    for row in undisturbed:
        said = (tmp_path / f"s-{row.number:03d}/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in said] == list(range(1, len(said) + 1))


def _wait_for(reached: object) -> None:
    deadline = time.monotonic() + 60
    while not reached() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.005)
