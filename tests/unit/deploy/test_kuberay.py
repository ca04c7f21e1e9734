"""deploy/kuberay against the schemas of its kinds, and against the settings, versions and labels of lmaas.

Kubernetes' own kinds are checked strictly against Kubernetes' schemas (kubernetes-validate ships them). No package ships the schema of
RayCluster: this module contains the part of it that lmaas uses, from KubeRay's CRD (`ray.io_rayclusters.yaml`, v1), with unknown fields
refused, and its pod templates are checked as pods. `LMAAS_TEST_RAYCLUSTER_CRD=<that file>` checks against the CRD itself.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from lmaas.config import load
from lmaas.control.provisioners.resources import parse_resources

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "kuberay"
KUBERNETES = "1.33"

_RESOURCES = {"type": "object", "additionalProperties": {"type": "object"}}
_GROUP = {
    "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
    "template": {"type": "object"},
}
RAYCLUSTER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["headGroupSpec"],
            "properties": {
                "rayVersion": {"type": "string"},
                "enableInTreeAutoscaling": {"type": "boolean"},
                "autoscalerOptions": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                        "idleTimeoutSeconds": {"type": "integer"},
                        "resources": _RESOURCES,
                    },
                },
                "headGroupSpec": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["template"],
                    "properties": _GROUP | {"serviceType": {"type": "string"}},
                },
                "workerGroupSpecs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["groupName", "maxReplicas", "minReplicas", "template"],
                        "properties": _GROUP
                        | {name: {"type": "integer", "minimum": 0} for name in ("replicas", "minReplicas", "maxReplicas")}
                        | {"groupName": {"type": "string"}},
                    },
                },
            },
        },
    },
}


def objects() -> list[dict[str, Any]]:
    """Return everything that `kubectl apply -f deploy/kuberay` creates."""
    return [found for path in sorted(FOLDER.glob("*.yaml")) for found in yaml.safe_load_all(path.read_text())]


def one(kind: str, name: str) -> dict[str, Any]:
    """Return the object of this kind and name."""
    (found,) = [each for each in objects() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def templates() -> list[dict[str, Any]]:
    """Return the templates of the pods that are created."""
    cluster = one("RayCluster", "lmaas")["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [each["spec"]["template"] for each in objects() if each["kind"] in ("Deployment", "Job")] + [
        group["template"] for group in groups
    ]


def containers() -> list[dict[str, Any]]:
    """Return the containers of all pods."""
    return [each for pod in templates() for each in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]]


@pytest.mark.parametrize("found", [each for each in objects() if each["kind"] != "RayCluster"], ids=lambda each: each["kind"])
def test_kubernetes_own_kinds(found: dict[str, Any]) -> None:
    kubernetes_validate.validate(found, KUBERNETES, strict=True)


def test_the_ray_cluster() -> None:
    cluster = one("RayCluster", "lmaas")
    jsonschema.validate(cluster, RAYCLUSTER)
    if crd := os.environ.get("LMAAS_TEST_RAYCLUSTER_CRD"):
        versions = yaml.safe_load(Path(crd).read_text())["spec"]["versions"]
        (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
        jsonschema.validate(cluster, _closed(schema))
    for template in templates():
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}} | template, KUBERNETES, strict=True)


def _closed(schema: Any) -> Any:
    """Return the schema with unknown fields refused, as the API server prunes them."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(each) for name, each in schema.items()}
    if isinstance(schema.get("properties"), dict) and set(schema["properties"]) != {"type"}:
        closed.setdefault("additionalProperties", schema.get("x-kubernetes-preserve-unknown-fields", False))
    return closed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "maxReplicas"), 3),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "8"),
        (("spec", "workerGroupSpecs", 0, "groupName"), None),
        (("spec", "autoscalerOptions", "upscalingMode"), "Fast"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ],
)
def test_what_would_be_wrong(path: tuple[Any, ...], value: Any) -> None:
    cluster = one("RayCluster", "lmaas")
    inner: Any = cluster
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, RAYCLUSTER)


def test_settings_are_ours() -> None:
    given = one("ConfigMap", "lmaas-settings")["data"]
    own = {each["name"]: each.get("value", "from a secret") for container in containers() for each in container.get("env", [])}
    settings = load(given | {name: value for name, value in own.items() if name.startswith("LMAAS_")})
    assert settings.provisioner == "ray"
    cluster = one("RayCluster", "lmaas")
    assert settings.ray_address == f"ray://{cluster['metadata']['name']}-head-svc:10001"
    (group,) = cluster["spec"]["workerGroupSpecs"]
    node = {name: float(value) for name, value in group["rayStartParams"].items() if name != "resources"}
    held = json.loads(group["rayStartParams"]["resources"].strip("'"))
    assert settings.engine_cpus <= node["num-cpus"]
    assert settings.engine_accelerators is not None
    assert settings.engine_accelerators <= node["num-gpus"]
    assert all(held[name] >= amount for name, amount in parse_resources(settings.ray_resources).items())
    most = group["maxReplicas"]
    assert (settings.ray_cpus, settings.ray_accelerators) == (node["num-cpus"] * most, node["num-gpus"] * most)
    (mount,) = [each for each in group["template"]["spec"]["containers"][0]["volumeMounts"] if each["name"] == "node"]
    assert mount["mountPath"] == str(settings.ray_node_home)


def test_whoever_registers_base_models_or_serves_them_has_them_at_the_same_path() -> None:
    readers = {}
    for pod in templates():
        claims = {each["name"] for each in pod["spec"].get("volumes", []) if "persistentVolumeClaim" in each}
        for container in pod["spec"]["containers"]:
            for mount in container["volumeMounts"]:
                if mount["name"] in claims:
                    readers[container["name"]] = (mount["mountPath"], mount.get("readOnly", False))
    assert readers == {
        "init": ("/var/cache/lmaas", False),
        "gateway": ("/var/cache/lmaas", True),
        "ray-worker": ("/var/cache/lmaas", True),
    }


def test_secrets_come_by_reference() -> None:
    secret = re.compile("URL|KEY|PASSWORD|TOKEN|SECRET")
    open_ones = {"LMAAS_CONSOLE_URL", "LMAAS_CONSOLE_API_URL"}  # addresses without passwords
    for container in containers():
        assert not [
            each for each in container.get("env", []) if secret.search(each["name"]) and "value" in each and each["name"] not in open_ones
        ]
    settings = one("ConfigMap", "lmaas-settings")["data"]
    assert {name for name in settings if secret.search(name)} == {"LMAAS_OBJECT_STORE_URL"}
    assert not [each for each in objects() if each["kind"] == "Secret"]


def test_one_version_of_ray() -> None:
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements" / "ray.txt").read_text(), re.MULTILINE)
    assert one("RayCluster", "lmaas")["spec"]["rayVersion"] == pinned


def test_selectors_select() -> None:
    labels = [template["metadata"]["labels"] for template in templates()]
    found = 0
    for each in objects():
        spec = each.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if selector and each["kind"] != "RayCluster":
            wanted = selector.get("matchLabels", selector)
            assert sum(1 for held in labels if wanted.items() <= held.items()) == 1, each["metadata"]["name"]
            found += 1
    assert found >= 7
