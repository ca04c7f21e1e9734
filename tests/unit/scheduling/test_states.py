"""The words that the functions in Redis share with their clients, on both sides; and the transitions of a ticket."""

import re
from collections.abc import Set as AbstractSet
from enum import StrEnum

import pytest

from lmaas.scheduling.client import PARTS, library
from lmaas.scheduling.states import (
    GATEWAY_LOST,
    REFUSALS,
    RUNNER_LOST,
    TERMINAL,
    TRANSITIONS,
    LimitName,
    NoTicket,
    RetryReason,
    Signal,
    TicketState,
    WaitPhase,
)
from lmaas.states import Observed, UsageStatus

#: `local NAME = { WORD = 'word', … }` in the library, as name → (word's name → word).
IN_LUA = {
    name: dict(re.findall(r"(\w+) = '(\w+)'", body))
    for name, body in re.findall(r"^local ([A-Z_]+) = \{(.*?)\}$", library(), re.DOTALL | re.MULTILINE)
    if "= '" in body
}


def names(words: AbstractSet[StrEnum] | type[StrEnum]) -> dict[str, str]:
    return {word.name: word.value for word in words}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("TICKET", names(TicketState)),
        ("NO_TICKET", names(NoTicket)),
        ("PHASE", names(set(WaitPhase) - {WaitPhase.LOADING})),
        ("REASON", names(RetryReason)),
        ("SIGNAL", names(Signal)),
        ("LIMIT", names(LimitName)),
        ("REPLICA", names({Observed.STARTING, Observed.READY, Observed.DRAINING})),
        ("LOST", {"STATUS": UsageStatus.LOST.value, "CODE": GATEWAY_LOST}),
        ("WASTED", {"STATUS": UsageStatus.WASTED.value, "CODE": RUNNER_LOST}),
    ],
)
def test_lua_has_the_same_words(name: str, words: dict[str, str]) -> None:
    assert IN_LUA[name] == words


def test_all_words_of_lua_are_compared() -> None:
    compared = test_lua_has_the_same_words.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert set(IN_LUA) == {name for name, _ in compared}


def test_lua_uses_a_word_by_its_name_only() -> None:
    """A state is never compared with a string, nor set to one; and each name that is used exists."""
    text = "\n".join(line.split("--", 1)[0] for line in library().splitlines())
    assert re.findall(r"\bstate\s*[=~]=?\s*'\w+'", text) == []
    assert re.findall(r"\b(?:tell|refuse)\([^()']*'\w+'", text) == []
    used = set(re.findall(rf"\b({'|'.join(IN_LUA)})\.(\w+)", text))
    assert used == {(name, word) for name, words in IN_LUA.items() for word in words}
    assert len(PARTS) == 12


def test_the_lines_of_the_library_are_as_short_as_those_of_python() -> None:
    assert [line for line in library().splitlines() if len(line) > 140] == []


def test_every_state_has_its_transitions_and_the_terminal_ones_have_none() -> None:
    assert set(TRANSITIONS) == set(TicketState)
    assert {state for state, targets in TRANSITIONS.items() if not targets} == TERMINAL
    assert all(state not in targets for state, targets in TRANSITIONS.items())


def test_a_report_has_a_state_of_a_ticket_or_a_reason_why_there_is_none() -> None:
    assert not set(names(TicketState).values()) & set(names(NoTicket).values())
    assert set(NoTicket) - REFUSALS == {NoTicket.UNKNOWN}
