"""Interfaces, addresses, routes and tc filters of one network namespace, over rtnetlink.

pyroute2 builds and decodes the messages. Its IPRoute runs an event loop for each call and so cannot be called under
asyncio; its IPRSocket is the same socket without a loop, and the kernel answers a request before `send` returns, so the
callers stay synchronous without a thread.

Everything is read whole and read again when something changed: there is no copy that could drift from the kernel. No
filter and no qdisc of another program is touched. Ours is known by its handle, is replaced in place without a gap, and
stays when this process ends.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import itertools
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface, ip_network
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from pyroute2.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_ECHO,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    rtnl,
)
from pyroute2.netlink.rtnl.errmsg import errmsg
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import IFF_LOOPBACK, IFF_UP, ifinfmsg
from pyroute2.netlink.rtnl.iprsocket import IPRSocket
from pyroute2.netlink.rtnl.rtmsg import rtmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg
from pyroute2.netlink.rtnl.tcmsg.sched_bpf import TCA_BPF_FLAG_ACT_DIRECT
from pyroute2.protocols import ETH_P_ALL

from enforcer.policy import Address
from enforcer.topology import Interface, Route

# include/uapi/linux/rtnetlink.h, what pyroute2 does not name
_SKIP_STATISTICS = 1 << 3
_UNICAST, _LOCAL = rtnl.rt_type["unicast"], rtnl.rt_type["local"]
LOOPBACK: Final = 1  # lo's index in every network namespace: LOOPBACK_IFINDEX, include/net/flow.h
_CLSACT_HANDLE = 0xFFFF0000
_EVERY_PROTOCOL = socket.htons(ETH_P_ALL)

# Nobody's first choice: the kernel counts up from 1. The second says, beyond the end of any process of ours, that the
# clsact below the filter is ours as well. The guard has two of its own, since it is beside another program.
_OUR_HANDLE: Final = 0x52454E46
_OUR_HANDLE_ON_OUR_CLSACT: Final = 0x52454E47
_GUARDS_HANDLE: Final = 0x52454E48
_GUARDS_HANDLE_ON_OUR_CLSACT: Final = 0x52454E49
GUARD: Final = "guard"
_ETHERNET = 1  # ARPHRD_ETHER
_INVERTED = 2  # FIB_RULE_INVERT
_FIRST_PRIORITY = 1  # a filter behind one that says "ok" never runs, and that must not be the learner
_TIMEOUT_SECONDS = 5
_DUMP_ATTEMPTS = 8
_RECEIVE_BYTES = 65_536
_COALESCE_SECONDS = 0.005
_MESSAGES_A_TURN = 256
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port


_Reading = TypeVar("_Reading")


class NetlinkError(OSError):
    """The kernel refused a request; errno is the kernel's, strerror its explanation, or the error's text if none."""


class Direction(enum.Enum):
    """Where tc runs a program; the value is the parent of its filters."""

    INGRESS = 0xFFFFFFF2
    EGRESS = 0xFFFFFFF3


class Attachment(enum.IntEnum):
    """What became of an attempt to attach; only the first is false."""

    IMPOSSIBLE = 0  # the interface is gone
    KEPT = 1  # it was there already
    MADE = 2


@dataclass(frozen=True, slots=True)
class _Filter:
    """Any program's tc filter, or the head of a chain of them (handle 0)."""

    handle: int
    protocol: int  # network order
    priority: int
    kind: str
    name: str | None  # bpf only

    @property
    def ours(self) -> bool:
        return self.kind == "bpf" and (self.handle in (_OUR_HANDLE, _OUR_HANDLE_ON_OUR_CLSACT) or self.is_guard)

    @property
    def is_guard(self) -> bool:
        return self.handle in (_GUARDS_HANDLE, _GUARDS_HANDLE_ON_OUR_CLSACT)

    @property
    def on_our_clsact(self) -> bool:
        return self.handle in (_OUR_HANDLE_ON_OUR_CLSACT, _GUARDS_HANDLE_ON_OUR_CLSACT)

    @property
    def program(self) -> str:
        return (self.name or "").rpartition("#")[0]


