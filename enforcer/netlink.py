"""Interfaces, addresses, routes and tc filters of one network namespace, over rtnetlink.

Everything is read whole and read again when something changed: there is no copy that could drift from the kernel. That
is affordable because a reading decodes only what is asked for: 200 veths take 4 ms here and 20 ms in pyroute2, whose
synchronous calls cannot run under asyncio either and whose decoder drops the id and the tag of a tc program.

No filter and no qdisc of another program is touched. Ours is known by its handle, is replaced in place without a gap,
and stays when this process ends.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface, ip_network
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from enforcer.policy import Address
from enforcer.topology import Interface, Route

# include/uapi/linux/netlink.h
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_REQUEST, _ACK, _ECHO, _DUMP_INTERRUPTED, _ACK_TLVS = 0x01, 0x04, 0x08, 0x10, 0x200
_DUMP = 0x300
_REPLACE, _EXCLUSIVE, _CREATE = 0x100, 0x200, 0x400
_ERROR, _DONE = 2, 3
_STATUS = struct.Struct("=i")
_EXTENDED_MESSAGE = 1
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ATTRIBUTE_TYPE_MASK = 0x3FFF
_U32 = struct.Struct("=I")
# include/uapi/linux/rtnetlink.h
_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWRULE, _DELRULE = 32, 33
_NEWQDISC, _DELQDISC, _GETQDISC = 36, 37, 38
_NEWTFILTER, _DELTFILTER, _GETTFILTER = 44, 45, 46
_GROUP_LINK, _GROUP_TC, _GROUP_RULE4, _GROUP_RULE6 = 1, 4, 8, 19
_GROUP_ADDRESS4, _GROUP_ROUTE4, _GROUP_ADDRESS6, _GROUP_ROUTE6 = 5, 7, 9, 11
_GROUPS = (
    *(_GROUP_LINK, _GROUP_TC, _GROUP_RULE4, _GROUP_RULE6),
    *(_GROUP_ADDRESS4, _GROUP_ROUTE4, _GROUP_ADDRESS6, _GROUP_ROUTE6),
)
_LINK = struct.Struct("=BxHiII")  # family, ARPHRD, index, flags, change
_LINK_UP, _LINK_LOOPBACK = 0x1, 0x8
_LINK_NAME, _LINK_LOWER, _LINK_MASTER, _LINK_INFO, _LINK_EXT_MASK, _LINK_NETNSID = 3, 5, 10, 18, 29, 37
_LINK_INFO_KIND = 1
_SKIP_STATISTICS = 1 << 3
_ADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ADDR_ADDRESS, _ADDR_LOCAL = 1, 2
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, destination bits, source bits, tos, table, protocol, scope, type, flags
_ROUTE_DESTINATION, _ROUTE_INTERFACE, _ROUTE_GATEWAY, _ROUTE_MULTIPATH, _ROUTE_VIA = 1, 4, 5, 9, 18
_ROUTE_UNICAST, _ROUTE_LOCAL = 1, 2
_ROUTE_CLONED = 0x200  # an exception learned from a redirect or from path MTU discovery
_NEXT_HOP = struct.Struct("=HBBi")  # length, flags, hops, interface
_VIA_FAMILY_BYTES = 2
_TC = struct.Struct("=BxxxiIIHH")  # family, index, handle, parent, protocol (network order), priority
_TC_KIND, _TC_OPTIONS = 1, 2
_BPF_FD, _BPF_NAME, _BPF_FLAGS, _BPF_TAG, _BPF_ID = 6, 7, 8, 10, 11
_DIRECT_ACTION = 1
_CLSACT_HANDLE, _CLSACT_PARENT = 0xFFFF0000, 0xFFFFFFF1
_EVERY_PROTOCOL = socket.htons(0x0003)  # ETH_P_ALL

# Nobody's first choice: the kernel counts up from 1. The second says, beyond the end of any process of ours, that the
# clsact below the filter is ours as well.
_OUR_HANDLE: Final = 0x52454E46
_OUR_HANDLE_ON_OUR_CLSACT: Final = 0x52454E47
_FIRST_PRIORITY = 1  # a filter behind one that says "ok" never runs, and that must not be the learner
_TIMEOUT_SECONDS = 5
_DUMP_ATTEMPTS = 8
_RECEIVE_BYTES = 65_536
_COALESCE_SECONDS = 0.005
_MESSAGES_A_TURN = 256


class NetlinkError(OSError):
    """The kernel refused a request; errno is the kernel's and strerror carries its explanation, if it gave one."""


