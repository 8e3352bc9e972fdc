"""A step of either stage, as the loop makes it, beside what its operations would allow.

With `model.num_memory_layers=0` the warmup stage alone, for models that leave no room for more.

The sides are `train.loop` itself, with the loader, the reading ahead, the engine and the metrics of a run: warmup, the
continual stage from the bank, and online. Beside them: the matrix products of the model's own shapes alone, a training
loop of a few lines without anything of ours around the model, and compiling the references that a step reads. Rows and
references are random (`launch.bench_corpus`); every chunk found a reference of its own, the dearest case.
Not here: operations (`model.flops`), generation.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from data.loader import Loader
from data.packing import RowPlan, pack
from data.references import References
from launch.bench_corpus import write_corpus
from launch.build import training_dtype
from launch.config import RunConfig
from launch.silence import silent_stderr
from launch.timing import Bench, Conditions, Figure, Side, Times, interleaved, rate, ratio
from memorybank import codecs
from memorybank.bank import BankReader, OnlineReader
from memorybank.cache import CachedRecords
from memorybank.codec import Codec
from memorybank.config import CodecKind, QueryMode
from memorybank.pool import window_slots
from memorybank.record import MemoryShape
from memorybank.store import Generation, GenerationSettings
from memorybank.writer import batch_for, compile_generation
from model.config import ModelConfig
from model.flops import count_parameters, step_flops, text_token_flops
from model.transformer import Memory3LM
from train import distributed
from train.config import DivergenceConfig, OptimConfig, StageConfig
from train.distributed import Ranks
from train.engine import DeepSpeedEngine, ModelInput
from train.inputs import InputsAhead
from train.loop import collector_at_rest, train_epoch
from train.metrics import JsonLines, Metrics
from train.optim import parameter_groups
from train.products import products
from train.schedule import Schedule
from train.stages import MemoryStage, PlainStage, Stage
from train.state import RunState

DEFAULTS = [
    "model=small", "model.prefix_ids=[1,2,3,4]", "engine.num_ranks=1", "warmup.rows_per_step=4", "warmup.micro_rows=2",
]  # fmt: skip

_FROM_BANK, _WITH_COMPILING, _ONLINE = 1.10, 1.15, 1.15
_OF_PEAK, _OF_BARE_LOOP = 0.60, 1.05
_WARM = 1
_BYTES_OF_ANOTHER = 24
"""Of a parameter: itself and its gradient, master, the master's gradient, two moments; and some for activations."""
_NEVER = 1 << 30
_GROUPS = {
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "aten::bmm": "attention's products",
    "aten::baddbmm_": "attention's products",
    "aten::_softmax": "attention's softmax",
    "aten::_softmax_backward_data": "attention's softmax",
}


@dataclass(frozen=True, slots=True)
class Scene:
    """What all sides of a step share.

    Attributes:
        folder: Of everything that is written.
        stage: Rows of a step and of a micro-batch.
        plan: The rows, for every side the same.
        found_MC: The reference that each of their chunks found.
        generation: Memories of all of them; None for a model without memory layers.
    """

    config: RunConfig
    folder: Path
    stage: StageConfig
    references: References
    plan: RowPlan
    found_MC: np.ndarray[Any, np.dtype[np.int64]]
    generation: Generation | None
    codec: Codec
    engine: DeepSpeedEngine
    ranks: Ranks

    @property
    def steps(self) -> int:
        """Steps that each side may make."""
        return self.plan.num_rows // self.stage.rows_per_step

    @property
    def filled(self) -> int:
        """Slots of a step that name a memory."""
        found_BC = self.found_MC[: self.stage.rows_per_step]
        window = self.config.retrieval.window
        return int((window_slots(found_BC, QueryMode.own, window=window) >= 0).sum())

    @property
    def num_read(self) -> int:
        """Distinct references of a step."""
        return int(self.stage.rows_per_step * self.found_MC.shape[1])


@contextmanager
def scene(config: RunConfig, *, steps: int, threads: int) -> Iterator[Scene]:
    """Write corpus and bank, and start an engine of one rank."""
    stage = config.warmup
    if stage is None:
        raise ValueError("warmup=null: its rows are those of every side; leave it as it is")
    ranks = distributed.start(threads=threads)
    try:
        with TemporaryDirectory(prefix="memory3-bench-") as name:
            yield _scene(config, stage, Path(name), ranks, rows=steps * stage.rows_per_step)
    finally:
        distributed.stop()


