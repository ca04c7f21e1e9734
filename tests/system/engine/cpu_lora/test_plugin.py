"""The plugin in vLLM: how it is loaded, when it refuses, and the defect of stock vLLM that it corrects."""

# ruff: noqa: SLF001 (the hooks change vLLM's own methods, which begin with an underscore)

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper import get_punica_wrapper
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from lmaas.engine.cpu_lora import hooks, plugin
from lmaas.engine.cpu_lora.wrapper import IsolatedPunicaWrapper
from tests.system.engine.cpu_lora.build import layer, route

MAX_RANK, HIDDEN, OUT = 16, 12, 10


def adapter(adapter_id: int, rank: int) -> LoRAModel:
    weights = LoRALayerWeights("layer", rank, rank, torch.ones(rank, HIDDEN), torch.ones(OUT, rank))
    return LoRAModel(adapter_id, rank, {"layer": weights})


def test_activation_tells_the_true_rank_and_slots_are_used_again() -> None:
    hooks.install()
    wrapper = IsolatedPunicaWrapper(256, 64, "cpu")
    modules = {name: layer(1, MAX_RANK, HIDDEN, (OUT,), wrapper=wrapper) for name in ("layer", "not_adapted")}
    manager = SimpleNamespace(
        _registered_adapters={1: adapter(1, 16), 2: adapter(2, 2)}, modules=modules, punica_wrapper_mapping={"language_model": wrapper},
        _get_lora_layer_weights=lambda model, name: model.loras.get(name),
    )  # fmt: skip
    for adapter_id, rank in ((1, 16), (2, 2)):
        manager.lora_index_to_id, manager._active_adapters = [None], {}  # the one before was evicted
        assert LoRAModelManager.activate_adapter(manager, adapter_id)
        assert not LoRAModelManager.activate_adapter(manager, adapter_id)
        route(wrapper, [0, -1], slots=1)
        for name, expected in (("layer", rank * HIDDEN), ("not_adapted", 0)):
            y, stacked = torch.zeros(2, OUT), modules[name]
            wrapper.add_lora_linear(y, torch.ones(2, HIDDEN), stacked.lora_a_stacked, stacked.lora_b_stacked, 1.0, (OUT,))
            assert y.tolist() == [[expected] * OUT, [0] * OUT]
        assert [wrapper.layer_of(m.lora_b_stacked).rank.tolist() for m in modules.values()] == [[[rank]], [[0]]]


def test_an_activation_that_fails_leaves_nobodys_weights_in_the_slot() -> None:
    hooks.install()
    wrapper = IsolatedPunicaWrapper(256, 64, "cpu")
    good, bad = layer(1, MAX_RANK, HIDDEN, (OUT,), wrapper=wrapper), layer(1, MAX_RANK, HIDDEN, (OUT + 1,), wrapper=wrapper)
    weights = LoRALayerWeights("too_large", 4, 4, torch.ones(4, HIDDEN + 1), torch.ones(OUT, 4))
    broken = LoRAModel(2, 4, {"layer": adapter(2, 4).loras["layer"], "bad": weights})
    manager = SimpleNamespace(
        _registered_adapters={1: adapter(1, 16), 2: broken}, modules={"layer": good, "bad": bad}, punica_wrapper_mapping={"": wrapper},
        _get_lora_layer_weights=lambda model, name: model.loras.get(name), lora_index_to_id=[None], _active_adapters={},
    )  # fmt: skip
    manager.deactivate_adapter = lambda adapter_id: LoRAModelManager.deactivate_adapter(manager, adapter_id)
    manager._deactivate_adapter = lambda adapter_id: LoRAModelManager._deactivate_adapter(manager, adapter_id)
    assert LoRAModelManager.activate_adapter(manager, 1)
    manager.deactivate_adapter(1)
    for _ in range(2):  # does not count as active the second time
        with pytest.raises(RuntimeError, match="size of tensor"):
            LoRAModelManager.activate_adapter(manager, 2)
        assert manager.lora_index_to_id == [None]
        assert not manager._active_adapters
    assert wrapper.layer_of(good.lora_b_stacked).rank.tolist() == [[0]]


def test_the_logits_of_a_prompt_are_told_from_those_that_are_sampled() -> None:
    hooks.install()
    wrapper, hidden = IsolatedPunicaWrapper(256, 64, "cpu"), torch.zeros(9, HIDDEN)
    seen: list[slice | None] = []

    class Model:
        def compute_logits(self, _rows: Any) -> None:
            seen.append(wrapper.prompt_rows)

    model = Model()
    manager = SimpleNamespace(punica_wrapper_mapping={"language_model": wrapper})
    runner: Any = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager), model=model, num_prompt_logprobs={"a": 1})

    def as_vllm_does(runner: Any, hidden_states: Any, _scheduled: dict[str, int]) -> str:
        for rows in (hidden_states[2:5], hidden_states[5:9]):
            runner.model.compute_logits(rows)
        return "answer"

    assert hooks.prompt_logprobs(as_vllm_does, runner, hidden, {}) == "answer"
    assert seen == [slice(2, 5), slice(5, 9)]
    assert wrapper.prompt_rows is None
    model.compute_logits(hidden)
    assert seen[-1] is None


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = type(current_platform)
    monkeypatch.setattr(platform, "get_punica_wrapper", vars(platform)["get_punica_wrapper"])  # put back afterwards
    plugin.register()


@pytest.mark.usefixtures("registered")
def test_vllm_builds_the_corrected_wrapper() -> None:
    assert type(get_punica_wrapper(64, max_batches=4, device="cpu")) is IsolatedPunicaWrapper


@pytest.mark.usefixtures("registered")
def test_an_unknown_vllm_is_refused_where_lora_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    monkeypatch.delenv(plugin.OVERRIDE, raising=False)
    with pytest.raises(plugin.UnknownVllmError, match=r"vLLM 0\.32\.0, this is 0\.99\.0"):
        get_punica_wrapper(64, max_batches=4, device="cpu")

    records: list[logging.LogRecord] = []
    monkeypatch.setattr(plugin.logger, "handle", records.append)
    monkeypatch.setenv(plugin.OVERRIDE, "1")
    assert type(get_punica_wrapper(64, max_batches=4, device="cpu")) is IsolatedPunicaWrapper
    assert records[0].levelno == logging.WARNING


def test_nothing_happens_on_other_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = type(current_platform)
    stock = vars(platform)["get_punica_wrapper"]
    monkeypatch.setattr(platform, "is_cpu", lambda _self: False)
    plugin.register()
    assert vars(platform)["get_punica_wrapper"] is stock


@pytest.mark.usefixtures("registered")
def test_the_runner_whose_rows_are_not_known_is_refused() -> None:
    config = SimpleNamespace(use_v2_model_runner=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: config)
        with pytest.raises(plugin.UnknownVllmError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
            get_punica_wrapper(64, max_batches=4, device="cpu")


def test_stock_vllm_still_gives_rows_without_an_adapter_the_last_slot() -> None:
    wrapper, a, b = PunicaWrapperCPU(256, 64, "cpu"), torch.zeros(2, 1, MAX_RANK, HIDDEN), torch.zeros(2, 1, OUT, MAX_RANK)
    a[1], b[1] = 1.0, 1.0
    route(wrapper, [0, -1], slots=2)
    y = torch.zeros(2, OUT)
    wrapper.add_lora_linear(y, torch.ones(2, HIDDEN), (a,), (b,), 1.0, (OUT,))
    assert y[1].any(), "vLLM fixed the leak (vllm#48421, #49656): lmaas/engine/cpu_lora is not needed for correctness any more"
