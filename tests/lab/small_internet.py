"""The lab's internet where knot, unbound and registries are too heavy: the same names and addresses, one process.

DNS over UDP on the resolver's addresses; on the registries' ports a server that says one line of HTTP. No TLS, no
images: enough for clients that ask for a name and connect, like the lab's agents.
"""

from __future__ import annotations

import asyncio
import re
import sys

import dns.flags
import dns.message
import dns.name
import dns.rdatatype
import dns.rrset
import dns.zone

from tests.lab import internet
from tests.lab.lab import RESOLVER, RESOLVER6, Lab, poll

_PORTS = (443, 5000, 8443)
_FRESH = re.compile(r"n([0-9]{5,7})\.fresh\.allowed\.test\.")
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"
_LONGEST_CHAIN = 8


def start(lab: Lab) -> None:
    """Start it in the lab and wait until it answers there and on the host."""
    server = lab.spawn("net", [sys.executable, "-m", "tests.lab.small_internet"], "small-internet")

    def answers() -> bool:
        if server.poll() is not None:
            raise RuntimeError(f"the small internet has ended:\n{lab.log('small-internet')}")
        try:
            return bool(lab.host.call("resolve", name="registry.allowed.test"))
        except OSError:
            return False

    poll("DNS answers on the host", answers)
    for port in _PORTS:
        poll(f"the server on {port}", lambda port=port: lab.net.attempt("127.0.0.1", port).reached)  # type: ignore[misc]


# --- DNS -------------------------------------------------------------------------------------------------------------
def _zones() -> list[dns.zone.Zone]:
    zones = []
    for name, records in internet.ZONES.items():
        lines = "\n".join(line.strip() for line in records.splitlines())
        zones.append(dns.zone.from_text(internet.SOA.format(name) + lines + "\n", origin=name, relativize=False))
    return zones


class _Resolver(asyncio.DatagramProtocol):
    """Answers from the zones, CNAMEs followed across them."""

    def __init__(self, zones: list[dns.zone.Zone]) -> None:
        self._zones = zones

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str | int, ...]) -> None:
        query = dns.message.from_wire(data)
        (question,) = query.question
        if question.name.is_subdomain(dns.name.from_text("silent.allowed.test")):
            return  # questions that stay open, for those who would like to answer them
        response = dns.message.make_response(query, recursion_available=True)
        name = question.name
        for _ in range(_LONGEST_CHAIN):
            found = self._find(name, question.rdtype) or self._find(name, dns.rdatatype.CNAME)
            if found is None:
                break
            response.answer.append(found)
            if found.rdtype == question.rdtype:
                break
            name = found[0].target
        self._transport.sendto(response.to_wire(), address)

    def _find(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> dns.rrset.RRset | None:
        """The records of a name, from itself or from the wildcard above it."""
        if (fresh := _FRESH.fullmatch(name.to_text())) and kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
            address = internet.fresh_address(int(fresh[1]), 4 if kind == dns.rdatatype.A else 6)
            return dns.rrset.from_text(name, 300, "IN", kind, address)
        wildcard = dns.name.Name((b"*", *name.labels[1:]))
        for zone in self._zones:
            if not name.is_subdomain(zone.origin or dns.name.root):
                continue
            node = zone.get_node(name) or zone.get_node(wildcard)
            rdataset = node.get_rdataset(dns.rdataclass.IN, kind) if node is not None else None
            if rdataset is not None:
                return dns.rrset.from_rdata_list(name, rdataset.ttl, list(rdataset))
        return None


# --- registries ------------------------------------------------------------------------------------------------------
async def _serve_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request of any kind, one answer."""
    try:
        if await reader.read(4096):
            writer.write(_ANSWER)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    zones = _zones()
    for address in (RESOLVER, RESOLVER6):
        await loop.create_datagram_endpoint(lambda: _Resolver(zones), local_addr=(address, 53))
    servers = [await asyncio.start_server(_serve_once, ["0.0.0.0", "::"], port) for port in _PORTS]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(_serve())
