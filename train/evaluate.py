"""What memory buys: the losses of every arm on held-out text and on probes, and the table that compares them.

Each arm is one `Reading` (`arms`), run by one function; its result keeps sums per document or per probe, so
that the table can be made later, from several runs and seeds. A row states what it covers: tokens or probes,
query mode, pattern, filter, hits, age of the generation. A difference is the row's loss less that of M's
memory arm, paired over the same tokens or probes: positive means that memory is better.

`evaluation-<split>.json`, beside what the results were made of (`launch.evaluate`):

    {"format": "memory3-evaluation", "version": 1, "results": [{"arm", "model", ..., "items": [{...}]}]}

Invariants: no gradient; order and size of batches decide nothing; all arms of one table cover the same items.

Not here: retrieval (`memorybank`), which references an arm reads (`arms`), the bootstrap (`statistics`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.documents import Probe
from data.tokenizer import Tokenizer
from memorybank.config import QueryMode
from model.generate import FixedMemory, generate
from model.loss import IGNORE
from model.memory import MemoryBatch, ReferenceBatch
from model.transformer import Memory3LM
from train.arms import Arm, Ids, Pattern, Reading, fold, hits
from train.distributed import Ranks
from train.engine import Inference, InferenceEngine, ModelInput
from train.stages import Reader
from train.statistics import Floats, Interval, group_sums, mean_interval, paired_interval

HIT_LIMIT = 0.5
"""Share of probes with a hit among the first five references, below which the headline omits a relation."""

_FORMAT, _VERSION = "memory3-evaluation", 1
_ALONE = Ranks(0, 1, torch.device("cpu"))


class Scorer(Protocol):
    """Something that gives the loss of every target: an engine, or a model alone."""

    def token_losses(self, inputs: ModelInput) -> Tensor:
        """Next-token loss of every target, (B, T) float32, 0 where ignored, without gradient."""
        ...


@dataclass(frozen=True, slots=True)
class TextSet:
    """Held-out rows.

    Attributes:
        tokens_MT1: (M, T + 1) int64: inputs, and the targets one place further.
        documents_MT1: (M, T + 1) number of the document that each token belongs to.
        names: Id of each of these documents, by its number.
    """

    tokens_MT1: Tensor
    documents_MT1: Ids
    names: Mapping[int, str]

    @property
    def row_documents(self) -> list[Ids]:
        """For each row, the documents of which it holds a token."""
        return [np.unique(documents) for documents in self.documents_MT1]


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """Probes, encoded: the row of a probe is ``<s>``, question, answer, end mark.

    Attributes:
        probes: The probes.
        question_ids: Tokens of each question.
        answer_ids: Tokens of each answer, the end mark included.
        holding: For each probe, the references of its group that hold its answer (`arms.holders`).
        majority: Commonest answer of each relation in the training facts.
    """

    probes: Sequence[Probe]
    question_ids: Sequence[list[int]]
    answer_ids: Sequence[list[int]]
    holding: Sequence[Ids]
    majority: Mapping[str, str]

    @classmethod
    def encode(
        cls,
        probes: Sequence[Probe],
        tokenizer: Tokenizer,
        *,
        holding: Sequence[Ids],
        majority: Mapping[str, str],
    ) -> "ProbeSet":
        """Encode questions and answers apart, so that decoding begins exactly where the answer does."""
        questions = [tokenizer.encode(probe.question) for probe in probes]
        answers = [[*tokenizer.encode(probe.answer), tokenizer.newline_id] for probe in probes]
        return cls(probes, questions, answers, holding, majority)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the arms of one evaluation share.

    Attributes:
        label: Name of the weights in the table: "M" with memory in its continual stage, "C" the control.
        reader: Hands out the memories of references.
        overlap_limit: Largest overlap with the row that the filter let pass; None: nothing was filtered.
        age_steps: Steps between the reader's generation and these weights; None: there is no generation.
        batch_rows: Rows at once.
        ranks: Batches are dealt among them; evaluation is then a collective.
    """

    label: str
    reader: Reader
    overlap_limit: float | None = None
    age_steps: int | None = None
    batch_rows: int = 16
    ranks: Ranks = _ALONE


@dataclass(frozen=True, slots=True)
class TextItem:
    """One document's share of an arm: nats summed over the targets that belong to it, and their number."""

    document: str
    loss: float
    tokens: int

    @property
    def unit(self) -> str:
        """What the bootstrap resamples."""
        return self.document


