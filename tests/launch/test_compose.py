"""Every shipped configuration, and every way of mistyping one."""

import re
from pathlib import Path

import pytest
import torch

from launch import compose
from launch.compose import CONF, compose_config, differences, laid_over, load_config, save_config, to_yaml
from launch.config import check
from memorybank.config import CodecKind
from model.flops import count_parameters
from model.transformer import Memory3LM

DATA = {
    "jsonl": ["data.path=corpus.jsonl"],
    "hosts": ["launcher.hosts.file=hosts"],
    "continual": ["continual.branch_from=demo"],
    "control": ["continual.branch_from=demo"],
}


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")


def shipped() -> list[list[str]]:
    """One list of overrides per YAML file of conf/, and the pairs that belong together."""
    choices = [[]]
    for path in sorted(CONF.glob("*/*.yaml")):
        if path.parent.name == "sweep":  # not of one run: tests/launch/test_sweep.py
            continue
        experiment = ["experiment=quick"] if path.parent.name == "stage" else []
        choices.append([f"{path.parent.name}={path.stem}", *experiment, *DATA.get(path.stem, [])])
    choices += [
        [f"experiment={path.stem}", "debug=smoke"] for path in sorted((CONF / "experiment").glob("*.yaml"))
    ]
    return choices


@pytest.mark.parametrize("overrides", shipped(), ids=lambda overrides: " ".join(overrides) or "defaults")
def test_shipped_configuration_composes_round_trips_and_builds(overrides: list[str], tmp_path: Path) -> None:
    config = compose_config(overrides)
    check(config)
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert to_yaml(again) == to_yaml(config)
    with torch.device("meta"):
        model = Memory3LM(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


@pytest.mark.parametrize(("name", "billions"), [("paper_2b4", 2.433), ("paper_0b92", 0.9227)])
def test_models_of_the_paper_have_its_parameters(name: str, billions: float) -> None:
    config = compose_config([f"model={name}"]).model
    with torch.device("meta"):
        model = Memory3LM(config)
    count = count_parameters(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert round((count.non_embedding - norms) / 1e9, 4) == billions  # the paper counts matrices


def test_overlays_apply_in_order() -> None:
    assert compose_config(["experiment=demo"]).model.num_layers == 8
    smoke = compose_config(["experiment=demo", "debug=smoke", "warmup.steps=9"])
    assert smoke.model.num_layers == 2
    assert smoke.experiment == "demo"
    assert smoke.warmup is not None
    assert (smoke.warmup.steps, smoke.warmup.ramp_steps) == (9, 1)
    assert smoke.continual is not None
    assert smoke.continual.memory is not None


def test_what_is_chosen_beats_the_experiment_and_is_beaten_by_debug_and_single_keys() -> None:
    choices = ["experiment=paper_2b4", "engine=zero3", "bank=paper", "logging=wandb", "paths=scratch"]
    config = compose_config(choices)
    assert (config.engine.zero_stage, config.engine.num_ranks) == (3, 64)
    assert config.codec.kind is CodecKind.residual2x14_pq8x10
    assert config.retrieval.allow_own_document
    assert config.logging.wandb
    assert config.paths.root == "/scratch/memory3"
    single = compose_config([*choices, "engine.zero_stage=2", "debug=smoke"]).engine
    assert (single.zero_stage, single.num_ranks) == (2, 2)


def test_a_stage_is_trained_alone_whatever_other_files_set() -> None:
    assert compose_config(["stage=warmup", "experiment=demo", "debug=smoke"]).continual is None
    for stage, reads in (("continual", True), ("control", False)):
        config = compose_config(
            [f"stage={stage}", "continual.branch_from=m", "experiment=demo", "debug=smoke"]
        )
        assert config.warmup is None
        assert config.continual is not None
        assert (config.continual.memory is not None) is reads
        assert config.continual.steps == 4


def test_files_of_groups_change_something_or_state_the_default() -> None:
    """What stands in a file and in the schema alike would be a second home for a default."""
    plain = compose_config(["experiment=quick"])
    for group in ("engine", "bank", "logging", "paths", "stage"):
        for path in sorted((CONF / group).glob("*.yaml")):
            config = compose_config(["experiment=quick", f"{group}={path.stem}", *DATA.get(path.stem, [])])
            assert differences(plain, config) or path.stem in ("zero1", "exact"), path
    assert compose_config(["optim=paper"]).optim == plain.optim


@pytest.mark.parametrize(
    "path",
    [
        "wörk.jsonl",
        "/x/a (1).jsonl",
        "/x/my texts/a.jsonl",
        "C:\\texts\\a.jsonl",
        "$HOME/a.jsonl",
        "/x/{y}",
    ],
)
def test_a_path_needs_no_quotes_but_the_shells(path: str) -> None:
    assert compose_config(["data=jsonl", f"data.path={path}"]).data.path == path
    assert compose_config(["data=jsonl", f'data.path="{path}"']).data.path == path


REFUSED = {
    # keys: at every level, nearest named
    "warmup.stepz=3": "warmup.stepz=3: there is no key warmup.stepz; did you mean warmup.steps?",
    "modell=nano": "modell=nano: there is no key modell; did you mean model?",
    "retrieval.embedder.knd=static": (
        "retrieval.embedder.knd=static: there is no key retrieval.embedder.knd; did you mean retrieval.embedder.kind?"
    ),
    "data.sources.factbook.weigth=2": (
        "data.sources.factbook.weigth=2: there is no key data.sources.factbook.weigth; "
        "did you mean data.sources.factbook.weight?"
    ),
    "steps=4": "steps=4: there is no key steps; did you mean warmup.steps or continual.steps?",
    "+new.key=1": "+new.key=1: there is no key new; `memory3 pretrain --cfg` prints every key",
    "++warmup.stepz=3": "++warmup.stepz=3: there is no key warmup.stepz; did you mean warmup.steps?",
    "warmup={step: 4}": "warmup={step: 4}: there is no key warmup.step; did you mean warmup.steps?",
    "run.name=x": "run.name=x: run has no keys of its own; run must be a text, for example run",
    "lr=3": (
        "lr=3: there is no key lr; lr is DeepSpeed's, whose JSON is derived; set warmup.peak_lr and continual.peak_lr"
    ),
    "learn=3": "learn=3: there is no key learn; `memory3 pretrain --cfg` prints every key",
    "optim.zzz=1": "optim.zzz=1: there is no key optim.zzz; optim has beta1, beta2, eps, weight_decay, clip_norm",
    "warmup.weights.factbook=1": (
        "warmup.weights.factbook=1: there is no warmup.weights.factbook yet; add it with '+warmup.weights.factbook=1'"
    ),
    "warmup.weights.factbok-facts=1": (
        "warmup.weights.factbok-facts=1: there is no warmup.weights.factbok-facts; did you mean "
        "'+warmup.weights.factbook-facts=1'?"
    ),
    "warmup.weights.a=1": "warmup.weights.a=1: there is no warmup.weights.a; labels: factbook, factbook-facts",
    "data.sources.factbok.weight=2": (
        "data.sources.factbok.weight=2: there is no data.sources.factbok; did you mean "
        "'data.sources.factbook.weight=2'?"
    ),
    "+data.sources.x.kind=text": (
        "+data.sources.x.kind=text: data.sources.x must be a section; add it with '+data.sources={x: {kind: ...}}'"
    ),
    # no YAML can name code
    "+_target_=os.system": "+_target_=os.system: there is no key _target_; `memory3 pretrain --cfg` prints every key",
    "optim._target_=os.system": (
        "optim._target_=os.system: there is no key optim._target_; optim has beta1, beta2, eps, weight_decay, clip_norm"
    ),
    # choices
    "model=nanoo": (
        "model=nanoo does not exist; did you mean model=nano? choices: base, micro, nano, paper_0b92, paper_2b4, small"
    ),
    "debug=zzz": "debug=zzz does not exist; choices: overfit, profile, smoke",
    "engine=3": (
        "engine=3: write engine=NAME, once, or single keys engine.KEY=VALUE, or leave it away; "
        "choices: zero0, zero1, zero2, zero3"
    ),
    "engine=zero4": "engine=zero4 does not exist; did you mean engine=zero3? choices: zero0, zero1, zero2, zero3",
    "paths=/data/runs": (
        "paths=/data/runs does not exist; did you mean paths.root=/data/runs? choices: scratch, temporary"
    ),
    "paths.root=${oc.env:NO_DISK}": (
        "paths.root=${oc.env:NO_DISK}: the environment has no NO_DISK; set it, or paths.root=VALUE"
    ),
    "model=null": (
        "model=null: write model=NAME, once, or single keys "
        "model.KEY=VALUE, or leave it away; choices: base, micro, nano, paper_0b92, paper_2b4, small"
    ),
    "+data=jsonl": (
        "+data=jsonl: write data=NAME, once, or single keys "
        "data.KEY=VALUE, or leave it away; choices: factbook, jsonl"
    ),
    "+debug=smoke": "+debug=smoke: write debug=NAME, once, or leave it away; choices: overfit, profile, smoke",
    "~launcher": (
        "~launcher: write launcher=NAME, once, or single keys "
        "launcher.KEY=VALUE, or leave it away; choices: hosts, local, slurm"
    ),
    "data@model=jsonl": (
        "data@model=jsonl: write data=NAME, once, or single keys "
        "data.KEY=VALUE, or leave it away; choices: factbook, jsonl"
    ),
    "continual={}": "continual={}: an empty section changes nothing; set its keys",
    # types
    "warmup.steps=abc": "warmup.steps=abc: warmup.steps must be a whole number, for example 100",
    "warmup.steps=1.5": "warmup.steps=1.5: warmup.steps must be a whole number, for example 100",
    "warmup.peak_lr=high": "warmup.peak_lr=high: warmup.peak_lr must be a number, for example 0.0008",
    "logging.progress=maybe": "logging.progress=maybe: logging.progress must be true or false",
    "engine.precision=fp16": "engine.precision=fp16: engine.precision must be one of bf16, fp32",
    "data.relations=[null]": "data.relations=[null]: data.relations must be a list of texts, [a, b]",
    "model.prefix_ids=[a]": "model.prefix_ids=[a]: model.prefix_ids must be a list of whole numbers, [1, 2]",
    "evaluation.max_probes=x": "evaluation.max_probes=x: evaluation.max_probes must be a whole number, or null",
    "seed=null": "seed=null: seed must be a whole number, for example 0",
    "warmup=3": "warmup=3: warmup must be a section; set its keys, warmup.steps=...",
    "warmup.steps=${oc.env:PATH}": (
        "warmup.steps=${oc.env:PATH}: warmup.steps must be a whole number, for example 100"
    ),
    "run=???": "run=???: a value is missing; set run=VALUE",
    # + in front of what is there
    "+warmup.steps=5": "+warmup.steps=5: warmup.steps exists; drop the +: 'warmup.steps=5'",
    "+run=x": "+run=x: run exists; drop the +: 'run=x'",
    "+warmup=null": "+warmup=null: warmup exists; drop the +: 'warmup=null'",
    # Hydra's own
    "hydra.run.dir=x": (
        "hydra.run.dir=x: Hydra's own settings are not taken; a file of yours, "
        f"{CONF}/GROUP/NAME.yaml, is chosen with GROUP=NAME"
    ),
    # grammar
    "warmup.steps": "warmup.steps: settings are written KEY=VALUE; quote values that hold spaces or brackets",
    "warmup.epoch_steps=0-5:1,5-:2": (
        "warmup.epoch_steps=0-5:1,5-:2: this is several values; `memory3 pretrain -m` trains with each, `memory3 "
        "sweep` draws among them; one value that has commas is quoted, \"warmup.epoch_steps='0-5:1,5-:2'\""
    ),
    "seed=range(0,2)": (
        "seed=range(0,2): this is several values; `memory3 pretrain -m` trains with each, `memory3 sweep` draws among "
        "them; one value that has commas is quoted, \"seed='range(0,2)'\""
    ),
    "warmup.peak_lr=interval(1,2)": (
        "warmup.peak_lr=interval(1,2): this is no single value; `memory3 sweep` draws from an interval"
    ),
    "warmup.steps=[1": "warmup.steps=[1: settings are written KEY=VALUE; quote values that hold spaces or brackets",
    "~warmup.steps": "~warmup.steps: keys cannot be deleted; set warmup.steps=null where a key may be null",
    # inside a section that is null
    "continual.memory.query=own": (
        "continual.memory.query=own: continual or continual.memory is null here, which single keys cannot change; "
        "choose a file of conf/ that sets it, such as experiment=quick"
    ),
}  # fmt: skip


def test_of_two_stages_the_one_that_is_null_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^continual.steps=1: continual is null in conf/stage/warmup.yaml, which"
    ):
        compose_config(["experiment=quick", "warmup.steps=1", "continual.steps=1", "stage=warmup"])


def test_a_second_experiment_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^\+experiment=paper_2b4: write experiment=NAME, once, or leave it away; "
    ):
        compose_config(["experiment=demo", "+experiment=paper_2b4"])


