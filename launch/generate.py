"""`memory3 generate`: complete prompts without memory and with it, and show the references that were read.

A single prompt's completion is printed while it grows; several are decoded `--batch` at a time, and printed when all
are there, or with `--json` one by one as they end. Of a prompt that is longer than the model's row, the row holds the
end; the past, what lies before, may become memories (`--past memory`).
Not here: decoding (`model.generate`), retrieval (`memorybank.retriever`).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.references import Citation, ReferenceSource
from launch import build
from launch.opened import OpenedRun, open_run
from memorybank.bank import BankReader, Records
from memorybank.embedder import Embedder
from memorybank.library import Library
from memorybank.past import Past, PastReferences, WithPast, compile_past
from memorybank.retriever import RetrievedMemory, Retriever
from model.generate import stream


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Length of the completion.
        temperature: 0 decodes greedily.
        top_p: Nucleus.
        seed: Seed of the sampling.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model made of a prompt.

    Attributes:
        text: The completion, without the prompt.
        row: Tokens of `<s>`, prompt and completion.
        references: The references of each retrieval, in the order of time.
    """

    text: str
    row: list[int]
    references: list[list[Citation]]


Told = Callable[[str], None]
"""Is told a completion's text so far, token by token."""


def run(arguments: argparse.Namespace) -> int:
    """Complete, and print."""
    build.quiet_third_parties()
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    check(sampling)
    if arguments.batch < 1:
        raise ValueError(
            f"--batch {arguments.batch} is below 1; set 1 or more prompts to be decoded together"
        )
    prompts = prompts_of(arguments.prompt, arguments.prompts)
    opened = open_run(arguments.run, arguments.root)
    embedder, library = opened.context.embedder(), None
    notes = sys.stderr if arguments.json else sys.stdout
    if arguments.bank is not None:
        library = opened.library(arguments.bank, embedder=embedder.name, stale=arguments.stale == "allow")
        age = opened.step - library.settings.step
        print(f"memories of {library.folder}, compiled {age} steps before these weights\n", file=notes)
    rows, room = [_row(opened, prompt) for prompt in prompts], _room(opened, sampling)
    past = None
    if arguments.past == "memory" and 1 <= room < max(map(len, rows)) - 1:
        if len(rows) > 1:
            raise ValueError(
                "--past memory reads the past of one prompt; give one --prompt at a time, or shorter ones"
            )
        rows, before = [rows[0][-room:]], rows[0][1:-room]
        past = past_of(opened, before, library)
        print(
            f"the last {room} tokens of the prompt are the row; the {len(before)} before them became "
            f"{len(past.references)} memories\n",
            file=notes,
        )
    _refuse_long(opened, rows, sampling)  # before anything is printed
    sources: list[tuple[str, RetrievedMemory | None]] = [("without memory", None)]
    if not arguments.no_memory:
        sources.append(("with memory", memory_of(opened, embedder, library, past=past)))
    elif past is not None:
        sources.append(("with its past alone", memory_of(opened, embedder, library, past=past, bank=False)))

    def completions(
        source: RetrievedMemory | None, told: Told | None = None
    ) -> Iterator[tuple[int, Completion]]:
        return _complete(opened, rows, sampling, source, library, past, batch=arguments.batch, told=told)

    if arguments.json:
        for label, source in sources:
            for number, completion in completions(source):
                print(as_json(number, prompts[number], label, completion), flush=True)
    elif len(prompts) == 1:
        _show_one(prompts[0], sources, completions)
    else:
        _show_all(prompts, [(label, dict(completions(source))) for label, source in sources])
    return 0


def _show_one(
    prompt: str,
    sources: Sequence[tuple[str, RetrievedMemory | None]],
    completions: Callable[[RetrievedMemory | None, Told], Iterator[tuple[int, Completion]]],
) -> None:
    for label, source in sources:
        print(f"--- {label}\n{prompt}", end="", flush=True)
        ((_, completion),) = completions(source, _print_as_it_grows())
        print("\n")
        print_references(completion)


