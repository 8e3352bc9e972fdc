"""Every rule of `launch.config.check`, one refusal each."""

import re
from pathlib import Path

import pytest

from launch.compose import compose_config
from train.config import MemorySource

DEMO = [
    "experiment=demo",
    *("warmup.steps=100", "warmup.rows_per_step=16", "warmup.micro_rows=8", "warmup.peak_lr=2.0e-3"),
    *("warmup.ramp_steps=10", "continual.steps=36", "continual.ramp_steps=4", "continual.decay_steps=9"),
]
ALONE = "warmup=null"

RULES = {
    # of one section each; the packages test their own rules, these show that they are asked
    "model.num_heads=0": "model.num_heads=0: set a positive number",
    "data.vocab_size=10": "data.vocab_size=10 is too small; set at least 260",
    "retrieval.window=0": "retrieval.window=0: set it to 1 or more",
    "engine.zero_stage=4": "engine.zero_stage=4 does not exist; set 0, 1, 2 or 3",
    "engine.num_ranks=0": "engine.num_ranks=0 is below 1; set 1 or more",
    "engine.threads_per_rank=0": "engine.threads_per_rank=0 is below 1; set 1 or more",
    "launcher=hosts": "launcher.hosts.file=null names no hosts; set it to a file of lines 'NAME slots=8'",
    "launcher.hosts.port=80": "launcher.hosts.port=80 is no port that users may open; set 1024 to 64535",
    "launcher.slurm.nodes=0": "launcher.slurm.nodes=0 is below 1; set 1 or more",
    "launcher.slurm.array_tasks=0": "launcher.slurm.array_tasks=0 is below 1; set 1 or more",
    "launcher.slurm.signal_seconds=-1": "launcher.slurm.signal_seconds=-1 is below 0; set 0 or more",
    "launcher.slurm.options=[x]": "launcher.slurm.options=['x']: 'x' is no option of sbatch; write for example --part",
    "launcher.slurm.time=soon": "launcher.slurm.time=soon is no limit of a job; set hours:minutes:seconds or days-",
    "launcher.slurm.time=90": "launcher.slurm.time=90 is no limit of a job",
    "launcher.hosts.shell=": "launcher.hosts.shell='' runs nothing on a host; set for example ssh",
    "launcher.slurm.options=[[x]]": "launcher.slurm.options=[['x']]: ['x'] is no single value; set one, in quotes",
    "logging.profile_steps=-1": "logging.profile_steps=-1 is below 0; set 0 or more",
    "logging.memory_snapshot=true": "logging.memory_snapshot=true records the steps that are traced, and logging.pro",
    "optim.beta1=1": "optim.beta1=1.0 is not within 0 and 1; set for example 0.95",
    "optim.beta2=-0.1": "optim.beta2=-0.1 is not within 0 and 1",
    "optim.eps=0": "optim.eps=0.0 is not above 0; set a positive number",
    "optim.clip_norm=-1": "optim.clip_norm=-1.0 is not above 0; set a positive number",
    "optim.clip_norm=nan": "optim.clip_norm=nan is no finite number; set one that is",
    "optim.weight_decay=-0.1": "optim.weight_decay=-0.1 is below 0; set 0 or more",
    "saving.every_steps=0": "saving.every_steps=0 is below 1; set 1 or more",
    "saving.keep_last=0": "saving.keep_last=0 is below 1; set 1 or more",
    "saving.keep_generations=0": "saving.keep_generations=0 is below 1; set 1 or more",
    "saving.keep_every=0": "saving.keep_every=0 is below 1; set 1 or more",
    "saving.keep_best=-1": "saving.keep_best=-1 is below 0; set 0 or more",
    "divergence.patience=0": "divergence.patience=0 is below 1; set 1 or more",
    "divergence.window_steps=1": "divergence.window_steps=1 is below 2; set 2 or more",
    "divergence.max_rollbacks=-1": "divergence.max_rollbacks=-1 is below 0; set 0 or more",
    "divergence.lr_factor=2": "divergence.lr_factor=2.0 is not within 0 and 1; set 1 to leave the learning rate",
    "logging.validate_every=0": "logging.validate_every=0 is below 1; set 1 or more",
    "logging.validation_rows=0": "logging.validation_rows=0 is below 1; set 1 or more",
    "evaluation.text_rows=0": "evaluation.text_rows=0 is below 1; set 1 or more",
    "evaluation.max_probes=0": "evaluation.max_probes=0 is below 1; set 1 or more",
    "evaluation.answer_tokens=0": "evaluation.answer_tokens=0 is below 1; set 1 or more",
    "evaluation.bootstrap_samples=0": "evaluation.bootstrap_samples=0 is below 1; set 1 or more",
    "evaluation.batch_rows=0": "evaluation.batch_rows=0 is below 1; set 1 or more",
    "seed=-1": "seed=-1 is below 0; set 0 or more",
    "data.split_seed=-1": "data.split_seed=-1 is below 0; set 0 or more",
    "evaluation.seed=-1": "evaluation.seed=-1 is below 0; set 0 or more",
    "paths.root=''": "paths.root='' is no folder; set for example paths.root=runs",
    "run=a/b": "run='a/b' is not a folder name; set run to letters, digits, '-' and '_'",
    "run=..": "run='..' is not a folder name",
    "run=''": "run='' is not a folder name",
    "run=prepared": "run=prepared is the folder of the prepared corpora; set run to another name",
    "run=a=b": "run='a=b' cannot be named in commands; set run to letters, digits, '-', '_' and '.', first",
    "run=a:b": "run='a:b' cannot be named in commands; set run to letters",
    "run=-x": "run='-x' cannot be named in commands; set run to letters",
    "seed=99999999999999999999": "seed=99999999999999999999 is beyond what numbers hold; set one from -92233",
    "model.rope_base=1e39": "model.rope_base=1e+39 is beyond what numbers hold; set one from -3.4e+38 to 3.4e+38",
    "supervision.backoff_seconds=1e10": "supervision.backoff_seconds=10000000000.0 is above 1000000000.0; set",
    "engine.threads_per_rank=5000": "engine.threads_per_rank=5000 is above 4096; set 4096 or less",
    "launcher.slurm.signal_seconds=70000": "launcher.slurm.signal_seconds=70000 is above 65535; set 65535 or less",
    "launcher=slurm launcher.slurm.time=0:06:00": (
        "launcher.slurm.time=0:06:00 leaves no time to train: SIGUSR1 comes launcher.slurm.signal_seconds=300 before "
        "its end, or up to 60 earlier; set a longer time"
    ),
    "launcher=slurm launcher.slurm.time=1:00": "launcher.slurm.time=1:00 leaves no time to train",
    "launcher=slurm launcher.slurm.time=0-0": "launcher.slurm.time=0-0 leaves no time to train",
    "retrieval.index.kind=ivf_pq retrieval.index.code_bytes=7": (
        "retrieval.index.code_bytes=7 does not divide the embedder's 384 numbers: set it to a divisor, or leave it out"
    ),
    "codec.separate=true": (
        "codec.separate=true, but codec.kind=model learns nothing from keys or values: set codec.separate=false"
    ),
    "bank.cache_mib=-1": "bank.cache_mib=-1 is below 0: set 0 to keep nothing",
    "bank.cold_gib=nan": "bank.cold_gib=nan is no finite number; set one that is",
    # of a stage
    "warmup.steps=0": "warmup.steps=0 is below 1; set 1 or more",
    "continual.rows_per_step=0": "continual.rows_per_step=0 is below 1; set 1 or more",
    "warmup.micro_rows=0": "warmup.micro_rows=0 is below 1; set 1 or more",
    "warmup.max_rows=0": "warmup.max_rows=0 is below 1; set 1 or more",
    "warmup.ramp_steps=-1": "warmup.ramp_steps=-1 is below 0; set 0 or more",
    "warmup.decay_steps=-1": "warmup.decay_steps=-1 is below 0; set 0 or more",
    "warmup.rows_per_step=24": (
        "warmup.rows_per_step=24 is not a multiple of warmup.micro_rows=8 x engine.num_ranks=2; "
        "set it to a multiple of 16"
    ),
    "continual.ramp_steps=30": (
        "continual.ramp_steps=30 + continual.decay_steps=9 exceed continual.steps=36; shorten them"
    ),
    "warmup.peak_lr=0": "warmup.peak_lr=0.0 is not above 0; set for example 1e-3",
    "warmup.peak_lr=inf": "warmup.peak_lr=inf is no finite number; set one that is",
    "warmup.final_lr=1": "warmup.final_lr=1.0 is not within 0 and warmup.peak_lr=0.002; set for example 0",
    "+warmup.weights.factbook=-1": "warmup.weights.factbook=-1.0 is below 0; set 0 to draw nothing from it",
    "+warmup.weights.factbok=1": (
        "warmup.weights.factbok=1.0, but the corpus has no source factbok; did you mean warmup.weights.factbook? "
        "sources: factbook, factbook-facts; leave it away with '~warmup.weights.factbok'"
    ),
    "data=jsonl data.path=x": "warmup.weights.factbook-facts=1.5, but the corpus has no source factbook-facts; ",
    "continual.epoch_steps=0": "continual.epoch_steps=0 is below 1; set null for one pass over the rows",
    "continual.epoch_steps='0-10:5,20-:10'": (
        "continual.epoch_steps=0-10:5,20-:10: '20-:10' leaves out the steps from 10; let it begin at 10"
    ),
    "continual.memory.online_share=2": (
        "continual.memory.online_share=2.0 is not within 0 and 1; set for example 0.25"
    ),
    # between sections
    "model.row_tokens=64 bank.context=document": (
        "bank.context=document reads documents in windows of model.row_tokens=64 tokens, which hold no reference of "
        "model.reference_tokens=128: set bank.context=reference, or model.row_tokens to 128 or more"
    ),
    "bank.context=document continual.memory.source=online": (
        "continual.memory.source=online encodes references by themselves inside the step, but bank.context=document; "
        "set bank.context=reference, or continual.memory.source=bank"
    ),
    "data.reference_tokens=64": (
        "data.reference_tokens=64 differs from model.reference_tokens=128; set both alike"
    ),
    "model.num_memory_layers=0": "continual.memory is set, but model.num_memory_layers=0; give the model memory layers",
    "warmup.branch_from=x": "warmup.branch_from is set, but only the continual stage branches; set it to null",
    "continual.branch_from=x": "continual.branch_from=x and warmup are both set; set warmup=null to",
    ALONE: (
        "warmup=null and continual.branch_from=null: the continual stage has nothing to start from; "
        "set continual.branch_from to the run that was warmed up"
    ),
}  # fmt: skip


