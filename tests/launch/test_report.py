"""`memory3 report`: the table of a run, of a run and its control, and of several seeds."""

import json
import re
import shutil
from pathlib import Path

import pytest

from launch.build import Context
from launch.report import draw_losses
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


def test_pair_shows_memory_against_its_control(root: Path) -> None:
    done = within("report", "m=c", "--root", str(root))
    assert done.code == 0, done.err
    assert re.search(r"^\| C +\| no memory ", done.out, re.MULTILINE)
    assert re.search(r"^\| M +\| memory .* nats|^\| M +\| memory ", done.out, re.MULTILINE)


def test_run_alone_has_no_control_in_its_table(root: Path) -> None:
    done = within("report", "m", "--root", str(root))
    assert done.code == 0, done.err
    assert not re.search(r"^\| C ", done.out, re.MULTILINE)


def test_two_seeds_stand_in_one_table(root: Path) -> None:
    done = within("report", "m=c", "m=c", "--root", str(root))
    assert done.code == 0, done.err
    assert re.search(r"\| (\+\+|--) ", done.out)


def test_run_that_was_not_evaluated_is_named_with_the_command(root: Path) -> None:
    done = within("report", "m", "--split", "test", "--root", str(root))
    assert done.code == 2
    assert done.err == (
        f"memory3 report: {root}/m/evaluation-test.json does not exist; run `memory3 evaluate m --split test` first\n"
    )


def test_headline_relations_are_those_of_the_validation_probes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the test half it is the other way round."""
    monkeypatch.setattr(Context, "hit_shares", lambda self: {"capital": (9, 0.5, 0.9), "area": (9, 0.0, 0.1)})
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
    path.write_text(json.dumps(to_json(arms)))
    done = within("report", "m", "--split", "test", "--root", str(root))
    path.unlink()
    assert done.code == 0, done.err
    assert "**facts: capital**" in done.out
    assert re.search(r"^\| area † ", done.out, re.MULTILINE)


def test_losses_are_drawn(root: Path, tmp_path: Path) -> None:
    draw_losses([("M", root / "m"), ("C", root / "c")], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
