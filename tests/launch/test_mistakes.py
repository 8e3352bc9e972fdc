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
from launch.compose import CONF, compose_config, load_config
from launch.config import RunConfig, check
from launch.keys import keys_of, kind_of, unknown_key
from launch.synonyms import DEEPSPEED, OTHERS

BASE = ["experiment=quick", "data=jsonl", "data.path=corpus.jsonl"]


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
TYPES = {
    key: wrong for key, _, _, kind in keys(compose_config(BASE)) if (wrong := wrong_value(kind)) is not None
}
TYPES_COMPOSED = [f"{key}={TYPES[key][0]}" for key in list(TYPES)[::8] if not (CONF / key).is_dir()]
ZERO_IS_RIGHT = {
    *(
        "seed",
        "data.split_seed",
        "evaluation.seed",
        "data.sources.documents.min_chars",
        "data.validation_fraction",
    ),
    *("data.test_fraction", "retrieval.overlap_training", "retrieval.overlap_evaluation", "bank.cache_mib"),
    *("bank.cold_gib", "optim.beta1", "optim.beta2", "optim.weight_decay", "engine.zero_stage"),
    *("launcher.slurm.signal_seconds", "warmup.final_lr", "warmup.ramp_steps", "warmup.decay_steps"),
    *("continual.final_lr", "continual.ramp_steps", "continual.decay_steps", "continual.memory.online_share"),
    *("saving.keep_best", "divergence.spike_nats", "divergence.spike_sigmas", "divergence.margin_steps"),
    *("divergence.max_rollbacks", "supervision.max_restarts", "supervision.backoff_seconds"),
    *("supervision.max_backoff_seconds", "logging.profile_steps"),
}
NUMBERS = [
    (key, value)
    for key, _, _, kind in keys(compose_config(BASE))
    for value in {int: [-1, 0, 10**30], float: [-1.0, 0.0, 1e39, float("nan"), float("inf")]}.get(kind, [])
    if value or key not in ZERO_IS_RIGHT
]
GROUPS = {
    "engine=zer3": "did you mean engine=zero3?",
    "stage=warmpu": "did you mean stage=warmup?",
    "optim=papr": "did you mean optim=paper?",
    "bank=compct": "did you mean bank=compact?",
    "logging=wadb": "did you mean logging=wandb?",
    "paths=scrtch": "did you mean paths=scratch?",
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

FILES = {
    # sections
    "model: nano": "model=nano must be a section; to choose conf/model/nano.yaml write 'defaults: [override /mod",
    "model: nao": "model=nao does not exist; did you mean model=nano?",
    "debug: smoke": "there is no key debug; files of conf/debug/ are chosen on the command line; give debug=NAME there",
    "sweep: memory": "there is no key sweep; files of conf/sweep/ are run by `memory3 sweep sweep=NAME`",
    "warmup: 3": "warmup=3 must be a section; set its keys, warmup.steps=...",
    "warmup: {weights: [a]}": "warmup.weights=['a'] must be a section, {LABEL: ...}",
    "data: {sources: {documents: null}}": "data.sources.documents must be a section",
    "engine:": "engine must be a section; set its keys, engine.zero_stage=...",
    "seed: {a: 1}": "seed={'a': 1} must be a whole number, for example 0",
    "model: {prefix_ids: {a: 1}}": "model.prefix_ids has no keys of its own; model.prefix_ids must be a list of whole",
    "- seed": "a file holds lines KEY: VALUE",
    # within lists and labels
    "launcher: {slurm: {options: [{a: b}]}}": "launcher.slurm.options=[{'a': 'b'}]: {'a': 'b'} is no single value; set",
    "launcher: {slurm: {setup: [null]}}": "launcher.slurm.setup must be a list of texts, [a, b]",
    "warmup: {weights: {documents: {a: 1}}}": "warmup.weights.documents={'a': 1}: {'a': 1} is no single value",
    # other files
    "defaults: [qick]": "experiment=qick does not exist; did you mean experiment=quick?",
    "defaults: [override /model: nao]": "model=nao does not exist; did you mean model=nano?",
    "defaults: [override /modle: nano]": "there is no group modle; did you mean 'override /model'? groups: bank,",
    "defaults: [override /debug: smoke]": "files of conf/debug/ are chosen on the command line; give debug=NAME there",
    "warmup: {steps: '${warmup.stepz}'}": "warmup.steps refers to warmup.stepz: there is no key warmup.stepz; did you",
    "warmup: {steps: '${run}'}": "warmup.steps=run must be a whole number, for example 100",
    # rules
    "seed: -1": "seed=-1 is below 0; set 0 or more",
    "warmup: {rows_per_step: 7}": "warmup.rows_per_step=7 is not a multiple of warmup.micro_rows=8 x engine.",
    "warmup: {peak_lr: .nan}": "warmup.peak_lr=nan is no finite number; set one that is",
    "warmup: {weights: {document: 2}}": "warmup.weights.document=2.0, but the corpus has no source document; did you",
    "warmup: null": "warmup and continual are both null: nothing would be trained; choose a file",
    "engine: {zero_stage: 7}": "engine.zero_stage=7 does not exist; set 0, 1, 2 or 3",
    "launcher: {slurm: {time: 24:00:00}}": "launcher.slurm.time=86400 is no limit of a job; set hours:minutes:seconds",
}  # fmt: skip


@cache
def base() -> RunConfig:
    return compose_config(BASE)


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the caller looks at the message)
        compose_config([*BASE, *overrides])
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of `experiment=mine`."""
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    monkeypatch.setattr(compose, "CONF", conf)
    return conf / "experiment/mine.yaml"


def refusal_of_file(mine: Path, yaml: str, *overrides: str) -> str:
    mine.write_text(f"# @package _global_\n{yaml}\n")
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the caller looks at the message)
        compose_config(["data=jsonl", "data.path=corpus.jsonl", "experiment=mine", *overrides])
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_there_are_more_than_two_hundred() -> None:
    assert sum(map(len, (MISSPELT, TYPES, NUMBERS, GROUPS, PAIRS))) > 200
    assert len(set(MISSPELT)) == len(MISSPELT)


def test_a_key_in_the_wrong_section_is_named_where_it_is() -> None:
    every = list(keys_of(RunConfig))
    sections = ["", *(f"{key}." for key in every if "LABEL" not in key and is_dataclass(kind_of(key)))]
    names = sorted({key.rpartition(".")[2] for key in every})
    for misplaced in {f"{section}{name}" for section in sections for name in names} - set(every):
        said = unknown_key(misplaced)
        assert said is not None
        named = set(re.findall(r"[\w.]+", said.partition("did you mean ")[2]))
        assert {key.rpartition(".")[2] for key in named & set(every)} == {misplaced.rpartition(".")[2]}, said


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("precision", "did you mean engine.precision?"),
        ("optim.steps", "did you mean warmup.steps or continual.steps?"),
        ("path", "did you mean data.sources.LABEL.path or data.path or retrieval.embedder.path?"),
        ("data.kind", "did you mean data.sources.LABEL.kind?"),
        ("index.kind", "did you mean retrieval.index.kind?"),
        ("memory.source", "did you mean warmup.memory.source or continual.memory.source?"),
        ("warmpu.steps", "did you mean warmup.steps?"),
        ("path.root", "did you mean paths.root?"),
        ("data.source.documents.kind", "did you mean data.sources.documents.kind?"),
        ("warmup.weights_decay", "did you mean optim.weight_decay?"),
        ("model.d_model", "set model.width"),
        ("warmup.learning_rate", "set warmup.peak_lr"),
        ("trainer.max_steps", "set warmup.steps and continual.steps"),
        ("gpus", "set engine.num_ranks, or did you mean launcher.slurm.gpus?"),
    ],
)
def test_the_key_that_was_meant_is_named(key: str, said: str) -> None:
    refused = unknown_key(key)
    assert refused is not None
    assert refused.partition("; ")[2] == said


def test_a_misspelt_key_at_any_level_is_named_with_the_nearest() -> None:
    right = [key for key, *_ in keys(compose_config(BASE))]
    for key, override in zip(right, MISSPELT, strict=True):
        said = refusal(override)
        assert said == f"{override}: there is no key {override[:-2]}; did you mean {key}?", key


@pytest.mark.parametrize("override", TYPES_COMPOSED)
def test_a_wrong_type_is_named_with_the_right_one(override: str) -> None:
    key = override.partition("=")[0]
    said = refusal(override)
    assert said.startswith(f"{override}: {key} ")
    assert TYPES[key][1] in said


def test_a_wrong_type_in_a_frozen_configuration_is_named_with_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for key, (value, expected) in TYPES.items():
        *above, name = key.split(".")
        path.write_text("".join(f"{part}: {{" for part in above) + f"{name}: {value}" + "}" * len(above))
        with pytest.raises(ValueError, match=rf"^{path}: .*{re.escape(key)}\b.* {re.escape(expected)}"):
            load_config(path)


@pytest.mark.parametrize("value", ["2", "-1", "10"])
def test_a_number_is_neither_true_nor_false(value: str) -> None:
    override = f"supervise={value}"
    assert refusal(override) == f"{override}: supervise must be true or false"
    assert compose_config([*BASE, "supervise=1"]).supervise


def refusal_of_number(key: str, value: float) -> str:
    """What `check` says of a configuration, nothing where it takes the number."""
    config = base()
    _, holder, name, _ = next(each for each in keys(config) if each[0] == key)
    kept = getattr(holder, name)
    setattr(holder, name, value)
    try:
        check(config)
    except ValueError as refused:
        return str(refused)
    finally:
        setattr(holder, name, kept)
    return ""


def test_a_number_out_of_range_is_named_with_its_value_and_a_remedy() -> None:
    for number, (key, value) in enumerate(NUMBERS):
        said = refusal_of_number(key, value)
        before, wrong, remedy = said.partition(f"{key}={value}")
        if (key, value) == ("data.sources.documents.weight", 0):  # one source may well have it
            wrong, remedy = said, said
        assert wrong, (key, value, said)
        assert re.search(r"\b(set|shorten|give|leave)\b", remedy), (key, value, said)
        if number % 11 == 0:
            assert refusal(f"{key}={value}").startswith(f"{before}{wrong}"), (key, value)


def test_zero_is_taken_where_it_means_something() -> None:
    assert [key for key in sorted(ZERO_IS_RIGHT) if refusal_of_number(key, 0)] == []


@pytest.mark.parametrize("override", GROUPS)
def test_an_unknown_file_of_a_group_is_named_with_the_nearest(override: str) -> None:
    with pytest.raises(ValueError, match=re.escape(GROUPS[override])) as refused:
        compose_config([override])
    assert str(refused.value).startswith(f"{override} does not exist; ")


@pytest.mark.parametrize("overrides", PAIRS)
def test_a_contradictory_pair_is_named_with_both(overrides: str) -> None:
    assert PAIRS[overrides] in refusal(*overrides.split(" "))


class Asked(dict[str, Any]):
    """A configuration that remembers which keys were looked for."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.keys_asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def keys_of_deepspeed() -> set[str]:
    """What the installed DeepSpeed looks for in its JSON, and in the section of ZeRO."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    asked = Asked({"train_batch_size": 8})
    DeepSpeedConfig(asked)
    zero = DeepSpeedZeroConfig.model_fields
    return asked.keys_asked | zero.keys() | {each.alias for each in zero.values() if each.alias is not None}


def test_every_key_of_deepspeed_is_answered_with_ours() -> None:
    theirs = keys_of_deepspeed()
    assert {"train_batch_size", "flops_profiler", "overlap_comm", "stage3_max_live_parameters"} <= theirs
    same_name = {key.rpartition(".")[2] for key, *_ in keys(base())}
    for key in sorted(theirs | DEEPSPEED.keys()):
        for place in ("", "engine."):
            said = refusal(f"{place}{key}=1")
            if not place and (CONF / key).is_dir():
                assert said.startswith(f"{key}=1: write {key}=NAME, once"), said
            elif key in same_name:
                assert re.search(rf"did you mean [\w.]+\.{key}( or [\w.]+)?\?", said), said
            else:
                assert f"{key} is DeepSpeed's, whose JSON is derived; " in said, said


def test_answers_name_keys_that_there_are() -> None:
    ours = set(keys_of(RunConfig))
    for answer in {*DEEPSPEED.values(), *OTHERS.values()}:
        named = re.findall(r"[a-zA-Z]+(?:\.\w+)+", answer.replace("STAGE", "continual"))
        assert set(named) <= ours | {"metrics.jsonl"}
        assert answer.startswith(("set ", "leave it away: ", "choose data=NAME, "))


def test_keys_of_other_trainers_are_answered_with_ours() -> None:
    same_name = {key.rpartition(".")[2] for key in keys_of(RunConfig)}
    assert OTHERS.keys() & same_name == {"batch_size", "gpus"}
    assert not OTHERS.keys() & DEEPSPEED.keys()
    for key, answer in OTHERS.items():
        said = unknown_key(f"continual.{key}")
        assert said is not None
        assert f"; {answer.replace('STAGE', 'continual')}" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train_batch_size=8", "set warmup.rows_per_step and continual.rows_per_step"),
        ("+continual.train_batch_size=8", "set continual.rows_per_step"),
        ("engine.zero_optimization.stage=2", "stage is DeepSpeed's, whose JSON is derived; set engine.zero_stage"),
        ("zero_optimization.offload_optimizer.device=cpu", "offload_optimizer is DeepSpeed's, whose JSON is derived; "),
        ("optimizer.params.lr=1", "lr is DeepSpeed's, whose JSON is derived; set warmup.peak_lr and continual.peak_lr"),
        ("tensorboard.enabled=true", "there is no key tensorboard; did you mean logging.tensorboard?"),
        ("amp.enabled=true", "there is no key amp; amp is DeepSpeed's, whose JSON is derived; set engine.precision"),
    ],
)  # fmt: skip
def test_a_key_of_deepspeed_is_answered_where_it_stands(override: str, said: str) -> None:
    assert said in refusal(override)


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
def test_unknown_keys_in_a_file_are_named_with_the_file(yaml: str, said: str, mine: Path) -> None:
    assert refusal_of_file(mine, yaml).startswith(f"conf/experiment/mine.yaml: {said}")


@pytest.mark.parametrize("yaml", FILES)
def test_mistakes_in_a_file_are_named_with_file_key_and_remedy(yaml: str, mine: Path) -> None:
    assert refusal_of_file(mine, yaml).startswith(f"conf/experiment/mine.yaml: {FILES[yaml]}")


def test_a_value_of_the_wrong_shape_at_any_key_of_a_file_is_named(mine: Path) -> None:
    for number, (key, holder, name, kind) in enumerate(keys(base())):
        is_section = is_dataclass(getattr(holder, name)) or get_origin(kind) is dict
        if number % (4 if is_section else 16) == 0:
            *above, last = key.split(".")
            yaml = "".join(f"{part}: {{" for part in above) + f"{last}: "
            said = refusal_of_file(mine, yaml + ("7" if is_section else "{a: 1}") + "}" * len(above))
            assert re.match(rf"conf/experiment/mine.yaml: {re.escape(key)}\b.* must be ", said), said


def test_what_file_and_command_line_contradict_in_is_named_with_both(mine: Path) -> None:
    said = refusal_of_file(mine, "warmup: {rows_per_step: 12}", "warmup.micro_rows=5")
    assert said == (
        "warmup.rows_per_step=12 is not a multiple of warmup.micro_rows=5 x engine.num_ranks=2; set it to a multiple "
        "of 10 (warmup.rows_per_step is set in conf/experiment/mine.yaml)"
    )
    said = refusal_of_file(mine, "warmup: {rows_per_step: 12}", "warmup.rows_per_step=7", "model=nano")
    assert said.startswith("warmup.rows_per_step=7 is not a multiple of warmup.micro_rows=8 x")
    assert "mine" not in said
    (mine.parents[1] / "model/wide.yaml").write_text("num_heads: 3\n")
    assert refusal_of_file(mine, "seed: 1", "model=wide").startswith(
        "conf/model/wide.yaml: model.num_kv_heads=2: set a divisor of model.num_heads=3"
    )
