"""What is found before a run starts: no room, no right to write, a disk that is too slow (faults 2 and 22)."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.filesize import decimal

from launch import preflight, pretrain
from launch.compose import compose_config
from launch.config import RunConfig
from memorybank.config import IndexConfig, IndexKind
from tests.support.launch import prepared_root, run_settings, within


def config() -> RunConfig:
    """Of a prepared corpus, filled in as before training."""
    found = compose_config(run_settings(prepared_root(), "unbegun"))
    pretrain.fill_in(found)
    return found


def folder_of(config: RunConfig) -> Path:
    return Path(config.paths.root) / config.run


def test_a_disk_without_room_is_refused_with_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `memory3 plan` says is what is asked for."""
    found = json.loads(within("plan", *run_settings(prepared_root(), "unbegun"), "--json").out)
    wanted, held = found["disk"]["written"], found["site"]["held"]
    assert 0 < held < wanted  # the search vectors
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=wanted - held - 1))
    checkpoints = found["disk"]["checkpoints"] + 1
    with pytest.raises(
        ValueError, match=rf"up to {decimal(wanted)}: {checkpoints} checkpoints of .* make room"
    ):
        preflight.check(config(), folder_of(config()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=wanted - held))
    preflight.check(config(), folder_of(config()))
    assert list(folder_of(config()).iterdir()) == []


@pytest.mark.parametrize("folder", ["/proc/memory3/run", "{tmp}/file/run"])
def test_a_folder_that_cannot_be_written_is_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = Path(folder.format(tmp=tmp_path))
    with pytest.raises(ValueError, match=rf"{path} cannot be written: .*; set paths.root"):
        preflight.check(config(), path)


def test_an_index_of_more_references_than_there_are_is_refused() -> None:
    coded = replace(config(), retrieval=replace(config().retrieval, index=IndexConfig(kind=IndexKind.ivf_pq)))
    with pytest.raises(ValueError, match=r"retrieval\.index\.kind=ivf_pq needs at least 10,240 .*: set"):
        preflight.check(coded, folder_of(coded))
    preflight.check(replace(coded, continual=None), folder_of(coded))


def test_a_slow_disk_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(preflight, "write_rate", lambda folder: 1e3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    with caplog.at_level(logging.WARNING):
        preflight.check(config(), folder_of(config()))
    assert "takes 1.0 kB a second" in caplog.text
    assert "a signal leaves 30 s" in caplog.text
