"""The bytes of a stream, compared with the same changes made with JSON."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmaas.protocols.sse import DONE, Rewriter, data, rewrite_whole
from lmaas.protocols.text import ChatCompletions

ENGINE = "ten_3f9c-" + "a1" * 32


def rewriter(**more: Any) -> Rewriter:
    return Rewriter(ENGINE, "m", **{"include_usage": False, "continuous_usage": False} | more)


def collect(chunks: list[bytes], **more: Any) -> list[bytes]:
    """Return the events that a client receives for these chunks."""
    rewrite = rewriter(**more)
    out = b"".join([*(rewrite.feed(chunk) for chunk in chunks), rewrite.close()])
    assert out == b"" or out.endswith(b"\n\n")
    return [event for raw in out.split(b"\n\n") if (event := raw.strip(b"\n"))] + [DONE] * rewrite.done


FACTS = {"service_tier": "default", "system_fingerprint": "fp_1"}


def with_facts(value: dict[str, Any], asked: str) -> dict[str, Any]:
    """Return the value with the client's name and the facts after it, in order, and without the engine's own."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if key not in FACTS:
            found |= {key: asked} | FACTS if key == "model" else {key: item}
    return found


LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text
)
EVENTS = st.lists(st.lists(LINES, min_size=1, max_size=3).map("\n".join).map(str.encode), max_size=6)


@given(EVENTS, st.lists(st.integers(0, 300), max_size=12), st.booleans())
def test_events_are_whole_however_the_bytes_arrive(sent: list[bytes], cuts: list[int], last_is_open: bool) -> None:
    stream = b"".join(event + b"\n\n" for event in sent)
    if last_is_open:
        stream = stream.removesuffix(b"\n\n")
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    chunks = [stream[start:end] for start, end in itertools.pairwise(places)]
    assert b"".join(chunks) == stream
    assert collect(chunks) == sent


@given(EVENTS)
def test_events_byte_by_byte(sent: list[bytes]) -> None:
    stream = b"".join(event + b"\n\n" for event in sent)
    assert collect([bytes([byte]) for byte in stream]) == sent


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([], []),
        ([b""], []),
        ([b"\n\n\n\n"], []),
        ([b"data: 1\n", b"\ndata: 2", b"\n\n"], [b"data: 1", b"data: 2"]),
        ([b"data: 1\n\ndata: [DONE]\n\n"], [b"data: 1", DONE]),
        ([b"data: 1\n\ndata: [DONE]"], [b"data: 1", DONE]),
        ([b": waits\n\n"], [b": waits"]),
        pytest.param([b"data: 1\n\n\ndata: 2\n\n"], [b"data: 1", b"data: 2"]),
    ],
)
def test_streams(chunks: list[bytes], expected: list[bytes]) -> None:
    assert collect(chunks) == expected


def test_events_of_ours() -> None:
    waiting = ChatCompletions().waiting(["position 3", "why"])
    assert waiting == b": position 3\n: why\n", "an empty line would end an event"
    assert data({"a": "ü\n\n"}) == 'data: {"a":"ü\\n\\n"}\n\n'.encode()
    assert collect([b": x\n" + data({"a": 1})]) == [b': x\ndata: {"a":1}'], "one event, whose first line clients skip"


NASTY = (
    *('"usage":{', ',"usage":{"prompt_tokens":1}', '"model":"x"', f'"model":"{ENGINE}"', ENGINE, '"choices":[],', '"choices":[]'),
    *("\\", '"', '\\"', "}", "{", "],", "\n\n", "data: [DONE]", "ü", "😀", "\x00", "\u2028"),
)
TEXT = st.lists(st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=["Cs"]), max_size=5)), max_size=8).map("".join)
LOGPROBS = st.one_of(
    st.none(), st.fixed_dictionaries({"content": st.lists(st.fixed_dictionaries({"token": TEXT, "logprob": st.just(-0.5)}))})
)
CHOICE = st.fixed_dictionaries(
    {
        "index": st.integers(0, 3),
        "delta": st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT, "refusal": TEXT}),
        "logprobs": LOGPROBS,
        "finish_reason": st.sampled_from([None, "stop", "length"]),
        "stop_reason": st.one_of(st.none(), TEXT),
    }
)
USAGE = st.fixed_dictionaries(
    {"prompt_tokens": st.integers(0, 99), "total_tokens": st.integers(0, 99), "completion_tokens": st.integers(0, 99)},
    optional={"prompt_tokens_details": st.fixed_dictionaries({"cached_tokens": st.integers(0, 9)})},
)


def written(event: dict[str, Any]) -> bytes:
    """Return the bytes that vLLM writes for an event."""
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


