"""Log records of an engine contain nothing of a request."""

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmaas.engine.hooks import records
from lmaas.engine.log.seal import RECORD_CHARACTERS, VARIABLE, write_seal

SECRET = "SECRETTEXT"
MARK = "\x020123456789abcdef "
REQUEST = "req_0123456789abcdef01234567"


class Collector(logging.Handler):
    """Keeps formatted records."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.texts.append(self.format(record))


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The output of a handler of a sealed engine, without the mark."""
    monkeypatch.setattr(logging.Handler, "format", logging.Handler.format)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "sealed"))
    write_seal(tmp_path / "sealed", MARK)
    records.install()
    handler = Collector()
    logger = logging.getLogger("vllm.test")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield handler.texts
    logger.removeHandler(handler)


log = logging.getLogger("vllm.test")


class Unprintable:
    """An object whose text is a request's."""

    def __str__(self) -> str:
        return SECRET


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda: log.info("Fixed text"), "Fixed text"),
        (lambda: log.info("Request %s took %.1f s, %d tokens", REQUEST, 1.26, 7), f"Request {REQUEST} took 1.3 s, 7 tokens"),
        (lambda: log.info("Aborted %s", f"chatcmpl-{REQUEST}-0-a1b2c3d4"), f"Aborted chatcmpl-{REQUEST}-0-a1b2c3d4"),
        (lambda: log.info("Adapter %s", "ada_0123456789abcdef0123.1"), "Adapter ada_0123456789abcdef0123.1"),
        (lambda: log.info("signal=%s", "SIGTERM"), "signal=SIGTERM"),
        (lambda: log.warning("Prompt %r", SECRET), "Prompt '<10 characters>'"),
        (lambda: log.warning("Request %s", SECRET), "Request <10 characters>"),
        (lambda: log.warning("Tokens %s", [1, 2, 3]), "Tokens <list>"),
        (lambda: log.warning("Number %s", 10**30), "Number <int>"),
        (lambda: log.warning("%s and %s", None, True), "None and True"),
        (lambda: log.warning("Body %s", {"prompt": SECRET}), "Body <dict>"),
        (lambda: log.warning("%(what)s", {"what": SECRET}), "<10 characters>"),
        (lambda: log.warning("Object %s", Unprintable()), "Object <Unprintable>"),
        (lambda: log.warning("Error %s", ValueError(SECRET)), "Error <ValueError>"),
        (lambda: log.warning("Number %d", SECRET), "Number %d (values left out)"),
        (lambda: log.warning(f"Computed {SECRET}"), "(computed message of 19 characters left out)"),
        (lambda: log.warning("Computed " + SECRET), "(computed message of 19 characters left out)"),
        (lambda: log.warning(str(SECRET)), "(computed message of 10 characters left out)"),
        (lambda: log.warning(ValueError(SECRET)), "(ValueError left out)"),
        (lambda: log.warning("Stack", stack_info=True), "Stack"),
    ],
)
def test_text_of_requests_is_replaced(collected: list[str], write: Callable[[], None], text: str) -> None:
    write()
    assert collected == [MARK + text]


def raise_literal() -> None:
    raise ValueError("A text in the code")


def raise_computed() -> None:
    raise ValueError(f"about {SECRET}")


def raise_caused() -> None:
    try:
        json.loads(SECRET)
    except ValueError as error:
        raise RuntimeError(SECRET) from error


def raise_os() -> None:
    Path(f"/{SECRET}").read_text()


def raise_noted() -> None:
    error = KeyError(SECRET)
    error.add_note(SECRET)
    raise error


def raise_deep(depth: int = 300) -> None:
    if depth:
        raise_deep(depth - 1)
    raise ValueError(SECRET)


@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        (raise_literal, ["ValueError: A text in the code at ", "test_records.py", " raise_literal"]),
        (raise_computed, ["ValueError: (text left out) at ", " raise_computed"]),
        (raise_caused, ["RuntimeError: (text left out)", "json.decoder.JSONDecodeError: (text left out)", "json/decoder.py"]),
        (raise_os, ["FileNotFoundError: No such file or directory"]),
        (raise_noted, ["KeyError: (text left out)"]),
        (raise_deep, ["ValueError: (text left out) at … > ", " raise_deep"]),
    ],
)
def test_exceptions_are_logged_as_types_and_places(collected: list[str], fail: Callable[[], None], expected: list[str]) -> None:
    try:
        fail()
    except Exception:
        log.exception("It failed")
    (text,) = collected
    assert all(part in text for part in ["It failed", *expected]), text
    assert SECRET not in text
    assert len(text) < RECORD_CHARACTERS
    assert all(line.startswith(MARK) for line in text.splitlines())


def test_records_are_bounded(collected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "TRUSTED", ("vllm.test.",))
    log.info("x" * 10 * RECORD_CHARACTERS)
    log.info("line\n" * 10 * RECORD_CHARACTERS)
    assert all(len(text.replace(MARK, "")) < RECORD_CHARACTERS + 100 for text in collected)


def test_a_handler_that_has_formatted_the_exception_before_does_not_give_it_away(collected: list[str]) -> None:
    try:
        raise_computed()
    except ValueError:
        record = log.makeRecord("vllm.test", logging.ERROR, __file__, 1, "Failed", (), sys.exc_info())
        record.exc_text = traceback.format_exc()
    log.handle(record)
    assert SECRET not in collected[0]
    assert SECRET in (record.exc_text or "")  # the record itself stays the same


def test_records_are_as_they_were_before_the_seal_and_elsewhere(
    collected: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "not yet"))
    log.info(f"Computed {SECRET}")
    write_seal(tmp_path / "not yet", MARK)
    log.info(f"Computed {SECRET}")
    monkeypatch.delenv(VARIABLE)
    log.info(f"Computed {SECRET}")
    assert collected == [f"Computed {SECRET}", f"{MARK}(computed message of 19 characters left out)", f"Computed {SECRET}"]


def test_it_is_installed_once() -> None:
    before = logging.Handler.format
    try:
        records.install()
        installed = logging.Handler.format
        records.install()
        assert logging.Handler.format is installed
    finally:
        logging.Handler.format = before  # type: ignore[method-assign]
