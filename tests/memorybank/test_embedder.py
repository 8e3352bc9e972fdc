import importlib.util
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from memorybank.config import EmbedderConfig, EmbedderKind
from memorybank.embedder import FolderEmbedder, StaticEmbedder, VectorCache, build

CAPITAL, ALSO_CAPITAL, COFFEE = (
    "The capital of France is Paris.",
    "Paris is the French capital city",
    "Coffee exports rose",
)


@pytest.fixture(scope="module")
def static() -> StaticEmbedder:
    return StaticEmbedder()


def test_static_vectors_are_unit_and_similar_texts_are_near(static: StaticEmbedder) -> None:
    vectors = static.embed([CAPITAL, ALSO_CAPITAL, COFFEE])
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, static.size)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.8 > vectors[0] @ vectors[2]


def test_blank_texts_have_no_direction(static: StaticEmbedder) -> None:
    assert not static.embed(["", " \n"]).any()
    assert static.embed([]).shape == (0, static.size)


def test_a_text_s_vector_does_not_depend_on_its_company(static: StaticEmbedder) -> None:
    together = static.embed([COFFEE, CAPITAL])
    assert (static.embed([CAPITAL]) == together[1]).all()


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps wordllama"):
        StaticEmbedder()


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = EmbedderConfig(kind=EmbedderKind.folder, path=str(tmp_path))
    with pytest.raises(ValueError, match=r"no modules\.json"):
        build(config)
    modules = [{"type": f"sentence_transformers.models.{name}", "path": ""} for name in ("Pooling", "Dense")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="Dense"):
        build(config)


@pytest.mark.slow
def test_minilm_knows_more_than_words() -> None:
    minilm = build(EmbedderConfig(batch_size=2))
    vectors = minilm.embed([CAPITAL, ALSO_CAPITAL, COFFEE, "", "What is the main city of the French?"])
    assert isinstance(minilm, FolderEmbedder)
    assert vectors.shape == (5, 384)
    assert not vectors[3].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[[0, 1, 2, 4]], axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[4] > 0.5 > vectors[2] @ vectors[4]
    assert minilm.embed([]).shape == (0, 384)
    assert minilm.name == build(EmbedderConfig()).name


class Recorder:
    """The static embedder, writing down what it was asked for; stops after `fails_after` calls."""

    def __init__(self, embedder: StaticEmbedder, fails_after: int = 1000) -> None:
        self.name, self.size = embedder.name, embedder.size
        self.asked: list[list[str]] = []
        self._embedder, self._fails_after = embedder, fails_after

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        if len(self.asked) == self._fails_after:
            raise KeyboardInterrupt
        self.asked.append(list(texts))
        return self._embedder.embed(texts)


def test_cache_embeds_only_what_is_new(static: StaticEmbedder, tmp_path: Path) -> None:
    recorder = Recorder(static)
    first = VectorCache(tmp_path, recorder).vectors([CAPITAL, COFFEE, CAPITAL])
    again = VectorCache(tmp_path, recorder).vectors([COFFEE, ALSO_CAPITAL])
    assert [sorted(call) for call in recorder.asked] == [sorted([CAPITAL, COFFEE]), [ALSO_CAPITAL]]
    assert (first[0] == first[2]).all()
    assert (first[1] == again[0]).all()
    assert (again == static.embed([COFFEE, ALSO_CAPITAL])).all()
    assert VectorCache(tmp_path, recorder).vectors([]).shape == (0, static.size)


def test_embed_reads_what_is_kept_and_keeps_nothing(static: StaticEmbedder, tmp_path: Path) -> None:
    VectorCache(tmp_path, static).vectors([CAPITAL])
    recorder = Recorder(static)
    cache = VectorCache(tmp_path, recorder)
    assert (cache.embed([COFFEE, CAPITAL]) == static.embed([COFFEE, CAPITAL])).all()
    assert recorder.asked == [[COFFEE]]
    assert len(list(tmp_path.rglob("block-*.npz"))) == 1
    assert (cache.name, cache.size) == (static.name, static.size)


def test_an_interrupted_call_goes_on_with_the_same_batches(static: StaticEmbedder, tmp_path: Path) -> None:
    texts = [f"{'very ' * (number % 7)}long text number {number}" for number in range(20)]
    whole, broken, resumed = Recorder(static), Recorder(static, fails_after=2), Recorder(static)
    expected = VectorCache(tmp_path / "a", whole, texts_per_block=6).vectors(texts)
    with pytest.raises(KeyboardInterrupt):
        VectorCache(tmp_path / "b", broken, texts_per_block=6).vectors(texts)
    settled: list[int] = []
    vectors = VectorCache(tmp_path / "b", resumed, texts_per_block=6).vectors(texts, progress=settled.append)
    assert (vectors == expected).all()
    assert broken.asked + resumed.asked == whole.asked
    assert settled == [6, 6, 6, 2]


def test_two_callers_embed_once(static: StaticEmbedder, tmp_path: Path) -> None:
    recorder = Recorder(static)
    caches = [VectorCache(tmp_path, recorder) for _ in range(2)]
    threads = [threading.Thread(target=cache.vectors, args=([CAPITAL, COFFEE],)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder.asked) == 1
    assert (caches[0].vectors([COFFEE]) == caches[1].vectors([COFFEE])).all()


def test_a_damaged_block_is_named(static: StaticEmbedder, tmp_path: Path) -> None:
    VectorCache(tmp_path, static).vectors([CAPITAL])
    (block,) = tmp_path.rglob("block-*.npz")
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 1
    block.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"{block.name} is damaged"):
        VectorCache(tmp_path, static).vectors([CAPITAL])
