"""`benchmarks.reference`, end to end: both arms of two seeds, and one table."""

import json
from pathlib import Path

import pytest

from benchmarks import reference


@pytest.mark.slow
def test_both_arms_of_every_seed_stand_in_one_table(tmp_path: Path) -> None:
    stem, root = tmp_path / "reference", tmp_path / "runs"
    settings = ["debug=smoke", "data.vocab_size=1024", f"paths.root={root}", "logging.progress=false"]
    given = ["--seeds", "0", "1", "--output", str(stem), *settings]
    assert reference.main(given) == 0
    results = json.loads(stem.with_suffix(".json").read_text())
    assert [found["seed"] for found in results] == [0, 1]
    page = stem.with_suffix(".md").read_text()
    assert f"`python -m benchmarks.reference {' '.join(given)}` at commit " in page
    for row in ("| M     | memory ", "| C     | no memory ", "| C     | RAG "):
        assert row in page
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in root.iterdir()} > {
        f"reference-seed{seed}{arm}" for seed in (0, 1) for arm in ("", "-control")
    }