class Direction(enum.Enum):
    """Where tc runs a program; the value is the parent of its filters."""

    INGRESS = 0xFFFFFFF2
    EGRESS = 0xFFFFFFF3


@dataclass(frozen=True, slots=True)
class AttachedProgram:
    """A program of ours on an interface."""

    name: str
    program_id: int
    tag: bytes  # SHA-1 of the instructions, the first 8 bytes; another build has another


@dataclass(frozen=True, slots=True)
class _Filter:
    """Any program's tc filter, or the head of a chain of them (handle 0)."""

    handle: int
    protocol: int
    priority: int
    kind: str
    program: AttachedProgram | None

    @property
    def ours(self) -> bool:
        return self.handle in (_OUR_HANDLE, _OUR_HANDLE_ON_OUR_CLSACT) and self.program is not None


class Netlink:
    """rtnetlink in the network namespace in which it was entered; not for use by several threads.

    Requests block: the kernel answers them before `send` returns. Anything it refuses raises NetlinkError.
    """

    def __enter__(self) -> Self:
        self.vanished = 0  # interfaces that were gone before they could be attached to
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.settimeout(_TIMEOUT_SECONDS)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._sequence = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    # --- readings ----------------------------------------------------------------------------------------------------
    def interfaces(self) -> tuple[Interface, ...]:
        """Every interface, by index, with its addresses."""
        request = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _attribute(_LINK_EXT_MASK, _U32.pack(_SKIP_STATISTICS))
        links = [body for kind, body in self._dump(_GETLINK, request) if kind == _NEWLINK]
        addresses: dict[int, list[IPv4Interface | IPv6Interface]] = {}
        for kind, body in self._dump(_GETADDR, _ADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
            family, prefix_bits, _, _, index = _ADDR.unpack_from(body)
            if kind == _NEWADDR and family in (socket.AF_INET, socket.AF_INET6):
                attributes = dict(_attributes(body[_ADDR.size :]))
                remote = attributes[_ADDR_ADDRESS]
                local = attributes.get(_ADDR_LOCAL, remote)
                # The prefix of a point-to-point address is the peer's, and comes as a route of its own.
                bits = prefix_bits if local == remote else len(local) * 8
                addresses.setdefault(index, []).append(ip_interface((local, bits)))
        return tuple(sorted((_interface(body, addresses) for body in links), key=lambda link: link.index))

    def routes(self) -> tuple[Route, ...]:
        """Every next hop of every unicast route, of all tables."""
        routes: list[Route] = []
        for kind, body in self._dump(_GETROUTE, _ROUTE.pack(socket.AF_UNSPEC, *(0,) * 8)):
            family, bits, _, _, _, _, _, route_type, flags = _ROUTE.unpack_from(body)
            if kind == _NEWROUTE and route_type == _ROUTE_UNICAST and not flags & _ROUTE_CLONED:
                routes += _next_hops(family, bits, dict(_attributes(body[_ROUTE.size :])))
        return tuple(routes)

    def route_to(self, address: Address) -> int | None:
        """Index of the interface through which this host would reach `address`; None if it would not."""
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        request = _ROUTE.pack(family, address.max_prefixlen, *(0,) * 7)
        request += _attribute(_ROUTE_DESTINATION, address.packed)
        if isinstance(address, IPv6Address) and address.scope_id:
            try:
                request += _attribute(_ROUTE_INTERFACE, _U32.pack(socket.if_nametoindex(address.scope_id)))
            except OSError:
                return None
        try:
            replies = self._request(_GETROUTE, 0, request)
        except NetlinkError as error:
            # No route, or one of type unreachable, prohibit, blackhole; or the scope's interface went meanwhile.
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ENODEV):
                return None
            raise
        for _, body in replies:
            route_type = _ROUTE.unpack_from(body)[7]
            interface = dict(_attributes(body[_ROUTE.size :])).get(_ROUTE_INTERFACE)
            if route_type in (_ROUTE_UNICAST, _ROUTE_LOCAL) and interface is not None:
                return int(_U32.unpack(interface)[0])
        return None

    # --- tc ----------------------------------------------------------------------------------------------------------
    def attach(self, index: int, direction: Direction, program_fd: int, name: str) -> bool:
        """Make the sched_cls program behind `program_fd` ours on this interface; False if the interface is gone.

        Does nothing if it is there already; another program of ours is replaced in one step. It runs with direct
        action, and should end in TC_ACT_UNSPEC so that other programs' filters have their turn.
        """
        filters = self._filters(index, direction)
        ours = next((entry for entry in filters if entry.ours), None)
        if ours and ours.program and (ours.program.name, ours.program.program_id) == (name, _program_id(program_fd)):
            return True
        options = _attribute(_BPF_FD, _U32.pack(program_fd))
        options += _attribute(_BPF_NAME, name.encode() + b"\0")
        options += _attribute(_BPF_FLAGS, _U32.pack(_DIRECT_ACTION))
        priority = ours.priority if ours else _free_priority(filters)
        try:
            made = self._ensure_clsact(index, direction)
            handle = ours.handle if ours else _OUR_HANDLE_ON_OUR_CLSACT if made else _OUR_HANDLE
            request = _filter_request(index, direction, priority, handle) + _attribute(_TC_OPTIONS, options)
            self._request(_NEWTFILTER, _CREATE | _REPLACE, request)
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise
            self.vanished += 1
            return False
        return True

    def attached(self, index: int) -> dict[Direction, AttachedProgram]:
        """What of ours is on this interface; empty also when the interface is gone."""
        return {
            direction: entry.program
            for direction in Direction
            for entry in self._filters(index, direction)
            if entry.ours and entry.program
        }

    def detach(self, index: int) -> None:
        """Remove our filters from this interface, and its clsact if we made it and nobody else uses it."""
        ours = [
            (direction, entry) for direction in Direction for entry in self._filters(index, direction) if entry.ours
        ]
        for direction, entry in ours:
            self._remove(_DELTFILTER, _filter_request(index, direction, entry.priority, entry.handle))
        made = any(entry.handle == _OUR_HANDLE_ON_OUR_CLSACT for _, entry in ours)
        if made and not any(self._filters(index, direction) for direction in Direction):
            self._remove(_DELQDISC, _clsact_request(index))

    def _ensure_clsact(self, index: int, direction: Direction) -> bool:
        """Whether it had to be made."""
        request = _clsact_request(index)
        try:
            self._request(_NEWQDISC, _CREATE | _EXCLUSIVE, request + _attribute(_TC_KIND, b"clsact\0"))
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
            if direction is Direction.INGRESS:
                return False  # the older `ingress` qdisc, in the same place, does as well
            for _, body in self._request(_GETQDISC, _ECHO, request):  # without it only listeners are told
                kind = dict(_attributes(body[_TC.size :]))[_TC_KIND]
                if kind != b"clsact\0":
                    # It would take the filter, and run it at ingress.
                    message = f"another program's {_text(kind)} qdisc leaves no place for egress programs"
                    raise NetlinkError(errno.EBUSY, message) from error
            return False
        return True

    def _filters(self, index: int, direction: Direction) -> list[_Filter]:
        """Everybody's; empty without the interface or the qdisc."""
        request = _TC.pack(socket.AF_UNSPEC, index, 0, direction.value, 0, 0)
        filters = []
        for kind, body in self._dump(_GETTFILTER, request):
            if kind == _NEWTFILTER:
                _, _, handle, _, protocol, priority = _TC.unpack_from(body)
                attributes = dict(_attributes(body[_TC.size :]))
                classifier = _text(attributes[_TC_KIND])
                options = dict(_attributes(attributes.get(_TC_OPTIONS, b""))) if classifier == "bpf" else {}
                program = None
                if _BPF_ID in options:
                    name = _text(options.get(_BPF_NAME, b""))
                    program = AttachedProgram(name, _U32.unpack(options[_BPF_ID])[0], options[_BPF_TAG])
                filters.append(_Filter(handle, protocol, priority, classifier, program))
        return filters

    def _remove(self, kind: int, request: bytes) -> None:
        """Whoever was there first, what counts is that it is gone."""
        try:
            self._request(kind, 0, request)
        except NetlinkError as error:
            if error.errno not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
                raise

    # --- events ------------------------------------------------------------------------------------------------------
    def changes(self) -> Changes:
        """Follow what happens to links, addresses, routes and tc; needs a running event loop. Close it after use."""
        return Changes(own_port=self._socket.getsockname()[0])

    # --- messages ----------------------------------------------------------------------------------------------------
    def _dump(self, kind: int, request: bytes) -> list[tuple[int, bytes]]:
        """A consistent reading, or the last of several: whatever interrupted it is an event of its own."""
        for _ in range(_DUMP_ATTEMPTS):
            replies, interrupted = self._exchange(kind, _DUMP, request)
            if not interrupted:
                break
        return replies

    def _request(self, kind: int, flags: int, request: bytes) -> list[tuple[int, bytes]]:
        return self._exchange(kind, flags | _ACK, request)[0]

    def _exchange(self, kind: int, flags: int, request: bytes) -> tuple[list[tuple[int, bytes]], bool]:
        """(replies as (type, body), whether a change interrupted them)."""
        self._sequence += 1
        length = _HEADER.size + len(request)
        self._socket.send(_HEADER.pack(length, kind, flags | _REQUEST, self._sequence, 0) + request)
        replies: list[tuple[int, bytes]] = []
        interrupted = False
        while True:
            received = self._socket.recv(_RECEIVE_BYTES)
            at = 0
            while at + _HEADER.size <= len(received):
                length, reply, reply_flags, sequence, _ = _HEADER.unpack_from(received, at)
                body = received[at + _HEADER.size : at + length]
                at += (length + 3) & ~3
                if sequence != self._sequence:
                    continue  # of a request that timed out
                interrupted |= bool(reply_flags & _DUMP_INTERRUPTED)
                if reply in (_ERROR, _DONE):
                    _raise_refusal(reply, reply_flags, body)
                    return replies, interrupted
                replies.append((reply, body))


