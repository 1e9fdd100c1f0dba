"""The long memory: which addresses are permitted, by which rule, until when.

The only stateful module of the core. An (address, port) may be held by several holders - a rule and one of its host
patterns each - and lives as long as any of them: expiry and revocation are per holder, so that a registry which leaves
the policy does not take another one's shared CDN address with it, and does not keep its own. Holders are patterns and
not names because the policy bounds patterns, while a wildcard's names are without end.

Whoever owns a name below a wildcard answers with as many addresses as he likes. So a holder has a bound of its own and
makes room among its own: such a flood costs no other registry its permissions. Of a holder's addresses goes what has
neither been answered nor connected to for the longest. Room is made without revoking: connections that are open go on.

Times are seconds on the clock of the BPF programs (`now` is always passed in).
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from enforcer.dns_answer import DnsAnswer
from enforcer.kernel_abi import (
    LIFETIME_CEILING_SECONDS,
    LIFETIME_FLOOR_SECONDS,
    MAX_LEARNED,
    REFRESH_MARGIN_SECONDS,
    RangeClass,
)
from enforcer.policy import Address, HostPattern, Rule

Destination = tuple[Address, int]  # (address, port)
Holder = tuple[str, HostPattern]  # (rule name, the pattern of it that covers the name)
Classify = Callable[[Address], RangeClass | None]  # None: a public address
LastUsed = Callable[[Destination], float]  # when a connection went there last; -inf: never, or it is not known

IN_USE_SECONDS = 60.0  # since the last connection, or packet of a forwarded one, for which an address counts as in use
_LOOKS = 16  # at addresses that are in use, before the one of them that waits longest has to go
_ROOM = 64  # a full memory makes room for this fraction of it at once: to find the largest holder looks at each


@dataclass(frozen=True, slots=True)
class LearnedAddress:
    """One permission: `address`:`port` because `name` resolved to it and `rule` allows that name by `pattern`."""

    address: Address
    port: int
    name: str  # the name that was asked for; after a restart the pattern's text
    rule: str
    pattern: HostPattern
    expires_at: float

    @property
    def destination(self) -> Destination:
        """What the kernel knows it by."""
        return self.address, self.port


@dataclass(frozen=True, slots=True)
class Changes:
    """What the kernel has to be told. A destination is in one of the three at most."""

    permit: tuple[LearnedAddress, ...] = ()  # new, or with another end than the kernel knows
    withdraw: tuple[Destination, ...] = ()  # no holder is left, and what is connected there is to be judged again
    forget: tuple[Destination, ...] = ()  # no holder is left, for want of room: what is connected stays so

    def __bool__(self) -> bool:
        return bool(self.permit or self.withdraw or self.forget)


def combined(changes: Iterable[Changes]) -> Changes:
    """What several changes, one after the other, come to. To withdraw stays what it is when forgetting follows."""
    permit: dict[Destination, LearnedAddress] = {}
    withdraw: dict[Destination, None] = {}
    forget: dict[Destination, None] = {}
    for change in changes:
        for entry in change.permit:
            withdraw.pop(entry.destination, None)
            forget.pop(entry.destination, None)
            permit[entry.destination] = entry
        for destination in change.withdraw:
            permit.pop(destination, None)
            forget.pop(destination, None)
            withdraw[destination] = None
        for destination in change.forget:
            permit.pop(destination, None)
            if destination not in withdraw:
                forget[destination] = None
    return Changes(tuple(permit.values()), tuple(withdraw), tuple(forget))


def _expiry(entry: LearnedAddress) -> float:
    return entry.expires_at


def _never(_: Destination) -> float:
    return -math.inf


def lifetime_seconds(ttl_seconds: int) -> int:
    """How long an answer's address stays permitted: clients cache answers longer than their TTL says."""
    return min(max(ttl_seconds, LIFETIME_FLOOR_SECONDS), LIFETIME_CEILING_SECONDS)


def may_teach(range_class: RangeClass | None, rule: Rule) -> bool:
    """Whether an answer with an address of this class (None: public) permits it to `rule`."""
    return range_class is None or (range_class is RangeClass.PRIVATE and rule.private_addresses)


def permitted(
    answer: DnsAnswer, matches: Iterable[tuple[Rule, HostPattern]], classify: Classify, now: float
) -> Iterator[LearnedAddress]:
    """Every permission that `answer` gives under `matches`, the rules and patterns that cover its question."""
    for rule, pattern in matches:
        for record in answer.addresses:
            if not may_teach(classify(record.address), rule):
                continue
            expires_at = now + lifetime_seconds(record.ttl_seconds)
            for port in rule.ports:
                yield LearnedAddress(record.address, port, answer.question, rule.name, pattern, expires_at)


