"""The LoRA weights of one layer, as vLLM stacks them by slot, with the true rank of each adapter."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class StackedLoRA:
    """The weights of one layer for all slots. A merged layer (q/k/v, gate/up) has a slice for each of its projections.

    `a[i]` [slots, 1, R, in], `b[i]` [slots, 1, outᵢ, R]. `a` is empty for an embedding, whose A vLLM looks up itself. `rank` [slices,
    slots] is the number of ranks in use, 0 for a projection that the adapter does not change. It may be too large, never too small: vLLM
    fills unused ranks with zeros.
    """

    def __init__(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        self.a = a
        self.b = b
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.widths = [min(size, bi.shape[2]) for size, bi in zip(sizes, b, strict=True)]
        self.rank = np.zeros((len(b), b[0].shape[0]), dtype=np.int64)
        self.highest_rank = 0
        self.native: Any = None  # state of native.py

    @classmethod
    def of(cls, module: Any) -> "StackedLoRA | None":
        """Return the weights of one of vLLM's LoRA layers, or None for another kind of layer. Stores each B rank by rank, see
        `rank_major`."""
        a, b = getattr(module, "lora_a_stacked", None), getattr(module, "lora_b_stacked", None)
        if isinstance(b, torch.Tensor) and b.dim() == 4 and isinstance(a, torch.Tensor):
            module.lora_b_stacked = rank_major(b)
            return cls((a,) if a.dim() == 4 else (), (module.lora_b_stacked,), (b.shape[2],))
        if isinstance(a, tuple) and isinstance(b, tuple) and all(t.dim() == 4 and t.shape[1] == 1 for t in (*a, *b)):
            module.lora_b_stacked = tuple(rank_major(bi) for bi in b)
            return cls(a, module.lora_b_stacked, module.output_slices)
        return None

    def activate(self, slot: int, lora_b: "torch.Tensor | Sequence[torch.Tensor | None] | None") -> None:
        """Record the ranks of the adapter that vLLM has copied into `slot`. `lora_b` is its B, one for each projection, or None for
        none."""
        parts = [lora_b] if lora_b is None or isinstance(lora_b, torch.Tensor) else list(lora_b)
        ranks = [0 if part is None else part.shape[-1] for part in parts]
        # If vLLM splits one B over several projections, they share its rank.
        self.rank[:, slot] = ranks if len(ranks) == len(self.b) else max(ranks)
        np.minimum(self.rank[:, slot], [bi.shape[3] for bi in self.b], out=self.rank[:, slot])
        self.highest_rank = int(self.rank.max())


def rank_major(b: torch.Tensor) -> torch.Tensor:
    """Return `b` [slots, 1, out, R] with `out` as its fastest dimension. The weights of one rank are then adjacent, as the kernels read
    them.

    Shape and contents are unchanged, so vLLM writes through the same indices.
    """
    if b.dim() != 4 or b.shape[1] != 1 or b.stride(2) == 1:
        return b
    result: torch.Tensor = b.transpose(2, 3).contiguous().transpose(2, 3)
    return result
