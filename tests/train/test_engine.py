"""DeepSpeed on two real ranks: that it trains, alike on all ranks and with every ZeRO stage, and loads no pickles."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kill_and_resume import checkpoint_bytes
from model.memory import ReferenceBatch
from model.transformer import Memory3LM
from tests.support.spawn import spawn
from tests.support.train import Canary, model_config, two_ranks
from train.config import EngineConfig, OptimConfig, Precision
from train.distributed import Ranks
from train.engine import (
    DeepSpeedEngine,
    InferenceEngine,
    ModelInput,
    StepResult,
    deepspeed_settings,
    hash_weights,
)

STEPS = 12
ROWS = 4


def model(**switches: bool) -> Memory3LM:
    torch.manual_seed(0)
    return Memory3LM(model_config(row_tokens=64, **switches))


def rows(ranks: Ranks, step: int, *, micro_rows: int, memory: bool = False) -> list[ModelInput]:
    """This rank's micro-batches of a step: every other token repeats the one before it, which can be learnt."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, 60, (ROWS, 33), generator=generator).repeat_interleave(2, dim=1)[:, :65]
    mine = tokens.chunk(ranks.world_size)[ranks.rank]
    inputs = []
    for part in mine.split(micro_rows):
        read = None
        if memory:  # each row reads what is to come as a reference
            lengths = torch.full((len(part),), 64)
            slots = torch.arange(len(part)).view(-1, 1, 1).expand(-1, 2, -1).contiguous()
            read = ReferenceBatch(part[:, 1:].contiguous(), lengths, torch.zeros_like(lengths), slots)
        inputs.append(ModelInput(part[:, :-1], part[:, 1:], read))
    return inputs


def engine(
    ranks: Ranks,
    *,
    zero_stage: int = 1,
    micro_rows: int = 2,
    switches: dict[str, bool] | None = None,
    **optim: float,
) -> DeepSpeedEngine:
    return DeepSpeedEngine(
        model(**(switches or {})),
        optim=OptimConfig(**optim),
        engine=EngineConfig(zero_stage=zero_stage),
        rows_per_step=ROWS,
        micro_rows=micro_rows,
        ranks=ranks,
    )


def trained(ranks: Ranks, *, memory: bool = False, micro_rows: int = 2, **settings: Any) -> dict[str, Any]:
    made = engine(ranks, micro_rows=micro_rows, **settings)
    results = [
        made.train_step(rows(ranks, step % 3, micro_rows=micro_rows, memory=memory), lr=3e-3)
        for step in range(STEPS)
    ]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "tokens": {result.tokens for result in results},
        "skipped": any(result.skipped for result in results),
        "updates take time": all(result.seconds_update > 0 for result in results),
        "hash": made.weights_hash(),
        "local_hash": hash_weights(made.module.state_dict()),
        "weights": made.weights(),
    }


def check_everything(folder: Path) -> dict[str, Any]:
    with two_ranks() as ranks:
        found: dict[str, Any] = {f"zero {stage}": trained(ranks, zero_stage=stage) for stage in (0, 1, 2)}
        found["again"] = trained(ranks)
        found["accumulated"] = trained(ranks, micro_rows=1)
        for stage in (0, 1, 2):
            found[f"online, zero {stage}"] = trained(ranks, memory=True, zero_stage=stage)
        recomputing = {"activation_checkpointing": True}
        found["online, recomputed"] = trained(ranks, memory=True, switches=recomputing)
        found["rate 0"] = _rate_of_zero(ranks)
        found["clipped"] = trained(ranks, clip_norm=1e-4)["norms"]
        found["clipping"] = {
            stage: _distances(ranks, stage, clip_norms=(1e-2, 2e-2, 4e-2, 1e6, 1e7)) for stage in (1, 2)
        }
        found["not finite"] = {stage: _not_finite(ranks, stage) for stage in (1, 2)}
        found["forward"] = _forward(ranks)
        found["resumed"] = _resumed(ranks, folder)
        found["pickle"] = _load_with_pickle(ranks, folder)
        found["nothing"] = _message(lambda: engine(ranks).load(folder / "nothing"))
    return found


def _distances(ranks: Ranks, zero_stage: int, *, clip_norms: tuple[float, ...]) -> list[float]:
    """How far one update goes, where AdamW's `eps` is so large that it goes as far as the gradient is long."""
    moved = []
    for clip_norm in clip_norms:
        made = engine(ranks, zero_stage=zero_stage, clip_norm=clip_norm, eps=1e3, weight_decay=0.0)
        before = _masters(made)
        made.train_step(rows(ranks, 0, micro_rows=2), lr=1.0)
        moved.append(float((_masters(made) - before).norm()))
    return moved


