"""Finished artefacts on disk, of which this is the only writer: written aside, hashed, renamed, then trusted.

An artefact is a folder. While it is made it is called ``<folder>.partial``; its manifest then holds the
identity alone (what is being made, from what). When the work is done every file is fsynced and hashed, the
manifest is completed, and one rename publishes:

    <folder>/
      manifest.json   {kind, version, settings, inputs, extra, fingerprint, checksum (of all these),
                       files: {name: {bytes, sha256, crc32: [one number per MiB]}}}
      ...             any files, subfolders included; names in the manifest are relative, with "/"

Invariants: a folder without a complete manifest does not exist for readers; a published folder never changes;
equal fingerprints mean equal identity and equal bytes; a mapped file's blocks are checked before their bytes
are handed out.

Not here: what the files mean (each module that owns a format), which artefacts there are (`prepare`).
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHECKSUM = "checksum"
BLOCK_BYTES = 1 << 20
UNFINISHED = ".tmp"
"""Ending of files that are being written; a crash leaves them behind and the next producer removes them."""

Bytes = NDArray[np.uint8]


def fingerprint(value: object) -> str:
    """The identity of a JSON value: 16 hexadecimal digits, independent of the order of keys.

    Raises:
        TypeError: The value is no plain JSON (an Enum or a Path has to be turned into text first).
    """
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:16]


def named_apart(folder: Path) -> str:
    """The name of a folder, and a mark of where it lies: another of the same name has another mark."""
    return f"{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path`, durable and whole, when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync(path.parent)


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Writes or replaces a file so that readers, and crashes, see the old content or the new."""
    with writing(path) as file:
        file.write(content)


