"""What is found before a run starts: no room, no right to write, a disk that is too slow (faults 2 and 22)."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import preflight
from launch.compose import compose_config
from launch.config import RunConfig
from memorybank.cost import memory_bytes
from model.flops import count_parameters


def config(*overrides: str) -> RunConfig:
    return compose_config(["experiment=demo", *overrides])


def test_room_is_that_of_kept_checkpoints_and_of_all_generations() -> None:
    demo = config("saving.keep_last=3", "saving.keep_best=0", "saving.every_steps=10", "codec.kind=int8")
    room = preflight.needed(demo, num_references=1000)
    assert room.checkpoint == count_parameters(demo.model).total * 16
    assert room.checkpoints == 1 + 2 * (3 + 2)
    assert room.memories > 2 * 1000 * memory_bytes(demo.model, "int8")
    assert preflight.needed(demo, num_references=10).memories < room.memories
    assert preflight.needed(config("continual.memory=null"), 1000).memories == 0
    few = config(
        "saving.keep_last=99", "saving.every_steps=200"
    )  # two, and two in the stage's own places; one
    assert preflight.needed(few, 1000).checkpoints == 1 + 4 + 3


def test_a_disk_without_room_is_refused_with_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    (tmp_path / "standing").write_bytes(bytes(1000))
    with pytest.raises(
        ValueError, match=r"room for 2.0 MB and holds 1.0 kB.*needs up to .* checkpoints of .* MB"
    ):
        preflight.check(config(), tmp_path, num_references=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    preflight.check(config(), tmp_path, num_references=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["standing"]


@pytest.mark.parametrize("folder", ["/proc/memory3/run", "{tmp}/file/run"])
def test_a_folder_that_cannot_be_written_is_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = Path(folder.format(tmp=tmp_path))
    with pytest.raises(ValueError, match=rf"{path} cannot be written: .*; set paths.root"):
        preflight.check(config(), path, num_references=1)


def test_an_index_of_more_references_than_there_are_is_refused(tmp_path: Path) -> None:
    coded = config("retrieval.index.kind=ivf_pq")
    with pytest.raises(
        ValueError, match=r"retrieval\.index\.kind=ivf_pq needs at least 10,240 .* are 10,239: set"
    ):
        preflight.check(coded, tmp_path, num_references=10_239)
    preflight.check(coded, tmp_path, num_references=10_240)
    preflight.check(
        config("retrieval.index.kind=ivf_pq", "continual.memory=null"), tmp_path, num_references=1
    )


def test_a_slow_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "write_rate", lambda folder: 1e6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    with caplog.at_level(logging.WARNING):
        preflight.check(config(), tmp_path, num_references=1)
    assert "takes 1.0 MB a second" in caplog.text
    assert "a signal leaves 30 s" in caplog.text
