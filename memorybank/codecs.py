"""Which codec a bank has: chosen by configuration when it is written, by its name when it is read.

    <bank>/codec-<kind>[-separate]-<weights>/     a quantiser (quantizer.py), one for each set of weights
    <library>/codec-SSSSSS-0000/                  the same, of a library

A quantiser belongs to the weights whose memories trained it: it is fitted when they first write records, on references
sampled uniformly from those that the bank may hold, and every generation of these weights uses it. Generations state
their codec's name, which for a quantiser ends in its fingerprint, and are read with that one or not at all.

Not here: what the coders do (codec.py, quantizer.py).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data.files import MANIFEST, is_finished, open_manifest
from data.references import ReferenceTokens
from memorybank import quantizer
from memorybank.codec import Codec, Floats, Integers, VectorCoder
from memorybank.config import STAGES, CodecConfig, CodecKind
from memorybank.record import MemoryShape
from memorybank.store import MAKE_ANEW, GenerationSettings
from memorybank.team import ALONE, Team, seen_by_first
from memorybank.writer import Encode, encode_records

log = logging.getLogger(__name__)

Ids = NDArray[np.int64]
LEAST_SAMPLED = 1024
"""References sampled at least (if there are so many), however many vectors each gives."""
MOST_HELD_OUT = 256
"""References kept from training, a tenth of all at most, to measure the error on."""


def of_kind(kind: CodecKind, shape: MemoryShape, dtype: torch.dtype = torch.bfloat16) -> Codec:
    """Return a codec that needs no training.

    Args:
        kind: one outside `STAGES`.
        shape: of a memory.
        dtype: the type that the model computes in.
    """
    head_size = shape.head_size
    coder: VectorCoder
    match kind:
        case CodecKind.model:
            coder = Floats(dtype, head_size)
        case CodecKind.float16:
            coder = Floats(torch.float16, head_size)
        case CodecKind.float8:
            coder = Floats(torch.float8_e4m3fn, head_size)
        case CodecKind.int8:
            coder = Integers(8, head_size)
        case CodecKind.int4:
            coder = Integers(4, head_size)
        case _:
            raise AssertionError(f"{kind.name} has to be fitted")
    return Codec(shape, coder)


def named(name: str, shape: MemoryShape, folders: Sequence[Path]) -> Codec:
    """Return the codec that a generation states.

    Args:
        name: the codec's.
        shape: of a memory.
        folders: where its quantiser may stand, if it is one (`folders_of`, `Library.codec_folders`).

    Raises:
        ValueError: there is none of this name, or it is damaged.
    """
    types = (torch.bfloat16, torch.float32, torch.float64)
    fixed = [of_kind(CodecKind.model, shape, dtype) for dtype in types]
    fixed += [of_kind(kind, shape) for kind in CodecKind if kind not in STAGES]
    for codec in fixed:
        if codec.name == name:
            return codec
    return quantizer.open_codec(folder_of(name, folders), shape)


def folder_of(name: str, folders: Sequence[Path]) -> Path:
    """Return the one of these folders in which the quantiser of this name stands.

    They are opened by their names: what a shared file system lists lags between hosts (team.py).

    Raises:
        ValueError: it is in none of them.
    """
    found = {}
    for folder in folders:
        if (folder / MANIFEST).is_file():
            manifest = open_manifest(folder, kind=quantizer.KIND, version=quantizer.VERSION)
            found[quantizer.codec_name(manifest)] = folder
    if name not in found:
        where = f"{folders[0].parent}: " if folders else ""
        raise ValueError(
            f"{where}memories were written with the codec {name}, which is not there (found: "
            f"{', '.join(found) or 'none'}); restore its folder, or make the memories anew: {MAKE_ANEW}"
        )
    return found[name]


def folders_of(weights: str, bank: Path) -> list[Path]:
    """Return where quantisers of these weights may stand below the bank of a run."""
    configs = [CodecConfig(kind=kind, separate=separate) for kind in STAGES for separate in (False, True)]
    return [_folder(config, weights, bank) for config in configs]


def _folder(config: CodecConfig, weights: str, bank: Path) -> Path:
    return bank / f"codec-{config.kind.name}{'-separate' if config.separate else ''}-{weights}"


def obtain(
    config: CodecConfig,
    shape: MemoryShape,
    dtype: torch.dtype,
    bank: Path,
    *,
    encode: Encode,
    references: ReferenceTokens,
    ids: Ids,
    settings: GenerationSettings,
    team: Team = ALONE,
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    batch: int = 64,
) -> Codec:
    """Return the codec to write a bank with; a quantiser that these weights do not have yet is fitted first.

    Every rank calls this: all encode the sample, and the first one trains and publishes.

    Args:
        config: which codec.
        shape: of a memory.
        dtype: the type that the model computes in.
        bank: folder of generations, and of the quantisers.
        encode: the model's encoder, possibly a collective.
        references: their tokens.
        ids: the references that the bank may hold, from which the sample is drawn.
        settings: what generations are made from.
        team: the processes that share the work; the first one trains.
        alone: wraps the training, while all other processes wait.
        batch: references encoded at once.

    Raises:
        ValueError: there are too few references to train it.
    """
    if config.kind not in STAGES:
        return of_kind(config.kind, shape, dtype)
    folder = _folder(config, settings.weights, bank)
    ids = np.unique(ids)

    def sampled() -> tuple[Ids, Ids]:
        held_out, sample = draw(config, shape, len(ids))
        return ids[held_out], ids[sample]

    return fitted(
        config,
        shape,
        dtype,
        folder,
        encode=encode,
        references=references,
        sampled=sampled,
        inputs={"weights": settings.weights},
        team=team,
        alone=alone,
        batch=batch,
        window_tokens=settings.window_tokens,
    )


def fitted(
    config: CodecConfig,
    shape: MemoryShape,
    dtype: torch.dtype,
    folder: Path,
    *,
    encode: Encode,
    references: ReferenceTokens,
    sampled: Callable[[], tuple[Ids, Ids]],
    inputs: Mapping[str, str],
    team: Team = ALONE,
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    batch: int = 64,
    window_tokens: int | None = None,
) -> Codec:
    """Return the quantiser that stands in `folder`, which is fitted first if it is not there; every rank calls this.

    Args:
        config: which quantiser.
        shape: of a memory.
        dtype: the type that the model computes in.
        folder: where it stands, or shall stand.
        encode: the model's encoder, possibly a collective.
        references: their tokens.
        sampled: draws the references to measure its error on, and those to train it on, ascending.
        inputs: fingerprints of what the memories are made from.
        team: the processes that share the work; the first one trains.
        alone: wraps the training, while all other processes wait.
        batch: references encoded at once.
        window_tokens: that of `GenerationSettings`.

    Raises:
        ValueError: there are too few references to train it.
    """
    stated = quantizer.identity(config.kind, shape.head_size, separate=config.separate)
    kind, version = quantizer.KIND, quantizer.VERSION
    if not seen_by_first(
        team, lambda: is_finished(folder, kind=kind, version=version, settings=stated, inputs=inputs)
    ):
        plain = of_kind(CodecKind.model, shape, dtype)
        held_out, sample = (
            plain.decode(
                encode_records(encode, references, some, plain, batch=batch, window_tokens=window_tokens)
            )
            for some in sampled()
        )
        # On every rank, so that every rank refuses.
        vectors = quantizer.training_vectors(config.kind, sample, separate=config.separate)
        if team.rank == 0:
            num = f"{len(sample.index_NLGS):,}"
            log.info("%s: training on the memories of %s references, once for these weights", folder, num)
            with alone():
                quantizer.fit(folder, config.kind, shape, vectors, held_out, inputs=inputs)
        team.barrier()  # it is published
    return quantizer.open_codec(folder, shape)


def draw(config: CodecConfig, shape: MemoryShape, num: int) -> tuple[Ids, Ids]:
    """Return which of `num` references, drawn uniformly, a quantiser's error is measured on, and it is trained on.

    Both ascend; nothing as large as `num` is held.
    """
    each = shape.num_kept * (1 if config.separate else 2)
    # A tenth more than whole references would need: short ones give fewer vectors.
    wanted = max(LEAST_SAMPLED, -(-quantizer.advised_vectors(config.kind) * 11 // (10 * each)))
    held_out = min(MOST_HELD_OUT, -(-(num - 1) // 10))
    drawn = np.random.default_rng(0).choice(num, min(held_out + wanted, num), replace=False).astype(np.int64)
    return np.sort(drawn[:held_out]), np.sort(drawn[held_out:])
