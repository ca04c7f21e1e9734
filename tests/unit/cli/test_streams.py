"""Standard streams that are closed."""

import sys

import pytest

from lmaas.cli.streams import binary_output, is_terminal
from lmaas.errors import SettingsError


def test_a_closed_stream_is_no_terminal() -> None:
    assert not is_terminal(None)
    with open("/dev/null") as stream:
        assert not is_terminal(stream)


def test_bytes_need_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SettingsError, match="Standard output is closed"):
        binary_output()
