"""DeepSpeed behind a narrow protocol: the only module that knows it.

One `train_step` is one optimizer update: accumulation, averaging over ranks, clipping and skipping happen inside.
DeepSpeed's JSON is derived from our typed settings. What it would write as a checkpoint is caught as a snapshot, which
is written into the folder that `train.checkpoint` publishes, at once or while training goes on, and is read with
pickles switched off, by any number of ranks.
Not here: which batch comes next (`loop`), the checkpoint's container (`checkpoint`).
"""

import gc
import io
import json
import logging
import math
import operator
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from copy import copy as shallow_copy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.attention import AttentionShares
from model.loss import LossSum
from model.memory import ExplicitMemory, MemoryBatch, Places, ReferenceBatch
from model.transfer import fetched, sent
from model.transformer import Memory3LM
from train.config import EngineConfig, OptimConfig, Precision
from train.distributed import Ranks
from train.optim import parameter_groups

UNIVERSAL = ".universal"
"""Ending of a folder that lies beside a checkpoint while another number of ranks reads it."""
_TAG = "engine"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What one forward pass is given.

    Attributes:
        tokens_BT: Inputs.
        targets_BT: The token that follows each input.
        memory: What the chunks read; None means nothing.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    memory: MemoryBatch | ReferenceBatch | None = None

    def to(self, device: torch.device | str) -> "ModelInput":
        """The same inputs on another device."""
        return ModelInput(
            sent(self.tokens_BT, device),
            sent(self.targets_BT, device),
            None if self.memory is None else self.memory.to(device),
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer update.

    Attributes:
        loss: Mean next-token loss over all ranks and micro-batches, in nats.
        tokens: Targets behind the loss, over all ranks.
        grad_norm: Global norm before clipping; None in float32 without ZeRO, where DeepSpeed does not keep it.
        skipped: Whether the update was left out because the gradient was not finite.
        seconds_update: What the optimizer took of the step: clipping, update, exchange of parameters. Gradients are
            exchanged before, at the end of the backward pass.
    """

    loss: float
    tokens: int
    grad_norm: float | None
    skipped: bool
    seconds_update: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint holds of an engine on this rank.

    Attributes:
        weights: All parameters by name, on rank 0; empty elsewhere.
        write: Writes this rank's files into a folder; no collective.
    """

    weights: Mapping[str, Tensor]
    write: Callable[[Path], None]


class Inference(Protocol):
    """What evaluation and compilation need: the forward pass, without gradient."""

    def token_losses(self, inputs: ModelInput) -> Tensor:
        """Next-token loss of every target, (B, T) float32, without gradient."""
        ...

    def attention_shares(self, inputs: ModelInput) -> AttentionShares:
        """Where attention goes at the memory layers (`Memory3LM.attention_shares`): for a few rows, no gradient."""
        ...

    def encode(
        self,
        tokens_NR: Tensor,
        lengths_N: Tensor,
        titles_N: Tensor | None = None,
        places: Places | None = None,
    ) -> ExplicitMemory:
        """Memories of references, by themselves or at their places in documents, without gradient."""
        ...

    def weights_hash(self) -> str:
        """Identifies the weights, the same on every rank; a collective."""
        ...


class Engine(Inference, Protocol):
    """What the loop and the checkpoints need beyond that."""

    @property
    def runs_ahead(self) -> bool:
        """Whether updates are made on a device while this thread goes on."""
        ...

    def queue_step(self, inputs: Iterable[ModelInput], *, lr: float) -> Callable[[], StepResult]:
        """Queue one optimizer update from this rank's micro-batches, each asked for when it is needed; a collective.

        Returns:
            Waits for the update and tells of it; a collective, to be called in the order of the updates.
        """
        ...

    def train_step(self, inputs: Iterable[ModelInput], *, lr: float) -> StepResult:
        """Make one update, and wait for it."""
        return self.queue_step(inputs, lr=lr)()

    def weights(self) -> dict[str, Tensor]:
        """All parameters by name, on rank 0 (empty elsewhere); a collective under ZeRO-3."""
        ...

    def snapshot(self, *, copy: bool) -> Snapshot:
        """Parameters, optimizer state and random numbers as they are now; a collective.

        Args:
            copy: Whether training may go on before it is written. The memory of one copy is kept and used again, so
                that each must be written before the next is taken.
        """
        ...

    def load(self, folder: Path) -> None:
        """Read what a snapshot wrote; a collective."""
        ...


class DeepSpeedEngine(Engine):
    """The engine of every run, on GPUs (nccl) and on CPU ranks (gloo)."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optim: OptimConfig,
        engine: EngineConfig,
        rows_per_step: int,
        micro_rows: int,
        ranks: Ranks,
    ) -> None:
        deepspeed = _import_deepspeed(ranks)
        self._ranks = ranks
        settings = deepspeed_settings(
            optim, engine, rows_per_step=rows_per_step, micro_rows=micro_rows, world_size=ranks.world_size
        )
        if ranks.device.type == "cuda":
            model = model.to(ranks.device)
        with redirect_stdout(io.StringIO()):  # what it prints of its memory, and nothing else does
            gc.freeze()  # it collects garbage eight times, each time looking at all that was imported
            try:
                self._engine, *_ = deepspeed.initialize(
                    model=model,
                    model_parameters=parameter_groups(model, optim.weight_decay),
                    config=settings,
                    dist_init_required=False,
                )
            finally:
                gc.unfreeze()
        self._zero_stage = engine.zero_stage
        self._copies = TensorCopies()
        self._device_judges = engine.zero_stage == 1 and engine.precision is Precision.bf16
        if self._device_judges:
            _add_up_in_one_pass(self._engine.optimizer)
            _judge_on_the_device(self._engine.optimizer, clip_norm=optim.clip_norm)
        if engine.zero_stage == 0 and engine.precision is Precision.bf16:
            # DeepSpeed makes AdamW's states by an update without gradient, which must not count in its bias correction.
            for moments in self._engine.optimizer.optimizer.state.values():
                moments["step"].zero_()

    @property
    def module(self) -> Any:
        """The wrapped model, for what only reads it."""
        return self._engine.module

    @property
    def runs_ahead(self) -> bool:
        return self._ranks.device.type == "cuda"

    def queue_step(self, inputs: Iterable[ModelInput], *, lr: float) -> Callable[[], StepResult]:
        engine, device = self._engine, self._ranks.device
        engine.train()
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        found = torch.zeros(3, dtype=torch.float64, device=device)  # loss, targets, norm
        computed = _mark(device)
        for micro in inputs:
            loss = self._forward(micro)
            engine.backward(loss.sum / loss.count.clamp(min=1))
            found[:2] += torch.stack([loss.sum.detach().double(), loss.count.double()])
            computed = _mark(device)
            engine.step()
            self._ranks.pulse.beat()
        updated = _mark(device)
        norm = engine.get_global_grad_norm()
        if norm is not None:
            found[2] = norm
        applied = engine.was_step_applied()
        read = fetched(found)

        def result() -> StepResult:
            totals = torch.tensor([*read().tolist(), not applied], dtype=torch.float64)
            if self._device_judges and not 0 <= totals[2] < math.inf:
                totals[2:] = torch.tensor([math.inf, 1.0])
            totals = self._ranks.sum(totals)  # so that every rank decides alike
            return StepResult(
                loss=(totals[0] / totals[1].clamp(min=1)).item(),
                tokens=int(totals[1]),
                grad_norm=None if norm is None else totals[2].item() / self._ranks.world_size,
                skipped=bool(totals[3]),
                seconds_update=_seconds_between(computed, updated),
            )

        return result

    @torch.no_grad()
    def token_losses(self, inputs: ModelInput) -> Tensor:
        self._engine.eval()
        self._ranks.pulse.beat()
        batch = inputs.to(self._ranks.device)
        losses: Tensor = self._engine(
            batch.tokens_BT, targets_BT=batch.targets_BT, memory=batch.memory, per_token=True
        )
        return losses

    def attention_shares(self, inputs: ModelInput) -> AttentionShares:
        self._engine.eval()
        self._ranks.pulse.beat()
        batch = inputs.to(self._ranks.device)
        shares: AttentionShares = self.module.attention_shares(batch.tokens_BT, batch.memory)
        return shares

    @torch.no_grad()
    def encode(
        self,
        tokens_NR: Tensor,
        lengths_N: Tensor,
        titles_N: Tensor | None = None,
        places: Places | None = None,
    ) -> ExplicitMemory:
        self._engine.eval()
        self._ranks.pulse.beat()
        device = self._ranks.device
        memory: ExplicitMemory = self.module.encode(
            sent(tokens_NR, device),
            sent(lengths_N, device),
            None if titles_N is None else sent(titles_N, device),
            None if places is None else places.to(device),
        )
        return memory

    def weights(self) -> dict[str, Tensor]:
        if self._zero_stage == 3:
            gathered: dict[str, Tensor] | None = self._engine._zero3_consolidated_16bit_state_dict()
            return gathered or {}
        if not self._ranks.is_first:
            return {}
        return {name: value.detach().cpu().contiguous() for name, value in self.module.state_dict().items()}

    def weights_hash(self) -> str:
        weights = self.weights()
        return str(self._ranks.broadcast(hash_weights(weights) if self._ranks.is_first else None))

    def snapshot(self, *, copy: bool) -> Snapshot:
        plain = self._engine.checkpoint_engine
        caught = _Caught(plain)
        with TemporaryDirectory(
            prefix="memory3-"
        ) as aside:  # for helper scripts, which nobody should have to run
            try:
                self._engine.checkpoint_engine = caught
                self._engine.save_checkpoint(aside, tag=_TAG, save_latest=False)
            finally:
                self._engine.checkpoint_engine = plain
            files = {str(Path(path).relative_to(aside)): state for path, state in caught.files.items()}
        weights, generators = self.weights(), _generators(self._ranks.device)
        if copy:
            weights, files = self._copies.take((weights, files))

        def write(folder: Path) -> None:
            (folder / _TAG).mkdir(parents=True, exist_ok=True)
            for name, state in files.items():
                plain.save(state, str(folder / name))
            save_file(generators, folder / _TAG / self._generators_file)

        return Snapshot(weights, write)

    def load(self, folder: Path) -> None:
        _forbid_pickles()
        if not (folder / _TAG).is_dir():
            raise ValueError(f"{folder} holds no engine state; it was not written by this version")
        partitions = len(list((folder / _TAG).glob("*_optim_states.pt")))
        if self._zero_stage > 0 and partitions != self._ranks.world_size:
            self._load_divided_anew(folder)
        else:
            self._load_from(folder)
        generators = folder / _TAG / self._generators_file
        if generators.exists():  # with more ranks than there were, the new ones keep their own
            _set_generators(load_file(generators))

    def _load_divided_anew(self, folder: Path) -> None:
        """Load what another number of ranks wrote, by way of DeepSpeed's universal format."""
        whole = folder.with_name(folder.name + UNIVERSAL)
        config = self._engine._config
        try:
            if self._ranks.is_first:
                _make_universal(folder / _TAG, whole / _TAG)
            self._ranks.barrier()
            config.load_universal_checkpoint = True
            self._load_from(whole)
            for weights, moments in self._engine.optimizer.optimizer.state.items():
                moments["step"] = moments["step"].to(weights.device)  # it was read on the CPU
            self._ranks.barrier()
        finally:
            config.load_universal_checkpoint = False
            if self._ranks.is_first:
                shutil.rmtree(whole, ignore_errors=True)

    def _load_from(self, folder: Path) -> None:
        with redirect_stdout(io.StringIO()):
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        assert loaded is not None

    @property
    def _generators_file(self) -> str:
        return f"generators_rank_{self._ranks.rank}.safetensors"

    def _forward(self, inputs: ModelInput) -> LossSum:
        batch = inputs.to(self._ranks.device)
        loss: LossSum = self._engine(batch.tokens_BT, targets_BT=batch.targets_BT, memory=batch.memory)
        return loss


class _Caught:
    """Takes what DeepSpeed would have its checkpoint engine write; everything else is that engine's."""

    def __init__(self, plain: Any) -> None:
        self.files: dict[str, Any] = {}
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def save(self, state_dict: Any, path: str) -> None:
        self.files[path] = state_dict


class TensorCopies:
    """Copies nested values with all their tensors into the CPU's memory, which later copies use again.

    Touching new memory takes longer than copying into it. Tensors that share a storage share its copy, so that what
    is written of a copy are the same tensors, byte for byte.
    """

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []

    def take(self, value: T) -> T:
        """A copy of dicts, lists and tuples, and of the tensors in them; it ends the one taken before."""
        free: dict[int, list[torch.UntypedStorage]] = {}
        for storage in self._storages:
            free.setdefault(storage.nbytes(), []).append(storage)
        copied: dict[tuple[int, int], torch.UntypedStorage] = {}
        taken: T = _copy(value, copied, free)
        self._storages = list(copied.values())
        return taken


def _copy(value: Any, copied: dict[Any, torch.UntypedStorage], free: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        source = value.untyped_storage()
        key = source.data_ptr(), source.nbytes()
        if key not in copied:
            size = source.nbytes()
            used_before = free.get(size)
            copied[key] = used_before.pop() if used_before else torch.UntypedStorage(size)  # type: ignore[no-untyped-call]
            copied[key].copy_(source, non_blocking=False)
        view = torch.empty(0, dtype=value.dtype)
        view.set_(copied[key], value.storage_offset(), value.shape, value.stride())
        return view.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        same = shallow_copy(value)
        for key, item in value.items():
            same[key] = _copy(item, copied, free)
        return same
    if type(value) in (list, tuple):
        items = [_copy(item, copied, free) for item in value]
        is_same = type(value) is tuple and all(map(operator.is_, items, value))
        return value if is_same else type(value)(items)
    return shallow_copy(value)


class InferenceEngine:
    """A model by itself, in one process."""

    def __init__(self, model: Memory3LM) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def token_losses(self, inputs: ModelInput) -> Tensor:
        batch = inputs.to(self.device)
        losses = self.model(batch.tokens_BT, targets_BT=batch.targets_BT, memory=batch.memory, per_token=True)
        assert isinstance(losses, Tensor)
        return losses

    def attention_shares(self, inputs: ModelInput) -> AttentionShares:
        batch = inputs.to(self.device)
        return self.model.attention_shares(batch.tokens_BT, batch.memory)

    @torch.no_grad()
    def encode(
        self,
        tokens_NR: Tensor,
        lengths_N: Tensor,
        titles_N: Tensor | None = None,
        places: Places | None = None,
    ) -> ExplicitMemory:
        return self.model.encode(
            sent(tokens_NR, self.device),
            sent(lengths_N, self.device),
            None if titles_N is None else sent(titles_N, self.device),
            None if places is None else places.to(self.device),
        )

    def weights_hash(self) -> str:
        return hash_weights(self.model.state_dict())


def deepspeed_settings(
    optim: OptimConfig, engine: EngineConfig, *, rows_per_step: int, micro_rows: int, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's JSON, derived; `rows_per_step` must be a multiple of `micro_rows` x ranks."""
    accumulate, rest = divmod(rows_per_step, micro_rows * world_size)
    if rest or not accumulate:
        raise ValueError(
            f"rows_per_step={rows_per_step} is not a multiple of micro_rows={micro_rows} x {world_size} ranks; "
            f"set rows_per_step to a multiple of {micro_rows * world_size}, or micro_rows lower"
        )
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": optim.clip_norm,
        "bf16": {"enabled": engine.precision is Precision.bf16},
        "zero_optimization": {"stage": engine.zero_stage},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.0,  # set anew at every step, from the schedule
                "betas": [optim.beta1, optim.beta2],
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                "torch_adam": True,  # with `fused`: PyTorch's own kernel, no C++ build at run time
                "fused": True,
            },
        },
        "steps_per_print": 2**31,
        # It waits for the device before and after each micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "zero_force_ds_cpu_optimizer": False,
    }
    if engine.precision is Precision.bf16 and engine.zero_stage > 0:
        # Otherwise micro-batch gradients add up in bf16; with ZeRO-0 DeepSpeed refuses this setting.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        # Each gradient goes where they add up as soon as it is there, and is freed, instead of all of them at the end.
        settings["bf16"]["immediate_grad_update"] = True
    return settings


