from typing import Any

import numpy as np
import pytest
import torch

from data.batch import TokenBatch
from memorybank.config import QueryMode
from train.config import MemorySource
from train.stages import MemoryStage, PlainStage, Reads, encodes_online, is_online, reads_bank

NEIGHBOURS_MC = np.arange(40).reshape(10, 4)  # the chunks of row r found 4r .. 4r+3


class Recorder:
    """A reader that hands back the slots it was asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[Any] = []

    def batch(self, ids_BCK: Any, device: Any = "cpu") -> Any:
        self.asked.append(ids_BCK)
        return self.name


def stage(**changes: Any) -> MemoryStage:
    settings: dict[str, Any] = {
        "query": QueryMode.own,
        "window": 2,
        "bank": Recorder("bank"),
        "online": None,
        "online_share": 0.5,
        "rows_per_step": 2,
        "seed": 0,
    }
    scores_MC = np.where(NEIGHBOURS_MC < 0, -np.inf, NEIGHBOURS_MC / 100).astype(np.float32)
    return MemoryStage(NEIGHBOURS_MC, scores_MC, **(settings | changes))


def batch(*positions: int) -> TokenBatch:
    return TokenBatch(torch.arange(len(positions) * 5).view(-1, 5), positions, None)


def test_a_plain_stage_reads_no_memory() -> None:
    given = PlainStage().model_input(batch(0, 1))
    assert given.memory is None
    assert given.tokens_BT.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert given.targets_BT.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]


def test_own_reads_what_a_chunk_and_those_before_it_found() -> None:
    bank = Recorder("bank")
    stage(bank=bank).model_input(batch(7, 2))
    assert bank.asked[0].tolist() == [
        [[-1, 28], [28, 29], [29, 30], [30, 31]],
        [[-1, 8], [8, 9], [9, 10], [10, 11]],
    ]


def test_previous_reads_only_what_chunks_before_it_found() -> None:
    bank = Recorder("bank")
    stage(bank=bank, query=QueryMode.previous).model_input(batch(7))
    assert bank.asked[0].tolist() == [[[-1, -1], [-1, 28], [28, 29], [29, 30]]]


def test_the_reads_of_a_step_cover_the_rows_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PlainStage().reads(4) is None
    # Rows 2 and 3 hold 8 .. 15, each read once by its chunk and, but for the last of a row, once by the next.
    assert stage().reads(4) == Reads(2 / 16, 8, pytest.approx(0.115))
    previous = stage(query=QueryMode.previous).reads(4)
    assert previous == Reads(6 / 16, 6, pytest.approx(0.115))
    shared = NEIGHBOURS_MC.copy()
    shared[2], shared[3] = [8, 8, -1, 9], -1
    monkeypatch.setitem(globals(), "NEIGHBOURS_MC", shared)
    # The second 8 is read once by its chunk; the row after has found nothing.
    assert stage().reads(4) == Reads(12 / 16, 2, pytest.approx(0.25 / 3))
    shared[2] = -1
    assert stage().reads(4) == Reads(1.0, 0, None)


def test_all_micro_batches_of_a_mixed_step_read_from_the_same_place_on_every_rank() -> None:
    readers = {"bank": Recorder("bank"), "online": Recorder("online")}
    ranks = [stage(rows_per_step=4, seed=3, **readers) for _ in range(2)]
    chosen = []
    for step in range(2):
        # Rank 0 has positions 4s and 4s+1, one row at a time, rank 1 the two after them.
        sources = {
            made.model_input(batch(4 * step + 2 * rank + micro)).memory
            for rank, made in enumerate(ranks)
            for micro in range(2)
        }
        assert len(sources) == 1
        chosen += sources
    assert chosen == ["online" if is_online(step, share=0.5, seed=3) else "bank" for step in range(2)]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_online_steps_follow_from_the_seed_and_have_their_share(share: float) -> None:
    drawn = [is_online(step, share=share, seed=5) for step in range(2000)]
    assert drawn == [is_online(step, share=share, seed=5) for step in range(2000)]
    assert np.mean(drawn) == pytest.approx(share, abs=0.04)


def test_another_seed_chooses_other_steps() -> None:
    one, other = ([is_online(step, share=0.5, seed=seed) for step in range(50)] for seed in (0, 1))
    assert one != other


def test_pure_stages_ask_their_only_reader_at_every_step() -> None:
    for only in ("bank", "online"):
        readers = {"bank": None, "online": None} | {only: Recorder(only)}
        made = stage(**readers)
        assert {made.model_input(batch(2 * step)).memory for step in range(5)} == {only}


def test_what_the_sources_need() -> None:
    assert [reads_bank(source) for source in MemorySource] == [True, False, True]
    assert [encodes_online(source) for source in MemorySource] == [False, True, True]
