"""Which interfaces lead out of this host, which only into its own namespaces, and what is attached where.

Invariant: the exception has to be proved. An interface is internal only if its kind, its ports, its peer and the routes
through it all say that it leads to namespaces of this host; anything else, known or not yet known, is an uplink, and
what leaves through an uplink is judged. So a new VPN is guarded from its first packet.

WSL 2 with mirrored networking has one more exception, `loopback0`. Its routing rules send all TCP and UDP for 127.0.0.1
there, what is meant for this host's own servers too: Windows looks whose port it is and sends it back, or keeps it (the
comments in NetworkManager.cpp of microsoft/WSL; not measured here). So 127.0.0.0/8 through it is what `lo` is
elsewhere, and is let pass: refused, an engine would not reach its own daemon. Nothing else is: the device ends in
Windows, which may forward what a socket that is bound to the device sends anywhere. What it can reach is Windows'
programs, a proxy among them: they are as much outside of what is enforced here as curl.exe, which WSL runs for
everybody.
"""

from __future__ import annotations

import enum
import functools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, collapse_addresses, ip_network

from enforcer.policy import Address, Network

# rtnl_link_ops.kind of devices whose other end is this host: a peer in one of its namespaces, or nothing at all.
_INTERNAL_KINDS = frozenset({"veth", "netkit", "dummy"})
_PAIRS = frozenset({"veth", "netkit"})
# Behind a tap that is a bridge's port sits a virtual machine of this host. A tap on its own may be a VPN.
_INTERNAL_PORT_KINDS = _INTERNAL_KINDS | {"tun"}
# 0.0.0.0/1 and 128.0.0.0/1 are how VPNs spell a default route without replacing the one that is there.
_DEFAULT_ROUTE_BITS = 1
_HOST_LOOPBACK_NAME = "loopback0"  # given by WSL's service, c_loopbackDeviceName of microsoft/WSL
_LOOPBACK = IPv4Network("127.0.0.0/8")  # IPv4 only: WSL mirrors no other


@dataclass(frozen=True, slots=True)
class Interface:
    """One network device of the current network namespace."""

    index: int
    name: str
    kind: str | None  # rtnl kind: veth, bridge, tun, wireguard, vlan ...; None: hardware, loopback
    master: int | None = None  # index of the bridge, bond or VRF it is enslaved to
    peer: int | None = None  # index of the peer or lower device; None: it has none, or it is in another namespace
    up: bool = True
    loopback: bool = False
    addresses: tuple[IPv4Interface | IPv6Interface, ...] = ()
    link_address: bytes = b""  # of an Ethernet device: 6 bytes; empty: its packets begin with the network header


@dataclass(frozen=True, slots=True)
class Route:
    """One next hop of a unicast route, whatever its table."""

    destination: Network
    gateway: Address | None  # None: the destination is on the link
    interface: int


class Role(enum.Enum):
    """What an interface leads to."""

    LOOPBACK = "loopback"
    INTERNAL = "internal"  # only to namespaces and virtual machines of this host
    UPLINK = "uplink"
    HOST_LOOPBACK = "host loopback"  # WSL 2, mirrored: an uplink but for 127.0.0.0/8, which is as much here as there


@dataclass(frozen=True, slots=True)
class InterfaceRole:
    """The role of one interface and, in words for status and doctor, what decided it."""

    interface: Interface
    role: Role
    why: str


