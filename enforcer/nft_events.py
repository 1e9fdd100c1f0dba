"""What others do to our nftables table, as the kernel tells it: within a millisecond, and before their command returns.

The kernel names the socket behind each change. This process's own are left out by a filter in the kernel, so that what
is learned costs nothing here. What another process changes in our table is never wanted, whatever it is.

Of a storm nothing is queued but one fact; and a storm takes no more than half of the event loop's time.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from enforcer.nfnetlink import NETLINK_NETFILTER, message_attributes, messages
from enforcer.ruleset import TABLE

# linux/netlink.h, linux/filter.h, linux/netfilter/nfnetlink.h, nf_tables.h; asm-generic/socket.h
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
_NFNLGRP_NFTABLES = 7
_NFNL_SUBSYS_NFTABLES = 10
_NFTA_TABLE = 1  # of tables, chains, rules, sets, elements and objects alike
_NFPROTO_INET = 1
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_SOCK_FILTER, _SOCK_FPROG = struct.Struct("=HBBI"), struct.Struct("@HP")
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD | BPF_W | BPF_ABS and others
_AT_PORT = 12  # of struct nlmsghdr
_WHOLE = 0xFFFFFFFF

_BUFFER_BYTES = 4 << 20
_DATAGRAM_BYTES = 1 << 18
_DATAGRAMS_A_TURN = 256


class TableWatch:
    """Calls back on the event loop when somebody else has changed our table, or may have: then events were lost.

    Watches the network namespace in which it was entered, from then on; `follow` begins to call back, also for what
    came before. Needs a running event loop. OSError where the kernel does not let it listen.
    """

    def __init__(self, changed: Callable[[], None], lost: Callable[[], None]) -> None:
        self._changed = changed
        self._lost = lost
        self._own: frozenset[int] = frozenset()
        self._resume: asyncio.TimerHandle | None = None
        self._following = False

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        try:
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            self._socket.bind((0, 0))  # what has no address hears nothing
            self._leave_out_own()
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._resume is not None:
            self._resume.cancel()
        if self._following:
            self._loop.remove_reader(self._socket)
        self._socket.close()

    def follow(self) -> None:
        """Call back from now on."""
        self._following = True
        self._loop.add_reader(self._socket, self._read)

    def _read(self) -> None:
        changed = False
        for _ in range(_DATAGRAMS_A_TURN):
            try:
                datagram = self._socket.recv(_DATAGRAM_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._lost()
                continue
            changed = changed or self._is_foreign(datagram)
        if changed:
            started = self._loop.time()
            self._changed()
            self._loop.remove_reader(self._socket)
            self._resume = self._loop.call_later(self._loop.time() - started, self._go_on)

    def _go_on(self) -> None:
        self._loop.add_reader(self._socket, self._read)

    def _is_foreign(self, datagram: bytes) -> bool:
        """Whether it tells of our table; all that is in it comes from one transaction, and so from one socket."""
        if len(datagram) < _AT_PORT + 4 or not any(map(_is_of_table, messages(datagram))):
            return False
        (port,) = struct.unpack_from("=I", datagram, _AT_PORT)
        if port in self._own:
            return False
        self._leave_out_own()  # libnftables may have opened another socket
        return port not in self._own

    def _leave_out_own(self) -> None:
        self._own = own_ports()
        lines = _all_but(self._own)
        program = ctypes.create_string_buffer(lines, len(lines))
        fprog = _SOCK_FPROG.pack(len(lines) // _SOCK_FILTER.size, ctypes.addressof(program))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)


def own_ports() -> frozenset[int]:
    """The netlink addresses of this process's sockets to netfilter, libnftables' among them."""
    ports = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if not str(descriptor.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor.name))) as opened:
                if opened.family == socket.AF_NETLINK and opened.proto == NETLINK_NETFILTER:
                    ports.add(int(opened.getsockname()[0]))
        except FileNotFoundError:
            continue  # the listing's own
    return frozenset(ports - {0})  # 0: the kernel's, and that of a socket without an address yet


def _all_but(ports: Iterable[int]) -> bytes:
    """A filter that drops what these sockets did: struct sock_filter of each line."""
    listed = sorted(ports)
    lines = [(_LOAD_WORD, 0, 0, _AT_PORT)]
    # A word is loaded as if it were in network order.
    lines += [(_JUMP_EQUAL, len(listed) - place, 0, socket.htonl(port)) for place, port in enumerate(listed)]
    lines += [(_RETURN, 0, 0, _WHOLE), (_RETURN, 0, 0, 0)]
    return b"".join(_SOCK_FILTER.pack(*line) for line in lines)


def _is_of_table(message: tuple[int, int, bytes]) -> bool:
    kind, _, body = message
    if kind >> 8 != _NFNL_SUBSYS_NFTABLES or not body or body[0] != _NFPROTO_INET:
        return False
    return message_attributes(body).get(_NFTA_TABLE, b"").rstrip(b"\0") == TABLE.encode()
