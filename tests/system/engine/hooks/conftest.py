"""Imports vLLM once, before the tests' modules import it: torch warns during the import."""

import importlib
import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
    importlib.import_module("vllm.v1.structured_output")
