"""What a run will take, before it is started: a pure function from a configuration and a site to figures and warnings.

Every figure is another module's formula: parameters and FLOPs (`model.flops`), bytes of a micro-batch
(`model.footprint`), of ranks and checkpoints (`train.footprint`), of records (`memorybank.cost`), of the index
(`memorybank.index_plan`). No torch.
Invariants: nothing is measured; what is not known (how many references an epoch finds, until its search is made) is an
upper bound, or an estimate beside one, and called so; what is compared with the disk is the bound; a proposal is only
made if it fits.
Not here: looking at the machine and printing (`launch.plan`), whether the machine works (`launch.doctor`).
"""

import itertools
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from launch.config import RunConfig
from launch.devices import Device
from launch.units import binary, decimal
from memorybank.config import CodecKind, check_codec, vector_size
from memorybank.cost import CODECS, generation_bytes
from memorybank.index_plan import IndexPlan, plan_index
from model.config import ModelConfig
from model.flops import ParameterCount, TokenFlops, count_parameters, step_flops, text_token_flops
from model.footprint import micro_batch_bytes
from train.config import MemorySource, StageConfig
from train.footprint import RankMemory, checkpoint_bytes, number_bytes, rank_memory
from train.forecast import BankEpoch
from train.schedule import epoch_begins, most_generations, schedule_of

USABLE = 0.92
"""Share of a device's memory that a plan may fill: CUDA's context, workspaces and gaps take the rest."""
_SECONDS_PER_DAY = 86_400
_KEY_BYTES = 16
"""Of a text whose search vector is kept (`memorybank.embedder.VectorCache`)."""
_NEIGHBOUR_BYTES = 12
"""Of a chunk's reference and score (`train.neighbours`)."""
_MOST_PASSES = 40
"""Over the same text, beyond which more training on it gains next to nothing (Muennighoff et al., 2023)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a run will be, as far as it is known.

    Attributes:
        device: One per rank.
        mfu: Share of the device's nominal rate that is reached (PaLM's count).
        price: Of a device for an hour; None = not asked for.
        memory_bytes: Memory of one rank; None = not known.
        host_memory: Memory of the first rank's machine; None = not known.
        free_disk: Bytes free where the run folder lies; None = not known.
        held: Bytes of the run, and of what it searches with, that lie there already.
        documents: Of the prepared corpus; None = not prepared, or not looked at.
        references: That the bank may hold at most; None = not known.
        epochs: Bank epochs of the prepared corpus, of all stages; None = not looked at.
        tokens: Of the prepared corpus.
        prepared_bytes: What the prepared corpus takes already.
    """

    device: Device
    mfu: float
    price: float | None = None
    memory_bytes: int | None = None
    host_memory: int | None = None
    free_disk: int | None = None
    held: int = 0
    documents: int | None = None
    references: int | None = None
    epochs: Sequence[BankEpoch] | None = None
    tokens: int | None = None
    prepared_bytes: int | None = None

    def check(self) -> None:
        """Raise ValueError, naming the option, when a figure cannot be."""
        if not 0 < self.mfu <= 1:
            raise ValueError(
                f"--mfu {self.mfu} is no share of the device's rate; set it between 0 and 1 (0.4)"
            )
        for option, value in (
            ("--tflops", self.device.tflops),
            ("--memory", self.memory_bytes),
            ("--price", self.price),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"{option} {value} is not above 0; set a positive number")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that will not work, or not as one may think, and what would."""

    says: str
    remedy: str


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage.

    Attributes:
        name: warmup or continual.
        steps: Updates.
        tokens: Text tokens, references not counted.
        accumulate: Micro-batches of an update on each rank.
        token_flops: Of a text token without memory.
        memory_token_flops: What reading memory and encoding references adds to each, at most.
        tokens_per_second: Of all ranks together.
        seconds: Of the whole stage.
        price: Of the whole stage; None without a price.
        memory: Of a rank, for ZeRO stages 0 to 3.
    """

    name: str
    steps: int
    tokens: int
    accumulate: int
    token_flops: TokenFlops
    memory_token_flops: float
    tokens_per_second: float
    seconds: float
    price: float | None
    memory: list[RankMemory]

    @property
    def days(self) -> float:
        return self.seconds / _SECONDS_PER_DAY


