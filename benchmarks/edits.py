"""What a model answers after its bank was edited: facts of held-out countries made false, and taken out.

    python -m benchmarks.edits RUN ... --root runs --output benchmarks/results/edits

For each run a library of the held-out countries' documents is built below `--work`; copies of it are edited by the
library's own functions, a few by the command line too, and questions are asked as fact probes are: five references
found with the question alone, one memory each, the likelihood of an answer and its end mark, in float32. Nothing of
the run is written but search vectors, in the prepared corpus's cache.

An edit puts a false value in place of the true one, everywhere in the document that the probe asks about. The false
value is another held-out country's, of the same relation and shape (digits, words) and of like length, and stands
nowhere in the document. A third value, chosen alike, is the sharper control: it tells that the true value went from
that the false one came.

All countries of one half are edited at once, one relation at a time, and the other half's questions see what an edit
elsewhere does. That is the same as one edit at a time unless a question reads, or would have read, a reference of
another document that was edited; such edits are made again alone.

Not here: how banks are edited (`memorybank.edits`), how probes are asked (`train.evaluate`).
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.origin import made_by
from data.documents import Document, Probe
from data.files import fingerprint, write_atomic
from data.tokenizer import Tokenizer
from launch import build, cli
from launch.opened import OpenedRun, open_run
from memorybank.bank import BankReader, OnlineReader
from memorybank.edits import Compiler, Documents, Editor
from memorybank.embedder import VectorCache
from memorybank.library import Library, state_numbers
from memorybank.retriever import Retriever
from model.transformer import Memory3LM
from train.arms import fold
from train.evaluate import Setting, answer_losses
from train.probes import question_text
from train.stages import Reader
from train.statistics import Floats, Interval, group_sums, mean_interval

Ids = NDArray[np.int64]

NEAREST = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every run, and write the tables and every edit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders, or names below --root: seeds of one recipe"
    )
    parser.add_argument("--root", default="runs", help="default: %(default)s")
    parser.add_argument("--work", type=Path, help="where libraries are built (default: ROOT/edits)")
    parser.add_argument("--seed", type=int, default=0, help="chooses false values (default: %(default)s)")
    parser.add_argument(
        "--commands",
        type=int,
        default=3,
        help="edits of each run made by the command line too (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="path without ending: .md and .json")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    build.quiet_third_parties()
    origin = made_by("edits", given)
    runs: list[list[Measured]] = []
    differences: list[float] = []
    for run in arguments.runs:
        opened = open_run(run, arguments.root)
        probes = opened.context.prepared.probes
        bench = Bench(opened, (arguments.work or Path(arguments.root) / "edits") / opened.config.run, probes)
        edits, left_out = choose_edits(probes, bench.text, bench.length, seed=arguments.seed)
        read = [asked.holds[0] for asked in bench.ask(bench.base, edits)]
        left_out["held by nothing that the question reads"] = read.count(False)
        edits = [edit for edit, is_read in zip(edits, read, strict=True) if is_read]
        measured: list[Measured] = []
        for relation in dict.fromkeys(edit.probe.relation for edit in edits):
            measured += measure(bench, [edit for edit in edits if edit.probe.relation == relation])
            print(f"{run}, {relation}: {len(measured)} of {len(edits)} edits", file=sys.stderr, flush=True)
            if not runs:
                _write(arguments, origin, [measured], left_out, differences)  # of the relations so far
        runs.append(measured)
        step = max(1, len(measured) // max(1, arguments.commands))
        differences += by_command(bench, measured[::step][: arguments.commands], arguments.root)
        _write(arguments, origin, runs, left_out, differences)
    print(arguments.output.with_suffix(".md").read_text())
    return 0


@dataclass(frozen=True, slots=True)
class Edit:
    """A fact and what is put in its place.

    Attributes:
        probe: The question, its true answer, and the document that holds it.
        false: The value put in its place.
        third: The value of the control.
        half: 0 or 1: which half of the countries the probe's country belongs to.
    """

    probe: Probe
    false: str
    third: str
    half: int

    @property
    def true(self) -> str:
        """The value that the document holds."""
        return self.probe.answer.strip()


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of a question in one state of a library.

    Attributes:
        true: Nats of the true answer.
        false: Nats of the false one.
        documents: Ids of the documents whose references were read.
        holds: Whether what was read of the probe's own document holds the true value, and the false one.
        elsewhere: Whether what was read of other documents holds the true value.
        lowest: The score of the last reference that was read.
    """

    true: float
    false: float
    documents: tuple[str, ...] = ()
    holds: tuple[bool, bool] = (False, False)
    elsewhere: bool = False
    lowest: float = -np.inf


