"""DNS messages: wire bytes in, what they say about addresses out.

The full parser, on dnspython's primitives and their only user. BPF (bpf/dns.h) reads the same packets and believes
less: what it learns is a subset of what `parse_answer` returns. So this one is lenient where that is harmless (a record
that is damaged, out of order or of another kind is passed over) and strict about how an address is reached: from the
question through CNAMEs of class IN to a record of the type that was asked for.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.wire

from enforcer.kernel_abi import RangeClass
from enforcer.policy import Address, Network

HEADER = struct.Struct("!6H")  # RFC 1035 section 4.1.1: id, flags, then how many questions, answers, ...
QUERY_PAYLOAD_BYTES = 1232  # of our own queries: what no path fragments (dnsflagday.net/2020)
_POINTER = 0xC0
ADDRESS_TYPES: dict[int, type[IPv4Address] | type[IPv6Address]] = {
    dns.rdatatype.A: IPv4Address,
    dns.rdatatype.AAAA: IPv6Address,
}
_MAX_TTL_SECONDS = 0x7FFFFFFF  # more counts as 0 (RFC 2181 section 8)


class DnsAnswerError(Exception):
    """The bytes are no DNS answer to one question; the sender's fault, and nothing may be learned from them."""


@dataclass(frozen=True, slots=True)
class AnswerAddress:
    """One address record of the answer."""

    address: Address
    ttl_seconds: int


@dataclass(frozen=True, slots=True)
class DnsAnswer:
    """What one answer says. Names are lower case without a trailing dot, in A-label form."""

    question: str
    rdtype: int
    aliases: tuple[str, ...]  # names the question is an alias of, nearest first (CNAME)
    addresses: tuple[AnswerAddress, ...]  # of the question or an alias, as the message has them; may repeat
    resolver: Address
    truncated: bool  # the resolver has more to say over TCP


def parse_answer(wire: bytes, resolver: Address) -> DnsAnswer:
    """The addresses that `resolver` gave for the one question in `wire`; DnsAnswerError if it is no such answer.

    An error code (RFC 1035 RCODE) means no addresses, and so does any other question than one for A or AAAA.
    """
    flags, records, parser, question, rdtype = _read_head(wire)
    if not flags & dns.flags.QR:
        raise DnsAnswerError("a query, not an answer")
    targets: dict[dns.name.Name, list[dns.name.Name]] = {}
    found: list[tuple[dns.name.Name, AnswerAddress]] = []
    if flags & 0xF == 0 and rdtype in ADDRESS_TYPES:
        for _ in range(records):
            try:
                owner, kind, ttl_seconds, value = _read_record(parser)
            except dns.exception.DNSException:
                break  # cut: where a next record would begin is not known
            if owner is None:
                continue
            if isinstance(value, dns.name.Name):
                targets.setdefault(owner, []).append(value)
            elif value is not None and kind == rdtype:
                found.append((owner, AnswerAddress(value, ttl_seconds)))
    chain = {question: None}
    reached = [question]
    for name in reached:
        for target in targets.get(name, ()):
            if target not in chain:
                chain[target] = None
                reached.append(target)
    return DnsAnswer(
        question=_text(question),
        rdtype=rdtype,
        aliases=tuple(name.to_text(omit_final_dot=True).lower() for name in reached[1:]),
        addresses=tuple(address for owner, address in found if owner in chain),
        resolver=resolver,
        truncated=bool(flags & dns.flags.TC),
    )


def parse_question(wire: bytes) -> str:
    """The name that is asked for, of a message that may be cut behind its question; DnsAnswerError if even that is."""
    _, _, _, question, _ = _read_head(wire)
    return _text(question)


def build_query(name: str, rdtype: int) -> bytes:
    """A recursive query with a random transaction id for a name in A-label form."""
    query = dns.message.make_query(name, dns.rdatatype.RdataType.make(rdtype), use_edns=0, payload=QUERY_PAYLOAD_BYTES)
    return bytes(query.to_wire())


def _read_head(wire: bytes) -> tuple[int, int, dns.wire.Parser, dns.name.Name, int]:
    """Flags, number of answer records, a parser that stands at the first of them, question name and type."""
    if len(wire) < HEADER.size:
        raise DnsAnswerError(f"{len(wire)} bytes, a header has {HEADER.size}")
    _, flags, questions, records, _, _ = HEADER.unpack_from(wire)
    if flags & 0x7800:
        raise DnsAnswerError("not a standard query (OPCODE)")
    if questions != 1:
        raise DnsAnswerError(f"{questions} questions, which of them is answered?")
    parser = dns.wire.Parser(wire, HEADER.size)
    try:
        question = dns.name.from_wire_parser(parser)
        rdtype, rdclass = parser.get_struct("!HH")
    except dns.exception.DNSException as error:
        raise DnsAnswerError(f"the question: {error or type(error).__name__}") from None
    if rdclass != dns.rdataclass.IN:
        raise DnsAnswerError(f"class {rdclass}, not IN")
    _text(question)
    return flags, records, parser, question, rdtype