def _masters(made: DeepSpeedEngine) -> Tensor:
    """This rank's part of the float32 weights."""
    optimizer = made._engine.optimizer
    parts = (
        getattr(optimizer, "fp32_groups_flat_partition", None) or optimizer.single_partition_of_fp32_groups
    )
    return torch.cat([part.detach().clone() for part in parts])


def _not_finite(ranks: Ranks, zero_stage: int) -> tuple[list[bool], list[float | None], bool]:
    """Three updates, the second with a NaN on one rank: which were left out; norms; whether it left no trace."""
    results: list[list[StepResult]] = []
    ends = []
    for steps in ((0, 1, 2), (0, 2)):
        made = engine(ranks, zero_stage=zero_stage)
        results.append([])
        for step in steps:
            factor = math.nan if (step, ranks.rank) == (1, 1) else 1.0
            hook = made.module.norm.register_forward_hook(lambda *given, factor=factor: given[2] * factor)
            results[-1].append(made.train_step(rows(ranks, step, micro_rows=2), lr=3e-3))
            hook.remove()
        ends.append(_masters(made))
    first = results[0]
    return [each.skipped for each in first], [each.grad_norm for each in first], torch.equal(*ends)


def _rate_of_zero(ranks: Ranks) -> bool:
    made = engine(ranks)
    before = made.weights_hash()
    made.train_step(rows(ranks, 0, micro_rows=2), lr=0.0)
    return made.weights_hash() == before


def _forward(ranks: Ranks) -> tuple[bool, bool]:
    """Whether losses and memories equal those of the model alone, after some training."""
    made = engine(ranks)
    made.train_step(rows(ranks, 0, micro_rows=2), lr=3e-3)
    given = rows(ranks, 1, micro_rows=2, memory=True)[0]
    alone = Memory3LM(model_config(row_tokens=64)).to(torch.bfloat16)
    alone.load_state_dict(made.module.state_dict())
    reference = InferenceEngine(alone)
    assert isinstance(given.memory, ReferenceBatch)
    lengths = given.memory.lengths_N
    keys = [each.encode(given.memory.tokens_NR, lengths).k_NLGSE for each in (made, reference)]
    return (
        torch.equal(made.token_losses(given), reference.token_losses(given)),
        torch.equal(*keys) and made.weights_hash() == reference.weights_hash(),
    )


def _resumed(ranks: Ranks, folder: Path) -> dict[str, list[float]]:
    """Losses of six steps, of the last three after loading, and of those with the weights alone."""
    made = engine(ranks)
    straight = []
    for step in range(6):
        straight.append(made.train_step(rows(ranks, step, micro_rows=2), lr=3e-3).loss)
        if step == 2:
            saved = made.snapshot(copy=True)
            weights = {name: value.clone() for name, value in made.module.state_dict().items()}
    saved.write(folder / "saved")  # long after it was taken
    ranks.barrier()
    loaded = engine(ranks)
    loaded.load(folder / "saved")
    resumed = [loaded.train_step(rows(ranks, step, micro_rows=2), lr=3e-3).loss for step in range(3, 6)]
    bare = engine(ranks)
    bare.module.load_state_dict(weights)
    dropped = [bare.train_step(rows(ranks, step, micro_rows=2), lr=3e-3).loss for step in range(3, 6)]
    return {"straight": straight, "resumed": resumed, "without optimizer": dropped}


def _load_with_pickle(ranks: Ranks, folder: Path) -> str:
    made = engine(ranks)
    made.snapshot(copy=False).write(folder / "malicious")
    ranks.barrier()
    if ranks.is_first:
        for file in (folder / "malicious").rglob("*.pt"):
            torch.save({"module": Canary(folder / "canary")}, file)
    ranks.barrier()
    return _message(lambda: made.load(folder / "malicious"))


