"""`benchmarks.tokens_kept`, end to end: with the tokens it was trained with, a run answers as `evaluate` says."""

import json
from pathlib import Path

import pytest

from benchmarks import tokens_kept
from data.documents import Split
from launch import build
from launch.evaluate import evaluate, headline
from launch.opened import open_run


def test_losses_are_those_of_evaluate_and_bytes_follow_the_tokens(run: Path, tmp_path: Path) -> None:
    stem = tmp_path / "kept"
    given = [str(run), "--root", str(run.parent), "--kept", "2", "8", "--output", str(stem)]
    assert tokens_kept.main(given) == 0
    fewer, same = json.loads(stem.with_suffix(".json").read_text())
    assert (fewer["kept"], same["kept"], same["bytes"]) == (2, 8, 4 * fewer["bytes"])

    build.quiet_third_parties()
    opened = open_run(run.name, str(run.parent))
    relations = headline(opened.context)
    found = {result.arm: result for result in evaluate(opened, Split.validation) if not result.is_text}
    for arm in tokens_kept.ARMS:
        losses = [item.loss / item.tokens for item in found[arm].items if item.relation in relations]  # type: ignore[union-attr]
        assert same[arm.name] == pytest.approx(sum(losses) / len(losses), rel=1e-6), arm
    assert fewer["memory"] != same["memory"]
    assert fewer["none"] == same["none"]

    page = stem.with_suffix(".md").read_text()
    assert f"`python -m benchmarks.tokens_kept {' '.join(given)}` at commit " in page
    assert "| 8 | 2,048 |" in page
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
