"""A command that fails ends with one line on standard error and exit code 1, and shows no secret."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from lmaas.api import table
from lmaas.api.operation import Operation
from lmaas.cli import main
from lmaas.cli.commands import cli
from lmaas.cli.processes import PROCESSES
from lmaas.errors import ApiError, SettingsError
from lmaas.manifests.client import ApiClient
from tests.support.foreign_server import serving
from tests.unit.cli.test_confirmation import commands

SECRET = "sk-lmaas-secret"
NOWHERE = {"LMAAS_URL": "http://127.0.0.1:1/v1", "LMAAS_API_KEY": SECRET}


def lmaas(*arguments: str | bytes, redirect: str = "", **environment: str) -> tuple[int, str]:
    """Run the command in a shell; return its exit code and its standard error."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LMAAS_", "PYTHONUNBUFFERED"))}
    command = [sys.executable, "-m", "lmaas", *arguments]
    # The first of the words after the script is its $0.
    shell = ["sh", "-c", f'exec "$0" "$@" {redirect}', *command]
    done = subprocess.run(shell, env=own | NOWHERE | environment, capture_output=True, check=False)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "redirect", "code", "says"),
    [
        (["tenant", "delete", "acme"], "<&-", 2, "This command asks for confirmation, and there is no terminal. Add --yes to confirm."),
        (["--help"], ">/dev/full", 1, "lmaas: The output cannot be written: No space left on device.\n"),
        (["tenant", "change", b"\xff", "--tier", "free"], "", 1, "lmaas: There can be no tenant with the name or id '\\udcff'.\n"),
        (["tenant", "create", b"\xff"], "", 1, "lmaas: A value has characters that are not valid text (UTF-8), so it cannot be sent.\n"),
        (["tenant", "list"], "2>/dev/full", 1, ""),
        (["tenant", "list"], ">&-", 1, "lmaas: The service at http://127.0.0.1:1 cannot be reached"),
        (["top"], ">&-", 1, "lmaas: The service at http://127.0.0.1:1 cannot be reached"),
        (["doctor"], ">&-", 1, ""),
        (["chat", "bot"], "<&-", 1, "lmaas: The service at http://127.0.0.1:1 cannot be reached"),
    ],
)
def test_of_a_whole_process(arguments: list[str | bytes], redirect: str, code: int, says: str) -> None:
    ended, err = lmaas(*arguments, redirect=redirect)
    assert ended == code
    assert says in err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert "unexpected" not in err


def test_a_full_disk_is_said_of_an_answer_too(tmp_path: Path) -> None:
    """A site module fixes the response, in place of a service."""
    (tmp_path / "sitecustomize.py").write_text(
        "from lmaas.manifests.client import ApiClient\n"
        "ApiClient.send = lambda *_, **__: {'id': 'ten_1', 'deleted': True}\n"
        "ApiClient.items = lambda *_, **__: [{'name': 'acme', 'id': 'ten_1', 'tier': 'free'}]\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    for arguments, unbuffered in (
        (["--json", "tenant", "list"], ""),
        (["tenant", "list"], ""),
        (["tenant", "delete", "acme", "--yes"], ""),
        (["tenant", "delete", "acme", "--yes"], "1"),
    ):
        code, err = lmaas(*arguments, redirect=">/dev/full", PYTHONPATH=path, PYTHONUNBUFFERED=unbuffered)
        assert (code, err) == (1, "lmaas: The output cannot be written: No space left on device.\n")


