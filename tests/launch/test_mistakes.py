"""Mistakes of every kind, generated from the schema: each is refused, with the key and what to write instead."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from launch import compose
from launch.compose import CONF, compose_config
from launch.config import RunConfig, check
from launch.explain import _DEEPSPEED

BASE = ["experiment=demo", "data=jsonl", "data.path=corpus.jsonl"]


def required(kind: Any) -> Any:
    return (
        next((each for each in get_args(kind) if each is not NoneType), kind)
        if NoneType in get_args(kind)
        else kind
    )


def keys(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, str, Any]]:
    """Every key of a configuration as (key, what holds it, its name there, its type)."""
    hints = get_type_hints(type(section))
    for each in fields(section):
        value = getattr(section, each.name)
        yield f"{prefix}{each.name}", section, each.name, required(hints[each.name])
        if is_dataclass(value):
            yield from keys(value, f"{prefix}{each.name}.")
        elif isinstance(value, dict):
            for label, entry in value.items():
                if is_dataclass(entry):
                    yield from keys(entry, f"{prefix}{each.name}.{label}.")


def misspelt(key: str) -> str:
    """Two letters swapped; the last one doubled in a short name."""
    above, dot, name = key.rpartition(".")
    at = next((at for at in range(len(name) // 2, len(name) - 1) if name[at] != name[at + 1]), None)
    if len(name) < 5 or at is None:
        return f"{above}{dot}{name}{name[-1]}"
    return f"{above}{dot}{name[:at]}{name[at + 1]}{name[at]}{name[at + 2 :]}"


def wrong_value(kind: Any) -> tuple[str, str] | None:
    """A value of another type, and what the refusal says; None for mappings."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "zzz", f"must be one of {', '.join(member.name for member in kind)}"
    if is_dataclass(kind):
        return "3", "must be a section"
    said = {
        int: ("1.5", "must be a whole number"),
        float: ("many", "must be a number"),
        bool: ("maybe", "must be true or false"),
        str: ("[a, b]", "must be a text"),
        list: ("7", "must be a list"),
    }
    return said.get(get_origin(kind) or kind)


MISSPELT = [f"{misspelt(key)}=1" for key, *_ in keys(compose_config(BASE))]
TYPES = [
    (f"{key}={wrong[0]}", wrong[1])
    for number, (key, _, _, kind) in enumerate(keys(compose_config(BASE)))
    if (wrong := wrong_value(kind)) is not None
    and number % 4 == 0
    and key not in ("model", "data", "experiment")
]
NUMBERS = [
    (key, value)
    for key, _, _, kind in keys(compose_config(BASE))
    for value in {int: [-1], float: [-1.0, float("nan"), float("inf")]}.get(kind, [])
]
GROUPS = {
    "model=nao": "did you mean model=nano?",
    "data=jsnol": "did you mean data=jsonl?",
    "experiment=dem": "did you mean experiment=demo?",
    "debug=smok": "did you mean debug=smoke?",
}
PAIRS = {
    "warmup.rows_per_step=6 warmup.micro_rows=4": "warmup.rows_per_step=6 is not a multiple of warmup.micro_rows=4",
    "continual.ramp_steps=140 continual.decay_steps=9": "exceed continual.steps=144; shorten them",
    "warmup.peak_lr=1e-3 warmup.final_lr=1e-2": "warmup.final_lr=0.01 is not within 0 and warmup.peak_lr=0.001",
    "model.num_heads=4 model.num_kv_heads=3": "model.num_kv_heads=3: set a divisor of model.num_heads=4",
    "model.row_tokens=100 model.chunk_tokens=64": "model.row_tokens=100: set a multiple of model.chunk_tokens=64",
    "model.tokens_kept=200 model.reference_tokens=128": "model.tokens_kept=200: set at most model.reference_tokens=128",
    "model.num_layers=2 model.num_memory_layers=3": "model.num_memory_layers=3: set 0 to model.num_layers=2",
    "retrieval.candidates=3 retrieval.fresh=5": "retrieval.candidates=3 is less than retrieval.fresh=5",
    "codec.kind=int8 codec.separate=true": "codec.separate=true, but codec.kind=int8 learns nothing",
    "data.validation_fraction=0.6 data.test_fraction=0.5": "leave nothing to train on; their sum must be below 1",
}  # fmt: skip
DEEPSPEED = [f"{place}{key}=1" for place in ("", "+", "engine.", "continual.") for key in _DEEPSPEED]


