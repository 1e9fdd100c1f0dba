"""What BPF learns from packets, case by case; the same messages go through the Python parser in test_dns_answer."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from enforcer import kernel_abi
from enforcer.kernel_abi import MAX_WIRE_BYTES, Outcome, Protocol, ResolverTrust
from tests import dns_vectors
from tests.dns_vectors import Vector
from tests.kernel import packets
from tests.kernel.harness import (
    CEILING_SECONDS,
    CLIENT_PORT,
    CLIENT_V4,
    CLIENT_V6,
    FLOOR_SECONDS,
    FOREIGN_MARK,
    MARGIN_SECONDS,
    MASK,
    RESOLVER_V4,
    RESOLVER_V6,
    SECOND_NS,
    STRANGER,
    VOUCHED,
    Harness,
)

pytestmark = pytest.mark.root

VECTORS = {vector.name: vector for vector in dns_vectors.load()}
PLAIN = VECTORS["one-address"]
ADDRESS = ip_address("192.0.2.1")
AAAA = VECTORS["aaaa"]


def from_resolver(wire: bytes, port: int = CLIENT_PORT) -> bytes:
    return packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, packets.udp(53, port, wire))


def answer_with(ttl_seconds: int, address: str = "c0000201") -> bytes:
    return dns_vectors.assemble(
        f"1234 8180 0001 0001 0000 0000 registry.example. 0001 0001 c00c 0001 0001 {ttl_seconds:08x} 0004 {address}"
    )


# --- messages --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_vector_teaches_what_it_says(harness: Harness, vector: Vector, v6: bool) -> None:
    harness.ask(vector.query, v6=v6)
    assert harness.answer(vector.answer, v6=v6) is vector.outcome
    assert harness.addresses() == vector.learned


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_user_space_is_told_of_what_was_learned_or_left_to_it_and_of_nothing_else(
    harness: Harness, vector: Vector
) -> None:
    harness.ask(vector.query)
    harness.answer(vector.answer)
    events = list(harness.events())
    if vector.outcome not in {Outcome.LEARNED, Outcome.UNREADABLE}:
        assert events == []
        return
    (event,) = events
    assert event.outcome is vector.outcome
    assert event.wire == vector.answer[:MAX_WIRE_BYTES]
    assert event.message_length == len(vector.answer)
    assert (event.resolver, event.protocol) == (RESOLVER_V4, Protocol.UDP)
    assert event.inserted == len(harness.learned())
    assert 0 <= harness.state.now_ns() - event.at_ns < 60 * SECOND_NS


def test_every_port_of_the_rule_is_learned_and_no_other(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    harness.answer(PLAIN.answer)
    assert set(harness.learned()) == {(ADDRESS, 443), (ADDRESS, 5000)}


def test_tcp_message_in_one_segment_teaches_as_udp_does(harness: Harness) -> None:
    query = packets.tcp(CLIENT_PORT, 53, packets.message(PLAIN.query), options=bytes(12))
    harness.run("track_query", packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.TCP, query))
    answer = packets.tcp(53, CLIENT_PORT, packets.message(PLAIN.answer), options=bytes(12))
    frame = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.TCP, answer)
    assert harness.learn(frame) == [Outcome.LEARNED]
    assert harness.addresses() == PLAIN.learned


def test_two_messages_in_one_segment_both_teach(harness: Harness) -> None:
    second = VECTORS["aaaa"]
    queries = packets.message(PLAIN.query) + packets.message(b"\x43\x21" + second.query[2:])
    answers = packets.message(PLAIN.answer) + packets.message(b"\x43\x21" + second.answer[2:])
    harness.run(
        "track_query", packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.TCP, packets.tcp(CLIENT_PORT, 53, queries))
    )
    frame = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.TCP, packets.tcp(53, CLIENT_PORT, answers))
    assert harness.learn(frame) == [Outcome.LEARNED, Outcome.LEARNED]
    assert harness.addresses() == PLAIN.learned | second.learned


@pytest.mark.parametrize("cut", [1, 8, 16])
def test_part_of_a_tcp_message_is_left_to_the_daemon(harness: Harness, cut: int) -> None:
    query = packets.tcp(CLIENT_PORT, 53, packets.message(PLAIN.query))
    harness.run("track_query", packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.TCP, query))
    part = packets.tcp(53, CLIENT_PORT, packets.message(PLAIN.answer)[:-cut])
    assert harness.learn(packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.TCP, part)) == [Outcome.UNREADABLE]
    assert harness.addresses() == set()
    (event,) = harness.events()
    assert event.wire == PLAIN.answer[:-cut]
    assert event.message_length == len(PLAIN.answer)


@pytest.mark.parametrize(
    "payload", [b"", b"\0", b"\0\x2e", bytes(5), b"\0\0\0"], ids=lambda payload: f"{len(payload)}-bytes"
)
def test_tcp_segment_without_a_message_teaches_nothing(harness: Harness, payload: bytes) -> None:
    frame = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.TCP, packets.tcp(53, CLIENT_PORT, payload))
    assert harness.learn(frame) in ([], [Outcome.MALFORMED])
    assert harness.learned() == {}


# --- which packets count ---------------------------------------------------------------------------------------------
def test_answer_without_a_query_teaches_nothing(harness: Harness) -> None:
    assert harness.answer(PLAIN.answer) is Outcome.UNSOLICITED
    assert harness.learned() == {}


def test_answer_to_another_port_teaches_nothing(harness: Harness) -> None:
    harness.ask(PLAIN.query, port=CLIENT_PORT + 1)
    assert harness.answer(PLAIN.answer) is Outcome.UNSOLICITED
    assert harness.learned() == {}


def test_answer_to_another_client_teaches_nothing(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    frame = packets.frame(RESOLVER_V4, STRANGER, Protocol.UDP, packets.udp(53, CLIENT_PORT, PLAIN.answer))
    assert harness.learn(frame) == [Outcome.UNSOLICITED]
    assert harness.learned() == {}


def test_answer_over_another_protocol_teaches_nothing(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    segment = packets.tcp(53, CLIENT_PORT, packets.message(PLAIN.answer))
    assert harness.learn(packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.TCP, segment)) == [Outcome.UNSOLICITED]
    assert harness.learned() == {}


def test_answer_from_another_server_teaches_nothing_even_if_it_was_asked(harness: Harness) -> None:
    query = packets.frame(CLIENT_V4, STRANGER, Protocol.UDP, packets.udp(CLIENT_PORT, 53, PLAIN.query))
    harness.run("track_query", query)
    answer = packets.frame(STRANGER, CLIENT_V4, Protocol.UDP, packets.udp(53, CLIENT_PORT, PLAIN.answer))
    assert harness.learn(answer) == [Outcome.UNTRUSTED]
    assert harness.learned() == {}
    assert list(harness.state.maps["queries"].items()) == []


def trust(harness: Harness, value: ResolverTrust | None) -> None:
    """What the daemon says of RESOLVER_V4 from now on; None: nothing."""
    harness.state.maps["resolvers"].delete(kernel_abi.pack_address(RESOLVER_V4))
    if value is not None:
        harness.state.maps["resolvers"].update(kernel_abi.pack_address(RESOLVER_V4), bytes((value,)))


@pytest.fixture
def trusted_again(harness: Harness) -> Iterator[None]:
    """The harness trusts its resolver when the test is over."""
    yield
    trust(harness, ResolverTrust.TRUSTED)


@pytest.mark.usefixtures("trusted_again")
def test_resolver_that_is_trusted_by_the_time_it_answers_teaches(harness: Harness) -> None:
    trust(harness, None)
    harness.ask(PLAIN.query)
    trust(harness, ResolverTrust.TRUSTED)
    assert harness.answer(PLAIN.answer) is Outcome.LEARNED


@pytest.mark.usefixtures("trusted_again")
def test_retired_resolver_answers_what_was_asked_before_and_nothing_else(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    trust(harness, ResolverTrust.RETIRED)
    assert harness.answer(PLAIN.answer) is Outcome.LEARNED
    harness.ask(PLAIN.query)
    assert harness.answer(PLAIN.answer) is Outcome.UNSOLICITED


@pytest.mark.usefixtures("trusted_again")
def test_resolver_that_is_trusted_no_more_teaches_nothing(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    trust(harness, None)
    assert harness.answer(PLAIN.answer) is Outcome.UNTRUSTED
    assert harness.learned() == {}


def test_answer_from_another_port_of_the_resolver_is_no_answer(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    frame = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, packets.udp(5353, CLIENT_PORT, PLAIN.answer))
    assert harness.learn(frame) == []
    assert harness.learned() == {}


def test_late_answer_teaches_nothing(harness: Harness) -> None:
    harness.configure(query_seconds=0)
    harness.ask(PLAIN.query)
    assert harness.answer(PLAIN.answer) is Outcome.UNSOLICITED
    assert harness.learned() == {}


def test_second_answer_to_one_query_teaches_nothing(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    assert harness.answer(PLAIN.answer) is Outcome.LEARNED
    assert harness.answer(answer_with(60, "c0000263")) is Outcome.UNSOLICITED
    assert harness.addresses() == PLAIN.learned


def test_wrong_guess_uses_up_the_query(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    assert harness.answer(AAAA.answer) is Outcome.MISMATCHED
    assert harness.answer(PLAIN.answer) is Outcome.UNSOLICITED
    assert harness.learned() == {}


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
def test_what_is_no_query_is_not_remembered(harness: Harness, payload: bytes) -> None:
    harness.ask(payload)
    assert list(harness.state.maps["queries"].items()) == []


def test_query_to_another_port_is_not_remembered(harness: Harness) -> None:
    frame = packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.UDP, packets.udp(CLIENT_PORT, 5353, PLAIN.query))
    harness.run("track_query", frame)
    assert list(harness.state.maps["queries"].items()) == []


def test_nothing_is_learned_or_cleared_before_the_settings_are_written(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    harness.configure(configured=False)
    assert harness.learn(from_resolver(PLAIN.answer)) == []
    assert harness.run("learn", from_resolver(PLAIN.answer), VOUCHED) == VOUCHED
    assert harness.learned() == {}
    harness.configure()
    assert harness.answer(PLAIN.answer) is Outcome.LEARNED


def test_marks_from_outside_are_cleared_and_others_bits_stay(harness: Harness) -> None:
    assert harness.run("learn", from_resolver(PLAIN.answer), MASK | FOREIGN_MARK) == FOREIGN_MARK


# --- how packets are built -------------------------------------------------------------------------------------------
def test_ipv4_options_are_passed_over(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    datagram = packets.udp(53, CLIENT_PORT, PLAIN.answer)
    frame = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, datagram, options=b"\x94\x04\0\0" * 10)
    assert harness.learn(frame) == [Outcome.LEARNED]


@pytest.mark.parametrize(
    ("first", "chain"),
    [
        (packets.HOP_BY_HOP, packets.extension(Protocol.UDP)),
        (packets.ROUTING, packets.extension(Protocol.UDP, words=2)),
        (packets.DESTINATION_OPTIONS, packets.extension(Protocol.UDP, words=4)),
        (packets.HOP_BY_HOP, packets.extension(packets.DESTINATION_OPTIONS) + packets.extension(Protocol.UDP)),
        (packets.FRAGMENT, packets.fragment(Protocol.UDP)),  # atomic: the whole packet
    ],
    ids=["hop-by-hop", "routing", "destination", "two", "atomic fragment"],
)
def test_ipv6_extension_headers_are_passed_over(harness: Harness, first: int, chain: bytes) -> None:
    harness.ask(PLAIN.query, v6=True)
    datagram = packets.udp(53, CLIENT_PORT, PLAIN.answer)
    frame = packets.frame(RESOLVER_V6, CLIENT_V6, Protocol.UDP, datagram, extensions=(first, chain))
    assert harness.learn(frame) == [Outcome.LEARNED]


def test_more_extension_headers_than_anyone_sends_are_not_read(harness: Harness) -> None:
    harness.ask(PLAIN.query, v6=True)
    chain = packets.extension(packets.DESTINATION_OPTIONS) * 4 + packets.extension(Protocol.UDP)
    datagram = packets.udp(53, CLIENT_PORT, PLAIN.answer)
    frame = packets.frame(RESOLVER_V6, CLIENT_V6, Protocol.UDP, datagram, extensions=(packets.HOP_BY_HOP, chain))
    assert harness.learn(frame) == []
    assert harness.learned() == {}


def test_first_fragment_is_left_to_the_daemon(harness: Harness) -> None:
    datagram = packets.udp(53, CLIENT_PORT, PLAIN.answer)
    harness.ask(PLAIN.query)
    part = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, datagram[:-10], fragmentation=packets.MORE_FRAGMENTS)
    assert harness.learn(part) == [Outcome.UNREADABLE]
    harness.ask(PLAIN.query, v6=True)
    extensions = (packets.FRAGMENT, packets.fragment(Protocol.UDP, more=True))
    part = packets.frame(RESOLVER_V6, CLIENT_V6, Protocol.UDP, datagram[:-10], extensions=extensions)
    assert harness.learn(part) == [Outcome.UNREADABLE]
    assert harness.learned() == {}
    assert [event.wire for event in harness.events()] == [PLAIN.answer[:-10]] * 2


def test_fragment_that_looks_whole_is_left_to_the_daemon(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    datagram = packets.udp(53, CLIENT_PORT, PLAIN.answer)
    frame = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, datagram, fragmentation=packets.MORE_FRAGMENTS)
    assert harness.learn(frame) == [Outcome.UNREADABLE]
    assert harness.learned() == {}


def test_later_fragment_is_not_read_as_if_it_had_ports(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    datagram = packets.udp(53, CLIENT_PORT, PLAIN.answer)
    assert harness.learn(packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, datagram, fragmentation=100)) == []
    harness.ask(PLAIN.query, v6=True)
    extensions = (packets.FRAGMENT, packets.fragment(Protocol.UDP, offset=100))
    frame = packets.frame(RESOLVER_V6, CLIENT_V6, Protocol.UDP, datagram, extensions=extensions)
    assert harness.learn(frame) == []
    assert harness.learned() == {}


def test_bytes_behind_the_datagram_are_not_read(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    cut = len(PLAIN.answer) - 16  # what is left ends before the record
    datagram = packets.udp(53, CLIENT_PORT, PLAIN.answer, length=8 + cut)
    assert harness.learn(packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, datagram)) == [Outcome.UNREADABLE]
    assert harness.learned() == {}


def test_packet_that_is_shorter_than_it_says_teaches_nothing(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    frame = from_resolver(PLAIN.answer)
    for size in range(34, len(frame)):  # the kernel runs no program over less than an IPv4 header
        assert harness.learn(frame[:size]) == []
    assert harness.learned() == {}
    assert harness.learn(frame) == [Outcome.LEARNED]


# --- lifetimes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ttl_seconds", "lifetime_seconds"),
    [(0, FLOOR_SECONDS), (1_000, 1_000), (1_000_000, CEILING_SECONDS), (0x80000000, FLOOR_SECONDS)],
)
def test_lifetime_is_the_ttl_between_floor_and_ceiling(
    harness: Harness, ttl_seconds: int, lifetime_seconds: int
) -> None:
    before = harness.state.now_ns()
    harness.ask(PLAIN.query)
    harness.answer(answer_with(ttl_seconds))
    after = harness.state.now_ns()
    for expires_at, _ in harness.learned().values():
        assert before <= expires_at - lifetime_seconds * SECOND_NS <= after


def test_repeated_answer_is_counted_and_not_reported(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    assert harness.answer(answer_with(1_000)) is Outcome.LEARNED
    first = harness.learned()
    list(harness.events())
    for ttl_seconds in 1_000, 900, 1_000 + MARGIN_SECONDS - 5:
        harness.ask(PLAIN.query)
        assert harness.answer(answer_with(ttl_seconds)) is Outcome.REPEATED
    assert harness.learned() == first
    assert list(harness.events()) == []


def test_answer_that_lives_noticeably_longer_is_reported(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    harness.answer(answer_with(1_000))
    list(harness.events())
    harness.ask(PLAIN.query)
    assert harness.answer(answer_with(1_000 + MARGIN_SECONDS)) is Outcome.LEARNED
    assert len(list(harness.events())) == 1


def test_answer_leaves_alone_when_an_address_was_used(harness: Harness) -> None:
    used_at = harness.state.now_ns() - 5 * SECOND_NS
    value = kernel_abi.pack_learned(harness.state.now_ns() + SECOND_NS, 0, used_at=used_at)
    harness.state.maps["learned"].update(kernel_abi.pack_learned_key(ADDRESS, 443), value)
    harness.ask(PLAIN.query)
    assert harness.answer(PLAIN.answer) is Outcome.LEARNED
    assert harness.used_at(ADDRESS, 443) == used_at
    assert harness.used_at(ADDRESS, 5000) == 0


def test_expired_address_is_learned_again(harness: Harness) -> None:
    for port in 443, 5000:
        harness.vouch(ADDRESS, port, -1)
    harness.ask(PLAIN.query)
    assert harness.answer(PLAIN.answer) is Outcome.LEARNED
    assert all(expires_at > harness.state.now_ns() for expires_at, _ in harness.learned().values())


def test_address_taught_by_another_pattern_is_reported_and_not_shortened(harness: Harness) -> None:
    harness.ask(PLAIN.query)
    harness.answer(answer_with(10_000))
    long, _ = harness.learned()[ADDRESS, 443]
    list(harness.events())
    other = VECTORS["wildcard"]
    harness.ask(other.query)
    assert harness.answer(other.answer) is Outcome.LEARNED
    assert harness.learned()[ADDRESS, 443] == (long, 1)
    assert len(list(harness.events())) == 1


# --- the budget of steps ---------------------------------------------------------------------------------------------
def test_eight_ports_and_eight_addresses_fit(harness: Harness) -> None:
    ports = tuple(range(5_000, 5_008))
    key = kernel_abi.pack_name_key("many.ports.example", wildcard=False)
    harness.state.maps["names"].update(key, kernel_abi.pack_name_rule(99, ports, private_addresses=False))
    lines = "many.ports.example. 0001 0001", "8 x c00c 0001 0001 0000003c 0004 c00002{n}"
    wire = b"".join(map(dns_vectors.assemble, ("1234 8180 0001 0008 0000 0000", *lines)))
    harness.ask(dns_vectors.question_of(wire))
    assert harness.answer(wire) is Outcome.LEARNED
    assert set(harness.learned()) == {(ip_address(f"192.0.2.{n}"), port) for n in range(8) for port in ports}


def test_answer_that_takes_more_steps_than_there_are_is_left_to_the_daemon(harness: Harness) -> None:
    head, record = "1234 8180 0001 0020 0000 0000", "32 x registry.example. 0001 0001 0000003c 0004 c00002{n}"
    wire = b"".join(map(dns_vectors.assemble, (head, "registry.example. 0001 0001", record)))
    harness.ask(dns_vectors.question_of(wire))
    assert harness.answer(wire) is Outcome.UNREADABLE
    (event,) = harness.events()
    assert event.wire == wire
    first = {ip_address(f"192.0.2.{n}") for n in range(len(harness.addresses()))}
    assert harness.addresses() == first
    assert 8 <= len(first) < 32


def test_name_of_a_hundred_labels_neither_teaches_nor_troubles_the_daemon(harness: Harness) -> None:
    name = "a." * 100 + "example.com."
    wire = dns_vectors.assemble(f"1234 8180 0001 0001 0000 0000 {name} 0001 0001 c00c 0001 0001 0000003c 0004 c0000201")
    harness.ask(dns_vectors.question_of(wire))
    assert len(list(harness.state.maps["queries"].items())) == 1
    assert harness.answer(wire) is Outcome.UNREADABLE
    assert harness.learned() == {}
    assert list(harness.events()) == []


@pytest.mark.parametrize(("pointers", "outcome"), [(14, Outcome.LEARNED), (15, Outcome.UNREADABLE)])
def test_chain_of_pointers_is_followed_as_far_as_dnspython_would(
    harness: Harness, pointers: int, outcome: Outcome
) -> None:
    # A TXT record holds a ladder of pointers down to the question's name; an owner points to its top.
    text_at = 12 + 18 + 4 + 12
    ladder = b"\xc0\x0c" + b"".join((0xC000 | text_at + 2 * n).to_bytes(2) for n in range(pointers - 1))
    wire = dns_vectors.assemble("1234 8180 0001 0002 0000 0000 registry.example. 0001 0001 c00c 0010 0001 0000003c")
    wire += len(ladder).to_bytes(2) + ladder + (0xC000 | text_at + 2 * (pointers - 1)).to_bytes(2)
    wire += dns_vectors.assemble("0001 0001 0000003c 0004 c0000201")
    harness.ask(dns_vectors.question_of(wire))
    assert harness.answer(wire) is outcome
    assert harness.addresses() == (PLAIN.learned if outcome is Outcome.LEARNED else set())
    found = dns_vectors.accepted(wire)
    assert found
    assert [record.address for record in found[2]] == [ADDRESS]
