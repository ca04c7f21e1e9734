"""The input of custom tools, taken out of arguments in JSON piece by piece."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmaas.protocols.responses.unwrapping import Unwrapper


def unwrapped(pieces: list[str]) -> tuple[str, str]:
    """Return the text that is known before the end, and the text that the end adds."""
    unwrapper = Unwrapper()
    return "".join(unwrapper.feed(piece) for piece in pieces), unwrapper.end()


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans(), st.lists(st.integers(0, 60), max_size=8))
def test_any_text_in_any_pieces(text: str, ascii_only: bool, cuts: list[int]) -> None:
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
    assert unwrapped(cut(arguments, cuts)) == (text, "")
    assert unwrapped(list(arguments)) == (text, "")


#: Characters that look like an escape, or like a part of one.
PARTS = ("\\", "\\\\", "\\u", "\\ud83d", "\\ude00", "ud83d", "\\n", "😀", '"', "a", "0", " ")


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.booleans(), st.data())
def test_backslashes_in_any_pieces(text: str, ascii_only: bool, data: st.DataObject) -> None:
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
    for place in range(1, len(arguments)):
        assert unwrapped([arguments[:place], arguments[place:]]) == (text, "")
    cuts = data.draw(st.lists(st.integers(0, len(arguments)), max_size=8))
    assert unwrapped(cut(arguments, cuts)) == (text, "")


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.sampled_from(["", '"}']), st.lists(st.integers(0, 60), max_size=8))
def test_what_is_no_json_is_the_same_in_any_pieces(characters: str, end: str, cuts: list[int]) -> None:
    """A model may write escapes that JSON does not have, and its output may be cut off anywhere."""
    arguments = '{"input": "' + characters + end
    expected = "".join(unwrapped([arguments]))
    assert "".join(unwrapped(cut(arguments, cuts))) == expected
    assert "".join(unwrapped(list(arguments))) == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "a", "more": 1}', "a"),
        ('{ "input" :\n"a\nb"}', "a\nb"),
        (r'{"input": "\d+\."}', r"\d+\."),
        ('{"input": "\\ud83c"}', "\ufffd"),
        ('{"input": "\\ud83c x"}', "\ufffd x"),
        (r'{"input": "\\ud83d tail"}', r"\ud83d tail"),
        (r'{"input": "C:\users\n\d"}', "C:\\users\n\\d"),
        (r'{"input": "cut\ud83c\ude0', "cut\ufffd"),
        ('{"input": "cut', "cut"),
        ('{"input": "cut\\', "cut"),
        ('{"input": "cut\\u00', "cut"),
        ('{"input": "cut\\ud83c', "cut\ufffd"),
        ('{"input": 5}', '{"input": 5}'),
        ('{"input": null}', '{"input": null}'),
        ('{"patch": "x", "input": "y"}', "y"),
        ('{"patch": "x"}', '{"patch": "x"}'),
        ('"only text"', "only text"),
        ("*** Begin Patch", "*** Begin Patch"),
        ("[" * 10_000, "[" * 10_000),
        (" " * 300 + '{"input": "late"}', "late"),
        ("{}", "{}"),
        ("", ""),
    ],
)
def test_what_models_write(arguments: str, text: str) -> None:
    assert "".join(unwrapped([arguments])) == text
    assert "".join(unwrapped(list(arguments))) == text


def test_text_is_known_as_it_arrives() -> None:
    unwrapper = Unwrapper()
    assert [unwrapper.feed(piece) for piece in ('{"in', 'put": "a', "b\\", "n", 'c"', "}")] == ["", "a", "b", "\n", "c", ""]
    assert unwrapper.end() == ""


@pytest.mark.parametrize("piece", ["a", "\\n", "\\u00e9", "x" * 50])
def test_the_time_does_not_grow_with_the_text(piece: str) -> None:
    unwrapper: Any = Unwrapper()
    unwrapper.feed('{"input": "')
    assert "".join(unwrapper.feed(piece) for _ in range(20_000)) == json.loads(f'"{piece}"') * 20_000
