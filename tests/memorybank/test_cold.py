"""Cold start: encoded once, kept across processes, trusted after any kill."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data.files import MANIFEST
from data.references import References
from memorybank import cold
from memorybank.bank import BankReader
from memorybank.cold import BATCH, ENTRIES, ENTRY, RECORDS, ColdRecords, ColdStart, opened_stores, stores
from memorybank.store import Generation
from memorybank.writer import compile_generation
from model.transformer import Memory3LM
from tests.support.memorybank import codec, settings
from tests.support.spawn import spawn

PLENTY = 2**30
BYTES = codec().record_bytes


class Encoder:
    """The model's encoder, which counts its calls."""

    def __init__(self, network: Memory3LM) -> None:
        self.calls = 0
        self._network = network

    def __call__(self, *arguments: torch.Tensor) -> object:
        self.calls += 1
        return self._network.encode(*arguments)


def obtain(bank: Path, *, max_bytes: int = PLENTY, **changes: object) -> ColdRecords:
    return ColdRecords.obtain(bank, settings(**changes), codec(), max_bytes=max_bytes)


def made(ids_N: np.ndarray) -> torch.Tensor:
    """Records that say whose they are."""
    return torch.stack(
        [torch.from_numpy(np.random.default_rng(id).integers(0, 256, BYTES, np.uint8)) for id in ids_N]
    )


def refuse(ids_N: np.ndarray) -> torch.Tensor:
    raise AssertionError(f"{ids_N} were kept already")


def test_a_second_process_encodes_nothing(tmp_path: Path, network: Memory3LM, passages: References) -> None:
    first = Encoder(network)
    ids_BCK = np.array([[[-1, 3, 9], [40, 3, -1]]])
    read = BankReader(ColdStart(obtain(tmp_path), first, passages, codec()), codec()).batch(ids_BCK)
    assert first.calls == 1
    second = Encoder(network)
    again = ColdStart(obtain(tmp_path), second, passages, codec())
    found = BankReader(again, codec()).batch(ids_BCK)
    assert second.calls == 0
    assert torch.equal(found.pool.k_NLGSE, read.pool.k_NLGSE)
    assert torch.equal(found.pool.v_NLGSE, read.pool.v_NLGSE)
    assert torch.equal(found.pool.index_NLGS, read.pool.index_NLGS)
    again.read(np.array([40, 7]))
    assert second.calls == 1


def test_warm_start_equals_cold_start_whoever_was_encoded_with_whom(
    tmp_path: Path, network: Memory3LM, passages: References
) -> None:
    ids = np.array([2, 4, 7, 9, 11, 20])
    compile_generation(
        network.encode, passages, ids, codec(), tmp_path / "warm", settings=settings(), batch=BATCH
    )
    warm = Generation.open(tmp_path / "warm").read(ids)
    together = ColdStart(obtain(tmp_path / "a"), network.encode, passages, codec())
    alone = ColdStart(obtain(tmp_path / "b"), network.encode, passages, codec())
    assert torch.equal(together.read(ids), warm)
    for id in ids[::-1]:
        assert torch.equal(alone.read(np.array([id])), warm[ids == id])


def test_records_come_in_the_order_asked_for_and_repeat(tmp_path: Path) -> None:
    kept = obtain(tmp_path)
    kept.keep(np.array([8, 2]), made)
    kept.keep(np.array([2, 5]), made)
    assert kept.has(np.array([1, 2, 5, 8, 9])).tolist() == [False, True, True, True, False]
    asked = np.array([5, 8, 2, 5])
    assert torch.equal(kept.read(asked), made(asked))
    assert len(kept) == 3
    assert (kept.folder / RECORDS).stat().st_size == 3 * BYTES


