"""Whether a library is what it says: every byte against its hash, and a sample against the model; repair, and absence.

Invariants: `verify` changes nothing; `repair` makes anew what can be made from the library's own text, which is
vectors, records and the search index, and touches no piece that is sound; `find_document` reads every file there is,
and believes no table.

Not here: edits (edits.py), the checksum that guards each read (data/files.py).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data import files
from data.files import (
    MANIFEST,
    Manifest,
    copy_artefact,
    delete_artefact,
    is_held,
    only_writer,
    open_manifest,
    read_manifest,
    reopen,
)
from memorybank import codecs
from memorybank.edits import Compiler, Editor, Told, refuse_changes, sweep
from memorybank.library import (
    KIND,
    PIECE,
    STATE,
    VERSION,
    Library,
    Part,
    lists_some,
    open_piece,
    shared_of,
    state_folder,
    state_numbers,
)
from memorybank.segment import Segment, Segments
from memorybank.writer import encode_records

_BLOCK = 1 << 22
# A batch of other references rounds otherwise: close calls keep other tokens, and numbers differ in their last bits.
_LEAST_ALIKE, _LARGEST_ERROR, _LEAST_COSINE = 0.8, 0.1, 0.99
_FOREIGN = "is not a part of the bank"

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be."""

    path: Path
    what: str
    piece: str | None = None
    """Name of the piece that can be made anew, or None when it cannot."""

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def verify(
    folder: Path,
    compiler: Compiler | None = None,
    *,
    sample: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda total, done: None,
) -> list[Problem]:
    """Return all that is wrong with a library.

    Args:
        folder: of the library.
        compiler: what it should have been compiled with; None compares no sample.
        sample: references that are embedded and compiled anew.
        seed: chooses them.
        progress: is told the bytes to be read in all, and those read since.

    Raises:
        ValueError: there is no library; or every byte is sound, but a sample cannot be compared, since it was compiled
            with something else.
    """
    problems: list[Problem] = []
    pieces: dict[str, str] = {}
    numbers = state_numbers(folder)
    if not numbers:
        raise ValueError(f"there is no bank in {folder}; make one with `memory3 bank build RUN`")
    for number in numbers:
        state = state_folder(folder, number)
        try:
            inputs = open_manifest(state, kind=KIND, version=VERSION).inputs
            problems += [
                Problem(state / name, "its bytes differ from the manifest") for name in files.verify(state)
            ]
            pieces |= {name: fingerprint for name, fingerprint in inputs.items() if PIECE.fullmatch(name)}
        except ValueError as problem:
            problems.append(Problem(state, f"state cannot be read: {problem}"))
    total = sum(
        path.stat().st_size for name in pieces for path in (folder / name).rglob("*") if path.is_file()
    )
    for name, fingerprint in pieces.items():
        problems += _piece_problems(folder / name, fingerprint)
        size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        progress(total, size)
    known = {state_folder(folder, number).name for number in numbers} | pieces.keys()
    for path in sorted(folder.iterdir()):
        # An edit that was interrupted leaves pieces and work folders, which the next one takes up or sweeps.
        name = path.name.removesuffix(".partial")
        if path.name not in known and not PIECE.fullmatch(name) and not STATE.fullmatch(name):
            problems.append(Problem(path, _FOREIGN))
    if not problems and compiler is not None and sample:
        with Library.open(folder) as library:
            try:
                refuse_changes(folder, library.settings, compiler)
            except ValueError as stale:
                raise ValueError(
                    f"{stale}; its bytes are sound: `--sample 0` looks at nothing else"
                ) from None
            problems += _sample_problems(library, compiler, sample=sample, seed=seed)
    return problems


def repair(editor: Editor, problems: Sequence[Problem]) -> list[str]:
    """Make anew the vectors, records and index among the problems, and return the names of the pieces made.

    Only the shards that are damaged are made, where the manifest still tells them from the others; older states that
    are damaged are deleted. Where what is made differs from what was (copied by `compact`, say, from records that
    other batches made), a new state names it.

    Raises:
        ValueError: a text, a quantiser or a state is damaged, which only a copy can restore; or the compiler is another
            one.
    """
    assert editor.compiler is not None
    beyond = [problem for problem in problems if problem.piece is None and problem.what != _FOREIGN]
    if beyond:
        raise ValueError(
            f"{beyond[0]}; this cannot be made from the rest: restore it from a copy with "
            f"`memory3 bank fetch COPY {editor.folder}`"
        )
    made = sorted({problem.piece for problem in problems if problem.piece is not None})
    with only_writer(editor.folder):
        state = state_folder(editor.folder, state_numbers(editor.folder)[-1])
        manifest = open_manifest(state, kind=KIND, version=VERSION)
        parts = [Part(**part) for part in manifest.settings["parts"]]
        _give_up(editor.folder, set(made).difference(manifest.inputs))
        made = [name for name in made if name in manifest.inputs]
        for part in parts:
            for name in set(made).intersection(part.pieces):
                _take_apart(editor.folder / name)
                editor.make_again(manifest, part, name)
        shared = shared_of(manifest)
        sound = {
            name: open_piece(editor.folder / name).fingerprint if name in made else manifest.inputs[name]
            for name in chain(*(part.pieces for part in parts), shared.pieces)
            if name not in shared.indexes
        }
        indexes, found = _sound_indexes(editor, manifest, parts, sound, damaged=made)
        sound |= found
        if indexes != shared.indexes or not sound.items() <= manifest.inputs.items():
            editor.rename(manifest, sound, indexes)
    return made


