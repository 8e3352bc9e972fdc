"""Sweeps: what their trials come to, and what kills, failures and a second start change about it."""

import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import yaml

from benchmarks.documentation import corpus_settings
from launch import slurm as launch_slurm
from launch import sweep, sweep_report, trial
from launch.cli import parse
from launch.compose import CONF, compose_config
from launch.space import Numbers, Value, read_space
from launch.study import Row, Study
from launch.sweep_report import objective
from launch.trial import TrialProcess
from memorybank.config import QueryMode
from tests.support.launch import memory3, prepared_root, trained_corpus, within
from tests.support.spawn import HANG_SECONDS
from tests.support.sweep import RATES, SPACE, control, facts_loss, losses, starts
from train.arms import Arm, Pattern
from train.evaluate import ArmResult, ProbeItem, TextItem, to_json

REPOSITORY = Path(__file__).parents[2]


def rows(root: Path, *, like: str = RATES) -> list[Row]:
    """What the journal of a sweep says."""
    space = read_space([*SPACE, like] if like == RATES else [*SPACE, RATES, like])
    return Study(root / "s", space.swept, seed=0, settle_steps=2).rows()


def rate(values: dict[str, Value]) -> float:
    return float(values["warmup.peak_lr"])


def test_a_sweep_trains_prunes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert control(tmp_path, 9, picture=True) == 0
    said = capsys.readouterr().out
    ended = rows(tmp_path)
    assert [row.number for row in ended] == list(range(9))
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
    assert lines[0].startswith("# Sweep s: 9 of 9 trials (")
    assert lines[2].startswith(
        "Loss: held-out text, validation half, 8,192 tokens, without memory, nats per token, at the end"
    )
    assert lines[6].startswith(f"| {best.number} | {best.loss:.4f} | {rate(best.values):.4g} | finished |")
    assert "apart (PED-ANOVA): `warmup.peak_lr` 100%." in said
    assert f"warmup.peak_lr={rate(best.values)}" in lines[-3]
    assert (tmp_path / "s/report.md").read_text() in said
    assert (tmp_path / "s/report.png").read_bytes().startswith(b"\x89PNG")

    reports = [tmp_path / "s" / name for name in ("report.md", "report.png")]
    files = [path.stat().st_ino for path in reports]
    assert control(tmp_path, 9, picture=True) == 0  # nothing is left to do
    assert all(
        path.stat().st_ino != file for path, file in zip(reports, files, strict=True)
    )  # not overwritten
    assert rows(tmp_path) == ended
    assert all(starts(tmp_path / f"s-{row.number:03d}") == 1 for row in ended)
    assert control(tmp_path, 10) == 0  # and it can be made longer
    assert rows(tmp_path)[:9] == ended
    assert len(rows(tmp_path)) == 10


def test_a_sweep_of_facts_evaluates_every_trial_and_prunes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = "warmup.peak_lr=choice(1e-4, 1e-3, 1e-2)"
    assert control(tmp_path, 9, choices, objective="facts") == 0
    said = capsys.readouterr().out
    ended = rows(tmp_path, like=choices)
    assert [row.state for row in ended] == ["finished"] * 9
    assert [row.loss for row in ended] == [facts_loss(rate(row.values)) for row in ended]
    assert [row.beside for row in ended] == [{"text": 1.5}] * 9  # of those that repeat another as well
    lines = said.splitlines()
    assert (
        "Loss: fact probes, validation half, without memory, nats per answer token, of the trained run."
        in said
    )
    assert lines[4] == "| trial | loss | text | `warmup.peak_lr` |  |"
    best = max((1e-4, 1e-3, 1e-2), key=lambda rate: losses(rate)[-1])
    number = min(row.number for row in ended if rate(row.values) == best)
    assert (
        lines[6]
        == f"| {number} | {facts_loss(best):.4f} | 1.5000 | {ended[number].values['warmup.peak_lr']} | finished |"
    )


