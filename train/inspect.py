"""A look into one row: what its chunks retrieved, what was kept of it, what attention it got, and whether it helped.

    row --text_queries / generation_queries--> queries --search--> Neighbours --inspect_row--> Inspection

What a reference contributed is measured by **ablation**: the log-likelihood of the tokens that a chunk predicts, less
the same with that one slot emptied and everything else as it was. What all memory contributed is the same difference
to a row that reads none. The parts need not add up to the whole: references can say the same thing.

Invariants: a chunk of Q inputs is held to account for the Q tokens it predicts, which are the ones after each of
them; the row and its ablations go through the model as one batch.

Not here: searching (`memorybank.retriever`), drawing (`launch.inspect`, `launch.inspection_page`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.references import Citation, ReferenceSource
from data.tokenizer import Tokenizer
from memorybank.bank import BankReader
from memorybank.config import QueryMode
from memorybank.neighbours import Neighbours
from model.memory import MemoryBatch
from train.engine import InferenceEngine, ModelInput

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Query:
    """What searches for one chunk.

    Attributes:
        mode: `own`: with tokens that the chunk predicts itself; `previous`: with tokens before those only.
        tokens: The tokens whose text searches; none find nothing.
    """

    mode: QueryMode
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Prediction:
    """One predicted token.

    Attributes:
        text: What it writes.
        loss: Nats, as the row was read.
        loss_without: Nats, when the row reads no memory.
        generated: Whether the model wrote it itself.
    """

    text: str
    loss: float
    loss_without: float
    generated: bool

    @property
    def gain(self) -> float:
        """What memory added to its log-likelihood, in nats."""
        return self.loss_without - self.loss


@dataclass(frozen=True, slots=True)
class Read:
    """One reference in one chunk.

    Attributes:
        reference: Its number.
        score: Of the search.
        attention_L: Share of the chunk's attention at each memory layer.
        gain: What it added to the log-likelihood of the chunk's predictions, in nats, by ablation.
    """

    reference: int
    score: float
    attention_L: tuple[float, ...]
    gain: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk.

    Attributes:
        query: What searched for it.
        query_text: Its text.
        predictions: The tokens that it predicts.
        reads: The references it reads, best first.
        prefix_L: Share of its attention that goes to the prefix, at each memory layer.
        context_L: And to the row itself.
        refused: Better references that the overlap filter refused.
    """

    query: QueryMode
    query_text: str
    predictions: tuple[Prediction, ...]
    reads: tuple[Read, ...]
    prefix_L: tuple[float, ...]
    context_L: tuple[float, ...]
    refused: int

    @property
    def gain(self) -> float:
        """What all memory added to the log-likelihood of its predictions, in nats."""
        return sum(prediction.gain for prediction in self.predictions)

    @property
    def memory_L(self) -> tuple[float, ...]:
        """Share of its attention that goes to memories, at each memory layer."""
        return tuple(sum(shares) for shares in zip(*(read.attention_L for read in self.reads), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A reference that was read, and what its memory keeps of it.

    Attributes:
        citation: Where it comes from.
        tokens: Text of its tokens, the title line first.
        title: How many tokens that line has.
        index_LGS: Which tokens each head of each memory layer kept; -1 is none.
    """

    citation: Citation
    tokens: tuple[str, ...]
    title: int
    index_LGS: Ids

    @property
    def num_heads(self) -> int:
        """Key/value heads of all memory layers."""
        return int(np.prod(self.index_LGS.shape[:2]))

    @property
    def keeping(self) -> list[int]:
        """For each token, how many of these heads kept it."""
        kept = self.index_LGS[self.index_LGS >= 0]
        return [int(count) for count in np.bincount(kept, minlength=len(self.tokens))]


@dataclass(frozen=True, slots=True)
class Inspection:
    """A row, looked into.

    Attributes:
        chunks: In the order of the row.
        sources: The references that were read, by number.
        slots: How many references a chunk may read.
    """

    chunks: tuple[Chunk, ...]
    sources: Mapping[int, Source]
    slots: int

    @property
    def predictions(self) -> list[Prediction]:
        """All tokens of the row but its first."""
        return [prediction for chunk in self.chunks for prediction in chunk.predictions]

    @property
    def gain(self) -> float:
        """What all memory added to the log-likelihood of the row, in nats."""
        return sum(chunk.gain for chunk in self.chunks)

    @property
    def memory_L(self) -> tuple[float, ...]:
        """Share of attention that memories received at each memory layer, mean over the row's tokens."""
        weights = [len(chunk.predictions) for chunk in self.chunks]
        shares_CL = [chunk.memory_L or (0.0,) * len(chunk.prefix_L) for chunk in self.chunks]
        return tuple(float(share) for share in np.average(shares_CL, axis=0, weights=weights))


def text_queries(row: Sequence[int], mode: QueryMode, *, chunk_tokens: int) -> list[Query]:
    """Return what searches for each chunk of a given text; the row's last token is predicted, not read."""
    chunks = _chunks(row[:-1], chunk_tokens)
    if mode is QueryMode.previous:
        chunks = [[], *chunks[:-1]]
    return [Query(mode, chunk) for chunk in chunks]


def generation_queries(row: Sequence[int], *, prompt_tokens: int, chunk_tokens: int) -> list[Query]:
    """Return what searched for each chunk while a row was generated (`model.generate`).

    Chunks that hold tokens of the prompt search with those, later ones with the chunk before them.
    """
    asked = [Query(QueryMode.own, chunk) for chunk in _chunks(row[:prompt_tokens], chunk_tokens)]
    chunks = _chunks(row[:-1], chunk_tokens)
    return asked + [Query(QueryMode.previous, chunk) for chunk in chunks[len(asked) - 1 : -1]]


def inspect_row(
    engine: InferenceEngine,
    row: Sequence[int],
    queries: Sequence[Query],
    found: Neighbours,
    reader: BankReader,
    *,
    tokenizer: Tokenizer,
    references: ReferenceSource,
    prompt_tokens: int | None = None,
) -> Inspection:
    """Look into a row.

    Args:
        engine: The weights, best in float32: in bfloat16 rounding is as large as what one reference adds.
        row: Tokens, `<s>` first, of at least two.
        queries: What searched for each of its chunks.
        found: What they found, one row of one chunk per query (`Retriever.neighbours`).
        reader: Hands out the memories.
        tokenizer: Tokens to text.
        references: Their text.
        prompt_tokens: Tokens of the row that the model did not write; None: all.
    """
    ids_CK = found.ids_MCk[:, 0]
    tokens_1T, targets_1T = torch.tensor([row[:-1]]), torch.tensor([row[1:]])
    read = (ids_CK >= 0).any()
    memory = reader.batch(ids_CK[None], engine.device) if read else None
    without_T = engine.token_losses(ModelInput(tokens_1T, targets_1T))[0].tolist()
    shares = engine.attention_shares(ModelInput(tokens_1T, targets_1T, memory))
    texts = tokenizer.split(row)[1:]
    chunk_tokens = engine.model.config.chunk_tokens
    chunks = []
    for number, query in enumerate(queries):
        begin, end = number * chunk_tokens, min((number + 1) * chunk_tokens, len(row) - 1)
        here = slice(begin, end)
        slots = np.flatnonzero(ids_CK[number] >= 0).tolist()
        nll_BT = _ablated(engine, tokens_1T[:, :end], targets_1T[:, :end], memory, number, slots)[:, here]
        added = (nll_BT[1:] - nll_BT[:1]).sum(1).tolist()
        attention_LK = shares.memory_BTK[:, 0, here].mean(1) if slots else None
        chunks.append(
            Chunk(
                query=query.mode,
                query_text=tokenizer.decode(query.tokens),
                predictions=tuple(
                    Prediction(*values, generated=prompt_tokens is not None and place + 1 >= prompt_tokens)
                    for place, values in enumerate(
                        zip(texts[here], nll_BT[0].tolist(), without_T[here], strict=True), start=begin
                    )
                ),
                reads=tuple(
                    Read(
                        reference=int(ids_CK[number, slot]),
                        score=float(found.scores_MCk[number, 0, slot]),
                        attention_L=() if attention_LK is None else tuple(attention_LK[:, slot].tolist()),
                        gain=gain,
                    )
                    for slot, gain in zip(slots, added, strict=True)
                ),
                prefix_L=tuple(shares.prefix_BT[:, 0, here].mean(1).tolist()),
                context_L=tuple(shares.context_BT[:, 0, here].mean(1).tolist()),
                refused=int(found.refused_overlap_MC[number, 0]),
            )
        )
    sources = {} if memory is None else _sources(memory, ids_CK, tokenizer, references)
    return Inspection(tuple(chunks), sources, ids_CK.shape[1])


def _chunks(tokens: Sequence[int], chunk_tokens: int) -> list[Sequence[int]]:
    return [tokens[begin : begin + chunk_tokens] for begin in range(0, len(tokens), chunk_tokens)]


def _ablated(
    engine: InferenceEngine,
    tokens_1T: Tensor,
    targets_1T: Tensor,
    memory: MemoryBatch | None,
    chunk: int,
    slots: Sequence[int],
) -> Tensor:
    """Return the losses of a row up to the end of a chunk: as it is, then with each of the chunk's slots emptied."""
    num_rows = 1 + len(slots)
    if memory is not None:
        slots_BCK = memory.slots_BCK[:, : chunk + 1].repeat(num_rows, 1, 1)
        for row, slot in enumerate(slots, start=1):
            slots_BCK[row, chunk, slot] = -1
        memory = MemoryBatch(memory.pool, slots_BCK)
    batch = tokens_1T.expand(num_rows, -1), targets_1T.expand(num_rows, -1)
    return engine.token_losses(ModelInput(*batch, memory)).cpu()


def _sources(
    memory: MemoryBatch, ids_CK: Ids, tokenizer: Tokenizer, references: ReferenceSource
) -> dict[int, Source]:
    """Return the references of a pool, by number."""
    ids = np.unique(ids_CK[ids_CK >= 0])
    tokens_NR, lengths_N, titles_N = references.tokens(ids)
    index_NLGS = memory.pool.index_NLGS.cpu().numpy()
    return {
        id: Source(
            citation=references.describe(id),
            tokens=tuple(tokenizer.split(tokens_R[:length].tolist())),
            title=int(title),
            index_LGS=index_LGS,
        )
        for id, tokens_R, length, title, index_LGS in zip(
            ids.tolist(), tokens_NR, lengths_N, titles_N, index_NLGS, strict=True
        )
    }
