"""`memory3 generate`: completions without memory and with it, and what was read."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from launch import generate
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


@pytest.mark.parametrize(("encoding", "line"), [("utf-8", "\u2264 \xb5"), ("ascii", r"\u2264 \u00b5")])
def test_a_line_of_json_loses_no_letter_that_its_reader_has_no_code_for(encoding: str, line: str) -> None:
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding)):
        said = generate.as_json(0, "p", "with memory", generate.Completion("\u2264 \xb5", [], []))
    assert f'"text": "{line}"' in said


OTHERS = ("A list is", "def f(x):\n    return")


def test_several_prompts_become_what_each_becomes_alone(tmp_path: Path) -> None:
    alone = [complete("--max-new-tokens", "6", prompt=prompt).out for prompt in (PROMPT, *OTHERS)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in OTHERS) + "\n\n")
    done = complete("--max-new-tokens", "6", "--prompts", str(file), "--batch", "2")
    assert done.code == 0, done.err
    shown = re.split(r"=== prompt \d of 3\n", done.out)[1:]
    assert [part.strip() for part in shown] == [part.strip() for part in alone]


def test_json_has_a_line_for_each_completion_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n\nA list is\n"))
    done = within(
        "generate", "m", "--root", str(trained().root), "--prompts", "-", "--json", "--max-new-tokens", "4"
    )
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert sorted((line["memory"], line["number"], line["prompt"]) for line in lines) == [
        ("with memory", 0, PROMPT), ("with memory", 1, "A list is"),
        ("without memory", 0, PROMPT), ("without memory", 1, "A list is"),
    ]  # fmt: skip
    assert all(len(line["references"]) == (line["memory"] == "with memory") for line in lines)
    read = next(line["references"] for line in lines if line["memory"] == "with memory")
    assert len(read[0]) == 5
    assert read[0][0].keys() >= {"document", "title", "begin", "end"}
    alone = complete("--max-new-tokens", "4", "--json", "--no-memory")
    assert [json.loads(line) for line in alone.out.splitlines()] == lines[:1]


def test_one_prompt_is_printed_as_it_grows_and_no_half_character_is() -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        told = generate._print_as_it_grows()
        seen = []
        for text in ("A", "A har", "A har\ufffd", "A har\u00e9", "A har\u00e9s"):
            told(text)
            seen.append(out.getvalue())
    assert seen == ["A", "A har", "A har", "A har\u00e9", "A har\u00e9s"]


FACT = "The lighthouse of Mirador was painted green by the sailor Ottoline."
FILLER = "A for statement loops over the items of a sequence, in the order that they appear in it. "


def test_a_long_prompts_past_becomes_memories_and_its_far_fact_is_found() -> None:
    prompt = f"{FILLER * 8}\n{FACT}\n{FILLER * 40}\nThe lighthouse of Mirador was painted"
    done = complete("--max-new-tokens", "4", "--past", "memory", "--no-memory", prompt=prompt)
    assert done.code == 0, done.err
    tokens, pieces = map(int, re.findall(r"the (\d+) before them became (\d+) memories", done.out)[0])
    assert tokens > 10 * 128
    assert tokens / 128 <= pieces < tokens / 90
    without, _, with_past = done.out.partition("--- with its past alone\n")
    assert "read at" not in without
    assert with_past.startswith(prompt)
    spans = [
        (int(begin), int(end))
        for begin, end in re.findall(
            r"read at retrieval 1: earlier in the prompt \[prompt, characters (\d+) to (\d+)\]", with_past
        )
    ]
    assert len(spans) == 5
    assert all(begin < end for begin, end in spans)
    first, last = spans[0]
    assert "lighthouse of Mirador" in prompt[first:last]


def test_a_short_past_is_read_whole_beside_the_bank() -> None:
    prompt = FILLER * 12
    done = complete("--max-new-tokens", "4", "--past", "memory", prompt=prompt)
    assert done.code == 0, done.err
    (pieces,) = re.findall(r"became (\d+) memories", done.out)
    read = re.findall(r"read at retrieval 0: (.+) \[", done.out)
    assert 1 <= int(pieces) <= 4
    assert read.count("earlier in the prompt") == int(pieces)
    assert len(read) == 5


def test_a_prompt_that_fits_has_no_past() -> None:
    plain, asked = (complete("--max-new-tokens", "4", *more) for more in ((), ("--past", "memory")))
    assert plain.out == asked.out


@pytest.mark.parametrize(
    ("arguments", "prompt", "said"),
    [
        ((), "word " * 200, "the model was trained on rows of 128; shorten the prompt, or set --max-new-tokens lower"),
        (("--max-new-tokens", "500"), PROMPT, "the model was trained on rows of 128"),
        (("--max-new-tokens", "128", "--past", "memory"), PROMPT, "rows of 128; set --max-new-tokens to 127 or less\n"),
        (("--max-new-tokens", "0"), PROMPT, "--max-new-tokens 0 is below 1; set 1 or more"),
        (("--temperature", "-1"), PROMPT, "--temperature -1.0 is below 0; set 0 for greedy decoding"),
        (("--batch", "0"), PROMPT, "--batch 0 is below 1; set 1 or more"),
        (("--prompts", "missing.txt"), PROMPT, "--prompts missing.txt cannot be read"),
        (("--prompt", "word " * 200), PROMPT, "prompt 2 and completion are"),
        (("--prompt", "word " * 200, "--past", "memory"), PROMPT, "give one --prompt at a time"),
        (("--top-p", "0"), PROMPT, "--top-p 0.0 is not within 0 and 1; set 1 for no cut"),
    ],
)  # fmt: skip
def test_what_cannot_be_generated_is_refused(arguments: tuple[str, ...], prompt: str, said: str) -> None:
    done = complete(*arguments, prompt=prompt)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


@pytest.mark.parametrize("line", ["word", '{"text": "a"}', '{"prompt": 1}', "[1]"])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=r'prompts.jsonl:2 is no JSON object with a text "prompt"'):
        generate.prompts_of([], str(file))


def test_lines_of_other_systems_are_prompts_without_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("A list is\r\nThe statement\r\n", newline=""))
    assert generate.prompts_of([], "-") == ["A list is", "The statement"]


def test_no_prompt_is_said() -> None:
    with pytest.raises(ValueError, match="give --prompt TEXT, or --prompts FILE"):
        generate.prompts_of([], None)
