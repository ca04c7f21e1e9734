"""Manifests: what is read, and what is refused."""

from pathlib import Path

import pytest

from lmaas.errors import InvalidRequest
from lmaas.manifests.apply import read, read_folder
from lmaas.manifests.models import read_models

TENANTS = Path(__file__).parents[3] / "tenants"


def test_the_sample_tenants_are_valid() -> None:
    acme, globex = read_folder(TENANTS)
    assert (acme.name, globex.name) == ("acme", "globex")
    assert acme.settings == {"tier": "standard", "max_queued": 64, "max_adapters": 20}
    for manifest in (acme, globex):
        (adapter,) = manifest.adapters
        files = {path.name: path.stat().st_size for path in adapter.folder.iterdir()}
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
        assert sum(files.values()) <= 1_500_000


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "must be a mapping"),
        ("tier: standard", "'name' is missing"),
        ("name: 7", "'name' must be of the type str"),
        ("name: a\nlimit: 1", "'limit' is not known"),
        ("name: a\nlimits: {max_queued: many}", "'limits.max_queued' must be of the type int"),
        ("name: a\nlimits: {max_queued: true}", "'limits.max_queued' must be of the type int"),
        ("name: a\nadapters: [{name: b, path: c}]", "'adapters[0].base_model' is missing"),
        ("name: a\nadapters: [b]", "adapters[0] must be a mapping"),
        ("name: [", "while parsing"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as raised:
        read(path)
    assert str(path) in raised.value.message
    assert complaint in raised.value.message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "must be a mapping"),
        ("name: a", "'source' is missing"),
        ("name: a\nsource: [b]", "'source' must be of the type str"),
        ("name: a\nsource: b\nlinears: {}", "'linears' is not known"),
        ("name: a\nsource: b\nreplicas: 3", "'replicas' must be of the type dict"),
        ("name: a\nsource: b\nreplicas: {most: 3}", "'replicas.most' is not known. Known are: min, max."),
        ("name: a\nsource: b\nneeds: {cpus: all}", "'needs.cpus' must be of the type float"),
        ("name: a\nsource: b\nneeds: {accelerators: 0.5}", "'needs.accelerators' must be of the type int"),
        ("name: a\nsource: b\nengine: {max_loras: true}", "'engine.max_loras' must be of the type int"),
        ("name: a\nsource: b\nprices: {engine: cheap}", "'prices.engine' must be of the type int"),
    ],
)
def test_a_wrong_base_model_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "models" / "a.yaml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(InvalidRequest) as raised:
        read_models(tmp_path)
    assert str(path) in raised.value.message
    assert complaint in raised.value.message


def test_a_base_model_as_code(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "b.yml").write_text("name: b\nsource: org/name\n")
    (tmp_path / "models" / "a.yaml").write_text(
        "name: a\nsource: ./weights\ndtype: auto\nidle_timeout_s: 9\nreplicas: {min: 1}\nneeds: {cpus: 2}\n"
        "engine: {args: --enforce-eager, max_lora_rank: 8}\nprices: {cached: 3}\n"
    )
    first, second = read_models(tmp_path)
    assert (second.name, second.values) == ("b", {"source": "org/name"})
    assert first.values == {
        "source": str(tmp_path / "models" / "weights"),
        "dtype": "auto",
        "idle_timeout_s": 9,
        "min_replicas": 1,
        "cpus": 2,
        "engine_args": "--enforce-eager",
        "max_lora_rank": 8,
        "cached_price": 3,
    }
    assert read_models(tmp_path / "models") == []


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        read_folder(tmp_path / "none")