def _text(name: dns.name.Name) -> str:
    """Lower case, no trailing dot. A label with a dot or a NUL would read as another name than it is."""
    if any(b"." in label or b"\0" in label for label in name.labels):
        raise DnsAnswerError(f"a dot or a NUL inside a label of {name}")
    return name.to_text(omit_final_dot=True).lower()


def _read_record(
    parser: dns.wire.Parser,
) -> tuple[dns.name.Name | None, int, int, Address | dns.name.Name | None]:
    """Owner, type, TTL in seconds and value of the next record; None for what is damaged or of no use here.

    Raises DNSException when the record's end is not known.
    """
    start = parser.current
    _skip_name(parser)
    owner = _name(dns.wire.Parser(parser.wire, start))
    rdtype, rdclass, ttl_seconds, size = parser.get_struct("!HHIH")
    data_at = parser.current
    data = parser.get_bytes(size)
    value: Address | dns.name.Name | None = None
    if rdclass == dns.rdataclass.IN:
        if rdtype == dns.rdatatype.CNAME:
            # Nothing of the message behind the data counts, and nothing of the data may be left over.
            inner = dns.wire.Parser(parser.wire[: parser.current], data_at)
            target = _name(inner)
            value = target if inner.remaining() == 0 else None
        elif rdtype in ADDRESS_TYPES:
            with contextlib.suppress(ValueError):  # of another length
                value = ADDRESS_TYPES[rdtype](data)
    return owner, rdtype, ttl_seconds if ttl_seconds <= _MAX_TTL_SECONDS else 0, value


def _name(parser: dns.wire.Parser) -> dns.name.Name | None:
    try:
        return dns.name.from_wire_parser(parser)
    except dns.exception.DNSException:
        return None


def _skip_name(parser: dns.wire.Parser) -> None:
    """To the end of a name, wherever its pointer leads."""
    while length := parser.get_uint8():
        if length >= _POINTER:
            parser.get_uint8()
            return
        if length > 63:
            raise dns.name.BadLabelType
        parser.get_bytes(length)


# --- what an address is ----------------------------------------------------------------------------------------------
# IANA's special-purpose registries (RFC 6890 and its updates). Documentation ranges are not among them: nobody answers
# there, and laboratories use them as the public Internet. The host's own addresses are the daemon's to add.
_NEVER_V4 = (
    "0.0.0.0/8",  # "this network"; Linux connects 0.0.0.0 to itself
    "127.0.0.0/8",
    "169.254.0.0/16",  # link-local; clouds' metadata services
    "192.0.0.0/24",  # protocol assignments
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, broadcast
)
_PRIVATE_V4 = (
    "10.0.0.0/8",
    "100.64.0.0/10",  # carrier-grade NAT; Tailscale
    "172.16.0.0/12",
    "192.168.0.0/16",
    "198.18.0.0/15",  # benchmarks; some local proxies answer with it
)
_NEVER_V6 = (
    "::/96",  # unspecified, loopback, IPv4-compatible
    "100::/64",  # discard
    "2001::/32",  # Teredo, which embeds IPv4
    "2002::/16",  # 6to4, likewise
    "fe80::/10",  # link-local
    "ff00::/8",  # multicast
)
_PRIVATE_V6 = (
    "64:ff9b:1::/48",  # local NAT64
    "fc00::/7",
    "fec0::/10",  # site-local, deprecated
)
_NAT64 = int(IPv6Address("64:ff9b::"))  # RFC 6052: the last 32 bits are an IPv4 address


def _ranges() -> tuple[tuple[Network, RangeClass], ...]:
    ranges: list[tuple[Network, RangeClass]] = []
    for never, texts in (True, _NEVER_V4 + _NEVER_V6), (False, _PRIVATE_V4 + _PRIVATE_V6):
        range_class = RangeClass.NEVER if never else RangeClass.PRIVATE
        for network in map(ip_network, texts):
            ranges.append((network, range_class))
            if isinstance(network, IPv4Network):
                behind_nat64 = IPv6Network((_NAT64 | int(network.network_address), 96 + network.prefixlen))
                ranges.append((behind_nat64, range_class))
    return tuple(ranges)


SPECIAL_RANGES = _ranges()  # disjoint; for the `ranges` map
# The same as numbers: (address, mask, class) by version. A reload classifies all that is held.
_NUMBERS = {
    version: tuple(
        (int(network.network_address), int(network.netmask), range_class)
        for network, range_class in SPECIAL_RANGES
        if network.version == version
    )
    for version in (4, 6)
}


def classify_address(address: Address) -> RangeClass | None:
    """Whether an answer with `address` may teach; None: any allowed name may.

    An IPv4-mapped IPv6 address never may: no resolver has a reason to answer with one.
    """
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return RangeClass.NEVER
    number = int(address)
    for network, mask, range_class in _NUMBERS[address.version]:
        if number & mask == network:
            return range_class
    return None
