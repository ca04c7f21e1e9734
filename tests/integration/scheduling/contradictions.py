"""Reads all keys of a pool, and reports where stored indices differ from the data that they are derived from."""

import json
from collections import Counter
from typing import Any

from lmaas.scheduling.client import stored_replica
from tests.support.figures import STORED

#: A script that returns all keys of a pool as JSON: what follows the prefix → type and content. The stream of events is left out. Tickets
#: are JSON, and the pool's figures are fields of their own.
READ_POOL = f"""{STORED}
local all = {{}}
for _, key in ipairs(redis.call('KEYS', KEYS[1] .. ':*')) do
  local kind, name = redis.call('TYPE', key).ok, string.sub(key, #KEYS[1] + 2)
  local content = nil
  if kind == 'hash' then content = redis.call('HGETALL', key) end
  if kind == 'zset' then content = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end
  if kind == 'set' then content = redis.call('SMEMBERS', key) end
  if kind == 'list' then content = redis.call('LRANGE', key, 0, -1) end
  for i = 2, name == 'tickets' and #content or 0, 2 do
    local ticket = ticket_of(content[i])
    ticket.event, ticket.text, ticket.reserved = event_of(ticket), nil, nil
    content[i] = cjson.encode(ticket)
  end
  for i = 1, name == 'vars' and #content or 0, 2 do
    if string.sub(content[i], 1, 7) == 'figures' then
      local vars = {{}}
      read_figures(vars, content[i + 1])
      content[i + 1] = ''
      for field, value in pairs(vars) do
        content[#content + 1] = field
        content[#content + 1] = type(value) == 'number' and string.format('%.17g', value) or value
      end
    end
  end
  if content then all[name] = {{ kind, content }} end
end
return cjson.encode(all)
"""
#: The parts of a replica's share in the index (PARTS_OF_SHARE in fleet.lua).
PARTS_OF_SHARE = 2**40
HOLDING = ("granted", "loading")
#: How the names of a queue's keys begin: that of interactive tickets, and that of background tickets.
LINES = ("", "background:")
Raw = dict[str, Any]


def read(text: str) -> Raw:
    """Decode the result of READ_POOL: a hash is a dict, a sorted set a dict of scores in its order, a set a set, a list a list."""
    return {name: _content(kind, content) for name, (kind, content) in json.loads(text).items()}


def _content(kind: str, content: list[str]) -> Any:
    if kind == "hash":
        return dict(zip(content[::2], content[1::2], strict=True))
    if kind == "zset":
        return {member: float(score) for member, score in zip(content[::2], content[1::2], strict=True)}
    return set(content) if kind == "set" else content


def contradictions(raw: Raw) -> list[str]:
    """Return where the indices differ from what is computed anew from tickets, replicas, resident adapters and waiting lines."""
    expected = _derived(raw)
    given = {
        "tickets",
        "replicas",
        "vars",
        "progress",
        "due",
        *(line + name for line in LINES for name in ("counters", "sequences", "passed")),
    }
    names = {name for name in raw if name not in given and not name.startswith(("resident:", "used:", "loading:"))} | set(expected)
    pairs = {name: (_rounded(raw.get(name)), _rounded(expected.get(name))) for name in sorted(names)}
    return [f"{name}: {stored!r}, derived {derived!r}" for name, (stored, derived) in pairs.items() if stored != derived] + _figures(raw)


def _rounded(content: Any) -> Any:
    """Return numbers as JSON stores them in Valkey, with 14 digits."""
    if not isinstance(content, dict):
        return content
    return {name: float(f"{value:.14g}") if isinstance(value, float) else value for name, value in content.items()}


def _tickets(raw: Raw) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in raw.get("tickets", {}).items()}


def _replicas(raw: Raw) -> dict[str, Any]:
    return {name: stored_replica(text) for name, text in raw.get("replicas", {}).items()}


def _stands(ticket: Any, replicas: dict[str, Any]) -> bool:
    return ticket["state"] in HOLDING and replicas.get(ticket["replica"], {}).get("life") == ticket["life"]


def _derived(raw: Raw) -> Raw:
    tickets, replicas = _tickets(raw), _replicas(raw)
    found: Raw = {"expiry": raw.get("expiry", {}) if set(raw.get("expiry", {})) == set(tickets) else dict.fromkeys(tickets, 0.0)}
    for name, ticket in tickets.items():
        if ticket["state"] == "queued":
            _add_queued(found, raw, name, ticket)
        elif _stands(ticket, replicas):
            _add_held(found, raw, name, ticket, replicas[ticket["replica"]])
        elif ticket["state"] in HOLDING:
            _add_lost(found, raw, name)
    for line in LINES:
        tenants = [each.removeprefix(f"{line}queue:") for each in found if each.startswith(f"{line}queue:")]
        found[f"{line}waiting"] = {tenant: raw.get(f"{line}counters", {}).get(tenant) for tenant in tenants}
    for name in sorted(replicas):
        _add_replica(found, raw, replicas[name])
    found["lost"] = [each for each in raw.get("lost", []) if f"lost:{each}" in raw]
    for each in found["lost"]:
        found.setdefault(f"lost:{each}", raw[f"lost:{each}"])  # it may still have tickets that no call has reached since
    return {name: content for name, content in found.items() if content}


def _add_queued(found: Raw, raw: Raw, name: str, ticket: Any) -> None:
    sequence, line = ticket["sequence"], LINES[ticket["background"]]
    found.setdefault(f"{line}queue", {})[name] = sequence
    found.setdefault(f"{line}needs", {})[name] = f"{ticket['weight']}|{ticket['adapter']}"
    if sequence < 0:
        found.setdefault(f"{line}front", {})[name] = sequence
    else:
        own = f"{line}queue:{ticket['tenant']}"
        found.setdefault(own, {})[name] = raw.get(own, {}).get(name)