class Change(enum.Flag):
    """What may have changed since the last time."""

    LINK = enum.auto()
    ADDRESS = enum.auto()
    ROUTE = enum.auto()  # routing rules too
    TRAFFIC_CONTROL = enum.auto()  # qdiscs and filters, unless by the Netlink that is asking
    LOST = enum.auto()  # more than the kernel keeps for us has happened; comes with all the others
    EVERYTHING = LINK | ADDRESS | ROUTE | TRAFFIC_CONTROL


_CHANGE_OF = {
    **dict.fromkeys((_NEWLINK, _DELLINK), Change.LINK),
    **dict.fromkeys((_NEWADDR, _DELADDR), Change.ADDRESS),
    **dict.fromkeys((_NEWROUTE, _DELROUTE, _NEWRULE, _DELRULE), Change.ROUTE),
    **dict.fromkeys((_NEWQDISC, _DELQDISC, _NEWTFILTER, _DELTFILTER), Change.TRAFFIC_CONTROL),
}


class Changes:
    """An endless asynchronous iterator of what changed.

    The first item, EVERYTHING, comes at once: the subscription is older than the listing that it asks for, so nothing
    falls between the two. An event after silence comes at once, what follows it in one item 5 ms later. A consumer
    that is slower than the events spends no more than half of its time here. Nothing is queued but one set of flags.
    """

    def __init__(self, own_port: int) -> None:
        self._own_port = own_port
        self._pending = Change.EVERYTHING
        self._wake = asyncio.Event()
        self._wake.set()
        self._delivered_at: float | None = None
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        for group in _GROUPS:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        self._loop.add_reader(self._socket, self._collect)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        if self._delivered_at is not None:
            busy_seconds = self._loop.time() - self._delivered_at
            await asyncio.sleep(max(_COALESCE_SECONDS, busy_seconds))
            self._delivered_at = None
        await self._wake.wait()
        self._wake.clear()
        changed, self._pending = self._pending, Change(0)
        self._delivered_at = self._loop.time()
        return changed

    def _collect(self) -> None:
        for _ in range(_MESSAGES_A_TURN):
            try:
                # One message a datagram; the rest of it is dropped unread, since a new reading tells more.
                header = self._socket.recv(_HEADER.size)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._pending |= Change.LOST | Change.EVERYTHING
            else:
                _, kind, _, _, port = _HEADER.unpack(header)
                if kind not in _CHANGE_OF or port == self._own_port:
                    continue  # classes and chains of tc; our own attaching
                self._pending |= _CHANGE_OF[kind]
            self._wake.set()


