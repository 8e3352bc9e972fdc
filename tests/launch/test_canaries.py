"""Faults 23 to 25: nothing that a file contains runs code, and no manifest leads out of its folder."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import corpus, files
from data.files import CHECKSUM, MANIFEST, fingerprint, publishing
from data.sources import _json_records
from launch.compose import compose_config, load_config, read_settings, save_config
from memorybank import index_store, quantizer, store, vectors
from memorybank.record import MemoryShape
from tests.support.train import Canary
from train import checkpoint

TAGS = [
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]",
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/name:os.system",
    "{{_target_: os.system, command: 'touch {canary}'}}",
]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("key", ["run", "optim", "data", "continual"])
def test_tags_and_targets_in_a_frozen_configuration_are_refused(
    tag: str, key: str, canary: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    save_config(compose_config(["experiment=demo"]), path)
    load_config(path)
    text = re.sub(rf"^{key}:.*\n(?:[ -].*\n)*", "", path.read_text(), flags=re.MULTILINE)
    assert f"\n{key}:" not in text
    path.write_text(f"{text}{key}: {tag.format(canary=canary)}\n")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        load_config(path)
    if tag.startswith("!!"):
        with pytest.raises(ValueError, match=r"config\.yaml"):
            read_settings(path)  # a report reads any version of the schema
    assert not canary.exists()


@pytest.mark.parametrize("tag", TAGS)
def test_tags_and_targets_in_a_manifest_are_text_or_refused(tag: str, canary: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "a", "corpus", 1)
    text = tag.format(canary=canary)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=MANIFEST):
        files.open_manifest(folder, kind="corpus", version=1)
    rewritten(folder, lambda stored: stored.update(settings={"_target_": "os.system", "command": text}))
    assert files.open_manifest(folder, kind="corpus", version=1).settings["command"] == text
    assert not canary.exists()


def test_documents_are_text_whatever_they_say(canary: Path, tmp_path: Path) -> None:
    texts = [tag.format(canary=canary) for tag in TAGS]
    path = tmp_path / "corpus.jsonl"
    records = [
        {"text": text, "_target_": "os.system", "title": {"_target_": f"touch {canary}"}} for text in texts
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = list(_json_records([str(path)], ["corpus.jsonl"], ("text", "title"), "text"))
    assert [record["text"] for record in found] == texts
    assert not canary.exists()


def test_a_pickle_in_place_of_records_or_their_ids_is_never_executed(canary: Path, tmp_path: Path) -> None:
    settings = {
        "layout": {}, "lineage": "x", "step": 1, "codec": "bfloat16", "record_bytes": 8,
        "num_records": 1, "ids": "0", "records_per_shard": 1, "batch": 1,
    }  # fmt: skip
    inputs = {"weights": "w", "references": "r", "tokenizer": "t"}
    evil = tmp_path / "evil"
    np.save(evil.with_suffix(".npy"), np.array([Canary(canary)], dtype=object), allow_pickle=True)
    for name, content in (
        ("object", evil.with_suffix(".npy").read_bytes()),
        ("pickle", pickle.dumps(Canary(canary))),
    ):
        folder = tmp_path / f"generation-{name}"
        with publishing(
            folder, kind=store.KIND, version=store.VERSION, settings=settings, inputs=inputs
        ) as work:
            (work / store.IDS).write_bytes(content)
            (work / store.records_file(0)).write_bytes(content[:8])
        with pytest.raises(ValueError, match=r"does not hold|magic|cannot"):
            store.Generation.open(folder)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # it does sing


SHAPE = MemoryShape.of(compose_config(["experiment=demo"]).model)
CONTAINERS: dict[str, tuple[str, int, Callable[[Path], Any]]] = {
    "corpus": (corpus.KIND, corpus.VERSION, corpus.Corpus.open),
    "checkpoint": (
        checkpoint.KIND,
        checkpoint.VERSION,
        lambda folder: checkpoint.Checkpoints(folder.parent, inputs={}).open(folder),
    ),
    "bank": (store.KIND, store.VERSION, store.Generation.open),
    "vectors": (vectors.KIND, vectors.VERSION, vectors.Vectors.open),
    "index": (index_store.KIND, index_store.VERSION, lambda folder: index_store.open_index(folder, [])),
    "codec": (quantizer.KIND, quantizer.VERSION, lambda folder: quantizer.open_codec(folder, SHAPE)),
}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_no_container_is_led_out_of_its_folder(container: str, name: str, tmp_path: Path) -> None:
    """Fault 24."""
    kind, version, opened = CONTAINERS[container]
    folder = published(tmp_path / container, kind, version)
    (tmp_path / "x").write_bytes(b"1")
    rewritten(folder, lambda stored: stored["files"].update({name: stored["files"].pop("x")}))
    with pytest.raises(ValueError, match="which leads out of its folder"):
        opened(folder)


@pytest.mark.parametrize("container", CONTAINERS)
def test_no_container_follows_a_link(container: str, tmp_path: Path) -> None:
    """Fault 24."""
    kind, version, opened = CONTAINERS[container]
    folder = published(tmp_path / container, kind, version)
    (folder / "x").rename(tmp_path / "elsewhere")
    (folder / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a symbolic link"):
        opened(folder)


def published(folder: Path, kind: str, version: int) -> Path:
    with publishing(folder, kind=kind, version=version, settings={}, inputs={}) as work:
        (work / "x").write_bytes(b"1")
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Publish the artefact's manifest anew with a change, as somebody would who means harm."""
    path = folder / MANIFEST
    try:
        stored = json.loads(path.read_text())
    except ValueError:  # a test has put something else there
        path.unlink()
        for leftover in folder.iterdir():
            leftover.unlink()
        folder.rmdir()
        stored = json.loads((published(folder, "corpus", 1) / MANIFEST).read_text())
    stored.pop(CHECKSUM, None)
    change(stored)
    named = {key: stored[key] for key in ("kind", "version", "settings", "inputs")}
    stored["fingerprint"] = fingerprint(
        {**named, "files": {name: entry["sha256"] for name, entry in stored["files"].items()}}
    )
    path.write_text(json.dumps(stored))
