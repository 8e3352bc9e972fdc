"""What a run has read: all that decides, beside corpus, settings and seed, which rows come next.

The rows of an epoch are a pure function of the history at its beginning (`rows.plan_epoch`), so a resumed run draws
the same rows without having stored them, and what will be read is known before a run begins (`forecast`). No torch.
Not here: where a run stands (`state`), how both are written to disk (`checkpoint`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data.packing import RowPlan


@dataclass(frozen=True, slots=True)
class History:
    """What the run had read when its present epoch began, one entry per document.

    Attributes:
        finished: (documents,) bool: the document's last token lay in a consumed row.
        drawn: (documents,) uint16: how often the document was drawn in this stage.
    """

    finished: NDArray[np.bool_]
    drawn: NDArray[np.uint16]

    @classmethod
    def empty(cls, num_documents: int) -> Self:
        """Nothing read yet."""
        return cls(np.zeros(num_documents, dtype=np.bool_), np.zeros(num_documents, dtype=np.uint16))

    def after(self, plan: RowPlan, cursor: int) -> "History":
        """The history once `cursor` rows of a plan are consumed."""
        finished, drawn = self.finished.copy(), self.drawn.copy()
        finished[plan.finished(cursor)] = True
        np.add.at(drawn, plan.documents, 1)
        return History(finished, drawn)

    @classmethod
    def of_read(cls, read: NDArray[np.bool_]) -> Self:
        """What a stage starts from that branches off: what was read stays so, nothing is drawn yet."""
        return cls(read, np.zeros(len(read), dtype=np.uint16))

    def save(self, folder: Path) -> None:
        """Write two files into a folder that is being published."""
        np.save(folder / "finished.npy", np.packbits(self.finished))
        np.save(folder / "drawn.npy", self.drawn)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The inverse of `save`."""
        drawn = np.load(folder / "drawn.npy", allow_pickle=False)
        finished = np.unpackbits(np.load(folder / "finished.npy", allow_pickle=False), count=len(drawn))
        return cls(finished.astype(np.bool_), drawn)
