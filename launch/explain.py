"""What Hydra and OmegaConf refuse, in one sentence of ours: the key, its value, and what to do instead.

Not here: composing (`launch.compose`), rules across keys (`launch.config.check`).
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from yaml import YAMLError

from launch.config import RunConfig

_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list, [a, b]",
}

_DEEPSPEED = {
    "train_batch_size": "STAGE.rows_per_step",
    "train_micro_batch_size_per_gpu": "STAGE.micro_rows",
    "gradient_accumulation_steps": "STAGE.rows_per_step, which micro_rows and ranks divide",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.beta1, optim.beta2, optim.eps, optim.weight_decay",
    "scheduler": "STAGE.peak_lr, STAGE.ramp_steps, STAGE.decay_steps",
    "zero_optimization": "engine.zero_stage",
    "stage3_gather_16bit_weights_on_model_save": "engine.zero_stage",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "data_types": "engine.precision",
    "zero_allow_untested_optimizer": "nothing: AdamW is DeepSpeed's own",
    "steps_per_print": "logging.progress",
    "wall_clock_breakdown": "nothing: metrics.jsonl splits the seconds of every step",
    "tensorboard": "nothing: metrics.jsonl has every value",
    "csv_monitor": "nothing: metrics.jsonl has every value",
    "deepspeed": "engine",
    "deepspeed_config": "engine",
    "ds_config": "engine",
    "local_rank": "engine.num_ranks",
}
"""What to set in place of DeepSpeed's own keys, whose JSON is derived (`train.engine`)."""


def refuse_unknown(overrides: Sequence[str], conf: Path) -> None:
    """Refuse overrides that the schema has no key for; also `+key=...`, which Hydra itself would add.

    Raises:
        ValueError: Naming the nearest key.
    """
    for override in overrides:
        match = re.match(r"[+~]{0,2}([\w./-]+)", override)
        if override.startswith("sweep="):
            raise ValueError(f"{override}: files of conf/sweep/ are run by `memory3 sweep {override}`")
        if match is None or (conf / match[1]).is_dir():  # left to Hydra's grammar, or the choice of a file
            continue
        unknown = unknown_key(match[1])
        if unknown:
            raise ValueError(f"{override}: {unknown}")
        if re.search(r"=\{\s*\}$", override):
            raise ValueError(f"{override}: an empty section changes nothing; set its keys")
        if override.startswith("~") and is_dataclass(kind_of(match[1].rpartition(".")[0])):
            raise ValueError(
                f"{override}: keys cannot be deleted; set {match[1]}=null where a key may be null"
            )


def explain(problem: Exception, overrides: Sequence[str], conf: Path) -> str:
    """Say in one sentence what is wrong with a configuration.

    Args:
        problem: What Hydra, OmegaConf or the YAML reader raised.
        overrides: Settings of the command line; empty when a file was read.
        conf: Folder of the shipped YAML files.
    """
    if isinstance(problem, OverrideParseException):
        return (
            f"{problem.override}: settings are written KEY=VALUE; quote values that hold spaces or brackets"
        )
    if isinstance(problem, YAMLError):
        return f"{' '.join(str(problem).split())}; the file must be plain YAML, without tags"
    text = str(problem) + ("" if problem.__cause__ is None else f"\n{problem.__cause__}")
    return (
        _of_commas(overrides)
        or _of_group(text, overrides, conf)
        or _of_present_key(text, overrides)
        or _of_key(text, overrides)
        or " ".join(text.split())
    )


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
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing:
        group, _, choice = missing[1].rpartition("/")
        return unknown_choice(group, choice, conf)
    if not re.search(r"Config group override|[Mm]ultiple values for|more than once", text):
        return None
    for override in overrides:
        group = _name(override)
        if group and (conf / group).is_dir():
            listed = ", ".join(_choices(conf / group))
            return f"{override}: write {group}=NAME, once, or leave it away; choices: {listed}"
    return None


def unknown_choice(group: str, choice: str, conf: Path) -> str:
    """That a folder of `conf/` has no such file, with the nearest that it has."""
    choices = _choices(conf / group)
    near = difflib.get_close_matches(choice, choices, n=1)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group}={choice} does not exist; {hint}choices: {', '.join(choices)}"


def _of_present_key(text: str, overrides: Sequence[str]) -> str | None:
    """`+key=...` where the key is there already."""
    present = re.search(r"An item is already at '([^']+)'", text)
    override = present and _override_of(present[1], [each for each in overrides if each.startswith("+")])
    if not override:
        return None
    return f"{override}: {_name(override)} exists; drop the +: '{override.lstrip('+')}'"


