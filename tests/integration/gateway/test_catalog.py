"""The resolution of a model name, for each tenant."""

import re

import pytest

from lmaas.error_bodies import openai_body
from lmaas.errors import ModelNotFound, Unavailable
from lmaas.inference import catalog as module
from lmaas.inference.catalog import Catalog, ListedModel
from lmaas.store.adapters import activate, delete_adapter
from lmaas.store.database import Database
from lmaas.store.models import BaseModel
from lmaas.store.scopes import AnyScope
from lmaas.store.tenants import Tenant
from tests.integration.store.build import base_model, tenant, upload
from tests.support.conditions import until

OLD, NEW, THEIRS = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
async def base(db: Database) -> BaseModel:
    return await base_model(db, "base-model")


@pytest.fixture
async def acme(db: Database, base: BaseModel) -> Tenant:
    """A tenant with two versions of `bot`, the second one live, and `draft`, which has no live version."""
    found = await tenant(db, "acme")
    await upload(db, found.id, "bot", base, content=OLD)
    await upload(db, found.id, "bot", base, content=NEW)
    await upload(db, found.id, "draft", base, content=OLD, activate=False)
    return found


@pytest.fixture
async def other(db: Database, base: BaseModel) -> Tenant:
    """Another tenant, with a `bot` and a `secret` of its own."""
    found = await tenant(db, "other")
    await upload(db, found.id, "bot", base, content=THEIRS)
    await upload(db, found.id, "secret", base, content=THEIRS)
    return found


async def test_a_base_model_is_everybodys(db: Database, base: BaseModel, acme: Tenant, other: Tenant) -> None:
    catalog = Catalog(db)
    for one in (acme, other):
        served = await catalog.resolve(one.id, "base-model")
        assert (served.base, served.engine_name, served.adapter, served.source, served.version) == (base, "base-model", "", "", None)


@pytest.mark.parametrize(("name", "content", "version"), [("bot", NEW, 2), ("bot@2", NEW, 2), ("bot@1", OLD, 1), ("draft@1", OLD, 1)])
async def test_live_and_pinned(db: Database, base: BaseModel, acme: Tenant, other: Tenant, name: str, content: str, version: int) -> None:
    served = await Catalog(db).resolve(acme.id, name)
    engine_name = f"{acme.id}-{content}"
    assert (served.engine_name, served.adapter, served.version) == (engine_name, engine_name, version)
    assert served.source == f"adapters/{acme.id}/{content}"
    assert served.base == base
    assert served.created > 1_700_000_000
    assert other.id not in served.source


async def test_a_fingerprint_is_of_the_weights_and_their_configuration(db: Database, acme: Tenant, other: Tenant) -> None:
    catalog = Catalog(db)
    found = [
        (await catalog.resolve(acme.id, "base-model")).fingerprint,
        (await catalog.resolve(acme.id, "bot@1")).fingerprint,
        (await catalog.resolve(acme.id, "bot")).fingerprint,
    ]
    assert len(set(found)) == 3
    assert all(re.fullmatch("fp_[0-9a-f]{12}", one) for one in found)
    assert (await catalog.resolve(acme.id, "bot@2")).fingerprint == found[2]
    assert (await catalog.resolve(other.id, "base-model")).fingerprint == found[0]


async def test_the_same_name_is_each_tenants_own(db: Database, acme: Tenant, other: Tenant) -> None:
    catalog = Catalog(db)
    assert (await catalog.resolve(acme.id, "bot")).adapter == f"{acme.id}-{NEW}"
    assert (await catalog.resolve(other.id, "bot")).adapter == f"{other.id}-{THEIRS}"


async def test_everything_else_is_the_same_not_found(db: Database, acme: Tenant, other: Tenant) -> None:
    catalog = Catalog(db)
    await catalog.resolve(other.id, "secret")  # known to the cache, but only for its owner
    names = [
        *("made-up", "secret", "secret@1", "draft", "bot@3", "bot@0", "bot@01", "bot@", "@1", "bot@1@1", "bot@-1", "bot@9999999999"),
        *("bot@٣", f"{acme.id}-{NEW}", f"{other.id}-{THEIRS}", "base-model@1", "BOT", "Bot", "b\u043et", "\uff42ot", "bot\u200b", "bot\n"),
        *(" bot", "bot ", "../bot", "..", ".", "/etc/passwd", "a/../bot", "bot%00", "bot\x00", "' OR '1'='1", "", "b" * 64, "x" * 100_000),
        *("\ud800", "*", "bot'--", "bot;", "bot@1 "),
    ]
    for name in names:
        with pytest.raises(ModelNotFound) as caught:
            await catalog.resolve(acme.id, name)
        error = caught.value
        shown = name if len(name) <= 100 else name[:100] + "..."
        assert openai_body(error) == openai_body(ModelNotFound(name))
        assert error.message.count(shown) >= 1
        assert len(error.message) < 200
        assert error.status == 404


async def test_a_rollback_is_seen_after_a_moment(db: Database, acme: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRESH_S", 0.05)
    catalog = Catalog(db)
    assert (await catalog.resolve(acme.id, "bot")).version == 2
    await activate(db, acme.id, "bot", 1)

    async def rolled_back() -> bool:
        return (await catalog.resolve(acme.id, "bot")).version == 1

    await until(rolled_back, every_s=0.01)
    await delete_adapter(db, acme.id, "bot")

    async def gone() -> bool:
        try:
            await catalog.resolve(acme.id, "bot")
        except ModelNotFound:
            return True
        return False

    await until(gone, every_s=0.01)


async def test_a_new_adapter_is_seen_at_once(db: Database, base: BaseModel, acme: Tenant) -> None:
    catalog = Catalog(db)
    with pytest.raises(ModelNotFound):
        await catalog.resolve(acme.id, "fresh")
    await upload(db, acme.id, "fresh", base)
    assert (await catalog.resolve(acme.id, "fresh")).version == 1


async def test_the_list_is_the_tenants_own(db: Database, base: BaseModel, acme: Tenant, other: Tenant) -> None:
    catalog = Catalog(db)
    [listed_base, bot] = await catalog.listed(acme.id)
    assert listed_base == ListedModel("base-model", listed_base.created, None, base.max_model_len, base.kind)
    assert (bot.name, bot.parent, bot.max_model_len) == ("bot", "base-model", base.max_model_len)
    assert min(listed_base.created, bot.created) > 1_700_000_000
    assert [model.name for model in await catalog.listed(other.id)] == ["base-model", "bot", "secret"]


async def test_without_a_database_known_models_go_on(acme: Tenant, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRESH_S", 0.0)
    away = False

    class Away(Database):
        def begin(self, scope: AnyScope) -> object:  # type: ignore[override]
            if away:
                raise Unavailable("away", code="database_unavailable")
            return super().begin(scope)

    database = Away(database_url)
    catalog = Catalog(database)
    await catalog.resolve(acme.id, "bot")
    away = True
    assert (await catalog.resolve(acme.id, "bot")).version == 2
    with pytest.raises(Unavailable):
        await catalog.resolve(acme.id, "never-asked")
    await database.close()