@dataclass(slots=True)
class Measured:
    """An edit of one run, in every state.

    Attributes:
        edit: The edit.
        tokens: Of the true answer and of the false one, end marks included.
        states: What was answered, by state.
        alone: Whether the edit was made again alone.
    """

    edit: Edit
    tokens: tuple[int, int]
    states: dict[str, Asked] = field(default_factory=dict)
    alone: bool = False

    def margin(self, state: str, *, per_token: bool = False) -> float:
        """Nats by which the false answer is the likelier one."""
        asked, (true, false) = self.states[state], self.tokens if per_token else (1, 1)
        return asked.true / true - asked.false / false

    def change(self, state: str, answer: str) -> float:
        """Nats that the log-likelihood of the true, or the false, answer gained since before."""
        return float(getattr(self.states["before"], answer) - getattr(self.states[state], answer))


class CachedEmbedder:
    """An embedder whose vectors are kept: the bank's texts stand in the prepared corpus's cache already."""

    def __init__(self, cache: VectorCache, *, name: str, size: int) -> None:
        self._cache, self.name, self.size = cache, name, size

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one unit vector per text, (n, X)."""
        return self._cache.vectors(texts)


def shape(value: str) -> str:
    """Return what two values of one format share: words and digits made alike.

    >>> shape("2 December 1971"), shape("83,600 sq km")
    ('0 A 0000', '00,000 A A')
    """
    return re.sub(r"[^\W\d_]+", "A", re.sub(r"\d", "0", value))


def replaced(text: str, old: str, new: str) -> tuple[str, int]:
    """Return the text with a value in another's place, and how often: whole words and whole numbers only."""
    words = r"\s+".join(map(re.escape, old.split()))
    return re.subn(rf"(?<!\w)(?<!\d[.,]){words}(?!\w)(?![.,]\d)", lambda _: new, text)


def holds(text: str, value: str) -> bool:
    """Whether a text holds a value, as whole words and whole numbers."""
    return replaced(fold(text), fold(value), "")[1] > 0


def choose_edits(
    probes: Sequence[Probe], text: Callable[[str], str], length: Callable[[str], int], *, seed: int = 0
) -> tuple[list[Edit], dict[str, int]]:
    """Return an edit for every probe that has one, and how many were left out, by reason.

    Args:
        probes: Questions; values are exchanged within a relation, among countries.
        text: Text of a document by id.
        length: Tokens of a value; the two are drawn from the `NEAREST` in length, since a short answer is a likely one.
        seed: Chooses values and halves.
    """
    rng = np.random.default_rng(seed)
    countries = sorted({probe.group for probe in probes})
    half_of = dict(zip(countries, (rng.permutation(len(countries)) % 2).tolist(), strict=True))
    edits, left_out = [], {"no other value of that shape": 0, "not in the document as it stands": 0}
    for probe in probes:
        true, own = probe.answer.strip(), text(probe.document)
        values = sorted(
            {
                value
                for other in probes
                if other.relation == probe.relation and other.group != probe.group
                for value in [other.answer.strip()]
                if shape(value) == shape(true) and value != true and not holds(own, value)
            }
        )
        if len(values) < 2:
            left_out["no other value of that shape"] += 1
        elif not replaced(own, true, "")[1]:
            left_out["not in the document as it stands"] += 1
        else:
            nearest = sorted(values, key=lambda value: abs(length(value) - length(true)))[:NEAREST]
            false, third = rng.choice(nearest, size=2, replace=False).tolist()
            edits.append(Edit(probe, false, third, half_of[probe.group]))
    return edits, left_out


