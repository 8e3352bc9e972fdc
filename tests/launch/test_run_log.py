import json
from pathlib import Path

import pytest

from launch.run_log import Line, RunLog, are_seeds, different_settings
from tests.support.run_log import lines, rollback, run_folder


def test_both_stages_are_told_apart(tmp_path: Path) -> None:
    log = RunLog.read(run_folder(tmp_path / "m", lines()))
    assert log.label == "m"
    assert log.stages == ["warmup", "continual"]
    assert [len(log.steps(stage)) for stage in log.stages] == [40, 40]
    assert [len(log.validations(stage)) for stage in log.stages] == [4, 4]
    assert [line["bank_references"] for line in log.epochs] == [100, 2100]
    assert log.last is not None
    assert log.last["step"] == 40


def test_a_validation_stands_where_its_step_does(tmp_path: Path) -> None:
    log = RunLog.read(run_folder(tmp_path / "m", lines()))
    points = log.points(log.validations("continual"), "validation_memory")
    assert points[0] == (80 + 2 * 10, pytest.approx(2.8))


def test_a_torn_last_line_is_left_out_and_another_is_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "m", lines(warmup=3, continual=0))
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "warmup", "st')
    assert len(RunLog.read(folder).lines) == 3
    path.write_text('{"stage"\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1 is not JSON .*; delete that line"):
        RunLog.read(folder)


def test_a_folder_without_lines_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing/metrics.jsonl does not exist: name a run"):
        RunLog.read(tmp_path / "nothing")


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    log = RunLog.read(run_folder(tmp_path / "m", []))
    assert (log.last, log.validation, log.stages, log.hours()) == (None, None, [], 0.0)


def test_time_is_split_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    log = RunLog.read(run_folder(tmp_path / "m", lines()))
    seconds = log.seconds("continual")
    assert seconds == {
        "data": pytest.approx(4), "retrieve": pytest.approx(8), "compute": pytest.approx(24),
        "update": pytest.approx(4), "search": 2.0, "compile": 4.0, "validation": 2.0,
    }  # fmt: skip
    assert log.hours() == pytest.approx((40 + 2 + 40 + 8) / 3600)


def test_time_that_no_key_tells_is_between_steps_and_a_crash_is_left_out(tmp_path: Path) -> None:
    written = lines(warmup=4, continual=0)
    for line in written[2:]:
        line["time"] += 5  # something that older runs' lines do not tell
    resumed = {"stage": "warmup", "step": 4, "event": "resumed", "time": written[-1]["time"] + 9000}
    log = RunLog.read(run_folder(tmp_path / "m", [*written, resumed]))
    assert log.seconds("warmup")["between steps"] == pytest.approx(5)
    assert log.events == [resumed]


RESUMED = {"stage": "warmup", "step": 4, "event": "resumed", "time": 2e9}
ENDED = {"stage": "warmup", "step": 4, "code": 1, "cause": "", "reason": "", "time": 2e9}


@pytest.mark.parametrize(
    ("events", "recoveries"),
    [
        ([RESUMED | {"steps_repeated": 0}], 0),  # of ranks that another launcher stopped
        ([RESUMED | {"steps_repeated": 2}], 1),  # a kill of everything
        ([ENDED | {"event": "stopped", "code": 130}, RESUMED | {"steps_repeated": 0}], 0),
        ([ENDED | {"event": "crashed", "code": 143}, RESUMED], 0),  # as older runs told of a stop
        ([ENDED | {"event": "crashed"}, RESUMED | {"steps_repeated": 0}], 1),
        ([ENDED | {"event": "crashed"}, ENDED | {"event": "crashed"}, RESUMED | {"event": "restarted"}], 1),
        ([ENDED | {"event": "crashed"}, RESUMED, ENDED | {"event": "stopped"}, RESUMED], 1),
        ([ENDED | {"event": "crashed"}], 0),  # not survived yet
    ],
)
def test_a_start_after_a_crash_or_a_kill_is_a_recovery_and_one_after_a_stop_is_none(
    events: list[Line], recoveries: int, tmp_path: Path
) -> None:
    log = RunLog.read(run_folder(tmp_path / "m", [*lines(warmup=4, continual=0), *events]))
    assert len(log.recoveries) == recoveries


def test_a_rollback_is_no_resume_and_the_time_before_it_was_spent(tmp_path: Path) -> None:
    written = lines(warmup=8, continual=0)
    back = {**rollback(), "time": written[-1]["time"] + 3}
    passed = {"stage": "warmup", "step": 9, "passed_over": True, "time": back["time"] + 1}
    log = RunLog.read(run_folder(tmp_path / "m", [*written, back, passed]))
    assert (log.resumes, log.rollbacks, log.passed_over) == ([], [back], [passed])
    assert log.seconds("warmup")["between steps"] == pytest.approx(3 + 1)


def test_seeds_differ_in_their_seed_alone(tmp_path: Path) -> None:
    first, second, other = (
        RunLog.read(run_folder(tmp_path / name, [], settings))
        for name, settings in (
            ("a", "seed: 0\npaths: {root: x}\nmodel: {width: 8}\n"),
            ("b", "seed: 1\npaths: {root: y}\nmodel: {width: 8}\n"),
            ("c", "seed: 1\nmodel: {width: 16}\n"),
        )
    )
    assert are_seeds([first, second])
    assert not are_seeds([first, other])
    assert dict(different_settings([first, other])) == {"seed": [0, 1], "model.width": [8, 16]}


def test_lines_alone_are_enough(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "m", lines(warmup=2, continual=0))
    (folder / "config.yaml").unlink()
    log = RunLog.read(folder)
    assert log.settings == {}
    assert json.dumps(log.lines[0]["step"]) == "1"
