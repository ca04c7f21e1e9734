"""The output of `lmaas up`: lines for a terminal of 80 columns, and text that is copied to shells."""

import io
import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lmaas.config import Settings
from lmaas.errors import SettingsError
from lmaas.scheduling.client import connect
from lmaas.states import PoolKind
from lmaas.store.database import driver_url
from lmaas.up.bootstrap import prepare_default_model, read_credentials, write_credentials
from lmaas.up.stack import check_port, example


@pytest.mark.parametrize("name", ["home", "a home", 'it\'s 100% "mine" $HOME `x` ü'])
def test_the_example_sends_the_tenants_key_from_any_folder(name: str, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / name, port=18080)
    settings.home.mkdir()
    write_credentials(settings, {"tenants": {"acme": {"api_key": "sk-lmaas-secret"}}})
    # In place of curl, a program that prints its arguments, one a line.
    (tmp_path / "curl").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (tmp_path / "curl").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    shell = subprocess.run(["sh", "-c", example(settings, "acme", "base")], capture_output=True, check=True, text=True, env={"PATH": path})
    arguments = shell.stdout.split("\0")
    assert "http://127.0.0.1:18080/v1/chat/completions" in arguments
    assert "authorization: Bearer sk-lmaas-secret" in arguments
    body = json.loads(arguments[arguments.index("-d") + 1])
    assert (body["model"], body["messages"][0]["role"]) == ("base", "user")


@pytest.mark.parametrize("kind", list(PoolKind))
def test_the_example_fits_a_narrow_terminal(kind: PoolKind) -> None:
    text = example(Settings(home=Path("/home/somebody/lmaas/.lmaas")), "acme", "smollm2-135m-instruct", kind)
    assert max(map(len, text.splitlines())) <= 80
    words = shlex.split(text)
    assert words[-1].startswith("{")
    assert ("input" in json.loads(words[-1])) is (kind is PoolKind.EMBED)
    assert any(word.endswith("/v1/embeddings") for word in words) is (kind is PoolKind.EMBED)


def test_credentials_are_never_readable_by_others(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    before = os.umask(0)
    try:
        write_credentials(settings, {"operator_key": "one"})
        settings.credentials_path.chmod(0o644)
        write_credentials(settings, {"operator_key": "two"})
    finally:
        os.umask(before)
    assert read_credentials(settings) == {"operator_key": "two"}
    assert settings.credentials_path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["credentials.json"]


@pytest.mark.parametrize("cache", ["/dev/null/cache", "~no-such-user/cache"])
def test_a_cache_that_cannot_be_used_is_said_in_one_line(cache: str) -> None:
    with pytest.raises(SettingsError, match=r"The cache folder .+ cannot be used: .+\. Set LMAAS_CACHE to a folder of your own\.$"):
        prepare_default_model(replace(Settings(), cache=Path(cache)), Console(file=io.StringIO()))


def test_a_preparation_that_is_told_to_stop_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of the conversion, a program that makes progress and never ends.
    (tmp_path / "endless.py").write_text("import time\nwhile True: print(1, flush=True); time.sleep(0.01)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr("lmaas.up.bootstrap.default_model.__name__", "endless")
    looks = iter([False, False, True])
    with pytest.raises(SettingsError, match="Stopped before the base model was prepared"):
        prepare_default_model(replace(Settings(), cache=tmp_path / "cache"), Console(file=io.StringIO()), lambda: next(looks))


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 1 << 20), ("203.0.113.1", 18080)])
def test_an_address_that_cannot_be_used_is_said_in_one_line(host: str, port: int) -> None:
    with pytest.raises(SettingsError, match=rf"The address {host}, port {port}, cannot be used \(.+\)\. Set LMAAS_PORT or LMAAS_HOST\."):
        check_port(Settings(host=host, port=port))


def test_what_is_no_url_is_refused_by_the_name_of_its_setting() -> None:
    with pytest.raises(SettingsError, match="LMAAS_DATABASE_URL is not the URL of a database"):
        driver_url("nonsense")
    with pytest.raises(SettingsError, match="LMAAS_REDIS_URL is not the URL of a Redis or Valkey server"):
        connect("nonsense")