@pytest.mark.parametrize("code", [0, 2])
def test_a_trial_is_evaluated_once_it_is_trained(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def answer(arguments: list[str]) -> int:
        asked.append(arguments)
        return code

    monkeypatch.setattr(trial.cli, "main", answer)
    run = tmp_path / "s-000"
    run.mkdir()
    with (run / "trial.lock").open("wb") as lock:
        assert trial.main(str(run), str(lock.fileno()), trial.EVALUATE, "seed=3") == code
    assert asked[0] == ["pretrain", "--no-prepare", "seed=3"]
    assert asked[1:] == ([] if code else [["evaluate", str(run), "--root", str(tmp_path)]])
    assert (run / "trial-exit").read_text() == f"{code}\n"
    assert (run / "trial.lock").read_text() == f"{os.getpid()}\n"


def test_the_objective_of_facts_is_their_loss_with_memory_where_memory_is_read(tmp_path: Path) -> None:
    fact = ProbeItem("p", "g", "r", 2.0, 1, exact=False, hit1=False, hit5=False, majority=False)

    def result(
        arm: Arm, loss: float, query: QueryMode | None = None, pattern: Pattern | None = None
    ) -> ArmResult:
        item = replace(fact, loss=loss) if query is None and loss < 5 else TextItem("d", loss, 1)
        return ArmResult(
            arm=arm, model="M", query=query, pattern=pattern, overlap_limit=None, age_steps=None, filled=None,
            note="", items=(item,),
        )  # fmt: skip

    results = [
        result(Arm.none, 9.0),
        result(Arm.none, 3.0),
        result(Arm.memory, 1.0),
        result(Arm.shuffled, 2.0),
    ]
    for number, (query, pattern) in enumerate(product(QueryMode, Pattern)):
        results.append(result(Arm.memory, 5.0 + number, query, pattern))
    (tmp_path / "evaluation-validation.json").write_text(json.dumps(to_json(results)))
    text = 5.0 + list(product(QueryMode, Pattern)).index((QueryMode.previous, Pattern.inference))
    assert TrialProcess(tmp_path, compose_config(SPACE), []).evaluation() == {
        "facts": 1.0,
        "facts, shuffled": 2.0,
        "facts, no memory": 3.0,
        "text": text,
        "text, no memory": 9.0,
    }


def test_a_corpus_without_facts_is_no_objective(tmp_path: Path) -> None:
    run = TrialProcess(tmp_path, compose_config(["experiment=quick", "debug=smoke"]), [])
    text = TextItem("d", 6.0, 4)
    shared = {
        "query": None,
        "pattern": None,
        "overlap_limit": None,
        "age_steps": None,
        "filled": None,
        "note": "",
    }
    (tmp_path / "evaluation-validation.json").write_text(
        json.dumps(to_json([ArmResult(arm=Arm.none, model="C", items=(text,), **shared)]))
    )
    with pytest.raises(ValueError, match="its corpus has no fact probes; choose --objective text"):
        run.evaluation()


@pytest.fixture
def queue(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM of this machine that is asked often; its folder."""
    monkeypatch.setattr(launch_slurm, "_QUEUE_SECONDS", 0.1)
    return cluster


def test_cancelling_one_job_after_the_other_ends_a_sweep(
    tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = time.sleep
    (queue / "full").touch()

    def cancel(seconds: float) -> None:
        """All that wait."""
        for job in (queue / "jobs").iterdir():
            subprocess.run(["scancel", job.name], check=True)
        sleep(seconds)

    monkeypatch.setattr(sweep.time, "sleep", cancel)
    more = ["launcher=slurm", "launcher.slurm.array_tasks=2", "launcher.slurm.gpus=false"]
    with pytest.raises(
        ValueError, match=r"3 jobs were cancelled .*goes on with the [23] trials that are left"
    ):
        control(tmp_path, 6, *more, RATES, jobs=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Six trials that nobody killed."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert control(root, 6) == 0
    return rows(root)


@pytest.mark.parametrize(("kills", "seed"), [(3, 1), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_a_killed_controller_repeats_nothing(
    kills: int, seed: int, undisturbed: list[Row], tmp_path: Path
) -> None:
    """Kills fall anywhere from the start of its process, before it holds the sweep's lock as well."""
    moments = random.Random(seed)
    command = [sys.executable, "-m", "tests.support.sweep", "control", str(tmp_path), "6"]
    allowed = tmp_path / "allowed"
    environment = {**os.environ, "STEPS_ALLOWED": str(allowed)}
    allowed.touch()
    before_it_holds = 0.0
    for killed in range(kills):
        with allowed.open("ab") as steps:  # of 30, which leave the last trial to the last controller
            steps.write(bytes(30 * (killed + 1) // kills - 30 * killed // kills))
        begun = time.monotonic()
        controller = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
        if killed == 0:
            _wait_until_it_holds(tmp_path / "s", controller)
            before_it_holds = time.monotonic() - begun
        else:
            time.sleep(moments.random() * 2 * before_it_holds)
        assert controller.poll() is None  # each kill is one of a sweep at work
        controller.kill()
        controller.wait()
    allowed.write_bytes(bytes(36))
    assert subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode == 0
    _kill_while_it_reports(tmp_path / "s", command, environment, kills, moments)
    assert rows(tmp_path) == undisturbed
    assert [starts(tmp_path / f"s-{row.number:03d}") for row in undisturbed] == [1] * 6
    for row in undisturbed:
        said = (tmp_path / f"s-{row.number:03d}/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in said] == list(range(1, len(said) + 1))


def _kill_while_it_reports(
    folder: Path, command: list[str], environment: dict[str, str], kills: int, moments: random.Random
) -> None:
    """Of a sweep with nothing left to train: a controller leaves the whole report behind, or none."""
    text, picture = (folder / "report.md").read_bytes(), (folder / "report.png").read_bytes()
    seconds = 0.0
    for killed in range(kills + 1):  # the first one is not
        for name in ("report.md", "report.png"):
            (folder / name).unlink(missing_ok=True)
        with subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL
        ) as controller:
            _wait_until_it_holds(folder, controller)
            begun = time.monotonic()
            if killed:
                time.sleep(moments.random() * seconds)
                controller.kill()
        seconds = seconds or time.monotonic() - begun
        for name, whole in (("report.md", text), ("report.png", picture)):
            path = folder / name
            assert path.exists() or killed
            assert not path.exists() or path.read_bytes() == whole
    assert subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode == 0
    assert ((folder / "report.md").read_bytes(), (folder / "report.png").read_bytes()) == (text, picture)


def test_a_trial_that_is_killed_goes_on(tmp_path: Path) -> None:
    assert control(tmp_path, 1, RATES, "logging.wandb_project=killed-once") == 0
    (row,) = rows(tmp_path)
    assert (row.state, row.loss) == ("finished", losses(rate(row.values))[-1])
    assert starts(tmp_path / "s-000") == 2
    said = (tmp_path / "s-000/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in said] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("fate", "note", "times"),
    [
        ("killed", "ended 3 times by a signal; it said nothing", 3),
        ("memory", "memory3 pretrain: rank 0: OutOfMemoryError: CUDA out of memory", 1),
        ("kernel", "memory3 pretrain: rank 0 was ended by SIGKILL; the kernel has", 1),
        ("nan", "validation loss is nan at step 3", 1),
    ],
)
def test_bad_trials_fail_and_a_sweep_of_failures_ends(
    fate: str, note: str, times: int, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="5 trials failed and none has finished, the last one so: ") as ended:
        control(tmp_path, 7, RATES, f"logging.wandb_project={fate}")
    assert f"{note}\nmend what they share; the same command then goes on with the 2 that are left" in str(
        ended.value
    )
    assert [(row.state, row.note) for row in rows(tmp_path)] == [("failed", note)] * 5
    assert [starts(tmp_path / f"s-{number:03d}") for number in range(5)] == [times] * 5
    assert not TrialProcess(
        tmp_path / "s-000", compose_config(SPACE), []
    ).is_alive()  # one of "nan" waits to be stopped


def test_a_sweep_with_a_finished_trial_goes_on_whatever_fails(tmp_path: Path) -> None:
    fates = "logging.wandb_project=choice(fine, memory, kernel)"
    assert control(tmp_path, 9, RATES, fates, seed=257) == 0
    states = [row.state for row in rows(tmp_path, like=fates)]
    assert states == ["failed", "failed", "finished", *["failed"] * 6]


def test_a_job_that_still_trains_may_save_a_sweep_of_failures(
    tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first six, which train together, five fail while the sixth has not begun its steps."""
    allowed, sleep = tmp_path / "allowed", time.sleep
    allowed.write_bytes(bytes(30))
    monkeypatch.setenv("STEPS_ALLOWED", str(allowed))
    more = ["launcher=slurm", "launcher.slurm.array_tasks=6", "launcher.slurm.gpus=false"]
    fates = "logging.wandb_project=choice(fine, memory, kernel)"

    def allow(seconds: float) -> None:
        """The others, once the controller knows of five failures and waits."""
        if [row.state for row in rows(tmp_path, like=fates)].count("failed") == 5:
            allowed.write_bytes(bytes(42))
        sleep(seconds)

    monkeypatch.setattr(sweep.time, "sleep", allow)
    assert control(tmp_path, 7, *more, RATES, fates, seed=7, jobs=True) == 0
    states = [row.state for row in rows(tmp_path, like=fates)]
    assert states[:6] == [*["failed"] * 5, "finished"]


def test_a_trial_that_lacked_room_on_the_disk_is_trained_once_there_is_some(tmp_path: Path) -> None:
    lacks = [
        "warmup.steps=4000",
        "saving.every_steps=1",
        "saving.keep_last=4000",
        "model.width=16384",
    ]  # petabytes
    fates = ["logging.wandb_project=memory"]
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"s-000 has room for .*; make room, .*; the same command then goes on$"
        ):
            control(tmp_path, 2, RATES, *lacks, *fates)
        assert [row.state for row in rows(tmp_path)] == ["running"]
    assert starts(tmp_path / "s-000") == 2


def test_a_sweep_whose_trials_all_failed_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # and stays one
        with pytest.raises(
            ValueError, match="all of 2 trials failed, the last one so: memory3 pretrain: rank 0: Out"
        ):
            control(tmp_path, 2, RATES, "logging.wandb_project=memory")
        assert "# Sweep s: 2 of 2 trials (2 failed)" in capsys.readouterr().out


def test_trials_are_tasks_of_arrays_on_slurm(
    tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that is killed, and a controller that is killed, on the way."""
    monkeypatch.setenv("STEP_SECONDS", "0.2")
    more = ["launcher=slurm", "launcher.slurm.array_tasks=3", "launcher.slurm.gpus=false"]
    more += ["logging.wandb_project=killed-once", RATES]

    class KilledError(Exception):
        pass

    def killed(seconds: float) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(sweep.time, "sleep", killed)
        with pytest.raises(KilledError):
            control(tmp_path, 4, *more, jobs=True)
    assert control(tmp_path, 4, *more, jobs=True) == 0
    assert [row.state for row in rows(tmp_path)] == ["finished"] * 4  # too few for one to be pruned
    trained = [tmp_path / f"s-{number:03d}" for number in range(4)]
    assert [starts(path) for path in trained] == [2] * 4  # the first controller's death repeated none
    jobs = sorted(path.name for path in (queue / "jobs").iterdir())
    assert jobs[:3] == ["100_0", "100_1", "100_2"]
    assert len(jobs) == 2 * 4


def test_a_job_that_is_cancelled_before_it_began_is_a_failed_trial(
    tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, sleep = queue / "full", time.sleep
    full.touch()

    def cancel(seconds: float) -> None:
        """Once the controller waits for its first jobs, both of which wait."""
        if full.exists():
            subprocess.run(["scancel", "100_1"], check=True)
            full.unlink()
        sleep(seconds)

    monkeypatch.setattr(sweep.time, "sleep", cancel)
    more = ["launcher=slurm", "launcher.slurm.array_tasks=2", "launcher.slurm.gpus=false"]
    assert control(tmp_path, 3, *more, RATES, jobs=True) == 0
    cancelled = rows(tmp_path)[1]
    note = "job 100_1 was cancelled before it began; a greater --trials draws another instead"
    assert (cancelled.state, cancelled.note) == ("failed", note)
    assert sorted(path.name for path in (queue / "jobs").iterdir()) == ["100_0", "100_1", "101_2"]
    assert {starts(tmp_path / f"s-{number:03d}") for number in (0, 2)} == {1}


@pytest.mark.usefixtures("queue")
def test_a_trial_that_fails_as_a_job_says_why(tmp_path: Path) -> None:
    more = ["launcher=slurm", "launcher.slurm.array_tasks=2", "launcher.slurm.gpus=false"]
    with pytest.raises(ValueError, match=r"[56] trials failed and none has finished"):
        control(tmp_path, 8, *more, "logging.wandb_project=memory", RATES, jobs=True)
    oom = "memory3 pretrain: rank 0: OutOfMemoryError: CUDA out of memory"
    assert {row.note for row in rows(tmp_path)} == {oom}


def test_a_setting_that_cannot_be_is_a_failed_trial(tmp_path: Path) -> None:
    assert control(tmp_path, 3, RATES, "warmup.ramp_steps=choice(1, 7)") == 0
    failed = [row for row in rows(tmp_path, like="warmup.ramp_steps=choice(1,7)") if row.state == "failed"]
    assert {row.values["warmup.ramp_steps"] for row in failed} == {"7"}
    assert "warmup.ramp_steps=7 + warmup.decay_steps=0 exceed warmup.steps=6; shorten them" in failed[0].note
    assert not (tmp_path / f"s-{failed[0].number:03d}").exists()


def test_values_that_were_tried_are_not_trained_again(tmp_path: Path) -> None:
    assert control(tmp_path, 4, "warmup.peak_lr=choice(1e-3, 2e-3)") == 0
    trained = list(tmp_path.glob("s-*"))
    assert len(trained) <= 2
    journal = (tmp_path / "s/report.md").read_text()
    assert journal.count("finished: like trial ") == 4 - len(trained)


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF / "sweep").glob("*.yaml"))])
def test_the_command_of_a_published_sweep_draws_its_trials(name: str, tmp_path: Path) -> None:
    page = (REPOSITORY / f"benchmarks/results/sweep_{name}.md").read_text()
    _, _, rest = page.partition("\n    memory3 ")
    command, _, rest = rest.partition("\n\n")
    plan = sweep.sweep_of(parse(shlex.split(command.replace("\\\n", ""))))
    head, _, *lines = ("| trial" + rest.partition("\n| trial")[2].partition("\n\n")[0]).splitlines()
    table = [dict(zip(head.split("|"), line.split("|"), strict=True)) for line in lines]
    trials = sorted(table, key=lambda row: int(row[" trial "]))
    assert [int(row[" trial "]) for row in trials] == list(range(plan.trials))
    # The draws of later trials follow from losses.
    for drawn in Study(tmp_path, plan.space.swept, seed=plan.seed, settle_steps=0).open(8):
        for key, value in drawn.values.items():
            assert trials[drawn.number][f" `{key}` "].strip() == sweep_report.value_text(value)


@pytest.mark.parametrize(
    "setting",
    ["a=1", "continual.epoch_steps='50'", "model.ffn_width=${model.width}", 'a=["b","c d"]', "a='$b'"],
)
def test_the_best_command_can_be_given_to_a_shell(setting: str) -> None:
    plan = sweep.Sweep("s", read_space([RATES, "seed=1"]), 1, 0)
    plan = replace(plan, space=replace(plan.space, fixed=(setting,)))
    row = Row(0, "finished", 1.0, {"warmup.peak_lr": 1e-3})
    said = sweep_report.render(plan, compose_config(SPACE), [row], {})
    [command] = [line for line in said.splitlines() if line.startswith("    memory3 pretrain ")]
    assert shlex.split(command) == ["memory3", "pretrain", *plan.settings(0, row.values)]


def test_draws_follow_from_seed_and_history(tmp_path: Path) -> None:
    """A study that is closed after every trial, its last line torn, draws what one that stays open draws."""

    def drawn(folder: Path, *, reopened: bool) -> list[float]:
        folder.mkdir()
        space = read_space([RATES]).swept
        study = Study(folder, space, seed=5, settle_steps=0)
        values = []
        for _ in range(12):
            if reopened:
                with (folder / "journal.log").open("ab") as journal:
                    journal.write(b'{"op_code":4,"wor')
                study = Study(folder, space, seed=5, settle_steps=0)
                assert study.open(1)[0].values == study.open(1)[0].values  # an open trial is not drawn again
            [trial] = study.open(1)
            values.append(rate(trial.values))
            trial.finish(losses(values[-1])[-1])
        return values

    values = drawn(tmp_path / "open", reopened=False)
    assert values == drawn(tmp_path / "reopened", reopened=True)
    assert len(set(values)) == 12


def test_other_sweeps_runs_and_users_are_refused(tmp_path: Path) -> None:
    control(tmp_path, 1)
    with pytest.raises(
        ValueError, match=r"holds a sweep of other settings:\n  seed: 0 -> 1\nchoose another --name"
    ):
        control(tmp_path, 1, seed=1)
    with pytest.raises(ValueError, match=r"holds a sweep of other settings:\n  objective: text -> facts\n"):
        control(tmp_path, 1, objective="facts")
    with pytest.raises(
        ValueError, match=r"  swept: .*'interval.1,2.'.*\nchoose another --name, or give the old"
    ):
        control(tmp_path, 1, "warmup.peak_lr=interval(1,2)")
    with (
        sweep.only_user(tmp_path / "s"),
        pytest.raises(ValueError, match="wait for it, or choose another --name"),
    ):
        control(tmp_path, 1)
    (tmp_path / "s/sweep.json").rename(tmp_path / "s/config.yaml")
    with pytest.raises(ValueError, match="holds a run; choose another --name"):
        control(tmp_path, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweep=memry"], "sweep=memry does not exist; did you mean sweep=memory? choices: learning_rate, memory"),
        (["warmup.steps=3"], "nothing varies: write at least one setting as KEY=interval(1e-4, 1e-2) or KEY=choice"),
        (["run=x", RATES], "run=x: a sweep decides this itself; --name NAME names it, its runs are NAME-000, ..."),
        (["--trials=0", RATES, "--name=x"], "--trials 0: set 1 or more"),
        (["--report", RATES, "paths.root=HERE"], "HERE/sweep is no sweep; leave --report away to begin one"),
        (["warmup.peak_lr=choice(1e-3, high)"], "warmup.peak_lr=high: warmup.peak_lr must be a number"),
        (["model=choice(nano, nanoo)"], "model=nanoo does not exist; did you mean model=nano?"),
        # the grammar
        (["warmup.peak_lrr=interval(1,2)"], "there is no key warmup.peak_lrr; did you mean warmup.peak_lr?"),
        (["lrr=interval(1,2)"], "lrr=interval(1,2): there is no key lrr; "),
        (["warmup.peak_lr=interval(2,1)"], "warmup.peak_lr=interval(2,1): an interval goes upwards; write int"),
        (["warmup.peak_lr=tag(log,interval(0,1))"], "logarithms begin above 0; write for example interval(0.01, 1)"),
        (["warmup.peak_lr=tag(lin,interval(1,2))"], "the one tag is log, of an interval: tag(log, interval(1e-4"),
        (["model.selection=interval(1,2)"], "model.selection is no number; write choice(a, b)"),
        (["warmup.steps=interval(1.5,2.5)"], "warmup.steps takes whole numbers; write whole ends"),
        (["warmup.steps=range(5,1)"], "a range goes upwards and leaves out its end; write for example range(1, 5)"),
        (["warmup.steps=choice(1)"], "one choice is no choice; write warmup.steps=1"),
        (["model=glob(*)"], "model=glob(*): list the choices, choice(a, b)"),
        (["warmup.steps=interval(1,"], "warmup.steps=interval(1,: settings are written KEY=VALUE; what varies as "),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = within("sweep", *(text.replace("HERE", str(tmp_path)) for text in arguments))
    assert done.code == 2
    assert done.err.startswith("memory3 sweep: ")
    assert said.replace("HERE", str(tmp_path)) in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trails: 3\noverrides: [seed=0]", "there is no key trails; did you mean trials?"),
        ("steps: 3\noverrides: [seed=0]", "there is no key steps; keys: overrides, trials, objective"),
        ("trials: many\noverrides: [seed=0]", "trials: many must be a whole number, 1 or more, for example 20"),
        ("trials: 0\noverrides: [seed=0]", "trials: 0 must be a whole number, 1 or more, for example 20"),
        ("trials: true\noverrides: [seed=0]", "trials: True must be a whole number, 1 or more, for example 20"),
        ("trials: 3", "overrides is missing; write '- KEY=VALUE' a line below it, and vary one of them"),
        ("overrides: seed=0", "overrides seed=0 is not a list of settings; write '- KEY=VALUE' a line below it"),
        ("overrides:\n  - seed: 0", "overrides [{'seed': 0}] is not a list of settings; write '- KEY=VALUE' a line"),
        ("overrides: []\nobjective: fact", "objective: fact does not exist; did you mean facts? choices: text, facts"),
        ("overrides: []\nobjective: 3", "objective: 3 does not exist; choices: text, facts"),
        ("overrides: [seed=0", "expected ',' or ']'"),
        ("a: !!python/name:os.system", "the file must be plain YAML, without tags"),
        ("\t", "the file must be plain YAML, without tags"),
        ("", "it has no keys; write trials: 20, and overrides: a list of settings"),
        ("- seed=0,1", "it has no keys; write trials: 20, and overrides: a list of settings"),
    ],
)  # fmt: skip
def test_mistakes_in_files_name_the_file_and_the_key(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/mine.yaml").write_text(text)
    monkeypatch.setattr(sweep, "CONF", tmp_path)
    done = within("sweep", "sweep=mine")
    assert done.code == 2
    assert done.err.startswith("memory3 sweep: conf/sweep/mine.yaml: ")
    assert said in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "given", "said"),
    [
        ("warmup.stepz=choice(1,2)", [], "MINE: warmup.stepz=choice(1,2): there is no key warmup.stepz; did you mean"),
        ("warmup.steps=interval(2,1)", [], "MINE: warmup.steps=interval(2,1): an interval goes upwards; write"),
        ("experiment=dem seed=1,2", [], "MINE: experiment=dem does not exist; did you mean experiment=demo?"),
        ("model=choice(nano,nanoo)", [], "MINE: model=nanoo does not exist; did you mean model=nano?"),
        ("warmup.peak_lr=choice(1e-3,high)", [], "MINE: warmup.peak_lr=high: warmup.peak_lr must be a number"),
        ("warmup.steps=choice(0,1)", [], "MINE: warmup.steps=0 is below 1; set 1 or more"),
        ("run=x seed=1,2", [], "MINE: run=x: a sweep decides this itself; --name NAME names it"),
        ("model=nano model=micro seed=1,2", [], "MINE: model=micro: write model=NAME, once"),
        # what the command line has a part in, or alone
        (
            "warmup.ramp_steps=5,6",
            ["warmup.steps=3", "warmup.decay_steps=0"],
            "warmup.ramp_steps=5 + warmup.decay_steps=0 exceed warmup.steps=3; shorten them (warmup.ramp_steps is set "
            "in MINE)",
        ),
        ("warmup.steps=1,2", ["warmup.steps=0,1"], "warmup.steps=0 is below 1; set 1 or more"),
        ("model=nano seed=1,2", ["model=nanoo"], "model=nanoo does not exist; did you mean model=nano?"),
        ("seed=1,2", ["sweep=memory"], "sweep=memory: write sweep=NAME, once"),
    ],
)  # fmt: skip
def test_mistakes_in_overrides_of_files_name_the_file(
    overrides: str, given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    (conf / "sweep/mine.yaml").write_text(yaml.safe_dump({"overrides": overrides.split()}))
    monkeypatch.setattr(sweep, "CONF", conf)
    done = within("sweep", "sweep=mine", "debug=smoke", *given)
    assert done.code == 2
    assert done.err.startswith(f"memory3 sweep: {said.replace('MINE', 'conf/sweep/mine.yaml')}")
    assert done.err.count("\n") == 1


def test_sweep_files_are_for_sweeps() -> None:
    done = within("pretrain", "sweep=memory")
    assert (
        done.err
        == "memory3 pretrain: sweep=memory: files of conf/sweep/ are run by `memory3 sweep sweep=memory`\n"
    )


def test_dimensions_are_read_by_the_type_of_their_key() -> None:
    space = read_space(
        [
            "warmup.peak_lr=1e-3",
            "warmup.peak_lr=tag(log, interval(1e-4, 1e-2))",  # the later one counts
            "model.num_layers=interval(2, 8)",
            "retrieval.window=range(1, 9, 2)",
            "optim.beta2=range(0.1, 0.5, 0.1)",
            "model.width=128,256",
            "seed=3",
        ]
    )
    assert space.fixed == ("seed=3",)
    assert space.swept["warmup.peak_lr"] == Numbers(1e-4, 1e-2, log=True)
    assert space.swept["model.num_layers"] == Numbers(2, 8, whole=True)
    assert space.swept["retrieval.window"] == Numbers(1, 7, whole=True, step=2)
    assert space.swept["optim.beta2"] == Numbers(0.1, 0.4, step=0.1)
    assert space.swept["model.width"].ends == ("128", "256")
    assert next(space.corners()) == [
        *("seed=3", "warmup.peak_lr=0.0001", "model.num_layers=2", "retrieval.window=1"),
        *("optim.beta2=0.1", "model.width=128"),
    ]
    assert len(list(space.corners())) == 6


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF / "sweep").glob("*.yaml"))])
def test_shipped_sweeps_compose(name: str) -> None:
    from launch.cli import parser

    plan = sweep.sweep_of(parser().parse_args(["sweep", f"sweep={name}", "--trials=3"]))
    assert (plan.name, plan.trials) == (name, 3)
    for corner in plan.space.corners():
        config = compose_config(corner)
    facts = "fact probes, validation half, with memory, nats per answer token, of the trained run"
    text = "held-out text, validation half, 8,192 tokens, without memory, nats per token, at the end of the warmup"
    assert objective(plan, config) == {"memory": facts, "learning_rate": f"{text} stage"}[name]


