"""`memory3 doctor`: whether this machine can train; one line a check, and a remedy where something is wrong.

Nothing is inferred that can be tried: processes add numbers through gloo and NCCL, files are written, renamed, mapped
and locked in the folder of runs. A check states `ok`, `note` (works, but not as well as it could) or `fail` (no run is
possible); only a `fail` makes the exit code 1. What was written for a check is deleted again.
Not here: what a run needs of memory and disk (`memory3 plan`); other hosts: where the folder of runs may be shared with
some, a note says how to try its locks from two of them.
"""

import argparse
import fcntl
import json
import mmap
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from enum import Enum
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.devices import available_here, memory_here
from launch.units import binary

_PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_WRITTEN_BYTES = 128 << 20
_SLOW_DISK = 100e6
_FEW_FILES = 4096
_LITTLE_DISK, _LITTLE_MEMORY = 5 << 30, 4 << 30
_IMPORT_SECONDS, _COLLECTIVE_SECONDS = 300, 60
_WANDB_SECONDS = 2.0
_LOCAL = ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")
"""File systems that one host alone mounts; any other may be shared, those of FUSE and of clouds too."""


class State(Enum):
    """What a check found."""

    ok = "ok"
    note = "note"
    fail = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it."""

    name: str
    state: State
    says: str
    remedy: str | None = None


def run(arguments: argparse.Namespace) -> int:
    """Make all checks, print each as soon as it is made; 1 when one of them makes runs impossible."""
    findings = []
    console = Console(width=max(Console().width, 100))
    for title, checks in (
        ("software", (_python, _packages, _faiss)),
        ("machine", (_processor, _gpus, _collectives, _limits)),
        ("folder of runs", (_folder,)),
        ("network", (_wandb,)),
    ):
        if not arguments.json:
            console.print(title, style="dim", highlight=False)
        for finding in (finding for check in checks for finding in check(Path(arguments.root))):
            findings.append(finding)
            if not arguments.json:
                console.print(_line(finding), highlight=False)
    failed = [finding.name for finding in findings if finding.state is State.fail]
    noted = [finding.name for finding in findings if finding.state is State.note]
    if arguments.json:
        print(json.dumps([asdict(finding) | {"state": finding.state.name} for finding in findings]))
    else:
        end = "this machine cannot train yet" if failed else "this machine can train"
        look = f"; look at: {', '.join([*failed, *noted])}" if failed or noted else ""
        style = "bold red" if failed else "bold yellow" if noted else "bold green"
        console.print(f"\n{end}{look}", style=style, highlight=False)
    return int(bool(failed))


def _line(finding: Finding) -> Table:
    style = {State.ok: "green", State.note: "yellow", State.fail: "bold red"}[finding.state]
    line = Table.grid(padding=(0, 2))
    line.add_column(width=0)
    line.add_column(width=4)
    line.add_column(width=11)
    line.add_column()
    name = Text(finding.name, style="" if finding.state is State.ok else "bold")
    line.add_row("", Text(finding.state.name, style=style), name, Text(finding.says))
    if finding.remedy is not None:
        line.add_row("", "", "", Text(f"-> {finding.remedy}", style=style))
    return line


def _python(_: Path) -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    wanted = _project()["requires-python"]
    version = platform.python_version()
    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    says = f"{version}, in {sys.prefix}" + ("" if fits else f"; {wanted} is needed")
    remedy = None if fits else f"make PYTHON=python3.12 install, with a Python {wanted}"
    yield Finding("python", State.ok if fits else State.fail, says, remedy)


def _packages(_: Path) -> Iterator[Finding]:
    """Installed versions against the ranges that the project states; one line for all that fit."""
    from packaging.requirements import Requirement

    fitting = []
    for text in _project()["dependencies"]:
        requirement = Requirement(text)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(
                requirement.name,
                State.fail,
                f"not installed; {requirement} is needed",
                f"pip install '{requirement}'",
            )
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fitting.append(f"{requirement.name}=={version}")
        else:
            says = f"{version} is outside {requirement.specifier}"
            yield Finding(requirement.name, State.fail, says, f"pip install '{requirement}'")
    yield Finding("packages", State.ok, ", ".join(fitting))


def _project() -> dict[str, Any]:
    """Return what the project requires: by pyproject.toml in a checkout, by the installed metadata elsewhere."""
    if _PROJECT.is_file():
        found: dict[str, Any] = tomllib.loads(_PROJECT.read_text())["project"]
        return found
    here = metadata.metadata("memory3-pretrain")
    required = [text for text in metadata.requires("memory3-pretrain") or [] if "extra ==" not in text]
    return {"requires-python": here["Requires-Python"], "dependencies": required}


def _faiss(_: Path) -> Iterator[Finding]:
    variants = {
        found.name: found.version for found in metadata.distributions() if found.name.startswith("faiss")
    }
    remedy = "pip install faiss-cpu (or faiss-gpu), one of them alone"
    if len(variants) != 1:
        said = "no variant is installed" if not variants else f"several are installed: {', '.join(variants)}"
        yield Finding("faiss", State.fail if not variants else State.note, said, remedy)
        return
    [(name, version)] = variants.items()
    try:
        from memorybank.index import compile_options
    except ImportError as problem:
        yield Finding("faiss", State.fail, f"{name} {version} cannot be loaded: {problem}", remedy)
        return
    sets = [word for word in compile_options().split() if word not in ("OPTIMIZE", "DD", "GENERIC")]
    yield Finding("faiss", State.ok, f"{name} {version}, compiled for {', '.join(sets) or 'any processor'}")


def _processor(_: Path) -> Iterator[Finding]:
    with suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
        says = f"{os.cpu_count()} cores, {', '.join(fast) if fast else 'no bfloat16 instructions'}"
        remedy = None if fast else "on CPU ranks set engine.precision=fp32: bfloat16 is emulated here"
        yield Finding("processor", State.ok if fast else State.note, says, remedy)


def _gpus(_: Path) -> Iterator[Finding]:
    try:
        import torch
    except ImportError as problem:
        yield Finding("torch", State.fail, f"cannot be loaded: {problem}", "pip install torch")
        return
    driver = Path("/proc/driver/nvidia/version")
    if not torch.cuda.is_available():
        if driver.exists():
            says = f"there is a driver, but torch {torch.__version__} finds no GPU: ranks would run on CPUs"
            yield Finding("gpus", State.note, says, "install a CUDA build of torch that the driver supports")
        else:
            yield Finding("gpus", State.ok, "none: ranks run on CPUs")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        says = f"{properties.name}, {binary(total)}, {binary(free)} free, CUDA {torch.version.cuda}"
        if free < 0.9 * total:
            yield Finding(f"gpu {number}", State.note, says, "nvidia-smi names the processes that hold it")
        else:
            yield Finding(f"gpu {number}", State.ok, says)


def _collectives(_: Path) -> Iterator[Finding]:
    """Add numbers on two real processes: through gloo always, through NCCL where there are GPUs."""
    try:
        import torch
    except ImportError:
        return  # said before
    wanted = [("gloo", 2)]
    if torch.cuda.is_available():
        wanted.append(("nccl", min(2, torch.cuda.device_count())))
    for backend, num_ranks in wanted:
        seconds = all_reduce_seconds(backend, num_ranks)
        if isinstance(seconds, str):
            remedy = {
                "gloo": "let processes of this host speak to each other: GLOO_SOCKET_IFNAME=lo, or the name of the "
                "network interface, and the host's name in /etc/hosts",
                "nccl": "NCCL_DEBUG=INFO says more; in containers give --shm-size=1g or more, and --gpus all",
            }[backend]
            yield Finding(backend, State.fail, seconds, remedy)
        else:
            says = f"{num_ranks} processes on this host added 1 MiB in {seconds * 1e3:.1f} ms"
            yield Finding(backend, State.ok, says)


def all_reduce_seconds(
    backend: str, num_ranks: int, *, timeout_seconds: float = _COLLECTIVE_SECONDS
) -> float | str:
    """Return how long real processes take to add 1 MiB, or what went wrong."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes, answers = [], []
    # Ctrl-C reaches the whole group, and would end those that import in a traceback: they are ended by us instead.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for rank in range(num_ranks):
            answer, told = context.Pipe(duplex=False)
            process = context.Process(target=_add, args=(backend, rank, num_ranks, port, told), daemon=True)
            process.start()
            told.close()
            processes.append(process)
            answers.append(answer)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    said: list[float | str] = []
    try:
        for patience in (_IMPORT_SECONDS, timeout_seconds):  # libraries are loaded, numbers are added
            deadline = time.monotonic() + patience
            said = [
                answer.recv()
                if answer.poll(max(0.0, deadline - time.monotonic()))
                else f"a process gave no answer within {patience:g} s"
                for answer in answers
            ]
    except EOFError:
        return "a process ended without a word"
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join(1)
            process.kill()
    wrong = [text for text in said if isinstance(text, str)]
    return wrong[0] if wrong else max(said, key=float)


