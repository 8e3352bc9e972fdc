"""What Hydra and OmegaConf refuse, in one sentence of ours: the key, its value, and what to do instead.

Not here: composing (`launch.compose`), rules across keys (`launch.config.check`), which key was meant (`launch.keys`).
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from yaml import YAMLError

from data.config import SourceKind, labels_of
from launch.config import RunConfig
from launch.keys import expected, is_optional_section, keys_of, kind_of, unknown_key
from launch.origins import Setting


def refuse_unknown(overrides: Sequence[str], conf: Path) -> None:
    """Refuse overrides that the schema has no key for; also `+key=...`, which Hydra itself would add.

    And what Hydra takes without words: a second file of a group in place of the first, any number as true.

    Raises:
        ValueError: Naming the nearest key.
    """
    groups: set[str] = set()
    for override in overrides:
        match = re.match(r"[+~]{0,2}([\w./-]+)", override)
        if override.startswith("sweep="):
            raise ValueError(f"{override}: files of conf/sweep/ are run by `memory3 sweep {override}`")
        if _is_path(override) and not (conf / override).is_dir():
            raise ValueError(
                f"{override}: settings are written KEY=VALUE; for documents of a file or folder write data=jsonl "
                f"data.path={override} (data.sources.documents.kind says what it holds)"
            )
        if match is None:  # left to Hydra's grammar
            continue
        if re.split(r"[./]", match[1])[0] == "hydra":
            raise ValueError(f"{override}: {own_files(conf)}")
        if (conf / match[1]).is_dir():
            ignored = override[0] in "+~" or override[match.end() :].startswith(
                "@"
            )  # Hydra may pass over these
            if ignored or match[1] in groups:
                raise ValueError(_choose(override, match[1], conf))
            groups.add(match[1])
            continue
        unknown = unknown_key(match[1])
        if unknown:
            raise ValueError(f"{override}: {unknown}")
        if kind_of(match[1]) is bool and re.search(r"=(?![01]$)-?\d+$", override):
            raise ValueError(f"{override}: {match[1]} must be {expected(match[1])}")
        if re.search(r"=\{\s*\}$", override):
            raise ValueError(f"{override}: an empty section changes nothing; set its keys")
        if override.startswith("~") and is_dataclass(kind_of(match[1].rpartition(".")[0])):
            raise ValueError(
                f"{override}: keys cannot be deleted; set {match[1]}=null where a key may be null"
            )


def own_files(conf: Path) -> str:
    """What to do in place of Hydra's own keys and options, most of which are for finding files."""
    return f"Hydra's own settings are not taken; a file of yours, {conf}/GROUP/NAME.yaml, is chosen with GROUP=NAME"


def with_texts_quoted(overrides: Sequence[str]) -> list[str]:
    """Overrides, with quotes around texts that Hydra's grammar would refuse: paths with blanks, brackets or umlauts."""
    return [_with_text_quoted(override) for override in overrides]


def _with_text_quoted(override: str) -> str:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        key, equals, value = override.partition("=")
        is_structure = re.match(r"[\[{]|\w+\(", value) or re.search(r"\\$|['\"]", value)
        name = key.lstrip("+")
        if equals and not is_structure and unknown_key(name) is None and kind_of(name) is str:
            return f'{key}="{value}"'
    return override