def test_the_objective_is_the_last_validation_with_memory_where_memory_is_read(tmp_path: Path) -> None:
    run = TrialProcess(tmp_path, compose_config(["experiment=quick", "debug=smoke"]), [])
    lines = [
        {"stage": "warmup", "step": 4, "loss": 9.0},
        {"stage": "warmup", "step": 4, "validation_none": 5.0},
        {"stage": "continual", "step": 2, "validation_none": 4.0, "validation_memory": 3.0, "validation_shuffled": 1.0},
        {"stage": "continual", "step": 4, "validation_none": 2.0},
    ]  # fmt: skip
    metrics = tmp_path / "metrics.jsonl"
    with metrics.open("w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
        file.write('{"stage": "contin')
        file.flush()
        assert [(each.step, each.loss, each.is_last) for each in run.new_losses()] == [
            (4, 5.0, False),
            (6, 3.0, False),
            (8, 2.0, True),
        ]
        assert list(run.new_losses()) == []
        file.write('ual", "step": 4, "validation_memory": 1.0}\n')
    assert [each.loss for each in run.new_losses()] == [1.0]
    shutil.copy(metrics, tmp_path / "rewritten")  # as a resumed run does
    (tmp_path / "rewritten").rename(metrics)
    assert len(list(run.new_losses())) == 4


REAL = [
    *("experiment=quick", "debug=smoke", "continual=null", "warmup.steps=2", "warmup.rows_per_step=2"),
    *("engine.num_ranks=1", "logging.validation_rows=2", "saving.every_steps=100"),
]
DIVERGES = "warmup.peak_lr=choice(1e-3, 1e9)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("varied", "settings", "note"),
    [
        (DIVERGES, ["warmup.steps=4"], r"validation loss is nan at step \d"),
        (
            DIVERGES,
            ["warmup.steps=8", "logging.validate_every=8", "divergence.patience=3", "divergence.max_rollbacks=0"],
            "memory3 pretrain: rank 0: warmup stage: no finite gradient, 3 bad updates in a row .* lower warmup.peak",
        ),
        (
            "model.ffn_width=choice(64, 262144)",
            [],
            "memory3 pretrain: rank 0: out of memory in the warmup stage: .*can't allocate memory",
        ),
    ],
    ids=["nan", "diverged", "memory"],
)  # fmt: skip
def test_a_real_trial_that_cannot_be_trained_fails_and_the_next_one_is_trained(
    varied: str, settings: list[str], note: str, tmp_path: Path
) -> None:
    (tmp_path / "prepared").symlink_to(prepared_root() / "prepared")
    corpus = corpus_settings(tmp_path, trained_corpus())
    space = read_space([*REAL, *corpus, *settings, varied])
    plan = sweep.Sweep("s", space, 2, seed=5)  # draws the second choice, then the first
    limited = ("sh", "-c", 'ulimit -d 3000000; exec "$@"', "sh", *trial.PROGRAM)  # KiB of data in a process
    config = compose_config(next(space.corners()))
    assert sweep.control(plan, config, tmp_path / "s", trials=trial.Processes(limited)) == 0
    failed, trained = Study(tmp_path / "s", space.swept, seed=5, settle_steps=0).rows()
    assert (failed.state, trained.state) == ("failed", "finished")
    assert re.match(note, failed.note)
    assert (tmp_path / "s-000/trial.log").read_text().count("starting from the beginning") == 1
    assert trained.loss is not None
    assert math.isfinite(trained.loss)


