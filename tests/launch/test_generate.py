"""`memory3 generate`: completions without memory and with it, and what was read."""

import re

import pytest

from tests.support.launch import Finished, trained, within

PROMPT = "The import statement"


def complete(*arguments: str, prompt: str = PROMPT) -> Finished:
    return within("generate", "m", "--root", str(trained().root), "--prompt", prompt, *arguments)


def test_completes_without_and_with_memory_and_shows_what_was_read() -> None:
    done = complete("--max-new-tokens", "4")
    assert done.code == 0, done.err
    assert f"--- without memory\n{PROMPT}" in done.out
    without, _, with_memory = done.out.partition("--- with memory\n")
    assert with_memory.startswith(PROMPT)
    read = re.findall(r"read at retrieval 0: (.+) \[(.+), characters \d+ to \d+\]", with_memory)
    assert len(read) == 5
    assert all(title == document for title, document in read)
    assert "read at" not in without


def test_no_memory_leaves_the_second_completion_out() -> None:
    done = complete("--max-new-tokens", "4", "--no-memory")
    assert done.code == 0
    assert "--- with memory" not in done.out


@pytest.mark.parametrize(
    ("arguments", "prompt", "said"),
    [
        ((), "word " * 200, "the model was trained on rows of 128; shorten the prompt, or set --max-new-tokens lower"),
        (("--max-new-tokens", "500"), PROMPT, "the model was trained on rows of 128"),
        (("--max-new-tokens", "0"), PROMPT, "--max-new-tokens 0 is below 1; set 1 or more"),
        (("--temperature", "-1"), PROMPT, "--temperature -1.0 is below 0; set 0 for greedy decoding"),
        (("--top-p", "0"), PROMPT, "--top-p 0.0 is not within 0 and 1; set 1 for no cut"),
    ],
)  # fmt: skip
def test_what_cannot_be_generated_is_refused(arguments: tuple[str, ...], prompt: str, said: str) -> None:
    done = complete(*arguments, prompt=prompt)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
