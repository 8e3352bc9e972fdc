"""A corpus that nobody has to prepare for: the Python documentation that ships with the standard library.

Small runs on it serve the campaign (`benchmarks.campaign`) and the tests of `launch`.
"""

import json
from pathlib import Path
from pydoc_data import topics as pydoc


def topics(path: Path, *, limit: int = 3500) -> Path:
    """Write the topics of at most `limit` characters as JSON lines."""
    documents = [
        {"id": name, "title": name, "text": text.strip()}
        for name, text in sorted(pydoc.topics.items())
        if len(text) <= limit
    ]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def corpus_settings(root: Path, corpus: Path) -> list[str]:
    """Settings of such a corpus below `root`."""
    return [
        "data=jsonl",
        f"data.path={corpus}",
        "data.sources.documents.title_field=title",
        "data.sources.documents.id_field=id",
        "data.vocab_size=640",
        "data.validation_fraction=0.15",
        "data.test_fraction=0.1",
        "data.num_workers=1",
        "retrieval.embedder.kind=static",
        f"paths.root={root}",
    ]
