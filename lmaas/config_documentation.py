"""Write docs/reference/settings.md from the settings: `python -m lmaas.config_documentation > docs/reference/settings.md`."""

import dataclasses
import sys
from typing import Any

from lmaas.config import ENGINE_VARIABLES, PREFIX, Settings

_INTRODUCTION = """\
# Settings

<!-- Generated from lmaas/config.py by `python -m lmaas.config_documentation`. Do not edit. -->

Every process reads its settings from environment variables at its start: `LMAAS_PORT=9000 make up`. An unknown `LMAAS_…` variable or a
value that does not parse stops the process with an error. An empty value counts as unset. Names end with their unit: `_S` is seconds,
`_BYTES` bytes.
"""
#: The first setting of each section.
_SECTIONS = {
    "home": ("The stack", ""),
    "model": ("The default base model", ""),
    "url": ("Command line and operator", ""),
    "max_connections": ("Gateways", ""),
    "console": ("Console", "How people sign in, and what the settings of OIDC do: [the console](../how-to/console.md)."),
    "queue_deadline_s": ("Queue and shutdown", ""),
    "webhook_private_targets": ("Webhooks", "What they are: [webhooks](../how-to/webhooks.md)."),
    "idle_timeout_s": (
        "Scaling",
        "How these work together: [scaling](../concepts/scaling.md) and [cold starts](../concepts/cold-start.md).",
    ),
    "provisioner": ("Controllers and provisioners", "For `LMAAS_RAY_…` see [many machines](../how-to/ray.md)."),
    "engine_host": (
        "Engines",
        "Sizes are defaults for base models that do not set their own ([base models](../how-to/base-models.md)). The last two variables "
        "are read inside the engine's processes.",
    ),
}
_MIB = 1024 * 1024


def page() -> str:
    """Return the page in Markdown."""
    parts: list[str] = [_INTRODUCTION]
    for field in dataclasses.fields(Settings):
        if field.name in _SECTIONS:
            title, text = _SECTIONS[field.name]
            parts.append(f"\n## {title}\n" + (f"\n{text}\n" if text else "") + "\n| variable | default | meaning |\n| --- | --- | --- |\n")
        parts.append(f"| `{PREFIX}{field.name.upper()}` | {_default(field)} | {field.metadata['text']} |\n")
    parts += [f"| `{name}` |  | {text} |\n" for name, text in ENGINE_VARIABLES.items() if text]
    return "".join(parts)


def _default(field: dataclasses.Field[Any]) -> str:
    match field.default:
        case None | "":
            return str(field.metadata["unset"])
        case bool():
            return f"`{str(field.default).lower()}`"
        case int() if field.name.endswith("_bytes"):
            mebibytes = field.default // _MIB
            return f"{mebibytes} MiB" if mebibytes < 1024 else f"{mebibytes // 1024} GiB"
        case float():
            return f"{field.default:g}"
        case int():
            return str(field.default)
        case _:
            return f"`{field.default}`"


if __name__ == "__main__":
    sys.stdout.write(page())