class Netlink:
    """rtnetlink in the network namespace in which it was entered; not for use by several threads.

    Requests block: the kernel answers them before `send` returns. Anything it refuses raises NetlinkError.
    """

    def __enter__(self) -> Self:
        self.vanished = 0  # interfaces that were gone before they could be attached to
        self._socket = IPRSocket(ext_ack=True, strict_check=True)  # strict: it lists no more routes than asked for
        self._socket.bind(groups=0)
        self._socket.socket.settimeout(_TIMEOUT_SECONDS)
        # What ends a dump says whether it is complete, which pyroute2 does not look at.
        self._socket.register_policy(NLMSG_DONE, errmsg)
        self._sequence = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    # --- readings ----------------------------------------------------------------------------------------------------
    def interfaces(self) -> tuple[Interface, ...]:
        """Every interface, by index, with its addresses."""
        addresses: dict[int, list[IPv4Interface | IPv6Interface]] = defaultdict(list)
        for index, address in self._dump(rtnl.RTM_GETADDR, ifaddrmsg(), _address):
            if address is not None:
                addresses[index].append(address)
        request = _message(ifinfmsg(), [("IFLA_EXT_MASK", _SKIP_STATISTICS)])
        interfaces = self._dump(rtnl.RTM_GETLINK, request, lambda link: _interface(link, addresses[link["index"]]))
        return tuple(sorted(interfaces, key=lambda interface: interface.index))

    def routes(self) -> tuple[Route, ...]:
        """Every next hop of every unicast route, of all tables."""
        request = _message(rtmsg(), family=socket.AF_UNSPEC, type=_UNICAST)
        return tuple(itertools.chain.from_iterable(self._dump(rtnl.RTM_GETROUTE, request, _next_hops)))

    def mark_rules(self) -> tuple[tuple[int, int, int, bool], ...]:
        """Rules of policy routing that look at marks: (priority, mark, mask, whether they are for all other marks)."""
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            found += self._dump(rtnl.RTM_GETRULE, _message(fibmsg(), family=family), _mark_rule)
        return tuple(rule for rule in found if rule is not None)

    def route_to(self, address: Address) -> int | None:
        """Index of the interface through which this host would reach `address`; None if it would not."""
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        attributes: list[tuple[str, Any]] = [("RTA_DST", socket.inet_ntop(family, address.packed))]
        if isinstance(address, IPv6Address) and address.scope_id:
            try:
                attributes.append(("RTA_OIF", socket.if_nametoindex(address.scope_id)))
            except OSError:
                return None
        message = _message(rtmsg(), attributes, family=family, dst_len=address.max_prefixlen)
        try:
            replies = self._request(rtnl.RTM_GETROUTE, 0, message)
        except NetlinkError as error:
            # No route, or one of type unreachable, prohibit, blackhole; or the scope's interface went meanwhile.
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ENODEV):
                return None
            raise
        return next((route.get("oif") for route in replies if route["type"] in (_UNICAST, _LOCAL)), None)

    # --- tc ----------------------------------------------------------------------------------------------------------
    def attach(self, index: int, direction: Direction, program_fd: int, name: str) -> Attachment:
        """Make the sched_cls program behind `program_fd` ours on this interface.

        Does nothing if it is there already; another program of ours is replaced in one step, but the guard has a place
        beside it. It runs with direct action, and should end in TC_ACT_UNSPEC so that other programs' filters have
        their turn.
        """
        # pyroute2 does not decode the program's id, so the filter's name carries it. No program gets it a second time
        # while this one is attached.
        filter_name = f"{name}#{_program_id(program_fd)}"
        filters = self._filters(index, direction)
        ours = next((entry for entry in filters if entry.ours and entry.is_guard == (name == GUARD)), None)
        if ours and ours.name == filter_name:
            return Attachment.KEPT
        options = [
            ("TCA_BPF_FD", program_fd),
            ("TCA_BPF_NAME", filter_name),
            ("TCA_BPF_FLAGS", TCA_BPF_FLAG_ACT_DIRECT),
        ]
        priority = ours.priority if ours else _free_priority(filters)
        made = False
        try:
            made = self._ensure_clsact(index, direction)
            if ours:
                handle = ours.handle
            elif name == GUARD:
                handle = _GUARDS_HANDLE_ON_OUR_CLSACT if made else _GUARDS_HANDLE
            else:
                handle = _OUR_HANDLE_ON_OUR_CLSACT if made else _OUR_HANDLE
            message = _filter_message(index, direction, priority, handle, [("TCA_OPTIONS", {"attrs": options})])
            self._request(rtnl.RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_REPLACE, message)
        except NetlinkError as error:
            if made:  # for nothing: this kernel has no BPF filters
                self._remove(rtnl.RTM_DELQDISC, _clsact_message(index))
            if error.errno != errno.ENODEV:
                raise
            self.vanished += 1
            return Attachment.IMPOSSIBLE
        return Attachment.MADE

    def takes_filters(self, program_fd: int | None) -> bool:
        """Whether tc takes BPF filters (clsact and cls_bpf): tried on lo, where nothing of it stays."""
        if program_fd is None:
            return False
        if self.attached(LOOPBACK):
            return True
        try:
            return bool(self.attach(LOOPBACK, Direction.INGRESS, program_fd, "probe"))
        except NetlinkError:
            return False
        finally:
            self.detach(LOOPBACK)

    def attached(self, index: int) -> dict[Direction, str]:
        """Names of our programs on this interface, the guard aside; empty also when the interface is gone."""
        return {
            direction: entry.program
            for direction in Direction
            for entry in self._filters(index, direction)
            if entry.ours and not entry.is_guard
        }

    def guarded(self, index: int) -> bool:
        """Whether the guard is at the egress of this interface."""
        return any(entry.ours and entry.is_guard for entry in self._filters(index, Direction.EGRESS))

    def detach(self, index: int) -> None:
        """Remove our filters from this interface, and its clsact if we made it and nobody else uses it."""
        ours = [
            (direction, entry) for direction in Direction for entry in self._filters(index, direction) if entry.ours
        ]
        for direction, entry in ours:
            self._remove(rtnl.RTM_DELTFILTER, _filter_message(index, direction, entry.priority, entry.handle))
        made = any(entry.on_our_clsact for _, entry in ours)
        if made and not any(self._filters(index, direction) for direction in Direction):
            self._remove(rtnl.RTM_DELQDISC, _clsact_message(index))

    def _ensure_clsact(self, index: int, direction: Direction) -> bool:
        """Whether it had to be made."""
        try:
            self._request(
                rtnl.RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, _clsact_message(index, [("TCA_KIND", "clsact")])
            )
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
            if direction is Direction.INGRESS:
                return False  # the older `ingress` qdisc, in the same place, does as well
            # Without NLM_F_ECHO only listeners are told.
            for qdisc in self._request(rtnl.RTM_GETQDISC, NLM_F_ECHO, _clsact_message(index)):
                kind = qdisc.get("kind")
                if kind != "clsact":
                    # It would take the filter, and run it at ingress.
                    message = f"another program's {kind} qdisc leaves no place for egress programs"
                    raise NetlinkError(errno.EBUSY, message) from error
            return False
        return True

    def _filters(self, index: int, direction: Direction) -> list[_Filter]:
        """Everybody's; empty without the interface or the qdisc, and where the kernel has no filters at all."""
        try:
            return self._dump(rtnl.RTM_GETTFILTER, _message(tcmsg(), index=index, parent=direction.value), _filter)
        except NetlinkError as error:
            if error.errno != errno.EOPNOTSUPP:  # CONFIG_NET_CLS
                raise
            return []

    def _remove(self, kind: int, message: Any) -> None:
        """Whoever was there first, what counts is that it is gone."""
        try:
            self._request(kind, 0, message)
        except NetlinkError as error:
            if error.errno not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
                raise

    # --- events ------------------------------------------------------------------------------------------------------
    def changes(self) -> Changes:
        """Follow what happens to links, addresses, routes and tc; needs a running event loop. Close it after use."""
        return Changes(own_port=self._socket.epid)

    # --- messages ----------------------------------------------------------------------------------------------------
    def _dump(self, kind: int, message: Any, read: Callable[[Any], _Reading]) -> list[_Reading]:
        """A consistent listing, or the last of several: whatever interrupted it is an event of its own."""
        for _ in range(_DUMP_ATTEMPTS):
            readings, interrupted = self._exchange(kind, NLM_F_DUMP, message, read)
            if not interrupted:
                break
        return readings

    def _request(self, kind: int, flags: int, message: Any) -> list[Any]:
        return self._exchange(kind, flags | NLM_F_ACK, message, lambda reply: reply)[0]

    def _exchange(
        self, kind: int, flags: int, message: Any, read: Callable[[Any], _Reading]
    ) -> tuple[list[_Reading], bool]:
        """(what `read` makes of each reply, whether a change interrupted them).

        pyroute2's messages refer to themselves. Read one by one they are young garbage; kept until the last has come,
        200 interfaces cost a full collection each time, which takes longer than all the rest.
        """
        self._sequence += 1
        self._socket.put(message, kind, flags | NLM_F_REQUEST, msg_seq=self._sequence)
        readings: list[_Reading] = []
        interrupted = False
        while True:
            # Not IPRSocket.get(), which would cut what is longer than 16 KB.
            for reply in self._socket.marshal.parse(self._socket.recv(_RECEIVE_BYTES)):
                header = reply["header"]
                if header["sequence_number"] != self._sequence:
                    continue  # of a request that timed out
                interrupted |= bool(header["flags"] & NLM_F_DUMP_INTR)
                if header["error"] is not None:
                    raise NetlinkError(*header["error"].args)
                if header["type"] == NLMSG_DONE and reply.get("code"):
                    raise NetlinkError(-reply["code"], os.strerror(-reply["code"]))
                if header["type"] in (NLMSG_ERROR, NLMSG_DONE):
                    return readings, interrupted
                readings.append(read(reply))


