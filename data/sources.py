"""Documents out of sources: files and hub datasets through Hugging Face `datasets`, and the World Factbook.

A source is a numbered sequence of records; any span of them can be read again, by any process, so work is cut
by record number. The split of a generic source is decided here: a hash of the id holds documents out, and a
held-out document is neither training text nor reference. The factbook's documents come with their own split.

Invariants: records keep the order of the sorted files; every refusal names the file and the line or record;
the cache of `datasets` lies in the folder given, never in the home folder.

Not here: what is stored of the documents (`corpus`), how often a source is drawn (`order`).
"""

import difflib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data.config import DataConfig, SourceConfig, SourceKind, labels_of
from data.documents import Document, Probe, Split, Use
from data.files import fingerprint, hash_files

if TYPE_CHECKING:
    from data.factbook import FactbookText

_ENDINGS = {
    SourceKind.jsonl: (".jsonl", ".ndjson", ".json", ".jsonl.gz"),
    SourceKind.parquet: (".parquet",),
    SourceKind.text: (".txt", ".md", ".rst"),
}
_WHERE = "memory3_where"  # column: the record's place in the source's files, "part1.jsonl:12"
_KINDS = {int: "a number", float: "a number", list: "a list", dict: "an object"}
_READER_VERSION = 3  # of `_json_records`, whose output `datasets` caches


class Source(Protocol):
    """A numbered sequence of records, most of which are documents."""

    @property
    def label(self) -> str:
        """The source's key in the config."""

    @property
    def num_records(self) -> int:
        """How many records there are, dropped ones included."""

    def documents(self, begin: int, end: int) -> Iterator[Document]:
        """The documents among the records [begin, end), in order; dropped ones are left out."""


def open_sources(
    config: DataConfig, cache: Path, fingerprints: Mapping[str, str]
) -> tuple[list[Source], list[Probe]]:
    """The sources in the order of the config, and the probes that they bring.

    Args:
        config: Checked by `data.config.check`.
        cache: Folder for what `datasets` keeps.
        fingerprints: From `content_fingerprints`: what is kept of files that have changed is not used.

    Raises:
        ValueError: A source is missing, cannot be read, or holds nothing.
    """
    sources: list[Source] = []
    probes: list[Probe] = []
    for label, settings in config.sources.items():
        if settings.kind is SourceKind.factbook:
            text = _load_factbook(tuple(config.relations), config.split_seed)
            # Two sources, so that a stage can weigh facts against sections.
            facts = [document for document in text.documents if document.use is Use.training]
            sections = [document for document in text.documents if document.use is not Use.training]
            of_sections, of_facts = labels_of(label, settings.kind)
            sources += [ListSource(of_sections, sections), ListSource(of_facts, facts)]
            probes += text.probes
        else:
            records = _open_records(label, settings, config.path, cache, content=fingerprints.get(label, ""))
            if settings.max_documents is not None:
                records = records.select(range(min(settings.max_documents, len(records))))
            split = SplitRule(config.validation_fraction, config.test_fraction, config.split_seed)
            sources.append(RecordSource(label, settings, split, records))
    return sources, probes


def content_fingerprints(config: DataConfig) -> dict[str, str]:
    """Fingerprints of what the local sources hold (names and bytes of files), by label; reads everything.

    Raises:
        ValueError: A file is missing.
    """
    fingerprints = {}
    for label, settings in config.sources.items():
        if settings.kind is SourceKind.factbook:
            text = _load_factbook(tuple(config.relations), config.split_seed)
            fingerprints[label] = fingerprint([repr(item) for item in (*text.documents, *text.probes)])
        if settings.kind.is_local:
            root, files = _files(label, settings, config.path)
        elif settings.kind is SourceKind.hub and Path(settings.name or "").is_dir():
            root = Path(settings.name or "")
            files = _files_below(root)
        else:
            continue
        names = {path.relative_to(root).as_posix(): path for path in files}
        fingerprints[label] = fingerprint(hash_files(names))
    return fingerprints


