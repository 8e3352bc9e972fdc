"""`benchmarks.edits`: which values are exchanged, how they are put into a text, and what is counted."""

import json
from pathlib import Path

import pytest

from benchmarks import edits
from benchmarks.edits import Asked, Edit, Measured, choose_edits, holds, render, replaced, shape
from data.documents import Probe, Split

STATES = ("without memory", "before", "edited", "third value", "elsewhere", "removed", "removed elsewhere")


def probe(country: str, answer: str, relation: str = "capital") -> Probe:
    return Probe(
        id=f"{country}/{relation}",
        question=f"Question: What is the {relation} of {country}?\nAnswer:",
        answer=f" {answer}",
        relation=relation,
        group=country,
        split=Split.test,
        document=f"{country}/{relation}",
        section="Government",
    )


@pytest.mark.parametrize(
    ("text", "old", "new", "result"),
    [
        ("Capital: Lima; of Lima.", "Lima", "Oslo", ("Capital: Oslo; of Oslo.", 2)),
        ("Limassol, Kalima", "Lima", "Oslo", ("Limassol, Kalima", 0)),
        ("15,000 km, 315,000 km, 15,000.5 km", "15,000 km", "9 km", ("9 km, 315,000 km, 15,000.5 km", 1)),
        ("0 km, 10 km, 1.0 km", "0 km", "7 km", ("7 km, 10 km, 1.0 km", 1)),
        ("area: 83,600\nsq km", "83,600 sq km", r"\1", ("area: \\1", 1)),
        ("code: .ae", ".ae", ".ao", ("code: .ao", 1)),
    ],
)
def test_whole_words_and_whole_numbers_are_replaced(
    text: str, old: str, new: str, result: tuple[str, int]
) -> None:
    assert replaced(text, old, new) == result
    assert holds(text.upper(), old) == (result[1] > 0)


def test_a_false_value_is_another_countrys_of_the_same_relation_and_shape() -> None:
    cities = ["Lima", "Oslo", "Rome", "Bern", "New York", "San Juan"]
    probes = [probe(f"c{place}", city) for place, city in enumerate(cities)]
    probes += [probe(f"c{place}", f"{place}00 km", "coastline") for place in range(1, 5)]
    text = {each.document: f"It is{each.answer}." for each in probes}
    text["c0/capital"] += " Not Rome."
    text["c1/coastline"] = "It is not said."
    edits, left_out = choose_edits(probes, text.__getitem__, len)
    assert left_out == {"no other value of that shape": 2, "not in the document as it stands": 1}
    assert [edit.probe.id for edit in edits[:4]] == [f"c{place}/capital" for place in range(4)]
    for edit in edits:
        assert len({edit.true, edit.false, edit.third}) == 3
        assert shape(edit.true) == shape(edit.false) == shape(edit.third)
        assert {edit.false, edit.third} <= {
            other.answer.strip() for other in probes if other.relation == edit.probe.relation
        }
    assert {edits[0].false, edits[0].third} == {"Oslo", "Bern"}
    assert len({(edit.probe.group, edit.half) for edit in edits}) == len({e.probe.group for e in edits})
    assert choose_edits(probes, text.__getitem__, len)[0] == edits


def test_the_tables_count_answers_that_changed_places() -> None:
    run = []
    for place in range(4):
        edit = Edit(probe(f"c{place}", "Lima"), "Oslo", "Rome", place % 2)
        states = dict.fromkeys(STATES, Asked(true=2.0, false=3.0))
        if place:
            states |= {"edited": Asked(true=3.5, false=3.0), "removed": Asked(true=2.5, false=3.0)}
        run.append(Measured(edit, (2, 2), states))
    lines = render([run]).splitlines()
    edited = next(line for line in lines if line.startswith("| edited | 75.0%"))
    assert edited.split(" | ")[3].startswith("+0.125 [")  # three of 0.5, one of -1
    assert any(line.startswith("| before | +75.0% [") and " | + | " in line for line in lines)
    assert any(line.startswith("| removed | 75.0% [") and "-0.375 [" in line for line in lines)
    assert any(line.startswith("| removed elsewhere | 0.0% [0.0%, 0.0%]") for line in lines)
    assert any(line.startswith("| capital | 4 | 0% | 75% | 0% | +1.125 [") for line in lines)


def test_facts_of_a_run_are_exchanged_and_asked_for(run: Path, tmp_path: Path) -> None:
    stem = tmp_path / "edits"
    given = [str(run), "--root", str(run.parent), "--work", str(tmp_path / "work"), "--commands", "1"]
    assert edits.main([*given, "--output", str(stem)]) == 0
    found = json.loads(stem.with_suffix(".json").read_text())
    assert {one["country"] for one in found} == {"Liechtenstein", "Samoa"}
    for one in found:
        nats = one["nats"]
        assert {*nats} == {*STATES}
        assert nats["edited"] != nats["before"] != nats["without memory"]
        alone = [other for other in found if other["relation"] == one["relation"]]
        if len(alone) == 1:  # nothing was edited elsewhere
            assert nats["elsewhere"] == nats["removed elsewhere"] == nats["before"]
    page = stem.with_suffix(".md").read_text()
    said = "1 edits were made by `memory3 bank replace` and `remove` as well, one by one: answers differ by at most "
    assert float(page.partition(said)[2].split()[0]) < 1e-3
