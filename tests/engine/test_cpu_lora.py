"""LoRA on CPU: each row gets its own adapter at its own rank, or is left alone bit for bit."""

import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmaas.engine import cpu_lora

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)  # torch's own, while vLLM imports it
    pytest.importorskip("vllm")
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper import get_punica_wrapper
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.platforms import current_platform

MAX_RANK, HIDDEN, SIZES, VOCAB = 16, 12, (10, 6, 6), 20


class Slots:
    """The stacked weights as vLLM lays them out, and the dense truth. What no adapter wrote is garbage, which must not matter."""

    def __init__(self, count: int, rank_major: bool) -> None:
        self.ids: list[int | None] = [None] * count
        self.a = [torch.full((count, 1, MAX_RANK, HIDDEN), float("nan")) for _ in SIZES]
        self.b = [torch.full((count, 1, size, MAX_RANK), 1e6) for size in SIZES]
        self.logits_b = torch.full((count, 1, VOCAB, MAX_RANK), 1e6)
        if rank_major:
            self.b = [cpu_lora._rank_major(b) for b in self.b]
        self.next_id = 1

    def load(self, wrapper: Any, slot: int, rank: int, adapted: list[bool]) -> None:
        self.ids[slot], self.next_id = self.next_id, self.next_id + 1
        for a, b, present in zip(self.a, self.b, adapted, strict=True):
            a[slot, 0, :rank] = torch.randn(rank, HIDDEN) * present
            b[slot, 0, :, :rank] = torch.randn(b.shape[2], rank) * present
        self.logits_b[slot, 0, :, :rank] = torch.randn(VOCAB, rank)
        wrapper.note_rank(self.ids[slot], rank)

    def delta(self, a: Any, b: Any, x: Any, slot: int, rank: int) -> Any:
        return b[slot, 0, :, :rank] @ (a[slot, 0, :rank] @ x)


def new_wrapper(kind: Any) -> Any:
    return kind(256, 64, "cpu")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_row_gets_its_own_adapter_or_none(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    wrapper = new_wrapper(cpu_lora.IsolatedPunicaWrapper)
    count = data.draw(st.integers(1, 5))
    slots = Slots(count, rank_major=data.draw(st.booleans()))
    ranks: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 3))):  # each round loads into some slots, also such that are taken
        for slot in data.draw(st.sets(st.integers(0, count - 1), min_size=0 if ranks else 1)):
            ranks[slot] = data.draw(st.integers(1, MAX_RANK))
            slots.load(wrapper, slot, ranks[slot], data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
        requests = data.draw(st.lists(st.tuples(st.sampled_from([-1, *ranks]), st.integers(1, 6)), min_size=1, max_size=10))
        rows, samples = [s for s, n in requests for _ in range(n)], [s for s, _ in requests]
        as_ids = [tuple(slots.ids[s] if s >= 0 else 0 for s in some) for some in (rows, samples)]
        wrapper.update_metadata(LoRAMapping(*as_ids, is_prefill=data.draw(st.booleans())), slots.ids, count + 1, VOCAB)
        together = data.draw(st.sampled_from([None, True, False]))
        if together is not None and sum(s >= 0 for s in set(rows)) > 1:
            wrapper._route("token", len(rows), MAX_RANK).together = together
        check_layers(wrapper, slots, ranks, rows, samples)


def check_layers(wrapper: Any, slots: Slots, ranks: dict[int, int], rows: list[int], samples: list[int]) -> None:
    n = len(rows)
    x, base = torch.randn(n, HIDDEN), torch.randn(n, sum(SIZES))
    dense = base.clone()
    for i, slot in enumerate(rows):
        if slot >= 0:
            dense[i] += torch.cat([slots.delta(a, b, x[i], slot, ranks[slot]) for a, b in zip(slots.a, slots.b, strict=True)])

    y = base.clone()
    wrapper.add_lora_linear(y, x, tuple(slots.a), tuple(slots.b), 1.0, SIZES)
    same(y, dense, base, rows)

    y, buffer = base.clone(), torch.randn(3, n, MAX_RANK)  # in two steps, as fully sharded layers do
    wrapper.add_shrink(buffer, x, tuple(slots.a), 0.5)
    wrapper.add_expand(y, buffer * 2, tuple(slots.b), SIZES)
    same(y, dense, base, rows)

    y = base.clone()
    wrapper.add_lora_linear(y, x, tuple(slots.a), tuple(slots.b), 1.0, SIZES, buffer=buffer)
    same(y, dense, base, rows)

    h, y, first = torch.randn(n, MAX_RANK), base[:, : SIZES[0]].clone(), slots.b[0]
    wrapper.add_lora_embedding(y, h, first)
    own = [first[s, 0, :, : ranks[s]] @ h[i, : ranks[s]] if s >= 0 else torch.zeros(SIZES[0]) for i, s in enumerate(rows)]
    same(y, base[:, : SIZES[0]] + torch.stack(own), base, rows)

    hidden, logits = torch.randn(len(samples), HIDDEN), torch.randn(len(samples), VOCAB + 4)  # vLLM pads the vocabulary
    expected = logits.clone()
    for i, slot in enumerate(samples):
        if slot >= 0:
            expected[i, :VOCAB] += slots.delta(slots.a[0], slots.logits_b, hidden[i], slot, ranks[slot])
    y = logits.clone()
    wrapper.add_lora_logits(y, hidden, slots.a[0], slots.logits_b, 1.0)
    same(y, expected, logits, samples)


def same(y: Any, dense: Any, base: Any, rows: list[int]) -> None:
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-4)
    for i, slot in enumerate(rows):
        if slot < 0:
            assert torch.equal(y[i], base[i, : y.shape[1]])


