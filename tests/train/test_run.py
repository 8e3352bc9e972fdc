"""Whole stages on two real ranks: resumed runs end with the same bytes, rows and banks are what they should be.

One spawn trains everything; the tests read what the runs left behind.
"""

import gc
import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.kill_and_resume import differences
from data.documents import Split
from launch import worker
from memorybank.config import BankConfig, QueryMode
from memorybank.store import Generation
from model.loss import LossSum
from model.transformer import Memory3LM
from tests.support.spawn import spawn
from tests.support.train import (
    continual_config,
    prepared,
    prepared_root,
    resume,
    resumed_root,
    run_config,
    stage_config,
    train,
    two_ranks,
)
from train.checkpoint import Checkpoint, Checkpoints
from train.config import DivergenceConfig, LoggingConfig, MemoryConfig, MemorySource, SavingConfig
from train.distributed import Ranks
from train.divergence import Health, HopelessError
from train.engine import DeepSpeedEngine, InferenceEngine, ModelInput
from train.history import History
from train.metrics import read_metrics
from train.rows import in_bank, plan_epoch
from train.state import RunState
from train.texts import held_out_rows

ALONE = Ranks(0, 1, torch.device("cpu"))
MIXED = MemoryConfig(source=MemorySource.mixed, online_share=0.5, query=QueryMode.previous)


def all_runs(root: Path) -> dict[str, str]:
    """W: warmup with gradient accumulation. M: continual with a bank. C: its control. X: mixed, with accumulation.

    S: few checkpoints and generations stay.
    """
    with two_ranks() as ranks:
        warmup = run_config(root, "w")
        train(warmup, ranks)
        arms = {
            "m": continual_config(branch_from=str(root / "w")),
            "c": continual_config(branch_from=str(root / "w"), memory=None),
            "x": continual_config(
                branch_from=str(root / "w"), memory=MIXED, steps=6, epoch_steps="0-2:2,2-:3", rows_per_step=8
            ),
            "s": continual_config(branch_from=str(root / "w"), steps=8, epoch_steps="2"),
        }
        few = SavingConfig(every_steps=1, keep_last=1, keep_every=3, keep_best=0, keep_generations=1)
        configs = {
            name: run_config(
                root,
                name,
                warmup=None,
                continual=stage,
                saving=few
                if name == "s"
                else SavingConfig(every_steps=2 if name == "x" else 4, keep_last=100),
                logging=LoggingConfig(progress=False, validate_every=4, validation_rows=4),
            )
            for name, stage in arms.items()
        }
        for config in configs.values():
            train(config, ranks)
        at_once = replace(warmup.saving, asynchronous=False)  # ends with the bytes of the asynchronous one
        resume(replace(warmup, saving=at_once), "warmup-10", ranks)
        for step in (4, 8):  # in the middle of an epoch; at the edge of one
            with running_ahead():  # as on a GPU, with the same bytes
                resume(configs["m"], f"continual-{step}", ranks)
        resume(replace(configs["m"], bank=BankConfig(cache_mib=0)), "continual-12", ranks)
        for step in (2, 4):  # where epochs change their length; before the next edge
            resume(configs["x"], f"continual-{step}", ranks)
        resume(configs["s"], "continual-3", ranks)
        return {
            "refused": _resume_with_another_generation(configs["m"], ranks),
            **_diverging_runs(root, ranks),
        }


WATCH = DivergenceConfig(window_steps=4, patience=2)
PASSED_OVER = (8, 12)  # updates 9 and 10, counted from 0, and one on either side


def _diverging_runs(root: Path, ranks: Ranks) -> dict[str, str]:
    """D: a spike in two steps, on one rank. E: the same rows passed over from the beginning. N: one NaN, on one rank.

    Beyond: D once more from its rollback on, NaN in every update, and in every update of a stage of two.
    """

    def run(name: str, *, steps: int = 20, **divergence: Any) -> Any:
        return run_config(
            root,
            name,
            warmup=stage_config(steps=steps),
            saving=SavingConfig(every_steps=4, keep_last=100),
            divergence=replace(WATCH, **divergence),
        )

    with pytest.MonkeyPatch.context() as patch, running_ahead():
        _poison(patch, ranks, updates=(9, 10), factor=50.0)
        train(run("d"), ranks)
    resume(run("d"), "warmup-8", ranks)
    with pytest.MonkeyPatch.context() as patch:
        begun = partial(RunState, health=Health(passed_over=(PASSED_OVER,)))
        patch.setattr(worker, "RunState", begun)
        train(run("e"), ranks)
    with pytest.MonkeyPatch.context() as patch:
        _poison(patch, ranks, updates=(5,), factor=float("nan"))
        train(run("n"), ranks)
    said = {}
    for name, config in (("hopeless", run("h", steps=8)), ("nothing", run("o", steps=2, patience=9))):
        with pytest.MonkeyPatch.context() as patch:
            _poison(patch, ranks, updates=range(100), factor=float("nan"))
            try:
                train(config, ranks)
            except HopelessError as problem:
                said[name] = str(problem)
    return said


