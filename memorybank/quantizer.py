"""Product quantisers (paper, section 3.3 and appendix B): trained by faiss, encoding and decoding in torch.

A quantiser rotates a vector and then replaces it by centroids, in one stage or two; the second stage takes what the
first one leaves. A stage of ``MxB`` cuts the vector into M parts and keeps, for each, the number of the nearest of
2^B centroids, in B bits:

    OPQ20_80,Residual2x14,PQ8x10     rotation, 2 x 14 bits (4 bytes), 8 x 10 bits (10 bytes): 80 numbers in 14 bytes

Codes are packed as faiss packs them: those of a stage one after the other from the lowest bit on, up to a whole byte.

    codec-<...>/
      manifest.json         settings: factory, head_size, separate; inputs: weights;
                              extra: training vectors, relative errors on held-out references by layer
      vectors.safetensors   rotation (E, E), stage0 (M, 2^B, E/M), stage1: of all vectors; or, trained apart,
      keys.safetensors, values.safetensors

Invariants: bytes and vectors are those of faiss's `sa_encode` and `sa_decode` (up to ties and rounding); nothing is
trained below the minimum, which is the number of centroids of a part.

Not here: which quantiser a bank has, and the sample it is trained on (codecs.py).
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from data.files import Manifest, open_manifest, publishing, write_atomic
from memorybank.codec import Codec, relative_errors
from memorybank.config import STAGES, CodecConfig, CodecKind
from memorybank.record import MemoryShape
from model.memory import ExplicitMemory

log = logging.getLogger(__name__)

KIND, VERSION = "codec", 1
ADVISED_PER_CENTROID = 39
"""Training vectors per centroid below which faiss warns."""
_SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32
_ROUNDS, _OPQ_ROUNDS, _OPQ_VECTORS = 10, 20, 1 << 14


def factory(kind: CodecKind, head_size: int) -> str:
    """Return faiss's name of a quantiser for vectors of `head_size` numbers."""
    *first, (parts, bits) = STAGES[kind]
    residual = "".join(f"Residual{parts}x{bits}," for parts, bits in first)
    return f"OPQ{head_size // 4 if first else parts}_{head_size},{residual}PQ{parts}x{bits}"


