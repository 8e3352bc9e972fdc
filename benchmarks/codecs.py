"""What codecs cost and keep: bytes, reconstruction error, speed, and the model's loss, on a trained run.

    python -m benchmarks.codecs RUN --root runs --output benchmarks/results/codecs

Quantisers are fitted on references sampled from the run's bank (and kept there: a second run finds them). Errors are
measured on references that none was fitted on; losses on held-out text and probes, every codec reading the same
references, against memories in the model's own type. Nothing else of the run is written.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.origin import cpu, made_by
from data.documents import Split
from data.files import open_manifest, write_atomic
from launch import build
from launch.evaluate import HeldOut, held_out_readings
from launch.opened import OpenedRun, open_run
from memorybank import codecs, quantizer
from memorybank.bank import BankReader
from memorybank.codec import Codec, relative_errors
from memorybank.config import STAGES, CodecConfig, CodecKind, QueryMode
from memorybank.quantizer import ProductQuantizer
from memorybank.record import MemoryShape
from memorybank.writer import encode_records
from model.memory import ExplicitMemory
from train.arms import Arm, Pattern, Reading, reference_ids
from train.evaluate import ArmResult, Setting, TextItem, evaluate_probes, evaluate_text
from train.statistics import Interval, group_sums, paired_interval

PAPER = MemoryShape(num_layers=22, num_kv_heads=8, tokens_kept=8, head_size=80)
PAPER_KIND = CodecKind.residual2x14_pq8x10
PAPER_REFERENCES = 1.12e8
SECONDS = 0.5
"""Of CPU time: what is timed is called again until so many are spent."""
CONFIGS = [
    *(CodecConfig(kind=kind) for kind in CodecKind if kind is not PAPER_KIND),
    CodecConfig(kind=CodecKind.residual2x8_pq8x8, separate=True),
    CodecConfig(kind=PAPER_KIND),  # takes longest to fit
]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one codec did.

    Attributes:
        codec: Its kind, and whether keys and values have their own.
        name: As generations state it.
        memory_bytes: Keys and values of a memory, this model's.
        record_bytes: A record, this model's.
        paper_memory_bytes: Keys and values of a memory of the paper's model.
        paper_record_bytes: A record of the paper's model.
        fitted_vectors: What it was trained on, 0: nothing to train.
        fit_cpu_seconds: CPU time of the training.
        error_keys: Relative squared error of keys on held-out references, by layer.
        error_values: The same of values.
        encoded_per_second: Memories.
        decoded_per_second: Memories.
        text: Loss on text less that with the model's own type, nats per token, interval over documents.
        probes: The same on probes, nats per answer token, interval over countries.
    """

    codec: str
    name: str
    memory_bytes: int
    record_bytes: int
    paper_memory_bytes: int
    paper_record_bytes: int
    fitted_vectors: int
    fit_cpu_seconds: float
    error_keys: list[float]
    error_values: list[float]
    encoded_per_second: float
    decoded_per_second: float
    text: Interval
    probes: Interval | None


@dataclass(frozen=True, slots=True)
class Kept:
    """Records in memory, by the numbers of their references, ascending."""

    ids_N: NDArray[np.int64]
    records: Tensor

    def read(self, ids_N: NDArray[np.int64]) -> Tensor:
        """The records of references, in the order asked for."""
        return self.records[torch.from_numpy(np.searchsorted(self.ids_N, ids_N))]


