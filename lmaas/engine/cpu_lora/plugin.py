"""The entry point that vLLM calls, and the check of vLLM's version. Imports neither vLLM nor torch by itself.

The plugin replaces the class that vLLM's CPU platform names as its "punica wrapper", which is built only when LoRA is on. That is
also where an unknown vLLM is refused: without LoRA this plugin changes nothing.
"""

import importlib
import logging
import os

#: The vLLM versions whose source was read and tested against what is replaced here.
PATCHED_VERSIONS = frozenset({"0.32.0"})
OVERRIDE = "LMAAS_ALLOW_UNKNOWN_VLLM"
#: In the engine's log when the plugin is active: a supervisor looks for it before its engine gets any work.
ACTIVE_MARK = "lmaas cpu_lora active"

logger = logging.getLogger("vllm.lmaas.cpu_lora")


class UnknownVllmError(RuntimeError):
    """This vLLM, or this way of running it, was never checked against the replacement: its LoRA answers could be another tenant's."""


def register() -> None:
    """Entry point (`vllm.general_plugins`), called by each vLLM process; may be called again. Does nothing except on CPU."""
    from vllm.platforms import current_platform  # noqa: PLC0415 (only inside an engine)

    if current_platform.is_cpu():
        # Asked for by vllm.lora.punica_wrapper.get_punica_wrapper, once per LoRA manager. Raising here stops an engine that would
        # serve LoRA, whatever vLLM does with exceptions of a plugin's function.
        type(current_platform).get_punica_wrapper = classmethod(lambda _cls: wrapper_name())


def wrapper_name() -> str:
    """The qualified name that vLLM imports in place of its own wrapper. Raises UnknownVllmError on what was not checked."""
    version = str(importlib.import_module("vllm").__version__)
    if version.partition("+")[0] not in PATCHED_VERSIONS:
        known = ", ".join(sorted(PATCHED_VERSIONS))
        if os.environ.get(OVERRIDE) != "1":
            raise UnknownVllmError(
                f"LoRA on CPU is refused: lmaas corrects it in vLLM {known}, this is {version}. Stock vLLM gives tokens another "
                f"tenant's adapter on CPU. Install a known version, turn LoRA off, or set {OVERRIDE}=1 after checking."
            )
        logger.warning("%s=1: correcting LoRA on CPU in vLLM %s, which was not checked (known: %s)", OVERRIDE, version, known)
    from vllm.config import get_current_vllm_config_or_none  # noqa: PLC0415 (only inside an engine)

    from lmaas.engine.cpu_lora import hooks, norm  # noqa: PLC0415 (both import vLLM)

    config = get_current_vllm_config_or_none()
    if config is not None and config.use_v2_model_runner:
        raise UnknownVllmError(
            "LoRA on CPU is refused with vLLM's V2 model runner, which lmaas does not correct. Set VLLM_USE_V2_MODEL_RUNNER=0."
        )
    hooks.install()
    norm.install()
    return "lmaas.engine.cpu_lora.wrapper.IsolatedPunicaWrapper"
