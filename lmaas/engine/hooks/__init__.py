"""Changes inside vLLM's processes other than LoRA on CPUs: log records, notes about compilations, the cache of valid grammars.

Each hook is installed once, also in a zygote, where it has no effect: it reads its environment variable when it is used. Names and places
are those of vLLM 0.32.0. Where one is missing, that hook is skipped with a warning.
"""

import logging

from lmaas.engine.hooks import background, compilation, records, validation

log = logging.getLogger("vllm.lmaas.hooks")


def install() -> None:
    """Install all hooks in this process. It may be called more than once."""
    records.install()
    for hook in (background, compilation, validation):
        try:
            hook.install()
        except (ImportError, AttributeError) as error:
            log.warning("This vLLM has no place for %s (%s): it runs without.", hook.__name__, type(error).__name__)
