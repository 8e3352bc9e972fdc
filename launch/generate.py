"""`memory3 generate`: complete a prompt without memory and with it, and show the references that were read.

Of a prompt that is longer than the model's row, the row holds the end; the past, what lies before, may become
memories (`--past memory`).
Not here: decoding (`model.generate`), retrieval (`memorybank.retriever`).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from data.references import Citation, ReferenceSource
from launch import build
from launch.opened import OpenedRun, open_run
from memorybank.bank import BankReader, Records
from memorybank.embedder import Embedder
from memorybank.library import Library
from memorybank.past import Past, PastReferences, WithPast, compile_past
from memorybank.retriever import RetrievedMemory, Retriever
from model.generate import generate


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


def run(arguments: argparse.Namespace) -> int:
    """Complete, and print."""
    build.quiet_third_parties()
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    check(sampling)
    opened = open_run(arguments.run, arguments.root)
    embedder, library = opened.context.embedder(), None
    if arguments.bank is not None:
        library = opened.library(arguments.bank, embedder=embedder.name, stale=arguments.stale == "allow")
        age = opened.step - library.settings.step
        print(f"memories of {library.folder}, compiled {age} steps before these weights\n")
    row, room = _row(opened, arguments.prompt), _room(opened, sampling)
    past = None
    if arguments.past == "memory" and 1 <= room < len(row) - 1:
        row, before = row[-room:], row[1:-room]
        past = past_of(opened, before, library)
        print(
            f"the last {len(row)} tokens of the prompt are the row; the {len(before)} before them became "
            f"{len(past.references)} memories\n"
        )
    sources: list[tuple[str, RetrievedMemory | None]] = [("without memory", None)]
    if not arguments.no_memory:
        sources.append(("with memory", memory_of(opened, embedder, library, past=past)))
    elif past is not None:
        sources.append(("with its past alone", memory_of(opened, embedder, library, past=past, bank=False)))
    for label, source in sources:
        (completion,) = _complete(opened, [row], sampling, source, library, past)
        print(f"--- {label}\n{arguments.prompt}{completion.text}\n")
        print_references(completion)
    return 0


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
    return _complete(opened, [_row(opened, prompt) for prompt in prompts], sampling, memory, library, None)


def _complete(
    opened: OpenedRun,
    rows: Sequence[list[int]],
    sampling: Sampling,
    memory: RetrievedMemory | None,
    library: Library | None,
    past: Past | None,
) -> list[Completion]:
    longest, room = max(map(len, rows)), _room(opened, sampling)
    if longest > room or room < 1:
        limit = opened.config.model.row_tokens
        raise ValueError(
            f"prompt and completion are {longest + sampling.max_new_tokens} tokens, the model was trained on rows of "
            f"{limit}; shorten the prompt, or set --max-new-tokens lower, or --past memory"
        )
    completions = generate(
        opened.engine.model,
        rows,
        max_new_tokens=sampling.max_new_tokens,
        memory=memory,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    references: ReferenceSource = opened.context.prepared.references if library is None else library
    first_of_past = _first_of_past(opened, library)

    def describe(number: int) -> Citation:
        if past is not None and number >= first_of_past:
            return past.references.describe(number - first_of_past)
        return references.describe(number)

    read = {} if memory is None else memory.references_read
    return [
        Completion(
            opened.context.prepared.tokenizer.decode(tokens),
            [*rows[row], *tokens],
            [[describe(number) for number in ids] for ids in read.get(row, [])],
        )
        for row, tokens in enumerate(completions)
    ]


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
