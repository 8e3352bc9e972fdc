"""The price of plain top-level packages, paid by rules; and an installation from the files that a container gets."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["conf", "data", "launch", "memorybank", "model", "train"]


def test_no_other_distribution_owns_our_package_names() -> None:
    owners = packages_distributions()
    strangers = {name: set(owners.get(name, [])) - {"memory3-pretrain"} for name in PACKAGES}
    assert not any(strangers.values()), strangers


@pytest.mark.parametrize("name", PACKAGES)
def test_our_packages_are_imported_from_this_checkout(name: str) -> None:
    module = __import__(name)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / name


def test_the_files_that_the_container_copies_make_an_installation(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    recipe = (ROOT / "Dockerfile").read_text().splitlines()
    for line in recipe:
        if line.startswith("COPY "):
            *names, _ = line.split()[1:]
            for name in names:
                assert f"!{name}" in ignored
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, source / name)
                else:
                    shutil.copy(ROOT / name, source / name)
    extras = next(line for line in recipe if line.startswith("ARG EXTRAS=")).partition("=")[2].split(",")
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    assert set(extras) <= set(project["optional-dependencies"])
    install = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(installed),
        str(source),
    ]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=120)
    command = ["plan", "--config-only", "experiment=paper_2b4"]
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys, launch.cli; print(launch.cli.__file__); sys.exit(launch.cli.main({command}))",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.splitlines()[0]).is_relative_to(installed)
    assert "2,433,308,800" in found.stdout
    assert (installed / "bin" / "memory3").exists()
