import json
import shutil
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.files import open_manifest
from memorybank import index_lists
from memorybank.config import IndexConfig, IndexKind
from memorybank.index import Block, ExactIndex, IdSet
from memorybank.index_plan import IndexPlan, plan_index
from memorybank.index_store import KIND, VERSION, BankIndex, build_index, open_index, open_lists, queries_of
from tests.support.data import sections
from tests.support.memorybank import embedder

INPUTS = {"vectors": "v0", "embedder": "static"}
SIZE = 256
NUM = 10_400


@cache
def windows() -> tuple[np.ndarray, np.ndarray]:
    """Vectors of distinct windows of the factbook, and of other, shorter ones that ask."""
    texts, questions = {}, []
    for record in sections(300):
        words = record["text"].split()
        for begin in range(0, len(words), 50):
            texts[" ".join(words[begin : begin + 80])] = None
        questions += [" ".join(words[begin : begin + 40]) for begin in range(31, len(words), 3000)]
    assert len(texts) >= NUM
    vectors, queries = embedder().embed(list(texts)[:NUM]), embedder().embed(questions[:200])
    vectors.flags.writeable = queries.flags.writeable = False
    return vectors, queries


def ids() -> np.ndarray:
    return 3 * np.arange(NUM) + 5


def blocks() -> list[Block]:
    vectors = windows()[0]
    return [(ids()[:4000], vectors[:4000]), (ids()[4000:], vectors[4000:])]


def plan(kind: IndexKind, **changes: int) -> IndexPlan:
    code_bytes = 8 if kind is IndexKind.ivf_pq else None
    found = plan_index(NUM, SIZE, IndexConfig(kind=kind, code_bytes=code_bytes))
    return IndexPlan(**({name: getattr(found, name) for name in IndexPlan.__slots__} | changes))


def build(folder: Path, kind: IndexKind, *, recall: float = 0.9, **changes: int) -> Path:
    build_index(
        folder,
        blocks(),
        plan(kind, **changes),
        queries=windows()[1],
        query_ids=ids()[: len(windows()[1])],
        inputs=INPUTS,
        recall=recall,
    )
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[IndexKind, Path]:
    root = tmp_path_factory.mktemp("indexes")
    kinds = (IndexKind.exact, IndexKind.ivf_flat, IndexKind.ivf_pq)
    # Shards of 3,000: four of them, the first block ends within the second.
    return {kind: build(root / kind.name, kind, shard_vectors=3000) for kind in kinds}


def exact() -> ExactIndex:
    index = ExactIndex(SIZE)
    index.add(ids(), windows()[0])
    return index


