import atexit
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from memorybank.config import IndexConfig, IndexKind, RetrievalConfig
from memorybank.search import RowSearch
from memorybank.vectors import Vectors, compile_vectors
from tests.support.memorybank import embedder, references, tokenizer


def search(root: Path, kind: IndexKind) -> RowSearch:
    return RowSearch(
        tokenizer(),
        references(),
        embedder().embed,
        vectors,
        RetrievalConfig(index=IndexConfig(kind=kind)),
        chunk_tokens=64,
        folder=root / "indexes",
    )


@cache
def vectors() -> Vectors:
    folder = TemporaryDirectory(prefix="search-")
    atexit.register(folder.cleanup)
    compile_vectors(embedder(), references(), Path(folder.name) / "vectors")
    return Vectors.open(Path(folder.name) / "vectors")


def test_small_banks_are_searched_exactly_and_leave_nothing_on_disk(tmp_path: Path) -> None:
    ids = np.arange(0, len(references()), 2)
    index = search(tmp_path, IndexKind.auto).index(ids)
    assert len(index) == len(ids)
    assert not (tmp_path / "indexes").exists()


def test_lists_are_published_once_and_find_what_the_exact_search_finds(tmp_path: Path) -> None:
    ids = np.arange(0, len(references()), 2)
    queries = embedder().embed([references().text(int(id)) for id in ids[:50]])
    exact = search(tmp_path, IndexKind.exact).index(ids).search(queries, 5)
    found = [search(tmp_path, IndexKind.ivf_flat).index(ids).search(queries, 5) for _ in range(2)]
    assert (found[0][1] == found[1][1]).all()
    assert np.isin(found[0][1], exact[1]).mean() >= 0.9
    (published,) = (tmp_path / "indexes").iterdir()
    assert published.name.startswith(f"ivf_flat-{embedder().name}-")
