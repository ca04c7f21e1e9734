"""The vLLM options that a base model may set (`engine_args`). They affect an engine's speed and size, but never the code or weights that it
runs, the address that it listens on, or the files that it writes.

This is an allowlist, because vLLM has more than 300 options and each release adds some. Several import a class or a file by name, others
log prompts, or replace weights and templates. Options must be given in full: abbreviations, dotted names and short forms are refused, even
if vLLM would accept them.
`LMAAS_ENGINE_ARGS`, which is a setting of the operator's own machine, has no restrictions.
"""

import re
import shlex

#: Options with a value.
VALUED = frozenset(
    {
        *("gpu-memory-utilization", "kv-cache-dtype", "block-size", "num-gpu-blocks-override", "kv-offloading-size", "cpu-offload-gb"),
        *("tensor-parallel-size", "pipeline-parallel-size", "max-parallel-loading-workers", "safetensors-load-strategy"),
        *("max-num-batched-tokens", "long-prefill-token-threshold", "attention-backend", "moe-backend", "linear-backend"),
        *("quantization", "seed", "max-cudagraph-capture-size", "optimization-level", "performance-mode"),
        # Names from vLLM's own lists. Files of parsers use another option.
        *("tool-call-parser", "reasoning-parser"),
    }
)
#: Options without a value. `--no-…` disables them.
SWITCHES = frozenset(
    {
        *("enforce-eager", "enable-prefix-caching", "enable-chunked-prefill", "disable-cascade-attn", "disable-sliding-window"),
        *("async-scheduling", "enable-expert-parallel", "disable-custom-all-reduce", "fully-sharded-loras", "numa-bind"),
    }
)
#: Options of lmaas.testing.fake_engine, without the one that makes it write a file.
FAKE = frozenset({"fake-token-ms", "fake-accept-ms", "fake-start-ms", "fake-poison"})
#: A number or a name, but not a path or JSON.
VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,99}")


def refusal(text: str) -> str | None:
    """Return the reason why these arguments are not allowed, as a text for an operator, or None if they are."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        return f"it cannot be parsed as arguments: {error}"
    waiting = None
    for word in words:
        if waiting is not None:
            if VALUE.fullmatch(word) is None:
                return f"'{word[:100]}' is not a value of '{waiting}'"
            waiting = None
            continue
        name, equals, value = word.partition("=")
        # vLLM reads underscores as dashes.
        option = name.removeprefix("--").replace("_", "-")
        if not name.startswith("--") or (option not in VALUED | FAKE | SWITCHES and option.removeprefix("no-") not in SWITCHES):
            return f"'{name[:100]}' is not one of the options that a base model may set: {', '.join(sorted(VALUED | SWITCHES))}"
        if option not in VALUED | FAKE:
            if equals:
                return f"'{name}' takes no value"
        elif not equals:
            waiting = name
        elif VALUE.fullmatch(value) is None:
            return f"'{value[:100]}' is not a value of '{name}'"
    return None if waiting is None else f"'{waiting}' takes a value"
