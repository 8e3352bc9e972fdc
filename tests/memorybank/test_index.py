import numpy as np
import pytest

from memorybank.index import ExactIndex


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
