"""`lmaas apply` through the real API: its changes, the things that it leaves alone, and errors, which change nothing."""

import asyncio
import json
import os
import pty
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from lmaas.errors import ApiError, InvalidRequest
from lmaas.manifests.apply import PartlyApplied, apply
from lmaas.manifests.client import ApiClient
from lmaas.manifests.folder import read_folder
from lmaas.manifests.plan import Change
from lmaas.store.scopes import SYSTEM
from tests.integration.api.test_base_models import lmaas
from tests.integration.gateway.stack import Stack, running
from tests.support.adapters import base, config, pack, tensors
from tests.support.base_models import write_model

MODELS, TENANTS = "/admin/v1/base-models", "/admin/v1/tenants"
BOT = "adapters: [{name: bot, base_model: tiny, path: bot}]\n"


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path / "stack") as stack:
        yield stack


class Folder:
    """A folder of manifests, and the client that applies it."""

    def __init__(self, path: Path, client: ApiClient) -> None:
        self.path, self._client = path, client

    def write(self, name: str, content: str) -> Path:
        """Write a manifest."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return path

    def adapter(self, content: bytes, settings: bytes | None = None, name: str = "bot") -> Path:
        """Write the folder of an adapter."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_bytes(settings or config())
        (folder / "adapter_model.safetensors").write_bytes(content)
        return folder

    async def apply(self) -> list[Change]:
        """Apply the folder. The gateway runs in this event loop, so the client runs in a thread."""
        return await asyncio.to_thread(lambda: apply(read_folder(self.path), self._client))

    async def outcomes(self) -> dict[str, str]:
        """Apply the folder; return the outcomes by name."""
        return {change.name: str(change.outcome) for change in await self.apply()}


@pytest.fixture
def client(stack: Stack, operator_key: str) -> Iterator[ApiClient]:
    with closing(ApiClient(stack.url + "/v1", operator_key)) as client:
        yield client


@pytest.fixture
def folder(client: ApiClient, tmp_path: Path) -> Folder:
    """Manifests of the base model `tiny` alone; its weights exist."""
    made = Folder(tmp_path / "manifests", client)
    made.path.mkdir()
    write_model(tmp_path / "tiny", {name: list(shape) for name, shape in base().linears.items() if "layers" in name})
    made.write("models/tiny.yaml", "name: tiny\nsource: ../../tiny\n")
    return made


@pytest.fixture
def versions() -> list[bytes]:
    """The weights of three versions of an adapter."""
    return [pack(tensors()), pack(tensors(dtype="F16")), pack(tensors(leaves=("q_proj",)))]


async def everything(stack: Stack) -> dict[str, list[Any]]:
    """Return every row that applying could change, and the audit log."""
    async with stack.db.begin(SYSTEM) as connection:
        return {
            table: list(await connection.execute(text(f"SELECT * FROM {table} ORDER BY 1")))  # noqa: S608 (names of tables)
            for table in ("tenants", "base_models", "adapters", "adapter_versions", "audit_log")
        }


async def test_what_is_removed_from_a_manifest_is_a_default_again(folder: Folder, operator: httpx.AsyncClient) -> None:
    folder.write(
        "models/tiny.yaml",
        "name: tiny\nsource: ../../tiny\ndtype: float16\nidle_timeout_s: 9\nreplicas: {min: 1, max: 3}\nneeds: {cpus: 2, accelerators: 1}\n"
        "engine: {max_loras: 100, max_cpu_loras: 200, max_lora_rank: 8, max_num_seqs: 3, max_model_len: 64, args: --enforce-eager}\n"
        "prices: {prompt: 1, engine: 2}\n",
    )
    folder.write(
        "acme.yaml", "name: acme\ntier: free\nlimits: {max_queued: 5, max_adapters: 3, tokens_per_minute: 7, budget_per_month: 9}\n"
    )
    folder.write("globex.yaml", "name: globex\n")
    assert await folder.outcomes() == {"tiny": "created", "acme": "created", "globex": "created"}
    assert await folder.outcomes() == {"tiny": "unchanged", "acme": "unchanged", "globex": "unchanged"}
    usual = (await operator.get(f"{TENANTS}/globex")).json()
    await operator.post(MODELS, json={"name": "usual", "source": str(folder.path.parent / "tiny")})

    folder.write("models/tiny.yaml", "name: tiny\nsource: ../../tiny\nreplicas: {max: null}\nprices:\n")
    folder.write("acme.yaml", "name: acme\nlimits: {tokens_per_minute: 0, max_concurrent: null}\n")
    assert await folder.outcomes() == {"tiny": "changed", "acme": "changed", "globex": "unchanged"}
    mine = {"id", "name", "created_at"}
    acme = (await operator.get(f"{TENANTS}/acme")).json()
    assert {name for name in acme if acme[name] != usual[name]} == mine
    tiny, plain = (await operator.get(f"{MODELS}/tiny")).json(), (await operator.get(f"{MODELS}/usual")).json()
    assert {name for name in tiny if tiny[name] != plain[name]} == mine
    assert set((await folder.outcomes()).values()) == {"unchanged"}


