"""The lines of result files, for each end of a line and for both APIs."""

import json
from typing import Any

import pytest
from anthropic.types.messages import MessageBatchIndividualResponse

from lmaas.batches.outputs import CANCELLED, EXPIRED, LEFT, Stop, anthropic_line, openai_line
from lmaas.error_bodies import anthropic_body
from lmaas.errors import ModelNotFound
from lmaas.states import LineState
from lmaas.store.batch_lines import LineRow

MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "tiny",
    "content": [{"type": "text", "text": "Hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 2},
}
SPENT = Stop("insufficient_quota", "The budget is spent.")


def row(state: str = LineState.DONE, status: int | None = 200, answer: Any = None, request_id: str | None = "req_1") -> LineRow:
    return LineRow(0, 3, "id-ж", state, request_id, status, None if answer is None else json.dumps(answer).encode())


ENDS = [
    pytest.param(row(answer=MESSAGE), LEFT, {"status_code": 200, "request_id": "req_1", "body": MESSAGE}, None, "succeeded", id="done"),
    pytest.param(
        row(LineState.FAILED, 404, anthropic_body(ModelNotFound("x"), "req_1")),
        LEFT,
        {"status_code": 404, "request_id": "req_1", "body": anthropic_body(ModelNotFound("x"), "req_1")},
        None,
        "errored",
        id="refused",
    ),
    pytest.param(
        row(LineState.FAILED, None, {"code": "runner", "message": "No."}),
        EXPIRED,
        None,
        {"code": "runner", "message": "No."},
        "errored",
        id="an error without a response",
    ),
    pytest.param(row(LineState.PENDING, None), EXPIRED, None, EXPIRED._asdict(), "expired", id="expired"),
    pytest.param(row(LineState.PENDING, None), CANCELLED, None, CANCELLED._asdict(), "canceled", id="cancelled"),
    pytest.param(row(LineState.PENDING, None), SPENT, None, SPENT._asdict(), "errored", id="stopped"),
    pytest.param(row(LineState.RUNNING, None), LEFT, None, LEFT._asdict(), "errored", id="left"),
]


@pytest.mark.parametrize(("line", "stop", "response", "error", "kind"), ENDS)
def test_each_end_in_both_forms(line: LineRow, stop: Stop, response: Any, error: Any, kind: str) -> None:
    text = openai_line("batch_1", line, stop)
    shown = json.loads(text)
    assert shown.pop("id").startswith("batch_req_")
    assert shown == {"custom_id": "id-ж", "response": response, "error": error}
    result = json.loads(anthropic_line(line, stop))
    assert result["custom_id"] == "id-ж"
    assert result["result"]["type"] == kind
    # The types of Anthropic's library read it.
    read = MessageBatchIndividualResponse.model_validate(result)
    if read.result.type == "succeeded":
        assert read.result.message.content[0].type == "text"
    if read.result.type == "errored":
        assert read.result.error.error.message


def test_a_line_is_one_line_and_always_the_same() -> None:
    line = LineRow(0, 1, "a\nb", LineState.DONE, "req_1", 200, b'{\r\n"a": "b\\n"\n}')
    for text in (openai_line("batch_1", line, LEFT), anthropic_line(line, LEFT)):
        assert (text.count(b"\n"), text.count(b"\r")) == (1, 0)
    assert openai_line("batch_1", line, LEFT) == openai_line("batch_1", line, LEFT)
    assert json.loads(openai_line("batch_1", line, LEFT))["id"] != json.loads(openai_line("batch_2", line, LEFT))["id"]


def test_a_request_that_never_ran_has_an_id_too() -> None:
    shown = json.loads(openai_line("batch_1", row(LineState.FAILED, 404, {}, request_id=None), LEFT))
    assert shown["response"]["request_id"].startswith("req_")
