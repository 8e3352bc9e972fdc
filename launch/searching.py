"""`memory3 plan --search`: the searches of a run's bank epochs, made before the run begins.

What they find gives every generation its size. They stay in the run's folder, where the run finds them: a job on GPUs
need not wait for what a CPU can do the day before.
Not here: what an epoch searches (`launch.forecast`), the search (`train.continual`).
"""

import sys
from copy import deepcopy

from launch.config import RunConfig
from launch.forecast import searches
from launch.lock import only_user
from train.neighbours import is_published


def search(config: RunConfig) -> None:
    """Make the searches that are not there yet, with a progress bar.

    Raises:
        ValueError: The corpus is not prepared, no stage reads memory, or the run's folder is in use or holds a run of
            another configuration.
    """
    from rich.progress import Progress

    from launch import build, prepare, pretrain
    from train.continual import search_epoch

    if not any(stage.memory for stage in config.stages.values()):
        raise ValueError("--search: no stage of this run reads memory, so nothing is searched; leave it out")
    build.quiet_third_parties()
    config = deepcopy(config)  # the plan fills in what the tokenizer decides by itself
    pretrain.fill_in(config)
    folder = pretrain.folder_of(config)
    with only_user(folder):
        pretrain.refuse_other_run(config, folder)
        if config.continual is not None and config.continual.branch_from is not None:
            build.branch_source(folder, config)  # refuses what is not there
        context = build.context(config)
        prepare.embed_references(context)
        searcher, references = context.search(context.embedder()), context.prepared.references
        with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
            for asked in progress.track(list(searches(config, references)), description="bank epochs"):
                settings = asked.settings(config.retrieval, chunk_tokens=config.model.chunk_tokens)
                if not is_published(asked.folder(folder), settings=settings, inputs=context.prepared.inputs):
                    found = search_epoch(asked, searcher, references.shards, config.retrieval)
                    found.publish(asked.folder(folder), settings=settings, inputs=context.prepared.inputs)