@dataclass(frozen=True)  # without slots: what is worked out is kept
class AttachmentPlan:
    """Where the programs belong, and what the ruleset treats as internal."""

    roles: tuple[InterfaceRole, ...]  # in the order of the interfaces
    learn: frozenset[int]  # indexes: queries are tracked and answers teach here
    gate: frozenset[int]  # indexes: packets from containers get their mark here; disjoint from `learn`
    own_ranges: tuple[Network, ...]  # collapsed; an answer that names one of these teaches nothing
    unlearnable: tuple[tuple[Address, str], ...]  # trusted resolvers whose answers cannot teach, and why

    @property
    def uplinks(self) -> tuple[Interface, ...]:
        """What leaves this host leaves through one of these."""
        return tuple(entry.interface for entry in self.roles if entry.role is Role.UPLINK)

    @functools.cached_property
    def own_addresses(self) -> frozenset[Address]:
        """Of this host, on whatever interface."""
        return frozenset(address.ip for entry in self.roles for address in entry.interface.addresses)

    def is_own(self, address: Address) -> bool:
        """Whether `address` is in one of `own_ranges`."""
        number = int(address)
        return any(number & mask == network for network, mask in self._own_numbers[address.version])

    @functools.cached_property
    def _own_numbers(self) -> Mapping[int, tuple[tuple[int, int], ...]]:
        """`own_ranges` as (address, mask) by version. A reload looks up all that is held."""
        return {
            version: tuple(
                (int(network.network_address), int(network.netmask))
                for network in self.own_ranges
                if network.version == version
            )
            for version in (4, 6)
        }

    @property
    def internal(self) -> frozenset[str]:
        """Names of the interfaces through which nothing leaves this host, loopback among them."""
        return self._names(Role.LOOPBACK, Role.INTERNAL)

    @property
    def host_loopback(self) -> frozenset[str]:
        """Names of the interfaces through which nothing for 127.0.0.0/8 leaves this machine."""
        return self._names(Role.HOST_LOOPBACK)

    def name_of(self, index: int) -> str:
        """Of an interface of the plan."""
        return next(entry.interface.name for entry in self.roles if entry.interface.index == index)

    def _names(self, *roles: Role) -> frozenset[str]:
        return frozenset(entry.interface.name for entry in self.roles if entry.role in roles)


def plan_attachments(
    interfaces: Collection[Interface],
    routes: Collection[Route],
    resolver_routes: Mapping[Address, int | None],
    *,
    wsl: bool = False,
) -> AttachmentPlan:
    """Decide the role of every interface and what is attached to it.

    `resolver_routes` is the index of the interface through which the kernel would reach each trusted resolver; None
    where it has no route. A resolver that is reached through an internal interface never teaches: whoever runs a
    container could then answer. `wsl`: this is WSL 2, whose loopback0 is what it is called.
    """
    by_index = {interface.index: interface for interface in interfaces}
    leads_out = _uplinks(by_index, routes)
    host_loopback = _host_loopback(by_index, routes) if wsl else None
    roles = tuple(
        InterfaceRole(interface, Role.HOST_LOOPBACK, "127.0.0.1 of Windows; anything else is judged")
        if interface.index == host_loopback
        else _role(interface, leads_out, by_index)
        for interface in interfaces
    )
    role_of = {entry.interface.index: entry for entry in roles}

    learn = {entry.interface.index for entry in roles if entry.role is Role.LOOPBACK}
    unlearnable = []
    for resolver, index in resolver_routes.items():
        reached_through = None if index is None else role_of.get(index)
        if reached_through is None:
            unlearnable.append((resolver, "no route to it"))
        elif reached_through.role is Role.INTERNAL:
            name = reached_through.interface.name
            unlearnable.append((resolver, f"reached through {name}, which is internal: {reached_through.why}"))
        else:
            learn.add(reached_through.interface.index)

    # A port's packets come by its master, but with br_netfilter, which docker loads, pass prerouting before.
    gate = {
        index
        for index, interface in by_index.items()
        if index not in learn and (not _is_port(interface, by_index) or role_of[index].role is Role.INTERNAL)
    }
    return AttachmentPlan(
        roles=roles,
        learn=frozenset(learn),
        gate=frozenset(gate),
        own_ranges=_own_ranges(role_of, routes),
        unlearnable=tuple(unlearnable),
    )


def _is_port(interface: Interface, by_index: Mapping[int, Interface]) -> bool:
    """Whether its packets reach the network layer as its master's: true of bridges, bonds and teams, not of a VRF."""
    master = by_index.get(interface.master) if interface.master is not None else None
    return master is not None and master.kind != "vrf"