@dataclass(frozen=True, slots=True)
class Losses:
    """Of the arms read with one codec: text, and probes if there are any."""

    results: list[ArmResult]

    def against(self, other: "Losses", *, text: bool) -> Interval | None:
        """The difference of these losses, paired by document, or by country; None without items."""
        pairs = [
            (ours, theirs)
            for ours, theirs in zip(self.results, other.results, strict=True)
            if ours.is_text == text
        ]
        if not pairs:
            return None
        ((ours, theirs),) = pairs
        sums, counts = _sums(ours)
        return paired_interval(sums[None], _sums(theirs)[0][None], counts[None])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every codec, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder, or its name below --root")
    parser.add_argument("--root", default="runs", help="default: %(default)s")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument(
        "--kinds", nargs="+", choices=[kind.name for kind in CodecKind], help="codecs (default: all)"
    )
    parser.add_argument("--output", type=Path, required=True, help="path without ending: .md and .json")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    build.quiet_third_parties()
    opened = open_run(arguments.run, arguments.root)
    split = Split(arguments.split)
    held_out = held_out_readings(opened, split)
    memory, none = (_readings(held_out, arm) for arm in (Arm.memory, Arm.none))
    shape, exact = opened.shape, opened.codec(CodecConfig())
    references, encode = opened.context.prepared.references, opened.engine.encode
    ids = np.unique(reference_ids(memory))
    read = Kept(ids, encode_records(encode, references, ids, exact, batch=64))
    drawn, _ = codecs.draw(CodecConfig(kind=CodecKind.pq16x8), shape, len(opened.bank_ids))
    unseen_ids = opened.bank_ids[drawn]
    unseen = exact.decode(encode_records(encode, references, unseen_ids, exact, batch=64))
    baseline = _losses(opened, held_out, memory, BankReader(read, exact))
    without = _losses(opened, held_out, none, BankReader(read, exact))
    chosen = [config for config in CONFIGS if arguments.kinds is None or config.kind.name in arguments.kinds]
    speeds = paper_speeds() if any(config.kind is PAPER_KIND for config in chosen) else {}
    head = (
        f"# Codecs\n\n{made_by('codecs', given)}; {cpu()}, {torch.get_num_threads()} thread(s). Run "
        f"`{opened.config.run}`, step {opened.step}, {len(opened.bank_ids):,} references in its bank, "
        f"{len(unseen_ids)} of them held out from fitting; {split.value} half.\n\n"
    )
    measured = []
    for config in chosen:
        codec = opened.codec(config)
        kept = Kept(ids, codec.encode(exact.decode(read.records)))
        losses = _losses(opened, held_out, memory, BankReader(kept, codec))
        measured.append(_measure(config, codec, opened, unseen, losses, baseline))
        print(measured[-1], flush=True)
        text = (
            head + _render(measured, baseline, without, opened) + (_render_speeds(speeds) if speeds else "")
        )
        write_atomic(arguments.output.with_suffix(".md"), text.encode())  # of what there is so far
        facts = {
            "codecs": [asdict(row) for row in measured],
            "loss": [result.loss for result in baseline.results],
            "loss_without_memory": [result.loss for result in without.results],
            "vectors_per_cpu_second": speeds,
        }
        write_atomic(arguments.output.with_suffix(".json"), json.dumps(facts, indent=1).encode())
    print(text)
    return 0


