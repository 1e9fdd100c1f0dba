"""Packets, built by hand: Ethernet frames as BPF_PROG_TEST_RUN takes them. No checksums; nothing here verifies any."""

from __future__ import annotations

import struct

from enforcer.kernel_abi import Protocol
from enforcer.policy import Address

HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS = 0, 43, 44, 60
MORE_FRAGMENTS = 0x2000


def udp(source_port: int, destination_port: int, payload: bytes, *, length: int | None = None) -> bytes:
    """`length`: what the header claims, if it lies."""
    return struct.pack("!4H", source_port, destination_port, length or 8 + len(payload), 0) + payload


def tcp(
    source_port: int, destination_port: int, payload: bytes = b"", *, flags: int = 0x18, options: bytes = b""
) -> bytes:
    """PSH|ACK unless `flags` says otherwise; `options` in whole words."""
    offset = (5 + len(options) // 4) << 4
    head = struct.pack("!HHIIBBHHH", source_port, destination_port, 1, 1, offset, flags, 64_000, 0, 0)
    return head + options + payload


def message(wire: bytes) -> bytes:
    """A DNS message as TCP carries it."""
    return struct.pack("!H", len(wire)) + wire


def extension(next_header: int, *, words: int = 0) -> bytes:
    """An IPv6 hop-by-hop, routing or destination options header of 8 * (words + 1) bytes."""
    return bytes([next_header, words]) + bytes(6 + 8 * words)


def fragment(next_header: int, *, offset: int = 0, more: bool = False) -> bytes:
    """An IPv6 fragment header; `offset` in units of 8 bytes."""
    return struct.pack("!BBHI", next_header, 0, offset << 3 | more, 77)


def frame(
    source: Address,
    destination: Address,
    protocol: Protocol,
    transport: bytes,
    *,
    options: bytes = b"",
    fragmentation: int = 0,
    extensions: tuple[int, bytes] | None = None,
) -> bytes:
    """`options`, `fragmentation` (flags and offset): of IPv4. `extensions`: of IPv6, the first one's number and all."""
    if source.version == 4:
        head = struct.pack(
            "!BBHHHBBH4s4s",
            *(0x45 + len(options) // 4, 0, 20 + len(options) + len(transport), 7, fragmentation, 64, protocol, 0),
            *(source.packed, destination.packed),
        )
        return bytes(12) + b"\x08\x00" + head + options + transport
    first, chain = extensions or (protocol, b"")
    head = struct.pack("!IHBB16s16s", 6 << 28, len(chain + transport), first, 64, source.packed, destination.packed)
    return bytes(12) + b"\x86\xdd" + head + chain + transport
