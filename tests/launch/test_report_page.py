"""`launch.report_page`: what stands on the page, and that it loads nothing; `test_report` shows it to a browser."""

from pathlib import Path

import pytest

from launch.report_page import Evaluation, loss_charts, pictures, render
from launch.run_log import SECONDS, RunLog
from tests.support.browser import Elements
from tests.support.run_log import lines, rollback, run_folder
from train.arms import Arm
from train.evaluate import ArmResult, TextItem, table

HOSTILE = "</td><script>alert(1)</script>"


def two_runs(folder: Path) -> list[RunLog]:
    main = RunLog.read(run_folder(folder / "m", lines(), "seed: 0\nmodel: {width: 8}\n"))
    control = RunLog.read(run_folder(folder / "c", lines(warmup=0, has_memory=False), "model: {width: 16}\n"))
    return [main, control]


def evaluation() -> Evaluation:
    from memorybank.config import QueryMode
    from train.arms import Pattern

    def result(arm: Arm, loss: float, *, reads: bool) -> ArmResult:
        return ArmResult(
            arm=arm,
            model="M",
            query=QueryMode.own if reads else None,
            pattern=Pattern.training if reads else None,
            overlap_limit=0.9 if reads else None,
            age_steps=None,
            filled=1.0 if reads else None,
            note=HOSTILE,
            items=(TextItem("a", loss * 10, 10), TextItem("b", loss * 20, 20)),
        )

    arms = [result(Arm.none, 2.0, reads=False), result(Arm.memory, 1.9, reads=True)]
    return Evaluation("m: test half", table([arms], samples=10), "")


def page(logs: list[RunLog], *evaluations: Evaluation) -> Elements:
    return Elements(render(logs, evaluations))


def test_it_says_what_memory_did_beside_its_control(tmp_path: Path) -> None:
    text = page(two_runs(tmp_path)).text
    assert "Held-out loss 2.500 with memory, 2.600 without, 2.600 in c" in text
    assert "+0.100 nats" in text
    assert "than shuffled memory by +0.200" in text
    assert "Query own: a chunk's search has seen the tokens that it predicts" in text
    assert "c, held-out, no memory" in text
    assert "m, held-out, memory" in text
    assert "m, shuffled" in text


def test_charts_cover_both_stages_memory_bank_speed_and_stability(tmp_path: Path) -> None:
    drawn = pictures(two_runs(tmp_path))
    assert {name: [chart.title for chart in charts] for name, charts in drawn.items()} == {
        "losses": ["Warmup", "Continual stage"],
        "memory": [
            "Held-out loss, by what is read",
            "What memory saves",
            "Attention on memory",
            "Score of what was retrieved",
            "References read in a step",
            "Empty slots",
        ],
        "bank": [
            "References that may be read",
            "Memories compiled at a refresh",
            "Age of the generation that is read",
        ],
        "throughput": ["Speed"],
        "stability": ["Gradient norm", "Learning rate"],
    }
    saved = drawn["memory"][1].series[0]
    assert saved.points[0] == (100, pytest.approx(0.1))
    assert drawn["memory"][0].marks == [82.0, 122.0]


def test_the_time_of_a_stage_is_split(tmp_path: Path) -> None:
    text = page(two_runs(tmp_path)).text
    split = "data 8.3% · retrieve 16.7% · compute 50.0% · update 8.3% · search 4.2% · compile 8.3% · validation 4.2%"
    assert split in text


def test_every_part_of_the_time_has_a_colour(tmp_path: Path) -> None:
    written = render(two_runs(tmp_path), [])
    for number in range(len(SECONDS) + 1):  # the last is what no key tells
        assert f"--k{number}:#" in written
        assert f"i.k{number}{{" in written


def test_a_run_of_warmup_alone_has_no_empty_charts(tmp_path: Path) -> None:
    log = RunLog.read(run_folder(tmp_path / "w", lines(warmup=15, continual=0)))
    assert [chart.title for chart in loss_charts([log])] == ["Warmup"]
    said = page([log])
    assert "Held-out loss 2.900 after 15 of 40 steps of the warmup stage" in said.text
    assert not [given for _, given in said.elements if given.get("id") in ("memory", "bank", "settings")]


