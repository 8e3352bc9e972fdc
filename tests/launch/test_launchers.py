"""The same command under every launcher: the first step has the same loss, bit for bit on as many ranks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from launch.compose import compose_config, load_config
from launch.joined import compose_for
from launch.launchers import _run, commands, ranks_per_host, read_hosts
from launch.slurm import job_name, meeting_place, script
from tests.support import slurm
from tests.support.launch import prepared_root, run_settings, trained
from tests.support.spawn import HANG_SECONDS
from train.announced import Announced, announced
from train.distributed import free_port
from train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
WARMUP = ["continual=null"]
MEMORY3 = [sys.executable, "-m", "launch.cli"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "launch.cli",
]
DEEPSPEED = ["deepspeed", "--num_gpus=2", "--master_port=29517"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """paths.root with the prepared corpus of `trained()`."""
    folder = tmp_path_factory.mktemp("launchers") / "runs"
    shutil.copytree(prepared_root() / "prepared", folder / "prepared")
    return folder


def settings(root: Path, name: str, *more: str) -> list[str]:
    """The command that every launcher is given."""
    given = [text for text in run_settings(root, name) if not text.startswith("paths.root=")]
    return ["pretrain", "--no-prepare", *given, *WARMUP, f"paths.root={root}", *more]


def start(command: list[str], **environment: str) -> str:
    """Run a command to its end; what it said."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True, text=True, check=False, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def first_loss(run: Path) -> float:
    return float(next(line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line))


