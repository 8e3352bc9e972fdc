"""Reading: rows from token shards, memories from the bank, files against their checksums, beside a training step.

The shares are of CPU time, since threads read while a step computes; the stall is what a step waited nevertheless. Each
pass over rows opens the shards anew, so that their checksums are part of it; the files lie in the page cache.
Not here: what the step itself takes (`launch.bench_step`).
"""

from contextlib import ExitStack

import numpy as np
import torch

from data.files import publishing, verify, write_atomic
from data.loader import Loader
from data.packing import RowPlan, pack
from data.references import References
from launch.bench_step import Loop, Scene, loops, memory_stage, scene
from launch.build import training_dtype
from launch.config import RunConfig
from launch.timing import Bench, Conditions, Figure, Side, interleaved, rate, ratio
from memorybank.bank import BankReader
from memorybank.cache import CachedRecords
from memorybank.store import Generation
from train.metrics import read_metrics

DEFAULTS = [
    "model=small", "model.prefix_ids=[1,2,3,4]", "engine.num_ranks=1", "warmup.rows_per_step=4", "warmup.micro_rows=2",
]  # fmt: skip

_ROWS_SHARE, _MEMORY_SHARE = 0.01, 0.02
_TOKENS_PER_SECOND, _VERIFIED_GB = 20e6, 1.0
_TOKENS = 4 << 20
_FILES, _FILE_BYTES = 4, 16 << 20
_WARM = 1


def measure(config: RunConfig, conditions: Conditions) -> Bench:
    """Time a step's reading beside the step."""
    with ExitStack() as held:
        threads = torch.get_num_threads()
        now = held.enter_context(scene(config, steps=conditions.rounds + _WARM + 1, threads=threads))
        continual = loops(now, held)["continual, bank"]
        many = _many_rows(now)
        sides: dict[str, Side] = {
            "continual step": continual,
            "rows": _rows(now, many),
            "rows and memories of a step": _memories(now),
            "verifying files": _verifying(now),
        }
        times = interleaved(sides, conditions, warm=_WARM)
        stalled = _stalls(continual)[_WARM:]
    step, rows, memories, verifying = times.values()
    tokens = many.num_rows * config.model.row_tokens
    return Bench(
        shape={
            "T": config.model.row_tokens,
            "rows": f"{now.stage.rows_per_step} in micro-batches of {now.stage.micro_rows}",
            "memories": f"{now.num_read} distinct of {now.codec.record_bytes:,} bytes a step",
            "type": str(training_dtype(config)).removeprefix("torch."),
        },
        times=list(times.values()),
        figures=[
            ratio(
                "loading a step's rows / step, CPU time",
                rows,
                step,
                scale=now.stage.rows_per_step / many.num_rows,
                by_cpu=True,
                target=_ROWS_SHARE,
            ),
            rate("rows", rows, amount=tokens, unit="tokens/s", target=_TOKENS_PER_SECOND),
            ratio(
                "rows and memories of a step / step, CPU time",
                memories,
                step,
                by_cpu=True,
                target=_MEMORY_SHARE,
                note="slots, gathering, checksums, decoding; nothing of it in the cache before",
            ),
            Figure(
                "time that a step waits for its memories / step",
                tuple(stalled),
                target=_MEMORY_SHARE,
                note="they are read while the step before computes",
            ),
            rate(
                "verifying",
                verifying,
                amount=_FILES * _FILE_BYTES / 1e9,
                unit="GB/s",
                target=_VERIFIED_GB,
                note="SHA-256 and a checksum of every MiB, as `memory3 checkpoint verify` reads",
            ),
        ],
    )


def _many_rows(scene: Scene) -> RowPlan:
    """A plan of some million tokens: the documents, again and again."""
    shards = scene.references.shards
    documents = np.arange(shards.num_documents)
    times = -(-_TOKENS // int(shards.lengths().sum()))
    return pack(np.tile(documents, times), shards.lengths(), scene.plan.row_tokens, seed=0)


def _rows(scene: Scene, plan: RowPlan) -> Side:
    settings = scene.stage

    def run() -> None:
        shards = References.open(scene.folder / "references").shards
        with Loader(
            shards, plan, rows_per_step=settings.rows_per_step, micro_rows=settings.micro_rows
        ) as rows:
            for _ in rows:
                pass

    return run


def _memories(scene: Scene) -> Side:
    """What is made ahead for a step, from a bank that was not read before."""
    assert scene.generation is not None
    folder, settings = scene.generation.folder, scene.stage
    micro = settings.rows_per_step // settings.micro_rows

    def run() -> None:
        generation = Generation.open(folder)
        cache = CachedRecords(generation, max_bytes=scene.config.bank.cache_mib << 20)
        stage = memory_stage(scene, bank=BankReader(cache, scene.codec))
        with Loader(
            scene.references.shards,
            scene.plan,
            rows_per_step=settings.rows_per_step,
            micro_rows=settings.micro_rows,
        ) as rows:
            for _ in range(micro):
                stage.model_input(next(rows))

    return run


def _verifying(scene: Scene) -> Side:
    folder = scene.folder / "verified"
    with publishing(folder, kind="bench", version=1, settings={}, inputs={}) as work:
        content = np.random.default_rng(0).integers(0, 256, (_FILES, _FILE_BYTES), dtype=np.uint8)
        for number, file in enumerate(content):
            write_atomic(work / f"{number}.bin", file.data)
    return lambda: verify(folder)


def _stalls(loop: Loop) -> list[float]:
    """Return, step by step, the share of its time that a step waited for memories."""
    return [
        line["seconds_retrieve"]
        / sum(line[f"seconds_{part}"] for part in ("data", "retrieve", "compute", "update"))
        for line in read_metrics(loop.path)
    ]