async def test_a_rollback_and_an_upload_by_the_tenant_stay(
    stack: Stack, folder: Folder, operator: httpx.AsyncClient, versions: list[bytes]
) -> None:
    folder.adapter(versions[0])
    folder.write("acme.yaml", "name: acme\n" + BOT)
    assert (await folder.outcomes())["acme/bot"] == "created"
    folder.adapter(versions[1])
    assert (await folder.outcomes())["acme/bot"] == "changed"
    path = f"{TENANTS}/acme/adapters"

    async def live() -> tuple[int, int]:
        shown = (await operator.get(f"{path}/bot")).json()
        return shown["live_version"], shown["latest_version"]

    async def upload(name: str, content: bytes) -> None:
        files = {"adapter_config": config(), "adapter_model": content}
        assert (await operator.post(path, data={"name": name, "base_model": "tiny"}, files=files)).status_code < 300

    assert await live() == (2, 2)
    assert (await operator.post(f"{path}/bot/activate", json={"version": 1})).status_code == 200
    assert (await folder.outcomes())["acme/bot"] == "unchanged"
    assert await live() == (1, 2)
    # A version and an adapter that the tenant uploaded itself.
    await upload("bot", versions[2])
    await upload("own", versions[2])
    before = await everything(stack)
    changes = await folder.apply()
    assert {str(change.outcome) for change in changes} == {"unchanged"}
    assert await everything(stack) == before
    notes = [note for change in changes for note in change.notes]
    assert notes[0] == "Not in the manifest, left as they are: own."
    assert notes[1].startswith("Version 3 is live and stays so; the folder has the content of version 2.")
    # The manifest sets the pin.
    folder.write("acme.yaml", "name: acme\nadapters: [{name: bot, base_model: tiny, path: bot, version: 1}]\n")
    assert (await folder.outcomes())["acme/bot"] == "changed"
    assert await live() == (1, 3)
    assert (await folder.outcomes())["acme/bot"] == "unchanged"
    folder.write("acme.yaml", "name: acme\nadapters: [{name: bot, base_model: tiny, version: 3}]\n")
    assert (await folder.outcomes())["acme/bot"] == "changed"
    assert await live() == (3, 3)
    # New content in the folder becomes a new version, which is live.
    folder.write("acme.yaml", "name: acme\n" + BOT)
    folder.adapter(pack(tensors(rank=2)), config(r=2))
    assert (await folder.outcomes())["acme/bot"] == "changed"
    assert await live() == (4, 4)
    # An adapter that was removed from the manifest stays, and is served.
    folder.write("acme.yaml", "name: acme\n")
    [_, change] = await folder.apply()
    assert change.notes == ("Not in the manifest, left as they are: bot, own.",)
    assert await live() == (4, 4)


