"""The arithmetic: each row gets its own adapter at its own rank, or stays the same bit for bit, whatever else is in the batch."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmaas.engine.cpu_lora import native
from lmaas.engine.cpu_lora.wrapper import IsolatedPunicaWrapper
from tests.support.effort import tries
from tests.system.engine.cpu_lora.build import VOCAB, layer, logits_layer, route

SIZES = st.sampled_from([(1,), (16,), (37,), (130,), (20, 20), (48, 16, 16), (65, 7, 7)])
# Ranks that fill the kernel's tiles (of 4) and that do not; inputs and sizes that fill vectors (of 16, 8, 4) and that do not.
RANKS, INPUTS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 64]), st.sampled_from([1, 3, 16, 24, 63, 64, 200])
#: Tolerance of bfloat16, whose weights and results have 8 bits: three roundings. Of float32: sums of up to 200 products in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=["compiled 0", "compiled 1", "compiled 2", "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every kernel that this machine can run: the compiled one for each instruction set of the CPU, and torch's."""
    kind, _, choice = request.param.partition(" ")
    if kind == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
        yield kind
        return
    path = native.library()
    if path is None and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler here")
    assert path is not None, "install lmaas again: its kernel is missing or out of date"
    try:
        chosen = native.NativeKernel(str(path), int(choice))
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(native, "load", lambda: chosen)
    yield kind
    native.NativeKernel(str(path))  # the best one again


def new_wrapper() -> Any:
    return IsolatedPunicaWrapper(4096, 256, "cpu")


class Layer:
    """One layer with adapters in some of its slots, and the dense reference for them in float64."""

    def __init__(self, wrapper: Any, slots: int, max_rank: int, inputs: int, sizes: tuple[int, ...], dtype: Any) -> None:
        self.module = layer(slots, max_rank, inputs, sizes, dtype, wrapper)
        self.inputs, self.sizes, self.dtype = inputs, sizes, dtype
        self.delta: dict[int, Any] = {-1: torch.zeros(sum(sizes), inputs, dtype=torch.float64)}
        wrapper.prepare(self.module)

    def load(self, slot: int, ranks: list[int]) -> None:
        """Put an adapter into a slot, which may be taken. Rank 0 leaves that projection unchanged."""
        a: list[Any] = [torch.randn(rank, self.inputs).to(self.dtype) if rank else None for rank in ranks]
        b: list[Any] = [
            (torch.randn(n, rank) / rank**0.5).to(self.dtype) if rank else None for rank, n in zip(ranks, self.sizes, strict=True)
        ]
        if any(ranks):
            self.module.set_lora(slot, *((a[0], b[0]) if len(a) == 1 else (a, b)))
            self.module.punica_wrapper.activated(self.module, slot, b[0] if len(b) == 1 else b)
        else:
            self.module.reset_lora(slot)
            self.module.punica_wrapper.activated(self.module, slot, None)
        none = [torch.zeros(size, self.inputs) for size in self.sizes]
        dense = [zeros if ai is None else bi.double() @ ai.double() for ai, bi, zeros in zip(a, b, none, strict=True)]
        self.delta[slot] = torch.cat([part.double() for part in dense])

    def add(self, y: Any, x: Any, **options: Any) -> Any:
        """Return the result of vLLM's call; `y` stays unchanged."""
        y = y.clone()
        m = self.module
        m.punica_wrapper.add_lora_linear(y, x, m.lora_a_stacked, m.lora_b_stacked, 1.0, m.output_slices, **options)
        return y

    def check(self, got: Any, y: Any, x: Any, rows: list[int]) -> None:
        """Compare with the reference, relative to the size of the computed sums."""
        for i, slot in enumerate(rows):
            if slot < 0:
                assert torch.equal(got[i], y[i])
                continue
            expected = y[i].double() + self.delta[slot] @ x[i].double()
            size = 1 + y[i].double().abs() + self.delta[slot].abs() @ x[i].double().abs()
            assert ((got[i].double() - expected).abs() / size).max() < TOLERANCE[self.dtype]


