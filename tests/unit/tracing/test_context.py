"""The ids of traces, and the headers that carry them."""

import pytest

from lmaas.http import new_request_id
from lmaas.jobs.background import attempt_id
from lmaas.tracing.context import MAX_STATE, OWN_PREFIX, TraceContext, own, received

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01".encode()


@pytest.mark.parametrize(
    ("sent", "sampled"),
    [
        (PARENT, True),
        (f"00-{TRACE}-{SPAN}-00".encode(), False),
        (f"00-{TRACE}-{SPAN}-03".encode(), True),
        (f"00-{TRACE}-{SPAN}-fe".encode(), False),
        (f" 00-{TRACE}-{SPAN}-01 ".encode(), True),
        pytest.param(f"cc-{TRACE}-{SPAN}-01-what-the-future-is-like".encode(), True, id="later version"),
    ],
)
def test_a_clients_trace_is_continued(sent: bytes, sampled: bool) -> None:
    assert received([(b"host", b"x"), (b"traceparent", sent)]) == TraceContext(TRACE, SPAN, sampled)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param([], id="none"),
        pytest.param([PARENT, PARENT], id="two"),
        pytest.param([b""], id="empty"),
        pytest.param([b"00-xyz"], id="no ids"),
        pytest.param([PARENT.upper()], id="upper case"),
        pytest.param([PARENT + b"-more"], id="more than version 0 has"),
        pytest.param([PARENT + b"1"], id="long flags"),
        pytest.param([b"ff" + PARENT[2:]], id="version 255"),
        pytest.param([f"00-{'0' * 32}-{SPAN}-01".encode()], id="trace of zeros"),
        pytest.param([f"00-{TRACE}-{'0' * 16}-01".encode()], id="span of zeros"),
        pytest.param([b"\xff" * 55], id="no ASCII"),
        pytest.param([b"0" * 60_000], id="long"),
    ],
)
def test_headers_that_are_wrong_are_ignored(sent: list[bytes]) -> None:
    assert received([(b"traceparent", value) for value in sent]) is None


@pytest.mark.parametrize(
    ("states", "kept"),
    [
        ([b"a=1"], "a=1"),
        ([b"a=1", b"b=2,c=3"], "a=1,b=2,c=3"),
        ([b"a=" + b"x" * MAX_STATE], ""),
        ([b"a=\xff"], ""),
        ([b"a=\x00"], ""),
        ([], ""),
    ],
)
def test_the_state_of_other_systems_is_passed_on(states: list[bytes], kept: str) -> None:
    context = received([(b"traceparent", PARENT), *((b"tracestate", value) for value in states)])
    assert context is not None
    assert context.state == kept


def test_own_ids_are_those_of_requests() -> None:
    assert own("req_0123456789abcdef01234567", 1) == TraceContext(f"{OWN_PREFIX}0123456789abcdef01234567", "", sampled=True)
    # All attempts of a response in the background have the trace of the request that created it.
    first, third = (attempt_id("resp_0123456789abcdef01234567", number) for number in (1, 3))
    assert own(first, 1) == own(third, 1) == own("req_0123456789abcdef01234567", 1)
    with pytest.raises(ValueError, match="'req_1' is not the id of a request"):
        own("req_1", 1)


@pytest.mark.parametrize(("ratio", "least", "most"), [(0, 0, 0), (1, 2000, 2000), (0.25, 380, 620)])
def test_a_share_is_sampled(ratio: float, least: int, most: int) -> None:
    assert least <= sum(own(new_request_id(), ratio).sampled for _ in range(2000)) <= most


def test_a_trace_that_a_small_share_has_is_in_a_larger_share_too() -> None:
    for _ in range(200):
        request_id = new_request_id()
        decisions = [own(request_id, ratio).sampled for ratio in (0.1, 0.5, 0.9)]
        assert decisions == sorted(decisions)