def _uplinks(by_index: Mapping[int, Interface], routes: Iterable[Route]) -> dict[int, str]:
    """Index -> why, of every interface that is not proved internal."""
    leads_out: dict[int, str] = {}
    for index, interface in by_index.items():
        if not (interface.loopback or interface.kind == "bridge"):
            enslaved = _is_port(interface, by_index)
            if interface.kind not in (_INTERNAL_PORT_KINDS if enslaved else _INTERNAL_KINDS):
                leads_out[index] = f"{interface.kind} device" if interface.kind else "hardware"
    for route in routes:
        interface_of_route = by_index.get(route.interface)
        if interface_of_route is None or interface_of_route.loopback:
            continue
        if route.destination.prefixlen <= _DEFAULT_ROUTE_BITS:
            leads_out.setdefault(route.interface, f"route to {route.destination}")
        elif route.gateway is not None:
            leads_out.setdefault(route.interface, f"route to {route.destination} via {route.gateway}")

    if not leads_out:
        # A system in a container boots with one end of a pair as its way out, which looks like a way in until there is
        # a route. Where nothing leads out, that one may.
        for index, interface in by_index.items():
            if interface.kind in _PAIRS and interface.peer not in by_index and not _is_port(interface, by_index):
                leads_out[index] = f"{interface.kind}, and no way out is known"

    # A bridge leads where any of its ports leads, a port where its bridge leads, one end of a veth pair where the
    # other end leads when both are here. Each round adds at least one interface, so this ends.
    spread = True
    while spread:
        spread = False
        for index, interface in by_index.items():
            if interface.loopback:
                continue
            for neighbour, relation in ((interface.master, "port of"), (interface.peer, "peer of")):
                if neighbour is None or neighbour not in by_index:
                    continue
                if neighbour in leads_out and index not in leads_out:
                    leads_out[index] = f"{relation} {by_index[neighbour].name}, an uplink"
                    spread = True
                elif relation == "port of" and index in leads_out and neighbour not in leads_out:
                    leads_out[neighbour] = f"its port {interface.name} is an uplink ({leads_out[index]})"
                    spread = True
    return leads_out


def _host_loopback(by_index: Mapping[int, Interface], routes: Iterable[Route]) -> int | None:
    """Index of the interface that WSL routes 127.0.0.1 to; None with any other networking than mirrored.

    Name and route have to agree, and it must stand alone. Its kind does not matter: Hyper-V's driver and virtio have
    none, and whatever it is, only 127.0.0.0/8 profits.
    """
    for route in routes:
        interface = by_index.get(route.interface)
        if (
            interface is not None
            and interface.name == _HOST_LOOPBACK_NAME
            and interface.master is None
            and not interface.loopback
            and isinstance(route.destination, IPv4Network)
            and route.destination.subnet_of(_LOOPBACK)
        ):
            return interface.index
    return None


def _role(interface: Interface, leads_out: Mapping[int, str], by_index: Mapping[int, Interface]) -> InterfaceRole:
    if interface.loopback:
        return InterfaceRole(interface, Role.LOOPBACK, "loopback")
    if interface.index in leads_out:
        return InterfaceRole(interface, Role.UPLINK, leads_out[interface.index])
    if interface.kind == "bridge":
        ports = sorted(port.name for port in by_index.values() if port.master == interface.index)
        why = f"bridge of local ports only: {', '.join(ports)}" if ports else "bridge without ports"
        return InterfaceRole(interface, Role.INTERNAL, why)
    return InterfaceRole(interface, Role.INTERNAL, f"{interface.kind} without a gateway behind it")


def _own_ranges(role_of: Mapping[int, InterfaceRole], routes: Iterable[Route]) -> tuple[Network, ...]:
    """The host's own addresses on uplinks; on internal interfaces everything that is on the link."""
    v4: set[IPv4Network] = set()
    v6: set[IPv6Network] = set()
    on_link: defaultdict[int, list[Network]] = defaultdict(list)
    for route in routes:
        if route.gateway is None:
            on_link[route.interface].append(route.destination)
    for index, entry in role_of.items():
        ranges: list[Network] = [
            ip_network(address.ip) if entry.role in (Role.UPLINK, Role.HOST_LOOPBACK) else address.network
            for address in entry.interface.addresses
        ]
        if entry.role is Role.INTERNAL:
            ranges += on_link[index]
        for network in ranges:
            if isinstance(network, IPv4Network):
                v4.add(network)
            else:
                v6.add(network)
    return (*collapse_addresses(v4), *collapse_addresses(v6))
