"""Sweeps whose trials train nothing, so that tests can afford many.

    python -m tests.support.sweep FOLDER DESCRIPTOR SETTINGS...    a trial: what `launch.trial` does, in a blink
    python -m tests.support.sweep FOLDER                           the same as a job
    python -m tests.support.sweep control ROOT TRIALS              a controller of such trials, to be killed

A trial reports losses that its settings decide, step by step, and goes on after the last step that its folder knows;
one that is to be evaluated says that facts are the other way round: what text likes least they like best.
Where STEPS_ALLOWED names a file, all trials together take as many steps as it has bytes, six for each; a run without
a number takes as many by itself.
`logging.wandb_project` says what happens to it: `nan`, `memory` (out of memory), `kernel` (which ended a rank for want
of memory), `killed` (always), `killed-once`.
"""

import json
import os
import signal
import sys
import time
from math import log10
from pathlib import Path

SPACE = ["experiment=quick", "continual=null", "data.name=none", "warmup.steps=6", "warmup.ramp_steps=1"]
RATES = "warmup.peak_lr=tag(log,interval(1e-4,1e-1))"
PROGRAM = (sys.executable, "-S", str(Path(__file__)))


def trial(folder: Path, descriptor: int | None, settings: dict[str, str]) -> int:
    """Pretend to train; the exit code."""
    if descriptor is not None:
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    fate = settings.get("logging.wandb_project", "")
    metrics = folder / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    for step in range(done + 1, int(settings["warmup.steps"]) + 1):
        while not _is_allowed(folder, step):
            time.sleep(0.005)
        if step == 3 and (fate == "killed" or (fate == "killed-once" and done == 0)):
            os.killpg(os.getpid(), signal.SIGKILL)
        if step == 3 and fate == "memory":
            print("memory3 pretrain: rank 0: OutOfMemoryError: CUDA out of memory", flush=True)
            return _ended(folder, 2)
        if step == 3 and fate == "kernel":  # what `launch.agent` leaves
            failure = {
                "code": 137,
                "rank": None,
                "cause": "rank 0 was ended by SIGKILL",
                "from_outside": False,
            }
            (folder / "failure.json").write_text(json.dumps(failure))
            print("memory3 pretrain: rank 0 was ended by SIGKILL; the kernel has", flush=True)
            return _ended(folder, 137)
        loss = 2 + (log10(float(settings["warmup.peak_lr"])) + 2.5) ** 2 + 1 / step
        if step == 3 and fate == "nan":
            loss = float("nan")
        with metrics.open("a") as lines:
            lines.write(json.dumps({"stage": "warmup", "step": step, "validation_none": loss}) + "\n")
        time.sleep(float(os.environ.get("STEP_SECONDS", "0.01")))
        while fate == "nan" and step == 3:
            time.sleep(1)
    if "--evaluate" in settings:
        _evaluate(folder, float(settings["warmup.peak_lr"]))
    return _ended(folder, 0)


def _is_allowed(folder: Path, step: int) -> bool:
    allowed = os.environ.get("STEPS_ALLOWED")
    number = folder.name.rpartition("-")[2]
    before = 6 * int(number) if number.isdigit() else 0
    return allowed is None or before + step <= Path(allowed).stat().st_size


def facts_loss(rate: float) -> float:
    """What an evaluated trial says of facts."""
    return 9 - losses(rate)[-1]


def losses(rate: float) -> list[float]:
    """What a trial reports."""
    return [2 + (log10(rate) + 2.5) ** 2 + 1 / step for step in range(1, 7)]


def starts(folder: Path) -> int:
    """How often a trial was started."""
    return len((folder / "starts").read_text().splitlines())


def control(
    root: Path,
    trials: int,
    *settings: str,
    seed: int = 0,
    picture: bool = False,
    jobs: bool = False,
    objective: str = "text",
) -> int:
    """Run a sweep of such trials below a root."""
    from launch import sweep, sweep_report
    from launch.compose import compose_config
    from launch.space import read_space
    from launch.trial import Jobs, Processes

    sweep._POLL_SECONDS = 0.02
    space = read_space([*SPACE, f"paths.root={root}", *(settings or [RATES])])
    plan = sweep.Sweep("s", space, trials, seed, sweep.Objective(objective))
    config = compose_config(next(space.corners()))
    where = Jobs(config, root / "s", PROGRAM) if jobs else Processes(PROGRAM)
    draw = sweep_report.draw
    if not picture:  # half a second each
        sweep_report.draw = lambda *_, **__: None
    try:
        return sweep.control(plan, config, root / "s", trials=where)
    finally:
        sweep_report.draw = draw


def _evaluate(folder: Path, rate: float) -> None:
    text = {"document": "d", "loss": 6.0, "tokens": 4}
    fact = {"probe": "p", "group": "g", "relation": "r", "loss": facts_loss(rate), "tokens": 1}
    fact |= dict.fromkeys(("exact", "hit1", "hit5", "majority"), False)
    shared = dict.fromkeys(("query", "pattern", "overlap_limit", "age_steps", "filled"))
    results = [{"arm": "none", "model": "C", "note": "", **shared, "items": [item]} for item in (text, fact)]
    stored = {"format": "memory3-evaluation", "version": 1, "results": results}
    (folder / "evaluation-validation.json").write_text(json.dumps(stored))


def _ended(folder: Path, code: int) -> int:
    (folder / "trial-exit.partial").write_text(f"{code}\n")
    (folder / "trial-exit.partial").rename(folder / "trial-exit")
    return code


if __name__ == "__main__":
    if sys.argv[1] == "control":
        sys.exit(control(Path(sys.argv[2]), int(sys.argv[3]), picture=True))
    folder = Path(sys.argv[1])
    texts = sys.argv[3:] or json.loads((folder / "trial.json").read_text())
    pairs = (text.partition("=") for text in texts)
    number = int(sys.argv[2]) if sys.argv[3:] else None
    sys.exit(trial(folder, number, {key: value for key, _, value in pairs}))