@contextmanager
def running_ahead() -> Iterator[None]:
    """Queue an update before the one before it is judged, as where a device makes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedEngine, "runs_ahead", True)
        yield


def _poison(patch: pytest.MonkeyPatch, ranks: Ranks, *, updates: Container[int], factor: float) -> None:
    """Multiply the loss of rows that these updates read, on the second rank, whenever they are read."""
    forward, poisoned, calls = DeepSpeedEngine._forward, set(), count()

    def poisoning(self: DeepSpeedEngine, inputs: ModelInput) -> LossSum:
        assert not gc.isenabled()  # the collector rests while a run trains
        loss, rows = forward(self, inputs), inputs.tokens_BT.numpy().tobytes()
        if next(calls) // 2 in updates and ranks.rank == 1:  # two micro-batches an update
            poisoned.add(rows)
        return loss._replace(sum=loss.sum * factor) if rows in poisoned else loss

    patch.setattr(DeepSpeedEngine, "_forward", poisoning)


def _resume_with_another_generation(config: Any, ranks: Ranks) -> str:
    """What is said when the generation that a checkpoint names was replaced since."""
    root = Path(config.paths.root)
    other = root / "m-other"
    if ranks.is_first:
        (other / "bank").mkdir(parents=True)
        (other / "checkpoints").mkdir()
        (other / "bank" / "generation-continual-0001").symlink_to(root / "m/bank/generation-continual-0000")
        (other / "checkpoints" / "continual-00000012").symlink_to(root / "m/checkpoints/continual-00000012")
    ranks.barrier()
    try:
        train(replace(config, run="m-other"), ranks)
    except ValueError as problem:
        return str(problem)
    return "accepted"


@pytest.fixture(scope="module")
def root() -> Path:
    return prepared_root()


@pytest.fixture(scope="module")
def said(root: Path) -> list[dict[str, str]]:
    return spawn(all_runs, root)


@pytest.fixture(scope="module")
def runs(root: Path, said: list[dict[str, str]]) -> Path:
    """The folder of all runs, once they are done."""
    return root


def checkpoint(runs: Path, run: str, name: str) -> Checkpoint:
    opened = prepared(runs)
    inputs = {
        "shards": opened.shards.fingerprint,
        "references": opened.references.fingerprint,
        "tokenizer": opened.tokenizer.fingerprint,
    }
    checkpoints = Checkpoints(runs / run, inputs=inputs, ranks=ALONE)
    stage, step = name.split("-")
    return checkpoints.open(runs / run / "checkpoints" / f"{stage}-{int(step):08d}")


def steps(runs: Path, run: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(runs / run / "metrics.jsonl") if "loss" in line]


def test_generations_stay_that_a_checkpoint_names_and_the_newest(runs: Path) -> None:
    kept = {path.name: checkpoint(runs, "s", path.name).state for path in (runs / "s/checkpoints").iterdir()}
    assert sorted(kept) == [f"continual-{step:08d}" for step in (3, 6, 8)]
    assert {state.generation for state in kept.values()} == {
        f"generation-continual-{n:04d}" for n in (1, 2, 3)
    }
    for run in ("s", "s-from-continual-3/s"):
        found = {path.name for path in (runs / run / "bank").glob("generation-*")}
        assert found == {state.generation for state in kept.values()}


RESUMED = [
    ("w", "warmup-10", "warmup-00000020"),
    ("m", "continual-4", "continual-00000020"),
    ("m", "continual-8", "continual-00000020"),
    ("m", "continual-12", "continual-00000020"),
    ("x", "continual-2", "continual-00000006"),
    ("x", "continual-4", "continual-00000006"),
    ("s", "continual-3", "continual-00000008"),
]


@pytest.mark.parametrize(("run", "origin", "last"), RESUMED)
def test_a_resumed_run_ends_with_the_same_bytes(run: str, origin: str, last: str, runs: Path) -> None:
    """Weights, fp32 masters, AdamW's moments of both ranks, state and history; with a cache of records, or without."""
    resumed = resumed_root(runs, run, origin) / run
    assert differences(runs / run / "checkpoints" / last, resumed / "checkpoints" / last) == []


