"""The search vectors of a segment, or of a prepared corpus, on disk.

    <library>/vectors-SSSSSS-PPPP/
      manifest.json      settings: embedder, size, vectors_per_shard, num_vectors; inputs: segment
      vectors-NNNNN.bin  float32, (n, X), in the order of the references

Vectors depend on text and embedder alone: new weights leave them as they are.

Invariants: the bytes do not depend on the number of ranks, nor on interruptions (a shard is embedded in calls that are
cut at fixed places, so that batches are always the same); a block is checked against its checksum before it is
searched; nothing is kept in memory but one call's vectors while they are written, and nothing when they are read.

Not here: which references may be found (library.py), the search itself (index.py).
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.files import Manifest, MappedFile, is_finished, open_manifest, partial, publishing, writing
from memorybank.embedder import Embedder
from memorybank.team import ALONE, Team, seen_by_first, wait_to_see

KIND, VERSION = "vectors", 1
VECTORS_PER_SHARD = 1 << 14
"""Each shard that is read holds a map: 1e8 vectors make 6,104, of the 65,530 that Linux gives a process."""

_AT_ONCE = 1024

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


class Texts(Protocol):
    """References in their order: a segment, or those of a prepared corpus."""

    fingerprint: str

    def __len__(self) -> int: ...

    def text(self, reference: int, /) -> str:
        """Title line and text."""


def compile_vectors(
    embedder: Embedder,
    segment: Texts,
    folder: Path,
    *,
    team: Team = ALONE,
    progress: Callable[[int], None] = lambda _: None,
    vectors_per_shard: int = VECTORS_PER_SHARD,
) -> None:
    """Embed a segment's references and publish their vectors; every rank calls this.

    Vectors that stand there already are left as they are; an interrupted call goes on after its last whole shard.
    """

    def embedded(rows: range) -> Floats:
        return embedder.embed([segment.text(row) for row in rows])

    _publish(
        embedded,
        segment,
        folder,
        embedder.name,
        embedder.size,
        vectors_per_shard,
        team,
        progress,
    )


def copy_vectors(
    vectors: "Vectors",
    read: Callable[[Ids], Floats],
    ids: Ids,
    segment: Texts,
    folder: Path,
    *,
    team: Team = ALONE,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Publish the vectors of a segment that were made before; nothing is embedded.

    Args:
        vectors: whose embedder made them.
        read: vectors (n, X) of ids.
        ids: by which `read` knows the segment's references, in their order.
        segment: whose vectors they are.
        folder: to be published.
        team: the processes that share the work.
        progress: is told how many more are written.
    """

    def copied(rows: range) -> Floats:
        return read(ids[rows.start : rows.stop])

    _publish(
        copied,
        segment,
        folder,
        vectors.embedder,
        vectors.size,
        VECTORS_PER_SHARD,
        team,
        progress,
    )


def _publish(
    make: Callable[[range], Floats],
    segment: Texts,
    folder: Path,
    embedder: str,
    size: int,
    per_shard: int,
    team: Team,
    progress: Callable[[int], None],
) -> None:
    settings = {
        "embedder": embedder,
        "size": size,
        "vectors_per_shard": per_shard,
        "num_vectors": len(segment),
    }
    inputs = {"segment": segment.fingerprint}
    if seen_by_first(
        team, lambda: is_finished(folder, kind=KIND, version=VERSION, settings=settings, inputs=inputs)
    ):
        return
    work = partial(folder)
    shards = [
        range(begin, min(begin + per_shard, len(segment))) for begin in range(0, len(segment), per_shard)
    ]

    def write_mine() -> None:
        for number, rows in enumerate(shards):
            path = work / vectors_file(number)
            mine = number % team.world_size == team.rank and not path.exists()
            with writing(path) if mine else nullcontext() as file:
                for begin in range(0, len(rows), _AT_ONCE):
                    some = rows[begin : begin + _AT_ONCE]
                    if file is not None:
                        file.write(make(some).astype("<f4").tobytes())
                    progress(len(some))

    if team.rank == 0:
        with publishing(folder, kind=KIND, version=VERSION, settings=settings, inputs=inputs):
            team.barrier()  # the work folder is there, and rid of what others left
            write_mine()
            team.barrier()  # every shard is there
            wait_to_see(work, {vectors_file(number) for number in range(len(shards))})
    else:
        team.barrier()
        write_mine()
        team.barrier()
    team.barrier()  # the vectors are published


