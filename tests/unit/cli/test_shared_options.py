"""Options and forms of every command: `--json`, `--wide`, `--tenant` and help, before the command or after it; the version; singular and
plural names."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from lmaas.cli.commands import SECTIONS, cli
from lmaas.cli.processes import PROCESSES
from lmaas.manifests.client import ApiClient
from tests.support.foreign_server import serving
from tests.unit.cli.test_confirmation import NOWHERE, commands

ROW = {"id": "key_1", "name": "mine", "role": "inference", "revoked_at": None, "prefix": "sk-lmaas-abc", "created_at": "2026-11-30"}


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(cli, arguments, env=NOWHERE | environment)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service whose every list has one row."""
    monkeypatch.setattr(ApiClient, "items", lambda *_, **__: [ROW])
    monkeypatch.setattr(ApiClient, "send", lambda *_, **__: {"data": [ROW], "has_more": False})


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("arguments", [["--json", "key", "list"], ["key", "list", "--json"], ["--json", "key", "list", "--json"]])
def test_json_may_stand_before_or_after_the_command(arguments: list[str]) -> None:
    assert json.loads(run(*arguments).output) == [ROW | {"limits": "none"}]


@pytest.mark.parametrize(
    "arguments",
    [["--tenant", "acme", "adapter", "list"], ["adapter", "list", "--tenant", "acme"], ["adapter", "list", "-t", "acme"]],
)
def test_the_tenant_may_stand_before_or_after_the_command(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    asked: list[Any] = []

    def items(client: ApiClient, *_: Any, **__: Any) -> list[dict[str, Any]]:
        asked.append(client.tenant)
        return []

    monkeypatch.setattr(ApiClient, "items", items)
    done = run(*arguments)
    assert (done.exit_code, asked) == (0, ["acme"])
    assert done.output == "There are no adapters. Upload one: lmaas adapter upload NAME FOLDER --base-model MODEL\n"


def test_every_command_for_the_api_has_them() -> None:
    servers = {process.name for process in PROCESSES}
    for path, command in commands(cli):
        names = {option for parameter in command.params for option in parameter.opts}
        if path[0] not in servers | {"completion"}:
            assert {"--json", "--wide"} <= names, path
        assert len([option for parameter in command.params for option in parameter.opts]) == len(names), path


def test_the_help_lists_every_command_with_a_whole_sentence() -> None:
    done = run("--help", COLUMNS="80")
    listed = {str(command.name) for section in SECTIONS.values() for command in section}
    assert listed == set(cli.commands)
    words = " ".join(done.output.split())
    for name, command in cli.commands.items():
        if not command.hidden:
            sentence = " ".join((command.help or "").split()).partition(". ")[0].rstrip(".")
            assert f"{name} {sentence}." in words
    assert all(len(line) <= 80 for line in done.output.splitlines())


def helps(command: click.Command, path: tuple[str, ...] = ()) -> Any:
    yield path
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from helps(inner, (*path, name))


@pytest.mark.parametrize("path", list(helps(cli)), ids=" ".join)
def test_every_help_fits_80_columns(path: tuple[str, ...]) -> None:
    done = run(*path, "--help", COLUMNS="80")
    assert done.exit_code == 0
    assert [line for line in done.output.splitlines() if len(line) > 80] == []


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("noun", ["key", "keys"])
def test_a_noun_may_be_in_the_plural(noun: str) -> None:
    assert "key_1" in run(noun, "list").output


@pytest.mark.parametrize("noun", ["file", "files", "batch", "batches", "adapters", "models", "replicas", "tenants"])
def test_other_nouns_in_both_numbers(noun: str) -> None:
    assert run(noun, "--help").exit_code == 0


@pytest.mark.parametrize("arguments", [["--version"], ["--json", "--version"]])
def test_the_version_needs_no_right_setting(arguments: list[str]) -> None:
    done = run(*arguments, LMAAS_PORT="x")
    assert (done.output, done.exit_code) == (f"lmaas {version('lmaas')}\n", 0)


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("arguments", [[], ["--wide"]])
def test_a_wide_table_has_every_column(arguments: list[str]) -> None:
    done = run("key", "list", *arguments, COLUMNS="40", FORCE_COLOR="1")  # makes the output of the test a terminal
    words = " ".join(done.output.split())
    said = "Not shown, because the terminal has 40 columns: prefix, created at, expires at. Add --wide to see them."
    assert (said in words) is (not arguments)
    assert ("sk-lmaas-abc" in words) is bool(arguments)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_needs_no_right_setting(shell: str) -> None:
    done = run("completion", shell, LMAAS_PORT="x")
    assert done.exit_code == 0
    assert f"_LMAAS_COMPLETE={shell}_complete" in done.output


def completed(words: str, **environment: str) -> list[str]:
    """Return bash's completions of the last of these words."""
    with_words = {"_LMAAS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    own = {name: value for name, value in os.environ.items() if not name.startswith("LMAAS_")}
    done = subprocess.run([sys.executable, "-m", "lmaas"], env=own | with_words | environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line.removeprefix("plain,") for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(("words", "offered"), [("lmaas ada", "adapter"), ("lmaas key re", "revoke"), ("lmaas key list --wi", "--wide")])
def test_commands_and_options_are_completed(words: str, offered: str) -> None:
    assert offered in completed(words, LMAAS_PORT="x")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("lmaas tenant change ac", ["acme"]),
        ("lmaas tenant change ", ["acme", "globex"]),
        ("lmaas adapter list --tenant g", ["globex"]),
        ("lmaas --tenant a", ["acme"]),
        ("lmaas adapter versions --tenant acme a", ["acme"]),
        ("lmaas replica show ten_2", ["ten_2"]),
        ("lmaas tenant create ac", []),
    ],
)
def test_names_are_completed_from_the_service(words: str, offered: list[str]) -> None:
    """Every list of this server contains two tenants."""
    rows = [{"id": "ten_1", "name": "acme"}, {"id": "ten_2", "name": "globex"}]
    kept = dict.fromkeys(("base_model", "desired", "observed", "url", "reason", "created_at", "ready_at", "ended_at", "start"))
    more = dict.fromkeys(("tier", "max_queued", "max_adapters", "live_version", "latest_version", "activated_by", "effective_limits"))
    limits = dict.fromkeys(("requests_per_minute", "tokens_per_minute", "max_concurrent", "tokens_per_month", "budget_per_month"))
    page = {"object": "list", "data": [row | kept | more | limits for row in rows], "first_id": None, "last_id": None, "has_more": False}
    with serving(200, json.dumps(page).encode()) as url:
        assert completed(words, LMAAS_URL=f"{url}/v1", LMAAS_API_KEY="sk-lmaas-x") == offered


@pytest.mark.parametrize("environment", [NOWHERE, {"LMAAS_PORT": "x"}, {"LMAAS_URL": "http://x"}])
def test_without_a_service_no_name_is_completed(environment: dict[str, str]) -> None:
    assert completed("lmaas tenant change ac", **environment) == []
