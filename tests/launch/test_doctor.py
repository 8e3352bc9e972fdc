"""`memory3 doctor`: real processes, files and locks; what it says of machines that are not well."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from launch import doctor
from launch.doctor import State, file_system
from tests.support.launch import within


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_WRITTEN_BYTES", 2 << 20)
    monkeypatch.setattr(doctor, "_WANDB", ("127.0.0.1", 9))  # nothing listens there


def test_this_machine_can_train_and_nothing_is_left_behind(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    done = within("doctor", "--root", str(root), "--json")
    found = {finding["name"]: finding for finding in json.loads(done.out)}
    assert done.code == 0, found
    names = ["python", "packages", "faiss", "processor", "gloo", "disk", "rename", "locks", "memory", "wandb"]
    assert set(names) <= found.keys()
    assert "torch==2" in found["packages"]["says"]
    assert "deepspeed==0" in found["packages"]["says"]
    assert "2 processes on this host added 1 MiB" in found["gloo"]["says"]
    assert found["locks"]["says"] == "a lock keeps other processes out"
    assert "writes offline" in found["wandb"]["says"]
    assert {finding["state"] for finding in found.values()} <= {"ok", "note"}
    assert all(finding["remedy"] for finding in found.values() if finding["state"] != "ok")
    assert list(root.iterdir()) == []


def failing(monkeypatch: pytest.MonkeyPatch, root: Path, *checks: str) -> tuple[int, str]:
    """Run some checks alone, and return the exit code and what was printed."""
    for name in (
        "_python",
        "_packages",
        "_faiss",
        "_processor",
        "_gpus",
        "_collectives",
        "_folder",
        "_limits",
    ):
        if name not in checks:
            monkeypatch.setattr(doctor, name, lambda _: iter(()))
    done = within("doctor", "--root", str(root))
    return done.code, done.out


def test_versions_outside_the_projects_ranges_are_failures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    required = {"requires-python": ">=4", "dependencies": ["torch>=99", "numpy>=1", "not-there>=2"]}
    monkeypatch.setattr(doctor, "_project", lambda: required)
    code, out = failing(monkeypatch, tmp_path, "_python", "_packages")
    assert code == 1
    assert ">=4 is needed" in out
    assert "is outside >=99" in out
    assert "-> pip install 'torch>=99'" in out
    assert "not-there" in out
    assert "numpy" in out.split("ok    packages")[1]
    assert "this machine cannot train yet; look at: python, torch, not-there" in out


def test_a_folder_that_cannot_be_written_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    code, out = failing(monkeypatch, tmp_path / "file" / "runs", "_folder")
    assert code == 1
    assert "cannot be written" in " ".join(out.split())


def test_locks_that_keep_nobody_out_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.fcntl, "flock", lambda *_: None)  # as on a file system without locks
    finding = doctor._lock(tmp_path)
    assert (finding.state, finding.says) == (State.note, "a lock keeps nobody out")
    assert finding.remedy


def test_little_disk_is_worth_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, out = failing(monkeypatch, tmp_path, "_folder")
    assert code == 0
    assert "-> free some, or set paths.root" in out


def test_processes_that_cannot_meet_say_why() -> None:
    assert isinstance(doctor.all_reduce_seconds("no-such-backend", 1), str)


def test_wandb_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(doctor, "_WANDB", server.getsockname())
        monkeypatch.setenv("WANDB_API_KEY", "k")
        [finding] = doctor._wandb(Path())
    assert "a key is set" in finding.says


def test_the_file_system_is_that_of_the_deepest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nhost:/x {tmp_path} nfs4 rw 0 0\n")
    assert file_system(tmp_path / "runs", mounts) == "nfs4"
    assert file_system(Path("/etc"), mounts) == "ext4"