@pytest.mark.parametrize(("run", "origin", "last"), RESUMED)
def test_metrics_have_each_step_once_and_alike(run: str, origin: str, last: str, runs: Path) -> None:
    def lines(root: Path) -> list[dict[str, Any]]:
        # A cache begins empty after a resume.
        apart = (
            "time",
            "tokens_per_second",
            "mfu",
            "mfu_causal",
            "matmul_share",
            "cache_hit_rate",
            "bytes_read",
        )
        return [
            {key: value for key, value in line.items() if key not in apart and "seconds_" not in key}
            for line in read_metrics(root / run / "metrics.jsonl")
            if "checkpoint" not in line
        ]

    resumed = resumed_root(runs, run, origin)
    assert lines(resumed) == lines(runs)
    assert [line["step"] for line in steps(resumed, run)] == list(range(1, int(last[-8:]) + 1))


def test_comparing_checkpoints_sees_a_difference(runs: Path) -> None:
    found = differences(
        runs / "m" / "checkpoints" / "continual-00000020", runs / "c" / "checkpoints" / "continual-00000020"
    )
    assert "model.safetensors" in found
    assert any("optim_states" in name for name in found)


def test_the_loss_falls_in_the_warmup(runs: Path) -> None:
    losses = [line["loss"] for line in steps(runs, "w")]
    assert losses[-1] < losses[0] - 0.5


def test_the_continual_stage_begins_with_the_weights_of_the_warmup(runs: Path) -> None:
    before = steps(runs, "w")[-1]["loss"]
    assert steps(runs, "c")[0]["loss"] == pytest.approx(before, abs=0.5)
    assert steps(runs, "c")[0]["tokens"] == steps(runs, "w")[-1]["tokens"] + 4 * 128


def test_the_first_update_of_both_arms_has_the_same_rows_and_weights(runs: Path) -> None:
    """Nothing but memory tells them apart; a barely trained model hardly notices it."""
    m, c = steps(runs, "m"), steps(runs, "c")
    assert m[0]["loss"] != c[0]["loss"]
    assert m[0]["loss"] == pytest.approx(c[0]["loss"], abs=0.1)
    assert [line["lr"] for line in m] == [line["lr"] for line in c]
    assert [line["tokens"] for line in m] == [line["tokens"] for line in c]
    for name in ("continual-8", "continual-16", "continual-20"):
        one, other = checkpoint(runs, "m", name), checkpoint(runs, "c", name)
        np.testing.assert_array_equal(one.history.drawn, other.history.drawn)
        np.testing.assert_array_equal(one.history.finished, other.history.finished)
        np.testing.assert_array_equal(one.read, other.read)


def test_fact_documents_are_drawn_once_their_section_is_in_the_bank(runs: Path) -> None:
    corpus = prepared(runs).shards.corpus
    requires = corpus.table["requires"]
    drawn_facts = 0
    for epoch_end, before in (("continual-8", "continual-4"), ("continual-16", "continual-12")):
        history = checkpoint(runs, "m", before).history
        bank = in_bank(corpus, history.finished)
        stage = continual_config()
        plan = plan_epoch(
            prepared(runs).shards,
            "continual",
            stage,
            history,
            source_weights={"factbook": 1.0},
            row_tokens=128,
            epoch=int(epoch_end == "continual-16"),
            epoch_step=8 * int(epoch_end == "continual-16"),
            seed=0,
        ).plan
        facts = [number for number in set(plan.documents.tolist()) if requires[number] >= 0]
        drawn_facts += len(facts)
        assert all(bank[requires[fact]] for fact in facts)
    assert drawn_facts > 0


def test_held_out_documents_are_never_read_as_training_text(runs: Path) -> None:
    corpus = prepared(runs).shards.corpus
    held_out = np.concatenate([corpus.select(split=split) for split in (Split.validation, Split.test)])
    for name in ("continual-8", "continual-16", "continual-20"):
        found = checkpoint(runs, "m", name)
        assert not found.history.drawn[held_out].any()
        assert not found.read[held_out].any()
        assert found.read.sum() > 0


def test_the_bank_of_an_epoch_holds_only_finished_documents_and_reference_only_ones(runs: Path) -> None:
    opened = prepared(runs)
    sizes = []
    for epoch, within in enumerate(("continual-4", "continual-12", "continual-20")):
        found = checkpoint(runs, "m", within)
        assert found.state.generation == f"generation-continual-{epoch:04d}"
        generation = Generation.open(runs / "m" / "bank" / found.state.generation)
        assert generation.fingerprint == found.state.generation_fingerprint
        assert generation.settings.step == found.state.epoch_step == epoch * 8
        allowed = in_bank(opened.shards.corpus, found.history.finished)
        assert allowed[opened.references.document_of[generation.ids]].all()
        sizes.append(int(allowed[opened.references.document_of].sum()))
    assert sizes == [
        line["bank_references"]
        for line in read_metrics(runs / "m" / "metrics.jsonl")
        if "bank_references" in line
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]  # the bank grows


