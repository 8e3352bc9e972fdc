"""`memory3 cost`: the paper's figures as a user reads them, JSON, picture, and no torch on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import within

PAPER = ("model=paper_2b4", "--references", "1.12e8", "--embedder", "bge-m3")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_tables_show_the_papers_figures() -> None:
    done = within("cost", *PAPER)
    assert done.code == 0, done.err
    rows = {cells(line)[0]: cells(line)[1:] for line in done.out.splitlines() if line.startswith("│")}
    assert rows["implicit memory: parameters"][0] == "2.24"
    assert rows["explicit memory"] == ["0.308", "0.000144"]
    assert rows["text, retrieved and read"] == ["0", "0.624 or more"]
    assert "write (TFLOP)" in done.out
    assert "from 0.494 to 13,400 uses" in done.out
    assert rows["all layers, heads and tokens"] == ["72,089,600", "7.17 PiB", "1"]
    assert rows["8 of 128 tokens"] == ["450,560", "45.9 TiB", "160"]
    assert rows["residual2x14_pq8x10"] == ["39,424", "4.02 TiB", "1,829"]
    assert rows["search, exact"][:2] == ["229 G", "427 GiB"]
    assert rows["the model"] == ["34.5 EFLOP", "2.66 days"]


def test_json_holds_the_same_numbers_and_nothing_else_is_printed(tmp_path: Path) -> None:
    picture = tmp_path / "cost.png"
    done = within(
        "cost", *PAPER, "--json", "--codec", "residual2x14_pq8x10", "--disk", "7", "--picture", str(picture)
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["knowledge"]["explicit_write"] == pytest.approx(0.308e12, rel=1e-3)
    assert found["best_uses"] == pytest.approx([0.494, 13_400], rel=1e-3)
    assert (found["references"], found["codec"], found["embedder"]) == (
        112_000_000,
        "residual2x14_pq8x10",
        "bge-m3",
    )
    assert found["hardware"]["disk_gb_per_second"] == 7
    assert {stored["name"]: stored["bytes_per_reference"] for stored in found["codecs"]}[
        "residual2x14_pq8x10"
    ] == 39_424
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_model_is_costed_in_a_unit_that_can_be_read() -> None:
    done = within("cost", "model=micro", "retrieval.embedder.kind=static", "--codec", "model")
    assert done.code == 0, done.err
    assert "write (GFLOP)" in done.out
    assert "1,000,000 references, bfloat16, static" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model.num_memory_layers=0",), "model.num_memory_layers=0: this model has no memory to cost"),
        (("--references", "many"), "--references many is no number of references; give for example 1000000"),
        (("--references", "0"), "--references 0 is no number of references"),
        (("--disk", "0"), "disk_gb_per_second=0.0 is not above 0"),
        (
            ("retrieval.embedder.kind=folder", "retrieval.embedder.path=x"),
            "retrieval.embedder.kind=folder does not tell the embedder's size; name the nearest with --embedder",
        ),
    ],
)
def test_mistakes_are_named_with_their_remedy(arguments: tuple[str, ...], said: str) -> None:
    done = within("cost", *arguments)
    assert done.code == 2
    assert done.err.startswith(f"memory3 cost: {said}")


def test_nothing_of_it_needs_torch() -> None:
    program = "import sys, launch.cost; print(sorted({'torch', 'faiss', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
