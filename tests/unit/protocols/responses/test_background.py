"""Responses in the background: their objects before the end, and reading their logs from any event on."""

import json
from typing import Any

import pytest

from lmaas.errors import InvalidRequest
from lmaas.protocols.responses.answer import StreamedResponse
from lmaas.protocols.responses.background import creation_events, error_event, failure_event, run_of, status_of, with_status
from lmaas.protocols.responses.event_log import rest_of
from lmaas.states import BackgroundStatus
from lmaas.store.event_logs import Piece
from tests.support.response_streams import parse
from tests.unit.protocols.responses.build import inference


def queued_response(**body: Any) -> bytes:
    return StreamedResponse(inference(background=True, **body)).queued()


@pytest.mark.parametrize("text", ["", '"status":"queued","completed_at":null,"error":null,', '\u2028\n\n"\\ud800'])
def test_only_the_status_changes(text: str) -> None:
    queued = queued_response(instructions=text, metadata={"status": "queued"})
    before = json.loads(queued)
    assert (before["status"], before["background"], before["output"], before["usage"]) == ("queued", True, [], None)
    for status in BackgroundStatus:
        body = with_status(queued, status)
        assert json.loads(body) == before | {"status": status}
        assert status_of(body) is status
    failed = json.loads(with_status(queued, "failed", InvalidRequest("no", code="context_length_exceeded", param="input")))
    assert failed["error"] == {"code": "context_length_exceeded", "message": "no", "param": "input", "type": "invalid_request_error"}
    assert failed | {"status": "queued", "error": None} == before
    run = run_of("resp_1", queued, 5)
    assert (run.response_id, run.created_at, run.first_event) == ("resp_1", before["created_at"], 5)


def test_the_events_of_a_creation_and_of_errors() -> None:
    queued = queued_response()
    stream = creation_events(queued) + failure_event(2, queued) + error_event(3, "a_code", 'A "message".\n\n')
    events, _ = parse(stream)
    response = json.loads(queued)
    expected: list[Any] = [
        {"type": kind, "sequence_number": number, "response": response}
        for number, kind in enumerate(["response.created", "response.queued", "response.failed"])
    ]
    expected.append({"type": "error", "sequence_number": 3, "code": "a_code", "message": 'A "message".\n\n', "param": None})
    assert events == expected


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_rest_of_a_piece(first: int, count: int) -> None:
    each = [error_event(first + number, "code", "text") for number in range(count)]
    piece = Piece(first, first + count - 1, b"".join(each))
    for cursor in range(-1, first + count):
        assert rest_of(piece, cursor) == b"".join(each[max(0, cursor - first + 1) :])


async def test_a_batch_cannot_have_background_responses() -> None:
    line = inference(background=True)
    with pytest.raises(InvalidRequest) as refused:
        await line.protocol.expand("ten_1", line.request)
    assert (refused.value.param, refused.value.error_code) == ("background", "unsupported_parameter")