@dataclass(frozen=True, slots=True)
class BankPlan:
    """The generations that training compiles.

    Attributes:
        epochs: Bank epochs, each with a generation of its own.
        generations: How many of these lie on disk at a time, at most.
        references: Of the largest generation; at most, where its search was not made yet.
        generation_bytes: Of a generation with so many.
        expected_references: Of the largest generation, an estimate until all searches were made; None = without a
            prepared corpus.
        expected_bytes: Of a generation with so many.
        exact: Whether all searches were made.
        index: Over all references that may be read; None = their number is not known.
    """

    epochs: Sequence[BankEpoch]
    generations: int
    references: int
    generation_bytes: int
    expected_references: int | None
    expected_bytes: int | None
    exact: bool
    index: IndexPlan | None


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What lies in paths.root when the run ends; parts that are not known are None.

    Attributes:
        prepared: Corpus, shards, references.
        search: Search vectors of the references, and their index.
        queries: Search vectors of the chunks that ask, and what they find.
        checkpoint: One checkpoint.
        checkpoints: How many stay, over all stages.
        bank: The generations that lie there at a time.
    """

    prepared: int | None
    search: int | None
    queries: int | None
    checkpoint: int
    checkpoints: int
    bank: int

    @property
    def written(self) -> int:
        """What searching and training write, at most: a checkpoint is written beside those that stay."""
        training = (self.checkpoints + 1) * self.checkpoint + self.bank
        return training + (self.search or 0) + (self.queries or 0)

    @property
    def total(self) -> int:
        return self.written + (self.prepared or 0)

    @property
    def whole(self) -> bool:
        """Whether no part is missing."""
        return None not in (self.prepared, self.search, self.queries)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything that is said of one run."""

    parameters: ParameterCount
    stages: list[StagePlan]
    bank: BankPlan | None
    disk: DiskPlan
    problems: list[Problem]


def plan(config: RunConfig, site: Site) -> RunPlan:
    """Return what a checked configuration will take at a site; `config.model` is the model that will be trained.

    Raises:
        ValueError: A figure of the site cannot be.
    """
    site.check()
    stages = [_stage(name, stage, config, site) for name, stage in config.stages.items()]
    bank = _bank(config, site)
    disk = _disk(config, site, bank)
    problems = [
        *_memory_problems(config, site, stages),
        *_index_problems(site, bank),
        *_disk_problems(config, site, disk),
        *_repeats(config, site, stages),
    ]
    return RunPlan(count_parameters(config.model), stages, bank, disk, problems)


def stage_memory(
    config: RunConfig, stage: StageConfig, *, zero_stage: int, cpu: bool, micro_rows: int | None = None
) -> RankMemory:
    """Return what a rank holds in a stage, with micro-batches of its own size or of another."""
    micro_rows = micro_rows or stage.micro_rows
    memory = stage.memory
    micro_batch = micro_batch_bytes(
        config.model,
        rows=micro_rows,
        number_bytes=number_bytes(config.engine.precision),
        references_read=config.retrieval.window if memory is not None else 0,
        encoded_online=memory is not None and memory.source is not MemorySource.bank,
        cpu=cpu,
    )
    return rank_memory(
        count_parameters(config.model).total,
        micro_batch,
        zero_stage=zero_stage,
        precision=config.engine.precision,
        num_ranks=config.engine.num_ranks,
        accumulate=stage.rows_per_step // (micro_rows * config.engine.num_ranks),
        cpu=cpu,
        asynchronous=config.saving.asynchronous,
    )


def _accumulate(config: RunConfig, stage: StageConfig) -> int:
    return stage.rows_per_step // (stage.micro_rows * config.engine.num_ranks)


def _stage(name: str, stage: StageConfig, config: RunConfig, site: Site) -> StagePlan:
    model, num_ranks = config.model, config.engine.num_ranks
    tokens_per_step = stage.rows_per_step * model.row_tokens
    token = text_token_flops(model)
    memory_flops = _memory_flops(name, stage, config, site)
    rate = site.device.peak(config.engine.precision) * 1e12 * site.mfu * num_ranks
    seconds = stage.steps * (tokens_per_step * token.palm + memory_flops) / rate
    price = None if site.price is None else seconds / 3600 * num_ranks * site.price
    return StagePlan(
        name=name,
        steps=stage.steps,
        tokens=stage.steps * tokens_per_step,
        accumulate=_accumulate(config, stage),
        token_flops=token,
        memory_token_flops=memory_flops / tokens_per_step,
        tokens_per_second=stage.steps * tokens_per_step / seconds,
        seconds=seconds,
        price=price,
        memory=[
            stage_memory(config, stage, zero_stage=zero, cpu=site.device.memory_bytes is None)
            for zero in range(4)
        ],
    )


