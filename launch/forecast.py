"""The bank epochs that a run will have on a prepared corpus, as `memory3 plan` states them. No torch.

Not here: what an epoch is made of (`train.forecast`), what follows for memory and disk (`launch.planning`), making
the searches (`launch.searching`).
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from data.prepare import Prepared, PreparedSizes, open_prepared
from data.references import References
from launch.compose import load_config
from launch.config import RunConfig
from train.config import StageConfig
from train.forecast import BankEpoch, StageEpoch, bank_epoch, read_at, stage_epochs
from train.history import History
from train.neighbours import EpochSearch, epoch_search, published_size

_MOST_DOCUMENTS = 4_000_000
"""Documents of all epochs together, each of which orders them anew: a second or two."""
_MOST_EPOCHS = 1_000
"""Each takes two milliseconds however small the corpus is."""
_MOST_REFERENCES = 20_000_000
"""Whose table is read: 0.6 GB."""


def forecast(config: RunConfig, sizes: PreparedSizes) -> list[BankEpoch] | None:
    """Return the bank epochs of a run; None where planning them takes too long, or it branches from a run not there.

    Raises:
        ValueError: The prepared corpus is damaged, or training will refuse it.
    """
    most_epochs = min(_MOST_EPOCHS, _MOST_DOCUMENTS // max(1, sizes.documents))
    if sizes.references > _MOST_REFERENCES or not most_epochs:
        return None
    prepared = open_prepared(config.data, Path(config.paths.root) / "prepared")
    epochs = _epochs(config, prepared.references, most_epochs)
    return None if epochs is None else [_bank_epoch(config, prepared, *epoch) for epoch in epochs]


def held_bytes(config: RunConfig) -> int:
    """Return the bytes of a run, and of what it searches with, that lie on the disk already."""
    root = Path(config.paths.root)
    prepared = root / "prepared" / config.data.name
    folders = root / config.run, prepared / "vectors", prepared / "indexes"
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def searches(config: RunConfig, references: References) -> Iterator[EpochSearch]:
    """Yield what the bank epochs of a run will search; nothing where it branches from a run not there.

    Raises:
        ValueError: Training will refuse the corpus.
    """
    for name, epoch in _epochs(config, references, sys.maxsize) or []:
        yield _search(config, references, name, epoch)


def _epochs(
    config: RunConfig, references: References, most_epochs: int
) -> list[tuple[str, StageEpoch]] | None:
    """The epochs that read memory, with their stage's name; None where all are more than `most_epochs`."""
    source = _warmed_up(config)
    if source is None or source.warmup is None:
        return None
    history = History.empty(references.shards.num_documents)
    found = []
    for name, of in (("warmup", source), ("continual", config)):
        stage: StageConfig | None = getattr(of, name)
        if stage is None:
            continue
        epochs = stage_epochs(
            references.shards,
            name,
            stage,
            history,
            source_weights={label: each.weight for label, each in of.data.sources.items()},
            row_tokens=of.model.row_tokens,
            seed=of.seed,
        )
        planned = list(islice(epochs, min(most_epochs + 1, sys.maxsize)))
        most_epochs -= len(planned)
        if most_epochs < 0:
            return None
        history = History.of_read(read_at(planned, stage, stage.steps - stage.decay_steps))
        if of is config and stage.memory is not None:
            found += [(name, epoch) for epoch in planned]
    return found


def _search(config: RunConfig, references: References, name: str, epoch: StageEpoch) -> EpochSearch:
    return epoch_search(
        references,
        name,
        epoch.epoch,
        epoch.history,
        epoch.rows.plan,
        validation_rows=config.logging.validation_rows,
    )


def _bank_epoch(config: RunConfig, prepared: Prepared, name: str, epoch: StageEpoch) -> BankEpoch:
    stage: StageConfig = getattr(config, name)
    assert stage.memory is not None
    references, chunk_tokens = prepared.references, config.model.chunk_tokens
    asked = _search(config, references, name, epoch)
    found = published_size(
        asked.folder(Path(config.paths.root) / config.run),
        stage.memory.source,
        settings=asked.settings(config.retrieval, chunk_tokens=chunk_tokens),
        inputs=prepared.inputs,
    )
    return bank_epoch(
        references, stage, asked, steps=epoch.rows.steps, chunk_tokens=chunk_tokens, found=found
    )


def _warmed_up(config: RunConfig) -> RunConfig | None:
    """The configuration of the run whose warmup the continual stage goes on from; None where it is not there."""
    if config.continual is None or config.continual.branch_from is None:
        return config
    folders = Path(config.continual.branch_from), Path(config.paths.root) / config.continual.branch_from
    frozen = [folder / "config.yaml" for folder in folders if (folder / "config.yaml").exists()]
    return load_config(frozen[0]) if frozen else None