@dataclass(slots=True)
class LearnedAddresses:
    """All learned permissions: at most `capacity` of them (destination times holder), `per_holder` of one holder.

    A holder with more makes room among its own, a full memory among those of the largest holder; `evicted` counts.
    """

    capacity: int = MAX_LEARNED
    per_holder: int = 16_384
    evicted: int = 0
    last_used: LastUsed = _never
    _holders: dict[Destination, dict[Holder, LearnedAddress]] = field(default_factory=dict)
    # Of each holder, what has waited longest for an answer or a connection first.
    _waiting: dict[Holder, OrderedDict[Destination, None]] = field(default_factory=dict)
    # (when to look at it, tie breaker, destination, holder): one for each permission, and some that are gone.
    _deadlines: list[tuple[float, int, Destination, Holder]] = field(default_factory=list)
    _pushes: int = 0
    _permissions: int = 0

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def permissions(self) -> int:
        """How many are held: destinations times their holders."""
        return self._permissions

    def __contains__(self, destination: Destination) -> bool:
        return destination in self._holders

    def __iter__(self) -> Iterator[LearnedAddress]:
        for holders in self._holders.values():
            yield from holders.values()

    def longest_of_each(self) -> Iterator[LearnedAddress]:
        """For each destination the permission that ends last."""
        for holders in self._holders.values():
            yield max(holders.values(), key=_expiry) if len(holders) > 1 else next(iter(holders.values()))

    def holders(self, destination: Destination) -> tuple[LearnedAddress, ...]:
        """Every permission that a destination has."""
        return tuple(self._holders.get(destination, {}).values())

    def longest(self, destination: Destination) -> LearnedAddress:
        """The permission that ends last; KeyError if there is none."""
        return max(self._holders[destination].values(), key=_expiry)

    def holds(self, entry: LearnedAddress) -> bool:
        """Whether to learn `entry` would change nothing: its holder has the destination, for about as long."""
        held = self._holders.get(entry.destination, {}).get((entry.rule, entry.pattern))
        return held is not None and entry.expires_at < held.expires_at + REFRESH_MARGIN_SECONDS

    def learn(self, entries: Iterable[LearnedAddress], now: float = math.inf) -> Changes:
        """Hold `entries`; the changes name only what is new, or lives noticeably longer than before or shorter.

        `now` tells what is in use, where room has to be made; infinity: nothing is.
        """
        permit: dict[Destination, LearnedAddress] = {}
        forget: dict[Destination, None] = {}
        for entry in entries:
            destination = entry.destination
            holders = self._holders.get(destination, {})
            if not holders or entry.expires_at >= self.longest(destination).expires_at + REFRESH_MARGIN_SECONDS:
                permit[destination] = entry
            holder = entry.rule, entry.pattern
            held = holders.get(holder)
            if held is None:
                self._hold(entry)
            else:
                self._waiting[holder].move_to_end(destination)
                if entry.expires_at >= held.expires_at + REFRESH_MARGIN_SECONDS:
                    holders[holder] = entry
            forget.pop(destination, None)
            for evicted in self._make_room(holder, now):
                if evicted in self._holders:
                    permit[evicted] = self.longest(evicted)
                else:
                    permit.pop(evicted, None)
                    forget[evicted] = None  # the kernel may know it all the same: BPF was first
        return Changes(tuple(permit.values()), (), tuple(forget))

    def expire(self, now: float) -> tuple[Destination, ...]:
        """Forget what has expired; returns the destinations that have no holder left."""
        gone = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, destination, holder = heapq.heappop(self._deadlines)
            entry = self._holders.get(destination, {}).get(holder)
            if entry is None:
                continue  # has made room
            if entry.expires_at > now:
                self._push(entry, destination, holder)
            elif self._drop(destination, holder):
                gone.append(destination)
        return tuple(gone)

    def narrowed(
        self, keep: Callable[[LearnedAddress], bool], capacity: int | None = None, now: float = math.inf
    ) -> tuple[LearnedAddresses, Changes]:
        """This memory with only the permissions that `keep` wants, and what the kernel must be told to agree.

        What others still hold stays, for as long as they do, and as far as there is room: the least recently used goes
        first. This object stays as it is, for when the kernel refuses. `capacity` None: as before.
        """
        kept = LearnedAddresses(capacity or self.capacity, self.per_holder, self.evicted, self.last_used)
        permit: dict[Destination, LearnedAddress] = {}
        withdraw: list[Destination] = []
        left: dict[Holder, list[Destination]] = {}
        # Addresses are slow to hash: of 262,144 each look-up takes a tenth of a second.
        for destination, holders in self._holders.items():
            held = {holder: entry for holder, entry in holders.items() if keep(entry)}
            for holder in holders.keys() - held.keys():
                left.setdefault(holder, []).append(destination)
            if not held:
                withdraw.append(destination)
                continue
            kept._holders[destination] = held
            kept._permissions += len(held)
            if len(held) < len(holders):
                longest = max(held.values(), key=_expiry)
                if longest.expires_at < max(holders.values(), key=_expiry).expires_at:
                    permit[destination] = longest
        kept._renew_deadlines()
        for holder, waiting in self._waiting.items():
            remaining = waiting.copy()
            for destination in left.get(holder, ()):
                del remaining[destination]
            if remaining:
                kept._waiting[holder] = remaining
        forget: dict[Destination, None] = {}
        for evicted in kept._make_room_for_all(now):
            permit.pop(evicted, None)
            if evicted not in kept:
                forget[evicted] = None
            elif (longest := kept.longest(evicted)).expires_at < self.longest(evicted).expires_at:
                permit[evicted] = longest
        return kept, Changes(tuple(permit.values()), tuple(withdraw), tuple(forget))

    def _hold(self, entry: LearnedAddress) -> None:
        """Hold a permission whose holder is new."""
        destination, holder = entry.destination, (entry.rule, entry.pattern)
        self._holders.setdefault(destination, {})[holder] = entry
        self._waiting.setdefault(holder, OrderedDict())[destination] = None
        self._permissions += 1
        self._push(entry, destination, holder)

    def _push(self, entry: LearnedAddress, destination: Destination, holder: Holder) -> None:
        """Look at it when it expires. The tuples are the caller's: of 262,144 each copy would take 15 MB."""
        self._pushes += 1
        heapq.heappush(self._deadlines, (entry.expires_at, self._pushes, destination, holder))
        if len(self._deadlines) > 2 * self._permissions + _ROOM:
            # Those that made room, which else would wait for their deadlines: the flood would grow here.
            self._renew_deadlines()

    def _renew_deadlines(self) -> None:
        """One for each permission that is held, and none for what is gone."""
        self._deadlines = [
            (held.expires_at, number, place, holder)
            for number, (place, holder, held) in enumerate(
                ((place, each, held) for place, holders in self._holders.items() for each, held in holders.items()),
                self._pushes + 1,
            )
        ]
        heapq.heapify(self._deadlines)
        self._pushes += self._permissions

    def _drop(self, destination: Destination, holder: Holder) -> bool:
        """Remove one permission; whether the destination has no holder left."""
        holders = self._holders[destination]
        del holders[holder]
        waiting = self._waiting[holder]
        del waiting[destination]
        if not waiting:
            del self._waiting[holder]
        self._permissions -= 1
        if not holders:
            del self._holders[destination]
        return not holders

    def _make_room(self, holder: Holder, now: float) -> Iterator[Destination]:
        """Evict what is over the bounds now that `holder` has one more; what was evicted."""
        while len(self._waiting[holder]) > self.per_holder:
            yield self._evict(holder, now)
        yield from self._make_room_for_all(now)

    def _make_room_for_all(self, now: float) -> Iterator[Destination]:
        """Evict what is over the bound of all holders together."""
        if self._permissions > self.capacity:
            room = self.capacity - self.capacity // _ROOM
            for largest in sorted(self._waiting, key=lambda each: len(self._waiting[each]), reverse=True):
                while self._permissions > room and largest in self._waiting:
                    yield self._evict(largest, now)

    def _evict(self, holder: Holder, now: float) -> Destination:
        """Remove the permission of `holder` that has waited longest for an answer or a connection."""
        waiting = self._waiting[holder]
        victim = next(iter(waiting))
        unused_since = math.inf
        for _ in range(min(_LOOKS, len(waiting) - 1)):  # not at the newest
            destination = next(iter(waiting))
            used_at = self.last_used(destination)
            if used_at < unused_since:
                victim, unused_since = destination, used_at
            if used_at <= now - IN_USE_SECONDS:
                break
            waiting.move_to_end(destination)
        self.evicted += 1
        self._drop(victim, holder)
        return victim
