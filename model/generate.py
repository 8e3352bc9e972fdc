"""Generation: prompts of any lengths, as many at a time as a batch has places, new memories at chunk boundaries.

The boundaries are a row's multiples of ``chunk_tokens``, whatever the other rows of the batch do. Each chunk of a
prompt, also a partial last one, reads what its own tokens retrieve; generated tokens complete that chunk and read
its memories; after that, each chunk reads what the chunk before it retrieved (paper section 3.1). A prompt that ends
at a boundary hands its last chunk's memories on, which are what that chunk retrieves.

Invariants: what becomes of a prompt depends on the prompts before it and the seed at most (and with temperature 0 on
nothing but itself), not on the rows that it is decoded with; a row that ends leaves its place to the next prompt in the
same step. Products of other shapes round differently, so that equal means equal up to that.

Not here: the cache (``model/decoder.py``), and how a chunk's text becomes memories (``memorybank/retriever.py``
implements ``MemorySource``).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Protocol

import torch
from torch import Tensor

from model.decoder import Decoder
from model.memory import ExplicitMemory, MemoryBatch
from model.transformer import Memory3LM

PROMPT_TOKENS = 4096
"""Tokens of prompts that are read at once, together with the memories of all their chunks."""

SORTED = 512
"""Most probable tokens that are sorted first; all are where these do not make up `top_p`."""


class MemorySource(Protocol):
    """Where generation gets memories from."""

    def read(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> MemoryBatch | None:
        """Return what some chunks' tokens retrieve.

        A row's chunks come in their order. A chunk asks when it is complete: of a row that then ends, in vain.

        Args:
            rows: For each chunk, the number of its prompt.
            chunks: The tokens of each.

        Returns:
            A batch with ``slots_BCK`` of B = len(rows) and C = 1; None = nothing for any of them.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class FixedMemory:
    """The same memories for all chunks of a row, whatever it says: a probe's references."""

    pool: ExplicitMemory
    slots_BK: Tensor
    """Rows of the pool that each prompt reads; -1 = empty."""

    def read(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> MemoryBatch:
        """Return the rows' memories."""
        return MemoryBatch(self.pool, self.slots_BK[list(rows)].unsqueeze(1))


def generate(
    model: Memory3LM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch: int | None = None,
    stop_id: int | None = None,
    memory: MemorySource | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the stop token; arguments and errors: see `stream`."""
    new: list[list[int]] = [[] for _ in prompts]
    for number, token in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        batch=batch,
        stop_id=stop_id,
        memory=memory,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    ):
        if token is not None:
            new[number].append(token)
    return new


@torch.no_grad()
def stream(
    model: Memory3LM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch: int | None = None,
    stop_id: int | None = None,
    memory: MemorySource | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    ahead: bool | None = None,
) -> Iterator[tuple[int, int | None]]:
    """Yield each new token with its prompt's number as soon as it is known, and None after a prompt's last one.

    Args:
        model: The model, with its prefix.
        prompts: Token ids, each of any length from one.
        max_new_tokens: Per prompt, the stop token not counted.
        batch: Prompts that are decoded together; None = all.
        stop_id: Token that ends a row; None = none does.
        memory: Where memories come from; None = no memory.
        temperature: 0 = the most probable token.
        top_p: Sample among the most probable tokens that together have at least this probability.
        seed: Of the sampling.
        ahead: Whether a thread reads a chunk's memories while the chunk's last token is decoded; None = where it is not
            the CPU, which reads, that decodes.

    Raises:
        ValueError: for an empty prompt, or settings out of range.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token: begin it with <s>")
    if max_new_tokens < 1 or (batch is not None and batch < 1):
        raise ValueError(f"max_new_tokens={max_new_tokens}, batch={batch}: set 1 or more")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}: set temperature >= 0 and top_p above 0, at most 1"
        )
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    waiting = (
        _Row(number, list(prompt), len(prompt), torch.rand(max_new_tokens, generator=generator).tolist())
        for number, prompt in enumerate(prompts)
    )
    free = list(range(min(batch or len(prompts), len(prompts))))
    decoder = Decoder(model, rows=len(free), capacity=max(map(len, prompts)) + max_new_tokens)
    with ThreadPoolExecutor(1) as thread:
        beside = device.type != "cpu" if ahead is None else ahead
        rows = _Rows(decoder, model.config.chunk_tokens, memory, thread if beside else None)
        while rows.fill(free, waiting):
            hidden_BD = decoder.advance(torch.tensor([row.tokens[-1] for row in rows.placed], device=device))
            logits_BV = model.head(model.norm(hidden_BD))
            if temperature:
                draws = [row.draws[row.num_new] for row in rows.placed]
                chosen_B = _drawn(logits_BV / temperature, torch.tensor(draws, device=device), top_p)
            else:
                chosen_B = logits_BV.max(-1).indices  # argmax takes four times as long on a CPU in bfloat16
            free = []
            for place, (row, token) in enumerate(zip(rows.placed, chosen_B.tolist(), strict=True)):
                if token != stop_id:
                    row.tokens.append(token)
                    yield row.number, token
                if token == stop_id or row.num_new == max_new_tokens:
                    free.append(place)
                    yield row.number, None
            rows.read(ended=free)


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """A prompt that is being completed."""

    number: int
    tokens: list[int]
    prompt_length: int
    draws: list[float]
    """A number in [0, 1) for each new token."""

    @property
    def num_new(self) -> int:
        """New tokens so far."""
        return len(self.tokens) - self.prompt_length


