"""vLLM is imported here once, before the tests' modules import it: torch warns while it is."""

import importlib
import importlib.util
import warnings

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("no engine is installed", allow_module_level=True)
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
    importlib.import_module("vllm.lora.layers")
