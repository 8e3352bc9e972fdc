"""`memory3 generate`: complete a prompt without memory and with it, and show the references that were read.

Not here: decoding (`model.generate`), retrieval (`memorybank.retriever`).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from data.references import Citation, ReferenceSource
from launch import build
from launch.opened import OpenedRun, open_run
from memorybank.bank import BankReader, ColdStart
from memorybank.embedder import Embedder
from memorybank.library import Library
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
        references: The references of each retrieval, in the order of time.
    """

    text: str
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
    memory = memory_of(opened, embedder, library)
    for label, source in (("without memory", None), ("with memory", memory)):
        if source is None or not arguments.no_memory:
            (completion,) = complete(opened, [arguments.prompt], sampling, source, library)
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
    opened: OpenedRun, embedder: Embedder | None = None, library: Library | None = None
) -> RetrievedMemory:
    """Retrieval over a library, or over all that the run's bank may hold, encoded when first retrieved."""
    context, config = opened.context, opened.config
    codec, embedder = context.codec(), embedder or context.embedder()
    references: ReferenceSource = context.prepared.references if library is None else library
    records = ColdStart(None, opened.engine.encode, references, codec) if library is None else library
    retriever = Retriever(
        embedder,
        context.search(embedder).index(opened.bank_ids) if library is None else library,
        references,
        k=config.retrieval.fresh,
        candidates=config.retrieval.candidates,
    )
    return RetrievedMemory(
        retriever, context.prepared.tokenizer, BankReader(records, codec), device=opened.engine.device
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
    tokenizer = opened.context.prepared.tokenizer
    references: ReferenceSource = opened.context.prepared.references if library is None else library
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    longest, limit = max(map(len, rows)) + sampling.max_new_tokens, opened.config.model.row_tokens
    if longest > limit:
        raise ValueError(
            f"prompt and completion are {longest} tokens, the model was trained on rows of {limit}; shorten the "
            "prompt, or set --max-new-tokens lower"
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
    read = {} if memory is None else memory.references_read
    return [
        Completion(
            tokenizer.decode(tokens),
            [[references.describe(number) for number in ids] for ids in read.get(row, [])],
        )
        for row, tokens in enumerate(completions)
    ]


def print_references(completion: Completion) -> None:
    """List what was read, one line a reference."""
    for number, citations in enumerate(completion.references):
        for citation in citations:
            print(
                f"  read at retrieval {number}: {citation.title} [{citation.document}, characters "
                f"{citation.begin} to {citation.end}]"
            )
