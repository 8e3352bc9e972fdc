"""What a rank says of itself: beats, phases, whether its main thread waits."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.spawn import HANG_SECONDS
from train import pulse
from train.pulse import Pulse, _waits


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Pulse]:
    made, before = Pulse(), set(threading.enumerate())
    made.show(tmp_path, tmp_path / "stacks" / "rank-0.txt", rank=0, batch_seconds=0.2, phase_seconds=9)
    yield made
    tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-ended"))  # without its folder the thread ends
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=HANG_SECONDS)


def record(folder: Path, *, phase: str, since: float = 0.0) -> dict[str, object]:
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        if (folder / "0.json").exists():
            found: dict[str, object] = json.loads((folder / "0.json").read_text())
            if found["phase"] == phase and float(str(found["written"])) >= since:
                return found
        time.sleep(0.01)
    raise AssertionError(f"no record of {phase}")


def test_phases_have_their_limits_and_end_where_they_began(shown: Pulse, tmp_path: Path) -> None:
    assert record(tmp_path, phase="start")["limit"] == 9
    with shown.batches("an update"):
        assert record(tmp_path, phase="an update")["limit"] == 0.2
        with shown.phase("a checkpoint"):
            assert record(tmp_path, phase="a checkpoint")["limit"] == 9
        found = record(tmp_path, phase="an update")
    assert found["waiting"] is False
    assert "test_pulse.py" in str(found["where"])
    assert record(tmp_path, phase="start")["limit"] == 9


def test_a_beat_is_the_time_of_the_last_work(shown: Pulse, tmp_path: Path) -> None:
    before = time.monotonic()
    shown.beat()
    after = time.monotonic()
    assert before <= float(str(record(tmp_path, phase="start", since=after)["beat"])) <= after


def test_who_stands_in_a_collective_waits() -> None:
    source = "def stand():\n    import sys\n    return sys._getframe()\n"
    for name, waits in (("torch/distributed/c10d.py", True), ("torch/nn/linear.py", False)):
        space: dict[str, object] = {}
        exec(compile(source, f"/lib/{name}", "exec"), space)
        frame = space["stand"]()  # type: ignore[operator]
        assert _waits(frame) is waits


def test_the_signal_writes_the_stacks_of_all_threads(shown: Pulse, tmp_path: Path) -> None:
    end = threading.Event()
    beside = threading.Thread(target=end.wait)
    beside.start()
    signal.raise_signal(pulse.STACKS)
    end.set()
    beside.join()
    said = (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert "Current thread" in said
    assert "test_the_signal_writes_the_stacks_of_all_threads" in said
    assert said.count("Thread 0x") >= 2