@cache
def base() -> RunConfig:
    return compose_config(BASE)


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the caller looks at the message)
        compose_config([*BASE, *overrides])
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_there_are_more_than_two_hundred() -> None:
    assert sum(map(len, (MISSPELT, TYPES, NUMBERS, GROUPS, PAIRS))) > 200
    assert len(set(MISSPELT)) == len(MISSPELT)


def test_a_misspelt_key_at_any_level_is_named_with_the_nearest() -> None:
    right = [key for key, *_ in keys(compose_config(BASE))]
    for key, override in zip(right, MISSPELT, strict=True):
        said = refusal(override)
        assert said == f"{override}: there is no key {override[:-2]}; did you mean {key}?", key


@pytest.mark.parametrize(("override", "expected"), TYPES, ids=[override for override, _ in TYPES])
def test_a_wrong_type_is_named_with_the_right_one(override: str, expected: str) -> None:
    said = refusal(override)
    assert said.startswith(f"{override}: {override.partition('=')[0]} ")
    assert expected in said


@pytest.mark.parametrize(("key", "value"), NUMBERS)
def test_a_number_out_of_range_is_named_with_its_value(key: str, value: float) -> None:
    config = base()
    _, holder, name, _ = next(each for each in keys(config) if each[0] == key)
    kept = getattr(holder, name)
    setattr(holder, name, value)
    try:
        with pytest.raises(ValueError, match=re.escape(f"{key}={value}")):
            check(config)
    finally:
        setattr(holder, name, kept)


@pytest.mark.parametrize("override", GROUPS)
def test_an_unknown_file_of_a_group_is_named_with_the_nearest(override: str) -> None:
    with pytest.raises(ValueError, match=re.escape(GROUPS[override])) as refused:
        compose_config([override])
    assert str(refused.value).startswith(f"{override} does not exist; ")


@pytest.mark.parametrize("overrides", PAIRS)
def test_a_contradictory_pair_is_named_with_both(overrides: str) -> None:
    assert PAIRS[overrides] in refusal(*overrides.split(" "))


def test_keys_of_deepspeed_are_answered_with_ours() -> None:
    for override in DEEPSPEED:
        said = refusal(override)
        assert "is DeepSpeed's, whose JSON is derived; set " in said, override
    assert "set continual.rows_per_step" in refusal("continual.train_batch_size=8")
    assert "set engine.zero_stage" in refusal("engine.zero_optimization.stage=2")
    ours = {key for key, *_ in keys(compose_config(BASE))}
    for text in _DEEPSPEED.values():
        for key in re.findall(r"[a-zA-Z]+\.\w+", text.replace("STAGE", "continual")):
            assert key in ours | {"metrics.jsonl"}


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("sed: 1", "there is no key sed; did you mean seed?"),
        ("warmup: {memroy: null}", "there is no key warmup.memroy; did you mean warmup.memory?"),
        ("retrieval: {embedder: {knid: static}}", "there is no key retrieval.embedder.knid; did you mean retrieval.e"),
        ("engine: {zero_optimization: {stage: 2}}", "there is no key engine.zero_optimization; zero"),
        ("model: {width: wide}", "model.width=wide must be a whole number, for example 256"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_named_with_the_file(
    yaml: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    (conf / "experiment/mine.yaml").write_text(f"# @package _global_\n{yaml}\n")
    monkeypatch.setattr(compose, "CONF", conf)
    with pytest.raises(ValueError, match=re.escape(f"conf/experiment/mine.yaml: {said}")):
        compose_config(["experiment=mine"])
