"""A SLURM of one machine, for tests: `sbatch` really runs its script, in a process group of its own.

    install(FOLDER)      writes FOLDER/bin/{sbatch,squeue,scancel,scontrol,srun}
    FOLDER/full          jobs wait for as long as it is there

A job lives as FOLDER/jobs/NUMBER[_TASK]/{pid,name,requeue,code}; nothing but this file is imported. `srun` runs its
tasks here, one for each node, and hands signals on to them, as the real one does.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "srun")


def install(folder: Path) -> Path:
    """Make the commands; the folder that belongs into PATH."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in COMMANDS:
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {folder} {name} "$@"\n')
        path.chmod(0o755)
    return folder / "bin"


def sbatch(folder: Path, arguments: list[str]) -> str:
    script = Path(arguments[-1])
    assert script.read_text().startswith("#!/bin/bash\n")
    options = dict(
        option.partition("=")[::2] for option in re.findall(r"^#SBATCH --(\S+)", script.read_text(), re.M)
    )
    options = {"job-name": script.name, "output": "slurm-%j.out"} | options
    given = dict(argument[2:].partition("=")[::2] for argument in arguments[:-1])
    number = 100 + len({path.name.partition("_")[0] for path in (folder / "jobs").iterdir()})
    for task in given["array"].split(",") if "array" in given else [None]:
        job = folder / "jobs" / (str(number) if task is None else f"{number}_{task}")
        job.mkdir()
        (job / "name").write_text(options["job-name"])
        output = options["output"].replace("%j", str(number)).replace("%A", str(number))
        environment = {
            **os.environ,
            "SLURM_JOB_ID": job.name,
            "SLURM_SUBMIT_DIR": os.getcwd(),
            "SLURM_JOB_NODELIST": "node[1-9]",
            **({} if task is None else {"SLURM_ARRAY_TASK_ID": task}),
        }
        output = output.replace("%a", str(task))
        process = subprocess.Popen(
            [sys.executable, "-S", __file__, str(folder), "daemon", str(job), str(script), output],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        (job / "daemon").write_text(str(process.pid))
    return str(number) if "parsable" in given else f"Submitted batch job {number}\n"


def daemon(folder: Path, arguments: list[str]) -> str:
    """Run a job's script when its turn comes, again for as long as it is queued again."""
    job, script, output = Path(arguments[0]), arguments[1], arguments[2]
    while (folder / "full").exists() and not (job / "code").exists():
        time.sleep(0.02)
    if (job / "code").exists():  # cancelled
        return ""
    again = True
    while again:
        with open(output, "ab") as out:
            process = subprocess.Popen(["/bin/bash", script], stdout=out, stderr=out, start_new_session=True)
        (job / "pid").write_text(str(process.pid))
        code = process.wait()
        again = (job / "requeue").exists()
        (job / "requeue").unlink(missing_ok=True)
    (job / "code").write_text(str(code))
    return ""


def squeue(folder: Path, arguments: list[str]) -> str:
    [name] = [argument.partition("=")[2] for argument in arguments if argument.startswith("--name=")]
    assert "--format=%i %K" in arguments
    jobs = [job for job in sorted((folder / "jobs").iterdir()) if not (job / "code").exists()]
    return "".join(
        f"{job.name} {job.name.partition('_')[2] or 'N/A'}\n"
        for job in jobs
        if (job / "name").read_text() == name
    )


def scancel(folder: Path, arguments: list[str]) -> str:
    job = folder / "jobs" / arguments[0]
    if (job / "pid").exists():
        os.kill(int((job / "pid").read_text()), signal.SIGTERM)
    else:
        (job / "code").write_text("0")
    return ""


def scontrol(folder: Path, arguments: list[str]) -> str:
    if arguments[:2] == ["show", "hostnames"]:
        return "127.0.0.1\n127.0.0.1\n"
    assert arguments[0] == "requeue"
    (folder / "jobs" / arguments[1] / "requeue").touch()
    return ""


def srun(folder: Path, arguments: list[str]) -> str:
    nodes = 0
    while arguments[0].startswith("--"):
        name, _, value = arguments[0].partition("=")
        nodes = int(value) if name == "--nodes" else nodes
        arguments = arguments[1:]
    tasks = [
        subprocess.Popen(arguments, env={**os.environ, "SLURM_NODEID": str(node)}, close_fds=False)
        for node in range(nodes)
    ]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
    sys.exit(max(task.wait() for task in tasks))


def wait_for(job: Path, timeout_seconds: float = 1200) -> int:
    """The exit code of a job, once it is done."""
    deadline = time.monotonic() + timeout_seconds
    while not (job / "code").exists():
        assert time.monotonic() < deadline, f"{job} does not end"
        time.sleep(0.1)
    time.sleep(0.1)
    return int((job / "code").read_text())


if __name__ == "__main__":
    print(globals()[sys.argv[2]](Path(sys.argv[1]), sys.argv[3:]), end="")
