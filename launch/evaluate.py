"""`memory3 evaluate`: what memory buys a trained run, on held-out text and on fact probes.

The references that any arm reads are found with the held-out text and the questions alone, encoded with the run's final
weights (and kept: `memorybank.cold`), and read by every arm in turn. The results go to `<run>/evaluation-<split>.json`,
those with the memories of a bank to `<run>/evaluation-<split>-<bank>.json`; the tables can be made later from several
runs and seeds (`memory3 report`).
Not here: the arms (`train.arms`), losses and tables (`train.evaluate`).
"""

import argparse
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.documents import Split
from data.files import fingerprint, named_apart, write_json_atomic
from data.references import ReferenceSource
from launch import build
from launch.opened import OpenedRun, library_folder, open_run
from memorybank.bank import BankReader, OnlineReader
from memorybank.library import Library
from train.arms import Arm, Bank, Reading, probe_readings, reference_ids, text_readings
from train.evaluate import (
    HIT_LIMIT,
    ArmResult,
    ProbeSet,
    Setting,
    TextSet,
    evaluate_probes,
    evaluate_text,
    from_json,
    relation_table,
    render,
    table,
    to_json,
)
from train.probes import search_probes
from train.stages import Reader


def run(arguments: argparse.Namespace) -> int:
    """Evaluate a run, write its results, and print its table."""
    build.quiet_third_parties()
    opened = open_run(arguments.run, arguments.root)
    split = Split(arguments.split)
    library = None
    if arguments.bank is not None:
        name, stale = opened.context.embedder().name, arguments.stale == "allow"
        library = opened.library(arguments.bank, embedder=name, stale=stale)
    results = save_results(opened, split, library=library)
    samples = opened.config.evaluation.bootstrap_samples
    state = opened.checkpoint.state
    print(f"{opened.config.run}, {state.stage} step {state.step:,}: {arguments.split} half")
    print(render_results([results], samples=samples, headline=headline(opened.context)))
    print(f"results: {results_path(opened.folder, arguments.split, _name_of(library, opened.folder))}")
    return 0


def save_results(opened: OpenedRun, split: Split, *, library: Library | None = None) -> list[ArmResult]:
    """Evaluate a run and write what came out, or read it when these weights were evaluated alike before.

    Arguments are those of `evaluate`.
    """
    path, config = results_path(opened.folder, split.value, _name_of(library, opened.folder)), opened.config
    identity = {
        "weights": opened.engine.weights_hash(),
        "bank": None if library is None else library.fingerprint,
        "settings": fingerprint([asdict(config.evaluation), str(config.retrieval), config.bank.context.name]),
        "inputs": opened.context.prepared.inputs,
    }
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if {key: stored.get(key) for key in identity} == identity and "step" in stored:
            return from_json(stored)
    results = evaluate(opened, split, library=library)
    described = None if library is None else f"state {library.number}, {library.settings.codec}"
    state = opened.checkpoint.state
    stated = {
        **identity,
        "stage": state.stage,
        "step": state.step,
        "bank_described": described,
        "headline": headline(opened.context),
    }
    write_json_atomic(path, {**stated, **to_json(results)})
    return results


def headline(context: build.Context) -> list[str]:
    """The relations of the headline: decided on validation probes and the whole bank, as `memory3 prepare` shows."""
    return [name for name, (_, _, five) in context.hit_shares().items() if five >= HIT_LIMIT]


def results_path(folder: Path, split: str, bank: str | None = None) -> Path:
    """Where a run's results of a split are kept; those with the memories of a bank apart, by the bank's name."""
    return folder / (f"evaluation-{split}.json" if bank is None else f"evaluation-{split}-{bank}.json")


def _name_of(library: Library | None, run: Path) -> str | None:
    """A bank by its folder's name; one that is not the run's own is marked by where it lies."""
    if library is None:
        return None
    folder = library.folder.resolve()
    return folder.name if folder == library_folder(run, None).resolve() else named_apart(folder)


def banks_evaluated(folder: Path, split: str) -> dict[str, str]:
    """The banks that a run was evaluated with on a split, by name, and which state and codec they had."""
    first = f"evaluation-{split}-"
    return {
        path.stem.removeprefix(first): json.loads(path.read_text(encoding="utf-8"))["bank_described"]
        for path in sorted(folder.glob(f"{first}*.json"))
    }


def read_results(folder: Path, split: str, bank: str | None = None) -> list[ArmResult]:
    """The results that `memory3 evaluate` wrote, with the memories of a bank if one is named.

    Raises:
        ValueError: The run was not evaluated on this split.
    """
    path = results_path(folder, split, bank)
    if not path.exists():
        raise ValueError(f"{path} does not exist; run `memory3 evaluate {folder.name} --split {split}` first")
    return from_json(json.loads(path.read_text(encoding="utf-8")))


def read_position(folder: Path, split: str, bank: str | None = None) -> tuple[str, int] | None:
    """The stage and the step whose weights were evaluated; None if an older version wrote the file."""
    stored = json.loads(results_path(folder, split, bank).read_text(encoding="utf-8"))
    return (stored["stage"], stored["step"]) if "step" in stored else None


def read_headline(folder: Path, split: str, bank: str | None = None) -> list[str] | None:
    """The headline's relations as `memory3 evaluate` found them; None if an older one wrote the file."""
    stored = json.loads(results_path(folder, split, bank).read_text(encoding="utf-8"))
    relations: list[str] | None = stored.get("headline")
    return relations


