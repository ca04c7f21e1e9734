"""The request log has one line for each request, and no text of a tenant."""

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from lmaas.http import CODE, MAX_SHOWN_PATH, PRINCIPAL
from lmaas.inference.protocol import INFERENCE
from lmaas.inference.request_log import RequestLog
from lmaas.metering.usage import UsageRecord
from lmaas.states import UsageStatus
from lmaas.types import Principal, Role

NOON = datetime(2026, 11, 30, 12, 0, 0, 345_000, tzinfo=UTC).timestamp()
TENANT = Principal("key_1", Role.INFERENCE, "ten_1", "acme")
OPERATOR = Principal("key_2", Role.OPERATOR, None, None)
HEAD = {"time": "2026-11-30T12:00:00.345Z", "level": "INFO", "logger": "lmaas.requests", "message": "request"}


def record(**fields: Any) -> UsageRecord:
    return UsageRecord("req_1", "ten_1", "key_1", "base", "robot", "ten_1-abc", 3, stream=True, **fields)


def inference(**fields: Any) -> Any:
    model = SimpleNamespace(shown="robot@3", base=SimpleNamespace(name="base"))
    protocol = SimpleNamespace(path="/v1/chat/completions")
    return SimpleNamespace(request_id="req_1", model=model, first_s=None, trace=None, protocol=protocol, **fields)


def logged(status: int, path: str = "/v1/adapters", method: str | None = "GET", **left: Any) -> dict[str, Any] | None:
    """Return the fields of the line of a request that left these things in its scope."""
    lines: list[str] = []
    scope = {"method": method, "path": path, "request_id": "req_1", "query_string": b"secret=1"} | left
    RequestLog(lines.append, lambda: NOON).ended(scope, status, 0.0204)
    if not lines:
        return None
    (line,) = lines
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    found: dict[str, Any] = json.loads(line)
    assert len(found) == line.count('": '), "a field is there twice"
    return found


def test_a_served_request() -> None:
    served = record(status=UsageStatus.COMPLETED, prompt_tokens=12, cached_tokens=8, completion_tokens=5)
    served.start("rep_1", queue_ms=7, load_ms=3)
    served.end(UsageStatus.COMPLETED)
    asked = inference(record=served)
    asked.first_s = 0.0156
    found = logged(200, "/v1/chat/completions", "POST", **{PRINCIPAL: TENANT, INFERENCE: asked})
    assert found == HEAD | {
        "request_id": "req_1",
        "tenant_id": "ten_1",
        "key_id": "key_1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "took_ms": 20,
        "outcome": "completed",
        "code": None,
        "model": "robot@3",
        "base_model": "base",
        "stream": True,
        "replica_id": "rep_1",
        "queue_ms": 7,
        "load_ms": 3,
        "ttft_ms": 16,
        "run_ms": 0,
        "prompt_tokens": 12,
        "cached_tokens": 8,
        "completion_tokens": 5,
    }


def test_a_request_that_was_accepted_and_failed() -> None:
    failed = record()
    failed.end(UsageStatus.FAILED, "engine_failed")
    found = logged(502, "/v1/completions", "POST", **{PRINCIPAL: TENANT, INFERENCE: inference(record=failed)})
    assert found is not None
    shown = {name: found[name] for name in ("status", "outcome", "code", "replica_id", "run_ms", "ttft_ms")}
    assert shown == {"status": 502, "outcome": "failed", "code": "engine_failed", "replica_id": None, "run_ms": None, "ttft_ms": None}


@pytest.mark.parametrize(
    ("status", "left", "expected"),
    [
        pytest.param(200, {PRINCIPAL: TENANT}, {"tenant_id": "ten_1", "outcome": "ok", "code": None}, id="management"),
        pytest.param(200, {PRINCIPAL: OPERATOR}, {"tenant_id": None, "key_id": "key_2", "outcome": "ok"}, id="operator"),
        pytest.param(401, {CODE: "invalid_api_key"}, {"tenant_id": None, "key_id": None, "outcome": "refused"}, id="no key"),
        pytest.param(404, {PRINCIPAL: TENANT, CODE: "not_found"}, {"key_id": "key_1", "code": "not_found"}, id="not found"),
        pytest.param(502, {}, {"outcome": "refused", "code": None}, id="an error of another process"),
        pytest.param(0, {PRINCIPAL: TENANT}, {"status": None, "outcome": "left"}, id="the client left"),
        pytest.param(
            429,
            {PRINCIPAL: TENANT, CODE: "queue_full", INFERENCE: inference(record=record())},
            {"outcome": "refused", "code": "queue_full", "model": "robot@3", "base_model": "base"},
            id="over a limit",
        ),
        pytest.param(200, {PRINCIPAL: TENANT, INFERENCE: inference()}, {"outcome": "ok", "model": "robot@3"}, id="in the background"),
    ],
)
def test_requests_that_no_engine_served(status: int, left: dict[str, Any], expected: dict[str, Any]) -> None:
    found = logged(status, **left)
    assert found is not None
    assert expected.items() <= found.items()
    assert "prompt_tokens" not in found


def test_a_model_is_named_only_if_it_exists() -> None:
    asked = inference()
    del asked.model
    found = logged(404, **{PRINCIPAL: TENANT, CODE: "model_not_found", INFERENCE: asked})
    assert found is not None
    assert "model" not in found


@pytest.mark.parametrize("path", ['/v1/ad"apters\n\x01ü\u2028', "/" + "x" * 10_000, "/\\"])
def test_a_path_may_have_anything(path: str) -> None:
    found = logged(404, path, **{CODE: "not_found"})
    assert found is not None
    assert found["path"] == path[:MAX_SHOWN_PATH]


def test_bytes_that_are_not_http_have_no_method() -> None:
    found = logged(400, "", None, **{CODE: "invalid_http"})
    assert found is not None
    assert (found["method"], found["code"]) == (None, "invalid_http")


@pytest.mark.parametrize("path", ["/healthz", "/health", "/readyz", "/metrics"])
def test_probes_are_logged_if_they_fail(path: str) -> None:
    assert logged(200, path) is None
    assert logged(503, path, **{CODE: "starting"}) is not None
    assert logged(0, path) is not None


def test_an_attempt_of_a_job_runner() -> None:
    lines: list[str] = []
    log = RequestLog(lines.append, lambda: NOON)
    wasted = record()
    wasted.end(UsageStatus.WASTED, "put_back")
    log.attempt("batch_line", TENANT, inference(record=wasted), "batch_1")
    log.attempt("background", TENANT, inference(), "resp_1", "no_capacity")
    first, second = (json.loads(line) for line in lines)
    assert first["message"] == "attempt"
    assert (first["action"], first["belongs_to"], first["outcome"], first["code"]) == ("batch_line", "batch_1", "wasted", "put_back")
    assert (first["path"], first["key_id"], first["prompt_tokens"]) == ("/v1/chat/completions", "key_1", 0)
    assert (second["belongs_to"], second["outcome"], second["code"]) == ("resp_1", "refused", "no_capacity")


def test_the_time_of_each_second_is_right() -> None:
    lines: list[str] = []
    moments = iter([NOON, NOON + 0.5, NOON + 1, NOON + 0.9])
    log = RequestLog(lines.append, lambda: next(moments))
    for _ in range(4):
        log.ended({"method": "GET", "path": "/", "request_id": "req_1"}, 200, 0)
    assert [json.loads(line)["time"][17:] for line in lines] == ["00.345Z", "00.845Z", "01.345Z", "01.245Z"]