def expected() -> float:
    """The first loss of plain `memory3 pretrain` on two ranks."""
    return first_loss(trained().main)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(TORCHRUN, id="torchrun"),
        pytest.param([*DEEPSPEED, "--module", "launch.cli"], id="deepspeed", marks=pytest.mark.slow),
        pytest.param([*DEEPSPEED, "--no_local_rank", "--module", "launch.cli"], id="deepspeed-no-local-rank",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_ranks_that_another_launcher_started_train_the_same(
    launcher: list[str], root: Path, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    start([*launcher, *settings(root, name)])
    assert first_loss(root / name) == expected()
    assert load_config(root / name / "config.yaml").engine.num_ranks == 2
    assert sorted(path.name for path in (root / name / "checkpoints").iterdir()) == [
        "warmup-00000002",
        "warmup-00000004",
    ]


@pytest.mark.slow
def test_torchrun_may_start_the_command_itself(root: Path, tmp_path: Path) -> None:
    command = tmp_path / "memory3"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m launch.cli "$@"\n')
    command.chmod(0o755)
    torchrun = [*TORCHRUN[: TORCHRUN.index("-m", 2)], "--no-python", "memory3"]
    start([*torchrun, *settings(root, "no-python")], PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert first_loss(root / "no-python") == expected()


@pytest.mark.slow
def test_torchruns_of_two_nodes_train_the_same(root: Path) -> None:
    meeting = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    with ThreadPoolExecutor() as nodes:
        said = [
            nodes.submit(
                start,
                [
                    *torchrun,
                    "--rdzv-backend=c10d",
                    meeting,
                    f"--node-rank={node}",
                    "-m",
                    "launch.cli",
                    *settings(root, "nodes"),
                ],
            )
            for node in range(2)
        ]
        for each in said:
            each.result()
    assert first_loss(root / "nodes") == expected()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_another_number_of_ranks_differs_by_rounding_alone(num_ranks: int, root: Path) -> None:
    changes = [f"engine.num_ranks={num_ranks}", "warmup.micro_rows=1"]
    start([*MEMORY3, *settings(root, f"ranks-{num_ranks}", *changes)])
    assert first_loss(root / f"ranks-{num_ranks}") == pytest.approx(expected(), abs=2e-3)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Two hosts as network namespaces, joined by a cable: the host file, and the shell that reaches them."""
    names = [f"m3-{os.getpid()}-{number}" for number in (1, 2)]
    with ExitStack() as made:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
                pytest.skip("network namespaces cannot be made here")
            made.callback(subprocess.run, ["ip", "netns", "delete", name], check=False)
        cable = f"link add m3 netns {names[0]} type veth peer name m3 netns {names[1]}"
        subprocess.run(["ip", *cable.split()], check=True)
        for number, name in enumerate(names, start=1):
            for words in (f"address add 10.73.0.{number}/24 dev m3", "link set m3 up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        shell = folder / "shell"
        shell.write_text(
            "#!/bin/sh\n"
            f"case $1 in 10.73.0.1) host={names[0]};; 10.73.0.2) host={names[1]};; esac\n"
            'exec env -i PATH="$PATH" DS_ACCELERATOR=cpu ip netns exec $host sh -c "$2"\n'
        )
        shell.chmod(0o755)
        hosts = folder / "hosts"
        hosts.write_text("10.73.0.1 slots=1  # the first is where they meet\n10.73.0.2 slots=1\n")
        yield hosts, shell


@pytest.mark.slow
def test_two_hosts_train_the_same(root: Path, tmp_path: Path) -> None:
    with two_hosts(tmp_path) as (hosts, shell):
        more = [f"launcher.hosts.file={hosts}", f"launcher.hosts.shell={shell}"]
        start([*MEMORY3, *settings(root, "hosts", "launcher=hosts", *more)], GLOO_SOCKET_IFNAME="m3")
    assert first_loss(root / "hosts") == expected()


PDSH = f"""\
#!{sys.executable}
import os, subprocess, sys
assert sys.argv[1:5] == ["-S", "-f", "1024", "-w"], sys.argv
line = " ".join(sys.argv[6:])
kept = {{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}}
shells = [
    subprocess.Popen(["bash", "-c", line.replace("%n", str(number))], cwd="/", env=kept)
    for number, host in enumerate(sys.argv[5].split(","))
]
sys.exit(max(shell.wait() for shell in shells))
"""
SSH = '#!/bin/sh\ncase "$*" in *" hostname -I") echo 127.0.0.1;; esac\n'


@pytest.mark.slow
def test_deepspeeds_own_hosts_train_the_same(root: Path, tmp_path: Path) -> None:
    """`deepspeed --hostfile`, whose pdsh has a shell of this machine for each host, with nothing that is set here."""
    for name, program in (("pdsh", PDSH), ("ssh", SSH)):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    deepspeed = ["deepspeed", f"--hostfile={tmp_path}/hosts", f"--master_port={free_port()}", "--module"]
    quoted = r"logging.wandb_project=\'a,b\'"  # pdsh leaves words to the hosts' shells
    start([*deepspeed, "launch.cli", *settings(root, "hostfile", quoted)], PATH=path)
    assert first_loss(root / "hostfile") == expected()
    trained_with = load_config(root / "hostfile" / "config.yaml")
    assert trained_with.engine.num_ranks == 2
    assert trained_with.logging.wandb_project == "a,b"


@pytest.mark.slow
def test_a_job_of_two_nodes_trains_the_same(root: Path, cluster: Path) -> None:
    more = ["launcher=slurm", "launcher.slurm.nodes=2", "launcher.slurm.gpus=false"]
    said = start([*MEMORY3, *settings(root, "job", *more)])
    assert said.startswith(f"job 100 trains {root}/job; it says how it goes in {root}/job/slurm-100.out")
    assert slurm.wait_for(cluster / "jobs/100") == 0, (root / "job/slurm-100.out").read_text()
    assert first_loss(root / "job") == expected()


def test_a_job_whose_time_is_over_is_queued_again_and_goes_on(root: Path, cluster: Path) -> None:
    """SIGUSR1 in the middle of training: a checkpoint, `scontrol requeue`, the same script again."""
    command = settings(root, "requeued", "launcher=slurm", "launcher.slurm.gpus=false", "engine.num_ranks=1")
    start([*MEMORY3, *command, "warmup.steps=40", "saving.every_steps=1000", "logging.validate_every=1000"])
    job, run = cluster / "jobs/100", root / "requeued"
    while not (run / "metrics.jsonl").exists() or not read_metrics(run / "metrics.jsonl"):
        assert not (job / "code").exists(), (run / "slurm-100.out").read_text()
        time.sleep(0.02)
    os.kill(int((job / "pid").read_text()), signal.SIGUSR1)
    assert slurm.wait_for(job) == 0, (run / "slurm-100.out").read_text()
    lines = read_metrics(run / "metrics.jsonl")
    [resumed] = [line for line in lines if line.get("event") == "resumed"]
    assert 0 < resumed["step"] < 40
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert "the time of this job is over: it is queued again" in (run / "slurm-100.out").read_text()


def slurm_config(*more: str) -> list[str]:
    return [
        "launcher=slurm",
        "launcher.slurm.nodes=2",
        "engine.num_ranks=16",
        "warmup.rows_per_step=128",
        *more,
    ]


def test_the_script_of_a_job(tmp_path: Path) -> None:
    config = compose_config(
        slurm_config('launcher.slurm.options=["--partition=gpu"]', "launcher.slurm.setup=[module load cuda]")
    )
    folder = tmp_path / "runs" / "mine"
    assert script(config, folder, "memory3 pretrain") == (
        "#!/bin/bash\n"
        f"#SBATCH --job-name={job_name(folder)}\n"
        f"#SBATCH --output={folder}/slurm-%j.out\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --requeue\n"
        "#SBATCH --signal=B:USR1@300\n"
        "#SBATCH --time=24:00:00\n"
        "#SBATCH --nodes=2\n"
        "#SBATCH --ntasks-per-node=1\n"
        "#SBATCH --cpus-per-task=8\n"
        "#SBATCH --gpus-per-node=8\n"
        "#SBATCH --partition=gpu\n"
        "module load cuda\n"
        'cd "$SLURM_SUBMIT_DIR"\n'
        f"export PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}\n"
        "exec memory3 pretrain\n"
    )  # fmt: skip
    assert job_name(folder) != job_name(tmp_path / "elsewhere" / "mine")
    [srun] = commands(config, folder, address="n1:29500")
    assert srun[:6] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1",
                        "--cpus-per-task=8"]  # fmt: skip
    assert srun[6:9] == ["sh", "-c", 'exec "$@" --node="$SLURM_NODEID"']
    assert srun[-4:] == [str(folder), "8", "--nodes=2", "--address=n1:29500"]


def test_jobs_that_share_a_node_meet_at_different_ports(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    found = set()
    for job in ("1000999", "1001000"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        found.add(meeting_place(29400))
    assert found == {"127.0.0.1:30399", "127.0.0.1:29400"}
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(ValueError, match="this is no allocation of SLURM"):
        meeting_place(29400)


def test_a_job_that_waits_is_not_submitted_again(root: Path, cluster: Path) -> None:
    job = cluster / "jobs/7"
    job.mkdir()
    (job / "name").write_text(job_name(root / "queued"))
    done = subprocess.run(
        [*MEMORY3, *settings(root, "queued", "launcher=slurm")], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{root}/queued has job 7 already; wait for it, or end it: scancel --name=queued-" in done.stderr


def test_hosts_are_read_and_shared_out(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two\na slots=8\n\nb\n")
    assert ranks_per_host(read_hosts(file), 16) == 8
    config = compose_config(
        ["launcher=hosts", f"launcher.hosts.file={file}", "engine.num_ranks=16", "warmup.rows_per_step=128"]
    )
    first, second = commands(config, tmp_path / "it's")
    assert first[:2] == ["ssh", "a"]
    assert second[:2] == ["ssh", "b"]
    assert first[2].endswith(" 8 --nodes=2 --listen --address=a:29400 --node=0")
    assert second[2].endswith("--node=1")
    assert "it'\"'\"'s" in first[2]


@pytest.mark.parametrize(
    ("text", "num_ranks", "said"),
    [
        ("", 2, "names no host"),
        ("a slots=x\n", 2, r"line 1: 'a slots=x' is not 'NAME' or 'NAME slots=8'"),
        ("a\na\n", 2, "line 2: a stands there twice; give it more slots instead"),
        ("a slots=1\nb\n", 4, "is 2 ranks a host, but a has slots=1; set engine.num_ranks=2"),
        ("a\nb\n", 3, "engine.num_ranks=3 cannot be shared by 2 hosts; set a multiple of 2"),
        ("-oProxyCommand=x\n", 2, "line 1: .* is not 'NAME'"),
    ],
)
def test_host_files_that_do_not_fit_are_refused(text: str, num_ranks: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=said):
        ranks_per_host(read_hosts(tmp_path / "hosts"), num_ranks)


def test_what_launchers_announce() -> None:
    assert announced({}) is None
    torchrun = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert announced(torchrun) == Announced(9, 16, 1, 8)
    deepspeed = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"}
    assert announced(deepspeed) == Announced(9, 16, 1, 8)
    with pytest.raises(ValueError, match="announces ranks, but LOCAL_RANK is missing; unset RANK"):
        announced({"RANK": "0", "WORLD_SIZE": "2"})


def test_the_launchers_ranks_are_the_runs() -> None:
    assert compose_for(["experiment=quick"], 1).engine.num_ranks == 1
    with pytest.raises(
        ValueError, match=r"engine\.num_ranks=4, but the launcher started 2 ranks; leave engine"
    ):
        compose_for(["engine.num_ranks=4"], 2)


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """As at a terminal; what a shell starts in the background ignores it, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_is_the_launchers_alone_which_tells_what_it_started() -> None:
    # The group of a terminal's Ctrl-C is played by a child that sends the signal to both.
    child = (
        "import os, signal, sys; os.kill(os.getpid(), signal.SIGINT); os.kill(os.getppid(), signal.SIGINT); "
    )
    child += "sys.exit(128 + int(sys.stdin.readline()))"
    assert _run([[sys.executable, "-c", child]], compose_config(["debug=smoke"])) == 128 + signal.SIGINT
