"""Which connections of the old policy the new one must look at again.

What a name's rule permitted is known by its learned addresses, and is revoked with them in one transaction. This is the
rest: addresses that a rule listed, and connections that nobody judged when they began. To look again is all that is
asked for: the rules then refuse what has no permission, packet by packet, and leave the rest alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from enforcer.learned import Destination, LearnedAddresses
from enforcer.policy import Address, Level, Mode, Network, Policy
from enforcer.ruleset import LEARNED_SET_SIZE

MAX_DESTINATIONS = 65_536
DNS_PORT = 53
CROWDED = LEARNED_SET_SIZE // 4  # of what each of the table's sets has room for


class Revoked:
    """Where every packet is judged, since permission ended while connections may have been open; as the table holds it.

    It matters to connections alone that began before. Where none is left it may be forgotten, which makes room: a
    table's set that is full would have the kernel refuse the next policy.
    """

    def __init__(self, held: Mapping[Destination, float] | None = None) -> None:
        """`held`: when each ends, in seconds of the clock that is used throughout, the earliest first."""
        self._ends_at = dict(held or {})

    def __contains__(self, destination: object) -> bool:
        return destination in self._ends_at

    def __iter__(self) -> Iterator[Destination]:
        return iter(self._ends_at)

    def __len__(self) -> int:
        return len(self._ends_at)

    @property
    def is_crowded(self) -> bool:
        """Whether it is time to ask which connections are open."""
        return len(self._ends_at) > CROWDED

    def revoke(self, destinations: Iterable[Destination], ends_at: float) -> None:
        """From now on, until then; no earlier call may have named a later time."""
        for destination in destinations:
            self._ends_at.pop(destination, None)
            self._ends_at[destination] = ends_at

    def pardon(self, destinations: Iterable[Destination]) -> None:
        """No more."""
        for destination in destinations:
            self._ends_at.pop(destination, None)

    def expire(self, now: float) -> None:
        """The table has forgotten these by itself."""
        while self._ends_at and next(iter(self._ends_at.values())) <= now:
            del self._ends_at[next(iter(self._ends_at))]

    def snapshot(self) -> dict[Destination, float]:
        """What `without_connection` is asked about."""
        return dict(self._ends_at)

    def without_connection(
        self, snapshot: Mapping[Destination, float], connected: Collection[Destination]
    ) -> list[Destination]:
        """Of what was revoked before `connected` was read, and not again since, that to which nothing is open."""
        return [
            destination
            for destination, ends_at in snapshot.items()
            if destination not in connected and self._ends_at.get(destination) == ends_at
        ]


def narrows(before: Policy, after: Policy) -> bool:
    """Whether `after` may refuse what `before` let through without a learned address."""
    return after.mode is Mode.ENFORCE and (_judges_more(before, after) or _networks(before) != _networks(after))


def to_judge_again(
    before: Policy, after: Policy, learned: LearnedAddresses, connected: Iterable[Destination]
) -> tuple[Destination, ...]:
    """Of the destinations that are `connected` those to which every packet is to be judged under `after`."""
    all_of_them = _judges_more(before, after)
    found = (
        destination
        for destination in connected
        if _judged(after, destination[1])
        and destination not in learned
        and not lists(after, destination)
        and (all_of_them or lists(before, destination))
    )
    return tuple(sorted(found, key=lambda place: (place[0].version, place)))[:MAX_DESTINATIONS]


def lists(policy: Policy, destination: Destination) -> str | None:
    """The rule that lists this address on this port, without any DNS answer."""
    return next(
        (
            name
            for name, networks, ports in _networks(policy)
            if destination[1] in ports and _held(destination[0], networks)
        ),
        None,
    )


def lists_address(policy: Policy, address: Address) -> str | None:
    """The same on whatever port."""
    return next((name for name, networks, _ in _networks(policy) if _held(address, networks)), None)


def _held(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks if network.version == address.version)


def _networks(policy: Policy) -> list[tuple[str, tuple[Network, ...], tuple[int, ...]]]:
    return [(rule.name, rule.addresses, rule.ports) for rule in policy.rules if rule.addresses]


def _judged(policy: Policy, port: int) -> bool:
    return port in policy.container_ports or (policy.scope.engines is Level.STRICT and port != DNS_PORT)


def _judges_more(before: Policy, after: Policy) -> bool:
    scopes = zip(*((p.scope.containers, p.scope.engines, p.scope.host) for p in (before, after)), strict=True)
    return (
        before.mode is Mode.OBSERVE
        or any(old is not Level.STRICT and new is Level.STRICT for old, new in scopes)
        or not set(after.container_ports) <= set(before.container_ports)
    )
