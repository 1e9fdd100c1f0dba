"""A resolver of the lab whose answers are as odd as the name that is asked for wants them.

    ANY.LABELS.192-0-2-1.KIND.odd.allowed.test     an answer of this kind that says: A 192.0.2.1

Over UDP and TCP, on the address that is its argument. The kinds are the methods of `Odd`; "slow" and "slower" are plain
ones that take their time, "split" is plain in many segments of TCP. Every other name, allowed or not, has the address
`address_of` it.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import dns.flags
import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from tests.lab.lab import Lab, poll

ZONE = "odd.allowed.test"
SLOW_SECONDS = {"slow": 0.05, "slower": 0.5}
PIECE_BYTES = 20  # of a TCP answer; each is a segment

Wires = Iterator[bytes]


def name_of(kind: str, address: str) -> str:
    """The name whose answer is of this kind, and says this address."""
    return f"{address.replace('.', '-')}.{kind}.{ZONE}"


def address_of(name: str) -> str:
    """What every other name resolves to."""
    return str(IPv4Address("198.18.96.0") + zlib.crc32(name.encode()) % 8192)


def start(lab: Lab, *addresses: str) -> None:
    """Start one in the lab's internet on each of these, and wait until they answer."""
    for address in addresses:
        lab.ip("net", f"addr add {address}/32 dev lo")
        log = f"odd-resolver-{address}"
        server = lab.spawn("net", [sys.executable, "-m", "tests.lab.odd_resolver", address], log)

        def answers(address: str = address, server: object = server, log: str = log) -> bool:
            return "answering" in lab.log(log)

        poll(f"the resolver on {address}", answers)


class Odd:
    """The answers to one query over one protocol; each yields what is sent, a datagram or a message at a time."""

    def __init__(self, query: dns.message.Message, address: str) -> None:
        self.query = query
        self.name = query.question[0].name
        self.address = address

    def reply(self, *records: tuple[str, str, str], ttl: int = 300) -> dns.message.Message:
        """(owner, type, data): the owner "@" is the name that was asked for."""
        message = dns.message.make_response(self.query, recursion_available=True)
        for owner, kind, data in records:
            at = self.name if owner == "@" else dns.name.from_text(owner)
            message.answer.append(dns.rrset.from_text(at, ttl, "IN", kind, data))
        return message

    def plain(self) -> Wires:
        """As any resolver would."""
        yield self.reply(("@", "A", self.address)).to_wire()

    slow = slower = plain

    def immortal(self) -> Wires:
        """TTL 0."""
        yield self.reply(("@", "A", self.address), ttl=0).to_wire()

    def twice(self) -> Wires:
        """A second answer, with the address behind."""
        yield from self.plain()
        yield self.reply(("@", "A", str(IPv4Address(self.address) + 1))).to_wire()

    def alias(self) -> Wires:
        """Through names that no policy knows."""
        yield self.reply(
            ("@", "CNAME", "a.cdn.example."), ("a.cdn.example.", "CNAME", "b.cdn.example."),
            ("b.cdn.example.", "A", self.address),
        ).to_wire()  # fmt: skip

    def stray(self) -> Wires:
        """A chain that begins elsewhere than at the question."""
        yield self.reply(("evil.test.", "CNAME", "b.cdn.example."), ("b.cdn.example.", "A", self.address)).to_wire()

    def loop(self) -> Wires:
        """Aliases in a circle, beside an address of neither."""
        yield self.reply(
            ("@", "CNAME", "a.cdn.example."), ("a.cdn.example.", "CNAME", self.name.to_text()),
            ("evil.test.", "A", self.address),
        ).to_wire()  # fmt: skip

    def pointers(self) -> Wires:
        """The record's owner is a compression pointer to itself."""
        wire = bytearray(self.reply(("@", "A", self.address)).to_wire())
        at = wire.rindex(b"\xc0\x0c\x00\x01")
        wire[at : at + 2] = struct.pack("!H", 0xC000 | at)
        yield bytes(wire)

    def swapped(self) -> Wires:
        """0x20: letters in another case than they were asked in."""
        message = self.reply(("@", "A", self.address))
        message.question[0].name = dns.name.Name([label.swapcase() for label in self.name.labels])
        yield message.to_wire()

    def other(self) -> Wires:
        """Of another question, though an allowed one."""
        message = self.reply(("@", "A", self.address))
        message.question[0].name = dns.name.from_text(f"other.{ZONE}")
        yield message.to_wire()

    def questions(self) -> Wires:
        """Two questions."""
        message = self.reply(("@", "A", self.address))
        message.question.append(dns.rrset.RRset(dns.name.from_text("evil.test."), dns.rdataclass.IN, dns.rdatatype.A))
        yield message.to_wire()

    def many(self) -> Wires:
        """30 records, the last with the address."""
        first = IPv4Address("198.18.92.0")
        yield self.reply(*(("@", "A", str(first + n)) for n in range(29)), ("@", "A", self.address)).to_wire()

    def fragments(self) -> Wires:
        """3 kB, which leave in fragments, the last record with the address."""
        first = IPv4Address("198.18.93.0")
        records = (("@", "A", str(first + n)) for n in range(190))
        yield self.reply(*records, ("@", "A", self.address)).to_wire(max_size=4096)

    def truncated(self) -> Wires:
        """Nothing but the flag that says to ask over TCP."""
        message = self.reply()
        message.flags |= dns.flags.TC
        yield message.to_wire()


