"""Deletions ask for confirmation, on a terminal only; usage errors have the exit code 2."""

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import click
import pytest
from click.testing import CliRunner

from lmaas.cli.commands import cli

#: No service listens at this address, so a confirmed command fails with exit code 1.
NOWHERE = {"LMAAS_URL": "http://127.0.0.1:1/v1", "LMAAS_API_KEY": "sk-lmaas-none"}
DELETIONS = [
    ["tenant", "delete", "acme"],
    ["model", "delete", "tiny"],
    ["--tenant", "acme", "adapter", "delete", "bot"],
    ["key", "revoke", "key_1"],
    ["files", "delete", "file-1"],
    ["--tenant", "acme", "webhooks", "delete", "wh_1"],
    ["--tenant", "acme", "key", "revoke", "key_1", "--force"],
]


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_deletion_is_here_and_has_yes() -> None:
    deletions = {path: command for path, command in commands(cli) if path[-1] in ("delete", "revoke")}
    nouns = {path[0] for path in deletions}
    here = {next(pair for pair in pairwise(arguments) if pair[0] in nouns) for arguments in DELETIONS}
    assert here == set(deletions)
    for command in deletions.values():
        assert "yes" in {parameter.name for parameter in command.params}


@pytest.mark.parametrize("arguments", DELETIONS)
def test_without_a_terminal_a_deletion_needs_yes(arguments: list[str]) -> None:
    done = CliRunner().invoke(cli, arguments, env=NOWHERE, input="y\n")
    assert done.exit_code == 2
    assert "Error: This command asks for confirmation, and there is no terminal. Add --yes to confirm." in done.output
    confirmed = CliRunner().invoke(cli, [*arguments, "--yes"], env=NOWHERE)
    assert "127.0.0.1:1" in str(confirmed.exception)


@pytest.mark.parametrize(("answer", "says"), [("n", "Aborted!"), ("y", "127.0.0.1:1")])
def test_on_a_terminal_it_asks(answer: str, says: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LMAAS_")}
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        done = subprocess.run(
            [sys.executable, "-m", "lmaas", "key", "revoke", "key_1"],
            env=environment | NOWHERE,
            stdin=theirs,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 1
    assert done.stdout == "", "the question is not part of the output"
    assert "Revoke the key 'key_1'? It stops working within a second, and cannot be restored. [y/N]: " in done.stderr
    assert says in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["tenant", "change", "acme"], "Give at least one option"),
        (["model", "change", "tiny"], "Give at least one option"),
        (["key", "change", "key_1"], "Give at least one option"),
        (["tenant", "change", "acme", "--tier", "gold"], "'gold' is not one of"),
        (["apply", "/no/such/folder"], "does not exist"),
        (["adapter", "activate", "bot", "two"], "'two' is not a valid integer"),
        (["tenant", "forget"], "No such command"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], complaint: str) -> None:
    done = CliRunner().invoke(cli, arguments, env=NOWHERE)
    assert done.exit_code == 2
    assert complaint in done.output


def test_an_operator_names_the_tenant() -> None:
    done = CliRunner().invoke(cli, ["adapter", "list"], env={"LMAAS_URL": None, "LMAAS_API_KEY": None})
    assert done.exit_code == 2
    assert "Name the tenant: --tenant NAME." in done.output
