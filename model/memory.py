"""What a reference leaves behind, and which of its tokens it leaves.

An ``ExplicitMemory`` holds, for every memory layer and key/value head, the keys and values of the
few tokens of a reference that the rest of it attends to most. Memories are held once, in a pool, and
read through slots: ``slots_BCK`` names the rows of the pool that a chunk reads, -1 = empty.
Not here: how memories are stored (``memorybank``) and read (``model/attention.py``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import Selection
from model.transfer import sent

SCORES_IN_CACHE = 1 << 18
"""Scores that token selection holds at once on a CPU: 1 MiB in float32, which stays in a core's own cache."""


@dataclass(frozen=True, slots=True, eq=False)
class ExplicitMemory:
    """What N references offer to each memory layer."""

    k_NLGSE: Tensor
    """Keys, rotated once, to their place in the span that all references share."""
    v_NLGSE: Tensor
    """Values."""
    index_NLGS: Tensor
    """Which token of the reference was kept, int64, ascending; -1 = none (a short reference), never read."""

    def to(self, device: torch.device | str) -> "ExplicitMemory":
        """Return the same memory on another device."""
        return ExplicitMemory(
            sent(self.k_NLGSE, device),
            sent(self.v_NLGSE, device),
            sent(self.index_NLGS, device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class MemoryBatch:
    """Memories that were written before, for instance read from the bank; no gradient reaches them."""

    pool: ExplicitMemory
    slots_BCK: Tensor
    """Rows of the pool that a chunk reads, int64; -1 = empty."""

    def to(self, device: torch.device | str) -> "MemoryBatch":
        """Return the same batch on another device."""
        return MemoryBatch(self.pool.to(device), sent(self.slots_BCK, device))


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceBatch:
    """References that the forward pass encodes itself, gradients included."""

    tokens_NR: Tensor
    """Token ids, int64; anything beyond a reference's length is ignored."""
    lengths_N: Tensor
    titles_N: Tensor
    """How many leading tokens are the title line; read only if `select_title` is off."""
    slots_BCK: Tensor
    """Rows of `tokens_NR` that a chunk reads, int64; -1 = empty."""

    def to(self, device: torch.device | str) -> "ReferenceBatch":
        """Return the same batch on another device."""
        return ReferenceBatch(
            sent(self.tokens_NR, device),
            sent(self.lengths_N, device),
            sent(self.titles_N, device),
            sent(self.slots_BCK, device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where references stand in rows that each hold a title line and, behind it, several of its references.

    What a reference then leaves behind was computed with the text before it in the row in sight.
    """

    row_N: Tensor
    """Row of each reference, int64."""
    begin_N: Tensor
    """Where its own text, its title line not counted, begins in the row, int64."""

    def to(self, device: torch.device | str) -> "Places":
        """Return the same places on another device."""
        return Places(sent(self.row_N, device), sent(self.begin_N, device))

    def tokens(self, titles_N: Tensor, *, row_tokens: int, reference_tokens: int) -> Tensor:
        """Return where each token of each reference stands in the flattened rows, (N, R).

        The title line, which opens the row, comes first; beyond a reference's length the places mean nothing.
        """
        place_R = torch.arange(reference_tokens, device=titles_N.device)
        title_N1 = titles_N.unsqueeze(1)
        at_NR = torch.where(place_R < title_N1, place_R, self.begin_N.unsqueeze(1) + place_R - title_N1)
        return self.row_N.unsqueeze(1) * row_tokens + at_NR.clamp(max=row_tokens - 1)


@torch.no_grad()
def select_tokens(
    q_NRHE: Tensor,
    k_NRGE: Tensor,
    lengths_N: Tensor,
    *,
    tokens_kept: int,
    selection: Selection,
    titles_N: Tensor | None = None,
) -> Tensor:
    """Return ``index_NGS``, the tokens each head keeps: ascending, then -1 if the reference is too short.

    A token's importance is the attention it receives from all tokens of its reference, without mask and
    without positions, summed over the query heads of the group (paper section 3.1).

    Args:
        q_NRHE: Queries before rotation.
        k_NRGE: Keys before rotation.
        lengths_N: Tokens of each reference; padding beyond them neither gives nor receives.
        tokens_kept: S.
        selection: How the attention received is measured.
        titles_N: Leading tokens that take no part; None = all take part.
    """
    N, R, H, E = q_NRHE.shape
    G = k_NRGE.shape[2]
    place_R = torch.arange(R, device=q_NRHE.device)
    takes_part_NR = place_R < lengths_N[:, None]
    if titles_N is not None:
        takes_part_NR &= place_R >= titles_N[:, None]
    q_NGRE = (q_NRHE * E**-0.5).view(N, R, G, H // G, E).transpose(1, 2).reshape(N, G, R * (H // G), E)
    k_NGRE = k_NRGE.transpose(1, 2)
    at_a_time = max(1, SCORES_IN_CACHE // (H * R * R)) if q_NRHE.device.type == "cpu" else N
    importance_NGR = torch.cat(
        [
            _attention_received(*some, selection=selection)
            for some in zip(*(x.split(at_a_time) for x in (q_NGRE, k_NGRE, takes_part_NR)), strict=True)
        ]
    )
    importance_NGR.masked_fill_(~takes_part_NR.unsqueeze(1), -torch.inf)
    weight, index = importance_NGR.topk(min(tokens_kept, R), dim=-1)
    index = index.masked_fill(weight == -torch.inf, R).sort(-1).values
    index = index.masked_fill(index == R, -1)
    return torch.nn.functional.pad(index, (0, tokens_kept - index.shape[-1]), value=-1)


def _attention_received(
    q_NGRE: Tensor, k_NGRE: Tensor, takes_part_NR: Tensor, *, selection: Selection
) -> Tensor:
    """Return what each token receives from all that take part, (N, G, R); meaningless where it takes no part.

    `q_NGRE` holds the group's M queries of a token one after the other, R * M in all.
    """
    scores = torch.matmul(q_NGRE, k_NGRE.transpose(2, 3))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    out_NR = torch.zeros_like(takes_part_NR, dtype=scores.dtype)
    out_NR.masked_fill_(~takes_part_NR, torch.finfo(torch.float32).min)
    scores += out_NR[:, None, None, :]
    gives = takes_part_NR.repeat_interleave(q_NGRE.shape[2] // takes_part_NR.shape[1], dim=1)[:, None, None]
    if selection is Selection.exp:
        return scores.masked_fill_(~gives.transpose(2, 3), -torch.inf).logsumexp(2)
    return torch.matmul(gives.to(scores.dtype), scores.softmax(-1)).squeeze(2)
