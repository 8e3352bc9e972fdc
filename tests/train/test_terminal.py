import io
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from train.terminal import LiveView, PlainLines, Status, view


def step(number: int, **changes: Any) -> dict[str, Any]:
    line = {
        "stage": "continual",
        "step": number,
        "num_steps": 800,
        "loss": 1.5,
        "grad_norm": 0.47,
        "lr": 1e-3,
    }
    line |= {"tokens_per_second": 3600.0, "mfu": None, "skipped": False, "generation": None}
    return {**line, "generation_age": None, "time": 1000.0 + number, **changes}


def told(*lines: dict[str, Any]) -> Status:
    status = Status(1000.0)
    for line in lines:
        status.take(line)
    return status


def test_a_line_says_where_the_run_stands() -> None:
    validation = {"stage": "continual", "step": 2, "validation_none": 2.4, "validation_memory": 2.3}
    validation |= {"validation_shuffled": 2.5, "memory_attention": 0.061, "time": 1002.0}
    read = {"generation": "generation-continual-0001", "generation_age": 12, "mfu": 0.412}
    saved = {"stage": "continual", "step": 2, "checkpoint": "continual-00000002", "time": 1002.0}
    status = told(step(1), step(2), validation, saved, step(3, **read))
    assert status.line(1072.0) == (
        "continual 3/800 · loss 1.500 · grad norm 0.47 · lr 1.00e-03 · tokens/s 3,600 · MFU 41.2% · "
        "bank continual-0001, 12 steps old · attention on memory 6.1% · checkpoint 1:10 ago · stage ends in 13:17"
    )
    assert (
        status.validation_line()
        == "continual 3/800 · held-out, no memory 2.400 · memory 2.300 · shuffled 2.500"
    )


def test_what_is_not_known_is_not_shown() -> None:
    assert told(step(1)).line(1001.0) == (
        "continual 1/800 · loss 1.500 · grad norm 0.47 · lr 1.00e-03 · tokens/s 3,600 · checkpoint none yet"
    )


def test_a_resumed_run_has_a_checkpoint_and_its_own_pace() -> None:
    event = {"stage": "continual", "step": 400, "event": "resumed", "checkpoint": "c", "time": 1000.0}
    status = told(event, step(401, time=1003.0), step(402, time=1006.0))
    assert "checkpoint 0:06 ago · stage ends in 19:54" in status.line(1006.0)


def test_a_restarted_run_has_none() -> None:
    event = {"stage": "warmup", "step": 0, "event": "restarted", "checkpoint": None, "time": 1000.0}
    assert "checkpoint none yet" in told(event, step(1, stage="warmup")).line(1001.0)


def test_the_next_stage_begins_anew_and_skips_stay_counted() -> None:
    status = told(
        step(7, stage="warmup", validation_none=2.0), step(8, stage="warmup", skipped=True), step(1)
    )
    line = status.line(1009.0)
    assert line.startswith("continual 1/800")
    assert "skipped 1" in line
    assert "held-out" not in status.validation_line()
    assert "ends in" not in line


def printed(width: int = 200) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width), out


def test_what_is_no_terminal_gets_a_line_every_so_many_steps_and_of_each_validation() -> None:
    console, out = printed(40)
    view = PlainLines(10, console)
    for number in range(1, 26):
        view.log(step(number, num_steps=25))
        if number in (7, 25):
            view.log({"stage": "continual", "step": number, "validation_none": 2 + number, "time": 0.0})
    view.close()
    assert [line.split(" · ")[:2] for line in out.getvalue().splitlines()] == [
        ["continual 7/25", "held-out 9.000"],
        ["continual 10/25", "loss 1.500"],
        ["continual 20/25", "loss 1.500"],
        ["continual 25/25", "loss 1.500"],
        ["continual 25/25", "held-out 27.000"],
    ]


def test_the_live_view_fits_a_terminal_of_eighty_columns() -> None:
    console, out = printed(80)
    view = LiveView(console)
    view.log(step(1))
    view.log(
        step(
            412, mfu=0.412, generation="generation-continual-0003", generation_age=112, memory_attention=0.061
        )
    )
    view.log(
        {"stage": "continual", "step": 412, "validation_none": 2.4, "validation_memory": 2.3, "time": 0.0}
    )
    console.print(view.render())
    view.close()
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for part in ("412/800", "loss 1.500", "MFU 41.2%", "bank continual-0003, 112 steps old", "memory 2.300"):
        assert part in text


def test_the_live_view_scrolls_what_is_logged_and_gives_the_stream_back() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        view = LiveView(Console(file=io.StringIO(), force_terminal=True))
        view.log(step(1))
        assert handler.stream is not stream
        view.close()
        assert handler.stream is stream
    finally:
        logging.getLogger().removeHandler(handler)


@pytest.mark.parametrize(
    ("is_terminal", "name", "expected"),
    [(True, "xterm", LiveView), (True, "dumb", PlainLines), (False, "xterm", PlainLines)],
)
def test_the_live_view_is_for_terminals_that_lines_can_be_drawn_over_on(
    is_terminal: bool, name: str, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", name)
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: is_terminal)
    assert type(view(1, Console(file=out))) is expected


def test_a_run_that_never_took_a_step_closes() -> None:
    console, out = printed()
    LiveView(console).close()
    assert out.getvalue().strip() == ""


def test_a_run_whose_lines_nobody_can_read_any_more_goes_on() -> None:
    """A pipe whose reader is gone, and letters that its reader has no code for."""
    program = "import logging, sys; from train.terminal import view\n"
    program += "logging.basicConfig(format='%(message)s'); shown = view(1)\n"
    program += (
        f"for number in range(1, 9): shown.log({step(1)!r} | dict(step=number)); sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as started:  # fmt: skip
        assert started.stdin is not None
        assert started.stdout is not None
        assert started.stderr is not None
        assert started.stdout.readline().startswith("continual 1/800 ? loss 1.500")
        started.stdout.close()
        started.stdin.write("\n" * 8)
        started.stdin.close()
        said = started.stderr.read()
    assert started.returncode == 0
    assert said == "nobody reads the lines of this run any more; it goes on, and metrics.jsonl has them all\n"
