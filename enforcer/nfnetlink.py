"""Messages of nfnetlink, as bytes: what the kernel's log and its connection tracking have in common."""

from __future__ import annotations

import struct
from collections.abc import Iterator

# include/uapi/linux/netlink.h, netfilter/nfnetlink.h
NETLINK_NETFILTER = 12
REQUEST, ACK, DUMP = 0x01, 0x04, 0x300
ERROR, DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_FAMILY = struct.Struct("!BBH")  # family, version, resource: nflog's group
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_TYPE_MASK = 0x3FFF
_STATUS = struct.Struct("=i")


def request(
    kind: int, flags: int, attributes: bytes = b"", *, resource: int = 0, sequence: int = 0, family: int = 0
) -> bytes:
    """A message to the kernel; family 0 is every one."""
    body = _FAMILY.pack(family, 0, resource) + attributes
    return _HEADER.pack(_HEADER.size + len(body), kind, flags | REQUEST, sequence, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + b"\0" * (-len(value) % 4)


def messages(datagram: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, sequence, what follows the header) of each message."""
    at = 0
    while at + _HEADER.size <= len(datagram):
        length, kind, _, sequence, _ = _HEADER.unpack_from(datagram, at)
        yield kind, sequence, datagram[at + _HEADER.size : at + length]
        at += max(length + 3 & ~3, _HEADER.size)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes of a nested one; of one kind the last."""
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += max(length + 3 & ~3, _ATTRIBUTE.size)
    return found


def message_attributes(body: bytes) -> dict[int, bytes]:
    """The attributes of a message of nfnetlink."""
    return attributes(body[_FAMILY.size :])


def error_number(body: bytes) -> int:
    """The errno of what follows the header of ERROR or DONE; 0 is yes."""
    return -int(_STATUS.unpack_from(body)[0])