def test_a_locale_without_a_character_does_not_stop_the_output(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from lmaas.manifests.client import ApiClient\n"
        "ApiClient.items = lambda *_, **__: [{'name': '\\u2192', 'id': 'ten_1', 'tier': 'free'}]\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert lmaas("tenant", "list", PYTHONPATH=path, PYTHONIOENCODING="ascii") == (0, "")


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and its standard error."""
    monkeypatch.setattr(sys, "argv", ["lmaas", *arguments])
    for name, value in (NOWHERE | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError(SECRET), KeyError("row"), TypeError(), RuntimeError(f"a\n{SECRET}"), AssertionError()])
def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ApiClient, "items", fail)
    kind = type(error).__name__
    line = f"lmaas: An unexpected error ({kind}). Run `lmaas --traceback …` to see where it comes from, and report it.\n"
    assert run(monkeypatch, capsys, "tenant", "list") == (1, line)
    monkeypatch.setattr(sys, "argv", ["lmaas", "--traceback", "tenant", "list"])
    with pytest.raises(type(error)):
        main()


def test_an_error_of_the_system_names_the_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/closed/x")

    monkeypatch.setattr(ApiClient, "items", fail)
    assert run(monkeypatch, capsys, "tenant", "list") == (1, "lmaas: /closed/x: Permission denied.\n")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"LMAAS_API_KEY": f"{SECRET}\nx"}, "The API key has a space or a character that no key has."),
        ({"LMAAS_API_KEY": f"{SECRET}é"}, "The API key has a space or a character that no key has."),
        ({"LMAAS_API_KEY": f"{SECRET}\r\n"}, "The service at http://127.0.0.1:1 cannot be reached"),
        ({"LMAAS_URL": "http://[::1"}, "LMAAS_URL is not the address of a service"),
        ({"LMAAS_URL": f"http://me:{SECRET}@127.0.0.1:1"}, "The service at http://127.0.0.1:1 cannot be reached"),
        ({"LMAAS_HOME": "/dev/null", "LMAAS_URL": "", "LMAAS_API_KEY": ""}, "There are no credentials in /dev/null/credentials.json."),
    ],
)
def test_a_wrong_setting_is_said_without_its_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str], says: str
) -> None:
    code, err = run(monkeypatch, capsys, "tenant", "list", **environment)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"lmaas: {says}")
    assert SECRET not in err


@pytest.mark.parametrize("content", ["", "[]", "5", "{}", '{"base_url": "http://127.0.0.1:1"}', "\0"])
def test_a_broken_file_of_credentials_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "credentials.json").write_text(content)
    code, err = run(monkeypatch, capsys, "tenant", "list", LMAAS_HOME=str(tmp_path), LMAAS_URL="", LMAAS_API_KEY="")
    assert (code, err.count("\n")) == (1, 1)
    assert "There are no credentials in" in err


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://a:hidden@h:port/x", "LMAAS_DATABASE_URL is not the URL of a database"),
        ("mysql://a:hidden@h/x", "LMAAS_DATABASE_URL is not the URL of a database"),
        ("hidden", "LMAAS_DATABASE_URL is not the URL of a database"),
        ("postgresql://a:hidden@127.0.0.1:1/x?foo=bar", "LMAAS_DATABASE_URL has the option 'foo', which Postgres does not know."),
        ("postgresql://a:hidden@127.0.0.1:1/x?sslmode=bar", "The database cannot be reached: "),
        ("postgresql://a:hidden@127.0.0.1:99999/x", "The database cannot be reached: "),
    ],
)
def test_a_wrong_database_is_said_without_its_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, says: str
) -> None:
    code, err = run(monkeypatch, capsys, "migrate", LMAAS_DATABASE_URL=url)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"lmaas: {says}")
    assert "hidden" not in err


@pytest.mark.parametrize("name", ["", ".", "..", "%2e%2e", "a/b", "a\\b"])
@pytest.mark.parametrize(
    "before", [["tenant", "change", "--tier", "free"], ["tenant", "delete", "--yes"], ["model", "show"], ["replica", "stop"]]
)
def test_a_name_that_leads_elsewhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], before: list[str], name: str
) -> None:
    code, err = run(monkeypatch, capsys, *before, "--", name)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("lmaas: There can be no ")


@pytest.mark.parametrize(("status", "body"), [(200, b'{"ok": true}'), (502, b"<html>")])
def test_every_command_says_that_another_server_is_at_the_address(tmp_path: Path, status: int, body: bytes) -> None:
    (tmp_path / "a.yaml").write_text("name: a")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    with serving(status, body) as url:
        line = f"The service at {url} answered with something that is not lmaas (status {status}). Check LMAAS_URL."
        tried, values = 0, {"folder": str(tmp_path), "path": str(tmp_path / "a.yaml"), "version": "1"}
        for path, command in commands(cli):
            if path[0] in {*(process.name for process in PROCESSES), "simulate", "completion", "logs", "doctor"}:
                continue
            arguments = ["--tenant", "acme"] if path[0] in ("adapter", "key") else []
            arguments += path
            for parameter in command.params:
                if isinstance(parameter, click.Argument):
                    arguments.append(values.get(parameter.name or "", "some"))
                elif parameter.name == "yes":
                    arguments.append("--yes")
                elif parameter.required:
                    arguments += [parameter.opts[0], "some"]
            if path[-1] == "change":
                arguments += [{"model": "--min-replicas", "webhooks": "--name"}.get(path[0], "--tokens-per-minute"), "1"]
            done = CliRunner().invoke(cli, arguments, env=NOWHERE | {"LMAAS_URL": url})
            assert isinstance(done.exception, ApiError), (arguments, done.output, done.exception)
            assert line in done.exception.message
            tried += 1
        assert tried > 20


class Tenants:
    """Two tenants: `acme` exists; the deletion of a tenant fails once with `failure`."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.deleted: list[str] = []
        self._failure = failure

    def send(self, operation: Operation, body: Mapping[str, Any] | None = None, *, tenant: str, **_: Any) -> dict[str, Any]:
        """Respond to a request about a tenant."""
        assert body is None
        if operation is table.GET_TENANT:
            if tenant != "acme":
                raise ApiError(404, "The tenant does not exist.", "tenant_not_found", "req_1")
            return {"id": "ten_1", "name": "acme"}
        assert operation is table.DELETE_TENANT
        self.deleted.append(tenant)
        if self._failure is not None:
            raise self._failure
        return {"id": tenant, "deleted": True}


@pytest.mark.parametrize(("name", "deleted"), [("acme", "ten_1"), ("ten_1", "ten_1"), ("gone", "gone")])
def test_a_tenant_is_deleted_by_its_id(monkeypatch: pytest.MonkeyPatch, name: str, deleted: str) -> None:
    tenants = Tenants()
    monkeypatch.setattr(ApiClient, "send", lambda _, *arguments, **options: tenants.send(*arguments, **options))
    done = CliRunner().invoke(cli, ["--json", "tenant", "delete", name, "--yes"], env=NOWHERE)
    assert json.loads(done.output) == {"id": deleted, "deleted": True}
    assert tenants.deleted == [deleted]


@pytest.mark.parametrize(
    ("failure", "hint"),
    [
        (ApiError(503, "The files stay.", "object_store_unavailable", "req_1"), " To try again: lmaas tenant delete ten_1"),
        (SettingsError("The service cannot be reached."), " To try again: lmaas tenant delete ten_1"),
        (ApiError(403, "No.", "forbidden", "req_1"), ""),
    ],
)
def test_a_deletion_that_failed_is_tried_again_by_id(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: ApiError | SettingsError, hint: str
) -> None:
    tenants, message = Tenants(failure), failure.message
    monkeypatch.setattr(ApiClient, "send", lambda _, *arguments, **options: tenants.send(*arguments, **options))
    code, err = run(monkeypatch, capsys, "tenant", "delete", "acme", "--yes")
    assert code == 1
    assert err.startswith(f"lmaas: {message}{hint}")
