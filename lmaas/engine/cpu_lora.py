"""vLLM plugin: LoRA on vLLM's CPU backend computed so that every token gets its own adapter, or none.

Stock vLLM (`lora/ops/torch_ops/lora_ops.py`) indexes the stacked weights with -1 for tokens without an adapter, and -1 is the last
slot: tenants leak into each other and into the base model (vllm#48421, #49656). Here rows are grouped by slot and rows of no
adapter are left alone, bit for bit.

The plugin replaces the class that vLLM's CPU platform names as its "punica wrapper", which is built only when LoRA is on. That is
also where an unknown vLLM is refused: without LoRA this plugin changes nothing.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PATCHED_VERSIONS = frozenset({"0.32.0"})
OVERRIDE = "LMAAS_ALLOW_UNKNOWN_VLLM"
#: In the engine's log when the plugin is active: a supervisor looks for it before its engine gets any work.
ACTIVE_MARK = "lmaas cpu_lora active"

# One GEMM for all adapters wastes multiplications on pairs that are masked; one GEMM per adapter costs calls. A further adapter's calls
# cost about as much as this many wasted (row, rank) pairs: the break-even at hidden size 576 on 2 quiet cores, more on busy ones.
_CALLS_WORTH = 2048

logger = logging.getLogger("vllm.lmaas.cpu_lora")


class UnknownVllmError(RuntimeError):
    """This vLLM was never checked against the replacement, so its LoRA answers on CPU could be another tenant's."""


def register() -> None:
    """Entry point (`vllm.general_plugins`), called by each vLLM process; may be called again. Does nothing except on CPU."""
    from vllm.platforms import current_platform  # noqa: PLC0415 (only inside an engine)

    if current_platform.is_cpu():
        # Asked for by vllm.lora.punica_wrapper.get_punica_wrapper, once per LoRA manager. Raising here stops an engine that would
        # serve LoRA, whatever vLLM does with exceptions of a plugin's function.
        type(current_platform).get_punica_wrapper = classmethod(lambda _cls: wrapper_name())


def wrapper_name() -> str:
    """The qualified name that vLLM imports in place of its own wrapper. Raises UnknownVllmError on a vLLM that was not checked."""
    version = str(importlib.import_module("vllm").__version__)
    if version.partition("+")[0] not in PATCHED_VERSIONS:
        known = ", ".join(sorted(PATCHED_VERSIONS))
        if os.environ.get(OVERRIDE) != "1":
            raise UnknownVllmError(
                f"LoRA on CPU is refused: lmaas corrects it in vLLM {known}, this is {version}. Stock vLLM gives tokens another "
                f"tenant's adapter on CPU. Install a known version, turn LoRA off, or set {OVERRIDE}=1 after checking."
            )
        logger.warning("%s=1: correcting LoRA on CPU in vLLM %s, which was not checked (known: %s)", OVERRIDE, version, known)
    logger.info("%s: on vLLM %s every token gets its own adapter or none", ACTIVE_MARK, version)
    return f"{__name__}.IsolatedPunicaWrapper"


def __getattr__(name: str) -> Any:
    # The class can only be made where vLLM is imported; importing this module must not import vLLM.
    if name == "IsolatedPunicaWrapper":
        return _wrapper_class()
    raise AttributeError(name)


class Routing:
    """Which rows of a batch belong to which slot. `slots` [n]: slot of each row, -1 for none. `ranks`: true rank by slot."""

    def __init__(self, slots: "Tensor", ranks: Sequence[int]) -> None:
        self.slots = slots
        rows: dict[int, list[int]] = {}
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                rows.setdefault(slot, []).append(row)
        self.rank = {slot: ranks[slot] for slot in sorted(rows) if ranks[slot]}
        self.rows: dict[int, slice | Tensor] = {
            slot: slice(at[0], at[-1] + 1) if at[-1] - at[0] == len(at) - 1 else slots.new_tensor(at)
            for slot, at in sorted(rows.items())
            if ranks[slot]
        }
        useful = sum(len(rows[slot]) * rank for slot, rank in self.rank.items())
        wasted = len(slots) * sum(self.rank.values()) - useful
        self.together = len(self.rank) > 1 and wasted <= _CALLS_WORTH * (len(self.rank) - 1)

    @functools.cached_property
    def _columns(self) -> "tuple[list[int], list[int]]":
        """(slot, index within the slot) of every column of the combined GEMM, as two lists."""
        return [s for s, r in self.rank.items() for _ in range(r)], [i for r in self.rank.values() for i in range(r)]

    @functools.cached_property
    def foreign(self) -> "Tensor":
        """[n, K] bool: true where the row does not own the column."""
        result: Tensor = self.slots[:, None] != self.slots.new_tensor(self._columns[0])
        return result

    def columns(self, max_rank: int) -> "Tensor":
        """[K] indices into weights flattened to [slots * max_rank, …]. Cached for the one max_rank that an engine has."""
        if getattr(self, "_columns_for", None) != max_rank:
            self._columns_for = max_rank
            self._column_index: Tensor = self.slots.new_tensor([s * max_rank + i for s, i in zip(*self._columns, strict=True)])
        return self._column_index


