"""The one configuration schema, and the rules that hold across its fields.

`conf/*.yaml` is composed against `RunConfig`, checked, and frozen into the run folder, where every rank reads it.
Field documentation stands under each field, here and in the packages that own the parts.
Not here: composing (`launch.compose`). This module imports no torch.
"""

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from data.config import DataConfig, labels_of
from data.config import check as check_data
from memorybank.config import (
    BankConfig,
    BankContext,
    CodecConfig,
    RetrievalConfig,
    check_bank,
    check_codec,
    check_retrieval,
)
from memorybank.record import MemoryShape
from model.config import ModelConfig
from train.config import (
    STAGES,
    DivergenceConfig,
    EngineConfig,
    EvaluationConfig,
    LoggingConfig,
    MemoryConfig,
    MemorySource,
    OptimConfig,
    SavingConfig,
    StageConfig,
    WatchdogConfig,
)
from train.schedule import epoch_ranges

_SLURM_TIME = re.compile(r"(\d+-)?\d+:[0-5]?\d(:[0-5]?\d)?|\d+-\d+|UNLIMITED")
"""What sbatch takes, without bare minutes: a YAML file without quotes makes 1:30:00 to 5400, which would be those."""
_SLURM_EARLY_SECONDS = 60
"""SLURM may send a signal so much earlier than it was asked to."""
_RUN_NAME = re.compile(r"\w[\w.-]*")
_LARGEST = {int: 2**63 - 1, float: 3.4e38}
"""What int64 and float32 hold."""


class Resume(Enum):
    """What to do with a run folder that was used before."""

    auto = "auto"
    never = "never"


class LauncherKind(Enum):
    """Who starts the processes above the ranks."""

    local = "local"
    hosts = "hosts"
    slurm = "slurm"


@dataclass(kw_only=True, slots=True)
class HostsConfig:
    """Several machines without a scheduler; all see paths.root and the working directory under the same paths."""

    file: str | None = None
    """A host a line, `NAME slots=8`; the ranks are shared out evenly."""
    shell: str = "ssh"
    """Command that runs a line on a host: it is given the host and the line."""
    port: int = 29400
    """Port of the first host where the machines meet; of a job's nodes, this and the job's number modulo 1000."""


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """What a job asks for."""

    submit: bool = True
    """Hand the run to `sbatch`; false starts it with `srun` in the allocation that the command is given in."""
    nodes: int = 1
    """Machines of a job; the ranks are shared out evenly."""
    gpus: bool = True
    """Ask for a GPU for each rank."""
    time: str = "24:00:00"
    """Limit of a job, hours:minutes:seconds or days-hours, a minute above `signal_seconds` at least; a run that needs
    longer goes on in the next one."""
    signal_seconds: int = 300
    """So long before the limit SIGUSR1 comes: a checkpoint is published, and the job queued again."""
    options: list[str] = field(default_factory=list)
    """More options of sbatch, `["--partition=gpu", "--account=lab"]`."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the run, such as `module load cuda`."""
    array_tasks: int = 4
    """Trials of a sweep that are queued or train at the same time, as tasks of arrays."""


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """How ranks are started; torchrun and deepspeed start `memory3 pretrain` by themselves."""

    kind: LauncherKind = LauncherKind.local
    """`local`: on this machine; `hosts`: on those of a host file; `slurm`: as a job."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    """For `hosts`."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """For `slurm`."""


@dataclass(kw_only=True, slots=True)
class PathsConfig:
    """Where artefacts lie; always outside the packages."""

    root: str = "runs"
    """Folder of everything that is made: `<root>/prepared/<data.name>` and `<root>/<run>`."""


@dataclass(kw_only=True, slots=True)
class SupervisionConfig:
    """How a run is started again that crashed, with `supervise=true`."""

    max_restarts: int = 5
    """Restarts in a row without a newer checkpoint; then the run ends with an error."""
    backoff_seconds: float = 10.0
    """Pause before the first of them; each that follows waits twice as long."""
    max_backoff_seconds: float = 600.0
    """The longest pause."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything that a run depends on."""

    run: str = "run"
    """Name of the run: its folder below paths.root, of letters, digits, `-`, `_` and `.`."""
    seed: int = 0
    """Decides initialisation, the order of rows and all draws."""
    resume: Resume = Resume.auto
    """`auto` goes on where the run folder's newest checkpoint stands; `never` refuses a used folder."""
    supervise: bool = False
    """Start the ranks again when they crash, from the newest whole checkpoint, unless the crash will repeat."""
    experiment: str | None = None
    """Name of the experiment overlay that was chosen, for the record."""
    paths: PathsConfig = field(default_factory=PathsConfig)
    """Where artefacts lie."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the network."""
    data: DataConfig
    """Corpus, tokenizer and references."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Embedder, candidates and filters."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """How memories become bytes."""
    bank: BankConfig = field(default_factory=BankConfig)
    """How memories are made."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed and ranks."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    """How ranks are started."""
    warmup: StageConfig | None = field(default_factory=StageConfig)
    """The parametric stage; null skips it."""
    continual: StageConfig | None = None
    """The stage with memory; null skips it."""
    saving: SavingConfig = field(default_factory=SavingConfig)
    """Checkpoints."""
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    """What is done when training goes wrong."""
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    """What `supervise=true` does."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """When a rank counts as hanging."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Progress, wandb and validation inside the loop."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The final table."""

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages that there are, in the order of time."""
        found = {name: getattr(self, name) for name in STAGES}
        return {name: stage for name, stage in found.items() if stage is not None}

    @property
    def memory(self) -> MemoryConfig | None:
        """How the trained run reads memory: as its last stage did."""
        last = self.continual or self.warmup
        return None if last is None else last.memory


