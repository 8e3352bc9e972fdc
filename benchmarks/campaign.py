"""Kill a small run wherever it can be killed, corrupt every file that a run reads, and count what was lost.

    python benchmarks/campaign.py --work FOLDER --out benchmarks/results/campaign.json
    python benchmarks/campaign.py --work FOLDER --minutes 20      # a slice: what is done stays done
    python benchmarks/campaign.py --short                       # seconds; what continuous integration runs

Runs are those of `debug=smoke` on the Python documentation, warmup and continual stage apart, on one rank and on two.
They are forked from a parent that has imported everything and used nothing, so that a trial takes a second or two.

    operations   SIGKILL to all ranks when one of them is about to create, write, sync, rename or delete a file of the
                 stage's last checkpoint (rotation included) or of its second bank generation: each such operation once;
                 files that torch and safetensors write by themselves are also cut in the middle
    times        SIGKILL at random moments, up to five in a row, each followed by a resume
    corruptions  a bit flipped, cut, deleted, zeroed, extended or swapped with another file: in a checkpoint, a bank's
                 generation, a search index, search vectors, a prepared corpus with its shards; then it is read as
                 training reads it

A kill counts as survived when the resumed run ends with the same bytes as one that nobody disturbed (weights, masters,
moments, state), reports every step once, and never begins anew after a checkpoint was published. A corruption counts
as found when reading refuses it (a checkpoint: falls back to the one before, by name) and a full `verify` sees it; as
silent when anything was read that differs. The exit code is 0 when everything was survived and found.
"""

import argparse
import builtins
import gc
import hashlib
import importlib
import io
import json
import logging
import os
import platform
import random
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.kill_and_resume import _commit, _cpu, differences, newest_checkpoint  # noqa: E402
from data.files import verify  # noqa: E402
from data.prepare import open_prepared  # noqa: E402
from launch import build, prepare, worker  # noqa: E402
from launch.compose import compose_config  # noqa: E402
from launch.config import RunConfig  # noqa: E402
from launch.pretrain import freeze  # noqa: E402
from memorybank.config import IndexConfig, IndexKind  # noqa: E402
from memorybank.index_plan import plan_index  # noqa: E402
from memorybank.index_store import build_index, open_index  # noqa: E402
from memorybank.store import Generation  # noqa: E402
from memorybank.vectors import Vectors  # noqa: E402
from train import checkpoint, distributed, engine  # noqa: E402
from train.checkpoint import Checkpoints, entries  # noqa: E402
from train.engine import _import_deepspeed  # noqa: E402
from train.metrics import read_metrics  # noqa: E402

