"""The campaign in short: a few kills at file operations and at random times, a few corruptions; and its tools."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.campaign import Operations, Trial, render
from benchmarks.corruptions import DAMAGES, corrupt
from benchmarks.kill_and_resume import REPOSITORY
from tests.support.spawn import HANG_SECONDS


def test_a_short_campaign_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "campaign.py"), "--short"]
    options = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "campaign.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "campaign.json").read_text())
    assert result["lost"] == []
    rows = {kind: [row for row in result["rows"] if row["kind"] == kind] for kind in ("operations", "times")}
    assert {row["what"] for row in rows["operations"]} == {"warmup-1", "continual-1", "bank compact"}
    assert all(row["kills"] == row["trials"] for row in rows["operations"])
    assert sum(row["kills"] for row in rows["times"]) >= 2
    found = [row for row in result["rows"] if row["kind"] == "corruptions"]
    assert sum(row["trials"] for row in found) == 24
    assert "Nothing was lost" in (tmp_path / "campaign.md").read_text()


@pytest.mark.parametrize("seed", range(30))
def test_a_corruption_changes_bytes_of_the_copy_alone(seed: int, tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    for folder in (original, copy):
        folder.mkdir()
    for name, content in (("a", b"12345"), ("b", b"67"), ("empty", b"")):
        (original / name).write_bytes(content)
        os.link(original / name, copy / name)
    before = {path.name: path.read_bytes() for path in original.iterdir()}
    rng = random.Random(seed)
    files = sorted(copy.iterdir())
    said = corrupt(rng.choice(files), files, rng)
    assert said.split()[0] in DAMAGES
    assert {path.name: path.read_bytes() for path in original.iterdir()} == before
    assert {path.name: path.read_bytes() for path in copy.iterdir()} != before


def test_operations_on_what_is_meant_are_counted(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from benchmarks.campaign import Operations\n"
        "folder = Path(sys.argv[1]); counter = Operations(['/meant']); counter.install()\n"
        "(folder / 'meant').mkdir(); (folder / 'meant/x').write_text('1'); (folder / 'other').write_text('1')\n"
        "(folder / 'meant/x').read_text(); (folder / 'other').rename(folder / 'meant/y')\n"
        "import shutil; shutil.rmtree(folder / 'meant')\n"
        "print(counter.count)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (
        int(done.stdout.split()[-1]) == 1 + 1 + 1 + 3
    )  # made, written, renamed; two files and a folder deleted


def test_what_was_lost_is_said() -> None:
    assert Operations(["x"]).count == 0
    lost = Trial("times 1", "times", "warmup-1", 1, False, "unequal: state.json", 1.0)
    page = render(
        {
            "command": "x", "commit": "y", "machine": {"cpu": "c", "cores": 2}, "seconds": 1.0, "left": 3,
            "damages": {}, "rows": [], "lost": [{"id": lost.id, "what": lost.what, "outcome": lost.outcome}],
        }
    )  # fmt: skip
    assert "- LOST: times 1, warmup-1: unequal: state.json" in page
    assert "Nothing was lost" not in page
    assert "3 trials are left to do" in page
