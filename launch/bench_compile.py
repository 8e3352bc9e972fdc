"""Writing memories: compiling a generation, beside the forward pass of the same layers without writing.

The forward pass reads references that lie in memory, and leaves nothing behind: no selection, no records, no files. The
compilation is that of a run: tokens from the shards, selection, the codec, files, checksums, publication; a batch makes
a shard of records, so that all but the last are written while the next one is encoded. Its files alone are the same
records, published again.
Not here: a step with its share of an epoch's compilation (`launch.bench_step`).
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from data.references import References
from launch.bench_corpus import write_corpus
from launch.bench_step import generation_settings, where_time_goes
from launch.build import training_dtype
from launch.config import RunConfig
from launch.timing import Bench, Conditions, Side, interleaved, rate, ratio
from memorybank import codecs
from memorybank.codec import Codec
from memorybank.config import CodecKind
from memorybank.record import MemoryShape
from memorybank.store import Generation
from memorybank.writer import Encode, batch_for, compile_generation, copy_generation, encode_records
from model.config import ModelConfig
from model.flops import reference_encode_flops
from model.memory import ExplicitMemory
from model.transformer import Block, Memory3LM

DEFAULTS = ["model=small", "model.prefix_ids=[1,2,3,4]"]

_OF_FORWARD = 0.85
_REFERENCES = 256


def measure(config: RunConfig, conditions: Conditions) -> Bench:
    """Time compilation, its parts, and the forward pass."""
    model_config, device, dtype = config.model, conditions.device, training_dtype(config)
    count, batch = _REFERENCES * (1 if device.type == "cpu" else 8), batch_for(device)
    torch.manual_seed(0)
    model = Memory3LM(model_config).to(dtype).to(device).eval()
    codec = codecs.of_kind(CodecKind.model, MemoryShape.of(model_config), dtype)
    with TemporaryDirectory(prefix="memory3-bench-") as name:
        references = write_corpus(Path(name), model_config, documents=count // 2)
        encode = encoder(model, device)
        sides = {
            "compiling": _compiling(
                encode, references, codec, model_config, Path(name), count=count, batch=batch
            ),
            "encoding, no files": _encoding(encode, references, codec, count=count, batch=batch),
            "forward pass": forward_of_memory_layers(model, references, device, count=count),
            "its files alone": _files(references, codec, model_config, Path(name)),
        }
        times = interleaved(sides, conditions)
        profiles = [where_time_goes(f"{name} {count} references", run) for name, run in [*sides.items()][:3]]
    compiling, encoding, forward, files = times.values()
    flops = reference_encode_flops(model_config) * count
    return Bench(
        shape={
            "references": f"{count} of {model_config.reference_tokens} tokens, {batch} at a time",
            "shards": f"{count // batch} of {batch} records",
            "memory layers": f"{model_config.num_memory_layers} of width {model_config.width}",
            "codec": codec.name,
            "record": f"{codec.record_bytes:,} bytes",
        },
        times=list(times.values()),
        figures=[
            ratio(
                "forward pass / compiling",
                forward,
                compiling,
                target=_OF_FORWARD,
                at_least=True,
                note="throughput of compiling / throughput of the same layers without writing",
            ),
            ratio("forward pass / encoding without files", forward, encoding),
            ratio("its files alone / compiling", files, compiling),
            rate("compiled", compiling, amount=count, unit="references/s"),
            rate("compiled", compiling, amount=flops / 1e9, unit="GFLOP/s"),
            rate("written", compiling, amount=count * codec.record_bytes / 1e6, unit="MB/s"),
        ],
        findings=profiles,
    )


def encoder(model: Memory3LM, device: torch.device) -> Encode:
    """`Memory3LM.encode`, from arguments on the CPU."""

    @torch.no_grad()
    def encode(tokens_NR: Tensor, lengths_N: Tensor, titles_N: Tensor) -> ExplicitMemory:
        return model.encode(tokens_NR.to(device), lengths_N.to(device), titles_N.to(device))

    return encode


def _compiling(
    encode: Encode,
    references: References,
    codec: Codec,
    model: ModelConfig,
    folder: Path,
    *,
    count: int,
    batch: int,
) -> Side:
    number = iter(range(1 << 30))

    def run() -> None:
        made = next(number)
        compile_generation(
            encode,
            references,
            np.arange(count) + made % 2 * count,
            codec,
            folder / f"generation-{made}",
            settings=generation_settings(model, references),
            records_per_shard=batch,
            batch=batch,
        )

    return run


def _files(references: References, codec: Codec, model: ModelConfig, folder: Path) -> Side:
    """Publish once more what was compiled first, from memory."""
    number = iter(range(1 << 30))

    @cache
    def compiled() -> tuple[Generation, Tensor]:
        first = Generation.open(folder / "generation-0")
        return first, first.read(first.ids)

    def run() -> None:
        first, records = compiled()
        copy_generation(
            first,
            lambda ids_N: records[np.searchsorted(first.ids, ids_N)],
            first.ids,
            folder / f"generation-copied-{next(number)}",
            settings=generation_settings(model, references),
        )

    return run


def _encoding(encode: Encode, references: References, codec: Codec, *, count: int, batch: int) -> Side:
    return lambda: encode_records(encode, references, np.arange(count), codec, batch=batch)


def forward_of_memory_layers(
    model: Memory3LM, references: References, device: torch.device, *, count: int = _REFERENCES
) -> Side:
    """The memory layers as `Memory3LM.encode` runs them: of the last one the projections alone."""
    config = model.config
    tokens_NR = torch.from_numpy(references.tokens(np.arange(count))[0]).to(device)
    *before, last = [block for block in model.blocks if isinstance(block, Block)][: config.num_memory_layers]
    turn = model.rotation(config.num_prefix, config.reference_tokens)

    @torch.no_grad()
    def run() -> None:
        for some in torch.split(tokens_NR, batch_for(device)):
            prefix = model.encode_prefix(config.num_memory_layers)
            hidden_BTD = model.embedding(some)
            for block, read in zip(before, prefix, strict=False):
                hidden_BTD, _, _ = block(hidden_BTD, turn, attention=model.attention, prefix=read)
            last.project(hidden_BTD)

    return run