def test_whatever_a_kill_left_behind_is_not_read_and_written_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every state on the way of an append: part of the records, all of them, and entries up to any byte."""
    whole = obtain(tmp_path)
    whole.keep(np.array([1, 2]), made)
    before = [(whole.folder / name).stat().st_size for name in (RECORDS, ENTRIES)]
    whole.keep(np.array([3, 4]), made)
    records, entries = ((whole.folder / name).read_bytes() for name in (RECORDS, ENTRIES))
    states = [(size, before[1]) for size in (before[0], before[0] + 1, before[0] + BYTES, len(records) - 1)]
    states += [(len(records), size) for size in range(before[1], len(entries) + 1)]
    for number, (record_size, entry_size) in enumerate(states):
        bank = tmp_path / str(number)
        folder = bank / whole.folder.name
        folder.mkdir(parents=True)
        shutil.copy(whole.folder / MANIFEST, folder)
        (folder / RECORDS).write_bytes(records[:record_size])
        (folder / ENTRIES).write_bytes(entries[:entry_size])
        kept = obtain(bank)
        assert len(kept) == entry_size // ENTRY.itemsize
        known = np.array([1, 2, 3, 4])[: len(kept)]
        assert torch.equal(kept.read(known), made(known))
        kept.keep(np.array([3, 4]), made)
        everything = np.array([1, 2, 3, 4])
        for reader in (kept, obtain(bank)):
            assert torch.equal(reader.read(everything), made(everything))
        assert (folder / RECORDS).stat().st_size == len(records)
        assert (folder / ENTRIES).read_bytes() == entries
    assert caplog.records == []


def test_an_entry_that_is_not_whole_hides_what_follows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = obtain(tmp_path)
    kept.keep(np.arange(4), made)
    content = bytearray((kept.folder / ENTRIES).read_bytes())
    content[ENTRY.itemsize + 3] ^= 1
    (kept.folder / ENTRIES).write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        reopened = obtain(tmp_path)
    assert "3 entries from entry 1 on are not whole" in caplog.text
    assert reopened.has(np.arange(4)).tolist() == [True, False, False, False]
    reopened.keep(np.arange(4), made)
    assert torch.equal(obtain(tmp_path).read(np.arange(4)), made(np.arange(4)))


def test_a_damaged_record_is_refused_by_name(tmp_path: Path) -> None:
    kept = obtain(tmp_path)
    kept.keep(np.array([5, 6, 7]), made)
    content = bytearray((kept.folder / RECORDS).read_bytes())
    content[BYTES + 17] ^= 4
    (kept.folder / RECORDS).write_bytes(bytes(content))
    assert torch.equal(kept.read(np.array([5, 7])), made(np.array([5, 7])))
    with pytest.raises(
        ValueError, match=rf"{RECORDS}: record 1, of reference 6, is damaged.*delete {kept.folder}"
    ):
        kept.read(np.array([6]))


def _keep(bank: Path) -> None:
    kept = obtain(bank)
    begin = 10 * int(os.environ["RANK"])
    for first in range(begin, begin + 20):
        kept.keep(np.arange(first, first + 4), made)


def test_two_processes_keep_each_reference_once(tmp_path: Path) -> None:
    reader = obtain(tmp_path)
    spawn(_keep, tmp_path, world_size=2)
    reader.keep(np.arange(33), refuse)  # opened before, it learns of what others kept
    assert len(reader) == 33
    assert torch.equal(reader.read(np.arange(33)), made(np.arange(33)))
    assert (reader.folder / RECORDS).stat().st_size == 33 * BYTES


def test_a_store_is_of_one_identity_and_those_of_other_weights_go_when_nobody_reads_them(
    tmp_path: Path,
) -> None:
    one = obtain(tmp_path)
    one.keep(np.arange(2), made)
    assert len(obtain(tmp_path, context="document")) == 0
    assert len(obtain(tmp_path, references="r1")) == 0
    assert len(stores(tmp_path)) == 3  # of the same weights
    other = obtain(tmp_path, weights="w1")
    assert set(stores(tmp_path)) == {one.folder, other.folder}  # one is still open here
    one.close()
    assert len(obtain(tmp_path, weights="w2")) == 0
    assert one.folder not in stores(tmp_path)
    assert torch.equal(made(np.arange(2)), made(np.arange(2)))


@pytest.mark.parametrize("left", ["a folder", "a manifest", "nothing"])
def test_a_store_that_goes_before_it_is_held_is_begun_again(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, original, calls = obtain(tmp_path).folder, cold.hold, []

    def hold(path: Path) -> int:
        calls.append(path)
        if len(calls) == 1:  # as delete_artefact goes about it
            (folder / MANIFEST).unlink()
            if left == "nothing":
                shutil.rmtree(folder)
            elif left == "a manifest":  # and another process began it
                obtain(tmp_path)
        return original(path)

    monkeypatch.setattr(cold, "hold", hold)
    again = obtain(tmp_path)
    again.keep(np.arange(2), made)
    assert len(obtain(tmp_path)) == 2


def test_of_all_stores_those_that_are_damaged_or_gone_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, damaged, gone = (obtain(tmp_path, references=f"r{number}").folder for number in range(3))
    (damaged / MANIFEST).write_text("{")
    listed = cold.stores
    monkeypatch.setattr(cold, "stores", lambda bank: [*listed(bank), tmp_path / "cold-w-gone"])
    shutil.rmtree(gone)
    assert [kept.folder for kept in opened_stores(tmp_path)] == [whole]
    (said,) = caplog.messages
    assert said.startswith(f"{damaged / MANIFEST} cannot be read")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace('"version": 1', '"version": 9'), r"is \('cold', 9\), but \('cold', 1\)"),
        (lambda text: text.replace('"step": 7', '"step": 8'), "is not what the folder is named after"),
        (lambda text: text[:40], "cannot be read"),
    ],
)
def test_another_or_damaged_manifest_is_refused(
    damage: Callable[[str], str], said: str, tmp_path: Path
) -> None:
    folder = obtain(tmp_path).folder
    (folder / MANIFEST).write_text(damage((folder / MANIFEST).read_text()))
    with pytest.raises(ValueError, match=rf"{said}.*; delete {folder}: its memories are encoded again"):
        obtain(tmp_path)


def test_a_full_store_keeps_what_it_has_and_the_rest_is_encoded_again(
    tmp_path: Path, network: Memory3LM, passages: References, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder(network)
    start = ColdStart(obtain(tmp_path, max_bytes=3 * BYTES + 5), encoder, passages, codec())
    ids = np.array([10, 11, 12, 13, 14])
    first = start.read(ids)
    again = start.read(ids)
    assert torch.equal(first, again)
    assert torch.equal(first, ColdStart(None, network.encode, passages, codec()).read(ids))
    assert encoder.calls == 3  # three are kept, the other two are encoded at each read
    assert len(obtain(tmp_path)) == 3
    assert caplog.text.count("is full with 3 memories") == 1
    assert "raise bank.cold_gib" in caplog.text


def test_many_references_are_kept_part_by_part(
    tmp_path: Path, network: Memory3LM, passages: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "KEPT_AT_ONCE", 4)
    encoder = Encoder(network)
    start = ColdStart(obtain(tmp_path), encoder, passages, codec())
    start.compile(np.arange(3))
    told: list[int] = []
    start.compile(np.array([9, 1, 2, 3, 3, 4, 5, 6, 7, 8]), progress=told.append)
    assert told == [2, 4, 3]
    assert encoder.calls == 3
    assert len(obtain(tmp_path)) == 10


def test_a_full_disk_is_said_in_one_line_and_leaves_what_was_kept(
    tmp_path: Path, network: Memory3LM, passages: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ColdStart(obtain(tmp_path), network.encode, passages, codec())
    start.read(np.array([1, 2]))

    def full(descriptor: int, content: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cold.os, "pwrite", full)
        with pytest.raises(
            ValueError, match=r"cannot be written: .*No space left on device; make room"
        ) as refused:
            start.read(np.array([3]))
    assert "\n" not in str(refused.value)
    assert len(obtain(tmp_path)) == 2
    start.read(np.array([1, 2, 3]))
    assert len(obtain(tmp_path)) == 3