def paper_speeds(num_vectors: int = 4096) -> dict[str, float]:
    """Vectors per second and CPU thread through the paper's codec, by torch and by faiss; centroids at random."""
    name = quantizer.factory(PAPER_KIND, PAPER.head_size)
    rng = np.random.default_rng(0)
    index = faiss.index_factory(PAPER.head_size, name)
    rotation, *stages = quantizer._parts(index)
    faiss.copy_array_to_vector(np.eye(PAPER.head_size, dtype=np.float32).ravel(), rotation.A)
    rotation.is_trained = rotation.is_orthonormal = True
    for stage in stages:
        centroids = rng.standard_normal(stage.M * stage.ksub * stage.dsub).astype(np.float32)
        faiss.copy_array_to_vector(centroids, stage.centroids)
    inner = faiss.downcast_index(index.index)
    coarse = faiss.downcast_index(inner.q1.quantizer)
    coarse.ntotal = 1 << coarse.pq.M * coarse.pq.nbits
    coarse.is_trained = inner.is_trained = index.is_trained = True
    coder = ProductQuantizer.of_faiss(name, index)
    x = rng.standard_normal((num_vectors, PAPER.head_size)).astype(np.float32)
    codes = index.sa_encode(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    calls: dict[str, Callable[[], object]] = {
        "encode, torch": lambda: coder.encode(torch.from_numpy(x)),
        "encode, faiss": lambda: index.sa_encode(x),
        "decode, torch": lambda: coder.decode(torch.from_numpy(codes)),
        "decode, faiss": lambda: index.sa_decode(codes),
    }
    speeds = {label: num_vectors * _per_second(call) for label, call in calls.items()}
    torch.set_num_threads(threads)
    return speeds


def _readings(held_out: HeldOut, arm: Arm) -> list[Reading]:
    """One reading of text, own query and inference pattern, and one of probes."""

    def chosen(readings: Sequence[Reading]) -> list[Reading]:
        modes = ((QueryMode.own, Pattern.inference), (None, None))
        return [r for r in readings if r.arm is arm and (r.query, r.pattern) in modes][:1]

    return [*chosen(held_out.text_readings), *chosen(held_out.probe_readings)]


def _losses(opened: OpenedRun, held_out: HeldOut, readings: Sequence[Reading], reader: BankReader) -> Losses:
    setting = Setting(label="M", reader=reader, batch_rows=opened.config.evaluation.batch_rows)
    results = evaluate_text(opened.engine, held_out.text, readings[:1], setting)
    if readings[1:]:
        results += evaluate_probes(
            opened.engine.model,
            held_out.probes,
            readings[1:],
            setting,
            tokenizer=opened.context.prepared.tokenizer,
            reference_tokens=lambda _: [],  # of RAG, which is not among the readings
            row_tokens=opened.config.model.row_tokens,
            answer_tokens=1,  # losses are wanted, not what decoding says
        )
    return Losses(results)


def _measure(
    config: CodecConfig,
    codec: Codec,
    opened: OpenedRun,
    unseen: ExplicitMemory,
    losses: Losses,
    baseline: Losses,
) -> Measured:
    fitted: dict[str, Any] = {"num_vectors": 0, "cpu_seconds": 0.0}
    if config.kind in STAGES:
        folder = codecs.folder_of(codec.name, codecs.folders_of(opened.settings.weights, opened.bank))
        fitted = dict(open_manifest(folder, kind=quantizer.KIND, version=quantizer.VERSION).extra)
        paper_bytes = codec.vector_bytes  # of codes, whatever the head size
    else:
        paper_bytes = codecs.of_kind(config.kind, PAPER, opened.context.dtype).vector_bytes
    records = codec.encode(unseen)
    num = len(records)
    keys, values = relative_errors(codec, unseen)
    text = losses.against(baseline, text=True)
    assert text is not None
    return Measured(
        codec=config.kind.name + (", separate" if config.separate else ""),
        name=codec.name,
        memory_bytes=codec.memory_bytes,
        record_bytes=codec.record_bytes,
        paper_memory_bytes=PAPER.memory_bytes(paper_bytes),
        paper_record_bytes=PAPER.record_bytes(paper_bytes),
        fitted_vectors=fitted["num_vectors"],
        fit_cpu_seconds=fitted["cpu_seconds"],
        error_keys=keys,
        error_values=values,
        encoded_per_second=num * _per_second(lambda: codec.encode(unseen)),
        decoded_per_second=num * _per_second(lambda: codec.decode(records)),
        text=text,
        probes=losses.against(baseline, text=False),
    )


def _sums(result: ArmResult) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Losses and counts of each document, or country."""
    values, weights, units = zip(
        *(
            (item.loss, item.tokens, item.unit)
            if isinstance(item, TextItem)
            else (item.loss / item.tokens, 1, item.unit)
            for item in result.items
        ),
        strict=True,
    )
    _, sums, counts = group_sums(values, units, counts=weights)
    return sums, counts


def _per_second(call: Callable[[], object]) -> float:
    """Calls per second of this process's CPU time and thread."""
    started, calls = time.process_time(), 0
    while (spent := time.process_time() - started) < SECONDS:
        call()
        calls += 1
    return calls / spent


def _render(rows: Sequence[Measured], baseline: Losses, without: Losses, opened: OpenedRun) -> str:
    names = ["text"] + ["probes"] * (len(baseline.results) - 1)
    losses = "; ".join(
        f"{name}: {ours.loss:.4f} with memories in the model's type, {none.loss:.4f} without memory"
        for name, ours, none in zip(names, baseline.results, without.results, strict=True)
    )
    first = _table(
        [
            "codec", "vectors, B", "record, B", "paper: vectors, B", "record, B", "1.12e8, TiB", "fitted on",
            "CPU s", "error keys", "values", "encode/s", "decode/s", "text, nats", "probes, nats",
        ],
        [
            [
                row.codec,
                f"{row.memory_bytes:,}",
                f"{row.record_bytes:,}",
                f"{row.paper_memory_bytes:,}",
                f"{row.paper_record_bytes:,}",
                f"{row.paper_record_bytes * PAPER_REFERENCES / 2**40:.2f}",
                f"{row.fitted_vectors:,}" if row.fitted_vectors else "–",
                f"{row.fit_cpu_seconds:.0f}" if row.fitted_vectors else "–",
                _percent(float(np.mean(row.error_keys))),
                _percent(float(np.mean(row.error_values))),
                f"{row.encoded_per_second:,.0f}",
                f"{row.decoded_per_second:,.0f}",
                _interval(row.text),
                _interval(row.probes),
            ]
            for row in rows
        ],
    )  # fmt: skip
    layers = range(opened.shape.num_layers)
    second = _table(
        ["codec", *(f"layer {layer}" for layer in layers)],
        [
            [
                row.codec,
                *(
                    f"{_percent(row.error_keys[layer])} / {_percent(row.error_values[layer])}"
                    for layer in layers
                ),
            ]
            for row in rows
        ],
    )
    return (
        f"Losses: {losses}. Text: own query, inference pattern. The last two columns: loss less that with the model's "
        "type, the same references read, 95 % interval over documents and countries. Bytes of a memory's keys and "
        "values, and of a record (which adds a byte per kept token), for this model and for the paper's. Errors: "
        f"squared, relative, on held-out references. Memories per CPU-second.\n\n{first}\n\n"
        f"Held-out error by layer, keys / values:\n\n{second}\n\n"
    )


def _render_speeds(speeds: dict[str, float]) -> str:
    vectors = PAPER_REFERENCES * 2 * PAPER.num_kept
    slow, fast = (vectors / speeds[f"encode, {by}"] / 3600 for by in ("faiss", "torch"))
    flops = 2 * (2 * 2**14 * 40 + 8 * 2**10 * 10 + 80 * 80)
    traffic = 2 * 4 * (2 * 2**14 + 8 * 2**10)
    return (
        "The paper's codec at head size 80, vectors per CPU-second, one thread: "
        + ", ".join(f"{label} {speed:,.0f}" for label, speed in speeds.items())
        + f". Its {vectors:.3g} vectors would take {slow:,.0f} CPU-hours to encode with faiss and {fast:,.0f} with "
        f"torch. Computed, not measured: {flops / 1e6:.1f} MFLOP a vector, {flops * 2 * PAPER.num_kept / 1e9:.1f} "
        f"GFLOP a memory beside the 308 GFLOP of compiling it; {flops * vectors / 1e18:.2f} EFLOP in all, "
        f"{flops * vectors / 30e12 / 3600:.0f} hours of one H100 at 30 TFLOP/s of float32 "
        f"(half of what it can), and {traffic * vectors / 3.35e12 / 3600:.0f} hours of its memory at 3.35 TB/s for "
        f"writing and reading {traffic / 1e3:.0f} KB of scores a vector.\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


if __name__ == "__main__":
    sys.exit(main())
