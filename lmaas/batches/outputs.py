"""The lines of a batch's result files, in OpenAI's and in Anthropic's form. Pure, and always the same for the same row."""

import hashlib
from typing import Any, NamedTuple

import msgspec

from lmaas.states import LineState
from lmaas.store.batch_lines import LineRow


class Stop(NamedTuple):
    """The reason why the pending lines of a batch were not run."""

    code: str
    message: str


EXPIRED = Stop("batch_expired", "This request was not run before the batch expired.")
CANCELLED = Stop("batch_cancelled", "This request was not run, because the batch was cancelled.")
#: Of a line that is pending in a batch that nothing has stopped, which is a fault of the service.
LEFT = Stop("internal_error", "This request was not run because of an error of the service.")


class _Error(msgspec.Struct):
    """An error instead of a response, as it is stored."""

    code: str
    message: str


_ERROR = msgspec.json.Decoder(_Error)


def openai_line(batch_id: str, line: LineRow, stop: Stop) -> bytes:
    """Return a line of OpenAI's output file or error file, with its end."""
    response = None
    error = _error_of(line, stop)
    if error is None:
        # A request that was refused before it ran has no id in the ledger.
        request_id = line.request_id or f"req_{_digest(batch_id, line)}"
        response = {"status_code": line.status_code, "request_id": request_id, "body": _raw(line.answer)}
    shown = {
        "id": f"batch_req_{_digest(batch_id, line)}",
        "custom_id": line.custom_id,
        "response": response,
        "error": None if error is None else {"code": error.code, "message": error.message},
    }
    return msgspec.json.encode(shown) + b"\n"


def anthropic_line(line: LineRow, stop: Stop) -> bytes:
    """Return a line of the results of Anthropic's message batches, with its end."""
    return msgspec.json.encode({"custom_id": line.custom_id, "result": _result(line, stop)}) + b"\n"


def _result(line: LineRow, stop: Stop) -> dict[str, Any]:
    error = _error_of(line, stop)
    if error is None:
        if line.state == LineState.DONE:
            return {"type": "succeeded", "message": _raw(line.answer)}
        return {"type": "errored", "error": _raw(line.answer)}
    if error.code == EXPIRED.code:
        return {"type": "expired"}
    if error.code == CANCELLED.code:
        return {"type": "canceled"}
    inner = {"type": "api_error", "message": error.message, "code": error.code, "details": {"error_code": error.code}}
    return {"type": "errored", "error": {"type": "error", "error": inner, "request_id": line.request_id}}


def _error_of(line: LineRow, stop: Stop) -> Stop | None:
    """Return why a line has no response, None if it has one."""
    if line.state not in (LineState.DONE, LineState.FAILED):
        return stop
    if line.status_code is not None:
        return None
    stored = _ERROR.decode(line.answer or b"{}")
    return Stop(stored.code, stored.message)


def _raw(body: bytes | None) -> msgspec.Raw:
    # A body is JSON, in which the ends of lines are only space between values.
    return msgspec.Raw((body or b"null").replace(b"\n", b" ").replace(b"\r", b" "))


def _digest(batch_id: str, line: LineRow) -> str:
    """Return what the id of a line is made of. It is the same whenever the file is written."""
    return hashlib.blake2b(f"{batch_id}/{line.line}".encode(), digest_size=12).hexdigest()
