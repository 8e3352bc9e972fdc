"""Text out of packages, the tables of a benchmark that was interrupted, and all of it at a small size."""

import argparse
import gzip
import html
import json
import shutil
import subprocess
from pathlib import Path
from pydoc_data import topics as pydoc

import pytest

from benchmarks import million, packages

WORDS = "A harbour is a place where ships stay while the sea is rough, and where they load and unload. " * 3


@pytest.fixture
def debs(tmp_path: Path) -> Path:
    """A package with a page, a translation of it, Sphinx sources of another, glosses and a dictionary."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not there: Debian packages cannot be read")
    files = {
        "usr/share/doc/a/harbour.html": f"<title>The harbour</title><style>x{{}}</style><p>{WORDS}</p>".encode(),
        "usr/share/doc/a/harbour.de.html": f"<p>{WORDS}</p>".encode(),
        "usr/share/doc/a/short.html": b"<p>short</p>",
        "usr/share/wordnet/data.noun": f"  licence\n00 06 n 02 harbour 0 sea_port 0 000 | {WORDS}\n".encode(),
        "usr/share/dictd/ships.index": b"00databaseurl\tA\tB\nship\tA\tEs\nvessel\tA\tEs\n",
        "usr/share/dictd/ships.dict.dz": gzip.compress(f"{{ship}}: {WORDS}".encode()),
        "DEBIAN/control": b"Package: a\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n",
    }
    for name, content in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "debs").mkdir()
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", "tree", "debs/a_1_all.deb"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    return tmp_path / "debs"


def test_documents_of_every_kind_are_read(debs: Path) -> None:
    found = {document_id.split("/")[-1]: (title, text) for document_id, title, text in packages.read(debs)}
    assert set(found) == {"harbour.html", "a:data.noun#0", "a:ships#0"}
    assert found["harbour.html"] == ("The harbour", WORDS.strip())
    assert found["a:data.noun#0"][1] == f"harbour, sea port: {WORDS}".strip()
    assert found["a:ships#0"][1].startswith("ship: A harbour")


def test_the_report_of_an_unfinished_run_says_so(tmp_path: Path) -> None:
    index = {
        "kind": "ivf_flat", "lists": 4096, "lists_read": 40, "num_vectors": 400_000, "recall_at_5": 0.96,
        "recall_at_64": 0.9, "queries": 1000,
    }  # fmt: skip
    bank = {
        "references": 400_000, "documents": 9, "bytes": {"text": 4e8}, "record_bytes": 8512, "size": 256,
        "index": index,
    }  # fmt: skip
    searched = {"recall_at_5": 0.95, "recall_at_64": 0.9, "queries": 1000, "cpu_seconds_1000_alone": 2.0}
    searched |= {f"cpu_seconds_1000_{how}": 1.0 for how in ("together", "first", "exact_together")}
    spent = {"clock_seconds": 10.0, "cpu_seconds": 5.0, "lives": 2, "memory": [[0, 0, 5e8], [10, 9, 6e8]]}
    phases = {
        "text": spent | {"result": {"documents": 9, "characters": 100, "queries": 9}},
        "build": spent | {"result": bank | {"put": 400_000, "put_documents": 9, "characters": 100}},
        "search distinct": spent | {"result": bank | searched},
        "add 1": spent,
    }
    (tmp_path / "progress.json").write_text(json.dumps(phases))
    arguments = argparse.Namespace(
        output=tmp_path / "out", references=10**6, index="auto", ranks=2, limit_gib=3.9, work=tmp_path
    )
    million.report(million.Progress(tmp_path / "progress.json"), arguments)
    text = (tmp_path / "out.md").read_text()
    assert "**Not finished: add 10, search, compact" in text
    assert (
        "| build | 400,000 | 400,000 references, index built (ivf_flat) | 10 | 5 | 80,000 references | 600 |"
        in text
    )
    assert "| 400,000, distinct text | ivf_flat over 400,000 | 40 of 4,096 | 0.950 |" in text
    rows = {line.split(" |")[0][2:]: line for line in text.splitlines() if line.startswith("| 1e+")}
    assert list(rows) == ["1e+06", "1e+07", "1e+08"]
    assert "IVF262144_HNSW32,PQ256" in rows["1e+08"]
    assert "4.08 TB / 45.2 TB" in rows["1e+08"], "the paper's 4.02 TiB and 45.9 TiB are of 1.12e8 references"
    assert json.loads((tmp_path / "out.json").read_text()) == phases


@pytest.mark.slow
def test_every_phase_of_a_small_bank(tmp_path: Path) -> None:
    """On the Python documentation; every phase has processes of its own."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not there: Debian packages cannot be read")
    pages, control = tmp_path / "tree/usr/share/doc/python", tmp_path / "tree/DEBIAN/control"
    pages.mkdir(parents=True)
    control.parent.mkdir()
    control.write_text("Package: p\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n")
    whole = "\n".join(pydoc.topics.values())
    for number, begin in enumerate(range(0, len(whole), 1500)):
        (pages / f"{number}.html").write_text(f"<pre>{html.escape(whole[begin : begin + 1500])}</pre>")
    (tmp_path / "debs").mkdir()
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", "tree", "debs/p_1_all.deb"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    given = [
        "--packages",
        str(tmp_path / "debs"),
        "--work",
        str(tmp_path / "work"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert million.main([*given, "--references", "1000", "--index", "ivf_flat", "--vocabulary", "800"]) == 0
    phases = million.Progress(tmp_path / "work/progress.json").phases
    assert len(phases) == 8 + million.ADDS
    assert all(spent["lives"] == 1 and "result" in spent for spent in phases.values())
    found = phases["search"]["result"]
    assert 800 < found["references"] < 1200
    assert found["record_bytes"] == 8512
    assert found["index"]["recall_at_5"] >= found["index"]["recall_wanted"] == 0.95  # of 907 queries
    assert found["recall_at_5"] >= 0.85  # of six queries, five results each: 27 of the 30 are the nearest
    assert phases["verify"]["result"]["bytes"] > 1e6
    assert "Not finished" not in (tmp_path / "out.md").read_text()
