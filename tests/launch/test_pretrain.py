"""Run folders: resumed, finished, in use, of another configuration; and what a failing rank says."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from threading import Barrier, Thread
from time import sleep

import pytest

from benchmarks.documentation import corpus_settings, topics
from launch import launchers, preflight, pretrain
from launch.compose import compose_config, save_config
from launch.config import RunConfig
from launch.lock import one_of_ranks, only_user
from tests.support.launch import Finished, memory3, run_settings, trained, within


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of everything that `trained()` made."""
    return Path(shutil.copytree(trained().root, tmp_path / "runs"))


def again(root: Path, *changes: str) -> Finished:
    """Train run `m` once more, inside this process: for what is refused before ranks start."""
    return within("pretrain", "--no-prepare", *run_settings(root, "m"), *changes)


def test_resumed_run_ends_with_the_same_bytes_and_then_has_nothing_to_do(root: Path) -> None:
    run = root / "m"
    for path in (run / "checkpoints/continual-00000004", run / "bank/generation-continual-0001"):
        shutil.rmtree(path)
    harmless = ["saving.keep_last=3", "evaluation.text_rows=2", "engine.threads_per_rank=1", "resume=auto"]
    resumed = memory3("pretrain", "--no-prepare", *run_settings(root, "m"), *harmless)
    assert resumed.code == 0, resumed.err
    assert f"resuming from {run}/checkpoints/continual-00000002" in resumed.err
    for file in ("model.safetensors", "state.json", "read.npy"):
        mine, theirs = (
            (folder / "checkpoints/continual-00000004" / file).read_bytes()
            for folder in (run, trained().main)
        )
        assert mine == theirs, file
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in lines if "loss" in line]
    assert steps == [(stage, step) for stage in ("warmup", "continual") for step in (1, 2, 3, 4)]

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    finished = memory3("pretrain", "--no-prepare", *run_settings(root, "m"), *harmless)
    assert finished.code == 0, finished.err
    assert (
        f"{run} is finished, its last checkpoint is continual-00000004: nothing is left to train"
        in finished.err
    )
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


def test_mistake_that_only_the_ranks_see_is_one_line(root: Path) -> None:
    for path in (root / "m/checkpoints").rglob("model.safetensors"):
        path.write_bytes(b"broken")
    done = memory3("pretrain", "--no-prepare", *run_settings(root, "m"))
    assert done.code == 2
    assert "Traceback" not in done.err
    own = [line for line in done.err.splitlines() if line.startswith("memory3 pretrain: ")]
    assert len(own) == 1
    assert "checkpoints are damaged (see the warnings above); restore one from a copy" in own[0]
    assert done.err.splitlines()[-1] == own[0]
    assert "falling back" in done.err


def test_used_folder_is_refused_while_its_launcher_or_a_rank_lives(root: Path) -> None:
    with only_user(root / "m"):
        done = again(root)
    assert done.code == 2
    assert done.err.startswith(f"memory3 pretrain: {root}/m is in use by a run that pid ")
    assert done.err.endswith(" started; wait for it, or set run=NAME\n")
    with one_of_ranks(root / "m"), one_of_ranks(root / "m"):
        done = again(root)
    assert done.code == 2
    assert "is in use" in done.err
    with only_user(root / "m"):
        pass