def test_overflow_in_one_adapter_stays_in_its_rows() -> None:
    wrapper, slots = new_wrapper(cpu_lora.IsolatedPunicaWrapper), Slots(2, rank_major=True)
    for slot in (0, 1):
        slots.load(wrapper, slot, 4, [True] * 3)
    slots.a[0][0] = 3e38
    wrapper.update_metadata(LoRAMapping((1, 2, 0), (1, 2, 0), is_prefill=True), slots.ids, 3, VOCAB)
    assert wrapper._route("token", 3, MAX_RANK).together
    y = torch.zeros(3, sum(SIZES))
    wrapper.add_lora_linear(y, torch.full((3, HIDDEN), 10.0), tuple(slots.a), tuple(slots.b), 1.0, SIZES)
    assert not y[0].isfinite().all()
    assert y[1:].isfinite().all()


def test_rows_that_do_not_match_the_routing_are_refused() -> None:
    wrapper, slots = new_wrapper(cpu_lora.IsolatedPunicaWrapper), Slots(1, rank_major=True)
    slots.load(wrapper, 0, 4, [True] * 3)
    wrapper.update_metadata(LoRAMapping((1, 0), (1, 0), is_prefill=True), slots.ids, 2, VOCAB)
    with pytest.raises(RuntimeError, match="2 token rows"):
        wrapper.add_lora_linear(torch.zeros(3, sum(SIZES)), torch.zeros(3, HIDDEN), tuple(slots.a), tuple(slots.b), 1.0, SIZES)


def adapter(adapter_id: int, rank: int, value: float = 1.0) -> LoRAModel:
    layer = LoRALayerWeights("layer", rank, rank, torch.full((rank, HIDDEN), value), torch.full((SIZES[0], rank), value))
    return LoRAModel(adapter_id, rank, {"layer": layer})


