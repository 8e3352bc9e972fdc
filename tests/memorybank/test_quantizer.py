"""The product quantisers against faiss, on vectors with structure (products of a few directions)."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from memorybank import quantizer
from memorybank.codec import Codec, relative_errors
from memorybank.config import STAGES, CodecKind
from memorybank.quantizer import (
    ProductQuantizer,
    factory,
    fit,
    min_vectors,
    open_codec,
    train,
    training_vectors,
)
from memorybank.record import MemoryShape
from model.memory import ExplicitMemory

SHAPE = MemoryShape(num_layers=2, num_kv_heads=2, tokens_kept=4, head_size=16)
PAPER = MemoryShape(num_layers=22, num_kv_heads=8, tokens_kept=8, head_size=80)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train with few rounds."""
    monkeypatch.setattr(quantizer, "_ROUNDS", 3)
    monkeypatch.setattr(quantizer, "_OPQ_ROUNDS", 3)


def vectors(n: int, size: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((size // 2, size))
    return (rng.standard_normal((n, size // 2)) @ mixing).astype(np.float32)


def memory(n: int, seed: int = 0) -> ExplicitMemory:
    """Memories, every fourth of a reference that was too short for more than one token."""
    size = (n, SHAPE.num_layers, SHAPE.num_kv_heads, SHAPE.tokens_kept)
    k, v = (
        torch.from_numpy(vectors(n * SHAPE.num_kept, 16, seed=2 * seed + part)).view(*size, 16)
        for part in (0, 1)
    )
    index = torch.arange(4).expand(size).clone()
    index[::4, ..., 1:] = -1
    return ExplicitMemory(k, v * 3 + 1, index)


@cache
def random_index(name: str, size: int) -> Any:
    """A faiss index as trained, but with random numbers: 2 x 2^14 centroids take minutes to train."""
    rng = np.random.default_rng(5)
    index = faiss.index_factory(size, name)
    rotation, *quantizers = quantizer._parts(index)
    matrix = np.linalg.qr(rng.standard_normal((size, size)))[0].astype(np.float32)
    faiss.copy_array_to_vector(matrix.ravel(), rotation.A)
    rotation.is_trained = rotation.is_orthonormal = True
    inner = faiss.downcast_index(index.index)
    for quantized in quantizers:
        centroids = rng.standard_normal(quantized.M * quantized.ksub * quantized.dsub).astype(np.float32)
        faiss.copy_array_to_vector(centroids, quantized.centroids)
    if isinstance(inner, faiss.Index2Layer):
        coarse = faiss.downcast_index(inner.q1.quantizer)
        coarse.is_trained, coarse.ntotal = True, 1 << coarse.pq.M * coarse.pq.nbits
    inner.is_trained = index.is_trained = True
    return index


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("kind", STAGES)
def test_codes_and_vectors_are_those_of_faiss(kind: CodecKind, size: int) -> None:
    name = factory(kind, size)
    index = random_index(name, size)
    coder = ProductQuantizer.of_faiss(name, index)
    assert coder.vector_bytes == index.sa_code_size()
    x = vectors(300, size)
    theirs = index.sa_encode(x)
    ours = coder.encode(torch.from_numpy(x))
    assert ours.dtype == torch.uint8
    assert (ours.numpy() == theirs).all(axis=1).mean() > 0.98  # ties, within rounding
    decoded = coder.decode(torch.from_numpy(theirs))
    np.testing.assert_allclose(decoded.numpy(), index.sa_decode(theirs), atol=1e-4)
    # Where the codes differ, the vectors are as near.
    far_ours, far_theirs = (
        (coder.decode(codes) - torch.from_numpy(x)).square().sum(1)
        for codes in (ours, torch.from_numpy(theirs))
    )
    torch.testing.assert_close(far_ours.mean(), far_theirs.mean(), rtol=1e-3, atol=0)


def test_names_are_the_paper_s() -> None:
    assert factory(CodecKind.residual2x14_pq8x10, 80) == "OPQ20_80,Residual2x14,PQ8x10"
    assert factory(CodecKind.residual2x14_pq8x10, 64) == "OPQ16_64,Residual2x14,PQ8x10"
    assert factory(CodecKind.residual2x8_pq8x8, 80) == "OPQ20_80,Residual2x8,PQ8x8"
    assert factory(CodecKind.pq16x8, 80) == "OPQ16_80,PQ16x8"


def test_bytes_of_the_paper_s_memory() -> None:
    """450,560 bytes in bfloat16, 39,424 through the quantiser (sections 3.1 and 3.3); a record adds 1,408."""
    assert PAPER.memory_bytes(160) == 450_560
    name = factory(CodecKind.residual2x14_pq8x10, 80)
    codec = Codec(PAPER, ProductQuantizer.of_faiss(name, random_index(name, 80)))
    assert codec.memory_bytes == 39_424
    assert codec.record_bytes == 39_424 + 1_408


def test_encoding_does_not_depend_on_how_many_vectors_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name = factory(CodecKind.residual2x8_pq8x8, 64)
    coder = ProductQuantizer.of_faiss(name, random_index(name, 64))
    x = torch.from_numpy(vectors(100, 64))
    whole = coder.encode(x)
    monkeypatch.setattr(quantizer, "_SCORES_AT_ONCE", 8 * 256 * 7)
    assert torch.equal(coder.encode(x), whole)
    assert coder.encode(x[:0]).shape == (0, 10)
    assert coder.decode(whole[:0]).shape == (0, 64)


@pytest.mark.parametrize("separate", [False, True])
def test_a_fitted_codec_is_published_and_opened_by_its_fingerprint(separate: bool, tmp_path: Path) -> None:
    kind, held_out = CodecKind.residual2x8_pq8x8, memory(20, seed=1)
    sets = training_vectors(kind, memory(40), separate=separate)
    assert {part: x.shape for part, x in sets.items()} == (
        # A quarter of the references keep one token of four.
        {"keys": (520, 16), "values": (520, 16)} if separate else {"vectors": (1040, 16)}
    )
    fit(tmp_path / "codec", kind, SHAPE, sets, held_out, inputs={"weights": "w0"})
    codec, again = open_codec(tmp_path / "codec", SHAPE), open_codec(tmp_path / "codec", SHAPE)
    assert codec.name == again.name
    assert codec.name.startswith("OPQ4_16,Residual2x8,PQ8x8:")
    records = codec.encode(held_out)
    assert records.shape == (20, SHAPE.record_bytes(10))
    assert torch.equal(records, again.encode(held_out))
    decoded = codec.decode(records)
    assert torch.equal(decoded.index_NLGS, held_out.index_NLGS)
    manifest = quantizer.open_manifest(tmp_path / "codec", kind="codec", version=1)
    stated = manifest.extra["held_out_error_keys"], manifest.extra["held_out_error_values"]
    for found, expected in zip(stated, relative_errors(codec, held_out), strict=True):
        assert found == pytest.approx(expected)
    assert all(error < 0.15 for errors in stated for error in errors)
    assert manifest.inputs == {"weights": "w0"}
    with pytest.raises(ValueError, match=r"vectors of 16 numbers, and model\.head_size=80"):
        open_codec(tmp_path / "codec", PAPER)
    damaged = next((tmp_path / "codec").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        open_codec(tmp_path / "codec", SHAPE)


def test_too_few_vectors_are_refused_with_the_number_of_references_needed() -> None:
    """40 references of 2 * 2 * 2 * 4 = 32 vectors at most, here 26 on the average."""
    message = (
        r"codec\.kind=residual2x14_pq8x10 needs 16,384 vectors to be trained, some 631 references; the 40 sampled "
        r"ones give 1,040: add documents, or set codec\.kind=pq16x8 \(256 vectors\) or int8 \(none\)"
    )
    with pytest.raises(ValueError, match=message):
        training_vectors(CodecKind.residual2x14_pq8x10, memory(40))
    with pytest.raises(ValueError, match=r"some 1,261 references; the 40 sampled ones give 520"):
        training_vectors(CodecKind.residual2x14_pq8x10, memory(40), separate=True)
    assert min_vectors(CodecKind.pq16x8) == 256


def test_less_than_the_usual_advice_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        training_vectors(CodecKind.pq16x8, memory(40))
    assert (
        "pq16x8: 1,040 vectors of 40 references to train on; usual advice is 9,984 vectors, some 384 references"
        in caplog.text
    )
    caplog.clear()
    sets = training_vectors(CodecKind.pq16x8, memory(500))
    assert not caplog.records
    assert sets["vectors"].shape == (9984, 16)  # no more than the advice


def test_training_says_nothing_and_is_repeatable(capfd: pytest.CaptureFixture[str]) -> None:
    name = factory(CodecKind.residual2x8_pq8x8, 16)
    first, second = (ProductQuantizer.of_faiss(name, train(name, vectors(300, 16))) for _ in range(2))
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)
    assert capfd.readouterr() == ("", "")
