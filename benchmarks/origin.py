"""Where a result comes from: the command, the commit, the processor.

Imports nothing heavy, so that a script which forks stays small.
"""

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path


def made_by(script: str, arguments: Sequence[str]) -> str:
    """The command that wrote a page, and the commit at which it did."""
    return f"`python -m benchmarks.{script} {' '.join(arguments)}` at commit {commit(length=7)}"


def commit(*, length: int = 40) -> str:
    """The commit of this repository, with a mark where files have changed since."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", f"--abbrev={length}"],
        cwd=Path(__file__).parent,
        check=False,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
