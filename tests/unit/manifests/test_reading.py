"""Manifests: their contents, and the refusals that need no service."""

import os
from pathlib import Path

import pytest

from lmaas.errors import InvalidRequest
from lmaas.manifests.folder import read_folder
from lmaas.manifests.models import read_model
from lmaas.manifests.tenants import read_tenant

TENANTS = Path(__file__).parents[3] / "tenants"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def write_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes(b"{}")
    return folder


def test_the_sample_tenants_are_valid() -> None:
    acme, globex = read_folder(TENANTS).tenants
    assert (acme.name, globex.name) == ("acme", "globex")
    assert acme.settings == {"tier": "standard", "max_queued": 64, "max_adapters": 20}
    for manifest in (acme, globex):
        (adapter,) = manifest.adapters
        assert adapter.folder is not None
        files = {path.name: path.stat().st_size for path in adapter.folder.iterdir()}
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
        assert sum(files.values()) <= 1_500_000


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "The file must be a mapping"),
        ("[]", "The file must be a mapping"),
        ("tier: standard", "'name' is missing"),
        ("name:", "'name' is missing"),
        ("name: 7", "'name' must be text, not 7. Put it in quotes."),
        ("name: yes", "'name' must be text, not true. Put it in quotes."),
        ("name: 2026-01-01", "'name' must be text, not the date 2026-01-01. Put it in quotes."),
        ("name: 2026-01-01 12:00:00", "'name' must be text, not the date 2026-01-01T12:00:00. Put it in quotes."),
        (f"name: 0x{'f' * 5000}", "'name' must be text, not a number with many digits. Put it in quotes."),
        (f"name: a\ntier: 0x{'f' * 5000}", "'tier' must be text, not a number with many digits. Put it in quotes."),
        (f"name: a\nlimits: {{max_queued: 0x{'f' * 5000}}}", "'limits.max_queued' is too large."),
        (f"name: a\nlimits: {{max_queued: -0x{'f' * 16}}}", "'limits.max_queued' is too large."),
        (f"name: a\n? 0x{'f' * 5000}\n: b", "'a number with many digits' is not known."),
        (f"name: {'1' * 5000}", "The file is not valid YAML"),
        (f"name: a\n{'b' * 500}: c", "bbb...' is not known."),
        (f"name: a\nadapters: [{{name: b, base_model: c, version: 0x{'f' * 5000}}}]", "'adapters[0].version' is too large."),
        ("name: !!bool b", "A value does not fit its tag"),
        ("name: !!int ''", "A value does not fit its tag"),
        ("name: !!timestamp b", "A value does not fit its tag"),
        ("name: 2026-13-01", "month must be in 1..12"),
        ("name: !!binary YQ==", "'name' must be text, not b'a'."),
        (
            "name: a\nadapters: [{name: b, base_model: c, path: ~no-such-user/x}]",
            "'adapters[0].path' cannot be used: Could not determine home",
        ),
        (f"name: a\nadapters: [{{name: b, base_model: c, path: {'p' * 5000}}}]", "'adapters[0].path' cannot be used: File name too long."),
        ('name: a\nadapters: [{name: b, base_model: c, path: "a\\0b"}]', "'adapters[0].path': there is no folder"),
        ("name: a\nadapters: [{name: b, base_model: c, path: fifo}]", "adapter_model.safetensors is not a regular file."),
        ("name: a\nlimit: 1", "'limit' is not known. The known fields are: name, tier, limits, adapters."),
        ("name: a\nlimits: {max_queued: many}", "'limits.max_queued' must be a whole number, not 'many'"),
        ("name: a\nlimits: {max_queued: true}", "'limits.max_queued' must be a whole number, not true"),
        ("name: a\nlimits: {max_queued: 1.5}", "'limits.max_queued' must be a whole number, not 1.5"),
        ("name: a\nlimits: {1: 2}", "'limits.1' is not known"),
        ("name: a\nlimits: [1]", "'limits' must be a mapping, not a list"),
        ("name: a\nadapters: {b: c}", "'adapters' must be a list, not a mapping"),
        ("name: a\nadapters: [{name: b, path: c}]", "'adapters[0].base_model' is missing"),
        ("name: a\nadapters: [b]", "'adapters[0]' must be a mapping"),
        ("name: a\nadapters: [null]", "'adapters[0]' must be a mapping"),
        ("name: a\nadapters: [{name: B, base_model: c, version: 1}]", "'adapters[0].name' is 'B'. An adapter's name has"),
        ("name: a\nadapters: [{name: b, base_model: c}]", "'adapters[0].path' is missing"),
        ("name: a\nadapters: [{name: b, base_model: c, version: 0}]", "'adapters[0].version' must be 1 or more, not 0"),
        ("name: a\nadapters: [{name: b, base_model: c, path: none}]", "'adapters[0].path': there is no folder"),
        ("name: a\nadapters: [{name: b, base_model: c, path: half}]", "adapter_model.safetensors cannot be read: No such file"),
        (
            "name: a\nadapters: [{name: b, base_model: c, path: good}, {name: b, base_model: c, version: 2}]",
            "'adapters[0]' and 'adapters[1]' are both named 'b'",
        ),
        ("name: a\ntier: free\nname: b", "line 3: 'name' appears twice"),
        ("name: a\nlimits:\n  max_queued: 1\n  max_queued: 1", "line 4: 'max_queued' appears twice"),
        ("name: [", "line 1: expected the node content"),
        ("name: a\n---\nname: b", "line 2: Another document begins here. Put each into a file of its own."),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("name: \x00", "not valid YAML"),
        ("[" * 2000, "nested too deeply"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    write_adapter(tmp_path / "good")
    (write_adapter(tmp_path / "half") / "adapter_model.safetensors").unlink()
    (model := write_adapter(tmp_path / "fifo") / "adapter_model.safetensors").unlink()
    os.mkfifo(model)
    path = write(tmp_path, "a.yaml", text)
    with pytest.raises(InvalidRequest) as raised:
        read_tenant(path)
    assert raised.value.message.startswith(f"{path}: ")
    assert complaint in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: a\nsource: ~no-such-user", "'source' cannot be used: Could not determine home directory."),
        ("name: a\nsource: ./loop", "'source' cannot be used: Symlink loop"),
        ('name: a\nsource: "./a\\0b"', "'source' cannot be used: embedded null byte."),
        (f"name: a\nsource: b\nidle_timeout_s: 0x{'f' * 5000}", "'idle_timeout_s' is too large."),
        (f"name: a\nsource: b\nreplicas: {{max: 0x{'f' * 5000}}}", "'replicas.max' is too large."),
        ("[]", "must be a mapping"),
        ("name: a", "'source' is missing"),
        ("name: a\nsource:", "'source' is missing"),
        ("name: a\nsource: [b]", "'source' must be text, not a list"),
        ("name: a\nsource: b\nlinears: {}", "'linears' is not known"),
        ("name: a\nsource: b\nreplicas: 3", "'replicas' must be a mapping, not 3"),
        ("name: a\nsource: b\nreplicas: {most: 3}", "'replicas.most' is not known. The known fields are: min, max."),
        ("name: a\nsource: b\nneeds: {cpus: all}", "'needs.cpus' must be a number, not 'all'"),
        ("name: a\nsource: b\nneeds: {cpus: .inf}", "'needs.cpus' must be a number, not inf"),
        ("name: a\nsource: b\nneeds: {accelerators: 0.5}", "'needs.accelerators' must be a whole number"),
        ("name: a\nsource: b\nengine: {max_loras: true}", "'engine.max_loras' must be a whole number"),
        ("name: a\nsource: b\nprices: {engine: cheap}", "'prices.engine' must be a whole number"),
        ("name: a\nsource: b\nprices: {engine: 1, engine: 2}", "line 3: 'engine' appears twice"),
    ],
)
def test_a_wrong_base_model_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path / "models", "a.yaml", text)
    (tmp_path / "models" / "loop").symlink_to("loop")
    with pytest.raises(InvalidRequest) as raised:
        read_model(path)
    assert raised.value.message.startswith(f"{path}: ")
    assert complaint in raised.value.message


