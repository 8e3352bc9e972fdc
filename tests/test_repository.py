"""What holds for the repository as a whole."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = {".py", ".yaml", ".yml", ".toml", ".md", ".txt", ".json", ".jsonl", ".sh", ".csv", ".svg", ""}


def tracked_files() -> list[Path]:
    """Files that are committed or could be: neither ignored nor generated."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_packages_are_listed_by_exact_name() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(found) == packages == {"conf", "data", "launch", "memorybank", "model", "train"}


@pytest.mark.parametrize("path", ["data/new.py", "model/new.py", "memorybank/new.py", "conf/data/new.yaml"])
def test_gitignore_hides_no_source(path: str) -> None:
    ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False)
    if ignored.returncode == 128:
        pytest.skip("not a git checkout")
    assert ignored.returncode == 1


def test_no_machine_is_named_in_what_is_committed() -> None:
    machine = re.compile(
        r"/(?:root|home|work|Users|tmp)/[\w.]+|https?://(?:localhost|127\.|10\.|192\.168\.)|\bnode-\d+\b"
    )
    named = []
    for path in tracked_files():
        if path.suffix in TEXTS and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="replace")
            named += [f"{path.relative_to(ROOT)}: {found[0]}" for found in machine.finditer(text)]
    assert not named


def test_configuration_is_yaml_alone() -> None:
    assert {path.name for path in (ROOT / "conf").rglob("*.py")} == {"__init__.py"}


def test_every_test_that_the_page_of_faults_names_exists() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(?:tests/[\w/]+\.py::)?(test_\w+)", page))
    assert len(names) > 30
    assert sorted(map(int, re.findall(r"^\| (\d+) \|", page, re.M))) == list(range(1, 29))
    assert [name for name in sorted(names) if f"def {name}(" not in source] == []
    assert [path for path in re.findall(r"`(tests/[\w/]+\.py)", page) if not (ROOT / path).exists()] == []
