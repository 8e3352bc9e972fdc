"""Encode first, then split: the losses of both contexts, and of documents' own pasts as memories.

    python -m benchmarks.document_context RUN --root ROOT --output benchmarks/results/document_context

1. Held-out text and probes: one run's final weights compile what is read once in context `reference` and once in
   context `document`; every arm of either reads the same references in the same slots.
2. Documents of eleven rows: all sections of each held-out country, joined and cut. The last row is scored with nothing
   before it, and with the ten rows before it as memories, of which each chunk retrieves five: in either context, and
   another country's instead (shuffled, found by the same queries).

Differences are paired, with 95 % intervals over documents (text), countries (probes, long documents).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.origin import made_by
from data.documents import Split
from data.files import write_atomic
from launch import build
from launch.config import RunConfig
from launch.evaluate import HeldOut, held_out_readings
from launch.opened import OpenedRun, open_run
from memorybank.bank import BankReader
from memorybank.config import BankContext, QueryMode
from memorybank.embedder import Embedder
from memorybank.past import Past, PastReferences, WithPast, compile_past
from train.arms import Arm, Reading, reference_ids
from train.engine import ModelInput
from train.evaluate import ArmResult, ProbeItem, Setting, evaluate_probes, evaluate_text, to_json
from train.statistics import Floats, group_sums, mean_interval, paired_interval

ROWS_OF_PAST = 10
SAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Line:
    """An arm: its name, its sums and counts by unit, and the names of the arms that it is compared with."""

    name: str
    sums: Floats
    counts: Floats
    against: Sequence[str] = ()

    def cells(self, arms: dict[str, "Line"]) -> list[str]:
        """Loss, and the paired differences from the arms that it is compared with."""
        loss = mean_interval(self.sums, self.counts, samples=SAMPLES)
        found = [
            (name, paired_interval(self.sums, arms[name].sums, self.counts, samples=SAMPLES))
            for name in self.against
        ]
        differences = [f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}] against {name}" for name, d in found]
        return [
            self.name,
            f"{loss.mean:.4f} [{loss.low:.4f}, {loss.high:.4f}]",
            "; ".join(differences) or "–",
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder, or its name below --root")
    parser.add_argument("--root", default="runs", help="default: %(default)s")
    parser.add_argument(
        "--split", choices=["validation", "test"], default="validation", help="default: %(default)s"
    )
    parser.add_argument("--text-rows", type=int, default=48, help="held-out rows (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, required=True, help="path without ending: .md and .json are written"
    )
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    build.quiet_third_parties()
    torch.set_num_threads(1)
    started = time.process_time()
    opened = open_run(arguments.run, arguments.root)
    opened.config.evaluation.text_rows = arguments.text_rows
    split = Split(arguments.split)
    results, seconds = compare_contexts(opened, held_out_readings(opened, split))
    long, described = compare_pasts(opened, split)
    sections = [*tables(results), (described, long)]
    stage = opened.config.continual
    memory = None if stage is None else stage.memory
    text = "\n".join(
        [
            f"# Encode first, then split: {split.value} half",
            "",
            f"{made_by('document_context', given)}; "
            f"{time.process_time() - started:.0f} CPU-seconds on one thread.",
            "",
            f"Run `{opened.folder.name}`, step {opened.step}, weights {opened.engine.weights_hash()}; trained in "
            f"context `{opened.config.bank.context.value}`, source "
            f"`{'none' if memory is None else memory.source.value}`: the other context, and a past, it meets for the "
            "first time. Nats per token (text), per answer token (probes).",
            "",
            f"Compiled: {', '.join(f'{name}: {value}' for name, value in seconds.items())}.",
            "",
            *(line for title, lines in sections for line in _markdown(title, lines)),
        ]
    )
    write_atomic(arguments.output.with_suffix(".md"), text.encode())
    stored = {
        "contexts": {name: to_json(found) for name, found in results.items()},
        "long_documents": [
            {"arm": line.name, "sums": line.sums.tolist(), "counts": line.counts.tolist()} for line in long
        ],
        "compiled": seconds,
    }
    write_atomic(arguments.output.with_suffix(".json"), json.dumps(stored).encode())
    print(text)
    return 0


def compare_contexts(
    opened: OpenedRun, held_out: HeldOut
) -> tuple[dict[str, list[ArmResult]], dict[str, str]]:
    """The arms of both contexts, by context ("none": without memory), and what compiling them took."""
    text = [reading for reading in held_out.text_readings if reading.arm in (Arm.memory, Arm.shuffled)]
    facts = [
        reading
        for reading in held_out.probe_readings
        if reading.arm in (Arm.memory, Arm.shuffled, Arm.oracle)
    ]
    ids = reference_ids([*text, *facts])
    results: dict[str, list[ArmResult]] = {}
    seconds = {}
    for context in BankContext:
        other = replace(opened, config=_in_context(opened, context))
        started = time.process_time()
        cold, codec = other.cold_start()
        cold.compile(ids)
        seconds[context.value] = f"{len(ids):,} references in {time.process_time() - started:.0f} CPU-seconds"
        reader = BankReader(cold, codec)
        if not results:
            results["none"] = _evaluate(opened, held_out, [Reading(Arm.none)], [Reading(Arm.none)], reader)
        results[context.value] = _evaluate(opened, held_out, text, facts, reader)
    return results, seconds


def tables(results: dict[str, list[ArmResult]]) -> list[tuple[str, list[Line]]]:
    """A table of text for each query mode and pattern, and one of probes."""
    none_text, none_probes = results["none"]
    sections = []
    modes = dict.fromkeys((found.query, found.pattern) for found in results["document"] if found.is_text)
    for query, pattern in modes:
        assert query is not None
        assert pattern is not None
        chosen = {
            f"{found.arm.value}, {context}": found
            for context in ("reference", "document")
            for found in results[context]
            if found.is_text and (found.query, found.pattern) == (query, pattern)
        }
        title = f"Text, query {query.name}, {pattern.name} pattern ({len(none_text.items)} documents)"
        sections.append((title, _lines({"no memory": none_text, **chosen})))
    chosen = {
        f"{found.arm.value}, {context}": found
        for context in ("reference", "document")
        for found in results[context]
        if not found.is_text
    }
    title = f"Probes ({len(none_probes.items)} of {len({item.unit for item in none_probes.items})} countries)"
    sections.append((title, _lines({"no memory": none_probes, **chosen})))
    return sections


class Remembering:
    """An embedder that embeds a text once."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self.name, self.size = embedder.name, embedder.size

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One unit vector per text, (n, X)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        self._vectors.update(zip(new, self._embedder.embed(new), strict=True))
        return np.stack([self._vectors[text] for text in texts])


