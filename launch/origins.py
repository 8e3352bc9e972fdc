"""Which files of `conf/` a configuration is composed of, and which keys each of them sets: for refusals that name them.

Files stand in the order in which they are merged: of two that set a key the later one has it.
Not here: composing (`launch.compose`), the wording of refusals (`launch.explain`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

REFUSALS = (HydraException, OmegaConfBaseException, YAMLError, AttributeError, AssertionError, ValueError)
"""What Hydra, OmegaConf and the YAML reader raise; keys of a section that is null end in their own assertions."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A key that a file sets, sections taken apart.

    Attributes:
        key: From the root of the configuration; empty where a file is no mapping.
        value: As it stands in the file.
        file: `conf/GROUP/NAME.yaml`, or the path of a frozen configuration.
    """

    key: str
    value: Any
    file: str


def settings_of_files(overrides: Sequence[str], conf: Path, config_name: str) -> list[Setting]:
    """What the chosen files set; nothing where Hydra cannot say which files these are."""
    settings: list[Setting] = []
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            chosen = loader.compute_defaults_list(config_name, list(overrides), RunMode.RUN).defaults
        for each in chosen:
            path = conf / f"{each.config_path}.yaml"
            if path.exists():  # others are Hydra's own, and the schema
                settings += _settings(path, f"{conf.name}/{each.config_path}.yaml", each.package)
    except REFUSALS:
        return []
    return settings


def settings_of_file(path: Path) -> list[Setting]:
    """What a frozen configuration sets; nothing where it is no YAML."""
    try:
        return _settings(path, "", "")
    except REFUSALS:
        return []


def _settings(path: Path, file: str, package: str) -> list[Setting]:
    content = OmegaConf.to_container(OmegaConf.load(path))
    if isinstance(content, dict):
        content.pop("defaults", None)
        if not content:
            return []
    return [Setting(key, value, file) for key, value in flat(content, package).items()]


def flat(container: Any, above: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their dotted keys; an empty mapping is a leaf."""
    leaves: dict[str, Any] = {}

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, item in value.items():
                visit(item, f"{key}.{name}" if key else str(name))
        else:
            leaves[key] = value

    visit(container, above)
    return leaves
