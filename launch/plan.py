"""`memory3 plan`: what a run will take, before anything is started. No GPU is needed, nor torch but for `--search`.

The resolved configuration; tables of (1) the parameters, (2) both stages: FLOPs, rate, time, price, (3) memory of a
rank under each ZeRO stage, (4) bank and disk; then what will not work, each with what would; or the same as JSON.
Not here: the figures (`launch.planning` and what it calls), preparing the corpus, starting ranks.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launch import resolved
from launch.compose import compose_config, to_yaml
from launch.config import RunConfig
from launch.devices import DEVICES, Device, device_here, memory_here
from launch.forecast import forecast, held_bytes
from launch.planning import USABLE, BankPlan, DiskPlan, Problem, RunPlan, Site, StagePlan, plan
from launch.units import binary, decimal, duration, three, whole_number
from model.flops import ParameterCount
from train.footprint import RankMemory, number_bytes

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was looked at: the configuration as it will be trained, the site, and what is to be said of both."""

    config: RunConfig
    site: Site
    notes: list[Problem]


def run(arguments: argparse.Namespace) -> int:
    """Compose, look at the site, compute, print."""
    config = compose_config(arguments.overrides)
    if arguments.search:
        from launch import searching

        searching.search(config)
    seen = _look(config, arguments)
    planned = plan(seen.config, seen.site)
    problems = [*seen.notes, *planned.problems]
    if arguments.json:
        print(json.dumps(_json(seen, planned, problems)))
        return 0
    console = Console(width=max(Console().width, _WIDTH))
    for part in (
        _heading(seen),
        resolved.table(seen.config),
        _parameters(planned.parameters, number_bytes(seen.config.engine.precision)),
        _stages(planned.stages, seen),
        _memory(planned.stages, seen),
        _disk(planned.bank, planned.disk, seen),
        _problems(problems),
    ):
        console.print(Padding(part, (0, 0, 1, 0)), highlight=False)
    return 0


def _look(config: RunConfig, arguments: argparse.Namespace) -> _Seen:
    """Return what is known of the site; with `--config-only`, what the command line says of it."""
    notes = []
    found, count = device_here()
    name = arguments.device or found
    device = _device(name, arguments)
    if name == "cpu":  # a rank's share of the cores
        threads = config.engine.threads_per_rank
        device = replace(
            device, tflops=device.tflops * threads, float32_tflops=device.float32_tflops * threads
        )
    if arguments.tflops is not None:
        device = replace(device, tflops=arguments.tflops, float32_tflops=arguments.tflops)
    memory = device.memory_bytes
    if arguments.memory is not None:
        memory = round(arguments.memory * 2**30)
    sizes = epochs = free_disk = host_memory = None
    held = 0
    if not arguments.config_only:
        from data.prepare import prepared_sizes

        root = Path(config.paths.root)
        sizes = prepared_sizes(config.data, root / "prepared")
        if sizes is not None:
            notes += _held_out(config, root / "prepared")
            if not notes:
                try:
                    epochs = forecast(config, sizes)
                except ValueError as refused:
                    notes.append(_problem(refused))
        there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
        free_disk = shutil.disk_usage(there).free
        held = held_bytes(config)
        if name == found:
            host_memory = memory_here()
            memory = host_memory // config.engine.num_ranks if memory is None else memory
        wanted = config.engine.num_ranks * (config.engine.threads_per_rank if name == "cpu" else 1)
        if name == found and wanted > count:
            what = "threads" if name == "cpu" else "ranks"
            notes.append(
                Problem(
                    f"{wanted} {what} on this machine's {count} {'cores' if name == 'cpu' else 'GPUs'}",
                    f"engine.num_ranks={max(1, count // max(1, wanted // config.engine.num_ranks))}",
                )
            )
    config.model.vocab_size, note = _vocabulary(config, None if sizes is None else sizes.vocab_size)
    notes += note
    references = None if sizes is None else sizes.references
    if arguments.references is not None:
        references = whole_number(arguments.references)
    site = Site(
        device=device,
        mfu=arguments.mfu,
        price=arguments.price,
        memory_bytes=memory,
        host_memory=host_memory,
        free_disk=free_disk,
        held=held,
        documents=None if sizes is None else sizes.documents,
        references=references,
        epochs=epochs,
        tokens=None if sizes is None else sizes.tokens,
        prepared_bytes=None if sizes is None else sizes.num_bytes,
    )
    return _Seen(config, site, notes)


