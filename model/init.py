"""Initial weights: normal with one standard deviation, less for what is added to the residual stream.

The output projections of attention and feed-forward get ``std / sqrt(2 * num_layers)``, so that the
residual stream's variance does not grow with depth (GPT-2). The paper is silent.
Not here: the seed; the caller sets torch's.
"""

import math

from torch import nn

from model.layers import RMSNorm


def initialise(model: nn.Module, *, std: float, num_layers: int) -> None:
    """Fill every parameter of `model` in place, in the order in which it names them."""
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            into_residual = name.endswith((".out", ".down"))
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * num_layers) if into_residual else std)
