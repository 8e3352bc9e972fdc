"""`memory3 demo`: from raw documents to the table, on the World Factbook."""

import re
from pathlib import Path

import pytest

from launch.arms import control_of
from launch.compose import compose_config, differences
from tests.support.launch import memory3


def test_control_differs_from_the_memory_arm_in_nothing_else() -> None:
    main = compose_config(["experiment=demo"])
    changed = {key for key, _, _ in differences(main, control_of(main))}
    assert {key for key in changed if not key.startswith(("warmup", "continual.memory"))} == {
        "run", "continual.branch_from",
    }  # fmt: skip


def test_control_of_a_run_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no arm M to compare with; choose experiment=demo"):
        control_of(compose_config(["experiment=demo", "continual.memory=null"]))


def test_demo_runs_through_and_can_be_repeated(tmp_path: Path) -> None:
    settings = [
        "debug=smoke",
        "data.vocab_size=1024",
        f"paths.root={tmp_path}/runs",
        "logging.progress=false",
    ]
    done = memory3("demo", *settings)
    assert done.code == 0, done.err
    assert done.out.startswith("demo: ")
    assert "estimated time: " in done.out
    assert "first 5 hold" in done.out  # retrieval, before any training
    for row in (r"\| M +\| memory ", r"\| M +\| oracle ", r"\| C +\| no memory ", r"\| C +\| RAG "):
        assert re.search(row, done.out)
    for label in ("  C  ", "  M without memory", "  M with memory"):
        assert done.out.count(label) >= 3
    paths = re.findall(rf"({re.escape(str(tmp_path))}\S*)$", done.out, re.MULTILINE)
    assert all(Path(path).exists() for path in paths)
    assert {"table.md", "losses.png"} <= {Path(path).name for path in paths}
    assert (tmp_path / "runs/demo/losses.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in done.err
