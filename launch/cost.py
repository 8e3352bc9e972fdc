"""`memory3 cost`: what memory costs a model, before a bank is written. No run is needed, and no torch.

Tables of (1) the paper's cost model, (2) storage step by step and codec by codec, (3) one chunk's compute, memory
traffic and search, which the paper leaves out, and (4) compiling the whole bank; as JSON instead; and as a picture.
Not here: the arithmetic (`model.flops`, `memorybank.cost`).
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.compose import compose_config
from launch.units import binary, decimal, duration, scale, three, whole_number
from memorybank.config import CodecKind, EmbedderKind, RetrievalConfig
from memorybank.cost import (
    EMBEDDERS,
    Hardware,
    Stored,
    Work,
    Writing,
    chunk_work,
    in_codecs,
    position_bytes,
    sparsification,
    writing,
)
from model.config import ModelConfig
from model.flops import KnowledgeCost, knowledge_cost

_TOKENS = 1000
"""Traffic is also told for so many tokens."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything that the command says of one model; operations in FLOP, times in seconds."""

    knowledge: KnowledgeCost
    best_uses: tuple[float, float]
    sparsification: list[Stored]
    codecs: list[Stored]
    position_bytes: int
    chunk_tokens: int
    chunk: list[Work]
    writing: Writing


def run(arguments: argparse.Namespace) -> int:
    """Compute, then print the tables or the JSON, and draw the picture when one is asked for."""
    config = compose_config(arguments.overrides)
    references = whole_number(arguments.references)
    hardware = Hardware(
        disk_gb_per_second=arguments.disk,
        bus_gb_per_second=arguments.bus,
        memory_gb_per_second=arguments.memory,
        device_tflops=arguments.tflops,
    )
    hardware.check()
    codec = "bfloat16" if arguments.codec == CodecKind.model.name else arguments.codec
    embedder = arguments.embedder or _embedder_of(config.retrieval)
    found = costs(
        config.model,
        references=references,
        codec=codec,
        embedder=embedder,
        fresh=config.retrieval.fresh,
        hardware=hardware,
    )
    if arguments.json:
        settings = {
            "model": asdict(config.model),
            "references": references,
            "codec": codec,
            "embedder": embedder,
            "hardware": asdict(hardware),
        }
        print(json.dumps({**settings, **asdict(found)}, default=lambda choice: choice.value))
    else:
        rates = (
            f"disk {hardware.disk_gb_per_second:g} GB/s, bus {hardware.bus_gb_per_second:g} GB/s, host memory "
            f"{hardware.memory_gb_per_second:g} GB/s, device {hardware.device_tflops:g} TFLOP/s"
        )
        console = Console(width=max(Console().width, 110))
        for table in (
            _knowledge_table(found, config.model),
            _storage_table(found, references),
            _chunk_table(found, references, codec, embedder, rates),
            _writing_table(found.writing, references, codec),
        ):
            console.print(table)
    if arguments.picture is not None:
        title = next((text for text in arguments.overrides if text.startswith("model=")), "model=nano")
        draw(found, references=references, codec=codec, title=title, path=Path(arguments.picture))
        if not arguments.json:
            print(f"picture: {arguments.picture}")
    return 0


def costs(
    model: ModelConfig, *, references: int, codec: str, embedder: str, fresh: int, hardware: Hardware
) -> Costs:
    """Everything about one model and a bank of so many references.

    Raises:
        ValueError: The model has no memory layers, or codec or embedder is unknown.
    """
    if not model.num_memory_layers:
        raise ValueError("model.num_memory_layers=0: this model has no memory to cost; set 1 or more")
    knowledge = knowledge_cost(model)
    return Costs(
        knowledge=knowledge,
        best_uses=knowledge.best_uses,
        sparsification=sparsification(model),
        codecs=in_codecs(model),
        position_bytes=position_bytes(model),
        chunk_tokens=model.chunk_tokens,
        chunk=chunk_work(
            model, references=references, codec=codec, embedder=embedder, fresh=fresh, hardware=hardware
        ),
        writing=writing(model, references=references, codec=codec, hardware=hardware),
    )


