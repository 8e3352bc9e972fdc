"""Goodput: the share of the wall time that a supervised run spends on what counts, when a rank is killed every minute.

    python benchmarks/goodput.py --out benchmarks/results/goodput.json experiment=demo
    python benchmarks/goodput.py --period 20 --work FOLDER experiment=demo debug=smoke warmup.steps=400

`memory3 pretrain ... supervise=true` runs to its end while one of its ranks, drawn with a seed, gets SIGKILL every
`--period` seconds. Useful is what the lines of the finished run tell: waiting for data, updates, search, compilation,
validation and the stall of saving, each step once. What faults cost is told apart as far as the lines tell it: noticing
that a rank is gone, pauses, starts (the first one, too), updates made again; the rest is what was begun and lost.
"""

import argparse
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from benchmarks.kill_and_resume import _descendants, _pretrain, prepare  # noqa: E402
from benchmarks.origin import commit, cpu  # noqa: E402
from launch.compose import compose_config  # noqa: E402
from launch.run_log import RunLog, spent  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Run, kill, and say what of the time counted; the exit code is that of the run."""
    arguments = _parser().parse_args(argv)
    work: Path = arguments.work.resolve()
    config = compose_config(arguments.overrides)
    prepare(arguments.overrides, work, arguments.prepared, [work / "killed"])
    overrides = [*arguments.overrides, "supervise=true", "supervision.backoff_seconds=1"]
    rng, kills, started = random.Random(arguments.seed), list[float](), time.time()
    launcher = subprocess.Popen(_pretrain(overrides, work / "killed"), cwd=REPOSITORY)
    due = arguments.period
    while launcher.poll() is None:
        time.sleep(0.1)
        if time.time() - started > due and len(kills) < (arguments.kills or math.inf):
            due += arguments.period
            if ranks := _ranks(launcher.pid):
                kills.append(time.time())
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(ranks), signal.SIGKILL)
    result = {
        "command": f"python benchmarks/goodput.py --period {arguments.period} --seed {arguments.seed} "
        + " ".join(arguments.overrides),
        "commit": commit(),
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
        "exit_code": launcher.returncode,
        "kills": len(kills),
        **shares(RunLog.read(work / "killed" / config.run), started, time.time(), kills),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return int(launcher.returncode)


def shares(log: RunLog, started: float, ended: float, kills: Sequence[float]) -> dict[str, Any]:
    """What the wall time of a finished run went to.

    Args:
        log: The run's lines.
        started: When the command was given, as `time.time` counts.
        ended: When it ended.
        kills: When ranks were killed.
    """
    useful = Counter[str]()
    for line in log.lines:
        useful.update(spent(line))
    steps = sum(len(log.steps(stage)) for stage in log.stages)
    total, wall = useful.total(), ended - started
    lost = {"noticing": 0.0, "pauses": 0.0, "starts": 0.0}
    begun = started
    for line in log.lines:
        if line.get("event") == "crashed":
            lost["noticing"] += line["time"] - max(
                (kill for kill in kills if kill < line["time"]), default=begun
            )
            lost["pauses"] += line["restarted_after"] or 0.0
            begun = line["time"] + (line["restarted_after"] or 0.0)
        elif "event" not in line and begun:
            lost["starts"] += line["time"] - sum(spent(line).values()) - begun
            begun = 0.0
    repeated = sum(event.get("steps_repeated", 0) for event in log.events)
    lost["updates made again"] = repeated * total / max(1, steps)
    lost["begun and lost"] = wall - total - sum(lost.values())
    return {
        "wall_seconds": round(wall, 1),
        "useful_seconds": round(total, 1),
        "useful": {name: round(seconds, 1) for name, seconds in useful.items() if seconds},
        "lost": {name: round(seconds, 1) for name, seconds in lost.items()},
        "steps": steps,
        "steps_repeated": repeated,
        "goodput": round(total / wall, 3),
    }


def _ranks(launcher: int) -> list[int]:
    found = []
    for pid in sorted(_descendants(launcher)):
        with suppress(FileNotFoundError, ProcessLookupError):
            if b"launch.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/goodput"), help="a new folder for the run")
    parser.add_argument(
        "--prepared", type=Path, help="a prepared corpus that is copied; without it one is made"
    )
    parser.add_argument("--period", type=float, default=60.0, help="seconds between two kills")
    parser.add_argument("--kills", type=int, help="at most so many; without it there is no end to them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="+", help="settings of the run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
