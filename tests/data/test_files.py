"""The only writer of artefacts: publish once, resume, refuse what is not whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data import files
from data.files import (
    BLOCK_BYTES,
    MANIFEST,
    Manifest,
    fingerprint,
    is_finished,
    open_manifest,
    partial,
    publishing,
    verify,
    write_atomic,
    write_json_atomic,
    writing,
)

SETTINGS = {"size": 3, "names": ["a", "b"]}


def publish(folder: Path, files: dict[str, bytes], **changes: object) -> Manifest:
    identity = {"kind": "thing", "version": 1, "settings": SETTINGS, "inputs": {"corpus": "c0"}, **changes}
    with publishing(folder, **identity) as work:  # type: ignore[arg-type]
        for name, content in files.items():
            write_atomic(work / name, content)
    return open_manifest(folder, kind=str(identity["kind"]), version=1)


def test_fingerprint_ignores_key_order_and_nothing_else() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(value) for value in (1, "1", [1], {"1": 1}, None)}) == 5
    with pytest.raises(TypeError):
        fingerprint(Path("x"))


def test_published_folder_reads_back(tmp_path: Path) -> None:
    content = os.urandom(BLOCK_BYTES + 7)
    extra: dict[str, int] = {}
    with publishing(
        tmp_path / "a", kind="thing", version=1, settings=SETTINGS, inputs={}, extra=extra
    ) as work:
        write_atomic(work / "deep/er/x.bin", content)
        write_atomic(work / "empty", b"")
        extra["count"] = 5
        assert not (tmp_path / "a").exists()
    manifest = open_manifest(tmp_path / "a", kind="thing", version=1)
    assert not partial(tmp_path / "a").exists()
    assert manifest.extra == {"count": 5}
    assert manifest.settings == SETTINGS
    assert sorted(manifest.files) == ["deep/er/x.bin", "empty"]
    mapped = manifest.mapped("deep/er/x.bin")
    assert bytes(mapped.read(BLOCK_BYTES - 3, 10)) == content[-10:]
    assert bytes(mapped.read_all()) == content
    assert manifest.mapped("empty").read_all().size == 0
    assert manifest.text("empty") == ""
    assert verify(tmp_path / "a") == []
    with pytest.raises(ValueError, match="has no file 'y'"):
        manifest.mapped("y")
    with pytest.raises(ValueError, match="outside its"):
        mapped.read(BLOCK_BYTES, 8)


def test_fingerprint_follows_identity_and_content(tmp_path: Path) -> None:
    first = publish(tmp_path / "a", {"x": b"1"}).fingerprint
    assert publish(tmp_path / "b", {"x": b"1"}).fingerprint == first
    assert publish(tmp_path / "c", {"x": b"2"}).fingerprint != first
    assert publish(tmp_path / "d", {"x": b"1"}, inputs={"corpus": "c1"}).fingerprint != first


def test_is_finished_asks_for_the_same_identity(tmp_path: Path) -> None:
    identity = {"kind": "thing", "version": 1, "settings": SETTINGS}
    assert not is_finished(tmp_path / "a", **identity)  # type: ignore[arg-type]
    publish(tmp_path / "a", {"x": b"1"})
    assert is_finished(tmp_path / "a", **identity)  # type: ignore[arg-type]
    assert is_finished(tmp_path / "a", **identity, inputs={"corpus": "c0"})  # type: ignore[arg-type]
    assert not is_finished(tmp_path / "a", **identity, inputs={"corpus": "c1"})  # type: ignore[arg-type]
    assert not is_finished(tmp_path / "a", kind="thing", version=1, settings={"size": 4})


def test_exception_publishes_nothing_and_the_next_producer_goes_on(tmp_path: Path) -> None:
    def attempt(settings: dict[str, int], fail: bool) -> list[str]:
        with publishing(tmp_path / "a", kind="thing", version=1, settings=settings, inputs={}) as work:
            found = sorted(path.name for path in work.iterdir() if path.name != MANIFEST)
            write_atomic(work / f"x{len(found)}", b"1")
            if fail:
                raise RuntimeError("stop")
        return found

    for _ in range(2):
        with pytest.raises(RuntimeError):
            attempt({"n": 1}, True)
        with pytest.raises(ValueError, match=r"no thing in .*no manifest\.json"):
            open_manifest(tmp_path / "a", kind="thing", version=1)
    with pytest.raises(ValueError, match="never finished"):
        open_manifest(partial(tmp_path / "a"), kind="thing", version=1)
    shutil.copytree(partial(tmp_path / "a"), partial(tmp_path / "b"))
    assert attempt({"n": 1}, False) == ["x0", "x1"]
    shutil.copytree(partial(tmp_path / "b"), partial(tmp_path / "a"))
    assert attempt({"n": 2}, False) == [], "the work folder of other settings has to be emptied"
    assert sorted(open_manifest(tmp_path / "a", kind="thing", version=1).files) == ["x0"]


def test_killed_producer_leaves_finished_files_only(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from data.files import publishing, writing, write_atomic
with publishing(Path(sys.argv[1]), kind="thing", version=1, settings={}, inputs={}) as work:
    write_atomic(work / "done", b"1")
    with writing(work / "half") as file:
        file.write(b"2")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(partial(tmp_path / "a").glob("half*.tmp"))) == 1
    with publishing(tmp_path / "a", kind="thing", version=1, settings={}, inputs={}) as work:
        assert sorted(path.name for path in work.iterdir()) == ["done", MANIFEST]


def test_two_producers_at_once_are_refused(tmp_path: Path) -> None:
    identity = {"kind": "thing", "version": 1, "settings": {}, "inputs": {}}
    with (
        publishing(tmp_path / "a", **identity),  # type: ignore[arg-type]
        pytest.raises(ValueError, match="another process is writing"),
        publishing(tmp_path / "a", **identity),  # type: ignore[arg-type]
    ):
        pass


def test_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "x.json", {"a": "é"})
    with pytest.raises(TypeError), writing(tmp_path / "x.json") as file:
        file.writelines([b"half", None])  # type: ignore[list-item]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "é"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_damage_is_found(tmp_path: Path) -> None:
    content = bytes(2 * BLOCK_BYTES)
    publish(tmp_path / "a", {"x.bin": content, "y": b"1"})
    damaged = bytearray(content)
    damaged[BLOCK_BYTES + 5] ^= 1
    (tmp_path / "a/x.bin").write_bytes(damaged)
    manifest = open_manifest(tmp_path / "a", kind="thing", version=1)
    mapped = manifest.mapped("x.bin")
    assert mapped.read(0, BLOCK_BYTES).sum() == 0, "an undamaged block can still be read"
    with pytest.raises(ValueError, match=r"x\.bin: block 1 .*damaged"):
        mapped.read(BLOCK_BYTES - 1, 2)
    (tmp_path / "a/y").unlink()
    assert verify(tmp_path / "a") == ["x.bin", "y"]
    with pytest.raises(ValueError, match="y is missing"):
        open_manifest(tmp_path / "a", kind="thing", version=1)
    (tmp_path / "a/y").write_bytes(b"123")
    with pytest.raises(ValueError, match="has 3 bytes instead of the manifest's 1"):
        open_manifest(tmp_path / "a", kind="thing", version=1)


def test_mismatches_name_both_sides(tmp_path: Path) -> None:
    publish(tmp_path / "a", {"x": b"1"})
    with pytest.raises(ValueError, match="kind is 'thing', and 'other' is needed"):
        open_manifest(tmp_path / "a", kind="other", version=1)
    with pytest.raises(ValueError, match="version is 1, and 2 is needed"):
        open_manifest(tmp_path / "a", kind="thing", version=2)
    with pytest.raises(ValueError, match="made from corpus c0, but corpus is now c9"):
        open_manifest(tmp_path / "a", kind="thing", version=1, inputs={"corpus": "c9"})


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    publish(tmp_path / "a", {"x": b"1"})
    path = tmp_path / "a" / MANIFEST
    stored = json.loads(path.read_text())
    stored["files"][name] = stored["files"].pop("x")
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="leads out of its folder"):
        open_manifest(tmp_path / "a", kind="thing", version=1)


def test_links_are_refused(tmp_path: Path) -> None:
    publish(tmp_path / "a", {"x": b"1"})
    (tmp_path / "elsewhere").write_bytes(b"1")
    (tmp_path / "a/x").unlink()
    (tmp_path / "a/x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="symbolic link"):
        open_manifest(tmp_path / "a", kind="thing", version=1)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {}}'])
def test_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    publish(tmp_path / "a", {"x": b"1"})
    (tmp_path / "a" / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"damaged|never finished"):
        open_manifest(tmp_path / "a", kind="thing", version=1)


def test_edited_manifest_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "a", {"x": b"1"})
    path = tmp_path / "a" / MANIFEST
    path.write_text(path.read_text().replace('"c0"', '"c1"'))
    with pytest.raises(ValueError, match="changed by hand"):
        open_manifest(tmp_path / "a", kind="thing", version=1)


def test_manifest_that_is_flipped_anywhere_is_refused(tmp_path: Path) -> None:
    """Facts that decide nothing are read all the same."""
    publish(tmp_path / "a", {"x": b"1"}, extra={"documents": 123})
    path = tmp_path / "a" / MANIFEST
    path.write_text(path.read_text().replace("123", "122"))
    with pytest.raises(ValueError, match="its checksum is not its content's"):
        open_manifest(tmp_path / "a", kind="thing", version=1)


def test_rows_are_copies_of_checked_spans(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (5, BLOCK_BYTES // 2 + 3), np.uint8)
    length = rows.shape[1]
    manifest = publish(tmp_path / "a", {"x.bin": rows.tobytes() + b"rest"})
    wanted = np.array([3, 0, 3])
    assert np.array_equal(manifest.mapped("x.bin").rows(wanted, length), rows[wanted])
    assert manifest.mapped("x.bin").rows(wanted[:0], length).shape == (0, length)
    with pytest.raises(ValueError, match="outside its"):
        manifest.mapped("x.bin").rows(np.array([5]), length)
    content = bytearray((tmp_path / "a/x.bin").read_bytes())
    content[BLOCK_BYTES + 5] ^= 1  # in rows 1 and 2, and in the block where row 3 begins
    (tmp_path / "a/x.bin").write_bytes(bytes(content))
    file = manifest.mapped("x.bin")
    assert np.array_equal(file.rows(np.array([0]), length)[0], rows[0])
    for row in (1, 2, 3):
        with pytest.raises(ValueError, match=r"block 1 .* is damaged"):
            manifest.mapped("x.bin").rows(np.array([row]), length)


def test_who_opens_what_was_published_this_moment_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed, go_on = threading.Event(), threading.Event()
    folder, sync = tmp_path / "a", files._sync

    def slow_sync(path: Path) -> None:
        sync(path)
        if path == tmp_path:  # the last thing that a publication does
            renamed.set()
            assert go_on.wait(30)

    monkeypatch.setattr(files, "_sync", slow_sync)

    def publish() -> None:
        with files.publishing(folder, kind="thing", version=1, settings={}, inputs={}):
            pass

    with ThreadPoolExecutor(2) as pool:
        published = pool.submit(publish)
        assert renamed.wait(30)
        held = pool.submit(files.hold, folder)
        time.sleep(0.1)
        go_on.set()
        published.result(30)
        descriptor = held.result(30)
    assert files.is_held(folder)
    os.close(descriptor)
    assert not files.is_held(folder)