class _Rows:
    """The rows of a decoder, and what they read."""

    def __init__(
        self, decoder: Decoder, chunk_tokens: int, memory: MemorySource | None, thread: Executor | None
    ) -> None:
        self.placed: list[_Row] = []
        """By place."""
        self._decoder = decoder
        self._chunk_tokens = chunk_tokens
        self._memory = memory
        self._thread = thread
        self._asking: list[_Row] = []
        self._answer: Future[MemoryBatch | None] = Future()

    def fill(self, free: Sequence[int], waiting: Iterator[_Row]) -> bool:
        """Give free places to waiting prompts, and those that are left to other rows; return whether there are rows."""
        arrived = list(islice(waiting, len(free)))
        for place, row in zip(free, arrived, strict=False):
            self.placed[place : place + 1] = [row]
        by_chunks = sorted(free[: len(arrived)], key=self._num_chunks)
        for num_chunks, group in groupby(by_chunks, key=self._num_chunks):
            alike = list(group)
            together = max(1, PROMPT_TOKENS // (num_chunks * self._chunk_tokens))
            for first in range(0, len(alike), together):
                self._put(alike[first : first + together])
        for place in reversed(free[len(arrived) :]):
            self._decoder.drop(place)
            self.placed[place] = self.placed[-1]
            self.placed.pop()
        return bool(self.placed)

    def read(self, *, ended: Sequence[int]) -> None:
        """Ask for those that completed a chunk with their last token; let those read who asked a token before."""
        if self._asking:
            places = [self.placed.index(row) for row in self._asking]
            self._decoder.read(places, self._answer.result())
        gone = set(ended)
        self._asking = [
            row
            for place, row in enumerate(self.placed)
            if self._memory and place not in gone and len(row.tokens) % self._chunk_tokens == 0
        ]
        if self._asking:
            self._answer = self._ask(
                self._asking, [row.tokens[-self._chunk_tokens :] for row in self._asking]
            )

    def _num_chunks(self, place: int) -> int:
        return -(-len(self.placed[place].tokens) // self._chunk_tokens)

    def _put(self, places: Sequence[int]) -> None:
        """Read prompts of equally many chunks."""
        rows, size = [self.placed[place] for place in places], self._chunk_tokens
        memory = None
        if self._memory is not None:
            begins = range(0, len(rows[0].tokens), size)
            memory = self._ask(
                [row for row in rows for _ in begins],
                [row.tokens[begin : begin + size] for row in rows for begin in begins],
            ).result()
        if memory is not None:
            memory = MemoryBatch(memory.pool, memory.slots_BCK.view(len(rows), len(begins), -1))
        self._decoder.put(places, [row.tokens for row in rows], memory)

    def _ask(self, rows: Sequence[_Row], chunks: Sequence[list[int]]) -> Future[MemoryBatch | None]:
        assert self._memory is not None
        question = [row.number for row in rows], chunks
        if self._thread is not None:
            return self._thread.submit(torch.no_grad()(self._memory.read), *question)
        answer: Future[MemoryBatch | None] = Future()
        answer.set_result(self._memory.read(*question))
        return answer


def _drawn(logits_BV: Tensor, draws_B: Tensor, top_p: float) -> Tensor:
    """Return the tokens at which the summed probabilities pass the draws, (B,)."""
    probabilities, order = logits_BV.float().softmax(-1), None
    if top_p < 1:
        probabilities, order = _best(probabilities, top_p)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    sums = probabilities.cumsum(-1, dtype=torch.float64)  # in which no draw is rounded up to the whole sum
    place_B1 = torch.searchsorted(sums, draws_B.double()[:, None] * sums[:, -1:], right=True)
    return (place_B1 if order is None else order.gather(1, place_B1)).squeeze(1)


def _best(probabilities_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the greatest probabilities, in their order, and whose they are: at least those that make up `top_p`."""
    if probabilities_BV.shape[1] > SORTED:
        best, order = probabilities_BV.topk(SORTED)
        if (best.sum(-1) >= top_p).all():
            return best, order
    best, order = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    return best, order