def read_json_lines(files: Sequence[Path], label: str, settings: SourceConfig) -> Iterator[Document]:
    """The documents of JSON-lines files, in order, for a bank: nothing is held out, and nothing cached.

    Raises:
        ValueError: A file is missing, or a line is no document; both are named.
    """
    source = RecordSource(label, settings, SplitRule(0, 0, 0), None)
    fields = tuple(
        name for name in (settings.text_field, settings.title_field, settings.id_field) if name is not None
    )
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} does not exist, or is no file; give files of JSON lines")
        records = _json_records([str(file)], [str(file)], fields, settings.text_field)
        for number, record in enumerate(records):
            if not (record[settings.text_field] or "").strip():
                raise ValueError(
                    f"{record[_WHERE]}: a document without text (field {settings.text_field!r}); give it text, or take "
                    "its line out"
                )
            if settings.id_field is not None and record[settings.id_field] in (None, ""):
                raise ValueError(
                    f"{record[_WHERE]}: a document without id (field {settings.id_field!r}); give it one"
                )
            document = source.document(number, record)
            if document is not None:
                yield document


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Which split a document belongs to, by a hash of its id: adding documents moves no other."""

    validation: float
    test: float
    seed: int

    def split(self, document_id: str) -> Split:
        digest = hashlib.sha256(f"{self.seed}\0{document_id}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        if share < self.validation:
            return Split.validation
        return Split.test if share < self.validation + self.test else Split.train


@dataclass(frozen=True, slots=True)
class ListSource:
    """Documents that are at hand and know their split and use."""

    label: str
    items: Sequence[Document]

    @property
    def num_records(self) -> int:
        return len(self.items)

    def documents(self, begin: int, end: int) -> Iterator[Document]:
        for document in self.items[begin:end]:
            yield replace(document, source=self.label)


@dataclass(frozen=True, slots=True)
class RecordSource:
    """Records of a `datasets.Dataset`, which is memory-mapped and travels to other processes as a path."""

    label: str
    settings: SourceConfig
    rule: SplitRule
    records: Any

    @property
    def num_records(self) -> int:
        return len(self.records)

    def documents(self, begin: int, end: int) -> Iterator[Document]:
        for number, record in enumerate(self.records.select(range(begin, end)), start=begin):
            document = self.document(number, record)
            if document is not None:
                yield document

    def document(self, number: int, record: Mapping[str, Any]) -> Document | None:
        """The document that a record describes; None when it is to be dropped."""
        settings = self.settings
        place = record.get(_WHERE, number)
        where = f"data.sources.{self.label}, record {place}"
        text = record[settings.text_field]
        if text is None or (isinstance(text, str) and not text.strip()):
            if settings.min_chars > 0:
                return None
            raise ValueError(
                f"{where}: a document without text (field {settings.text_field!r}); give it text, or drop "
                f"empty texts with data.sources.{self.label}.min_chars=1"
            )
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: field {settings.text_field!r} holds {type(text).__name__}, not a text; set "
                f"data.sources.{self.label}.text_field to the one that holds the text"
            )
        if len(text) < settings.min_chars:
            return None
        document_id = f"{self.label}:{place}"
        if settings.id_field is not None:
            if record[settings.id_field] in (None, ""):
                raise ValueError(f"{where}: a document without id (field {settings.id_field!r}); give it one")
            document_id = str(record[settings.id_field])
        title = "" if settings.title_field is None else str(record[settings.title_field] or "")
        # Only training text needs held-out text of its kind; references are all in use.
        split = self.rule.split(document_id) if settings.use.trains else Split.train
        return Document(
            id=document_id,
            text=text,
            title=" ".join(title.split()),
            source=self.label,
            licence=settings.licence,
            split=split,
            use=settings.use if split is Split.train else Use.training,
        )


class _RefusedLine(ValueError):
    """A line that is no document, or a file without lines; its message is for the user."""


class _AbsentField(ValueError):
    """Its name, which no record has, and the names that the last record has."""


def _open_records(
    label: str, settings: SourceConfig, shared_path: str | None, cache: Path, *, content: str
) -> Any:
    """The dataset of a source, with a column `_WHERE` where records have a place in files."""
    datasets = _import_datasets(cache)
    wanted = (settings.text_field, settings.title_field, settings.id_field)
    fields = tuple(dict.fromkeys(name for name in wanted if name))
    root, files = _files(label, settings, shared_path) if settings.kind.is_local else (Path(), [])
    places = [path.relative_to(root).as_posix() for path in files]
    names = [str(path) for path in files]
    options = {"cache_dir": str(cache), "split": "train"}
    shown = f"data.sources.{label}: {settings.name if not files else settings.path or shared_path}"
    try:
        match settings.kind:
            case SourceKind.jsonl:
                columns = {name: datasets.Value("string") for name in [*fields, _WHERE]}
                records = datasets.Dataset.from_generator(
                    _json_records,
                    features=datasets.Features(columns),
                    cache_dir=str(cache),
                    gen_kwargs={
                        "files": names,
                        "places": places,
                        "fields": fields,
                        "text_field": settings.text_field,
                        "needed": fields,
                        "version": f"{_READER_VERSION} {content}",
                    },
                )
            case SourceKind.parquet:
                records = datasets.load_dataset("parquet", data_files=names, **options)
            case SourceKind.text:
                records = datasets.load_dataset("text", sample_by="document", data_files=names, **options)
                if settings.text_field != "text":
                    records = records.rename_column("text", settings.text_field)
                records = records.add_column(_WHERE, places)
            case _:
                options["split"] = settings.hub_split
                records = datasets.load_dataset(settings.name, settings.hub_config, **options)
    except Exception as error:
        cause = error.__cause__ or error  # datasets wraps what went wrong
        if isinstance(cause, _RefusedLine):
            raise ValueError(str(cause)) from None
        if isinstance(cause, _AbsentField):
            raise ValueError(_no_field(shown, label, settings, *cause.args)) from None
        raise ValueError(_unread(shown, label, settings, names, cause)) from error
    for name in fields:
        if name not in records.column_names:
            there = sorted(set(records.column_names) - {_WHERE})
            raise ValueError(_no_field(shown, label, settings, name, there))
    if len(records) == 0:
        raise ValueError(f"{shown} holds no documents; give a source that does")
    return records.select_columns([name for name in records.column_names if name in (*fields, _WHERE)])


def _unread(
    shown: str, label: str, settings: SourceConfig, files: Sequence[str], cause: BaseException
) -> str:
    """Why `datasets` could not read a source, and what to do."""
    if isinstance(cause, UnicodeDecodeError):
        return _not_utf8(next((file for file in files if not _is_utf8(file)), shown), cause)
    if "corresponds to no data" in str(cause):
        return f"{shown} holds no documents; give a source that does"
    if "save_to_disk" in str(cause):
        return (
            f"{shown} was written by save_to_disk; write it as Parquet, load_from_disk({settings.name!r})"
            f".to_parquet('FILE.parquet'), and set data.sources.{label}.kind=parquet and its path"
        )
    return f"{shown} cannot be read as {settings.kind.value}: {cause}"


def _is_utf8(file: str) -> bool:
    try:
        Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    return (
        f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert the file: "
        "iconv -f ENCODING -t UTF-8 FILE"
    )


def _no_field(shown: str, label: str, settings: SourceConfig, name: str, there: Sequence[str]) -> str:
    """That a source has no field of this name, and which key to set to what."""
    key = next(key for key in ("text_field", "title_field", "id_field") if getattr(settings, key) == name)
    near = difflib.get_close_matches(name, there, n=1)
    others = " to one of them" if key == "text_field" else " to one of them, or to null"
    remedy = f"={near[0]}" if near else others
    return f"{shown} has no field {name!r}, but {list(there)}; set data.sources.{label}.{key}{remedy}"


def _json_records(
    files: list[str],
    places: list[str],
    fields: tuple[str, ...],
    text_field: str,
    *,
    needed: tuple[str, ...] = (),
    version: str = "",
) -> Iterator[dict[str, str | None]]:
    """The wanted fields of each line, read here since `datasets` guesses types (a text may become a date).

    Some line must have each of those `needed`. `version` names the reader and the files' content for the cache of
    `datasets`, and is not used.
    """
    absent, record = set(needed), None
    for name, place in zip(files, places, strict=True):
        with gzip.open(name) if name.endswith(".gz") else open(name, "rb") as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    if number == 1 and line.lstrip().startswith(b"["):
                        raise _RefusedLine(
                            f"{name} is one JSON array; every line must be one JSON object: "
                            f"jq -c '.[]' {name} > FILE.jsonl"
                        )
                    if line.strip():
                        where = f"{name}, line {number}"
                        record = _json_record(line, text_field, where=where)
                        absent.difference_update(record)
                        yield {**_texts(record, fields, where=where), _WHERE: f"{place}:{number}"}
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise _RefusedLine(f"{name} is no whole gzip file: {error}; compress it again") from None
    if absent and record is not None:
        raise _AbsentField(min(absent), sorted(record))


def _json_record(line: bytes, text_field: str, *, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _RefusedLine(_not_utf8(where, error)) from None
    except ValueError as error:
        raise _RefusedLine(f"{where} is no JSON: {error}; every line must be one JSON object") from None
    if not isinstance(record, dict):
        raise _RefusedLine(f"{where} is no JSON object but {line[:40]!r}; every line must be one")
    if text_field not in record or not isinstance(record[text_field], str | None):
        raise _RefusedLine(
            f"{where}: a document without text: {_no_text(record, text_field)}; set text_field to the one that holds "
            "the text, or give it text"
        )
    return record


def _no_text(record: Mapping[str, Any], field: str) -> str:
    if field not in record:
        return f"it has no field {field!r}, but {sorted(record)}"
    value = record[field]
    held = json.dumps(value) if isinstance(value, bool) else _KINDS[type(value)]
    return f"its field {field!r} holds {held}, not a text; its fields are {sorted(record)}"


def _texts(record: Mapping[str, Any], fields: Sequence[str], *, where: str) -> dict[str, str | None]:
    values = {field: record.get(field) for field in fields}
    texts = {
        field: value if value is None or isinstance(value, str) else json.dumps(value)
        for field, value in values.items()
    }
    try:
        "".join(text for text in texts.values() if text).encode()
    except UnicodeEncodeError as error:
        raise _RefusedLine(f"{where} holds half a character ({error.reason}); mend the line") from None
    return texts


def _files(label: str, settings: SourceConfig, shared_path: str | None) -> tuple[Path, list[Path]]:
    """The folder that a local source's names are relative to, and its files, sorted."""
    given = settings.path or shared_path
    assert given is not None, "data.config.check refuses this"
    path = Path(given)
    if not path.exists():
        raise ValueError(f"data.sources.{label}: {path} does not exist; set data.path or its own path")
    if path.is_file():
        return path.parent, [path]
    endings = _ENDINGS[settings.kind]
    files = [file for file in _files_below(path) if file.name.endswith(endings)]
    if not files:
        raise ValueError(f"data.sources.{label}: {path} holds no file ending in {', '.join(endings)}")
    return path, files


def _files_below(folder: Path) -> list[Path]:
    """Sorted, but for hidden ones: what editors and systems leave beside a corpus is none of it."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


@lru_cache(maxsize=1)
def _load_factbook(relations: tuple[str, ...], seed: int) -> "FactbookText":
    from data import factbook

    return factbook.load(relations=relations, seed=seed)


def _import_datasets(cache: Path) -> Any:
    """The library, with every cache of its own inside `cache` and its progress bars off."""
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE"):
        # Read by the library when it is first imported; a cache that the user has chosen stays chosen.
        os.environ.setdefault(name, str(cache / name.removeprefix("HF_").lower()))
    import datasets

    datasets.disable_progress_bars()
    return datasets
