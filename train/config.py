"""The typed settings of training; they are part of the Hydra schema (`launch.config`).

Every field is followed by its one-sentence documentation. Cross-field rules live in `launch.config.check`.
Not here: sizes of the network (`model.config`), the corpus (`data.config`), the search (`memorybank.config`).
"""

from dataclasses import dataclass, field
from enum import Enum

from memorybank.config import QueryMode

STAGES = ("warmup", "continual")
"""Of a run, in the order of time."""


class MemorySource(Enum):
    """Where the memories that a training step reads come from."""

    bank = "bank"
    online = "online"
    mixed = "mixed"


class Precision(Enum):
    """The type of parameters, activations and gradients; master weights and AdamW states are always float32."""

    bf16 = "bf16"
    fp32 = "fp32"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, as in the paper's set-up where it is stated (section 5.1)."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and embeddings have none."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """What DeepSpeed is asked for; its JSON is derived from this, nobody writes it."""

    zero_stage: int = 1
    """ZeRO stage, 0 to 3."""
    precision: Precision = Precision.bf16
    """Type of parameters and activations."""
    num_ranks: int = 2
    """Processes of a run, over all machines: one per GPU, or per CPU core; torchrun and deepspeed say it themselves."""
    threads_per_rank: int = 1
    """CPU threads of each rank."""


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """How a continual stage reads memory (paper, section 5.4)."""

    source: MemorySource = MemorySource.bank
    """`bank`: compiled once per bank epoch; `online`: encoded inside the step, with gradient; `mixed`: both."""
    online_share: float = 0.25
    """Share of the steps that encode online when `source` is `mixed`."""
    query: QueryMode = QueryMode.own
    """`own`: a chunk reads what its own text retrieves (the paper); `previous`: only what chunks before it do."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One stage of pretraining: its rows, its schedule, and whether it reads memory."""

    steps: int = 100
    """Optimizer updates."""
    rows_per_step: int = 16
    """Rows of one update, over all ranks and micro-batches."""
    micro_rows: int = 8
    """Rows that one rank processes at once."""
    peak_lr: float = 8e-4
    """Learning rate after the ramp."""
    final_lr: float = 0.0
    """Learning rate at the end of the decay."""
    ramp_steps: int = 10
    """Steps of the linear ramp from zero."""
    decay_steps: int = 0
    """Steps of the linear decay at the end (WSD); a continual stage branches from before it."""
    weights: dict[str, float] = field(default_factory=dict)
    """How often documents of a source are drawn, relative to its size; overrides `data.sources.<label>.weight`."""
    max_rows: int | None = None
    """Only so many rows are trained, again and again: to see a model learn them by heart; null trains all."""
    epoch_steps: str | None = None
    """Steps of a bank epoch, 100, or by ranges of steps, "0-1000:100,1000-:500"; null means one pass over the rows."""
    branch_from: str | None = None
    """Run folder whose warmup checkpoint the continual stage branches from; null means this run's own."""
    memory: MemoryConfig | None = None
    """Null means that no memory is read: the paper's warmup, and the control arm C."""


@dataclass(kw_only=True, slots=True)
class SavingConfig:
    """When checkpoints are published and how many stay."""

    every_steps: int = 50
    """Steps between two checkpoints; both ends of a stage are always saved."""
    asynchronous: bool = True
    """Write checkpoints while training goes on, from a copy in the CPU's memory; false saves that memory."""
    keep_last: int = 2
    """Newest checkpoints kept per stage; the ends of stages and branch points always stay."""
    keep_every: int | None = None
    """Checkpoints of every so many steps stay; null keeps none for that reason."""
    keep_best: int = 1
    """Checkpoints of the lowest validation losses that stay, per stage; 0 keeps none for that reason."""
    keep_generations: int = 2
    """Newest generations of the bank that stay; those that a checkpoint names, or somebody reads, always do."""


@dataclass(kw_only=True, slots=True)
class DivergenceConfig:
    """When training counts as gone wrong, and what is done: back to a checkpoint, and past the rows that did it."""

    spike_nats: float | None = 0.5
    """A loss so many nats above the median of the last good ones is bad; null watches for NaN and Inf alone."""
    spike_sigmas: float = 6.0
    """It must also be so many standard deviations (estimated from their median deviation) above them."""
    window_steps: int = 64
    """Good updates whose losses are compared with; none stands out before there are so many."""
    patience: int = 5
    """Bad updates in a row before the run goes back; gradients that are not finite are left out meanwhile."""
    margin_steps: int = 1
    """Updates passed over before the first bad one and after the last, besides the bad ones."""
    lr_factor: float = 1.0
    """The learning rate of the rest of the stage is multiplied by this at every rollback; 1 leaves it."""
    max_rollbacks: int = 3
    """Rollbacks of a stage before the run ends with an error."""


@dataclass(kw_only=True, slots=True)
class WatchdogConfig:
    """When a rank counts as hanging: its stacks and those of its peers are written, and the run ends."""

    batch_seconds: float = 600.0
    """A micro-batch of training, of a validation or of a compilation may take so long; or a rank that is stopped."""
    phase_seconds: float = 7200.0
    """What is no series of batches may take so long: the start, a search for neighbours, a checkpoint."""


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What a run says of itself while it trains."""

    progress: bool = True
    """Show the live view on a terminal; elsewhere a line every `line_every` steps, and for each validation."""
    line_every: int = 20
    """Steps between two lines where the output is no terminal."""
    peak_tflops: float | None = None
    """Peak of one rank's device in the type of training, TFLOP/s, for MFU; null: that of a known GPU, or of the
    rank's CPU threads, 0.2 each in bf16 and 0.05 in fp32."""
    tensorboard: bool = False
    """Mirror the metrics to `<run>/tensorboard`, a folder for each stage (needs the extra `tensorboard`)."""
    wandb: bool = False
    """Mirror the metrics to wandb (offline where no key or network is found)."""
    wandb_project: str = "memory3"
    """Project of the wandb run."""
    validate_every: int = 50
    """Steps between two validations inside the loop; the ends of stages are always validated."""
    validation_rows: int = 16
    """Held-out rows read by a validation inside the loop."""
    profile_steps: int = 0
    """Steps of each stage that are traced with torch's profiler, into `<run>/profile`; 0 traces none."""
    memory_snapshot: bool = False
    """Write what CUDA's allocator held at the end of these steps, too."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """What the final table covers."""

    text_rows: int = 48
    """Held-out text rows."""
    max_probes: int | None = None
    """Probes; null means all of the split."""
    answer_tokens: int = 32
    """Greedy decoding of an answer stops after this many tokens."""
    bootstrap_samples: int = 2000
    """Resamples behind a 95 % interval."""
    batch_rows: int = 16
    """Rows evaluated at once."""
    seed: int = 0
    """Seed of the shuffled and random arms and of the bootstrap."""
