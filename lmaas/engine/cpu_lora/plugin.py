"""The entry point that vLLM calls, and the check of vLLM's version. Importing this module imports neither vLLM nor torch.

The plugin replaces the class that vLLM's CPU platform names as its "punica wrapper", which is built only if LoRA is enabled. An unknown
vLLM is refused there too, so without LoRA this plugin changes nothing.
"""

import importlib
import logging
import os

#: The vLLM versions whose source was reviewed and tested with these replacements.
PATCHED_VERSIONS = frozenset({"0.32.0"})
OVERRIDE = "LMAAS_ALLOW_UNKNOWN_VLLM"
#: The text in the engine's log that shows that the plugin is active. A supervisor checks for it before its engine gets any work.
ACTIVE_MARK = "lmaas cpu_lora active"

logger = logging.getLogger("vllm.lmaas.cpu_lora")


class UnknownVllmError(RuntimeError):
    """The replacement was never checked with this vLLM, or with these options. Its LoRA answers could use another tenant's adapter."""


def register() -> None:
    """Entry point (`vllm.general_plugins`), called by each vLLM process. May be called again. Has no effect except on CPU."""
    from vllm.platforms import current_platform  # noqa: PLC0415 (only inside an engine)

    if current_platform.is_cpu():
        # vllm.lora.punica_wrapper.get_punica_wrapper calls this once for each LoRA manager. An exception here stops an engine that would
        # serve LoRA, however vLLM treats exceptions of a plugin's function.
        type(current_platform).get_punica_wrapper = classmethod(lambda _cls: wrapper_name())


def wrapper_name() -> str:
    """Return the qualified name of the class that vLLM uses in place of its own wrapper. Raises UnknownVllmError for an unchecked vLLM."""
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
