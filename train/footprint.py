"""The bytes of training: what a rank holds in memory under each ZeRO stage, and what a checkpoint takes on disk.

Pure arithmetic on sizes, no torch. It follows what DeepSpeed keeps for the settings that `engine.deepspeed_settings`
derives: weights and activations in the training type, AdamW's moments and, for bfloat16, master weights in float32.
`benchmarks/plan.py` compares it with real runs.

Invariants: a rank's memory is stated at its peak, which is one of three moments: the end of a forward pass, when all
activations are there; the update; a validation. Libraries, and on rank 0 embedder and search index, are not counted;
what a CPU rank's heap takes beyond its tensors is stated apart.
Not here: activations themselves (`model.footprint`), the engine (`engine`), which settings fit (`launch.planning`).
"""

from dataclasses import dataclass, replace

from model.footprint import MicroBatchBytes
from train.config import Precision

_BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in numbers: gradients that are reduced at once."""
_LIVE = 1_000_000_000
"""Its default `stage3_max_live_parameters`."""
_FLOAT32 = 4
_MOMENTS = 2 * _FLOAT32
_INPUTS = 3
"""Micro-batches there at a time: the one that is computed, one that is ready and one in the making."""
_MAPPED = 32 << 20
"""Larger blocks are no part of glibc's heap, and given back when they are freed."""
_SCATTERED = 15 << 20
"""Small blocks, and what lies between them, all over a CPU rank's heap."""
_HOLES = {Precision.bf16: 2.5, Precision.fp32: 6.5}
_HOLES_OF_STAGE_3 = 9.5
"""Holes that a layer leaves in a CPU rank's heap, each of the size of its hidden states, as they were counted: an
aligned block does not fit into the hole that its like has left beside blocks that stay."""
_GLOO_THREADS = 2
"""Threads on a CPU that gather parameters, each in a heap of its own, which keeps the room."""
_PER_DOCUMENT = 2 + 1 / 8 + 1 / 8
"""Bytes of a document in a checkpoint: how often it was drawn, whether it is finished, whether it was read."""
_MANIFEST_BYTES_PER_BYTE = 12 / 2**20
"""A checksum of some 12 characters for every MiB."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What one rank holds at its peak, in bytes.

    Attributes:
        parameters: In the training type; under ZeRO-3 its share, and those that are gathered at a time.
        gradients: Held when the peak comes.
        masters: Its share of the float32 master weights.
        moments: Its share of AdamW's two moments.
        activations: Kept for the backward pass.
        memories: The pools that a micro-batch and those made ahead read.
        temporaries: Of the loss and the backward pass, of communication and update, or of a validation.
        peak: The moment of the peak: "backward", "update", "validation".
        copies: On a CPU, what an asynchronous save has copied, on the first rank; a GPU's lie in the host's memory.
        gaps: On a CPU, what the process holds beside all that: its heap does not shrink, and has holes.
    """

    parameters: int
    gradients: int
    masters: int
    moments: int
    activations: int
    memories: int
    temporaries: int
    peak: str
    copies: int = 0
    gaps: int = 0

    @property
    def total(self) -> int:
        """All tensors."""
        return sum(self.parts().values())

    @property
    def resident(self) -> int:
        """What the process holds of its device's memory."""
        return self.total + self.gaps

    def parts(self) -> dict[str, int]:
        """What it consists of, by name."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.masters + self.moments,
            "activations": self.activations,
            "memories": self.memories,
            "temporaries": self.temporaries,
            "copies": self.copies,
        }


def number_bytes(precision: Precision) -> int:
    """Return the bytes of a parameter, and of an activation."""
    return 2 if precision is Precision.bf16 else 4


def rank_memory(
    parameters: int,
    micro_batch: MicroBatchBytes,
    *,
    zero_stage: int,
    precision: Precision,
    num_ranks: int,
    accumulate: int,
    cpu: bool = False,
    asynchronous: bool = False,
) -> RankMemory:
    """Return what one rank holds.

    Args:
        parameters: Of the model.
        micro_batch: What a micro-batch takes.
        zero_stage: 0 to 3.
        precision: Of parameters and activations.
        num_ranks: Ranks that share what the stage shares.
        accumulate: Micro-batches of an update on each rank.
        cpu: Whether ranks compute on CPUs, where memory that is only reserved is not taken.
        asynchronous: Whether checkpoints are written from a copy.
    """
    size = number_bytes(precision)
    mixed = size < _FLOAT32
    shared = num_ranks if zero_stage else 1
    share = -(-parameters // shared)
    bucket = min(_BUCKET, parameters) * size if cpu else _BUCKET * size
    masters = share * _FLOAT32 if mixed or zero_stage in (1, 2) else 0
    moments = share * _MOMENTS
    weights = parameters * size
    between = update = (
        0  # gradients held between micro-batches; what backward pass and update hold beyond that
    )
    if zero_stage == 0:
        between = weights if accumulate > 1 else 0
        update = weights - between + (2 * parameters * _FLOAT32 if mixed else 0)
    elif zero_stage == 1 and mixed:
        between = parameters * _FLOAT32
        copied = parameters if parameters <= _BUCKET else 0  # a larger group is reduced in place
        update = copied * _FLOAT32 + parameters * size  # by any number of ranks, in the training type
    elif zero_stage == 3:
        weights = share * size + min(_LIVE, parameters) * size
        between = share * _FLOAT32 + bucket * (1 if cpu else 2)
        update = share * _FLOAT32
    else:
        partition = (parameters if zero_stage == 1 else share) * _FLOAT32
        between = partition if accumulate > 1 else 0
        update = partition - between + max(bucket, share * _FLOAT32)
    memories = micro_batch.memories * _INPUTS
    reserved = 0 if cpu or zero_stage in (0, 3) or (zero_stage == 1 and mixed) else bucket
    lasting = between if zero_stage == 3 or (zero_stage == 1 and mixed) else 0
    moments_of_run = (
        (
            "backward",
            between,
            micro_batch.activations,
            micro_batch.working + reserved,
        ),
        ("update", between, 0, update),
        ("validation", lasting, 0, micro_batch.validation),
    )
    peak, gradients, activations, temporaries = max(moments_of_run, key=lambda moment: sum(moment[1:]))
    copies = weights + masters + moments if cpu and asynchronous else 0
    taken = RankMemory(weights, gradients, masters, moments, activations, memories, temporaries, peak, copies)
    if not cpu:
        return taken
    # An update's blocks do not fit where the backward pass has been, or are no part of the heap.
    trained = between + micro_batch.activations + micro_batch.working + update
    largest = max(trained, lasting + micro_batch.validation)
    holes = round((_HOLES_OF_STAGE_3 if zero_stage == 3 else _HOLES[precision]) * micro_batch.hidden)
    exchanges = num_ranks > 1 and zero_stage in (1, 2) and parameters * size <= _MAPPED
    threads = _GLOO_THREADS * parameters * size if exchanges else 0
    return replace(taken, gaps=largest - gradients - activations - temporaries + _SCATTERED + holes + threads)


def checkpoint_bytes(
    parameters: int, *, zero_stage: int, precision: Precision, num_documents: int = 0
) -> int:
    """Return the size of a checkpoint, all its files together: the same for every number of ranks."""
    size = number_bytes(precision)
    masters = _FLOAT32 if size < _FLOAT32 or zero_stage else 0
    engine = (0 if zero_stage == 3 else size) + masters + _MOMENTS
    files = parameters * (size + engine) + num_documents * _PER_DOCUMENT
    return round(files * (1 + _MANIFEST_BYTES_PER_BYTE))
