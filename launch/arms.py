"""The two arms of a comparison: M with memory in its continual stage, and C, the matched control.

From one warmup checkpoint both train on the same rows in the same order, with the same schedule and fresh optimizer
state; C reads no memory. Each arm is a run of its own: stopped anywhere, the comparison goes on where it was.
Not here: training (`launch.pretrain`), evaluating (`launch.evaluate`).
"""

from copy import deepcopy
from typing import TYPE_CHECKING

from launch import pretrain
from launch.config import RunConfig

if TYPE_CHECKING:
    from data.documents import Split
    from launch.opened import OpenedRun
    from train.evaluate import ArmResult


def control_of(main: RunConfig) -> RunConfig:
    """The configuration of C that matches M's.

    Raises:
        ValueError: M has no continual stage with memory.
    """
    control = deepcopy(main)
    if control.continual is None or control.continual.memory is None:
        raise ValueError(
            "continual.memory is null: there is no arm M to compare with; choose experiment=demo"
        )
    control.run = f"{main.run}-control"
    if control.continual.branch_from is None:
        control.continual.branch_from = main.run
    control.warmup = None
    control.continual.memory = None
    return control


def train_arms(main: RunConfig) -> int:
    """Train M, then C; returns the first exit code that is not 0."""
    for config, what in (
        (main, f"arm M ({main.run}): the continual stage with memory"),
        (control_of(main), f"arm C ({main.run}-control): the same continual stage without memory"),
    ):
        print(f"\n== {what}", flush=True)
        code = pretrain.pretrain(config)
        if code:
            return code
    return 0


def open_arms(main: RunConfig) -> tuple["OpenedRun", "OpenedRun"]:
    """Both trained runs."""
    from launch.opened import open_run

    return open_run(main.run, main.paths.root), open_run(control_of(main).run, main.paths.root)


def evaluate_arms(opened: tuple["OpenedRun", "OpenedRun"], split: "Split") -> list["ArmResult"]:
    """The results of both arms on a split, M's first."""
    from launch.evaluate import save_results

    return [result for each in opened for result in save_results(each, split)]
