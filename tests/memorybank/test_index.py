from pathlib import Path

import numpy as np
import pytest

from memorybank.index import Blocks, ExactIndex, IdSet, search_spans


def unit(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    vectors = rng.standard_normal((n, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_finds_the_largest_inner_products_under_the_given_ids() -> None:
    rng = np.random.default_rng(0)
    vectors, ids = unit(rng, 300, 16), rng.permutation(10_000)[:300]
    index = ExactIndex(16)
    index.add(ids[:200], vectors[:200])
    index.add(ids[200:], vectors[200:])
    queries = unit(rng, 40, 16)
    scores, found = index.search(queries, 5)
    expected = np.argsort(-queries @ vectors.T, axis=1)[:, :5]
    assert (found == ids[expected]).all()
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, expected, 1), atol=1e-6)
    assert len(index) == 300


def test_equals_the_flat_index_of_faiss() -> None:
    import faiss

    rng = np.random.default_rng(1)
    vectors, queries = unit(rng, 2000, 64), unit(rng, 70, 64)
    flat, ours = faiss.IndexFlatIP(64), ExactIndex(64)
    flat.add(vectors)
    ours.add(np.arange(2000), vectors)
    expected, found = flat.search(queries, 20), ours.search(queries, 20)
    assert (found[1] == expected[1]).all()
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


def test_fewer_references_than_asked_for() -> None:
    index = ExactIndex(4)
    scores, found = index.search(np.ones((1, 4), np.float32), 3)
    assert found.tolist() == [[-1, -1, -1]]
    index.add(np.array([8]), np.ones((1, 4), np.float32))
    scores, found = index.search(np.ones((1, 4), np.float32), 3)
    assert found.tolist() == [[8, -1, -1]]
    assert scores[0, 0] == 4
    assert np.isneginf(scores[0, 1:]).all()


def test_equal_scores_are_ordered_by_id() -> None:
    index = ExactIndex(4)
    index.add(np.array([9, 3, 7]), np.ones((3, 4), np.float32))
    assert index.search(np.ones((2, 4), np.float32), 3)[1].tolist() == [[3, 7, 9]] * 2


def test_vectors_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="another embedder"):
        ExactIndex(4).add(np.array([0]), np.ones((1, 5), np.float32))


def test_blocks_are_searched_in_spans_as_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors, ids = unit(rng, 300, 16), np.cumsum(rng.integers(1, 9, 300))
    vectors[250:] = vectors[:50]  # equal scores, apart
    vectors.tofile(tmp_path / "vectors.bin")
    mapped = np.memmap(tmp_path / "vectors.bin", np.float32, "r").reshape(300, 16)
    blocks = Blocks([(ids[:7], mapped[:7]), (ids[7:200], mapped[7:200]), (ids[200:], mapped[200:])])
    index = ExactIndex(16)
    index.add(ids, vectors)
    queries = unit(rng, 40, 16)
    expected = index.search(queries, 300)
    for rows in (1, 64, 1000):
        scores, found = search_spans(blocks.spans(rows=rows), queries, 300)
        np.testing.assert_allclose(scores, expected[0], atol=1e-6)
        assert (np.sort(found) == ids).all()
    assert max(len(span) for span, _ in blocks.spans(5, 290, rows=64)) == 64
    assert np.concatenate([span for span, _ in blocks.spans(5, 290, rows=64)]).tolist() == ids[5:290].tolist()
    removed = IdSet(int(ids[-1]) + 1)
    removed.add(ids[::3])
    found = search_spans(blocks.spans(), queries, 100, removed=removed)[1]
    assert not np.isin(found, ids[::3]).any()
    assert (found >= 0).all()


def test_blocks_give_vectors_by_id() -> None:
    vectors = unit(np.random.default_rng(0), 20, 4).astype(np.float16)
    blocks = Blocks([(np.arange(10), vectors[:10]), (np.arange(50, 60), vectors[10:])])
    wanted = np.array([55, 3, 59, 3, 0])
    assert (blocks.of(wanted) == vectors[[15, 3, 19, 3, 0]].astype(np.float32)).all()
    assert blocks.has(np.array([-1, 9, 10, 49, 50, 60])).tolist() == [False, True, False, False, True, False]
    assert [blocks.begin_after(id) for id in (-1, 4, 9, 30, 50, 59)] == [0, 5, 10, 10, 11, 20]
    with pytest.raises(ValueError, match=r"2 of 3 ids have no search vector \(first: 10\)"):
        blocks.of(np.array([9, 10, 49]))
