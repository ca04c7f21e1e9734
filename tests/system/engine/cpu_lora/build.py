"""vLLM's LoRA layers without vLLM's server: weights stacked in vLLM's layout, and batches over them."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA

VOCAB = 20


def layer(slots: int, max_rank: int, inputs: int, sizes: tuple[int, ...], dtype: Any = torch.float32, wrapper: Any = None) -> Any:
    """Return a linear layer, merged if it has several sizes, with vLLM's own way of copying an adapter into a slot.

    Memory that no adapter has written contains garbage until its slot is first used, which must have no effect.
    """
    made = SimpleNamespace(
        n_slices=len(sizes),
        tp_size=1,
        output_slices=sizes,
        punica_wrapper=wrapper,
        lora_a_stacked=tuple(torch.full((slots, 1, max_rank, inputs), float("nan"), dtype=dtype) for _ in sizes),
        lora_b_stacked=tuple(torch.full((slots, 1, size, max_rank), float("nan"), dtype=dtype) for size in sizes),
    )
    kind = BaseLinearLayerWithLoRA if len(sizes) == 1 else MergedColumnParallelLinearWithLoRA
    made.reset_lora = lambda index: kind.reset_lora(made, index)
    made.set_lora = lambda *args: kind.set_lora(made, *args)
    return made


def logits_layer(slots: int, max_rank: int, inputs: int, dtype: Any = torch.float32) -> SimpleNamespace:
    """Return the LoRA weights of an `lm_head`."""
    return SimpleNamespace(
        lora_a_stacked=torch.zeros(slots, 1, max_rank, inputs, dtype=dtype),
        lora_b_stacked=torch.zeros(slots, 1, VOCAB, max_rank, dtype=dtype),
    )


def route(wrapper: Any, rows: list[int], samples: list[int] | None = None, slots: int = 8) -> None:
    """Give the wrapper the slot of each row of the batch (-1: none), as vLLM does before a step. Slot s holds adapter s + 1."""
    mapping = LoRAMapping(*(tuple(slot + 1 for slot in some) for some in (rows, rows if samples is None else samples)), is_prefill=True)
    wrapper.update_metadata(mapping, list(range(1, slots + 1)), slots + 1, VOCAB)
