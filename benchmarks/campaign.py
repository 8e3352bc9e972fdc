"""Kill a small run wherever it can be killed, corrupt every file that a run reads, and count what was lost.

    python benchmarks/campaign.py --work FOLDER --out benchmarks/results/campaign.json
    python benchmarks/campaign.py --work FOLDER --minutes 20      # a slice: what is done stays done
    python benchmarks/campaign.py --short                       # seconds; what continuous integration runs

Runs are those of `debug=smoke` on the Python documentation, warmup and continual stage apart, on one rank and on two.
They are forked from a parent that has imported everything and used nothing, so that a trial takes a second or two.

    operations   SIGKILL to all ranks when one of them is about to create, write, sync, rename or delete a file of the
                 stage's last checkpoint (rotation included), of its second bank generation or of the neighbours
                 found for it: each such operation once; files that torch and safetensors write by themselves are also
                 cut in the middle. The same for two edits of a bank that users keep: `replace` and `compact`
    times        SIGKILL at random moments, up to five in a row, each followed by a resume
    corruptions  a bit flipped, cut, deleted, zeroed, extended or swapped with another file: in what
                 `benchmarks.corruptions` lists; then it is read as training, or a reader of the bank, reads it

A kill counts as survived when the resumed run ends with the same bytes as one that nobody disturbed (weights, masters,
moments, state; a bank: every file), reports every step once, and never begins anew after a checkpoint was published. A
corruption counts as found when reading refuses it (a checkpoint: falls back to the one before, by name) and a full
`verify` sees it; as silent when anything was read that differs. The exit code is 0 when everything was survived and
found.
"""

import argparse
import builtins
import gc
import importlib
import io
import json
import os
import platform
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402

from benchmarks import small_bank  # noqa: E402
from benchmarks.corruptions import Artefact, Passed, corrupt, of_corpus, of_library, of_run  # noqa: E402
from benchmarks.documentation import corpus_settings, topics  # noqa: E402
from benchmarks.kill_and_resume import differences, newest_checkpoint  # noqa: E402
from benchmarks.origin import commit, cpu  # noqa: E402
from launch import prepare, worker  # noqa: E402
from launch.compose import compose_config  # noqa: E402
from launch.config import RunConfig  # noqa: E402
from launch.lock import only_user  # noqa: E402
from launch.pretrain import make_ready  # noqa: E402
from train import checkpoint, distributed, engine  # noqa: E402
from train.checkpoint import entries  # noqa: E402
from train.config import STAGES  # noqa: E402
from train.engine import _import_deepspeed  # noqa: E402
from train.metrics import read_metrics  # noqa: E402

