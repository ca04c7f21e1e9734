"""Decoding of bodies, forms and query strings by their types, with errors that name the field and the rule in words."""

import json
import re
from collections.abc import Mapping
from datetime import date
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from lmaas.errors import InvalidRequest

Decoded = TypeVar("Decoded", bound=msgspec.Struct)
MAX_SHOWN = 100


def decode(kind: type[Decoded], given: Mapping[str, Any], *, text: bool = False) -> Decoded:
    """Return the fields as a `kind`. In a query string or a form all values are `text`, from which numbers and booleans are read.

    Raises InvalidRequest with the field as `param` and one of the codes `unsupported_parameter` (unknown field), `missing_parameter`,
    `invalid_type` and `out_of_range`, or the code that the field's type names.
    """
    try:
        return msgspec.convert(given, kind, strict=not text)
    except msgspec.ValidationError as error:
        found = _fault(inspect.type_info(kind), dict(given), "", text=text)
        raise found or InvalidRequest(f"The request is not valid: {error}") from None


def _struct_fault(kind: inspect.StructType, given: Mapping[str, Any], where: str, *, text: bool) -> InvalidRequest | None:
    fields = {field.encode_name: field for field in kind.fields}
    for name in given:
        if name not in fields and kind.forbid_unknown_fields:
            path = f"{where}{name}"[:MAX_SHOWN]
            known = ", ".join(fields)
            return InvalidRequest(f"The field '{path}' is not known. Known are: {known}.", code="unsupported_parameter", param=path)
    for name, field in fields.items():
        if name in given:
            fault = _fault(field.type, given[name], f"{where}{name}", text=text)
            if fault is not None:
                return fault
        elif field.required:
            return InvalidRequest(f"'{where}{name}' is required.", code="missing_parameter", param=f"{where}{name}")
    return None


def _fault(kind: inspect.Type, value: Any, path: str, *, text: bool) -> InvalidRequest | None:
    """Return what is wrong with a value, or None. Faults inside lists and objects have their own path."""
    options = _options(kind)
    if value is None and any(isinstance(option, inspect.NoneType) for option in options):
        return None
    main = next(option for option in options if not isinstance(option, inspect.NoneType))
    plain, extra = _unwrapped(main)
    if isinstance(plain, inspect.AnyType):
        return None
    if isinstance(plain, inspect.StructType) and isinstance(value, dict):
        return _struct_fault(plain, value, f"{path}." if path else "", text=text)
    if isinstance(plain, inspect.ListType) and isinstance(value, list):
        faults = (_fault(plain.item_type, item, f"{path}[{index}]", text=text) for index, item in enumerate(value))
        if plain.max_length is None or len(value) <= plain.max_length:
            return next((fault for fault in faults if fault is not None), None)
    read = _read(plain, value, text=text)
    if read is None:
        code = "invalid_type"
    elif not _is_allowed(plain, read):
        code = str(extra.get("code", "out_of_range"))
    else:
        return None
    words = str(extra.get("words") or _words(plain)) + (", or null" if len(options) > 1 else "")
    return InvalidRequest(f"'{path}' must be {words}, not {_shown(value)}.", code=code, param=path)


def _options(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    plain, _ = _unwrapped(kind)
    return plain.types if isinstance(plain, inspect.UnionType) else (kind,)


def _unwrapped(kind: inspect.Type) -> tuple[inspect.Type, Mapping[str, Any]]:
    extra: dict[str, Any] = {}
    while isinstance(kind, inspect.Metadata):
        extra, kind = (kind.extra or {}) | extra, kind.type
    return kind, extra


def _read(kind: inspect.Type, value: Any, *, text: bool) -> Any:
    """Return the value as the type's Python class, whatever its bounds are; None if it is of another type."""
    plain = next((plain for found, plain in _PLAIN.items() if isinstance(kind, found)), str)
    try:
        return msgspec.convert(value, plain, strict=not text)
    except msgspec.ValidationError:
        return None


_PLAIN: dict[type[inspect.Type], Any] = {
    inspect.IntType: int,
    inspect.FloatType: float,
    inspect.BoolType: bool,
    inspect.DateType: date,
    inspect.ListType: list,
    inspect.StructType: dict,
    inspect.DictType: dict,
}


def _is_allowed(kind: inspect.Type, value: Any) -> bool:
    match kind:
        case inspect.IntType() | inspect.FloatType():
            return (kind.ge is None or value >= kind.ge) and (kind.le is None or value <= kind.le)
        case inspect.StrType():
            fits = kind.max_length is None or len(value) <= kind.max_length
            return fits and (kind.pattern is None or re.search(kind.pattern, value) is not None)
        case inspect.ListType(max_length=int(most)):
            return len(value) <= most
        case inspect.LiteralType():
            return value in kind.values
        case inspect.EnumType():
            return value in {item.value for item in kind.cls}
        case _:
            return True


def _words(kind: inspect.Type) -> str:
    """Return the rule of a type in words that follow 'must be'."""
    match kind:
        case inspect.IntType() | inspect.FloatType():
            words = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
            return words if kind.ge is None or kind.le is None else f"{words} from {kind.ge:,} to {kind.le:,}"
        case inspect.StrType(max_length=int(longest)):
            return f"text of at most {longest:,} characters"
        case inspect.ListType(max_length=int(most)):
            return f"a list of at most {most:,} items"
        case inspect.LiteralType():
            return "one of: " + ", ".join(str(value) for value in kind.values)
        case inspect.EnumType():
            return "one of: " + ", ".join(str(item.value) for item in kind.cls)
        case _:
            return next((words for found, words in _OTHER_WORDS.items() if isinstance(kind, found)), "text")


_OTHER_WORDS: dict[type[inspect.Type], str] = {
    inspect.BoolType: "true or false",
    inspect.DateType: "a day such as 2026-11-22",
    inspect.ListType: "a list",
    inspect.StructType: "an object",
    inspect.DictType: "an object",
}


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
