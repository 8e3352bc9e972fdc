"""A bank of a million references: what it costs to build, edit, search, read and verify, and what its search finds.

    mkdir DEBS; cd DEBS; apt-get download $(python -m benchmarks.million --list-packages)
    python -m benchmarks.million --packages DEBS --work WORK --output benchmarks/results/million

Text is that of Debian packages (`benchmarks.packages`). The distinct documents are built first; then documents of the
same text, begun 150, 300, ... characters later, are added in ten edits until the bank holds the references wanted.
One document in fifty is held out, and asks. The model is `nano` with random weights (what is timed does not depend on
them) and the paper's 8 tokens kept, the embedder the static table, the codec int8: a record takes 8,512 bytes, a
million 8.5 GB, with vectors, index, text and the copy that `compact` makes some 25 GB of disk.

Each phase runs in processes of its own, under RLIMIT_DATA (`--limit-gib`), and is measured from outside: seconds on
the clock, CPU-seconds, which other processes change less, and anonymous memory over time. A phase that was killed
goes on when the command is given again, and its seconds add up; finished ones are not repeated. `--references 20000
--index ivf_flat` is a trial of a minute or two.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import packages
from data.corpus import hash_id
from data.documents import Document, Split, Use
from data.files import fingerprint, write_atomic, writing
from data.tokenizer import Tokenizer, train
from launch.compose import compose_config
from memorybank import soundness
from memorybank.config import CodecConfig, CodecKind, IndexConfig, IndexKind
from memorybank.cost import EMBEDDERS, memory_bytes, position_bytes
from memorybank.edits import Compiler, Documents, Editor
from memorybank.embedder import StaticEmbedder
from memorybank.index import Blocks, search_spans
from memorybank.index_plan import IndexPlan, plan_index
from memorybank.library import Library, index_blocks, state_numbers
from memorybank.record import MemoryShape
from memorybank.segment import CutDocument, DocumentCutter
from model.flops import knowledge_cost
from model.transformer import Memory3LM

PACKAGES = [
    "wordnet-base",
    "dict-gcide",
    "dict-foldoc",
    "dict-jargon",
    "anarchism",
    "python3.11-doc",
    "linux-doc-6.1",
    "postgresql-doc-15",
    "perl-doc",
    "cppreference-doc-en-html",
    "libreoffice-help-en-us",
    "debian-handbook",
    "git-doc",
    "apache2-doc",
    "vim-doc",
    "octave-doc",
]
STRIDE = 150
"""Characters by which a document of the same text begins later."""
ADDS = 10
GPU_TFLOPS, GPUS, CPU_GFLOPS, CORES = 400, 8, 50, 64
"""The hardware of the computed table: eight H100 at 40 % of their nominal bfloat16 rate, 64 cores in float32."""

Told = Callable[[str, int, int, int], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, phase by phase, and write the tables of what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list-packages", action="store_true", help="print the packages, and do nothing")
    parser.add_argument("--packages", type=Path, metavar="FOLDER", help="where their .deb files lie")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for text, bank and progress")
    parser.add_argument("--output", type=Path, help="path without ending: .md and .json are written")
    parser.add_argument(
        "--references", type=int, default=1_000_000, help="about so many (default: %(default)s)"
    )
    kinds = [kind.name for kind in IndexKind]
    parser.add_argument("--index", choices=kinds, default="auto", help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="processes that compile (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="pieces (default: %(default)s)")
    parser.add_argument("--limit-gib", type=float, default=3.9, help="RLIMIT_DATA (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.list_packages:
        print(" ".join(PACKAGES))
        return 0
    if not (arguments.packages and arguments.work and arguments.output):
        parser.error("--packages, --work and --output are needed")
    arguments.work.mkdir(parents=True, exist_ok=True)
    progress = Progress(arguments.work / "progress.json")
    adds = [f"add {number}" for number in range(1, ADDS + 1)]
    names = ["text", "build", "search distinct", *adds, "search", "gather", "verify", "remove", "compact"]
    for name in names:
        if not progress.is_done(name):
            run_phase(name, arguments, progress)
        report(progress, arguments)
    return 0


class Progress:
    """What was measured of every phase, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.phases: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def is_done(self, name: str) -> bool:
        """Whether a phase has come to its end."""
        return "result" in self.phases.get(name, {})

    def result(self, name: str) -> Any:
        """What a phase returned."""
        return self.phases[name]["result"]

    def save(self) -> None:
        """Write everything."""
        write_atomic(self._path, json.dumps(self.phases).encode())


