"""Reading YAML files whose every field is known and has the right type."""

import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from lmaas.errors import InvalidRequest

#: A whole number of this size or more is beyond every limit of the API.
TOO_LARGE = 2**63
#: The names of field types in messages.
WORDS = {str: "text", int: "a whole number", float: "a number", dict: "a mapping", list: "a list"}


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a mapping with the same key twice; YAML itself would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping. Raises ConstructorError for a key that appears twice."""
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' appears twice. Keep one of the two.", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


@contextmanager
def refusing(path: Path, field: str = "") -> Iterator[None]:
    """Turn an error of the system within the block, such as a folder that may not be entered, into an InvalidRequest.

    It names the file and, if the path comes from one, the field.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split()).rstrip(".")
        what = f"{_quoted(field)} cannot be used" if field else "It cannot be read"
        raise InvalidRequest(f"{_short(str(path))}: {what}: {why}.") from error


def load(path: Path) -> Any:
    """Return the file's content. Raises InvalidRequest, naming the file and the line."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidRequest(f"{path}: It is not a regular file.")
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (it is a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        problem = error.problem or error.context
        if problem == "but found another document":
            problem = "Another document begins here. Put each into a file of its own."
        raise InvalidRequest(f"{path}: {where}{problem}") from error
    except OSError as error:
        raise InvalidRequest(f"{path}: The file cannot be read: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InvalidRequest(f"{path}: The file is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise InvalidRequest(f"{path}: The file is nested too deeply.") from error
    except (LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # The loader raises these for a value with a tag that it does not fit, such as `!!bool 3`.
        raise InvalidRequest(f"{path}: The file is not valid YAML: A value does not fit its tag (!!).") from error


def checked(path: Path, value: Any, fields: Mapping[str, type], required: Sequence[str] = (), where: str = "") -> dict[str, Any]:
    """Return a mapping of `fields`, each of its type, without those that are null: null means that the field is not given.

    A whole number counts as a number. Raises InvalidRequest, naming the file and the field.
    """
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path}: {_quoted(where.rstrip('.')) or 'The file'} must be a mapping.")
    for name, item in value.items():
        if name not in fields:
            known = name if isinstance(name, str) else _shown(name)
            raise InvalidRequest(f"{path}: '{where}{_short(known)}' is not known. The known fields are: {', '.join(fields)}.")
        if item is not None and not _is(item, fields[name]):
            hint = " Put it in quotes." if fields[name] is str and isinstance(item, int | float | date) else ""
            raise InvalidRequest(f"{path}: '{where}{name}' must be {WORDS[fields[name]]}, not {_shown(item)}.{hint}")
        if isinstance(item, int) and abs(item) >= TOO_LARGE:
            raise InvalidRequest(f"{path}: '{where}{name}' is too large.")
    for name in required:
        if value.get(name) is None:
            raise InvalidRequest(f"{path}: '{where}{name}' is missing.")
    return {name: item for name, item in value.items() if item is not None}


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind) and not isinstance(value, bool)


def _quoted(text: str) -> str:
    return f"'{text}'" if text else ""


def _shown(value: object) -> str:
    kind = type(value)
    if kind is dict or kind is list:
        return WORDS[kind]
    if isinstance(value, int) and abs(value) >= TOO_LARGE:
        return "a number with many digits"
    if isinstance(value, date):  # or a time
        return f"the date {value.isoformat()}"
    text = str(value).lower() if isinstance(value, bool) else ascii(value) if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 50 else text[:47] + "..."


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def yaml_files(folder: Path) -> list[Path]:
    """Return the YAML files of a folder by name, without hidden ones; none if there is no folder. Raises OSError if it cannot be read."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml") and not path.name.startswith("."))