def _is_path(override: str) -> bool:
    """Whether documents were meant by what is no setting."""
    ending = Path(override.removesuffix(".gz")).suffix
    is_named = ending in (".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".md", ".rst")
    return "=" not in override and (is_named or (os.path.exists(override) and ending != ".yaml"))


def explain(
    problem: Exception, overrides: Sequence[str], conf: Path, settings: Sequence[Setting] = ()
) -> str:
    """Say in one sentence what is wrong with a configuration.

    Args:
        problem: What Hydra, OmegaConf or the YAML reader raised.
        overrides: Settings of the command line; empty when a file was read.
        conf: Folder of the shipped YAML files.
        settings: What the files set that were read.
    """
    if isinstance(problem, OverrideParseException):
        return (
            f"{problem.override}: settings are written KEY=VALUE; quote values that hold spaces or brackets"
        )
    if isinstance(problem, YAMLError):
        return f"{' '.join(str(problem).split())}; the file must be plain YAML, without tags"
    text = str(problem) + ("" if problem.__cause__ is None else f"\n{problem.__cause__}")
    keys = [override for override in overrides if not (conf / _name(override)).is_dir()]
    return (
        _of_commas(overrides)
        or _of_group(text, overrides, conf)
        or _of_present_key(text, keys)
        or _of_key(text, keys, settings, conf)
        or " ".join(text.split())
    )


def with_files(refused: str, overrides: Sequence[str], conf: Path, settings: Sequence[Setting]) -> str:
    """A refusal of `launch.config.check`, with the files that set the keys that it names before its remedy.

    It begins with the file where one has set all of them; where others have a part in it, the command line among
    them, the files stand behind.
    """
    keys = [override for override in overrides if not (conf / _name(override)).is_dir()]
    files: dict[str, str] = {}
    from_files = True
    wrong = refused.partition(";")[0]
    for key, equals in re.findall(r"(?<![\w.-])([a-z_]\w*(?:\.[\w-]+)*)(=?)", wrong):
        if unknown_key(key) or not ("." in key or equals or is_optional_section(key)):
            continue
        if _override_of(key, keys):
            from_files = False
            continue
        below = f"{key}." if "." in key else None
        for each in settings:
            if each.key == key or (below and each.key.startswith(below)):
                files[key] = each.file
    if from_files and len(set(files.values())) == 1:
        return f"{next(iter(files.values()))}: {refused}"
    listed = ", ".join(f"{key} is set in {file}" for key, file in files.items())
    return f"{refused} ({listed})" if listed else refused


def _of_commas(overrides: Sequence[str]) -> str | None:
    """Several values in place of one; Hydra takes a value with commas for several."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_interval_sweep():
            return f"{override.input_line}: this is no single value; `memory3 sweep` draws from an interval"
        if override.is_sweep_override():
            key, _, value = str(override.input_line).partition("=")
            return (
                f"{override.input_line}: this is several values; `memory3 pretrain -m` trains with each, `memory3 "
                f"sweep` draws among them; one value that has commas is quoted, \"{key}='{value}'\""
            )
    return None


def _of_group(text: str, overrides: Sequence[str], conf: Path) -> str | None:
    """What is wrong with the choice of a file of `conf/`."""
    file = re.search(r"^In '([^']+)'", text)
    place = f"conf/{file[1]}.yaml: " if file else ""
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if missing:
        group, _, choice = missing[1].partition("/")
        if f"{group}={choice}" in overrides:
            place = ""
        elif place in ("", "conf/config.yaml: "):  # Hydra names the file whose choice was overridden
            place = _file_that_overrides(group, choice, conf)
        return f"{place}{unknown_choice(group, choice, conf)}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown and file:
        group = unknown[1]
        if (conf / group).is_dir():
            return f"{place}{_on_the_command_line(group)}"
        groups = sorted(path.name for path in conf.iterdir() if path.is_dir())
        near = difflib.get_close_matches(group, groups, n=1)
        hint = f"did you mean 'override /{near[0]}'? " if near else ""
        return f"{place}there is no group {group}; {hint}groups: {', '.join(groups)}"
    if not re.search(r"Config group override|[Mm]ultiple values for|more than once", text):
        return None
    of_groups = [each for each in overrides if _name(each) and (conf / _name(each)).is_dir()]
    if not of_groups:
        return None
    wrong = min(of_groups, key=lambda each: _is_choice(each, of_groups, conf))
    return _choose(wrong, _name(wrong), conf)


def _is_choice(override: str, of_groups: Sequence[str], conf: Path) -> bool:
    """Whether nothing is wrong with the choice of a file."""
    name, _, choice = override.partition("=")
    once = sum(_name(each) == name for each in of_groups) == 1
    return once and choice in _choices(conf / name)


def _choose(override: str, group: str, conf: Path) -> str:
    keys = f", or single keys {group}.KEY=VALUE" if _is_section(group) else ""
    return f"{override}: write {group}=NAME, once{keys}, or leave it away; choices: {', '.join(_choices(conf / group))}"


def _is_section(group: str) -> bool:
    return group in get_type_hints(RunConfig) and is_dataclass(kind_of(group))


def _on_the_command_line(group: str) -> str:
    if group == "sweep":
        return "files of conf/sweep/ are run by `memory3 sweep sweep=NAME`"
    return f"files of conf/{group}/ are chosen on the command line; give {group}=NAME there"


def _file_that_overrides(group: str, choice: str, conf: Path) -> str:
    """The first file of `conf/` whose list of defaults makes a choice; empty where none does."""
    for path in sorted(conf.rglob("*.yaml")):
        if re.search(rf"/?{re.escape(group)}: *{re.escape(choice)}\b", path.read_text(encoding="utf-8")):
            return f"conf/{path.relative_to(conf)}: "
    return ""


def unknown_choice(group: str, choice: str, conf: Path) -> str:
    """That a folder of `conf/` has no such file, with the nearest that it has."""
    choices = _choices(conf / group)
    near = difflib.get_close_matches(choice, choices, n=1)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    keys = [key for key in keys_of(RunConfig) if key.startswith(f"{group}.")]
    if not near and len(keys) == 1:
        hint = f"did you mean {keys[0]}={choice}? "
    return f"{group}={choice} does not exist; {hint}choices: {', '.join(choices)}"


def _of_present_key(text: str, overrides: Sequence[str]) -> str | None:
    """`+key=...` where the key is there already."""
    present = re.search(r"An item is already at '([^']+)'", text)
    override = present and _override_of(present[1], [each for each in overrides if each.startswith("+")])
    if not override:
        return None
    return f"{override}: {_name(override)} exists; drop the +: '{override.lstrip('+')}'"


def _of_key(text: str, overrides: Sequence[str], settings: Sequence[Setting], conf: Path) -> str | None:
    """What is wrong with a key or its value."""
    found = re.search(r"full_key: ([\w.\-]+)", text)
    if found is None or "NoneType" in text:
        said = _of_shape(settings, conf) or _of_missing_section(overrides, settings)
        if said or found is None:
            return said
    key = found[1]
    file = re.search(r"In '([^']+)': \w+ raised while", text)
    override = None if file else _override_of(key, overrides)
    if (
        override and f".{key}." in f"{_name(override)}."
    ):  # OmegaConf names new elements without the keys above them
        key = re.sub(rf"(\.{re.escape(key)})\b.*", r"\1", _name(override))
    place = f"conf/{file[1]}.yaml" if file else override or _file_of(key, settings) or key
    if "not in struct" in text and override:
        return f"{place}: {_of_label(override, key, settings, overrides)}"
    if "mandatory value" in text:
        return f"{place}: a value is missing; set {key}=VALUE"
    variable = re.search(r"Environment variable '([^']+)' not found", text)
    if variable:
        return f"{place}: the environment has no {variable[1]}; set it, or {key}=VALUE"
    absent = re.search(r"Interpolation key '([^']+)' not found", text)
    if absent:
        return f"{place}: {key} refers to {absent[1]}: {unknown_key(absent[1]) or 'it has no value'}"
    value = re.search(r"[Vv]alue '(.*?)'(?=[ ,])", text)
    of_element = f"full_key: {key}[" in text
    given = f"{key}={value[1]}" if value and not override and not of_element else key
    unknown = _unknown_in_file(key, conf) if file else unknown_key(key)
    return f"{place}: {unknown or f'{given} must be {expected(key)}'}"


def _of_shape(settings: Sequence[Setting], conf: Path) -> str | None:
    """The first key of a file that holds a section where there is none, or none where there is one."""
    for each in settings:
        place = f"{each.file}: " if each.file else ""
        if not each.key:
            return f"{place}a file holds lines KEY: VALUE"
        unknown = _unknown_in_file(each.key, conf)
        if unknown:
            return f"{place}{unknown}"
        kind = kind_of(each.key)
        is_section = is_dataclass(kind) or get_origin(kind) is dict
        if not is_section or each.value is None or isinstance(each.value, dict):
            continue
        if each.file and isinstance(each.value, str) and (conf / each.key).is_dir():
            if each.value not in _choices(conf / each.key):
                return f"{place}{unknown_choice(each.key, each.value, conf)}"
            return (
                f"{place}{each.key}={each.value} must be a section; to choose conf/{each.key}/{each.value}.yaml write "
                f"'defaults: [override /{each.key}: {each.value}]'"
            )
        return f"{place}{each.key}={each.value} must be {expected(each.key)}"
    return None


def _unknown_in_file(key: str, conf: Path) -> str | None:
    """Why a file cannot set a key; None when it can."""
    unknown, group = unknown_key(key), key.partition(".")[0]
    if unknown and group not in get_type_hints(RunConfig) and (conf / group).is_dir():
        return f"there is no key {group}; {_on_the_command_line(group)}"
    return unknown


def _of_label(override: str, key: str, settings: Sequence[Setting], overrides: Sequence[str]) -> str:
    """What to write in place of a label that a mapping does not hold."""
    above, _, label = key.rpartition(".")
    there = {
        each.key.removeprefix(f"{above}.").partition(".")[0]
        for each in settings
        if each.key.startswith(f"{above}.")
    }
    if above == "data.sources":
        near = difflib.get_close_matches(label, sorted(there), n=1)
        right = override.replace(key, f"{above}.{near[0]}", 1) if near else ""
        return f"there is no {key}; did you mean '{right}'?" if right else f"{key} must be {expected(key)}"
    sources = _labels_of_sources(settings)
    complete = not any(_name(each).startswith("data.sources") for each in overrides)
    near = difflib.get_close_matches(label, sorted({*sources, *there}), n=1)
    if label in sources or not complete or not sources:
        return f"there is no {key} yet; add it with '+{override}'"
    if not near:
        return f"there is no {key}; labels: {', '.join(sources)}"
    plus = "" if near[0] in there else "+"
    return f"there is no {key}; did you mean '{plus}{override.replace(key, f'{above}.{near[0]}', 1)}'?"


def _labels_of_sources(settings: Sequence[Setting]) -> list[str]:
    kinds = {}
    for each in settings:
        match = re.fullmatch(r"data\.sources\.([^.]+)\.kind", each.key)
        if match and each.value in SourceKind.__members__:
            kinds[match[1]] = SourceKind[each.value]
    return [label for source, kind in kinds.items() for label in labels_of(source, kind)]


def _of_missing_section(overrides: Sequence[str], settings: Sequence[Setting]) -> str | None:
    """OmegaConf cannot set keys inside a section that is null; None when no override does."""
    for override in overrides:
        if unknown_key(_name(override)):
            continue
        parts = _name(override).split(".")
        ends = range(1, len(parts) + 1)
        nullable = [".".join(parts[:end]) for end in ends if is_optional_section(".".join(parts[:end]))]
        last = {section: _last_within(section, settings) for section in nullable}
        null = [section for section, setting in last.items() if setting is None or setting.value is None]
        if null:
            files = [setting.file for setting in last.values() if setting and setting.key in null]
            where = f"in {files[0]}" if files else "here"
            return (
                f"{override}: {' or '.join(null)} is null {where}, which single keys cannot change; choose a file of "
                "conf/ that sets it, such as experiment=quick"
            )
    return None


def _last_within(section: str, settings: Sequence[Setting]) -> Setting | None:
    """The last that a file says of a section, or of a key within; None where no file does."""
    return next((each for each in reversed(settings) if f"{each.key}.".startswith(f"{section}.")), None)


def _choices(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _name(override: str) -> str:
    """What an override sets, without its value."""
    return override.lstrip("+~").partition("=")[0]


def _override_of(key: str, overrides: Sequence[str]) -> str | None:
    """The last override that sets a key, a section around it, or something within it."""
    for override in reversed(overrides):
        name = _name(override)
        if f"{key}.".startswith(f"{name}.") or f".{key}." in f".{name}.":
            return override
    return None


def _file_of(key: str, settings: Sequence[Setting]) -> str | None:
    """The file that has a key."""
    return next((each.file for each in reversed(settings) if each.key == key), None)