def _add_held(found: Raw, raw: Raw, name: str, ticket: Any, replica: Any) -> None:
    at, adapter = replica["id"], ticket["adapter"]
    found.setdefault(f"held:{at}", {})[name] = ticket.get("sequence", 0)
    if ticket["background"]:
        age = raw.get(f"back:{at}", {}).get(name, 0)
        found.setdefault(f"back:{at}", {})[name] = age if 0 < age <= replica["latest"] else "no age"
    if adapter:
        running = found.setdefault(f"running:{at}", {})
        running[adapter] = str(int(running.get(adapter, 0)) + 1)
        found.setdefault(f"runs:{adapter}", {})[at] = 0
    if ticket["state"] == "loading":
        if replica["state"] == "draining":
            _add_lost(found, raw, name)
        else:
            found.setdefault(f"waits:{at}|{adapter}", {})[name] = ticket["sequence"]


def _add_lost(found: Raw, raw: Raw, name: str) -> None:
    """Check that a ticket that lost its place and was not reached yet is in one of the lists."""
    lists = [f"lost:{each}" for each in raw.get("lost", []) if name in raw.get(f"lost:{each}", {})]
    found.setdefault("nowhere", {}).update({} if lists else {name: "it is in no list of lost tickets"})


def _add_replica(found: Raw, raw: Raw, replica: Any) -> None:
    name, runs = replica["id"], len(found.get(f"running:{replica['id']}", {}))
    share = replica["load"] * PARTS_OF_SHARE // max(1, replica["slots"])
    for adapter in raw.get(f"resident:{name}", ()):
        found.setdefault(f"has:{adapter}", {})[name] = 0
    if replica["state"] == "starting":
        found.setdefault("starting", {})[name] = replica["since"]
    if replica["state"] != "ready" or replica.get("suspect") or replica.get("stale"):
        return
    if f"back:{name}" in found:
        found.setdefault("yielding", {})[name] = replica["latest"]
    if replica["load"] < replica["slots"]:
        found.setdefault("free", {})[name] = share
    if replica["load"] < replica["slots"] and runs < replica["adapter_slots"]:
        found.setdefault("spare", {})[name] = share
    if runs and runs >= replica["adapter_slots"]:
        found.setdefault("crowded", {})[name] = share


def _figures(raw: Raw) -> list[str]:
    """Check the figures that replicas and the pool count."""
    tickets, replicas, numbers = _tickets(raw), _replicas(raw), raw.get("vars", {})
    lines: list[str] = []

    def same(what: str, stored: Any, derived: Any) -> None:
        if float(stored or 0) != derived:
            lines.append(f"{what}: {stored!r}, derived {derived!r}")

    loads: Counter[str] = Counter()
    back: Counter[str] = Counter()
    for ticket in tickets.values():
        if _stands(ticket, replicas):
            loads[ticket["replica"]] += ticket["held"]
            back[ticket["replica"]] += ticket["held"] if ticket["background"] else 0
    for name, replica in replicas.items():
        same(f"load of {name}", replica["load"], loads[name])
        same(f"background load of {name}", replica["back"], back[name])
        same(f"runs of {name}", replica["runs"], len(raw.get(f"running:{name}", ())))
        same(f"has of {name}", replica["has"], len(raw.get(f"resident:{name}", ())))
    open_ones = [each for each in replicas.values() if each["state"] == "ready" and not each.get("suspect") and not each.get("stale")]
    same("load", numbers.get("load"), sum(loads.values()))
    same("back", numbers.get("back"), sum(back.values()))
    same("open", numbers.get("open"), len(open_ones))
    same("open_slots", numbers.get("open_slots"), sum(each["slots"] for each in open_ones))
    same("room", numbers.get("room"), sum(max(0, each["slots"] - each["load"]) for each in open_ones))
    same("adapters", numbers.get("adapters"), sum(max(0, each["adapter_slots"] - each["runs"]) for each in open_ones))
    same("slots", numbers.get("slots"), sum(each["slots"] for each in replicas.values() if each["state"] == "ready"))
    same("able", numbers.get("able"), sum(each["state"] != "draining" and not each.get("suspect") for each in replicas.values()))
    same("lost", numbers.get("lost"), len(raw.get("lost", ())))
    same("loading", numbers.get("loading"), sum(len(content) for name, content in raw.items() if name.startswith("loading:")))
    same("queued", numbers.get("queued"), len(raw.get("queue", ())))
    same("background_queued", numbers.get("background_queued"), len(raw.get("background:queue", ())))
    if set(raw.get("due", {})) != set(replicas):
        lines.append(f"due: {sorted(raw.get('due', {}))}, derived {sorted(replicas)}")
    if not set(raw.get("progress", {})) <= set(tickets):
        lines.append(f"progress of tickets that are gone: {sorted(set(raw['progress']) - set(tickets))}")
    for line in LINES:
        passed, queued = set(raw.get(f"{line}passed", {})), set(raw.get(f"{line}queue", {}))
        sequences, waiting = set(raw.get(f"{line}sequences", {})), set(raw.get(f"{line}waiting", {}))
        if not passed <= queued:
            lines.append(f"{line}passed: {sorted(passed)}, queued {sorted(queued)}")
        if sequences != waiting:
            lines.append(f"{line}sequences: {sorted(sequences)}, waiting {sorted(waiting)}")
    return lines
