import json
import logging
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.spawn import HANG_SECONDS
from tests.support.wandb_server import ask_only, server
from train.metrics import (
    JsonLines,
    Metrics,
    Mirror,
    TensorBoard,
    Wandb,
    WandbAccount,
    read_metrics,
    wandb_account,
)
from train.terminal import PlainLines


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
    with Metrics([JsonLines(path, stage="warmup", step=0), PlainLines(1)]) as metrics:
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
    with Metrics([JsonLines(path, stage="warmup", step=0), PlainLines(1)]) as metrics:
        metrics.log(stage="warmup", step=1, num_steps=2, loss=2.0, grad_norm=1, lr=1, tokens_per_second=1)
        metrics.log(stage="warmup", step=1, validation_none=3.0)
    assert [set(line) - {"time", "stage", "step"} for line in read_metrics(path)] == [
        {"num_steps", "loss", "grad_norm", "lr", "tokens_per_second"},
        {"validation_none"},
    ]


def test_what_happened_to_a_run_is_never_cut_off(tmp_path: Path) -> None:
    """A run that falls back to an older checkpoint still tells that it was resumed from a newer one before."""
    path = tmp_path / "metrics.jsonl"
    write(path, ("warmup", 9), ("warmup", 10), ("warmup", 11))
    for step, cut in ((10, 1), (9, 1)):
        lines = JsonLines(path, stage="warmup", step=step)
        assert lines.steps_cut == 0  # none of these lines is that of a step
        lines.log({"stage": "warmup", "step": step, "event": "resumed", "steps_repeated": cut})
        lines.close()
    assert [line.get("event") for line in read_metrics(path)] == [None, "resumed", "resumed"]
    assert positions(path) == [("warmup", 9), ("warmup", 10), ("warmup", 9)]


def test_a_rollback_survives_the_next_one_and_a_resume_from_before_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, stage="warmup", step=0)
    for step in range(1, 7):
        lines.log({"stage": "warmup", "step": step, "loss": 2.5})
    for step in (4, 2):
        lines.rewind("warmup", step)
        lines.log({"stage": "warmup", "step": step, "event": "rollback"})
    lines.close()
    JsonLines(path, stage="warmup", step=1).close()
    assert [(line["step"], line.get("event")) for line in read_metrics(path)] == [
        (1, None),
        (4, "rollback"),
        (2, "rollback"),
    ]


def test_steps_that_are_repeated_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, stage="warmup", step=0)
    for step in (1, 2, 3):
        lines.log({"stage": "warmup", "step": step, "loss": 2.5})
        lines.log({"stage": "warmup", "step": step, "validation_none": 2.5})
    lines.close()
    again = JsonLines(path, stage="warmup", step=1)
    again.close()
    assert again.steps_cut == 2


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "warmup", "step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON"):
        read_metrics(path)


class FakeRun:
    def __init__(self, fails: bool) -> None:
        self.lines: list[dict[str, object]] = []
        self.axes: dict[str, str] = {}
        self.fails = fails
        self.finished = 0

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, object]) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.lines.append(values)

    def finish(self) -> None:
        self.finished += 1


