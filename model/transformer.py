"""The language model with explicit memory.

``Memory3LM`` owns the prefix and all positions: prefix at 0..p-1, every reference at p..p+R-1, a row always
from p + reference_tokens on, memory or not. The first ``num_memory_layers`` blocks write and read memories;
all blocks read the prefix, which goes through them once per forward pass, with gradient, beside all rows; references
that are encoded have read it by itself.
The model does not know where memories come from: references encoded inside the forward pass and the
same references encoded before give the same bits.

Not here: which references a chunk reads (``memorybank``), decoding (``model/generate.py``).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from model.attention import (
    AttentionFunction,
    AttentionShares,
    MemoryKeys,
    PrefixKeys,
    attention_shares,
    fast_attention,
)
from model.config import ModelConfig
from model.init import initialise
from model.layers import FeedForward, RMSNorm
from model.loss import LossSum, chunked_next_token_loss, token_losses
from model.memory import ExplicitMemory, MemoryBatch, Places, ReferenceBatch, select_tokens
from model.rope import Rotation, rotate, rotation

KEPT = 0.8
"""Of what a compiled block would keep for its backward pass, the share that it may. What goes is computed again:
norms and gates, no products. A token's 11 widths become 8."""


VARIANTS = 32
"""How often a block may be compiled: prefix and rows, with memory and without, with gradient and without, sizes."""