# --- decoding --------------------------------------------------------------------------------------------------------
def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & _ATTRIBUTE_TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += max(length + 3 & ~3, _ATTRIBUTE.size)


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="surrogateescape")  # a name of an interface is any bytes


def _raise_refusal(kind: int, flags: int, body: bytes) -> None:
    """Raise what DONE or ERROR says, unless it says yes."""
    code = -_STATUS.unpack_from(body)[0]
    if code:
        # ERROR repeats the header of the request (NETLINK_CAP_ACK: no more than that).
        repeated_bytes = _HEADER.size if kind == _ERROR else 0
        said = dict(_attributes(body[_STATUS.size + repeated_bytes :])) if flags & _ACK_TLVS else {}
        explanation = _text(said.get(_EXTENDED_MESSAGE, b""))
        raise NetlinkError(code, f"{os.strerror(code)} ({explanation})" if explanation else os.strerror(code))


def _interface(body: bytes, addresses: Mapping[int, Iterable[IPv4Interface | IPv6Interface]]) -> Interface:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    attributes = dict(_attributes(body[_LINK.size :]))
    kind = dict(_attributes(attributes.get(_LINK_INFO, b""))).get(_LINK_INFO_KIND)
    lower = attributes.get(_LINK_LOWER)
    master = attributes.get(_LINK_MASTER)
    return Interface(
        index=index,
        name=_text(attributes[_LINK_NAME]),
        kind=_text(kind) if kind is not None else None,
        master=_U32.unpack(master)[0] if master is not None else None,
        # With a namespace id the number counts in that namespace; 0 and its own index mean that there is none.
        peer=_U32.unpack(lower)[0] if lower is not None and _LINK_NETNSID not in attributes else None,
        up=bool(flags & _LINK_UP),
        loopback=bool(flags & _LINK_LOOPBACK),
        addresses=tuple(addresses.get(index, ())),
    )


