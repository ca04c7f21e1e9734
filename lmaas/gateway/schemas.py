"""JSON schemas that an engine may compile: bounded, since compiling is done by the engine that all tenants share.

A schema of 200 bytes can stop an engine for minutes: repetitions multiply (`(a{1,30000}b{1,30000}){1,30000}`), and a schema that is only
itself never ends.
"""

import hashlib
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

from lmaas.errors import InvalidRequest, OverLimit

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_PATTERN_LENGTH = 1000
#: About how many states a schema may unfold to. Measured on 2 cores: two million took 0.3 s, fifty million 4 s.
MAX_COST = 100_000
#: Schemas that a tenant may bring in a minute and that it has not used lately: each is compiled.
MAX_NEW = 60
NEW_WINDOW_S = 60.0
KNOWN_SCHEMAS = 256
KNOWN_TENANTS = 10_000


class NewSchemas:
    """Which schemas each tenant has used lately; those beyond MAX_NEW new ones a minute are refused. One gateway's view."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tenants: OrderedDict[str, tuple[OrderedDict[bytes, None], deque[float]]] = OrderedDict()

    def admit(self, tenant_id: str, schemas: Any) -> None:
        """Take note of what an engine would compile for this request. Raises OverLimit `too_many_new_schemas`."""
        known, times = self._tenants.setdefault(tenant_id, (OrderedDict(), deque()))
        self._tenants.move_to_end(tenant_id)
        if len(self._tenants) > KNOWN_TENANTS:
            self._tenants.popitem(last=False)
        digest = hashlib.sha256(json.dumps(schemas, sort_keys=True).encode()).digest()
        if digest in known:
            known.move_to_end(digest)
            return
        now = self._clock()
        while times and times[0] <= now - NEW_WINDOW_S:
            times.popleft()
        if len(times) >= MAX_NEW:
            raise OverLimit(
                f"At most {MAX_NEW} new schemas or sets of tools may be brought in a minute; those used lately do not count.",
                code="too_many_new_schemas",
                retry_after_s=times[0] + NEW_WINDOW_S - now,
            )
        times.append(now)
        known[digest] = None
        if len(known) > KNOWN_SCHEMAS:
            known.popitem(last=False)


def depth(value: Any) -> int:
    """How deep lists and objects are nested; found without recursion."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [item for parent in level for item in _children(parent)]
    return deepest


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def check_schema(name: str, schema: Any) -> None:
    """Raises InvalidRequest `invalid_schema` (with `name` as the parameter to blame) unless an engine can compile it in no time."""
    if not isinstance(schema, dict):
        raise _invalid(name, "must hold a JSON schema object")
    # Depth first: what is too deep breaks json.dumps.
    if depth(schema) > MAX_DEPTH or len(json.dumps(schema)) > MAX_BYTES:
        raise _invalid(name, f"holds a schema that is too large: {MAX_BYTES} bytes and {MAX_DEPTH} levels are allowed")
    for part in _parts(schema):
        reference = part.get("$ref")
        if reference is not None and _resolve(schema, reference) is None:
            raise _invalid(name, "holds a $ref that is not a place in the same schema")
    if _is_only_itself(schema):
        raise _invalid(name, "holds a schema that refers to nothing but itself")
    if _cost(schema) > MAX_COST:
        raise _invalid(name, "holds a schema whose repetitions multiply to too much: use smaller counts in patterns, lengths and items")


def _invalid(name: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"'{name}' {what}.", code="invalid_schema", param=name)


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
        waiting += _children(value)


def _resolve(schema: dict[str, Any], reference: Any) -> Any:
    """What a `$ref` such as `#/$defs/city` names, or None."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    value: Any = schema
    for step in reference[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def _is_only_itself(schema: dict[str, Any]) -> bool:
    """Whether some part leads back to itself without a property or an item between: then there is nothing to generate."""
    done: set[int] = set()
    for start in _parts(schema):
        path: list[tuple[int, Iterator[Any]]] = []
        active: set[int] = set()
        step: Any = start
        while True:
            if isinstance(step, dict):
                if id(step) in active:
                    return True
                if id(step) not in done:
                    active.add(id(step))
                    path.append((id(step), _same_place(schema, step)))
            while path:
                step = next(path[-1][1], None)
                if step is not None:
                    break
                finished = path.pop()[0]
                active.discard(finished)
                done.add(finished)
            else:
                break
    return False


def _same_place(schema: dict[str, Any], part: dict[str, Any]) -> Iterator[Any]:
    if "$ref" in part:
        yield _resolve(schema, part["$ref"])
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(part.get(key), list):
            yield from part[key]


def _count(value: Any) -> int:
    return min(value, MAX_COST + 1) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _cost(part: Any) -> int:
    """About how many states a part unfolds to. The depth is bounded, so recursion is."""
    if isinstance(part, list):
        return sum(_cost(item) for item in part)
    if not isinstance(part, dict):
        return 1
    own = 1 + max(_count(part.get("minLength")), _count(part.get("maxLength")))
    patterns = [part.get("pattern")]
    if isinstance(part.get("patternProperties"), dict):
        patterns += list(part["patternProperties"])
    own += sum(pattern_cost(pattern) for pattern in patterns if isinstance(pattern, str))
    repeated = max(
        1, _count(part.get("minItems")), _count(part.get("maxItems")), _count(part.get("minProperties")), _count(part.get("maxProperties"))
    )
    return min((own + sum(_cost(value) for value in part.values() if isinstance(value, dict | list))) * repeated, MAX_COST + 1)


def pattern_cost(pattern: str) -> int:
    """About how many states a regular expression unfolds to: counts multiply what they repeat, what stands in a row adds up."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        return MAX_COST + 1
    groups: list[list[int]] = [[0, 0]]  # for each open group: the cost of all its items, and of the last one
    at = 0
    while at < len(pattern):
        character = pattern[at]
        at += 1
        if character == "(":
            groups.append([0, 0])
        elif character == ")" and len(groups) > 1:
            _add(groups, sum(groups.pop()))
        elif character == "{" and (end := pattern.find("}", at)) > 0 and (times := _times(pattern[at:end])):
            groups[-1][1] = min(groups[-1][1] * times, MAX_COST + 1)
            at = end + 1
        elif character == "[":
            # A class is one item.
            end = at
            while end < len(pattern) and pattern[end] != "]":
                end += 2 if pattern[end] == "\\" else 1
            at = end + 1
            _add(groups, 1)
        else:
            at += character == "\\"
            _add(groups, 1)
    return min(sum(sum(group) for group in groups), MAX_COST + 1)


def _add(groups: list[list[int]], cost: int) -> None:
    groups[-1] = [min(sum(groups[-1]), MAX_COST + 1), min(cost, MAX_COST + 1)]


def _times(counts: str) -> int:
    """The highest count of `{3}`, `{3,}` or `{3,5}`; 0 if it is no count."""
    numbers = counts.split(",")
    if (
        len(numbers) > 2
        or not numbers[0].isdigit()
        or not all(number == "" or (number.isascii() and number.isdigit()) for number in numbers)
    ):
        return 0
    return max(1, *(min(int(number[:9]), MAX_COST + 1) if len(number) < 10 else MAX_COST + 1 for number in numbers if number))