class Change(enum.Flag):
    """What may have changed since the last time."""

    LINK = enum.auto()
    ADDRESS = enum.auto()
    ROUTE = enum.auto()  # routing rules too
    TRAFFIC_CONTROL = enum.auto()  # qdiscs and filters, unless by the Netlink that is asking
    LOST = enum.auto()  # more than the kernel keeps for us has happened; comes with all the others
    EVERYTHING = LINK | ADDRESS | ROUTE | TRAFFIC_CONTROL


_CHANGE_OF = {
    **dict.fromkeys((rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK), Change.LINK),
    **dict.fromkeys((rtnl.RTM_NEWADDR, rtnl.RTM_DELADDR), Change.ADDRESS),
    **dict.fromkeys((rtnl.RTM_NEWROUTE, rtnl.RTM_DELROUTE, rtnl.RTM_NEWRULE, rtnl.RTM_DELRULE), Change.ROUTE),
    **dict.fromkeys(
        (rtnl.RTM_NEWQDISC, rtnl.RTM_DELQDISC, rtnl.RTM_NEWTFILTER, rtnl.RTM_DELTFILTER), Change.TRAFFIC_CONTROL
    ),
}
_GROUPS = (
    (rtnl.RTMGRP_LINK | rtnl.RTMGRP_TC)
    | (rtnl.RTMGRP_IPV4_IFADDR | rtnl.RTMGRP_IPV4_ROUTE | rtnl.RTMGRP_IPV4_RULE)
    | (rtnl.RTMGRP_IPV6_IFADDR | rtnl.RTMGRP_IPV6_ROUTE | rtnl.RTMGRP_IPV6_RULE)
)


