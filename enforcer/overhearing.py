"""DNS overheard on the wire: packets in, what the daemon has to read out.

Takes the place of the BPF programs `track_query` and `learn` where they cannot be attached, and decides as they do
(bpf/packet.h, bpf/dns.h): an answer counts only if it comes from port 53 of a trusted resolver and answers a question
that was seen leaving - resolver, client, client's port, transaction id, protocol, name, type and class - not longer ago
than QUERY_WINDOW_SECONDS, once. What is no such answer teaches nothing.

No address is learned here. An event says "read this", its `inserted` is always 0 and the permissions come from the
daemon's own parser: nothing has been permitted by then that it could disagree with. Outcomes mean what they mean for
BPF, with one difference: a whole answer whose records BPF cannot place is UNREADABLE there and is read here, so that it
is LEARNED, REPEATED or NO_ADDRESS. UNREADABLE is left for what is not all there (truncated, cut, a first fragment): the
daemon reads the part and asks for the name itself. EVENT_LOST is never counted; who reads the packets knows the loss.

Addresses are the 16 bytes of kernel_abi.pack_address. Times are nanoseconds on one clock, passed in.
"""

from __future__ import annotations

import itertools
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from enforcer.dns_answer import ADDRESS_TYPES, DnsAnswer, DnsAnswerError, parse_answer
from enforcer.kernel_abi import (
    LOOPBACK_IFINDEX,
    MAX_QUERIES,
    MAX_WIRE_BYTES,
    QUERY_WINDOW_SECONDS,
    DnsEvent,
    Outcome,
    Protocol,
    pack_address,
    unpack_address,
)
from enforcer.learned import LearnedAddress
from enforcer.policy import Address

_NANOSECONDS = 1_000_000_000
_QUERY_WINDOW_NS = QUERY_WINDOW_SECONDS * _NANOSECONDS

# --- packets, as in bpf/packet.h ---
_DNS_PORT = 53
_IPV4_HEADER_BYTES, _IPV6_HEADER_BYTES = 20, 40
_UDP_HEADER_BYTES, _TCP_HEADER_BYTES = 8, 20
_IPV4_MAPPED = bytes(10) + b"\xff\xff"
_IPV4_OFFSET_MASK, _IPV4_MORE_FRAGMENTS = 0x1FFF, 0x2000
_IPV6_OFFSET_MASK, _IPV6_MORE_FRAGMENTS = 0xFFF8, 0x0001
_IPV6_FRAGMENT = 44
_IPV6_EXTENSIONS = frozenset({0, 43, _IPV6_FRAGMENT, 60})  # hop-by-hop, routing, fragment, destination options
_MAX_EXTENSIONS = 4  # before the transport
_PORTS = struct.Struct("!HH")

