"""Damaged messages through both parsers: neither crashes, and BPF never believes more than Python."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from enforcer import kernel_abi
from enforcer.kernel_abi import Outcome, Protocol
from enforcer.learned import lifetime_seconds
from enforcer.policy import Address
from tests import dns_vectors
from tests.dns_vectors import Vector
from tests.kernel import packets
from tests.kernel.harness import (
    CLIENT_PORT,
    CLIENT_V4,
    CLIENT_V6,
    FOREIGN_MARK,
    MASK,
    RESOLVER_V4,
    RESOLVER_V6,
    SECOND_NS,
    Harness,
)

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

SEED = 20_261_123
MESSAGES = 20_000
CHUNK = 500  # messages between two looks at the whole map
DNS_HEADER_BYTES = 12
INTERESTING = (0x00, 0x01, 0x0C, 0x1C, 0x3F, 0x40, 0x7F, 0x80, 0xBF, 0xC0, 0xC1, 0xFF)


def mutated(rng: random.Random, wire: bytes, donor: bytes) -> bytes:
    """One to three small damages, mostly behind the question: a wrong question is refused before any record is read."""
    message = bytearray(wire)
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = 0 if rng.random() < 0.15 else min(len(dns_vectors.question_of(wire)), len(message))
        at = rng.randint(start, len(message))
        kind = rng.randrange(9)
        if kind == 0 and at < len(message):
            message[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(message):
            message[at] = rng.choice(INTERESTING)
        elif kind == 2:
            del message[at : at + rng.choice((1, 2, 4, 12, 16))]
        elif kind == 3:
            message[at:at] = rng.randbytes(rng.choice((1, 2, 4, 12)))
        elif kind == 4:
            message[at : at + 2] = (0xC000 | rng.randrange(len(message) + 4)).to_bytes(2)  # a pointer somewhere
        elif kind == 5:
            message[6:8] = rng.choice((0, 1, 2, 31, 32, 33, 0xFFFF)).to_bytes(2)  # ANCOUNT
        elif kind == 6:
            length = rng.choice((4, 12, 16, 28))
            message[at:at] = message[at : at + length]  # something twice
        elif kind == 7:
            from_donor = rng.randrange(len(donor))
            message[at:at] = donor[from_donor : from_donor + rng.randrange(40)]
        else:
            del message[at:]
    return bytes(message[:4_000])


def corpus() -> list[Vector]:
    """Messages that teach, and those that nearly do; each with a query that fits it."""
    return [vector for vector in dns_vectors.load() if vector.accepted and vector.outcome is not Outcome.UNSOLICITED]


def cases() -> Iterator[tuple[bytes, bytes]]:
    """(query, damaged answer)."""
    rng = random.Random(SEED)  # noqa: S311
    vectors = corpus()
    for _ in range(MESSAGES):
        vector = rng.choice(vectors)
        yield vector.query, mutated(rng, vector.answer, rng.choice(vectors).answer)


def test_damaged_answers_never_teach_bpf_more_than_python(harness: Harness) -> None:
    outcomes: Counter[Outcome] = Counter()
    taught = accepted = left_out = 0
    learned_map = harness.state.maps["learned"]
    for number, (query, wire) in enumerate(cases()):
        found = dns_vectors.accepted(wire)
        permitted: dict[tuple[Address, int], int] = {}  # (address, port) -> lifetime in seconds
        for record in found[2] if found else ():
            for port in found[0].ports if found else ():
                longest = max(permitted.get((record.address, port), 0), lifetime_seconds(record.ttl_seconds))
                permitted[record.address, port] = longest
        harness.ask(query)
        if len(wire) < DNS_HEADER_BYTES:
            assert not found  # and BPF does not even count it
            continue
        outcome = harness.answer(wire)
        outcomes[outcome] += 1
        accepted += bool(permitted)
        events = list(harness.events())
        assert len(events) == (outcome in {Outcome.LEARNED, Outcome.UNREADABLE})
        if any(event.inserted for event in events) or number % CHUNK == 0:
            learned = harness.learned()
            inserted = sum(event.inserted for event in events)  # an address twice, with a longer lifetime, counts twice
            assert len(learned) <= inserted
            assert bool(learned) == bool(inserted)
            assert learned.keys() <= permitted.keys(), wire.hex()
            for destination, (expires_at, _) in learned.items():
                assert expires_at <= harness.state.now_ns() + permitted[destination] * SECOND_NS, wire.hex()
                learned_map.delete(kernel_abi.pack_learned_key(*destination))
            taught += bool(learned)
            left_out += learned.keys() < permitted.keys()
    # The corpus reaches every part of the parser, and the comparison compares something.
    assert taught > MESSAGES * 0.3, outcomes
    assert taught > accepted * 0.5, (taught, accepted)
    for outcome in Outcome.UNREADABLE, Outcome.NO_ADDRESS, Outcome.MISMATCHED, Outcome.MALFORMED:
        assert outcomes[outcome] > MESSAGES * 0.005, outcomes
    print(f"{MESSAGES} messages: {taught} taught, {accepted} accepted, {left_out} left something out; {dict(outcomes)}")


def test_same_messages_every_time() -> None:
    assert [next(cases()) for _ in range(3)] == [next(cases())] * 3


def test_damaged_frames_leave_packets_and_verdicts_alone(harness: Harness) -> None:
    rng = random.Random(SEED)  # noqa: S311
    vectors = corpus()
    for number in range(MESSAGES // 5):
        vector = rng.choice(vectors)
        tcp = rng.random() < 0.5
        protocol = Protocol.TCP if tcp else Protocol.UDP
        payload = packets.message(vector.answer) if tcp else vector.answer
        transport = (packets.tcp if tcp else packets.udp)(53, CLIENT_PORT, payload)
        source, destination = (RESOLVER_V4, CLIENT_V4) if number % 2 else (RESOLVER_V6, CLIENT_V6)
        frame = bytearray(packets.frame(source, destination, protocol, transport))
        for _ in range(rng.choice((1, 1, 2, 4))):
            frame[rng.randrange(14, min(len(frame), 90))] = rng.choice((rng.randrange(256), *INTERESTING))
        for program in "learn", "track_query", "gate":
            assert harness.run(program, bytes(frame), FOREIGN_MARK) & ~MASK == FOREIGN_MARK
    assert harness.learned() == {}  # nothing was asked