class Changes:
    """An endless asynchronous iterator of what changed.

    The first item, EVERYTHING, comes at once: the subscription is older than the listing that it asks for, so nothing
    falls between the two. An event after silence comes at once, what follows it in one item 5 ms later. A consumer
    that is slower than the events spends no more than half of its time here. Nothing is queued but one set of flags.

    pyroute2's AsyncIPRoute would decode and queue every event without a bound, and end at the first that is lost. Only
    the socket is pyroute2's here, and of an event only its type is read.
    """

    def __init__(self, own_port: int) -> None:
        self._own_port = own_port
        self._pending = Change.EVERYTHING
        self._wake = asyncio.Event()
        self._wake.set()
        self._delivered_at: float | None = None
        self._loop = asyncio.get_running_loop()
        self._socket = IPRSocket()
        self._socket.bind(groups=_GROUPS)
        self._loop.add_reader(self._socket.fileno(), self._collect)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._socket.fileno())
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
                header = self._socket.recv(_HEADER.size, socket.MSG_DONTWAIT)
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


# --- messages --------------------------------------------------------------------------------------------------------
def _message(empty: Any, attributes: Iterable[tuple[str, Any]] = (), **fields: int) -> Any:
    """One of pyroute2's messages, filled in."""
    empty.update(fields, attrs=list(attributes))
    return empty


