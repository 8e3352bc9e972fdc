"""`memory3 bank inspect`: what a text, or a prompt and its completion, read from the bank, and whether it helped.

A text is read under the conditions of `memory3 evaluate`: every chunk reads what the chunk before it found (or, with
`--query own`, what it found itself), and references that overlap the text are refused. A prompt is read as
`memory3 generate` reads it.
Not here: measuring (`train.inspect`), the HTML page (`launch.inspection_page`).
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from data.files import write_atomic
from launch import build, inspection_page
from launch.generate import Sampling, check, complete, memory_of
from launch.inspection_page import Setting
from launch.opened import OpenedRun, open_run
from launch.page import refuse_without_folder
from memorybank.config import QueryMode
from memorybank.library import Library
from memorybank.retriever import RetrievedMemory, Retriever
from model.transformer import Memory3LM
from train.engine import InferenceEngine
from train.inspect import Chunk, Inspection, Query, Source, generation_queries, inspect_row, text_queries

_KEEP, _HELP, _HURT = (214, 158, 20), (20, 150, 130), (200, 60, 120)
_COLOURS = {"help": "green", "hurt": "red", "even": "dim"}
_BARS = " ▁▂▃▄▅▆▇█"


def run(arguments: argparse.Namespace) -> int:
    """Inspect, print, and write the page."""
    if (arguments.text is None) == (arguments.prompt is None):
        raise ValueError("give either --text TEXT or --prompt TEXT")
    if arguments.prompt is not None and arguments.query is not None:
        raise ValueError(f"--query {arguments.query} is for --text: a prompt is read as generation reads it")
    if arguments.html is not None:
        refuse_without_folder(arguments.html)
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens)
    check(sampling)
    build.quiet_third_parties()
    opened = open_run(arguments.run, arguments.root)
    library = None
    if arguments.bank is not None:
        name, stale = opened.context.embedder().name, arguments.stale == "allow"
        library = opened.library(arguments.bank, embedder=name, stale=stale)
    query = QueryMode(arguments.query or "previous")
    if arguments.text is not None:
        found, setting = inspect_text(opened, arguments.text, query, library)
    else:
        found, setting = inspect_prompt(opened, arguments.prompt, sampling, library)
    console = Console()
    console.print(terminal(found, setting, details=arguments.details))
    if arguments.html is not None:
        write_atomic(Path(arguments.html), inspection_page.render(found, setting).encode())
        console.print(f"page: {arguments.html}", soft_wrap=True)
    return 0


def inspect_text(
    opened: OpenedRun, text: str, query: QueryMode, library: Library | None = None
) -> tuple[Inspection, Setting]:
    """Look into a text, which is the beginning of a document.

    Raises:
        ValueError: It is empty, longer than the model's row, or too short for any chunk to read something.
    """
    tokenizer, model = opened.context.prepared.tokenizer, opened.config.model
    row = [tokenizer.bos_id, *tokenizer.encode(text)]
    if not 2 <= len(row) <= model.row_tokens + 1:
        raise ValueError(f"--text has {len(row) - 1} tokens; give between 1 and {model.row_tokens}")
    if query is QueryMode.previous and len(row) - 1 <= model.chunk_tokens:
        raise ValueError(
            f"--text has {len(row) - 1} tokens, one chunk, and with --query previous the first chunk reads nothing; "
            f"give more than {model.chunk_tokens} tokens, or --query own"
        )
    queries = text_queries(row, query, chunk_tokens=model.chunk_tokens)
    return _inspect(opened, row, queries, memory_of(opened, library=library), library, filtered=True)


def inspect_prompt(
    opened: OpenedRun, prompt: str, sampling: Sampling, library: Library | None = None
) -> tuple[Inspection, Setting]:
    """Complete a prompt with memory and look into prompt and completion; errors are those of `complete`."""
    tokenizer = opened.context.prepared.tokenizer
    memory = memory_of(opened, library=library)
    (completion,) = complete(opened, [prompt], sampling, memory)
    prompt_tokens = 1 + len(tokenizer.encode(prompt))
    queries = generation_queries(
        completion.row, prompt_tokens=prompt_tokens, chunk_tokens=opened.config.model.chunk_tokens
    )
    return _inspect(
        opened, completion.row, queries, memory, library, filtered=False, prompt_tokens=prompt_tokens
    )


def _inspect(
    opened: OpenedRun,
    row: list[int],
    queries: list[Query],
    memory: RetrievedMemory,
    library: Library | None,
    *,
    filtered: bool,
    prompt_tokens: int | None = None,
) -> tuple[Inspection, Setting]:
    context, tokenizer = opened.context, opened.context.prepared.tokenizer
    assert isinstance(memory.retriever, Retriever)  # no past is read here
    found = memory.retriever.neighbours(
        [tokenizer.decode(query.tokens) for query in queries],
        tokens=[row] * len(queries) if filtered else None,
    )
    model = Memory3LM(replace(opened.config.model, compile=False))  # in float32, from the run's weights
    model.load_state_dict(opened.checkpoint.weights())
    inspection = inspect_row(
        InferenceEngine(model.to(opened.engine.device)),
        row,
        queries,
        found,
        memory.reader,
        tokenizer=tokenizer,
        references=context.prepared.references if library is None else library,
        prompt_tokens=prompt_tokens,
    )
    setting = Setting(
        run=opened.folder.name,
        stage=opened.checkpoint.state.stage,
        step=opened.step,
        references=len(opened.bank_ids if library is None else library),
        generation=None if library is None else str(library.folder),
        age_steps=None if library is None else opened.step - library.settings.step,
        overlap_limit=opened.config.retrieval.overlap_evaluation if filtered else None,
        generated=prompt_tokens is not None,
    )
    return inspection, setting


def terminal(inspection: Inspection, setting: Setting, *, details: bool) -> RenderableType:
    """What is printed.

    Args:
        inspection: What was found.
        setting: Under which conditions.
        details: Whether to list what each head of each layer kept.
    """
    parts: list[RenderableType] = [
        Text(f"{setting.run}: {inspection_page.headline(inspection)}", style="bold"),
        *(Text(line, style="dim") for line in inspection_page.conditions(inspection, setting)),
        Text.assemble(
            ("text", _style(_HELP, 0.8)),
            " memory made the token likelier  ",
            ("text", _style(_HURT, 0.8)),
            " less likely  ",
            ("text", _style(_KEEP, 0.9)),
            " kept by heads of the memory layers: the more, the stronger",
        ),
    ]
    seen: set[int] = set()
    for number, chunk in enumerate(inspection.chunks):
        parts += ["", *_chunk(number, chunk, inspection, seen, details=details)]
    return Group(*parts)


def _chunk(
    number: int, chunk: Chunk, inspection: Inspection, seen: set[int], *, details: bool
) -> Iterator[RenderableType]:
    yield Text.assemble(
        (f"chunk {number}", "bold"),
        (f"  {inspection_page.nats(chunk.gain)}", _COLOURS[inspection_page.kind(chunk.gain)]),
        f" by memory over {len(chunk.predictions)} tokens",
    )
    text = Text()
    for prediction in chunk.predictions:
        colour = _HELP if prediction.gain > 0 else _HURT
        style = _style(colour, inspection_page.shade(prediction.gain))
        text.append(_printable(prediction.text), f"{style} underline" if prediction.generated else style)
    yield Padding(text, (0, 2))
    yield Text(f"  {inspection_page.reading(chunk)}", style="dim")
    if not chunk.reads:
        return
    layers = "  ".join(
        f"{layer} {_BARS[round(share * 8)]} {share:.1%}" for layer, share in enumerate(chunk.memory_L)
    )
    yield Text(f"  attention on memory, by layer: {layers}")
    table = Table(box=None, padding=(0, 2), pad_edge=True)
    for name in ("reference", "score", "attention", "adds"):
        table.add_column(name, justify="left" if name == "reference" else "right")
    for read in chunk.reads:
        citation = inspection.sources[read.reference].citation
        table.add_row(
            Text(f"{_printable(citation.title)} [{citation.document}, {citation.begin} to {citation.end}]"),
            f"{read.score:.2f}",
            f"{inspection_page.mean(read.attention_L):.1%}",
            Text(inspection_page.nats(read.gain), style=_COLOURS[inspection_page.kind(read.gain)]),
        )
    yield table
    for read in chunk.reads:
        if read.reference not in seen:
            seen.add(read.reference)
            yield from _source(inspection.sources[read.reference], details=details)


def _source(source: Source, *, details: bool) -> Iterator[RenderableType]:
    """A reference's text with what was kept, and what its heads agree on; by layer and head when asked for."""
    text = Text()
    for token, count in zip(source.tokens, source.keeping, strict=True):
        text.append(_printable(token), _style(_KEEP, (count / source.num_heads) ** 0.5))
    yield Padding(text, (1, 4, 0, 4))
    favourites = sorted(range(len(source.tokens)), key=lambda place: -source.keeping[place])[:8]
    named = ", ".join(
        f"{_printable(source.tokens[place])!r} {source.keeping[place]}" for place in sorted(favourites)
    )
    yield Padding(Text(f"kept by most of {source.num_heads} heads: {named}", style="dim"), (0, 4))
    if details:
        for layer, heads in enumerate(source.index_LGS):
            for head, places in enumerate(heads):
                kept = " · ".join(_printable(source.tokens[place]).strip() for place in places if place >= 0)
                yield Padding(Text(f"layer {layer}, head {head}: {kept}"), (0, 6))


def _style(colour: tuple[int, int, int], strength: float) -> str:
    """A background, the stronger the more it matters, with black letters: readable on dark and light terminals."""
    if strength < 0.1:
        return ""
    red, green, blue = (round(255 - (255 - part) * min(strength, 1.0)) for part in colour)
    return f"black on rgb({red},{green},{blue})"


def _printable(text: str) -> str:
    """Text without what could steer a terminal."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
