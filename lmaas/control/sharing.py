"""Divides full machines among pools: a pure function over all of them.

Each pool keeps the replicas that it has and still wants. Pools that want more are served in this order: first, each pool that waits without
a replica gets one, the longest wait first; second, replicas that operators always want (`min_replicas`); third, one more at a time for the
pool that has the fewest; then, starts ahead of a request; last, replicas that only background work needs, those that a deadline requires
before the others. Room for a replica that does not fit yet is reserved for the first pool in that order, so that no later pool takes it.

For the first three, replicas that only background work needs give way at once, and then replicas of idle pools, the longest idle first.
A replica of an idle pool stays for its first `residency_s`; otherwise two pools with a few requests each would drain each other again and
again. Busy replicas give way only to a pool that has none at all. A pool's second and further replicas do so immediately. Its first one
does so when another pool has waited for `starvation_s` and it has been served for `quantum_s` (the longest-served first). `min_replicas`
never give way. For a pool whose engines fail to start, no busy replica gives way, and no room is reserved while busy replicas use the rest.

For background work with a deadline that requires a replica, replicas of idle pools give way, and so do those that only background work
without such a deadline needs. For other background work, none does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from lmaas.types import Resources

#: The rounding error that a sum of fractions of a CPU may have.
EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class SharingRules:
    """Times in seconds: the time for which a pool is served before it gives way to a waiting one, and the times derived from that."""

    quantum_s: float = 60.0

    @property
    def residency_s(self) -> float:
        """The minimum time for which a replica stays after it has become ready."""
        return self.quantum_s / 4

    @property
    def starvation_s(self) -> float:
        """The time after which a busy pool may have to make room for a waiting one."""
        return self.quantum_s / 2


@dataclass(frozen=True, slots=True)
class HeldReplica:
    """A replica that is desired and alive: its slots that interactive requests use, those that background work uses, and the seconds since
    it became ready or, if it is not ready, was recorded."""

    replica: str
    load: int
    age_s: float
    ready: bool = True
    background: int = 0


@dataclass(frozen=True, slots=True)
class PoolClaim:
    """The replicas that one pool has and wants, and what each needs. `leaving` counts those that drain and still have their memory.
    Only background work needs `background` of the wanted ones; with `due`, its deadline requires them."""

    id: str
    name: str
    needs: Resources
    wanted: int
    held: Sequence[HeldReplica] = ()
    leaving: int = 0
    min_replicas: int = 0
    queued: int = 0
    #: Seconds since the last request.
    idle_s: float = 0.0
    #: True if no request needs the replicas yet.
    ahead: bool = False
    #: True if the pool may start a replica now (not for a while after a failed start), and true if its last start failed.
    may_start: bool = True
    failing: bool = False
    background: int = 0
    due: bool = False

    @property
    def busy(self) -> bool:
        """True if interactive requests wait or run."""
        return self.queued > 0 or any(held.load > 0 for held in self.held)

    @property
    def interactive(self) -> int:
        """The number of wanted replicas without those that only background work needs."""
        return self.wanted - self.background


@dataclass(frozen=True, slots=True)
class Share:
    """The number of replicas that a pool gets now, and the reason if that is fewer than it wants (otherwise empty)."""

    replicas: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WaitingSince:
    """The time (on `now`'s clock) since which each pool without a replica has waited. One round passes it to the next."""

    pools: Mapping[str, float] = field(default_factory=dict)


class _Turn(IntEnum):
    WAITING = 0
    PROMISED = 1
    MORE = 2
    AHEAD = 3
    BACKGROUND = 4


@dataclass(slots=True)
class _Room:
    """A mutable number of CPUs and accelerators."""

    cpus: float
    accelerators: float

    def fits(self, needs: Resources) -> bool:
        return needs.cpus <= self.cpus + EPSILON and needs.accelerators <= self.accelerators

    def add(self, needs: Resources, times: int = 1) -> None:
        self.cpus += times * needs.cpus
        self.accelerators += times * needs.accelerators


def share(
    capacity: Resources | None, pools: Sequence[PoolClaim], waiting: WaitingSince, rules: SharingRules, now: float
) -> tuple[dict[str, Share], WaitingSince]:
    """Return the share of each pool of `capacity` (None for no bound), and the waiting pools.

    If a share is smaller than what the pool has, the rest is drained. A larger share fits now: the replicas that run or may be started
    never exceed `capacity` in total, unless more run already.
    """
    since = {pool.id: waiting.pools.get(pool.id, now) for pool in pools if pool.interactive > 0 and not pool.held and not pool.ahead}
    if capacity is None:
        return {pool.id: Share(pool.wanted) for pool in pools}, WaitingSince(since)
    return _Round(capacity, pools, since, rules, now).result(), WaitingSince(since)


class _Round:
    def __init__(
        self, capacity: Resources, pools: Sequence[PoolClaim], since: Mapping[str, float], rules: SharingRules, now: float
    ) -> None:
        self._capacity, self._pools, self._since, self._rules, self._now = capacity, pools, since, rules, now
        self._free = _Room(capacity.cpus, capacity.accelerators)
        #: The room that becomes free when the draining replicas have ended.
        self._coming = _Room(0, 0)
        self._shares: dict[str, int] = {}
        self._why: dict[str, str] = {}
        for pool in pools:
            kept = min(pool.wanted, len(pool.held))
            self._shares[pool.id] = kept
            self._free.add(pool.needs, -len(pool.held) - pool.leaving)
            self._coming.add(pool.needs, len(pool.held) - kept + pool.leaving)

    def result(self) -> dict[str, Share]:
        short = [pool for pool in self._pools if pool.interactive > len(pool.held)]
        turns = {pool.id: self._turn(pool) for pool in short}
        for pool in sorted(short, key=lambda pool: (turns[pool.id], self._since.get(pool.id, 0.0), pool.id)):
            if turns[pool.id] is _Turn.WAITING:
                self._serve(_Turn.WAITING, pool, 1)
            elif turns[pool.id] is _Turn.PROMISED:
                self._serve(_Turn.PROMISED, pool, min(pool.min_replicas, pool.interactive))
        # A pool that has no replica yet waits for its first. The others get one more at a time, the pool with the least first.
        more = [pool for pool in short if turns[pool.id] is _Turn.MORE or self._shares[pool.id] > len(pool.held)]
        while more:
            pool = min(more, key=lambda pool: (self._shares[pool.id] * (pool.needs.cpus + pool.needs.accelerators), pool.id))
            before = self._shares[pool.id]
            self._serve(_Turn.MORE, pool, min(before + 1, pool.interactive))
            if self._shares[pool.id] == before:
                more.remove(pool)
        for pool in short:
            if turns[pool.id] is _Turn.AHEAD:
                self._serve(_Turn.AHEAD, pool, pool.interactive)
        for pool in sorted(self._pools, key=lambda pool: (not pool.due, pool.id)):
            # A pool that gives way to another one does not take room at the same time.
            if pool.background > 0 and self._shares[pool.id] >= min(pool.wanted, len(pool.held)):
                self._serve(_Turn.BACKGROUND, pool, pool.wanted)
        return {pool.id: Share(self._shares[pool.id], self._why.get(pool.id, "")) for pool in self._pools}

    def _turn(self, pool: PoolClaim) -> _Turn:
        if pool.ahead:
            return _Turn.AHEAD
        if not pool.held and pool.busy:
            return _Turn.WAITING
        return _Turn.PROMISED if len(pool.held) < pool.min_replicas else _Turn.MORE

    def _serve(self, turn: _Turn, pool: PoolClaim, target: int) -> None:
        """Give the pool up to `target` replicas as far as they fit, and keep room free for the first one that does not."""
        if not _Room(self._capacity.cpus, self._capacity.accelerators).fits(pool.needs):
            self._why[pool.id] = f"a replica needs {_words(pool.needs)}, and all machines together have {_words(self._capacity)}"
            return
        if not pool.may_start:
            return
        while self._shares[pool.id] < target:
            if self._free.fits(pool.needs):
                self._free.add(pool.needs, -1)
                self._shares[pool.id] += 1
                continue
            self._why[pool.id] = "the machines are full"
            if turn is not _Turn.AHEAD and (turn is not _Turn.BACKGROUND or pool.due):
                self._make_room(turn, pool)
            return

    def _make_room(self, turn: _Turn, pool: PoolClaim) -> None:
        """Choose replicas to give way, if they make enough room together, and reserve that room for this pool."""
        missing = _Room(max(0.0, pool.needs.cpus - self._free.cpus), max(0.0, pool.needs.accelerators - self._free.accelerators))
        found = _Room(self._coming.cpus, self._coming.accelerators)
        chosen: list[PoolClaim] = []
        for victim in self._victims(turn, pool):
            # Draining a replica that has none of the missing resource would not help.
            if _lacks(found.cpus, missing.cpus, victim.needs.cpus) or _lacks(
                found.accelerators, missing.accelerators, victim.needs.accelerators
            ):
                chosen.append(victim)
                found.add(victim.needs)
        enough = found.cpus + EPSILON >= missing.cpus and found.accelerators >= missing.accelerators
        if not enough and not self._ever(pool):
            self._why[pool.id] = "the machines are full of replicas that other pools always have (min_replicas)"
            return
        for victim in chosen if enough else ():
            self._shares[victim.id] -= 1
            self._why[victim.id] = f"gives way to {pool.name}"
            self._coming.add(victim.needs)
        if enough or (turn is _Turn.WAITING and not pool.failing):
            # No later pool takes this room. A pool whose engines fail to start does not make other pools wait for room that is in use.
            self._coming.cpus -= missing.cpus
            self._coming.accelerators -= missing.accelerators
            self._free.cpus -= pool.needs.cpus - missing.cpus
            self._free.accelerators -= pool.needs.accelerators - missing.accelerators

    def _victims(self, turn: _Turn, claimant: PoolClaim) -> list[PoolClaim]:
        """Return the pools whose replicas may give way, once for each replica, in the order in which they do."""
        rules = self._rules
        starving = turn is _Turn.WAITING and not claimant.failing and self._now - self._since[claimant.id] >= rules.starvation_s
        found: list[tuple[int, float, str, PoolClaim]] = []
        for pool in self._pools:
            if pool is claimant:
                continue
            # In the order in which plan() stops them: the least busy first.
            held = sorted(pool.held, key=lambda one: (one.load, one.background, one.ready, one.age_s))
            spare = held[len(pool.held) - self._shares[pool.id] : len(held) - pool.min_replicas]
            for place, one in enumerate(spare, start=len(pool.held) - self._shares[pool.id]):
                rank = self._rank(turn, claimant, pool, one, left=len(held) - place, starving=starving)
                if rank is not None:
                    found.append((rank, -pool.idle_s if rank == 1 else -one.age_s, pool.id, pool))
        found.sort(key=lambda entry: entry[:3])
        return [pool for _, _, _, pool in found]

    def _rank(self, turn: _Turn, claimant: PoolClaim, pool: PoolClaim, one: HeldReplica, *, left: int, starving: bool) -> int | None:
        """Return the rank in which a replica gives way, None if it does not. `left` is how many its pool has, with this one."""
        rules, settled = self._rules, one.age_s >= self._rules.residency_s
        if left > pool.interactive:
            # Only background work needs it.
            gives_way = turn is not _Turn.BACKGROUND or (settled and not pool.due)
            return 0 if gives_way else None
        if not settled:
            return None
        if not pool.busy:
            return 1
        if turn is _Turn.WAITING and not claimant.failing and left > 1:
            return 2
        return 3 if starving and one.ready and one.age_s >= rules.quantum_s else None

    def _ever(self, claimant: PoolClaim) -> bool:
        """Return whether there would be room if every replica that may give way did so."""
        room = _Room(self._capacity.cpus, self._capacity.accelerators)
        for pool in self._pools:
            if pool is not claimant:
                room.add(pool.needs, -min(pool.min_replicas, len(pool.held)))
        return room.fits(claimant.needs)


def _lacks(found: float, missing: float, offered: float) -> bool:
    return offered > 0 and missing > found + EPSILON


def _words(amount: Resources) -> str:
    return f"{amount.cpus:g} CPUs and {amount.accelerators} accelerators"
