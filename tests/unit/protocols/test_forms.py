"""Each response of every protocol has one of two forms: a stream, or one piece."""

from typing import Any

import pytest

from lmaas.errors import InternalError
from lmaas.inference.protocol import AnyProtocol
from lmaas.protocols.messages.protocol import Messages
from lmaas.protocols.pooling.embeddings import Embeddings
from lmaas.protocols.pooling.ranking import Rerank, Score
from lmaas.protocols.responses.protocol import Responses
from lmaas.protocols.text import ChatCompletions, Completions
from tests.unit.protocols.pooling.build import inference_of
from tests.unit.protocols.responses.build import NoState

CHAT = [{"role": "user", "content": "Hello"}]
STREAMED: list[tuple[AnyProtocol, dict[str, Any]]] = [
    (ChatCompletions(), {"messages": CHAT}),
    (Completions(), {"prompt": "Hello"}),
    (Responses(NoState()), {"input": "Hello"}),
    (Messages(), {"messages": CHAT, "max_tokens": 5}),
]
WHOLE: list[tuple[AnyProtocol, dict[str, Any]]] = [
    *STREAMED,
    (Embeddings(), {"input": "Hello"}),
    (Rerank(), {"query": "Hello", "documents": ["Bye"]}),
    (Score(), {"text_1": "Hello", "text_2": "Bye"}),
]


@pytest.mark.parametrize(("protocol", "body"), WHOLE, ids=lambda value: getattr(value, "path", ""))
def test_an_answer_in_one_piece_is_no_stream(protocol: AnyProtocol, body: dict[str, Any]) -> None:
    whole = protocol.answer(inference_of(protocol, body))
    with pytest.raises(ValueError, match="a stream instead"):
        whole.feed(b"data: {}\n\n")
    assert (whole.close(), whole.failed(InternalError())) == (b"", b"")


@pytest.mark.parametrize(("protocol", "body"), STREAMED, ids=lambda value: getattr(value, "path", ""))
def test_a_stream_is_no_answer_in_one_piece(protocol: AnyProtocol, body: dict[str, Any]) -> None:
    stream = protocol.answer(inference_of(protocol, body | {"stream": True}))
    with pytest.raises(ValueError, match="a whole answer instead"):
        stream.take(b"{}")
    assert stream.failed(InternalError())
