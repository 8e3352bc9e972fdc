"""`memory3 report`: the table of a run, of a run and its control, and of several seeds; the page and the pictures."""

import json
import re
import shutil
from pathlib import Path

import pytest

from launch.report import draw_losses
from tests.support.browser import boxes, screenshot
from tests.support.launch import trained, within
from train.arms import Arm
from train.evaluate import ArmResult, ProbeItem, to_json


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of both arms, evaluated."""
    root = Path(shutil.copytree(trained().root, tmp_path_factory.mktemp("report") / "runs"))
    for run in ("m", "c"):
        assert within("evaluate", run, "--root", str(root)).code == 0
    return root


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page lands in the working directory."""
    monkeypatch.chdir(tmp_path)


def test_pair_shows_memory_against_its_control(root: Path) -> None:
    done = within("report", "m=c", "--root", str(root))
    assert done.code == 0, done.err
    assert re.search(r"^\| C +\| no memory ", done.out, re.MULTILINE)
    assert re.search(r"^\| M +\| memory .* nats|^\| M +\| memory ", done.out, re.MULTILINE)


def test_an_evaluation_of_a_run_that_trained_on_says_of_which_step_it_is(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "m", tmp_path / "m")
    lines = tmp_path / "m/metrics.jsonl"
    last = json.loads([line for line in lines.read_text().splitlines() if '"loss"' in line][-1])
    with lines.open("a") as file:
        print(json.dumps({**last, "step": last["step"] + 3000}), file=file)
    done = within("report", "m", "--root", str(tmp_path))
    assert done.out.startswith("m (as of continual step 4; now at continual step 3,004): validation half\n")
    assert "m (as of continual step 4; " in (tmp_path / "report.html").read_text()


def test_run_alone_has_no_control_in_its_table(root: Path) -> None:
    done = within("report", "m", "--root", str(root))
    assert done.code == 0, done.err
    assert not re.search(r"^\| C ", done.out, re.MULTILINE)


def test_two_seeds_stand_in_one_table(root: Path) -> None:
    shutil.copytree(root / "m", root / "again")
    done = within("report", "m=c", "again=c", "--root", str(root))
    shutil.rmtree(root / "again")
    assert done.code == 0, done.err
    assert done.out.startswith("m, again: validation half, 2 seeds\n")
    assert re.search(r"\| (\+\+|--) ", done.out)


def test_run_that_was_not_evaluated_has_a_page_and_is_told_the_command(root: Path, tmp_path: Path) -> None:
    done = within("report", "m", "--split", "test", "--root", str(root), "--html", "page.html")
    assert done.code == 0, done.err
    assert done.out == (
        "m has no evaluation on the test half; `memory3 evaluate m --split test` makes one\npage: page.html\n"
    )
    assert "Continual stage" in (tmp_path / "page.html").read_text()


def test_a_pair_has_a_page_and_pictures_of_both_without_corpus_or_checkpoint(
    root: Path, tmp_path: Path
) -> None:
    """Only lines, settings and evaluations are there; one run is given as a folder."""
    for run in ("m", "c"):
        (tmp_path / run).mkdir()
        for name in ("metrics.jsonl", "config.yaml", "evaluation-validation.json"):
            shutil.copy(root / run / name, tmp_path / run)
    done = within("report", f"{tmp_path / 'm'}=c", "--root", str(tmp_path), "--pictures", "drawn")
    assert done.code == 0, done.err
    page = (tmp_path / "report.html").read_text()
    assert "m: validation half" in page
    assert "c, held-out, no memory" in page
    assert str(tmp_path) not in page
    drawn = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert drawn == ["bank.png", "losses.png", "memory.png", "stability.png", "throughput.png"]