def _device(name: str, arguments: argparse.Namespace) -> Device:
    """The device of this name; one that is not known has the figures that the command line states.

    Raises:
        ValueError: It states none.
    """
    if name in DEVICES:
        return DEVICES[name]
    if arguments.tflops is None or arguments.memory is None:
        raise ValueError(
            f"the figures of this machine's {name} are not known here; give --tflops X and --memory GIB from its data "
            "sheet, or --device of a known one"
        )
    return Device(name, arguments.tflops, arguments.tflops, round(arguments.memory * 2**30))


def _held_out(config: RunConfig, prepared: Path) -> list[Problem]:
    """What a prepared corpus lacks that training, and an evaluation of the test split that is wanted, will read."""
    from data.documents import Split
    from data.shards import TokenShards

    shards, notes = TokenShards.open(prepared / config.data.name / "shards"), []
    for split in (Split.validation, Split.test) if config.data.test_fraction else (Split.validation,):
        try:
            shards.held_out(split, row_tokens=config.model.row_tokens)
        except ValueError as refused:
            notes.append(_problem(refused))
    return notes


def _problem(refused: ValueError) -> Problem:
    """What a refusal says, and its remedy, which follows a semicolon."""
    says, _, remedy = str(refused).partition("; ")
    return Problem(says, remedy.removeprefix("set "))


def _vocabulary(config: RunConfig, prepared: int | None) -> tuple[int, list[Problem]]:
    """Return the vocabulary that will be trained, which is the tokenizer's."""
    stated = config.model.vocab_size
    if prepared is None and config.data.tokenizer_model is not None:
        return stated, []
    pieces = prepared or config.data.vocab_size
    if pieces == stated:
        return pieces, []
    says = f"model.vocab_size={stated:,} is not what will be trained: the tokenizer's {pieces:,} pieces are"
    return pieces, [
        Problem(says, f"data.vocab_size={stated}, or data.tokenizer_model=FILE, if {stated:,} are wanted")
    ]


def _json(seen: _Seen, planned: RunPlan, problems: Sequence[Problem]) -> dict[str, Any]:
    import yaml

    stages = []
    for stage in planned.stages:
        memory = {
            f"zero_{zero}": {**asdict(taken), "total": taken.total, "resident": taken.resident}
            for zero, taken in enumerate(stage.memory)
        }
        stages.append({**asdict(stage), "days": stage.days, "memory": memory})
    parameters = planned.parameters
    return {
        "config": yaml.safe_load(to_yaml(seen.config)),
        "site": asdict(replace(seen.site, epochs=None)),
        "parameters": {
            **asdict(parameters),
            "non_embedding": parameters.non_embedding,
            "total": parameters.total,
        },
        "stages": stages,
        "bank": None if planned.bank is None else _bank_json(planned.bank),
        "disk": {**asdict(planned.disk), "written": planned.disk.written, "total": planned.disk.total},
        "problems": [asdict(problem) for problem in problems],
    }


def _bank_json(bank: BankPlan) -> dict[str, Any]:
    epochs = [{**asdict(epoch), "most": epoch.most} for epoch in bank.epochs]
    return {**asdict(bank), "epochs": epochs, "index": _index_text(bank)}