def test_the_history_of_an_epoch_is_what_was_read_when_it_began(runs: Path) -> None:
    after_warmup = checkpoint(runs, "w", "warmup-20")
    first = checkpoint(runs, "m", "continual-4")
    np.testing.assert_array_equal(first.history.finished, after_warmup.read)
    assert not first.history.drawn.any()
    edge, second = checkpoint(runs, "m", "continual-8"), checkpoint(runs, "m", "continual-12")
    np.testing.assert_array_equal(second.history.finished, edge.read)
    assert second.history.drawn.any()


def test_a_generation_is_compiled_by_the_weights_of_the_checkpoint_before_it(runs: Path) -> None:
    edge = checkpoint(runs, "m", "continual-8")
    model = Memory3LM(run_config(runs, "m").model).to(torch.bfloat16)
    model.load_state_dict(edge.weights())
    generation = Generation.open(runs / "m" / "bank" / "generation-continual-0001")
    assert generation.settings.weights == InferenceEngine(model).weights_hash()
    assert generation.settings.lineage == "m"


def test_the_age_of_the_generation_is_a_metric(runs: Path) -> None:
    assert [line["generation_age"] for line in steps(runs, "m")] == [*range(1, 9), *range(1, 9), *range(1, 5)]
    assert {line["generation_age"] for line in steps(runs, "c")} == {None}
    assert [line["generation_age"] for line in steps(runs, "x")] == [1, 2, 1, 2, 3, 1]  # as its ranges say


def test_a_generation_that_the_checkpoint_does_not_name_is_refused(
    said: list[dict[str, str]], runs: Path
) -> None:
    named = checkpoint(runs, "m", "continual-12").state.generation_fingerprint
    for rank in said:
        assert f"but the checkpoint names {named}" in rank["refused"]
        assert "generation-continual-0001" in rank["refused"]


def test_the_validation_loss_is_that_of_validation_rows(runs: Path) -> None:
    """Computed again here, without ranks, engine and loop: the loop's `validation_none` is no training loss."""
    found = checkpoint(runs, "w", "warmup-20")
    model = Memory3LM(run_config(runs, "w").model).to(torch.bfloat16)
    model.load_state_dict(found.weights())
    rows = held_out_rows(prepared(runs).shards, Split.validation, num_rows=4, row_tokens=128)
    nll = InferenceEngine(model).token_losses(ModelInput(rows.tokens_MT1[:, :-1], rows.tokens_MT1[:, 1:]))
    lines = [line for line in read_metrics(runs / "w" / "metrics.jsonl") if "validation_none" in line]
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[-1]["validation_none"] == pytest.approx(nll.mean().item(), abs=2e-3)
    assert lines[-1]["validation_tokens"] == 4 * 128
    splits = {prepared(runs).shards.document(int(number)).split for number in np.unique(rows.documents_MT1)}
    assert splits == {Split.validation}


def test_a_validation_says_what_it_read(runs: Path) -> None:
    line = [line for line in read_metrics(runs / "x" / "metrics.jsonl") if "validation_memory" in line][-1]
    assert line["query"] == "previous"
    assert line["pattern"] == "training"
    assert line["overlap_limit"] == pytest.approx(2 / 3)
    assert line["generation_age"] == 1
    assert {"validation_none", "validation_memory", "validation_shuffled"} <= line.keys()
    assert len(line["memory_attention_layers"]) == 1
    assert 0 < line["memory_attention"] == line["memory_attention_layers"][0] < 1


def test_every_step_with_memory_says_what_it_read(runs: Path) -> None:
    for run, memory in (("m", True), ("x", True), ("c", False)):
        lines = [line for line in read_metrics(runs / run / "metrics.jsonl") if "loss" in line]
        read = [line for line in lines if "empty_slots" in line]
        assert len(read) == (len(lines) if memory else 0)
        for line in read:
            assert 0 < line["empty_slots"] < 1
            assert 1 <= line["distinct_references"] <= 8 * 4
            assert 0 < line["retrieval_score"] < 1