def _next_hops(family: int, prefix_bits: int, attributes: dict[int, bytes]) -> Iterator[Route]:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return
    destination_bytes = attributes.get(_ROUTE_DESTINATION, b"\0" * (4 if family == socket.AF_INET else 16))
    destination = ip_network((destination_bytes, prefix_bits))
    if _ROUTE_INTERFACE in attributes:
        yield Route(destination, _gateway(attributes), _U32.unpack(attributes[_ROUTE_INTERFACE])[0])
    hops = attributes.get(_ROUTE_MULTIPATH, b"")
    while len(hops) >= _NEXT_HOP.size:
        length, _, _, interface = _NEXT_HOP.unpack_from(hops)
        yield Route(destination, _gateway(dict(_attributes(hops[_NEXT_HOP.size : length]))), interface)
        hops = hops[max(length + 3 & ~3, _NEXT_HOP.size) :]


def _gateway(attributes: dict[int, bytes]) -> Address | None:
    if _ROUTE_GATEWAY in attributes:
        return ip_address(attributes[_ROUTE_GATEWAY])
    if _ROUTE_VIA in attributes:  # IPv4 through an IPv6 neighbour, RFC 5549
        return ip_address(attributes[_ROUTE_VIA][_VIA_FAMILY_BYTES:])
    return None


def _clsact_request(index: int) -> bytes:
    return _TC.pack(socket.AF_UNSPEC, index, _CLSACT_HANDLE, _CLSACT_PARENT, 0, 0)


def _filter_request(index: int, direction: Direction, priority: int, handle: int) -> bytes:
    head = _TC.pack(socket.AF_UNSPEC, index, handle, direction.value, _EVERY_PROTOCOL, priority)
    return head + _attribute(_TC_KIND, b"bpf\0")


def _free_priority(filters: Iterable[_Filter]) -> int:
    """The first that no other kind of classifier holds; programs share one, each under its own handle."""
    held = {entry.priority for entry in filters if (entry.kind, entry.protocol) != ("bpf", _EVERY_PROTOCOL)}
    return next(priority for priority in range(_FIRST_PRIORITY, 1 << 16) if priority not in held)


def _program_id(program_fd: int) -> int:
    """The kernel's id of a loaded program."""
    for line in Path(f"/proc/self/fdinfo/{program_fd}").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "prog_id":
            return int(value)
    raise ValueError(f"file descriptor {program_fd} is not a BPF program")
