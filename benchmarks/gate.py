"""Whether memory has become dear: ratios that a change must not worsen, in a few seconds, for continuous integration.

    python -m benchmarks.gate

Each ratio compares two sides of one process by CPU time (`launch.timing`), at a size of milliseconds: what counts is
that it stays, since such sizes are not what is optimised for. Fourteen runs, on two cores that others kept busy (load
averages of 5 to 12), gave the lowest and the highest that stand beside each; a limit is `MARGIN` times the highest. A
ratio above its limit is measured twice more before it counts; then the exit code is 1.
Not here: targets at the sizes that matter (`memory3 bench`).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data.references import References
from launch.bench_attention import Problem
from launch.bench_compile import encoder, forward_of_memory_layers
from launch.bench_corpus import write_corpus
from launch.bench_step import generation_settings
from launch.timing import Conditions, Figure, Side, interleaved, ratio
from memorybank import codecs
from memorybank.bank import BankReader, OnlineReader
from memorybank.config import CodecKind, QueryMode
from memorybank.pool import window_slots
from memorybank.record import MemoryShape
from memorybank.store import Generation
from memorybank.writer import compile_generation, encode_records
from model.attention import fast_attention
from model.config import ModelConfig
from model.flops import step_flops
from model.generate import generate
from model.memory import MemoryBatch, ReferenceBatch
from model.transformer import Memory3LM
from train.products import products

CONFIG = ModelConfig(num_layers=4, num_memory_layers=2, row_tokens=512, vocab_size=1024, prefix_ids=[1, 2, 3])
ROWS = 2
PROMPTS, FOUND = 8, 5
ROUNDS = 5
ATTEMPTS = 3
MARGIN = 1.2
"""Of a limit over the highest ratio of many runs."""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Gate:
    """A ratio and its limit.

    Attributes:
        what: Its sides.
        ours: The first one.
        against: The second one.
        measured: The lowest and the highest that it was when the limit was set.
        scale: It is multiplied by this.
    """

    what: str
    ours: Side
    against: Side
    measured: tuple[float, float]
    scale: float = 1.0

    @property
    def limit(self) -> float:
        """What it may be."""
        return MARGIN * max(self.measured)

    def figure(self) -> Figure:
        """Measure it."""
        sides = {"ours": self.ours, "against": self.against}
        times = interleaved(sides, Conditions(ROUNDS, CPU))
        return ratio(
            self.what, times["ours"], times["against"], scale=self.scale, target=self.limit, by_cpu=True
        )


def main() -> int:
    """Measure all gates, print them, and return the exit code."""
    torch.set_num_threads(1)
    table = Table(
        "CPU time",
        "ratio",
        "was",
        "limit",
        title="Ratios that a change must not worsen",
        title_justify="left",
    )
    passed = True
    with TemporaryDirectory(prefix="memory3-gate-") as folder:
        for gate in gates(Path(folder)):
            figure = measured(gate.figure)
            passed &= bool(figure.met)
            table.add_row(
                gate.what,
                f"{figure.value:.3g}",
                "{:.3g} to {:.3g}".format(*gate.measured),
                f"≤ {gate.limit:.3g}{'' if figure.met else '  EXCEEDED'}",
            )
    Console().print(table)
    return 0 if passed else 1


def measured(measure: Callable[[], Figure]) -> Figure:
    """The first figure within its limit, or the last of some attempts: a busy moment is no regression."""
    figure = measure()
    for _ in range(ATTEMPTS - 1):
        if figure.met:
            break
        figure = measure()
    return figure


def gates(folder: Path) -> Iterator[Gate]:
    """All of them; what they read is written into a folder."""
    torch.manual_seed(0)
    model = Memory3LM(CONFIG).to(torch.bfloat16)
    references = write_corpus(folder, CONFIG, documents=8)
    problem = Problem.random(CONFIG, places=5, dtype=torch.bfloat16, device=CPU)
    yield Gate(
        "attention with memory / the library's kernel without",
        problem.side(fast_attention, problem.window),
        problem.kernel(),
        measured=(0.97, 1.19),
    )
    yield Gate(
        "attention with memory / with a dense mask",
        problem.side(fast_attention, problem.fresh),
        problem.dense(problem.fresh),
        measured=(0.54, 0.67),
    )
    bank, online = _memories(model, references, folder)
    step = partial(_step, model)
    yield Gate("step that reads memories / step without", partial(step, bank), step, measured=(1.01, 1.15))
    flops = [
        step_flops(CONFIG, rows=ROWS, slots_filled=80, references_encoded=count, encode_gradient=True).total
        for count in (0, ROWS * 8)
    ]
    yield Gate(
        "step that encodes its references / step without / by operations",
        partial(step, online),
        step,
        scale=flops[0] / flops[1],
        measured=(0.91, 1.10),
    )
    floats = codecs.of_kind(CodecKind.model, MemoryShape.of(CONFIG), torch.bfloat16)
    ids = np.arange(32)
    yield Gate(
        "compiling / forward pass of the same layers",
        lambda: encode_records(encoder(model, CPU), references, ids, floats, batch=32),
        forward_of_memory_layers(model, references, CPU, count=32),
        measured=(1.17, 1.51),
    )
    reader = BankReader(Generation.open(folder / "generation"), floats)
    yield Gate(
        "reading memories of a step / step",
        lambda: reader.batch(_slots(ROWS)),
        step,
        measured=(0.0043, 0.0066),
    )
    yield Gate(
        "generating with memory / without",
        partial(_generate, model, _Found(reader)),
        partial(_generate, model),
        measured=(0.92, 1.12),
    )
    multiplied = products(CONFIG, tokens=ROWS * CONFIG.row_tokens, dtype=torch.bfloat16, device=CPU)
    yield Gate(
        "step without memory / matrix products of its operations",
        step,
        multiplied.run,
        scale=multiplied.flops / step_flops(CONFIG, rows=ROWS).total,
        measured=(1.85, 2.13),
    )


def _slots(rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    found_BC = np.arange(rows * 8).reshape(rows, 8)
    return window_slots(found_BC, QueryMode.own, window=5)


def _memories(model: Memory3LM, references: References, folder: Path) -> tuple[MemoryBatch, ReferenceBatch]:
    floats = codecs.of_kind(CodecKind.model, MemoryShape.of(CONFIG), torch.bfloat16)
    settings = generation_settings(CONFIG, references)
    compile_generation(
        encoder(model, CPU), references, np.arange(32), floats, folder / "generation", settings=settings
    )
    read = BankReader(Generation.open(folder / "generation"), floats).batch(_slots(ROWS))
    return read, OnlineReader(references).batch(_slots(ROWS))


@dataclass(frozen=True, slots=True)
class _Found:
    """Other references for every row of every chunk, from the bank."""

    reader: BankReader

    def read(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> MemoryBatch:
        """Return them."""
        ids_BCK = (np.arange(FOUND) + FOUND * np.asarray(rows)[:, None, None]) % 32
        return self.reader.batch(ids_BCK)


def _generate(model: Memory3LM, memory: _Found | None = None) -> None:
    """Complete prompts of a chunk and a half by a chunk: new memories in the middle."""
    prompts = torch.arange(PROMPTS * 96).view(PROMPTS, -1) % CONFIG.vocab_size
    generate(model, prompts.tolist(), max_new_tokens=64, memory=memory)


def _step(model: Memory3LM, memory: MemoryBatch | ReferenceBatch | None = None) -> None:
    tokens = torch.arange(ROWS * CONFIG.row_tokens).view(ROWS, -1) % CONFIG.vocab_size
    model.zero_grad(set_to_none=True)
    model(tokens, targets_BT=tokens, memory=memory).sum.backward()


if __name__ == "__main__":
    sys.exit(main())
