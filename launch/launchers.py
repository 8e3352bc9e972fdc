"""Who starts the processes above the ranks (`launch.agent`), one on every machine, and with which command.

    local    one, here
    hosts    one on each line of a host file, through `ssh` or what stands in for it
    slurm    one on each node of an allocation, through `srun` (`launch.slurm` asks for the allocation)

All machines see the run's folder under the same path. The commands are pure functions of the configuration.
Ranks of other programs than training start on this machine alone (`run_here`).
Not here: ranks that torchrun or deepspeed started by themselves (`launch.joined`).
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch import slurm
from launch.config import LauncherKind, RunConfig
from train.stopping import heeds_hangup

_PASSED_ON = ("NCCL_", "GLOO_", "CUDA_", "TORCH_", "DS_", "HF_", "MALLOC_", "MEMORY3_")
"""Variables whose names begin so reach the ranks on other hosts; `srun` passes on all."""
_PATIENCE_SECONDS = 10
"""Agents of other machines end by themselves within this time of the first failure; then they are told to."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Host:
    """A line of a host file: `NAME slots=8`, as DeepSpeed writes them."""

    name: str
    slots: int | None = None


def read_hosts(path: Path) -> list[Host]:
    """Read a host file; `#` begins a comment.

    Raises:
        ValueError: It is missing or empty, a line is malformed, or a host stands there twice.
    """
    if not path.is_file():
        raise ValueError(f"launcher.hosts.file={path} does not exist; write a host a line, 'NAME slots=8'")
    hosts: list[Host] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, *rest = words
        slots = rest[0].removeprefix("slots=") if rest else None
        if len(rest) > 1 or (slots is not None and not slots.isdigit()) or name.startswith("-"):
            raise ValueError(f"{path}, line {number}: {line.strip()!r} is not 'NAME' or 'NAME slots=8'")
        if any(host.name == name for host in hosts):
            raise ValueError(f"{path}, line {number}: {name} stands there twice; give it more slots instead")
        hosts.append(Host(name, None if slots is None else int(slots)))
    if not hosts:
        raise ValueError(f"launcher.hosts.file={path} names no host; write a host a line, 'NAME slots=8'")
    return hosts


def ranks_per_host(hosts: Sequence[Host], num_ranks: int) -> int:
    """Ranks that each host runs.

    Raises:
        ValueError: They cannot be shared out evenly, or a host has fewer slots.
    """
    if num_ranks % len(hosts):
        raise ValueError(
            f"engine.num_ranks={num_ranks} cannot be shared by {len(hosts)} hosts; set a multiple of {len(hosts)}"
        )
    share = num_ranks // len(hosts)
    for host in hosts:
        if host.slots is not None and host.slots < share:
            raise ValueError(
                f"engine.num_ranks={num_ranks} is {share} ranks a host, but {host.name} has slots={host.slots}; set "
                f"engine.num_ranks={host.slots * len(hosts)}, or leave the host away"
            )
    return share


def commands(config: RunConfig, folder: Path, *, address: str = "") -> list[list[str]]:
    """The commands that start the agents of a run.

    Args:
        config: The run's.
        folder: Its folder.
        address: Where the nodes of the allocation meet, under SLURM.

    Raises:
        ValueError: The host file does not fit the run.
    """
    launcher, num_ranks = config.launcher, config.engine.num_ranks
    agent = [sys.executable, "-m", "launch.agent", str(folder.resolve())]
    match launcher.kind:
        case LauncherKind.local:
            return [[*agent, str(num_ranks), "--listen"]]
        case LauncherKind.hosts:
            assert launcher.hosts.file is not None
            hosts = read_hosts(Path(launcher.hosts.file))
            agent += [str(ranks_per_host(hosts, num_ranks)), f"--nodes={len(hosts)}", "--listen"]
            agent.append(f"--address={hosts[0].name}:{launcher.hosts.port}")
            variables = [f"{name}={value}" for name, value in sorted(variables_of_ranks(config).items())]
            there = ["cd", str(Path.cwd()), "&&", "exec", "env", *variables, *agent]
            return [
                [*shlex.split(launcher.hosts.shell), host.name, _line([*there, f"--node={node}"])]
                for node, host in enumerate(hosts)
            ]
        case LauncherKind.slurm:
            return [slurm.srun_command(config, agent, address)]


