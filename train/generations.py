"""Which generations of the bank stay on disk, and the sweeping of the others.

    stays: what a checkpoint names (a resumed bank epoch reads exactly that one), the newest few of a stage,
           and what somebody reads; a quantiser, as long as records that it wrote

Invariants: while a published checkpoint cannot be read, nothing goes, since it may name anything; a kill on the way
leaves nothing that looks like a generation.

Not here: which checkpoints stay (`checkpoint`), compiling (`continual`).
"""

import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from data.files import MANIFEST, Manifest, delete_artefact, is_held, open_manifest
from memorybank import quantizer, store
from memorybank.cold import opened_stores
from train.checkpoint import entries
from train.config import STAGES

log = logging.getLogger(__name__)

_NAME = re.compile(r"generation-(warmup|continual)-(\d{4,})")


def outdated(run: Path, *, last: int, without: Collection[Path] = ()) -> list[Path]:
    """The generations of a run that no rule keeps, oldest first.

    Args:
        run: The run folder.
        last: So many newest ones of each stage stay in any case.
        without: Checkpoints that count as deleted.
    """
    found = sorted(
        (STAGES.index(match[1]), int(match[2]), path)
        for path in (run / "bank").glob("generation-*")
        if (match := _NAME.fullmatch(path.name))
    )
    published = [entry for entry in entries(run) if entry.folder not in without]
    for entry in published:
        if entry.state is None:
            if len(found) > last:
                log.warning(
                    "%s cannot be read, and may name any generation: all of them stay until it is restored, or deleted",
                    entry.folder,
                )
            return []
    named = {entry.state.generation for entry in published if entry.state is not None}
    newest = {path for stage in range(len(STAGES)) for path in [p for s, _, p in found if s == stage][-last:]}
    return [path for _, _, path in found if path.name not in named and path not in newest]


def needed_by(run: Path, generation: str) -> list[str]:
    """The checkpoints of a run that cannot be resumed without a generation: they name it, or cannot be read."""
    found = entries(run)
    return [
        entry.folder.name for entry in found if entry.state is None or entry.state.generation == generation
    ]


def sweep(run: Path, *, last: int) -> list[Path]:
    """Delete the generations that no rule keeps, and the quantisers that only they were written with; return both."""
    doomed = []
    for path in outdated(run, last=last):
        if is_held(path):
            log.info("%s is being read, and stays for now", path)
        else:
            doomed.append(path)
    # Quantisers go first: a kill in between leaves their generation, which names them, to the next sweep.
    gone = _quantisers_of(run, doomed) if doomed else []
    for path in [*gone, *doomed]:
        delete_artefact(path)
    return [*gone, *doomed]


def _quantisers_of(run: Path, doomed: Sequence[Path]) -> list[Path]:
    """The quantisers of the doomed generations' weights with which nothing that stays was written."""
    bank = run / "bank"
    weights = {manifest.inputs["weights"] for manifest in map(_manifest, doomed) if manifest is not None}
    staying = [path for path in bank.glob("generation-*") if path not in doomed]
    used = {manifest.settings["codec"] for manifest in map(_manifest, staying) if manifest is not None}
    used |= {kept.settings["codec"] for kept in opened_stores(bank)}
    found = []
    for path in sorted(
        bank.glob(f"codec-*/{MANIFEST}")
    ):  # a folder for each set of weights (memorybank.codecs)
        try:
            manifest = open_manifest(path.parent, kind=quantizer.KIND, version=quantizer.VERSION)
        except ValueError:
            continue
        if manifest.inputs["weights"] in weights and quantizer.codec_name(manifest) not in used:
            found.append(path.parent)
    return found


def _manifest(folder: Path) -> Manifest | None:
    try:
        return open_manifest(folder, kind=store.KIND, version=store.VERSION)
    except ValueError:  # a kill left it half deleted, or it is damaged
        return None