KINDS = ("operations", "times", "corruptions")
DAMAGES = ("flip", "truncate", "delete", "swap", "zero", "extend")
_BATCH = 25
CHAIN = 5
"""Kills of one run, at random times, before it may end."""
STAGES = ("warmup", "continual")
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
        return saved if self.stage == "warmup" else (*saved, "/bank/generation-continual-0001")


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
        self._opened: list[Artefact] = []
        self._sound: dict[int, str] = {}
        self.scenarios = [Scenario(stage, world) for world in WORLDS for stage in STAGES]

    def config(self, scenario: Scenario, root: Path) -> RunConfig:
        """The configuration of a scenario's run, below a root."""
        settings = [
            "experiment=quick",
            "debug=smoke",
            "data=jsonl",
            f"data.path={self.work / 'topics.jsonl'}",
            "data.sources.documents.title_field=title",
            "data.sources.documents.id_field=id",
            "data.vocab_size=640",
            "data.validation_fraction=0.15",
            "data.test_fraction=0.1",
            "data.num_workers=1",
            "logging.progress=false",
            "logging.validation_rows=2",
            "saving.every_steps=1",
            "saving.keep_last=2",
            "saving.keep_best=0",
            f"engine.num_ranks={scenario.world}",
            f"paths.root={root}",
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
            documents = [
                {"id": name, "title": name, "text": text.strip()}
                for name, text in sorted(topics.topics.items())
                if len(text) <= 3500
            ]
            lines = "".join(json.dumps(document) + "\n" for document in documents)
            (self.work / "topics.jsonl").write_text(lines, encoding="utf-8")
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

    def start(
        self, scenario: Scenario, root: Path, counters: "Sequence[Operations] | None" = None
    ) -> "Ranks":
        """Fork the ranks of a run, which trains or goes on."""
        run, port = root / scenario.name, _free_port()
        run.mkdir(parents=True, exist_ok=True)
        if not (run / "config.yaml").exists():
            forked(lambda: freeze(self.config(scenario, root), run), run.with_suffix(".log"))
        pids: list[int] = []
        for rank in range(scenario.world):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, pids[0] if pids else 0)
                _become(rank, scenario.world, port, run, counters[rank] if counters else None)
            with suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pids[0] if pids else pid)
            pids.append(pid)
        return Ranks(pids)

    def trials(
        self, kinds: Sequence[str], *, kills: int, corruptions: int
    ) -> Iterator[tuple[str, Callable[[], Trial]]]:
        """Yield the ids of all trials, and what does them, in the order of the kinds."""
        if "operations" in kinds:
            for scenario in self.scenarios:
                for rank, count in enumerate(json.loads(self._count(scenario).read_text())["operations"]):
                    for number in range(1, count + 1):
                        id = f"operation {scenario.name} rank {rank} {number}"
                        yield id, lambda id=id, s=scenario, r=rank, n=number: self.operation(id, s, r, n)
        if "times" in kinds:
            for number in range(kills):  # more than are needed, since some runs end before
                scenario = self.scenarios[number % len(self.scenarios)]
                id = f"times {scenario.name} {number}"
                yield id, lambda id=id, s=scenario: self.times(id, s)
        if "corruptions" in kinds:
            for number in range(corruptions):
                id = f"corruption {number}"
                yield id, lambda id=id: self.corruption(id)

    def operation(self, id: str, scenario: Scenario, rank: int, number: int) -> Trial:
        """Kill all ranks at an operation of one of them, resume, compare."""
        started, root = time.monotonic(), self._trial_root(scenario)
        counters = [
            Operations(scenario.targets, at=number if r == rank else None) for r in range(scenario.world)
        ]
        killed = any(code < 0 for code in self.start(scenario, root, counters).wait())
        outcome = self.resumed(scenario, root)
        return Trial(
            id,
            "operations",
            scenario.name,
            int(killed),
            outcome == "equal",
            outcome,
            time.monotonic() - started,
        )

    def times(self, id: str, scenario: Scenario) -> Trial:
        """Kill all ranks at random times, a few times in a row, resume, compare."""
        started, root, rng = time.monotonic(), self._trial_root(scenario), random.Random(f"{self.seed} {id}")
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
        return Trial(
            id, "times", scenario.name, kills, outcome == "equal", outcome, time.monotonic() - started
        )

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
        try:
            seen = bool(verify(folder))
        except (ValueError, FileNotFoundError):
            seen = True
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

    def _artefacts(self) -> "list[Artefact]":
        found: list[Artefact] = []
        for scenario in self.scenarios:
            run = self.root / scenario.name
            config = self.config(scenario, self.root)
            newest = newest_checkpoint(run)
            relative = str(newest.relative_to(run))
            found.append(
                Artefact(
                    "checkpoint",
                    run,
                    relative,
                    lambda copy, c=config, r=relative: _newest(copy, c, r),
                    must_refuse=True,
                )
            )
            if scenario.stage == "continual":
                generation = sorted((run / "bank").glob("generation-*"))[-1]
                found.append(
                    Artefact(
                        "bank",
                        generation.parent,
                        generation.name,
                        lambda copy, n=generation.name: _bank(copy / n),
                    )
                )
        prepared = build.prepared_folder(config)
        for name in ("corpus", "tokenizer", "shards", "references"):
            found.append(
                Artefact(
                    name,
                    prepared.parent.parent,
                    f"prepared/{config.data.name}/{name}",
                    lambda copy, c=config: _corpus(copy, c),
                )
            )
        (vectors,) = (prepared / "vectors").glob("references-*")
        found.append(Artefact("vectors", vectors, ".", _vectors))
        index = self.work / "index"
        if not index.exists():
            _build_index(vectors, index)
        found.append(Artefact("index", index, ".", lambda copy: _search(copy, vectors)))
        return found

    def _trial_root(self, scenario: Scenario) -> Path:
        root = self.work / "trial"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        (root / "prepared").symlink_to(self.root / "prepared")
        return root

    def _count(self, scenario: Scenario) -> Path:
        return self.root / f"{scenario.name}.json"


class Passed(Exception):
    """A damaged checkpoint was passed over; by name, as it should be, or in silence."""


@dataclass(frozen=True, slots=True)
class Artefact:
    """Something that can be damaged.

    Attributes:
        name: What it is.
        root: The folder that is copied.
        folder: The artefact in it, relative.
        read: Reads all that training reads of a copy of the root; a digest of it.
        must_refuse: Whether any damage has to be refused, rather than damage to what is read.
    """

    name: str
    root: Path
    folder: str
    read: Callable[[Path], str]
    must_refuse: bool = False


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