class Bench:
    """One run, its library of held-out countries, and copies of it that are edited."""

    def __init__(self, opened: OpenedRun, work: Path, probes: Sequence[Probe]) -> None:
        """Build the library below `work` if it is not there."""
        self.opened = opened
        self.base, self._copy = work / "library", work / "edited"
        embedder = opened.context.embedder()
        self.embedder = CachedEmbedder(
            opened.context.vectors(embedder), name=embedder.name, size=embedder.size
        )
        self.compiler: Compiler = replace(opened.compiler(self.base), embedder=self.embedder)
        self._corpus = opened.context.prepared.shards.corpus
        self._model = Memory3LM(opened.config.model)  # in float32: bfloat16 rounds answers apart
        self._model.load_state_dict(opened.engine.model.state_dict())
        self._model.to(opened.engine.device).eval()
        if not state_numbers(self.base):
            Editor(folder=self.base, compiler=self.compiler).build(self._cut(self._held_out(probes)))

    def text(self, document_id: str) -> str:
        """The text of a document of the corpus."""
        return self.document(document_id).text

    def document(self, document_id: str) -> Document:
        """A document of the corpus."""
        return self._corpus.document(self._corpus.number(document_id))

    def fresh_copy(self) -> Path:
        """A copy of the library, in place of the copy before; pieces never change, so that links will do."""
        shutil.rmtree(self._copy, ignore_errors=True)
        return Path(shutil.copytree(self.base, self._copy, copy_function=os.link))

    def changed(self, edits: Sequence[Edit], value: Callable[[Edit], str]) -> list[Document]:
        """The documents of edits, with another value in the true one's place."""
        return [
            replace(before, text=replaced(before.text, edit.true, value(edit))[0])
            for edit in edits
            for before in [self.document(edit.probe.document)]
        ]

    def remove(self, folder: Path, edits: Sequence[Edit]) -> None:
        """Take the documents of edits out of a library."""
        with Library.open(folder) as library:
            numbers = library.document_numbers([edit.probe.document for edit in edits])
        Editor(folder=folder).remove(numbers)

    def replace(self, folder: Path, edits: Sequence[Edit], value: Callable[[Edit], str]) -> None:
        """Put other values into the documents of edits."""
        Editor(folder=folder, compiler=self.compiler).replace(self._cut(self.changed(edits, value)))

    def ask(self, folder: Path | None, edits: Sequence[Edit]) -> list[Asked]:
        """Ask every edit's question in a library, or without memory, for its true answer and its false one."""
        if folder is None:
            reader = OnlineReader(self.opened.context.prepared.references)  # of what nobody reads
            return [Asked(true, false) for true, false in self._losses(edits, None, reader)]
        with Library.open(folder) as library:
            found = self._retriever(library).neighbours(
                [question_text(edit.probe) for edit in edits],
                tokens=[self._tokens(edit.probe.question) for edit in edits],
            )
            losses = self._losses(edits, found.ids_MCk, BankReader(library, self.opened.codec_of(library)))
            return [
                self._asked(
                    library, edit, ids[ids >= 0].tolist(), float(scores[ids >= 0].min(initial=np.inf)), *loss
                )
                for edit, ids, scores, loss in zip(
                    edits, found.ids_MCk[:, 0], found.scores_MCk[:, 0], losses, strict=True
                )
            ]

    def rivals(self, edits: Sequence[Edit]) -> list[dict[str, float]]:
        """For each edit's question, the best score of every document among its candidates in the library."""
        with Library.open(self.base) as library:
            vectors = self.embedder.embed([question_text(edit.probe) for edit in edits])
            scores_Mc, ids_Mc = library.search(vectors, self.opened.config.retrieval.candidates)
            found = []
            for scores, ids in zip(scores_Mc, ids_Mc, strict=True):
                best: dict[str, float] = {}
                for score, number in zip(scores.tolist(), ids.tolist(), strict=True):
                    best.setdefault(library.describe(number).document, score)
                found.append(best)
            return found

    def _held_out(self, probes: Sequence[Probe]) -> list[Document]:
        """Every document of the probes' countries that the run may read."""
        references, table = self.opened.context.prepared.references, self._corpus.table
        numbers = np.unique(references.document_of[self.opened.bank_ids])
        countries = {int(table["group"][self._corpus.number(probe.document)]) for probe in probes}
        held = numbers[np.isin(table["group"][numbers], sorted(countries))]
        return [self._corpus.document(number) for number in held.tolist()]

    def _cut(self, documents: Sequence[Document]) -> Documents:
        named = fingerprint([[document.id, document.text] for document in documents])
        return Documents({"documents": named}, lambda: map(self.compiler.cutter.cut, documents))

    def _asked(
        self, library: Library, edit: Edit, ids: list[int], lowest: float, true: float, false: float
    ) -> Asked:
        cited = [library.describe(number).document for number in ids]
        texts = [library.text(number) for number in ids]
        own = "\n".join(text for text, name in zip(texts, cited, strict=True) if name == edit.probe.document)
        rest = "\n".join(text for text, name in zip(texts, cited, strict=True) if name != edit.probe.document)
        held = holds(own, edit.true), holds(own, edit.false)
        return Asked(true, false, tuple(dict.fromkeys(cited)), held, holds(rest, edit.true), lowest)

    def _losses(
        self, edits: Sequence[Edit], ids_MCK: Ids | None, reader: Reader
    ) -> list[tuple[float, float]]:
        setting = Setting(label="M", reader=reader, batch_rows=self.opened.config.evaluation.batch_rows)
        prompts = [[self._tokenizer.bos_id, *self._tokens(edit.probe.question)] for edit in edits]
        true, false = (
            answer_losses(self._model, prompts, list(answers), ids_MCK, setting).tolist()
            for answers in zip(*map(self._answers, edits), strict=True)
        )
        return list(zip(true, false, strict=True))

    def length(self, value: str) -> int:
        """Tokens of a value."""
        return len(self._tokens(f" {value}"))

    def lengths(self, edit: Edit) -> tuple[int, int]:
        """Tokens of the true answer and of the false one, with the end mark."""
        true, false = map(len, self._answers(edit))
        return true, false

    def _answers(self, edit: Edit) -> tuple[list[int], list[int]]:
        true, false = (
            [*self._tokens(f" {value}"), self._tokenizer.newline_id] for value in (edit.true, edit.false)
        )
        return true, false

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.opened.context.prepared.tokenizer

    def _retriever(self, library: Library) -> Retriever:
        retrieval = self.opened.config.retrieval
        return Retriever(
            self.embedder,
            library,
            library,
            k=retrieval.fresh,
            candidates=retrieval.candidates,
            limit=retrieval.overlap_evaluation,
        )


