"""Checkpoints of a run, with an engine that has no model: publishing, damage, order, rotation."""

import errno
import logging
import os
import shutil
import time
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data import files
from tests.support.spawn import HANG_SECONDS
from tests.support.train import Canary, CountingEngine, state
from train import checkpoint
from train.checkpoint import Checkpoint, Checkpoints, Retention, entries, newest_of, reasons_to_keep
from train.distributed import Ranks
from train.engine import Snapshot
from train.history import History

ALONE = Ranks(0, 1, torch.device("cpu"))
INPUTS = {"shards": "s0", "references": "r0", "tokenizer": "t0"}
HISTORY = History(np.arange(11) % 2 == 0, np.arange(11).astype(np.uint16))
READ = np.arange(11) < 7


def checkpoints(
    run: Path, *, keep_last: int = 2, retention: Retention | None = None, **inputs: str
) -> Checkpoints:
    return Checkpoints(
        run, inputs=INPUTS | inputs, retention=retention or Retention(last=keep_last), ranks=ALONE
    )


def save(
    run: Path,
    step: int,
    *,
    stage: str = "warmup",
    keep: bool = False,
    keep_last: int = 99,
    retention: Retention | None = None,
    validation: float | None = None,
) -> Path:
    engine = CountingEngine()
    engine.updates = step
    saving = checkpoints(run, keep_last=keep_last, retention=retention)
    saving.save(engine, state(step, stage=stage, validation=validation), HISTORY, READ, keep=keep)
    (saved,) = saving.saved()
    return saved.folder


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def newest(run: Path) -> Checkpoint:
    found = checkpoints(run).newest()
    assert found is not None
    return found


def test_what_was_saved_is_what_is_opened(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    assert folder == tmp_path / "checkpoints" / "warmup-00000005"
    opened = newest(tmp_path)
    assert opened.folder == folder
    assert opened.state == state(5)
    np.testing.assert_array_equal(opened.history.finished, HISTORY.finished)
    np.testing.assert_array_equal(opened.history.drawn, HISTORY.drawn)
    np.testing.assert_array_equal(opened.read, READ)
    assert opened.weights() == {"updates": torch.tensor([5])}
    engine = CountingEngine()
    engine.load(folder)
    assert engine.updates == 5


def test_a_run_that_never_published_has_none(tmp_path: Path) -> None:
    assert checkpoints(tmp_path).newest() is None
    (tmp_path / "checkpoints" / "warmup-00000005.partial").mkdir(parents=True)
    assert checkpoints(tmp_path).newest() is None


def test_a_partial_folder_is_ignored_and_does_not_stop_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    folder.rename(folder.with_name(folder.name + ".partial"))
    assert newest(tmp_path).state.step == 5
    save(tmp_path, 10)
    assert newest(tmp_path).state.step == 10
    assert names(tmp_path) == ["warmup-00000005", "warmup-00000010"]


def test_nothing_of_a_killed_save_gets_into_the_next_one(tmp_path: Path) -> None:
    """Libraries have names of their own for files that they have not finished."""
    folder = save(tmp_path, 5)
    (folder / "engine" / ".tmpO98MOh").write_bytes(b"half")
    folder.rename(folder.with_name(folder.name + ".partial"))
    save(tmp_path, 5)
    assert sorted(path.name for path in (folder / "engine").iterdir()) == ["state.pt"]


def test_a_folder_without_manifest_does_not_exist(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "manifest.json").unlink()
    assert newest(tmp_path).state.step == 5


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "state.json", "finished.npy", "drawn.npy", "read.npy", "engine/state.pt"],
)
def test_a_damaged_file_is_found_by_name_and_the_checkpoint_before_it_serves(
    file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    damage(folder / file)
    with pytest.raises(ValueError, match=rf"{folder} is damaged: {file}; restore it from a copy"):
        checkpoints(tmp_path).open(folder)
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path).state.step == 5
    assert file in caplog.text
    assert "falling back" in caplog.text


@pytest.mark.parametrize("content", ["", "{}", '{"kind": '])
def test_a_damaged_manifest_is_passed_over(content: str, tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "manifest.json").write_text(content)
    assert newest(tmp_path).state.step == 5


def test_a_missing_file_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "model.safetensors").unlink()
    assert newest(tmp_path).state.step == 5


def test_only_damaged_checkpoints_stop_the_run(tmp_path: Path) -> None:
    for step in (5, 10):
        damage(save(tmp_path, step) / "state.json")
    with pytest.raises(ValueError, match=r"all 2 checkpoints in .* are damaged.*set run=NAME"):
        checkpoints(tmp_path).newest()