def _heading(seen: _Seen) -> Group:
    config, model = seen.config, seen.config.model
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    grid.add_row("run", f"{config.run}, in {config.paths.root}; data {config.data.name}")
    grid.add_row(
        "model",
        f"{model.num_layers} layers of {model.width}, {model.num_heads} heads over {model.num_kv_heads} key/value "
        f"heads of {model.head_size}, feed-forward {model.ffn_width}, vocabulary {model.vocab_size:,}; "
        f"{model.num_memory_layers} memory layers",
    )
    grid.add_row(
        "engine",
        f"{config.engine.num_ranks} ranks, ZeRO-{config.engine.zero_stage}, {config.engine.precision.name}"
        f"{', activations recomputed' if model.activation_checkpointing else ''}",
    )
    memory = (
        ""
        if seen.site.memory_bytes is None
        else f", {binary(seen.site.memory_bytes)} of memory for each rank"
    )
    grid.add_row(
        "site",
        f"{seen.site.device.name}: {seen.site.device.peak(config.engine.precision):g} TFLOP/s a rank"
        f"{memory}; MFU {seen.site.mfu:g}",
    )
    return Group(Text("memory3 plan", style="bold"), grid)


def _parameters(count: ParameterCount, size: int) -> Table:
    table = _table("parameters", "number", "share", "bytes", title="Parameters, exact")
    parts = [(field.name.replace("_", "-"), getattr(count, field.name)) for field in fields(count)]
    for name, number in parts:
        table.add_row(name, f"{number:,}", f"{number / count.total:.1%}", binary(number * size))
    table.add_section()
    table.add_row(
        "without embedding and head", f"{count.non_embedding:,}", "", binary(count.non_embedding * size)
    )
    table.add_row("all", f"{count.total:,}", "", binary(count.total * size), style="bold")
    return table


def _stages(stages: Sequence[StagePlan], seen: _Seen) -> Table:
    config, site = seen.config, seen.site
    table = _table(
        "stage",
        *(stage.name for stage in stages),
        title="Stages",
        caption=f"time = (tokens x PaLM FLOPs + memory's) / (MFU {site.mfu:g} x "
        f"{site.device.peak(config.engine.precision):g} TFLOP/s x {config.engine.num_ranks} ranks); search, "
        f"validation and evaluation are not counted; memory's share is an upper bound",
    )

    def row(name: str, cells: Sequence[str]) -> None:
        table.add_row(name, *cells)

    settings = [getattr(config, stage.name) for stage in stages]
    row(
        "steps x rows x tokens",
        [
            f"{stage.steps:,} x {setting.rows_per_step:,} x {config.model.row_tokens:,}"
            for stage, setting in zip(stages, settings, strict=True)
        ],
    )
    row("text tokens", [decimal(stage.tokens) for stage in stages])
    row(
        "micro-batches a step and rank",
        [
            f"{stage.accumulate} of {setting.micro_rows} rows"
            for stage, setting in zip(stages, settings, strict=True)
        ],
    )
    row("FLOPs a token, PaLM", [decimal(stage.token_flops.palm) for stage in stages])
    row("FLOPs a token, causal", [decimal(stage.token_flops.causal) for stage in stages])
    row(
        "memory adds, at most",
        [
            f"{decimal(stage.memory_token_flops)} ({stage.memory_token_flops / stage.token_flops.palm:.0%})"
            if stage.memory_token_flops
            else "-"
            for stage in stages
        ],
    )
    row("tokens/s", [three(stage.tokens_per_second) for stage in stages])
    row("time", [duration(stage.seconds) for stage in stages])
    if site.price is not None:
        row(f"price, {site.price:g} a rank and hour", [three(stage.price or 0.0) for stage in stages])
    if len(stages) > 1:
        table.add_section()
        total = f"{duration(sum(stage.seconds for stage in stages))}"
        if site.price is not None:
            total += f", {three(sum(stage.price or 0.0 for stage in stages))}"
        table.add_row("both", *[""] * (len(stages) - 1), total, style="bold")
    return table


_PARTS = ("parameters", "gradients", "masters", "moments", "activations", "memories", "temporaries", "copies")