def write_json_atomic(path: Path, value: object) -> None:
    """Writes or replaces a JSON file, as `write_atomic` does."""
    write_atomic(path, (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode())


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What the manifest knows of one file: its size, its hash, and a checksum of each MiB."""

    bytes: int
    sha256: str
    crc32: "array[int]"
    """Packed: a bank of 45 TB has 43 million of them."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A finished artefact: what it is, what it was made from, and its files."""

    folder: Path
    kind: str
    version: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    extra: Mapping[str, Any]
    fingerprint: str
    files: Mapping[str, FileEntry]

    def mapped(self, name: str) -> "MappedFile":
        """The file of that name, memory-mapped, checked block by block as it is read."""
        if name not in self.files:
            raise ValueError(f"{self.folder}: the {self.kind} has no file {name!r}")
        return MappedFile(self.folder / name, self.files[name])

    def text(self, name: str) -> str:
        """The whole of a small UTF-8 file, checked."""
        return bytes(self.mapped(name).read_all()).decode()


class MappedFile:
    """A read-only memory map; each MiB is checked against its crc32 when it is first touched.

    Safe to share between threads. The arrays handed out are views of the map, and cannot be written.
    """

    def __init__(self, path: Path, entry: FileEntry) -> None:
        self.path = path
        self.size = entry.bytes
        self._crc32 = entry.crc32
        self._checked = np.zeros(len(entry.crc32), dtype=np.bool_)
        if path.stat().st_size != entry.bytes:
            raise ValueError(_wrong_size(path, entry.bytes))

    def read(self, offset: int, length: int) -> Bytes:
        """The bytes [offset, offset + length), shape (length,).

        Raises:
            ValueError: The span leaves the file, or one of its blocks is damaged.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{self.path}: bytes {offset} to {offset + length} are outside its {self.size}")
        first, last = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)
        if length and not self._checked[first:last].all():
            self._check(first, last)
        return self._bytes[offset : offset + length]

    def rows(self, numbers: NDArray[np.int64], length: int) -> Bytes:
        """Copies of the spans of `length` bytes that begin at multiples of it, (n, length).

        Raises:
            ValueError: A span leaves the file, or one of its blocks is damaged.
        """
        if not len(numbers):
            return np.empty((0, length), np.uint8)
        begins = numbers * length
        self.read(int(begins.min()), 0)  # refuses what leaves the file
        self.read(int(begins.max()) + length, 0)
        first, last = begins // BLOCK_BYTES, (begins + length - 1) // BLOCK_BYTES
        for offset in range(int((last - first).max()) + 1):
            for block in np.unique(np.minimum(first + offset, last)).tolist():
                if not self._checked[block]:
                    self._check(block, block + 1)
        whole = self.size // length * length
        return self._bytes[:whole].reshape(-1, length)[numbers]

    @cached_property
    def _bytes(self) -> Bytes:
        # Mapped when first read, since every map holds a file descriptor; an empty file cannot be mapped.
        # A plain view, since slices of `np.memmap` cost twice as much: rows are made of many small ones.
        return np.asarray(
            np.memmap(self.path, dtype=np.uint8, mode="r") if self.size else np.empty(0, np.uint8)
        )

    def read_all(self) -> Bytes:
        """The whole file."""
        return self.read(0, self.size)

    def _check(self, first: int, last: int) -> None:
        for block in range(first, last):
            if not self._checked[block]:
                content = self._bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
                if zlib.crc32(content.data) != self._crc32[block]:
                    raise ValueError(
                        f"{self.path}: block {block} (bytes from {block * BLOCK_BYTES}) is damaged: its "
                        "checksum differs from the manifest's; in a bank that you keep `memory3 bank verify --fix` "
                        f"mends it, of anything else delete {self.path.parent} and make it again"
                    )
                self._checked[block] = True


def partial(folder: Path) -> Path:
    """Where the artefact `folder` is being made; ranks other than the publishing one write there too."""
    return folder.with_name(folder.name + ".partial")


@contextmanager
def publishing(
    folder: Path,
    *,
    kind: str,
    version: int,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    extra: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """Yields an artefact's work folder, and publishes it as `folder` when the block ends without exception.

    The work folder of a crashed producer with the same identity (kind, version, settings, inputs) is kept,
    with what is finished in it; another one's is emptied. Files should be written with `writing`, so that one
    that exists is whole. An older artefact at `folder` is replaced. One process publishes; other ranks write
    into `partial(folder)` between its start and its end.

    Args:
        folder: Where the artefact shall stand.
        kind: What it is ("corpus").
        version: Of the format.
        settings: Everything that decides its content, as plain JSON.
        inputs: The fingerprints of what it is made from, by name.
        extra: Facts for readers that decide nothing; read when the block ends, so it may be filled within.

    Raises:
        ValueError: Another process is making the same artefact.
    """
    identity = {"kind": kind, "version": version, "settings": dict(settings), "inputs": dict(inputs)}
    work = partial(folder)
    work.mkdir(parents=True, exist_ok=True)
    lock = _lock(work)
    try:
        if _stored_identity(work) != _canonical(identity):
            _empty(work)
            write_json_atomic(work / MANIFEST, identity)
        for leftover in work.rglob(f"*{UNFINISHED}"):
            leftover.unlink()
        yield work
        files = _hash_files(work)
        named = {**identity, "files": {name: entry.sha256 for name, entry in files.items()}}
        manifest = {
            **identity,
            "extra": dict(extra or {}),
            "fingerprint": fingerprint(named),
            "files": {
                name: {"bytes": entry.bytes, "sha256": entry.sha256, "crc32": list(entry.crc32)}
                for name, entry in files.items()
            },
        }
        write_json_atomic(work / MANIFEST, {**manifest, CHECKSUM: _checksum(manifest)})
        _replace(work, folder)
    finally:
        os.close(lock)


def open_manifest(
    folder: Path, *, kind: str, version: int, inputs: Mapping[str, str] | None = None
) -> Manifest:
    """Opens a finished artefact, after checking that it is the one meant and no file is missing or cut short.

    Args:
        folder: The artefact.
        kind: What it has to be.
        version: The format that the caller reads.
        inputs: Fingerprints that it must have been made from; None accepts any.

    Raises:
        ValueError: Not there, of another kind or version, made from other inputs, or with damaged files.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"there is no {kind} in {folder}: no {MANIFEST} in it; make it first")
    stored = _load_json(path)
    if not isinstance(stored, dict) or "files" not in stored:
        raise ValueError(
            f"{path}: the {kind} was never finished; make it again, which goes on where it stopped"
        )
    manifest = _parse(folder, stored)
    for key, found, wanted in (("kind", manifest.kind, kind), ("version", manifest.version, version)):
        if found != wanted:
            raise ValueError(
                f"{folder}: its {key} is {found!r}, and {wanted!r} is needed; "
                "give another folder, or delete it and make it again"
            )
    for name, wanted_input in (inputs or {}).items():
        if manifest.inputs.get(name) != wanted_input:
            raise ValueError(
                f"{folder}: the {kind} was made from {name} {manifest.inputs.get(name)}, but {name} is now "
                f"{wanted_input}; make the {kind} again from it, or go back to the {name} it was made from"
            )
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing; delete {folder} and make the {kind} again")
        if file.stat().st_size != entry.bytes:
            raise ValueError(_wrong_size(file, entry.bytes))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Reads an artefact's manifest alone; whether its files are there and whole is another question.

    Raises:
        ValueError: It is damaged, or was changed.
        FileNotFoundError: There is none.
    """
    return _parse(folder, _load_json(folder / MANIFEST))


def is_finished(
    folder: Path,
    *,
    kind: str,
    version: int,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
) -> bool:
    """Whether `folder` holds a published artefact of this identity (from any inputs when they are None)."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    stored = _load_json(path)
    if not isinstance(stored, dict) or "files" not in stored:
        return False
    wanted = {"kind": kind, "version": version, "settings": dict(settings)}
    if inputs is not None:
        wanted["inputs"] = dict(inputs)
    return _canonical(wanted) == _canonical({key: stored.get(key) for key in wanted})