def check(config: RunConfig) -> None:
    """Apply every rule that one field alone cannot state.

    Raises:
        ValueError: Naming the key, its value, and what to set instead.
    """
    _check_values(config)
    config.model.check()
    check_data(config.data)
    check_retrieval(config.retrieval)
    check_codec(config.codec, MemoryShape.of(config.model).head_size)
    check_bank(config.bank, config.model)
    _check_engine(config.engine)
    _check_launcher(config.launcher, config.engine)
    _check_optim(config.optim)
    _at_least(1, "saving", config.saving, "every_steps", "keep_last", "keep_every", "keep_generations")
    _at_least(0, "saving", config.saving, "keep_best")
    _check_divergence(config.divergence)
    _at_least(0, "supervision", config.supervision, "max_restarts", "backoff_seconds", "max_backoff_seconds")
    _at_most(1e9, "supervision", config.supervision, "backoff_seconds", "max_backoff_seconds")
    _at_least(1, "watchdog", config.watchdog, "batch_seconds", "phase_seconds")
    _at_least(1, "logging", config.logging, "validate_every", "validation_rows", "line_every")
    _at_least(0, "logging", config.logging, "profile_steps")
    if config.logging.memory_snapshot and not config.logging.profile_steps:
        raise ValueError(
            "logging.memory_snapshot=true records the steps that are traced, and logging.profile_steps=0; set "
            "logging.profile_steps=3, or debug=profile"
        )
    if config.logging.peak_tflops is not None and not config.logging.peak_tflops > 0:
        raise ValueError(
            f"logging.peak_tflops={config.logging.peak_tflops} is not above 0; set that of one device, or null"
        )
    sizes = ("text_rows", "max_probes", "answer_tokens", "bootstrap_samples", "batch_rows")
    _at_least(1, "evaluation", config.evaluation, *sizes)
    _check_run(config)
    if config.warmup is None and config.continual is None:
        raise ValueError(
            "warmup and continual are both null: nothing would be trained; choose a file that sets one, such as "
            "experiment=quick"
        )
    if config.data.reference_tokens != config.model.reference_tokens:
        raise ValueError(
            f"data.reference_tokens={config.data.reference_tokens} differs from "
            f"model.reference_tokens={config.model.reference_tokens}; set both alike"
        )
    for name, stage in config.stages.items():
        _check_stage(name, stage, config)
    if config.warmup is not None and config.warmup.branch_from is not None:
        raise ValueError("warmup.branch_from is set, but only the continual stage branches; set it to null")
    if config.warmup is None and config.continual is not None and config.continual.branch_from is None:
        raise ValueError(
            "warmup=null and continual.branch_from=null: the continual stage has nothing to start from; "
            "set continual.branch_from to the run that was warmed up"
        )
    if (
        config.warmup is not None
        and config.continual is not None
        and config.continual.branch_from is not None
    ):
        raise ValueError(
            f"continual.branch_from={config.continual.branch_from} and warmup are both set; set warmup=null to "
            "branch from that run, or continual.branch_from=null to go on from this run's own warmup"
        )