@pytest.mark.parametrize(
    ("trials", "kills"), [(3, 3), pytest.param(12, 20, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_real_trials_are_trained_once_whatever_is_killed(trials: int, kills: int, tmp_path: Path) -> None:
    """Kills fall anywhere from the start of its process: while it composes, prepares the corpus, and at work."""
    rates = "warmup.peak_lr=tag(log,interval(1e-4,1e-2))"
    command = ["sweep", f"--trials={trials}", *REAL, rates, *corpus_settings(tmp_path, trained_corpus())]
    moments = random.Random(trials)
    for killed in range(kills):
        controller = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *command],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        latest = time.monotonic() + moments.random() * 15
        most = 1 + killed * max(0, trials - 4) // kills  # what is left has to suffice for the kills to come
        if killed == 0:
            while not list(
                tmp_path.glob("prepared/*/tokenizer*")
            ):  # it has a corpus; shards, vectors are to come
                assert controller.poll() is None
                time.sleep(0.01)
            assert not (tmp_path / "sweep").exists()
        else:
            while time.monotonic() < latest and len(list(tmp_path.glob("sweep-*"))) <= most:
                time.sleep(0.01)
            time.sleep(moments.random())
        assert controller.poll() is None  # each kill is one of a sweep at work
        controller.send_signal(signal.SIGKILL)
        controller.wait()
    done = memory3(*command, timeout_seconds=3000)
    assert done.code == 0, done.err
    assert f"# Sweep sweep: {trials} of {trials} trials ({trials} finished)" in done.out
    for number in range(trials):
        run = tmp_path / f"sweep-{number:03d}"
        said = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in said if "loss" in line] == [1, 2]
        log = (run / "trial.log").read_text()
        assert log.count("starting from the beginning") == 1
        assert "resuming" not in log
        assert (run / "trial-exit").read_text() == "0\n"


def _wait_until_it_holds(folder: Path, controller: "subprocess.Popen[bytes]") -> None:
    """Wait until a controller has a sweep's lock, after which there is nothing of it that a kill may not meet."""
    lock, holder = folder / "lock", f"pid {controller.pid} on "
    deadline = time.monotonic() + HANG_SECONDS
    while not (lock.exists() and lock.read_text().startswith(holder)):
        assert controller.poll() is None, "it has ended"
        assert time.monotonic() < deadline
        time.sleep(0.005)