async def test_what_a_tenant_made_live_itself_is_not_replaced(
    stack: Stack, folder: Folder, operator: httpx.AsyncClient, versions: list[bytes]
) -> None:
    folder.write("acme.yaml", "name: acme\n")
    await folder.apply()
    key = (await operator.post(f"{TENANTS}/acme/keys", json={"role": "tenant_admin"})).json()["key"]
    new = pack(tensors(rank=2)), config(r=2)
    async with httpx.AsyncClient(base_url=stack.url, headers={"authorization": f"Bearer {key}"}) as tenant:

        async def upload(content: bytes) -> None:
            files = {"adapter_config": config(), "adapter_model": content}
            assert (await tenant.post("/v1/adapters", data={"name": "bot", "base_model": "tiny"}, files=files)).status_code == 201

        async def live() -> tuple[int, int, str]:
            shown = (await tenant.get("/v1/adapters/bot")).json()
            return shown["live_version"], shown["latest_version"], shown["activated_by"]

        # The adapter was uploaded before a manifest named it.
        await upload(versions[0])
        folder.write("acme.yaml", "name: acme\n" + BOT)
        folder.adapter(versions[1])
        assert await live() == (1, 1, "tenant_admin")
        changes = await folder.apply()
        assert changes[-1].notes[0].startswith("Version 1 is live by the tenant's own choice and stays so")
        assert await live() == (1, 2, "tenant_admin")
        assert set((await folder.outcomes()).values()) == {"unchanged"}
        # Delete the adapter, and upload it again.
        assert (await tenant.delete("/v1/adapters/bot")).status_code == 200
        await upload(versions[2])
        await folder.apply()
        assert await live() == (1, 2, "tenant_admin")
        # New content replaces a version that an operator has made live, until the tenant activates a version itself.
        assert (await operator.post(f"{TENANTS}/acme/adapters/bot/activate", json={"version": 2})).status_code == 200
        folder.adapter(*new)
        assert (await folder.outcomes())["acme/bot"] == "changed"
        assert await live() == (3, 3, "operator")
        assert (await tenant.post("/v1/adapters/bot/activate", json={"version": 1})).status_code == 200
        folder.adapter(versions[0])
        assert (await folder.outcomes())["acme/bot"] == "changed"
        assert await live() == (1, 4, "tenant_admin")


Break = Callable[[Folder], object]
BROKEN: dict[str, tuple[Break, list[str]]] = {
    "not YAML": (lambda folder: folder.write("z.yaml", "name: ["), ["z.yaml: line 1"]),
    "two manifests": (lambda folder: folder.write("z.yaml", "name: acme\n"), ["acme.yaml", "z.yaml", "are both for the tenant 'acme'"]),
    "name": (lambda folder: folder.write("z.yaml", "name: Zeta\n"), ["z.yaml: 'name' must be 1 to 63"]),
    "tier": (lambda folder: folder.write("z.yaml", "name: z\ntier: gold\n"), ["z.yaml: 'tier' must be one of"]),
    "range": (
        lambda folder: folder.write("z.yaml", "name: z\nlimits: {max_queued: 0}\n"),
        ["z.yaml: 'limits.max_queued' must be a whole number from 1 to 100,000"],
    ),
    "negative": (
        lambda folder: folder.write("z.yaml", "name: z\nlimits: {tokens_per_month: -1}\n"),
        ["z.yaml: 'limits.tokens_per_month' must be a whole number from 0"],
    ),
    "no base model": (
        lambda folder: folder.write("z.yaml", "name: z\nadapters: [{name: b, base_model: none, path: bot}]\n"),
        ["z.yaml: 'adapters[0].base_model': there is no base model 'none'"],
    ),
    "no version": (
        lambda folder: folder.write("z.yaml", "name: z\nadapters: [{name: b, base_model: tiny, path: bot, version: 2}]\n"),
        ["z.yaml: 'adapters[0].version': the adapter 'b' has no version 2."],
    ),
    "bad adapter": (lambda folder: folder.adapter(b"PK\3\4" + bytes(100)), ["acme.yaml: 'adapters[0]':", "zip archive"]),
    "bad rank": (
        lambda folder: folder.write("models/tiny.yaml", "name: tiny\nsource: ../../tiny\nengine: {max_lora_rank: 2}\n"),
        ["acme.yaml: 'adapters[0]':", "rank"],
    ),
    "no weights": (
        lambda folder: folder.write("models/y.yaml", "name: y\nsource: ../../none\n"),
        ["models/y.yaml: 'source':", "there is no folder"],
    ),
    "bounds": (
        lambda folder: folder.write("models/y.yaml", "name: y\nsource: ../../tiny\nreplicas: {min: 3, max: 2}\n"),
        ["models/y.yaml: 'replicas.min' must not be more than"],
    ),
    "context": (
        lambda folder: folder.write("models/y.yaml", "name: y\nsource: ../../tiny\nengine: {max_model_len: 513}\n"),
        ["models/y.yaml: 'engine.max_model_len' must not be more than the model's own (512)"],
    ),
    "no such kind": (
        lambda folder: folder.write("models/y.yaml", "name: y\nsource: ../../tiny\nkind: rerank\n"),
        ["models/y.yaml: 'kind' must be"],
    ),
    "no adapters": (
        lambda folder: folder.write("models/tiny.yaml", "name: tiny\nsource: ../../tiny\nkind: embed\n"),
        ["acme.yaml: 'adapters[0]':", "'tiny' takes no adapters"],
    ),
    "arguments": (
        lambda folder: folder.write("models/y.yaml", "name: y\nsource: ../../tiny\nengine: {args: --port 1}\n"),
        ["models/y.yaml: 'engine.args'"],
    ),
    "name of a base model": (
        lambda folder: folder.write("z.yaml", "name: z\nadapters: [{name: tiny, base_model: tiny, path: bot}]\n"),
        ["z.yaml: 'adapters[0].name': 'tiny' is the name of a base model"],
    ),
    "too many adapters": (
        lambda folder: folder.write("acme.yaml", "name: acme\nlimits: {max_adapters: 0}\n" + BOT),
        ["acme.yaml: The tenant would have 1 adapters", "'limits.max_adapters' is 0"],
    ),
}
#: Once the adapter exists, lowering the limit is allowed, and another check refuses the base model's rank and kind.
FIRST_ONLY = {"too many adapters", "bad rank", "no adapters"}