def measure(bench: Bench, edits: Sequence[Edit]) -> list[Measured]:
    """Make the edits of a relation, and ask every question in every state."""
    measured = [Measured(edit, bench.lengths(edit)) for edit in edits]
    for state, folder in (("without memory", None), ("before", bench.base)):
        for one, asked in zip(measured, bench.ask(folder, edits), strict=True):
            one.states[state] = asked
    rivals = bench.rivals(edits)
    for half in (0, 1):
        made = [edit for edit in edits if edit.half == half]
        documents = {edit.probe.document for edit in made}
        states = _edited(bench, made, edits)
        for place, one in enumerate(measured):
            found = {state: answers[place] for state, answers in states.items()}
            if one.edit.half != half:
                one.states |= {"elsewhere": found["edited"], "removed elsewhere": found["removed"]}
                continue
            others = documents - {one.edit.probe.document}
            one.alone = any(
                not others.isdisjoint(asked.documents)
                or any(rivals[place].get(other, -np.inf) >= asked.lowest for other in others)
                for asked in found.values()
            )
            if one.alone:
                alone = _edited(bench, [one.edit], [one.edit])
                found = {state: answers[0] for state, answers in alone.items()}
            one.states |= found
    return measured


def by_command(bench: Bench, measured: Sequence[Measured], root: str) -> list[float]:
    """Make edits one at a time by `memory3 bank`; return their largest differences to what was measured, nats."""
    differences = []
    for one in measured:
        folder, file, largest = bench.fresh_copy(), bench.base.parent / "corrected.jsonl", 0.0
        (document,) = bench.changed([one.edit], lambda edit: edit.false)
        line = {"id": document.id, "title": document.title, "text": document.text}
        file.write_text(json.dumps(line) + "\n", encoding="utf-8")
        run = str(bench.opened.folder)
        for state, arguments in (
            ("edited", ("replace", run, str(file), "--source", document.source)),
            ("removed", ("remove", run, document.id)),
        ):
            with redirect_stdout(sys.stderr):
                code = cli.main(["bank", *arguments, "--bank", str(folder), "--root", root])
            if code:
                raise ValueError(f"memory3 bank {' '.join(arguments)} ended with {code}")
            (asked,), before = bench.ask(folder, [one.edit]), one.states[state]
            largest = max(largest, abs(asked.true - before.true), abs(asked.false - before.false))
        differences.append(largest)
    return differences


