"""Inputs made ahead are those made when they are asked for; what their memories cost is counted."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import Loader
from data.packing import RowPlan, pack
from memorybank.bank import BankReader, OnlineReader
from memorybank.cache import CachedRecords
from memorybank.config import QueryMode
from memorybank.store import Generation
from memorybank.writer import compile_generation
from model.memory import MemoryBatch, ReferenceBatch
from tests.support.memorybank import codec, model, prepared, references, settings
from tests.support.spawn import HANG_SECONDS
from train.engine import ModelInput
from train.inputs import BankReading, InputsAhead, StepInputs
from train.stages import MemoryStage, PlainStage, Stage

ROWS, CHUNKS, ACCUMULATE = 24, 4, 2


@pytest.fixture(scope="module")
def plan() -> RowPlan:
    shards = prepared().shards
    return pack(np.arange(12), shards.lengths(), 256, num_rows=ROWS, seed=0)


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    folder = tmp_path_factory.mktemp("bank") / "generation-0"
    compile_generation(
        model().encode, references(), np.arange(30), codec(), folder, settings=settings(), batch=30
    )
    return Generation.open(folder)


def stage(generation: Generation, cache: CachedRecords | None, *, online_share: float = 0.0) -> MemoryStage:
    neighbours_MC = np.random.default_rng(3).integers(-1, 30, (ROWS, CHUNKS))
    return MemoryStage(
        neighbours_MC,
        np.zeros(neighbours_MC.shape, np.float32),
        query=QueryMode.own,
        window=3,
        bank=BankReader(cache or generation, codec()),
        online=OnlineReader(references()) if online_share else None,
        online_share=online_share,
        rows_per_step=4,
        seed=0,
    )


def loader(plan: RowPlan, cursor: int = 0) -> Loader:
    return Loader(prepared().shards, plan, rows_per_step=4, micro_rows=2, cursor=cursor)


def cached(generation: Generation, records: int) -> CachedRecords:
    return CachedRecords(generation, max_bytes=records * generation.record_bytes)


def done(step: StepInputs) -> StepInputs:
    """A step whose micro-batches were all handed out."""
    assert len(list(step.micro)) > 0
    return step


def tensors(inputs: ModelInput) -> list[torch.Tensor]:
    memory = inputs.memory
    found = [inputs.tokens_BT, inputs.targets_BT]
    if isinstance(memory, MemoryBatch):
        found += [memory.slots_BCK, memory.pool.k_NLGSE, memory.pool.v_NLGSE, memory.pool.index_NLGS]
    elif isinstance(memory, ReferenceBatch):
        found += [memory.slots_BCK, memory.tokens_NR, memory.lengths_N]
    return found


@pytest.mark.parametrize("online_share", [0.0, 0.5])
@pytest.mark.parametrize(("records", "depth"), [(0, 1), (5, 1), (1000, 4)])
def test_made_ahead_through_a_cache_inputs_are_bitwise_those_made_when_needed(
    records: int, depth: int, online_share: float, generation: Generation, plan: RowPlan
) -> None:
    plain = stage(generation, None, online_share=online_share)
    with loader(plan) as batches:
        expected = [plain.model_input(batch) for batch in batches]
    cache = cached(generation, records)
    ahead = stage(generation, cache, online_share=online_share)
    with (
        loader(plan) as batches,
        InputsAhead(ahead, batches, accumulate=ACCUMULATE, cache=cache, depth=depth) as inputs,
    ):
        found = [micro for step in inputs for micro in step.micro]
    assert len(found) == len(expected) == ROWS // 2
    kinds = {type(micro.memory) for micro in expected}
    assert kinds == ({MemoryBatch, ReferenceBatch} if online_share else {MemoryBatch})
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours.memory) is type(theirs.memory)
        assert all(torch.equal(a, b) for a, b in zip(tensors(ours), tensors(theirs), strict=True))


def test_the_cursor_is_that_of_what_was_handed_out(generation: Generation, plan: RowPlan) -> None:
    cache = cached(generation, 8)
    with (
        loader(plan, cursor=8) as batches,
        InputsAhead(stage(generation, cache), batches, accumulate=ACCUMULATE, cache=cache, depth=3) as inputs,
    ):
        assert [done(step).cursor for step in inputs] == [12, 16, 20, 24]


def test_hits_and_bytes_are_counted_by_the_step_that_is_handed_out(
    generation: Generation, plan: RowPlan
) -> None:
    cache = cached(generation, 1000)
    made = stage(generation, cache)
    with loader(plan) as batches, InputsAhead(made, batches, accumulate=2, cache=cache, depth=5) as inputs:
        readings = [done(step).reading for step in inputs]
    seen: set[int] = set()
    for number, reading in enumerate(readings):
        assert reading is not None
        asked = missed = 0
        for first in (4 * number, 4 * number + 2):  # two micro-batches, each reading what it reads once
            ids = set(made._neighbours_MC[first : first + 2].ravel().tolist()) - {-1}
            asked, missed = asked + len(ids), missed + len(ids - seen)
            seen |= ids
        assert reading.bytes_read == missed * generation.record_bytes
        assert reading.cache_hit_rate == pytest.approx(1 - missed / asked)
    assert readings[0] is not None
    assert readings[-1] is not None
    assert readings[0].bytes_read > readings[-1].bytes_read


class Slow:
    """A stage that waits to be released before it makes an input."""

    def __init__(self, stage: Stage) -> None:
        self.release = threading.Semaphore(0)
        self.made = threading.Semaphore(0)
        self._stage = stage

    def reads(self, cursor: int) -> None:
        return None

    def model_input(self, batch: object) -> ModelInput:
        self.release.acquire(timeout=HANG_SECONDS)
        made = self._stage.model_input(batch)  # type: ignore[arg-type]
        self.made.release()
        return made


def test_a_step_begins_with_its_first_micro_batch_and_the_others_are_made_meanwhile(
    generation: Generation, plan: RowPlan
) -> None:
    cache = cached(generation, 8)
    slow = Slow(stage(generation, cache))
    with loader(plan) as batches, InputsAhead(slow, batches, accumulate=4, cache=cache) as inputs:
        slow.release.release()
        step = next(inputs)
        next(step.micro)  # the three that follow have not been made
        slow.release.release(1000)
        assert len(list(step.micro)) == 3


def test_only_waiting_for_memories_is_a_stall(generation: Generation, plan: RowPlan) -> None:
    cache = cached(generation, 8)
    slow = Slow(stage(generation, cache))
    with loader(plan) as batches, InputsAhead(slow, batches, accumulate=1, cache=cache) as inputs:
        threading.Timer(0.5, slow.release.release).start()
        first = done(next(inputs))
        slow.made.acquire()
        slow.release.release()
        slow.made.acquire(timeout=HANG_SECONDS)
        threading.Event().wait(0.3)  # it is handed over
        second = done(next(inputs))
        slow.release.release(1000)
    assert isinstance(first.reading, BankReading)
    assert isinstance(second.reading, BankReading)
    assert second.seconds_retrieve < 0.2
    assert 0.25 < first.seconds_retrieve <= first.seconds_waited


def test_a_stage_without_a_bank_has_nothing_to_report(plan: RowPlan) -> None:
    with loader(plan) as batches, InputsAhead(PlainStage(), batches, accumulate=2, cache=None) as inputs:
        assert {done(step).reading for step in inputs} == {None}
    assert not [thread for thread in threading.enumerate() if thread.name in ("memories", "loader")]


def test_what_fails_while_reading_is_raised_where_the_step_is_wanted(
    generation: Generation, plan: RowPlan, tmp_path: Path
) -> None:
    cache = cached(generation, 8)
    broken = stage(generation, cache)
    broken._neighbours_MC = broken._neighbours_MC + 500
    with (
        loader(plan) as batches,
        InputsAhead(broken, batches, accumulate=2, cache=cache) as inputs,
        pytest.raises(ValueError, match="holds no memory"),
    ):
        done(next(inputs))
