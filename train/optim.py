"""Which parameters decay. Pure: from names and shapes to AdamW's parameter groups.

Not here: the learning rate (`schedule`), the update (`engine`).
"""

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in a fixed order: matrices of the layers and the head decay; norms and embeddings do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (kept if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
