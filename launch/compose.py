"""Hydra, in one process and before any rank exists: from YAML and overrides to a checked, frozen configuration.

Not here: the schema and its rules (`launch.config`), the wording of refusals (`launch.explain`, `launch.keys`).
"""

import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from data.files import write_atomic
from launch.config import RunConfig, check
from launch.explain import explain, refuse_unknown, with_files, with_texts_quoted
from launch.origins import REFUSALS, flat, settings_of_file, settings_of_files

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose_config(overrides: list[str], *, config_name: str = "config") -> RunConfig:
    """Compose, type-check and rule-check a configuration.

    Args:
        overrides: Hydra's grammar, `experiment=demo model=micro warmup.steps=200`; of two for a key the later counts.
        config_name: Name of the primary file below `conf/`.

    Raises:
        ValueError: Naming the offending key, and the nearest one that exists.
    """
    overrides = with_texts_quoted(overrides)
    config = compose_unchecked(overrides, config_name=config_name)
    try:
        check(config)
    except ValueError as refused:
        settings = settings_of_files(overrides, CONF, config_name)
        raise ValueError(with_files(str(refused), overrides, CONF, settings)) from refused
    return config


def laid_over(beneath: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Overrides, and before them those beneath whose keys and groups they leave alone."""
    given = {override.partition("=")[0] for override in overrides}
    return [*(each for each in beneath if each.partition("=")[0] not in given), *overrides]


def compose_unchecked(overrides: list[str], *, config_name: str = "config") -> RunConfig:
    """Compose and type-check, without the rules across keys; `~` at the beginning of a path is the home folder.

    Raises:
        ValueError: Naming the offending key, and the nearest one that exists.
    """
    overrides = with_texts_quoted(overrides)
    refuse_unknown(overrides, CONF)
    _store_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose(config_name, overrides=overrides)
        config = OmegaConf.to_object(composed)
    except REFUSALS as problem:
        settings = settings_of_files(overrides, CONF, config_name)
        raise ValueError(explain(problem, overrides, CONF, settings)) from problem
    assert isinstance(config, RunConfig)
    _expand_home(config)
    return config


@cache
def _store_schema() -> None:
    ConfigStore.instance().store(name="schema", node=RunConfig)


def _expand_home(section: Any) -> None:
    for each in fields(section):
        value = getattr(section, each.name)
        if isinstance(value, str) and value.startswith("~"):
            setattr(section, each.name, os.path.expanduser(value))
        for inner in value.values() if isinstance(value, dict) else [value]:
            if is_dataclass(inner):
                _expand_home(inner)


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
    except REFUSALS as problem:
        raise ValueError(f"{path}: {explain(problem, [], CONF, settings_of_file(path))}") from problem
    assert isinstance(config, RunConfig)
    return config


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, as (key, old value, new value)."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    keys = sorted(flat_old.keys() | flat_new.keys())
    return [
        (key, flat_old.get(key), flat_new.get(key)) for key in keys if flat_old.get(key) != flat_new.get(key)
    ]


def read_settings(path: Path) -> dict[str, Any]:
    """A frozen configuration as flat keys, whichever version of the schema wrote it."""
    try:
        return flat(OmegaConf.to_container(OmegaConf.load(path)))
    except REFUSALS as problem:
        raise ValueError(f"{path}: {explain(problem, [], CONF)}") from problem


def _flatten(config: RunConfig) -> dict[str, Any]:
    return flat(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
