"""vLLM is imported here once, before the tests' modules import it: torch warns while it is."""

import warnings

import pytest

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
    pytest.importorskip("vllm.lora.layers")