def vector_bytes(kind: CodecKind) -> int:
    """Return the bytes of a vector's codes: whole bytes for each stage."""
    return sum(-(-parts * bits // 8) for parts, bits in STAGES[kind])


def min_vectors(kind: CodecKind) -> int:
    """Return the vectors without which a quantiser cannot be trained: as many as a part has centroids."""
    return 1 << max(bits for _, bits in STAGES[kind])


def advised_vectors(kind: CodecKind) -> int:
    """Return how many vectors a quantiser should be trained on by the usual advice."""
    return ADVISED_PER_CENTROID * min_vectors(kind)


def train(name: str, vectors_ME: NDArray[np.float32]) -> Any:
    """Return the faiss index of a factory name, trained; the same vectors and threads give the same index."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.index_factory(vectors_ME.shape[1], name)
    rotation, *quantizers = _parts(index)
    # faiss's own 25 rounds of k-means, and 50 for the rotation on 65,536 vectors, take several times as long.
    rotation.niter, rotation.max_train_points = _OPQ_ROUNDS, _OPQ_VECTORS
    rotation.pq = parts = faiss.ProductQuantizer(rotation.d_out, rotation.M, 8)
    for quantizer in (parts, *quantizers):
        quantizer.cp.niter = _ROUNDS
        quantizer.cp.min_points_per_centroid = 1  # too few of them is for `training_vectors` to say, once
    inner: Any = faiss.downcast_index(index.index)
    if isinstance(inner, faiss.IndexPQ):
        # It would order the centroids for distances between codes, which nobody takes: 5/6 of the time, the same error.
        inner.do_polysemous_training = False
    index.train(np.ascontiguousarray(vectors_ME))
    rotation.pq = None  # was ours, and goes
    return index


class ProductQuantizer:
    """A trained quantiser, as a `VectorCoder`."""

    def __init__(self, name: str, rotation_EE: Tensor, stages: Sequence[Tensor]) -> None:
        """Make one of its numbers.

        Args:
            name: the factory name.
            rotation_EE: the rows onto which a vector is projected, orthonormal.
            stages: centroids of each stage, (M, 2^B, E/M).
        """
        self.name = name
        self._codes = [(len(stage), stage.shape[1].bit_length() - 1) for stage in stages]
        self._stage_bytes = [-(-parts * bits // 8) for parts, bits in self._codes]
        self.vector_bytes = sum(self._stage_bytes)
        self.tensors = {"rotation": rotation_EE, **{f"stage{n}": stage for n, stage in enumerate(stages)}}
        """What it consists of, on the CPU."""
        self._on_device: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}

    @classmethod
    def of_faiss(cls, name: str, index: Any) -> "ProductQuantizer":
        """Take the numbers out of a trained faiss index."""
        rotation, *quantizers = _parts(index)
        matrix = faiss.vector_to_array(rotation.A).reshape(rotation.d_out, rotation.d_in)
        stages = [
            torch.from_numpy(faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub))
            for pq in quantizers
        ]
        return cls(name, torch.from_numpy(matrix), stages)

    @classmethod
    def of_tensors(cls, name: str, tensors: Mapping[str, Tensor]) -> "ProductQuantizer":
        """Make one of `tensors` as another one had them."""
        stages = [tensors[key] for key in sorted(tensors) if key.startswith("stage")]
        return cls(name, tensors["rotation"], stages)

    def encode(self, vectors_ME: Tensor) -> Tensor:
        """Return uint8 (M, vector_bytes): per part, the nearest centroid of what the stages before it left."""
        rotation_EE, stages = self._on(vectors_ME.device)
        at_once = max(1, _SCORES_AT_ONCE // max(stage[..., 0].numel() for stage in stages))
        return torch.cat(
            [self._encode(some, rotation_EE, stages) for some in torch.split(vectors_ME, at_once)]
        )

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors in float32: the stages' centroids, added and rotated back."""
        rotation_EE, stages = self._on(codes.device)
        rotated_ME: Tensor | float = 0.0
        for stage, (parts, bits), packed in zip(
            stages, self._codes, torch.split(codes, self._stage_bytes, dim=1), strict=True
        ):
            rotated_ME = rotated_ME + _look_up(stage, _unpack(packed, parts, bits))
        assert isinstance(rotated_ME, Tensor)
        return rotated_ME @ rotation_EE

    def _encode(self, vectors_ME: Tensor, rotation_EE: Tensor, stages: list[Tensor]) -> Tensor:
        rest_ME = vectors_ME.float() @ rotation_EE.T
        packed = []
        for stage_PKe, (parts, bits) in zip(stages, self._codes, strict=True):
            rest_PMe = torch.unflatten(rest_ME, 1, (parts, -1)).transpose(0, 1)
            # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2): the nearest centroid has the largest of the latter.
            norms_P1K = stage_PKe.square().sum(2).div_(-2)[:, None]
            codes_MP = torch.baddbmm(norms_P1K, rest_PMe, stage_PKe.transpose(1, 2)).argmax(2).T
            rest_ME = rest_ME - _look_up(stage_PKe, codes_MP)
            packed.append(_pack(codes_MP, bits))
        return torch.cat(packed, dim=1)

    def _on(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Return rotation and stages on a device; they are copied there once."""
        if device not in self._on_device:
            moved = [tensor.to(device) for tensor in self.tensors.values()]
            self._on_device[device] = (moved[0], moved[1:])
        return self._on_device[device]


def training_vectors(
    kind: CodecKind, sample: ExplicitMemory, *, separate: bool = False
) -> dict[str, NDArray[np.float32]]:
    """Return what a quantiser is trained on, (M, E) by name: "vectors", or "keys" and "values" apart.

    Of more than the usual advice asks for, so many are drawn uniformly.

    Args:
        kind: which quantiser.
        sample: memories of uniformly sampled references; places that short ones left empty do not count.
        separate: one quantiser for keys and one for values, instead of one for all vectors.

    Raises:
        ValueError: the sample holds too few vectors; the message says how many references are needed.
    """
    kept = (sample.index_NLGS >= 0).cpu()
    keys, values = (x_NLGSE.cpu()[kept].float().numpy() for x_NLGSE in (sample.k_NLGSE, sample.v_NLGSE))
    sets = {"keys": keys, "values": values} if separate else {"vectors": np.concatenate([keys, values])}
    _require_enough(kind, min(map(len, sets.values())), len(kept))
    rng = np.random.default_rng(0)
    return {part: rng.permutation(vectors)[: advised_vectors(kind)] for part, vectors in sets.items()}


def identity(kind: CodecKind, head_size: int, *, separate: bool) -> dict[str, Any]:
    """Return the settings of a quantiser's manifest."""
    return {"factory": factory(kind, head_size), "head_size": head_size, "separate": separate}


def config_of(manifest: Manifest) -> CodecConfig:
    """Return the configuration that a published quantiser follows."""
    stated = manifest.settings
    kind = next(kind for kind in STAGES if factory(kind, stated["head_size"]) == stated["factory"])
    return CodecConfig(kind=kind, separate=stated["separate"])


def fit(
    folder: Path,
    kind: CodecKind,
    shape: MemoryShape,
    vectors: Mapping[str, NDArray[np.float32]],
    held_out: ExplicitMemory,
    *,
    inputs: Mapping[str, str],
) -> None:
    """Train a quantiser and publish it, with its errors on memories that it was not trained on.

    Args:
        folder: where it shall stand.
        kind: which quantiser.
        shape: of a memory.
        vectors: what `training_vectors` returned.
        held_out: memories of other references.
        inputs: hashes of what the memories were made from.
    """
    name, started = factory(kind, shape.head_size), time.process_time()
    coders = {part: ProductQuantizer.of_faiss(name, train(name, some)) for part, some in vectors.items()}
    extra: dict[str, Any] = {
        "num_vectors": min(map(len, vectors.values())),
        "cpu_seconds": time.process_time() - started,
    }
    if len(held_out.index_NLGS):
        keys, values = relative_errors(Codec(shape, *coders.values(), name=name), held_out)
        extra |= {"held_out_error_keys": keys, "held_out_error_values": values}
    stated = identity(kind, shape.head_size, separate=len(coders) > 1)
    with publishing(folder, kind=KIND, version=VERSION, settings=stated, inputs=inputs, extra=extra) as work:
        for part, coder in coders.items():
            content = {key: tensor.contiguous() for key, tensor in coder.tensors.items()}
            write_atomic(work / f"{part}.safetensors", save_tensors(content))


def open_codec(folder: Path, shape: MemoryShape) -> Codec:
    """Return a published quantiser as a codec; its name holds its fingerprint.

    Raises:
        ValueError: there is none, it is damaged, or it is for vectors of another size.
    """
    manifest = open_manifest(folder, kind=KIND, version=VERSION)
    name, head_size = manifest.settings["factory"], manifest.settings["head_size"]
    if head_size != shape.head_size:
        raise ValueError(
            f"{folder}: the codec is for vectors of {head_size} numbers, and model.head_size={shape.head_size}; "
            "read it with the run that fitted it"
        )
    coders = [
        ProductQuantizer.of_tensors(name, load_tensors(bytes(manifest.mapped(file).read_all())))
        for file in sorted(manifest.files)  # keys before values
    ]
    return Codec(shape, *coders, name=codec_name(manifest))


def codec_name(manifest: Manifest) -> str:
    """Return the name under which generations state a published quantiser."""
    return f"{manifest.settings['factory']}:{manifest.fingerprint}"


def _require_enough(kind: CodecKind, found: int, num_references: int) -> None:
    """Refuse too few vectors, and warn of less than the usual advice."""
    minimum, each = min_vectors(kind), found / num_references
    if found < minimum:
        raise ValueError(
            f"codec.kind={kind.name} needs {minimum:,} vectors to be trained, some {_ceil(minimum / each):,} "
            f"references; the {num_references:,} sampled ones give {found:,}: add documents, or set "
            f"codec.kind={CodecKind.pq16x8.name} ({min_vectors(CodecKind.pq16x8):,} vectors) or int8 (none)"
        )
    if found < advised_vectors(kind):
        log.warning(
            "codec.kind=%s: %s vectors of %s references to train on; usual advice is %s vectors, some %s references",
            kind.name,
            f"{found:,}",
            f"{num_references:,}",
            f"{advised_vectors(kind):,}",
            f"{_ceil(advised_vectors(kind) / each):,}",
        )


def _ceil(value: float) -> int:
    return -int(-value // 1)


def _parts(index: Any) -> tuple[Any, ...]:
    """Return the rotation of a faiss index, and the product quantiser of each of its stages."""
    rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0))
    inner: Any = faiss.downcast_index(index.index)
    if not hasattr(inner, "q1"):
        return rotation, inner.pq
    coarse: Any = faiss.downcast_index(inner.q1.quantizer)
    return rotation, coarse.pq, inner.pq


def _look_up(stage_PKe: Tensor, codes_MP: Tensor) -> Tensor:
    """Return the centroids that the codes of a stage name, side by side, (M, E)."""
    first_P = torch.arange(len(stage_PKe), device=codes_MP.device) * stage_PKe.shape[1]
    # Six times as fast on a CPU as indexing by part and code.
    return torch.nn.functional.embedding(codes_MP + first_P, stage_PKe.flatten(0, 1)).flatten(1)


def _pack(codes_MP: Tensor, bits: int) -> Tensor:
    """Return codes of so many bits each, one after the other from the lowest bit on, as uint8 (M, bytes)."""
    first_P, shift_P, num_bytes = _places(codes_MP.shape[1], bits, codes_MP.device)
    packed = torch.zeros((len(codes_MP), num_bytes + 2), dtype=torch.int32, device=codes_MP.device)
    words_MP = codes_MP.int() << shift_P
    for byte in range(3):
        # Codes that share a byte share no bit of it: adding is joining.
        packed.index_add_(1, first_P + byte, words_MP >> 8 * byte & 255)
    return packed[:, :num_bytes].to(torch.uint8)


def _unpack(packed: Tensor, parts: int, bits: int) -> Tensor:
    """Return the codes that `_pack` packed, int32 (M, parts)."""
    first_P, shift_P, _ = _places(parts, bits, packed.device)
    wide = torch.nn.functional.pad(packed, (0, 2)).int()
    words_MP = wide[:, first_P] | wide[:, first_P + 1] << 8 | wide[:, first_P + 2] << 16
    return words_MP >> shift_P & (1 << bits) - 1


def _places(parts: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return each code's first byte and its shift in it, and the bytes of all; a code touches three at most."""
    offset_P = torch.arange(parts, device=device, dtype=torch.int32) * bits
    return offset_P // 8, offset_P % 8, -(-parts * bits // 8)
