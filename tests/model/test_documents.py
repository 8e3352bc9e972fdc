"""Encode first, then split: references at their places in documents."""

import pytest
import torch
from torch import Tensor

from model.attention import PrefixKeys, fast_attention
from model.memory import ExplicitMemory, Places
from model.rope import rotate
from model.transformer import Memory3LM
from tests.support.model import random_tokens, tiny_model

TITLE, TEXT = (
    3,
    (9, 5, 8, 9),
)  # a title line and four references' own tokens; they have 12, 8, 11 and 12 tokens
BEGINS = [TITLE + sum(TEXT[:number]) for number in range(len(TEXT))]
LENGTHS = torch.tensor([TITLE + own for own in TEXT])
TITLES = torch.full((len(TEXT),), TITLE)
PLACES = Places(torch.zeros(len(TEXT), dtype=torch.int64), torch.tensor(BEGINS))


def document(seed: int = 0) -> Tensor:
    return random_tokens(1, TITLE + sum(TEXT), seed=seed)


def split(model: Memory3LM, tokens: Tensor) -> ExplicitMemory:
    with torch.no_grad():
        return model.encode(tokens, LENGTHS, TITLES, PLACES)


def rows_of(memory: ExplicitMemory, rows: slice) -> list[Tensor]:
    return [part[rows] for part in (memory.k_NLGSE, memory.v_NLGSE, memory.index_NLGS)]


@pytest.mark.parametrize("select_title", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_documents_of_one_reference_equal_the_references_bitwise(
    dtype: torch.dtype, select_title: bool
) -> None:
    model = tiny_model(dtype=dtype, select_title=select_title)
    tokens, lengths, titles = random_tokens(4, 12), torch.tensor([12, 2, 7, 12]), torch.tensor([3, 0, 6, 0])
    alone = model.encode(tokens, lengths, titles)
    placed = model.encode(tokens, lengths, titles, Places(torch.arange(4), titles))
    for one, other in zip(rows_of(alone, slice(None)), rows_of(placed, slice(None)), strict=True):
        assert torch.equal(one, other)


def test_the_first_reference_is_that_of_plain_mode_and_later_ones_see_what_stands_before_them() -> None:
    model = tiny_model()
    tokens = document()
    plain = torch.cat([tokens[:, :TITLE], tokens[:, BEGINS[3] : BEGINS[3] + TEXT[3]]], dim=1)
    alone = model.encode(torch.cat([tokens[:, :12], plain]), LENGTHS[[0, 3]], TITLES[[0, 3]])
    placed = split(model, tokens)
    for one, other in zip(rows_of(alone, slice(0, 1)), rows_of(placed, slice(0, 1)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # the first layer sees no context yet: same tokens kept, same keys, though they stood elsewhere in the row
    torch.testing.assert_close(alone.k_NLGSE[1, 0], placed.k_NLGSE[3, 0], rtol=1e-12, atol=1e-12)
    assert torch.equal(alone.index_NLGS[1, 0], placed.index_NLGS[3, 0])
    # the second one does
    assert not torch.allclose(alone.k_NLGSE[1, 1], placed.k_NLGSE[3, 1])


def test_keys_are_rotated_once_to_their_place_in_the_reference() -> None:
    model = tiny_model()
    tokens = document()
    memory = split(model, tokens)
    hidden = model.embedding(tokens)
    turn = model.rotation(3, tokens.shape[1])
    for layer, prefix in enumerate(model.encode_prefix(2)):
        assert isinstance(prefix, PrefixKeys)
        q, k, v = model.blocks[layer].project(hidden)
        for number, (begin, own) in enumerate(zip(BEGINS, TEXT, strict=True)):
            at = torch.cat([torch.arange(TITLE), torch.arange(begin, begin + own)])
            by_hand = rotate(k[:, at], model.rotation(3, len(at)))[
                0
            ]  # p..p+len-1, whatever the place in the row
            for head in range(2):
                kept = memory.index_NLGS[number, layer, head]
                torch.testing.assert_close(memory.k_NLGSE[number, layer, head], by_hand[kept, head])
                torch.testing.assert_close(memory.v_NLGSE[number, layer, head], v[0, at][kept, head])
        hidden = model.blocks[layer].finish(
            hidden, fast_attention(rotate(q, turn), rotate(k, turn), v, prefix=prefix)
        )


def test_later_text_changes_no_earlier_reference() -> None:
    model = tiny_model()
    tokens, changed = document(), document()
    changed[:, BEGINS[3] :] = random_tokens(1, TEXT[3], seed=9)
    before, after = split(model, tokens), split(model, changed)
    for one, other in zip(rows_of(before, slice(0, 3)), rows_of(after, slice(0, 3)), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(before.k_NLGSE[3], after.k_NLGSE[3])
    changed = document()
    changed[:, BEGINS[0]] = 5
    assert not torch.allclose(before.v_NLGSE[3, 1], split(model, changed).v_NLGSE[3, 1])


def test_padding_and_neighbouring_rows_are_inert() -> None:
    model = tiny_model()
    alone = split(model, document())
    tokens = torch.cat([random_tokens(1, 50, seed=5), torch.nn.functional.pad(document(), (0, 16))])
    places = Places(torch.tensor([1, 0, 1, 1, 1]), torch.tensor([BEGINS[0], 3, *BEGINS[1:]]))
    lengths = torch.tensor([12, 6, *LENGTHS[1:]])
    both = model.encode(tokens, lengths, torch.full((5,), TITLE), places)
    ours = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close(both.k_NLGSE[ours], alone.k_NLGSE, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both.v_NLGSE[ours], alone.v_NLGSE, rtol=1e-12, atol=1e-12)
    assert torch.equal(both.index_NLGS[ours], alone.index_NLGS)
    assert (both.index_NLGS < lengths[:, None, None, None]).all()


def test_a_reference_beyond_the_shared_span_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.reference_tokens=12"):
        tiny_model().encode(document(), LENGTHS + 1, TITLES, PLACES)