def _check_run(config: RunConfig) -> None:
    run, folder = config.run, Path(config.paths.root) / config.run
    if not run or "/" in run or run.startswith("."):
        raise ValueError(f"run={run!r} is not a folder name; set run to letters, digits, '-' and '_'")
    if run == "prepared":
        raise ValueError("run=prepared is the folder of the prepared corpora; set run to another name")
    is_begun = (folder / "config.yaml").exists()  # its generations are bound to its name
    if not _RUN_NAME.fullmatch(run) and not is_begun:
        raise ValueError(
            f"run={run!r} cannot be named in commands; set run to letters, digits, '-', '_' and '.', first a letter or "
            "digit"
        )


def _check_values(config: RunConfig) -> None:
    for key, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} is no finite number; set one that is")
        largest = _LARGEST.get(type(value))
        if largest is not None and abs(value) > largest:
            raise ValueError(
                f"{key}={value} is beyond what numbers hold; set one from {-largest} to {largest}"
            )
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict | list):  # OmegaConf does not look into these
                raise ValueError(
                    f"{key}={value}: {each} is no single value; set one, in quotes where it has brackets"
                )
    for key, seed in (
        ("seed", config.seed),
        ("data.split_seed", config.data.split_seed),
        ("evaluation.seed", config.evaluation.seed),
    ):
        if seed < 0:
            raise ValueError(f"{key}={seed} is below 0; set 0 or more")
    if not config.paths.root:
        raise ValueError("paths.root='' is no folder; set for example paths.root=runs")


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a configuration that are no sections, with their keys."""
    of_labels = isinstance(section, dict)
    named = (
        section.items()
        if of_labels
        else [(each.name, getattr(section, each.name)) for each in fields(section)]
    )
    for name, value in named:
        if is_dataclass(value) or (isinstance(value, dict) and not of_labels):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_engine(engine: EngineConfig) -> None:
    if engine.zero_stage not in range(4):
        raise ValueError(f"engine.zero_stage={engine.zero_stage} does not exist; set 0, 1, 2 or 3")
    _at_least(1, "engine", engine, "num_ranks", "threads_per_rank")
    _at_most(4096, "engine", engine, "threads_per_rank")


def _check_launcher(launcher: LauncherConfig, engine: EngineConfig) -> None:
    if launcher.kind is LauncherKind.hosts and launcher.hosts.file is None:
        raise ValueError("launcher.hosts.file=null names no hosts; set it to a file of lines 'NAME slots=8'")
    if not 1024 <= launcher.hosts.port < 64536:
        raise ValueError(
            f"launcher.hosts.port={launcher.hosts.port} is no port that users may open; set 1024 to 64535"
        )
    if not launcher.hosts.shell.strip():
        raise ValueError("launcher.hosts.shell='' runs nothing on a host; set for example ssh")
    if not _SLURM_TIME.fullmatch(launcher.slurm.time):
        raise ValueError(
            f"launcher.slurm.time={launcher.slurm.time} is no limit of a job; set hours:minutes:seconds or "
            "days-hours:minutes:seconds, in quotes where it stands in a file, for example '24:00:00'"
        )
    _at_least(1, "launcher.slurm", launcher.slurm, "nodes", "array_tasks")
    _at_least(0, "launcher.slurm", launcher.slurm, "signal_seconds")
    _at_most(65535, "launcher.slurm", launcher.slurm, "signal_seconds")
    early = launcher.slurm.signal_seconds + _SLURM_EARLY_SECONDS
    if launcher.kind is LauncherKind.slurm and _seconds(launcher.slurm.time) <= early:
        raise ValueError(
            f"launcher.slurm.time={launcher.slurm.time} leaves no time to train: SIGUSR1 comes "
            f"launcher.slurm.signal_seconds={launcher.slurm.signal_seconds} before its end, or up to "
            f"{_SLURM_EARLY_SECONDS} earlier; set a longer time (hours:minutes:seconds), or fewer signal_seconds"
        )
    if launcher.kind is LauncherKind.slurm and engine.num_ranks % launcher.slurm.nodes:
        raise ValueError(
            f"engine.num_ranks={engine.num_ranks} cannot be shared by launcher.slurm.nodes={launcher.slurm.nodes}; "
            f"set a multiple of {launcher.slurm.nodes}"
        )
    for option in launcher.slurm.options:
        if not option.startswith("-"):
            raise ValueError(
                f"launcher.slurm.options={launcher.slurm.options}: {option!r} is no option of sbatch; write for "
                "example --partition=gpu"
            )


def _seconds(limit: str) -> float:
    """Of a job's limit: [hours:]minutes:seconds, or hours[:minutes[:seconds]] behind days."""
    if limit == "UNLIMITED":
        return math.inf
    days, is_behind_days, time = limit.rpartition("-")
    parts, units = [int(part) for part in time.split(":")], [3600, 60, 1]
    if not is_behind_days:
        units = units[-len(parts) :]
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def _check_optim(optim: OptimConfig) -> None:
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optim, key) < 1:
            raise ValueError(f"optim.{key}={getattr(optim, key)} is not within 0 and 1; set for example 0.95")
    for key in ("eps", "clip_norm"):
        if not getattr(optim, key) > 0:
            raise ValueError(f"optim.{key}={getattr(optim, key)} is not above 0; set a positive number")
    _at_least(0, "optim", optim, "weight_decay")