def _show_all(prompts: Sequence[str], found: Sequence[tuple[str, dict[int, Completion]]]) -> None:
    for number, prompt in enumerate(prompts):
        print(f"=== prompt {number + 1} of {len(prompts)}")
        for label, completed in found:
            print(f"--- {label}\n{prompt}{completed[number].text}\n")
            print_references(completed[number])


def prompts_of(given: Sequence[str], file: str | None) -> list[str]:
    """Return all prompts: those given, then those of a file, a line each, or `-` for the standard input.

    Lines of a file `.jsonl` are JSON objects with a `prompt`, which may have several lines; empty lines are none.

    Raises:
        ValueError: There is no prompt, or no such file, or a line is not what it should be.
    """
    prompts = list(given)
    if file is not None:
        try:
            content = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise ValueError(f"--prompts {file} cannot be read: {problem}") from problem
        for number, line in enumerate(content.replace("\r\n", "\n").split("\n"), start=1):
            if line.strip():
                prompts.append(_of_json(line, f"{file}:{number}") if file.endswith(".jsonl") else line)
    if not prompts:
        raise ValueError("there is no prompt; give --prompt TEXT, or --prompts FILE with one a line")
    return prompts


def _of_json(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(f'{place} is no JSON object with a text "prompt"; write {{"prompt": "..."}} a line')
    return prompt


def as_json(number: int, prompt: str, label: str, completion: Completion) -> str:
    """A completion on one line, with its prompt's number from 0, and what was read at each retrieval."""
    read = [[asdict(citation) for citation in citations] for citations in completion.references]
    told = {"number": number, "memory": label, "prompt": prompt, "text": completion.text, "references": read}
    return json.dumps(told, ensure_ascii=(sys.stdout.encoding or "utf-8").lower() != "utf-8")


def check(sampling: Sampling) -> None:
    """Refuse settings that no token can be chosen by.

    Raises:
        ValueError: Naming the option.
    """
    if sampling.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {sampling.max_new_tokens} is below 1; set 1 or more")
    if not sampling.temperature >= 0:
        raise ValueError(f"--temperature {sampling.temperature} is below 0; set 0 for greedy decoding")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"--top-p {sampling.top_p} is not within 0 and 1; set 1 for no cut")


def memory_of(
    opened: OpenedRun,
    embedder: Embedder | None = None,
    library: Library | None = None,
    *,
    past: Past | None = None,
    bank: bool = True,
) -> RetrievedMemory:
    """Retrieval over a library, or over all that the run's bank may hold, and over a prompt's past.

    What no library holds is encoded when first retrieved.

    Args:
        opened: The run.
        embedder: Searches.
        library: What is read instead of the run's own references.
        past: The prompt's past (`past_of`).
        bank: Whether the library, or the run's references, are read at all.
    """
    context, config = opened.context, opened.config
    embedder = embedder or context.embedder()
    references: ReferenceSource = context.prepared.references if library is None else library
    records, codec = opened.records(library)
    search: Retriever | WithPast
    source: Records = records
    both = None
    if bank or past is None:
        search = Retriever(
            embedder,
            context.search(embedder).index(opened.bank_ids) if library is None else library,
            references,
            k=config.retrieval.fresh,
            candidates=config.retrieval.candidates,
            limit=config.retrieval.overlap_evaluation,  # for callers that give tokens to compare with
        )
        both = search, records
    if past is not None:
        search = source = WithPast(
            past, embedder, k=config.retrieval.fresh, first_id=_first_of_past(opened, library), bank=both
        )
    return RetrievedMemory(
        search, context.prepared.tokenizer, BankReader(source, codec), device=opened.engine.device
    )


def past_of(opened: OpenedRun, tokens: Sequence[int], library: Library | None = None) -> Past:
    """Compile the past of a prompt, in windows of the model's row whatever the bank's context.

    Args:
        opened: The run.
        tokens: The past.
        library: What is read beside it; its codec serves the past too.
    """
    context, model = opened.context, opened.config.model
    references = PastReferences(tokens, context.prepared.tokenizer, reference_tokens=model.reference_tokens)
    return compile_past(
        references,
        opened.engine.encode,
        opened.codec() if library is None else opened.codec_of(library),
        context.embedder(),
        window_tokens=max(model.row_tokens, model.reference_tokens),
    )


