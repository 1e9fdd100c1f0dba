"""The connections that the kernel tracks in this network namespace, read over netlink."""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import ip_address

from enforcer.kernel_abi import Protocol
from enforcer.nfnetlink import (
    DONE,
    DUMP,
    ERROR,
    NETLINK_NETFILTER,
    attribute,
    attributes,
    error_number,
    message_attributes,
    messages,
    request,
)
from enforcer.policy import Address

# include/uapi/linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_TUPLE_ORIGINAL, _TUPLE_REPLY = 1, 2
_NESTED = 1 << 15  # NLA_F_NESTED
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2
_IPV4_SOURCE, _IPV4_DESTINATION, _IPV6_SOURCE, _IPV6_DESTINATION = 1, 2, 3, 4
_PROTOCOL_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_RECEIVE_BYTES = 65_536
_TIMEOUT_SECONDS = 5


def tcp_destinations() -> set[tuple[Address, int]]:
    """Where TCP connections of this host and through it lead, after translation. OSError if the kernel does not tell.

    Blocks: some microseconds for each connection.
    """
    return {destination for _, destination in tcp_connections()}


def tcp_connections() -> set[tuple[tuple[Address, int], tuple[Address, int]]]:
    """(source, destination) of each of them as it leaves this host, after translation. Raises and blocks alike."""
    found: set[tuple[bytes, bytes, bytes, bytes]] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as kernel:
        kernel.settimeout(_TIMEOUT_SECONDS)
        kernel.send(request(_GET, DUMP))
        while True:
            for kind, _, body in messages(kernel.recv(_RECEIVE_BYTES)):
                if kind in (ERROR, DONE):
                    if code := error_number(body):
                        raise OSError(code, os.strerror(code))
                    return {(_endpoint(*each[:2]), _endpoint(*each[2:])) for each in found}
                # The answers come from where the packets really go, and go where they really come from.
                reply = attributes(message_attributes(body).get(_TUPLE_REPLY, b""))
                protocol = attributes(reply.get(_TUPLE_PROTOCOL, b""))
                if protocol.get(_PROTOCOL_NUMBER) == bytes((Protocol.TCP,)):
                    addresses = attributes(reply.get(_TUPLE_IP, b""))
                    far = addresses.get(_IPV4_SOURCE) or addresses.get(_IPV6_SOURCE)
                    near = addresses.get(_IPV4_DESTINATION) or addresses.get(_IPV6_DESTINATION)
                    if far and near and protocol.keys() >= {_SOURCE_PORT, _DESTINATION_PORT}:
                        found.add((near, protocol[_DESTINATION_PORT], far, protocol[_SOURCE_PORT]))


def original_source(source: tuple[Address, int], destination: tuple[Address, int]) -> tuple[Address, int] | None:
    """Where a TCP connection, as it arrives at its destination, comes from; None if the kernel does not know it.

    Its port is another than its client's where two connections would else be the same after translation. OSError if the
    kernel does not tell. Some microseconds.
    """
    version = destination[0].version
    kinds = (_IPV4_SOURCE, _IPV4_DESTINATION) if version == 4 else (_IPV6_SOURCE, _IPV6_DESTINATION)
    addresses = attribute(kinds[0], destination[0].packed) + attribute(kinds[1], source[0].packed)
    ports = (
        attribute(_PROTOCOL_NUMBER, bytes((Protocol.TCP,)))
        + attribute(_SOURCE_PORT, destination[1].to_bytes(2, "big"))
        + attribute(_DESTINATION_PORT, source[1].to_bytes(2, "big"))
    )
    reply = attribute(_NESTED | _TUPLE_IP, addresses) + attribute(_NESTED | _TUPLE_PROTOCOL, ports)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as kernel:
        kernel.settimeout(_TIMEOUT_SECONDS)
        kernel.send(request(_GET, 0, attribute(_NESTED | _TUPLE_REPLY, reply), family=family))
        for kind, _, body in messages(kernel.recv(_RECEIVE_BYTES)):
            if kind in (ERROR, DONE):
                if (code := error_number(body)) not in (0, errno.ENOENT):
                    raise OSError(code, os.strerror(code))
                return None
            original = attributes(message_attributes(body).get(_TUPLE_ORIGINAL, b""))
            found = attributes(original.get(_TUPLE_IP, b""))
            address = found.get(_IPV4_SOURCE) or found.get(_IPV6_SOURCE)
            port = attributes(original.get(_TUPLE_PROTOCOL, b"")).get(_SOURCE_PORT)
            if address and port:
                return _endpoint(address, port)
    return None


def _endpoint(address: bytes, port: bytes) -> tuple[Address, int]:
    return ip_address(address), int.from_bytes(port, "big")
