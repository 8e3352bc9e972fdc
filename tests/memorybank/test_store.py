import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.files import BLOCK_BYTES, MANIFEST, verify
from data.references import References
from memorybank.store import Generation, records_file
from memorybank.writer import compile_generation, encode_records
from tests.support.memorybank import codec, model, model_config, settings


@pytest.fixture(scope="module")
def folder(passages: References, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generation without every third reference; more than one block of checksums in its first shard."""
    folder = tmp_path_factory.mktemp("bank") / "generation-0"
    ids = np.flatnonzero(np.arange(len(passages)) % 3 != 1)
    assert 150 * codec().record_bytes > 1.1 * BLOCK_BYTES
    compile_generation(
        model().encode, passages, ids, codec(), folder, settings=settings(), records_per_shard=150, batch=16
    )
    return folder


def test_a_record_is_exactly_as_long_as_the_manifest_says(folder: Path) -> None:
    stated = json.loads((folder / MANIFEST).read_text())["settings"]
    sizes = [path.stat().st_size for path in folder.glob("records-*.bin")]
    assert sum(sizes) == stated["num_records"] * stated["record_bytes"]
    assert stated["record_bytes"] == codec().record_bytes == Generation.open(folder).record_bytes
    assert verify(folder) == []


def test_records_come_in_the_order_asked_for(folder: Path, passages: References) -> None:
    generation = Generation.open(folder)
    ids = np.array([30, 0, 3, 30, generation.ids[-1]])
    records = generation.read(ids)
    assert records.shape == (5, generation.record_bytes)
    assert torch.equal(records[0], records[3])
    made = encode_records(model().encode, passages, generation.ids[:21], codec(), batch=16)
    assert torch.equal(records[[1, 2]], made[[0, 2]])
    assert torch.equal(records[0], made[-1])
    assert len(generation.read(ids[:0])) == 0


def test_it_says_what_it_holds(folder: Path, passages: References) -> None:
    generation = Generation.open(folder)
    assert 3 in generation
    assert 4 not in generation
    assert generation.has(np.array([0, 1, 2, 3])).tolist() == [True, False, True, True]
    assert len(generation) == len(passages) - len(range(1, len(passages), 3))
    assert generation.settings == settings()


def test_a_reference_without_memory_is_an_error_not_another_memory(
    folder: Path, passages: References
) -> None:
    generation = Generation.open(folder)
    for absent in (4, len(passages) + 5, -1):
        with pytest.raises(ValueError, match=rf"no memory of 1 of 2.*first: {absent}.*memory3 bank refresh"):
            generation.read(np.array([0, absent]))


LAYOUT = model_config().layout()


@pytest.mark.parametrize(
    ("key", "expected", "named"),
    [
        ("weights", "w1", "weights is w0, but w1"),
        ("tokenizer", "t1", "tokenizer is t0, but t1"),
        ("references", "r1", "references is r0, but r1"),
        ("codec", "float32", "codec is bfloat16, but float32"),
        ("step", 8, "step is 7, but 8"),
        ("lineage", "other", "lineage is run, but other"),
        ("context", "document", "context is reference, but document"),
        ("window_tokens", 512, "window_tokens is None, but 512"),
        ("layout", LAYOUT | {"rope_base": 5e5}, r"layout\.rope_base is 10000\.0, but 500000\.0"),
        ("layout", LAYOUT | {"tokens_kept": 4}, r"layout\.tokens_kept is 8, but 4"),
        ("layout", LAYOUT | {"prefix_ids": [1]}, r"layout\.prefix_ids"),
        (
            "layout",
            {k: v for k, v in LAYOUT.items() if k != "rope_base"},
            r"layout\.rope_base is 10000\.0, but None",
        ),
    ],
)
def test_another_generation_is_refused_by_name(folder: Path, key: str, expected: object, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}.*memory3 bank refresh"):
        Generation.open(folder, expect={key: expected})


def test_the_expected_generation_opens(folder: Path) -> None:
    expect = {
        "layout": LAYOUT,
        "weights": "w0",
        "tokenizer": "t0",
        "references": "r0",
        "codec": "bfloat16",
        "step": 7,
    }
    Generation.open(folder, expect=expect)


def test_a_flipped_byte_is_found_when_its_block_is_read(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / folder.name
    shutil.copytree(folder, damaged)
    shard = damaged / records_file(0)
    content = bytearray(shard.read_bytes())
    content[BLOCK_BYTES + 17] ^= 4
    shard.write_bytes(bytes(content))
    generation = Generation.open(damaged)
    assert torch.equal(generation.read(generation.ids[:2]), Generation.open(folder).read(generation.ids[:2]))
    beyond = BLOCK_BYTES // generation.record_bytes + 1
    with pytest.raises(ValueError, match=rf"{records_file(0)}: block 1"):
        generation.read(generation.ids[beyond : beyond + 1])
    assert verify(damaged) == [records_file(0)]


def test_a_truncated_shard_and_an_unfinished_generation_do_not_open(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / folder.name
    shutil.copytree(folder, damaged)
    with (damaged / records_file(0)).open("r+b") as shard:
        shard.truncate(1000)
    with pytest.raises(ValueError, match=records_file(0)):
        Generation.open(damaged)
    (damaged / MANIFEST).unlink()
    with pytest.raises(ValueError, match="no generation"):
        Generation.open(damaged)
