"""The ids of a trace, and the header that passes them on (W3C Trace Context)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

#: The first digits of the ids of traces that begin here. The rest are those of the request id, so that either can be found by the other.
OWN_PREFIX = "6c6d6161"
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_REQUEST_ID = re.compile(r"req_([0-9a-f]{24})(?:_\d+)?")
#: The header `tracestate` is dropped if it is longer, as the standard allows.
MAX_STATE = 512
_STATE = re.compile(rb"[\x20-\x7e]+")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A place in a trace. `span_id` is that of the caller's span, empty for a trace that begins here."""

    trace_id: str
    span_id: str
    sampled: bool
    state: str = ""


def received(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """Return the context that a client sent, or None. Invalid headers are ignored, as the standard demands."""
    parents = []
    states = []
    for name, value in headers:
        if name == b"traceparent":
            parents.append(value)
        elif name == b"tracestate":
            states.append(value)
    found = _TRACEPARENT.fullmatch(parents[0].strip()) if len(parents) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    # A later version may have more fields. 255 is no version.
    if version == b"ff" or (version == b"00" and more) or not trace_id.strip(b"0") or not span_id.strip(b"0"):
        return None
    state = b",".join(states)
    kept = state.decode() if len(state) <= MAX_STATE and _STATE.fullmatch(state) else ""
    return TraceContext(trace_id.decode(), span_id.decode(), bool(int(flags, 16) & 1), kept)


def own(request_id: str, ratio: float) -> TraceContext:
    """Return the context of a request without one. All attempts of a response in the background have the same trace. The share `ratio` of
    all traces is sampled; the id decides, so that all processes decide the same."""
    match = _REQUEST_ID.fullmatch(request_id)
    if match is None:
        raise ValueError(f"{request_id!r} is not the id of a request")
    trace_id = OWN_PREFIX + match[1]
    return TraceContext(trace_id, "", int(trace_id[16:], 16) < ratio * 2**64)