def copy_artefact(source: Manifest, folder: Path) -> None:
    """Publishes a copy of an artefact, byte for byte; an interrupted copy goes on after its last whole file.

    Raises:
        ValueError: A file of the source is damaged: nothing is published.
    """
    identity = {
        "kind": source.kind,
        "version": source.version,
        "settings": source.settings,
        "inputs": source.inputs,
    }
    with publishing(folder, **identity, extra=source.extra) as work:  # type: ignore[arg-type]
        for name, entry in source.files.items():
            if not (work / name).exists():
                with (source.folder / name).open("rb") as original, writing(work / name) as copy:
                    shutil.copyfileobj(original, copy, BLOCK_BYTES)
            if _hash_file(work / name) != entry:
                (work / name).unlink()
                raise ValueError(
                    f"{source.folder / name} differs from its manifest, and was not copied; give a sound copy"
                )


def reopen(folder: Path, damaged: Sequence[str]) -> None:
    """Turns an artefact back into the work folder of its producer, without the files that are damaged.

    Whoever publishes it again with the same identity then makes those files alone.
    """
    for name in damaged:
        (folder / name).unlink(missing_ok=True)
    delete_artefact(partial(folder))
    folder.rename(partial(folder))


def delete_artefact(folder: Path) -> None:
    """Removes an artefact, published or not; a crash on the way leaves one that does not exist for readers.

    Of a symbolic link, the link alone.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds a folder for one writer; the kernel frees it when the holder dies.

    Raises:
        ValueError: Another process is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        yield
    finally:
        os.close(lock)


def hold(folder: Path) -> int:
    """Marks an artefact as being read, until the descriptor returned is closed or the process dies.

    Waits for who has just published it (`publishing` holds its lock until the rename is synced) and for who looks
    whether it is held: without waiting the mark would be lost, and what is read could be swept.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks: what is read may be swept
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def is_held(folder: Path) -> bool:
    """Whether a process, this one included, reads an artefact that it marked with `hold`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


def verify(folder: Path) -> list[str]:
    """The names of all files that are missing or whose bytes differ from the manifest's; reads everything."""
    manifest = read_manifest(folder)

    def damaged(name: str) -> bool:
        path = folder / name
        return not path.is_file() or _hash_file(path) != manifest.files[name]

    with ThreadPoolExecutor(_num_threads()) as pool:
        return [
            name for name, bad in zip(manifest.files, pool.map(damaged, manifest.files), strict=True) if bad
        ]


def strangers(folder: Path) -> list[str]:
    """The names of all files that lie in an artefact's folder without being part of it."""
    known = {MANIFEST, *read_manifest(folder).files}
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [name for name in found if name not in known]


