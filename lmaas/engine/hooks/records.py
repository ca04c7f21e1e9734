"""Keeps tenants' text out of the engine's log records.

Once the log is sealed (see log/seal.py), a record consists of the fixed text in the code that logs it, of numbers, and of identifiers made
by lmaas. Exceptions are logged as types and places. Computed text, such as an f-string, may contain a request's text and is left out.
"""

import copy
import functools
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from types import CodeType, FrameType
from typing import Any

from lmaas.engine.log.seal import RECORD_CHARACTERS, VARIABLE, read_seal

#: Loggers whose text is computed, but never from a request.
TRUSTED = ("vllm.v1.metrics.", "vllm.lmaas.", "lmaas.")
#: Identifiers made by lmaas and vLLM (`req_…`, `chatcmpl-req_…-0`), and names of signals.
_IDENTIFIER = re.compile(r"(?:[a-z]{2,8}-)?[a-z]{2,8}_[0-9a-f]{20,24}(?:[-_.:][0-9a-zA-Z]{1,16}){0,3}|SIG[A-Z]{2,6}")
#: Exceptions whose text comes from the library alone.
_SAFE_TEXTS = frozenset({"OutOfMemoryError", "AcceleratorError", "MemoryError", "SystemExit", "KeyboardInterrupt"})
#: The maximum number of exceptions of a chain, and of the innermost frames of each, that are logged.
CHAIN, FRAMES = 3, 8


def install() -> None:
    """Make every handler of this process format safe records once the log is sealed."""
    original = logging.Handler.format
    if hasattr(original, "_lmaas_records"):
        return

    marks: dict[str, str] = {}

    @functools.wraps(original)
    def format(handler: logging.Handler, record: logging.LogRecord) -> str:
        path = os.environ.get(VARIABLE)
        if not path:
            return original(handler, record)
        if path not in marks:
            mark = read_seal(path)
            if mark is None:
                return original(handler, record)
            marks[path] = mark
        return _marked(original(handler, safe_record(record)), marks[path])

    format._lmaas_records = True  # type: ignore[attr-defined]  # so that it is wrapped once
    logging.Handler.format = format  # type: ignore[method-assign, assignment]  # for every handler, also those made later


def _marked(text: str, mark: str) -> str:
    if len(text) > RECORD_CHARACTERS:
        text = f"{text[:RECORD_CHARACTERS]} … {len(text) - RECORD_CHARACTERS} characters left out"
    return "\n".join(mark + line for line in text.splitlines())


def safe_record(record: logging.LogRecord) -> logging.LogRecord:
    """Return a copy of a record without any text of a request. Must be called while the code that logs is still on the stack."""
    safe = copy.copy(record)
    safe.msg, safe.args = _message(record), ()
    error = record.exc_info[1] if record.exc_info else None
    safe.exc_info, safe.stack_info = None, None
    safe.exc_text = describe(error) if error is not None else None
    return safe


def _message(record: logging.LogRecord) -> str:
    if not isinstance(record.msg, str):
        return f"({type(record.msg).__name__} left out)"
    trusted = f"{record.name}.".startswith(TRUSTED)
    if not trusted and not _is_literal(record):
        return f"(computed message of {len(record.msg)} characters left out)"
    if not record.args:
        return record.msg
    args = record.args if trusted else _safe_args(record.msg, record.args)
    try:
        return record.msg % args
    except (TypeError, ValueError, KeyError):
        return f"{record.msg} (values left out)"


def _is_literal(record: logging.LogRecord) -> bool:
    """Return whether the message is a constant in the code that logs it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if frame.f_lineno == record.lineno and code.co_filename == record.pathname and code.co_name == record.funcName:
            return _has_constant(code, record.msg)
        frame = frame.f_back
    return False


def _has_constant(code: CodeType, text: str) -> bool:
    return any(type(constant) is str and constant == text for constant in code.co_consts)


def _safe_args(message: str, args: Any) -> Any:
    if isinstance(args, Mapping):
        # A single mapping either holds the values for the names in the message, or is itself the value.
        return {name: safe_value(value) for name, value in args.items()} if "%(" in message else (safe_value(args),)
    return tuple(safe_value(value) for value in args)


def safe_value(value: object) -> object:
    """Return a value of a record in the form in which it may be logged: numbers and lmaas's identifiers unchanged, all other values as
    their type."""
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    if isinstance(value, str):
        return value if _IDENTIFIER.fullmatch(value) else f"<{len(value)} characters>"
    if isinstance(value, type):
        return f"<{value.__name__}>"
    return f"<{type(value).__name__}>"


def describe(error: BaseException) -> str:
    """Return an exception and its causes: types and places, and the texts that are constants of the code that raised them."""
    return "\n".join(_one(each) for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and len(seen) < CHAIN and not any(following is each for each in seen):
        seen.append(following)
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


def _one(error: BaseException) -> str:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    frames = list(traceback.walk_tb(error.__traceback__))
    places = [f"{_short(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}" for frame, line in frames]
    shown = " > ".join(["…"] * (len(places) > FRAMES) + places[-FRAMES:])
    return f"{name}: {_text(error, frames)}" + (f" at {shown}" if shown else "")


def _text(error: BaseException, frames: list[tuple[FrameType, int]]) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if type(error).__name__ in _SAFE_TEXTS:
        return str(error)[:300]
    match error.args:
        case [str(text)] if frames and _has_constant(frames[-1][0].f_code, text):
            return text
    return "(text left out)" if error.args else ""


def _short(path: str) -> str:
    return "/".join(PurePath(path).parts[-2:])