async def test_an_error_names_its_file_and_changes_nothing(stack: Stack, folder: Folder, versions: list[bytes]) -> None:
    """An error names its file and changes nothing, in a first application as in a later one."""
    originals = {"acme.yaml": "name: acme\n" + BOT, "models/tiny.yaml": "name: tiny\nsource: ../../tiny\n"}

    def restore() -> None:
        for path in (*folder.path.glob("*.yaml"), *folder.path.glob("models/*.yaml")):
            path.unlink()
        for name, content in originals.items():
            folder.write(name, content)
        folder.adapter(versions[0])

    for first in (True, False):
        before = await everything(stack)
        for name, (wrong, complaints) in BROKEN.items():
            if name in FIRST_ONLY and not first:
                continue
            restore()
            wrong(folder)
            with pytest.raises(InvalidRequest) as raised:
                await folder.apply()
            for complaint in complaints:
                assert complaint in raised.value.message, name
            assert "\n" not in raised.value.message, name
            assert await everything(stack) == before, name
        restore()
        await folder.apply()


async def test_what_adapters_were_validated_against_is_refused_by_the_plan(stack: Stack, folder: Folder, versions: list[bytes]) -> None:
    folder.adapter(versions[0])
    folder.write("acme.yaml", "name: acme\n" + BOT)
    await folder.apply()
    folder.write("models/tiny.yaml", "name: tiny\nsource: ../../tiny\nengine: {max_lora_rank: 8}\n")
    folder.write("acme.yaml", "name: acme\ntier: free\n" + BOT)
    before = await everything(stack)
    with pytest.raises(InvalidRequest, match=r"models/tiny.yaml: The base model has 1 adapters"):
        await folder.apply()
    assert await everything(stack) == before