def test_a_run_of_one_step_and_of_none(tmp_path: Path) -> None:
    begun = RunLog.read(run_folder(tmp_path / "one", lines(warmup=1, continual=0)))
    assert "Training loss 8.000 after 1 of 40 steps" in page([begun]).text
    assert "none: no step yet" in page([RunLog.read(run_folder(tmp_path / "none", []))]).text


def test_faults_that_were_survived_are_listed(tmp_path: Path) -> None:
    written = lines(warmup=12, continual=0)
    written[4]["skipped"] = True
    written[4]["grad_norm"] = float("inf")
    event = {"stage": "warmup", "step": 8, "event": "resumed", "checkpoint": "warmup-00000008"}
    written.append({**event, "steps_repeated": 3, "time": 2e9})
    text = page([RunLog.read(run_folder(tmp_path / "m", written))]).text
    assert "faults survived21 crashes or kills, 3 steps repeated; 1 skipped updates" in text
    assert "resumed from warmup-00000008" in text
    assert "update skipped: a gradient was not finite" in text
    assert "No stop" not in text
    quiet = page([RunLog.read(run_folder(tmp_path / "quiet", lines()))]).text
    assert "No stop, no crash, no rollback and no skipped update stands in these runs' lines." in quiet


def test_a_stop_that_was_continued_is_no_fault(tmp_path: Path) -> None:
    stop = {"stage": "warmup", "step": 12, "event": "stopped", "code": 130, "cause": "SIGINT", "reason": ""}
    resumed = {"stage": "warmup", "step": 12, "event": "resumed", "checkpoint": "warmup-00000012"}
    written = [
        *lines(warmup=12, continual=0),
        stop | {"time": 2e9},
        resumed | {"steps_repeated": 0, "time": 2e9},
    ]
    text = page([RunLog.read(run_folder(tmp_path / "m", written))]).text
    assert "faults survived00 crashes or kills, 0 steps repeated" in text
    assert "beside them, it was stopped and continued 1 times" in text
    assert "stopped: SIGINT" in text


def test_a_rollback_is_a_fault_survived_and_no_resume(tmp_path: Path) -> None:
    written = lines(warmup=12, continual=0)
    written[8:] = [{"stage": "warmup", "step": step, "passed_over": True, "time": 2e9} for step in (9, 10)]
    written.insert(8, rollback())
    log = RunLog.read(run_folder(tmp_path / "m", written))
    text = page([log]).text
    assert (
        "0 crashes or kills, 0 steps repeated; 1 rollbacks, 2 updates passed over; 0 skipped updates" in text
    )
    assert "went back from step 11 to warmup-00000008: loss 9.000 stands out, 2 bad updates in a row" in text
    assert "3 steps undone, 16 rows passed over (updates 9 to 10)" in text
    assert "No stop" not in text
    [norm] = [drawn for drawn in pictures([log])["stability"] if drawn.title == "Gradient norm"]
    assert norm.marks == [16.0]


def test_a_crash_is_listed_with_its_cause_and_what_followed(tmp_path: Path) -> None:
    crash = {
        "stage": "warmup",
        "step": 12,
        "event": "crashed",
        "cause": "rank 1 was killed",
        "reason": "restart 1",
    }
    written = [*lines(warmup=12, continual=0), {**crash, "restarted_after": 4.0, "time": 2e9}]
    text = page([RunLog.read(run_folder(tmp_path / "m", written))]).text
    assert "crashed: rank 1 was killed; restart 1" in text
    assert "faults survived00 crashes or kills" in text  # it did not go on yet


def test_settings_that_differ_stand_side_by_side(tmp_path: Path) -> None:
    text = page(two_runs(tmp_path)).text
    assert "model.width816" in text
    assert str(tmp_path) not in text


def test_the_evaluation_has_its_table_and_no_empty_columns(tmp_path: Path) -> None:
    text = page(two_runs(tmp_path), evaluation()).text
    assert "text, query own, training pattern" in text
    assert "1.900" in text
    assert "exact" not in text


def test_it_loads_nothing_and_holds_the_words_of_others_as_text(tmp_path: Path) -> None:
    logs = two_runs(tmp_path)
    hostile = RunLog(HOSTILE, tmp_path, logs[1].lines, {"model.width": HOSTILE})
    made = page([logs[0], hostile], evaluation())
    assert made.loaded == []
    assert "script" not in {tag for tag, _ in made.elements}
    assert made.text.count(HOSTILE) > 5
