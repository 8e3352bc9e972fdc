"""`train.evaluate`: losses against hand computation, exact match, results on disk, the table."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from memorybank.bank import OnlineReader
from memorybank.config import QueryMode
from model.generate import FixedMemory, generate
from tests.support.train_evaluate import CHUNK, VOCABULARY, Encoded, Letters, References, model, probe
from train.arms import Arm, Pattern, Reading
from train.distributed import Ranks
from train.engine import InferenceEngine
from train.evaluate import (
    ArmResult,
    ProbeItem,
    ProbeSet,
    Setting,
    TextItem,
    TextSet,
    evaluate_probes,
    evaluate_text,
    from_json,
    headline_relations,
    memory_attention,
    relation_table,
    render,
    table,
    to_json,
    validation_losses,
)

ROWS, TOKENS = 5, 3 * CHUNK
LETTERS = Letters()
REFERENCES = References(40)


@pytest.fixture(scope="module")
def network():
    return model()


@pytest.fixture(scope="module")
def rows():
    """Rows of documents that end anywhere, also in the middle of a row."""
    tokens = torch.randint(3, VOCABULARY, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    documents = np.arange(ROWS * (TOKENS + 1)).reshape(ROWS, -1) // 17
    return TextSet(tokens, documents, {number: f"document {number}" for number in range(100)})


def some_ids(num_rows, num_chunks, *, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(40)[:5] for _ in range(num_rows * num_chunks)]).reshape(
        num_rows, num_chunks, 5
    )
    return np.where(rng.random(ids.shape) < 0.3, -1, ids)


def memory_reading(ids):
    return Reading(Arm.memory, ids, QueryMode.own, Pattern.inference)


def hand_losses(network, tokens, targets, memory=None):
    """Nats of each target from the full logits of one row."""
    with torch.no_grad():
        logits = network(tokens[None], memory=memory)[0]
    return -logits.double().log_softmax(-1)[torch.arange(len(targets)), targets]


# --- text


def test_text_losses_are_those_of_the_logits_summed_by_the_targets_document(network, rows):
    ids = some_ids(ROWS, 3)
    reader = Encoded(network, REFERENCES)
    none, memory = evaluate_text(
        InferenceEngine(network),
        rows,
        [Reading(Arm.none), memory_reading(ids)],
        Setting(label="M", reader=reader, overlap_limit=0.5, age_steps=7, batch_rows=2),
    )
    for result, read in ((none, False), (memory, True)):
        by_hand: dict[str, list[float]] = {}
        for row in range(ROWS):
            tokens = rows.tokens_MT1[row]
            batch = reader.batch(ids[row : row + 1]) if read else None
            losses = hand_losses(network, tokens[:-1], tokens[1:], batch)
            for document, loss in zip(rows.documents_MT1[row, 1:].tolist(), losses.tolist(), strict=True):
                by_hand.setdefault(f"document {document}", []).append(loss)
        assert [item.document for item in result.items] == list(by_hand)
        for item in result.items:
            assert item.tokens == len(by_hand[item.document])
            assert item.loss == pytest.approx(sum(by_hand[item.document]), rel=1e-5)
    assert sum(item.tokens for item in none.items) == ROWS * TOKENS
    assert abs(none.loss - memory.loss) > 1e-3
    assert (none.overlap_limit, none.age_steps, none.filled) == (None, None, None)
    assert (memory.overlap_limit, memory.age_steps) == (0.5, 7)
    assert memory.filled == pytest.approx((ids >= 0).mean())
    assert (memory.model, memory.query, memory.pattern) == ("M", QueryMode.own, Pattern.inference)


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_order_and_size_of_batches_decide_nothing(network, rows, batch_rows):
    ids, setting = some_ids(ROWS, 3), Setting(label="M", reader=Encoded(network, REFERENCES), batch_rows=2)
    expected = evaluate_text(InferenceEngine(network), rows, [memory_reading(ids)], setting)[0]
    order = np.array([3, 0, 4, 2, 1])
    moved = TextSet(rows.tokens_MT1[order], rows.documents_MT1[order], rows.names)
    other = replace(setting, batch_rows=batch_rows)
    found = evaluate_text(InferenceEngine(network), moved, [memory_reading(ids[order])], other)[0]
    assert [item.document for item in found.items] == [item.document for item in expected.items]
    assert [item.loss for item in found.items] == pytest.approx(
        [item.loss for item in expected.items], rel=1e-5
    )


def test_all_slots_empty_equals_no_memory(network, rows):
    empty = np.full((ROWS, 3, 5), -1, np.int64)
    setting = Setting(label="M", reader=Encoded(network, REFERENCES))
    none, read = evaluate_text(
        InferenceEngine(network), rows, [Reading(Arm.none), memory_reading(empty)], setting
    )
    assert none.items == read.items
    assert read.filled == 0.0


def test_a_row_without_memory_is_not_changed_by_its_neighbours_memory(network, rows):
    ids = some_ids(ROWS, 3)
    ids[2] = -1
    alone = TextSet(rows.tokens_MT1[2:3], rows.documents_MT1[2:3], rows.names)
    setting = Setting(label="M", reader=Encoded(network, REFERENCES))
    none = evaluate_text(InferenceEngine(network), alone, [Reading(Arm.none)], setting)[0]
    marked = TextSet(
        rows.tokens_MT1, np.where(np.arange(ROWS)[:, None] == 2, rows.documents_MT1, 99), rows.names
    )
    read = evaluate_text(InferenceEngine(network), marked, [memory_reading(ids)], setting)[0]
    within = [item for item in read.items if item.document != "document 99"]
    assert [item.loss for item in within] == pytest.approx([item.loss for item in none.items], rel=1e-5)


def test_live_references_give_what_their_memories_give(network, rows):
    ids = some_ids(ROWS, 3)
    banked, live = (
        evaluate_text(
            InferenceEngine(network), rows, [memory_reading(ids)], Setting(label="M", reader=reader)
        )[0].loss
        for reader in (Encoded(network, REFERENCES), OnlineReader(REFERENCES))
    )
    assert banked == pytest.approx(live, rel=1e-6)


class Deaf(Ranks):
    """A rank that hears nothing of its peers: what it returns is its own share."""

    def sum(self, values):
        return values


def test_ranks_share_the_rows_and_take_equally_many_batches(network, rows):
    calls = []

    class Counting(InferenceEngine):
        def token_losses(self, inputs):
            calls.append(len(inputs.tokens_BT))
            return super().token_losses(inputs)

    setting = Setting(label="M", reader=Encoded(network, REFERENCES), batch_rows=2)
    readings = [memory_reading(some_ids(ROWS, 3))]
    whole = evaluate_text(InferenceEngine(network), rows, readings, setting)[0]
    shares = []
    for rank in range(2):
        share = replace(setting, ranks=Deaf(rank, 2, torch.device("cpu")))
        shares.append(evaluate_text(Counting(network), rows, readings, share)[0])
        assert len(calls) == 2 * (rank + 1)
    for item, first, second in zip(whole.items, shares[0].items, shares[1].items, strict=True):
        assert first.loss + second.loss == pytest.approx(item.loss, rel=1e-6)


def test_validation_losses(network, rows):
    setting = Setting(label="", reader=Encoded(network, REFERENCES))
    readings = [Reading(Arm.none), memory_reading(some_ids(ROWS, 3))]
    losses = validation_losses(InferenceEngine(network), rows, readings, setting)
    results = evaluate_text(InferenceEngine(network), rows, readings, setting)
    assert losses == {result.arm: result.loss for result in results}
    first = results[0]
    assert first.loss == pytest.approx(sum(i.loss for i in first.items) / (ROWS * TOKENS))


def test_memory_attention_is_the_share_at_each_layer_over_one_batch_of_rows(network, rows):
    setting = Setting(label="", reader=Encoded(network, REFERENCES), batch_rows=2)
    ids = some_ids(ROWS, 3)
    found = memory_attention(
        InferenceEngine(network), rows, [Reading(Arm.none), memory_reading(ids)], setting
    )
    memory = Encoded(network, REFERENCES).batch(ids[:2])
    by_hand = network.attention_shares(rows.tokens_MT1[:2, :-1], memory).memory_BTK.sum(-1).mean((1, 2))
    assert found == pytest.approx(by_hand.tolist())
    assert all(0 < share < 1 for share in found)
    assert memory_attention(InferenceEngine(network), rows, [Reading(Arm.none)], setting) == []


# --- probes


def probe_set(answers=(" oslo", " rome", " washington"), holding=((), (), ())):
    probes = [probe(number, answer=answer) for number, answer in enumerate(answers)]
    held = [np.array(ids, np.int64) for ids in holding]
    return ProbeSet.encode(probes, LETTERS, holding=held, majority={"capital": "Rome"})


def run_probes(network, probes, readings, **changes):
    setting = Setting(label="M", reader=Encoded(network, REFERENCES), **changes)
    return evaluate_probes(
        network, probes, readings, setting,
        tokenizer=LETTERS, reference_tokens=REFERENCES.of, row_tokens=80, answer_tokens=12,
    )  # fmt: skip


PROBE_IDS = np.array([[[3, 8, 9, -1, 1]], [[-1] * 5], [[20, 21, 22, 23, 24]]])


def hand_probe_loss(network, prompt, answer, memory=None):
    row = torch.tensor([*prompt, *answer])
    return hand_losses(network, row[:-1], row[1:], memory)[len(prompt) - 1 :].sum().item()


def test_answer_losses_are_those_of_the_logits_of_one_row(network):
    probes = probe_set()
    none, memory = run_probes(
        network, probes, [Reading(Arm.none), Reading(Arm.memory, PROBE_IDS)], batch_rows=2
    )
    for number in range(3):
        question, answer = probes.question_ids[number], probes.answer_ids[number]
        assert answer == [*LETTERS.encode(probes.probes[number].answer), LETTERS.newline_id]
        prompt = [LETTERS.bos_id, *question]
        chunks = math.ceil((len(prompt) + len(answer) - 1) / CHUNK)
        assert chunks > 2
        every = Encoded(network, REFERENCES).batch(np.repeat(PROBE_IDS[number : number + 1], chunks, axis=1))
        assert none.items[number].loss == pytest.approx(hand_probe_loss(network, prompt, answer), rel=1e-4)
        read = None if number == 1 else every
        assert memory.items[number].loss == pytest.approx(
            hand_probe_loss(network, prompt, answer, read), rel=1e-4
        )
        assert none.items[number].tokens == len(answer)
    assert none.loss == pytest.approx(np.mean([item.loss / item.tokens for item in none.items]))
    assert memory.items[1].loss == pytest.approx(none.items[1].loss, rel=1e-5)
    assert abs(memory.items[0].loss - none.items[0].loss) > 1e-3


def test_batches_of_probes_decide_nothing(network):
    probes, readings = probe_set(), [Reading(Arm.memory, PROBE_IDS)]
    small, large = (run_probes(network, probes, readings, batch_rows=rows)[0] for rows in (1, 16))
    assert [i.loss for i in small.items] == pytest.approx([i.loss for i in large.items], rel=1e-5)
    assert [i.exact for i in small.items] == [i.exact for i in large.items]


def test_exact_match_is_greedy_decoding_with_the_probes_memory(network):
    """The answer that the model gives, in other letters' case, is exact; another one is not."""
    probes = probe_set()
    batch = Encoded(network, REFERENCES).batch(PROBE_IDS)
    memory = FixedMemory(batch.pool, batch.slots_BCK[:, 0])
    prompts = [[LETTERS.bos_id, *question] for question in probes.question_ids]
    with_memory, without = (
        generate(network, prompts, max_new_tokens=12, stop_id=LETTERS.newline_id, memory=source)
        for source in (memory, None)
    )
    assert with_memory[0] != without[0]
    said = [LETTERS.decode(ids) for ids in with_memory]
    renamed = [replace(p, answer=f"  {text.upper()} ") for p, text in zip(probes.probes, said, strict=True)]
    told = replace(probes, probes=renamed)
    none, read = run_probes(network, told, [Reading(Arm.none), Reading(Arm.memory, PROBE_IDS)], batch_rows=2)
    assert [item.exact for item in read.items] == [True, True, True]
    assert not none.items[0].exact
    live = Setting(label="M", reader=OnlineReader(REFERENCES))
    again = evaluate_probes(
        network, told, [Reading(Arm.memory, PROBE_IDS)], live,
        tokenizer=LETTERS, reference_tokens=REFERENCES.of, row_tokens=80, answer_tokens=12,
    )[0]  # fmt: skip
    assert [item.exact for item in again.items] == [True, True, True]


