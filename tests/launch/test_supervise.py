"""What follows on the end of a run that is supervised, and that it is written down."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch import supervise
from launch.compose import compose_config
from launch.config import SupervisionConfig
from launch.supervise import FAILURE, End, judge
from train.metrics import read_metrics

CRASH = End(1, "RuntimeError: lost node 1:4000", "warmup", 12, "warmup-00000010")
RULES = SupervisionConfig(max_restarts=3, backoff_seconds=10, max_backoff_seconds=25)


@pytest.mark.parametrize("code", [2, 3, 129, 130, 138, 143])
def test_a_mistake_divergence_and_a_signal_are_final(code: int) -> None:
    assert judge([replace(CRASH, code=code)], RULES).wait_seconds is None


def test_pauses_double_up_to_the_longest_and_begin_anew_with_a_newer_checkpoint() -> None:
    ends = [replace(CRASH, step=step) for step in (12, 13, 14)]
    assert [judge(ends[: number + 1], RULES).wait_seconds for number in range(3)] == [10, 20, 25]
    ends.append(replace(CRASH, step=33, checkpoint="warmup-00000030"))
    assert judge(ends, RULES).wait_seconds == 10


def test_too_many_restarts_without_a_newer_checkpoint_are_the_end() -> None:
    ends = [replace(CRASH, step=step) for step in (12, 13, 14, 15)]
    verdict = judge(ends, RULES)
    assert verdict.wait_seconds is None
    assert "3 restarts (supervision.max_restarts) brought no newer checkpoint" in verdict.reason


def test_the_same_crash_at_the_same_place_is_the_end() -> None:
    """Addresses, ports and seconds may differ; another update or another cause is another crash."""
    again = replace(CRASH, cause="RuntimeError: lost node 2:4012")
    assert judge([CRASH, again], RULES).wait_seconds is None
    assert "after update 12 of the warmup stage for the second time" in judge([CRASH, again], RULES).reason
    for other in (replace(again, step=11), replace(again, cause="killed"), replace(again, code=137)):
        assert judge([CRASH, other], RULES).wait_seconds == 20


def test_a_kill_from_outside_says_nothing_of_the_next_start() -> None:
    killed = replace(CRASH, code=137, cause="rank 1 was ended by SIGKILL", from_outside=True)
    assert [judge([killed] * number, RULES).wait_seconds for number in range(1, 5)] == [10, 20, 25, None]
    by_kernel = replace(killed, from_outside=False)
    assert "it will repeat" in judge([by_kernel] * 2, RULES).reason


def test_a_run_is_started_until_it_ends_well_and_every_crash_is_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(supervise.time, "sleep", pauses.append)
    config = compose_config(["experiment=demo", "supervise=true", "supervision.backoff_seconds=5"])
    codes = iter([137, 4, 1, 0])

    def start() -> int:
        assert not (tmp_path / FAILURE).exists()
        code, step = next(codes), len(pauses) + 1
        with (tmp_path / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"stage": "warmup", "step": step, "loss": 1.0}) + "\n")
            lines.write("" if code == 0 else '{"stage": "war')  # torn by the kill
        if code == 4:
            (tmp_path / FAILURE).write_text('{"code": 4, "rank": null, "cause": "rank 1 hangs"}')
        return code

    assert supervise.run(start, tmp_path, config) == 0
    assert pauses == [5, 10, 20]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    crashes = [line for line in lines if line.get("event") == "crashed"]
    assert [(line["step"], line["code"], line["cause"]) for line in crashes] == [
        (1, 137, "exit code 137"),
        (2, 4, "rank 1 hangs"),
        (3, 1, "exit code 1"),
    ]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("code", "event", "cause"), [(137, "crashed", "exit code 137"), (130, "stopped", "SIGINT")]
)
def test_without_supervision_a_run_is_started_once_and_how_it_ended_is_an_event(
    code: int, event: str, cause: str, tmp_path: Path
) -> None:
    """Lines of updates that made no loss stay, as those of a checkpoint that a resumed run goes on from."""
    starts: list[int] = []
    path = tmp_path / "metrics.jsonl"
    written = [
        {"stage": "warmup", "step": 1, "loss": 2.0},
        {"stage": "warmup", "step": 2, "passed_over": True},
    ]

    def start() -> int:
        starts.append(1)
        return code

    config = compose_config(["experiment=demo"])
    assert supervise.run(start, tmp_path, config) == code
    assert not path.exists()  # there was nothing to end
    path.write_text("".join(json.dumps(line) + "\n" for line in written))
    assert supervise.run(start, tmp_path, config) == code
    assert len(starts) == 2
    *kept, end = read_metrics(path)
    assert kept == written
    assert (end["event"], end["code"], end["cause"], end["step"]) == (event, code, cause, 1)
    assert end["restarted_after"] is None
