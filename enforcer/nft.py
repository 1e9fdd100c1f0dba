"""The kernel's nf_tables: transactions through libnftables, readings through netlink.

libnftables takes text and says where it is wrong, so every change goes through it. It walks every element of every set
before it lists anything, though (965 ms at 100,000 elements), and so counters, elements and chains are read with dump
requests of our own that ask the kernel for nothing else.

One writer at a time. Everything acts on the network namespace in which `Nft` was entered.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self

from enforcer.kernel_abi import Marks
from enforcer.ladder import Feature
from enforcer.ruleset import BASE_CHAINS, LEARNED_SETS, REVOKED_SETS, TABLE, Element, marks_of

# include/uapi/linux/netlink.h
_NETLINK_NETFILTER = 12
_NLMSG = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_NLM_F_REQUEST = 0x01
_NLM_F_DUMP_INTR = 0x10
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_STATUS = struct.Struct("=i")  # of DONE and ERROR: 0 or a negative errno
_NLA = struct.Struct("=HH")  # length, type
_NLA_TYPE_MASK = 0x3FFF
# include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h
_NFGENMSG = struct.Struct("!BBH")  # family, version, resource
_NFPROTO_INET = 1
_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_GETCHAIN = 4
_NFT_MSG_GETSETELEM = 13
_NFT_MSG_GETOBJ = 19
_NFTA_TABLE = 1  # of chains, elements and objects alike
_NFTA_CHAIN_NAME = 3
_NFTA_CHAIN_HOOK = 4
_NFTA_SET_ELEM_LIST_SET = 2
_NFTA_SET_ELEM_LIST_ELEMENTS = 3
_NFTA_SET_ELEM_KEY = 1
_NFTA_SET_ELEM_EXPIRATION = 5
_NFTA_DATA_VALUE = 1
_NFTA_OBJ_NAME = 2
_NFTA_OBJ_TYPE = 3
_NFTA_OBJ_DATA = 4
_NFT_OBJECT_COUNTER = 1
_NFTA_COUNTER_BYTES = 1
_NFTA_COUNTER_PACKETS = 2

_LARGE_CHARACTERS = 50_000
_libc = ctypes.CDLL(None)

_DUMP_ATTEMPTS = 20
_DUMP_TIMEOUT_SECONDS = 5
_RECEIVE_BYTES = 65_536


class NftError(Exception):
    """The kernel or libnftables said no; the message is theirs, with the line of the text and the line itself."""


@dataclass(frozen=True, slots=True)
class Counter:
    """A reading of a named counter."""

    packets: int
    bytes: int


class Nft:
    """nf_tables of one network namespace."""

    def __enter__(self) -> Self:
        import nftables  # noqa: PLC0415 - a package of the OS: without it the rest of the program still works

        # Both open their socket here: later moves to another namespace do not matter.
        self._library: Any = nftables.Nftables()
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._netlink.settimeout(_DUMP_TIMEOUT_SECONDS)
        self._sequence = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._netlink.close()
        del self._library  # frees its context and socket

    def apply(self, text: str) -> None:
        """Takes `text` as one transaction: all of it, or NftError and nothing."""
        # As a file, since libnftables names the wrong line for a string of several.
        try:
            with os.fdopen(os.memfd_create("ruleset"), "wb") as file:
                file.write(text.encode())
                file.flush()
                path = f"/proc/self/fd/{file.fileno()}"
                status, _, message = self._library.cmd_from_file(path)
        except OSError as error:
            raise NftError(f"no memory file for a ruleset: {error.strerror}") from error
        if len(text) > _LARGE_CHARACTERS:
            # libnftables' syntax tree takes a hundred times the text and more; the C library would keep it.
            _libc.malloc_trim(0)
        if status:
            raise NftError(message.strip().replace(f"{path}:", "line "))

    def probe(self) -> frozenset[Feature]:
        """Asks the kernel for each feature by itself.

        A transaction makes the rule in a table without hooks and deletes it again, so nothing is ever seen of it.
        NftError for somebody whom the kernel does not let ask.
        """
        table = f"{TABLE}_probe_{os.getpid()}"
        present = set()
        for feature in Feature:
            try:
                self.apply(f"table inet {table} {{\n {feature.value}\n}}\ndelete table inet {table}\n")
            except NftError as error:
                if os.strerror(errno.EPERM) in str(error):
                    raise
                continue
            present.add(feature)
        return frozenset(present)

    def present(self) -> bool:
        """Whether the table is there with its base chains attached."""
        hooked = {
            _text(chain[_NFTA_CHAIN_NAME])
            for chain in self._dump(_NFT_MSG_GETCHAIN, b"")
            if _text(chain[_NFTA_TABLE]) == TABLE and _NFTA_CHAIN_HOOK in chain
        }
        return hooked.issuperset(BASE_CHAINS)

    def listing(self) -> str:
        """Every rule of every table as text, without the elements of sets. NftError."""
        before = self._library.set_terse_output(True)
        try:
            status, text, message = self._library.cmd("list ruleset")
        finally:
            self._library.set_terse_output(before)
        if status:
            raise NftError(message.strip())
        return str(text)

    def marks(self) -> Marks | None:
        """The bits of the mark that the table's rules read; None: it is a baseline, and nobody has set any yet."""
        chains = self._dump(_NFT_MSG_GETCHAIN, b"")
        return marks_of(_text(chain[_NFTA_CHAIN_NAME]) for chain in chains if _text(chain[_NFTA_TABLE]) == TABLE)

    def counters(self) -> dict[str, Counter]:
        """Every named counter of the table; empty without the table."""
        request = _attribute(_NFTA_TABLE, TABLE.encode() + b"\0")
        request += _attribute(_NFTA_OBJ_TYPE, struct.pack("!I", _NFT_OBJECT_COUNTER))
        counters = {}
        for counter in self._dump(_NFT_MSG_GETOBJ, request):
            reading = dict(_attributes(counter[_NFTA_OBJ_DATA]))
            counters[_text(counter[_NFTA_OBJ_NAME])] = Counter(
                int.from_bytes(reading[_NFTA_COUNTER_PACKETS], "big"),
                int.from_bytes(reading[_NFTA_COUNTER_BYTES], "big"),
            )
        return counters

    def learned(self) -> list[Element]:
        """What the learned sets permit, with the seconds that are left, at least 1; NftError without the table."""
        return self._elements(LEARNED_SETS)

    def revoked(self) -> list[Element]:
        """What the revoked sets hold, in the same way; nothing where an older table has no such sets."""
        try:
            return self._elements(REVOKED_SETS)
        except NftError:
            if self.present():
                return []
            raise

    def _elements(self, set_names: tuple[str, str]) -> list[Element]:
        elements = []
        for set_name, address_bytes in zip(set_names, (4, 16), strict=True):
            request = _attribute(_NFTA_TABLE, TABLE.encode() + b"\0")
            request += _attribute(_NFTA_SET_ELEM_LIST_SET, set_name.encode() + b"\0")
            for part in self._dump(_NFT_MSG_GETSETELEM, request):
                for _, item in _attributes(part.get(_NFTA_SET_ELEM_LIST_ELEMENTS, b"")):
                    element = dict(_attributes(item))
                    key = dict(_attributes(element[_NFTA_SET_ELEM_KEY]))[_NFTA_DATA_VALUE]
                    left_milliseconds = int.from_bytes(element[_NFTA_SET_ELEM_EXPIRATION], "big")
                    # Each field of a concatenated key is padded to four bytes.
                    address = ip_address(key[:address_bytes])
                    port = int.from_bytes(key[address_bytes : address_bytes + 2], "big")
                    elements.append(Element(address, port, max(1, left_milliseconds // 1000)))
        return elements

    def _dump(self, message: int, request: bytes) -> list[dict[int, bytes]]:
        """The attributes of each object, read again if somebody changed the tables meanwhile."""
        try:
            for _ in range(_DUMP_ATTEMPTS):
                objects = self._dump_once(message, request)
                if objects is not None:
                    return objects
        except OSError as error:
            raise NftError(f"reading table inet {TABLE}: {error.strerror or error}") from error
        raise NftError(f"nf_tables changed during each of {_DUMP_ATTEMPTS} readings")

    def _dump_once(self, message: int, request: bytes) -> list[dict[int, bytes]] | None:
        """None: interrupted by a change."""
        self._sequence += 1
        payload = _NFGENMSG.pack(_NFPROTO_INET, 0, 0) + request
        kind = _NFNL_SUBSYS_NFTABLES << 8 | message
        header = _NLMSG.pack(_NLMSG.size + len(payload), kind, _NLM_F_REQUEST | _NLM_F_DUMP, self._sequence, 0)
        self._netlink.send(header + payload)
        objects: list[dict[int, bytes]] = []
        interrupted = False
        while True:
            received = memoryview(self._netlink.recv(_RECEIVE_BYTES))
            while received:
                length, kind, flags, sequence, _ = _NLMSG.unpack_from(received)
                body = received[_NLMSG.size : length]
                received = received[(length + 3) & ~3 :]
                if sequence != self._sequence:
                    continue  # of a reading that timed out
                interrupted |= bool(flags & _NLM_F_DUMP_INTR)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    code = -_STATUS.unpack_from(body)[0]
                    if code == errno.EINTR:
                        return None
                    if code:
                        raise NftError(f"reading table inet {TABLE}: {os.strerror(code)}")
                    return None if interrupted else objects
                objects.append(dict(_attributes(body[_NFGENMSG.size :])))


def _attribute(kind: int, value: bytes) -> bytes:
    return _NLA.pack(_NLA.size + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _attributes(data: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _NLA.size <= len(data):
        length, kind = _NLA.unpack_from(data, at)
        yield kind & _NLA_TYPE_MASK, bytes(data[at + _NLA.size : at + length])
        at += (length + 3) & ~3


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode()
