"""Tests that need a program which cannot be installed are skipped, with a warning."""

import pytest

from tests.support.debian import program


def test_a_program_that_is_there_is_found() -> None:
    assert program("sh", ("dash",), "nothing").endswith("/sh")


def test_what_cannot_be_installed_is_skipped_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    words = r"NOT TESTED: the moon, since no-such-program is missing\. .*install some-package more"
    with pytest.warns(pytest.PytestWarning, match=words), pytest.raises(pytest.skip.Exception):
        program("no-such-program", ("some-package", "more"), "the moon")
