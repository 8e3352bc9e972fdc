"""Ranks that meet before they are a process group, also where others met before them."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.spawn import HANG_SECONDS
from train import distributed
from train.distributed import Meeting

WORLD_SIZE = 3


@pytest.fixture
def meetings(monkeypatch: pytest.MonkeyPatch) -> list[Meeting]:
    """Meetings of ranks, in turn: 0, 1, 2, 0, 1, 2, ...; in a store that the launcher keeps."""
    store = dist.HashStore()
    announced = ((store, number % WORLD_SIZE, WORLD_SIZE) for number in range(3 * WORLD_SIZE))
    monkeypatch.setattr(distributed, "rendezvous", lambda url, timeout: announced)
    return [Meeting() for _ in range(3 * WORLD_SIZE)]


def meet(meetings: list[Meeting], text: str) -> list[str]:
    """What the others hear, who ask before the first says it."""
    heard = [""] * len(meetings)

    def hear(rank: int) -> None:
        heard[rank] = meetings[rank].hear()

    others = [threading.Thread(target=hear, args=(rank,)) for rank in range(1, len(meetings))]
    for other in others:
        other.start()
    time.sleep(0.2)
    meetings[0].say(text)
    for other in others:
        other.join(HANG_SECONDS)
    return heard[1:]


def test_ranks_that_were_started_again_hear_nothing_of_what_was_said_before(meetings: list[Meeting]) -> None:
    first, second = meetings[:3], meetings[3:6]
    assert meet(first, "runs/a") == ["runs/a", "runs/a"]
    assert meet(second, "runs/b") == ["runs/b", "runs/b"]
    assert len({meeting.word for meeting in first}) == 1
    assert len({meeting.word for meeting in first + second}) == 2


def test_ranks_that_ended_before_they_heard_stand_in_nobodys_way(meetings: list[Meeting]) -> None:
    asked = threading.Thread(target=meetings[1].hear, daemon=True)  # its first rank never says anything
    asked.start()
    time.sleep(0.2)
    assert meet(meetings[3:6], "runs/b") == ["runs/b", "runs/b"]


def test_ranks_that_met_share_a_store_that_is_new(meetings: list[Meeting]) -> None:
    meet(meetings[:3], "runs/a")
    meetings[0].store().set("key", "old")
    assert meetings[1].store().get("key") == b"old"
    meet(meetings[3:6], "runs/a")
    assert not meetings[4].store().check(["key"])


def test_ranks_that_are_announced_without_a_place_to_meet_do_not_train_each_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    try:
        with pytest.raises(ValueError, match="MASTER_PORT"):
            distributed.start(threads=torch.get_num_threads())
    finally:
        distributed.stop()