def answer(wire: bytes, tcp: bool) -> tuple[float, list[bytes]]:
    """(seconds to wait, what to send) for one query."""
    query = dns.message.from_wire(wire, one_rr_per_rrset=True)
    name = query.question[0].name.to_text(omit_final_dot=True).lower()
    *_, address, kind = ["", "", *name.removesuffix(f".{ZONE}").split(".")]
    if query.question[0].rdtype != dns.rdatatype.A:
        return 0, [dns.message.make_response(query, recursion_available=True).to_wire()]
    odd = Odd(query, address.replace("-", "."))
    kinds: dict[str, Callable[[], Wires]] = {name: getattr(odd, name) for name in vars(Odd) if name != "reply"}
    if not name.endswith(f".{ZONE}") or kind not in kinds:
        return 0, list(Odd(query, address_of(name)).plain())
    if tcp and kind in ("truncated", "twice"):
        kind = "plain"
    return SLOW_SECONDS.get(kind, 0), list(kinds[kind]())


class _Datagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str | int, ...]) -> None:
        wait, wires = answer(data, tcp=False)

        def send() -> None:
            for wire in wires:
                self._transport.sendto(wire, address)

        asyncio.get_running_loop().call_later(wait, send) if wait else send()


async def _stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Every query of the connection. The answers to what came at once leave at once, unless the kind is "split"."""
    try:
        while True:
            wires: list[bytes] = []
            split = False
            while not wires or reader._buffer:  # type: ignore[attr-defined]
                (length,) = struct.unpack("!H", await reader.readexactly(2))
                query = await reader.readexactly(length)
                split = split or b"\x05split" in query
                query = query.replace(b"\x05split", b"\x05plain")
                wires += [struct.pack("!H", len(wire)) + wire for wire in answer(query, tcp=True)[1]]
            stream = b"".join(wires)
            if split:
                stream = stream.replace(b"\x05plain", b"\x05split")
            step = PIECE_BYTES if split else len(stream)
            for at in range(0, len(stream), step):
                writer.write(stream[at : at + step])
                await writer.drain()
                await asyncio.sleep(0.002 if split else 0)  # asyncio sets TCP_NODELAY: each write is a segment
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def _serve(address: str) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(_Datagrams, local_addr=(address, 53))
    server = await asyncio.start_server(_stream, address, 53)
    print("answering", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