def test_a_spike_on_one_rank_takes_all_back_and_past_its_rows(runs: Path) -> None:
    """Fault 12. The poison follows the rows: met again, they would spike again."""
    lines = read_metrics(runs / "d" / "metrics.jsonl")
    (back,) = [line for line in lines if line.get("event") == "rollback"]
    assert (back["step"], back["diverged_at"], back["rollback"]) == (8, 11, 1)
    assert (back["checkpoint"], back["steps_undone"]) == ("warmup-00000008", 3)
    assert "stands out, 2 bad updates in a row" in back["reason"]
    assert (back["passed_over_first"], back["passed_over_last"]) == (9, 12)
    assert back["rows_passed_over"] == 4 * 8
    assert [line["step"] for line in lines if line.get("passed_over")] == [9, 10, 11, 12]
    assert [line["step"] for line in steps(runs, "d")] == [*range(1, 9), *range(13, 21)]
    state = checkpoint(runs, "d", "warmup-20").state
    assert state.skipped == 4
    assert state.health.passed_over == (PASSED_OVER,)
    assert state.tokens == 16 * 8 * 128


def test_after_a_rollback_the_weights_are_those_of_a_run_that_never_met_the_rows(runs: Path) -> None:
    ends = [runs / run / "checkpoints" / "warmup-00000020" for run in ("d", "e")]
    assert differences(*ends) == ["state.json"]  # where the rollback is counted


def test_a_run_killed_after_a_rollback_passes_the_same_rows_over(runs: Path) -> None:
    ends = [
        root / "d" / "checkpoints" / "warmup-00000020" for root in (runs, resumed_root(runs, "d", "warmup-8"))
    ]
    assert differences(*ends) == []
    lines = read_metrics(resumed_root(runs, "d", "warmup-8") / "d" / "metrics.jsonl")
    assert [line["event"] for line in lines if "event" in line] == ["rollback", "resumed"]


def test_a_nan_on_one_rank_is_left_out_on_all(runs: Path) -> None:
    """Fault 11: below the patience."""
    lines = steps(runs, "n")
    assert [line["step"] for line in lines if line["skipped"]] == [6]
    assert checkpoint(runs, "n", "warmup-20").state.skipped == 1
    assert all(np.isfinite(line["loss"]) for line in lines if line["step"] != 6)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5


def test_nan_without_end_stops_every_rank(said: list[dict[str, str]]) -> None:
    """Fault 11: beyond the patience, with nothing to go back to."""
    for rank in said:
        assert (
            "no finite gradient, 2 bad updates in a row (update 2), and there is no warmup checkpoint"
            in rank["hopeless"]
        )
        assert "lower warmup.peak_lr" in rank["hopeless"]


def test_a_stage_that_made_no_update_fails(said: list[dict[str, str]]) -> None:
    """Fault 13."""
    for rank in said:
        assert "not one of the 2 updates of the warmup stage was made" in rank["nothing"]


def test_every_step_that_reads_the_bank_says_how_its_records_came(runs: Path) -> None:
    record_bytes = Generation.open(runs / "m/bank/generation-continual-0000").record_bytes
    lines = steps(runs, "m")
    for line in lines:
        assert 0 <= line["cache_hit_rate"] <= 1
        assert line["bytes_read"] % record_bytes == 0
        assert min(line["seconds_data"], line["seconds_retrieve"]) >= 0
    first_of_epoch = [lines[step]["cache_hit_rate"] for step in (0, 8, 16)]
    assert first_of_epoch == [0, 0, 0]  # another generation, other records
    assert max(line["cache_hit_rate"] for line in lines) > 0.3
    without = [line for line in steps(resumed_root(runs, "m", "continual-12"), "m") if line["step"] > 12]
    assert {line["cache_hit_rate"] for line in without} == {0}
    assert sum(line["bytes_read"] for line in without) > sum(line["bytes_read"] for line in lines[12:])
    for line in steps(runs, "x"):
        assert (line["cache_hit_rate"] is None) == (line["bytes_read"] == 0)  # an online step reads no record
    assert not any("bytes_read" in line for line in steps(runs, "c"))


def test_only_whole_artefacts_are_left(runs: Path) -> None:
    assert not [path for path in runs.rglob("*.partial") if path.is_dir()]


def test_the_state_is_plain_json(runs: Path) -> None:
    state = json.loads((runs / "m" / "checkpoints" / "continual-00000012" / "state.json").read_text())
    assert (state["stage"], state["step"], state["epoch"], state["epoch_step"]) == ("continual", 12, 1, 8)
    assert state["cursor"] == 4 * 4
    assert History.load(runs / "m" / "checkpoints" / "continual-00000012").drawn.any()
    assert stage_config().rows_per_step * 20 * 128 + 12 * 4 * 128 == state["tokens"]