@dataclass(frozen=True, slots=True)
class ProbeItem:
    """One probe's share of an arm.

    Attributes:
        probe: Its id.
        group: The unit of the bootstrap (country).
        relation: The kind of fact.
        loss: Nats, summed over answer and end mark.
        tokens: Tokens of answer and end mark.
        exact: Whether greedy decoding gave the answer.
        hit1: Whether the first reference read holds the answer.
        hit5: Whether one of the first five does.
        majority: Whether the relation's commonest answer is the answer.
    """

    probe: str
    group: str
    relation: str
    loss: float
    tokens: int
    exact: bool
    hit1: bool
    hit5: bool
    majority: bool

    @property
    def unit(self) -> str:
        """What the bootstrap resamples."""
        return self.group


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """What one arm reached, item by item; see `Setting` and `Reading` for what is recorded with it.

    Attributes:
        arm: The arm.
        model: Label of the weights.
        query: Query mode of what was read; None where nothing was, or modes do not apply.
        pattern: Pattern of what was read, likewise.
        overlap_limit: The filter's limit; None where nothing was filtered.
        age_steps: Age of the generation; None where none was read.
        filled: Share of slots filled; None where nothing was read.
        note: What a reader of the numbers must know, or empty.
        items: Documents, or probes, in a fixed order.
    """

    arm: Arm
    model: str
    query: QueryMode | None
    pattern: Pattern | None
    overlap_limit: float | None
    age_steps: int | None
    filled: float | None
    note: str
    items: tuple[TextItem, ...] | tuple[ProbeItem, ...]

    @property
    def is_text(self) -> bool:
        """Whether the items are documents."""
        return isinstance(self.items[0], TextItem)

    @property
    def loss(self) -> float:
        """Nats per token of text, or per answer token averaged over probes."""
        sums, counts = zip(*(_loss_and_weight(item) for item in self.items), strict=True)
        return float(sum(sums) / sum(counts))


def evaluate_text(
    scorer: Scorer, rows: TextSet, readings: Sequence[Reading], setting: Setting
) -> list[ArmResult]:
    """Return one result per reading (`arms.text_readings`); a target counts for its own document."""
    tokens_MT, targets_MT = rows.tokens_MT1[:, :-1], rows.tokens_MT1[:, 1:]
    documents, of, counts = np.unique(rows.documents_MT1[:, 1:], return_inverse=True, return_counts=True)
    names = [rows.names[number] for number in documents.tolist()]
    results = []
    for reading in readings:
        nll_MT = target_losses(scorer, tokens_MT, targets_MT, reading.ids_MCK, setting)
        sums = np.bincount(of.ravel(), weights=nll_MT.ravel())
        items = zip(names, sums.tolist(), counts.tolist(), strict=True)
        results.append(_result(reading, setting, tuple(TextItem(*item) for item in items)))
    return results


def validation_losses(
    scorer: Scorer, rows: TextSet, readings: Sequence[Reading], setting: Setting
) -> dict[Arm, float]:
    """Return the mean loss of each arm: validation inside the loop, in one query mode and pattern."""
    return {result.arm: result.loss for result in evaluate_text(scorer, rows, readings, setting)}


def target_losses(
    scorer: Scorer, tokens_MT: Tensor, targets_MT: Tensor, ids_MCK: Ids | None, setting: Setting
) -> Floats:
    """Return the loss of every target, (M, T) nats, the same on every rank; None reads nothing."""
    nll_MT = torch.zeros(tokens_MT.shape, dtype=torch.float64)
    for part, counts in _dealt(len(tokens_MT), setting):
        inputs = ModelInput(tokens_MT[part], targets_MT[part], _memory(ids_MCK, part, setting.reader))
        nll_BT = scorer.token_losses(inputs)
        if counts:
            nll_MT[part] = nll_BT.double().cpu()
    return setting.ranks.sum(nll_MT).numpy()


