"""The long memory: which addresses are permitted, by which rule, until when.

The only stateful module of the core. An (address, port) may be held by several holders - a rule and one of its host
patterns each - and lives as long as any of them: expiry and revocation are per holder, so that a registry which leaves
the policy does not take another one's shared CDN address with it, and does not keep its own. Holders are patterns and
not names because the policy bounds patterns, while a wildcard's names are without end.

Times are seconds on the clock of the BPF programs (`now` is always passed in).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from enforcer.dns_answer import DnsAnswer
from enforcer.kernel_abi import LIFETIME_CEILING_SECONDS, LIFETIME_FLOOR_SECONDS, REFRESH_MARGIN_SECONDS, RangeClass
from enforcer.policy import Address, HostPattern, Rule

Destination = tuple[Address, int]  # (address, port)
Holder = tuple[str, HostPattern]  # (rule name, the pattern of it that covers the name)
Classify = Callable[[Address], RangeClass | None]  # None: a public address


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
    """What the kernel has to be told. A destination is in one of the two at most."""

    permit: tuple[LearnedAddress, ...] = ()  # new, or with another end than the kernel knows
    withdraw: tuple[Destination, ...] = ()  # no holder is left

    def __bool__(self) -> bool:
        return bool(self.permit or self.withdraw)


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
    """All learned permissions, at most `capacity` of them (destination times holder).

    When it is full the permission that would expire first makes room, and `evicted` counts it.
    """

    capacity: int = 262_144
    evicted: int = 0
    _holders: dict[Destination, dict[Holder, LearnedAddress]] = field(default_factory=dict)
    # One item for each permission: (when to look at it again, tie breaker, destination, holder).
    _deadlines: list[tuple[float, int, Destination, Holder]] = field(default_factory=list)
    _pushes: int = 0

    def __len__(self) -> int:
        return len(self._holders)

    def __contains__(self, destination: Destination) -> bool:
        return destination in self._holders

    def __iter__(self) -> Iterator[LearnedAddress]:
        for holders in self._holders.values():
            yield from holders.values()

    def holders(self, destination: Destination) -> tuple[LearnedAddress, ...]:
        """Every permission that a destination has."""
        return tuple(self._holders.get(destination, {}).values())

    def longest(self, destination: Destination) -> LearnedAddress:
        """The permission that ends last; KeyError if there is none."""
        return max(self._holders[destination].values(), key=lambda entry: entry.expires_at)

    def holds(self, entry: LearnedAddress) -> bool:
        """Whether to learn `entry` would change nothing: its holder has the destination, for about as long."""
        held = self._holders.get(entry.destination, {}).get((entry.rule, entry.pattern))
        return held is not None and entry.expires_at < held.expires_at + REFRESH_MARGIN_SECONDS

    def learn(self, entries: Iterable[LearnedAddress]) -> Changes:
        """Hold `entries`; the changes name only what is new or lives noticeably longer than before."""
        permit: dict[Destination, LearnedAddress] = {}
        withdraw: list[Destination] = []
        for entry in entries:
            destination = entry.destination
            holders = self._holders.get(destination, {})
            if not holders or entry.expires_at >= self.longest(destination).expires_at + REFRESH_MARGIN_SECONDS:
                permit[destination] = entry
            holder = entry.rule, entry.pattern
            held = holders.get(holder)
            if held is None:
                self._hold(entry)
            elif entry.expires_at >= held.expires_at + REFRESH_MARGIN_SECONDS:
                holders[holder] = entry
        while len(self._deadlines) > self.capacity:
            evicted = self._evict_earliest()
            if evicted is not None and permit.pop(evicted, None) is None:
                withdraw.append(evicted)
        return Changes(tuple(permit.values()), tuple(withdraw))

    def expire(self, now: float) -> tuple[Destination, ...]:
        """Forget what has expired; returns the destinations that have no holder left."""
        gone = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, destination, holder = heapq.heappop(self._deadlines)
            entry = self._holders[destination][holder]
            if entry.expires_at > now:
                self._push(entry)
            elif self._drop(destination, holder):
                gone.append(destination)
        return tuple(gone)

    def narrowed(self, keep: Callable[[LearnedAddress], bool]) -> tuple[LearnedAddresses, Changes]:
        """This memory with only the permissions that `keep` wants, and what the kernel must be told to agree.

        What others still hold stays, for as long as they do. This object stays as it is, for when the kernel refuses.
        """
        kept = LearnedAddresses(self.capacity, self.evicted)
        for entry in self:
            if keep(entry):
                kept._hold(entry)
        permit = []
        withdraw = []
        for destination in self._holders:
            if destination not in kept:
                withdraw.append(destination)
            elif (longest := kept.longest(destination)).expires_at < self.longest(destination).expires_at:
                permit.append(longest)
        return kept, Changes(tuple(permit), tuple(withdraw))

    def _hold(self, entry: LearnedAddress) -> None:
        """Hold a permission whose holder is new."""
        self._holders.setdefault(entry.destination, {})[entry.rule, entry.pattern] = entry
        self._push(entry)

    def _push(self, entry: LearnedAddress) -> None:
        self._pushes += 1
        item = entry.expires_at, self._pushes, entry.destination, (entry.rule, entry.pattern)
        heapq.heappush(self._deadlines, item)

    def _drop(self, destination: Destination, holder: Holder) -> bool:
        """Remove one permission; whether the destination has no holder left."""
        holders = self._holders[destination]
        del holders[holder]
        if not holders:
            del self._holders[destination]
        return not holders

    def _evict_earliest(self) -> Destination | None:
        """Remove the permission that ends first; its destination if that has no holder left."""
        while True:
            deadline, _, destination, holder = heapq.heappop(self._deadlines)
            entry = self._holders[destination][holder]
            if entry.expires_at > deadline:  # extended since it was pushed
                self._push(entry)
                continue
            self.evicted += 1
            return destination if self._drop(destination, holder) else None
