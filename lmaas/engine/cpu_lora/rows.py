"""The rows of an engine's step, grouped by the slot whose adapter they use."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[np.int64]


class Groups:
    """The rows of a step, grouped by slot. Rows without an adapter belong to no group.

    `slots` [n] is the slot of each row, -1 for none. `slot` [groups] is ascending, `start` [groups + 1] are indices into `rows`, and `rows`
    keeps the order of the step within each group. Created once for each step and used by every layer.
    """

    def __init__(self, slots: Integers) -> None:
        self.n = len(slots)
        own = np.flatnonzero(slots >= 0)
        order = np.argsort(slots[own], kind="stable")
        self.rows: Integers = own[order]
        self.slot, first = np.unique(slots[self.rows], return_index=True)
        self.start: Integers = np.append(first, len(self.rows)).astype(np.int64)
        self.native: Any = None  # state of native.py

    @functools.cached_property
    def by_slot(self) -> "list[tuple[int, slice | torch.Tensor]]":
        """Each group as its slot and its rows, the rows as an index of tensors."""
        result: list[tuple[int, slice | torch.Tensor]] = []
        for slot, first, end in zip(self.slot.tolist(), self.start[:-1], self.start[1:], strict=True):
            rows = self.rows[first:end]
            adjacent = rows[-1] - rows[0] == len(rows) - 1
            result.append((slot, slice(int(rows[0]), int(rows[-1]) + 1) if adjacent else torch.from_numpy(rows)))
        return result
