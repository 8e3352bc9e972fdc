"""Checkpoints of a run, with an engine that has no model: publishing, damage, order, rotation."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.train import Canary, CountingEngine, state
from train import checkpoint
from train.checkpoint import Checkpoint, Checkpoints, Retention
from train.distributed import Ranks
from train.state import History

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


def save(run: Path, step: int, *, stage: str = "warmup", keep: bool = False, keep_last: int = 9) -> Path:
    engine = CountingEngine()
    engine.updates = step
    return checkpoints(run, keep_last=keep_last).save(
        engine, state(step, stage=stage), HISTORY, READ, keep=keep
    )


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
    with pytest.raises(ValueError, match=rf"{folder} is damaged: {file}"):
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
    assert checkpoints(tmp_path).last_of("warmup").state.step == 100
    assert checkpoints(tmp_path).last_of("warmup", at_most=99).state.step == 20


def test_a_stage_without_checkpoint_is_refused_with_the_remedy(tmp_path: Path) -> None:
    save(tmp_path, 20)
    with pytest.raises(ValueError, match=r"no continual checkpoint; run the continual stage first"):
        checkpoints(tmp_path).last_of("continual")
    with pytest.raises(ValueError, match=r"no warmup checkpoint from step 19 or before"):
        checkpoints(tmp_path).last_of("warmup", at_most=19)


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
