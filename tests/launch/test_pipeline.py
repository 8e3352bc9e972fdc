"""Prepare, train both arms on two DeepSpeed ranks: a corpus that the project has never seen, by the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.documentation import corpus_settings
from data.prepare import open_prepared
from launch.compose import load_config
from memorybank.store import Generation
from tests.support.launch import memory3, prepared_root, trained, trained_corpus, within


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state(run: Path, checkpoint: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "checkpoints" / checkpoint / "state.json").read_text())
    return loaded


def test_prepare_says_what_it_made() -> None:
    said = trained().said["prepare"]
    documents = len(trained_corpus().read_text().splitlines())
    assert f"jsonl: {documents} documents, " in said.out
    for artefact in ("corpus", "tokenizer", "shards", "references"):
        assert f"{artefact}: made" in said.err


def test_prepare_again_makes_nothing() -> None:
    before = {path: path.stat().st_mtime_ns for path in (trained().root / "prepared").rglob("manifest.json")}
    done = within("prepare", *corpus_settings(trained().root, trained_corpus()))
    assert done.code == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_training_starts_at_the_beginning_and_says_so() -> None:
    said = trained().said["m"].err
    assert f"no checkpoint in {trained().main}: starting from the beginning" in said
    assert f"continual stage branches from {trained().main}/checkpoints/warmup-00000004" in said
    assert "Traceback" not in said


def test_frozen_configuration_knows_the_tokenizer() -> None:
    config = load_config(trained().main / "config.yaml")
    prepared = open_prepared(config.data, trained().root / "prepared")
    assert config.model.prefix_ids == prepared.tokenizer.prefix_ids
    assert config.model.vocab_size == prepared.tokenizer.vocab_size == 640


def test_every_step_of_both_stages_is_reported_once() -> None:
    steps = [(line["stage"], line["step"]) for line in metrics(trained().main) if "loss" in line]
    assert steps == [(stage, step) for stage in ("warmup", "continual") for step in (1, 2, 3, 4)]
    assert all(np.isfinite(line["loss"]) for line in metrics(trained().main) if "loss" in line)


def test_memory_arm_reads_a_generation_per_bank_epoch() -> None:
    run = trained().main
    ages = [(line["generation"], line["generation_age"]) for line in metrics(run) if "loss" in line]
    assert ages[4:] == [
        ("generation-continual-0000", 1),
        ("generation-continual-0000", 2),
        ("generation-continual-0001", 1),
        ("generation-continual-0001", 2),
    ]
    validations = [line for line in metrics(run) if "validation_memory" in line]
    assert [line["step"] for line in validations] == [2, 4]
    generation = Generation.open(run / "bank" / "generation-continual-0001")
    last = state(run, "continual-00000004")
    assert last["generation_fingerprint"] == generation.fingerprint
    assert generation.settings.step == 2
    assert len(generation) > 0


def test_control_takes_the_same_rows_without_memory() -> None:
    main, control = trained().main, trained().control
    assert f"continual stage branches from {main}/checkpoints/warmup-00000004" in trained().said["c"].err
    assert {line["stage"] for line in metrics(control)} == {"continual"}
    assert not (control / "bank").exists()
    assert all(line["generation"] is None for line in metrics(control) if "loss" in line)
    ends = [state(run, "continual-00000004") for run in (main, control)]
    assert ends[0]["cursor"] == ends[1]["cursor"]
    assert ends[0]["tokens"] == ends[1]["tokens"]
    for history in ("finished.npy", "drawn.npy", "read.npy"):
        mine, theirs = (
            (run / "checkpoints/continual-00000004" / history).read_bytes() for run in (main, control)
        )
        assert mine == theirs
    weights = [
        (run / "checkpoints/continual-00000004/model.safetensors").read_bytes() for run in (main, control)
    ]
    assert weights[0] != weights[1]


def test_a_warmup_may_read_memory_as_well(tmp_path: Path) -> None:
    """The paper's second warmup (figure 11), and the continual stage after it."""
    (tmp_path / "prepared").symlink_to(prepared_root() / "prepared")
    settings = [*corpus_settings(tmp_path, trained_corpus()), "engine.num_ranks=1", "warmup.epoch_steps='4'"]
    done = memory3(
        *("pretrain", "experiment=paper_0b92_memory", "debug=smoke", *settings, "warmup.steps=8", "run=both")
    )
    assert done.code == 0, done.err
    assert "bank epoch 0 reads no memory" in done.err  # nothing was read yet
    run = tmp_path / "both"
    read = [line for line in metrics(run) if "validation_memory" in line]
    assert [(line["stage"], line["step"]) for line in read] == [
        *(("warmup", step) for step in (6, 8)),
        *(("continual", step) for step in (2, 4)),
    ]
    assert sorted(path.name for path in (run / "neighbours").iterdir()) == [
        *("continual-0000", "continual-0001", "warmup-0000", "warmup-0001")
    ]
    assert state(run, "warmup-00000008")["generation"] == "generation-warmup-0001"
    assert read[-1]["generation_age"] == 2