def compare_pasts(opened: OpenedRun, split: Split) -> tuple[list[Line], str]:
    """The last rows of long documents, with nothing, with their pasts, and with other documents' pasts."""
    context, model = opened.context, opened.config.model
    embedder, codec = Remembering(context.embedder()), opened.codec()
    documents = long_documents(opened, split)
    pasts: dict[str, list[Past]] = {"document": [], "reference": []}
    for tokens in documents.values():
        past = PastReferences(
            tokens[: ROWS_OF_PAST * model.row_tokens].tolist(),
            context.prepared.tokenizer,
            reference_tokens=model.reference_tokens,
        )
        for name, window in (("document", model.row_tokens), ("reference", None)):
            pasts[name].append(
                compile_past(past, opened.engine.encode, codec, embedder, window_tokens=window)
            )
    num_references = np.mean([len(past.references) for past in pasts["document"]])
    others = [*range(1, len(documents)), 0]
    sums: dict[str, list[float]] = {}
    for number, tokens in enumerate(documents.values()):
        read: dict[str, tuple[Past | None, QueryMode]] = {"no past": (None, QueryMode.own)}
        for query in QueryMode:
            read |= {
                f"past, document, query {query.name}": (pasts["document"][number], query),
                f"past, reference, query {query.name}": (pasts["reference"][number], query),
                f"another's past, document, query {query.name}": (pasts["document"][others[number]], query),
            }
        for name, (memories, query) in read.items():
            sums.setdefault(name, []).append(_row_loss(opened, tokens, memories, query, embedder))
    counts = np.full(len(documents), float(model.row_tokens))
    lines = []
    for name, values in sums.items():
        mode = name.rpartition(", query ")[2]
        against: list[str] = [] if name == "no past" else ["no past"]
        if not name.startswith(("no past", "past, document")):
            against.append(f"past, document, query {mode}")
        lines.append(Line(name, np.asarray(values), counts, against))
    title = (
        f"The last row of long documents: {len(documents)} countries of {(1 + ROWS_OF_PAST) * model.row_tokens:,} "
        f"tokens, {num_references:.0f} memories of the first {ROWS_OF_PAST * model.row_tokens:,}, five a chunk, no "
        "bank (query previous: the 64 tokens before the chunk)"
    )
    return lines, title