@given(
    choices=st.lists(CHOICE, max_size=2),
    usage=st.one_of(st.none(), USAGE),
    after=st.dictionaries(st.sampled_from(["prompt_token_ids", "system_fingerprint"]), TEXT),
    asked=st.one_of(st.just("support-bot@3"), TEXT),
    include=st.booleans(),
    continuous=st.booleans(),
    facts=st.booleans(),
)
@example(
    choices=[{"index": 0, "delta": {"content": f'"model":"{ENGINE}","usage":{{"a":1}},"choices":[],'}}],
    usage={"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1},
    after={},
    asked="m",
    include=True,
    continuous=False,
    facts=True,
)
def test_the_rewriter_does_what_json_would(
    choices: list[dict[str, Any]],
    usage: dict[str, Any] | None,
    after: dict[str, str],
    asked: str,
    include: bool,
    continuous: bool,
    facts: bool,
) -> None:
    event = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": ENGINE, "choices": choices}
    if usage is not None:
        event["usage"] = usage
    event |= after
    continuous = continuous and include
    rewriter = Rewriter(ENGINE, asked, include_usage=include, continuous_usage=continuous, facts=FACTS if facts else None)
    out = rewriter(written(event))
    final = usage is not None and not choices
    assert rewriter.usage == usage
    assert rewriter.complete == final
    expected = with_facts(event, asked) if facts else event | {"model": asked}
    if usage is not None and not (include if final else continuous):
        del expected["usage"]
    if final and not include:
        assert out is None
    else:
        assert out is not None
        assert b"\n" not in out
        assert json.loads(out.removeprefix(b"data: ")) == expected
        assert list(json.loads(out.removeprefix(b"data: "))) == list(expected)


CHUNK = st.builds(
    lambda choices, usage, after: (
        {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": ENGINE, "choices": choices}
        | ({} if usage is None else {"usage": usage})
        | after
    ),
    st.lists(CHOICE.map(lambda choice: choice | {"index": 0}), max_size=1),
    st.one_of(st.none(), USAGE),
    st.dictionaries(st.sampled_from(["prompt_token_ids", "system_fingerprint"]), TEXT),
)


@given(
    sent=st.lists(CHUNK, max_size=5),
    cuts=st.lists(st.integers(0, 2000), max_size=6),
    include=st.booleans(),
    continuous=st.booleans(),
    simple=st.booleans(),
    facts=st.booleans(),
)
def test_many_at_once_are_what_each_would_be(
    sent: list[dict[str, Any]], cuts: list[int], include: bool, continuous: bool, simple: bool, facts: bool
) -> None:
    options: dict[str, Any] = {"include_usage": include, "continuous_usage": include and continuous, "facts": FACTS if facts else None}
    alone = rewriter(**options)
    each = [out for event in sent if (out := alone(written(event))) is not None]
    stream = b"".join(written(event) + b"\n\n" for event in sent) + DONE + b"\n\n"
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    together = rewriter(**options, prompts=1 if simple else 2)
    out = b"".join(together.feed(stream[start:end]) for start, end in itertools.pairwise(places))
    assert out == b"".join(event + b"\n\n" for event in each)
    assert (together.done, together.complete, together.error, together.aborted) == (True, alone.complete, None, False)
    assert counted(together.usage) == counted(alone.usage)


def counted(usage: dict[str, Any] | None) -> tuple[int, int, int] | None:
    if usage is None:
        return None
    return usage["prompt_tokens"], usage["completion_tokens"], (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


def piece(number: int, **more: Any) -> bytes:
    """Return an event with the usage so far."""
    usage = {"prompt_tokens": 7, "total_tokens": 7 + number, "completion_tokens": number, "completion_tokens_details": None}
    choice = {"index": 0, "delta": {"content": f"t{number}"}, "logprobs": None, "finish_reason": None} | more
    return written({"id": "1", "model": ENGINE, "choices": [choice], "usage": usage}) + b"\n\n"


def test_an_engines_error_ends_the_stream_where_it_stands() -> None:
    rewrite = rewriter()
    out = rewrite.feed(piece(1) + piece(2) + b'data: {"error":{"message":"m"}}\n\n' + piece(3) + DONE + b"\n\n")
    assert out.count(b"data: ") == 2
    assert (rewrite.error, rewrite.done, counted(rewrite.usage)) == (b'{"error":{"message":"m"}}', False, (7, 2, 0))
    assert rewrite.feed(piece(4)) == b""


def test_what_an_engine_ended_is_counted_and_not_delivered() -> None:
    rewrite = rewriter()
    out = rewrite.feed(piece(1) + piece(2, finish_reason="abort") + piece(3))
    assert out.count(b"data: ") == 1
    assert (rewrite.aborted, counted(rewrite.usage)) == (True, (7, 3, 0))
    assert rewrite.feed(piece(4)) == b""
    assert counted(rewrite.usage) == (7, 4, 0)


def test_a_model_may_write_what_ends_streams() -> None:
    rewrite = rewriter()
    out = rewrite.feed(piece(1, delta={"content": "data: [DONE]"}) + piece(2, delta={"content": 'data: {"error"'}) + piece(3))
    assert out.count(b'data: {"id"') == 3
    assert (rewrite.done, rewrite.error, counted(rewrite.usage)) == (False, None, (7, 3, 0))


def test_the_running_usage_is_read_when_somebody_asks() -> None:
    rewrite = rewriter()
    assert rewrite.usage is None
    for number in range(1, 4):
        out = rewrite.feed(piece(number))
        assert b"usage" not in out
        assert b'"model":"m"' in out
        assert counted(rewrite.usage) == (7, number, 0)
    rewrite.feed(piece(4)[:-1])
    assert counted(rewrite.usage) == (7, 3, 0)  # it is not complete yet


@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens"])
def test_a_usage_without_numbers_is_nonsense(field: str) -> None:
    with pytest.raises(ValueError, match="usage"):
        rewriter().feed(written({"model": ENGINE, "choices": [], "usage": {field: "1"}}) + b"\n\n")


WHOLE = {"id": "1", "object": "chat.completion", "model": ENGINE, "choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}


@given(TEXT, TEXT, st.one_of(st.none(), USAGE), st.sampled_from(["stop", "abort"]), st.booleans(), st.booleans(), st.booleans())
def test_an_answer_in_one_piece_is_rewritten_as_json_would(
    text: str, asked: str, usage: dict[str, Any] | None, reason: str, spaced: bool, facts: bool, own: bool
) -> None:
    answer: dict[str, Any] = WHOLE | {"choices": [{"message": {"content": text}, "finish_reason": reason}]}
    # The fields that vLLM writes.
    said: dict[str, Any] = {"service_tier": None, "system_fingerprint": "vllm-0.32.0-1a2b"} if own else {}
    answer = answer | said | {"usage": usage, "kv_transfer_params": None}
    sent = json.dumps(answer, ensure_ascii=False, separators=None if spaced else (",", ":")).encode()
    out, found, aborted = rewrite_whole(sent, ENGINE, asked, FACTS if facts else None)
    assert json.loads(out) == answer | {"model": asked} | (FACTS if facts else {})
    assert out.count(b'"system_fingerprint"') == (1 if facts or own else 0)
    assert (found, aborted) == (usage or {}, reason == "abort")


@pytest.mark.parametrize("text", [b"", b"{", b'{"model":"' + ENGINE.encode() + b'","usage":{"a":}', b"<html>"])
def test_an_answer_that_is_nonsense(text: bytes) -> None:
    with pytest.raises(ValueError, match="line 1"):
        rewrite_whole(text, ENGINE, "m")


def test_the_latest_usage_counts_and_completeness_stays() -> None:
    rewriter = Rewriter("e", "m", include_usage=True, continuous_usage=False)
    base = {"id": "1", "model": "e"}
    rewriter(written(base | {"choices": [{"index": 0}], "usage": {"completion_tokens": 1}}))
    assert (rewriter.usage, rewriter.complete) == ({"completion_tokens": 1}, False)
    rewriter(written(base | {"choices": [], "usage": {"completion_tokens": 2}}))
    assert (rewriter.usage, rewriter.complete) == ({"completion_tokens": 2}, True)
    rewriter(written(base | {"choices": [{"index": 0}]}))
    assert (rewriter.usage, rewriter.complete) == ({"completion_tokens": 2}, True)


def test_nonsense_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="line 1"):
        Rewriter("e", "m", include_usage=True, continuous_usage=False)(b'data: {"choices":[],"usage":{"a":')


@pytest.mark.parametrize(
    ("n", "chunks", "prompt_tokens", "completion_tokens"),
    [
        (1, [(0, 7, 3), (0, 7, 5)], 7, 5),
        (2, [(0, 7, 3), (1, 7, 4), (0, 7, 5)], 7, 9),
        (1, [(0, 7, 3), (1, 8, 4)], 15, 7),
        (2, [(0, 7, 1), (3, 8, 1), (1, 7, 2), (2, 8, 1)], 15, 5),
    ],
)
def test_several_choices_are_counted_together(
    n: int, chunks: list[tuple[int, int, int]], prompt_tokens: int, completion_tokens: int
) -> None:
    # vLLM's continuous usage is each choice's own; only its last chunk covers all of them.
    rewriter = Rewriter("e", "m", include_usage=False, continuous_usage=False, n=n)
    for index, prompt, completion in chunks:
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
        out = rewriter(written({"id": "1", "model": "e", "choices": [{"index": index, "text": "x"}], "usage": usage}))
        assert out is not None
        assert b"usage" not in out
    assert rewriter.usage is not None
    assert (rewriter.usage["prompt_tokens"], rewriter.usage["completion_tokens"]) == (prompt_tokens, completion_tokens)
    assert not rewriter.complete
    total = {"prompt_tokens": 70, "completion_tokens": 90}
    assert rewriter(written({"id": "1", "model": "e", "choices": [], "usage": total})) is None
    assert (rewriter.usage, rewriter.complete) == (total, True)