def test_activation_tells_the_wrapper_the_true_rank_and_reuses_slots() -> None:
    wrapper = new_wrapper(cpu_lora.IsolatedPunicaWrapper)
    layer = SimpleNamespace(
        n_slices=1,
        tp_size=1,
        lora_a_stacked=(torch.zeros(1, 1, MAX_RANK, HIDDEN),),
        lora_b_stacked=(torch.zeros(1, 1, SIZES[0], MAX_RANK),),
    )
    layer.reset_lora = lambda index: BaseLinearLayerWithLoRA.reset_lora(layer, index)
    layer.set_lora = lambda *args: BaseLinearLayerWithLoRA.set_lora(layer, *args)
    adapters = {1: adapter(1, 16), 2: adapter(2, 2), 3: adapter(3, 4, float("inf"))}
    manager = SimpleNamespace(
        _active_adapters={}, lora_index_to_id=[None], _registered_adapters=adapters, modules={"layer": layer},
        punica_wrapper_mapping={"language_model": wrapper}, _get_lora_layer_weights=lambda model, name: model.loras.get(name),
    )  # fmt: skip
    for adapter_id, rank in ((1, 16), (2, 2)):
        manager.lora_index_to_id, manager._active_adapters = [None], {}  # evicted
        assert LoRAModelManager.activate_adapter(manager, adapter_id)
        wrapper.update_metadata(LoRAMapping((adapter_id, 0), (adapter_id, 0), is_prefill=True), manager.lora_index_to_id, 2, VOCAB)
        y = torch.zeros(2, SIZES[0])
        wrapper.add_lora_linear(y, torch.ones(2, HIDDEN), layer.lora_a_stacked, layer.lora_b_stacked, 1.0, (SIZES[0],))
        assert y.tolist() == [[rank * HIDDEN] * SIZES[0], [0] * SIZES[0]]
        assert wrapper._route("token", 2, MAX_RANK).rank == {0: rank}
    manager.lora_index_to_id, manager._active_adapters = [None], {}
    with pytest.raises(ValueError, match="not finite"):
        LoRAModelManager.activate_adapter(manager, 3)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = type(current_platform)
    monkeypatch.setattr(platform, "get_punica_wrapper", vars(platform)["get_punica_wrapper"])  # put back afterwards
    cpu_lora.register()


@pytest.mark.usefixtures("registered")
def test_vllm_builds_the_corrected_wrapper() -> None:
    assert type(get_punica_wrapper(64, max_batches=4, device="cpu")) is cpu_lora.IsolatedPunicaWrapper


@pytest.mark.usefixtures("registered")
def test_an_unknown_vllm_is_refused_where_lora_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    monkeypatch.delenv(cpu_lora.OVERRIDE, raising=False)
    with pytest.raises(cpu_lora.UnknownVllmError, match=r"vLLM 0\.32\.0, this is 0\.99\.0"):
        get_punica_wrapper(64, max_batches=4, device="cpu")

    records: list[logging.LogRecord] = []
    monkeypatch.setattr(cpu_lora.logger, "handle", records.append)
    monkeypatch.setenv(cpu_lora.OVERRIDE, "1")
    assert type(get_punica_wrapper(64, max_batches=4, device="cpu")) is cpu_lora.IsolatedPunicaWrapper
    assert records[0].levelno == logging.WARNING


def test_stock_vllm_still_gives_rows_without_an_adapter_the_last_slot() -> None:
    wrapper, a, b = new_wrapper(PunicaWrapperCPU), torch.zeros(2, 1, MAX_RANK, HIDDEN), torch.zeros(2, 1, SIZES[0], MAX_RANK)
    a[1], b[1] = 1.0, 1.0
    wrapper.update_metadata(LoRAMapping((1, 0), (1, 0), is_prefill=True), [1, 2], 3, VOCAB)
    y = torch.zeros(2, SIZES[0])
    wrapper.add_lora_linear(y, torch.ones(2, HIDDEN), (a,), (b,), 1.0, (SIZES[0],))
    assert y[1].any(), "vLLM fixed the leak (vllm#48421, #49656): lmaas/engine/cpu_lora.py is not needed for correctness any more"