def long_documents(opened: OpenedRun, split: Split) -> dict[str, NDArray[np.int64]]:
    """Eleven rows of tokens of each held-out country that has as many: title lines and texts of its sections."""
    shards = opened.context.prepared.references.shards
    numbers = shards.corpus.select(split=split, refers=True)
    groups = shards.table["group"][numbers]
    needed = (1 + ROWS_OF_PAST) * opened.config.model.row_tokens
    documents = {}
    for group in np.unique(groups):
        own = numbers[groups == group].tolist()
        newline = np.array([opened.context.prepared.tokenizer.newline_id])
        joined = np.concatenate([part for number in own for part in (shards.tokens(number)[1:], newline)])
        if len(joined) >= needed:
            documents[shards.document(own[0]).id] = joined[:needed].astype(np.int64)
    return documents


def _row_loss(
    opened: OpenedRun, tokens: NDArray[np.int64], past: Past | None, query: QueryMode, embedder: Embedder
) -> float:
    """Nats of the last row, summed; its first token is predicted by the last one of the past."""
    model, tokenizer = opened.config.model, opened.context.prepared.tokenizer
    begin = len(tokens) - model.row_tokens
    memory = None
    if past is not None:
        delay = model.chunk_tokens if query is QueryMode.previous else 0
        chunks = [
            tokenizer.decode(tokens[at - delay : at - delay + model.chunk_tokens].tolist())
            for at in range(begin, len(tokens), model.chunk_tokens)
        ]
        source = WithPast(past, embedder, k=opened.config.retrieval.fresh)
        memory = BankReader(source, opened.codec()).batch(source.search(chunks)[None])
    row = torch.from_numpy(tokens[begin - 1 :])[None]
    losses = opened.engine.token_losses(ModelInput(row[:, :-1], row[:, 1:], memory))
    return float(losses.double().sum())


def _evaluate(
    opened: OpenedRun,
    held_out: HeldOut,
    text: Sequence[Reading],
    facts: Sequence[Reading],
    reader: BankReader,
) -> list[ArmResult]:
    config = opened.config
    setting = Setting(
        label="M",
        reader=reader,
        overlap_limit=config.retrieval.overlap_evaluation,
        batch_rows=config.evaluation.batch_rows,
    )
    return [
        *evaluate_text(opened.engine, held_out.text, text, setting),
        *evaluate_probes(
            opened.engine.model,
            held_out.probes,
            facts,
            setting,
            tokenizer=opened.context.prepared.tokenizer,
            reference_tokens=lambda number: [],
            row_tokens=config.model.row_tokens,
            answer_tokens=1,  # losses alone: nothing is decoded
        ),
    ]


def _in_context(opened: OpenedRun, context: BankContext) -> RunConfig:
    return replace(opened.config, bank=replace(opened.config.bank, context=context))


def _lines(arms: dict[str, ArmResult]) -> list[Line]:
    lines = []
    for name, found in arms.items():
        items = [
            (item.loss / item.tokens, 1.0) if isinstance(item, ProbeItem) else (item.loss, item.tokens)
            for item in found.items
        ]
        values, weights = zip(*items, strict=True)
        _, sums, counts = group_sums(values, [item.unit for item in found.items], counts=weights)
        arm, _, context = name.partition(", ")
        against = [] if not context else ["no memory"] if arm != "shuffled" else [f"memory, {context}"]
        if context == "document":
            against.append(f"{arm}, reference")
        lines.append(Line(name, sums, counts, against))
    return lines


def _markdown(title: str, lines: Sequence[Line]) -> list[str]:
    arms = {line.name: line for line in lines}
    rows = [["arm", "loss", "difference, paired"], ["---"] * 3, *(line.cells(arms) for line in lines)]
    return [f"**{title}**", "", *("| " + " | ".join(row) + " |" for row in rows), ""]


if __name__ == "__main__":
    sys.exit(main())
