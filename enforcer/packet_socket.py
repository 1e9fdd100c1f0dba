"""DNS packets as they pass an interface, read from packet sockets (packet(7)): the place of tc where there is no BPF.

A copy, not the packet: the client has its answer while user space still reads it. The kernel's filter is of classic
BPF, which needs CAP_NET_RAW and no bpf(2). One socket an interface, since a socket for all would copy what containers
say to each other as well. Packets begin with the network header on every kind of device; a VLAN tag is gone from them,
as it is where tc looks. On lo each packet leaves and arrives, and both are told.

The kernel's buffer is the only queue, and `lost` counts what did not fit. When a packet passed is the kernel's word and
not the moment it was read: a daemon that was held up for seconds must not take a late answer for a timely one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Self

from enforcer.overhearing import Packet

# asm-generic/socket.h, linux/if_packet.h, linux/if_ether.h, linux/filter.h
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE, _SO_TIMESTAMPNS = 26, 33, 35
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_ETH_P_ALL, _ETH_P_IP, _ETH_P_IPV6 = 0x0003, 0x0800, 0x86DD
_SKF_AD_PROTOCOL = 0xFFFFF000  # skb->protocol, at an offset that no packet has
_SOCKADDR_LL = struct.Struct("=H2siHBB8x")
_STATISTICS = struct.Struct("=II")  # packets, drops; reading sets both to zero
_TIMESPEC = struct.Struct("@ll")
_SOCK_FILTER, _SOCK_FPROG = struct.Struct("=HBBI"), struct.Struct("@HP")
_NANOSECONDS = 1_000_000_000

_BUFFER_BYTES = 4 << 20  # of each socket, counted with the kernel's overhead: some thousand packets
_PACKET_BYTES = 1 << 16  # TCP segments are joined and cut by the device: the longest that an IP header can say
_PACKETS_A_TURN = 128  # of one interface, before the event loop does something else

_libc = ctypes.CDLL(None, use_errno=True)


class PacketSocketError(Exception):
    """This kernel, or this process's rights, have no packet sockets; the text says what to do."""


class PacketSockets:
    """Calls back on the event loop with the DNS packets of a changing set of interfaces.

    Hears nothing before `listen_on`. `clock` is the time.CLOCK_* on which Packet.at_ns counts. Needs a running event
    loop; entering raises PacketSocketError.
    """

    def __init__(self, hear: Callable[[list[Packet]], None], clock: int) -> None:
        self._hear = hear
        self._clock = clock
        self._sockets: dict[int, socket.socket] = {}  # by interface index
        self._lost = 0  # as far as the kernel was asked
        self._buffer = memoryview(bytearray(_PACKET_BYTES))

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        _deaf_socket().close()  # the rights and the module are there
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for index in list(self._sockets):
            self._close(index)

    @property
    def interfaces(self) -> frozenset[int]:
        """Indexes of those that are listened on. One that is down stays and is heard when it is up; one that is removed
        goes."""
        return frozenset(self._sockets)

    @property
    def lost(self) -> int:
        """DNS packets that nobody will read, since the socket's buffer was full."""
        for opened in self._sockets.values():
            self._count_lost(opened)
        return self._lost

    def listen_on(self, indexes: Collection[int]) -> None:
        """Listen on these interfaces and no others. Those that do not exist (any more) are left out of `interfaces`.

        Those that are kept miss nothing.
        """
        for index, opened in list(self._sockets.items()):
            if index not in indexes or _is_orphaned(opened):
                self._close(index)
        for index in indexes:
            if index not in self._sockets:
                self._open(index)

    def _open(self, index: int) -> None:
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(_deaf_socket())
            try:
                _bind(opened, index)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                return
            self._sockets[index] = opened
            self._loop.add_reader(opened, self._read, index, opened)
            stack.pop_all()

    def _close(self, index: int) -> None:
        opened = self._sockets.pop(index)
        self._loop.remove_reader(opened)
        self._count_lost(opened)
        opened.close()

    def _count_lost(self, opened: socket.socket) -> None:
        _, drops = _STATISTICS.unpack(opened.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size))
        self._lost += drops

    def _read(self, index: int, opened: socket.socket) -> None:
        packets = []
        for _ in range(_PACKETS_A_TURN):
            try:
                size, control, _, address = opened.recvmsg_into([self._buffer], socket.CMSG_SPACE(_TIMESPEC.size))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENETDOWN:
                    raise
                if _is_orphaned(opened):
                    self._close(index)
                    break
                continue
            leaving = address[2] == socket.PACKET_OUTGOING
            packets.append(Packet(self._passed_at(control), index, leaving, bytes(self._buffer[:size])))
        if packets:
            self._hear(packets)

    def _passed_at(self, control: list[tuple[int, int, bytes]]) -> int:
        """The kernel's time stamp, which is of the wall clock, on our clock."""
        age_ns = 0
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
                seconds, nanoseconds = _TIMESPEC.unpack_from(data)
                # Not after now, whichever way the wall clock stepped: a question of the future would never be too old.
                age_ns = max(0, time.time_ns() - seconds * _NANOSECONDS - nanoseconds)
        return time.clock_gettime_ns(self._clock) - age_ns


