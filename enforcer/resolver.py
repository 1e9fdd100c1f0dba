"""The daemon's own questions to the trusted resolvers.

Clients that cached an answer before enforcement began never ask again, and BPF cannot read every answer whole; so the
daemon asks for itself. Its queries leave through the same interfaces as everybody's, over a connected socket with a
random port and transaction id.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Sequence

from enforcer.policy import Address

DNS_PORT = 53
UDP_DEADLINE_SECONDS = 2.0
TCP_DEADLINE_SECONDS = 4.0
MAX_UDP_BYTES = 65_535
TRUNCATED = 0x0200  # RFC 1035 section 4.1.1, flags


class NoAnswerError(Exception):
    """No resolver answered; the message says what each of them did."""


async def ask(query: bytes, resolvers: Sequence[Address]) -> tuple[bytes, Address]:
    """The first resolver's answer to `query` (a DNS message) and which one gave it; over TCP when it was truncated.

    Only bytes from the resolver's own address, to our own port, with our transaction id count. The caller parses them
    and checks the question. Raises NoAnswerError when none of `resolvers` answers within its deadline.
    """
    failures = []
    for resolver in resolvers:
        try:
            async with asyncio.timeout(UDP_DEADLINE_SECONDS):
                wire = await _ask_udp(query, resolver)
            if struct.unpack_from("!H", wire, 2)[0] & TRUNCATED:
                async with asyncio.timeout(TCP_DEADLINE_SECONDS):
                    wire = await _ask_tcp(query, resolver)
        except TimeoutError:
            failures.append(f"{resolver}: no answer in time")
        except (OSError, asyncio.IncompleteReadError) as error:
            failures.append(f"{resolver}: {error}")
        else:
            return wire, resolver
    raise NoAnswerError("; ".join(failures) or "no resolver is known")


def _family(resolver: Address) -> socket.AddressFamily:
    return socket.AF_INET if resolver.version == 4 else socket.AF_INET6


async def _ask_udp(query: bytes, resolver: Address) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(_family(resolver), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as udp:
        # Connected: the kernel drops what comes from elsewhere and reports a closed port at once.
        await loop.sock_connect(udp, (str(resolver), DNS_PORT))
        await loop.sock_sendall(udp, query)
        while True:
            wire = await loop.sock_recv(udp, MAX_UDP_BYTES)
            if len(wire) >= 12 and wire[:2] == query[:2]:
                return wire


async def _ask_tcp(query: bytes, resolver: Address) -> bytes:
    reader, writer = await asyncio.open_connection(str(resolver), DNS_PORT, family=_family(resolver))
    try:
        writer.write(struct.pack("!H", len(query)) + query)
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        wire = await reader.readexactly(length)
        if len(wire) < 12 or wire[:2] != query[:2]:
            raise OSError(errno.EPROTO, "the answer is not to our query")
        return wire
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
