"""Hydra, in one process and before any rank exists: from YAML and overrides to a checked, frozen configuration.

Not here: the schema and its rules (`launch.config`).
"""

import difflib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.files import write_atomic
from launch.config import RunConfig, check

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose_config(overrides: list[str], *, config_name: str = "config") -> RunConfig:
    """Compose, type-check and rule-check a configuration.

    Args:
        overrides: Hydra's grammar, `experiment=demo model=micro warmup.steps=200`.
        config_name: Name of the primary file below `conf/`.

    Raises:
        ValueError: Naming the offending key, and the nearest one that exists.
    """
    ConfigStore.instance().store(name="schema", node=RunConfig)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose(config_name, overrides=overrides)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, AttributeError) as problem:
        raise ValueError(_explain(problem)) from problem
    assert isinstance(config, RunConfig)
    check(config)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration as YAML, in one piece or not at all."""
    write_atomic(path, to_yaml(config).encode())


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, keys in the schema's order."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load_config(path: Path) -> RunConfig:
    """Read a frozen configuration; YAML tags that would run code are refused by the reader.

    Raises:
        ValueError: When the file is missing, or does not fit the schema.
    """
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: {path.parent} is not a run folder; list runs with `ls {path.parent.parent}`"
        )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path))
        config = OmegaConf.to_object(merged)
    except Exception as problem:
        raise ValueError(f"{path}: {_explain(problem)}") from problem
    assert isinstance(config, RunConfig)
    return config


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, as (key, old value, new value)."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    keys = sorted(flat_old.keys() | flat_new.keys())
    return [
        (key, flat_old.get(key), flat_new.get(key)) for key in keys if flat_old.get(key) != flat_new.get(key)
    ]


def _flatten(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, item in value.items():
                visit(item, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = value

    visit(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True), "")
    return flat


def _explain(problem: Exception) -> str:
    """The first line of what Hydra or OmegaConf says, with the nearest key or choice that exists."""
    text = str(problem)
    cause = problem.__cause__
    if cause is not None and str(cause) not in text:
        text = f"{text}: {cause}"
    advice = re.compile(r"\bTo append to your config use \S+|full_key:.*|reference_type=.*|object_type=.*")
    message = " ".join(" ".join(advice.sub("", line).split()) for line in text.splitlines()).strip()
    wrong = re.search(r"Could not override '([^']+)'|[Kk]ey '([^']+)'|has no attribute '([^']+)'", text)
    names = [group for group in (wrong.groups() if wrong else ()) if group]
    full = re.search(r"full_key: (\S+)", text)
    word = full[1] if full else (names[0] if names else "")
    missing_group = re.search(r"Could not find '([^']+)'", text)
    if missing_group:
        group, _, choice = missing_group[1].rpartition("/")
        choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        near = difflib.get_close_matches(choice, choices, n=1)
        hint = f"did you mean {group}={near[0]}? " if near else ""
        return f"{group}={choice} does not exist; {hint}choices: {', '.join(choices)}"
    nearest = _nearest_key(word) if word else None
    return f"{message} -- did you mean {nearest}?" if nearest and nearest != word else message


def _nearest_key(word: str) -> str | None:
    keys = list(_schema_keys(RunConfig))
    near = difflib.get_close_matches(word, keys, n=1, cutoff=0.6)
    if not near:
        leaf = word.rpartition(".")[2]
        near = [key for key in keys if difflib.get_close_matches(leaf, [key.rpartition(".")[2]], cutoff=0.75)]
    return near[0] if near else None


def _schema_keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    hints = get_type_hints(schema)
    for part in fields(schema):
        key = f"{prefix}{part.name}"
        keys.append(key)
        for kind in (hints[part.name], *get_args(hints[part.name])):
            if is_dataclass(kind):
                keys += _schema_keys(kind, f"{key}.")
    return keys
