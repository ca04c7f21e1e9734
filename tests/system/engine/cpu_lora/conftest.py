"""vLLM is imported here once, before the tests' modules import it: torch warns while it is."""

import importlib
import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
    importlib.import_module("vllm.lora.layers")
