"""The command line itself: immediate help, exit codes, `--cfg`."""

import logging
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from benchmarks.documentation import corpus_settings, topics
from launch import cli, compose
from launch.config import RunConfig
from tests.support.launch import memory3

HEAVY = ("torch", "numpy", "hydra", "datasets", "faiss", "transformers", "deepspeed", "rich")


@pytest.fixture(autouse=True)
def _logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


@pytest.mark.parametrize(
    "command",
    [
        "",
        *(command.name for command in cli.COMMANDS),
        *(f"bank {action.name}" for action in cli.BANK_ACTIONS),
        *(f"checkpoint {action.name}" for action in cli.CHECKPOINT_ACTIONS),
    ],
)
def test_help_answers_at_once_without_heavy_imports(command: str) -> None:
    program = (
        "import sys, time; from launch.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    print(time.process_time(), 'code', end.code, sorted(set(sys.modules) & set(sys.stdin.read().split())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command.split(), "--help"],
        cwd=Path(__file__).parents[2],
        input=" ".join(HEAVY),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.stdout.splitlines()[0].startswith(f"usage: memory3 {command}".rstrip())
    seconds, _, ended = done.stdout.splitlines()[-1].partition(" ")
    assert ended == "code 0 []"
    assert float(seconds) < 1  # of a processor; a tenth of it, as a rule


def test_the_version_is_shown_without_heavy_imports() -> None:
    program = (
        "import sys; from launch.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit as end: print(end.code, sorted(set(sys.modules) & set(sys.argv)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *HEAVY],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    package, torch, deepspeed, end = done.stdout.splitlines()
    assert package.startswith("memory3-pretrain ")
    assert torch == f"torch {version('torch')}"
    assert deepspeed == f"deepspeed {version('deepspeed')}"
    assert end == "0 []"


def test_settings_may_stand_on_both_sides_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = cli.parse(["sweep", "sweep=memory", "--trials", "3", "seed=1", "--name", "x", "a=b"])
    assert (arguments.overrides, arguments.trials, arguments.name) == (
        ["sweep=memory", "seed=1", "a=b"],
        3,
        "x",
    )
    for wrong in (["sweep", "a=b", "--trails", "3"], ["evaluate", "run", "a=b"]):
        with pytest.raises(SystemExit):
            cli.parse(wrong)
        assert "error: unrecognized arguments: " in capsys.readouterr().err


def test_every_command_has_a_module_with_run() -> None:
    for command in cli.COMMANDS:
        assert (Path(cli.__file__).parent / f"{command.name}.py").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["pretrian"], "invalid choice: 'pretrian'"),
        (["bank", "erase", "x"], "invalid choice: 'erase'"),
        (["evaluate"], "the following arguments are required: run"),
        (["bank", "search", "x"], "the following arguments are required: text"),
        (["evaluate", "x", "--split", "train"], "invalid choice: 'train'"),
        (
            ["pretrain", "--cfgg"],
            "memory3 pretrain: error: unrecognized arguments: --cfgg; did you mean --cfg?",
        ),
        (["evalute", "x"], "; did you mean evaluate?"),
        (["bank", "serach", "x", "y"], "; did you mean search?"),
        (["pretrain", "--experiment", "quick"], "--experiment; settings are written experiment=quick"),
        (["plan", "--warmup.steps=3", "seed=1"], "settings are written warmup.steps=3"),
        (["prepare", "--experiment"], "settings are written experiment=VALUE"),
        (["pretrain", "--config-dir", "mine"], "/conf/GROUP/NAME.yaml, is chosen with GROUP=NAME"),
        (
            ["bank", "build", "x", "--experiment", "quick"],
            "memory3 bank build: error: unrecognized arguments: --exp",
        ),
    ],
)
def test_wrong_usage_ends_with_code_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_users_mistake_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "warmup.stepz=3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "memory3 pretrain: warmup.stepz=3: there is no key warmup.stepz; did you mean warmup.steps?\n"
    )


@pytest.mark.parametrize(
    "command", ["evaluate", "checkpoint list", "generate --prompt x", "report", "bank compact"]
)
def test_a_misspelt_run_is_answered_with_the_nearest(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference/config.yaml").touch()
    assert cli.main([*command.split(), "refernce", "--root", str(tmp_path)]) == 2
    said = f"{tmp_path}/refernce is not a run folder; did you mean reference?\n"
    assert capsys.readouterr().err == f"memory3 {command.split(maxsplit=1)[0]}: {said}"


def test_interrupt_ends_with_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch import pretrain

    def interrupted(*_: object) -> RunConfig:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "compose_config", interrupted)
    assert cli.main(["pretrain"]) == 130
    assert capsys.readouterr().err == "memory3 pretrain: interrupted\n"


def test_interrupt_while_a_command_is_imported_ends_with_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["evaluate", "mine"]) == 130
    assert capsys.readouterr().err == "memory3 evaluate: interrupted\n"


def test_a_place_that_cannot_be_written_is_named_without_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    corpus = topics(tmp_path / "topics.jsonl", limit=1000)
    assert cli.main(["prepare", *corpus_settings(tmp_path / "file", corpus)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(
        f"memory3 prepare: {tmp_path}/file/prepared/jsonl/corpus.partial: Not a directory; mend it"
    )


def test_a_name_that_is_too_long_is_told_without_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = topics(tmp_path / "topics.jsonl", limit=1000)
    assert cli.main(["prepare", *corpus_settings(tmp_path, corpus), f"data.name={'x' * 300}"]) == 2
    assert "x: File name too long; mend it" in capsys.readouterr().err


@pytest.mark.parametrize("say", ["print", "Console().print"])
def test_a_reader_that_has_enough_is_no_crash(say: str) -> None:
    program = "import sys; from launch import cli, pretrain; from rich.console import Console\n"
    program += f"pretrain.run = lambda _: len([{say}('x' * 9999) for _ in range(10000)])\n"
    program += "sys.exit(cli.main(['pretrain', '--cfg']))"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.read(10)
        started.stdout.close()
        assert started.stderr.read() == b""
        assert started.wait() == 141


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_a_letter_is_no_crash(encoding: str) -> None:
    program = "import sys; from launch import cli, pretrain\n"
    program += "pretrain.run = lambda _: print('at most: \u2264') or 0\n"
    program += "cli.main(['pretrain', '--cfg'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"at most: ?\n"


def test_cfg_prints_every_key_and_makes_nothing(tmp_path: Path) -> None:
    done = memory3("pretrain", "--cfg", "experiment=demo", "warmup.steps=70", f"paths.root={tmp_path}/runs")
    assert (done.code, done.err) == (0, "")
    (tmp_path / "config.yaml").write_text(done.out)
    assert compose.load_config(tmp_path / "config.yaml") == compose.compose_config(
        ["experiment=demo", "warmup.steps=70", f"paths.root={tmp_path}/runs"]
    )
    assert OmegaConf.create(done.out).continual.memory.source == "bank"
    assert not (tmp_path / "runs").exists()


def test_the_home_folder_is_a_root_that_no_shell_has_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    for command in ("doctor", "report demo", "evaluate demo"):
        assert cli.parse([*command.split(), "--root=~/runs"]).root == "/users/me/runs"
