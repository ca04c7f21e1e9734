"""deploy/kubernetes against Kubernetes' schemas (strictly), the settings of lmaas, and rules for pods without privileges."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from lmaas.config import load

FOLDER = Path(__file__).parents[3] / "deploy" / "kubernetes"
KUBERNETES = "1.33"
SECRET_KEYS = {
    *("database-url", "database-passwords", "gateway-database-url", "controller-database-url", "replica-database-url"),
    *("jobs-database-url", "redis-url", "operator-key", "postgres-password", "valkey-password"),
}

OBJECTS = [found for path in sorted(FOLDER.rglob("*.yaml")) for found in yaml.safe_load_all(path.read_text())]
WORKLOADS = [each for each in OBJECTS if each["kind"] in ("Deployment", "StatefulSet", "Job")]
#: The containers that run all the time.
SERVING = [
    (each["metadata"]["name"], container)
    for each in WORKLOADS
    if each["kind"] != "Job"
    for container in each["spec"]["template"]["spec"]["containers"]
]
CONTAINERS = [
    container
    for each in WORKLOADS
    for container in (*each["spec"]["template"]["spec"].get("initContainers", ()), *each["spec"]["template"]["spec"]["containers"])
]


def named(found: dict[str, Any]) -> str:
    return f"{found['kind']} {found['metadata']['name']}"


def one(kind: str, name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [each for each in OBJECTS if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1
    return found[0]


def labels(workload: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return found


@pytest.mark.parametrize("found", OBJECTS, ids=named)
def test_each_object_fits_its_schema(found: dict[str, Any]) -> None:
    kubernetes_validate.validate(found, KUBERNETES, strict=True)


@pytest.mark.parametrize("workload", WORKLOADS, ids=named)
def test_pods_have_no_privileges(workload: dict[str, Any]) -> None:
    pod = workload["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert all("hostPath" not in volume for volume in pod["volumes"])
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
        assert mounted <= {volume["name"] for volume in pod["volumes"]} | claims


@pytest.mark.parametrize(("name", "container"), SERVING, ids=[name for name, _ in SERVING])
def test_what_serves_has_probes(name: str, container: dict[str, Any]) -> None:
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe].get("httpGet", {"port": "none"})["port"] in ports | {"none"}, name
        assert container[probe].keys() & {"httpGet", "exec"}


def test_several_of_a_kind_are_not_disrupted_together() -> None:
    several = {each["metadata"]["name"] for each in WORKLOADS if each["spec"].get("replicas", 1) > 1}
    assert several == {each["metadata"]["name"] for each in OBJECTS if each["kind"] == "PodDisruptionBudget"}


def test_selectors_select() -> None:
    pods = [labels(each) for each in WORKLOADS]
    for each in OBJECTS:
        spec = each.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if selector:
            wanted = selector.get("matchLabels", selector)
            assert [held for held in pods if wanted.items() <= held.items()], named(each)


def test_every_pod_has_a_policy_of_the_network() -> None:
    policies = [each["spec"]["podSelector"]["matchLabels"] for each in OBJECTS if each["kind"] == "NetworkPolicy"]
    for each in WORKLOADS:
        assert any(wanted.items() <= labels(each).items() for wanted in policies), named(each)
    [controller] = one("NetworkPolicy", "lmaas-controller")["spec"]["ingress"][0:1]
    allowed = {source["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for source in controller["from"]}
    assert allowed == {"gateway", "jobs"}


@pytest.mark.parametrize("component", ["migrate", "init", "gateway", "controller", "jobs", "console"])
def test_settings_are_ours(component: str) -> None:
    [container] = [each for each in CONTAINERS if each["name"] == component]
    given = {each["name"]: each.get("value", "") for each in container["env"]}
    # Values that the cluster fills in.
    given |= {name: "10.0.0.1" for name in given if name == "LMAAS_ENGINE_HOST"} | {
        name: "8" for name in given if name == "LMAAS_LOCAL_CPUS"
    }
    if {"configMapRef": {"name": "lmaas-settings"}} in container.get("envFrom", ()):
        given |= one("ConfigMap", "lmaas-settings")["data"]
    settings = load({name: value for name, value in given.items() if name.startswith("LMAAS_") and value})
    assert settings.provisioner == "local"
    ports = {each["containerPort"] for each in container.get("ports", ())}
    assert ports <= {settings.port, settings.controller_port, settings.jobs_port, settings.console_port}


def test_the_controllers_pod_has_room_for_its_engines() -> None:
    given = one("ConfigMap", "lmaas-settings")["data"]
    [controller] = one("Deployment", "lmaas-controller")["spec"]["template"]["spec"]["containers"]
    assert float(controller["resources"]["limits"]["cpu"]) >= float(given["LMAAS_ENGINE_CPUS"]) * int(given["LMAAS_ENGINE_MAX_REPLICAS"])
    assert one("Deployment", "lmaas-controller")["spec"]["strategy"] == {"type": "Recreate"}


def test_the_console_has_no_secret() -> None:
    [container] = [each for each in CONTAINERS if each["name"] == "console"]
    assert "envFrom" not in container
    assert all("value" in each for each in container["env"])
    service = one("Service", "lmaas-console")
    assert one("ConfigMap", "lmaas-settings")["data"]["LMAAS_CONSOLE_URL"] == (
        f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    )


def test_secrets_come_by_reference() -> None:
    secret = re.compile("KEY|PASSWORD|TOKEN|SECRET|DATABASE_URL|REDIS_URL")
    used = set()
    for container in CONTAINERS:
        for each in container.get("env", ()):
            reference = each.get("valueFrom", {}).get("secretKeyRef")
            assert (reference is not None) == bool(secret.search(each["name"]) or each["name"] == "REDISCLI_AUTH"), each
            used |= {reference["key"]} if reference else set()
    assert used == SECRET_KEYS
    page = (FOLDER.parents[1] / "docs" / "how-to" / "kubernetes.md").read_text()
    assert {key for key in SECRET_KEYS if f"--from-literal={key}=" not in page} == set()
    assert not [each for each in OBJECTS if each["kind"] == "Secret"]


def test_the_servers_are_those_of_compose() -> None:
    compose = yaml.safe_load((FOLDER.parents[1] / "compose.yaml").read_text())["services"]
    images = {each["name"]: each["image"] for each in CONTAINERS}
    assert {name: images[name] for name in ("postgres", "valkey")} == {name: compose[name]["image"] for name in ("postgres", "valkey")}
