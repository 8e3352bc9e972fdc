"""Exports: a checkpoint without its engine, beside what names its tensors and its tokens.

    <folder>/
        manifest.json        kind "checkpoint": sizes and hashes, as in `checkpoint`
        model.safetensors    parameters by name, in the training type
        config.json          `ModelConfig`, and the type of the parameters
        tokenizer.model      sentencepiece
        state.json, *.npy, config.yaml, origin.json   as in the checkpoint

`memory3 generate` and `memory3 evaluate` open such a folder like a run (the prepared corpus lies below `--root`);
`load_exported` gives the network to whoever writes torch. Training does not go on from it.
Not here: the command (`launch.checkpoint`).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path

import torch
from safetensors.torch import load_file

from data.files import publishing
from model.config import ModelConfig
from model.transformer import Memory3LM
from train.checkpoint import CONFIG, KIND, ORIGIN, VERSION, WEIGHTS, Checkpoint, damage

SIZES, TOKENIZER = "config.json", "tokenizer.model"
_COPIED = (WEIGHTS, "state.json", "finished.npy", "drawn.npy", "read.npy", CONFIG, ORIGIN)


def export(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    model: ModelConfig,
    tokenizer: Path,
    config: Path,
    inputs: Mapping[str, str],
) -> None:
    """Publish an export.

    Args:
        checkpoint: A verified one.
        folder: To be made.
        model: Sizes of the network.
        tokenizer: Its `.model` file.
        config: The run's configuration, for checkpoints that do not hold it.
        inputs: Fingerprints of what the run was made from.

    Raises:
        ValueError: The folder exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; give another folder, or delete it")
    state = checkpoint.state
    settings = {"stage": state.stage, "step": state.step, "ranks": 0, "keep": True}
    dtype = str(next(iter(checkpoint.weights().values())).dtype).removeprefix("torch.")
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in asdict(model).items()}
    with publishing(folder, kind=KIND, version=VERSION, settings=settings, inputs=inputs) as work:
        for name in _COPIED:
            if (checkpoint.folder / name).exists():
                shutil.copyfile(checkpoint.folder / name, work / name)
        if not (work / CONFIG).exists():
            shutil.copyfile(config, work / CONFIG)
        shutil.copyfile(tokenizer, work / TOKENIZER)
        (work / SIZES).write_text(json.dumps({**plain, "dtype": dtype}, indent=1) + "\n", encoding="utf-8")


def load_exported(folder: Path) -> Memory3LM:
    """The network of an export, verified, in the type it was trained in.

    Raises:
        ValueError: It is damaged.
    """
    problem = damage(folder)
    if problem is not None:
        raise ValueError(problem)
    sizes = json.loads((folder / SIZES).read_text(encoding="utf-8"))
    dtype = getattr(torch, sizes.pop("dtype"))
    choices = {
        field.name: type(field.default) for field in fields(ModelConfig) if isinstance(field.default, Enum)
    }
    chosen = {name: kind(sizes[name]) for name, kind in choices.items()}
    model = Memory3LM(ModelConfig(**{**sizes, **chosen, "compile": False})).to(dtype)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()
