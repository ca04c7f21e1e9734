"""Every `lmaas` command in the documentation exists, with its options."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lmaas.cli.commands import cli

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> Iterator[list[str]]:
    """Return the words after `lmaas` of each command in a page, in code spans and console blocks."""
    spans = re.findall(r"`([^`\n]+)`", text)
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans += [line.removeprefix("$ ") for block in blocks for line in block.split("\n") if line.startswith("$ ")]
    for span in spans:
        for part in re.split(r"&&|\|", span):
            found = re.match(r"\s*(?:\.venv/bin/)?lmaas\s+([^#]+)", part)
            if found:
                yield found[1].split()


def complaint(words: list[str]) -> str:
    """Return the first word that is not a command or option at its place; empty if there is none."""
    command: click.Command = cli
    remaining = iter(words)
    for word in remaining:
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            option = next((each for each in command.params if name in (*each.opts, *each.secondary_opts)), None)
            if option is None and name != "--help":
                return word
            if isinstance(option, click.Option) and not option.is_flag and not equals:
                next(remaining, None)
        elif isinstance(command, click.Group):
            inner = command.get_command(click.Context(command), word)
            if inner is None:
                # A placeholder, such as COMMAND or `…`.
                return word if re.fullmatch(r"[a-z-]+", word) else ""
            command = inner
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    found = list(commands(page.read_text()))
    assert {" ".join(words): bad for words in found if (bad := complaint(words))} == {}


def test_pages_have_commands() -> None:
    assert sum(len(list(commands(page.read_text()))) for page in PAGES) > 100


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("`lmaas tenant list`", ""),
        ("`lmaas --tenant acme usage --events`", ""),
        ("`lmaas tenant rename`", "rename"),
        ("`lmaas usage --everything`", "--everything"),
        ("```console\n$ .venv/bin/lmaas frobnicate\n```\n", "frobnicate"),
    ],
)
def test_a_command_that_does_not_exist_is_found(text: str, bad: str) -> None:
    [words] = commands(text)
    assert complaint(words) == bad
