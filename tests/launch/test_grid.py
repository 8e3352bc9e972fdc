"""Grids: which runs they come to, and what failures, kills and a second start change about them."""

import shlex
import subprocess
from pathlib import Path
from threading import Event

import pytest

from benchmarks.documentation import corpus_settings
from launch import grid
from launch.compose import load_config
from launch.grid import Combination, combinations, control
from launch.slurm import newest_output
from launch.trial import TrialProcess
from tests.support import slurm
from tests.support.launch import memory3, prepared_root, trained_corpus, within
from tests.support.sweep import PROGRAM, SPACE, losses, starts

RATES = "warmup.peak_lr=1e-3,1e-2"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_POLL_SECONDS", 0.02)


@pytest.fixture
def allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs take as many steps as this file has bytes; they end after six."""
    path = tmp_path / "allowed"
    path.touch()
    monkeypatch.setenv("STEPS_ALLOWED", str(path))
    return path


def of(root: Path, *settings: str) -> list[Combination]:
    """A grid of runs that train nothing."""
    return combinations([*SPACE, f"paths.root={root}", "run=g", *settings])


def test_every_combination_in_the_order_of_hydras_sweeper() -> None:
    found = combinations(
        ["seed=7", "model=nano,micro", "warmup.peak_lr=choice(1e-3, 2e-3)", "run=g", "seed=range(0,3,2)"]
    )
    assert [each.values for each in found] == [
        {"seed": seed, "model": model, "warmup.peak_lr": rate}
        for seed in ("0", "2")
        for model in ("nano", "micro")
        for rate in ("0.001", "0.002")
    ]
    first = found[0]
    assert first.config.run == "g-seed-0-model-nano-warmup.peak_lr-0.001"
    assert first.settings == (
        *("seed=0", "model=nano", "warmup.peak_lr=0.001"),
        f"run={first.config.run}",
    )
    assert (found[-1].config.seed, found[-1].config.warmup.peak_lr) == (2, 0.002)  # type: ignore[union-attr]
    assert found[0].config.model != found[2].config.model


def test_runs_are_named_after_the_experiment_and_what_can_stand_in_a_path() -> None:
    names = [each.config.run for each in combinations(["experiment=demo", "data.path='a b','a/b','a/b'"])]
    assert names[0].startswith("demo-data.path-_a_b_-")
    assert names[1].startswith("demo-data.path-_a_b_-")
    assert len(set(names)) == len(names) == 2
    (long,) = combinations([f"data.path=choice({'x' * 300})"])
    assert len(long.config.run) < 120


@pytest.mark.parametrize(
    "command", [["pretrain", "-m", "--no-prepare", "seed=0,1"], ["sweep", "seed=choice(0,1)"]]
)
def test_a_run_to_branch_from_is_looked_for_before_the_first_one_starts(
    command: list[str], tmp_path: Path
) -> None:
    branch = ["experiment=quick", "warmup=null", "continual.branch_from=nowhere"]
    done = within(*command, *branch, f"paths.root={tmp_path}")
    assert done.code == 2
    assert done.err == (
        f"memory3 {command[0]}: continual.branch_from=nowhere: {tmp_path}/nowhere is not a run folder; "
        "name a run that was warmed up\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "seed=1"], "nothing varies: write at least one setting as KEY=a,b or range(1, 5), or leave -m away"),
        (["-m", "warmup.peak_lr=interval(1,2)"], "warmup.peak_lr=interval(1,2): a grid takes lists; `memory3 sweep`"),
        (["-m", "warmup.peak_lr=tag(log,interval(1,2))"], "a grid takes lists; `memory3 sweep` draws from an interval"),
        (["-m", "run=a,b"], "run=a,b: runs are named after what varies; give one run=NAME, or none"),
        (["-m", "model=glob(*)"], "model=glob(*): list the choices, choice(a, b)"),
        (["-m", "seed=range(3,1)"], "seed=range(3,1): this range is empty; its end is left out"),
        (["-m", "seed=range(0.0,1.0,0)"], "this range is empty"),
        (["-m", "seed=0,"], "seed=0,: settings are written KEY=VALUE; what varies as a,b or choice(a, b) or range(1"),
        (["-m", "sead=0,1"], "sead=0,1: there is no key sead; did you mean seed?"),
        (["-m", "model=nano,nanoo"], "model=nanoo: model=nanoo does not exist; did you mean model=nano?"),
        (["-m", "seed=0,1", "warmup.ramp_steps=1,900"], "seed=0, warmup.ramp_steps=900: warmup.ramp_steps=900 + "),
        (["model=nano,micro"], "model=nano,micro: this is several values; `memory3 pretrain -m` trains with each"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = within("pretrain", *arguments, f"paths.root={tmp_path}")
    assert done.code == 2
    assert done.err.startswith("memory3 pretrain: ")
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_rank_of_torchrun_starts_no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    done = within("pretrain", "-m", "seed=0,1")
    assert (done.code, done.err) == (
        2,
        "memory3 pretrain: -m starts runs of its own; give the command without torchrun or deepspeed\n",
    )


def test_cfg_prints_the_command_of_each() -> None:
    done = within("pretrain", "--multirun", "--cfg", "seed=0,1", "data.path='it is'")
    assert done.code == 0
    commands = [shlex.split(line) for line in done.out.splitlines()]
    assert commands[1] == ["memory3", "pretrain", "seed=1", "data.path='it is'", "run=run-seed-1"]
    assert len(commands) == 2


def test_the_others_go_on_and_nothing_that_has_finished_is_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = of(tmp_path, RATES, "logging.wandb_project=well,memory")
    assert control(runs, PROGRAM) == 1
    said = capsys.readouterr().out
    assert (tmp_path / "g-grid/report.md").read_text() == said
    names = [each.config.run for each in runs]
    oom = "failed: memory3 pretrain: rank 0: OutOfMemoryError: CUDA out of memory"
    assert said.splitlines() == [
        "| run | `warmup.peak_lr` | `logging.wandb_project` | no memory |  |",
        "|---|---|---|---|---|",
        f"| {names[0]} | 0.001 | well | {losses(1e-3)[-1]:.4f} | finished |",
        f"| {names[1]} | 0.001 | memory |  | {oom} |",
        f"| {names[2]} | 0.01 | well | {losses(1e-2)[-1]:.4f} | finished |",
        f"| {names[3]} | 0.01 | memory |  | {oom} |",
        "",
        "2 of 4 finished. Losses: the last validation inside training, held-out text, nats per token.",
        "",
        f"    memory3 report {tmp_path / names[0]} {tmp_path / names[2]}",
        "",
        "The same command goes on with what is left.",
    ]
    more = of(tmp_path, "warmup.peak_lr=1e-3,1e-2,1e-1", "logging.wandb_project=choice(well)")
    assert control(more, PROGRAM) == 0  # the grid is another one now, its old runs are the same
    assert [starts(each.folder) for each in more] == [1, 1, 1]
    assert capsys.readouterr().out.count("finished: before") == 2
    assert control(runs, PROGRAM) == 1
    assert [starts(each.folder) for each in runs] == [1, 2, 1, 2]  # what failed is tried again


def test_a_combination_that_a_signal_ends_has_failed_and_goes_on_next_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = of(tmp_path, RATES, "logging.wandb_project=killed-once")
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "trial.log").write_text("memory3 pretrain: what an earlier start said\n")
    assert control(runs, PROGRAM) == 1
    assert capsys.readouterr().out.count("failed: ended by a signal; it said nothing") == 2
    assert control(runs, PROGRAM) == 0
    assert [len((each.folder / "metrics.jsonl").read_text().splitlines()) for each in runs] == [6, 6]


def test_what_a_killed_controller_left_is_waited_for(
    tmp_path: Path, allowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = of(tmp_path, RATES)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        allowed.write_bytes(bytes(6))
        Event().wait(seconds)

    monkeypatch.setattr(grid.time, "sleep", wait)
    left = TrialProcess(runs[0].folder, runs[0].config, runs[0].settings, PROGRAM)
    left.start()
    assert control(runs, PROGRAM) == 0
    assert waited
    assert [starts(each.folder) for each in runs] == [1, 1]
    assert not left.is_alive()


@pytest.mark.usefixtures("allowed")
def test_an_interrupt_stops_the_run_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = of(tmp_path, RATES)

    def interrupted(seconds: float) -> None:
        if seconds == grid._POLL_SECONDS:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grid.time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            control(runs, PROGRAM)
    first = TrialProcess(runs[0].folder, runs[0].config, [])
    assert not first.is_alive()
    assert first.exit_code() is None
    assert not runs[1].folder.exists()


def test_a_grid_has_one_user(tmp_path: Path) -> None:
    (tmp_path / "g-grid").mkdir()
    with grid.only_user(tmp_path / "g-grid"), pytest.raises(ValueError, match="wait for it, or set run=NAME"):
        control(of(tmp_path, RATES), PROGRAM)


def test_on_slurm_every_combination_is_a_job(
    tmp_path: Path, cluster: Path, allowed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = of(tmp_path, RATES, "launcher=slurm", "launcher.slurm.gpus=false")
    assert control(runs, PROGRAM) == 0
    said = capsys.readouterr().out
    assert ("waiting: job 100 |" in said, "waiting: job 101 |" in said) == (True, True)
    assert control(runs, PROGRAM) == 0
    assert "waiting: job 100, submitted before |" in capsys.readouterr().out
    allowed.write_bytes(bytes(6))
    jobs = sorted((cluster / "jobs").iterdir())
    assert [slurm.wait_for(job) for job in jobs] == [0, 0]
    assert control(runs, PROGRAM) == 0
    assert "2 of 2 finished." in capsys.readouterr().out
    assert [starts(each.folder) for each in runs] == [1, 1]
    assert "launcher.slurm.submit=false" in (runs[0].folder / "trial.json").read_text()


def test_a_job_that_failed_is_named_when_it_is_submitted_again(
    tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fates = "logging.wandb_project=well,memory,killed-once"
    runs = of(tmp_path, "warmup.peak_lr=1e-3", fates, "launcher=slurm", "launcher.slurm.gpus=false")
    assert control(runs, PROGRAM) == 0
    assert "again" not in capsys.readouterr().out
    assert sorted(slurm.wait_for(job) for job in (cluster / "jobs").iterdir()) == [-9, 0, 2]
    assert control(runs, PROGRAM) == 0
    oom = "memory3 pretrain: rank 0: OutOfMemoryError: CUDA out of memory"
    ends = [line.split("|")[-2].strip() for line in capsys.readouterr().out.splitlines()[2:5]]
    assert ends == [
        "finished: before",
        f"waiting: job 103, submitted again, for it failed: {oom}",
        "waiting: job 104, submitted again, for it failed: ended by a signal; it said nothing",
    ]
    assert [slurm.wait_for(cluster / "jobs" / job) for job in ("103", "104")] == [2, 0]
    assert [starts(each.folder) for each in runs] == [1, 2, 2]


def test_a_job_that_was_cancelled_before_it_began_is_named_when_it_is_submitted_again(
    tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = of(tmp_path, RATES, "launcher=slurm", "launcher.slurm.gpus=false")
    (cluster / "full").touch()
    assert control(runs, PROGRAM) == 0
    subprocess.run(["scancel", "101"], check=True)
    capsys.readouterr()
    assert control(runs, PROGRAM) == 0
    ends = [line.split("|")[-2].strip() for line in capsys.readouterr().out.splitlines()[2:4]]
    again = "job 102, submitted again, for the one before was cancelled before it began"
    assert ends == ["waiting: job 100, submitted before", f"waiting: {again}"]
    for job in ("100", "102"):  # else they wait for ever
        subprocess.run(["scancel", job], check=True)


def test_what_jobs_say_is_read_of_the_newest(tmp_path: Path) -> None:
    for name in ("slurm-9.out", "slurm-10.out", "slurm-9_1.out", "slurm-11_1.out", "slurm-8_11.out"):
        (tmp_path / name).touch()
    found = [newest_output(tmp_path, task) for task in (None, 1, 11, 2)]
    assert [path and path.name for path in found] == [
        "slurm-10.out",
        "slurm-11_1.out",
        "slurm-8_11.out",
        None,
    ]


REAL = [
    *("experiment=quick", "debug=smoke", "continual=null", "warmup.steps=2", "warmup.rows_per_step=2"),
    *("engine.num_ranks=1", "logging.validation_rows=2", "saving.every_steps=100", "run=g"),
]


def test_a_real_grid_is_trained_once(tmp_path: Path) -> None:
    (tmp_path / "prepared").symlink_to(prepared_root() / "prepared")
    command = ["pretrain", "-m", *REAL, *corpus_settings(tmp_path, trained_corpus()), "seed=0,1"]
    done = memory3(*command)
    assert done.code == 0, done.err
    assert "2 of 2 finished." in done.out
    folders = [tmp_path / "g-seed-0", tmp_path / "g-seed-1"]
    assert [load_config(folder / "config.yaml").seed for folder in folders] == [0, 1]
    said = [(folder / "metrics.jsonl").read_text() for folder in folders]

    again = within(*command)
    assert again.code == 0, again.err
    assert again.out.count("finished: before") == 2
    assert [(folder / "metrics.jsonl").read_text() for folder in folders] == said

    other = within(*command, "warmup.steps=3", "seed=2,1")
    assert other.code == 2
    assert "g-seed-1 holds a run of another configuration:\n  warmup.steps: 2 -> 3\n" in other.err
    assert not (tmp_path / "g-seed-2").exists()
