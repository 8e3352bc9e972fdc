import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from data.files import partial, write_atomic
from data.references import References
from memorybank import team
from memorybank.store import Generation, GenerationSettings, records_file
from memorybank.team import Team
from memorybank.writer import Encode, compile_generation
from model.memory import ExplicitMemory
from model.transformer import Memory3LM
from tests.support.memorybank import codec, hashes, late_on_rank_1, model, on_ranks, settings

IDS = np.arange(3, 40)  # 37 references in shards of 8: five shards, the last of 5 records
SHARD, BATCH = 8, 4
WINDOW = 256
IN_DOCUMENTS = settings(context="document", window_tokens=WINDOW)


def compiled(folder: Path, encode: Encode, passages: References, **changes: object) -> dict[str, str]:
    """Compile with small shards, and return the hash of every file."""
    given = {"settings": settings(), "records_per_shard": SHARD, "batch": BATCH} | changes
    compile_generation(encode, passages, IDS, codec(), folder, **given)
    return hashes(folder)


class Counting:
    """The model's encoder, counting its calls; stops at call `fails_at`."""

    def __init__(self, network: Memory3LM, fails_at: int = 10_000) -> None:
        self.network, self.calls, self.fails_at = network, 0, fails_at

    def __call__(self, tokens_NR: Tensor, lengths_N: Tensor, *more: Any) -> ExplicitMemory:
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        assert len(tokens_NR) == (BATCH if len(more) == 1 else BATCH * 128 // WINDOW)  # full batches only
        return self.network.encode(tokens_NR, lengths_N, *more)


@pytest.mark.parametrize(
    ("world_size", "stated"), [(2, settings()), (3, settings()), (2, IN_DOCUMENTS), (3, IN_DOCUMENTS)]
)
def test_bytes_do_not_depend_on_the_number_of_ranks(
    world_size: int, stated: GenerationSettings, network: Memory3LM, passages: References, tmp_path: Path
) -> None:
    alone = compiled(tmp_path / "alone", network.encode, passages, settings=stated)
    counters = [Counting(network) for _ in range(world_size)]
    progress: list[int] = []

    def run(team: Team) -> None:
        told = progress.append if team.rank == 0 else None
        given = {"settings": stated, "team": team, "progress": told}
        compiled(tmp_path / "together", counters[team.rank], passages, **given)

    on_ranks(world_size, run)
    assert hashes(tmp_path / "together") == alone
    # encode may be a collective: all ranks call it equally often, with work or without
    assert len({counter.calls for counter in counters}) == 1
    assert sum(progress) == len(IDS)


def test_an_interrupted_build_of_documents_is_the_same(
    network: Memory3LM, passages: References, tmp_path: Path
) -> None:
    whole = compiled(tmp_path / "whole", network.encode, passages, settings=IN_DOCUMENTS)
    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path / "broken", Counting(network, fails_at=5), passages, settings=IN_DOCUMENTS)
    assert compiled(tmp_path / "broken", network.encode, passages, settings=IN_DOCUMENTS) == whole
    assert whole != compiled(tmp_path / "plain", network.encode, passages)


def test_an_interrupted_build_goes_on_after_its_last_whole_shard(
    network: Memory3LM, passages: References, tmp_path: Path
) -> None:
    whole = compiled(tmp_path / "whole", network.encode, passages)
    folder = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        compiled(folder, Counting(network, fails_at=5), passages)  # in the third shard
    assert not folder.exists()
    assert (partial(folder) / records_file(1)).exists()
    assert not (partial(folder) / records_file(2)).exists()
    rest, progress = Counting(network), []
    assert compiled(folder, rest, passages, progress=progress.append) == whole
    assert rest.calls == 2 + 2 + 2
    assert progress[0] == 2 * SHARD


