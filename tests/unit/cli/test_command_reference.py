"""The reference of commands describes every command and option as the code has it."""

import click

from lmaas.cli.commands import cli
from lmaas.cli.documentation import PAGE, generated, updated
from tests.unit.cli.test_confirmation import commands


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text()
    assert page == updated(page), "run `python -m lmaas.cli.documentation`"


def test_every_command_is_described_with_its_options() -> None:
    text = generated()
    for path, command in commands(cli):
        if command.hidden:
            continue
        assert f"#### `{' '.join(('lmaas', *path))}" in text
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name not in ("as_json", "wide", "tenant"):
                assert f"`{parameter.opts[0]}" in text, (path, parameter.opts)


def test_every_command_and_option_has_a_help_text() -> None:
    for path, command in commands(cli):
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                sentence = (parameter.help or "").partition("  [default: ")[0]
                assert sentence.endswith("."), (path, parameter.opts)
