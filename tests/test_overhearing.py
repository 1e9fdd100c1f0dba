"""What the learner in user space makes of packets: the cases of tests/kernel/test_learn.py, without a kernel.

tests/kernel/test_overhearing.py sends damaged packets through this one and through BPF.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer.kernel_abi import (
    MAX_QUERIES,
    MAX_WIRE_BYTES,
    QUERY_WINDOW_SECONDS,
    REFRESH_MARGIN_SECONDS,
    Outcome,
    Protocol,
)
from enforcer.overhearing import Packet
from tests import dns_vectors
from tests.dns_vectors import Vector
from tests.ear import ETHERNET_HEADER_BYTES, INTERFACE, Ear
from tests.kernel import packets
from tests.kernel.harness import CLIENT_PORT, CLIENT_V4, CLIENT_V6, RESOLVER_V4, RESOLVER_V6, SECOND_NS, STRANGER

VECTORS = {vector.name: vector for vector in dns_vectors.load()}
PLAIN = VECTORS["one-address"]
AAAA = VECTORS["aaaa"]
SECOND_ID = b"\x43\x21"


@pytest.fixture
def ear() -> Ear:
    return Ear()


def is_whole(vector: Vector) -> bool:
    """Whether the resolver said all, and it fits."""
    return len(vector.answer) <= MAX_WIRE_BYTES and not vector.answer[2] & 0x02


def expected_outcome(vector: Vector) -> Outcome:
    """BPF's; where it cannot place a record, the full parser's."""
    if vector.outcome is Outcome.UNREADABLE and is_whole(vector):
        return Outcome.LEARNED if vector.accepted else Outcome.NO_ADDRESS
    return vector.outcome


def udp_answer(wire: bytes, *, fragmentation: int = 0) -> bytes:
    """A frame with an answer of the resolver."""
    datagram = packets.udp(53, CLIENT_PORT, wire)
    return packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, datagram, fragmentation=fragmentation)


def tcp_query(*wires: bytes) -> bytes:
    segment = packets.tcp(CLIENT_PORT, 53, b"".join(map(packets.message, wires)))
    return packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.TCP, segment)


def tcp_answer(*wires: bytes) -> bytes:
    segment = packets.tcp(53, CLIENT_PORT, b"".join(map(packets.message, wires)))
    return packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.TCP, segment)


def answer_with(ttl_seconds: int) -> bytes:
    return dns_vectors.assemble(
        f"1234 8180 0001 0001 0000 0000 registry.example. 0001 0001 c00c 0001 0001 {ttl_seconds:08x} 0004 c0000201"
    )


# --- messages --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_vector_teaches_what_it_says(ear: Ear, vector: Vector, v6: bool) -> None:
    ear.ask(vector.query, v6=v6)
    assert ear.answer(vector.answer, v6=v6) is expected_outcome(vector)
    # What BPF leaves to the daemon, the daemon accepts from the very same bytes.
    assert ear.addresses() <= vector.accepted
    assert vector.learned <= ear.addresses()


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_vector_without_its_query_teaches_nothing(ear: Ear, vector: Vector) -> None:
    assert ear.answer(vector.answer) in {Outcome.UNSOLICITED, Outcome.MALFORMED}
    assert ear.addresses() == set()
    assert ear.events == []


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_daemon_is_told_of_what_may_teach_and_of_nothing_else(ear: Ear, vector: Vector) -> None:
    ear.ask(vector.query)
    outcome = ear.answer(vector.answer)
    if outcome not in {Outcome.LEARNED, Outcome.UNREADABLE}:
        assert ear.events == []
        return
    (event,) = ear.events
    assert event.outcome is outcome
    assert event.wire == vector.answer[:MAX_WIRE_BYTES]
    assert event.message_length == len(vector.answer)
    assert (event.resolver, event.protocol, event.interface) == (RESOLVER_V4, Protocol.UDP, INTERFACE)
    assert event.inserted == 0
    assert event.at_ns == ear.now_ns


def test_tcp_message_in_one_segment_teaches_as_udp_does(ear: Ear) -> None:
    ear.leave(tcp_query(PLAIN.query))
    assert ear.learn(tcp_answer(PLAIN.answer)) == [Outcome.LEARNED]
    assert ear.addresses() == PLAIN.learned


def test_tcp_message_without_its_query_teaches_nothing(ear: Ear) -> None:
    assert ear.learn(tcp_answer(PLAIN.answer)) == [Outcome.UNSOLICITED]
    assert ear.addresses() == set()


def test_two_messages_in_one_segment_both_teach(ear: Ear) -> None:
    ear.leave(tcp_query(PLAIN.query, SECOND_ID + AAAA.query[2:]))
    assert ear.learn(tcp_answer(PLAIN.answer, SECOND_ID + AAAA.answer[2:])) == [Outcome.LEARNED] * 2
    assert ear.addresses() == PLAIN.learned | AAAA.learned


def test_second_message_in_one_segment_needs_a_query_too(ear: Ear) -> None:
    ear.leave(tcp_query(PLAIN.query))
    both = tcp_answer(PLAIN.answer, SECOND_ID + AAAA.answer[2:])
    assert ear.learn(both) == [Outcome.LEARNED, Outcome.UNSOLICITED]
    assert ear.addresses() == PLAIN.learned


def test_third_message_in_one_segment_is_not_read(ear: Ear) -> None:
    wires = [bytes((0, number)) + PLAIN.query[2:] for number in range(3)]
    ear.leave(tcp_query(*wires))
    assert len(ear.overhearing) == 2
    for number in range(3):
        ear.leave(tcp_query(bytes((0, number)) + PLAIN.query[2:]))
    outcomes = ear.learn(tcp_answer(*(bytes((0, number)) + PLAIN.answer[2:] for number in range(3))))
    assert len(outcomes) == 2


@pytest.mark.parametrize("cut", [1, 8, 16])
def test_part_of_a_tcp_message_is_left_to_the_daemon(ear: Ear, cut: int) -> None:
    ear.leave(tcp_query(PLAIN.query))
    part = packets.tcp(53, CLIENT_PORT, packets.message(PLAIN.answer)[:-cut])
    assert ear.learn(packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.TCP, part)) == [Outcome.UNREADABLE]
    (event,) = ear.events
    assert (event.wire, event.message_length) == (PLAIN.answer[:-cut], len(PLAIN.answer))
    assert ear.addresses() == set()


@pytest.mark.parametrize(
    "payload", [b"", b"\0", b"\0\x2e", bytes(5), b"\0\0\0"], ids=lambda payload: f"{len(payload)}-bytes"
)
def test_tcp_segment_without_a_message_teaches_nothing(ear: Ear, payload: bytes) -> None:
    frame = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.TCP, packets.tcp(53, CLIENT_PORT, payload))
    assert ear.learn(frame) in ([], [Outcome.MALFORMED])
    assert ear.events == []


def test_name_of_a_hundred_labels_neither_teaches_nor_troubles_the_daemon(ear: Ear) -> None:
    for labels, outcome in (91, Outcome.LEARNED), (93, Outcome.UNREADABLE), (100, Outcome.UNREADABLE):
        name = "a." * labels + "example.com."  # 95 steps in all with 91 or 92 of them
        wire = dns_vectors.assemble(
            f"1234 8180 0001 0001 0000 0000 {name} 0001 0001 c00c 0001 0001 0000003c 0004 c0000201"
        )
        ear.ask(dns_vectors.question_of(wire))
        assert ear.answer(wire) is outcome
        assert len(ear.events) == 1


@pytest.mark.parametrize(("length", "outcome"), [(63, Outcome.LEARNED), (64, Outcome.UNSOLICITED)])
def test_label_that_is_too_long_is_neither_remembered_nor_learned(ear: Ear, length: int, outcome: Outcome) -> None:
    wire = dns_vectors.assemble(
        f"1234 8180 0001 0001 0000 0000 '{'a' * length} example.com. 0001 0001 c00c 0001 0001 0000003c 0004 c0000201"
    )
    ear.ask(dns_vectors.question_of(wire))
    assert ear.answer(wire) is outcome
    ear.ask(PLAIN.query)
    assert ear.answer(wire) is (Outcome.MALFORMED if length > 63 else Outcome.MISMATCHED)


# --- which packets count ---------------------------------------------------------------------------------------------
def test_answer_to_another_port_teaches_nothing(ear: Ear) -> None:
    ear.ask(PLAIN.query, port=CLIENT_PORT + 1)
    assert ear.answer(PLAIN.answer) is Outcome.UNSOLICITED
    assert ear.events == []
    assert ear.answer(PLAIN.answer, port=CLIENT_PORT + 1) is Outcome.LEARNED


def test_answer_with_another_id_teaches_nothing(ear: Ear) -> None:
    ear.ask(SECOND_ID + PLAIN.query[2:])
    assert ear.answer(PLAIN.answer) is Outcome.UNSOLICITED
    assert ear.events == []
    assert ear.answer(SECOND_ID + PLAIN.answer[2:]) is Outcome.LEARNED


def test_answer_to_another_client_teaches_nothing(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    frame = packets.frame(RESOLVER_V4, STRANGER, Protocol.UDP, packets.udp(53, CLIENT_PORT, PLAIN.answer))
    assert ear.learn(frame) == [Outcome.UNSOLICITED]
    assert ear.events == []


def test_answer_over_another_protocol_teaches_nothing(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    assert ear.learn(tcp_answer(PLAIN.answer)) == [Outcome.UNSOLICITED]
    assert ear.events == []


def test_answer_of_the_other_resolver_teaches_nothing(ear: Ear) -> None:
    ear.overhearing.trust((RESOLVER_V4, STRANGER))
    ear.ask(PLAIN.query)
    frame = packets.frame(STRANGER, CLIENT_V4, Protocol.UDP, packets.udp(53, CLIENT_PORT, PLAIN.answer))
    assert ear.learn(frame) == [Outcome.UNSOLICITED]
    assert ear.events == []
    assert ear.answer(PLAIN.answer) is Outcome.LEARNED


def test_answer_from_another_server_teaches_nothing_even_if_it_was_asked(ear: Ear) -> None:
    ear.leave(packets.frame(CLIENT_V4, STRANGER, Protocol.UDP, packets.udp(CLIENT_PORT, 53, PLAIN.query)))
    answer = packets.frame(STRANGER, CLIENT_V4, Protocol.UDP, packets.udp(53, CLIENT_PORT, PLAIN.answer))
    assert ear.learn(answer) == [Outcome.UNTRUSTED]
    assert ear.events == []
    assert len(ear.overhearing) == 0


def test_resolver_that_is_trusted_by_the_time_it_answers_teaches(ear: Ear) -> None:
    ear.overhearing.trust((RESOLVER_V6,))
    ear.ask(PLAIN.query)
    ear.overhearing.trust((RESOLVER_V4,))
    assert ear.answer(PLAIN.answer) is Outcome.LEARNED


def test_retired_resolver_answers_what_was_asked_before_and_nothing_else(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    ear.overhearing.trust((RESOLVER_V6,), (RESOLVER_V4,))
    assert ear.answer(PLAIN.answer) is Outcome.LEARNED
    ear.ask(PLAIN.query)
    assert ear.answer(PLAIN.answer) is Outcome.UNSOLICITED


def test_resolver_that_is_trusted_no_more_teaches_nothing(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    ear.overhearing.trust((RESOLVER_V6,))
    assert ear.answer(PLAIN.answer) is Outcome.UNTRUSTED
    assert ear.events == []


def test_answer_from_another_port_of_the_resolver_is_no_answer(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    frame = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, packets.udp(5353, CLIENT_PORT, PLAIN.answer))
    assert ear.learn(frame) == []
    assert ear.events == []


def test_answer_that_leaves_is_not_read_and_query_that_arrives_is_not_remembered(ear: Ear) -> None:
    query = packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.UDP, packets.udp(CLIENT_PORT, 53, PLAIN.query))
    assert ear.learn(query) == []
    assert len(ear.overhearing) == 0
    ear.ask(PLAIN.query)
    ear.leave(udp_answer(PLAIN.answer))
    assert not ear.overhearing.outcomes
    assert ear.answer(PLAIN.answer) is Outcome.LEARNED


@pytest.mark.parametrize(
    ("late_ns", "outcome"), [(0, Outcome.LEARNED), (1, Outcome.UNSOLICITED)], ids=["in time", "late"]
)
def test_late_answer_teaches_nothing(ear: Ear, late_ns: int, outcome: Outcome) -> None:
    ear.ask(PLAIN.query)
    ear.now_ns += QUERY_WINDOW_SECONDS * SECOND_NS + late_ns
    assert ear.answer(PLAIN.answer) is outcome
    assert len(ear.events) == (outcome is Outcome.LEARNED)


def test_second_answer_to_one_query_teaches_nothing(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    assert ear.answer(PLAIN.answer) is Outcome.LEARNED
    assert ear.answer(PLAIN.answer[:-1] + b"\x63") is Outcome.UNSOLICITED
    assert ear.addresses() == PLAIN.learned


def test_wrong_guess_uses_up_the_query(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    assert ear.answer(AAAA.answer) is Outcome.MISMATCHED
    assert ear.answer(PLAIN.answer) is Outcome.UNSOLICITED
    assert ear.events == []


@pytest.mark.parametrize(
    "payload",
    [
        PLAIN.answer,  # QR=1
        PLAIN.query[:2] + b"\x29\x00" + PLAIN.query[4:],  # OPCODE 5
        PLAIN.query[:4] + b"\0\x02" + PLAIN.query[6:],  # QDCOUNT 2
        PLAIN.query[:-1],
        PLAIN.query[:11],
    ],
    ids=["answer", "update", "two questions", "cut", "no header"],
)
def test_what_is_no_query_is_not_remembered(ear: Ear, payload: bytes) -> None:
    ear.ask(payload)
    assert len(ear.overhearing) == 0


def test_query_to_another_port_and_fragment_of_one_are_not_remembered(ear: Ear) -> None:
    other = packets.udp(CLIENT_PORT, 5353, PLAIN.query)
    ear.leave(packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.UDP, other))
    part = packets.udp(CLIENT_PORT, 53, PLAIN.query)
    ear.leave(packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.UDP, part, fragmentation=packets.MORE_FRAGMENTS))
    assert len(ear.overhearing) == 0


def test_table_of_queries_is_bounded_and_the_oldest_goes_first(ear: Ear) -> None:
    for number in range(MAX_QUERIES + 1):
        ear.ask(struct.pack("!H", number % 65_536) + PLAIN.query[2:], port=1_024 + number // 65_536)
        if number == 1:
            ear.ask(struct.pack("!H", 0) + PLAIN.query[2:], port=1_024)  # asked again: the youngest now
    assert len(ear.overhearing) == MAX_QUERIES
    assert ear.answer(struct.pack("!H", 1) + PLAIN.answer[2:], port=1_024) is Outcome.UNSOLICITED
    assert ear.answer(struct.pack("!H", 0) + PLAIN.answer[2:], port=1_024) is Outcome.LEARNED


# --- how packets are built -------------------------------------------------------------------------------------------
def test_ipv4_options_are_passed_over(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    datagram = packets.udp(53, CLIENT_PORT, PLAIN.answer)
    frame = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, datagram, options=b"\x94\x04\0\0" * 10)
    assert ear.learn(frame) == [Outcome.LEARNED]


@pytest.mark.parametrize(
    ("first", "chain", "outcomes"),
    [
        (packets.HOP_BY_HOP, packets.extension(Protocol.UDP), [Outcome.LEARNED]),
        (packets.ROUTING, packets.extension(Protocol.UDP, words=2), [Outcome.LEARNED]),
        (packets.DESTINATION_OPTIONS, packets.extension(Protocol.UDP, words=4), [Outcome.LEARNED]),
        (
            packets.HOP_BY_HOP,
            packets.extension(packets.DESTINATION_OPTIONS) + packets.extension(Protocol.UDP),
            [Outcome.LEARNED],
        ),
        (packets.FRAGMENT, packets.fragment(Protocol.UDP), [Outcome.LEARNED]),  # atomic: the whole packet
        (packets.FRAGMENT, packets.fragment(Protocol.UDP, more=True), [Outcome.UNREADABLE]),
        (packets.FRAGMENT, packets.fragment(Protocol.UDP, offset=100), []),
        (
            packets.HOP_BY_HOP,
            packets.extension(packets.DESTINATION_OPTIONS) * 4 + packets.extension(Protocol.UDP),
            [],
        ),
    ],
    ids=["hop-by-hop", "routing", "destination", "two", "atomic fragment", "first fragment", "later fragment", "five"],
)
def test_ipv6_extension_headers_are_passed_over(ear: Ear, first: int, chain: bytes, outcomes: list[Outcome]) -> None:
    ear.ask(PLAIN.query, v6=True)
    datagram = packets.udp(53, CLIENT_PORT, PLAIN.answer)
    frame = packets.frame(RESOLVER_V6, CLIENT_V6, Protocol.UDP, datagram, extensions=(first, chain))
    assert ear.learn(frame) == outcomes


def test_first_fragment_is_left_to_the_daemon(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    datagram = packets.udp(53, CLIENT_PORT, PLAIN.answer)
    part = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, datagram[:-10], fragmentation=packets.MORE_FRAGMENTS)
    assert ear.learn(part) == [Outcome.UNREADABLE]
    (event,) = ear.events
    assert (event.wire, event.message_length) == (PLAIN.answer[:-10], len(PLAIN.answer))
    assert ear.addresses() == set()


def test_later_fragment_is_not_read_as_if_it_had_ports(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    assert ear.learn(udp_answer(PLAIN.answer, fragmentation=100)) == []
    assert ear.answer(PLAIN.answer) is Outcome.LEARNED


def test_bytes_behind_the_datagram_are_not_read(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    cut = len(PLAIN.answer) - 16  # what is left ends before the record
    datagram = packets.udp(53, CLIENT_PORT, PLAIN.answer, length=8 + cut)
    assert ear.learn(packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, datagram)) == [Outcome.NO_ADDRESS]
    assert ear.addresses() == set()


def test_packet_that_is_shorter_than_it_says_teaches_nothing(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    frame = udp_answer(PLAIN.answer)
    for size in range(ETHERNET_HEADER_BYTES, len(frame)):
        assert ear.learn(frame[:size]) == []
    assert ear.learn(frame) == [Outcome.LEARNED]


# --- what is held already --------------------------------------------------------------------------------------------
def test_repeated_answer_is_counted_and_not_reported(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    assert ear.answer(answer_with(1_000)) is Outcome.LEARNED
    for ttl_seconds in 1_000, 900, 1_000 + REFRESH_MARGIN_SECONDS - 1:
        ear.ask(PLAIN.query)
        assert ear.answer(answer_with(ttl_seconds)) is Outcome.REPEATED
    assert len(ear.events) == 1


def test_answer_that_lives_noticeably_longer_is_reported(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    ear.answer(answer_with(1_000))
    ear.ask(PLAIN.query)
    assert ear.answer(answer_with(1_000 + REFRESH_MARGIN_SECONDS)) is Outcome.LEARNED
    assert len(ear.events) == 2


def test_address_that_expired_is_reported_again(ear: Ear) -> None:
    ear.ask(PLAIN.query)
    ear.answer(answer_with(1_000))
    ear.now_ns += 1_001 * SECOND_NS
    ear.ask(PLAIN.query)
    assert ear.answer(answer_with(1_000)) is Outcome.LEARNED


# --- whatever comes --------------------------------------------------------------------------------------------------
@given(st.binary(max_size=120), st.booleans(), st.sampled_from((b"", b"\x45\0", b"\x60\0")))
def test_no_bytes_trouble_it_and_what_nobody_asked_for_teaches_nothing(data: bytes, leaving: bool, head: bytes) -> None:
    assert Ear().overhearing.hear(Packet(0, INTERFACE, leaving, head + data)) == []