def _line(words: Sequence[str]) -> str:
    return " ".join(word if word == "&&" else shlex.quote(word) for word in words)


def variables_of_ranks(config: RunConfig, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the environment of ranks on other hosts has to hold."""
    given = os.environ if environment is None else environment
    passed = {name: value for name, value in given.items() if name.startswith(_PASSED_ON)}
    package_root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package_root, given.get("PYTHONPATH")]))
    return {**passed, "OMP_NUM_THREADS": str(config.engine.threads_per_rank), "PYTHONPATH": path}


def run_agents(config: RunConfig, folder: Path) -> int:
    """Start the agents of a run, hand signals on to them, and return the exit code of the one that failed first."""
    on_slurm = config.launcher.kind is LauncherKind.slurm
    address = slurm.meeting_place(config.launcher.hosts.port) if on_slurm else ""
    return _run(commands(config, folder, address=address), config, listening=not on_slurm)


def run_here(program: str, worker: str, told: str, *, num_ranks: int, config: RunConfig) -> int:
    """Start ranks on this machine that do something else than to train, and return the exit code alike.

    Args:
        program: What the user called, for messages.
        worker: The module of a rank.
        told: What it is told.
        num_ranks: Processes.
        config: The run's; says how many threads each has.
    """
    agent = [sys.executable, "-m", "launch.agent", told, str(num_ranks), "--listen"]
    return _run([[*agent, f"--program={program}", f"--worker={worker}"]], config)


def _run(started: Sequence[Sequence[str]], config: RunConfig, *, listening: bool = True) -> int:
    """Start agents and wait for them; those that listen end when this process does, even if it is killed."""
    environment = {**os.environ, **variables_of_ranks(config)}
    # Ctrl-C reaches the whole group, and would end those that still import in a traceback: they are told by us instead.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN) if listening else None
    try:
        # Descriptors that may be inherited are: the lock of the run's folder.
        agents = [
            subprocess.Popen(
                command, env=environment, close_fds=False, stdin=subprocess.PIPE if listening else None
            )
            for command in started
        ]
    finally:
        if listening:
            signal.signal(signal.SIGINT, interrupt)

    def tell(number: int) -> None:
        for agent in agents:
            if agent.stdin is not None:
                with suppress(OSError):  # it is gone
                    agent.stdin.write(f"{int(number)}\n".encode())
                    agent.stdin.flush()
            else:
                agent.send_signal(number)

    handlers = {
        number: signal.signal(number, lambda number, _: tell(number))
        for number in (signal.SIGTERM, signal.SIGUSR1, *([signal.SIGHUP] if heeds_hangup() else []))
    }
    try:
        return _wait(agents, tell)
    except KeyboardInterrupt:
        tell(signal.SIGTERM)
        code = _wait(agents, tell)
        return 128 + signal.SIGINT if code == 128 + signal.SIGTERM else code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for agent in agents:
            if agent.stdin is not None:
                with suppress(OSError):  # what it was not told any more
                    agent.stdin.close()


def _wait(agents: Sequence["subprocess.Popen[bytes]"], tell: Callable[[int], None]) -> int:
    first, deadline = 0, None
    while any(agent.poll() is None for agent in agents):
        first = first or _failed(agents)
        if first and deadline is None:
            deadline = time.monotonic() + _PATIENCE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            tell(signal.SIGTERM)
            deadline = float("inf")
        time.sleep(_POLL_SECONDS)
    return first or _failed(agents)


def _failed(agents: Sequence["subprocess.Popen[bytes]"]) -> int:
    """The exit code of an agent that failed, as shells count it; 0 where none has."""
    code = next((agent.returncode for agent in agents if agent.returncode), 0)
    return 128 - code if code < 0 else code
