"""`benchmarks.codecs`, end to end: one codec that loses nothing, one that rounds, one that is fitted."""

import json
from pathlib import Path

import pytest

from benchmarks import codecs
from memorybank import quantizer
from tests.support.memorybank import few_rounds


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "_OPQ_VECTORS", 1 << 11)
    monkeypatch.setattr(codecs, "SECONDS", 0.01)


def test_what_is_exact_loses_nothing_and_what_is_fitted_says_on_what(run: Path, tmp_path: Path) -> None:
    stem = tmp_path / "codecs"
    given = [str(run), "--root", str(run.parent), "--kinds", "model", "int4", "pq16x8"]
    with few_rounds():
        assert codecs.main([*given, "--output", str(stem)]) == 0
    stored = json.loads(stem.with_suffix(".json").read_text())
    exact, rounded, fitted = stored["codecs"]
    for loss in ("text", "probes"):
        assert exact[loss]["mean"] == 0 != rounded[loss]["mean"]
        assert fitted[loss]["mean"] not in (0, rounded[loss]["mean"])
    for part in ("error_keys", "error_values"):
        assert exact[part] == [0, 0]
        assert all(0 < error < 0.1 for codec in (rounded, fitted) for error in codec[part])
    assert exact["memory_bytes"] > rounded["memory_bytes"] > fitted["memory_bytes"]
    assert fitted["fitted_vectors"] > 1000 > exact["fitted_vectors"] == 0
    assert stored["loss"] != stored["loss_without_memory"]
    page = stem.with_suffix(".md").read_text()
    assert page.count("| pq16x8 | ") == 2
    assert "head size 80" not in page


def test_the_papers_codec_is_timed_in_torch_and_in_faiss() -> None:
    speeds = codecs.paper_speeds(4)
    assert {*speeds} == {f"{way}, {by}" for way in ("encode", "decode") for by in ("torch", "faiss")}
    assert all(speed > 0 for speed in speeds.values())
    assert "CPU-hours to encode with faiss" in codecs._render_speeds(speeds)
