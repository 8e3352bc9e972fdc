"""Documents in windows: which references a window gives, and the batches made of them."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from data.references import References
from memorybank.windows import Window, cut_batches, cut_windows
from memorybank.writer import encode_records
from model.transformer import Memory3LM
from tests.support.memorybank import codec, model

WINDOW = 256


@pytest.fixture(scope="module")
def network() -> Memory3LM:
    """Float32, and with attention sharp enough that rounding does not decide which tokens are kept."""
    network = model(torch.float32)
    with torch.no_grad():
        for block in network.blocks:
            block.qkv.weight.mul_(5)
    return network


def test_windows_advance_by_half_and_give_each_reference_where_most_text_stands_before_it() -> None:
    assert cut_windows(np.full(8, 10), 40) == [Window(0, 0, 4), Window(2, 4, 6), Window(4, 6, 8)]
    assert cut_windows(np.full(3, 10), 40) == [Window(0, 0, 3)]
    assert cut_windows(np.array([40]), 40) == [Window(0, 0, 1)]
    assert cut_windows(np.full(5, 15), 40) == [
        Window(0, 0, 2),
        Window(1, 2, 3),
        Window(2, 3, 4),
        Window(3, 4, 5),
    ]
    assert cut_windows(np.array([10, 40, 10]), 40) == [Window(0, 0, 1), Window(1, 1, 2), Window(2, 2, 3)]


@pytest.mark.parametrize("seed", range(20))
def test_any_document_is_given_once_and_whole_from_the_first_window_that_holds_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    room = int(rng.integers(128, 512))
    lengths = rng.integers(1, 129, size=int(rng.integers(1, 60)))
    windows = cut_windows(lengths, room)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    assert [window.taken for window in windows] == [0, *(window.end for window in windows[:-1])]
    assert windows[-1].end == len(lengths)
    for window in windows:
        assert window.begin <= window.taken < window.end
        assert ends[window.end - 1] - begins[window.begin] <= room
    for before, after in pairwise(windows):
        advanced = begins[after.begin] - begins[before.begin]
        assert advanced > 0
        if advanced > room // 2:  # only for the next reference's sake
            assert ends[before.end] - begins[after.begin - 1] > room
        assert ends[before.end] - begins[before.begin] > room  # it could not have given one more


def records(
    network: Memory3LM, passages: References, ids: np.ndarray, window_tokens: int | None = WINDOW
) -> torch.Tensor:
    floats = codec(torch.float32)
    made = encode_records(network.encode, passages, ids, floats, batch=8, window_tokens=window_tokens)
    return floats.decode(made).k_NLGSE


def longest(passages: References) -> np.ndarray:
    numbers, counts = np.unique(passages.document_of, return_counts=True)
    return passages.of_documents(numbers[[counts.argmax()]])


def test_documents_of_one_reference_give_the_records_of_plain_mode(
    network: Memory3LM, passages: References
) -> None:
    numbers, counts = np.unique(passages.document_of, return_counts=True)
    ids = passages.of_documents(numbers[counts == 1])
    assert len(ids) > 1
    plain, in_document = (
        encode_records(network.encode, passages, ids, codec(torch.float32), batch=8, window_tokens=window)
        for window in (None, WINDOW)
    )
    assert torch.equal(plain, in_document)  # keys, values and which tokens they are of


def test_a_window_of_one_reference_is_plain_mode(network: Memory3LM, passages: References) -> None:
    ids = np.arange(3, 40)
    whole = passages.reference_tokens
    sizes = sum(passages.sizes(ids))
    full = ids[sizes > 0.8 * whole]  # two short ones may share a window of 128
    torch.testing.assert_close(
        records(network, passages, full, whole), records(network, passages, full, None), rtol=1e-4, atol=1e-5
    )


def test_a_reference_is_the_same_with_any_others_asked_for(network: Memory3LM, passages: References) -> None:
    ids = longest(passages)
    everything = records(network, passages, ids)
    some = np.array([1, 4, len(ids) - 1])
    torch.testing.assert_close(records(network, passages, ids[some]), everything[some], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(everything[some], records(network, passages, ids[some], None), atol=1e-2)


def test_batches_hold_every_reference_once_and_are_full(passages: References) -> None:
    ids = np.arange(2, 90)
    for window_tokens in (None, WINDOW):
        batches = cut_batches(passages, ids, batch=8, window_tokens=window_tokens)
        assert np.array_equal(
            np.sort(np.concatenate([part.positions_N for part in batches])), np.arange(len(ids))
        )
        shapes = [part.arguments()[0].shape for part in batches]
        assert {shape[0] for shape in shapes} == {8 if window_tokens is None else 4}
        assert all(shape[1] <= (window_tokens or 128) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_width_of_a_batch_changes_no_bit_of_a_record(dtype: torch.dtype, passages: References) -> None:
    network = model(dtype)
    tokens_NR, lengths_N, titles_N = map(torch.from_numpy, passages.tokens(np.arange(len(passages))))
    with torch.no_grad():
        padded = codec(dtype).encode(network.encode(tokens_NR, lengths_N, titles_N))
    bucketed = encode_records(
        network.encode, passages, np.arange(len(passages)), codec(dtype), batch=8, window_tokens=None
    )
    assert torch.equal(bucketed, padded)
    shortest = lengths_N.argmin(0, keepdim=True).numpy()
    assert torch.equal(
        encode_records(network.encode, passages, shortest, codec(dtype), batch=8), padded[shortest]
    )


def test_references_are_encoded_beside_others_of_their_length(passages: References) -> None:
    lengths_N = sum(passages.sizes(np.arange(len(passages))))
    batches = cut_batches(passages, np.arange(len(passages)), batch=8, window_tokens=None)
    widths = [part.arguments()[0].shape[1] for part in batches]
    longest = [int(lengths_N[part.positions_N].max()) for part in batches]
    assert longest == sorted(longest)
    assert widths == [min(128, -(-tokens // 16) * 16) for tokens in longest]
    assert len(set(widths)) > 1


def test_windows_hold_the_title_and_the_text_of_their_references(passages: References) -> None:
    ids = longest(passages)
    tokens, lengths, titles = passages.tokens(ids)
    for part in cut_batches(passages, ids, batch=8, window_tokens=WINDOW):
        rows, sizes, title, places = part.arguments()
        token_NR = places.tokens(title, row_tokens=rows.shape[1], reference_tokens=tokens.shape[1])
        for row, position in enumerate(part.positions_N.tolist()):
            assert sizes[row] == lengths[position]
            assert title[row] == titles[position]
            own = rows.flatten()[token_NR[row, : int(sizes[row])]]
            assert own.tolist() == tokens[position, : lengths[position]].tolist()
