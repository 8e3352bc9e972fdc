import json
import logging
import sys
import types
from pathlib import Path

import pytest

from train.metrics import JsonLines, Metrics, ProgressBar, Wandb, read_metrics


def write(path: Path, *positions: tuple[str, int]) -> None:
    path.write_text("".join(json.dumps({"stage": stage, "step": step}) + "\n" for stage, step in positions))


def positions(path: Path) -> list[tuple[str, int]]:
    return [(line["stage"], line["step"]) for line in read_metrics(path)]


def test_a_resumed_run_cuts_off_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ("warmup", 9), ("warmup", 10), ("continual", 1), ("continual", 2), ("continual", 3))
    lines = JsonLines(path, stage="continual", step=2)
    lines.log({"stage": "continual", "step": 3})
    lines.close()
    assert positions(path) == [
        ("warmup", 9),
        ("warmup", 10),
        ("continual", 1),
        ("continual", 2),
        ("continual", 3),
    ]


def test_going_back_to_warmup_cuts_the_continual_stage_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ("warmup", 9), ("warmup", 10), ("continual", 1))
    JsonLines(path, stage="warmup", step=9).close()
    assert positions(path) == [("warmup", 9)]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ("warmup", 1), ("warmup", 2))
    path.write_text(path.read_text()[:-1])
    assert positions(path) == [("warmup", 1)]
    JsonLines(path, stage="warmup", step=2).close()
    assert path.read_text().endswith("}\n")
    assert positions(path) == [("warmup", 1)]


def test_a_rollback_forgets_the_lines_after_it_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics([JsonLines(path, stage="warmup", step=0), ProgressBar()]) as metrics:
        for step in (1, 2, 3):
            metrics.log(stage="warmup", step=step)
        metrics.rewind("warmup", 1)
        metrics.log(stage="warmup", step=2, again=True)
    assert positions(path) == [("warmup", 1), ("warmup", 2)]
    assert read_metrics(path)[-1]["again"]


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl", stage="warmup", step=0)
    lines.log({"stage": "warmup", "step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"stage": "warmup", "step": 1, "loss": 2.5}]
    lines.close()


def test_all_sinks_get_each_line_with_its_time_and_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics([JsonLines(path, stage="warmup", step=0), ProgressBar()]) as metrics:
        metrics.log(stage="warmup", step=1, num_steps=2, loss=2.0, tokens_per_second=10.0)
        metrics.log(stage="warmup", step=1, validation_none=3.0)
    assert [set(line) - {"time", "stage", "step"} for line in read_metrics(path)] == [
        {"num_steps", "loss", "tokens_per_second"},
        {"validation_none"},
    ]


class FakeRun:
    def __init__(self, fails: bool) -> None:
        self.lines: list[dict[str, object]] = []
        self.fails = fails

    def log(self, values: dict[str, object]) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.lines.append(values)

    def finish(self) -> None:
        pass


def fake_wandb(
    monkeypatch: pytest.MonkeyPatch, *, fails: bool = False
) -> list[tuple[dict[str, object], FakeRun]]:
    started: list[tuple[dict[str, object], FakeRun]] = []

    def init(**settings: object) -> FakeRun:
        started.append((settings, FakeRun(fails)))
        return started[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return started


def test_wandb_is_offline_without_a_key_and_keeps_its_run_id_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = fake_wandb(monkeypatch)
    for _ in range(2):
        sink = Wandb(tmp_path, project="memory3", config={"seed": 0})
        sink.log({"stage": "warmup", "step": 1, "loss": 2.0})
        sink.close()
    assert [settings["mode"] for settings, _ in started] == ["offline", "offline"]
    assert started[0][0]["id"] == started[1][0]["id"]
    assert started[0][0]["resume"] == "allow"
    assert started[0][1].lines == [{"warmup/step": 1, "warmup/loss": 2.0}]


def test_an_outage_of_wandb_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb(monkeypatch, fails=True)
    sink = Wandb(tmp_path, project="memory3", config={})
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            sink.log({"stage": "warmup", "step": step})
    assert [record.message for record in caplog.records] == ["wandb went quiet: no network"]
