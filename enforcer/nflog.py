"""What nftables reports of refused packets, read over netlink (nfnetlink_log).

The kernel sends several reports at once, ten milliseconds after the first, and numbers them: a flood costs few
wake-ups and what the buffer of the socket could not hold is counted exactly. Reading is bounded too: beyond a number of
reports a second the rest is left to the kernel to drop.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from types import TracebackType
from typing import Self

from enforcer.audit_record import Kind, Report
from enforcer.kernel_abi import Marks, Protocol
from enforcer.ladder import AUDIT_GROUP
from enforcer.nfnetlink import (
    ACK,
    ERROR,
    NETLINK_NETFILTER,
    attribute,
    error_number,
    message_attributes,
    messages,
    request,
)
from enforcer.policy import Address
from enforcer.ruleset import CountedScope

# include/uapi/linux/netfilter/nfnetlink.h, nfnetlink_log.h
_PACKET, _CONFIG = 4 << 8, 4 << 8 | 1  # NFNL_SUBSYS_ULOG
_COMMAND, _MODE, _TIMEOUT, _FLAGS = 1, 2, 4, 6  # NFULA_CFG_*
_BIND, _COPY_PACKET, _SEQUENCE = 1, 2, 1
_HEADER, _MARK, _INDEV, _PAYLOAD, _PREFIX, _UID, _NUMBER = 1, 2, 4, 9, 10, 11, 12  # NFULA_*
_HOOK_FORWARD, _HOOK_PREROUTING = 2, 0
# IPv6 extension headers that may stand before the ports, all of the form (next header, length).
_IPV6_EXTENSIONS = frozenset({0, 43, 60})

_COPIED_BYTES = 128  # the headers
_BUFFER_BYTES = 1 << 20
_DATAGRAM_BYTES = 1 << 17
_DATAGRAMS_A_TURN = 8
_REPORTS_A_SECOND = 1_000


class NflogError(OSError):
    """The kernel does not report to us; errno says why: EPERM also if somebody else listens."""


class RefusalReader:
    """Calls back on the event loop with what was refused in the network namespace in which it was entered.

    `lost` counts reports that nobody will see. Needs a running event loop.
    """

    def __init__(self, callback: Callable[[list[Report]], None], marks: Marks) -> None:
        """`marks`: how the table's packets tell their scope."""
        self.lost = 0
        self._callback = callback
        self._marks = marks
        self._expected: int | None = None  # the next report's number
        self._left = _REPORTS_A_SECOND  # that may still be read in this second
        self._second = 0.0
        self._resume: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            self._socket.settimeout(5)
            self._configure(_COMMAND, bytes((_BIND,)))
            self._configure(_MODE, struct.pack("!IBB", _COPIED_BYTES, _COPY_PACKET, 0))
            self._configure(_TIMEOUT, struct.pack("!I", 1))  # hundredths of a second
            self._configure(_FLAGS, struct.pack("!H", _SEQUENCE))
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise
        self._loop.add_reader(self._socket, self._read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _configure(self, setting: int, value: bytes) -> None:
        self._socket.send(request(_CONFIG, ACK, attribute(setting, value), resource=AUDIT_GROUP))
        while True:
            # Reports may come before the answer; they are not counted as lost, since counting begins with the first.
            for kind, _, body in messages(self._socket.recv(_DATAGRAM_BYTES)):
                if kind == ERROR:
                    if code := error_number(body):
                        raise NflogError(code, f"nfnetlink_log group {AUDIT_GROUP}: {os.strerror(code)}")
                    return

    def _read(self) -> None:
        now = self._loop.time()
        if now >= self._second + 1:
            self._second, self._left = now, _REPORTS_A_SECOND
        reports: list[Report] = []
        for _ in range(_DATAGRAMS_A_TURN):
            if self._left <= 0:
                self._loop.remove_reader(self._socket)
                self._resume = self._loop.call_at(self._second + 1, self._loop.add_reader, self._socket, self._read)
                break
            try:
                datagram = self._socket.recv(_DATAGRAM_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # the numbers tell how many
                    raise
                continue
            for kind, _, body in messages(datagram):
                if kind == _PACKET:
                    self._left -= 1
                    attributes = message_attributes(body)
                    self._count(attributes)
                    report = decode_report(attributes, time.time(), self._marks)
                    if report is not None:
                        reports.append(report)
        if reports:
            self._callback(reports)

    def _count(self, attributes: dict[int, bytes]) -> None:
        if _NUMBER in attributes:
            number = int.from_bytes(attributes[_NUMBER], "big")
            if self._expected is not None:
                self.lost += (number - self._expected) & 0xFFFFFFFF
            self._expected = number + 1


def decode_report(attributes: dict[int, bytes], at: float, marks: Marks) -> Report | None:
    """One report; None for a packet that is too short to say where it went, or a rule that is not ours."""
    verb, _, scope = attributes.get(_PREFIX, b"").rstrip(b"\0").decode("ascii", "replace").partition(" ")
    packet = attributes.get(_PAYLOAD, b"")
    flow = _flow(packet)
    if flow is None or verb not in _KINDS or scope not in _SCOPES:
        return None
    protocol, source, destination = flow
    hook = attributes[_HEADER][2] if len(attributes.get(_HEADER, b"")) >= 3 else None
    return Report(
        at=at,
        kind=_KINDS[verb],
        scope=_SCOPES[scope],
        protocol=protocol,
        source=source,
        destination=destination,
        forwarded=_INDEV in attributes or hook in (_HOOK_FORWARD, _HOOK_PREROUTING),
        marked_scope=marks.scope(int.from_bytes(attributes.get(_MARK, b""), "big")),
        uid=int.from_bytes(attributes[_UID], "big") if _UID in attributes else None,
    )


_KINDS = {kind.value: kind for kind in (Kind.REFUSED, Kind.OBSERVED)}
_SCOPES = {scope.value: scope for scope in CountedScope}
Endpoint = tuple[Address, int]


def _flow(packet: bytes) -> tuple[Protocol, Endpoint, Endpoint] | None:
    source: Address
    destination: Address
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        number, at = packet[9], (packet[0] & 15) * 4
        source, destination = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    elif len(packet) >= 40 and packet[0] >> 4 == 6:
        number, at = packet[6], 40
        source, destination = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
        while number in _IPV6_EXTENSIONS and at + 2 <= len(packet):
            number, at = packet[at], at + (packet[at + 1] + 1) * 8
    else:
        return None
    if number not in (Protocol.TCP, Protocol.UDP) or at + 4 > len(packet):
        return None
    source_port, destination_port = struct.unpack_from("!HH", packet, at)
    return Protocol(number), (source, source_port), (destination, destination_port)