KINDS = ("operations", "times", "corruptions")
_BATCH = 25
CHAIN = 5
"""Kills of one run, at random times, before it may end."""
WORLDS = (1, 2)
_LATE = ("torch._dynamo", "torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.muon_optimizer")
_PATIENCE_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One of the runs that are killed."""

    stage: str
    world: int

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.world}"

    @property
    def targets(self) -> tuple[str, ...]:
        """What the operations that are counted touch, as parts of paths."""
        saved = f"/checkpoints/{self.stage}-00000004", f"/checkpoints/{self.stage}-00000002.deleted"
        epoch = "/bank/generation-continual-0001", "/neighbours/continual-0001"
        return saved if self.stage == "warmup" else (*saved, *epoch)


@dataclass(frozen=True, slots=True)
class Trial:
    """What one trial found.

    Attributes:
        id: What was done; the same seed does it again.
        kind: Of `KINDS`.
        what: Scenario, or the artefact that was damaged.
        kills: How many met a living process.
        ok: Whether nothing was lost, or used while damaged.
        outcome: In a word or a line.
        seconds: It took.
    """

    id: str
    kind: str
    what: str
    kills: int
    ok: bool
    outcome: str
    seconds: float


class Campaign:
    """All trials below one folder.

    Args:
        work: Where runs and results lie; a campaign that was stopped goes on there.
        seed: Of times and damages.
    """

    def __init__(self, work: Path, *, seed: int) -> None:
        self.work, self.seed, self.chain = work, seed, CHAIN
        self.root = work / "runs"
        self.results = work / f"trials-{seed}.jsonl"
        self.library = work / "library"
        self._opened: list[Artefact] = []
        self._sound: dict[int, str] = {}
        self.scenarios = [Scenario(stage, world) for world in WORLDS for stage in STAGES]
        self.edits = list(small_bank.EDITS)
        self._bank_run = self.root / Scenario("continual", 1).name

    def config(self, scenario: Scenario, root: Path) -> RunConfig:
        """The configuration of a scenario's run, below a root."""
        settings = [
            "experiment=quick",
            "debug=smoke",
            *corpus_settings(root, self.work / "topics.jsonl"),
            "logging.progress=false",
            "logging.validation_rows=2",
            "saving.every_steps=1",
            "saving.keep_last=2",
            "saving.keep_best=0",
            f"engine.num_ranks={scenario.world}",
            f"run={scenario.name}",
        ]
        if scenario.stage == "warmup":
            settings += ["continual=null"]
        else:
            settings += ["warmup=null", f"continual.branch_from={self.root / f'warmup-{scenario.world}'}"]
        return compose_config(settings)

    def set_up(self) -> None:
        """Prepare the corpus, and make the runs that nobody disturbs, with a count of their operations."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not (self.root / "prepared").exists():
            topics(self.work / "topics.jsonl")
            forked(
                lambda: prepare.ensure(self.config(self.scenarios[0], self.root)), self.work / "prepare.log"
            )
        for scenario in self.scenarios:
            if not self._count(scenario).exists():
                shutil.rmtree(self.root / scenario.name, ignore_errors=True)
                started = time.monotonic()
                counters = [Operations(scenario.targets) for _ in range(scenario.world)]
                codes = self.start(scenario, self.root, counters).wait()
                if any(codes):
                    raise RuntimeError(
                        f"{scenario.name} ended with {codes}; see {self.root / scenario.name}.log"
                    )
                counts = [
                    int((self.root / f"{scenario.name}.{rank}").read_text()) for rank in range(scenario.world)
                ]
                found = {"operations": counts, "seconds": time.monotonic() - started}
                self._count(scenario).write_text(json.dumps(found))
        if not self.library.exists():
            made = self.library.with_suffix(".made")
            shutil.rmtree(made, ignore_errors=True)
            forked(lambda: small_bank.build(self._bank_run, made), made.with_suffix(".log"))
            made.rename(self.library)
        for name in self.edits:
            edited = self._edited(name)
            if not edited.with_suffix(".json").exists():
                shutil.rmtree(edited, ignore_errors=True)
                shutil.copytree(self.library, edited)
                code = self.edit(name, edited, Operations([f"{edited}/"])).wait()[0]
                if code:
                    raise RuntimeError(f"{name} ended with {code}; see {edited.with_suffix('.log')}")

    def start(
        self, scenario: Scenario, root: Path, counters: "Sequence[Operations] | None" = None
    ) -> "Ranks":
        """Fork the ranks of a run, which trains or goes on."""
        run, port = root / scenario.name, distributed.free_port()
        run.mkdir(parents=True, exist_ok=True)
        if not (run / "config.yaml").exists():
            forked(lambda: make_ready(self.config(scenario, root), run), run.with_suffix(".log"))
        pids: list[int] = []
        for rank in range(scenario.world):
            counter = counters[rank] if counters else None
            be = partial(_be_rank, rank, scenario.world, port, run, counter)
            pids.append(spawn(be, run.with_suffix(".log"), group=pids[0] if pids else 0))
        return Ranks(pids)

    def edit(self, name: str, folder: Path, counter: "Operations") -> "Ranks":
        """Fork a process that edits a copy of the library, or goes on with it."""

        def edit() -> int:
            counter.install()
            small_bank.edit(name, self._bank_run, folder)
            folder.with_suffix(".json").write_text(json.dumps({"operations": [counter.count]}))
            return 0

        return Ranks([spawn(edit, folder.with_suffix(".log"), group=0)])

    def trials(
        self, kinds: Sequence[str], *, kills: int, corruptions: int
    ) -> Iterator[tuple[str, Callable[[], Trial]]]:
        """Yield the ids of all trials, and what does them, in the order of the kinds."""
        if "operations" in kinds:
            for scenario in self.scenarios:
                for rank, count in enumerate(json.loads(self._count(scenario).read_text())["operations"]):
                    for number in range(1, count + 1):
                        id = f"operation {scenario.name} rank {rank} {number}"
                        yield id, partial(self.operation, id, scenario, rank, number)
            for name in self.edits:
                (count,) = json.loads(self._edited(name).with_suffix(".json").read_text())["operations"]
                for number in range(1, count + 1):
                    id = f"operation bank {name} {number}"
                    yield id, partial(self.operation_of_edit, id, name, number)
        if "times" in kinds:
            for number in range(kills):  # more than are needed, since some runs end before
                scenario = self.scenarios[number % len(self.scenarios)]
                id = f"times {scenario.name} {number}"
                yield id, partial(self.times, id, scenario)
        if "corruptions" in kinds:
            for number in range(corruptions):
                id = f"corruption {number}"
                yield id, partial(self.corruption, id)

    def operation(self, id: str, scenario: Scenario, rank: int, number: int) -> Trial:
        """Kill all ranks at an operation of one of them, resume, compare."""
        started, root = time.monotonic(), self._trial_root()
        counters = [
            Operations(scenario.targets, at=number if r == rank else None) for r in range(scenario.world)
        ]
        killed = any(code < 0 for code in self.start(scenario, root, counters).wait())
        outcome = self.resumed(scenario, root)
        return _trial(id, "operations", scenario.name, int(killed), outcome, started)

    def operation_of_edit(self, id: str, name: str, number: int) -> Trial:
        """Kill an edit of the library at an operation, repeat it, compare all files."""
        started, folder = time.monotonic(), self._trial_root() / "library"
        shutil.copytree(self.library, folder)
        killed = self.edit(name, folder, Operations([f"{folder}/"], at=number)).wait()[0] < 0
        code = self.edit(name, folder, Operations([f"{folder}/"])).wait()[0]
        one, other = _files(folder), _files(self._edited(name))
        unequal = [file for file in sorted(one.keys() | other.keys()) if one.get(file) != other.get(file)]
        outcome = f"unequal: {', '.join(unequal[:5])}" if unequal else "equal"
        if code:
            outcome = f"repeated, it ended with {code}: {folder.with_suffix('.log').read_text()[-300:]}"
        return _trial(id, "operations", f"bank {name}", int(killed), outcome, started)

    def times(self, id: str, scenario: Scenario) -> Trial:
        """Kill all ranks at random times, a few times in a row, resume, compare."""
        started, root, rng = time.monotonic(), self._trial_root(), random.Random(f"{self.seed} {id}")
        known = json.loads(self._count(scenario).read_text())
        kills = 0
        for _ in range(self.chain):
            begun, ranks = time.monotonic(), self.start(scenario, root)
            if ranks.ended_within(rng.uniform(0, known["seconds"])):
                if not kills:  # the machine has become faster
                    known["seconds"] = time.monotonic() - begun
                    self._count(scenario).write_text(json.dumps(known))
                break
            ranks.kill()
            kills += 1
        outcome = self.resumed(scenario, root)
        return _trial(id, "times", scenario.name, kills, outcome, started)

    def resumed(self, scenario: Scenario, root: Path) -> str:
        """Resume a run to its end and compare it; "equal" when nothing was lost."""
        run = root / scenario.name
        published = [entry.folder.name for entry in entries(run) if entry.problem is None]
        before = _restarts(run)
        codes = self.start(scenario, root).wait()
        if any(codes):
            return f"the resumed run ended with {codes}: " + run.with_suffix(".log").read_text()[-300:]
        lines = read_metrics(run / "metrics.jsonl")
        if published and _restarts(run) > before:
            return f"began anew although {published[-1]} was published"
        steps = [(line["stage"], line["step"]) for line in lines if "loss" in line]
        if len(set(steps)) != len(steps) or len(steps) != 4:
            return f"steps {steps}"
        unequal = differences(newest_checkpoint(self.root / scenario.name), newest_checkpoint(run))
        return "equal" if not unequal else f"unequal: {', '.join(unequal[:5])}"

    def corruption(self, id: str) -> Trial:
        """Damage a file of a copy of an artefact, and read it as training does."""
        started, rng = time.monotonic(), random.Random(f"{self.seed} {id}")
        self._opened = self._opened or self._artefacts()
        chosen = rng.randrange(len(self._opened))
        artefact = self._opened[chosen]
        if chosen not in self._sound:
            self._sound[chosen] = artefact.read(artefact.root)
        copy = self.work / "corrupted"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(artefact.root, copy, copy_function=os.link, symlinks=True)
        folder = copy / artefact.folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        done = corrupt(rng.choice(files), files, rng)
        what = f"{artefact.name}: {done} in {artefact.folder}"
        seen = artefact.seen(folder)
        try:
            unread = artefact.read(copy) == self._sound[chosen] and not artefact.must_refuse
            outcome = "not read" if unread else "SILENT: it was used"
        except Passed as passed:
            outcome = str(passed)
        except ValueError:
            outcome = "refused"
        except Exception as problem:
            outcome = f"CRASHED: {problem!r}"
        if not seen:
            outcome += ", but `verify` saw nothing"
        ok = seen and outcome in ("refused", "not read", "passed over by name")
        return Trial(id, "corruptions", what, 0, ok, outcome, time.monotonic() - started)

    def _artefacts(self) -> list[Artefact]:
        found: list[Artefact] = []
        for scenario in self.scenarios:
            found += of_run(self.root / scenario.name, self.config(scenario, self.root))
        found += of_corpus(self.root, self.config(self.scenarios[0], self.root), self.work)
        return found + of_library(self._bank_run, self.library)

    def _trial_root(self) -> Path:
        root = self.work / "trial"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        (root / "prepared").symlink_to(self.root / "prepared")
        return root

    def _count(self, scenario: Scenario) -> Path:
        return self.root / f"{scenario.name}.json"

    def _edited(self, name: str) -> Path:
        return self.work / f"edited-{name}"


class Ranks:
    """The forked processes of a run, one group."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = list(pids)

    def wait(self) -> list[int]:
        """Exit codes; those of signals are negative."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self._pids]

    def ended_within(self, seconds: float) -> bool:
        """Wait so long at most; whether all have ended by then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = [os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in self._pids]
            if all(ended):
                self.wait()
                return True
            time.sleep(0.005)
        return False

    def kill(self) -> None:
        """SIGKILL to all of them at once."""
        os.killpg(self._pids[0], signal.SIGKILL)
        self.wait()