def _memory_flops(name: str, stage: StageConfig, config: RunConfig, site: Site) -> float:
    """Return what memory adds to a step: reading, and encoding in the step or its share of an epoch's compilation."""
    memory, model = stage.memory, config.model
    if memory is None:
        return 0.0
    chunks, window = _chunks(model), config.retrieval.window
    slots = stage.rows_per_step * sum(min(window, chunk + 1) for chunk in range(chunks))
    online = {MemorySource.bank: 0.0, MemorySource.online: 1.0, MemorySource.mixed: memory.online_share}[
        memory.source
    ]
    compiled = sum(epoch.most for epoch in _bank_epochs(name, stage, config, site)) / stage.steps
    read = step_flops(model, rows=stage.rows_per_step, slots_filled=slots)
    encoded = step_flops(
        model,
        rows=stage.rows_per_step,
        references_encoded=stage.rows_per_step * chunks,
        encode_gradient=True,
    )
    compilation = compiled * step_flops(model, rows=0, references_encoded=1).encode
    return read.memory_read + online * encoded.encode + compilation


def _chunks(model: ModelConfig) -> int:
    return model.row_tokens // model.chunk_tokens


def _bank_epochs(name: str, stage: StageConfig, config: RunConfig, site: Site) -> list[BankEpoch]:
    """Return the bank epochs of a stage; without a forecast, an upper bound of what each asks for."""
    if site.epochs is not None:
        return [epoch for epoch in site.epochs if epoch.stage == name]
    assert stage.memory is not None
    begins = epoch_begins(stage)
    if not begins:
        row = stage.rows_per_step * config.model.row_tokens
        begins = list(range(0, stage.steps, max(1, site.tokens // row) if site.tokens else stage.steps))
    found = []
    for number, (begin, end) in enumerate(itertools.pairwise([*begins, stage.steps])):
        rows = (end - begin) * stage.rows_per_step
        compiled = 0 if stage.memory.source is MemorySource.online else rows
        asking, chunks = (
            (num_rows + config.logging.validation_rows) * _chunks(config.model)
            for num_rows in (rows, compiled)
        )
        found.append(BankEpoch(name, number, end - begin, site.references, asking, chunks, None))
    return found


def _bank(config: RunConfig, site: Site) -> BankPlan | None:
    epochs: list[BankEpoch] = []
    generations = 0
    for name, stage in config.stages.items():
        if stage.memory is not None:
            found = _bank_epochs(name, stage, config, site)
            ends = itertools.accumulate(epoch.steps for epoch in found[:-1])
            generations += most_generations([0, *ends], stage, config.saving)
            epochs += found
    if not epochs:
        return None
    references = max(epoch.most for epoch in epochs)
    expected = max((epoch.likely for epoch in epochs if epoch.likely is not None), default=None)

    def size(held: int) -> int:
        return generation_bytes(config.model, held, vector_bytes=vector_bytes(config))

    return BankPlan(
        epochs=epochs,
        generations=generations,
        references=references,
        generation_bytes=size(references),
        expected_references=expected,
        expected_bytes=None if expected is None else size(expected),
        exact=all(epoch.found is not None for epoch in epochs),
        index=None if not site.references else _index(config, site.references),
    )


def vector_bytes(config: RunConfig) -> int:
    """Return the bytes of a key, and of a value, in the bank."""
    if config.codec.kind is CodecKind.model:
        return config.model.head_size * number_bytes(config.engine.precision)
    return CODECS[config.codec.kind.name](config.model.head_size)


def _index(config: RunConfig, references: int) -> IndexPlan | None:
    size = vector_size(config.retrieval.embedder)
    return None if size is None else plan_index(references, size, config.retrieval.index)


def _disk(config: RunConfig, site: Site, bank: BankPlan | None) -> DiskPlan:
    search = queries = 0 if bank is None else None
    size = vector_size(config.retrieval.embedder)
    if bank is not None and size is not None:
        asking = sum(epoch.asking for epoch in bank.epochs)
        queries = asking * (4 * size + _KEY_BYTES + _NEIGHBOUR_BYTES)
    if bank is not None and bank.index is not None:
        search = bank.index.num_vectors * bank.index.size * 4 + bank.index.disk_bytes
    return DiskPlan(
        prepared=site.prepared_bytes,
        search=search,
        queries=queries,
        checkpoint=checkpoint_bytes(
            count_parameters(config.model).total,
            zero_stage=config.engine.zero_stage,
            precision=config.engine.precision,
            num_documents=site.documents or 0,
        ),
        checkpoints=sum(_checkpoints(stage, config) for stage in config.stages.values()),
        bank=0 if bank is None else bank.generations * bank.generation_bytes,
    )


def _checkpoints(stage: StageConfig, config: RunConfig) -> int:
    """Return how many checkpoints of a stage stay, at most: by the rules of `saving`, and what others branch from."""
    saving = config.saving
    schedule = schedule_of(stage, save_every=saving.every_steps, validate_every=config.logging.validate_every)
    always = {schedule.branch_step, schedule.num_steps}
    saved = sorted({*range(saving.every_steps, schedule.num_steps + 1, saving.every_steps), *always} - {0})
    staying = {*saved[-saving.keep_last :], *always} - {0}
    if saving.keep_every is not None:
        staying |= {step for step in saved if step % saving.keep_every == 0}
    return min(len(saved), len(staying) + saving.keep_best)


def _memory_problems(config: RunConfig, site: Site, stages: list[StagePlan]) -> Iterator[Problem]:
    if site.memory_bytes is None:
        return
    limit = round(site.memory_bytes * USABLE)
    taken = {stage.name: stage.memory[config.engine.zero_stage] for stage in stages}
    if all(each.resident <= limit for each in taken.values()):
        return
    name = max(taken, key=lambda name: taken[name].resident)
    parts = taken[name].parts()
    largest = sorted(parts, key=lambda part: -parts[part])[:2]
    too_much = [
        f"{name}: a rank takes {binary(each.resident)}"
        for name, each in taken.items()
        if each.resident > limit
    ]
    yield Problem(
        f"{'; '.join(too_much)}; {binary(limit)} of its {binary(site.memory_bytes)} may be filled; largest: "
        + ", ".join(f"{part} {binary(parts[part])}" for part in largest),
        fitting(config, limit, cpu=site.device.memory_bytes is None)
        or f"nothing fits, not even on 4,096 ranks: choose a smaller model or a larger device, not {site.device.name}",
    )


def fitting(config: RunConfig, limit: int, *, cpu: bool) -> str | None:
    """Return the settings, as overrides, that make all stages fit and slow them least; None if there are none.

    Tried in this order: a higher ZeRO stage, smaller micro-batches, recomputing activations, more ranks; at last all of
    these with more rows in a step, which changes what is trained.
    """
    ranks = [config.engine.num_ranks]
    while ranks[-1] * 2 <= 4096:
        ranks.append(ranks[-1] * 2)
    for more_rows, num_ranks in itertools.product((False, True), ranks):
        for recompute in sorted({config.model.activation_checkpointing, True}):
            for last in (2, 3):  # ZeRO-3 gathers parameters in every pass
                found = []
                for zero in range(config.engine.zero_stage, last + 1):
                    tried = deepcopy(config)
                    tried.model.activation_checkpointing = recompute
                    tried.engine.num_ranks, tried.engine.zero_stage = num_ranks, zero
                    taken = _shrink_rows(tried, limit, cpu=cpu, more_rows=more_rows)
                    if taken is not None:
                        found.append((tried, taken))
                if found:  # of equally large micro-batches those of the lowest ZeRO stage
                    return _proposal(config, *max(found, key=lambda each: _micro_rows(each[0])))
    return None


def _shrink_rows(tried: RunConfig, limit: int, *, cpu: bool, more_rows: bool) -> int | None:
    """Set the largest micro-batches with which all stages fit, and return what a rank then takes at most."""
    most = 0
    for stage in tried.stages.values():
        wanted, allowed = stage.rows_per_step, stage.micro_rows
        for stage.micro_rows in (rows for rows in range(allowed, 0, -1) if allowed % rows == 0):
            together = stage.micro_rows * tried.engine.num_ranks
            stage.rows_per_step = -(-wanted // together) * together
            if stage.rows_per_step != wanted and not more_rows:
                continue
            taken = stage_memory(tried, stage, zero_stage=tried.engine.zero_stage, cpu=cpu).resident
            if taken <= limit:
                most = max(most, taken)
                break
        else:
            return None
    return most


def _micro_rows(config: RunConfig) -> int:
    return sum(stage.micro_rows for stage in config.stages.values())


def _proposal(config: RunConfig, fits: RunConfig, taken: int) -> str:
    """What a configuration that fits changes, and what a rank takes then."""
    changes: dict[str, tuple[object, object]] = {
        "engine.num_ranks": (config.engine.num_ranks, fits.engine.num_ranks),
        "engine.zero_stage": (config.engine.zero_stage, fits.engine.zero_stage),
        "model.activation_checkpointing": (
            config.model.activation_checkpointing,
            fits.model.activation_checkpointing,
        ),
    }
    more = False
    for name, stage in config.stages.items():
        fitted: StageConfig = getattr(fits, name)
        changes[f"{name}.micro_rows"] = stage.micro_rows, fitted.micro_rows
        changes[f"{name}.rows_per_step"] = stage.rows_per_step, fitted.rows_per_step
        more |= fitted.rows_per_step != stage.rows_per_step
    settings = [f"{key}={str(new).lower()}" for key, (old, new) in changes.items() if old != new]
    return f"{' '.join(settings)} takes {binary(taken)}{', and trains more rows a step' * more}"


def _index_problems(site: Site, bank: BankPlan | None) -> Iterator[Problem]:
    if site.host_memory is None or bank is None or bank.index is None:
        return
    index = bank.index
    if index.build_bytes > site.host_memory * USABLE:
        yield Problem(
            f"building the search index over {index.num_vectors:,} references takes {binary(index.build_bytes)} on the "
            f"first rank's machine, which has {binary(site.host_memory)} of memory",
            "retrieval.index.kind=exact takes none, and reads all vectors for every search; or put the first rank on a "
            "machine with more memory",
        )


def _repeats(config: RunConfig, site: Site, stages: list[StagePlan]) -> Iterator[Problem]:
    if not site.tokens:
        return
    for stage in stages:
        passes = stage.tokens / site.tokens
        if passes > _MOST_PASSES:
            yield Problem(
                f"{stage.name}: {decimal(stage.tokens)} tokens are {passes:,.0f} passes over {config.data.name}, which "
                f"has {decimal(site.tokens)}; beyond {_MOST_PASSES} they gain hardly anything",
                f"{stage.name}.steps={max(1, round(stage.steps * _MOST_PASSES / passes))} at most, or a larger corpus",
            )


def _disk_problems(config: RunConfig, site: Site, disk: DiskPlan) -> Iterator[Problem]:
    if site.free_disk is None or disk.written <= site.free_disk + site.held:
        return
    there = f", beside {binary(site.held)} that lie there already" * bool(site.held)
    parts = {
        "checkpoints": (disk.checkpoints + 1) * disk.checkpoint,
        "the bank": disk.bank,
        "search vectors and index": disk.search or 0,
        "vectors of queries": disk.queries or 0,
    }
    largest = sorted(parts, key=lambda part: -parts[part])[:2]
    yield Problem(
        f"searching and training write {binary(disk.written - site.held)}{there}, and {binary(site.free_disk)} are "
        f"free in {config.paths.root}; largest: {', '.join(f'{part} {binary(parts[part])}' for part in largest)}",
        _smaller(config, site, disk),
    )


def _smaller(config: RunConfig, site: Site, disk: DiskPlan) -> str:
    """Return what makes a run fit on the disk: fewer checkpoints, then a codec with fewer bytes."""
    assert site.free_disk is not None
    room = site.free_disk + site.held
    tried = deepcopy(config)
    settings = []
    if config.saving.keep_last > 1:
        tried.saving.keep_last = 1
        settings.append("saving.keep_last=1")
    if config.saving.keep_generations > 1:
        tried.saving.keep_generations = 1
        settings.append("saving.keep_generations=1")
    kinds = [kind for kind in CodecKind if kind not in (CodecKind.float16, CodecKind.model)]
    for kind in (config.codec.kind, *kinds):
        tried.codec = replace(config.codec, kind=kind, separate=False)
        try:
            check_codec(tried.codec, config.model.head_size)
        except ValueError:
            continue
        smaller = _disk(tried, site, _bank(tried, site))
        if smaller.written <= room:
            chosen = [] if kind is config.codec.kind else [f"codec.kind={kind.name}"]
            return f"{' '.join(settings + chosen)} writes {binary(smaller.written - site.held)}"
    return f"free {binary(disk.written - room)} there, or set paths.root to a larger disk"
