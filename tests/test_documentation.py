"""Every command of the README and of docs/ is executed, as it stands there."""

import argparse
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.documentation import topics
from launch import cli, doctor, formats_page
from tests.support.pages import ROOT, Block, Reader, blocks
from tests.support.wandb_server import NOBODY, ask_only

PAGES = (
    *("README.md", "docs/tutorial.md", "docs/operations.md", "docs/bank.md", "docs/science.md"),
    *("docs/report.md", "docs/inspect.md", "docs/faults.md"),
)
MAKE = "make demo     # a model is pretrained"


def walk(folder: Path, monkeypatch: pytest.MonkeyPatch, *, slow: bool) -> list[Block]:
    """Type what all pages say, from the first to the last; what was typed."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(doctor, "_WRITTEN_BYTES", 2 << 20)
    ask_only(NOBODY, folder, monkeypatch)
    topics(folder / "corpus.jsonl")
    (folder / "docs").mkdir()
    (folder / "benchmarks/results").mkdir(parents=True)
    shown = (ROOT / "docs/inspect.txt").read_text(encoding="utf-8")
    (folder / "docs/inspect.txt").write_text(shown[:300], encoding="utf-8")  # rows are short here
    kept = (folder / "corpus.jsonl").read_bytes()
    reader, typed = Reader(folder), []
    for page in PAGES:
        for block in blocks(page):
            if block.mark == "elsewhere" or (block.mark == "slow" and not slow):
                continue
            failed = reader.types(block.text)
            assert not failed, f"{block.page}, line {block.line}: {failed}"
            (folder / "corpus.jsonl").write_bytes(kept)  # the tutorial makes a greater one
            typed.append(block)
    return typed


def test_what_the_pages_say_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = walk(tmp_path / "here", monkeypatch, slow=False)
    assert {block.page for block in typed} == {
        page for page in PAGES if any(not b.mark for b in blocks(page))
    }
    assert sum(block.text.count("memory3 ") for block in typed) > 30


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_takes_longer_can_be_typed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(block.mark == "slow" for block in walk(tmp_path / "here", monkeypatch, slow=True))


def test_no_command_hides_from_the_tests() -> None:
    """Blocks are fenced and marked; what is left are the two commands of make."""
    for page in [Path("README.md"), *sorted(Path("docs").glob("*.md"), key=str)]:
        text = (ROOT / page).read_text(encoding="utf-8")
        fences = re.findall(r"^```(\S*.*)$", text, re.M)[::2]
        assert set(fences) <= {"", "sh", "sh slow", "sh elsewhere", "text"}, page
        bare = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        assert not re.findall(r"^    (?:memory3|make|python) .*$", bare, re.M), page
    unfenced = re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert [text.startswith(MAKE) for text in unfenced] == [True]
    pages = [str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")]
    left = [
        (block.page, block.text.split()[0])
        for page in pages
        for block in blocks(page)
        if block.mark == "elsewhere"
    ]
    assert left == [("docs/operations.md", "docker")]  # which is not here
    assert {block.page for page in pages for block in blocks(page)} <= set(PAGES)


def test_commands_in_running_text_exist() -> None:
    """Blocks are typed; of a command between words the sub-command, its options, the module or the target exist."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    seen = 0
    for page in [Path("README.md"), *sorted(Path("docs").glob("*.md"), key=str)]:
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
        for program, rest in re.findall(r"`(memory3|python -m|make|pip) ([^`]+)`", text):
            words, seen = shlex.split(rest), seen + 1
            if program == "memory3":
                assert _is_a_command(words), f"{page}: memory3 {rest}"
            elif program == "make":
                assert words[0] in targets, f"{page}: make {rest}"
            elif program == "python -m":
                assert find_spec(words[0]) is not None, f"{page}: python -m {rest}"
            else:
                assert "memory3-pretrain" not in rest, (
                    f"{page}: pip {rest}: there is no such package to install"
                )
    assert seen > 25


def _is_a_command(words: list[str]) -> bool:
    """Whether these are sub-commands and options of theirs, up to a `|` between alternatives."""
    parser, names = cli.parser(), [word for word in words if not word.startswith("-")]
    options = {option for action in parser._actions for option in action.option_strings}
    for name in names:
        found = [
            action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)
        ]
        if not found or name == "COMMAND":
            break
        if name not in found[0]:
            return False
        parser = found[0][name]
        options |= {option for action in parser._actions for option in action.option_strings}
    return {word for word in words if word.startswith("--")} <= options


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_figures_of_the_readme_stand_in_the_pages_beside_them() -> None:
    """Those with three decimals, which are measured: in a page that their paragraph links to."""
    checked = 0
    for paragraph in (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n"):
        pages = [ROOT / page for page in re.findall(r"\]\(([^)#]+\.md)", paragraph)]
        shown = "".join(page.read_text(encoding="utf-8") for page in pages)
        figures = set(re.findall(r"\b\d+\.\d{3}\b", paragraph))
        assert figures <= set(re.findall(r"\b\d+\.\d{3}\b", shown)), paragraph[:80]
        checked += len(figures)
    assert checked > 10


def test_the_page_of_formats_is_up_to_date() -> None:
    page = (ROOT / formats_page.PAGE).read_text(encoding="utf-8")
    assert page == formats_page.render(ROOT), "run `make docs`"
