"""Commands of the documentation, executed as they stand there, but on a corpus of seconds.

Fenced blocks whose info string begins with `sh` are run by bash, page after page, in one folder. `memory3` answers
inside this process; what a page says about sizes is made small by settings that are appended. Hosts and clusters are
this machine: `ssh` runs its line here, SLURM is `tests.support.slurm`, whose jobs are waited for. Of the campaign of
faults the short form is run, once. `sh slow` is left to the slow tests, `sh elsewhere` cannot be run.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from tests.support import slurm
from tests.support.launch import Finished, memory3, within

ROOT = Path(__file__).parents[2]
CORPUS = "data=jsonl data.path=corpus.jsonl data.sources.documents.title_field=title data.sources.documents.id_field=id"
SMALL = [
    "data.vocab_size=640",
    "data.validation_fraction=0.15",
    "data.test_fraction=0.1",
    "data.num_workers=1",
]
_TRAINS = ("pretrain", "sweep", "demo")
_MANY = ("engine.num_ranks", "launcher.slurm.nodes", "launcher.slurm.array_tasks")
_BENCHED = [
    *(
        "model.num_layers=2",
        "model.width=64",
        "model.num_heads=1",
        "model.num_kv_heads=1",
        "model.ffn_width=64",
    ),
    *("model.num_memory_layers=1", "model.row_tokens=128", "model.init=normal", "warmup.rows_per_step=2"),
    "warmup.micro_rows=1",
]
_SHIM = """\
import json, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({path!r})
    typed = sys.stdin.read() if "-" in sys.argv else ""
    asked.sendall(json.dumps([sys.argv[1:], typed]).encode() + b"\\n")
    code, out, err = json.loads(asked.makefile().read())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of shell.

    Attributes:
        mark: "slow", "elsewhere" or nothing.
    """

    page: str
    line: int
    mark: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of shell of a page, a path below the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in re.finditer(r"^```sh ?(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield Block(page, text[: found.start()].count("\n") + 1, found[1], found[2])


def small(arguments: Sequence[str]) -> list[str]:
    """A command of `memory3`, with settings that make it one of seconds."""
    command, more = arguments[0], []
    if command == "bench":
        return [*arguments, "--rounds", "5", *_BENCHED]
    if command in (*_TRAINS, "prepare", "plan") and "data=jsonl" in arguments:
        more += [text for text in CORPUS.split() if text not in arguments] + SMALL
    if command == "prepare":
        more.append("retrieval.embedder.kind=static")
    trained = command in _TRAINS or "--search" in arguments
    if trained and not any(text.startswith("debug=") for text in arguments):
        more.append("debug=smoke")
    if command in _TRAINS and "debug=profile" in arguments:
        more += ["retrieval.embedder.kind=static", "model.row_tokens=128"]
    if command in _TRAINS:
        more += [f"{key}=2" for key in _MANY if _asks(key, arguments)]
    return [*arguments, *more, *(["--trials=1"] if command == "sweep" else [])]


def _asks(key: str, arguments: Sequence[str]) -> bool:
    return any(text.startswith(f"{key}=") for text in arguments)


@dataclass
class Reader:
    """Somebody who types what the pages say.

    Attributes:
        folder: Where they sit.
        commands: What was asked of `memory3`, with the exit codes.
    """

    folder: Path
    commands: list[tuple[list[str], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        tools = self.folder / ".tools"
        tools.mkdir(parents=True)
        self._socket = tools / "socket"
        (tools / "shim.py").write_text(_SHIM.format(path=str(self._socket)))
        added = " ".join([*SMALL, "debug=smoke"])
        campaign = f'exec {sys.executable} {ROOT}/"$@" --short --work {tools / "campaign"}'
        for name, command in (
            ("memory3", f'exec {sys.executable} -S {tools / "shim.py"} "$@"'),
            (
                "python",
                f'case $1 in benchmarks/campaign.py) {campaign};; *) exec {sys.executable} "$@";; esac',
            ),
            ("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@" {added}'),
            ("deepspeed", f'exec {sys.executable} {Path(sys.executable).parent / "deepspeed"} "$@" {added}'),
            ("ssh", """exec sh -c "$(printf %s "$2" | sed 's/worker-[12]/127.0.0.1/g')\""""),
            (
                "chromium",
                f'exec {shutil.which("chromium") or "true"} --user-data-dir={tools / "browser"} "$@"',
            ),
        ):
            (tools / name).write_text(f"#!/bin/sh\n{command}\n")
            (tools / name).chmod(0o755)
        self._cluster = tools / "cluster"
        path = [str(tools), str(slurm.install(self._cluster)), os.environ["PATH"]]
        self._environment = {"PATH": os.pathsep.join(path), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}

    def types(self, text: str) -> str:
        """Run a block of shell in the folder; what went wrong, and nothing otherwise."""
        environment = {**os.environ, **self._environment, "CORPUS": CORPUS}
        self._socket.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(self._socket))
            server.listen()
            server.settimeout(0.05)
            bash = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text], cwd=self.folder, env=environment,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            while bash.poll() is None:
                try:
                    asked, _ = server.accept()
                except TimeoutError:
                    continue
                with asked:
                    asked.setblocking(True)
                    answer = self._answer(*json.loads(asked.makefile().readline()))
                    asked.sendall(json.dumps([answer.code, answer.out, answer.err]).encode())
            said = bash.communicate()[1]
        if bash.returncode != 0:
            return f"exit code {bash.returncode}\n{said}"
        return "".join(
            f"job {job.name} ({(job / 'name').read_text()}) ended with {code}\n"
            for job in (self._cluster / "jobs").iterdir()
            if (code := slurm.wait_for(job))
        )

    def _answer(self, arguments: list[str], typed: str) -> Finished:
        given = small(arguments)
        again = any(code == 0 and set(done) == set(given) for done, code in self.commands)
        if given[0] in ("prepare", "pretrain") and again:
            return Finished(0, "", "")  # nothing would be left to do
        with patch.object(sys, "stdin", StringIO(typed)), patch.dict(os.environ, self._environment):
            if given[0] == "bench":  # what starts an engine has a process of its own
                answer = memory3(*given, "--output", str(self.folder / "benched"))
            else:
                answer = within(*given)
        self.commands.append((given, answer.code))
        return answer