def corrupt(path: Path, files: Sequence[Path], rng: random.Random) -> str:
    """Damage a file so that its bytes differ, and say how; files are hard links, so that others stay as they are."""
    content = path.read_bytes()
    others = [other for other in files if other.read_bytes() != content]
    kinds = [
        kind
        for kind in DAMAGES
        if (content or kind in ("delete", "extend", "swap")) and (others or kind != "swap")
    ]
    while True:
        kind = rng.choice(kinds)
        place, length = rng.randrange(max(1, len(content))), rng.randrange(1, 4096)
        new: bytes | None
        match kind:
            case "flip":
                new = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
            case "truncate":
                new = content[:place]
            case "zero":
                end = min(len(content), place + length)
                new = content[:place] + bytes(end - place) + content[end:]
            case "extend":
                new = content + rng.randbytes(length)
            case "swap":
                other = rng.choice(others)
                new = other.read_bytes()
                _replace(other, content)
            case _:
                new = None
        if new == content:
            continue
        path.unlink() if new is None else _replace(path, new)
        with_what = f" with {other.name}" if kind == "swap" else ""
        return f"{kind} {path.name}{with_what}"


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
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _speak_into(log)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            worker.leave(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{log}:\n{log.read_text()[-2000:]}")


def _become(rank: int, world: int, port: int, run: Path, counter: Operations | None) -> None:
    """Be a rank until it ends."""
    code = 1
    try:
        _speak_into(run.with_suffix(".log"))
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
    except BaseException:
        traceback.print_exc()
    finally:
        worker.leave(code)


def _speak_into(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def _newest(run: Path, config: RunConfig, damaged: str) -> str:
    """What a run resumes from: it must not be the damaged one."""
    inputs = build.context(config).inputs
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("train.checkpoint").addHandler(handler)
    try:
        found = Checkpoints(run, inputs=inputs).newest()
    finally:
        logging.getLogger("train.checkpoint").removeHandler(handler)
    if found is not None and found.folder == run / damaged:
        return "used"
    if Path(damaged).name not in said.getvalue():
        raise Passed("passed over without a word")
    raise Passed("passed over by name")


def _bank(folder: Path) -> str:
    generation = Generation.open(folder)
    return _digest(
        generation.ids, generation.read(generation.ids).numpy(), generation.codec, generation.settings.step
    )


def _corpus(root: Path, config: RunConfig) -> str:
    prepared = open_prepared(config.data, root / "prepared")
    shards, references = prepared.shards, prepared.references
    parts: list[Any] = [prepared.tokenizer.encode("The harbour of"), shards.vocab_size, shards.lengths()]
    for number in range(shards.num_documents):
        parts += [shards.tokens(number), str(shards.document(number))]
    parts += [*references.tokens(range(len(references)))]
    parts += [references.text(number) for number in range(len(references))]
    return _digest(*parts)


def _vectors(folder: Path) -> str:
    vectors = Vectors.open(folder)
    return _digest(vectors.read(np.arange(len(vectors))), vectors.embedder, vectors.segment)


def _build_index(folder: Path, index: Path) -> None:
    vectors = Vectors.open(folder)
    numbers = np.arange(len(vectors))
    asked = IndexConfig(kind=IndexKind.ivf_flat)
    build_index(
        index,
        vectors.blocks_of(numbers),
        plan_index(len(vectors), vectors.size, asked),
        queries=vectors.read(numbers[:64]),
        query_ids=numbers[:64],
        inputs={"vectors": vectors.fingerprint},
    )


def _search(index: Path, folder: Path) -> str:
    vectors = Vectors.open(folder)
    opened = open_index(index, vectors.blocks_of(np.arange(len(vectors))))
    return _digest(*opened.search(vectors.read(np.arange(len(vectors))), 5))


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(
            np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else repr(part).encode()
        )
    return digest.hexdigest()


def _replace(path: Path, content: bytes) -> None:
    work = path.with_name(path.name + ".new")
    work.write_bytes(content)
    work.replace(path)


def _restarts(run: Path) -> int:
    """How often a run began anew."""
    path = run / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return sum(line.get("event") == "restarted" for line in lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is left of a campaign, or a slice of it, and write what was found so far."""
    arguments = _parser().parse_args(argv)
    if arguments.short:
        arguments.kills, arguments.corruptions, arguments.every = 2, 24, 70
    warm_up()
    campaign = Campaign(arguments.work.resolve(), seed=arguments.seed)
    if arguments.short:
        campaign.scenarios, campaign.chain = [Scenario("warmup", 1), Scenario("continual", 1)], 2
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
        forked(lambda batch=batch: [_append(campaign.results, trial()) for _, trial in batch], log)
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
        "commit": _commit(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
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


def _append(path: Path, trial: Trial) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(trial)) + "\n")


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
    sys.exit(main())