def _add(backend: str, rank: int, num_ranks: int, port: int, told: Connection) -> None:
    import torch
    import torch.distributed as dist

    told.send(0.0)
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=_COLLECTIVE_SECONDS),
        )
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        values = torch.full((1 << 18,), float(rank + 1), device=device)
        dist.all_reduce(values.clone())  # connects
        started = time.perf_counter()
        dist.all_reduce(values)
        added, seconds = float(values[-1]), time.perf_counter() - started
        expected = num_ranks * (num_ranks + 1) / 2
        told.send(seconds if added == expected else f"the sum is {added:g} instead of {expected:g}")
        dist.destroy_process_group()
    except (RuntimeError, OSError, ValueError) as problem:
        told.send(f"{type(problem).__name__}: {str(problem).splitlines()[0]}")


def _folder(root: Path) -> Iterator[Finding]:
    """What the folder of runs can do: speed, rename, memory maps, locks; tried in a folder of its own."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=root) as name:
            work = Path(name)
            yield _disk(work, root)
            yield _attempt("rename", _rename, work, "folders cannot be published; choose another paths.root")
            yield _attempt("memory maps", _map, work, "the bank cannot be read; choose another paths.root")
            yield _lock(work)
        yield from _other_hosts(root, *file_system(root))
    except OSError as problem:
        yield Finding(
            "runs", State.fail, f"{root} cannot be written: {problem}", "set --root, and paths.root"
        )


def _disk(work: Path, root: Path) -> Finding:
    free = shutil.disk_usage(work).free
    size = min(_WRITTEN_BYTES, free // 4)
    block = os.urandom(1 << 20)
    path = work / "speed"
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = size / (time.perf_counter() - started)
    with path.open("rb") as file:
        with suppress(OSError):  # not every file system forgets what it holds in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while file.read(1 << 20):
            pass
    read = size / (time.perf_counter() - started)
    kind, _ = file_system(root)
    says = f"{root} ({kind}): {binary(free)} free, writes {binary(written)}/s, reads {binary(read)}/s"
    if free < _LITTLE_DISK:
        return Finding("disk", State.note, says, "free some, or set paths.root to a larger disk")
    if written < _SLOW_DISK:
        return Finding(
            "disk",
            State.note,
            says,
            "saving takes long: raise saving.every_steps, or set paths.root to a faster disk",
        )
    return Finding("disk", State.ok, says)


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> tuple[str, list[str]]:
    """Return the type of the file system that holds a path, as the kernel names it, and its mount options."""
    here = path.resolve()
    best, kind, options = -1, "unknown", ""
    with suppress(OSError):
        for line in mounts.read_text().splitlines():
            _, point, found, given, *_ = line.split(" ")
            place = Path(point.replace("\\040", " "))
            if here.is_relative_to(place) and len(place.parts) > best:
                best, kind, options = len(place.parts), found, given
    return kind, options.split(",")


def _attempt(name: str, action: Callable[[Path], str], work: Path, remedy: str) -> Finding:
    try:
        return Finding(name, State.ok, action(work))
    except OSError as problem:
        return Finding(name, State.fail, str(problem), remedy)


def _rename(work: Path) -> str:
    """Publish as `data.files` does: write aside, sync file and folder, rename the folder, replace a file in it."""
    from data.files import write_atomic

    aside, published = work / "artefact.partial", work / "artefact"
    aside.mkdir()
    write_atomic(aside / "file", b"first")
    aside.rename(published)
    write_atomic(published / "file", b"second")
    if (published / "file").read_bytes() != b"second" or aside.exists():
        raise OSError("a renamed folder, or a replaced file, is not what was written")
    return "on this host folders are published by one rename, files replaced in one piece, both synced"


def _map(work: Path) -> str:
    path = work / "mapped"
    path.write_bytes(b"memory" * 1000)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if mapped[-6:] != b"memory":
            raise OSError("a mapped file does not hold what was written")
    return "files can be mapped"


def _lock(work: Path) -> Finding:
    """A lock that is held here has to keep another process of this host out, and to be free again once released."""
    path = work / "lock"
    path.touch()
    other = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", other, str(path)]
    try:
        with path.open("r+") as file:  # NFS locks no file that was opened for reading
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kept_out = subprocess.run(command, capture_output=True, check=False).returncode != 0
        freed = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError as problem:
        kept_out, freed = False, False
        says = f"files cannot be locked: {problem}"
    else:
        says = f"on this host a lock keeps {'other processes' if kept_out and freed else 'nobody'} out"
    if kept_out and freed:
        return Finding("locks", State.ok, says)
    return Finding(
        "locks",
        State.note,
        says,
        "never start two processes on one run folder; on NFS mount with local_lock=none",
    )


def _other_hosts(root: Path, kind: str, options: Sequence[str]) -> Iterator[Finding]:
    """Whether a lock keeps processes of other hosts out, too: no process of this one can try that."""
    if kind in _LOCAL:
        return
    for option in options:
        is_nfs = option.startswith("local_lock=") and option != "local_lock=none"
        if is_nfs or option == "localflock":
            says = f"{kind} is mounted with {option}: a lock keeps processes of this host out, and no others"
            remedy = f"mount it with {'local_lock=none' if is_nfs else 'flock'}, or never start a run from two hosts"
            yield Finding("other hosts", State.note, says, remedy)
            return
    says = (
        f"{kind} may be shared: whether a lock keeps processes of other hosts out shows on two of them alone"
    )
    file = root / ".locked"
    remedy = (
        f"`flock {file} sleep 60` on one; meanwhile `flock -n {file} echo free` on another has to say nothing"
    )
    yield Finding("other hosts", State.note, says, remedy)


def _limits(_: Path) -> Iterator[Finding]:
    available = available_here()
    says = f"{binary(available)} available of {binary(memory_here())}"
    if available < _LITTLE_MEMORY:
        yield Finding(
            "memory",
            State.note,
            says,
            "`memory3 plan` says what a run takes; libraries alone take 0.4 GiB a rank",
        )
    else:
        yield Finding("memory", State.ok, says)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FEW_FILES:
        wanted = (
            f"ulimit -n {min(65_536, hard) if hard > 0 else 65_536}"
            if hard != soft
            else "ask for a higher limit"
        )
        remedy = f"{wanted}: every shard of a large bank is a mapped file"
        yield Finding("open files", State.note, f"at most {soft:,}", remedy)
    else:
        yield Finding("open files", State.ok, f"at most {soft:,}")


def _wandb(_: Path) -> Iterator[Finding]:
    """Look whether its server answers; without it runs log offline, so that this is never a failure."""
    from train.metrics import wandb_account

    try:
        account = wandb_account()
    except Exception as problem:  # whatever wandb makes of its own settings
        says = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        yield Finding("wandb", State.note, says, "mend what it names; `wandb status` shows its settings")
        return
    offline = "logging.wandb=true writes offline"
    silence = _silence(account.server)
    if silence is not None:
        says = f"{account.server} does not answer ({silence}): {offline}"
        remedy = "`wandb sync RUN/wandb/offline-*` brings a run up from a machine that reaches it"
        yield Finding("wandb", State.ok, says, remedy)
    elif account.has_key:
        yield Finding("wandb", State.ok, f"{account.server} answers, a key for it is set")
    else:
        says = f"{account.server} answers, no key for it is set, or wandb is told to stay offline: {offline}"
        yield Finding(
            "wandb", State.ok, says, "`wandb login`, or WANDB_API_KEY, brings runs up while they train"
        )


def _silence(url: str) -> str | None:
    """Why a server does not answer, asked through the environment's proxy if there is one; None where it does."""
    try:
        urllib.request.build_opener().open(url, timeout=_WANDB_SECONDS).close()
    except urllib.error.HTTPError as answer:
        return f"{answer.code} {answer.reason}" if answer.code >= 500 else None
    except OSError as problem:
        reason = getattr(problem, "reason", problem)
        return str(getattr(reason, "strerror", None) or reason)
    return None
