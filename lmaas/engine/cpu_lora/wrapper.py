"""The replacement for vLLM's LoRA wrapper class on CPUs."""

from collections.abc import Callable
from typing import Any

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from lmaas.engine.cpu_lora import fallback, native
from lmaas.engine.cpu_lora.layer import StackedLoRA
from lmaas.engine.cpu_lora.plugin import ACTIVE_MARK, logger
from lmaas.engine.cpu_lora.rows import Groups


class IsolatedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]  # mypy does not follow vLLM
    """vLLM's CPU wrapper, corrected so that each row uses its own adapter or none.

    Stock vLLM (`lora/ops/torch_ops/lora_ops.py`) indexes the stacked weights with -1 for rows without an adapter, and -1 is the last slot.
    Adapters of tenants are thus applied to other tenants' rows and to the base model's (vllm#48421, #49656). Inherited: the metadata, and
    `apply_lora_full_linear`, which masks rows without an adapter itself. The signatures are vLLM's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kernel = native.load()
        logger.info("%s: every token gets its own adapter or none (%s)", ACTIVE_MARK, self._kernel or "torch's matrix products, slower")
        self._layers: dict[int, StackedLoRA] = {}  # by id of the B that vLLM passes, which the layer keeps alive
        self._groups: dict[object, Groups] = {}
        #: The rows of the step whose logits are being computed, if they are not the sampled rows. Set by hooks.py.
        self.prompt_rows: slice | None = None

    def prepare(self, module: Any) -> None:
        """Prepare the weights of one of vLLM's LoRA layers, once, before any adapter is copied into them."""
        if id(getattr(module, "lora_b_stacked", None)) not in self._layers and (layer := StackedLoRA.of(module)):
            self._layers[id(module.lora_b_stacked)] = layer
            if len(layer.b) == 1:  # classification heads pass the tensor in the tuple
                self._layers[id(layer.b[0])] = layer

    def emptied(self, slot: int) -> None:
        """Record that a slot no longer holds an adapter. Rows with this slot are left unchanged."""
        for layer in self._layers.values():
            layer.activate(slot, None)

    def activated(self, module: Any, slot: int, lora_b: Any) -> None:
        """Record that an adapter's B for this module, or None if it has none, has been copied into a slot."""
        if layer := self._layers.get(id(getattr(module, "lora_b_stacked", None))):
            layer.activate(slot, lora_b)

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._groups.clear()

    def _tokens(self, n: int) -> Groups | None:
        """Return the groups of the step's n rows, or None if no row has an adapter."""
        return self._matching("token", n, lambda: self.token_lora_indices)

    def _samples(self, n: int) -> Groups | None:
        """Return the groups of the n rows whose logits are computed, or None if no row has an adapter."""
        if self.prompt_rows is not None:
            prompt = self.prompt_rows
            return self._matching((prompt.start, prompt.stop), n, lambda: self.token_lora_indices[prompt])
        return self._matching("sampled", n, lambda: self.sampler_indices)

    def _matching(self, key: object, n: int, slots: Callable[[], Any]) -> Groups | None:
        groups = self._groups.get(key)
        if groups is None:
            groups = self._groups[key] = Groups(slots().numpy())
        if not len(groups.rows):
            return None
        if groups.n != n:  # a guess could apply another tenant's adapter to a row
            raise RuntimeError(f"LoRA routing has {groups.n} rows ({key}), the layer has {n}")
        return groups

    def layer_of(self, b: Any) -> StackedLoRA:
        try:
            return self._layers[id(b)]
        except KeyError:
            raise RuntimeError("LoRA weights of a layer that was not there when its adapter was activated") from None

    def _add(self, y: Any, x: Any, layer: StackedLoRA, groups: Groups, scale: float) -> None:
        if self._kernel is not None and self._kernel.takes(y, x, layer):
            self._kernel.add(y, x, layer, groups, scale)
        else:
            fallback.add(y, x, layer, groups, scale)

    def add_lora_linear(
        self, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any,
        *, buffer: Any = None, add_inputs: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        if buffer is not None:
            self.add_shrink(buffer, x, lora_a_stacked, scale, **kwargs)
            self.add_expand(y, buffer, lora_b_stacked, output_slices, add_inputs=add_inputs, **kwargs)
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if not add_inputs:
            y[:, : sum(output_slices)] = 0
        if groups := self._tokens(x.shape[0]):
            self._add(y, x, self.layer_of(lora_b_stacked), groups, scale)

    def add_lora_logits(self, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, **_: Any) -> None:
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if groups := self._samples(x.shape[0]):
            self._add(y, x, self.layer_of(lora_b_stacked), groups, scale)

    # The two steps separately, computed by torch: for embeddings, whose A vLLM looks up itself, and for layers that are sharded between the
    # steps.

    def add_lora_embedding(self, y: Any, x: Any, lora_b_stacked: Any, add_inputs: bool = True, **_: Any) -> None:
        if not add_inputs:
            y[:, : lora_b_stacked.shape[2]] = 0
        if groups := self._tokens(x.shape[0]):
            layer = self.layer_of(lora_b_stacked)
            for slot, rows in groups.by_slot:
                fallback.expand(y, x[rows], layer, 0, slot=slot, rows=rows)

    def add_shrink(self, y: Any, x: Any, lora_a_stacked: Any, scale: float, **_: Any) -> None:
        x = x.view(-1, x.shape[-1])
        groups = self._tokens(x.shape[0])
        for h, a in zip(y, lora_a_stacked, strict=True):
            out = h.view(-1, h.shape[-1])
            out.zero_()
            # Use all ranks of A, because the true ranks are known for B only, and A may be one shard of them.
            for slot, rows in groups.by_slot if groups else ():
                out[rows, : a.shape[2]] = (scale * (x[rows].to(a.dtype) @ a[slot, 0].t())).to(out.dtype)

    def add_expand(
        self, y: Any, x: Any, lora_b_stacked: Any, output_slices: Any, offset_start: int = 0, add_inputs: bool = True, **_: Any
    ) -> None:
        y = y.view(-1, y.shape[-1])
        if not add_inputs:
            y[:, offset_start : offset_start + sum(output_slices)] = 0
        if groups := self._tokens(y.shape[0]):
            layer = self.layer_of(lora_b_stacked)
            for slot, rows in groups.by_slot:
                for i, h in enumerate(x):
                    fallback.expand(y, h[rows], layer, i, slot=slot, rows=rows, offset=offset_start)
