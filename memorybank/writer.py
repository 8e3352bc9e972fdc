"""References through the model into a generation, on all ranks.

Invariants: the bytes of a generation depend on the weights and the references alone, not on the number of
ranks or on interruptions: shards, and the batches within a shard, are cut at fixed places (a document that
lies in two shards is encoded for each), and every batch is full (the last one repeats some of its shard);
every rank encodes equally many batches, so that `encode` may be a collective (ZeRO-3); a shard appears whole
or not at all, and one that has appeared is not made again; which ones have is what the first rank sees.

Not here: reading (store.py), what the model is given at once (windows.py), and which references an epoch
needs (train/continual.py).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.files import is_finished, partial, publishing, write_atomic
from data.references import ReferenceTokens
from memorybank.codec import Codec
from memorybank.store import IDS, KIND, VERSION, Generation, GenerationSettings, records_file
from memorybank.team import ALONE, Team, seen_by_first, wait_to_see
from memorybank.windows import EncodeBatch, cut_batches
from model.memory import ExplicitMemory
from model.transfer import fetched

Ids = NDArray[np.int64]

Item = TypeVar("Item")

BATCH = 64
"""References encoded at once on a CPU, unless another number is asked for."""

BATCH_BESIDE = 256
"""The same on any other device, which fewer would not keep busy: a shard of records."""

Encode = Callable[..., ExplicitMemory]
"""`Memory3LM.encode` or its like: its arguments (`windows.EncodeBatch`) on the CPU to memories on any device."""


def batch_for(device: torch.device) -> int:
    """Return how many references are encoded at once on a device."""
    return BATCH if device.type == "cpu" else BATCH_BESIDE


def compile_generation(
    encode: Encode,
    references: ReferenceTokens,
    ids: Ids,
    codec: Codec,
    folder: Path,
    *,
    settings: GenerationSettings,
    team: Team = ALONE,
    records_per_shard: int = 256,
    batch: int = BATCH,
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
        team: the processes that share the work.
        records_per_shard: records in a file, and the unit that is dealt to ranks.
        batch: references encoded at once.
        progress: is told how many more records all ranks have finished.
    """

    def cut(ids_N: Ids) -> list[EncodeBatch]:
        return cut_batches(references, ids_N, batch=batch, window_tokens=settings.window_tokens)

    def encoded(ids_N: Ids, num_batches: int) -> Iterator[Tensor]:
        return _encoded(encode, cut(ids_N), codec, num_batches=num_batches)

    _publish(
        encoded,
        lambda ids_N: len(cut(ids_N)),
        np.unique(ids).astype(np.int64),
        folder,
        settings=settings,
        codec_name=codec.name,
        record_bytes=codec.record_bytes,
        records_per_shard=records_per_shard,
        batch=batch,
        team=team,
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
        lambda ids_N: -(-len(ids_N) // records.batch),
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
    encode: Encode,
    references: ReferenceTokens,
    ids_N: Ids,
    codec: Codec,
    *,
    batch: int,
    window_tokens: int | None = None,
) -> Tensor:
    """Return the records of distinct, ascending references, uint8 (N, record_bytes) on the CPU.

    `window_tokens` is that of `GenerationSettings`.
    """
    batches = cut_batches(references, ids_N, batch=batch, window_tokens=window_tokens)
    return torch.cat(list(_encoded(encode, batches, codec)))


@torch.no_grad()
def _encoded(
    encode: Encode, batches: Sequence[EncodeBatch], codec: Codec, *, num_batches: int = 1
) -> Iterator[Tensor]:
    """Yield records batch by batch, in the order of their references; with documents, all of them at the end.

    `num_batches` may ask for more batches than there are: what is superfluous is encoded again, and dropped.
    """
    positions = [part.positions_N for part in batches]
    ordered = bool((np.diff(np.concatenate(positions)) == 1).all())
    count = max(num_batches, len(batches))
    copies = (
        fetched(codec.encode(encode(*batches[number % len(batches)].arguments()))) for number in range(count)
    )
    made: list[Tensor] = []
    for number, copy in enumerate(_one_ahead(copies)):
        records = copy()
        made += [records[: len(at)] for at in positions[number : number + 1]]
        if ordered or number + 1 == len(batches):
            place = np.argsort(np.concatenate(positions)) if not ordered else slice(None)
            yield torch.cat([records[:0], *made])[place]
            made = []
        else:
            yield records[:0]


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield each item when the next one is in the making, so that a device is never without work."""
    last = next(items)
    for item in items:
        yield last
        last = item
    yield last


def _publish(
    make: Callable[[Ids, int], Iterator[Tensor]],
    count: Callable[[Ids], int],
    ids_N: Ids,
    folder: Path,
    *,
    settings: GenerationSettings,
    codec_name: str,
    record_bytes: int,
    records_per_shard: int,
    batch: int,
    team: Team = ALONE,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Publish a generation whose records `make(ids, least number of batches)` yields batch by batch.

    A shard needs `count(ids)` batches by itself.
    """
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
    if seen_by_first(
        team, lambda: is_finished(folder, kind=KIND, version=VERSION, settings=decided, inputs=inputs)
    ):
        return
    publication = publishing(folder, kind=KIND, version=VERSION, settings=decided, inputs=inputs)
    with publication if team.rank == 0 else nullcontext(partial(folder)) as work, _WriteBehind() as files:
        shards = [
            ids_N[begin : begin + records_per_shard] for begin in range(0, len(ids_N), records_per_shard)
        ]
        # When the others are told, the work folder is there, and rid of what somebody else left.
        missing = seen_by_first(
            team,
            lambda: [shard for shard in range(len(shards)) if not (work / records_file(shard)).exists()],
        )
        if team.rank == 0:
            _write_ids(work / IDS, ids_N)
        if progress is not None:
            progress(len(ids_N) - sum(len(shards[shard]) for shard in missing))
        for first in range(0, len(missing), team.world_size):
            dealt = missing[first : first + team.world_size]
            num_batches = max(count(shards[shard]) for shard in dealt)
            # Without a shard of its own, a rank encodes along for nothing.
            shard = dealt[team.rank % len(dealt)]
            due, told = sum(len(shards[shard]) for shard in dealt), 0
            made: list[Tensor] = []
            for done, records in enumerate(make(shards[shard], num_batches), start=1):
                made.append(records)
                if progress is not None:
                    progress(due * done // num_batches - told)
                    told = due * done // num_batches
            if team.rank < len(dealt):
                files.write(work / records_file(shard), torch.cat(made))
        files.wait()
        team.barrier()  # every shard is there
        if team.rank == 0:
            wait_to_see(work, {records_file(shard) for shard in missing})
    team.barrier()  # the generation is published


class _WriteBehind:
    """Writes a shard while the next one is encoded; a context manager, left when its last file is there."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "records")
        self._last: Future[None] | None = None

    def write(self, path: Path, records: Tensor) -> None:
        """Write a file whole, when the one before it is there: two shards are held in memory at most."""
        self.wait()
        self._last = self._thread.submit(write_atomic, path, records.numpy().data)

    def wait(self) -> None:
        """Return when the last file is there, or raise what kept it from being written."""
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()


def _write_ids(path: Path, ids_N: Ids) -> None:
    buffer = BytesIO()
    np.save(buffer, ids_N)
    write_atomic(path, buffer.getvalue())