def test_a_base_model_as_code(tmp_path: Path) -> None:
    write(tmp_path / "models", "b.yml", "name: b\nsource: org/name\nkind: embed\nreplicas:\nengine: {args: null}\n")
    write(tmp_path / "models", ".c.yaml", "not: read\n")
    write(
        tmp_path / "models",
        "a.yaml",
        "name: a\nsource: ./weights\ndtype: auto\nidle_timeout_s: 9\nreplicas: {min: 1}\nneeds: {cpus: 2}\n"
        "engine: {args: --enforce-eager, max_lora_rank: 8}\nprices: {cached: 3, engine: 0}\n",
    )
    first, second = read_folder(tmp_path).models
    assert (second.name, second.values) == ("b", {"source": "org/name", "kind": "embed"})
    assert first.values == {
        "source": str(tmp_path / "models" / "weights"),
        "dtype": "auto",
        "idle_timeout_s": 9,
        "min_replicas": 1,
        "cpus": 2,
        "engine_args": "--enforce-eager",
        "max_lora_rank": 8,
        "cached_price": 3,
        "engine_price": 0,
    }
    # A folder of base models alone, and one file.
    assert read_folder(tmp_path / "models") == read_folder(tmp_path)
    assert [model.name for model in read_folder(tmp_path / "models" / "a.yaml").models] == ["a"]


