"""The request log: one line of JSON for each request, and for each attempt of a batch line or a background response.

No line has text of a prompt, an answer or a file. A model is named only if it exists, and a query string is left out, because either may
contain any text. The lines have the form of the other logs, but are formatted here: the logging module would take as long as a tenth of a
request.
"""

import time
from collections.abc import Callable
from json.encoder import encode_basestring_ascii

from starlette.types import Scope

from lmaas.http import CODE, MAX_SHOWN_PATH, PRINCIPAL, QUIET
from lmaas.inference.catalog import ServedModel
from lmaas.inference.protocol import INFERENCE, AnyInference
from lmaas.types import Principal

#: The logger's name in the lines.
LOGGER = "lmaas.requests"


class RequestLog:
    """Formats the lines, and gives them to `write`."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.time) -> None:
        self._write, self._clock = write, clock
        #: The second for which `_prefix` was made.
        self._second = 0
        self._prefix = ""

    def ended(self, scope: Scope, status: int, took_s: float) -> None:
        """Log a request of a client, which got a response with this status, or none if it is 0."""
        inference: AnyInference | None = scope.get(INFERENCE)
        path: str = scope["path"]
        if inference is None and path in QUIET and 0 < status < 400:
            return
        principal: Principal | None = scope.get(PRINCIPAL)
        code: str | None = scope.get(CODE)
        if principal is None:
            who = '"tenant_id": null, "key_id": null'
        else:
            who = f'"tenant_id": {_text(principal.tenant_id)}, "key_id": "{principal.key_id}"'
        if inference is None or code is not None or getattr(inference, "record", None) is None:
            rest = _not_served(inference, "refused" if code or status >= 400 else "ok" if status else "left", code)
        else:
            rest = _served(inference)
        self._write(
            f'{self._head("request")}, "request_id": "{scope["request_id"]}", {who}, "method": {_text(scope["method"])}, '
            f'"path": {_text(path[:MAX_SHOWN_PATH])}, "status": {status or "null"}, "took_ms": {took_s * 1000:.0f}{rest}}}\n'
        )

    def attempt(self, action: str, principal: Principal, inference: AnyInference, belongs_to: str, code: str | None = None) -> None:
        """Log an attempt of a job runner, with the code of the error if it was not accepted.

        `action` is `batch_line` or `background`, `belongs_to` the id of the batch or the response.
        """
        rest = _not_served(inference, "refused", code) if code is not None else _served(inference)
        self._write(
            f'{self._head("attempt")}, "action": "{action}", "request_id": "{inference.request_id}", '
            f'"tenant_id": {_text(principal.tenant_id)}, "key_id": "{principal.key_id}", "belongs_to": "{belongs_to}", '
            f'"path": "{inference.protocol.path}"{rest}}}\n'
        )

    def _head(self, message: str) -> str:
        now = self._clock()
        second = int(now)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        millis = int((now - second) * 1000)
        return f'{{"time": "{self._prefix}.{millis:03d}Z", "level": "INFO", "logger": "{LOGGER}", "message": "{message}"'


def _not_served(inference: AnyInference | None, outcome: str, code: str | None) -> str:
    """Return the fields of a request that no engine served. It has a model if that was found before the request was refused."""
    model: ServedModel | None = getattr(inference, "model", None)
    named = "" if model is None else f', "model": "{model.shown}", "base_model": "{model.base.name}"'
    return f', "outcome": "{outcome}", "code": {_text(code)}{named}'


def _served(inference: AnyInference) -> str:
    """Return the fields of an inference that was accepted."""
    record, model = inference.record, inference.model
    run_ms, first_s = record.run_ms, inference.first_s
    traced = "" if inference.trace is None else f', "trace_id": "{inference.trace.trace_id}"'
    return (
        f', "outcome": "{record.status}", "code": {_text(record.code)}, "model": "{model.shown}", "base_model": "{model.base.name}", '
        f'"stream": {"true" if record.stream else "false"}, "replica_id": {_text(record.replica_id)}, "queue_ms": {record.queued_ms}, '
        f'"load_ms": {record.load_ms}, "ttft_ms": {"null" if first_s is None else round(first_s * 1000)}, '
        f'"run_ms": {"null" if run_ms is None else run_ms}, "prompt_tokens": {record.prompt_tokens}, '
        f'"cached_tokens": {record.cached_tokens}, "completion_tokens": {record.completion_tokens}{traced}'
    )


def _text(value: str | None) -> str:
    return "null" if value is None else encode_basestring_ascii(value)