def memory_attention(
    engine: Inference, rows: TextSet, readings: Sequence[Reading], setting: Setting
) -> list[float]:
    """Return the share of attention that memories receive at each memory layer, in the memory arm.

    Mean over the tokens and heads of the first rows, one batch of them per rank (a collective); empty without
    a memory arm.
    """
    for reading in readings:
        if reading.arm is Arm.memory:
            part, counts = next(_dealt(len(rows.tokens_MT1), setting))
            tokens_BT, targets_BT = rows.tokens_MT1[part, :-1], rows.tokens_MT1[part, 1:]
            inputs = ModelInput(tokens_BT, targets_BT, _memory(reading.ids_MCK, part, setting.reader))
            share_LB = engine.attention_shares(inputs).memory_BTK.sum(-1).mean(-1).double().cpu()
            totals = torch.cat([share_LB.sum(1), torch.tensor([len(tokens_BT)])]) * counts
            totals = setting.ranks.sum(totals)
            return (totals[:-1] / totals[-1]).tolist()
    return []


def evaluate_probes(
    model: Memory3LM,
    probes: ProbeSet,
    readings: Sequence[Reading],
    setting: Setting,
    *,
    tokenizer: Tokenizer,
    reference_tokens: Callable[[int], list[int]],
    row_tokens: int,
    answer_tokens: int = 32,
) -> list[ArmResult]:
    """Return one result per reading (`arms.probe_readings`, those that concern these weights), by probe.

    The answer loss is nats per token of answer and end mark; exact match is greedy decoding up to the end
    mark, equal after folding case and spaces. RAG reads its references as text before the question, as much
    of their end as fits.

    Args:
        model: The weights.
        probes: Encoded probes; without any there is no result.
        readings: What each arm reads.
        setting: What the arms share.
        tokenizer: Decodes answers.
        reference_tokens: Tokens of a reference with its title line, for RAG.
        row_tokens: Longest row, prompt and answer together.
        answer_tokens: Decoding stops after so many tokens.
    """
    results = []
    for reading in readings if probes.probes else ():
        is_text = reading.arm is Arm.rag
        contexts = _contexts(reading, tokenizer, reference_tokens) if is_text else None
        prompts = [
            _prompt(question, context, tokenizer.bos_id, row_tokens - max(len(answer), answer_tokens))
            for question, answer, context in zip(
                probes.question_ids, probes.answer_ids, contexts or [[]] * len(probes.probes), strict=True
            )
        ]
        read_MCK = None if is_text else reading.ids_MCK
        losses = answer_losses(model, prompts, probes.answer_ids, read_MCK, setting)
        exact = _exact_matches(
            model,
            prompts,
            probes.probes,
            read_MCK,
            setting,
            tokenizer=tokenizer,
            answer_tokens=answer_tokens,
        )
        found_MK = np.full((len(prompts), 1), -1) if reading.ids_MCK is None else reading.ids_MCK[:, 0]
        hit1, hit5 = (hits(found_MK, probes.holding, first=first) for first in (1, 5))
        items = (
            ProbeItem(
                probe=probe.id,
                group=probe.group,
                relation=probe.relation,
                loss=float(losses[number]),
                tokens=len(probes.answer_ids[number]),
                exact=bool(exact[number]),
                hit1=bool(hit1[number]),
                hit5=bool(hit5[number]),
                majority=fold(probes.majority.get(probe.relation, "")) == fold(probe.answer),
            )
            for number, probe in enumerate(probes.probes)
        )
        results.append(_result(reading, setting, tuple(items)))
    return results