@dataclass(frozen=True, slots=True)
class Process:
    """A rank of a phase (`memorybank.team`)."""

    rank: int
    world_size: int
    meeting: Barrier
    told: "SimpleQueue[Any]"

    def barrier(self) -> None:
        self.meeting.wait()

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            for _ in range(1, self.world_size):
                self.told.put(value)
        else:
            value = self.told.get()
        self.barrier()
        return value


def run_phase(name: str, arguments: argparse.Namespace, progress: Progress) -> None:
    """Run a phase in its own processes, and watch them."""
    num = arguments.ranks if name == "build" or name.startswith("add") else 1
    context = multiprocessing.get_context("spawn")
    barrier, told, done = context.Barrier(num), context.SimpleQueue(), context.Value("q", 0)
    answer = arguments.work / "answer.json"
    answer.unlink(missing_ok=True)
    found = progress.phases.setdefault(
        name, {"clock_seconds": 0.0, "cpu_seconds": 0.0, "lives": 0, "memory": []}
    )
    found["lives"] += 1
    before, begun = (found["clock_seconds"], found["cpu_seconds"]), time.monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processes = [
        context.Process(target=work, args=(name, Process(rank, num, barrier, told), arguments, done, answer))
        for rank in range(num)
    ]
    for process in processes:
        process.start()
    saved = begun
    while any(process.is_alive() for process in processes):
        processes[0].join(0.25)
        if any(process.exitcode for process in processes):
            barrier.abort()
        seen = [usage(process) for process in processes]
        found["clock_seconds"] = before[0] + time.monotonic() - begun
        found["cpu_seconds"] = max(found["cpu_seconds"], before[1] + sum(cpu for cpu, _ in seen))
        last = found["memory"][-1] if found["memory"] else [-10.0, 0, 0.0]
        peak = max(memory for _, memory in seen)
        if found["clock_seconds"] - last[0] >= 10:
            found["memory"].append([found["clock_seconds"], done.value, peak])
        else:
            last[2] = max(last[2], peak)  # the most of each ten seconds
        if time.monotonic() - saved > 5:
            progress.save()
            saved = time.monotonic()
    for process in processes:
        process.join()
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    mine = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    found["cpu_seconds"] = before[1] + mine
    if any(process.exitcode for process in processes):
        progress.save()
        raise SystemExit(f"{name}: a process ended with {[process.exitcode for process in processes]}")
    found["result"] = json.loads(answer.read_text())
    progress.save()
    rounded = {key: value for key, value in found.items() if key not in ("memory", "lives")}
    print(f"{time.strftime('%H:%M:%S')} {name}: {json.dumps(rounded)}", flush=True)


def usage(process: BaseProcess) -> tuple[float, float]:
    """CPU-seconds and anonymous bytes of a process; zeros when it is gone."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0.0, 0.0
    anonymous = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
    ticks = os.sysconf("SC_CLK_TCK")
    return (int(fields[11]) + int(fields[12])) / ticks, 1024.0 * (anonymous[0] if anonymous else 0)


def work(
    name: str,
    team: Process,
    arguments: argparse.Namespace,
    done: "Synchronized[int]",
    answer: Path,
) -> None:
    """Do a phase, in a process of its own."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with its parent
    limit = int(arguments.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)

    def told(what: str, total: int, more: int, size: int) -> None:
        if what == "compiling":  # every rank is told what all have finished
            with done.get_lock():
                done.value += more if team.rank == 0 else 0

    action = name.split(maxsplit=1)[0]
    phases: dict[str, Callable[[], Any]] = {
        "text": lambda: text(arguments),
        "build": lambda: put(arguments, team, told, 0),
        "add": lambda: put(arguments, team, told, int(name.split()[1])),
        "search": lambda: search(arguments),
        "gather": lambda: gather(arguments),
        "verify": lambda: verify(arguments),
        "remove": lambda: remove(arguments),
        "compact": lambda: compact(arguments),
    }
    result = phases[action]()
    if team.rank == 0:
        write_atomic(answer, json.dumps(result).encode())