def render_results(
    runs: list[list[ArmResult]], *, samples: int = 2000, headline: Collection[str] | None = None
) -> str:
    """The table of one evaluation, or of several seeds' evaluations; without a memory arm, the losses alone."""
    if any(result.model == "M" for result in runs[0]):
        return render(
            table(runs, headline=headline, samples=samples), relation_table(runs, headline=headline)
        )
    return "".join(
        f"{result.model} {result.arm.value}: {result.loss:.4f} nats over {len(result.items)} "
        f"{'documents' if result.is_text else 'probes'}\n"
        for result in runs[0]
    )


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out text and probes of a split, with what every arm reads."""

    text: TextSet
    probes: ProbeSet
    text_readings: list[Reading]
    probe_readings: list[Reading]


def evaluate(opened: OpenedRun, split: Split, *, library: Library | None = None) -> list[ArmResult]:
    """Every arm that concerns a run's weights.

    Args:
        opened: The run; with memory in its last stage it is M, otherwise the control C.
        split: validation or test.
        library: A library to read, of whatever age, which is then in every row; None compiles what is needed with the
            final weights.
    """
    config = opened.config
    reads_memory = config.memory is not None
    references: ReferenceSource = opened.context.prepared.references if library is None else library
    held_out = held_out_readings(opened, split, library)
    text, facts = held_out.text_readings, held_out.probe_readings
    if not reads_memory:
        text = [reading for reading in text if reading.arm is Arm.none]
        facts = [reading for reading in facts if reading.arm in (Arm.none, Arm.rag)]
    else:
        facts = [reading for reading in facts if reading.arm is not Arm.rag]
    context = opened.context
    reader: Reader = OnlineReader(references)  # of a control, which reads nothing
    age_steps = None
    if library is not None:
        reader = BankReader(library, opened.codec_of(library))
        age_steps = opened.step - library.settings.step
    elif reads_memory:
        cold, codec = opened.cold_start()
        cold.compile(reference_ids([*text, *facts]))
        reader, age_steps = BankReader(cold, codec), 0
    setting = Setting(
        label="M" if reads_memory else "C",
        reader=reader,
        overlap_limit=config.retrieval.overlap_evaluation,
        age_steps=age_steps,
        batch_rows=config.evaluation.batch_rows,
    )

    def reference_tokens(number: int) -> list[int]:
        tokens_NR, lengths_N, _ = references.tokens([number])
        return [int(token) for token in tokens_NR[0, : int(lengths_N[0])]]

    return [
        *evaluate_text(opened.engine, held_out.text, text, setting),
        *evaluate_probes(
            opened.engine.model,
            held_out.probes,
            facts,
            setting,
            tokenizer=context.prepared.tokenizer,
            reference_tokens=reference_tokens,
            row_tokens=config.model.row_tokens,
            answer_tokens=config.evaluation.answer_tokens,
        ),
    ]


def held_out_readings(opened: OpenedRun, split: Split, library: Library | None = None) -> HeldOut:
    """What every arm reads: found among all that the bank may hold, with the text and questions alone."""
    config, context = opened.config, opened.context
    retrieval, embedder = config.retrieval, context.embedder()
    references: ReferenceSource = context.prepared.references if library is None else library
    search = context.search(embedder, references)
    ids = opened.bank_ids if library is None else library.live_ids()
    index = search.index(ids) if library is None else library
    document_of = np.full(ids.max(initial=0) + 1, -1, np.int64)
    document_of[ids] = references.documents_of(ids)
    bank = Bank(ids, document_of)
    text = context.held_out(split, config.evaluation.text_rows)
    row_documents = _documents_in(references, text)
    found = search.neighbours(
        text.tokens_MT1[:, :-1].numpy(),
        row_documents,
        index,
        k=retrieval.fresh,
        limit=retrieval.overlap_evaluation,
    )
    trained = None if config.memory is None else config.memory.query
    readings = text_readings(
        found.ids_MCk,
        row_documents,
        bank,
        seed=config.evaluation.seed,
        window=retrieval.window,
        random_query=trained,
    )
    probes = [probe for probe in context.prepared.probes if probe.split is split][
        : config.evaluation.max_probes
    ]
    if not probes:
        return HeldOut(text, ProbeSet([], [], [], [], {}), readings, [])
    searched = search_probes(
        probes,
        context.prepared.tokenizer,
        context.prepared.shards.corpus,
        references,
        context.vectors(embedder).vectors,
        index,
        retrieval,
    )
    facts = probe_readings(
        searched.ids_Mk,
        searched.documents,
        bank,
        relations=[probe.relation for probe in probes],
        groups=[probe.group for probe in probes],
        holding=searched.probe_set.holding,
        seed=config.evaluation.seed,
    )
    return HeldOut(text, searched.probe_set, readings, facts)


def _documents_in(references: ReferenceSource, text: TextSet) -> list[NDArray[np.int64]]:
    """The documents of each row, by their numbers among the references; a negative number of its own, if not there."""
    numbers = references.document_numbers(list(text.names.values()))
    number_of = {
        corpus_number: int(number) if number >= 0 else -2 - corpus_number
        for corpus_number, number in zip(text.names, numbers, strict=True)
    }
    return [np.array([number_of[int(n)] for n in own], np.int64) for own in text.row_documents]