def _memory(stages: Sequence[StagePlan], seen: _Seen) -> Table:
    chosen = seen.config.engine.zero_stage
    table = _table(
        "rank's memory",
        *(f"ZeRO-{zero}{' (chosen)' if zero == chosen else ''}" for zero in range(4)),
        title=f"Memory of each of {seen.config.engine.num_ranks} ranks at its peak",
        caption="beside libraries (0.4 GiB a process, a GPU's context), embedder and search index on rank 0",
    )
    for stage in stages:
        table.add_row(Text(stage.name, style="bold"))
        for part in _PARTS:
            sizes = [getattr(taken, part) for taken in stage.memory]
            if any(sizes):
                table.add_row(f"  {part}", *map(_bytes, sizes))
        table.add_row("  all", *(_total(taken, seen.site.memory_bytes) for taken in stage.memory))
        if any(taken.gaps for taken in stage.memory):
            table.add_row("  with the heap's gaps", *(_bytes(taken.resident) for taken in stage.memory))
        if any(taken.peak != "backward" for taken in stage.memory):
            table.add_row("  peak in", *(taken.peak for taken in stage.memory), style="dim")
        table.add_section()
    return table


def _total(taken: RankMemory, limit: int | None) -> Text:
    style = "bold" if limit is None else "bold green" if taken.resident <= limit * USABLE else "bold red"
    return Text(_bytes(taken.total), style=style)


def _disk(bank: BankPlan | None, disk: DiskPlan, seen: _Seen) -> Table:
    table = _table("in " + seen.config.paths.root, "size", "how", title="Bank and disk")
    prepare = (
        "the corpus is not prepared" if seen.site.free_disk is not None else "not looked at (--config-only)"
    )
    table.add_row(
        "prepared corpus",
        _size(disk.prepared),
        prepare
        if disk.prepared is None
        else f"{seen.site.documents:,} documents, {decimal(seen.site.tokens or 0)} tokens",
    )
    if bank is not None:
        references = seen.site.references
        how = (
            "how many references there are is not known"
            if references is None
            else f"{references:,} references"
        )
        table.add_row("search vectors and index", _size(disk.search), how)
        asking = sum(epoch.asking for epoch in bank.epochs)
        table.add_row(
            "vectors of queries", _size(disk.queries), f"at most {decimal(asking)} chunks, and what they find"
        )
    table.add_row(
        "checkpoints",
        binary((disk.checkpoints + 1) * disk.checkpoint),
        f"{disk.checkpoints} that stay and one being written, {binary(disk.checkpoint)} each",
    )
    if bank is not None:
        table.add_row(
            "bank's generations",
            binary(disk.bank),
            f"{bank.generations:,} at a time, of {len(bank.epochs):,} epochs; {_largest(bank)}",
        )
    table.add_section()
    free = "" if seen.site.free_disk is None else f"{binary(seen.site.free_disk)} are free"
    if seen.site.held:
        free += f", {binary(seen.site.held)} of this lie there already"
    all_of_it = f"{'' if disk.whole else 'at least '}{binary(disk.total)}"
    table.add_row(Text("all", style="bold"), Text(all_of_it, style="bold"), free)
    if bank is not None and bank.index is not None:
        table.caption = f"search: {_index_text(bank)}"
    return table


def _largest(bank: BankPlan) -> str:
    """The largest generation, as far as it is known."""
    size = f"{bank.references:,} references and {binary(bank.generation_bytes)}"
    if bank.exact:
        return f"{size} in the largest, as found"
    if bank.expected_references is None or bank.expected_bytes is None:
        return f"at most {size} each"
    return (
        f"at most {size} each; some {bank.expected_references:,} and {binary(bank.expected_bytes)} are expected "
        "(--search tells)"
    )


def _index_text(bank: BankPlan) -> str | None:
    return None if bank.index is None else bank.index.describe()


def _problems(problems: Sequence[Problem]) -> Group:
    if not problems:
        return Group(Text("nothing stands in the way of this run", style="green"))
    lines = [Text(f"{len(problems)} to look at", style="bold yellow")]
    for problem in problems:
        lines += [Text(f"- {problem.says}"), Text(f"  set: {problem.remedy}", style="green")]
    return Group(*lines)


def _table(first: str, *others: str, title: str, caption: str | None = None) -> Table:
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", title_style="bold"
    )
    table.add_column(first)
    for other in others:
        table.add_column(other, justify="left" if other == "how" else "right", overflow="fold")
    return table


def _size(num_bytes: int | None) -> str:
    return "not known" if num_bytes is None else binary(num_bytes)


def _bytes(num_bytes: int) -> str:
    return binary(num_bytes) if num_bytes else "-"