def _message(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return "accepted"


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_gradient_is_clipped_to_its_norm(zero_stage: int, both: list[dict[str, Any]]) -> None:
    for found in both:
        short, double, fourfold, free, freer = found["clipping"][zero_stage]
        assert double / short == pytest.approx(2, rel=0.01)
        assert fourfold / short == pytest.approx(4, rel=0.01)
        assert free == freer > fourfold


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_an_update_whose_gradient_is_not_finite_leaves_no_trace(
    zero_stage: int, both: list[dict[str, Any]]
) -> None:
    for found in both:
        skipped, norms, same = found["not finite"][zero_stage]
        assert skipped == [False, True, False]
        assert [math.isfinite(norm) for norm in norms] == [True, False, True]
        assert same


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """What the two ranks saw."""
    return spawn(check_everything, folder)


ONLINE = [f"online, zero {stage}" for stage in (0, 1, 2)]


@pytest.mark.parametrize("kind", ["zero 0", "zero 1", "zero 2", "accumulated", *ONLINE, "online, recomputed"])
def test_the_loss_falls_alike_on_all_ranks(kind: str, both: list[dict[str, Any]]) -> None:
    first, second = (found[kind] for found in both)
    assert first["losses"][-1] < first["losses"][0] - 1
    assert not first["skipped"]
    assert first["updates take time"]
    assert first["tokens"] == {ROWS * 64}
    for key in ("losses", "norms", "hash", "local_hash"):
        assert first[key] == second[key]
    assert first["hash"] == first["local_hash"]


def test_zero_stages_agree(both: list[dict[str, Any]]) -> None:
    losses = torch.tensor([both[0][f"zero {stage}"]["losses"] for stage in (0, 1, 2)])
    assert torch.allclose(losses[0], losses[1], atol=0.05)
    assert torch.allclose(losses[1], losses[2], atol=0.05)
    norms = torch.tensor([both[0][f"zero {stage}"]["norms"] for stage in (0, 1, 2)])
    assert torch.allclose(norms[:, 0], norms[0, 0].expand(3), rtol=0.02)


def test_the_same_run_has_the_same_weights(both: list[dict[str, Any]]) -> None:
    assert both[0]["zero 1"]["hash"] == both[0]["again"]["hash"]


def test_accumulation_changes_rounding_alone(both: list[dict[str, Any]]) -> None:
    whole, parts = both[0]["zero 1"], both[0]["accumulated"]
    assert parts["losses"] == pytest.approx(whole["losses"], abs=0.05)
    assert parts["norms"][0] == pytest.approx(whole["norms"][0], rel=0.02)


def test_the_rate_is_the_one_given(both: list[dict[str, Any]]) -> None:
    assert both[0]["rate 0"]


def test_the_norm_is_that_before_clipping(both: list[dict[str, Any]]) -> None:
    assert both[0]["clipped"][0] == pytest.approx(both[0]["zero 1"]["norms"][0], rel=1e-3)


def test_losses_and_memories_are_those_of_the_model(both: list[dict[str, Any]]) -> None:
    assert both[0]["forward"] == (True, True)


def test_resuming_keeps_the_optimizer(both: list[dict[str, Any]]) -> None:
    for found in both:
        resumed = found["resumed"]
        assert resumed["resumed"] == resumed["straight"][3:]
        assert resumed["without optimizer"] != resumed["straight"][3:]


def resumed_by_others(folder: Path, name: str) -> tuple[list[float], str]:
    """Losses after loading what other ranks saved, which is then saved anew; what is said of pickles."""
    with two_ranks() as ranks:
        loaded = engine(ranks)
        loaded.load(folder / name)
        assert not (folder / f"{name}.universal").exists() or not ranks.is_first
        loaded.snapshot(copy=False).write(folder / f"{name}-{ranks.world_size}")
        losses = [loaded.train_step(rows(ranks, step, micro_rows=2), lr=3e-3).loss for step in range(3, 6)]
        return losses, _message(lambda: loaded.load(folder / "malicious")) if ranks.world_size == 1 else ""


def test_another_number_of_ranks_goes_on_with_the_same_optimizer(
    both: list[dict[str, Any]], folder: Path
) -> None:
    """Fault 19, 2 -> 1 -> 2: losses within 0.01 nats; without the optimizer's state they are further away."""
    straight, dropped = (
        torch.tensor(both[0]["resumed"][key][-3:]) for key in ("straight", "without optimizer")
    )
    ((alone, said),) = spawn(resumed_by_others, folder, "saved", world_size=1)
    (first, _), (second, _) = spawn(resumed_by_others, folder, "saved-1")
    assert "UnpicklingError" in said
    assert not (folder / "canary").exists()
    assert first == second
    assert first == pytest.approx(straight.tolist(), abs=1e-5)  # the same two partitions again
    assert (torch.tensor(alone) - straight).abs().max() < 0.01
    assert (dropped - straight).abs().max() > 0.02


def test_a_pickle_in_an_engine_file_is_never_executed(both: list[dict[str, Any]], folder: Path) -> None:
    assert all("UnpicklingError" in found["pickle"] for found in both)
    assert not (folder / "canary").exists()
    file = next((folder / "malicious").rglob("*.pt"))
    torch.load(file, weights_only=False)
    assert (folder / "canary").exists()  # it does sing
    (folder / "canary").unlink()


def test_a_folder_without_engine_state_is_refused(both: list[dict[str, Any]]) -> None:
    assert all(
        "ValueError" in found["nothing"] and "holds no engine state" in found["nothing"] for found in both
    )


def test_saved_engine_files_hold_masters_and_moments_of_every_rank_and_no_scripts(
    both: list[dict[str, Any]], folder: Path
) -> None:
    assert not list((folder / "saved").rglob("*.py"))
    contents = checkpoint_bytes(folder / "saved")
    parameters = sum(parameter.numel() for parameter in model().parameters())
    by_rank = [
        sum(len(content) for name, content in contents.items() if f"rank_{rank}_" in name and "optim" in name)
        for rank in range(2)
    ]
    assert sum(by_rank) >= 3 * 4 * parameters  # fp32 masters and two moments
    assert min(by_rank) > 0.9 * max(by_rank)


def test_memory_trains_alike_with_every_zero_stage_and_recomputed(both: list[dict[str, Any]]) -> None:
    plain = both[0]["online, zero 1"]["losses"]
    for kind in ONLINE:
        assert both[0][kind]["losses"] == pytest.approx(plain, abs=0.02)
    assert both[0]["online, recomputed"]["losses"] == plain


def train_with(memory: bool, zero_stage: int, switches: dict[str, bool]) -> tuple[list[float], int]:
    with two_ranks() as ranks:
        found = trained(ranks, memory=memory, zero_stage=zero_stage, switches=switches)
        return found["losses"], sum(weight.numel() for weight in found["weights"].values())


@pytest.mark.slow
@pytest.mark.parametrize("memory", [False, True])
def test_zero_3_trains(memory: bool) -> None:
    (losses, numbers), (other_losses, others) = spawn(train_with, memory, 3, {})
    assert losses == other_losses
    assert losses[-1] < losses[0] - 1
    assert (numbers, others) == (sum(p.numel() for p in model().parameters()), 0)


@pytest.mark.slow
def test_compiled_blocks_train_alike() -> None:
    (losses, _), (other_losses, _) = spawn(train_with, True, 1, {"compile": True})
    (plain, _), _ = spawn(train_with, True, 1, {})
    assert losses == other_losses
    assert losses[0] == pytest.approx(plain[0], abs=0.01)
    assert losses == pytest.approx(plain, abs=0.2)  # bfloat16, rounded elsewhere


def test_the_settings_of_deepspeed_are_derived() -> None:
    settings = deepspeed_settings(
        OptimConfig(clip_norm=0.5, beta2=0.9),
        EngineConfig(zero_stage=2),
        rows_per_step=24,
        micro_rows=3,
        world_size=2,
    )
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"] == {"stage": 2}
    assert settings["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["optimizer"]["params"]["betas"] == [0.9, 0.9]


@pytest.mark.parametrize(("precision", "zero_stage"), [(Precision.bf16, 0), (Precision.fp32, 1)])
def test_gradients_accumulate_in_fp32_by_themselves_elsewhere(precision: Precision, zero_stage: int) -> None:
    made = EngineConfig(zero_stage=zero_stage, precision=precision)
    settings = deepspeed_settings(OptimConfig(), made, rows_per_step=4, micro_rows=2, world_size=2)
    assert "data_types" not in settings
    assert settings["bf16"]["enabled"] == (precision is Precision.bf16)


@pytest.mark.parametrize("rows_per_step", [2, 6])
def test_rows_that_cannot_be_divided_are_refused(rows_per_step: int) -> None:
    with pytest.raises(ValueError, match=r"rows_per_step=.* set rows_per_step to a multiple of 4"):
        deepspeed_settings(
            OptimConfig(), EngineConfig(), rows_per_step=rows_per_step, micro_rows=2, world_size=2
        )


def test_the_hash_knows_names_shapes_types_and_bytes() -> None:
    def of(**weights: Tensor) -> str:
        return hash_weights(weights)

    one = torch.arange(6.0)
    hashes = {
        of(a=one),
        of(b=one),
        of(a=one.view(2, 3)),
        of(a=one.to(torch.bfloat16)),
        of(a=one + 1),
    }
    assert len(hashes) == 5
    assert of(a=one, b=one + 1) == of(b=one + 1, a=one.clone())
    assert of(a=one.view(2, 3).t()) == of(a=one.view(2, 3).t().contiguous())