def test_rag_reads_references_as_text_before_the_question(network):
    probes = probe_set()
    rag = run_probes(
        network, probes, [Reading(Arm.rag, PROBE_IDS[:, :, :3])], overlap_limit=0.5, age_steps=3
    )[0]
    newline = LETTERS.newline_id
    for number in range(3):
        ids = [id for id in PROBE_IDS[number, 0, :3] if id >= 0]
        context = [token for id in ids for token in (*REFERENCES.of(id), newline)]
        question, answer = probes.question_ids[number], probes.answer_ids[number]
        room = 80 - 1 - len(question) - 12
        prompt = [LETTERS.bos_id, *(context[-room:] if context else []), *question]
        assert len(context) == 0 or len(prompt) == min(80 - 12, 1 + len(context) + len(question))
        assert rag.items[number].loss == pytest.approx(hand_probe_loss(network, prompt, answer), rel=1e-4)
    assert (rag.age_steps, rag.overlap_limit) == (None, 0.5)


def test_hits_and_majority_are_recorded(network):
    probes = probe_set(holding=((1,), (8,), (20, 30)))
    none, memory, oracle = run_probes(
        network,
        probes,
        [Reading(Arm.none), Reading(Arm.memory, PROBE_IDS), Reading(Arm.oracle, PROBE_IDS[:, :, :1])],
        overlap_limit=0.5,
    )
    assert [(item.hit1, item.hit5) for item in memory.items] == [(False, True), (False, False), (True, True)]
    assert not any(item.hit5 for item in none.items)
    assert [item.majority for item in none.items] == [False, True, False]
    assert (memory.overlap_limit, oracle.overlap_limit) == (0.5, None)


