"""The environment variables that an engine receives."""

import pytest

from lmaas.engine.launch import EngineSpec, environment, shared_environment
from lmaas.engine.zygote import wire

SECRET = "not for engines"


@pytest.mark.parametrize(
    "name",
    [
        *("LMAAS_DATABASE_URL", "LMAAS_REDIS_URL", "LMAAS_OBJECT_STORE_URL", "LMAAS_API_KEY", "LMAAS_OPERATOR_KEY"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "aws_secret_access_key"),
        *("GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_CLIENT_SECRET", "FSSPEC_S3_SECRET"),
    ],
)
def test_no_credentials_of_our_servers_and_stores(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = wire.facts(shared_environment())
    monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HF_TOKEN", "for models")
    found = environment(EngineSpec("m", "/models/x", "x", "float32", 16, 1, 1, 8, 1, 2**20))
    assert SECRET not in found.values()
    assert found["HF_TOKEN"] == "for models"
    monkeypatch.delenv("HF_TOKEN")
    # A client of the zygote may have these variables that the zygote lacks.
    assert wire.difference(before, wire.facts(shared_environment())) == ""


def test_engines_on_cpus_compile_nothing_while_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmaas.engine.launch.has_cpu_build", lambda: True)
    assert shared_environment()["TORCH_COMPILE_DISABLE"] == "1"
    monkeypatch.setattr("lmaas.engine.launch.has_cpu_build", lambda: False)
    assert "TORCH_COMPILE_DISABLE" not in shared_environment()
