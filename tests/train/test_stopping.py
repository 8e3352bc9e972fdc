"""Signals: noted while updates are made, acted upon at once otherwise, even when the main thread is busy."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.spawn import HANG_SECONDS

PROGRAM = """
import os, signal, sys, time
from train.stopping import Stop, StoppedError

def leave(code):
    print("left", flush=True)
    os._exit(code)

{before}
stop = Stop()
stop.listen(leave)
def kill(number):
    os.kill(os.getpid(), number)
    time.sleep(0.3)
{body}
print("end", stop.requested, stop.exit_code)
"""


def ended(body: str, *, before: str = "") -> tuple[int, str]:
    program = PROGRAM.format(body=body, before=before)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_between_updates_the_process_ends_at_once(number: int) -> None:
    from_a_terminal = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # whatever started these tests
    assert ended(f"kill({number})\ntime.sleep(20)", before=from_a_terminal) == (128 + number, "left\n")


def test_under_nohup_a_terminal_that_closes_stops_nothing() -> None:
    code, said = ended("kill(1)", before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    assert (code, said) == (0, "end False 143\n")


def test_a_main_thread_that_waits_outside_the_interpreter_delays_nothing() -> None:
    body = """
from threading import Lock, Timer
Timer(0.2, os.kill, (os.getpid(), 15)).start()
lock = Lock()
lock.acquire()
lock.acquire()
"""
    assert ended(body) == (143, "left\n")


def test_during_updates_signals_are_noted_and_more_of_them_change_nothing() -> None:
    body = """
with stop.deferred():
    kill(10)
    kill(15)
    print("saving", stop.requested, flush=True)
    os._exit(stop.exit_code)
"""
    assert ended(body) == (138, "saving True\n")


def test_a_signal_after_the_last_look_is_acted_upon_when_the_updates_are_done() -> None:
    body = """
with stop.deferred():
    kill(15)
    print("saved", flush=True)
"""
    assert ended(body) == (143, "saved\nleft\n")


def test_the_end_that_a_signal_asked_for_is_an_orderly_one() -> None:
    body = """
try:
    with stop.deferred():
        kill(15)
        raise StoppedError("stopped")
except StoppedError as problem:
    print(problem)
"""
    assert ended(body) == (0, "stopped\nend True 143\n")


def test_without_signals_nothing_happens() -> None:
    assert ended("with stop.deferred():\n    pass") == (0, "end False 143\n")
