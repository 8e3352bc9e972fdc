"""A library whose records are written by a quantiser: fitted to its own references, a piece of its own."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memorybank import codecs
from memorybank.bank import BankReader
from memorybank.codec import relative_errors
from memorybank.config import CodecConfig, CodecKind
from memorybank.edits import Editor
from memorybank.library import Library
from memorybank.record import MemoryShape
from memorybank.soundness import fetch, repair, verify
from memorybank.team import Team
from tests.support.memorybank import compiler, few_rounds, hashes, model, model_config, on_ranks, texts

SHAPE = MemoryShape.of(model_config())
SMALL = CodecConfig(kind=CodecKind.residual2x8_pq8x8)


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with few_rounds():
        yield


def editor(folder: Path, codec: CodecConfig | None = SMALL, *, seed: int = 0, **changes: object) -> Editor:
    given = {"folder": folder, "compiler": compiler(seed=seed, codec=codec), "references_per_segment": 20}
    return Editor(**(given | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "library"
    editor(folder).build(texts(0, 5))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "library")


def test_build_fits_a_quantiser_that_reads_what_was_written(built: Path) -> None:
    library = Library.open(built)
    assert library.record_bytes == SHAPE.record_bytes(10)
    assert library.shared.codec == "codec-000001-0000"
    fingerprint = library.manifest.inputs["codec-000001-0000"]
    assert library.settings.codec == f"OPQ16_64,Residual2x8,PQ8x8:{fingerprint}"
    codec = codecs.named(library.settings.codec, SHAPE, library.codec_folders)
    ids = library.live_ids()[:12]
    batch = BankReader(library, codec).batch(ids.reshape(1, 4, 3))
    with torch.no_grad():
        live = model().encode(*(torch.from_numpy(part) for part in library.tokens(ids)))
    assert torch.equal(batch.pool.index_NLGS, live.index_NLGS)
    keys, values = relative_errors(codec, live)
    assert max(keys + values) < 0.6  # an untrained model's vectors have little structure
    assert verify(built, compiler(codec=SMALL), sample=6) == []


def test_added_documents_are_written_with_the_same_quantiser(folder: Path) -> None:
    before = Library.open(folder)
    for codec, first in ((None, 5), (SMALL, 6)):
        editor(folder, codec).add(texts(first, first + 1))
        library = Library.open(folder)
        assert library.settings.codec == before.settings.codec
        assert library.shared == before.shared
    assert len(list(folder.glob("codec-*"))) == 1
    assert library.read(library.live_ids()).shape == (len(library), before.record_bytes)


def test_new_weights_are_fitted_anew_and_the_same_are_not(folder: Path) -> None:
    for codec in (None, SMALL):
        assert editor(folder, codec).refresh() == 1
    old = Library.open(folder)
    assert editor(folder, None, seed=1).refresh() == 2
    library = Library.open(folder)
    assert library.settings.weights == "w1"
    assert library.shared.codec == "codec-000002-0000"
    assert library.settings.codec != old.settings.codec
    assert library.settings.codec.split(":")[0] == old.settings.codec.split(":")[0]
    assert verify(folder, compiler(seed=1, codec=None), sample=6) == []
    old.close()
    editor(folder, CodecConfig(kind=CodecKind.int8), seed=1).refresh()
    library = Library.open(folder)
    assert (library.settings.codec, library.shared.codec) == ("int8", None)
    editor(folder, SMALL, seed=1).refresh()
    assert Library.open(folder).shared.codec == "codec-000004-0000"


def test_compact_keeps_the_quantiser(folder: Path) -> None:
    library = Library.open(folder)
    number = library.segments[0].document_numbers[:1]
    kept = np.setdiff1d(library.live_ids(), library.of_documents(number))
    records = library.read(kept)
    library.close()
    editor(folder).remove(number)
    editor(folder, None).compact()
    library = Library.open(folder)
    assert torch.equal(library.read(kept), records)
    assert library.shared.codec == "codec-000001-0000"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*library.piece_names(), "state-000003"])


def test_too_few_references_are_refused_and_say_how_many_are_needed(tmp_path: Path) -> None:
    paper = CodecConfig(kind=CodecKind.residual2x14_pq8x10)
    with pytest.raises(ValueError, match=r"needs 16,384 vectors to be trained, some 2\d\d references"):
        editor(tmp_path / "library", paper).build(texts(0, 2))
    with pytest.raises(ValueError, match="there is no bank"):
        Library.open(tmp_path / "library")


def test_a_damaged_quantiser_is_restored_from_a_copy_alone(folder: Path, built: Path) -> None:
    file = folder / "codec-000001-0000" / "vectors.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(bytes(content))
    problems = verify(folder)
    assert [problem.path for problem in problems] == [file]
    with pytest.raises(ValueError, match=f"{file}.*restore it from a copy with `memory3 bank fetch COPY"):
        repair(editor(folder), problems)
    assert fetch(built, folder, told=lambda *_: None) == (1, 1)
    assert hashes(folder) == hashes(built)


def test_damaged_records_are_made_again_with_the_quantiser(folder: Path, built: Path) -> None:
    file = folder / "records-000001-0000" / "records-00000.bin"
    file.write_bytes(b"")
    repair(editor(folder, None), verify(folder))
    assert hashes(folder) == hashes(built)


def test_a_fitted_build_is_byte_identical_on_two_ranks(built: Path, tmp_path: Path) -> None:
    shared = compiler(codec=SMALL)

    def run(team: Team) -> None:
        replace(editor(tmp_path / "library"), team=team, compiler=shared).build(texts(0, 5))

    on_ranks(2, run)
    made, expected = hashes(tmp_path / "library"), hashes(built)
    for found in (made, expected):
        del found["codec-000001-0000/manifest.json"]  # tells how long the training took
    assert made == expected
    assert Library.open(tmp_path / "library").fingerprint == Library.open(built).fingerprint