def assert_same(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(one[0], other[0], atol=2e-6)
    # Scores that differ in their last bits may change places.
    assert (one[1] == other[1]).mean() > 0.99


@pytest.mark.parametrize("kind", [IndexKind.exact, IndexKind.ivf_flat, IndexKind.ivf_pq])
def test_recall_is_reached_measured_and_stated(built: dict[IndexKind, Path], kind: IndexKind) -> None:
    index, queries = open_index(built[kind], blocks(), inputs=INPUTS), windows()[1]
    found, expected = index.search(queries, 64), exact().search(queries, 64)
    recall = (found[0][:, :5] >= expected[0][:, 4:5] - 1e-6).mean()
    stated = json.loads((built[kind] / "manifest.json").read_text())["extra"]
    assert recall >= 0.9
    assert stated["recall_at_5"] == pytest.approx(recall, abs=2e-3)
    assert 0.7 < stated["recall_at_64"] <= 1
    assert len(index) == NUM
    if kind is IndexKind.exact:
        assert_same(found, expected)
    else:
        # The fewest lists: one fewer misses the recall.
        lists = index._listed[0].lists
        assert 1 < lists.num_read == stated["lists_read"] < lists.num_lists / 2
        lists.num_read -= 1
        fewer = index.search(queries, 64)[0][:, :5]
        assert (fewer >= expected[0][:, 4:5] - 1e-6).mean() < 0.9


@pytest.mark.parametrize("kind", [IndexKind.ivf_flat, IndexKind.ivf_pq])
def test_merged_on_disk_equals_faiss_in_memory(built: dict[IndexKind, Path], kind: IndexKind) -> None:
    import faiss

    vectors, queries = windows()
    reference = faiss.deserialize_index(np.fromfile(built[kind] / "index.faiss", np.uint8))
    reference.add_with_ids(vectors, ids())
    lists = open_lists(open_manifest(built[kind], kind=KIND, version=VERSION)).lists
    reference.nprobe = lists.num_read
    expected, found = reference.search(queries, 64), lists.search(queries, 64)
    assert (found[1] == expected[1]).all()
    there = expected[1] >= 0
    assert (found[0][there] == expected[0][there]).all()


@pytest.mark.parametrize("kind", [IndexKind.exact, IndexKind.ivf_flat, IndexKind.ivf_pq])
def test_batches_find_what_single_queries_find(built: dict[IndexKind, Path], kind: IndexKind) -> None:
    index, queries = open_index(built[kind], blocks()), windows()[1][:40]
    alone = [index.search(query[None], 10) for query in queries]
    assert_same(index.search(queries, 10), tuple(np.concatenate(part) for part in zip(*alone, strict=True)))


def test_bucket_by_bucket_finds_the_same(
    built: dict[IndexKind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, queries = open_index(built[IndexKind.ivf_flat], blocks()), windows()[1]
    plain = index.search(queries, 64)
    scans = []
    scan = index_lists.InvertedLists._scan
    monkeypatch.setattr(index_lists, "BUCKET_BYTES", 1 << 20)
    monkeypatch.setattr(
        index_lists.InvertedLists, "_scan", lambda *given: scans.append(given[3]) or scan(*given)
    )
    found = index.search(queries, 64)
    assert (found[1] == plain[1]).all()
    assert (found[0] == plain[0]).all()
    assert len(scans) >= 10
    # In the order of the file, and each list in one scan only.
    bounds = [(part[part >= 0].min(), part.max()) for part in scans]
    assert all(last < first for (_, last), (first, _) in pairwise(bounds))


@pytest.mark.parametrize("kind", [IndexKind.exact, IndexKind.ivf_flat, IndexKind.ivf_pq])
def test_added_is_found_and_removed_is_not(built: dict[IndexKind, Path], kind: IndexKind) -> None:
    queries = windows()[1]
    added = 40_000 + np.arange(len(queries))
    grown = [*blocks(), (added, queries)]
    index = open_index(built[kind], grown)
    assert (index.search(queries, 5)[1] == added[:, None]).any(axis=1).all()
    before = index.search(queries, 20)[1]
    gone = np.unique(np.concatenate([before[:, 0], before[:, 3], added[:50]]))
    removed = IdSet(50_000)
    removed.add(gone)
    after = open_index(built[kind], grown, removed=removed).search(queries, 20)[1]
    assert not np.isin(after, gone).any()
    assert (after >= 0).all()
    stays = [[id for id in row if id not in set(gone.tolist())][:5] for row in before.tolist()]
    assert np.mean([row == list(own[: len(row)]) for row, own in zip(stays, after, strict=True)]) > 0.95


def test_an_index_finds_no_vector_whose_block_is_gone(built: dict[IndexKind, Path]) -> None:
    queries, rest = windows()[1], blocks()[1:]
    removed = IdSet(50_000)
    removed.add_range(0, int(rest[0][0][0]))
    manifest = open_manifest(built[IndexKind.ivf_pq], kind=KIND, version=VERSION)
    index = BankIndex(rest, listed=[open_lists(manifest)], exact=[], removed=removed)
    found = index.search(queries, 20)[1]
    assert ((found >= rest[0][0][0]) | (found == -1)).all()
    assert (found[:, :5] >= 0).mean() > 0.9


@pytest.mark.parametrize(
    ("begin", "end"), [(0, 0), (3, 6), (3, 9), (9, 15), (8, 16), (0, 40), (5, 33), (39, 40)]
)
def test_a_range_of_ids(begin: int, end: int) -> None:
    ids = IdSet(40)
    ids.add_range(begin, end)
    assert np.flatnonzero(ids.has(np.arange(40))).tolist() == list(range(begin, end))


def test_an_interrupted_build_goes_on_with_its_shards(
    built: dict[IndexKind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, made = index_lists._write_shard, []

    def dies_at_the_third(path: Path, *rest: object) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(index_lists, "_write_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "index", IndexKind.ivf_flat, shard_vectors=3000)
    with pytest.raises(ValueError, match="no search-index"):
        open_index(tmp_path / "index", blocks())
    monkeypatch.setattr(
        index_lists, "_write_shard", lambda path, *rest: made.append(path.name) or write(path, *rest)
    )
    monkeypatch.setattr(index_lists, "_trained", None)
    build(tmp_path / "index", IndexKind.ivf_flat, shard_vectors=3000)
    assert made == [f"shard-{number:05d}.bin" for number in range(4)]
    assert_equal_files(tmp_path / "index", built[IndexKind.ivf_flat])


def test_bytes_do_not_depend_on_shards_and_a_finished_index_is_left(
    built: dict[IndexKind, Path], tmp_path: Path
) -> None:
    build(tmp_path / "whole", IndexKind.ivf_flat)
    assert_equal_files(tmp_path / "whole", built[IndexKind.ivf_flat])
    modified = (tmp_path / "whole/manifest.json").stat().st_mtime_ns
    build(tmp_path / "whole", IndexKind.ivf_flat)
    assert (tmp_path / "whole/manifest.json").stat().st_mtime_ns == modified


def test_a_recall_out_of_reach_is_not_published_and_keeps_what_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = [(own, vectors.astype(np.float16)) for own, vectors in blocks()]
    arguments = {"queries": windows()[1], "query_ids": ids()[: len(windows()[1])], "inputs": INPUTS}
    flat = plan(IndexKind.ivf_flat)
    with pytest.raises(ValueError, match=r"recall@5 is 1\.000 with all lists read, and 1\.01 is wanted"):
        build_index(tmp_path / "index", halves, flat, recall=1.01, **arguments)
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(index_lists, "_trained", None)
    build_index(tmp_path / "index", halves, flat, recall=0.3, **arguments)
    assert len(open_index(tmp_path / "index", halves)) == NUM


@pytest.mark.parametrize("name", ["index.faiss", "sizes.bin", "lists.bin", "search.json"])
def test_damage_is_refused_by_name(built: dict[IndexKind, Path], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "index"
    shutil.copytree(built[IndexKind.ivf_flat], folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: block \d+ .* is damaged"):
        open_index(folder, blocks()).search(windows()[0][::50], 5)
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{name} has {len(content) - 1} bytes"):
        open_index(folder, blocks())


def test_other_vectors_are_refused(built: dict[IndexKind, Path], tmp_path: Path) -> None:
    folder = built[IndexKind.ivf_flat]
    with pytest.raises(ValueError, match="made from vectors v0, but vectors is now v1"):
        open_index(folder, blocks(), inputs={"vectors": "v1"})
    with pytest.raises(ValueError, match=r"built from 10,400 vectors .* there are 4,000"):
        open_index(folder, blocks()[:1])
    with pytest.raises(ValueError, match=r"planned for 10,400 vectors"):
        build_other(tmp_path, blocks()[:1])
    shuffled = ids().copy()
    shuffled[[100, 101]] = shuffled[[101, 100]]
    with pytest.raises(ValueError, match="do not ascend"):
        build_other(tmp_path, [(shuffled, windows()[0])])


def test_an_index_keeps_what_its_recall_was_measured_with(built: dict[IndexKind, Path]) -> None:
    manifest = open_manifest(built[IndexKind.ivf_flat], kind=KIND, version=VERSION)
    query_ids, queries = queries_of(manifest)
    assert np.array_equal(query_ids, ids()[: len(windows()[1])])
    assert np.array_equal(queries, windows()[1])


def build_other(root: Path, others: Sequence[Block]) -> None:
    build_index(
        root / "other",
        others,
        plan(IndexKind.ivf_flat),
        queries=windows()[1],
        query_ids=ids()[: len(windows()[1])],
        inputs=INPUTS,
        recall=0.9,
    )


def assert_equal_files(one: Path, other: Path) -> None:
    for name in ("index.faiss", "sizes.bin", "lists.bin", "search.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert not list(one.glob("shard-*"))