def test_a_host_that_lists_late_does_as_the_first_one_sees(
    network: Memory3LM, passages: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = compiled(tmp_path / "whole", network.encode, passages), tmp_path / "generation"
    with pytest.raises(KeyboardInterrupt):
        compiled(folder, Counting(network, fails_at=5), passages)  # two of five shards are there
    counters = [Counting(network), Counting(network)]

    def run(team: Team) -> None:
        compiled(folder, counters[team.rank], passages, team=team)

    with monkeypatch.context() as patch:
        late_on_rank_1(patch, Path, "exists", "is_file")
        on_ranks(2, run)
        on_ranks(2, run)  # it has been published
    assert hashes(folder) == whole
    assert [counter.calls for counter in counters] == [2 + 2, 2 + 2]


def test_nothing_is_published_before_the_first_host_lists_all_of_it(
    network: Memory3LM, passages: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def late(folder: Path) -> list[str]:
        looks.append(folder)
        return [name for name in os.listdir(folder) if name != records_file(4) or len(looks) > 2]

    monkeypatch.setattr(team, "listdir", late)
    monkeypatch.setattr(team, "_POLL_SECONDS", 0.01)
    compiled(tmp_path / "generation", network.encode, passages)
    assert len(looks) == 3
    monkeypatch.setattr(team, "_LAG_SECONDS", -1)
    looks.clear()
    with pytest.raises(
        ValueError, match=r"records-00004\.bin was written by another rank, and this host has not"
    ):
        compiled(tmp_path / "other", network.encode, passages)
    assert not (tmp_path / "other").exists()


def test_leftovers_of_other_weights_are_not_mixed_in(
    network: Memory3LM, passages: References, tmp_path: Path
) -> None:
    folder = tmp_path / "generation"
    with pytest.raises(KeyboardInterrupt):
        compiled(folder, Counting(network, fails_at=5), passages)
    other = model(seed=1)
    changed = compiled(folder, other.encode, passages, settings=settings(weights="w1"))
    assert changed == compiled(tmp_path / "clean", other.encode, passages, settings=settings(weights="w1"))


def test_a_finished_generation_is_not_made_again(
    network: Memory3LM, passages: References, tmp_path: Path
) -> None:
    folder = tmp_path / "generation"
    compiled(folder, network.encode, passages)
    again = Counting(network)
    compiled(folder, again, passages)
    assert again.calls == 0


def test_a_failing_rank_publishes_nothing(network: Memory3LM, passages: References, tmp_path: Path) -> None:
    def run(team: Team) -> None:
        encode = Counting(network, fails_at=1 if team.rank else 10_000)
        compiled(tmp_path / "generation", encode, passages, team=team)

    with pytest.raises((KeyboardInterrupt, threading.BrokenBarrierError)):
        on_ranks(2, run)
    assert not (tmp_path / "generation").exists()


def test_a_shard_that_cannot_be_written_ends_the_compilation(
    network: Memory3LM, passages: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def full(path: Path, content: memoryview) -> None:
        if path.name == records_file(2):
            raise OSError("no space left on device")
        written.append(path)
        write_atomic(path, content)

    monkeypatch.setattr("memorybank.writer.write_atomic", full)
    with pytest.raises(OSError, match="no space"):
        compiled(tmp_path / "bank", network.encode, passages)
    assert records_file(1) in {path.name for path in written}
    assert not (tmp_path / "bank").exists()
    monkeypatch.undo()
    assert compiled(tmp_path / "bank", network.encode, passages) == compiled(
        tmp_path / "other", network.encode, passages
    )


def test_a_shard_is_written_while_the_next_one_is_encoded(
    network: Memory3LM, passages: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file takes until the second shard is in the making, and with it nothing gets ahead of the third."""
    of_shard = [threading.Event() for _ in range(5)]

    class Telling(Counting):
        def __call__(self, *arguments: Any) -> ExplicitMemory:
            of_shard[self.calls * BATCH // SHARD].set()
            return super().__call__(*arguments)

    def slow(path: Path, content: memoryview) -> None:
        if path.name == records_file(0):
            assert of_shard[1].wait(60), "the second shard waits for the first one's file"
            assert not of_shard[3].wait(0.3), "shards pile up while a file is written"
        write_atomic(path, content)

    monkeypatch.setattr("memorybank.writer.write_atomic", slow)
    assert records_file(0) in compiled(tmp_path / "bank", Telling(network), passages)


def test_ids_in_any_order_and_number(network: Memory3LM, passages: References, tmp_path: Path) -> None:
    ids = np.array([9, 3, 9, 5])
    compile_generation(
        network.encode, passages, ids, codec(), tmp_path / "g", settings=settings(), batch=BATCH
    )
    assert Generation.open(tmp_path / "g").ids.tolist() == [3, 5, 9]


def test_an_empty_bank_is_refused(network: Memory3LM, passages: References, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no reference to compile"):
        compile_generation(network.encode, passages, IDS[:0], codec(), tmp_path / "g", settings=settings())
