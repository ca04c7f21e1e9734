"""The scheduler's functions in a real Valkey beside the model: one call goes to both, then everything that is stored is compared."""

import json
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from redis import Redis
from redis.client import Pipeline

from lmaas.scheduling.client import Beat, Bounds, Scheduler, Seed, Ticket, library, stored_replica
from lmaas.scheduling.states import RetryReason
from lmaas.types import TokenCounts
from tests.integration.scheduling.build import KEY
from tests.integration.scheduling.contradictions import LINES, READ_POOL, Raw, contradictions, read
from tests.integration.scheduling.model.data import Held, Line, Replica, Rules
from tests.integration.scheduling.model.limits import WINDOW_S, Tokens, month_of
from tests.integration.scheduling.model.scheduler import Model

POOL = "p"
#: The pool's numbers that the model does not store: it counts them anew or does without them.
UNTOLD = (
    "epoch",
    "seq",
    "layout",
    "run",
    "mark",
    "base",
    "began",
    "slots",
    "load",
    "back",
    "able",
    "open",
    "open_slots",
    "room",
    "adapters",
    "calm",
    "figures4",
    "queued",
    "background_queued",
    "loading",
)
#: A script that returns stored scopes in a form that Python reads.
READ_SCOPE = """
local found = redis.call('GET', KEYS[1])
if not found then return nil end
local memory = LAYOUT .. '/' .. (redis.call('GET', 'lmaas:limits') or '')
local _, wrapped = cmsgpack.unpack_one(found)
if string.sub(wrapped, 1, #memory) ~= memory then return nil end
local seeded, _, _, _, month, tokens, _, second, _, _, _, running, cost, newest_tokens, newest, at
  = struct.unpack(HEAD, wrapped, #memory + 1)
local scope = { running = running, month = month, tokens = tokens, cost = cost, seeded = seeded, seconds = {} }
for start = at, #wrapped, 24 do
  local second, requests, tokens = struct.unpack('<ddd', wrapped, start)
  scope.seconds[#scope.seconds + 1] = { second, requests, tokens }
end
if second > 0 then scope.seconds[#scope.seconds + 1] = { second, newest, newest_tokens } end
return cjson.encode(scope)
"""
for _constant in ("LAYOUT", "HEAD"):
    READ_SCOPE = re.search(rf"^local {_constant} = .*$", library(), re.MULTILINE)[0] + "\n" + READ_SCOPE  # type: ignore[index]


class Direct(Scheduler):
    """The scheduler's client, whose calls return only after the reply: its coroutines never wait.

    Each call includes what `reads` adds to the pipeline; `found` has what it read after the call.
    """

    def __init__(self, client: Redis, text: str) -> None:
        super().__init__(client, text)  # type: ignore[arg-type]
        self.client = client
        self.client.function_load(self._library, replace=True)
        self.reads: Callable[[Pipeline], None] = lambda _: None
        self.found: list[Any] = []

    async def call(self, function: str, pool: str, *args: bytes | str | int) -> Any:
        ask = self.client.pipeline(transaction=False)
        ask.fcall(f"{self._prefix}_{function}", 1, f"lmaas:{{{pool}}}", *args)
        self.reads(ask)
        reply, *self.found = ask.execute()
        return reply

    def forget_memories(self) -> None:
        """Trust the server's next reply, whatever it replied before."""
        self._memories.clear()


