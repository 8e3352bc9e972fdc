"""The bank epochs that a run will have on a prepared corpus, as `memory3 plan` states them. No torch.

Not here: what an epoch is made of (`train.forecast`), what follows for memory and disk (`launch.planning`).
"""

from itertools import islice
from pathlib import Path

from data.prepare import PreparedSizes
from data.references import References
from launch.compose import load_config
from launch.config import RunConfig
from train.forecast import BankEpoch, StageEpoch, bank_epoch, read_at, stage_epochs
from train.history import History

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
    source = _warmed_up(config)
    most_epochs = min(_MOST_EPOCHS, _MOST_DOCUMENTS // max(1, sizes.documents))
    if source is None or source.warmup is None or sizes.references > _MOST_REFERENCES or not most_epochs:
        return None
    references = References.open(Path(config.paths.root) / "prepared" / config.data.name / "references")
    history = History.empty(references.shards.num_documents)
    found = []
    for name, of in (("warmup", source), ("continual", config)):
        stage = getattr(of, name)
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
        planned = list(islice(epochs, most_epochs + 1))
        most_epochs -= len(planned)
        if most_epochs < 0:
            return None
        history = History.of_read(read_at(planned, stage, stage.steps - stage.decay_steps))
        if of is config and stage.memory is not None:
            found += [_bank_epoch(references, config, name, epoch) for epoch in planned]
    return found


def _bank_epoch(references: References, config: RunConfig, name: str, epoch: StageEpoch) -> BankEpoch:
    return bank_epoch(
        references,
        name,
        getattr(config, name),
        epoch,
        chunk_tokens=config.model.chunk_tokens,
        validation_rows=config.logging.validation_rows,
    )


def _warmed_up(config: RunConfig) -> RunConfig | None:
    """The configuration of the run whose warmup the continual stage goes on from; None where it is not there."""
    if config.continual is None or config.continual.branch_from is None:
        return config
    folders = Path(config.continual.branch_from), Path(config.paths.root) / config.continual.branch_from
    frozen = [folder / "config.yaml" for folder in folders if (folder / "config.yaml").exists()]
    return load_config(frozen[0]) if frozen else None
