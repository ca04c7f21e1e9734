"""Settings from the environment."""

import dataclasses
from pathlib import Path

import pytest

from lmaas.config import ENGINE_VARIABLES, Settings, load
from lmaas.errors import SettingsError


def test_defaults() -> None:
    settings = load({})
    assert settings == dataclasses.replace(Settings(), home=Path(".lmaas").absolute())
    assert settings.base_url == "http://127.0.0.1:8080/v1"
    assert settings.credentials_path == Path(".lmaas").absolute() / "credentials.json"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("PORT", "9000", 9000),
        ("IDLE_TIMEOUT_S", "0.5", 0.5),
        ("IDLE_TIMEOUT_S", "30", 30.0),
        ("DATABASE_URL", "postgres://u@h/d", "postgres://u@h/d"),
        ("TENANTS", "some/where", Path("some/where")),
        ("HOME", "/srv/lmaas", Path("/srv/lmaas")),
        ("ENGINE_ARGS", "--a 1 --b", "--a 1 --b"),
        ("ENGINE_KV_CACHE_BYTES", "1", 1),
        ("PROVISIONER", "ray", "ray"),
        ("MODEL", "", None),
        ("PORT", "", 8080),
    ],
)
def test_a_setting(name: str, text: str, value: object) -> None:
    settings = load({f"LMAAS_{name}": text, "OTHER": "x", "lmaas_port": "1", "XLMAAS_PORT": "2"})
    assert getattr(settings, name.lower()) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PORT", "http"),
        ("PORT", "8080.5"),
        ("PORT", "0"),
        ("PORT", "-1"),
        ("IDLE_TIMEOUT_S", "5m"),
        ("IDLE_TIMEOUT_S", "0"),
        ("IDLE_TIMEOUT_S", "-0.1"),
        pytest.param("IDLE_TIMEOUT_S", "nan"),
        pytest.param("DRAIN_TIMEOUT_S", "inf"),
        ("ENGINE_MAX_REPLICAS", "0"),
        ("MAX_BODY_BYTES", "1e6"),
        ("PROVISIONER", "kubernetes"),
        ("TRACES_URL", "collector:4318"),
        ("TRACES_URL", "grpc://collector:4317"),
        ("TRACES_URL", "http://"),
        ("TRACES_RATIO", "0"),
        ("TRACES_RATIO", "1.5"),
        ("TRACES_RATIO", "5%"),
        ("PROVISIONER", "Local"),
        ("IDLE_TIMEOUT", "5"),
        ("NO_SUCH_THING", "5"),
        ("", "5"),
        ("Port", "5x"),
    ],
)
def test_a_bad_setting_names_itself(name: str, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({f"LMAAS_{name}": text})
    assert f"LMAAS_{name}".upper() in caught.value.message.upper()


def test_variables_of_our_plugins_are_not_settings() -> None:
    assert load(dict.fromkeys(ENGINE_VARIABLES, "1")) == load({})


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LMAAS_PORT": "9000", "LMAAS_ENGINE_ARGS": "--x 'y z'", "LMAAS_IDLE_TIMEOUT_S": "0.25", "LMAAS_MODEL": "a/b"},
        {"LMAAS_HOME": "~/x", "LMAAS_API_KEY": "sk-lmaas-x", "LMAAS_REDIS_URL": "unix:///a%20b.sock"},
    ],
)
def test_a_child_process_gets_the_same_settings(environ: dict[str, str]) -> None:
    settings = load(environ)
    assert load(settings.environment()) == settings
    assert "LMAAS_MODEL_NAME" not in settings.environment()
    assert all(name.startswith("LMAAS_") for name in settings.environment())


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("10.0.0.5", "10.0.0.5")])  # noqa: S104 (not bound)
def test_the_url_for_clients(host: str, shown: str) -> None:
    assert load({"LMAAS_HOST": host, "LMAAS_PORT": "81"}).base_url == f"http://{shown}:81/v1"


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load({}).port = 1  # type: ignore[misc]


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("True", True), ("false", False), ("0", False), ("", False)])
def test_a_flag(text: str, value: bool) -> None:
    settings = load({"LMAAS_CONTROLLER_ENDS_REPLICAS": text})
    assert settings.controller_ends_replicas is value
    assert load(settings.environment()).controller_ends_replicas is value


def test_replicas_of_ray_do_not_end_with_a_controller() -> None:
    with pytest.raises(SettingsError, match="LMAAS_CONTROLLER_ENDS_REPLICAS"):
        load({"LMAAS_CONTROLLER_ENDS_REPLICAS": "true", "LMAAS_PROVISIONER": "ray"})


def test_no_flag() -> None:
    with pytest.raises(SettingsError, match="LMAAS_CONTROLLER_ENDS_REPLICAS must be one of true, 1, false, 0"):
        load({"LMAAS_CONTROLLER_ENDS_REPLICAS": "yes"})