def add_lora(
    y: "Tensor", x: "Tensor", a: Sequence["Tensor"], b: Sequence["Tensor"], *, sizes: Sequence[int], scale: float, route: Routing
) -> None:
    """`y[row, slice i] += scale · x[row] @ Aᵢ[slot].T @ Bᵢ[slot].T` in place, for the rows that have a slot, at that slot's true rank.

    y [n, Σ sizes], x [n, in], Aᵢ [slots, 1, R, in], Bᵢ [slots, 1, outᵢ, R]. A slice takes min(size, outᵢ) columns.
    """
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    widths = [min(size, bi.shape[2], y.shape[1] - at) for size, bi, at in zip(sizes, b, offsets, strict=True)]
    x = x.to(a[0].dtype)
    if route.together and all(ai.shape[2] == bi.shape[3] for ai, bi in zip(a, b, strict=True)):
        columns = route.columns(b[0].shape[3])
        for ai, bi, at, width in zip(a, b, offsets, widths, strict=True):
            h = x @ ai.flatten(0, 2).index_select(0, columns).t()
            h.masked_fill_(route.foreign, 0.0)  # not a product with a mask: another adapter's overflow must not become NaN here
            _accumulate(y[:, at : at + width], h, bi.permute(0, 3, 1, 2).flatten(0, 2).index_select(0, columns)[:, :width], scale)
        return
    for slot, rows in route.rows.items():
        rank, mine = route.rank[slot], x[rows]
        for ai, bi, at, width in zip(a, b, offsets, widths, strict=True):
            h = mine @ ai[slot, 0, :rank].t()
            expand(y, h, bi, slot=slot, rows=rows, rank=rank, at=at, width=width, scale=scale)


def expand(
    y: "Tensor", h: "Tensor", b: "Tensor", *, slot: int, rows: "slice | Tensor", rank: int, at: int, width: int, scale: float = 1.0
) -> None:
    """`y[rows, at : at + width] += scale · h @ B[slot].T` in place. h has one line per row of `rows`, its first `rank` columns count."""
    weights = b[slot, 0, :width, :rank].t()
    target = y[:, at : at + width]
    if isinstance(rows, slice):
        _accumulate(target[rows], h[:, :rank], weights, scale)
    else:
        target.index_add_(0, rows, h[:, :rank].to(y.dtype) @ weights.to(y.dtype), alpha=scale)


def _accumulate(y: "Tensor", h: "Tensor", weights: "Tensor", scale: float) -> None:
    y.addmm_(h.to(y.dtype), weights.to(y.dtype), alpha=scale)


