"""A corpus that nobody prepared for, and runs on it through the command line: what the tests of launch/ share.

The corpus is the Python documentation that ships with the standard library (`benchmarks.documentation`).
"""

import atexit
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.documentation import corpus_settings, topics
from launch import cli
from tests.support.spawn import HANG_SECONDS


@dataclass(frozen=True, slots=True)
class Finished:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Trained:
    """Two trained arms on the Python documentation, and what their training said.

    Attributes:
        root: paths.root of everything.
        main: Run `m`, with memory.
        control: Run `c`, the matched control.
        said: Output by run, and of `prepare`.
    """

    root: Path
    said: dict[str, Finished]

    @property
    def main(self) -> Path:
        return self.root / "m"

    @property
    def control(self) -> Path:
        return self.root / "c"


def memory3(*arguments: str, timeout_seconds: float = HANG_SECONDS) -> Finished:
    """Run `memory3` as a user does, in a process of its own."""
    here = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=here,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def run_settings(root: Path, name: str) -> list[str]:
    """Settings of a run of seconds on two ranks; of `trained()` for the runs `m` and `c`."""
    settings = [
        "experiment=quick",
        "debug=smoke",
        *corpus_settings(root, trained_corpus()),
        f"run={name}",
        "logging.progress=false",
    ]
    if name == "c":
        settings += ["warmup=null", "continual.memory=null", "continual.branch_from=m"]
    return settings


@cache
def trained_corpus() -> Path:
    """The corpus of `trained()`."""
    return topics(_folder() / "topics.jsonl")


def trained() -> Trained:
    """Prepare, and train M and C, once for all tests of a process; do not write into what it returns."""
    made = _train()
    for name, finished in made.said.items():
        assert finished.code == 0, f"{name}: {finished.err}"
    return made


def prepared_root() -> Path:
    """paths.root of `trained()`, where the corpus at least is prepared."""
    assert _prepare().code == 0, _prepare().err
    return _folder() / "runs"


@cache
def _prepare() -> Finished:
    return memory3("prepare", *corpus_settings(_folder() / "runs", trained_corpus()))


@cache
def _train() -> Trained:
    root = _folder() / "runs"
    said = {"prepare": _prepare()}
    for name in ("m", "c"):
        if all(finished.code == 0 for finished in said.values()):
            said[name] = memory3("pretrain", "--no-prepare", *run_settings(root, name))
    return Trained(root, said)


@cache
def _folder() -> Path:
    folder = TemporaryDirectory(prefix="launch-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def within(*arguments: str) -> Finished:
    """Run `memory3` inside this process: for what starts no ranks."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(arguments)
    return Finished(code, out.getvalue(), err.getvalue())