def fake_wandb(
    monkeypatch: pytest.MonkeyPatch, *, fails: bool = False, refuses: str | None = None
) -> list[tuple[dict[str, object], FakeRun]]:
    started: list[tuple[dict[str, object], FakeRun]] = []

    def init(**settings: object) -> FakeRun:
        if settings["mode"] == refuses:
            raise ConnectionError("the server does not answer")
        started.append((settings, FakeRun(fails)))
        return started[-1][1]

    fake = types.SimpleNamespace(
        init=init,
        Settings=dict,
        setup=lambda _: types.SimpleNamespace(settings=types.SimpleNamespace(base_url="")),
        login=lambda **_: "WANDB_API_KEY" in os.environ,
        teardown=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    without_key(monkeypatch)
    return started


def without_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", "nothing")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def wandb_mirror(run: Path) -> Mirror:
    return Mirror("wandb", lambda: Wandb(run, project="memory3", config={"seed": 0}))


def test_wandb_is_offline_without_a_key_and_keeps_its_run_id_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = fake_wandb(monkeypatch)
    for _ in range(2):
        sink = wandb_mirror(tmp_path)
        sink.log({"stage": "warmup", "step": 1, "loss": 2.0, "query": None, "by_layer": [0.1, 0.2]})
        sink.close()
    assert [settings["mode"] for settings, _ in started] == ["offline", "offline"]
    assert started[0][0]["id"] == started[1][0]["id"]
    assert started[0][0]["resume"] == "allow"
    assert started[0][1].lines == [
        {"warmup/step": 1, "warmup/loss": 2.0, "warmup/by_layer/0": 0.1, "warmup/by_layer/1": 0.2}
    ]
    assert started[0][1].axes == {"warmup/*": "warmup/step", "continual/*": "continual/step"}
    assert started[0][1].finished == 1


@pytest.mark.parametrize("named_by", ["variable", "settings file"])
def test_wandb_itself_says_its_server_and_whether_it_has_a_key(
    named_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package itself: a server of its own, named by a variable, or in the file that `wandb login --host` writes."""
    ask_only("http://wandb.invalid:8080", tmp_path, monkeypatch)
    if named_by == "settings file":
        monkeypatch.delenv("WANDB_BASE_URL")
        (tmp_path / "wandb-settings").mkdir()
        (tmp_path / "wandb-settings" / "settings").write_text(
            "[default]\nbase_url = http://wandb.invalid:8080\n"
        )
    netrc = tmp_path / "netrc"
    for machine, known in (("api.wandb.ai", False), ("wandb.invalid:8080", True)):
        netrc.write_text(f"machine {machine}\n  login user\n  password {'x' * 40}\n")
        assert wandb_account() == WandbAccount("http://wandb.invalid:8080", has_key=known)
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_account().has_key
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not wandb_account().has_key


def test_a_key_that_is_none_leaves_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The package itself refuses the key."""
    ask_only("http://wandb.invalid:8080", tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with caplog.at_level(logging.WARNING):
        sink = wandb_mirror(tmp_path)
        sink.log({"stage": "warmup", "step": 1, "loss": 2.0})
        sink.close()
    [record] = caplog.records
    assert record.message.startswith("wandb is offline: WANDB_API_KEY invalid: ")
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_an_outage_of_wandb_at_the_start_leaves_an_offline_run_of_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started = fake_wandb(monkeypatch, refuses="online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with caplog.at_level(logging.WARNING):
        wandb_mirror(tmp_path).log({"stage": "warmup", "step": 1, "loss": 2.0})
    ((settings, run),) = started
    assert settings["mode"] == "offline"
    assert settings["id"] == (tmp_path / "wandb-id").read_text()
    assert run.lines == [{"warmup/step": 1, "warmup/loss": 2.0}]
    assert [record.message for record in caplog.records] == [
        f"wandb is offline: the server does not answer; `wandb sync` brings {tmp_path}/wandb up later"
    ]


def test_an_outage_of_wandb_in_the_middle_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb(monkeypatch, fails=True)
    sink = wandb_mirror(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            sink.log({"stage": "warmup", "step": step})
        sink.close()
    assert [record.message for record in caplog.records] == [
        "wandb went quiet: no network; metrics.jsonl has everything"
    ]


def test_a_mirror_that_cannot_start_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb(monkeypatch, refuses="offline")
    lines = JsonLines(tmp_path / "metrics.jsonl", stage="warmup", step=0)
    with caplog.at_level(logging.WARNING), Metrics([lines, wandb_mirror(tmp_path)]) as metrics:
        metrics.log(stage="warmup", step=1, loss=2.0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    assert [record.message for record in caplog.records] == [
        "wandb is off: the server does not answer; metrics.jsonl has everything"
    ]


@pytest.mark.parametrize("does", ["log", "rewind", "close"])
def test_a_mirror_whose_sink_fails_stops_neither_a_step_nor_a_rollback_nor_the_end(
    does: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def act(*_: object) -> None:
                if name == does:
                    raise OSError("no space left on device")

            return act

    path = tmp_path / "metrics.jsonl"
    with (
        caplog.at_level(logging.WARNING),
        Metrics([JsonLines(path, stage="warmup", step=0), Mirror("TensorBoard", Full)]) as metrics,
    ):
        for step in (1, 2):
            metrics.log(stage="warmup", step=step)
        metrics.rewind("warmup", 1)
        metrics.log(stage="warmup", step=2)
    assert positions(path) == [("warmup", 1), ("warmup", 2)]
    [record] = caplog.records
    assert "no space left on device; metrics.jsonl has everything" in record.message


def test_a_mirror_that_does_not_finish_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("train.metrics._MIRROR_SECONDS", 0.05)
    released = threading.Event()

    class Stuck:
        def log(self, values: object) -> None:
            pass

        def close(self) -> None:
            released.wait(HANG_SECONDS)

    with caplog.at_level(logging.WARNING):
        Mirror("wandb", Stuck).close()
    released.set()
    assert [record.message for record in caplog.records] == [
        "wandb was left behind: it did not finish within 0.05 s; metrics.jsonl has everything"
    ]


def test_wandb_itself_writes_an_offline_run_that_can_be_synced_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package itself, twice under one id, without a network."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    without_key(monkeypatch)
    for step in (1, 2):
        sink = wandb_mirror(tmp_path)
        sink.log({"stage": "warmup", "step": step, "loss": 2.0})
        sink.close()
    name = (tmp_path / "wandb-id").read_text()
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))
    assert runs
    assert all(list(run.glob("run-*.wandb")) for run in runs)


LOGS = """
import sys
from pathlib import Path
from launch.worker import leave
from train import metrics

metrics._MIRROR_SECONDS = 10
run = Path(sys.argv[1])
wandb = metrics.Mirror("wandb", lambda: metrics.Wandb(run, project="memory3", config={}))
with metrics.Metrics([metrics.JsonLines(run / "metrics.jsonl", stage="warmup", step=0), wandb]) as lines:
    for step in range(1, 21):
        if step == 6:
            print("five steps", flush=True)
            sys.stdin.readline()
        lines.log(stage="warmup", step=step, loss=2.0)
leave(0)
"""
"""A run of twenty steps that waits after the fifth; a mirror gets ten seconds."""


@pytest.mark.slow
@pytest.mark.parametrize("outage", ["silent from the start", "dies", "falls silent"])
def test_wandb_itself_without_its_server_costs_no_line_and_a_bounded_time(
    outage: str, tmp_path: Path
) -> None:
    """The package itself, online, with a key, and a server of this machine that goes away."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    with server() as wandb:
        environment |= {"WANDB_BASE_URL": wandb.url, "WANDB_API_KEY": "x" * 40}
        if outage == "silent from the start":
            wandb.fall_silent()
        run = subprocess.Popen(
            [sys.executable, "-c", LOGS, str(tmp_path)], cwd=Path(__file__).parents[2], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert run.stdout is not None
            assert "five steps\n" in run.stdout
            reached = len(wandb.asked)
            if outage == "dies":
                wandb.die()
            if outage == "falls silent":
                wandb.fall_silent()
            begun = time.monotonic()
            _, said = run.communicate("\n", timeout=HANG_SECONDS)
            seconds = time.monotonic() - begun
        finally:
            run.kill()
            run.communicate()
    assert run.returncode == 0, said
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 21))
    assert seconds < 60  # ten for wandb, and what a busy machine adds
    name = (tmp_path / "wandb-id").read_text()
    if outage in ("dies", "falls silent"):
        assert reached > 2
        assert "wandb is offline" not in said
        assert list((tmp_path / "wandb").glob(f"run-*-{name}/run-{name}.wandb"))
    else:
        assert "wandb is offline: " in said
        assert "wandb is off: " not in said
        assert list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))


def test_tensorboard_has_the_names_of_the_lines_and_hides_what_is_repeated(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, loss in ((0, 2.0), (2, 1.0)):
        sink = TensorBoard(tmp_path, stage="warmup", step=first)
        for step in range(first + 1, 5):
            sink.log({"stage": "warmup", "step": step, "loss": loss, "query": None, "time": 1e9 + step})
        sink.log({"stage": "continual", "step": 1, "loss": 3.0, "memory_layers": [0.1, 0.2], "time": 2e9})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "warmup"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2), (2, 2), (3, 1), (4, 1)]
    continual = EventAccumulator(str(tmp_path / "tensorboard" / "continual"))
    continual.Reload()
    assert set(continual.Tags()["scalars"]) == {"loss", "step", "memory_layers/0", "memory_layers/1", "time"}


def test_tensorboard_that_is_not_there_is_said_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        sink = Mirror("TensorBoard", lambda: TensorBoard(tmp_path, stage="warmup", step=0))
        sink.log({"stage": "warmup", "step": 1, "loss": 1.0, "time": 0.0})
        sink.close()
    (record,) = caplog.records
    assert record.message.startswith("TensorBoard is off: ")