@pytest.mark.parametrize("override", RULES)
def test_rule_refuses_with_key_value_and_remedy(override: str) -> None:
    with pytest.raises(ValueError, match=re.escape(RULES[override])) as refused:
        compose_config([*DEMO, *override.split(" ")])
    assert "\n" not in str(refused.value)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^warmup and continual are both null: .* such as experiment=quick$"
    ):
        compose_config([*DEMO, "warmup=null", "continual=null"])


def test_a_run_that_was_begun_goes_on_whatever_its_name(tmp_path: Path) -> None:
    settings = [*DEMO, f"paths.root={tmp_path}", "run=rate=1e-3, wide"]
    with pytest.raises(ValueError, match="cannot be named in commands"):
        compose_config(settings)
    (tmp_path / "rate=1e-3, wide").mkdir()
    (tmp_path / "rate=1e-3, wide/config.yaml").touch()
    assert compose_config(settings).run == "rate=1e-3, wide"


def test_a_run_reads_memory_as_its_last_stage_did() -> None:
    memory = compose_config(["experiment=paper_0b92_memory", "continual=null"]).memory
    assert memory is not None
    assert memory.source is MemorySource.online
    assert compose_config(["experiment=paper_0b92_memory", "continual.memory=null"]).memory is None
    assert compose_config(["experiment=paper_0b92", "continual=null"]).memory is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["warmup=null", "continual.branch_from=x"],
        ["continual=null"],
        ["continual.memory=null"],
        ["continual.memory=null", "model.num_memory_layers=0"],
        ["continual.epoch_steps=null"],
        ["continual.epoch_steps='0-10:5,10-:13'"],
        ["warmup.rows_per_step=48"],
        ["evaluation.max_probes=null"],
        ["data.reference_tokens=64", "model.reference_tokens=64"],
        ["bank.context=document"],
        ["run=demo-warmup.peak_lr-1e-3"],
        ["run=Übung_2"],
        ["launcher.slurm.time=0:05:00"],  # no job
        ["seed=9223372036854775807"],
        ["retrieval.index.kind=ivf_pq", "retrieval.index.code_bytes=96"],
        [
            "retrieval.embedder.kind=folder",
            "retrieval.embedder.path=elsewhere",
            "retrieval.index.code_bytes=7",
        ],
        *(
            ["launcher=slurm", f"launcher.slurm.time={limit}"]
            for limit in ("24:00:00", "0:06:01", "30:00", "6:01", "2-12", "7-00:00:00", "UNLIMITED")
        ),
    ],
)
def test_what_is_allowed(overrides: list[str]) -> None:
    compose_config([*DEMO, *overrides])


def test_a_quantiser_that_cannot_cut_the_heads_is_refused() -> None:
    with pytest.raises(
        ValueError, match=re.escape("codec.kind=pq16x8 cuts vectors into 16 parts, and model.head_")
    ):
        compose_config([*DEMO, "codec.kind=pq16x8", "model.head_size=72"])
    assert compose_config([*DEMO, "codec.kind=residual2x14_pq8x10", "codec.separate=true"]).codec.separate


def test_references_longer_than_a_byte_counts_are_refused() -> None:
    long = ["model.reference_tokens=256", "data.reference_tokens=256"]
    with pytest.raises(ValueError, match=re.escape("model.reference_tokens=256: records keep positions")):
        compose_config([*DEMO, *long])
