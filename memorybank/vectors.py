"""The search vectors of a segment on disk.

    <library>/vectors-SSSSSS-PPPP/
      manifest.json      settings: embedder, size, vectors_per_shard, num_vectors; inputs: segment
      vectors-NNNNN.bin  float32, (n, X), in the order of the segment's references

Vectors depend on text and embedder alone: new weights leave them as they are.

Invariants: the bytes do not depend on the number of ranks, nor on interruptions (a shard is embedded by one call, so
that its batches are always the same); a block is checked against its checksum before it is searched; nothing is kept
in memory but one shard.

Not here: which references may be found (library.py), the search itself (index.py).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.files import Manifest, is_finished, partial, publishing, write_atomic
from memorybank.embedder import Embedder
from memorybank.segment import Segment

KIND, VERSION = "vectors", 1
VECTORS_PER_SHARD = 2048

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


def compile_vectors(
    embedder: Embedder,
    segment: Segment,
    folder: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
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
        rank,
        world_size,
        barrier,
        progress,
    )


def copy_vectors(
    vectors: "Vectors",
    read: Callable[[Ids], Floats],
    segment: Segment,
    folder: Path,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Publish the vectors of a segment that were made before: `read(numbers of references)`, kept like `vectors`."""

    def copied(rows: range) -> Floats:
        return read(segment.numbers[rows.start : rows.stop])

    _publish(
        copied,
        segment,
        folder,
        vectors.embedder,
        vectors.size,
        vectors.per_shard,
        0,
        1,
        lambda: None,
        progress,
    )


def _publish(
    make: Callable[[range], Floats],
    segment: Segment,
    folder: Path,
    embedder: str,
    size: int,
    per_shard: int,
    rank: int,
    world_size: int,
    barrier: Callable[[], None],
    progress: Callable[[int], None],
) -> None:
    settings = {
        "embedder": embedder,
        "size": size,
        "vectors_per_shard": per_shard,
        "num_vectors": len(segment),
    }
    inputs = {"segment": segment.fingerprint}
    finished = is_finished(folder, kind=KIND, version=VERSION, settings=settings, inputs=inputs)
    barrier()  # nobody publishes before everybody has looked
    if finished:
        return
    work = partial(folder)
    shards = [
        range(begin, min(begin + per_shard, len(segment))) for begin in range(0, len(segment), per_shard)
    ]

    def write_mine() -> None:
        for number, rows in enumerate(shards):
            if number % world_size == rank and not (work / vectors_file(number)).exists():
                write_atomic(work / vectors_file(number), make(rows).astype("<f4").tobytes())
            progress(len(rows))

    if rank == 0:
        with publishing(folder, kind=KIND, version=VERSION, settings=settings, inputs=inputs):
            barrier()  # the work folder is there, and rid of what others left
            write_mine()
            barrier()  # every shard is there
    else:
        barrier()
        write_mine()
        barrier()
    barrier()  # the vectors are published


def vectors_file(shard: int) -> str:
    """Return the name of a shard of vectors."""
    return f"vectors-{shard:05d}.bin"


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

    def __len__(self) -> int:
        return self._num_vectors

    def shards(self) -> Iterator[tuple[int, Floats]]:
        """Yield the row of each shard's first vector, and its vectors (n, X), a view of the map."""
        for number, shard in enumerate(self._shards):
            yield number * self.per_shard, shard.read_all().view("<f4").reshape(-1, self.size)

    def read(self, rows: Ids) -> Floats:
        """Return the vectors of rows, (n, X)."""
        found = np.empty((len(rows), self.size), np.float32)
        for place, row in enumerate(rows.tolist()):
            shard, begin = divmod(row, self.per_shard)
            found[place] = self._shards[shard].read(4 * self.size * begin, 4 * self.size).view("<f4")
        return found