# --- messages, as in bpf/dns.h ---
_MAX_MESSAGES = 2  # in one TCP segment: glibc sends the questions for A and AAAA together
_HEADER = struct.Struct("!2s5H")  # RFC 1035 section 4.1.1
_QUESTION_END = struct.Struct("!HH")  # type, class
_MAX_LABEL_BYTES = 63
_MAX_WIRE_NAME = 255
_LABEL_BYTES_A_STEP = 8
_MAX_NAME_STEPS = 95  # BPF has no more for an answer's question; only names of some hundred labels take them
_FLAG_ANSWER, _FLAGS_OPCODE, _FLAG_TRUNCATED = 0x8000, 0x7800, 0x0200
_CLASS_IN = 1


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet as it passed an interface."""

    at_ns: int
    interface: int  # index
    leaving: bool  # else arriving; on lo every packet does both
    data: bytes  # from the network header on; the packet's own lengths say where it ends


@dataclass(frozen=True, slots=True)
class _Query:
    """A question under way. Compared as it is, where BPF has room for a hash only."""

    question: bytes  # as of _question()
    asked_at_ns: int


@dataclass(frozen=True, slots=True)
class _Segment:
    """A packet of UDP or TCP. Offsets in bytes from the network header."""

    source: bytes
    destination: bytes
    protocol: Protocol
    source_port: int
    destination_port: int
    payload: int
    end: int  # of the packet, by its IP header
    datagram_end: int  # UDP: by its UDP header, beyond `end` in a fragment; TCP: `end`
    fragment: bool  # more follow


# protocol, whether through lo, resolver, client, client's port, transaction id
_QueryKey = tuple[Protocol, bool, bytes, bytes, int, bytes]


class Overhearing:
    """The questions under way, at most MAX_QUERIES, and what became of the answers.

    listed(name): whether the policy covers a lower-case name without trailing dot. permissions(answer, now in seconds):
    what the daemon would permit because of an answer. held(permission): whether it holds that already, for about as
    long. All three are asked anew for each answer, so a policy that changes needs no word here.
    """

    def __init__(
        self,
        listed: Callable[[str], bool],
        permissions: Callable[[DnsAnswer, float], Collection[LearnedAddress]],
        held: Callable[[LearnedAddress], bool],
    ) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self._listed = listed
        self._permissions = permissions
        self._held = held
        self._trusted: frozenset[bytes] = frozenset()
        self._retired: frozenset[bytes] = frozenset()
        self._queries: OrderedDict[_QueryKey, _Query] = OrderedDict()  # least recently asked first

    def trust(self, resolvers: Iterable[Address], retired: Iterable[Address] = ()) -> None:
        """Answers of these count from now on and no others; of `retired` those to questions that are under way."""
        self._trusted = frozenset(map(pack_address, resolvers))
        self._retired = frozenset(map(pack_address, retired)) - self._trusted

    def __len__(self) -> int:
        """Questions under way, and those that nobody answered."""
        return len(self._queries)

    def hear(self, packet: Packet) -> list[DnsEvent]:
        """What the daemon has to read because of this packet: the answers in it that may teach something new."""
        segment = _read_packet(packet.data)
        if segment is None:
            return []
        if packet.leaving:
            # Whoever is asked: a server may be trusted by the time it answers.
            if segment.destination_port == _DNS_PORT and segment.destination not in self._retired:
                self._remember(packet, segment)
            return []
        if segment.source_port != _DNS_PORT:
            return []
        if segment.source not in self._trusted | self._retired:
            self._pass_over(packet, segment)
            return []
        events = []
        for wire, whole in _messages(packet.data, segment):
            outcome, tell = self._judge(wire, whole, segment, packet)
            self.outcomes[outcome] += 1
            if tell:
                resolver = unpack_address(segment.source)
                events.append(
                    DnsEvent(packet.at_ns, packet.interface, whole, outcome, segment.protocol, 0, resolver, wire)
                )
        return events

    def _pass_over(self, packet: Packet, segment: _Segment) -> None:
        """An answer that teaches nothing: its question is no longer under way, and leaves the place to others."""
        self.outcomes[Outcome.UNTRUSTED] += 1
        for wire, _ in itertools.islice(_messages(packet.data, segment), 1):
            self._queries.pop(_query_key(packet, segment, wire), None)

    def _remember(self, packet: Packet, segment: _Segment) -> None:
        if segment.fragment:
            return
        for wire, whole in _messages(packet.data, segment):
            if len(wire) < whole or len(wire) < _HEADER.size:
                return
            transaction, flags, questions, _, _, _ = _HEADER.unpack_from(wire)
            if flags & (_FLAG_ANSWER | _FLAGS_OPCODE) or questions != 1:
                return
            name = _read_name(wire)
            if name is None:
                return
            question = _question(wire, name[1])
            if question is None:
                continue
            through_lo = packet.interface == LOOPBACK_IFINDEX
            key = segment.protocol, through_lo, segment.destination, segment.source, segment.source_port, transaction
            self._queries[key] = _Query(question, packet.at_ns)
            self._queries.move_to_end(key)
            if len(self._queries) > MAX_QUERIES:
                self._queries.popitem(last=False)

    def _judge(self, wire: bytes, whole: int, segment: _Segment, packet: Packet) -> tuple[Outcome, bool]:
        """What becomes of one message of a trusted resolver, and whether the daemon has to read it."""
        if len(wire) < _HEADER.size:
            return Outcome.MALFORMED, False
        _, flags, questions, _, _, _ = _HEADER.unpack_from(wire)
        if not flags & _FLAG_ANSWER or flags & _FLAGS_OPCODE or questions != 1:
            return Outcome.MALFORMED, False
        query = self._queries.pop(_query_key(packet, segment, wire), None)  # a second answer teaches nothing
        if query is None or packet.at_ns - query.asked_at_ns > _QUERY_WINDOW_NS:
            return Outcome.UNSOLICITED, False
        name = _read_name(wire)
        if name is None:
            return Outcome.MALFORMED, False
        labels, name_end = name
        if _steps(labels) > _MAX_NAME_STEPS:
            return Outcome.UNREADABLE, False
        question = _question(wire, name_end)
        if question is None:
            return Outcome.MALFORMED, False
        if question != query.question:
            return Outcome.MISMATCHED, False
        rdtype, rdclass = _QUESTION_END.unpack_from(wire, name_end)
        text = _text(labels)
        if text is None or rdclass != _CLASS_IN or not self._listed(text):
            return Outcome.UNLISTED, False
        if rdtype not in ADDRESS_TYPES:
            return Outcome.NO_ADDRESS, False
        if flags & _FLAG_TRUNCATED or len(wire) < whole or segment.fragment:
            return Outcome.UNREADABLE, True
        try:
            answer = parse_answer(wire, unpack_address(segment.source))
        except DnsAnswerError:
            return Outcome.UNREADABLE, True  # no such message is known; the daemon asks for the name
        entries = self._permissions(answer, packet.at_ns / _NANOSECONDS)
        if not entries:
            return Outcome.NO_ADDRESS, False
        if all(map(self._held, entries)):
            return Outcome.REPEATED, False
        return Outcome.LEARNED, True


def _query_key(packet: Packet, segment: _Segment, answer: bytes) -> _QueryKey:
    """Of the question that an answer answers."""
    through_lo = packet.interface == LOOPBACK_IFINDEX
    return segment.protocol, through_lo, segment.source, segment.destination, segment.destination_port, answer[:2]


# --- packets ---------------------------------------------------------------------------------------------------------
def _field_16(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]


def _read_packet(data: bytes) -> _Segment | None:
    """A packet of UDP or TCP whose ports can be read; None for every other, later fragments among them."""
    version = data[0] >> 4 if data else 0
    if len(data) < (_IPV4_HEADER_BYTES if version == 4 else _IPV6_HEADER_BYTES):
        return None
    if version == 4:
        at = (data[0] & 15) * 4
        fragmentation = _field_16(data, 6)
        if at < _IPV4_HEADER_BYTES or fragmentation & _IPV4_OFFSET_MASK:
            return None
        fragment = bool(fragmentation & _IPV4_MORE_FRAGMENTS)
        number = data[9]
        end = _field_16(data, 2)
        source, destination = _IPV4_MAPPED + data[12:16], _IPV4_MAPPED + data[16:20]
    elif version == 6:
        found = _pass_extensions(data)
        if found is None:
            return None
        number, at, fragment = found
        end = _IPV6_HEADER_BYTES + _field_16(data, 4)
        source, destination = data[8:24], data[24:40]
    else:
        return None
    if number == Protocol.UDP and at + _UDP_HEADER_BYTES <= len(data):
        protocol = Protocol.UDP
        payload, datagram_end = at + _UDP_HEADER_BYTES, at + _field_16(data, at + 4)
    elif number == Protocol.TCP and at + _TCP_HEADER_BYTES <= len(data):
        protocol = Protocol.TCP
        payload, datagram_end = at + (data[at + 12] >> 4) * 4, end
    else:
        return None
    source_port, destination_port = _PORTS.unpack_from(data, at)
    return _Segment(source, destination, protocol, source_port, destination_port, payload, end, datagram_end, fragment)


def _pass_extensions(data: bytes) -> tuple[int, int, bool] | None:
    """(protocol, offset of its header, whether more fragments follow) of an IPv6 packet."""
    number, at, fragment = data[6], _IPV6_HEADER_BYTES, False
    for _ in range(_MAX_EXTENSIONS):
        if number not in _IPV6_EXTENSIONS:
            break
        if at + 8 > len(data):
            return None
        if number == _IPV6_FRAGMENT:
            fragmentation = _field_16(data, at + 2)
            if fragmentation & _IPV6_OFFSET_MASK:
                return None
            fragment = bool(fragmentation & _IPV6_MORE_FRAGMENTS)
            number, at = data[at], at + 8
        else:
            number, at = data[at], at + (data[at + 1] + 1) * 8
    return number, at, fragment


def _messages(data: bytes, segment: _Segment) -> Iterator[tuple[bytes, int]]:
    """(at most MAX_WIRE_BYTES of a message, its whole length), of a UDP packet one and of a TCP segment two at most."""
    at = segment.payload
    tcp = segment.protocol is Protocol.TCP
    for _ in range(_MAX_MESSAGES):
        if tcp:
            if at + 2 >= segment.end or at + 2 > len(data):
                return
            whole, at = _field_16(data, at), at + 2
        else:
            whole = segment.datagram_end - at
        size = min(segment.end - at, whole, MAX_WIRE_BYTES)
        if size <= 0 or at + size > len(data):
            return
        yield data[at : at + size], whole
        at += whole  # of UDP the end


# --- questions -------------------------------------------------------------------------------------------------------
def _read_name(wire: bytes) -> tuple[list[bytes], int] | None:
    """(labels in lower case without the root, offset behind it) of the name behind the header.

    None if it is cut, too long or compressed, which nobody does in a question.
    """
    labels: list[bytes] = []
    at, position = _HEADER.size, 0
    while at < len(wire):
        length = wire[at]
        if length > _MAX_LABEL_BYTES or at + 1 + length > len(wire) or position + length >= _MAX_WIRE_NAME:
            return None
        at += 1
        if not length:
            return labels, at
        labels.append(wire[at : at + length].lower())
        at += length
        position += 1 + length
    return None


def _question(wire: bytes, name_end: int) -> bytes | None:
    """What two messages must have in common: name in lower case, type, class; None if it is cut."""
    end = name_end + _QUESTION_END.size
    # A label's length is no letter: lower() leaves it alone.
    return None if end > len(wire) else wire[_HEADER.size : name_end].lower() + wire[name_end:end]


def _steps(labels: list[bytes]) -> int:
    """In how many steps BPF reads the name: eight bytes of a label each, and one for the root."""
    return sum(-(-len(label) // _LABEL_BYTES_A_STEP) for label in labels) + 1


def _text(labels: list[bytes]) -> str | None:
    """The name as the policy writes it; None for the root, and where a dot or a NUL in a label would fake another.

    What is not ASCII becomes some other character than ASCII, so that it is equal to nothing in a policy.
    """
    if not labels or any(b"." in label or b"\0" in label for label in labels):
        return None
    return b".".join(labels).decode("latin-1")
