"""Matches `rank_pattern` and `alpha_pattern`, whose keys are regular expressions written by tenants.

PEFT matches a module with `re.match(rf"(.*\\.)?({key})$", module)` and takes the first key that matches. Python's matcher can backtrack
without end, so this module uses RE2, whose time is linear in the module's name. RE2 reads a few constructs differently from Python, so only
the syntax that both read alike is accepted.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value", int, float)

MAX_PATTERNS = 1024
MAX_PATTERN_LENGTH = 1000
#: RE2's instructions, over all patterns of an adapter: about 1,200 full module names, or one pattern with large counts.
MAX_PROGRAM = 100_000
_MAX_MEMORY_BYTES = 256 * 1024

_CLASS = r"\[\^?(?:[^\[\]\\]|\\[dDwWsS]|\\[^A-Za-z0-9])+\]"
#: Possessive, so that this pattern cannot backtrack either.
_COMMON_SYNTAX = re.compile(
    rf"""(?:
        [A-Za-z0-9_\ \-"#%&',/:;<=>@`~!.^$|)]       # ordinary characters, and those that stand alone
        | \\[dDwWsSbBA] | \\[^A-Za-z0-9]            # classes, anchors, escaped punctuation
        | \((?!\?) | \(\?(?:[ims]*:|P<[A-Za-z_]\w*>) # groups
        | (?:[*+?]|\{{[0-9]+(?:,[0-9]*)?\}})\??     # repetition
        | {_CLASS}
    )*+""",
    re.VERBOSE | re.ASCII,
)


class PatternError(ValueError):
    """A pattern is not supported. The message names it with the reason, and may be shown to the tenant."""


def matching_values(patterns: Mapping[str, Value], modules: Iterable[str]) -> dict[str, list[Value]]:
    """Return the values of the patterns that match each module, in their order: PEFT takes the first. Raises PatternError."""
    found: dict[str, list[Value]] = {module: [] for module in modules}
    if not patterns:
        return found
    if len(patterns) > MAX_PATTERNS:
        raise PatternError(f"it has {len(patterns)} patterns, more than the {MAX_PATTERNS} allowed")

    import re2  # noqa: PLC0415 (memory that a gateway needs only for such an upload)

    options = re2.Options()
    options.max_mem, options.never_capture, options.log_errors = _MAX_MEMORY_BYTES, True, False
    program = 0
    for key, value in patterns.items():
        _check_syntax(key)
        try:
            regex = re2.compile(rf"(.*\.)?({key})$", options)
        except re2.error:
            raise PatternError(f"the pattern {_show(key)} is not a valid regular expression, or repeats too much") from None
        program += regex.programsize
        if program > MAX_PROGRAM:
            raise PatternError(f"its patterns are too complex together, from {_show(key)} on")
        for module, values in found.items():
            if regex.match(module):
                values.append(value)
    return found


def exactly(modules: Iterable[str]) -> str:
    """Return a pattern that matches these modules and no others, for PEFT's rule and for vLLM's."""
    return f"^(?:{'|'.join(re.escape(module) for module in sorted(modules))})"


def _check_syntax(key: str) -> None:
    if len(key) > MAX_PATTERN_LENGTH:
        raise PatternError(f"the pattern {_show(key)} has {len(key)} characters, more than the {MAX_PATTERN_LENGTH} allowed")
    if not key.isascii() or not key.isprintable():
        raise PatternError(f"the pattern {_show(key)} has characters that no module's name has")
    if not _COMMON_SYNTAX.fullmatch(key):
        raise PatternError(
            f"the pattern {_show(key)} uses syntax that is not supported: look-around, back-references, possessive or conditional "
            "groups, and unusual escapes"
        )


def _show(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 100 else f"{shown[:96]}...{shown[-1]}"