def answer_losses(
    model: Memory3LM,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    ids_MCK: Ids | None,
    setting: Setting,
) -> Floats:
    """Return the loss of each answer after its prompt, (M,), in nats."""
    tokens_MT, targets_MT = _rows(prompts, answers)
    if ids_MCK is not None:
        num_chunks = -(-tokens_MT.shape[1] // model.config.chunk_tokens)
        ids_MCK = np.repeat(ids_MCK, num_chunks, axis=1)
    losses: Floats = target_losses(InferenceEngine(model), tokens_MT, targets_MT, ids_MCK, setting).sum(
        axis=1
    )
    return losses


def to_json(results: Sequence[ArmResult]) -> dict[str, Any]:
    """Return results as plain JSON values, under a format version."""
    plain = [asdict(result) for result in results]
    for values in plain:
        for key in ("arm", "query", "pattern"):
            values[key] = None if values[key] is None else values[key].name
    return {"format": _FORMAT, "version": _VERSION, "results": plain}


def from_json(value: Mapping[str, Any]) -> list[ArmResult]:
    """Return the results that `to_json` wrote.

    Raises:
        ValueError: When it is something else, or of another version.
    """
    found = (value.get("format"), value.get("version"))
    if found != (_FORMAT, _VERSION):
        raise ValueError(
            f"expected {_FORMAT} version {_VERSION}, found {found[0]} version {found[1]}: "
            "run `memory3 evaluate` again"
        )
    results = []
    for stored in value["results"]:
        kind = TextItem if "document" in stored["items"][0] else ProbeItem
        enums = {
            key: None if stored[key] is None else choices[stored[key]]
            for key, choices in (("arm", Arm), ("query", QueryMode), ("pattern", Pattern))
        }
        results.append(ArmResult(**{**stored, **enums, "items": tuple(kind(**i) for i in stored["items"])}))
    return results


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One arm against M's memory arm.

    Attributes:
        block: The rows that are compared with each other.
        result: What the first seed recorded: the arm, its conditions and its items.
        loss: Nats per token, or per answer token averaged over probes; the mean over seeds.
        difference: Loss less that of M's memory arm, paired; None for that arm itself.
        signs: Of the difference in each seed, "+" where memory is better.
        exact: Share of exact matches (probes).
        hit1: Share of probes whose first reference holds the answer; None where nothing is read.
        hit5: Share of probes one of whose first five references does, likewise.
        filled: Share of slots filled, the mean over seeds; None where nothing is read.
    """

    block: str
    result: ArmResult
    loss: Interval
    difference: Interval | None
    signs: str
    exact: Interval | None
    hit1: float | None
    hit5: float | None
    filled: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationRow:
    """The probes of one relation, over all seeds.

    Attributes:
        relation: Its name.
        headline: Whether it counts in the headline.
        probes: How many there are.
        loss: Mean answer loss by column ("M memory").
        exact: Share of exact matches by column.
        majority: Share of exact matches of the commonest answer.
        hit1: Share of probes whose first reference holds the answer.
        hit5: Share of probes one of whose first five references does.
    """

    relation: str
    headline: bool
    probes: int
    loss: dict[str, float]
    exact: dict[str, float]
    majority: float
    hit1: float
    hit5: float


def table(
    runs: Sequence[Sequence[ArmResult]],
    *,
    headline: Collection[str] | None = None,
    main: str = "M",
    samples: int = 2000,
    seed: int = 0,
) -> list[TableRow]:
    """Return the rows of the table: a block for each query mode and pattern of text, and one for facts.

    Arms that read nothing stand in every block of text, so that each is compared with each memory arm.

    Args:
        runs: The results of every model, once per seed, over the same items.
        headline: Relations that the facts' block covers; None takes `headline_relations`.
        main: Label of the weights whose memory arm all are compared with.
        samples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: When the seeds hold different arms or items, or a memory arm is missing.
    """
    arms = _aligned(runs)
    relations = headline_relations(runs, main=main) if headline is None else frozenset(headline)
    rows = []
    for block, chosen in _blocks(arms, relations):
        baseline = _unit_sums(_memory_arm(chosen, main, block), _loss_and_weight)[0]
        rows += [
            _table_row(block, seeds, baseline, main=main, samples=samples, seed=seed) for seeds in chosen
        ]
    return rows


def relation_table(
    runs: Sequence[Sequence[ArmResult]], *, headline: Collection[str] | None = None, main: str = "M"
) -> list[RelationRow]:
    """Return one row per relation; arguments and errors are those of `table`."""
    facts = [seeds for seeds in _aligned(runs) if not seeds[0].is_text]
    if not facts:
        return []
    headline = headline_relations(runs, main=main) if headline is None else headline
    rows = []
    for relation in sorted({item.relation for item in _probe_items(facts[0])}):
        arms = [_of_relations(seeds, {relation}) for seeds in facts]
        named = {f"{seeds[0].model} {seeds[0].arm.value}": seeds for seeds in arms}
        memory = _memory_arm(arms, main, "facts")
        rows.append(
            RelationRow(
                relation=relation,
                headline=relation in headline,
                probes=len(memory[0].items),
                loss={name: float(np.mean([r.loss for r in seeds])) for name, seeds in named.items()},
                exact={name: _share(seeds, "exact") for name, seeds in named.items()},
                majority=_share(memory, "majority"),
                hit1=_share(memory, "hit1"),
                hit5=_share(memory, "hit5"),
            )
        )
    return rows


def headline_relations(runs: Sequence[Sequence[ArmResult]], *, main: str = "M") -> frozenset[str]:
    """Return the relations that retrieval serves: at least `HIT_LIMIT` of their probes have a hit in five."""
    return frozenset(
        row.relation for row in relation_table(runs, headline=(), main=main) if row.hit5 >= HIT_LIMIT
    )


def render(rows: Sequence[TableRow], relations: Sequence[RelationRow] = ()) -> str:
    """Return both tables as Markdown that also reads well as plain text."""
    parts = []
    for block in dict.fromkeys(row.block for row in rows):
        chosen = [row for row in rows if row.block == block]
        parts.append(f"**{block}**\n\n" + _markdown(HEADER, [cells(row) for row in chosen]))
        parts.extend(
            f"{row.result.model} {row.result.arm.value}: {row.result.note}."
            for row in chosen
            if row.result.note
        )
    if relations:
        columns = list(relations[0].loss)
        header = ["relation", "probes", *columns, "hit@1", "hit@5", "majority"]
        parts.append(
            "**facts by relation: answer loss (exact matches)**\n\n"
            + _markdown(header, [_relation_cells(row, columns) for row in relations])
        )
        if not all(row.headline for row in relations):
            parts.append("† not in the headline: too few answers stand among the first five references.")
    parts.append(
        "Losses in nats, with 95 % intervals over documents (text) and countries (facts). Difference: loss "
        "less that of M's memory arm, paired; positive where memory is better; seeds: its sign in each. "
        "Every target counts, those of the first chunk included. "
        "own*: a chunk's references were found with the very tokens it predicts."
    )
    return "\n\n".join(parts) + "\n"


def _result(
    reading: Reading, setting: Setting, items: tuple[TextItem, ...] | tuple[ProbeItem, ...]
) -> ArmResult:
    ids = reading.ids_MCK
    reads_bank = ids is not None and reading.arm is not Arm.rag
    return ArmResult(
        arm=reading.arm,
        model=setting.label,
        query=reading.query,
        pattern=reading.pattern,
        overlap_limit=None if ids is None or reading.arm is Arm.oracle else setting.overlap_limit,
        age_steps=setting.age_steps if reads_bank else None,
        filled=None if ids is None else float((ids >= 0).mean()),
        note=reading.note,
        items=items,
    )


def _exact_matches(
    model: Memory3LM,
    prompts: Sequence[list[int]],
    probes: Sequence[Probe],
    ids_MCK: Ids | None,
    setting: Setting,
    *,
    tokenizer: Tokenizer,
    answer_tokens: int,
) -> NDArray[np.bool_]:
    """Return for each prompt whether greedy decoding gives the answer, (M,), the same on every rank."""
    exact_M = torch.zeros(len(prompts))
    model.eval()
    for part, counts in _dealt(len(prompts), setting):
        memory = _memory(ids_MCK, part, setting.reader)
        decoded = generate(
            model,
            list(prompts[part]),
            max_new_tokens=answer_tokens,
            stop_id=tokenizer.newline_id,
            memory=None if memory is None else _fixed(model, memory),
        )
        if counts:
            pairs = zip(decoded, probes[part], strict=True)
            exact = [fold(tokenizer.decode(ids)) == fold(probe.answer) for ids, probe in pairs]
            exact_M[part] = torch.tensor(exact).float()
    return setting.ranks.sum(exact_M).numpy() > 0


@torch.no_grad()
def _fixed(model: Memory3LM, memory: MemoryBatch | ReferenceBatch) -> FixedMemory:
    """Return what all chunks of each row read, on the model's device; live references are encoded once."""
    memory = memory.to(next(model.parameters()).device)
    if isinstance(memory, ReferenceBatch):
        return FixedMemory(
            model.encode(memory.tokens_NR, memory.lengths_N, memory.titles_N), memory.slots_BCK[:, 0]
        )
    return FixedMemory(memory.pool, memory.slots_BCK[:, 0])


def _dealt(num_rows: int, setting: Setting) -> Iterator[tuple[slice, bool]]:
    """Yield this rank's batches: equally many on every rank; a repeated one keeps step and does not count."""
    begins = range(0, num_rows, setting.batch_rows)
    for turn in range(0, len(begins), setting.ranks.world_size):
        number = turn + setting.ranks.rank
        begin = begins[min(number, len(begins) - 1)]
        yield slice(begin, begin + setting.batch_rows), number < len(begins)


def _memory(ids_MCK: Ids | None, part: slice, reader: Reader) -> MemoryBatch | ReferenceBatch | None:
    return None if ids_MCK is None or (ids_MCK[part] < 0).all() else reader.batch(ids_MCK[part])


def _contexts(
    reading: Reading, tokenizer: Tokenizer, reference_tokens: Callable[[int], list[int]]
) -> list[list[int]]:
    """Return the references of each probe as text, each with an end of line."""
    assert reading.ids_MCK is not None
    return [
        [token for id in ids[ids >= 0].tolist() for token in (*reference_tokens(id), tokenizer.newline_id)]
        for ids in reading.ids_MCK[:, 0]
    ]


def _prompt(question: list[int], context: list[int], bos_id: int, prompt_tokens: int) -> list[int]:
    """Return ``<s>``, as much of the context's end as the prompt's length allows, and the question."""
    room = max(0, prompt_tokens - 1 - len(question))
    return [bos_id, *context[max(0, len(context) - room) :], *question]


def _rows(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (M, T), padded on the right; targets outside the answers are ignored."""
    ends = [len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True)]
    tokens_MT = torch.zeros((len(prompts), max(ends)), dtype=torch.int64)
    targets_MT = torch.full_like(tokens_MT, IGNORE)
    for row, (prompt, answer, end) in enumerate(zip(prompts, answers, ends, strict=True)):
        tokens_MT[row, :end] = torch.tensor([*prompt, *answer[:-1]])
        targets_MT[row, len(prompt) - 1 : end] = torch.tensor(answer)
    return tokens_MT, targets_MT


def _loss_and_weight(item: TextItem | ProbeItem) -> tuple[float, float]:
    """Tokens of text weigh equally, and so do probes."""
    return (item.loss, item.tokens) if isinstance(item, TextItem) else (item.loss / item.tokens, 1)


def _exact_and_weight(item: TextItem | ProbeItem) -> tuple[float, float]:
    assert isinstance(item, ProbeItem)
    return float(item.exact), 1


_Seeds = tuple[ArmResult, ...]
"""The same arm of the same model, once per seed."""


def _aligned(runs: Sequence[Sequence[ArmResult]]) -> list[_Seeds]:
    """Return every arm with its results of all seeds, over the same items in the same order."""
    keyed = [{_key(result): result for result in run} for run in runs]
    for number, results in enumerate(keyed):
        if results.keys() != keyed[0].keys() or len(results) != len(runs[number]):
            raise ValueError(
                f"seed {number} holds other arms than seed 0, or one of them twice: evaluate all seeds alike"
            )
    arms = [tuple(results[key] for results in keyed) for key in keyed[0]] if keyed else []
    covered: dict[bool, list[tuple[str, str, int]]] = {}
    for result in (result for seeds in arms for result in seeds):
        items = [(item.unit, getattr(item, "probe", ""), item.tokens) for item in result.items]
        if items != covered.setdefault(result.is_text, items):
            raise ValueError(
                f"{result.model} {result.arm.value} covers other items than the arms before it: evaluate "
                "every arm and seed on the same rows and probes, with the same tokenizer"
            )
    return arms


def _key(result: ArmResult) -> tuple[bool, str, Arm, QueryMode | None, Pattern | None]:
    return result.is_text, result.model, result.arm, result.query, result.pattern


def _blocks(arms: Sequence[_Seeds], relations: frozenset[str]) -> Iterator[tuple[str, list[_Seeds]]]:
    """Yield the arms to be compared: of text per query mode and pattern, and of the headline's facts."""
    text = [(seeds, seeds[0].query, seeds[0].pattern) for seeds in arms if seeds[0].is_text]
    for query, pattern in dict.fromkeys((query, pattern) for _, query, pattern in text):
        if query is not None and pattern is not None:
            chosen = [seeds for seeds, *mode in text if mode in ([None, None], [query, pattern])]
            yield f"text, query {query.name}, {pattern.name} pattern", chosen
    facts = [seeds for seeds in arms if not seeds[0].is_text]
    if facts and (relations := relations & {item.relation for item in _probe_items(facts[0])}):
        yield f"facts: {', '.join(sorted(relations))}", [_of_relations(seeds, relations) for seeds in facts]


def _of_relations(seeds: _Seeds, relations: Collection[str]) -> _Seeds:
    return tuple(
        replace(result, items=tuple(item for item in _probe_items((result,)) if item.relation in relations))
        for result in seeds
    )


def _probe_items(seeds: _Seeds) -> list[ProbeItem]:
    return [cast(ProbeItem, item) for result in seeds for item in result.items]


def _memory_arm(arms: Sequence[_Seeds], main: str, block: str) -> _Seeds:
    for seeds in arms:
        if seeds[0].model == main and seeds[0].arm is Arm.memory:
            return seeds
    raise ValueError(f"{block}: no memory arm of {main} to compare with; evaluate it too")


def _share(seeds: _Seeds, name: str) -> float:
    return float(np.mean([getattr(item, name) for item in _probe_items(seeds)]))


def _unit_sums(seeds: _Seeds, measure: Callable[[Any], tuple[float, float]]) -> tuple[Floats, Floats]:
    """Return sums and counts of every unit, both (seeds, units)."""
    grouped = []
    for result in seeds:
        values, weights = zip(*(measure(item) for item in result.items), strict=True)
        grouped.append(group_sums(values, [item.unit for item in result.items], counts=weights)[1:])
    return np.stack([sums for sums, _ in grouped]), np.stack([counts for _, counts in grouped])


def _table_row(
    block: str, seeds: _Seeds, baseline: Floats, *, main: str, samples: int, seed: int
) -> TableRow:
    first = seeds[0]
    sums, counts = _unit_sums(seeds, _loss_and_weight)
    is_baseline = first.model == main and first.arm is Arm.memory
    exact = None if first.is_text else _unit_sums(seeds, _exact_and_weight)
    has_hits = first.filled is not None and not first.is_text
    return TableRow(
        block=block,
        result=first,
        loss=mean_interval(sums, counts, samples=samples, seed=seed),
        difference=(
            None if is_baseline else paired_interval(sums, baseline, counts, samples=samples, seed=seed)
        ),
        signs="" if is_baseline else "".join("-+"[int(d > 0)] for d in (sums - baseline).sum(axis=1)),
        exact=None if exact is None else mean_interval(*exact, samples=samples, seed=seed),
        hit1=_share(seeds, "hit1") if has_hits else None,
        hit5=_share(seeds, "hit5") if has_hits else None,
        filled=None if first.filled is None else float(np.mean([result.filled for result in seeds])),
    )


HEADER = ["model", "arm", "counted", "loss", "difference", "seeds", "exact", "query", "pattern", "filter"]
HEADER += ["hit@1 / hit@5", "filled", "age"]
"""Of the columns of `cells`."""


def cells(row: TableRow) -> list[str]:
    """A row of the table as text, below `HEADER`."""
    result = row.result
    num_tokens = sum(item.tokens for item in result.items)
    return [
        result.model,
        result.arm.value,
        f"{num_tokens:,} tokens" if result.is_text else f"{len(result.items)} probes",
        _interval(row.loss, ".3f"),
        _interval(row.difference, "+.3f"),
        row.signs or "–",
        _interval(row.exact, ".1%"),
        "–" if result.query is None else "own*" if result.query is QueryMode.own else result.query.name,
        "–" if result.pattern is None else result.pattern.name,
        "–" if result.overlap_limit is None else f"≤ {result.overlap_limit:.2f}",
        "–" if row.hit1 is None else f"{row.hit1:.0%} / {row.hit5:.0%}",
        "–" if row.filled is None else f"{row.filled:.0%}",
        "–" if result.age_steps is None else f"{result.age_steps} steps",
    ]


def _relation_cells(row: RelationRow, columns: Sequence[str]) -> list[str]:
    name = row.relation if row.headline else f"{row.relation} †"
    losses = [f"{row.loss[column]:.3f} ({row.exact[column]:.0%})" for column in columns]
    return [name, str(row.probes), *losses, f"{row.hit1:.0%}", f"{row.hit5:.0%}", f"{row.majority:.0%}"]


def _interval(interval: Interval | None, form: str) -> str:
    if interval is None:
        return "–"
    ends = "" if np.isnan(interval.low) else f" [{interval.low:{form}}, {interval.high:{form}}]"
    return f"{interval.mean:{form}}{ends}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