def complete(
    opened: OpenedRun,
    prompts: Sequence[str],
    sampling: Sampling,
    memory: RetrievedMemory | None,
    library: Library | None = None,
) -> list[Completion]:
    """Complete prompts, each the beginning of a document; the memory's references are of `library`, if there is one.

    Raises:
        ValueError: A prompt and its completion do not fit the model's row.
    """
    rows = [_row(opened, prompt) for prompt in prompts]
    completed = dict(_complete(opened, rows, sampling, memory, library, None))
    return [completed[number] for number in range(len(rows))]


def _complete(
    opened: OpenedRun,
    rows: Sequence[list[int]],
    sampling: Sampling,
    memory: RetrievedMemory | None,
    library: Library | None,
    past: Past | None,
    *,
    batch: int | None = None,
    told: Told | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Yield each row's completion with its number, as soon as it ends."""
    _refuse_long(opened, rows, sampling)
    references: ReferenceSource = opened.context.prepared.references if library is None else library
    first_of_past, decode = _first_of_past(opened, library), opened.context.prepared.tokenizer.decode

    def describe(number: int) -> Citation:
        if past is not None and number >= first_of_past:
            return past.references.describe(number - first_of_past)
        return references.describe(number)

    new: list[list[int]] = [[] for _ in rows]
    for number, token in stream(
        opened.engine.model,
        rows,
        max_new_tokens=sampling.max_new_tokens,
        batch=batch,
        memory=memory,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    ):
        if token is not None:
            new[number].append(token)
            if told is not None:
                told(decode(new[number]))
            continue
        read = [] if memory is None else memory.references_read.get(number, [])
        cited = [[describe(id) for id in ids] for ids in read]
        yield number, Completion(decode(new[number]), [*rows[number], *new[number]], cited)


def _refuse_long(opened: OpenedRun, rows: Sequence[list[int]], sampling: Sampling) -> None:
    longest, room = max(map(len, rows)), _room(opened, sampling)
    if longest > room or room < 1:
        remedy = "shorten the prompt, or set --max-new-tokens lower, or --past memory"
        if room < 1:
            remedy = f"set --max-new-tokens to {opened.config.model.row_tokens - 1} or less"
        which = f"prompt {[*map(len, rows)].index(longest) + 1}" if len(rows) > 1 else "prompt"
        raise ValueError(
            f"{which} and completion are {longest + sampling.max_new_tokens} tokens, the model was trained on rows of "
            f"{opened.config.model.row_tokens}; {remedy}"
        )


def _print_as_it_grows() -> Told:
    """Print what a text has more than before, but no character that may be half of one."""
    printed = 0

    def told(text: str) -> None:
        nonlocal printed
        whole = text.rstrip("\ufffd")
        print(whole[printed:], end="", flush=True)
        printed = max(printed, len(whole))

    return told


def _first_of_past(opened: OpenedRun, library: Library | None) -> int:
    """The number of a past's first reference: behind all that the bank may hold."""
    return len(opened.context.prepared.references) if library is None else library.next_reference


def _row(opened: OpenedRun, prompt: str) -> list[int]:
    """The tokens of a prompt as the beginning of a document."""
    tokenizer = opened.context.prepared.tokenizer
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def _room(opened: OpenedRun, sampling: Sampling) -> int:
    """Tokens of a prompt that fit the model's row beside the completion."""
    return opened.config.model.row_tokens - sampling.max_new_tokens


def print_references(completion: Completion) -> None:
    """List what was read, one line a reference."""
    for number, citations in enumerate(completion.references):
        for citation in citations:
            print(
                f"  read at retrieval {number}: {citation.title} [{citation.document}, characters "
                f"{citation.begin} to {citation.end}]"
            )