def vectors_file(shard: int) -> str:
    """Return the name of a shard of vectors."""
    return f"vectors-{shard:05d}.bin"


class ShardRows:
    """Some vectors of a shard, read when they are asked for; consecutive ones are a view of the map."""

    def __init__(self, file: MappedFile, size: int, rows: Ids | range) -> None:
        """Take `rows`, ascending, of a file of vectors of `size` numbers."""
        self._file = file
        self._rows = rows
        self.shape = (len(rows), size)

    def __getitem__(self, rows: slice | Ids, /) -> Floats:
        """Return vectors (n, X) by their places among the rows."""
        size = self.shape[1]
        if isinstance(self._rows, range) and isinstance(rows, slice):
            found = self._rows[rows]
            content = self._file.read(4 * size * found.start, 4 * size * len(found))
            return content.view("<f4").reshape(-1, size)
        if isinstance(self._rows, range):
            return self._file.rows(self._rows.start + np.asarray(rows), 4 * size).view("<f4")
        return self._file.rows(self._rows[rows], 4 * size).view("<f4")


class Vectors:
    """Published search vectors, opened for reading."""

    def __init__(self, manifest: Manifest) -> None:
        """Wrap an opened manifest."""
        settings = manifest.settings
        self.folder = manifest.folder
        self.fingerprint = manifest.fingerprint
        self.segment = manifest.inputs["segment"]
        self.embedder = str(settings["embedder"])
        self.size = int(settings["size"])
        self.per_shard = int(settings["vectors_per_shard"])
        self._num_vectors = int(settings["num_vectors"])
        num_shards = -(-self._num_vectors // self.per_shard)
        self._shards = [manifest.mapped(vectors_file(shard)) for shard in range(num_shards)]
        if sum(shard.size for shard in self._shards) != 4 * self.size * self._num_vectors:
            raise ValueError(
                f"{self.folder}: {self._num_vectors} vectors are stated, but {sum(s.size for s in self._shards)} bytes "
                "found; rebuild it with `memory3 bank verify --fix`"
            )

    @classmethod
    def open(cls, folder: Path) -> "Vectors":
        """Open published vectors; ValueError when they are missing or damaged."""
        return cls(open_manifest(folder, kind=KIND, version=VERSION))

    def __len__(self) -> int:
        return self._num_vectors

    def blocks(self) -> Iterator[tuple[slice, ShardRows]]:
        """Yield the vectors of each shard, and the rows that they are."""
        for number, shard in enumerate(self._shards):
            begin = number * self.per_shard
            count = min(self.per_shard, len(self) - begin)
            yield slice(begin, begin + count), ShardRows(shard, self.size, range(count))

    def blocks_of(self, rows: Ids) -> list[tuple[Ids, ShardRows]]:
        """Return the vectors of ascending rows, shard by shard."""
        found = []
        bounds = np.searchsorted(rows, self.per_shard * np.arange(len(self._shards) + 1))
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            some = rows[bounds[number] : bounds[number + 1]]
            found.append((some, ShardRows(self._shards[number], self.size, some - number * self.per_shard)))
        return found

    def read(self, rows: Ids) -> Floats:
        """Return the vectors of rows, (n, X)."""
        found = np.empty((len(rows), self.size), np.float32)
        shards, places = np.divmod(rows, self.per_shard)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            found[mine] = self._shards[shard].rows(places[mine], 4 * self.size).view("<f4")
        return found