def test_a_corpus_without_probes_has_no_probe_results(network):
    assert run_probes(network, ProbeSet([], [], [], [], {}), [Reading(Arm.none)]) == []


# --- results and table


def arm_result(arm, items, *, label="M", query=None, pattern=None, **changes):
    reads = arm is not Arm.none
    fields = {
        "arm": arm,
        "model": label,
        "query": query,
        "pattern": pattern,
        "overlap_limit": 0.66 if reads else None,
        "age_steps": 0 if reads else None,
        "filled": 0.8 if reads else None,
        "note": "",
        "items": tuple(items),
    }
    return ArmResult(**(fields | changes))


MODE = {"query": QueryMode.previous, "pattern": Pattern.inference}
DOCUMENTS = [f"d{number}" for number in range(20)]


def text_items(offset):
    return [TextItem(document, 10.0 * (3 + n % 4 + offset), 10) for n, document in enumerate(DOCUMENTS)]


def text_run(offset=0.0):
    return [
        arm_result(Arm.none, text_items(0.2 + offset)),
        arm_result(Arm.memory, text_items(0.0), **MODE),
        arm_result(Arm.shuffled, text_items(0.3 + offset), **MODE, note="a note"),
        arm_result(Arm.memory, text_items(-0.5), query=QueryMode.own, pattern=Pattern.training),
        arm_result(Arm.none, text_items(0.1 + offset), label="C"),
    ]