def draw(found: Costs, *, references: int, codec: str, title: str, path: Path) -> None:
    """Draw the paper's Figure 4 for this model, and beside it storage and a chunk's times, into a PNG.

    Args:
        found: What to draw.
        references: Of the bank.
        codec: In which its memories are read.
        title: The model.
        path: The picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (uses, storage, times) = plt.subplots(1, 3, figsize=(16, 4.6), width_ratios=[1.3, 1, 1.1])
    cost, (low, high) = found.knowledge, found.best_uses
    factor, prefix = scale(cost.implicit_write)
    exponents = [-2 + step / 50 for step in range(int(50 * 7.3) + 1)]
    numbers = [10**exponent for exponent in exponents]
    for label, values in (
        ("implicit memory (parameters)", [cost.implicit_write for _ in numbers]),
        ("explicit memory", [cost.explicit_write + n * cost.explicit_read for n in numbers]),
        ("text retrieval", [n * cost.text_read for n in numbers]),
    ):
        uses.plot(numbers, [value / factor for value in values], label=label)
    uses.set(
        xscale="log",
        xlim=(numbers[0], numbers[-1]),
        ylim=(0, 1.25 * cost.implicit_write / factor),
        xlabel="uses of one reference",
        ylabel=f"writing and reading ({prefix}FLOP)",
        title=f"{title}: the paper's cost model",
    )
    if low < high:
        uses.axvspan(low, high, color="C1", alpha=0.12)
        uses.text(
            (low * high) ** 0.5,
            1.12 * cost.implicit_write / factor,
            f"memory is cheapest\n{three(low)} to {three(high)} uses",
            ha="center",
            va="center",
            fontsize=9,
        )
    uses.legend(fontsize=7, loc="center", bbox_to_anchor=(0.57, 0.42))

    bars = [*found.sparsification, *found.codecs[1:]]
    _draw_bars(
        storage,
        [bar.name for bar in bars],
        [float(bar.bytes_per_reference * references) for bar in bars],
        [binary(bar.bytes_per_reference * references) for bar in bars],
        colours=["C0"] * len(found.sparsification) + ["C2"] * len(found.codecs[1:]),
    )
    storage.set(xlabel="bytes", title=f"storage of {references:,} references")

    _draw_bars(
        times,
        [work.name for work in found.chunk],
        [work.seconds for work in found.chunk],
        [duration(work.seconds) for work in found.chunk],
        colours=["C3" if work.bytes else "C0" for work in found.chunk],
    )
    times.set(
        xlabel="seconds (blue: computing, red: moving bytes)",
        title=f"a chunk of {found.chunk_tokens} tokens, {codec}",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_bars(
    axis: object,
    names: Sequence[str],
    values: Sequence[float],
    labels: Sequence[str],
    *,
    colours: Sequence[str],
) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    shown = [(n, v, label, c) for n, v, label, c in zip(names, values, labels, colours, strict=True) if v > 0]
    axis.barh([n for n, *_ in shown], [v for _, v, *_ in shown], color=[c for *_, c in shown], alpha=0.75)
    for place, (_, value, label, _) in enumerate(shown):
        axis.text(value, place, f" {label}", va="center", fontsize=8)
    least, most = min(v for _, v, *_ in shown), max(v for _, v, *_ in shown)
    axis.set(xscale="log", xlim=(least / 3, most * (most / least) ** 0.35 * 3))
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=8)


def _knowledge_table(found: Costs, model: ModelConfig) -> Table:
    cost, (low, high) = found.knowledge, found.best_uses
    factor, prefix = scale(cost.implicit_write)
    table = Table(
        "knowledge kept as",
        f"write ({prefix}FLOP)",
        f"read, each use ({prefix}FLOP)",
        title="One reference (the paper's cost model, appendix A)",
        caption=(
            f"memory is the cheapest from {three(low)} to {three(high)} uses"
            if low < high
            else "memory is never the cheapest at these sizes"
        )
        + f"; a reference has {model.reference_tokens} tokens, a chunk {model.chunk_tokens}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_row("implicit memory: parameters", three(cost.implicit_write / factor), "0 or more")
    table.add_row("explicit memory", three(cost.explicit_write / factor), three(cost.explicit_read / factor))
    table.add_row("text, retrieved and read", "0", f"{three(cost.text_read / factor)} or more")
    return table


def _storage_table(found: Costs, references: int) -> Table:
    table = Table(
        "keys and values of",
        "bytes per reference",
        f"{references:,} references",
        "times smaller",
        title="Storage",
        caption=f"our records add {found.position_bytes:,} bytes each, "
        f"{binary(found.position_bytes * references)} in all: which tokens were kept",
        title_justify="left",
        caption_justify="left",
    )
    first = found.sparsification[0].bytes_per_reference
    for stored in found.sparsification:
        table.add_row(*_stored_cells(stored, references, first))
    table.add_section()
    for stored in found.codecs:
        table.add_row(*_stored_cells(stored, references, first))
    return table


def _stored_cells(stored: Stored, references: int, first: int) -> tuple[str, str, str, str]:
    return (
        stored.name,
        f"{stored.bytes_per_reference:,}",
        binary(stored.bytes_per_reference * references),
        f"{first / stored.bytes_per_reference:,.0f}",
    )


def _chunk_table(found: Costs, references: int, codec: str, embedder: str, rates: str) -> Table:
    table = Table(
        "part",
        "FLOP",
        "bytes",
        "time",
        f"time for {_TOKENS:,} tokens",
        title=f"One chunk of {found.chunk_tokens} tokens, each part by itself: {references:,} references, "
        f"{codec}, {embedder}",
        caption=f"computed, not measured; nothing cached, one query at a time; {rates}",
        title_justify="left",
        caption_justify="left",
    )
    for work in found.chunk:
        table.add_row(
            work.name,
            decimal(work.flops) if work.flops else "",
            binary(work.bytes) if work.bytes else "",
            duration(work.seconds),
            duration(work.seconds * _TOKENS / found.chunk_tokens),
        )
    return table


def _writing_table(writing: Writing, references: int, codec: str) -> Table:
    table = Table(
        "compiling the bank",
        "FLOP or bytes",
        "time",
        title=f"Writing {references:,} references, {codec}: again whenever the weights change",
        title_justify="left",
    )
    table.add_row("the model", f"{decimal(writing.flops)}FLOP", duration(writing.compute_seconds))
    table.add_row("records to disk", binary(writing.bytes), duration(writing.disk_seconds))
    return table


def _embedder_of(retrieval: RetrievalConfig) -> str:
    kind = retrieval.embedder.kind
    if kind is EmbedderKind.folder:
        raise ValueError(
            "retrieval.embedder.kind=folder does not tell the embedder's size; name the nearest with "
            f"--embedder, one of {', '.join(EMBEDDERS)}"
        )
    return kind.name