def _give_up(folder: Path, lost: set[str]) -> None:
    """Delete the older states that name pieces which are lost: nothing could be made anew for them alone."""
    for number in state_numbers(folder)[:-1] if lost else []:
        state = state_folder(folder, number)
        if lost.intersection(open_manifest(state, kind=KIND, version=VERSION).inputs):
            if is_held(state):
                raise ValueError(
                    f"{state} is damaged, and is being read; repair the bank again when its reader is done"
                )
            delete_artefact(state)
    if lost:
        sweep(folder)


def _sound_indexes(
    editor: Editor, state: Manifest, parts: Sequence[Part], sound: dict[str, str], *, damaged: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the indexes of a state whose vectors may have been made anew, and their fingerprints.

    They are built anew if need be; one whose manifest is lost, from what no other one lists.
    """
    names = shared_of(state).indexes
    lists = {name: _listed(editor.folder / name) for name in names}
    listed = {vectors for found in lists.values() if found is not None for vectors in found}
    indexes: list[str] = []
    fingerprints: dict[str, str] = {}
    for name in names:
        folder, found = editor.folder / name, lists[name]
        if found is not None and name not in damaged and lists_some(open_piece(folder), sound):
            indexes.append(name)
            fingerprints[name] = state.inputs[name]
            continue
        mine = [part for part in parts if (part.vectors in found if found else part.vectors not in listed)]
        listed |= {part.vectors for part in mine}
        delete_artefact(folder)
        if mine and editor.index_again(state, mine, name):
            indexes.append(name)
            fingerprints[name] = open_piece(folder).fingerprint
    return tuple(indexes), fingerprints


def _listed(index: Path) -> set[str] | None:
    """The names of the vectors that an index lists; None when its manifest cannot be read."""
    try:
        return set(read_manifest(index).inputs)
    except (ValueError, OSError):
        return None


def find_document(
    folder: Path,
    document_id: str,
    *,
    text: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Return every place of a library where a document, or a piece of its text, is still to be found.

    Args:
        folder: of the library.
        document_id: looked up in every segment that lies there, and searched for in the bytes of every file.
        text: some words of it, searched for likewise.
        progress: is told the bytes that were read.

    Raises:
        ValueError: there is no such folder, or a segment cannot be opened.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no bank in {folder}; name the folder to be searched by --bank")
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("text-") and (path / MANIFEST).is_file():
            for row in Segment(open_piece(path)).find(document_id):
                found.append(f"{path}: document {row} has the id {document_id!r}")
    needles = {f"the id {document_id!r}": f'"id": {json.dumps(document_id, ensure_ascii=False)}'.encode()}
    if text is not None:
        needles["the text given"] = json.dumps(text, ensure_ascii=False)[1:-1].encode()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            for what, needle in needles.items():
                place = _find_bytes(path, needle)
                if place is not None:
                    found.append(f"{path}: {what} stands at byte {place}")
            progress(path.stat().st_size)
    return found


def fetch(source: Path, target: Path, *, told: Told) -> tuple[int, int]:
    """Bring the newest state of a library into another folder, copying only the pieces that are missing or damaged.

    This is how a library reaches nodes without a shared disk: pieces never change and are named by fingerprint, so that
    any copy of the folder (rsync, an object store mounted as one) will do as the source, and what was brought before is
    not brought again. The state is published last, by one rename.

    Returns:
        the number of the state, and how many pieces were copied.

    Raises:
        ValueError: the source is damaged, or the target itself; the target went on by itself.
    """
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} would be its own source; name the folder of a copy")
    with Library.open(source) as library, only_writer(target):
        _same_history(source, target, library)
        names = sorted(library.piece_names())
        missing = [name for name in names if not _is_sound(target / name, library.manifest.inputs[name])]
        for name in missing:
            piece = open_piece(source / name)
            delete_artefact(target / name)
            copy_artefact(piece, target / name)
            told("copying", len(missing), 1, sum(entry.bytes for entry in piece.files.values()))
        state = state_folder(target, library.number)
        if not _is_sound(state, library.fingerprint):
            delete_artefact(state)
            copy_artefact(library.manifest, state)
        sweep(target)
    return library.number, len(missing)


def _same_history(source: Path, target: Path, library: Library) -> None:
    """Refuse a target that was edited by itself: its states would be lost."""
    for number in state_numbers(target):
        ours, theirs = (state_folder(folder, number) / MANIFEST for folder in (target, source))
        if number > library.number or (theirs.exists() and _stated(ours) not in (None, _stated(theirs))):
            raise ValueError(
                f"{target} went on by itself: its state {number} is not one of {source}; fetch into another folder"
            )


def _stated(manifest: Path) -> str | None:
    try:
        return open_manifest(manifest.parent, kind=KIND, version=VERSION).fingerprint
    except ValueError:
        return None  # damaged: it may be replaced


def _is_sound(folder: Path, fingerprint: str) -> bool:
    try:
        manifest = open_piece(folder) if PIECE.fullmatch(folder.name) else None
        manifest = manifest or open_manifest(folder, kind=KIND, version=VERSION)
        return manifest.fingerprint == fingerprint and not files.verify(folder)
    except ValueError:
        return False


def _piece_problems(folder: Path, fingerprint: str) -> list[Problem]:
    piece = None if folder.name.startswith(("text-", "codec-")) else folder.name
    if folder.is_symlink():
        return [Problem(folder, "is a symbolic link, and a bank holds folders only")]
    if not folder.is_dir():
        return [Problem(folder, "is missing", piece)]
    try:
        damaged = files.verify(folder)
        problems = [Problem(folder / name, _FOREIGN) for name in files.strangers(folder)]
        if not damaged and open_piece(folder).fingerprint != fingerprint:
            problems.append(Problem(folder, "is another piece than the one that the state names", piece))
    except (ValueError, OSError) as problem:
        return [Problem(folder / MANIFEST, f"cannot be read: {problem}", piece)]
    what = "is missing, or its bytes differ from the manifest"
    return problems + [Problem(folder / name, what, piece) for name in damaged]


def _sample_problems(library: Library, compiler: Compiler, *, sample: int, seed: int) -> Iterator[Problem]:
    """Compare a sample with what embedder and model make of it now."""
    rng = np.random.default_rng(seed)
    sizes = np.array([part.references for part in library.parts], float)
    chosen = []
    for part, count in enumerate(rng.multinomial(sample, sizes / sizes.sum()).tolist()):
        live = library.live_ids(part) if count else np.zeros(0, np.int64)
        chosen.append(rng.choice(live, size=min(count, len(live)), replace=False))
    ids = np.sort(np.concatenate(chosen))
    vectors = compiler.embedder.embed([library.text(int(id)) for id in ids])
    cosines = (vectors * library.read_vectors(ids)).sum(axis=1)
    codec = codecs.named(library.settings.codec, compiler.shape, library.codec_folders)
    records = encode_records(
        compiler.encode,
        Segments(library.segments),
        ids,
        codec,
        batch=compiler.batch,
        window_tokens=library.settings.window_tokens,
    )
    made = codec.decode(records)
    kept = codec.decode(library.read(ids))
    for row, id in enumerate(ids.tolist()):
        if vectors[row].any() and cosines[row] < _LEAST_COSINE:
            yield Problem(
                library.folder, f"the vector of reference {id} is not its text's: cosine {cosines[row]:.3f}"
            )
        alike = made.index_NLGS[row] == kept.index_NLGS[row]
        error = _relative(made.k_NLGSE[row][alike], kept.k_NLGSE[row][alike])
        if alike.float().mean() < _LEAST_ALIKE or error > _LARGEST_ERROR:
            yield Problem(
                library.folder,
                f"the record of reference {id} is not what the model makes of it: {alike.float().mean():.0%} of the "
                f"kept tokens are the same, and their keys differ by {error:.0%}",
            )


def _relative(made: torch.Tensor, kept: torch.Tensor) -> float:
    return float((made.float() - kept.float()).norm() / made.float().norm().clamp(min=1e-12))


def _take_apart(folder: Path) -> None:
    """Turn a damaged piece into a work folder of its sound files; into nothing, if these cannot be told."""
    try:
        reopen(folder, files.verify(folder))
    except (ValueError, OSError):
        delete_artefact(folder)


def _find_bytes(path: Path, needle: bytes) -> int | None:
    """Return the first place of a needle in a file, which is read block by block."""
    with path.open("rb") as file:
        tail, begin = b"", 0
        while block := file.read(_BLOCK):
            place = (tail + block).find(needle)
            if place >= 0:
                return begin - len(tail) + place
            begin += len(block)
            tail = (tail + block)[-(len(needle) - 1) :] if len(needle) > 1 else b""
    return None
