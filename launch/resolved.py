"""A composed configuration as a terminal shows it: a row for each section, what differs from the schema before a bar.

Invariant: every key stands there once, with the value that a run is given.
Not here: the same as YAML (`launch.compose.to_yaml`), what keys mean (docs/config.md). This module imports no torch.
"""

import json
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from rich.table import Table
from rich.text import Text

from launch.config import RunConfig

_LONGEST_NAME = 24
"""Of a section in one line; labels of sources may make longer ones."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of a section.

    Attributes:
        text: `KEY=VALUE`.
        is_default: Whether the value is the schema's.
    """

    text: str
    is_default: bool


def sections(config: RunConfig) -> dict[str, list[Setting]]:
    """The keys by the dotted name of their section, in the schema's order; those of the top level under ''."""
    found: dict[str, list[Setting]] = {}

    def visit(section: Any, name: str) -> None:
        here = found.setdefault(name, [])
        for each in fields(section):
            value = getattr(section, each.name)
            inner = {"": value} if is_dataclass(value) else value if isinstance(value, dict) else {}
            if inner and all(map(is_dataclass, inner.values())):
                for label, of_label in inner.items():
                    visit(of_label, ".".join(filter(None, (name, each.name, label))))
            else:
                here.append(Setting(f"{each.name}={_written(value)}", value == _default(each)))

    visit(config, "")
    return {name: settings for name, settings in found.items() if settings}


def table(config: RunConfig) -> Table:
    """The sections as rows."""
    grid = Table.grid(padding=(0, 2))
    grid.title, grid.title_style, grid.title_justify = "Configuration, resolved", "bold", "left"
    grid.caption = "behind | stand the schema's defaults; as YAML: memory3 pretrain --cfg ..."
    grid.caption_justify = "left"
    grid.add_column(overflow="fold", max_width=_LONGEST_NAME)
    grid.add_column(overflow="fold")
    for name, settings in sections(config).items():
        chosen = [Text(each.text, style="bold") for each in settings if not each.is_default]
        defaults = [Text(each.text, style="dim") for each in settings if each.is_default]
        grid.add_row(name, Text(" ").join([*chosen, *([Text("|"), *defaults] if defaults else [])]))
    return grid


def _written(value: Any) -> str:
    """A value as an override writes it."""
    match value:
        case None | bool():
            return json.dumps(value)
        case Enum():
            return value.name
        case list():
            return f"[{','.join(map(_written, value))}]"
        case dict():
            return f"{{{','.join(f'{key}:{_written(each)}' for key, each in value.items())}}}"
        case _:
            return str(value) or "''"


def _default(each: "Field[Any]") -> Any:
    """The schema's value; `MISSING`, which no value equals, where it has none."""
    return each.default if each.default_factory is MISSING else each.default_factory()