def _clsact_message(index: int, attributes: Iterable[tuple[str, Any]] = ()) -> Any:
    return _message(tcmsg(), attributes, index=index, handle=_CLSACT_HANDLE, parent=rtnl.TC_H_CLSACT)


def _filter_message(
    index: int, direction: Direction, priority: int, handle: int, attributes: Iterable[tuple[str, Any]] = ()
) -> Any:
    info = priority << 16 | _EVERY_PROTOCOL
    attributes = [("TCA_KIND", "bpf"), *attributes]
    return _message(tcmsg(), attributes, index=index, handle=handle, parent=direction.value, info=info)


def _address(entry: Any) -> tuple[int, IPv4Interface | IPv6Interface | None]:
    """(index of the interface, None if it is not of the Internet protocols)."""
    if entry["family"] not in (socket.AF_INET, socket.AF_INET6):
        return entry["index"], None
    remote = entry.get("address")
    local = entry.get("local") or remote
    # The prefix of a point-to-point address is the peer's, and comes as a route of its own.
    return entry["index"], ip_interface((local, entry["prefixlen"])) if local == remote else ip_interface(local)


def _interface(link: Any, addresses: Iterable[IPv4Interface | IPv6Interface]) -> Interface:
    lower = link.get("link")
    return Interface(
        index=link["index"],
        name=os.fsdecode(link.get("ifname")),  # any bytes; pyroute2 leaves them bytes if they are not UTF-8
        kind=link.get(("linkinfo", "kind")),
        master=link.get("master"),
        # With a namespace id the number counts in that namespace; 0 and its own index mean that there is none.
        peer=lower if link.get("link_netnsid") is None else None,
        up=bool(link["flags"] & IFF_UP),
        loopback=bool(link["flags"] & IFF_LOOPBACK),
        addresses=tuple(addresses),
        link_address=_link_address(link),
    )


def _link_address(link: Any) -> bytes:
    if link["ifi_type"] != _ETHERNET:
        return b""
    return bytes.fromhex((link.get("address") or "").replace(":", ""))


def _mark_rule(rule: Any) -> tuple[int, int, int, bool] | None:
    mark = rule.get_attr("FRA_FWMARK")
    if mark is None:
        return None
    mask = rule.get_attr("FRA_FWMASK")
    return (
        rule.get_attr("FRA_PRIORITY") or 0,
        mark,
        0xFFFFFFFF if mask is None else mask,
        bool(rule["flags"] & _INVERTED),
    )


def _next_hops(route: Any) -> list[Route]:
    if route["family"] not in (socket.AF_INET, socket.AF_INET6):
        return []
    everywhere = "0.0.0.0" if route["family"] == socket.AF_INET else "::"
    destination = ip_network((route.get("dst") or everywhere, route["dst_len"]))
    hops = [hop for hop in (route, *route.get("multipath", ())) if hop.get("oif") is not None]
    return [Route(destination, _gateway(hop), hop.get("oif")) for hop in hops]


def _gateway(hop: Any) -> Address | None:
    # RTA_VIA: IPv4 through an IPv6 neighbour, RFC 5549
    gateway = hop.get("gateway") or hop.get(("via", "addr"))
    return ip_address(gateway) if gateway else None


def _filter(entry: Any) -> _Filter:
    kind = entry.get("kind")
    return _Filter(
        handle=entry["handle"],
        protocol=entry["info"] & 0xFFFF,
        priority=entry["info"] >> 16,
        kind=kind,
        name=entry.get(("options", "tca_bpf_name")) if kind == "bpf" else None,
    )


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