def _edited(bench: Bench, made: Sequence[Edit], asking: Sequence[Edit]) -> dict[str, list[Asked]]:
    """What is answered after each kind of edit; where none is made, what was answered before."""
    if not made:
        return dict.fromkeys(("edited", "third value", "removed"), bench.ask(bench.base, asking))
    folder, states = bench.fresh_copy(), {}
    bench.replace(folder, made, lambda edit: edit.false)
    states["edited"] = bench.ask(folder, asking)
    bench.replace(folder, made, lambda edit: edit.third)
    states["third value"] = bench.ask(folder, asking)
    bench.remove(folder, made)
    states["removed"] = bench.ask(folder, asking)
    return states


def _write(
    arguments: argparse.Namespace,
    origin: str,
    runs: Sequence[Sequence[Measured]],
    left_out: Mapping[str, int],
    differences: Sequence[float],
) -> None:
    head = (
        f"# Edits\n\n{origin}\n\n"
        f"{_remarks(runs)} Probes left out: {'; '.join(f'{count} {why}' for why, count in left_out.items())}. "
    )
    if differences:
        head += (
            f"{len(differences)} edits were made by `memory3 bank replace` and `remove` as well, one by one: answers "
            f"differ by at most {max(differences):.4f} nats from those below.\n\n"
        )
    write_atomic(arguments.output.with_suffix(".md"), (head + render(runs)).encode())
    rows = [
        json.dumps(_plain(one, run))
        for run, found in zip(arguments.runs, runs, strict=False)
        for one in found
    ]
    write_atomic(arguments.output.with_suffix(".json"), ("[\n" + ",\n".join(rows) + "\n]\n").encode())


