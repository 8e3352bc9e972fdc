"""Kill a run with SIGKILL at seeded moments, resume it until it ends, and compare it with one that nobody disturbed.

    python benchmarks/kill_and_resume.py --out benchmarks/results/kill_and_resume.json experiment=demo

Both runs begin with copies of one prepared corpus. The launcher and all its ranks are killed at once: in the middle of
a bank compilation and of a checkpoint's save (their `.partial` folders are watched), and after random steps. Each time
the same command is given again, with resume=auto. At the end the newest checkpoints are compared byte for byte: the
weights, the run's state, and every tensor of the engine's files (fp32 masters and AdamW's moments, one file a rank).
The exit code is 0 when they are equal.
"""

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from benchmarks.origin import commit, cpu  # noqa: E402
from launch.compose import compose_config  # noqa: E402
from launch.config import RunConfig  # noqa: E402
from train.schedule import epoch_begins  # noqa: E402

KINDS = ("compilation", "save", "step")
FAMILY_SECONDS = 2.0
"""Between two looks for a run's processes."""
PATIENCE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, order=True)
class Moment:
    """When to kill.

    Attributes:
        after: Steps that both stages will have finished by then; moments come in this order.
        kind: One of `KINDS`.
        what: Folder that is being made, relative to the run; or the step that was just reported.
        delay: Seconds from that sight to the kill.
    """

    after: int
    kind: str
    what: str
    delay: float