class Block(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.qkv = nn.Linear(config.width, heads * config.head_size, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_size, config.width, bias=False)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = FeedForward(config.width, config.ffn_width)

    def forward(
        self,
        hidden_BTD: Tensor,
        turn: Rotation,
        *,
        attention: AttentionFunction,
        prefix: PrefixKeys | None = None,
        memory: MemoryKeys | None = None,
        documents_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next hidden states, and the keys (rotated) and values that were attended to."""
        q, k, v = self.project(hidden_BTD)
        q, k = rotate(q, turn), rotate(k, turn)
        attended = attention(q, k, v, prefix=prefix, memory=memory, documents_BT=documents_BT)
        return self.finish(hidden_BTD, attended), k, v

    def write(
        self,
        hidden_BTD: Tensor,
        turn: Rotation,
        token_NR: Tensor | None,
        lengths_N: Tensor,
        titles_N: Tensor | None,
        *,
        attention: AttentionFunction,
        prefix: PrefixKeys | None,
        last: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the rows' next hidden states (unchanged if `last`) and k, v, index of the references' memory.

        Tokens attend from their places in the row; a key that is kept is turned once, to its place in the
        reference.

        Args:
            hidden_BTD: Hidden states of rows: a reference each, or several.
            turn: Of the row's positions, which begin with those of a reference.
            token_NR: Where the references' tokens stand in the flattened rows; None = a row is a reference.
            lengths_N: Tokens of each reference.
            titles_N: Leading tokens of a reference that may not be kept; None = all may.
            attention: Computes the attention.
            prefix: Read by all tokens.
            last: Whether no layer follows that writes memories.
        """
        q, k, v = self.project(hidden_BTD)
        # Always over as many tokens: sums over fewer would be rounded otherwise, and could keep another token.
        beyond = (0, 0, 0, 0, 0, self.config.reference_tokens - q.shape[1])
        index_NGS = select_tokens(
            pad(q, beyond) if token_NR is None else q.flatten(0, 1)[token_NR],
            pad(k, beyond) if token_NR is None else k.flatten(0, 1)[token_NR],
            lengths_N,
            tokens_kept=self.config.tokens_kept,
            selection=self.config.selection,
            titles_N=titles_N,
        )
        if not last:
            attended = attention(rotate(q, turn), rotate(k, turn), v, prefix=prefix)
            hidden_BTD = self.finish(hidden_BTD, attended)
        place_NGS = index_NGS.clamp(min=0)
        to_place = Rotation(turn.cos.squeeze(-2)[place_NGS], turn.sin.squeeze(-2)[place_NGS])
        kept_k, kept_v = (_kept(x, token_NR, place_NGS) for x in (k, v))
        return hidden_BTD, rotate(kept_k, to_place), kept_v, index_NGS

    def project(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, T, heads, E), not rotated."""
        heads = self.qkv(self.attention_norm(hidden_BTD)).unflatten(-1, (-1, self.config.head_size))
        kv_heads = self.config.num_kv_heads
        return heads.split([self.config.num_heads, kv_heads, kv_heads], dim=2)  # type: ignore[no-any-return]

    def finish(self, hidden_BTD: Tensor, attended_BTHE: Tensor) -> Tensor:
        """Return the hidden states after what was attended to and the feed-forward network are added."""
        hidden_BTD = hidden_BTD + self.out(attended_BTHE.flatten(2))
        return hidden_BTD + self.ffn(self.ffn_norm(hidden_BTD))  # type: ignore[no-any-return]


class OutputHead(nn.Linear):
    """The projection to the vocabulary, which in training never leaves as logits."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)

    def forward(  # type: ignore[override]
        self, hidden_BTD: Tensor, targets_BT: Tensor | None = None, per_token: bool = False
    ) -> Tensor | LossSum:
        if targets_BT is None:
            return super().forward(hidden_BTD)
        if per_token:
            return token_losses(hidden_BTD, self.weight, targets_BT)
        return chunked_next_token_loss(hidden_BTD, self.weight, targets_BT)


@dataclass(frozen=True, slots=True)
class WithPrefix:
    """Attention of rows and of the prefix behind them, which go through a block as one line of tokens, (1, B*T + P).

    A few more tokens cost a matrix product nothing; by itself, so short a text takes as many calls as all rows.

    Attributes:
        attention: Of rows, and of the prefix.
        rows: B.
        tokens: T.
    """

    attention: AttentionFunction
    rows: int
    tokens: int

    def __call__(
        self,
        q_BTHE: Tensor,
        k_BTGE: Tensor,
        v_BTGE: Tensor,
        *,
        prefix: PrefixKeys | None = None,
        memory: MemoryKeys | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Attend from all of them, in one line: the rows read the prefix, and the prefix reads itself."""
        assert prefix is None
        count = self.rows * self.tokens
        (q, q_1PHE), (k, k_1PGE), (v, v_1PGE) = (
            torch.split(x, [count, x.shape[1] - count], dim=1) for x in (q_BTHE, k_BTGE, v_BTGE)
        )
        read = self.attention(
            *(x.view(self.rows, self.tokens, *x.shape[2:]) for x in (q, k, v)),
            prefix=PrefixKeys(k_1PGE[0], v_1PGE[0]),
            memory=memory,
            documents_BT=documents_BT,
        )
        return torch.cat([read.reshape_as(q), self.attention(q_1PHE, k_1PGE, v_1PGE)], dim=1)


class Memory3LM(nn.Module):
    """A causal language model that reads explicit memories (paper section 3)."""

    def __init__(self, config: ModelConfig, attention: AttentionFunction = fast_attention) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.attention = attention
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = OutputHead(config.width, config.vocab_size)
        self.register_buffer(
            "prefix_1P", torch.tensor([config.prefix_ids], dtype=torch.int64), persistent=False
        )
        initialise(self, config)
        self._write = torch.compile(Block.write) if config.compile else Block.write
        if config.compile:
            torch._functorch.config.activation_memory_budget = KEPT
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
            for block in self.blocks:
                block.compile()

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        targets_BT: Tensor | None = None,
        memory: MemoryBatch | ReferenceBatch | None = None,
        documents_BT: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor | LossSum:
        """Predict the next token everywhere.

        Args:
            tokens_BT: Token ids; any T up to what memory holds, also one that ends within a chunk.
            targets_BT: Next tokens, ``IGNORE`` where no loss is wanted.
            memory: What each chunk reads (C = ceil(T / Q)); None = all slots empty.
            documents_BT: Document of every token: attention then stays inside a document (a dense mask).
            per_token: Return each target's loss instead of their sum; without gradient.

        Returns:
            Without targets ``logits_BTV``; with targets a ``LossSum``, or ``nll_BT`` if `per_token`.
        """
        hidden_BTD = self._rows(tokens_BT, memory, documents_BT, self.attention)
        return self.head(self.norm(hidden_BTD), targets_BT, per_token)  # type: ignore[no-any-return]

    def encode(
        self,
        tokens_NR: Tensor,
        lengths_N: Tensor,
        titles_N: Tensor | None = None,
        places: Places | None = None,
    ) -> ExplicitMemory:
        """Return the memories of references, each read alone after the prefix (paper section 3.1).

        With `places`, documents are encoded first and then split (paper section 8): rows hold a title line and
        several of its references, all of which are read with what stands before them in sight; each keeps
        tokens of its own and of the title line, at their places in the reference. A row of one reference
        gives the same as that reference alone.

        Runs the memory layers only, and of the last one no more than its queries, keys and values.

        Args:
            tokens_NR: Token ids, R <= reference_tokens; padding beyond a length is inert. With `places`,
                rows of any length.
            lengths_N: Tokens of each reference; of one shorter than tokens_kept fewer are kept.
            titles_N: Tokens of each title line, needed when `select_title` is off, and with `places`.
            places: Where the references stand in the rows; None = a row is a reference.
        """
        prefix = self.encode_prefix(self.config.num_memory_layers)
        return self._encode(tokens_NR, lengths_N, titles_N, prefix, places)

    def encode_prefix(self, num_layers: int) -> list[PrefixKeys | None]:
        """Return the prefix's keys and values at the first `num_layers` layers; without a prefix, None."""
        if not self.config.prefix_ids:
            return [None] * num_layers
        hidden = self.embedding(self.prefix_1P)
        turn = self.rotation(0, self.config.num_prefix)
        keys: list[PrefixKeys | None] = []
        for block in self.blocks[:num_layers]:
            hidden, k, v = block(hidden, turn, attention=self.attention)
            keys.append(PrefixKeys(k[0], v[0]))
        return keys

    @torch.no_grad()
    def attention_shares(
        self, tokens_BT: Tensor, memory: MemoryBatch | ReferenceBatch | None
    ) -> AttentionShares:
        """Return where attention goes at the memory layers: ``AttentionShares`` with L in front.

        Dense: for a few rows.
        """
        shares: list[AttentionShares] = []

        def recording(q_BTHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor, **reads: Any) -> Tensor:
            if (
                "memory" in reads and len(shares) < self.config.num_memory_layers
            ):  # else it is the prefix's own
                shares.append(
                    attention_shares(q_BTHE, k_BTGE, prefix=reads["prefix"], memory=reads["memory"])
                )
            return self.attention(q_BTHE, k_BTGE, v_BTGE, **reads)

        with torch.compiler.set_stance("force_eager"):  # who looks on is another function at every layer
            self._rows(tokens_BT, memory, None, recording)
        return AttentionShares(*(torch.stack(part) for part in zip(*shares, strict=True)))

    def rotation(self, start: int, tokens: int) -> Rotation:
        """Return the turns of `tokens` positions from `start` on."""
        weight = self.embedding.weight
        positions = torch.arange(start, start + tokens, device=weight.device)
        return rotation(
            positions, head_size=self.config.head_size, base=self.config.rope_base, dtype=weight.dtype
        )

    def memory_keys(
        self, memory: MemoryBatch | ReferenceBatch | None, tokens: int
    ) -> list[MemoryKeys | None]:
        """Return what rows read at every layer; None at layers without memory."""
        nothing: list[MemoryKeys | None] = [None] * self.config.num_layers
        if memory is None or not self.config.num_memory_layers:
            return nothing
        chunks = -(-tokens // self.config.chunk_tokens)
        if memory.slots_BCK.shape[1] != chunks:
            raise ValueError(
                f"slots_BCK is for {memory.slots_BCK.shape[1]} chunks, but {tokens} tokens make {chunks} of "
                f"model.chunk_tokens={self.config.chunk_tokens}: give each its slots, -1 for empty ones"
            )
        if isinstance(memory, ReferenceBatch):
            pool = self.encode(memory.tokens_NR, memory.lengths_N, memory.titles_N)
        else:
            pool = memory.pool
        dtype = self.embedding.weight.dtype
        kept_NLGS = pool.index_NLGS >= 0
        reads = [
            MemoryKeys(k.to(dtype), v.to(dtype), kept, memory.slots_BCK, self.config.chunk_tokens)
            for k, v, kept in zip(
                pool.k_NLGSE.unbind(1), pool.v_NLGSE.unbind(1), kept_NLGS.unbind(1), strict=True
            )
        ]
        return reads + nothing[len(reads) :]

    def _rows(
        self,
        tokens_BT: Tensor,
        memory: MemoryBatch | ReferenceBatch | None,
        documents_BT: Tensor | None,
        attention: AttentionFunction,
    ) -> Tensor:
        """Return the hidden states of rows after the last block."""
        B, T = tokens_BT.shape
        reads = self.memory_keys(memory, T)
        hidden = self.embedding(tokens_BT)
        turn = self.rotation(self.config.context_start, T)
        if self.config.prefix_ids:
            hidden = torch.cat([hidden.view(1, B * T, -1), self.embedding(self.prefix_1P)], dim=1)
            alone = self.rotation(0, self.config.num_prefix)
            turn = Rotation(
                *(torch.cat([rows.repeat(B, 1, 1), own]) for rows, own in zip(turn, alone, strict=True))
            )
            attention = WithPrefix(attention, rows=B, tokens=T)
        for block, read in zip(self.blocks, reads, strict=True):
            hidden, _, _ = self._run(
                block, hidden, turn, attention=attention, memory=read, documents_BT=documents_BT
            )
        if self.config.prefix_ids:
            hidden = torch.split(hidden, [B * T, self.config.num_prefix], dim=1)[0].view(B, T, -1)
        return hidden  # type: ignore[no-any-return]

    def _encode(
        self,
        tokens_BT: Tensor,
        lengths_N: Tensor,
        titles_N: Tensor | None,
        prefix: list[PrefixKeys | None],
        places: Places | None = None,
    ) -> ExplicitMemory:
        config = self.config
        longest = tokens_BT.shape[1] if places is None else int(lengths_N.max())
        if longest > config.reference_tokens:
            raise ValueError(
                f"a reference of {longest} tokens does not fit into "
                f"model.reference_tokens={config.reference_tokens}: cut references to that length"
            )
        if titles_N is None and not config.select_title:
            raise ValueError(
                "model.select_title=false needs titles_N: give the title tokens of each reference"
            )
        token_NR = None
        if places is not None:
            assert titles_N is not None
            token_NR = places.tokens(
                titles_N, row_tokens=tokens_BT.shape[1], reference_tokens=config.reference_tokens
            )
        hidden_BTD = self.embedding(tokens_BT)
        turn = self.rotation(config.num_prefix, tokens_BT.shape[1])
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer in range(config.num_memory_layers):
            hidden_BTD, k, v, index = self._run(
                self._write,
                self.blocks[layer],
                hidden_BTD,
                turn,
                token_NR,
                lengths_N,
                None if config.select_title else titles_N,
                attention=self.attention,
                prefix=prefix[layer],
                last=layer + 1 == config.num_memory_layers,
            )
            kept.append((k, v, index))
        k_NLGSE, v_NLGSE, index_NLGS = (torch.stack(part, dim=1) for part in zip(*kept, strict=True))
        return ExplicitMemory(k_NLGSE, v_NLGSE, index_NLGS)

    def _run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        return function(*args, **kwargs)


def _kept(x_BTGE: Tensor, token_NR: Tensor | None, place_NGS: Tensor) -> Tensor:
    """Return what stands at some places of each reference, for each head, (N, G, S, E)."""
    N, G, _ = place_NGS.shape
    if token_NR is None:
        token_NGS = torch.arange(N, device=place_NGS.device)[:, None, None] * x_BTGE.shape[1] + place_NGS
    else:
        token_NGS = token_NR.gather(1, place_NGS.flatten(1)).view_as(place_NGS)
    rows = token_NGS * G + torch.arange(G, device=place_NGS.device)[:, None]
    kept = x_BTGE.flatten(0, 2).index_select(0, rows.flatten())
    return kept.view(*place_NGS.shape, x_BTGE.shape[-1])