def _scene(config: RunConfig, stage: StageConfig, folder: Path, ranks: Ranks, *, rows: int) -> Scene:
    model = config.model
    chunks = model.row_tokens // model.chunk_tokens
    references = write_corpus(
        folder, model, documents=max(rows * chunks // 4, 2 * rows * model.row_tokens // 256)
    )
    shards = references.shards
    plan = pack(np.arange(shards.num_documents), shards.lengths(), model.row_tokens, seed=0, num_rows=rows)
    found_MC = np.random.default_rng(0).permutation(rows * chunks).reshape(rows, chunks)
    torch.manual_seed(0)
    with ranks.device:
        language_model = Memory3LM(model)
    engine = DeepSpeedEngine(
        language_model,
        optim=config.optim,
        engine=config.engine,
        rows_per_step=stage.rows_per_step,
        micro_rows=stage.micro_rows,
        ranks=ranks,
    )
    codec = codecs.of_kind(CodecKind.model, MemoryShape.of(model), training_dtype(config))
    generation = None
    if model.num_memory_layers:
        settings = generation_settings(model, references)
        ids_N = np.unique(found_MC)
        compile_generation(
            engine.encode,
            references,
            ids_N,
            codec,
            folder / "generation-bench",
            settings=settings,
            batch=batch_for(ranks.device),
        )
        generation = Generation.open(folder / "generation-bench")
    return Scene(config, folder, stage, references, plan, found_MC, generation, codec, engine, ranks)


def generation_settings(model: ModelConfig, references: References) -> GenerationSettings:
    """What a generation of a benchmark states."""
    return GenerationSettings(
        layout=model.layout(),
        weights="random",
        lineage="bench",
        step=0,
        references=references.fingerprint,
        tokenizer="random",
    )


class Loop:
    """The loop of a run, a step at a time; a context manager that ends its threads."""

    def __init__(self, scene: Scene, name: str, stage: Stage, cache: CachedRecords | None) -> None:
        self._scene = scene
        self._stage = stage
        self.path = scene.folder / f"{name}.jsonl"
        """Where its lines are written."""
        self._metrics = Metrics([JsonLines(self.path, stage="warmup", step=0)])
        self._state = RunState(stage="warmup")
        self._schedule = Schedule(_NEVER, 1e-4, 1e-4, 0, 0, save_every=_NEVER, validate_every=_NEVER)
        settings = scene.stage
        self._rows = Loader(
            scene.references.shards,
            scene.plan,
            rows_per_step=settings.rows_per_step,
            micro_rows=settings.micro_rows,
        )
        accumulate = settings.rows_per_step // settings.micro_rows
        self._inputs = InputsAhead(
            stage, self._rows, accumulate=accumulate, cache=cache, device=scene.ranks.device
        )

    def __call__(self) -> None:
        """Make one step."""
        self._state = train_epoch(
            self._scene.engine,
            self._stage,
            self._inputs,
            self._schedule,
            self._state,
            last_step=self._state.step + 1,
            metrics=self._metrics,
            validate=lambda _: {},
            save=lambda _: None,
            divergence=DivergenceConfig(),
        )

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *_: object) -> None:
        self._inputs.__exit__(None, None, None)
        self._rows.close()


def loops(scene: Scene, held: ExitStack) -> dict[str, Loop]:
    """The three ways to train, or the first of them."""
    if scene.generation is None:
        return {"warmup": held.enter_context(Loop(scene, "warmup", PlainStage(), None))}
    cache = CachedRecords(scene.generation, max_bytes=scene.config.bank.cache_mib << 20)
    stages: dict[str, tuple[Stage, CachedRecords | None]] = {
        "warmup": (PlainStage(), None),
        "continual, bank": (memory_stage(scene, bank=BankReader(cache, scene.codec)), cache),
        "continual, online": (memory_stage(scene, online=OnlineReader(scene.references)), None),
    }
    return {
        name: held.enter_context(Loop(scene, name, stage, records))
        for name, (stage, records) in stages.items()
    }