@pytest.mark.parametrize(
    "group", ["engine=zero1 engine=zero2", "stage=warmup stage=continual", "debug=smoke debug=smoke"]
)
def test_a_second_file_of_a_group_is_refused(group: str) -> None:
    second = group.split()[1]
    with pytest.raises(ValueError, match=f"^{second}: write {second.partition('=')[0]}=NAME, once"):
        compose_config(["experiment=quick", *group.split()])


def test_what_is_given_replaces_what_lies_beneath() -> None:
    overrides = laid_over(["experiment=demo", "seed=1", "run=x"], ["experiment=quick", "seed=2"])
    assert overrides == ["run=x", "experiment=quick", "seed=2"]


def test_a_path_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    settings = ["paths.root=~/runs", "data=jsonl", "data.sources.documents.path=~/a.jsonl", "data.path=x~/~"]
    config = compose_config(settings)
    assert config.paths.root == "/users/me/runs"
    assert (config.data.sources["documents"].path, config.data.path) == ("/users/me/a.jsonl", "x~/~")


def test_a_label_that_a_file_sets_is_named_as_it_stands() -> None:
    with pytest.raises(ValueError, match=r"; did you mean 'continual\.weights\.factbook-facts=2'\?$"):
        compose_config(["experiment=demo", "continual.weights.factbok-facts=2"])