def test_order_is_by_stage_and_step_never_by_time(tmp_path: Path) -> None:
    save(tmp_path, 3, stage="continual")
    save(tmp_path, 100)
    save(tmp_path, 20)
    assert newest(tmp_path).folder.name == "continual-00000003"
    assert newest_of(tmp_path, "warmup") == tmp_path / "checkpoints/warmup-00000100"


def test_a_stage_without_the_checkpoint_is_refused_with_the_remedy(tmp_path: Path) -> None:
    save(tmp_path, 20)
    with pytest.raises(
        ValueError, match=r"no continual checkpoint of step 20; finish the continual stage first"
    ):
        checkpoints(tmp_path).of("continual", 20)
    with pytest.raises(ValueError, match=r"no warmup checkpoint of step 30; "):
        checkpoints(tmp_path).of("warmup", 30)
    assert checkpoints(tmp_path).of("warmup", 20).state.step == 20


def test_rotation_keeps_the_newest_and_the_branch_points_of_each_stage(tmp_path: Path) -> None:
    save(tmp_path, 2, stage="warmup", keep=True)
    for step in range(3, 9):
        save(tmp_path, step, keep_last=2)
    save(tmp_path, 1, stage="continual", keep_last=2)
    assert names(tmp_path) == ["continual-00000001", *(f"warmup-{step:08d}" for step in (2, 7, 8))]


def test_rotation_gets_over_a_damaged_checkpoint_and_a_kill(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "manifest.json").write_text("{}")
    save(tmp_path, 0).rename(
        tmp_path / "checkpoints" / "warmup-00000000.deleted"
    )  # killed before deleting it
    for step in range(2, 5):
        save(tmp_path, step, keep_last=1)
    assert names(tmp_path) == ["warmup-00000001", "warmup-00000004"]


def test_a_resumed_run_publishes_over_the_checkpoint_it_fell_back_from(tmp_path: Path) -> None:
    save(tmp_path, 5)
    damage(save(tmp_path, 10) / "state.json")
    assert newest(tmp_path).state.step == 5
    save(tmp_path, 10)
    assert newest(tmp_path).state.step == 10