def memory_stage(
    scene: Scene, *, bank: BankReader | None = None, online: OnlineReader | None = None
) -> MemoryStage:
    """The continual stage of a scene, reading a bank or encoding online."""
    return MemoryStage(
        scene.found_MC,
        np.zeros(scene.found_MC.shape, np.float32),
        query=QueryMode.own,
        window=scene.config.retrieval.window,
        bank=bank,
        online=online,
        online_share=1.0,
        rows_per_step=scene.stage.rows_per_step,
        seed=0,
        device=scene.ranks.device,
    )


def compiling(scene: Scene, *, count: int) -> Side:
    """Compile and publish so many references, others every time."""
    number = iter(range(_NEVER))

    def run() -> None:
        made = next(number)
        compile_generation(
            scene.engine.encode,
            scene.references,
            (np.arange(count) + made * count) % len(scene.references),
            scene.codec,
            scene.folder / f"generation-{made}",
            settings=generation_settings(scene.config.model, scene.references),
            batch=batch_for(scene.ranks.device),
        )

    return run


def bare_loop(scene: Scene) -> Side:
    """A training loop of a few lines around the same model: rows in memory, masters in float32, fused AdamW."""
    device = scene.ranks.device
    model = deepcopy(scene.engine.module).to(device).train()
    if scene.config.model.compile:
        for block in model.blocks:
            block.compile()  # a copy forgets it
    parameters = list(model.parameters())
    masters = [nn.Parameter(p.detach().float()) for p in parameters]
    optimizer = _adamw(model, dict(zip(parameters, masters, strict=True)), scene.config.optim)
    micro = list(_first_step(scene))

    def run() -> None:
        for rows in micro:
            loss = model(rows.tokens_BT, targets_BT=rows.targets_BT)
            (loss.sum / loss.count / len(micro)).backward()
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(masters, scene.config.optim.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
        loss.sum.item()

    return run


def _adamw(
    model: Memory3LM, masters: dict[nn.Parameter, nn.Parameter], optim: OptimConfig
) -> torch.optim.AdamW:
    groups = parameter_groups(model, optim.weight_decay)
    for group in groups:
        group["params"] = [masters[parameter] for parameter in group["params"]]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def _first_step(scene: Scene) -> Iterator[ModelInput]:
    settings = scene.stage
    with Loader(
        scene.references.shards,
        scene.plan,
        rows_per_step=settings.rows_per_step,
        micro_rows=settings.micro_rows,
    ) as rows:
        for _ in range(settings.rows_per_step // settings.micro_rows):
            batch = next(rows)
            yield ModelInput(batch.inputs.to(scene.ranks.device), batch.targets.to(scene.ranks.device))


def measure(config: RunConfig, conditions: Conditions) -> Bench:
    """Time the sides of a step."""
    model, device = config.model, conditions.device
    with ExitStack() as held:
        threads = torch.get_num_threads()
        now = held.enter_context(scene(config, steps=conditions.rounds + _WARM + 3, threads=threads))
        stage = now.stage
        trained = loops(now, held)
        multiplied = products(
            model,
            tokens=stage.micro_rows * model.row_tokens,
            dtype=training_dtype(config),
            device=device,
        )
        batch = batch_for(device)
        count = min(len(now.references), -(-now.num_read // batch) * batch)  # whole batches, as in an epoch
        sides: dict[str, Side] = {**trained, "matrix products": multiplied.run}
        if len(trained) > 1:
            sides["compiling"] = compiling(now, count=count)
        if has_room_for_another(now):
            sides["bare loop"] = bare_loop(now)
        with collector_at_rest():
            times = interleaved(sides, conditions, warm=_WARM)
            profiles = [where_time_goes(name, loop) for name, loop in trained.items()]
        filled, read = now.filled, now.num_read
    rows, warmup = stage.rows_per_step, times["warmup"]
    plain = step_flops(model, rows=rows)
    tokens = rows * model.row_tokens
    palm, peak = text_token_flops(model).palm * tokens, config.logging.peak_tflops
    figures = (
        _reading(model, times, rows=rows, filled=filled, read=read, compiled=count)
        if "compiling" in times
        else []
    )
    figures.append(
        ratio(
            "warmup step's FLOP/s / matrix products' FLOP/s",
            times["matrix products"],
            warmup,
            scale=plain.total / multiplied.flops,
            target=_OF_PEAK,
            at_least=True,
            note=f"causal count, {plain.total / tokens / 1e6:.1f} MFLOP a token (PaLM: {palm / tokens / 1e6:.1f}); "
            "products of the model's own shapes, forward and backward",
        )
    )
    if "bare loop" in times:
        figures.append(
            ratio(
                "warmup step / bare loop's step",
                warmup,
                times["bare loop"],
                target=_OF_BARE_LOOP,
                note="loader, engine, metrics and all beside a loop of a few lines with the same model and optimizer",
            )
        )
    if peak is not None:
        figures += [
            Figure(
                f"MFU, {name}",
                tuple(palm / seconds / (peak * 1e12) for seconds in times[name].wall),
                note=f"6 * (non-embedding + head) + 12 * L * d * T FLOP a token of text, of {peak:g} TFLOP/s; by "
                f"the causal count {plain.total / times[name].seconds / (peak * 1e12):.1%}",
            )
            for name in trained
        ]
    return Bench(
        shape={
            "parameters": f"{count_parameters(model).non_embedding / 1e6:.1f}M + vocabulary {model.vocab_size:,}",
            "T": model.row_tokens,
            "rows": f"{rows} in micro-batches of {stage.micro_rows}",
            "references": f"{read} distinct of {model.reference_tokens} tokens a step, {filled} slots",
            "type": str(training_dtype(config)).removeprefix("torch."),
        },
        times=list(times.values()),
        figures=[
            *figures,
            rate("matrix products", times["matrix products"], amount=multiplied.flops / 1e9, unit="GFLOP/s"),
            rate("warmup", warmup, amount=tokens, unit="tokens/s"),
        ],
        findings=profiles,
    )


def _reading(
    model: ModelConfig, times: dict[str, Times], *, rows: int, filled: int, read: int, compiled: int
) -> list[Figure]:
    """What memory costs: from the bank, with compiling, online."""
    warmup, bank, online = (times[name] for name in ("warmup", "continual, bank", "continual, online"))
    plain = step_flops(model, rows=rows)
    from_bank = step_flops(model, rows=rows, slots_filled=filled, references_encoded=read)
    live = step_flops(model, rows=rows, slots_filled=filled, references_encoded=read, encode_gradient=True)
    ideals = [what.total / plain.total for what in (from_bank, live)]
    return [
        ratio(
            "continual step from the bank / warmup step",
            bank,
            warmup,
            target=_FROM_BANK,
            note="the same rows; records are read and decoded one micro-batch ahead",
        ),
        ratio(
            "(continual step + compiling what it reads) / warmup step / ideal",
            bank.plus(times["compiling"], share=read / compiled),
            warmup,
            scale=1 / ideals[0],
            target=_WITH_COMPILING,
            note=f"by operations alone {ideals[0]:.3f}: every chunk has its own reference, read in one epoch only",
        ),
        ratio(
            "online step / warmup step / ideal",
            online,
            warmup,
            scale=1 / ideals[1],
            target=_ONLINE,
            note=f"by operations alone {ideals[1]:.3f}",
        ),
    ]


def has_room_for_another(scene: Scene) -> bool:
    """Whether a second model with its optimizer fits beside the engine's; on a CPU, always."""
    device = scene.ranks.device
    if device.type != "cuda":
        return True
    parameters = sum(parameter.numel() for parameter in scene.engine.module.parameters())
    return bool(parameters * _BYTES_OF_ANOTHER < torch.cuda.mem_get_info(device)[0])


def where_time_goes(name: str, step: Callable[[], object]) -> str:
    """Return one line that shares a step's time out, operator by operator; on a GPU kernel by kernel."""
    on_gpu = torch.cuda.is_available()
    with (
        silent_stderr(),
        profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as traced,
    ):
        step()
    spent: Counter[str] = Counter()
    for event in traced.key_averages():
        spent[_GROUPS.get(event.key, _short(event.key))] += (
            event.self_device_time_total if on_gpu else event.self_cpu_time_total
        )
    total = sum(spent.values())
    parts = [f"{what} {share / total:.1%}" for what, share in spent.most_common(12)]
    return f"Where the time of a step goes, {name}: {', '.join(parts)}."


def _short(kernel: str) -> str:
    """Return a kernel's name without its C++ arguments, one that a table can hold."""
    return kernel.removeprefix("void ").partition("<")[0].partition("(")[0][:60]