def _of_key(text: str, overrides: Sequence[str]) -> str | None:
    """What is wrong with a key or its value."""
    found = re.search(r"full_key: ([\w.\-]+)", text)
    if found is None or "NoneType" in text:
        return _of_missing_section(overrides)
    key = found[1]
    file = re.search(r"In '([^']+)': \w+ raised while", text)
    override = _override_of(key, overrides)
    if (
        override and f".{key}." in f"{_name(override)}."
    ):  # OmegaConf names new elements without the keys above them
        key = re.sub(rf"(\.{re.escape(key)})\b.*", r"\1", _name(override))
    place = f"conf/{file[1]}.yaml" if file else override or key
    if "not in struct" in text and override and not is_dataclass(kind_of(key)):
        return f"{place}: there is no {key} yet; add it with '+{override}'"
    if "mandatory value" in text:
        return f"{place}: a value is missing; set {key}=VALUE"
    value = re.search(r"[Vv]alue '([^']*)'", text)
    given = f"{key}={value[1]}" if value and not override else key
    return f"{place}: {unknown_key(key) or f'{given} must be {_expected(key)}'}"


def unknown_key(key: str) -> str | None:
    """Why the schema has no such key, with the nearest that it has; None when it has."""
    kind: Any = RunConfig
    path: list[str] = []
    for part in key.split("."):
        at = ".".join(path)
        if is_dataclass(kind):
            names = [field.name for field in fields(kind)]
            if part not in names:
                return f"there is no key {'.'.join([*path, part])}; {_nearest(part, path, names)}"
        elif get_origin(kind) is not dict:
            return f"{at} has no keys of its own; {at} must be {_expected(at)}"
        kind = _required(_kind_below(kind, part))
        path.append(part)
    return None


def _nearest(part: str, path: Sequence[str], names: Sequence[str]) -> str:
    """Advice: the key in place of DeepSpeed's, the nearest one of the same section, else of any, else all there are."""
    if part in _DEEPSPEED:
        ours = _DEEPSPEED[part].replace("STAGE", "warmup" if "warmup" in path else "continual")
        return f"{part} is DeepSpeed's, whose JSON is derived; set {ours}"
    prefix = "".join(f"{name}." for name in path)
    near = [f"{prefix}{name}" for name in difflib.get_close_matches(part, names, n=1)]
    if not near:
        everywhere = _schema_keys(RunConfig)
        leaves = {key.rpartition(".")[2] for key in everywhere}
        leaf = [part] if part in leaves else difflib.get_close_matches(part, leaves, n=1, cutoff=0.75)
        near = [key for key in everywhere if key.rpartition(".")[2] in leaf]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"{'.'.join(path)} has {', '.join(names)}" if path else "`memory3 pretrain --cfg` prints every key"


def _expected(key: str) -> str:
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
    if kind is not required:
        text += ", or null"
    defaults = {field.name: field.default for field in fields(parent)} if is_dataclass(parent) else {}
    default = defaults.get(name, MISSING)
    if isinstance(default, bool) or default in (MISSING, None, ""):
        return text
    return f"{text}, for example {default}"


def _of_missing_section(overrides: Sequence[str]) -> str | None:
    """OmegaConf cannot set keys inside a section that is null; None when no override does."""
    for override in overrides:
        if unknown_key(_name(override)):
            continue
        parts = _name(override).split(".")
        ends = range(1, len(parts) + 1)
        nullable = [".".join(parts[:end]) for end in ends if _is_optional_section(".".join(parts[:end]))]
        if nullable:
            return (
                f"{override}: {' or '.join(nullable)} is null here, which single keys cannot change; choose a file of "
                "conf/ that sets it, such as experiment=quick"
            )
    return None


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


def _is_optional_section(key: str) -> bool:
    above, _, name = key.rpartition(".")
    kind = _kind_below(kind_of(above), name)
    return kind is not _required(kind) and is_dataclass(_required(kind))


def kind_of(key: str) -> Any:
    """The type of a key that the schema has, without None; of the whole schema for the empty key."""
    kind: Any = RunConfig
    for part in filter(None, key.split(".")):
        kind = _required(_kind_below(kind, part))
    return kind


def _kind_below(kind: Any, part: str) -> Any:
    return get_args(kind)[1] if get_origin(kind) is dict else get_type_hints(kind)[part]


def _required(kind: Any) -> Any:
    """`X | None` without its None."""
    kinds = [each for each in get_args(kind) if each is not NoneType]
    return kinds[0] if NoneType in get_args(kind) else kind


def _schema_keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(schema).items():
        kind = _required(hint)
        keys.append(f"{prefix}{name}")
        if is_dataclass(kind):
            keys += _schema_keys(kind, f"{prefix}{name}.")
    return keys
