"""What can be set about the data, and what is refused: sources, split, tokenizer, references.

These dataclasses are the Hydra schema of the group `data`. Not here: how the settings are used.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from data.documents import Use


class SourceKind(Enum):
    """Where a source's documents come from."""

    factbook = "factbook"
    jsonl = "jsonl"
    parquet = "parquet"
    text = "text"
    hub = "hub"

    @property
    def is_local(self) -> bool:
        """Whether the source is made of files that `path` names."""
        return self in (SourceKind.jsonl, SourceKind.parquet, SourceKind.text)


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of documents."""

    kind: SourceKind
    """factbook (needs the package), local files as jsonl, parquet or text, or a dataset of the hub."""
    path: str | None = None
    """A file, or a folder that is searched through, but for hidden files; None takes data.path. For local kinds."""
    name: str | None = None
    """Name of the hub dataset, or a local folder laid out like one. For kind hub."""
    hub_config: str | None = None
    """Configuration of the hub dataset."""
    hub_split: str = "train"
    """Which split of the hub dataset is read; this project splits by document itself."""
    text_field: str = "text"
    """Field of a record that holds the text."""
    title_field: str | None = None
    """Field that holds the title, None for documents without one."""
    id_field: str | None = None
    """Field that holds a unique id; None numbers the records."""
    licence: str = ""
    """Licence of the texts, shown with every reference."""
    use: Use = Use.both
    """training text, reference only, or both; the factbook decides for itself."""
    weight: float = 1.0
    """How often its documents are drawn, relative to the other sources' weights; 0 draws none."""
    min_chars: int = 0
    """Shorter texts are dropped, and null; at 0 nothing is, and a document without text is an error."""
    max_documents: int | None = None
    """Only so many records are read, from the first on; None reads all."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """A corpus and what is made of it."""

    name: str
    """Name of the folder that everything made of this corpus lies in."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by label; a document's id must be unique among all of them."""
    path: str | None = None
    """Path of every local source that names none itself."""
    validation_fraction: float = 0.02
    """Share of documents held out for validation, by a hash of the id; the factbook holds out countries."""
    test_fraction: float = 0.02
    """Share of the documents held out for the test."""
    split_seed: int = 0
    """Chooses which documents, or countries, are held out."""
    vocab_size: int = 4096
    """Pieces of the tokenizer that is trained, special ones included."""
    tokenizer_model: str | None = None
    """An existing sentencepiece .model to use; None trains one on the documents of the train split."""
    character_coverage: float = 1.0
    """Share of the characters met in training that get pieces; the others are spelt as bytes."""
    documents_per_shard: int = 10_000
    """Records per shard, the unit of parallel work and of resuming."""
    num_workers: int = 2
    """Processes that read and encode."""
    reference_tokens: int = 128
    """Longest reference, its title line included."""
    relations: list[str] = field(
        default_factory=lambda: [
            "capital",
            "population",
            "area",
            "coastline",
            "internet country code",
            "lowest point",
            "independence",
        ]
    )
    """Facts that the factbook's probes ask for."""


def labels_of(source: str, kind: SourceKind) -> tuple[str, ...]:
    """Labels under which a source stands in the corpus: its own, and of the factbook one for its facts, too."""
    return (source, f"{source}-facts") if kind is SourceKind.factbook else (source,)


def check(config: DataConfig) -> None:
    """Refuses settings that cannot work.

    Raises:
        ValueError: Names the key, its value, and what to set instead.
    """
    if config.name in ("", "..") or Path(config.name).name != config.name:
        raise ValueError(f"data.name={config.name!r} must be a plain folder name; set data.name=my_corpus")
    if not config.sources:
        raise ValueError("data.sources is empty; choose data=factbook, or data=jsonl data.path=FILE")
    for label, source in config.sources.items():
        _check_source(f"data.sources.{label}", source, config.path)
    if all(source.weight == 0 or not source.use.trains for source in config.sources.values()):
        raise ValueError(
            "data.sources has no training text: for one of them set use=both or use=training, "
            "and a weight above 0"
        )
    for key, fraction in (
        ("validation_fraction", config.validation_fraction),
        ("test_fraction", config.test_fraction),
    ):
        if not 0 <= fraction < 1:
            raise ValueError(f"data.{key}={fraction} must be at least 0 and below 1; set for example 0.02")
    if config.validation_fraction + config.test_fraction >= 1:
        raise ValueError(
            f"data.validation_fraction={config.validation_fraction} and "
            f"data.test_fraction={config.test_fraction} leave nothing to train on; their sum must be below 1"
        )
    if not 0.9 <= config.character_coverage <= 1:
        raise ValueError(
            f"data.character_coverage={config.character_coverage} must lie between 0.9 and 1; "
            "set 1, or 0.9995 for scripts of many characters"
        )
    for key, value, least in (
        ("vocab_size", config.vocab_size, 260),
        ("documents_per_shard", config.documents_per_shard, 1),
        ("num_workers", config.num_workers, 1),
        ("reference_tokens", config.reference_tokens, 16),
    ):
        if value < least:
            raise ValueError(f"data.{key}={value} is too small; set at least {least}")
    if config.tokenizer_model is not None and not Path(config.tokenizer_model).is_file():
        raise ValueError(
            f"data.tokenizer_model={config.tokenizer_model} is no file; give a sentencepiece .model, "
            "or null to train one"
        )


def _check_source(key: str, source: SourceConfig, shared_path: str | None) -> None:
    if source.kind.is_local and source.path is None and shared_path is None:
        raise ValueError(f"{key}.path is not set; set it, or data.path=FILE_OR_FOLDER")
    if source.kind is SourceKind.hub and not source.name:
        raise ValueError(f"{key}.name is not set; set it to the dataset's name on the hub")
    if not source.weight >= 0:
        raise ValueError(f"{key}.weight={source.weight} must not be negative; set 0 to draw nothing from it")
    if source.kind is SourceKind.factbook and (
        source.use is not Use.both or source.min_chars or source.max_documents is not None
    ):
        raise ValueError(
            f"{key}: the factbook decides itself which documents there are and what they are for; "
            "leave use, min_chars and max_documents as they are"
        )
    if source.min_chars < 0:
        raise ValueError(f"{key}.min_chars={source.min_chars} must not be negative; set 0 to drop nothing")
    if source.max_documents is not None and source.max_documents < 1:
        raise ValueError(
            f"{key}.max_documents={source.max_documents} must be at least 1; set null to read all"
        )
