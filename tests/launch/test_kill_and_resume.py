"""`debug=smoke`, killed with -9 in a compilation, in a save and in a step, ends like a run that nobody disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kill_and_resume import REPOSITORY, Moment, draw_moments
from launch.compose import compose_config
from tests.support.train import VOCABULARY, prepared_root

SMOKE = ["experiment=demo", "debug=smoke"]
CORPUS = [f"data.vocab_size={VOCABULARY}", "data.documents_per_shard=40"]
# The step of these seeds lies early in the warmup, so that a late kill still comes before the other moments.
LONGER = ["warmup.steps=60", "saving.every_steps=30"]
# What a kill is to come into must last longer than a scheduler's slices: a checkpoint of 58 MB.
LARGER = ["model.width=512", "model.num_heads=8", "model.num_kv_heads=4", "model.ffn_width=512"]
LARGER += ["continual.rows_per_step=16", "continual.micro_rows=8"]
SEEDS = (4, 19, 28)
KINDS = ("compilation", "save", "step", "step", "step")


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    for seed in SEEDS:
        out = tmp_path / f"result-{seed}.json"
        script = [sys.executable, str(REPOSITORY / "benchmarks" / "kill_and_resume.py"), "--seed", str(seed)]
        options = ["--out", str(out), "--work", str(tmp_path / str(seed)), "--kinds", "compilation,save,step"]
        options += ["--prepared", str(prepared_root() / "prepared")]
        done = subprocess.run(
            [*script, *options, *SMOKE, *LONGER, *LARGER, *CORPUS],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if "RuntimeError" not in done.stderr:  # the run outran a kill: another seed has other moments
            break
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["equal"]
    assert result["compared"] > 10
    moments = {kill["moment"]["kind"]: kill for kill in result["moments"]}
    assert moments.keys() == {"compilation", "save", "step"}
    for kind in ("compilation", "save"):
        assert moments[kind]["moment"]["what"] in moments[kind]["unfinished"]
    assert all(kill["processes"] >= 3 for kill in result["moments"])  # the launcher and both ranks


def test_moments_follow_from_the_seed_in_the_order_of_the_run() -> None:
    config = compose_config(SMOKE)
    drawn = draw_moments(config, KINDS, seed=1)
    assert drawn == draw_moments(config, KINDS, seed=1)
    assert drawn != draw_moments(config, KINDS, seed=2)
    assert [moment.after for moment in drawn] == sorted(moment.after for moment in drawn)
    assert sorted(moment.kind for moment in drawn) == sorted(KINDS)


@pytest.mark.parametrize("seed", range(20))
def test_moments_lie_within_the_run(seed: int) -> None:
    for moment in draw_moments(compose_config(SMOKE), KINDS, seed=seed):
        assert 0 < moment.after <= 8
        assert _exists(moment)


def _exists(moment: Moment) -> bool:
    """Whether warmup and continual stage, of 4 steps each and bank epochs of 2, come to this."""
    match moment.kind:
        case "compilation":
            return moment.what in {f"bank/generation-continual-{epoch:04d}.partial" for epoch in (0, 1)}
        case "save":
            stages = ("warmup", "continual")
            return moment.what in {
                f"checkpoints/{stage}-{step:08d}.partial" for stage in stages for step in (2, 4)
            }
        case _:
            return moment.what in {
                f"{stage} {step}" for stage in ("warmup", "continual") for step in range(1, 5)
            }


def test_unknown_kinds_and_runs_without_a_bank_are_refused() -> None:
    with pytest.raises(ValueError, match="'coffee'; known are compilation, save, step"):
        draw_moments(compose_config(SMOKE), ["coffee"], seed=0)
    with pytest.raises(ValueError, match="the run compiles no bank"):
        draw_moments(compose_config([*SMOKE, "continual.memory=null"]), ["compilation"], seed=0)