def _check_divergence(divergence: DivergenceConfig) -> None:
    _at_least(0, "divergence", divergence, "spike_nats", "spike_sigmas", "margin_steps", "max_rollbacks")
    _at_least(2, "divergence", divergence, "window_steps")
    _at_least(1, "divergence", divergence, "patience")
    if not 0 < divergence.lr_factor <= 1:
        raise ValueError(
            f"divergence.lr_factor={divergence.lr_factor} is not within 0 and 1; set 1 to leave the learning rate, "
            "or for example 0.5"
        )


def _check_stage(name: str, stage: StageConfig, config: RunConfig) -> None:
    _at_least(1, name, stage, "steps", "rows_per_step", "micro_rows", "max_rows")
    _at_least(0, name, stage, "ramp_steps", "decay_steps")
    share = stage.micro_rows * config.engine.num_ranks
    if stage.rows_per_step % share:
        raise ValueError(
            f"{name}.rows_per_step={stage.rows_per_step} is not a multiple of {name}.micro_rows={stage.micro_rows} "
            f"x engine.num_ranks={config.engine.num_ranks}; set it to a multiple of {share}"
        )
    if stage.ramp_steps + stage.decay_steps > stage.steps:
        raise ValueError(
            f"{name}.ramp_steps={stage.ramp_steps} + {name}.decay_steps={stage.decay_steps} exceed "
            f"{name}.steps={stage.steps}; shorten them"
        )
    if not stage.peak_lr > 0:
        raise ValueError(f"{name}.peak_lr={stage.peak_lr} is not above 0; set for example 1e-3")
    if not 0 <= stage.final_lr <= stage.peak_lr:
        raise ValueError(
            f"{name}.final_lr={stage.final_lr} is not within 0 and {name}.peak_lr={stage.peak_lr}; set for example 0"
        )
    labels = [each for label, source in config.data.sources.items() for each in labels_of(label, source.kind)]
    for label, weight in stage.weights.items():
        if label not in labels:
            near = difflib.get_close_matches(label, labels, n=1)
            raise ValueError(
                f"{name}.weights.{label}={weight}, but the corpus has no source {label}; "
                + (f"did you mean {name}.weights.{near[0]}? " if near else "")
                + f"sources: {', '.join(labels)}; leave it away with '~{name}.weights.{label}'"
            )
        if not weight >= 0:
            raise ValueError(f"{name}.weights.{label}={weight} is below 0; set 0 to draw nothing from it")
    if stage.epoch_steps is not None:
        epoch_ranges(stage.epoch_steps, num_steps=stage.steps, key=f"{name}.epoch_steps")
    if stage.memory is not None:
        if config.model.num_memory_layers == 0:
            raise ValueError(
                f"{name}.memory is set, but model.num_memory_layers=0; give the model memory layers, or set "
                f"{name}.memory=null"
            )
        if config.bank.context is BankContext.document and stage.memory.source is not MemorySource.bank:
            raise ValueError(
                f"{name}.memory.source={stage.memory.source.name} encodes references by themselves inside the "
                f"step, but bank.context=document; set bank.context=reference, or {name}.memory.source=bank"
            )
        if not 0 <= stage.memory.online_share <= 1:
            raise ValueError(
                f"{name}.memory.online_share={stage.memory.online_share} is not within 0 and 1; set for example 0.25"
            )


def _at_least(least: int, section: str, settings: object, *keys: str) -> None:
    for key in keys:
        value = getattr(settings, key)
        if value is not None and not value >= least:
            raise ValueError(f"{section}.{key}={value} is below {least}; set {least} or more")


def _at_most(most: float, section: str, settings: object, *keys: str) -> None:
    for key in keys:
        value = getattr(settings, key)
        if value > most:
            raise ValueError(f"{section}.{key}={value} is above {most}; set {most} or less")