def render(runs: Sequence[Sequence[Measured]]) -> str:
    """The tables, over all runs: intervals resample countries, and signs are those of each run."""

    def outranks(state: str, *, per_token: bool = False) -> _Measure:
        return lambda one: float(one.margin(state, per_token=per_token) > 0)

    def margin(state: str) -> _Measure:
        return lambda one: one.margin(state)

    def change(state: str, answer: str) -> _Measure:
        return lambda one: one.change(state, answer)

    def falls(state: str, answer: str) -> _Measure:
        return lambda one: float(one.change(state, answer) < 0)

    shares = _table(
        ["state of the bank", "false answer outranks true", "per token", "margin, nats"],
        [
            [
                state,
                _percent(_interval(runs, outranks(state))),
                _percent(_interval(runs, outranks(state, per_token=True))),
                _nats(_interval(runs, margin(state))),
            ]
            for state in ("without memory", "before", "elsewhere", "edited", "third value")
        ],
    )
    controls = ("before", "elsewhere", "third value")
    differences = _table(
        ["edited, less", "false answer outranks true", "runs", "per token", "margin, nats", "runs"],
        [
            [
                state,
                _percent(_interval(runs, ranks := _less(outranks("edited"), outranks(state))), "+.1%"),
                _signs(runs, ranks),
                _percent(
                    _interval(
                        runs, _less(outranks("edited", per_token=True), outranks(state, per_token=True))
                    ),
                    "+.1%",
                ),
                _nats(_interval(runs, margins := _less(margin("edited"), margin(state)))),
                _signs(runs, margins),
            ]
            for state in controls
        ],
    )
    removals = _table(
        ["after", "true answer falls", "its change, nats", "runs", "false answer falls", "its change, nats"],
        [
            [
                state,
                _percent(_interval(runs, falls(state, "true"))),
                _nats(_interval(runs, change(state, "true"))),
                _signs(runs, change(state, "true")),
                _percent(_interval(runs, falls(state, "false"))),
                _nats(_interval(runs, change(state, "false"))),
            ]
            for state in ("removed", "removed elsewhere", "edited", "third value")
        ],
    )
    parts = [
        (relation, [[one for one in run if one.edit.probe.relation == relation] for run in runs])
        for relation in dict.fromkeys(one.edit.probe.relation for one in runs[0])
    ]
    relations = _table(
        ["relation", "edits", "outranks: before", "edited", "third value", "margin, less before",
         "less third value", "true answer falls when removed"],
        [
            [
                relation,
                str(len(part[0])),
                *(f"{_interval(part, outranks(state)).mean:.0%}" for state in ("before", "edited", "third value")),
                *(
                    _nats(_interval(part, _less(margin("edited"), margin(state))))
                    for state in ("before", "third value")
                ),
                f"{_interval(part, falls('removed', 'true')).mean:.0%}",
            ]
            for relation, part in parts
        ],
    )  # fmt: skip
    return f"""\
**Replaced**

{shares}

{differences}

The headline is the likelihood of the whole answer and its end mark, by which decoding chooses; "per token" corrects
for length, in which values of one shape hardly differ. Margin: nats by which the false answer is the likelier one.
Elsewhere: the documents of the other half of the countries were replaced. Third value: the document holds neither.

**Removed**

{removals}

Change: log-likelihood now less before. Elsewhere: the documents of the other half of the countries were removed.

**By relation**

{relations}

95 % intervals over countries, all runs together; runs: the sign in each.
"""


_Measure = Callable[[Measured], float]


def _less(one: _Measure, other: _Measure) -> _Measure:
    return lambda measured: one(measured) - other(measured)


def _values(run: Sequence[Measured], measure: _Measure) -> tuple[Floats, Floats]:
    _, sums, counts = group_sums([measure(one) for one in run], [one.edit.probe.group for one in run])
    return sums, counts


def _interval(runs: Sequence[Sequence[Measured]], measure: _Measure) -> Interval:
    sums, counts = zip(*(_values(run, measure) for run in runs), strict=True)
    return mean_interval(np.stack(sums), np.stack(counts), samples=10_000)


def _signs(runs: Sequence[Sequence[Measured]], measure: _Measure) -> str:
    totals = [sum(map(measure, run)) for run in runs]
    return "".join("+" if total > 0 else "-" if total < 0 else "0" for total in totals)


def _percent(interval: Interval, form: str = ".1%") -> str:
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _nats(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _remarks(runs: Sequence[Sequence[Measured]]) -> str:
    first, every = runs[0], [one for run in runs for one in run]
    countries = {one.edit.probe.group for one in first}
    turned = [one for one in every if (one.margin("edited") > 0) != (one.margin("before") > 0)]
    to_false = sum(one.margin("edited") > 0 for one in turned)
    return (
        f"{len(first)} edits of facts of {len(countries)} held-out countries, validation and test halves (nothing is "
        f"chosen by this), in {len(runs)} runs. After the edit the question read the false value in its document for "
        f"{sum(one.states['edited'].holds[1] for one in first)} of them, and the true one in another document for "
        f"{sum(one.states['edited'].elsewhere for one in first)}; {sum(one.alone for one in first)} were made again "
        f"alone. Of {len(every)} edits, all runs, {to_false} turned the ranking to the false answer and "
        f"{len(turned) - to_false} to the true one."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(one: Measured, run: str) -> dict[str, object]:
    """An edit as JSON: losses in nats."""
    probe = one.edit.probe
    return {
        "run": run,
        "probe": probe.id,
        "country": probe.group,
        "relation": probe.relation,
        "true": one.edit.true,
        "false": one.edit.false,
        "third": one.edit.third,
        "tokens": one.tokens,
        "alone": one.alone,
        "nats": {state: [round(asked.true, 4), round(asked.false, 4)] for state, asked in one.states.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
