"""Passes information to the wrapper that vLLM does not pass: ranks at activation, and the rows whose prompt logits are computed."""

import functools
from collections.abc import Callable
from typing import Any

from vllm.lora.model_manager import LoRAModelManager
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_MARK = "_lmaas_cpu_lora"


def install() -> None:
    """Install the hooks in vLLM's classes, once for each process."""
    _wrap(LoRAModelManager, "activate_adapter", _activate_adapter)
    _wrap(GPUModelRunner, "_get_prompt_logprobs_dict", prompt_logprobs)


def _wrap(owner: Any, name: str, hook: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(original, self, *args, **kwargs)

    setattr(hooked, _MARK, True)
    setattr(owner, name, hooked)


def _activate_adapter(original: Callable[..., bool], manager: Any, lora_id: int) -> bool:
    """After vLLM has copied an adapter's weights into a slot, note their ranks, layer by layer."""
    for module in manager.modules.values():
        module.punica_wrapper.prepare(module)  # before the copy: it changes how B is stored
    try:
        activated = original(manager, lora_id)
    except BaseException:
        # vLLM records the slot's owner before it copies, and would take a partial copy for a complete one.
        if lora_id in manager.lora_index_to_id:
            for wrapper in manager.punica_wrapper_mapping.values():
                wrapper.emptied(manager.lora_index_to_id.index(lora_id))
        manager.deactivate_adapter(lora_id)
        raise
    if activated:
        slot, adapter = manager.lora_index_to_id.index(lora_id), manager._registered_adapters[lora_id]
        for name, module in manager.modules.items():
            weights = manager._get_lora_layer_weights(adapter, name)
            module.punica_wrapper.activated(module, slot, weights.lora_b if weights else None)
    return activated


def prompt_logprobs(original: Callable[..., Any], runner: Any, hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> Any:
    """Give the wrapper the rows to which the logits of a prompt belong.

    vLLM computes the logits of a prompt's tokens one request at a time, without passing the request. The LoRA layer of the logits would
    take them for the step's sampled rows. They are a view of the whole step's hidden states, and the offset of the view gives the rows.
    """
    if not runner.num_prompt_logprobs:
        return original(runner, hidden_states, num_scheduled_tokens)
    wrappers, model = list(runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()), runner.model
    compute_logits = model.compute_logits

    def with_rows(prompt_hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        first = (prompt_hidden_states.data_ptr() - hidden_states.data_ptr()) // (hidden_states.stride(0) * hidden_states.element_size())
        for wrapper in wrappers:
            wrapper.prompt_rows = slice(first, first + len(prompt_hidden_states))
        return compute_logits(prompt_hidden_states, *args, **kwargs)

    model.compute_logits = with_rows
    try:
        return original(runner, hidden_states, num_scheduled_tokens)
    finally:
        del model.compute_logits
        for wrapper in wrappers:
            wrapper.prompt_rows = None
