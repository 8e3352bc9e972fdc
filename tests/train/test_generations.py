"""Which generations stay beside the checkpoints, and what a kill, a reader or a damaged checkpoint changes."""

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.files import MANIFEST, hold, open_manifest, publishing
from memorybank import quantizer, store
from memorybank.config import CodecKind
from tests.support.train import CountingEngine, stage_config, state
from train.checkpoint import Checkpoints, Entry, Retention, reasons_to_keep
from train.config import SavingConfig
from train.distributed import Ranks
from train.generations import needed_by, outdated, sweep
from train.history import History
from train.schedule import most_generations

ALONE = Ranks(0, 1, torch.device("cpu"))
HISTORY = History(np.zeros(1, np.bool_), np.zeros(1, np.uint16))


def name(epoch: int) -> str:
    return f"generation-continual-{epoch:04d}"


def generation(run: Path, epoch: int, *, codec: str = "bfloat16", weights: str | None = None) -> Path:
    folder = run / "bank" / name(epoch)
    inputs = {"weights": weights or f"w{epoch}", "references": "r", "tokenizer": "t"}
    with publishing(
        folder, kind=store.KIND, version=store.VERSION, settings={"codec": codec}, inputs=inputs
    ) as work:
        (work / "records-00000.bin").write_bytes(b"memories")
    return folder


def checkpoint(run: Path, step: int, epoch: int | None) -> Path:
    position = replace(state(step, stage="continual"), generation=None if epoch is None else name(epoch))
    checkpoints = Checkpoints(run, inputs={}, retention=Retention(last=99), ranks=ALONE)
    return checkpoints.save(CountingEngine(), position, HISTORY, HISTORY.finished, keep=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Six generations; checkpoints name the first and the fourth."""
    for epoch in range(6):
        generation(tmp_path, epoch)
    checkpoint(tmp_path, 10, 0)
    checkpoint(tmp_path, 40, 3)
    return tmp_path


def test_those_that_need_a_generation_are_named_and_one_that_cannot_be_read_may_need_any(run: Path) -> None:
    checkpoint(run, 50, 3)
    assert needed_by(run, name(3)) == ["continual-00000040", "continual-00000050"]
    assert needed_by(run, name(5)) == []
    (run / "checkpoints/continual-00000050/state.json").unlink()
    assert needed_by(run, name(5)) == ["continual-00000050"]


def left(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "bank").iterdir())


def names(epochs: Iterable[int]) -> list[str]:
    return [name(epoch) for epoch in epochs]


def test_what_a_checkpoint_names_and_the_newest_stay(run: Path) -> None:
    assert [path.name for path in outdated(run, last=1)] == names([1, 2, 4])
    assert [path.name for path in sweep(run, last=2)] == names([1, 2])
    assert left(run) == names([0, 3, 4, 5])
    assert sweep(run, last=2) == []


def test_other_folders_and_unfinished_ones_are_left_alone_and_half_deleted_ones_are_not(run: Path) -> None:
    for other in ("generation-evaluation-test", f"{name(6)}.partial", "cold-w0-continual-1"):
        (run / "bank" / other).mkdir()
    (run / "bank" / name(1) / MANIFEST).unlink()
    assert [path.name for path in sweep(run, last=1)] == names([1, 2, 4])
    assert {"generation-evaluation-test", f"{name(6)}.partial", "cold-w0-continual-1"} < set(left(run))


def test_of_a_link_the_link_alone_goes(run: Path, tmp_path: Path) -> None:
    elsewhere = (run / "bank" / name(1)).rename(tmp_path / "elsewhere")
    (run / "bank" / name(1)).symlink_to(elsewhere)
    sweep(run, last=1)
    assert name(1) not in left(run)
    assert (elsewhere / MANIFEST).is_file()


def test_what_is_read_stays_until_its_reader_is_done(run: Path) -> None:
    descriptor = hold(run / "bank" / name(2))
    assert [path.name for path in sweep(run, last=1)] == names([1, 4])
    os.close(descriptor)
    assert [path.name for path in sweep(run, last=1)] == names([2])


def test_nothing_goes_while_a_checkpoint_cannot_be_read(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = run / "checkpoints" / "continual-00000040"
    (damaged / "state.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert sweep(run, last=1) == []
    assert f"{damaged} cannot be read" in caplog.text
    assert [path.name for path in outdated(run, last=1, without=[damaged])] == names([1, 2, 3, 4])


def test_a_quantiser_goes_with_the_last_records_that_it_wrote(tmp_path: Path) -> None:
    codecs = []
    for weights in ("w0", "w1", "w2"):
        folder = tmp_path / "bank" / f"codec-pq16x8-{weights}"
        settings = quantizer.identity(CodecKind.pq16x8, 64, separate=False)
        with publishing(
            folder,
            kind=quantizer.KIND,
            version=quantizer.VERSION,
            settings=settings,
            inputs={"weights": weights},
        ) as work:
            (work / "centroids").write_bytes(weights.encode())
        codecs.append(folder)
    written = [
        quantizer.codec_name(open_manifest(folder, kind=quantizer.KIND, version=quantizer.VERSION))
        for folder in codecs
    ]
    for epoch, (codec, weights) in enumerate(zip(written, ("w0", "w1", "w2"), strict=True)):
        generation(tmp_path, epoch, codec=codec, weights=weights)
    generation(tmp_path, 3, codec=written[1], weights="w1")
    checkpoint(tmp_path, 10, 3)
    assert sweep(tmp_path, last=1) == [
        codecs[0],
        codecs[2],
        *(tmp_path / "bank" / n for n in names([0, 1, 2])),
    ]
    assert left(tmp_path) == ["codec-pq16x8-w1", name(3)]


@pytest.mark.parametrize(
    "saving",
    [
        SavingConfig(every_steps=5, keep_last=2, keep_best=0, keep_generations=2),
        SavingConfig(every_steps=50, keep_last=2, keep_best=0, keep_generations=1),
        SavingConfig(every_steps=3, keep_last=4, keep_best=0, keep_every=9, keep_generations=1),
        SavingConfig(every_steps=7, keep_last=1, keep_best=2, keep_generations=3),
    ],
)
@pytest.mark.parametrize("epoch_steps", [4, 10, 40])
def test_plans_count_what_a_run_holds(saving: SavingConfig, epoch_steps: int, tmp_path: Path) -> None:
    """A stage step by step, its checkpoints and generations by the rules."""
    stage = stage_config(steps=60, decay_steps=20)
    begins = list(range(0, stage.steps, epoch_steps))
    retention = Retention(last=saving.keep_last, every=saving.keep_every, best=saving.keep_best)
    kept: list[Entry] = []
    there: list[int] = []
    most = 0
    for step in range(stage.steps + 1):
        if step and (step % saving.every_steps == 0 or step in (40, 60)):
            read = replace(
                state(step), generation=str(there[-1]), validation=float(step)
            )  # the first are the best
            kept.append(Entry(tmp_path / f"{step}", "warmup", step, None, read, step in (40, 60)))
            reasons = reasons_to_keep(kept, retention)
            kept = [entry for entry in kept if reasons[entry.folder]]
        if step in begins:
            named = {int(entry.state.generation) for entry in kept if entry.state}  # type: ignore[arg-type]
            there = [n for n in there if n in named or n in there[-saving.keep_generations :]]
            there.append(step // epoch_steps)
            most = max(most, len(there))
    counted = most_generations(begins, stage, saving)
    assert most == counted if saving.keep_best == 0 else most <= counted <= most + saving.keep_best