def hash_files(paths: Mapping[str, Path]) -> dict[str, str]:
    """The sha256 of files that this module did not write, by the names given."""
    with ThreadPoolExecutor(_num_threads()) as pool:
        return dict(zip(paths, pool.map(lambda path: _hash_file(path).sha256, paths.values()), strict=True))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; delete {path.parent} and make it again") from error


def _parse(folder: Path, stored: Any) -> Manifest:
    try:
        identity = {key: stored[key] for key in ("kind", "version", "settings", "inputs")}
        files = {
            name: FileEntry(entry["bytes"], entry["sha256"], array("I", entry["crc32"]))
            for name, entry in stored["files"].items()
        }
        manifest = Manifest(
            folder, **identity, extra=stored["extra"], fingerprint=stored["fingerprint"], files=files
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is damaged: {error!r}; delete {folder} and make it again"
        ) from error
    for name in files:
        _check_name(folder, name)
    named = {**identity, "files": {name: entry.sha256 for name, entry in files.items()}}
    if fingerprint(named) != manifest.fingerprint:
        raise ValueError(
            f"{folder / MANIFEST} was changed by hand: its fingerprint is {manifest.fingerprint}, its "
            f"content's {fingerprint(named)}; delete {folder} and make it again"
        )
    if stored.get(CHECKSUM, _checksum(stored)) != _checksum(stored):  # older manifests have none
        raise ValueError(
            f"{folder / MANIFEST} is damaged: its checksum is not its content's; delete {folder} and make it again"
        )
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Of all but the files: their names and hashes are in the fingerprint, wrong sizes and crc32 show in reading."""
    covered = {key: value for key, value in manifest.items() if key not in (CHECKSUM, "files")}
    return fingerprint(json.loads(json.dumps(covered)))


def _check_name(folder: Path, name: str) -> None:
    """Refuses names that lead out of the folder, by path or by link."""
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{folder / MANIFEST} names the file {name!r}, which leads out of its folder")
    path = folder
    for part in parts.parts:
        path = path / part
        if path.is_symlink():
            raise ValueError(
                f"{path} is a symbolic link, and an artefact holds files only; put the file in its place"
            )


def _wrong_size(path: Path, expected: int) -> str:
    return (
        f"{path} has {path.stat().st_size} bytes instead of the manifest's {expected}; "
        f"delete {path.parent} and make it again"
    )


def _num_threads() -> int:
    return min(8, os.cpu_count() or 1)


def _hash_files(folder: Path) -> dict[str, FileEntry]:
    paths = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        _check_name(folder, name)
        if path.is_file() and name != MANIFEST:
            paths[name] = path
    with ThreadPoolExecutor(_num_threads()) as pool:
        return dict(zip(paths, pool.map(_hash_and_sync, paths.values()), strict=True))


def _hash_and_sync(path: Path) -> FileEntry:
    _sync(path)
    return _hash_file(path)


def _hash_file(path: Path) -> FileEntry:
    sha256, crc32, size = hashlib.sha256(), array("I"), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha256.update(block)
            crc32.append(zlib.crc32(block))
            size += len(block)
    return FileEntry(size, sha256.hexdigest(), crc32)


def _stored_identity(work: Path) -> str:
    try:
        stored = json.loads((work / MANIFEST).read_text(encoding="utf-8"))
        return _canonical({key: stored[key] for key in ("kind", "version", "settings", "inputs")})
    except (OSError, ValueError, KeyError, TypeError):  # no manifest, or none of ours: a stranger's folder
        return ""


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _lock(work: Path) -> int:
    """An exclusive lock on the work folder, held until the descriptor is closed or the process dies."""
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise ValueError(f"another process is writing {work}; wait for it, or stop it") from error
        logger.warning("%s cannot be locked (%s): do not run two producers at once", work, error)
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(work: Path, folder: Path) -> None:
    for path in work.rglob("*"):
        if path.is_dir():
            _sync(path)
    _sync(work)
    outdated = folder.with_name(folder.name + ".outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if folder.exists():
        # A crash between the two renames leaves a complete work folder, which the next producer publishes.
        folder.rename(outdated)
    work.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(outdated, ignore_errors=True)