def test_ranks_whose_launcher_was_killed_are_told_and_how_to_end_them(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as launcher:
        pass
    (tmp_path / "lock").write_text(f"pid {launcher.pid} on {os.uname().nodename}\n")
    with (
        one_of_ranks(tmp_path),
        pytest.raises(ValueError, match="started, which is gone") as refused,
        only_user(tmp_path),
    ):
        pass
    assert f"`pkill -f 'launch.(agent|worker) {tmp_path}'` ends it, with a checkpoint" in str(refused.value)
    (tmp_path / "lock").write_text(f"pid {launcher.pid} on elsewhere\n")
    with (
        one_of_ranks(tmp_path),
        pytest.raises(ValueError, match="on elsewhere started; wait"),
        only_user(tmp_path),
    ):
        pass


def test_of_two_jobs_launched_in_the_same_second_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 7: without a name both mean the same folder, and one of them has it."""
    both, said = Barrier(2), []

    def trains(config: RunConfig, folder: Path) -> int:
        sleep(0.5)
        return 0

    monkeypatch.setattr(preflight, "write_rate", lambda folder: folder.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(pretrain, "make_ready", lambda *_: None)
    monkeypatch.setattr(launchers, "run_agents", trains)
    config = compose_config(["experiment=quick", "data=jsonl", "data.path=x", f"paths.root={tmp_path}"])

    def launch() -> None:
        both.wait()
        try:
            said.append(str(pretrain.pretrain(config)))
        except ValueError as problem:
            said.append(str(problem))

    jobs = [Thread(target=launch) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    said.remove("0")  # it trained
    (refused,) = said
    assert refused.startswith(
        f"{tmp_path / config.run} is in use by a run"
    )  # whose number it may not have written yet
    assert refused.endswith("wait for it, or set run=NAME")


def test_rank_may_join_while_the_launcher_holds_the_folder(tmp_path: Path) -> None:
    with only_user(tmp_path), one_of_ranks(tmp_path), one_of_ranks(tmp_path):
        pass


def test_changed_configuration_is_refused_with_the_difference(root: Path) -> None:
    done = again(root, "warmup.peak_lr=0.5", "seed=7", "saving.keep_last=9")
    assert done.code == 2
    assert done.err == (
        f"memory3 pretrain: {root}/m holds a run of another configuration:\n"
        "  seed: 0 -> 7\n"
        "  warmup.peak_lr: 0.002 -> 0.5\n"
        "set run=NAME to a new folder, or give these keys their old values to resume\n"
    )


def test_resume_never_refuses_a_used_folder(root: Path) -> None:
    done = again(root, "resume=never")
    assert done.code == 2
    assert done.err == (
        f"memory3 pretrain: {root}/m was used before and resume=never; set run=NAME to a new one, or resume=auto\n"
    )


def test_corpus_that_is_not_prepared_is_named_with_the_command(tmp_path: Path) -> None:
    done = within(
        "pretrain", "--no-prepare", *corpus_settings(tmp_path / "runs", topics(tmp_path / "topics.jsonl"))
    )
    assert done.code == 2
    assert done.err.startswith(f"memory3 pretrain: {tmp_path}/runs/prepared/jsonl/corpus is not prepared; ")
    assert "run `memory3 prepare` with all settings of the run" in done.err


def test_corpus_prepared_with_other_settings_is_refused(root: Path) -> None:
    done = again(root, "run=new", "data.vocab_size=700")
    assert done.code == 2
    assert "tokenizer was prepared with other settings; run `memory3 prepare` with all" in done.err


def control(root: Path, *changes: str) -> Finished:
    """Train a control inside this process, where no corpus is prepared, beside runs that there are by name only."""
    stages = ["warmup=null", "continual.memory=null", "continual.branch_from=m"]
    settings = ["experiment=quick", "data=jsonl", "data.path=x", f"paths.root={root}", "run=c2", *stages]
    save_config(compose_config([*settings[:-3], "run=m"]), root / "m/config.yaml")
    save_config(compose_config([*settings, "run=c"]), root / "c/config.yaml")
    save_config(
        compose_config([*settings[:-3], "run=begun", "warmup.decay_steps=8"]), root / "begun/config.yaml"
    )
    save_config(compose_config([*settings[:-3], "run=training"]), root / "training/config.yaml")
    unfinished, decayed = "begun/checkpoints/warmup-00000392.partial", "begun/checkpoints/warmup-00000400"
    for checkpoint in (
        "m/checkpoints/warmup-00000400",
        "training/checkpoints/warmup-00000300",
        unfinished,
        decayed,
    ):
        (root / checkpoint).mkdir(parents=True, exist_ok=True)
    return within("pretrain", "--no-prepare", *settings, *changes)


@pytest.mark.parametrize(
    ("branch_from", "said"),
    [
        ("nowhere", "nowhere is not a run folder; name a run that was warmed up"),
        ("mm", "mm is not a run folder; did you mean continual.branch_from=m?"),
        ("c", "c has no warmup stage; name the run that has"),
        (
            "begun",
            "begun has no warmup checkpoint of step 392, where its decay begins (its newest is warmup-00000400); ",
        ),
        (
            "training",
            "training has no warmup checkpoint of step 400, its last one (its newest is warmup-00000300); finish that",
        ),
    ],
)
def test_control_of_a_run_that_was_not_warmed_up_is_refused_before_ranks_start(
    tmp_path: Path, branch_from: str, said: str
) -> None:
    done = control(tmp_path, f"continual.branch_from={branch_from}")
    assert done.code == 2
    assert done.err.startswith(f"memory3 pretrain: continual.branch_from={branch_from}: {tmp_path}/{said}")
    assert done.err.count("\n") == 1
    assert not list(tmp_path.glob("c2/*.yaml"))


def test_control_of_a_run_of_another_size_is_refused_before_ranks_start(tmp_path: Path) -> None:
    done = control(tmp_path, "model.width=512")
    assert done.code == 2
    assert done.err == (
        f"memory3 pretrain: model.width=512, but continual.branch_from=m, and {tmp_path}/m was trained with 256; set "
        "model.width=256, or name a run of the same size\n"
    )


def test_a_control_that_has_branched_needs_the_other_run_no_more(tmp_path: Path) -> None:
    refused = f"{tmp_path}/prepared/jsonl/corpus is not prepared"
    assert refused in control(tmp_path).err
    half_written = tmp_path / "c2/checkpoints/continual-00000002.partial"
    half_written.mkdir(parents=True)
    assert "nowhere is not a run" in control(tmp_path, "continual.branch_from=nowhere").err
    half_written.rename(half_written.with_suffix(""))
    assert refused in control(tmp_path, "continual.branch_from=nowhere").err
