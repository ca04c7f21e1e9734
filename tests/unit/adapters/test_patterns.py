"""Patterns of rank_pattern and alpha_pattern match the same names as PEFT's rule, and none of them stalls the matcher."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmaas.adapters.patterns import MAX_PATTERN_LENGTH, MAX_PATTERNS, PatternError, exactly, matching_values
from tests.support.adapters import base
from tests.support.effort import tries

MODULES = [*base(layers=12).linears, "model.layers.1", "q_proj", "q.proj", "x_lm_head", "model.layers.0.self_attn.q_proj.q_proj"]
#: Names that are short enough for a matcher that backtracks.
SHORT = ["q_proj", "a", "0.a", "a.0", "a.q_proj", "mlp.1.a", "mlp.a_a", "lm.q-a", "aaa", "aQ.1", "1.10.0", "mlp", "a.mlp"]


def first_values(patterns: dict[str, int], modules: list[str]) -> dict[str, int]:
    """Return the first value of each module that some pattern matches."""
    return {module: values[0] for module, values in matching_values(patterns, modules).items() if values}


def by_peft(key: str, modules: list[str]) -> dict[str, int]:
    """Return the modules that PEFT's own rule matches (`peft.utils.other.get_pattern_key`)."""
    return {module: 1 for module in modules if re.match(rf"(.*\.)?({key})$", module)}


@pytest.mark.parametrize(
    "key",
    [
        *("q_proj", "self_attn.q_proj", "layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head", "embed_tokens", "proj", "", "."),
        *(
            "q.proj",
            ".*",
            ".+",
            "^q_proj",
            "^model.layers.0.self_attn.q_proj",
            "^lm_head$",
            "(q|v)_proj",
            r".*\.(q|v)_proj",
            "q_proj|k_proj",
        ),
        *(r"model\.layers\.\d+\.mlp\.(up|down)_proj", r"layers\.([0-4]|1[01])\..*", r"layers\.[0-9]\.mlp\..*", r"layers\.1\d?\..*_proj"),
        *("[a-z_]+", "[^.]*_proj", r"\w+", r"[\w.]+proj", r"layers\.\d{2}\..*", r"layers\.\d{1,2}\.mlp.*?", "a)|(lm_head", "(?:q|k)_proj"),
        *("(?i:Q_PROJ)", "(?P<which>up|down)_proj", r"\blm_head\b", "q_proj$", r"\Alm_head"),
    ],
)
def test_a_pattern_matches_what_it_matches_in_peft(key: str) -> None:
    assert first_values({key: 1}, MODULES) == by_peft(key, MODULES)


PIECES = ["q_proj", "mlp", "a", "0", "1", "_", r"\.", ".", "*", "+", "?", "(", "(?:", ")", "|", "^", "$", r"\d", r"\w", r"\b"]
PIECES += [
    "[a-z]",
    "[^.]",
    r"[\w.]",
    "{1,2}",
    "{2}",
    "{,3}",
    "{",
    "}",
    "]",
    "[",
    "-",
    r"\-",
    r"\S",
    r"\1",
    "(?=",
    "(?i)",
    "(?i:",
    r"\Z",
    " ",
]


@settings(max_examples=tries(1500), deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join))
def test_any_pattern_matches_as_in_peft_or_is_refused(key: str) -> None:
    try:
        found = first_values({key: 1}, SHORT)
    except PatternError as error:
        str(error).encode("ascii")
        return
    try:
        expected = by_peft(key, SHORT)
    except re.error:
        return  # PEFT itself cannot load it
    assert found == expected


def test_the_first_pattern_that_matches_wins() -> None:
    patterns = {"nothing": 1, "layers.0.self_attn.q_proj": 2, "q_proj": 3, ".*": 4}
    found = first_values(patterns, MODULES)
    assert found["model.layers.0.self_attn.q_proj"] == 2
    assert found["model.layers.1.self_attn.q_proj"] == 3
    assert found["lm_head"] == 4
    assert first_values(dict(reversed(patterns.items())), MODULES) == dict.fromkeys(MODULES, 4)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        *((key, "not supported") for key in ("(?=q)q_proj", "(?!k).*", "(?<=_)proj", "(?<!q)_proj", r"(q)\1", "(?P<a>q)(?P=a)", "(?>q+)")),
        *(
            (key, "not supported")
            for key in (r"\Zq", "x{,5}", "[[:alpha:]]+", "(?i)q_proj", "(?#x)q", r"\u0071", r"\N{DIGIT ONE}", "q{", "]")
        ),
        *((key, "not a valid") for key in ("(", "*q", "q**", "q++", "a{1001}", "(a{1000}){1000}", "((((a{99}){99}){99}){99})")),
        *((key, "no module's name") for key in ("\u202eq", "q\x00", "q\n", "ü")),
        ("a" * (MAX_PATTERN_LENGTH + 1), "characters, more than"),
    ],
)
def test_a_pattern_that_is_refused(key: str, why: str) -> None:
    with pytest.raises(PatternError, match=why) as caught:
        first_values({"q_proj": 1, key: 2}, MODULES)
    str(caught.value).encode("ascii")
    assert len(str(caught.value)) < 300


def test_the_number_of_patterns_is_bounded() -> None:
    assert first_values({f"x{i}": i for i in range(MAX_PATTERNS)}, MODULES) == {}
    with pytest.raises(PatternError, match="more than the 1024"):
        first_values({f"x{i}": i for i in range(MAX_PATTERNS + 1)}, MODULES)


@pytest.mark.parametrize("attack", [
    "(a+)+$", "(.*)*{i}", "((a|aa)*)*{i}", "(.*.*.*.*.*){i}!", "(.*a.*){{1,20}}{i}", "([a-z_.0-9]+)*{i}x", "(model|layers|.*)+{i}",
    "(.?){{200}}.{{200}}{i}", "(.*\\.){{9}}((q|k)_proj|.{{90}})*{i}", "(a{{1,30}}){{1,30}}{i}",
])  # fmt: skip
def test_as_many_hostile_patterns_as_are_allowed_end_soon(attack: str) -> None:
    """Each pattern would keep a backtracking matcher busy for a very long time. The base model has 224 modules."""
    names = [name + "a" * 60 for name in base(layers=32).linears]
    started = time.process_time()
    try:
        first_values({attack.format(i=i): i for i in range(MAX_PATTERNS)}, names)
    except PatternError as error:
        assert "too complex" in str(error)  # noqa: PT017 (either outcome is fine, the time counts)
    assert time.process_time() - started < 20


def test_an_exact_pattern_is_no_suffix() -> None:
    key = exactly(["b.c", "x"])
    assert [name for name in ("b.c", "a.b.c", "bxc", "x", "y.x", "xx") if re.match(rf"(.*\.)?({key})$", name)] == ["b.c", "x"]
