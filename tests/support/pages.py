"""Commands of the documentation, executed as they stand there, but on a corpus of seconds.

Fenced blocks whose info string begins with `sh` are run by bash, page after page, in one folder. `memory3` answers
inside this process; what a page says about sizes is made small by settings that are appended. `sh slow` is left to the
slow tests, `sh elsewhere` cannot be run on one machine.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from tests.support.launch import Finished, within

ROOT = Path(__file__).parents[2]
CORPUS = "data=jsonl data.path=corpus.jsonl data.sources.documents.title_field=title data.sources.documents.id_field=id"
SMALL = [
    "data.vocab_size=640",
    "data.validation_fraction=0.15",
    "data.test_fraction=0.1",
    "data.num_workers=1",
]
_TRAINS = ("pretrain", "sweep", "demo")
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
    if command in (*_TRAINS, "prepare", "plan") and "data=jsonl" in arguments:
        more += [text for text in CORPUS.split() if text not in arguments] + SMALL
    if command == "prepare":
        more.append("retrieval.embedder.kind=static")
    if command in _TRAINS and not any(text.startswith("debug=") for text in arguments):
        more.append("debug=smoke")
    if command in _TRAINS and "debug=profile" in arguments:
        more += ["retrieval.embedder.kind=static", "model.row_tokens=128"]
    # Behind the last setting: argparse takes none after an option that follows them.
    place = max((at for at, text in enumerate(arguments) if "=" in text and text[0] != "-"), default=0) + 1
    given = [*arguments[:place], *more, *arguments[place:]]
    return [*given, "--trials=1"] if command == "sweep" else given


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
        for name, command in (
            ("memory3", f'{sys.executable} -S {tools / "shim.py"} "$@"'),
            ("python", f'{sys.executable} "$@"'),
            ("torchrun", f'{sys.executable} -m torch.distributed.run "$@" {added}'),
            ("deepspeed", f'{sys.executable} {Path(sys.executable).parent / "deepspeed"} "$@" {added}'),
        ):
            (tools / name).write_text(f"#!/bin/sh\nexec {command}\n")
            (tools / name).chmod(0o755)

    def types(self, text: str) -> str:
        """Run a block of shell in the folder; what went wrong, and nothing otherwise."""
        path = os.pathsep.join([str(self._socket.parent), os.environ["PATH"]])
        environment = {
            **os.environ,
            "PATH": path,
            "CORPUS": CORPUS,
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
        }
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
        return "" if bash.returncode == 0 else f"exit code {bash.returncode}\n{said}"

    def _answer(self, arguments: list[str], typed: str) -> Finished:
        given = small(arguments)
        again = any(code == 0 and set(done) == set(given) for done, code in self.commands)
        if given[0] in ("prepare", "pretrain") and again:
            return Finished(0, "", "")  # nothing would be left to do
        with patch.object(sys, "stdin", StringIO(typed)):
            answer = within(*given)
        self.commands.append((given, answer.code))
        return answer