class Operations:
    """Counts what this process does to files whose paths contain one of some parts, and kills its group at one.

    Args:
        targets: Parts of paths.
        at: The operation, from 1, before which all ranks are killed; None only counts.
    """

    def __init__(self, targets: Sequence[str], *, at: int | None = None) -> None:
        self.count = 0
        self._targets = targets
        self._at = at
        self._lock = threading.Lock()

    def install(self) -> None:
        """Wrap the functions through which this project changes files."""
        for name in ("fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir"):
            self._wrap(os, name)
        for owner in (builtins, io):
            self._wrap(owner, "open")
        for owner in (checkpoint, engine):
            self._wrap(owner, "save_file", cuts=1)
        self._wrap(torch, "save", cuts=1)

    def _wrap(self, owner: Any, name: str, *, cuts: int | None = None) -> None:
        plain = getattr(owner, name)

        def wrapped(*arguments: Any, **settings: Any) -> Any:
            if name == "open" and not set("wxa+") & set(str((*arguments[1:2], settings.get("mode", ""))[0])):
                return plain(*arguments, **settings)
            path = _path(arguments[0 if cuts is None else cuts], settings.get("dir_fd"))
            if name in ("rename", "replace"):
                path += f" {_path(arguments[1], settings.get('dst_dir_fd'))}"
            self._met(path)
            done = plain(*arguments, **settings)
            if (
                cuts is not None
            ):  # written by a library in one go: also as a kill in its middle would leave it
                self._met(path, cut=True)
            return done

        setattr(owner, name, wrapped)

    def _met(self, path: str, *, cut: bool = False) -> None:
        if not any(target in path for target in self._targets):
            return
        with self._lock:
            self.count += 1
            if self.count == self._at:
                if cut:
                    os.truncate(path, os.path.getsize(path) // 2)
                os.killpg(0, signal.SIGKILL)
                time.sleep(_PATIENCE_SECONDS)


def _path(argument: Any, dir_fd: int | None) -> str:
    """The path of a file operation's first argument, which may be a descriptor."""
    if isinstance(argument, int):
        return os.readlink(f"/proc/self/fd/{argument}")
    path = os.fspath(argument) if isinstance(argument, str | os.PathLike) else ""
    base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
    return os.path.join(base, path)


def warm_up() -> None:
    """Import what ranks import, late imports of DeepSpeed included, and spare them the collection of all that."""
    _import_deepspeed(distributed.Ranks(0, 1, torch.device("cpu")))
    for name in _LATE:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def forked(work: Callable[[], object], log: Path) -> None:
    """Do something in a process of its own, so that this one stays fit to be forked.

    Raises:
        RuntimeError: It failed; the log says how.
    """

    def do() -> int:
        work()
        return 0

    if any(Ranks([spawn(do, log)]).wait()):
        raise RuntimeError(f"{log}:\n{log.read_text()[-2000:]}")


def spawn(work: Callable[[], int], log: Path, *, group: int | None = None) -> int:
    """Fork a process that does something, speaks into a log and ends with the exit code; its pid.

    Args:
        work: What it does.
        log: Is appended to.
        group: Of processes that are killed together: that of a first one, or 0 for its own.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if group is not None:
                os.setpgid(0, group)
            _speak_into(log)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            worker.leave(code)
    if group is not None:
        with suppress(PermissionError, ProcessLookupError):  # it has done so itself
            os.setpgid(pid, group or pid)
    return pid


def _be_rank(rank: int, world: int, port: int, run: Path, counter: Operations | None) -> int:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if counter is not None:
        counter.install()
    worker._GRACE_SECONDS = 0
    code = worker.main(run)
    if counter is not None:
        Path(f"{run}.{rank}").write_text(str(counter.count))
    return code


def _speak_into(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def _trial(id: str, kind: str, what: str, kills: int, outcome: str, started: float) -> Trial:
    return Trial(id, kind, what, kills, outcome == "equal", outcome, time.monotonic() - started)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def _restarts(run: Path) -> int:
    """How often a run began anew."""
    path = run / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return sum(line.get("event") == "restarted" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is left of a campaign, or a slice of it, and write what was found so far."""
    arguments = _parser().parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    with only_user(arguments.work, other="give another --work"):
        return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Do it, in a folder that nobody else uses; the exit code."""
    if arguments.short:
        arguments.kills, arguments.corruptions, arguments.every = 2, 24, 70
    warm_up()
    campaign = Campaign(arguments.work.resolve(), seed=arguments.seed)
    if arguments.short:
        campaign.scenarios, campaign.chain = [Scenario("warmup", 1), Scenario("continual", 1)], 2
        campaign.edits = ["compact"]
    campaign.set_up()
    deadline = time.monotonic() + 60 * arguments.minutes
    done = {trial.id: trial for trial in _done(campaign.results)}
    wanted = list(
        campaign.trials(arguments.kinds.split(","), kills=arguments.kills, corruptions=arguments.corruptions)
    )
    wanted = [
        (id, trial)
        for place, (id, trial) in enumerate(wanted)
        if not id.startswith("operation") or place % arguments.every == 0
    ]
    while time.monotonic() < deadline:
        enough = _kills(done.values(), "times") >= arguments.kills
        left = [
            each for each in wanted if each[0] not in done and not (enough and each[0].startswith("times"))
        ]
        if not left:
            break
        # Kills need a process of their own each, which has used nothing; corruptions share what they open.
        batch = left[: _BATCH if left[0][0].startswith("corruption") else 1]
        log = campaign.work / "trial.log"
        log.unlink(missing_ok=True)
        forked(partial(_make, batch, campaign.results), log)
        done = {each.id: each for each in _done(campaign.results)}
        for id, _ in batch:
            print(f"{id}: {done[id].outcome} ({done[id].seconds:.1f} s)", flush=True)
    short = (
        min(arguments.kills, _kills(done.values(), "times")) - arguments.kills
        if "times" in arguments.kinds
        else 0
    )
    missing = sum(id not in done and not id.startswith("times") for id, _ in wanted) - short
    result = {**summary(list(done.values()), arguments), "left": missing}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(render(result), encoding="utf-8")
    print(render(result))
    return 0 if all(trial.ok for trial in done.values()) else 1


def summary(trials: Sequence[Trial], arguments: argparse.Namespace) -> dict[str, Any]:
    """Counts, and everything that was lost."""
    rows = []
    for kind in KINDS:
        mine = [trial for trial in trials if trial.kind == kind]
        for what in sorted({trial.what.partition(":")[0] for trial in mine}):
            some = [trial for trial in mine if trial.what.partition(":")[0] == what]
            rows.append(
                {
                    "kind": kind,
                    "what": what,
                    "trials": len(some),
                    "kills": sum(trial.kills for trial in some),
                    "ok": sum(trial.ok for trial in some),
                    "outcomes": dict(Counter(trial.outcome.partition(":")[0] for trial in some)),
                }
            )
    damages = Counter(
        trial.what.partition(": ")[2].split()[0] for trial in trials if trial.kind == "corruptions"
    )
    return {
        "command": f"python benchmarks/campaign.py --seed {arguments.seed} --kills {arguments.kills} "
        f"--corruptions {arguments.corruptions}",
        "commit": commit(),
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
        "rows": rows,
        "damages": dict(damages),
        "lost": [asdict(trial) for trial in trials if not trial.ok],
        "seconds": round(sum(trial.seconds for trial in trials), 1),
    }


def render(result: dict[str, Any]) -> str:
    """The result as a page."""
    lines = [
        "# Kills and corruptions",
        "",
        f"`{result['command']}`, commit `{result['commit']}`, {result['machine']['cpu']}, "
        f"{result['machine']['cores']} cores, {result['seconds'] / 60:.0f} minutes.",
        "",
        "| kind | what | trials | kills | survived or found | outcomes |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(row["outcomes"].items()))
        lines.append(
            f"| {row['kind']} | {row['what']} | {row['trials']} | {row['kills'] or ''} | "
            f"{row['ok']} ({row['ok'] / row['trials']:.0%}) | {outcomes} |"
        )
    damages = ", ".join(f"{name} {count}" for name, count in sorted(result["damages"].items()))
    lines += ["", f"Corruptions by kind: {damages or 'none'}.", ""]
    if result["left"]:
        lines += [f"{result['left']} trials are left to do.", ""]
    lines += [f"- LOST: {trial['id']}, {trial['what']}: {trial['outcome']}" for trial in result["lost"]]
    if not result["lost"]:
        lines.append("Nothing was lost, and nothing damaged was used.")
    return "\n".join(lines) + "\n"


def _kills(trials: Any, kind: str) -> int:
    return sum(trial.kills for trial in trials if trial.kind == kind)


def _done(path: Path) -> list[Trial]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Trial(**json.loads(line)) for line in lines if line.endswith("\n")]


def _make(batch: Sequence[tuple[str, Callable[[], Trial]]], path: Path) -> None:
    """Make trials, and add each to the results when it is done."""
    for _, trial in batch:
        line = json.dumps(asdict(trial()))
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/campaign"), help="folder of runs and results")
    parser.add_argument("--out", type=Path, help="where the summary goes, .json; a page beside it, .md")
    parser.add_argument("--kinds", default=",".join(KINDS), help="what is done, in this order")
    parser.add_argument("--kills", type=int, default=200, help="at random times")
    parser.add_argument("--corruptions", type=int, default=500)
    parser.add_argument("--every", type=int, default=1, help="only every so manyth operation")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no trial after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few of each, on one rank")
    return parser


if __name__ == "__main__":
    worker.leave(main())