def probe_items(loss, *, exact=False, hit=True):
    """Two countries, two relations; 'area' is never found."""
    return [
        ProbeItem(
            probe=f"{land} {relation}",
            group=land,
            relation=relation,
            loss=4 * (loss + n),
            tokens=4,
            exact=exact,
            hit1=False,
            hit5=hit and relation == "capital",
            majority=land == "a",
        )
        for n, land in enumerate(("a", "b"))
        for relation in ("capital", "area")
    ]


def probe_run():
    return [
        arm_result(Arm.none, probe_items(2.0, hit=False)),
        arm_result(Arm.memory, probe_items(1.0, exact=True)),
        arm_result(Arm.rag, probe_items(1.5), label="C", age_steps=None),
    ]


def test_results_survive_json():
    results = text_run() + probe_run()
    assert from_json(json.loads(json.dumps(to_json(results)))) == results


def test_other_formats_are_refused():
    with pytest.raises(
        ValueError, match="expected memory3-evaluation version 1, found memory3-evaluation version 2"
    ):
        from_json({**to_json(text_run()), "version": 2})
    with pytest.raises(ValueError, match="found None"):
        from_json({})


def test_text_blocks_compare_with_memory_in_the_same_mode():
    rows = table([text_run()])
    previous = [row for row in rows if row.block == "text, query previous, inference pattern"]
    own = [row for row in rows if row.block == "text, query own, training pattern"]
    assert len(rows) == len(previous) + len(own)
    named = {(row.result.model, row.result.arm): row for row in previous}
    assert list(named) == [("M", Arm.none), ("M", Arm.memory), ("M", Arm.shuffled), ("C", Arm.none)]
    assert named["M", Arm.memory].difference is None
    for key, difference in ((("M", Arm.none), 0.2), (("M", Arm.shuffled), 0.3), (("C", Arm.none), 0.1)):
        found = named[key].difference
        assert (found.mean, found.low, found.high) == pytest.approx((difference,) * 3)
        assert named[key].signs == "+"
    assert named["M", Arm.none].loss.mean == pytest.approx(4.7)
    assert named["M", Arm.none].loss.high - named["M", Arm.none].loss.low > 0.5
    assert {
        row.result.arm: row.difference and round(row.difference.mean, 6)
        for row in own
        if row.result.model == "M"
    } == {
        Arm.none: 0.7,
        Arm.memory: None,
    }