def test_another_tokenizer_or_corpus_is_refused_by_name_and_not_taken_for_damage(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    for name, value in (("tokenizer", "t1"), ("shards", "s1"), ("references", "r1")):
        with pytest.raises(ValueError, match=rf"made from {name} {INPUTS[name]}, but {name} is now {value}"):
            checkpoints(tmp_path, **{name: value}).newest()


@pytest.mark.parametrize("name", ["finished", "drawn", "read"])
def test_a_pickle_in_place_of_an_array_is_never_executed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, 5)
    canary = tmp_path / "canary"
    np.save(folder / f"{name}.npy", np.array([Canary(canary)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=f"{name}.npy"):
        checkpoints(tmp_path).open(folder)  # the hash says so first
    monkeypatch.setattr(checkpoint, "damage", lambda folder: None)
    monkeypatch.setattr(
        checkpoint, "open_manifest", lambda *args, **kwargs: SimpleNamespace(settings={"keep": False})
    )
    with pytest.raises(ValueError, match="allow_pickle"):
        checkpoints(tmp_path).open(folder)
    assert not canary.exists()
    np.load(folder / f"{name}.npy", allow_pickle=True)
    assert canary.exists()  # it does sing


def test_retention_keeps_every_nth_and_the_best(tmp_path: Path) -> None:
    losses = {3: 2.5, 6: 2.0, 9: 2.2, 12: float("nan")}
    for step in range(1, 15):
        save(tmp_path, step, validation=losses.get(step))
    rules = Retention(last=2, every=5, best=1)
    reasons = reasons_to_keep(entries(tmp_path), rules)
    kept = {folder.name: why for folder, why in reasons.items() if why}
    assert kept == {
        "warmup-00000005": ["every 5"],
        "warmup-00000006": ["best"],
        "warmup-00000010": ["every 5"],
        "warmup-00000013": ["last 2"],
        "warmup-00000014": ["last 2"],
    }
    save(tmp_path, 15, retention=rules, validation=1.9)
    assert names(tmp_path) == [f"warmup-{step:08d}" for step in (5, 10, 14, 15)]  # 15 is the best now


def test_damaged_checkpoints_do_not_count_as_the_last_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints/warmup-00000003/state.json").unlink()
    reasons = reasons_to_keep(entries(tmp_path), Retention(last=1, best=0))
    assert [why for why in reasons.values()] == [[], ["last 1"], ["damaged"]]


def reader(run: Path) -> Checkpoints:
    return Checkpoints(run, inputs=INPUTS)


@pytest.mark.parametrize("opens", ["the newest", "by its folder"])
def test_a_checkpoint_that_is_read_is_not_deleted(tmp_path: Path, opens: str) -> None:
    folder = save(tmp_path, 1)
    assert reader(tmp_path).newest() if opens == "the newest" else reader(tmp_path).open(folder)
    save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == ["warmup-00000001", "warmup-00000002"]


def test_a_reader_whose_checkpoint_goes_before_it_is_read_opens_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    held: list[Path] = []

    def hold(folder: Path) -> int:
        held.append(folder)
        if len(held) == 1:
            save(tmp_path, 2, keep_last=1)
        descriptor = files.hold(folder)
        if len(held) == 2:
            shutil.rmtree(folder)
            save(tmp_path, 3, keep_last=1)
        return descriptor

    monkeypatch.setattr(checkpoint, "hold", hold)
    with caplog.at_level(logging.WARNING):
        found = reader(tmp_path).newest()
    assert found is not None
    assert found.state.step == 3
    assert [path.name for path in held] == [f"warmup-{step:08d}" for step in (1, 2, 3)]
    assert not caplog.records


def test_what_is_rotated_away_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    opened = checkpoint.open_manifest

    def open_manifest(folder: Path, **expected: Any) -> files.Manifest:
        if folder == first and folder.exists():
            checkpoint.delete(folder)
        return opened(folder, **expected)

    monkeypatch.setattr(checkpoint, "open_manifest", open_manifest)
    assert [entry.folder for entry in entries(tmp_path)] == [second]
    with pytest.raises(checkpoint.GoneError, match=rf"{first} is gone: its run, which trains"):
        checkpoint.damage(first)


def test_a_lost_manifest_is_damage_and_no_reason_to_begin_anew(tmp_path: Path) -> None:
    """Faults 3 and 4: nothing but the folders' own manifests says what there is."""
    (save(tmp_path, 5) / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"all 1 checkpoints in .* are damaged"):
        checkpoints(tmp_path).newest()


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    folder.rename(folder.with_name("warmup-00000099"))
    assert newest(tmp_path).state.step == 5
    with pytest.raises(ValueError, match="is not what its name says: it is of warmup, step 10"):
        checkpoints(tmp_path).open(folder.with_name("warmup-00000099"))


def test_a_kill_at_any_point_of_a_save_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults 1 and 5: what the disk holds before every operation of a save, and of one that replaces, is resumed."""
    run = tmp_path / "run"
    moments: list[Path] = []

    def watch(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def watched(*arguments: Any, **settings: Any) -> Any:
            moments.append(Path(shutil.copytree(run, tmp_path / f"moment-{len(moments):03d}")))
            return plain(*arguments, **settings)

        monkeypatch.setattr(owner, name, watched)

    save(run, 5)
    monkeypatch.setattr(files, "_num_threads", lambda: 1)
    for owner, operations in (
        (os, ("fsync",)),
        (Path, ("rename", "replace", "unlink", "write_text")),
        (np, ("save",)),
        (torch, ("save",)),
        (checkpoint, ("save_file",)),
        (checkpoint.shutil, ("rmtree",)),
    ):
        for name in operations:
            watch(owner, name)
    save(run, 10, keep_last=1)
    save(run, 10, keep_last=1)
    monkeypatch.undo()
    assert len(moments) >= 50
    steps = []
    for number, moment in enumerate(moments):
        steps.append(newest(moment).state.step)
        if number % 6 == 0:
            save(moment, 10, keep_last=1)
            assert names(moment) == ["warmup-00000010"]
    assert steps == sorted(steps)
    assert set(steps) == {5, 10}


@pytest.mark.parametrize(
    "problem", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "ro")]
)
def test_a_disk_that_is_full_in_a_save_leaves_the_checkpoint_before_it(
    problem: OSError, tmp_path: Path
) -> None:
    """Fault 2."""

    class Full(CountingEngine):
        def snapshot(self, *, copy: bool) -> Snapshot:
            return Snapshot({}, fail)

    def fail(folder: Path) -> None:
        raise problem

    save(tmp_path, 5)
    with pytest.raises(
        ValueError, match=r"warmup-00000010 could not be written: .*bytes are free there.*make room"
    ):
        checkpoints(tmp_path).save(Full(), state(10), HISTORY, READ, keep=False)
    assert newest(tmp_path).state.step == 5
    save(tmp_path, 10)
    assert newest(tmp_path).state.step == 10


def test_another_error_in_a_save_stays_what_it_is(tmp_path: Path) -> None:
    class Broken(CountingEngine):
        def snapshot(self, *, copy: bool) -> Snapshot:
            raise RuntimeError("lost a peer")

    with pytest.raises(RuntimeError, match="lost a peer"):
        checkpoints(tmp_path).save(Broken(), state(10), HISTORY, READ, keep=False)


def test_one_rank_reads_all_bytes_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Second(Ranks):
        def broadcast(self, value: Any) -> Any:
            return folder, None

    folder = save(tmp_path, 5)
    monkeypatch.setattr(checkpoint, "verify", lambda folder: pytest.fail("read by another rank"))
    second = Checkpoints(tmp_path, inputs=INPUTS, ranks=Second(1, 2, torch.device("cpu")))
    found = second.newest()
    assert found is not None
    assert found.folder == folder


def test_going_back_finds_the_newest_before_and_withdraws_what_follows(tmp_path: Path) -> None:
    save(tmp_path, 3, stage="continual")
    for step in (4, 8, 12, 16):
        save(tmp_path, step)
    damage(tmp_path / "checkpoints/warmup-00000008/state.json")
    found = checkpoints(tmp_path).before("warmup", 11)
    assert found is not None
    assert found.state.step == 4
    assert checkpoints(tmp_path).before("warmup", 3) is None
    checkpoints(tmp_path).withdraw_after(found.state)
    assert names(tmp_path) == ["continual-00000003", "warmup-00000004"]


def test_a_checkpoint_says_where_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: x\n")
    (tmp_path / "wandb-id").write_text("abc")
    written = Checkpoints(tmp_path, inputs=INPUTS, ranks=ALONE, origin={"torch": "2.0"})
    written.save(CountingEngine(), state(1), HISTORY, READ, keep=False)
    (saved,) = written.saved()
    assert (saved.folder / "config.yaml").read_text() == "run: x\n"
    assert newest(tmp_path).origin() == {"torch": "2.0", "wandb": "abc"}


def test_a_stage_never_starts_from_a_damaged_checkpoint_or_from_another_corpus(tmp_path: Path) -> None:
    """Fault 27: nothing older is taken in its place."""
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    with pytest.raises(ValueError, match="made from shards s0"):
        checkpoints(tmp_path, shards="s1").of("warmup", 10)
    damage(folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{folder} is damaged: model.safetensors"):
        checkpoints(tmp_path).of("warmup", 10)


class Gate:
    """Lets a snapshot be written when the test says so."""

    def __init__(self, step: int, *, problem: Exception | None = None) -> None:
        self.open = Event()
        self.engine = CountingEngine()
        self.engine.updates = step
        plain = self.engine.snapshot

        def snapshot(*, copy: bool) -> Snapshot:
            assert copy
            taken = plain(copy=copy)

            def write(folder: Path) -> None:
                assert self.open.wait(HANG_SECONDS)
                if problem is not None:
                    raise problem
                taken.write(folder)

            return Snapshot(taken.weights, write)

        self.engine.snapshot = snapshot  # type: ignore[method-assign]


def aside(run: Path) -> Checkpoints:
    return Checkpoints(run, inputs=INPUTS, ranks=ALONE, aside=ALONE.aside())


def test_an_asynchronous_save_publishes_what_was_there_when_it_began(tmp_path: Path) -> None:
    gate, saving = Gate(5), aside(tmp_path)
    saving.save(gate.engine, state(5), HISTORY, READ, keep=False)
    gate.engine.updates = 99  # training goes on
    assert saving.saved() == []
    assert checkpoints(tmp_path).newest() is None
    gate.open.set()
    saving.finish()
    (saved,) = saving.saved()
    assert saved.state == state(5)
    assert saved.seconds > saved.seconds_stalled
    assert newest(tmp_path).weights() == {"updates": torch.tensor([5])}
    assert saving.saved() == []


def test_one_checkpoint_is_written_at_a_time_and_in_order(tmp_path: Path) -> None:
    first, second, saving = Gate(5), Gate(10), aside(tmp_path)
    saving.save(first.engine, state(5), HISTORY, READ, keep=False)
    Timer(0.2, first.open.set).start()
    saving.save(second.engine, state(10), HISTORY, READ, keep=False)  # waits for the first
    assert names(tmp_path)[0] == "warmup-00000005"
    assert newest(tmp_path).state.step == 5
    second.open.set()
    saving.finish()
    assert [saved.state.step for saved in saving.saved()] == [5, 10]


@pytest.mark.parametrize("asked", ["the next save", "the next step", "the end"])
def test_a_failed_asynchronous_save_fails_the_run_at_the_next_safe_point(asked: str, tmp_path: Path) -> None:
    save(tmp_path, 5)
    gate, saving = Gate(10, problem=OSError(errno.ENOSPC, "No space left on device")), aside(tmp_path)
    saving.save(gate.engine, state(10), HISTORY, READ, keep=False)
    gate.open.set()

    def go_on() -> None:
        match asked:
            case "the next save":
                saving.save(CountingEngine(), state(15), HISTORY, READ, keep=False)
            case "the end":
                saving.finish()
            case _:
                while not saving.saved():
                    time.sleep(0.01)

    with pytest.raises(ValueError, match=r"warmup-00000010 could not be written: .*make room"):
        go_on()
    assert newest(tmp_path).state.step == 5
