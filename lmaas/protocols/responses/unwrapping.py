"""Takes the text for a custom tool out of the arguments of the function that stands for it, while they arrive."""

import json
import re

from lmaas.protocols.responses.tools import INPUT

_START = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
#: The maximum length of text that may still become the start. Longer text without it is something else.
_MAX_START = 200
#: Whole characters of a JSON string. The group has the last escape, or the plain characters after it. A \u without a number is no escape.
_CHARACTERS = re.compile(r'([^"\\]+|\\u[0-9a-fA-F]{4}|\\u(?=[0-9a-fA-F]{0,3}[^0-9a-fA-F])|\\[^u])*', re.DOTALL)
_ESCAPE = re.compile(r"(?:\\u[0-9a-fA-F]{4})+|\\.", re.DOTALL)
_FIRST_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class Unwrapper:
    """Reads `{"input": "<text>"}` piece by piece, and returns the text as far as it is known.

    A model may write something else. If the arguments do not begin as they should, nothing is returned before the end, and then what they
    hold: the value of `input` if they are an object that has it as a string, otherwise their text.
    """

    def __init__(self) -> None:
        self._rest = ""
        self._is_inside = self._is_over = False
        #: The pieces of arguments that do not begin as they should.
        self._odd: list[str] | None = None

    def feed(self, arguments: str) -> str:
        """Return the text that this piece of the arguments adds."""
        if self._is_over:
            return ""
        if self._odd is not None:
            self._odd.append(arguments)
            return ""
        self._rest += arguments
        if not self._is_inside:
            start = _START.match(self._rest)
            if start is None:
                if len(self._rest) > _MAX_START:
                    self._odd, self._rest = [self._rest], ""
                return ""
            self._is_inside, self._rest = True, self._rest[start.end() :]
        return self._inside()

    def _inside(self) -> str:
        matched = _CHARACTERS.match(self._rest)
        end, last = (matched.end(), matched[1] or "") if matched else (0, "")
        self._is_over = self._rest[end : end + 1] == '"'
        if not self._is_over and _FIRST_HALF.fullmatch(last):
            # The other half of the character has not come yet.
            end -= len(last)
        text, self._rest = _decoded(self._rest[:end]), self._rest[end:]
        return text

    def end(self) -> str:
        """Return the text that is left at the end of the arguments."""
        if self._is_over:
            return ""
        if self._is_inside:
            # The answer was cut off. An unfinished escape is dropped, and half of a character is replaced.
            matched = _CHARACTERS.match(self._rest)
            return _decoded(matched[0]) if matched else ""
        text = "".join([*(self._odd or ()), self._rest])
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        found = value.get(INPUT) if isinstance(value, dict) else value
        return _HALF_PAIR.sub("\ufffd", found) if isinstance(found, str) else text


def _decoded(characters: str) -> str:
    if "\\" not in characters:
        return characters
    try:
        text: str = json.loads(f'"{characters}"', strict=False)
    except ValueError:
        text = _ESCAPE.sub(_plain, characters)
    return _HALF_PAIR.sub("\ufffd", text)


def _plain(escape: re.Match[str]) -> str:
    """Return the character of an escape. By one that JSON does not have, the model meant the characters themselves."""
    try:
        text: str = json.loads(f'"{escape[0]}"', strict=False)
    except ValueError:
        return escape[0]
    return text
