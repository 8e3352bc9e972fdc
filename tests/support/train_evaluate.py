"""A tiny model, letters as tokens and references of letters: what the tests of evaluation share."""

import numpy as np
import torch

from data.documents import Probe, Split
from memorybank.pool import distinct
from model.config import ModelConfig
from model.memory import MemoryBatch
from model.transformer import Memory3LM
from train.arms import Ids

VOCABULARY = 64
CHUNK = 8


class Letters:
    """A tokenizer of single characters."""

    bos_id = 1
    newline_id = 2
    letters = "abcdefghijklmnopqrstuvwxyz .,:?!0123456789-'()"

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) + 3 for letter in text.casefold()]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.letters[id - 3] if 3 <= id < 3 + len(self.letters) else "#" for id in ids)


class References:
    """References of random letters; every fourth one is short."""

    def __init__(self, num_references: int, *, length: int = 12) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tokens_NR = torch.randint(3, VOCABULARY, (num_references, length), generator=generator).numpy()
        self._lengths_N = np.where(np.arange(num_references) % 4 == 3, 3, length)

    def tokens(self, ids: Ids) -> tuple[Ids, Ids, Ids]:
        return self._tokens_NR[ids], self._lengths_N[ids], np.zeros(len(ids), np.int64)

    def sizes(self, ids: Ids) -> tuple[Ids, Ids]:
        return np.zeros(len(ids), np.int64), self._lengths_N[ids]

    def of(self, id: int) -> list[int]:
        return self._tokens_NR[id, : self._lengths_N[id]].tolist()


class Encoded:
    """A reader of memories that the model wrote itself, as a bank would hand them out."""

    def __init__(self, model: Memory3LM, references: References) -> None:
        self._model, self._references = model, references

    @torch.no_grad()
    def batch(self, ids_BCK: Ids, device: torch.device | str = "cpu") -> MemoryBatch:
        ids_N, slots_BCK = distinct(ids_BCK)
        tokens_NR, lengths_N, _ = map(torch.from_numpy, self._references.tokens(ids_N))
        return MemoryBatch(self._model.encode(tokens_NR, lengths_N), slots_BCK)


def model(seed: int = 0) -> Memory3LM:
    """Return an untrained model in float32 whose weights are large enough for memories to matter."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=2,
        width=32,
        num_heads=2,
        num_kv_heads=1,
        head_size=16,
        ffn_width=32,
        num_memory_layers=1,
        row_tokens=64,
        chunk_tokens=CHUNK,
        reference_tokens=12,
        tokens_kept=4,
        prefix_ids=[1, 5, 6],
        init_std=0.3,
    )
    return Memory3LM(config).eval()


def probe(number: int, *, relation: str = "capital", answer: str = " oslo", group: str = "") -> Probe:
    """Return a probe about a country of its own."""
    return Probe(
        id=f"probe {number}",
        question=f"what is the {relation} of land {number}? answer:",
        answer=answer,
        relation=relation,
        group=group or f"land {number}",
        split=Split.validation,
        document=f"land {number}/section",
        section="section",
    )
