"""References through the model into a generation, on all ranks.

Invariants: the bytes of a generation depend on the weights and the references alone, not on the number of
ranks or on interruptions: shards, and the batches within a shard, are cut at fixed places, and every batch is
full (the last one repeats its references); every rank encodes equally many batches, so that `encode` may be
a collective (ZeRO-3); a shard appears whole or not at all, and one that has appeared is not made again.

Not here: reading (store.py) and which references an epoch needs (train/continual.py).
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.files import is_finished, partial, publishing, write_atomic, writing
from data.references import ReferenceTokens
from memorybank.codec import Codec
from memorybank.store import IDS, KIND, VERSION, Generation, GenerationSettings, records_file
from model.memory import ExplicitMemory

Ids = NDArray[np.int64]
Encode = Callable[[Tensor, Tensor, Tensor], ExplicitMemory]
"""`Memory3LM.encode` or its like: (tokens_NR, lengths_N, titles_N) on the CPU to memories on any device."""


def compile_generation(
    encode: Encode,
    references: ReferenceTokens,
    ids: Ids,
    codec: Codec,
    folder: Path,
    *,
    settings: GenerationSettings,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    records_per_shard: int = 256,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Encode references and publish their records as a generation; every rank calls this.

    A generation that stands there already, made from the same, is left as it is; an interrupted one goes on
    after its last whole shard.

    Args:
        encode: the model's encoder, possibly a collective.
        references: their tokens.
        ids: the references that get a record; order and repetitions do not matter.
        codec: memories to bytes.
        folder: `<bank>/generation-<name>`, to be published.
        settings: what the generation is made from.
        rank: this process.
        world_size: processes that share the work.
        barrier: returns when every process has called it.
        records_per_shard: records in a file, and the unit that is dealt to ranks.
        batch: references encoded at once.
        progress: is told how many more records all ranks have finished.
    """

    def encoded(ids_N: Ids, num_batches: int) -> Iterator[Tensor]:
        yield from _encoded(encode, references, ids_N, codec, batch=batch, num_batches=num_batches)

    _publish(
        encoded,
        np.unique(ids).astype(np.int64),
        folder,
        settings=settings,
        codec_name=codec.name,
        record_bytes=codec.record_bytes,
        records_per_shard=records_per_shard,
        batch=batch,
        rank=rank,
        world_size=world_size,
        barrier=barrier,
        progress=progress,
    )


def copy_generation(
    records: Generation,
    read: Callable[[Ids], Tensor],
    ids: Ids,
    folder: Path,
    *,
    settings: GenerationSettings,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Publish a generation of records that were compiled before; nothing is encoded.

    Args:
        records: a generation whose codec, shards and batches the new one states.
        read: the records of references, uint8 (N, record_bytes).
        ids: the references that get a record.
        folder: to be published.
        settings: what the generation is made from.
        progress: is told how many more records are written.
    """

    def copied(ids_N: Ids, num_batches: int) -> Iterator[Tensor]:
        for begin in range(0, len(ids_N), records.batch):
            yield read(ids_N[begin : begin + records.batch])

    _publish(
        copied,
        ids,
        folder,
        settings=settings,
        codec_name=records.codec,
        record_bytes=records.record_bytes,
        records_per_shard=records.records_per_shard,
        batch=records.batch,
        progress=progress,
    )


def encode_records(
    encode: Encode, references: ReferenceTokens, ids_N: Ids, codec: Codec, *, batch: int
) -> Tensor:
    """Return the records of references, uint8 (N, record_bytes) on the CPU.

    Every batch is full: the last is filled up by repeating the references.
    """
    return torch.cat(list(_encoded(encode, references, ids_N, codec, batch=batch)))


@torch.no_grad()
def _encoded(
    encode: Encode,
    references: ReferenceTokens,
    ids_N: Ids,
    codec: Codec,
    *,
    batch: int,
    num_batches: int = 1,
) -> Iterator[Tensor]:
    """Yield the records of references batch by batch; `num_batches` may ask for more batches than they need.

    Batches are filled up by repeating the references; what is superfluous is encoded and dropped.
    """
    padded = np.resize(ids_N, batch * max(num_batches, -(-len(ids_N) // batch)))
    for begin in range(0, len(padded), batch):
        tokens_NR, lengths_N, titles_N = references.tokens(padded[begin : begin + batch])
        memory = encode(torch.from_numpy(tokens_NR), torch.from_numpy(lengths_N), torch.from_numpy(titles_N))
        yield codec.encode(memory).cpu()[: max(0, len(ids_N) - begin)]


def _publish(
    make: Callable[[Ids, int], Iterator[Tensor]],
    ids_N: Ids,
    folder: Path,
    *,
    settings: GenerationSettings,
    codec_name: str,
    record_bytes: int,
    records_per_shard: int,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Publish a generation whose records `make(ids, least number of batches)` yields batch by batch."""
    if len(ids_N) == 0:
        raise ValueError(f"{folder}: no reference to compile; a bank needs at least one")
    stated = asdict(settings)
    inputs = {name: str(stated.pop(name)) for name in ("weights", "references", "tokenizer")}
    decided = {
        **stated,
        "codec": codec_name,
        "record_bytes": record_bytes,
        "records_per_shard": records_per_shard,
        "batch": batch,
        "num_records": len(ids_N),
        "ids": hashlib.sha256(ids_N.tobytes()).hexdigest()[:16],
    }
    finished = is_finished(folder, kind=KIND, version=VERSION, settings=decided, inputs=inputs)
    barrier()  # nobody publishes before everybody has looked
    if finished:
        return
    publication = publishing(folder, kind=KIND, version=VERSION, settings=decided, inputs=inputs)
    with publication if rank == 0 else nullcontext(partial(folder)) as work:
        barrier()  # the work folder is there, and rid of what others left
        shards = [
            ids_N[begin : begin + records_per_shard] for begin in range(0, len(ids_N), records_per_shard)
        ]
        missing = [shard for shard in range(len(shards)) if not (work / records_file(shard)).exists()]
        barrier()  # nobody writes before everybody has seen the same shards missing
        if rank == 0:
            _write_ids(work / IDS, ids_N)
        if progress is not None:
            progress(len(ids_N) - sum(len(shards[shard]) for shard in missing))
        for first in range(0, len(missing), world_size):
            dealt = missing[first : first + world_size]
            num_batches = max(-(-len(shards[shard]) // batch) for shard in dealt)
            shard = dealt[rank % len(dealt)]  # without a shard of its own, a rank encodes along for nothing
            due, told = sum(len(shards[shard]) for shard in dealt), 0
            with writing(work / records_file(shard)) if rank < len(dealt) else nullcontext() as file:
                for done, records in enumerate(make(shards[shard], num_batches), start=1):
                    if file is not None:
                        file.write(records.numpy().data)
                    if progress is not None:
                        progress(due * done // num_batches - told)
                        told = due * done // num_batches
        barrier()  # every shard is there
    barrier()  # the generation is published


def _write_ids(path: Path, ids_N: Ids) -> None:
    buffer = BytesIO()
    np.save(buffer, ids_N)
    write_atomic(path, buffer.getvalue())