def test_a_page_is_not_written_where_there_is_no_folder(root: Path, tmp_path: Path) -> None:
    done = within("report", "m", "--root", str(root), "--html", "nowhere/x.html")
    assert done.code == 2
    assert "--html nowhere/x.html: its folder does not exist; make it first" in done.err
    assert not (tmp_path / "nowhere").exists()
    assert done.out == ""
    done = within("report", "m", "--root", str(root), "--html", str(tmp_path))
    assert done.code == 2
    assert f"--html {tmp_path} is a folder; name the page's file in it, {tmp_path}/page.html" in done.err


def test_a_run_that_is_not_there_is_named(root: Path) -> None:
    for given in ("nothing", "m=nothing"):
        done = within("report", given, "--root", str(root))
        assert done.code == 2
        said = f"{root}/nothing is not a run folder; list runs with `ls {root}`"
        assert done.err == f"memory3 report: {said}\n"


def test_a_run_that_is_named_twice_is_no_second_seed(root: Path) -> None:
    done = within("report", "m", str(root / "m"), "--root", str(root))
    assert done.code == 2
    assert "m is named more than once; name each run once, M or M=C" in done.err
    assert done.out == ""


def test_runs_of_one_name_are_told_apart_by_their_folders(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "m"
    other.mkdir(parents=True)
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(root / "m" / name, other)
    done = within("report", "m", str(other), "--root", str(root))
    assert done.code == 0, done.err
    assert "runs/m · other/m" in (tmp_path / "report.html").read_text()


def test_headline_relations_are_those_that_the_evaluation_names(root: Path) -> None:
    """They were decided on validation probes; on the test half it is the other way round."""
    items = tuple(
        ProbeItem(f"{group}/{relation}", group, relation, 1.0, 2, False, hit, hit, False)
        for group in ("aa", "bb")
        for relation, hit in (("capital", False), ("area", True))
    )
    arms = [
        ArmResult(
            arm=arm,
            model="M",
            query=None,
            pattern=None,
            overlap_limit=None,
            age_steps=None,
            filled=filled,
            note="",
            items=items,
        )
        for arm, filled in ((Arm.none, None), (Arm.memory, 1.0))
    ]
    path = root / "m" / "evaluation-test.json"
    path.write_text(json.dumps({"headline": ["capital"], **to_json(arms)}))
    done = within("report", "m", "--split", "test", "--root", str(root))
    path.unlink()
    assert done.code == 0, done.err
    assert "**facts: capital**" in done.out
    assert re.search(r"^\| area † ", done.out, re.MULTILINE)


def test_losses_are_drawn(root: Path, tmp_path: Path) -> None:
    draw_losses([("M", root / "m"), ("C", root / "c")], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def page(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run and its control, both evaluated."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    done = within("report", "m=c", "--root", str(root), "--html", str(path))
    assert done.code == 0, done.err
    return path


def test_a_browser_draws_the_page_light_and_dark_and_has_nothing_to_say(page: Path, tmp_path: Path) -> None:
    for dark in (False, True):
        assert screenshot(page, tmp_path / f"{dark}.png", width=1200, height=900, dark=dark) == []
    assert (tmp_path / "True.png").read_bytes() != (tmp_path / "False.png").read_bytes()


@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_lays_out_every_part_within_the_page(width: int, page: Path) -> None:
    selectors = ["body", ".tile", ".card", ".chart", ".plot>svg", ".series span", ".scroll", ".bar"]
    found = boxes(page, selectors, width=width)
    (body,) = found["body"]
    assert len(found[".tile"]) == 5
    assert len(found[".chart"]) == len(found[".plot>svg"]) == 15
    for selector in selectors[1:]:
        assert found[selector], selector
        for left, top, right, bottom in found[selector]:
            assert right > left, selector
            assert bottom > top, selector
            assert body[0] <= left, selector
            assert right <= body[2] + 0.5, selector
    columns = {left for left, *_ in found[".chart"]}
    assert len(columns) == 1 if width == 500 else len(columns) > 1
    for above, below in zip(found[".card"], found[".card"][1:], strict=False):
        assert above[3] <= below[1]