async def test_a_dry_run_shows_the_plan_and_changes_nothing(stack: Stack, folder: Folder, operator_key: str, versions: list[bytes]) -> None:
    folder.adapter(versions[0])
    folder.write("acme.yaml", "name: acme\n" + BOT)
    before = await everything(stack)
    code, out, err = await lmaas(stack, operator_key, "apply", "--dry-run", str(folder.path))
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "base model tiny: to be created",
        f"  source: {(folder.path.parent / 'tiny').resolve()}",
        "tenant acme: to be created",
        "adapter acme/bot: to be created",
        "  live version: none → 1",
        "Plan: 3 to create.",
        "Nothing was changed (--dry-run).",
    ]
    code, planned, err = await lmaas(stack, operator_key, "--json", "apply", "--dry-run", str(folder.path))
    assert (code, err) == (0, "")
    assert await everything(stack) == before
    code, done, err = await lmaas(stack, operator_key, "--json", "apply", str(folder.path))
    assert (code, err) == (0, "")
    assert done == planned
    assert json.loads(done)[2] == {
        "thing": "adapter",
        "name": "acme/bot",
        "outcome": "created",
        "file": str(folder.path / "acme.yaml"),
        "fields": [{"field": "live version", "old": None, "new": 1}],
        "notes": [],
    }
    folder.write("acme.yaml", "name: acme\nlimits: {max_queued: 5}\n" + BOT)
    code, out, err = await lmaas(stack, operator_key, "apply", str(folder.path))
    plan = ["tenant acme: to be changed", "  limits.max_queued: 64 → 5", "Plan: 1 to change, 2 unchanged."]
    assert out.splitlines() == [*plan, "tenant acme: changed", "Done: 1 changed."], err
    code, out, err = await lmaas(stack, operator_key, "apply", str(folder.path))
    assert (code, out) == (0, "Plan: 3 unchanged.\n"), err
    folder.write("z.yaml", "name: acme\n")
    code, out, err = await lmaas(stack, operator_key, "apply", str(folder.path))
    assert (code, out) == (1, "")
    assert err.startswith(f"lmaas: {folder.path}/acme.yaml and {folder.path}/z.yaml are both for the tenant 'acme'")
    code, out, err = await lmaas(stack, operator_key, "apply", str(folder.path / "bot"))
    assert (code, out) == (2, "")


@pytest.mark.parametrize(("answer", "options"), [("n", []), ("y", []), (None, ["--yes"]), ("n", ["--json"])])
async def test_on_a_terminal_it_asks_after_the_plan(
    stack: Stack, folder: Folder, operator_key: str, answer: str | None, options: list[str]
) -> None:
    folder.write("acme.yaml", "name: acme\n")
    before = await everything(stack)
    ours, theirs = pty.openpty()
    try:
        if answer is not None:
            os.write(ours, f"{answer}\n".encode())
        code, out, err = await lmaas(stack, operator_key, "apply", str(folder.path), *options, stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    plan = out if "--json" not in options else err
    assert "tenant acme: to be created\nPlan: 2 to create.\n" in plan
    assert ("Make these changes? [y/N]: " in err) is (answer is not None)
    if answer == "n":
        assert (code, await everything(stack)) == (1, before)
        assert "created\nDone" not in out
    else:
        assert (code, out.splitlines()[-1]) == (0, "Done: 2 created.")
        assert await everything(stack) != before


async def test_only_operators_apply(stack: Stack, folder: Folder) -> None:
    key = (await stack.tenant()).key
    with closing(ApiClient(stack.url + "/v1", key)) as client, pytest.raises(ApiError, match="This needs an operator's key"):
        await asyncio.to_thread(lambda: apply(read_folder(folder.path), client))


class Failing(ApiClient):
    """A client whose uploads fail because the service has stopped."""

    def upload(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Fail like a gateway that has stopped."""
        raise ApiError(503, "The adapter store cannot take the files now.", "object_store_unavailable", "req_1")

    def for_tenant(self, tenant: str) -> "Failing":
        """Return this client for every tenant."""
        del tenant
        return self


async def test_a_failure_half_way_says_what_was_done(stack: Stack, folder: Folder, operator_key: str, versions: list[bytes]) -> None:
    folder.adapter(versions[0])
    path = folder.write("acme.yaml", "name: acme\n" + BOT)
    with closing(Failing(stack.url + "/v1", operator_key)) as client, pytest.raises(PartlyApplied) as raised:
        await asyncio.to_thread(lambda: apply(read_folder(folder.path), client))
    assert raised.value.message.splitlines() == [
        f"{path}: adapter acme/bot: The adapter store cannot take the files now. (object_store_unavailable, req_1)",
        "Done before: base model tiny created, tenant acme created. Once the cause is removed, run it again: it continues from here.",
    ]
    assert await folder.outcomes() == {"tiny": "unchanged", "acme": "unchanged", "acme/bot": "created"}
