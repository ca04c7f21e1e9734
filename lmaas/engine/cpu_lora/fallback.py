"""The LoRA arithmetic with torch's matrix products, one adapter after the other, for layers and machines without a compiled kernel."""

import torch

from lmaas.engine.cpu_lora.layer import StackedLoRA
from lmaas.engine.cpu_lora.rows import Groups


def add(y: torch.Tensor, x: torch.Tensor, layer: StackedLoRA, groups: Groups, scale: float) -> None:
    """`y[row, slice i] += scale · x[row] @ Aᵢ[slot].T @ Bᵢ[slot].T` in place, for the rows that have a slot, at that slot's true rank.

    y [n, out], x [n, in]. Rows without a slot stay as they are, bit for bit.
    """
    for slot, rows in groups.by_slot:
        mine = x[rows].to(layer.a[0].dtype)
        for i, (a, rank) in enumerate(zip(layer.a, layer.rank[:, slot].tolist(), strict=True)):
            if rank:
                expand(y, mine @ a[slot, 0, :rank].t(), layer, i, slot=slot, rows=rows, scale=scale)


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    layer: StackedLoRA,
    i: int,
    *,
    slot: int,
    rows: "slice | torch.Tensor",
    offset: int = 0,
    scale: float = 1,
) -> None:
    """`y[rows, slice i] += scale · h @ Bᵢ[slot].T` in place. h [rows, ≥ rank]; the slices begin at column `offset`."""
    rank, at = int(layer.rank[i, slot]), offset + layer.offsets[i]
    if not rank:
        return
    width = min(layer.widths[i], y.shape[1] - at)  # the model may pad its outputs less than vLLM pads B
    h, weights, target = h[:, :rank].to(y.dtype), layer.b[i][slot, 0, :width, :rank].t().to(y.dtype), y[:, at : at + width]
    if isinstance(rows, slice):
        target[rows].addmm_(h, weights, alpha=scale)
    else:
        target.index_add_(0, rows, h @ weights, alpha=scale)
