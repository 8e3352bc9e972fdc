"""The page that documents every key."""

import argparse

from launch import cli
from launch.compose import compose_config
from launch.config_page import PAGE, render
from model.config import ModelConfig


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make docs`"


def test_it_holds_every_key_once() -> None:
    page = render()
    for heading in (
        "`model.*`",
        "`data.sources.LABEL.*`",
        "`warmup.*`, `continual.*`",
        "`retrieval.embedder.*`",
    ):
        assert f"\n## {heading}\n" in page
    assert "| `steps` | whole number | `100` | Optimizer updates. |" in page
    assert "| `precision` | `bf16`, `fp32` | `bf16` | Type of parameters and activations. |" in page
    assert "| `memory` |" not in page  # a section of its own
    assert page.count("| `peak_lr` |") == 1
    empty = [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert empty == []


def test_it_names_the_commands_that_take_keys() -> None:
    def takes_keys(parser: argparse.ArgumentParser) -> bool:
        inner = [each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        below = any(takes_keys(sub) for choices in inner for sub in choices.values())
        return below or any(each.dest == "overrides" for each in parser._actions)

    (commands,) = (each for each in cli.parser()._actions if isinstance(each, argparse._SubParsersAction))
    named = " | ".join(name for name, sub in commands.choices.items() if takes_keys(sub))
    assert f"`memory3 {named}`" in render()


def test_defaults_are_those_of_the_schema_which_files_change() -> None:
    assert compose_config([]).model != ModelConfig()
    assert compose_config([]) == compose_config(["model=nano", "data=factbook", "launcher=local"])
    assert "`model=nano`, `data=factbook` and `launcher=local` are laid over them" in render()
    assert "| `tokens_kept` | whole number | `8` |" in render()
    assert "defaults are the `nano` model" not in render()
