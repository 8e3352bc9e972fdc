import pytest
import torch
from torch import Tensor

from model.config import Selection
from model.memory import select_tokens


def queries_and_keys(references: int = 3, tokens: int = 10) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(references, tokens, 4, 6), torch.randn(references, tokens, 2, 6)


def plainly(
    q_RHE: Tensor, k_RGE: Tensor, take_part: list[int], kept: int, selection: Selection
) -> list[list[int]]:
    """The definition, token by token (paper section 3.1)."""
    chosen = []
    for head in range(k_RGE.shape[1]):
        importance = {}
        for receiving in take_part:
            importance[receiving] = 0.0
            for giving in take_part:
                for query_head in (2 * head, 2 * head + 1):
                    q = q_RHE[giving, query_head]
                    scores = torch.stack([q @ k_RGE[j, head] / 6**0.5 for j in take_part])
                    weights = scores.softmax(0) if selection is Selection.softmax else scores.exp()
                    importance[receiving] += weights[take_part.index(receiving)].item()
        best = sorted(take_part, key=lambda token: -importance[token])[:kept]
        chosen.append(sorted(best) + [-1] * (kept - len(best)))
    return chosen


@pytest.mark.parametrize("selection", Selection)
@pytest.mark.parametrize("with_titles", [False, True])
def test_selection_equals_its_plain_definition(selection: Selection, with_titles: bool) -> None:
    q, k = queries_and_keys()
    lengths, titles = [10, 3, 6], [2, 2, 1]
    index = select_tokens(
        q,
        k,
        torch.tensor(lengths),
        tokens_kept=4,
        selection=selection,
        titles_N=torch.tensor(titles) if with_titles else None,
    )
    for reference, (length, title) in enumerate(zip(lengths, titles, strict=True)):
        take_part = list(range(title if with_titles else 0, length))
        assert index[reference].tolist() == plainly(q[reference], k[reference], take_part, 4, selection)


def test_padding_neither_gives_nor_receives() -> None:
    q, k = queries_and_keys()
    lengths = torch.tensor([10, 4, 6])
    index = select_tokens(q, k, lengths, tokens_kept=3, selection=Selection.softmax)
    for reference, length in enumerate(lengths.tolist()):
        q[reference, length:] = -1e6
        k[reference, length:] = 1e6
    assert torch.equal(select_tokens(q, k, lengths, tokens_kept=3, selection=Selection.softmax), index)


def test_a_reference_without_tokens_keeps_none() -> None:
    q, k = queries_and_keys()
    index = select_tokens(q, k, torch.tensor([0, 1, 2]), tokens_kept=3, selection=Selection.softmax)
    assert (index[0] == -1).all()
    assert (index[1] == torch.tensor([0, -1, -1])).all()


def test_more_may_be_kept_than_the_batch_is_wide() -> None:
    q, k = queries_and_keys(tokens=2)
    index = select_tokens(q, k, torch.tensor([2, 2, 1]), tokens_kept=5, selection=Selection.exp)
    assert index.shape == (3, 2, 5)
    assert index[0, 0].tolist() == [0, 1, -1, -1, -1]