@dataclass(frozen=True, slots=True)
class Kill:
    """What a kill met.

    Attributes:
        moment: The plan.
        reported: Newest step in the metrics, "stage step".
        unfinished: `.partial` folders that it left.
        checkpoint: Newest published checkpoint, which the run resumed from; None: it began anew.
        processes: How many were killed.
    """

    moment: Moment
    reported: str
    unfinished: list[str]
    checkpoint: str | None
    processes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run once undisturbed and once killed, compare, print, and write the result."""
    arguments = _parser().parse_args(argv)
    work: Path = arguments.work.resolve()
    config = compose_config(arguments.overrides)
    moments = draw_moments(config, arguments.kinds.split(","), seed=arguments.seed)
    roots = {name: work / name for name in ("undisturbed", "killed")}
    prepare(arguments.overrides, work, arguments.prepared, list(roots.values()))

    started = time.monotonic()
    run_to_end(arguments.overrides, roots["undisturbed"])
    undisturbed_seconds = time.monotonic() - started
    kills = []
    for moment in moments:
        kills.append(kill_at(moment, arguments.overrides, roots["killed"], config.run))
        print(f"killed: {moment.kind} ({moment.what}); unfinished: {kills[-1].unfinished}", flush=True)
    run_to_end(arguments.overrides, roots["killed"])

    unequal = differences(*(newest_checkpoint(root / config.run) for root in roots.values()))
    result = {
        "command": f"python benchmarks/kill_and_resume.py --seed {arguments.seed} --kinds {arguments.kinds} "
        + " ".join(arguments.overrides),
        "commit": commit(),
        "machine": {"cpu": cpu(), "cores": os.cpu_count()},
        "undisturbed_seconds": round(undisturbed_seconds, 1),
        "moments": [asdict(kill) for kill in kills],
        "compared": len(checkpoint_bytes(newest_checkpoint(roots["killed"] / config.run))),
        "unequal": unequal,
        "equal": not unequal,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(render(result))
    return 0 if result["equal"] else 1


def draw_moments(config: RunConfig, kinds: Sequence[str], *, seed: int) -> list[Moment]:
    """Moments of these kinds within a run, in the order in which it will reach them."""
    rng = random.Random(seed)
    stages = config.stages
    before = {"warmup": 0, "continual": stages["warmup"].steps if "warmup" in stages else 0}
    steps = [(name, step) for name, stage in stages.items() for step in range(1, stage.steps + 1)]
    saves = [
        (name, step)
        for name, step in steps
        if step % config.saving.every_steps == 0 or step == stages[name].steps
    ]
    moments = []
    for kind in kinds:
        if kind == "compilation":
            stage = stages.get("continual")
            begins = [] if stage is None or stage.memory is None else epoch_begins(stage)
            if not begins:
                raise ValueError(
                    "the run compiles no bank in epochs of steps; leave the kind compilation out"
                )
            epoch = rng.randrange(len(begins))
            after = before["continual"] + begins[epoch]
            what = f"bank/generation-continual-{epoch:04d}.partial"
        elif kind == "save":
            name, step = rng.choice(saves)
            after, what = before[name] + step, f"checkpoints/{name}-{step:08d}.partial"
        elif kind == "step":
            name, step = rng.choice(steps[:-1])
            after, what = before[name] + step, f"{name} {step}"
        else:
            raise ValueError(f"--kinds names {kind!r}; known are {', '.join(KINDS)}")
        moments.append(Moment(after, kind, what, rng.uniform(0.0, 0.5 if kind == "step" else 0.01)))
    return sorted(moments)


def prepare(overrides: Sequence[str], work: Path, given: Path | None, roots: Sequence[Path]) -> None:
    """Give every root the same prepared corpus: a copy of what was given, or made here once."""
    source = given or work / "prepared"
    if given is None:
        _check_call([*_memory3("prepare"), *overrides, f"paths.root={work}"])
    for root in roots:
        if root.exists():
            raise ValueError(f"{root} exists; give another --work, or delete it")
        shutil.copytree(source, root / "prepared")


def run_to_end(overrides: Sequence[str], root: Path) -> None:
    """Start the run, or resume it, and wait until it ends."""
    _check_call(_pretrain(overrides, root))


def kill_at(moment: Moment, overrides: Sequence[str], root: Path, run: str) -> Kill:
    """Start the run, or resume it, and kill all its processes at the moment.

    Raises:
        RuntimeError: The run ended before, or processes survived.
    """
    folder = root / run
    reached = _watch(moment, folder)
    launcher = subprocess.Popen(_pretrain(overrides, root), start_new_session=True, cwd=REPOSITORY)
    family: set[int] = set()
    try:
        deadline, due = time.monotonic() + PATIENCE_SECONDS, 0.0
        while True:
            if (
                time.monotonic() > due
            ):  # known before the moment: a search takes as long as a small compilation
                family, due = _descendants(launcher.pid), time.monotonic() + FAMILY_SECONDS
            if reached():
                break
            if launcher.poll() is not None:
                raise RuntimeError(f"the run ended (exit code {launcher.returncode}) before {moment}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the run did not reach {moment} within {PATIENCE_SECONDS:.0f} s")
            time.sleep(0.001)
        time.sleep(moment.delay)
    finally:
        killed = _kill_tree(launcher.pid, family)
        launcher.wait()
    _wait_until_free(folder / "lock")
    partials = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.partial"))
    if moment.kind != "step" and moment.what not in partials:
        raise RuntimeError(f"{moment.what} was published before the kill arrived; use another --seed")
    published = _published(folder)
    return Kill(
        moment=moment,
        reported=_newest_step(folder) or "none",
        unfinished=partials,
        checkpoint=published[-1].name if published else None,
        processes=killed,
    )


def newest_checkpoint(run: Path) -> Path:
    """The last checkpoint of a run."""
    return _published(run)[-1]


def checkpoint_bytes(folder: Path) -> dict[str, bytes]:
    """What decides how a run goes on, by name: files, and every tensor of the engine's files, unpickled by nobody."""
    contents = {}
    described = ("manifest.json", "config.yaml", "origin.json")  # where it comes from, paths included
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in described):
        name = path.relative_to(folder).as_posix()
        if path.suffix != ".pt":
            contents[name] = path.read_bytes()
            continue
        with zipfile.ZipFile(path) as archive:  # torch's format: each tensor's storage is a file of its own
            for entry in archive.namelist():
                _, _, inner = entry.partition("/")
                if inner.startswith("data/"):
                    contents[f"{name}:{inner}"] = archive.read(entry)
    return contents


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between two checkpoints, or stands in one alone."""
    a, b = checkpoint_bytes(one), checkpoint_bytes(other)
    names = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return [f"{one.name} is not {other.name}", *names] if one.name != other.name else names


def render(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        "| killed | what was going on | newest step | unfinished | went on from |",
        "|---|---|---|---|---|",
    ]
    for kill in result["moments"]:
        moment = kill["moment"]
        cells = (
            moment["kind"],
            moment["what"],
            kill["reported"],
            ", ".join(kill["unfinished"]),
            kill["checkpoint"],
        )
        lines.append("| " + " | ".join(str(cell or "-") for cell in cells) + " |")
    verdict = "equal, byte for byte" if result["equal"] else f"UNEQUAL: {', '.join(result['unequal'])}"
    return "\n".join(
        [*lines, "", f"{result['compared']} files and tensors of the last checkpoint: {verdict}"]
    )


def _watch(moment: Moment, folder: Path) -> Callable[[], bool]:
    if moment.kind != "step":
        return lambda: _is_being_made(folder / moment.what)
    stage, step = moment.what.split()

    def reached() -> bool:
        newest = _newest_step(folder)
        if newest is None:
            return False
        now_stage, now_step = newest.split()
        return (now_stage == "continual", int(now_step)) >= (stage == "continual", int(step))

    # A run that was killed later than this step has reported it already: the next report counts.
    lines = folder / "metrics.jsonl"
    seen = lines.stat().st_mtime_ns if lines.exists() else 0
    return lambda: lines.exists() and lines.stat().st_mtime_ns != seen and reached()


def _is_being_made(folder: Path) -> bool:
    """Whether a process holds the lock of a work folder (`data.files`); one that a kill left behind has none."""
    try:
        inode = f":{folder.stat().st_ino}"
    except FileNotFoundError:
        return False
    locks = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return any(lock[1] == "FLOCK" and lock[5].endswith(inode) for lock in locks)


def _newest_step(folder: Path) -> str | None:
    lines = folder / "metrics.jsonl"
    if not lines.exists():
        return None
    steps = [json.loads(line) for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")]
    trained = [f"{step['stage']} {step['step']}" for step in steps if "loss" in step]
    return trained[-1] if trained else None


def _published(run: Path) -> list[Path]:
    folders = [path for path in (run / "checkpoints").glob("*-????????") if (path / "manifest.json").exists()]
    return sorted(folders, key=lambda path: (path.name.startswith("continual"), path.name))


def _kill_tree(launcher: int, family: set[int]) -> int:
    """SIGKILL to a process, the family known and all descendants found now, wherever they moved; how many there were.

    Ranks may have sessions of their own, so the launcher's process group would miss them.
    """
    killed: set[int] = set()
    family = {launcher, *family}
    while family - killed:
        for pid in family - killed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)  # nobody starts another process between the look and the kill
            killed.add(pid)
        family = _descendants(launcher)
    for pid in killed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(killed)


def _descendants(root: int) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    family = {root}
    while found := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= found
    return family


def _wait_until_free(lock: Path, *, timeout_seconds: float = 30.0) -> None:
    """Wait until no process holds the run folder's lock any more."""
    deadline = time.monotonic() + timeout_seconds
    with lock.open("r+") as file:
        while time.monotonic() < deadline:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
    raise RuntimeError(f"{lock} is still held {timeout_seconds:.0f} s after the kill: a process survived")


def _memory3(command: str) -> list[str]:
    return [sys.executable, "-m", "launch.cli", command]


def _pretrain(overrides: Sequence[str], root: Path) -> list[str]:
    return [*_memory3("pretrain"), "--no-prepare", *overrides, f"paths.root={root}", "resume=auto"]


def _check_call(command: Sequence[str]) -> None:
    subprocess.run(command, cwd=REPOSITORY, check=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="settings of the run: experiment=demo debug=smoke")
    parser.add_argument("--out", type=Path, required=True, help="JSON file that takes the result")
    parser.add_argument("--work", type=Path, default=Path("runs/kill_and_resume"), help="folder of both runs")
    parser.add_argument("--prepared", type=Path, help="prepared corpora to copy, instead of preparing")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    parser.add_argument(
        "--kinds", default="compilation,save,step,step,step", help="one kill per kind: " + ", ".join(KINDS)
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