def text(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the distinct documents, the queries and the tokenizer."""
    seen: set[int] = set()
    num_documents = num_characters = 0
    queries: list[str] = []
    sample: list[str] = []
    rng = np.random.default_rng(0)
    with writing(arguments.work / "text.jsonl") as file:
        for document_id, title, content in packages.read(arguments.packages):
            mark = hash_id(content)
            if mark in seen:
                continue
            seen.add(mark)
            if len(seen) % 50 == 0:
                begin = int(rng.integers(max(len(content) - 250, 1)))
                queries.append(content[begin : begin + 250])  # about a chunk
                continue
            line = {"id": document_id, "title": title, "text": content}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            num_documents, num_characters = num_documents + 1, num_characters + len(content)
            if len(seen) % 20 == 0:
                sample.append(content[:2000])
    write_atomic(
        arguments.work / "queries.json", json.dumps(queries[:: max(1, len(queries) // 1000)]).encode()
    )
    write_atomic(
        arguments.work / "tokenizer.model", train(sample, arguments.vocabulary, character_coverage=0.9995)
    )
    return {"documents": num_documents, "characters": num_characters, "queries": len(queries)}


def documents(arguments: argparse.Namespace, add: int) -> Iterator[Document]:
    """The documents of the build (0), or those of an edit that adds, as many as it needs for its share."""
    stated = Progress(arguments.work / "progress.json")
    made_of = stated.result("text")
    if add == 0:
        # About 430 characters a reference; half of what is wanted, at most.
        share = min(1.0, arguments.references * 215 / made_of["characters"])
        yield from (found for found in distinct(arguments) if hash_id(found.id) < share * 2**64)
        return
    built = stated.result("build")
    each = (arguments.references - built["references"]) / ADDS * built["characters"] / built["references"]
    # The same share as was built, so that everything added is like something that is there.
    share = min(1.0, arguments.references * 215 / made_of["characters"])
    passed = 0.0
    for late in count(STRIDE, STRIDE):
        for found in distinct(arguments):
            rest = found.text[late:]
            if hash_id(found.id) >= share * 2**64 or len(rest) < packages.SHORTEST / 2:
                continue
            passed += len(rest)
            if passed > add * each:
                return
            if passed > (add - 1) * each:
                yield document(f"{found.id}@{late}", found.title, rest, "strided")


def distinct(arguments: argparse.Namespace) -> Iterator[Document]:
    """All distinct documents."""
    with (arguments.work / "text.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            found = json.loads(line)
            yield document(found["id"], found["title"], found["text"], found["id"].split(":")[0])


def document(document_id: str, title: str, content: str, source: str) -> Document:
    """A document of the bank."""
    return Document(
        id=document_id, title=title, text=content, source=source, split=Split.train, use=Use.reference
    )


def compiler(arguments: argparse.Namespace) -> Compiler:
    """`nano` with random weights and 8 tokens kept, the static embedder, int8."""
    tokenizer = Tokenizer(arguments.work / "tokenizer.model")
    config = compose_config(["model=nano", "model.tokens_kept=8", "data=factbook"]).model
    config.prefix_ids = list(tokenizer.prefix_ids)
    config.vocab_size = tokenizer.vocab_size
    torch.manual_seed(0)
    network = Memory3LM(config).to(torch.bfloat16).eval()
    return Compiler(
        encode=network.encode,
        codec=CodecConfig(kind=CodecKind.int8),
        row_tokens=config.row_tokens,
        shape=MemoryShape.of(config),
        dtype=torch.bfloat16,
        embedder=StaticEmbedder(),
        cutter=DocumentCutter(tokenizer, config.reference_tokens),
        layout=config.layout(),
        weights="random-0",
        lineage="benchmark",
        step=0,
        index=IndexConfig(kind=IndexKind[arguments.index]),
    )


def put(arguments: argparse.Namespace, team: Any, told: Told, add: int) -> dict[str, Any]:
    """Build the bank, or add a share to it."""
    made = compiler(arguments)

    def read() -> Iterator[CutDocument]:
        return map(made.cutter.cut, documents(arguments, add))

    editor = Editor(folder=arguments.work / "bank", compiler=made, team=team, told=told)
    origin = {"text": fingerprint(Progress(arguments.work / "progress.json").result("text")), "add": str(add)}
    if add + 1 not in state_numbers(editor.folder):  # else an earlier life ended before it could say so
        team.barrier()  # nobody publishes before everybody has looked
        (editor.add if add else editor.build)(Documents(origin, read))
    if team.rank != 0:
        return {}
    characters = sum(len(found.text) for found in documents(arguments, add))
    with Library.open(editor.folder, number=add + 1) as library:
        return {"characters": characters, **described(library), **of_last_edit(library, add)}


def of_last_edit(library: Library, add: int) -> dict[str, int]:
    """What the newest edit put in."""
    parts = [part for part in library.parts if part.text.startswith(f"text-{add + 1:06d}-")]
    return {"put": sum(part.references for part in parts), "put_documents": sum(p.documents for p in parts)}


def described(library: Library) -> dict[str, Any]:
    """What a bank holds, and the largest of its indexes."""
    index = max(library.indexes, key=lambda index: int(index.settings["num_vectors"]), default=None)
    return {
        "references": len(library),
        "documents": library.num_documents,
        "bytes": library.bytes_by_kind(),
        "record_bytes": library.record_bytes,
        "size": library.vectors(0).size,
        "index": None
        if index is None
        else {**dict(index.extra), **{k: index.settings[k] for k in ("kind", "lists", "num_vectors")}},
    }


def search(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time look-ups of held-out queries, alone and together, and compare them with exact ones."""
    queries = StaticEmbedder().embed(json.loads((arguments.work / "queries.json").read_text()))
    with Library.open(arguments.work / "bank") as library:
        library.search(queries[:1], 64)  # opened, and its centroids read
        begun = time.process_time()
        found, _ = library.search(queries, 64)
        first = time.process_time() - begun  # every block is checked when it is first read
        alone = [seconds(partial(library.search, queries[row : row + 1], 64)) for row in range(100)]
        together = seconds(lambda: library.search(queries, 64))
        vectors = [library.vectors(place) for place in range(len(library.parts))]
        blocks = Blocks(index_blocks(library.segments, vectors))
        begun = time.process_time()
        exact, _ = search_spans(blocks.spans(), queries, 64)
        exhaustive = time.process_time() - begun
        return {
            **described(library),
            "queries": len(queries),
            "recall_at_5": float((found[:, :5] >= exact[:, 4:5] - 1e-6).mean()),
            "recall_at_64": float((found >= exact[:, 63:] - 1e-6).mean()),
            "cpu_seconds_1000_alone": 1000 * float(np.median([cpu for cpu, _ in alone])),
            "clock_seconds_1000_alone": 1000 * float(np.median([clock for _, clock in alone])),
            "cpu_seconds_1000_together": 1000 * together[0] / len(queries),
            "cpu_seconds_1000_first": 1000 * first / len(queries),
            "cpu_seconds_1000_exact_together": 1000 * exhaustive / len(queries),
        }


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """CPU-seconds and clock seconds."""
    begun = time.process_time(), time.perf_counter()
    action()
    return time.process_time() - begun[0], time.perf_counter() - begun[1]


def gather(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read records at random, 320 at a time (64 chunks, five references each): first with, then without checksums."""
    with Library.open(arguments.work / "bank") as library:
        num = min(64 * 320, library.next_reference)
        ids = np.random.default_rng(0).choice(library.next_reference, num, replace=False)
        ids = ids[library.is_live(ids)]
        batches = [ids[begin : begin + 320] for begin in range(0, len(ids), 320)]
        first = [seconds(partial(library.read, some)) for some in batches]
        again = [seconds(partial(library.read, some)) for some in batches]
        return {
            "references": len(ids),
            "record_bytes": library.record_bytes,
            "cpu_seconds_first": sum(cpu for cpu, _ in first),
            "clock_seconds_first": sum(clock for _, clock in first),
            "cpu_seconds_again": sum(cpu for cpu, _ in again),
            "clock_seconds_again": sum(clock for _, clock in again),
        }


def verify(arguments: argparse.Namespace) -> dict[str, Any]:
    """Hash every byte, and compare a sample with what the model makes of it."""
    num_bytes = [0]

    def read(_: int, more: int) -> None:
        num_bytes[0] += more

    spent = seconds(
        lambda: [
            sys.exit(str(problem))
            for problem in soundness.verify(arguments.work / "bank", compiler(arguments), progress=read)
        ]
    )
    return {"bytes": num_bytes[0], "cpu_seconds": spent[0], "clock_seconds": spent[1]}


def remove(arguments: argparse.Namespace) -> dict[str, Any]:
    """Take out one document, then a thousand, and look for them."""
    folder = arguments.work / "bank"
    queries = StaticEmbedder().embed(json.loads((arguments.work / "queries.json").read_text()))
    with Library.open(folder) as library:
        found = np.unique(library.documents_of(library.search(queries, 5)[1]))
        chosen = np.random.default_rng(0).permutation(found[found >= 0])[:1000]
        gone = library.of_documents(chosen)
        before = len(library)
    one = seconds(lambda: Editor(folder=folder).remove(chosen[:1]))
    many = seconds(lambda: Editor(folder=folder).remove(chosen[1:]))
    with Library.open(folder) as library:
        again = library.search(queries, 64)[1]
        assert not np.isin(again, gone).any()
        assert len(library) == before - len(gone)
        cpu, _ = seconds(lambda: library.search(queries, 64))
    return {
        "documents": len(chosen),
        "references": len(gone),
        "clock_seconds_one": one[1],
        "clock_seconds_rest": many[1],
        "cpu_seconds_1000_after": 1000 * cpu / len(queries),
    }


def compact(arguments: argparse.Namespace) -> dict[str, Any]:
    """Delete what was removed."""
    folder = arguments.work / "bank"
    before = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    Editor(folder=folder).compact()
    after = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with Library.open(folder) as library:
        return {"bytes_before": before, "bytes_after": after, **described(library)}


def report(progress: Progress, arguments: argparse.Namespace) -> None:
    """Write what is there."""
    phases = progress.phases
    lines = [
        "# A bank of a million references",
        "",
        f"`python -m benchmarks.million --references {arguments.references} --index {arguments.index}` "
        f"({platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.ranks} compiling "
        f"processes, one thread each; RLIMIT_DATA {arguments.limit_gib} GiB; nano with 8 tokens "
        "kept, int8, static embedder). Other processes ran on the machine: CPU-seconds are what to compare.",
        "",
    ]
    undone = [name for name in ("build", f"add {ADDS}", "search", "compact") if not progress.is_done(name)]
    if undone:
        lines += [f"**Not finished: {', '.join(undone)} and what follows are missing.**", ""]
    lines += measured(phases) + memory(phases)
    if progress.is_done("build") and progress.is_done("search distinct"):
        lines += computed(phases)
    write_atomic(arguments.output.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    write_atomic(arguments.output.with_suffix(".json"), json.dumps(phases, indent=1).encode())


def measured(phases: dict[str, dict[str, Any]]) -> list[str]:
    """Every phase, and what was searched."""
    lines = [
        "## Measured",
        "",
        "| phase | bank after it | work | clock, s | CPU-s | per CPU-second | most anonymous memory of a process, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, phase in phases.items():
        found = phase.get("result")
        peak = max((row[2] for row in phase["memory"]), default=0.0) / 1e6
        after, what, rate = "", "", ""
        if found is None:
            what = "not finished"
        elif "put" in found:
            after, what = f"{found['references']:,}", f"{found['put']:,} references"
            rate = f"{found['put'] / phase['cpu_seconds']:,.0f} references"
            if found["index"] and found["index"]["num_vectors"] == found["references"]:
                what += f", index built ({found['index']['kind']})"
        elif name == "text":
            what = f"{found['documents']:,} documents, {found['characters'] / 1e6:,.0f}M characters"
        elif name == "gather":
            what = f"{found['references']:,} records of {found['record_bytes']:,} bytes"
            rate = f"{found['references'] / found['cpu_seconds_again']:,.0f} references " + (
                f"({found['references'] / found['cpu_seconds_first']:,.0f} when first read and checked)"
            )
        elif name == "verify":
            what = f"{found['bytes'] / 1e9:.1f} GB hashed, 64 references compiled"
            rate = f"{found['bytes'] / 1e9 / found['cpu_seconds']:.2f} GB"
        elif name == "remove":
            what = (
                f"{found['documents']:,} documents of {found['references']:,} references: the first alone in "
                f"{found['clock_seconds_one']:.2f} s, the others in {found['clock_seconds_rest']:.2f} s"
            )
        elif name == "compact":
            after = f"{found['references']:,}"
            what = f"{found['bytes_before'] / 1e9:.1f} GB to {found['bytes_after'] / 1e9:.1f} GB"
            rate = f"{found['references'] / phase['cpu_seconds']:,.0f} references"
        else:
            what = f"{found['queries']:,} queries"
            rate = f"{1000 / found['cpu_seconds_1000_together']:,.0f} look-ups"
        lines.append(
            f"| {name} | {after} | {what} | {phase['clock_seconds']:,.0f} | {phase['cpu_seconds']:,.0f} "
            f"| {rate} | {peak:,.0f} |"
        )
    lines += [
        "",
        "Look-ups of 64 references by held-out text, against exact search over the same vectors:",
        "",
        "| bank | index | lists read | recall@5 | recall@64 | recall@5 in the manifest | CPU-s per 1,000, one by one "
        "| in one batch | exact, in one batch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("search distinct", "search"):
        if "result" in phases.get(name, {}):
            r = phases[name]["result"]
            index = r["index"]
            kind = "exact" if index is None else f"{index['kind']} over {index['num_vectors']:,}"
            read = "-" if index is None else f"{index['lists_read']:,} of {index['lists']:,}"
            stated = "-" if index is None else f"{index['recall_at_5']:.3f}"
            which = "distinct text" if name != "search" else "with strided text"
            lines.append(
                f"| {r['references']:,}, {which} | {kind} | {read} | {r['recall_at_5']:.3f} | {r['recall_at_64']:.3f} "
                f"| {stated} | {r['cpu_seconds_1000_alone']:.1f} | {r['cpu_seconds_1000_together']:.1f} "
                f"| {r['cpu_seconds_1000_exact_together']:.1f} |"
            )
    return lines


def memory(phases: dict[str, dict[str, Any]]) -> list[str]:
    """Anonymous memory as the bank grew."""
    points: list[tuple[int, float]] = []
    begun = 0
    for name, phase in phases.items():
        if name == "build" or name.startswith("add"):
            points += [(begun + row[1], row[2] / 1e6) for row in phase["memory"]]
            begun = phase.get("result", {}).get("references", begun)
    if not points:
        return []
    edges = np.linspace(0, max(size for size, _ in points) + 1, 11)
    lines = [
        "",
        "Anonymous memory of the larger process while the bank grew (samples of ten seconds; the peaks are those of "
        "building the index):",
        "",
        "| references compiled | " + " | ".join(f"to {edge:,.0f}" for edge in edges[1:]) + " |",
        "|---" * 11 + "|",
    ]
    cells = []
    for low, high in pairwise(edges.tolist()):
        inside = [size for count, size in points if low <= count < high]
        cells.append(f"{np.median(inside):,.0f}, at most {max(inside):,.0f}" if inside else "")
    return [*lines, "| MB, median | " + " | ".join(cells) + " |"]


def computed(phases: dict[str, dict[str, Any]]) -> list[str]:
    """A table for the paper's model and embedder; nothing of it is measured but what its text says."""
    config = compose_config(["model=paper_2b4"]).model
    name = "search" if "result" in phases.get("search", {}) else "search distinct"
    found, built = phases[name]["result"], phases["build"]["result"]
    text_each = built["bytes"]["text"] / built["references"]
    size, weights = EMBEDDERS["bge-m3"].vector_size, EMBEDDERS["bge-m3"].weights
    positions = position_bytes(config)
    codecs = {codec: memory_bytes(config, codec) + positions for codec in ("residual2x14_pq8x10", "bfloat16")}
    share, rate = scan_rate(found)
    lines = [
        "",
        "## Computed: the paper's model (2.4B) and embedder (BGE-M3, 1,024 numbers)",
        "",
        f"Bytes follow from the formats, text at the measured {text_each:,.0f} bytes a reference. Hours: "
        f"{knowledge_cost(config).explicit_write / 1e12:.3f} TFLOP to compile and "
        f"{2 * 128 * weights / 1e12:.3f} to embed a reference on {GPUS} H100 at {GPU_TFLOPS} TFLOP/s each; "
        f"k-means (ten rounds) and coding on {CORES} cores at {CPU_GFLOPS} GFLOP/s each. Look-ups, one by one on one "
        f"core: bytes of centroids and of the lists read at the measured {rate / 1e9:.1f} GB per CPU-second, "
        f"reading the share of the lists that the measured bank reads ({share:.2%}; a larger one needs less: the "
        "dear side). A graph over the centroids is counted as reading 2,000 of them. Recall@5 is what an index "
        "must reach to be published; what was reached is measured only above.",
        "",
        "| references | records, paper's quantiser / bfloat16 | text | vectors | index | on disk, in memory "
        "| hours: compile, embed, index | recall@5 | CPU-s per 1,000 look-ups |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for references in (10**6, 10**7, 10**8):
        plan = plan_index(references, size, IndexConfig())
        records = " / ".join(f"{references * each / 1e12:,.3g} TB" for each in codecs.values())
        hours = [
            references * knowledge_cost(config).explicit_write / (GPUS * GPU_TFLOPS * 1e12) / 3600,
            references * 2 * 128 * weights / (GPUS * GPU_TFLOPS * 1e12) / 3600,
            index_flops(plan) / (CORES * CPU_GFLOPS * 1e9) / 3600,
        ]
        scanned = 4 * size * (2000 if plan.hnsw else plan.lists) + share * references * plan.code_bytes
        lines.append(
            f"| {references:.0e} | {records} | {references * text_each / 1e9:,.3g} GB "
            f"| {4 * size * references / 1e9:,.4g} GB | {plan.factory} | {plan.disk_bytes / 1e9:,.3g} GB, "
            f"{plan.memory_bytes / 1e9:,.2g} GB | {', '.join(f'{h:,.2g}' for h in hours)} | >= 0.95 "
            f"| {1000 * scanned / rate:,.3g} |"
        )
    return lines


def scan_rate(found: dict[str, Any]) -> tuple[float, float]:
    """The share of its lists that a measured bank reads, and the bytes it goes through in a CPU-second."""
    index, size = found["index"], found["size"]
    if index is None:
        share, listed, centroids = 1.0, 0, 0
    else:
        share, listed, centroids = index["lists_read"] / index["lists"], index["num_vectors"], index["lists"]
    added = found["references"] - listed
    each = 4 * size if index is None or index["kind"] == "ivf_flat" else size // 4
    scanned = 4 * size * (centroids + added) + share * listed * each
    return share, 1000 * scanned / found["cpu_seconds_1000_alone"]


def index_flops(plan: IndexPlan) -> float:
    """Ten rounds of k-means over the training vectors, and each vector's way to its list."""
    compared = 2000 if plan.hnsw else plan.lists
    return 2.0 * plan.size * (10 * plan.training_vectors * plan.lists + plan.num_vectors * compared)


if __name__ == "__main__":
    sys.exit(main())
