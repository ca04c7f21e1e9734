"""The plan: the changes that applying manifests would make, without a service."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmaas.api import table
from lmaas.errors import InvalidRequest
from lmaas.manifests.apply import described, planned, summary
from lmaas.manifests.folder import Manifests
from lmaas.manifests.models import ModelManifest
from lmaas.manifests.plan import Change, FieldChange, KnownAdapter, Observed, Outcome, Send, Upload, plan
from lmaas.manifests.tenants import AdapterManifest, TenantManifest

FILE, FOLDER = Path("tenants/acme.yaml"), Path("tenants/adapters/bot")
USUAL = {
    "tier": "standard", "max_queued": 64, "max_adapters": 20, "requests_per_minute": None, "tokens_per_minute": None,
    "max_concurrent": None, "tokens_per_month": None, "budget_per_month": None,
}  # fmt: skip
MODEL = {
    "source": "/tiny", "kind": "generate", "dtype": "float32", "idle_timeout_s": 300, "min_replicas": 0, "max_replicas": 1, "cpus": 1,
    "accelerators": None, "max_loras": 8, "max_lora_rank": 16, "max_cpu_loras": 64, "max_num_seqs": 16, "max_model_len": 512,
    "kv_cache_bytes": 2**30, "engine_args": "", "prompt_price": 0, "cached_price": 0, "completion_price": 0, "engine_price": 0,
}  # fmt: skip


def tenant(*adapters: AdapterManifest, **settings: Any) -> TenantManifest:
    return TenantManifest(FILE, "acme", settings, adapters)


def bot(folder: Path | None = FOLDER, version: int | None = None, **other: Any) -> AdapterManifest:
    return replace(AdapterManifest("bot", "base", folder, version, "adapters[0]"), **other)


def observed(
    adapters: Mapping[str, KnownAdapter] | None = None, content: str | None = "new", before: Any = USUAL, after: Any = USUAL, **other: Any
) -> Observed:
    """Return a service with the base model `base` and the tenant `acme`, whose settings are these before and after."""
    contents = {} if content is None else {("acme", "bot"): content}
    known = {} if before is None else {"acme": {"id": "ten_1"} | before}
    there = {"acme": adapters or {}} if before is not None else {}
    return Observed({"base": {"id": "mod_1"} | MODEL}, known, there, {}, {"acme": after}, contents, **other)


def known(live: int | None, *contents: str) -> dict[str, KnownAdapter]:
    return {"bot": KnownAdapter("base", live, dict(enumerate(contents, 1)))}


def own(live: int | None, *contents: str) -> dict[str, KnownAdapter]:
    """Return the same, where the tenant itself made the version live."""
    return {"bot": replace(known(live, *contents)["bot"], is_tenants=True)}


def upload(version: int, *, activate: bool) -> Upload:
    return Upload("acme", "bot", "base", FOLDER, version, activate)


def activation(version: int) -> Send:
    return Send(table.ACTIVATE_VERSION, {"version": version}, {"tenant": "acme", "name": "bot"})


def live(old: int | None, new: int) -> FieldChange:
    return FieldChange("live version", old, new)


def test_what_a_manifest_does_not_name_becomes_a_default() -> None:
    before = USUAL | {"tier": "free", "max_queued": 5, "tokens_per_month": 9}
    after = USUAL | {"max_adapters": 7}
    [change] = plan(Manifests((), (tenant(max_adapters=7),)), observed(before=before, after=after))
    assert (change.outcome, change.path) == (Outcome.CHANGED, FILE)
    assert change.fields == (
        FieldChange("tier", "free", "standard"),
        FieldChange("limits.max_queued", 5, 64),
        FieldChange("limits.max_adapters", 20, 7),
        FieldChange("limits.tokens_per_month", 9, None),
    )
    assert change.requests == (Send(table.CHANGE_TENANT, dict.fromkeys(USUAL) | {"max_adapters": 7}, {"tenant": "acme"}),)
    assert described(change) == [
        "tenant acme: changed",
        "  tier: free → standard",
        "  limits.max_queued: 5 → 64",
        "  limits.max_adapters: 20 → 7",
        "  limits.tokens_per_month: 9 → none",
    ]
    assert planned(change) == ["tenant acme: to be changed", *described(change)[1:]]
    assert summary([change]) == "Plan: 1 to change."


def test_what_is_as_it_should_be_asks_for_nothing() -> None:
    manifests = Manifests((ModelManifest(FILE, "base", {"source": "/tiny"}),), (tenant(bot()),))
    state = replace(observed(known(1, "new")), proposed_models={"base": MODEL})
    changes = plan(manifests, state)
    assert [(change.thing, change.outcome, change.fields, change.requests, change.notes) for change in changes] == [
        (thing, Outcome.UNCHANGED, (), (), ()) for thing in ("base model", "tenant", "adapter")
    ]
    assert described(changes[2]) == ["adapter acme/bot: unchanged"]
    assert planned(changes[2]) == []
    assert summary(changes) == "Plan: 3 unchanged."


def test_base_models_come_first_and_go_back_to_their_defaults() -> None:
    model = ModelManifest(FILE, "base", {"source": "/tiny", "max_replicas": 3})
    new = ModelManifest(FILE, "new", {"source": "/new"})
    state = replace(
        observed(before=None),
        models={"base": MODEL | {"id": "mod_1", "idle_timeout_s": 9, "engine_args": "--x"}},
        proposed_models={"base": MODEL | {"max_replicas": 3}, "new": MODEL},
    )
    first, second, third, fourth = plan(Manifests((model, new), (tenant(bot(base_model="new")),)), state)
    assert (first.outcome, second.outcome, third.outcome, fourth.outcome) == (Outcome.CHANGED, *[Outcome.CREATED] * 3)
    assert first.fields == (
        FieldChange("idle_timeout_s", 9, 300),
        FieldChange("replicas.max", 1, 3),
        FieldChange("engine.args", "--x", ""),
    )
    assert described(first)[-1] == "  engine.args: --x → none"
    wanted = dict.fromkeys(MODEL) | {"source": "/tiny", "max_replicas": 3}
    assert first.requests == (Send(table.CHANGE_MODEL, wanted, {"model": "base"}),)
    assert planned(second) == ["base model new: to be created", "  source: /tiny"]
    assert summary([first, second, third, fourth]) == "Plan: 3 to create, 1 to change."
    assert second.requests == (Send(table.CREATE_MODEL, {"name": "new"} | dict.fromkeys(MODEL) | {"source": "/new"}),)
    assert third.requests == (Send(table.CREATE_TENANT, {"name": "acme"} | dict.fromkeys(USUAL)),)
    assert fourth.requests == (Upload("acme", "bot", "new", FOLDER, 1, activate=True),)


@pytest.mark.parametrize(
    ("entry", "there", "outcome", "requests", "fields"),
    [
        # A new adapter, and a folder with content that no version has.
        (bot(), {}, Outcome.CREATED, [upload(1, activate=True)], [live(None, 1)]),
        (bot(), known(1, "old"), Outcome.CHANGED, [upload(2, activate=True)], [live(1, 2)]),
        (bot(), known(1, "old", "older"), Outcome.CHANGED, [upload(3, activate=True)], [live(1, 3)]),
        # A rollback, and an upload of the tenant's own, are left as they are.
        (bot(), known(1, "old", "new"), Outcome.UNCHANGED, [], []),
        (bot(), known(2, "new", "own"), Outcome.UNCHANGED, [], []),
        (bot(), known(1, "new", "new"), Outcome.UNCHANGED, [], []),
        # New content does not replace a version that the tenant itself made live.
        (bot(), own(1, "own"), Outcome.CHANGED, [upload(2, activate=False)], [FieldChange("latest version", 1, 2)]),
        (bot(), own(1, "own", "old"), Outcome.CHANGED, [upload(3, activate=False)], [FieldChange("latest version", 2, 3)]),
        (bot(), own(1, "own", "new"), Outcome.UNCHANGED, [], []),
        (bot(), own(None, "own"), Outcome.CHANGED, [upload(2, activate=True)], [live(None, 2)]),
        (bot(version=2), own(1, "own"), Outcome.CHANGED, [upload(2, activate=False), activation(2)], [live(1, 2)]),
        # Uploaded, but never activated.
        (bot(), known(None, "other", "new"), Outcome.CHANGED, [activation(2)], [live(None, 2)]),
        # A pinned version.
        (bot(version=1), {}, Outcome.CREATED, [upload(1, activate=False), activation(1)], [live(None, 1)]),
        (bot(version=1), known(2, "new", "own"), Outcome.CHANGED, [activation(1)], [live(2, 1)]),
        (bot(version=2), known(2, "new", "own"), Outcome.UNCHANGED, [], []),
        (bot(version=2), known(1, "old"), Outcome.CHANGED, [upload(2, activate=False), activation(2)], [live(1, 2)]),
        (bot(version=1), known(1, "old"), Outcome.CHANGED, [upload(2, activate=False)], [FieldChange("latest version", 1, 2)]),
        (
            bot(version=1),
            known(2, "old", "own"),
            Outcome.CHANGED,
            [upload(3, activate=False), activation(1)],
            [FieldChange("latest version", 2, 3), live(2, 1)],
        ),
        # A pin without a folder.
        (bot(None, 1), known(2, "old", "own"), Outcome.CHANGED, [activation(1)], [live(2, 1)]),
        (bot(None, 2), known(2, "old", "own"), Outcome.UNCHANGED, [], []),
    ],
)
def test_adapters(
    entry: AdapterManifest,
    there: dict[str, KnownAdapter],
    outcome: Outcome,
    requests: list[Send | Upload],
    fields: list[FieldChange],
) -> None:
    _, change = plan(Manifests((), (tenant(entry),)), observed(there, None if entry.folder is None else "new"))
    assert (change.outcome, list(change.requests), list(change.fields)) == (outcome, requests, fields)


def notes(changes: list[Change]) -> list[str]:
    return [note for change in changes for note in change.notes]


def test_what_stays_is_said() -> None:
    changes = plan(Manifests((), (tenant(bot()),)), observed(known(1, "old", "new") | {"own": KnownAdapter("base", 1)}))
    assert notes(changes) == [
        "Not in the manifest, left as they are: own.",
        "Version 1 is live and stays so; the folder has the content of version 2. "
        "To serve that one, set 'version: 2' in the manifest or activate it.",
    ]
    assert all(change.requests == () for change in changes)
    assert notes(plan(Manifests((), (tenant(bot(version=1)),)), observed(known(1, "old", "new")))) == []
    assert notes(plan(Manifests((), (tenant(bot()),)), observed(known(1, "old")))) == []
    assert notes(plan(Manifests((), (tenant(bot()),)), observed(own(1, "old")))) == [
        "Version 1 is live by the tenant's own choice and stays so; the folder has the content of version 2. "
        "To serve that one, set 'version: 2' in the manifest or activate it."
    ]


@pytest.mark.parametrize(
    ("entries", "state", "complaints"),
    [
        ([bot(base_model="none")], observed(content=None), ["'adapters[0].base_model': there is no base model 'none'"]),
        ([bot(name="base")], observed(), ["'adapters[0].name': 'base' is the name of a base model"]),
        ([bot()], observed({"bot": KnownAdapter("other", 1, {1: "old"})}), ["exists and is for 'other'"]),
        ([bot(version=3)], observed(known(1, "old")), ["'adapters[0].version': the adapter 'bot' has no version 3. It has: 1."]),
        ([bot(version=2)], observed(known(1, "new")), ["has no version 2. It has: 1."]),
        ([bot(None, 1)], observed(content=None), ["has no version 1. It has none."]),
        ([bot()], observed(after=USUAL | {"max_adapters": 0}), ["would have 1 adapters, of which 0 exist, but 'limits.max_adapters' is 0"]),
        ([bot()], observed(known(1, "old"), after=USUAL | {"max_adapters": 0}), ["of which 1 exist"]),
        ([bot(base_model="none")], observed(content=None, refusals=("a: wrong",)), ["a: wrong", "no base model 'none'"]),
    ],
)
def test_what_would_be_refused_is_said_before_anything_changes(
    entries: list[AdapterManifest], state: Observed, complaints: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        plan(Manifests((), (tenant(*entries),)), state)
    lines = raised.value.message.splitlines()
    assert len(lines) == len(complaints)
    for line, complaint in zip(lines, complaints, strict=True):
        assert complaint in line
        assert line.startswith((f"{FILE}: ", "a: wrong"))


def test_an_id_is_no_name() -> None:
    other = TenantManifest(Path("b.yaml"), "mod_1", {}, ())
    with pytest.raises(InvalidRequest) as raised:
        plan(Manifests((ModelManifest(FILE, "ten_1", {}),), (other,)), observed())
    assert raised.value.message.splitlines() == [
        "b.yaml: 'name' is the id of 'base'. Give the name instead.",
        f"{FILE}: 'name' is the id of 'acme'. Give the name instead.",
    ]


def test_a_limit_below_what_exists_is_allowed_as_long_as_nothing_is_uploaded() -> None:
    [_, change] = plan(Manifests((), (tenant(bot()),)), observed(known(1, "new"), after=USUAL | {"max_adapters": 0}))
    assert change.outcome is Outcome.UNCHANGED
