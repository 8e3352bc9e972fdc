"""`memory3 bank inspect`: a text and a prompt, on the terminal and as a page."""

import re
from pathlib import Path
from pydoc_data import topics

import pytest

from launch.opened import open_run
from tests.support.launch import Finished, trained, within

TEXT = topics.topics["import"][-220:]
PROMPT = "The import statement"


def inspect(*arguments: str) -> Finished:
    return within("bank", "inspect", "m", "--root", str(trained().root), *arguments)


def test_a_text_shows_what_was_read_kept_and_gained(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = inspect("--text", TEXT, "--details", "--html", str(page))
    assert done.code == 0, done.err
    assert re.match(
        r"m: memory (helped|hurt|changed little): [+−]?\d+\.\d\d nats over \d+ tokens\n", done.out
    )
    assert "Query previous: each chunk searches with the text of the chunk before it." in done.out
    assert "compiled with these weights when first retrieved" in " ".join(done.out.split())
    assert "reads nothing: no chunk stands before it" in done.out
    layers = open_run("m", str(trained().root)).config.model
    assert f"layer {layers.num_memory_layers - 1}, head {layers.num_kv_heads - 1}: " in done.out
    assert re.search(r"attention on memory, by layer: 0 .*%", done.out)
    read = re.findall(
        r"^ +(\S.*) \[(.+), (\d+) to (\d+)\] +0\.\d\d +\d+\.\d% +\S*\d\.\d\d nats", done.out, re.MULTILINE
    )
    assert read
    references = open_run("m", str(trained().root)).context.prepared.references
    texts = [references.text(number) for number in range(len(references))]
    for title, document, begin, end in read:
        assert title == document
        assert any(
            (cited := references.describe(number)).document == document
            and (cited.begin, cited.end) == (int(begin), int(end))
            and all(line.strip() in done.out for line in texts[number].split("\n")[:2])
            for number in range(len(references))
        )
    assert page.read_text().startswith("<!doctype html>")
    assert f"page: {page}" in done.out


def test_own_queries_are_said_to_have_seen_what_they_predict() -> None:
    done = inspect("--text", TEXT, "--query", "own")
    assert done.code == 0, done.err
    assert "has seen the tokens it predicts, so the gains flatter memory." in " ".join(done.out.split())
    assert "reads nothing" not in done.out


def test_a_prompt_is_completed_and_read_as_generation_reads() -> None:
    reading = ("--max-new-tokens", "9")
    done = inspect("--prompt", PROMPT, *reading)
    assert done.code == 0, done.err
    generated = within("generate", "m", "--root", str(trained().root), "--prompt", PROMPT, *reading)
    _, _, with_memory = generated.out.partition("--- with memory\n")
    read = re.findall(r"read at retrieval 0: (.+) \[(.+), characters (\d+) to (\d+)\]", with_memory)
    assert len(read) == 5
    for title, document, begin, end in read:
        assert f"{title} [{document}, {begin} to {end}]" in done.out
    assert "A prompt and its completion, read as generation reads" in done.out


def test_a_bank_that_users_keep_is_read_and_its_age_stated(tmp_path: Path) -> None:
    folder = str(tmp_path / "library")
    reading = ("--prompt", PROMPT, "--max-new-tokens", "2", "--bank", folder)
    refused = inspect(*reading)
    assert refused.code == 2
    assert f"there is no bank in {folder}" in refused.err
    built = within("bank", "build", "m", "--root", str(trained().root), "--bank", folder)
    assert built.code == 0, built.err
    done = inspect(*reading)
    assert done.code == 0, done.err
    stated = f"memories of {folder}, compiled 0 steps before these weights"
    assert "".join(stated.split()) in "".join(done.out.split())  # however the lines are broken


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give either --text TEXT or --prompt TEXT"),
        (("--text", "a", "--prompt", "b"), "give either --text TEXT or --prompt TEXT"),
        (("--prompt", "a", "--query", "own"), "--query own is for --text: a prompt is read as generation reads it"),
        (("--text", ""), "--text has 0 tokens; give between 1 and 128"),
        (("--text", "word " * 300), "tokens; give between 1 and 128"),
        (("--text", "Too short."), "give more than 64 tokens, or --query own"),
        (("--text", "a", "--html", "/nowhere/x.html"), "--html /nowhere/x.html: its folder does not exist"),
        (("--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens 0 is below 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_inspected_is_refused_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = inspect(*arguments)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
