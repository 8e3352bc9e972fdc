"""The keys of the schema, what each takes, and which of them was meant by one that there is not.

Not here: the schema (`launch.config`), names that other trainers have for the same (`launch.synonyms`).
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from launch.config import RunConfig
from launch.synonyms import DEEPSPEED, OTHERS
from train.config import STAGES

_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a section, {LABEL: ...}",
}


def unknown_key(key: str) -> str | None:
    """Why the schema has no such key, with the nearest that it has; None when it has."""
    kind: Any = RunConfig
    parts = key.split(".")
    for number, part in enumerate(parts):
        at = ".".join(parts[:number])
        if is_dataclass(kind):
            names = [field.name for field in fields(kind)]
            if part not in names:
                return f"there is no key {'.'.join(parts[: number + 1])}; {_meant(parts, number, names)}"
        elif get_origin(kind) is not dict:
            return f"{at} has no keys of its own; {at} must be {expected(at)}"
        kind = _required(_kind_below(kind, part))
    return None


def _meant(parts: Sequence[str], number: int, names: Sequence[str]) -> str:
    """What to set in place of a key, whose section has not this part of it but those names."""
    above, part, below = parts[:number], parts[number], parts[number + 1 :]
    if part in DEEPSPEED:
        part = next(each for each in reversed(parts) if each in DEEPSPEED)
        return f"{part} is DeepSpeed's, whose JSON is derived; {_answer(DEEPSPEED[part], above)}"
    meant = _misspelt_section(above, part, below, names) or _elsewhere(parts, above)
    said = [_answer(OTHERS[each], above) for each in reversed(parts[number:]) if each in OTHERS][:1]
    if not meant and not said:
        meant = _nearest(above, part, names)
    if meant:
        said.append(f"did you mean {' or '.join(meant)}?")
    if not said and above:
        said.append(f"{'.'.join(above)} has {', '.join(names)}")
    return ", or ".join(said) or "`memory3 pretrain --cfg` prints every key"


def _answer(text: str, above: Sequence[str]) -> str:
    """The answer of a table of synonyms, for the stage that a key names, or for both."""
    stage = next((name for name in above if name in STAGES), None)
    return re.sub(r"STAGE\.(\w+)", rf"{stage}.\1" if stage else r"warmup.\1 and continual.\1", text)


def _misspelt_section(
    above: Sequence[str], part: str, below: Sequence[str], names: Sequence[str]
) -> list[str]:
    """The key, right but for the name of a section."""
    near = difflib.get_close_matches(part, names, n=1) if below else []
    found = [".".join([*above, *near, *below])] if near else []
    return [key for key in found if unknown_key(key) is None]


def _elsewhere(parts: Sequence[str], above: Sequence[str]) -> list[str]:
    """Keys, right but for their section: as much as possible of the end is the same, or of what stands before it."""
    for end in range(len(parts), len(above), -1):
        for begin in range(end):
            tail = "." + ".".join(parts[begin:end])
            found = [key for key in _all_keys() if f".{key}".endswith(tail)]
            if found:
                return _preferred(found, above)
    return []


def _nearest(above: Sequence[str], part: str, names: Sequence[str]) -> list[str]:
    """Keys whose last part is spelt most nearly so; of equals, those of the same section."""
    elsewhere = {key.rpartition(".")[2] for key in _all_keys()}
    near = difflib.get_close_matches(part, names, n=1)
    near += difflib.get_close_matches(part, sorted(elsewhere), n=1, cutoff=0.8)
    if not near:
        return []
    nearest = max(near, key=lambda name: difflib.SequenceMatcher(None, name, part).ratio())
    if nearest in names:
        return [".".join([*above, nearest])]
    return _preferred([key for key in _all_keys() if key.rpartition(".")[2] == nearest], above)


def _preferred(keys: Sequence[str], above: Sequence[str]) -> list[str]:
    """Those of a section, where some are."""
    prefix = "".join(f"{name}." for name in above)
    return [key for key in keys if key.startswith(prefix)] or list(keys)


def expected(key: str) -> str:
    """What a key takes, with its default as an example."""
    above, _, name = key.rpartition(".")
    parent = kind_of(above)
    kind = _kind_below(parent, name)
    required = _required(kind)
    if is_dataclass(required):
        first = fields(required)[0].name
        if is_dataclass(parent):
            return f"a section; set its keys, {key}.{first}=..."
        return f"a section; add it with '+{above}={{{name}: {{{first}: ...}}}}'"
    if isinstance(required, type) and issubclass(required, Enum):
        return "one of " + ", ".join(member.name for member in required)
    text = _KINDS.get(get_origin(required) or required, "of another type")
    if get_origin(required) is list:
        element = get_args(required)[0]
        text = f"a list of {_KINDS[element].removeprefix('a ')}s, {'[a, b]' if element is str else '[1, 2]'}"
    if kind is not required:
        text += ", or null"
    defaults = {field.name: field.default for field in fields(parent)} if is_dataclass(parent) else {}
    default = defaults.get(name, MISSING)
    if isinstance(default, bool) or default in (MISSING, None, ""):
        return text
    return f"{text}, for example {default}"


def is_optional_section(key: str) -> bool:
    """Whether a key holds a section or null."""
    above, _, name = key.rpartition(".")
    kind = _kind_below(kind_of(above), name)
    return kind is not _required(kind) and is_dataclass(_required(kind))


def kind_of(key: str) -> Any:
    """The type of a key that the schema has, without None; of the whole schema for the empty key."""
    kind: Any = RunConfig
    for part in filter(None, key.split(".")):
        kind = _required(_kind_below(kind, part))
    return kind


def keys_of(section: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a section of the schema; entries of a mapping stand below LABEL."""
    for name, hint in _hints(section).items():
        kind, key = _required(hint), f"{prefix}{name}"
        yield key
        if get_origin(kind) is dict:
            kind, key = get_args(kind)[1], f"{key}.LABEL"
        if is_dataclass(kind):
            yield from keys_of(kind, f"{key}.")


@cache
def _all_keys() -> tuple[str, ...]:
    return tuple(keys_of(RunConfig))


@cache
def _hints(section: Any) -> dict[str, Any]:
    return get_type_hints(section)


def _kind_below(kind: Any, part: str) -> Any:
    return get_args(kind)[1] if get_origin(kind) is dict else _hints(kind)[part]


def _required(kind: Any) -> Any:
    """`X | None` without its None."""
    kinds = [each for each in get_args(kind) if each is not NoneType]
    return kinds[0] if NoneType in get_args(kind) else kind
