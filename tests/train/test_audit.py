"""`train.audit`: buckets by hand, and gains that add up to those of the evaluation."""

import numpy as np
import pytest
import torch

from memorybank.config import QueryMode
from tests.support.train_evaluate import CHUNK, Encoded, References, model
from train.arms import Arm, Pattern, Reading
from train.audit import audit, bucketed
from train.engine import InferenceEngine
from train.evaluate import Setting, TextSet, evaluate_text

ROWS, CHUNKS = 4, 3
REFERENCES = References(40)


@pytest.fixture(scope="module")
def network():
    return model()


@pytest.fixture(scope="module")
def rows():
    """Rows of tokens that no reference holds, but for their beginnings: parts of references 4, 5, 6 and 7."""
    tokens = torch.randint(0, 3, (ROWS, CHUNKS * CHUNK + 1), generator=torch.Generator().manual_seed(1))
    for row, kept in enumerate((0, 4, 7, 12)):
        tokens[row, :kept] = torch.tensor((REFERENCES.of(row + 4) + REFERENCES.of(20))[:kept])
    return TextSet(tokens, np.zeros(tokens.shape, np.int64), {0: "document"})


def test_buckets_by_hand() -> None:
    references = {0: [1, 2, 3, 4, 5], 1: [1, 2, 9, 9, 9], 2: [9] * 5, 3: [1, 2, 3, 4, 9]}
    rows = np.array([[1, 0, 2, 3, 4, 5], [0, 0, 0, 0, 0, 9]])
    ids = np.array([[[0, 1], [2, -1]], [[2, 3], [3, -1]]])
    # Overlaps: 5/5, 2/5 and 0/5 with the first row; 1/5 with the second.
    assert bucketed(rows, ids, references.__getitem__).tolist() == [[[4, 1], [0, -1]], [[0, 0], [0, -1]]]


def audited(network, rows, read, **changes):
    setting = Setting(label="M", reader=Encoded(network, REFERENCES), batch_rows=3)
    return audit(
        InferenceEngine(network), rows, read, setting, **{"content_tokens": REFERENCES.of, **changes}
    )


def test_gains_of_all_buckets_add_up_to_the_difference_of_the_arms(network, rows) -> None:
    ids = np.full((ROWS, CHUNKS, 2), -1)
    ids[:, 1:, 0] = np.arange(ROWS)[:, None] + 4
    ids[2, 2, 1] = 30
    (found,) = audited(network, rows, [ids])
    none, memory = evaluate_text(
        InferenceEngine(network),
        rows,
        [Reading(Arm.none), Reading(Arm.memory, ids, QueryMode.own, Pattern.inference)],
        Setting(label="M", reader=Encoded(network, REFERENCES)),
    )
    assert found.overall.nats == pytest.approx(none.loss - memory.loss, abs=1e-6)
    assert abs(found.overall.nats) > 1e-3
    parts = [bucket.gain for bucket in found.buckets] + [found.unread]
    assert sum(gain.chunks for gain in parts) == found.overall.chunks == ROWS * CHUNKS
    assert sum(gain.chunks * (gain.nats or 0.0) for gain in parts) == pytest.approx(
        ROWS * CHUNKS * found.overall.nats
    )
    assert (found.slots, found.empty) == (ROWS * CHUNKS * 2, ROWS * CHUNKS * 2 - 9)
    assert sum(bucket.slots for bucket in found.buckets) == 9


def test_a_chunk_counts_where_its_largest_overlap_lies(network, rows) -> None:
    ids = np.full((ROWS, CHUNKS, 2), -1)
    ids[1, 0] = [5, 30]  # row 1 begins with reference 5's first third
    ids[3, 0] = [30, 7]  # row 3 holds reference 7 whole: three letters
    (found,) = audited(network, rows, [ids])
    assert [bucket.gain.chunks for bucket in found.buckets] == [0, 1, 0, 0, 1]
    assert [bucket.slots for bucket in found.buckets][-1] == 1
    assert found.buckets[0].gain.nats is None
    assert found.buckets[1].gain.low is None  # one row: nothing to resample
    assert (found.unread.chunks, found.overall.chunks) == (ROWS * CHUNKS - 2, ROWS * CHUNKS)
    assert found.overall.low is not None


def test_chunks_before_the_first_memory_gain_nothing_and_ways_are_independent(network, rows) -> None:
    late, nothing = (np.full((ROWS, CHUNKS, 1), -1) for _ in range(2))
    late[:, 2] = 30
    read_late, read_nothing = audited(network, rows, [late, nothing])
    assert read_late.unread.chunks == ROWS * 2
    assert read_late.unread.nats == pytest.approx(0, abs=1e-6)
    assert read_nothing.overall.nats == 0
    assert read_nothing.empty == read_nothing.slots
    (alone,) = audited(network, rows, [late])
    assert alone == read_late
