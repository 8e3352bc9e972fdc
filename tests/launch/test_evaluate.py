"""`memory3 evaluate`: the arms that concern a run's weights, and which generations they may read."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.opened import OpenedRun, open_run
from tests.support.launch import trained, within


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of what was trained, with a bank of all that may be read, compiled two steps before the end."""
    root = tmp_path_factory.mktemp("evaluate") / "runs"
    shutil.copytree(trained().root, root)
    now = open_run("m", str(root))
    before = now.context.checkpoints(root / "m").open(root / "m/checkpoints/continual-00000002")
    older = OpenedRun(now.folder, now.config, now.context, before, now.context.inference_engine(before))
    older.compile(now.bank_ids, "generation-older")
    yield root
    shutil.rmtree(root)


def test_memory_arm_prints_its_table_and_where_it_is_kept(root: Path) -> None:
    done = within("evaluate", "m", "--root", str(root))
    assert done.code == 0, done.err
    for words in ("text, query own", "text, query previous", "inference pattern", "training pattern"):
        assert words in done.out
    for arm in ("no memory", "memory", "shuffled", "random"):
        assert f"| M     | {arm} " in done.out
    assert "| 0 steps |" in done.out
    assert f"results: {root}/m/evaluation-validation.json" in done.out
    assert (root / "m/evaluation-validation.json").exists()


def test_control_is_evaluated_without_memory(root: Path) -> None:
    done = within("evaluate", "c", "--root", str(root), "--split", "test")
    assert done.code == 0, done.err
    assert "C no memory: " in done.out
    assert "memory: " not in done.out.replace("no memory: ", "")


def test_generation_of_other_weights_is_refused_by_name(root: Path) -> None:
    for name in ("generation-continual-0000", "generation-older"):
        done = within("evaluate", "m", "--root", str(root), "--bank", name)
        assert done.code == 2
        assert done.err.startswith(f"memory3 evaluate: generation {root}/m/bank/{name}: weights is ")
        assert "compile it for these weights with `memory3 bank refresh`" in done.err
        assert done.err.count("\n") == 1


def test_stale_generation_is_read_when_allowed_and_its_age_stated(root: Path) -> None:
    done = within("evaluate", "m", "--root", str(root), "--bank", "generation-older", "--stale", "allow")
    assert done.code == 0, done.err
    assert "| 2 steps |" in done.out
    assert "| 0 steps |" not in done.out


def test_generation_that_lacks_what_is_read_is_refused(root: Path) -> None:
    arguments = ("--bank", "generation-continual-0000", "--stale", "allow")
    done = within("evaluate", "m", "--root", str(root), *arguments)
    assert done.code == 2
    assert "generation-continual-0000 holds no memory of " in done.err


def test_missing_generation_and_missing_run_are_named(root: Path) -> None:
    done = within("evaluate", "m", "--root", str(root), "--bank", "generation-nope")
    assert done.code == 2
    assert f"there is no generation in {root}/m/bank/generation-nope" in done.err
    done = within("evaluate", "nope", "--root", str(root))
    assert done.code == 2
    assert done.err == (
        f"memory3 evaluate: {root}/nope/config.yaml does not exist: {root}/nope is not a run folder; "
        f"list runs with `ls {root}`\n"
    )


def test_run_without_checkpoint_is_refused(root: Path) -> None:
    (root / "young").mkdir()
    shutil.copy(root / "m/config.yaml", root / "young/config.yaml")
    done = within("evaluate", "young", "--root", str(root))
    assert done.code == 2
    assert "young has no checkpoint yet; train it with `memory3 pretrain` first" in done.err
