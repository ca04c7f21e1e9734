"""The spans of one request."""

import re
import time

from lmaas.tracing.context import TraceContext
from lmaas.tracing.trace import Kind, Trace, only_root

CONTEXT = TraceContext("0" * 31 + "1", "00000000000000ff", sampled=True, state="a=1")


def test_stages_follow_each_other_below_the_request() -> None:
    trace = Trace(CONTEXT, "admission")
    before = time.time_ns()
    trace.enter("queue")
    time.sleep(0.03)
    trace.enter("load", {"x": 1}, began_s=0.01)
    trace.enter("delivery", kind=Kind.CLIENT)
    trace.mark("first_token")
    headers = trace.engine_headers()
    root, admission, queue, load, delivery = trace.end("POST /x", Kind.SERVER, 5.0, {"y": 2}, "failed")
    assert [span.name for span in (root, admission, queue, load, delivery)] == ["POST /x", "admission", "queue", "load", "delivery"]
    assert (root.parent_id, root.kind, root.attributes, root.error) == (CONTEXT.span_id, Kind.SERVER, {"y": 2}, "failed")
    assert 4.9e9 < root.end_ns - root.start_ns < 5.1e9
    stages = [admission, queue, load, delivery]
    assert admission.start_ns == root.start_ns
    assert [span.end_ns for span in stages] == [*(span.start_ns for span in stages[1:]), root.end_ns]
    assert {span.parent_id for span in stages} == {root.span_id}
    assert {span.trace_id for span in (root, *stages)} == {CONTEXT.trace_id}
    assert len({span.span_id for span in (root, *stages)}) == 5
    assert all(re.fullmatch("[0-9a-f]{16}", span.span_id) for span in (root, *stages))
    assert 9e6 < load.end_ns - load.start_ns < 20e6
    assert [span.error for span in stages] == ["", "", "", "failed"]
    assert [name for name, moment in delivery.events if before <= moment <= delivery.end_ns] == ["first_token"]
    assert headers == {"traceparent": f"00-{CONTEXT.trace_id}-{delivery.span_id}-01", "tracestate": "a=1"}


def test_a_load_cannot_begin_before_its_queue() -> None:
    trace = Trace(TraceContext(CONTEXT.trace_id, "", sampled=True), "admission")
    trace.enter("queue")
    trace.enter("load", began_s=60)
    assert set(trace.engine_headers()) == {"traceparent"}
    root, admission, queue, load = trace.end("x", Kind.CONSUMER, 0.0, {})
    assert root.parent_id == ""
    assert admission.start_ns <= admission.end_ns <= queue.start_ns == queue.end_ns == load.start_ns <= load.end_ns


def test_an_engine_that_was_lost_is_a_stage_that_failed() -> None:
    trace = Trace(CONTEXT, "admission")
    trace.enter("delivery")
    first = trace.engine_headers()
    trace.enter("queue", failed="engine_failed")
    trace.enter("delivery")
    assert trace.engine_headers() != first
    errors = {span.name + span.error for span in trace.end("x", Kind.SERVER, 0.1, {})}
    assert errors == {"x", "admission", "deliveryengine_failed", "queue", "delivery"}


def test_a_request_without_stages() -> None:
    (span,) = only_root(CONTEXT, "GET /v1/files", Kind.SERVER, 0.5, {})
    assert (span.trace_id, span.parent_id, span.end_ns - span.start_ns) == (CONTEXT.trace_id, CONTEXT.span_id, 500_000_000)
    assert abs(span.end_ns - time.time_ns()) < 1e9