@functools.cache
def _wrapper_class() -> type:
    # Here for the same reason as above; vLLM has no types that mypy could follow.
    from vllm.lora.model_manager import LoRAModelManager  # noqa: PLC0415 (only inside an engine)
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: PLC0415 (only inside an engine)

    class IsolatedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
        """vLLM's CPU wrapper with every path to the torch ops replaced. Inherited: the metadata, and `apply_lora_full_linear`, which
        masks rows without an adapter itself.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._true_rank: dict[int, int] = {}  # by adapter id; an id that is not here counts at max_rank
            self._slot_ids: tuple[int | None, ...] = ()
            self._routes: dict[tuple[str, int], Routing] = {}

        def note_rank(self, adapter_id: int, rank: int) -> None:
            """Called when an adapter has been copied into a slot."""
            self._true_rank[adapter_id] = rank
            self._routes.clear()

        def update_metadata(self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any) -> None:
            super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
            self._slot_ids = tuple(lora_index_to_id)
            self._routes.clear()

        def _route(self, kind: str, n: int, max_rank: int) -> Routing:
            key = (kind, max_rank)
            if key not in self._routes:
                slots = self.token_lora_indices if kind == "token" else self.sampler_indices
                ranks = [min(self._true_rank.get(i, max_rank), max_rank) if i is not None else max_rank for i in self._slot_ids]
                self._routes[key] = Routing(slots, ranks)
            route = self._routes[key]
            if len(route.slots) == n:
                return route
            if kind == "sampler" and len(route.slots) == 1:  # one request, several positions (prompt logprobs)
                ranks = [route.rank.get(slot, 0) for slot in range(len(self._slot_ids))]
                return Routing(route.slots.expand(n), ranks)
            # Guessing here could hand a row to the wrong tenant.
            raise RuntimeError(f"LoRA routing has {len(route.slots)} {kind} rows, the layer has {n}")

        # The signatures below are vLLM's.
        def add_shrink(self, y: Any, x: Any, lora_a_stacked: Any, scale: float, **_: Any) -> None:
            x = x.view(-1, x.shape[-1])
            route = self._route("token", x.shape[0], max(a.shape[2] for a in lora_a_stacked))
            for i, a in enumerate(lora_a_stacked):
                out = y[i].view(-1, y[i].shape[-1])
                out.zero_()
                for slot, rows in route.rows.items():
                    rank = min(route.rank[slot], a.shape[2])
                    out[rows, :rank] = (scale * (x[rows].to(a.dtype) @ a[slot, 0, :rank].t())).to(out.dtype)

        def add_expand(
            self, y: Any, x: Any, lora_b_stacked: Any, output_slices: Any, offset_start: int = 0, add_inputs: bool = True, **_: Any
        ) -> None:
            y = y.view(-1, y.shape[-1])
            at = offset_start
            for h, b, size in zip(x, lora_b_stacked, output_slices, strict=True):
                self._expand(y, h, b, at=at, width=min(size, b.shape[2]), add_inputs=add_inputs)
                at += size

        def add_lora_embedding(self, y: Any, x: Any, lora_b_stacked: Any, add_inputs: bool = True, **_: Any) -> None:
            self._expand(y, x, lora_b_stacked, at=0, width=min(lora_b_stacked.shape[2], y.shape[1]), add_inputs=add_inputs)

        def _expand(self, y: Any, h: Any, b: Any, *, at: int, width: int, add_inputs: bool) -> None:
            if not add_inputs:
                y[:, at : at + width] = 0
            route = self._route("token", h.shape[0], b.shape[3])
            for slot, rows in route.rows.items():
                expand(y, h[rows], b, slot=slot, rows=rows, rank=route.rank[slot], at=at, width=width)

        def add_lora_linear(
            self,
            y: Any,
            x: Any,
            lora_a_stacked: Any,
            lora_b_stacked: Any,
            scale: float,
            output_slices: Any,
            *,
            buffer: Any = None,
            add_inputs: bool = True,
            **kwargs: Any,
        ) -> None:
            if buffer is not None:
                self.add_shrink(buffer, x, lora_a_stacked, scale, **kwargs)
                self.add_expand(y, buffer, lora_b_stacked, output_slices, add_inputs=add_inputs, **kwargs)
                return
            y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
            if not add_inputs:
                y[:, : sum(output_slices)] = 0
            route = self._route("token", x.shape[0], lora_b_stacked[0].shape[3])
            add_lora(y, x, lora_a_stacked, lora_b_stacked, sizes=output_slices, scale=scale, route=route)

        def add_lora_logits(self, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, **_: Any) -> None:
            y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
            route = self._route("sampler", x.shape[0], lora_b_stacked.shape[3])
            add_lora(y, x, (lora_a_stacked,), (lora_b_stacked,), sizes=(lora_b_stacked.shape[2],), scale=scale, route=route)

    original: Callable[[Any, int], bool] = LoRAModelManager.activate_adapter

    def activate_adapter(self: Any, lora_id: int) -> bool:
        prepare_layers(self.modules.values())
        activated = original(self, lora_id)
        if activated:
            rank = true_rank(self._registered_adapters[lora_id].loras.values())
            for wrapper in self.punica_wrapper_mapping.values():
                wrapper.note_rank(lora_id, rank)
        return activated

    LoRAModelManager.activate_adapter = activate_adapter
    return IsolatedPunicaWrapper


def true_rank(layers: Any) -> int:
    """The largest rank among an adapter's tensors (not its declared rank). Raises ValueError on weights that are not finite: in a shared
    GEMM they would spoil other tenants' rows."""
    rank = 0
    for layer in layers:
        for b in layer.lora_b if isinstance(layer.lora_b, list) else [layer.lora_b]:
            if b is not None:
                if not b.sum(dtype=b.dtype).isfinite() and not b.isfinite().all():
                    raise ValueError("LoRA weights are not finite")
                rank = max(rank, b.shape[-1])
    return rank


def prepare_layers(layers: Any) -> None:
    """Store each B [slots, 1, out, R] with `out` as the fastest dimension, so that the slots' ranks are rows that one GEMM can take without
    a transposing copy. Shape and contents stay; vLLM writes through the same indices."""
    for layer in layers:
        stacked = getattr(layer, "lora_b_stacked", None)
        if isinstance(stacked, tuple):
            layer.lora_b_stacked = tuple(_rank_major(b) for b in stacked)
        elif stacked is not None and not isinstance(stacked, list):
            layer.lora_b_stacked = _rank_major(stacked)


def _rank_major(b: "Tensor") -> "Tensor":
    if b.dim() != 4 or b.shape[1] != 1 or b.stride(2) == 1:
        return b
    result: Tensor = b.transpose(2, 3).contiguous().transpose(2, 3)
    return result
