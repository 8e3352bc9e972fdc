"""`memory3 doctor`: real processes, files and locks; what it says of machines that are not well."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import doctor
from launch.doctor import State, file_system
from tests.support.launch import within
from tests.support.wandb_server import NOBODY, ask_only, server


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_WRITTEN_BYTES", 2 << 20)
    ask_only(NOBODY, tmp_path, monkeypatch)


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
    assert found["locks"]["says"] == "on this host a lock keeps other processes out"
    assert found["rename"]["says"].startswith("on this host ")
    assert found["wandb"]["says"] == (
        f"{NOBODY} does not answer (Connection refused): logging.wandb=true writes offline"
    )
    assert found["wandb"]["remedy"].startswith("`wandb sync ")
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
    assert (finding.state, finding.says) == (State.note, "on this host a lock keeps nobody out")
    assert finding.remedy


def test_little_disk_is_worth_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, out = failing(monkeypatch, tmp_path, "_folder")
    assert code == 0
    assert "-> free some, or set paths.root" in out


def test_processes_that_cannot_meet_say_why() -> None:
    assert isinstance(doctor.all_reduce_seconds("no-such-backend", 1), str)


def wandb() -> doctor.Finding:
    [finding] = doctor._wandb(Path())
    return finding


def test_a_wandb_server_that_answers_with_a_key_and_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with server() as own:
        ask_only(own.url, tmp_path, monkeypatch)
        unknown = wandb()
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        known = wandb()
    assert (known.says, known.remedy) == (f"{own.url} answers, a key for it is set", None)
    assert unknown.says.startswith(f"{own.url} answers, no key for it is set")
    assert unknown.says.endswith(": logging.wandb=true writes offline")
    assert unknown.remedy == "`wandb login`, or WANDB_API_KEY, brings runs up while they train"


def test_a_wandb_server_behind_a_proxy_is_asked_through_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ask_only("http://wandb.invalid", tmp_path, monkeypatch)
    with server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert wandb().says.startswith("http://wandb.invalid answers, no key for it is set")
        assert proxy.asked == ["http://wandb.invalid"]


def test_a_wandb_server_that_is_silent_or_ill_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "_WANDB_SECONDS", 0.2)
    with server() as own:
        ask_only(own.url, tmp_path, monkeypatch)
        own.code = 503
        assert "does not answer (503 Service Unavailable)" in wandb().says
        own.fall_silent()
        assert "does not answer (timed out)" in wandb().says


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("WANDB_BASE_URL", "my-server", "should be a valid URL"),
        ("WANDB_API_KEY", "short", "must have 40+ characters"),
    ],
)
def test_what_wandb_itself_refuses_is_a_note(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    finding = wandb()
    assert finding.state == State.note
    assert said in finding.says
    assert finding.remedy == "mend what it names; `wandb status` shows its settings"


@pytest.mark.parametrize(
    ("installed", "state", "said"),
    [
        ({}, State.fail, "no variant is installed"),
        ({"faiss-cpu": "1.9", "faiss-gpu": "1.8"}, State.note, "several are installed: faiss-cpu, faiss-gpu"),
    ],
)
def test_faiss_is_wanted_in_one_variant(
    installed: dict[str, str], state: State, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [SimpleNamespace(name=name, version=version) for name, version in installed.items()]
    monkeypatch.setattr(doctor.metadata, "distributions", lambda: iter(found))
    [finding] = doctor._faiss(Path())
    assert (finding.state, finding.says) == (state, said)
    assert finding.remedy == "pip install faiss-cpu (or faiss-gpu), one of them alone"


def test_faiss_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor.metadata, "distributions", lambda: iter([SimpleNamespace(name="faiss-gpu", version="1.8")])
    )
    monkeypatch.setitem(sys.modules, "memorybank.index", None)
    [finding] = doctor._faiss(Path())
    assert finding.state == State.fail
    assert finding.says.startswith("faiss-gpu 1.8 cannot be loaded: ")


@pytest.mark.parametrize(
    ("flags", "state", "said"),
    [("avx512f avx512_bf16", State.ok, "avx512_bf16"), ("avx2", State.note, "no bfloat16 instructions")],
)
def test_processors_without_bfloat16_are_better_off_with_float32(
    flags: str, state: State, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: f"{path} flags: {flags}")
    [finding] = doctor._processor(Path())
    assert finding.state == state
    assert finding.says.endswith(f"cores, {said}")
    assert ("engine.precision=fp32" in (finding.remedy or "")) == (state == State.note)


def test_gpus_are_told_with_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [70 << 30, 8 << 30]
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda number: SimpleNamespace(name=f"H{number}"),
        mem_get_info=lambda number: (free[number], 75 << 30),
    )
    monkeypatch.setitem(
        sys.modules, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="12.8"))
    )
    empty, held = doctor._gpus(Path())
    assert (empty.name, empty.state, held.name, held.state) == ("gpu 0", State.ok, "gpu 1", State.note)
    assert held.says == "H1, 75.0 GiB, 8.00 GiB free, CUDA 12.8"
    assert held.remedy == "nvidia-smi names the processes that hold it"


@pytest.mark.parametrize("has_driver", [False, True])
def test_a_driver_without_a_gpu_of_torch_is_worth_a_note(
    has_driver: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, __version__="2.0"))
    monkeypatch.setattr(Path, "exists", lambda _: has_driver)
    [finding] = doctor._gpus(Path())
    assert finding.state == (State.note if has_driver else State.ok)
    assert ("CUDA build" in (finding.remedy or "")) == has_driver


def test_torch_that_cannot_be_loaded_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    [finding] = doctor._gpus(Path())
    assert (finding.name, finding.state, finding.remedy) == ("torch", State.fail, "pip install torch")
    assert list(doctor._collectives(Path())) == []


def test_little_memory_and_few_files_are_worth_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, limits, expected in (
        (64 << 30, (20_000, 20_000), [State.ok, State.ok]),
        (1 << 30, (1024, 1024), [State.note, State.note]),
        (1 << 30, (1024, 4096), [State.note, State.note]),
    ):
        monkeypatch.setattr(doctor, "available_here", lambda available=available: available)
        monkeypatch.setattr(doctor.resource, "getrlimit", lambda _, limits=limits: limits)
        memory, files = doctor._limits(Path())
        assert [memory.state, files.state] == expected
        if limits == (1024, 1024):
            assert str(files.remedy).startswith("ask for a higher limit: ")
    assert "`memory3 plan` says what a run takes" in str(memory.remedy)
    assert str(files.remedy).startswith("ulimit -n 4096: ")


def mounted(tmp_path: Path, kind: str, options: str) -> tuple[str, list[str]]:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nhost:/x {tmp_path} {kind} {options} 0 0\n")
    assert file_system(Path("/etc"), mounts) == ("ext4", ["rw"])
    return file_system(tmp_path / "runs", mounts)


def test_the_file_system_is_that_of_the_deepest_mount(tmp_path: Path) -> None:
    assert mounted(tmp_path, "nfs4", "rw,hard") == ("nfs4", ["rw", "hard"])


@pytest.mark.parametrize(
    ("kind", "options", "said", "remedy"),
    [
        ("ext4", "rw", None, None),
        ("overlay", "rw", None, None),
        ("nfs4", "rw,local_lock=none", "nfs4 may be shared", "`flock RUNS/.locked sleep 60` on one"),
        (
            "nfs",
            "rw,nolock,local_lock=all",
            "with local_lock=all: a lock keeps processes of this host",
            "none",
        ),
        ("lustre", "rw,localflock", "with localflock: a lock keeps processes of this host", "with flock"),
        ("lustre", "rw,flock", "lustre may be shared", "on another has to say nothing"),
        ("fuse.sshfs", "rw", "fuse.sshfs may be shared", "`flock -n RUNS/.locked echo free`"),
    ],
)
def test_a_file_system_that_other_hosts_may_share_is_worth_a_note(
    kind: str, options: str, said: str | None, remedy: str, tmp_path: Path
) -> None:
    found = list(doctor._other_hosts(Path("RUNS"), *mounted(tmp_path, kind, options)))
    if said is None:
        assert found == []
    else:
        [finding] = found
        assert finding.state == State.note
        assert said in finding.says
        assert remedy in str(finding.remedy)


def test_the_check_of_the_folder_looks_at_its_file_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "file_system", lambda _: ("beegfs", ["rw"]))
    code, out = failing(monkeypatch, tmp_path / "runs", "_folder")
    assert code == 0
    assert "other hosts" in out.split("look at: ")[1]
