"""Which of vLLM's options a base model may set (`engine_args`): how fast and how large an engine is, never whose code or weights it runs,
where it listens, or what it writes down.

An allowlist, since vLLM has more than 300 options and each release adds some: several import a class or a file by name, others log prompts,
or replace weights and templates. Options are named in full: abbreviations, dotted names and short forms are refused, however vLLM reads
them.
`LMAAS_ENGINE_ARGS`, a setting of the operator's own machine, is free.
"""

import re
import shlex

#: With a value.
VALUED = frozenset(
    {
        *("gpu-memory-utilization", "kv-cache-dtype", "block-size", "num-gpu-blocks-override", "kv-offloading-size", "cpu-offload-gb"),
        *("tensor-parallel-size", "pipeline-parallel-size", "max-parallel-loading-workers", "safetensors-load-strategy"),
        *("max-num-batched-tokens", "long-prefill-token-threshold", "attention-backend", "moe-backend", "linear-backend"),
        *("quantization", "seed", "max-cudagraph-capture-size", "optimization-level", "performance-mode"),
        # Names out of vLLM's own lists; files of parsers are another option.
        *("tool-call-parser", "reasoning-parser"),
    }
)
#: Without one; `--no-…` turns it off.
SWITCHES = frozenset(
    {
        *("enforce-eager", "enable-prefix-caching", "enable-chunked-prefill", "disable-cascade-attn", "disable-sliding-window"),
        *("async-scheduling", "enable-expert-parallel", "disable-custom-all-reduce", "fully-sharded-loras", "numa-bind"),
    }
)
#: Of lmaas.testing.fake_engine. Not what has it write a file.
FAKE = frozenset({"fake-token-ms", "fake-accept-ms", "fake-start-ms", "fake-poison"})
#: A number or a name: no path, no JSON.
VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,99}")


def refusal(text: str) -> str | None:
    """Why these arguments may not be set, in words for an operator; None if they may."""
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
