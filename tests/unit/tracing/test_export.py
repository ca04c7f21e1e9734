"""Spans are sent in groups, and an outage of the collector loses only spans."""

import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lmaas.errors import SettingsError
from lmaas.tracing.context import TraceContext
from lmaas.tracing.export import AGAIN_S, LOG_EVERY_S, SPANS_AT_ONCE, Sender, portions, span_writer
from lmaas.tracing.otlp import exporter
from lmaas.tracing.trace import Attribute, Kind, Span, Trace, only_root
from tests.support.clocks import Clock
from tests.support.collector import collector
from tests.support.processes import free_port

CONTEXT = TraceContext("6c6d61610123456789abcdef01234567", "", sampled=True)


def trace(spans: int = 1) -> list[Span]:
    return only_root(CONTEXT, "x", Kind.SERVER, 0, {}) * spans


class Collecting:
    """An exporter that succeeds or fails, as the test sets."""

    def __init__(self) -> None:
        self.works = True
        self.calls: list[int] = []

    def __call__(self, spans: Sequence[Span]) -> bool:
        self.calls.append(len(spans))
        return self.works


def test_a_collector_that_is_away_is_asked_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    export, clock = Collecting(), Clock()
    sender = Sender(export, clock)
    assert sender.send([trace(2), trace(3)]) == 0
    assert export.calls == [5]
    export.works = False
    with caplog.at_level(logging.WARNING):
        assert sender.send([trace()] * (2 * SPANS_AT_ONCE)) == 2 * SPANS_AT_ONCE
        assert len(export.calls) == 2, "the second half does not wait for another failure"
        assert sender.send([trace()]) == 1
        clock.now += AGAIN_S
        assert sender.send([trace()]) == 1
        assert len(export.calls) == 3
        assert len(caplog.messages) == 1
        clock.now += LOG_EVERY_S
        assert sender.send([trace()]) == 1
        assert len(caplog.messages) == 2
    export.works = True
    clock.now += AGAIN_S
    assert sender.send([trace()]) == 0


def test_traces_are_not_divided() -> None:
    traces = [trace(spans) for spans in (5, 500, 8, 600, 1)]
    assert [[len(each) for each in portion] for portion in portions(traces)] == [[5, 500], [8], [600], [1]]


def test_spans_arrive_as_they_are() -> None:
    begun = Trace(replace(CONTEXT, span_id="00000000000000aa"), "admission")
    begun.enter("delivery", {"lmaas.replica.id": "rep_1"}, kind=Kind.CLIENT)
    begun.mark("first_token")
    attributes: dict[str, Attribute] = {
        "gen_ai.request.model": "robot",
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.request.stream": True,
        "seconds": 0.5,
    }
    spans = begun.end("POST /v1/x", Kind.SERVER, 2.0, attributes, "engine_failed")
    with collector() as collected:
        assert exporter(collected.url, "lmaas-gateway", 5.0)(spans)
        found = collected.trace(CONTEXT.trace_id)
        collected.status = 400
        assert not exporter(collected.url, "lmaas-gateway", 5.0)(spans)
    root, admission, delivery = (found[name] for name in ("POST /v1/x", "admission", "delivery"))
    assert (root.service, root.parent_id, root.kind, root.failed, root.attributes) == (
        "lmaas-gateway",
        "00000000000000aa",
        2,
        True,
        attributes,
    )
    assert (admission.parent_id, admission.kind, admission.failed, admission.start_ns) == (root.span_id, 1, False, root.start_ns)
    assert (delivery.kind, delivery.events, delivery.attributes) == (3, ["first_token"], {"lmaas.replica.id": "rep_1"})


async def test_a_collector_that_is_not_there_delays_no_request() -> None:
    began = time.monotonic()
    with span_writer(f"http://127.0.0.1:{free_port()}/v1/traces", "lmaas-gateway") as writer:
        for _ in range(5000):
            writer.add(trace())
        assert time.monotonic() - began < 1
        assert writer.dropped == 3000
    assert time.monotonic() - began < 5


def test_without_traces_opentelemetry_is_not_imported() -> None:
    # The client of Redis imports a part of OpenTelemetry where it is installed.
    code = "import lmaas.app, sys; print(*sys.modules.keys() & {'lmaas.tracing.otlp', 'opentelemetry.sdk.trace', 'google.protobuf'})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_without_opentelemetry_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "lmaas.tracing.otlp", raising=False)
    monkeypatch.delattr("lmaas.tracing.otlp", raising=False)
    with pytest.raises(SettingsError, match="pip install 'lmaas\\[traces\\]'"):
        span_writer("http://127.0.0.1:1/v1/traces", "x")