def test_seeds_are_averaged_and_their_signs_shown():
    rows = table([text_run(), text_run(-0.25), text_run(0.1)])
    control = next(row for row in rows if row.result.model == "C" and "previous" in row.block)
    assert control.difference.mean == pytest.approx(0.1 - 0.05)
    assert control.signs == "+-+"
    assert control.loss.mean == pytest.approx(4.5 + 0.1 - 0.05)


def test_facts_average_probes_over_the_headline_by_country():
    assert headline_relations([probe_run()]) == {"capital"}
    rows = {(row.result.model, row.result.arm): row for row in table([probe_run()])}
    none, memory, rag = rows["M", Arm.none], rows["M", Arm.memory], rows["C", Arm.rag]
    assert none.block == "facts: capital"
    assert len(none.result.items) == 2
    assert none.loss.mean == pytest.approx(2.5)
    assert (none.difference.mean, rag.difference.mean) == pytest.approx((1.0, 0.5))
    assert (memory.exact.mean, none.exact.mean) == (1.0, 0.0)
    assert (memory.hit1, memory.hit5, none.hit5) == (0.0, 1.0, None)
    both = table([probe_run()], headline=["capital", "area"])
    assert len(both[0].result.items) == 4
    assert table([probe_run()], headline=["unheard of"]) == []


def test_relations_out_of_the_headline_stay_in_their_table_and_are_marked():
    rows = relation_table([probe_run()])
    area, capital = rows
    assert (area.relation, area.headline, area.hit5) == ("area", False, 0.0)
    assert (capital.relation, capital.headline, capital.hit5) == ("capital", True, 1.0)
    assert capital.loss == pytest.approx({"M no memory": 2.5, "M memory": 1.5, "C RAG": 2.0})
    assert capital.exact == {"M no memory": 0.0, "M memory": 1.0, "C RAG": 0.0}
    assert capital.majority == 0.5
    assert relation_table([text_run()]) == []
    assert headline_relations([text_run()]) == frozenset()


def test_runs_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="seed 1 holds other arms"):
        table([text_run(), text_run()[:-1]])
    with pytest.raises(ValueError, match="twice"):
        table([[*text_run(), text_run()[0]]])
    shorter = [*text_run()[:-1], arm_result(Arm.none, text_items(0.1)[:-1], label="C")]
    with pytest.raises(ValueError, match="C no memory covers other items"):
        table([shorter])
    without = [result for result in text_run() if result.arm is not Arm.memory]
    with pytest.raises(ValueError, match="no memory arm of M"):
        table([without])


def test_render_states_what_every_row_covers():
    runs = [text_run() + probe_run()] * 2
    text = render(table(runs), relation_table(runs))
    lines = text.splitlines()
    shuffled = next(line for line in lines if "shuffled" in line)
    assert "200 tokens" in shuffled
    assert "+0.300 [+0.300, +0.300]" in shuffled
    assert "++" in shuffled
    assert "previous" in shuffled
    assert "≤ 0.66" in shuffled
    assert "80%" in shuffled
    assert "0 steps" in shuffled
    assert "M shuffled: a note." in lines
    assert any("own*" in line for line in lines)
    assert any("2 probes" in line and "0% / 100%" in line for line in lines)
    assert any(line.startswith("| area †") for line in lines)
    assert len({len(line) for line in lines if line.startswith("| M ") and "tokens" in line}) <= 2
    assert render(table([probe_run()], headline=())) == render([])
