"""The second base model of `lmaas up` and `lmaas init`: it embeds, it is optional, and it overwrites nothing that an operator has set."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lmaas.config import Settings
from lmaas.engine import embedding_model
from lmaas.engine.embedding_model import NAME
from lmaas.errors import SettingsError
from lmaas.states import PoolKind
from lmaas.store.database import Database
from lmaas.store.models import BaseModel, change_base_model, get_base_model, list_base_models, put_base_model
from lmaas.up.bootstrap import register_embedding_model
from tests.integration.store import build
from tests.support.base_models import write_model


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return replace(settings, cache=tmp_path / "cache", engine_dtype="float32")


async def registered(settings: Settings, db: Database) -> tuple[BaseModel | None, str]:
    """Register the model; return its row and the printed text."""
    said = io.StringIO()
    model = await register_embedding_model(settings, db, Console(file=said, width=300))
    return model, said.getvalue()


async def test_it_embeds_as_its_files_say(settings: Settings, db: Database) -> None:
    model, _ = await registered(settings, db)
    assert model is not None
    folder = settings.cache / "models" / NAME
    assert (model.name, model.source, model.kind) == (NAME, str(folder), PoolKind.EMBED)
    assert (model.max_model_len, model.max_num_seqs) == (256, 64)
    assert [path.name for path in folder.parent.iterdir()] == [NAME], "no remains of the copy"
    assert {"config.json", "model.safetensors", "tokenizer.json", "modules.json", "1_Pooling"} <= {path.name for path in folder.iterdir()}
    # Values that an operator has set stay, and values that follow the settings follow them.
    await change_base_model(db, NAME, {"prompt_price": 5, "max_replicas": 3})
    again, _ = await registered(replace(settings, engine_max_num_seqs=128), db)
    assert again is not None
    assert (again.id, again.prompt_price, again.max_replicas, again.max_num_seqs) == (model.id, 5, 3, 128)


async def test_it_moves_with_the_cache(settings: Settings, db: Database, tmp_path: Path) -> None:
    await registered(settings, db)
    settings.cache.rename(tmp_path / "elsewhere")
    moved = replace(settings, cache=tmp_path / "elsewhere")
    model, _ = await registered(moved, db)
    assert model is not None
    assert model.source == str(moved.cache / "models" / NAME)


async def test_a_copy_that_was_killed_leaves_nothing(settings: Settings, db: Database) -> None:
    partial = settings.cache / "models" / f"{NAME}.partial-999999999"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{")
    await registered(settings, db)
    assert [path.name for path in partial.parent.iterdir()] == [NAME]


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("mine", PoolKind.EMBED),
        ("mine", PoolKind.GENERATE),
        ("sentence-transformers/all-MiniLM-L6-v2", PoolKind.EMBED),
        (f"/only/on/the/nodes/of/{NAME}-fine", PoolKind.EMBED),
        (f"/old/cache/{NAME}", PoolKind.GENERATE),
    ],
)
async def test_an_operators_model_of_that_name_stays(settings: Settings, db: Database, tmp_path: Path, source: str, kind: PoolKind) -> None:
    if source == "mine":
        source = str(write_model(tmp_path / NAME))
    mine = await build.base_model(db, NAME, source=source, kind=kind)
    assert (await registered(settings, db))[0] is None
    assert await get_base_model(db, NAME) == mine


async def test_a_name_that_a_tenants_adapter_has_stays_the_tenants(settings: Settings, db: Database) -> None:
    tenant, base = await build.tenant(db, "acme"), await build.base_model(db)
    await build.upload(db, tenant.id, NAME, base)
    model, said = await registered(settings, db)
    assert model is None
    assert f"The embedding model {NAME} is not offered. A tenant has an adapter named '{NAME}'." in said
    assert [each.name for each in await list_base_models(db)] == ["base"]


async def test_without_its_wheel_or_a_place_the_service_runs_without_it(
    settings: Settings, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    damaged = tmp_path / "cache" / "models" / NAME
    damaged.mkdir(parents=True)
    for cache, why in (
        (tmp_path / "file", "cannot be used: Not a directory."),
        (Path("~no-such-user/cache"), "cannot be used: Could not determine home directory"),
        (tmp_path / "cache", f"{damaged}/config.json cannot be used"),
    ):
        model, said = await registered(replace(settings, cache=cache), db)
        assert model is None
        assert f"The embedding model {NAME} is not offered. " in said
        assert why in said
    monkeypatch.setattr(embedding_model, "packaged_folder", lambda: None)
    assert await registered(settings, db) == (None, "")
    assert await list_base_models(db) == []


async def test_the_setting_names_another_one_or_none(settings: Settings, db: Database, tmp_path: Path) -> None:
    assert await registered(replace(settings, embedding_model="none"), db) == (None, "")
    folder = write_model(tmp_path / "My-Bert", architectures=["BertModel"])
    model, _ = await registered(replace(settings, embedding_model=str(folder)), db)
    assert model is not None
    assert (model.name, model.source, model.kind) == ("my-bert", str(folder), PoolKind.EMBED)
    generator = write_model(tmp_path / "llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(SettingsError, match=r"LMAAS_EMBEDDING_MODEL is '.*/llama', which is no embedding model"):
        await registered(replace(settings, embedding_model=str(generator)), db)
    with pytest.raises(SettingsError, match="cannot be a model's name"):
        await registered(replace(settings, embedding_model=str(write_model(tmp_path / "a b", architectures=["BertModel"]))), db)
    assert [each.name for each in await list_base_models(db)] == ["my-bert"]


async def test_the_default_model_may_be_it(settings: Settings, db: Database, tmp_path: Path) -> None:
    """An operator who serves this model as the default model does not get it twice."""
    folder = write_model(tmp_path / NAME, architectures=["BertModel"])
    assert await registered(replace(settings, model=str(folder)), db) == (None, "")
    assert await list_base_models(db) == []


async def test_a_kind_cannot_change_with_the_settings(db: Database) -> None:
    await build.base_model(db, "one")
    with pytest.raises(Exception, match="A kind cannot change") as raised:
        await put_base_model(db, replace(await get_base_model(db, "one"), kind=PoolKind.EMBED))
    assert getattr(raised.value, "error_code", None) == "kind_is_fixed"
