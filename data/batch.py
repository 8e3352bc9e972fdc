"""A batch of rows, as it leaves the loader.

Not here: memories and what a stage makes of a batch (`train.stages`).
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows of T + 1 tokens: T inputs and, one later, T targets.

    Attributes:
        tokens_BT1: int64, shape (B, T + 1).
        positions: The rows' positions in the global order of the plan.
        documents_BT1: The document that each token is of, int64; None when not asked for.
    """

    tokens_BT1: Tensor
    positions: tuple[int, ...]
    documents_BT1: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """The tokens that are read, shape (B, T)."""
        return self.tokens_BT1[:, :-1]

    @property
    def targets(self) -> Tensor:
        """The tokens that are predicted, shape (B, T)."""
        return self.tokens_BT1[:, 1:]