def test_null_and_zero_clear_a_limit(tmp_path: Path) -> None:
    path = write(
        tmp_path, "a.yaml", "name: a\ntier: null\nlimits: {max_queued: null, max_adapters: 0, max_concurrent: 0, tokens_per_month: 7}\n"
    )
    manifest = read_folder(path).tenants[0]
    assert manifest.settings == {"max_adapters": 0, "tokens_per_month": 7}
    assert manifest.body == {
        "tier": None,
        "max_queued": None,
        "max_adapters": 0,
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "max_concurrent": None,
        "tokens_per_month": 7,
        "budget_per_month": None,
    }
    # Sections whose every line is a comment are null in YAML.
    empty = read_tenant(write(tmp_path, "b.yaml", "name: b\nlimits:\n  # max_queued: 3\nadapters:\n"))
    assert (empty.settings, empty.adapters) == ({}, ())


def test_every_wrong_file_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "name: acme\n")
    write(tmp_path, "b.yaml", "name: 7\n")
    write(tmp_path, "c.yml", "name: acme\n")
    write(tmp_path / "models", "d.yaml", "name: tiny\n")
    write(tmp_path / "models", "e.yaml", "name: tiny\nsource: a/b\n")
    write(tmp_path / "models", "f.yaml", "name: tiny\nsource: a/b\n")
    with pytest.raises(InvalidRequest) as raised:
        read_folder(tmp_path)
    assert raised.value.message.splitlines() == [
        f"{tmp_path}/models/d.yaml: 'source' is missing.",
        f"{tmp_path}/b.yaml: 'name' must be text, not 7. Put it in quotes.",
        f"{tmp_path}/models/e.yaml and {tmp_path}/models/f.yaml are both for the base model 'tiny'. Join them in one file, or rename one.",
        f"{tmp_path}/a.yaml and {tmp_path}/c.yml are both for the tenant 'acme'. Join them in one file, or rename one.",
    ]


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="does not exist"):
        read_folder(tmp_path / "none")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "folder.yml").mkdir()
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    with pytest.raises(InvalidRequest) as raised:
        read_folder(tmp_path)
    assert raised.value.message.splitlines() == [
        f"{tmp_path / 'fifo.yaml'}: It is not a regular file.",
        f"{tmp_path / 'folder.yml'}: It is not a regular file.",
        f"{tmp_path / 'gone.yaml'}: The file cannot be read: No such file or directory.",
    ]


@pytest.mark.parametrize(
    ("folder", "complaint"),
    [
        ("/dev/null", "/dev/null is neither a folder nor a regular file."),
        ("/no/such/folder", "The folder or file /no/such/folder does not exist."),
        ("/" + "a" * 5000, "It cannot be read: File name too long."),
    ],
)
def test_what_is_no_folder_of_manifests_is_said(folder: str, complaint: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_folder(Path(folder))
    assert raised.value.message.endswith(complaint)
    assert len(raised.value.message) < 300


def test_a_folder_that_may_not_be_entered_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as a user who may enter every folder, so the test replaces the system's error."""
    adapter = write_adapter(tmp_path / "adapter")
    path = write(tmp_path, "a.yaml", "name: a\nadapters: [{name: b, base_model: c, path: adapter}]")
    is_dir = Path.is_dir

    def refuse(closed: Path) -> None:
        def answer(self: Path) -> bool:
            if self == closed:
                raise PermissionError(13, "Permission denied")
            return is_dir(self)

        monkeypatch.setattr(Path, "is_dir", answer)

    for closed, complaint in (
        (adapter, f"{path}: 'adapters[0].path' cannot be used: Permission denied."),
        (tmp_path / "models", f"{tmp_path}: It cannot be read: Permission denied."),
        (tmp_path, f"{tmp_path}: It cannot be read: Permission denied."),
    ):
        refuse(closed)
        with pytest.raises(InvalidRequest) as raised:
            read_folder(tmp_path)
        assert raised.value.message == complaint
