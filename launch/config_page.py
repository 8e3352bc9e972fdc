"""The reference page of the configuration, `docs/config.md`: every key with its type, default and documentation line.

    python -m launch.config_page      writes the page; `make docs` does, and a test fails while it is out of date

Not here: the schema (`launch.config`), the documentation lines (each under its field).
"""

import ast
import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from data.files import write_atomic
from launch.compose import CONF
from launch.config import RunConfig

PAGE = CONF.parent / "docs" / "config.md"

_HEAD = """\
# Configuration

Every key that `memory3 prepare | pretrain | cost | sweep | plan | bench | demo` take as `KEY=VALUE`, in the grammar of
Hydra; made from the schema by `make docs`. `memory3 pretrain --cfg` prints them with the values that they have.
Defaults are those of the schema; `model=nano`, `data=factbook` and `launcher=local` are laid over them where no other
file of `conf/` is chosen, then the files below, in this order, then single keys. A file of your own,
`conf/GROUP/NAME.yaml`, is chosen with `GROUP=NAME` like these.

Of two settings for one key the later counts; of a group one file is chosen. A path may begin with `~`, the home folder.

A key that is misspelt, of the wrong type, out of range or in contradiction to another is refused before anything
starts, with what was meant: the key of that name in another section, what a name of another trainer
(`learning_rate`, `train_batch_size`) is called here, or the nearest name that exists.

| file of `conf/` | |
|---|---|
"""
_KINDS = {int: "whole number", float: "number", bool: "true, false", str: "text"}


def render() -> str:
    """The page."""
    lines = [_HEAD + "\n".join(_groups())]
    for title, section, doc in _sections():
        lines += ["", f"## {title}", "", doc, "", "| key | takes | default | |", "|---|---|---|---|"]
        hints = get_type_hints(section)
        docs = _docs_of(section)
        for each in fields(section):
            kind = hints[each.name]
            if _section_of(kind) is None:
                cells = (f"`{each.name}`", _takes(kind), _default(each), docs[each.name])
                lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _groups() -> Iterator[str]:
    defaults = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    groups = [group for each in defaults if isinstance(each, dict) for group in each]
    for group in [*groups, "sweep"]:
        for path in sorted((CONF / group).glob("*.yaml")):
            yield f"| `{group}={path.stem}` | {_first_sentence(path)} |"


def _first_sentence(path: Path) -> str:
    """Of the comment that a file begins with."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @")]
    comment = " ".join(
        line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)
    )
    assert comment, f"{path} begins with no comment"
    return re.split(r"(?<=\.) ", comment)[0]


def _sections() -> Iterator[tuple[str, type, str]]:
    """Titles, dataclasses and first paragraphs, in the schema's order; stages share theirs."""
    seen: dict[type, list[str]] = {RunConfig: [""]}
    order: list[type] = [RunConfig]

    def visit(section: type, prefix: str) -> None:
        for name, kind in get_type_hints(section).items():
            inner = _section_of(kind)
            if inner is not None:
                below = f"{prefix}{name}.{'LABEL.' if get_origin(kind) is dict else ''}"
                if inner not in seen:
                    order.append(inner)
                seen.setdefault(inner, []).append(below)
                visit(inner, below)

    visit(RunConfig, "")
    for section in order:
        titles = ", ".join(f"`{prefix}*`" for prefix in seen[section] if prefix)
        doc = (inspect.getdoc(section) or "").split("\n\n")[0]
        yield titles or "Top level", section, " ".join(doc.split())


def _section_of(kind: Any) -> type | None:
    """The dataclass that a key holds, or that each entry of its mapping holds."""
    for each in (kind, *get_args(kind)):
        if isinstance(each, type) and is_dataclass(each):
            return each
    return None


def _takes(kind: Any) -> str:
    kinds = (
        [each for each in get_args(kind) if each is not NoneType] if NoneType in get_args(kind) else [kind]
    )
    required = kinds[0]
    null = ", null" if required is not kind else ""
    if isinstance(required, type) and issubclass(required, Enum):
        return ", ".join(f"`{member.name}`" for member in required) + null
    if get_origin(required) is list:
        return f"list of {_KINDS[get_args(required)[0]]}s{null}"
    if get_origin(required) is dict:
        return f"mapping to {_KINDS[get_args(required)[1]]}s{null}"
    return _KINDS[required] + null


def _default(each: "Field[Any]") -> str:
    value = each.default
    if each.default_factory is not MISSING:
        value = each.default_factory()
    if value is MISSING:
        return "*must be set*"
    if isinstance(value, Enum):
        value = value.name
    texts = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return f"`{texts[value]}`"
    return f"`{str(value) or repr(value)}`" if value != "" else "empty"


@cache
def _docs_of(section: type) -> dict[str, str]:
    """The string under each field, in one line."""
    (body,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), (  # noqa: PT018
                f"{section.__name__}.{field.target.id} has no documentation line"
            )
            docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs


if __name__ == "__main__":
    write_atomic(Path(PAGE), render().encode())
