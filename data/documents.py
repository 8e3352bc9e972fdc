"""The document: the unit that is split, drawn, cut into references and cited.

A document is text with an identity; it belongs to exactly one split, and its use says whether the model
trains on it, the bank may hold it, or both. A probe is a question whose answer one document holds.

Not here: where documents come from (`corpus`, `factbook`), their tokens (`shards`).
"""

from dataclasses import dataclass
from enum import Enum


class Use(Enum):
    """What a document is for."""

    both = "both"
    training = "training"
    reference = "reference"

    @property
    def trains(self) -> bool:
        """Whether the document may become training text."""
        return self is not Use.reference

    @property
    def refers(self) -> bool:
        """Whether the document may be cut into references."""
        return self is not Use.training


class Split(Enum):
    """The part of the corpus that a document, or a probe, belongs to."""

    train = "train"
    validation = "validation"
    test = "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text with its identity.

    Attributes:
        id: Unique within a corpus.
        text: Without the title.
        title: One line, or empty.
        source: The label of the source it came from.
        licence: As stated by the source, or empty.
        stage: "warmup" or "continual" when only that stage may draw it, empty for any.
        requires: Id of the document that must have been read before this one is drawn, or empty.
        group: The unit of the bootstrap (a country, say), or empty when the document is its own.
    """

    id: str
    text: str
    title: str = ""
    source: str
    licence: str = ""
    split: Split
    use: Use
    stage: str = ""
    requires: str = ""
    group: str = ""

    @property
    def training_text(self) -> str:
        """The title line, if there is one, and the text."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A question about a held-out document.

    Attributes:
        id: Unique within a corpus.
        question: Text that ends where the answer begins.
        answer: What greedy decoding has to produce, without the end mark.
        relation: The kind of fact ("capital").
        group: The unit of the bootstrap (the country).
        split: validation or test.
        document: Id of the document that should hold the answer.
        section: Name of the section that document is.
        majority: The commonest answer to this kind of question in the training text, or empty.
    """

    id: str
    question: str
    answer: str
    relation: str
    group: str
    split: Split
    document: str
    section: str
    majority: str = ""