@settings(max_examples=tries(200), deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_row_gets_its_own_adapter_or_none(kernel: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    slots, sizes = data.draw(st.integers(1, 8)), data.draw(SIZES)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    wrapper = new_wrapper()
    tested = Layer(wrapper, slots, 64, data.draw(INPUTS), sizes, dtype)
    for _ in range(data.draw(st.integers(1, 3))):  # each round loads into some slots, some of which are taken
        for slot in data.draw(st.sets(st.integers(0, slots - 1), min_size=0 if len(tested.delta) > 1 else 1)):
            tested.load(slot, [data.draw(st.one_of(RANKS, st.just(0))) for _ in sizes])
        requests = data.draw(st.lists(st.tuples(st.sampled_from(list(tested.delta)), st.integers(1, 70)), min_size=1, max_size=10))
        rows = [slot for slot, length in requests for _ in range(length)]
        route(wrapper, rows, slots=slots)
        x, y = torch.randn(len(rows), tested.inputs).to(dtype), torch.randn(len(rows), sum(sizes)).to(dtype)
        got = tested.add(y, x)
        tested.check(got, y, x, rows)
        assert torch.equal(tested.add(y, x), got)
        if kernel == "compiled":  # torch's products may add in an order that depends on the number of rows
            at = data.draw(st.integers(0, len(rows) - 1))
            route(wrapper, [rows[at]], slots=slots)
            assert torch.equal(tested.add(y[at : at + 1], x[at : at + 1])[0], got[at]), "a result depends on the other rows"


@pytest.mark.usefixtures("kernel")
def test_rows_that_are_views_and_rows_in_two_steps_and_replaced_rows() -> None:
    wrapper = new_wrapper()
    tested, rows = Layer(wrapper, 3, 16, 24, (40, 8), torch.float32), [0, -1, 2, 2, 0]
    tested.load(0, [16, 5])
    tested.load(2, [0, 3])
    route(wrapper, rows)
    x, y = torch.randn(5, 60)[:, 7:31], torch.randn(5, 100)[:, 50:98]
    tested.check(tested.add(y, x), y, x, rows)
    tested.check(tested.add(y, x, add_inputs=False), torch.zeros_like(y), x, rows)
    tested.check(tested.add(y, x, buffer=torch.randn(2, 5, 16)), y, x, rows)
    column = torch.randn(24, 5).t()  # not contiguous
    tested.check(tested.add(y, column), y, column, rows)


@pytest.mark.usefixtures("kernel")
def test_other_types_than_the_compiled_kernel_knows() -> None:
    wrapper = new_wrapper()
    tested = Layer(wrapper, 2, 8, 24, (40,), torch.float32)
    tested.load(1, [8])
    route(wrapper, [1, -1])
    x, y = torch.randn(2, 24).to(torch.float16), torch.randn(2, 40)
    tested.check(tested.add(y, x), y, x, [1, -1])


@pytest.mark.usefixtures("kernel")
def test_overflow_in_one_adapter_stays_in_its_rows() -> None:
    wrapper = new_wrapper()
    tested = Layer(wrapper, 2, 8, 32, (64,), torch.float32)
    for slot in (0, 1):
        tested.load(slot, [8])
    tested.module.lora_a_stacked[0][0] = 3e38
    rows = [0, 1, 0, -1, 1]
    route(wrapper, rows)
    x, y = torch.full((5, 32), 10.0), torch.zeros(5, 64)
    got = tested.add(y, x)
    assert [bool(row.isfinite().all()) for row in got] == [False, True, False, True, True]


@pytest.mark.usefixtures("kernel")
def test_bfloat16_results_that_are_no_number_stay_so() -> None:
    wrapper = new_wrapper()
    tested = Layer(wrapper, 1, 8, 32, (64,), torch.bfloat16)
    tested.load(0, [8])
    route(wrapper, [0, 0])
    y = torch.zeros(2, 64, dtype=torch.bfloat16)
    y[0, :40], y[1, 60] = float("nan"), float("inf")
    got = tested.add(y, torch.ones(2, 32, dtype=torch.bfloat16))
    assert torch.equal(got.isnan(), y.isnan())
    assert torch.equal(got.isinf(), y.isinf())


@pytest.mark.usefixtures("kernel")
def test_logits_of_sampled_rows_and_of_a_prompt() -> None:
    wrapper, module = new_wrapper(), logits_layer(2, 8, 24)
    wrapper.prepare(module)
    for slot in (0, 1):
        module.lora_a_stacked[slot, 0, :4], module.lora_b_stacked[slot, 0, :, :4] = torch.randn(4, 24), torch.randn(VOCAB, 4)
        wrapper.activated(module, slot, module.lora_b_stacked[slot, 0, :, :4])

    def check(samples: list[int]) -> None:
        x, y = torch.randn(len(samples), 24), torch.randn(len(samples), VOCAB + 4)  # vLLM pads the vocabulary
        got = y.clone()
        wrapper.add_lora_logits(got, x, module.lora_a_stacked, module.lora_b_stacked, 1.0)
        for i, slot in enumerate(samples):
            delta = torch.zeros(VOCAB) if slot < 0 else module.lora_b_stacked[slot, 0] @ (module.lora_a_stacked[slot, 0] @ x[i])
            torch.testing.assert_close(got[i, :VOCAB], y[i, :VOCAB] + delta, rtol=1e-4, atol=1e-4)
            assert torch.equal(got[i, VOCAB:], y[i, VOCAB:])

    route(wrapper, [0, 0, 0, -1, 1, 1], [0, -1, 1])
    check([0, -1, 1])
    wrapper.prompt_rows = slice(3, 6)  # as many rows as there are requests, and others
    check([-1, 1, 1])
    wrapper.prompt_rows = None
    check([0, -1, 1])


@pytest.mark.usefixtures("kernel")
def test_classification_heads() -> None:
    wrapper = new_wrapper()
    head = layer(2, 8, 24, (3,))
    for stacked in (*head.lora_a_stacked, *head.lora_b_stacked):
        stacked.zero_()
    wrapper.prepare(head)
    head.lora_a_stacked[0][1, 0, :2], head.lora_b_stacked[0][1, 0, :, :2] = torch.randn(2, 24), torch.randn(3, 2)
    wrapper.activated(head, 1, head.lora_b_stacked[0][1, 0, :, :2])
    route(wrapper, [1, -1], slots=2)
    x, y = torch.randn(2, 24), torch.randn(2, 3)
    got = y.clone()
    wrapper.add_lora_logits(got, x, head.lora_a_stacked[0], head.lora_b_stacked[0], 1.0)  # as vLLM's classification head does
    delta = head.lora_b_stacked[0][1, 0] @ (head.lora_a_stacked[0][1, 0] @ x[0])
    torch.testing.assert_close(got[0], y[0] + delta, rtol=1e-4, atol=1e-4)
    assert torch.equal(got[1], y[1])


@pytest.mark.usefixtures("kernel")
def test_embeddings() -> None:
    wrapper = new_wrapper()
    a, b = torch.zeros(2, VOCAB, 8), torch.zeros(2, 1, 24, 8)
    b[1, 0, :, :3] = torch.randn(24, 3)
    module: Any = type("Embedding", (), {"lora_a_stacked": a, "lora_b_stacked": b})
    wrapper.prepare(module)
    wrapper.activated(module, 0, None)
    wrapper.activated(module, 1, b[1, 0, :, :3])
    route(wrapper, [1, -1, 0, 1])
    h, y = torch.randn(4, 8), torch.randn(4, 24)
    got = y.clone()
    wrapper.add_lora_embedding(got, h, module.lora_b_stacked, add_input=True)
    assert torch.equal(got[1:3], y[1:3])
    for i in (0, 3):
        torch.testing.assert_close(got[i], y[i] + b[1, 0, :, :3] @ h[i, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernel")
def test_rows_that_do_not_match_the_routing_are_refused() -> None:
    wrapper = new_wrapper()
    tested = Layer(wrapper, 1, 8, 24, (40,), torch.float32)
    tested.load(0, [8])
    route(wrapper, [0, -1])
    with pytest.raises(RuntimeError, match=r"2 rows \(token\), the layer has 3"):
        tested.add(torch.zeros(3, 40), torch.zeros(3, 24))
    route(wrapper, [-1, 0])
    # Computed by torch: the compiled kernel does not accept them, and would write behind y.
    with pytest.raises(RuntimeError, match=r"shape|size"):
        tested.add(torch.zeros(1, 40), torch.zeros(2, 24))
    route(wrapper, [-1, -1])
    y = torch.ones(3, 40)
    assert torch.equal(tested.add(y, torch.zeros(3, 24)), y)  # rows without an adapter, however many


def test_a_library_that_is_older_than_its_source_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built, source = tmp_path / "_kernel.so", tmp_path / "kernel.cpp"
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: SimpleNamespace(origin=str(built)))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    built.touch()
    assert native.library() == built  # a wheel has no source
    source.touch()
    os.utime(built, (1000, 1000))
    assert native.library() is None
    assert native.load() is None
    os.utime(source, (1000, 1000))
    assert native.library() == built
    assert native.load() is None  # it is not a library


def test_torch_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CHOICE, "torch")
    assert native.load() is None
