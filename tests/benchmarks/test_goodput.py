"""What of a run's time counts."""

import json
from pathlib import Path

import pytest

from benchmarks import goodput
from benchmarks.goodput import shares
from launch.run_log import RunLog
from tests.support.train import VOCABULARY, prepared_root


def test_what_counts_is_what_the_lines_tell_once_and_the_rest_is_told_apart(tmp_path: Path) -> None:
    step = {"stage": "warmup", "loss": 2.0, "tokens": 10, "seconds_data": 0.5, "seconds_update": 1.5}
    lines = [
        {**step, "step": 1, "time": 10.0},
        {
            "stage": "warmup",
            "step": 1,
            "checkpoint": "warmup-00000001",
            "seconds_checkpoint": 1.0,
            "time": 11.0,
        },
        {"stage": "warmup", "step": 1, "event": "crashed", "restarted_after": 4.0, "time": 15.0},
        {"stage": "warmup", "step": 1, "event": "resumed", "steps_repeated": 3, "time": 30.0},
        {**step, "step": 2, "time": 40.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = shares(RunLog.read(tmp_path), 2.0, 52.0, [3.0, 12.5])
    assert found["useful_seconds"] == 5.0
    assert found["useful"] == {"data": 1.0, "update": 3.0, "checkpoint": 1.0}
    assert (found["steps"], found["steps_repeated"]) == (2, 3)
    assert found["goodput"] == 0.1
    assert found["lost"] == {
        "noticing": 2.5,
        "pauses": 4.0,
        "starts": 10.0 - 2.0 - 2.0 + 40.0 - 2.0 - 19.0,
        "updates made again": 3 * 2.5,
        "begun and lost": 50.0 - 5.0 - 2.5 - 4.0 - 25.0 - 7.5,
    }


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed_ends_and_is_accounted_for(tmp_path: Path) -> None:
    out = tmp_path / "goodput.json"
    given = ["--work", str(tmp_path), "--prepared", str(prepared_root() / "prepared"), "--out", str(out)]
    settings = [
        "experiment=demo",
        "debug=smoke",
        f"data.vocab_size={VOCABULARY}",
        "data.documents_per_shard=40",
    ]
    settings += ["warmup.steps=1000", "saving.every_steps=100"]
    assert goodput.main([*given, "--period", "12", "--kills", "1", *settings]) == 0
    result = json.loads(out.read_text())
    assert result["kills"] == 1
    assert result["steps"] == 1004
    assert 0 < result["goodput"] < 1
    assert sum(result["lost"].values()) + result["useful_seconds"] == pytest.approx(
        result["wall_seconds"], abs=0.5
    )
