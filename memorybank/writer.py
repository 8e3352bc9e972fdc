"""References through the model into a generation, on all ranks.

Invariants: the bytes of a generation depend on the weights and the references alone, not on the number of
ranks or on interruptions: shards, and the batches within a shard, are cut at fixed places (a document that
lies in two shards is encoded for each), and every batch is full (the last one repeats some of its shard);
every rank encodes equally many batches, so that `encode` may be a collective (ZeRO-3); a shard appears whole
or not at all, and one that has appeared is not made again.

Not here: reading (store.py), what the model is given at once (windows.py), and which references an epoch
needs (train/continual.py).
"""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.files import is_finished, partial, publishing, write_atomic
from data.references import References
from memorybank.codec import Codec
from memorybank.store import IDS, KIND, VERSION, GenerationSettings, records_file
from memorybank.windows import Passages, cut_batches
from model.memory import ExplicitMemory

Ids = NDArray[np.int64]
Encode = Callable[..., ExplicitMemory]
"""`Memory3LM.encode` or its like: its arguments (`windows.EncodeBatch`) on the CPU to memories on any device."""


def compile_generation(
    encode: Encode,
    references: References,
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
    ids_N = np.unique(ids).astype(np.int64)
    if len(ids_N) == 0:
        raise ValueError(f"{folder}: no reference to compile; a bank needs at least one")
    stated = asdict(settings)
    inputs = {name: str(stated.pop(name)) for name in ("weights", "references", "tokenizer")}
    decided = {
        **stated,
        "codec": codec.name,
        "record_bytes": codec.record_bytes,
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
            num_batches = max(
                len(cut_batches(references, shards[shard], batch=batch, window_tokens=settings.window_tokens))
                for shard in dealt
            )
            shard = dealt[rank % len(dealt)]  # without a shard of its own, a rank encodes along for nothing
            records = encode_records(
                encode,
                references,
                shards[shard],
                codec,
                batch=batch,
                num_batches=num_batches,
                window_tokens=settings.window_tokens,
            )
            if rank < len(dealt):
                write_atomic(work / records_file(shard), records.numpy().tobytes())
            if progress is not None:
                progress(sum(len(shards[shard]) for shard in dealt))
        barrier()  # every shard is there
    barrier()  # the generation is published


@torch.no_grad()
def encode_records(
    encode: Encode,
    references: Passages,
    ids_N: Ids,
    codec: Codec,
    *,
    batch: int,
    num_batches: int | None = None,
    window_tokens: int | None = None,
) -> Tensor:
    """Return the records of references, uint8 (N, record_bytes) on the CPU.

    `ids_N` are distinct and ascending. `num_batches` asks for more batches than they need (`windows`): what is
    superfluous is encoded again, and dropped. `window_tokens` is that of `GenerationSettings`.
    """
    batches = cut_batches(references, ids_N, batch=batch, window_tokens=window_tokens)
    records = torch.empty((len(ids_N), codec.record_bytes), dtype=torch.uint8)
    for number in range(max(num_batches or 1, len(batches))):
        part = batches[number % len(batches)]
        made = codec.encode(encode(*part.arguments()))
        if number < len(batches):
            records[torch.from_numpy(part.positions_N)] = made[: len(part.positions_N)].cpu()
    return records


def _write_ids(path: Path, ids_N: Ids) -> None:
    buffer = BytesIO()
    np.save(buffer, ids_N)
    write_atomic(path, buffer.getvalue())
