"""`memory3 evaluate`: the arms that concern a run's weights, and which generations they may read."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.documents import Split
from launch.bank import corpus_documents
from launch.evaluate import banks_evaluated, evaluate
from launch.opened import OpenedRun, library_folder, open_run
from memorybank import cold
from memorybank.edits import Editor
from tests.support.launch import trained, within
from train.arms import Arm


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of what was trained, with a library of all that may be read, compiled two steps before the end."""
    root = tmp_path_factory.mktemp("evaluate") / "runs"
    shutil.copytree(trained().root, root)
    now = open_run("m", str(root))
    before = now.context.checkpoints(root / "m").open(root / "m/checkpoints/continual-00000002")
    older = OpenedRun(now.folder, now.config, now.context, before, now.context.inference_engine(before))
    folder = library_folder(root / "m", None)
    editor = Editor(folder=folder, compiler=older.compiler(folder))
    editor.build(corpus_documents(now, editor))
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


def test_bank_of_other_weights_is_refused_by_name_unless_allowed_and_its_age_stated(root: Path) -> None:
    done = within("evaluate", "m", "--root", str(root), "--bank")
    assert done.code == 2
    assert done.err.startswith(f"memory3 evaluate: bank {root}/m/bank/library: weights is ")
    assert "compile it for these weights with `memory3 bank refresh`" in done.err
    assert done.err.count("\n") == 1
    prompt = ("--prompt", "The import statement", "--max-new-tokens", "4")
    done = within("generate", "m", "--root", str(root), *prompt, "--bank", f"{root}/m/bank/library")
    assert done.code == 2
    assert "weights is " in done.err
    done = within("generate", "m", "--root", str(root), *prompt, "--bank", "--stale", "allow")
    assert done.code == 0, done.err
    assert f"memories of {root}/m/bank/library, compiled 2 steps before these weights" in done.out
    assert "read at retrieval 0: " in done.out
    done = within("evaluate", "m", "--root", str(root), "--bank", "--stale", "allow")
    assert done.code == 0, done.err
    assert "| 2 steps |" in done.out
    assert "| 0 steps |" not in done.out


def test_an_evaluation_with_a_bank_stands_beside_the_one_without_and_the_report_names_its_bank(
    root: Path, tmp_path: Path
) -> None:
    assert within("evaluate", "m", "--root", str(root)).code == 0
    without = (root / "m/evaluation-validation.json").read_bytes()
    done = within("evaluate", "m", "--root", str(root), "--bank", "--stale", "allow")
    assert done.code == 0, done.err
    assert f"results: {root}/m/evaluation-validation-library.json" in done.out
    assert (root / "m/evaluation-validation.json").read_bytes() == without
    done = within("report", "m", "--root", str(root), "--html", str(tmp_path / "report.html"))
    assert done.code == 0, done.err
    alone, _, beside = done.out.partition("m with the memories of bank library (state 1, ")
    assert alone.startswith("m: validation half\n")
    assert "): validation half\n" in beside
    for table, age, other in ((alone, 0, 2), (beside, 2, 0)):
        assert f"| {age} steps |" in table
        assert f"| {other} steps |" not in table
    assert "m with the memories of bank library (state 1, " in (tmp_path / "report.html").read_text()


def test_evaluations_with_two_banks_of_one_name_stand_side_by_side(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "m/bank/library", tmp_path / "library")
    own = root / "m/evaluation-validation-library.json"
    own.write_text("of the run's own bank")
    done = within(
        "evaluate", "m", "--root", str(root), "--bank", str(tmp_path / "library"), "--stale", "allow"
    )
    assert done.code == 0, done.err
    assert own.read_text() == "of the run's own bank"
    own.unlink()
    (path,) = (root / "m").glob("evaluation-validation-library-*.json")
    assert f"results: {path}\n" in done.out
    (bank,) = banks_evaluated(root / "m", "validation")
    assert bank == path.stem.removeprefix("evaluation-validation-")
    path.unlink()


def test_a_refreshed_bank_gives_the_numbers_of_what_evaluate_compiles_itself(root: Path) -> None:
    opened = open_run("m", str(root))
    itself = evaluate(opened, Split.validation)
    folder = root / "refreshed"
    shutil.copytree(root / "m/bank/library", folder)
    done = within("bank", "refresh", "m", "--root", str(root), "--bank", str(folder))
    assert done.code == 0, done.err
    name = opened.context.embedder().name
    read = evaluate(opened, Split.validation, library=opened.library(str(folder), embedder=name, stale=False))
    by_arm = [(result.arm, result.query, result.pattern) for result in itself]
    assert by_arm == [(result.arm, result.query, result.pattern) for result in read]
    for ours, theirs in zip(read, itself, strict=True):
        if ours.arm in (Arm.none, Arm.memory):
            assert ours.loss == pytest.approx(theirs.loss, abs=2e-3)


def test_what_one_command_encoded_no_other_encodes_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate`, `generate` and `inspect` read one store, in whatever process; the bank lists it."""

    def answers() -> list[object]:
        losses = [
            (result.arm, result.loss) for result in evaluate(open_run("m", str(root)), Split.validation)
        ]
        prompt = ("--prompt", "The import statement", "--max-new-tokens", "4", "--root", str(root))
        said = [within("generate", "m", *prompt), within("bank", "inspect", "m", *prompt)]
        assert {done.code for done in said} == {0}
        return [losses, *(done.out for done in said)]

    first = answers()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(cold, "encode_records", refuse)
    assert answers() == first
    (store,) = cold.stores(root / "m/bank")
    done = within("bank", "stat", "m", "--root", str(root))
    assert done.code == 0, done.err
    assert store.name in done.out
    assert f"{len(cold.ColdRecords(store)):,}" in done.out


def test_missing_bank_and_missing_run_are_named(root: Path) -> None:
    done = within("evaluate", "m", "--root", str(root), "--bank", f"{root}/nope")
    assert done.code == 2
    assert f"there is no bank in {root}/nope; make one with `memory3 bank build RUN`" in done.err
    done = within("evaluate", "nope", "--root", str(root))
    assert done.code == 2
    assert done.err == (f"memory3 evaluate: {root}/nope is not a run folder; list runs with `ls {root}`\n")


def test_run_without_checkpoint_is_refused(root: Path) -> None:
    (root / "young").mkdir()
    shutil.copy(root / "m/config.yaml", root / "young/config.yaml")
    done = within("evaluate", "young", "--root", str(root))
    assert done.code == 2
    assert "young has no checkpoint yet; train it with `memory3 pretrain` first" in done.err