@pytest.mark.parametrize("override", REFUSED)
def test_refusal_names_key_value_and_remedy_in_one_line(override: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the whole message is compared)
        compose_config([override])
    assert str(refused.value) == REFUSED[override]


def test_documents_in_place_of_a_setting_are_answered_with_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "model").mkdir()
    for path in ("corpus.jsonl", "elsewhere/corpus.jsonl.gz", "texts"):
        with pytest.raises(ValueError, match=rf"^{path}: .* write data=jsonl data\.path={path} \("):
            compose_config(["experiment=quick", path])
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (what must not be said)
        compose_config(["model"])
    assert "data.path" not in str(refused.value)


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("warmup: {stepz: 3}", "conf/experiment/mine.yaml: there is no key warmup.stepz; did you mean warmup.steps?"),
        ("warmupp: {steps: 3}", "conf/experiment/mine.yaml: there is no key warmupp; did you mean warmup?"),
        ("warmup: {steps: many}", "mine.yaml: warmup.steps=many must be a whole number, for example 100"),
        ("optim: {_target_: os.system}", "conf/experiment/mine.yaml: there is no key optim._target_; optim has beta1"),
        ("warmup: [1", "line 3, column 1; the file must be plain YAML, without tags"),
        ("run: !!python/object/apply:os.mkdir [HERE/made]", "the file must be plain YAML, without tags"),
    ],
)  # fmt: skip
def test_mistake_in_an_overlay_is_named_with_its_file(
    yaml: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "conf"
    for path in CONF.rglob("*.yaml"):
        copy = conf / path.relative_to(CONF)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (conf / "experiment/mine.yaml").write_text(
        f"# @package _global_\n{yaml}\n".replace("HERE", str(tmp_path))
    )
    monkeypatch.setattr(compose, "CONF", conf)
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        compose_config(["experiment=mine"])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("steps: 4\n", "stepz: 4\n"), "there is no key warmup.stepz; did you mean warmup.steps?"),
        (("zero_stage: 1", "zero_stage: one"), "engine.zero_stage=one must be a whole number, for example 1"),
        (
            ("run: demo", "run: !!python/object/apply:os.mkdir [HERE/made]"),
            "must be plain YAML, without tags",
        ),
        (("run: demo", "_target_: os.system\nrun: demo"), "there is no key _target_"),
        (
            ("weights:\n    factbook-facts: 1.5", "weights: 3"),
            "warmup.weights must be a section, {LABEL: ...}",
        ),
        (
            ("model:\n", "model: nano\nx:\n"),
            "model=nano must be a section; set its keys, model.vocab_size=...",
        ),
    ],
)
def test_frozen_configuration_that_was_edited_is_refused(
    change: tuple[str, str], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    text = to_yaml(compose_config(["experiment=demo", "debug=smoke"]))
    assert change[0] in text
    path.write_text(text.replace(change[0], change[1].replace("HERE", str(tmp_path)), 1))
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        load_config(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert not (tmp_path / "made").exists()


def test_a_folder_without_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder; list runs with"):
        load_config(tmp_path / "config.yaml")


def test_entries_of_a_mapping_can_be_added_and_deleted() -> None:
    added = compose_config(["experiment=quick", "+warmup.weights.factbook=2"]).warmup
    assert added is not None
    assert added.weights == {"factbook": 2.0}
    deleted = compose_config(
        ["experiment=quick", "+warmup.weights.factbook=2", "~warmup.weights.factbook"]
    ).warmup
    assert deleted is not None
    assert deleted.weights == {}


def test_differences_name_every_changed_key() -> None:
    quick = ["experiment=quick", "warmup.peak_lr=2.0e-3", "continual.memory.query=previous"]
    old = compose_config(quick)
    new = compose_config([*quick, "seed=3", "continual.memory=null", "warmup.peak_lr=0.1"])
    assert differences(old, old) == []
    changed = {key: (before, after) for key, before, after in differences(old, new)}
    assert changed["seed"] == (0, 3)
    assert changed["warmup.peak_lr"] == (2.0e-3, 0.1)
    assert changed["continual.memory.query"] == ("previous", None)