def answer(calling: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that never waits."""
    try:
        calling.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


def library_with(rules: Rules, text: str | None = None) -> str:
    """Return the library with other constants, with its time from two keys, and with its published messages in a list."""
    text = text or library()
    for name, value in asdict(rules).items():
        assert f"local {name} = " in text, name
        before, after = text.split(f"local {name} = ", 1)
        text = f"{before}local {name} = {value} --{after}"
    for before, after in (("redis.call('TIME')", "redis.call('MGET', 'now:s', 'now:us')"), ("call('PUBLISH', ", "call('RPUSH', 'said', ")):
        assert before in text, before
        text = text.replace(before, after)
    return text


def told(tokens: Tokens | None) -> TokenCounts | None:
    return None if tokens is None else TokenCounts(*tokens)


class Both:
    """A scheduler and its model. Each method calls both: it returns the result, and raises AssertionError where they differ."""

    def __init__(self, client: Redis, rules: Rules, now: int, scheduler: Direct) -> None:
        self.client, self.scheduler, self.model = client, scheduler, Model(rules)
        self.scopes: list[str] = []
        scheduler.reads = lambda ask: look(ask, self.scopes)
        self.now = now
        self.epoch: str | None = None
        #: False while a call is under way, and after one that found a difference.
        self.agreed = True
        self.flush()

    def at(self, now: int) -> None:
        """Set the current time."""
        self.now = now
        self.client.mset({"now:s": now // 1000, "now:us": now % 1000 * 1000})

    def flush(self) -> None:
        """Have the server lose its memory."""
        self.client.flushall()
        self.scheduler.forget_memories()  # by the time, which the test sets, this could be an older memory
        self.model.forget_everything()
        self.epoch = None
        self.at(self.now)

    @contextmanager
    def compared(self) -> Iterator[None]:
        self.agreed = False
        self.model.said.clear()
        self.model.placements.clear()
        yield
        difference = differences(stored(self.scheduler.found, self.scopes, self.now, self.model.rules), modelled(self.model, self.now))
        assert not difference, "\n".join(difference)
        self.agreed = True

    def reply(self, expected: Any, calling: Coroutine[Any, Any, Any]) -> Any:
        self.scopes = list(self.model.limits.scopes)
        got = answer(calling)
        if isinstance(got, dict) and (epoch := got.pop("epoch", None)) is not None:
            self.epoch = self.epoch or epoch
            assert epoch == self.epoch
        difference = differences(got, expected)
        assert not difference, "\n".join(difference)
        return got

    def submit(self, ticket: Ticket, bounds: Bounds, waited_ms: int = 0, attempts: int = 0, seeds: dict[str, Seed] | None = None) -> Any:
        with self.compared():
            return self.reply(
                self.model.submit(self.now, ticket, bounds, waited_ms=waited_ms, attempts=attempts, seeds=seeds),
                self.scheduler.submit(ticket, bounds, waited_ms=waited_ms, attempts=attempts, seeds=seeds),
            )

    def release(self, ticket: Ticket, event: dict[str, Any] | None, run_ms: int | None, used: Tokens | None) -> Any:
        with self.compared():
            return self.reply(
                self.model.release(self.now, ticket, event, run_ms, used),
                self.scheduler.release(ticket, "" if event is None else json.dumps(event), run_ms, told(used)),
            )

    def retry(self, ticket: Ticket, replica: str, reason: RetryReason, attempt: int) -> Any:
        with self.compared():
            return self.reply(
                self.model.retry(self.now, ticket, replica, reason, attempt), self.scheduler.retry(ticket, replica, reason, attempt)
            )

    def renew(self, progress: list[tuple[str, Tokens | None]]) -> Any:
        with self.compared():
            return self.reply(
                self.model.renew(self.now, progress), self.scheduler.renew(POOL, [(name, told(tokens)) for name, tokens in progress])
            )

    def restore(self, ticket: Ticket, replica: str, waited_ms: int, attempts: int) -> Any:
        with self.compared():
            return self.reply(
                self.model.restore(self.now, ticket, replica, waited_ms=waited_ms, attempts=attempts),
                self.scheduler.restore(ticket, replica, waited_ms=waited_ms, attempts=attempts),
            )

    def heartbeat(self, replica: str, beat: Beat) -> Any:
        with self.compared():
            return self.reply(self.model.heartbeat(self.now, replica, beat), self.scheduler.heartbeat(POOL, replica, beat))

    def loaded(self, replica: str, adapter: str) -> Any:
        with self.compared():
            return self.reply(self.model.loaded(self.now, replica, adapter), self.scheduler.loaded(POOL, replica, adapter))

    def load_failed(self, replica: str, adapter: str) -> Any:
        with self.compared():
            return self.reply(
                self.model.load_failed(self.now, replica, adapter, "broken"), self.scheduler.load_failed(POOL, replica, adapter, "broken")
            )

    def evict(self, replica: str, adapter: str) -> Any:
        with self.compared():
            return self.reply(self.model.evict(self.now, replica, adapter), self.scheduler.evict(POOL, replica, adapter))

    def drain(self, replica: str) -> Any:
        with self.compared():
            return self.reply(self.model.drain(self.now, replica), self.scheduler.drain(POOL, replica))

    def deregister(self, replica: str) -> None:
        with self.compared():
            self.model.deregister(self.now, replica)
            self.reply(None, self.scheduler.deregister(POOL, replica))

    def room(self) -> Any:
        with self.compared():
            return self.reply(self.model.read_room(self.now), self.scheduler.room(POOL))

    def stats(self, delay_ms: int = 0, first_ms: int = Rules.START_MS) -> Any:
        with self.compared():
            return self.reply(self.model.stats(self.now, delay_ms, first_ms), self.scheduler.stats(POOL, delay_ms, first_ms))


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Describe where two nested values differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = sorted({*left, *right}, key=str)
        return [line for key in keys for line in differences(left.get(key, "nothing"), right.get(key, "nothing"), f"{where} {key}")]
    return [] if left == right else [f"{where}: {left!r}, by the model {right!r}"]


# The stored data of both, in the same form.


def look(ask: Pipeline, scopes: list[str]) -> None:
    """Read everything in Valkey; take away what was published."""
    ask.eval(READ_POOL, 1, KEY)
    ask.xrange(f"{KEY}:usage")
    ask.lrange("said", 0, -1)
    ask.delete("said")
    for name in scopes:
        ask.eval(READ_SCOPE, 1, f"lmaas:limits:{name}")


def stored(found: list[Any], scopes: list[str], now: int, rules: Rules) -> dict[str, Any]:
    """Return what was read. Fail if it contradicts itself."""
    text, usage, said, _, *limits = found
    raw, published = read(text), iter(said)
    wrong = contradictions(raw)
    assert not wrong, "\n".join(wrong)
    return {
        "tickets": {name: _ticket(name, json.loads(facts), raw) for name, facts in raw.get("tickets", {}).items()},
        "replicas": {name: _replica(stored_replica(facts), raw, rules) for name, facts in raw.get("replicas", {}).items()},
        "lines": {line: _line(line, raw) for line in LINES},
        "progress": sorted(raw.get("progress", ())),
        "lost": [list(raw[f"lost:{number}"]) for number in raw.get("lost", ())],
        "numbers": _numbers({name: value for name, value in raw.get("vars", {}).items() if name not in UNTOLD}),
        "events": [json.loads(fields["event"]) for _, fields in usage],
        "said": sorted(_message(channel, message) for channel, message in zip(published, published, strict=True)),
        "limits": {name: _scope(facts and json.loads(facts), now) for name, facts in zip(scopes, limits, strict=True)},
    }


def _line(line: str, raw: Raw) -> dict[str, Any]:
    own = f"{line}queue:"
    return {
        "queue": list(raw.get(f"{line}queue", ())),
        "queues": {name.removeprefix(own): list(content) for name, content in raw.items() if name.startswith(own)},
        "waiting": list(raw.get(f"{line}waiting", ())),
        "passed": sorted(raw.get(f"{line}passed", ())),
        "counters": raw.get(f"{line}counters", {}),
    }


def _ticket(name: str, facts: Any, raw: Raw) -> dict[str, Any]:
    names = ("state", "attempts", "submitted", "placed", "granted", "replica", "revoked", "held")
    passed = raw.get(f"{LINES[facts['background']]}passed", {}).get(name)
    return {each: facts.get(each) for each in names} | {
        "expires": raw["expiry"].get(name),
        "passed": passed and int(passed),
        "progress": json.loads(raw.get("progress", {}).get(name, "null")),
    }


def _replica(facts: Any, raw: Raw, rules: Rules) -> dict[str, Any]:
    name = facts["id"]
    facts["beat"] = int(raw["due"][name]) - (rules.GONE_MS + 1 if facts.get("stale") else rules.STALE_MS)
    loading = raw.get(f"loading:{name}", {})
    return {each: facts[each] for each in ("url", "slots", "adapter_slots", "state", "beat", "since", "load", "back", "latest")} | {
        "running": {adapter: int(count) for adapter, count in raw.get(f"running:{name}", {}).items()},
        "used": {adapter: int(at) for adapter, at in raw.get(f"used:{name}", {}).items()},
        "suspect": facts.get("suspect", False),
        "resident": sorted(raw.get(f"resident:{name}", ())),
        "loading": {adapter: (source, sorted(raw.get(f"waits:{name}|{adapter}", ()))) for adapter, source in loading.items()},
    }


def _message(channel: str, message: str) -> str:
    news = json.loads(message) if channel.startswith("lmaas:gateway:") else message
    return f"{channel} {json.dumps(news, sort_keys=True)}"


def _scope(facts: Any, now: int) -> dict[str, Any]:
    if not facts:
        return {"running": 0, "seeded": 0, "month": (0, 0), "seconds": {}}
    recent = [each for each in facts["seconds"] if each[0] + WINDOW_S >= now // 1000 >= each[0]]
    return {
        "running": facts["running"],
        "seeded": facts["seeded"],
        "month": (facts["tokens"], facts["cost"]) if facts["month"] == month_of(now) else (0, 0),
        "seconds": {at: (requests, tokens) for at, requests, tokens in recent if requests or tokens},
    }


def modelled(model: Model, now: int) -> dict[str, Any]:
    """Return the same of the model."""
    numbers = {
        **_modelled_numbers(model.lines[False], ""),
        **_modelled_numbers(model.lines[True], "background_"),
        "boost": model.reserve.boost,
        "boost_at": model.reserve.boost_at,
        "arrived": model.reserve.arrived,
        "ages": model.ages,
        "yields": model.yields,
        "run_ms": model.run_ms,
        "start_ms": model.start_ms,
        "reaped": model.reaped,
        "offset": model.offset,
        "lives": model.lives,
        "lost": len(model.lost),
        "turn": model.turn,
        "spare": model.spare_until,
        "active": model.active,
        "controller": model.controller,
        "delay_ms": model.delay_ms,
        "first_ms": model.first_ms,
    }
    return {
        "tickets": {name: _held(held) for name, held in model.tickets.items()},
        "replicas": {name: _modelled_replica(model, replica) for name, replica in model.replicas.items()},
        "lines": {line: _modelled_line(model, background=bool(line)) for line in LINES},
        "progress": sorted(name for name, each in model.tickets.items() if each.progress is not None),
        "lost": model.lost,
        "numbers": _numbers(numbers),
        "events": model.events,
        "said": sorted(f"{channel} {json.dumps(news, sort_keys=True)}" for channel, news in model.said),
        "limits": {
            name: {
                "running": scope.running(),
                "seeded": scope.seeded,
                "month": scope.month_figures(now),
                "seconds": {second: used for second, used in scope.seconds(now).items() if any(used)},
            }
            for name, scope in model.limits.scopes.items()
        },
    }


def _modelled_numbers(line: Line, prefix: str) -> dict[str, Any]:
    return {f"{prefix}placed": line.placed, f"{prefix}last": line.last_to_leave, f"{prefix}floor": line.least_counter}


def _modelled_line(model: Model, *, background: bool) -> dict[str, Any]:
    queued, tenants = model.queue(background=background), model.tenants_waiting(background=background)
    return {
        "queue": [each.ticket.id for each in queued],
        "queues": {tenant: [one.ticket.id for one in model.queue(tenant, background=background)] for tenant in tenants},
        "waiting": tenants,
        "passed": sorted(each.ticket.id for each in queued if each.passed_at is not None),
        "counters": model.lines[background].counters,
    }


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Return only the numbers that differ from the defaults."""
    usual = {"run_ms": Rules.TURN_MS, "start_ms": Rules.START_MS, "first_ms": Rules.START_MS}
    found = {name: value if value is None or name.endswith("last") else float(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value not in (None, "", usual.get(name, 0))}


def _held(held: Held) -> dict[str, Any]:
    return {
        "state": held.state,
        "attempts": held.attempts,
        "submitted": held.submitted,
        "placed": held.placed,
        "granted": held.granted,
        "replica": held.replica,
        "revoked": held.revoked,
        "held": held.slots or None,
        "expires": held.expires,
        "passed": held.passed_at,
        "progress": held.progress and list(held.progress),
    }


def _modelled_replica(model: Model, replica: Replica) -> dict[str, Any]:
    loading = {
        adapter: (source, sorted(each.ticket.id for each in model.loading_on(replica, adapter)))
        for adapter, source in replica.loading.items()
    }
    return {
        "url": replica.url,
        "slots": replica.slots,
        "adapter_slots": replica.adapter_slots,
        "state": replica.state,
        "beat": replica.beat,
        "since": replica.since,
        "load": model.load(replica),
        "back": model.back(replica),
        "latest": replica.latest,
        "running": model.running(replica),
        "used": replica.used,
        "suspect": replica.suspect,
        "resident": sorted(replica.resident),
        "loading": loading,
    }