def hash_weights(weights: dict[str, Tensor]) -> str:
    """16 hex digits of SHA-256 over names, shapes, types and bytes of all parameters."""
    digest = sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
        digest.update(value.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _mark(device: torch.device) -> Any:
    """A point in the order of the device's work, without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    mark.record()
    return mark


def _seconds_between(first: Any, last: Any) -> float:
    """Seconds from one mark to another, both of which the device has passed."""
    return float(last - first) if isinstance(first, float) else float(first.elapsed_time(last)) / 1000


def _generators(device: torch.device) -> dict[str, Tensor]:
    """States of the random number generators of this process (nothing else draws: rows and order come from seeds)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _add_up_in_one_pass(optimizer: Any) -> None:
    """Let a micro-batch's gradients be added to the float32 sums as they are.

    DeepSpeed makes a float32 copy of each first, twice the traffic: 7 instead of 4.5 % of all kernels' time with
    the paper's model on an H100. The sums are the same bits.
    """

    def add(parameter: Tensor, group: int, number: int, clear_lp_grads: bool) -> None:
        total = optimizer.fp32_groups_gradients[group][number]
        total.add_(parameter.grad.view(total.shape))  # type: ignore[union-attr]
        parameter._hp_grad = total  # type: ignore[attr-defined]
        optimizer.fp32_groups_has_gradients[group][number] = True
        if clear_lp_grads:  # older versions leave it to this function
            parameter.grad = None

    optimizer._update_hp_grad = add


def _judge_on_the_device(optimizer: Any, *, clip_norm: float) -> None:
    """Let the device clip gradients, and leave out an update whose gradients are not finite.

    DeepSpeed reads their norm on the CPU for both, and makes its word for one that is not finite there, each of which
    waits for the whole backward pass before it queues the update. PyTorch's fused AdamW does both by itself, and spares
    a pass over the gradients. DeepSpeed's functions are replaced, not its settings: those come back with a checkpoint.
    """
    from deepspeed.runtime import bf16_optimizer, utils

    utils.mask_nan_or_inf_with_val_inplace = lambda norm, **_: norm.masked_fill_(~norm.isfinite(), -1.0)
    bf16_optimizer.is_invalid_grad_norm = lambda _: False
    bf16_optimizer.clip_tensors_by_global_norm = lambda **_: None

    def judge(adamw: Any, *_: Any) -> None:
        norm = optimizer._global_grad_norm  # -1: not finite
        adamw.found_inf = (~norm.isfinite() | (norm < 0)).to(torch.float32)
        adamw.grad_scale = ((norm + 1e-6) / clip_norm).clamp(min=1.0)

    optimizer.optimizer.register_step_pre_hook(judge)


def _import_deepspeed(ranks: Ranks) -> Any:
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # The shared-memory collective would be compiled at start: it needs a compiler, and a kill during the build
    # leaves a lock that the next start waits for. gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _make_universal(engine: Path, out: Path) -> None:
    """Turn the partitions of all ranks into whole tensors; in this process, where pickles are forbidden."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(out, ignore_errors=True)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(
            Namespace(
                input_folder=str(engine),
                output_folder=str(out),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )


def _forbid_pickles() -> None:
    """Make `torch.load` refuse everything but tensors and DeepSpeed's three plain types (DeepSpeed asks for more)."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