# --- sockets ---------------------------------------------------------------------------------------------------------
def _deaf_socket() -> socket.socket:
    """A packet socket with everything set and bound to nothing: it never sees a packet that its filter has not."""
    try:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
    except OSError as error:
        hints = {
            errno.EPERM: "run as root, or with CAP_NET_RAW",
            errno.EAFNOSUPPORT: "load the kernel module af_packet (CONFIG_PACKET)",
        }
        hint = hints.get(error.errno or 0, "")
        raise PacketSocketError(f"no packet socket: {error.strerror}{hint and '; '}{hint}") from error
    try:
        program = ctypes.create_string_buffer(FILTER, len(FILTER))
        fprog = _SOCK_FPROG.pack(len(FILTER) // _SOCK_FILTER.size, ctypes.addressof(program))
        opened.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
        opened.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        try:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)  # needs CAP_NET_ADMIN
        except PermissionError:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    except BaseException:
        opened.close()
        raise
    return opened


def _bind(opened: socket.socket, index: int) -> None:
    """By index: socket.bind() takes a name, and that may be another interface's by now. Raises OSError."""
    address = _SOCKADDR_LL.pack(socket.AF_PACKET, struct.pack("!H", _ETH_P_ALL), index, 0, 0, 0)
    if _libc.bind(opened.fileno(), address, len(address)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"packet socket on interface {index}: {os.strerror(number)}")


def _is_orphaned(opened: socket.socket) -> bool:
    """Whether its interface was removed or is in another namespace now: it will never hear anything again."""
    name: str = opened.getsockname()[0]
    return not name


# --- the filter ------------------------------------------------------------------------------------------------------
# Opcodes of classic BPF (linux/bpf_common.h): size and mode of loads, condition of jumps.
_LOAD_BYTE, _LOAD_HALF, _LOAD_HALF_BEYOND_X, _HEADER_LENGTH_TO_X = 0x30, 0x28, 0x48, 0xB1
_AND, _EQUAL, _ANY_BIT, _RETURN = 0x54, 0x15, 0x45, 0x06

_Line = tuple[str, int, int, str, str]  # label, opcode, operand, where to go if true, if false; "" is the next line


def _one_of(values: Collection[int], then: str) -> list[_Line]:
    """Go to `then` if what was loaded is among `values`, else drop."""
    return [("", _EQUAL, value, then, "") for value in values] + [("", _RETURN, 0, "", "")]


# To or from port 53 over UDP or TCP, but for later fragments. What has IPv6 extension headers passes if the first of
# them does not end in another protocol: the reader looks at the others.
_PROGRAM: list[_Line] = [
    ("", _LOAD_HALF, _SKF_AD_PROTOCOL, "", ""),
    ("", _EQUAL, _ETH_P_IP, "ipv4", ""),
    ("", _EQUAL, _ETH_P_IPV6, "ipv6", "drop"),
    ("ipv4", _LOAD_BYTE, 0, "", ""),
    ("", _AND, 0xF0, "", ""),
    ("", _EQUAL, 0x40, "", "drop"),
    ("", _LOAD_HALF, 6, "", ""),
    ("", _ANY_BIT, 0x1FFF, "drop", ""),
    ("", _HEADER_LENGTH_TO_X, 0, "", ""),
    ("", _LOAD_BYTE, 9, "", ""),
    *_one_of((socket.IPPROTO_UDP, socket.IPPROTO_TCP), "ipv4 ports"),
    ("ipv4 ports", _LOAD_HALF_BEYOND_X, 0, "", ""),
    ("", _EQUAL, 53, "accept", ""),
    ("", _LOAD_HALF_BEYOND_X, 2, "", ""),
    ("", _EQUAL, 53, "accept", "drop"),
    ("ipv6", _LOAD_BYTE, 0, "", ""),
    ("", _AND, 0xF0, "", ""),
    ("", _EQUAL, 0x60, "", "drop"),
    ("", _LOAD_BYTE, 6, "", ""),
    ("", _EQUAL, socket.IPPROTO_UDP, "ipv6 ports", ""),
    ("", _EQUAL, socket.IPPROTO_TCP, "ipv6 ports", ""),
    ("", _EQUAL, socket.IPPROTO_FRAGMENT, "ipv6 fragment", ""),
    *_one_of((socket.IPPROTO_HOPOPTS, socket.IPPROTO_ROUTING, socket.IPPROTO_DSTOPTS), "ipv6 extension"),
    ("ipv6 ports", _LOAD_HALF, 40, "", ""),
    ("", _EQUAL, 53, "accept", ""),
    ("", _LOAD_HALF, 42, "", ""),
    ("", _EQUAL, 53, "accept", "drop"),
    ("ipv6 fragment", _LOAD_HALF, 42, "", ""),
    ("", _ANY_BIT, 0xFFF8, "drop", ""),
    ("ipv6 extension", _LOAD_BYTE, 40, "", ""),
    *_one_of((socket.IPPROTO_UDP, socket.IPPROTO_TCP, socket.IPPROTO_HOPOPTS, socket.IPPROTO_ROUTING), "accept")[:-1],
    *_one_of((socket.IPPROTO_FRAGMENT, socket.IPPROTO_DSTOPTS), "accept"),
    ("accept", _RETURN, _PACKET_BYTES, "", ""),
    ("drop", _RETURN, 0, "", ""),
]


def _assemble(program: list[_Line]) -> bytes:
    """struct sock_filter of each line."""
    places = {label: place for place, (label, *_) in enumerate(program) if label}

    def distance(place: int, label: str) -> int:
        return places[label] - place - 1 if label else 0

    return b"".join(
        _SOCK_FILTER.pack(opcode, distance(place, if_true), distance(place, if_false), operand)
        for place, (_, opcode, operand, if_true, if_false) in enumerate(program)
    )


FILTER = _assemble(_PROGRAM)
