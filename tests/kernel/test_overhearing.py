"""The learner in user space beside the BPF programs, over the same packets: it never tells of more than they do."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from enforcer.kernel_abi import MAX_WIRE_BYTES, DnsEvent, Outcome, Protocol
from tests import dns_vectors
from tests.dns_vectors import Vector
from tests.ear import Ear
from tests.kernel import packets
from tests.kernel.harness import CLIENT_PORT, CLIENT_V4, CLIENT_V6, RESOLVER_V4, RESOLVER_V6, STRANGER, Harness
from tests.kernel.test_fuzz import DNS_HEADER_BYTES, INTERESTING, cases, corpus

pytestmark = pytest.mark.root

SEED = 20_261_124
MESSAGES = 4_000  # with each build
FRAMES = 4_000
LONGEST_MESSAGE = 1_500  # the kernel runs programs over a page at most, and two of them go into one
SHORTEST_FRAME = {4: 34, 6: 54}  # by IP version; the kernel runs no program over less
# What BPF and the learner say alike, of whatever bytes. The rest is about records: BPF leaves those it cannot place
# (UNREADABLE) to the daemon, which is what the learner reads with.
DECIDED_ALIKE = {
    *(Outcome.UNTRUSTED, Outcome.UNSOLICITED, Outcome.MISMATCHED, Outcome.MALFORMED, Outcome.UNLISTED),
}


class Pair:
    """Both, under one policy; nothing is held from one case to the next."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.ear = Ear()
        self.told = self.untold = 0

    def forget(self) -> None:
        """The next packets meet no query and no address."""
        for name in "queries", "learned":
            for key, _ in list(self.harness.state.maps[name].items()):
                self.harness.state.maps[name].delete(key)
        self.ear = Ear()

    def leave(self, frame: bytes) -> None:
        """Both remember the same questions."""
        self.harness.run("track_query", frame)
        self.ear.leave(frame)
        assert len(self.ear.overhearing) == len(list(self.harness.state.maps["queries"].items())), frame.hex()

    def arrive(self, frame: bytes) -> list[Outcome]:
        """BPF's outcomes, compared."""
        bpf_says = self.harness.learn(frame)
        bpf_tells = [bare(event) for event in self.harness.events()]
        ear_says = self.ear.learn(frame)
        ear_tells = [bare(event) for event in self.ear.events]
        assert len(ear_says) == len(bpf_says), frame.hex()
        for outcome in DECIDED_ALIKE:
            assert ear_says.count(outcome) == bpf_says.count(outcome), frame.hex()
        for event in ear_tells:
            # Of two messages in one packet the daemon has not read the first when the second is judged.
            assert event in bpf_tells or Outcome.REPEATED in bpf_says, frame.hex()
        # Nor less: what BPF learned is held because of the learner's events, and what it told in vain taught nothing.
        assert self.harness.addresses() <= self.ear.addresses(), frame.hex()
        for event in bpf_tells:
            if event not in ear_tells:
                self.untold += 1
                found = dns_vectors.accepted(event.wire)
                assert not found or not found[2], frame.hex()
        self.told += len(ear_tells)
        return bpf_says


def bare(event: DnsEvent) -> DnsEvent:
    """Without what is each one's own."""
    return replace(event, at_ns=0, interface=0, inserted=0, outcome=Outcome.LEARNED)


@pytest.fixture
def pair(harness: Harness) -> Pair:
    return Pair(harness)


def udp_query(vector: Vector) -> bytes:
    return packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.UDP, packets.udp(CLIENT_PORT, 53, vector.query))


def udp_answer(wire: bytes) -> bytes:
    return packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, packets.udp(53, CLIENT_PORT, wire))


def test_vectors_come_to_the_same(pair: Pair) -> None:
    for vector in dns_vectors.load():
        pair.forget()
        pair.leave(udp_query(vector))
        (bpf_says,) = pair.arrive(udp_answer(vector.answer))
        assert bpf_says is vector.outcome
        if bpf_says is not Outcome.UNREADABLE or len(vector.answer) > MAX_WIRE_BYTES:
            assert pair.ear.overhearing.outcomes == {bpf_says: 1}, vector.name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_damaged_answers_never_tell_more_than_bpf(pair: Pair) -> None:
    outcomes: Counter[Outcome] = Counter()
    for _, (query, wire) in zip(range(MESSAGES), cases(), strict=False):
        if len(wire) < DNS_HEADER_BYTES:
            continue
        pair.forget()
        pair.leave(packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.UDP, packets.udp(CLIENT_PORT, 53, query)))
        outcomes.update(pair.arrive(udp_answer(wire)))
    # The corpus reaches every decision, and most of what is told teaches.
    for outcome in Outcome.LEARNED, Outcome.UNREADABLE, Outcome.NO_ADDRESS, Outcome.MISMATCHED, Outcome.MALFORMED:
        assert outcomes[outcome] > MESSAGES * 0.005, outcomes
    assert pair.told > MESSAGES * 0.3
    print(f"{MESSAGES} messages: {pair.told} told, {pair.untold} by BPF only; {dict(outcomes)}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_damaged_packets_are_read_alike(pair: Pair) -> None:
    rng = random.Random(SEED)  # noqa: S311
    vectors = [vector for vector in corpus() if len(vector.answer) < LONGEST_MESSAGE]
    outcomes: Counter[Outcome] = Counter()
    remembered = 0
    for number in range(FRAMES):
        pair.forget()
        first, second = rng.choice(vectors), rng.choice(vectors)
        tcp = rng.random() < 0.5
        query, answer = frames(rng, first, second, tcp=tcp, v6=bool(number % 2))
        # One of the two is damaged, now and then both.
        damaged = rng.choice((1, 2, 2, 3))
        pair.leave(damage(rng, query) if damaged & 1 else query)
        remembered += len(pair.ear.overhearing)
        outcomes.update(pair.arrive(damage(rng, answer) if damaged & 2 else answer))
    for outcome in Outcome.LEARNED, Outcome.UNREADABLE, Outcome.UNTRUSTED, Outcome.UNSOLICITED, Outcome.MALFORMED:
        assert outcomes[outcome] > FRAMES * 0.005, outcomes
    assert remembered > FRAMES * 0.3
    print(f"{FRAMES} packets: {pair.told} told, {pair.untold} by BPF only, {remembered} queries; {dict(outcomes)}")


def frames(rng: random.Random, first: Vector, second: Vector, *, tcp: bool, v6: bool) -> tuple[bytes, bytes]:
    """A query and an answer, of two messages each over TCP; IPv6 with extension headers now and then."""
    client, resolver = (CLIENT_V6, RESOLVER_V6) if v6 else (CLIENT_V4, RESOLVER_V4)
    if rng.random() < 0.03:
        resolver = RESOLVER_V6 if v6 else STRANGER
    protocol = Protocol.TCP if tcp else Protocol.UDP
    if tcp:
        asked = packets.message(first.query) + packets.message(b"\x43\x21" + second.query[2:])
        answered = packets.message(first.answer) + packets.message(b"\x43\x21" + second.answer[2:])
        query, answer = packets.tcp(CLIENT_PORT, 53, asked), packets.tcp(53, CLIENT_PORT, answered, options=bytes(12))
    else:
        query, answer = packets.udp(CLIENT_PORT, 53, first.query), packets.udp(53, CLIENT_PORT, first.answer)
    extensions = extension_chain(rng, protocol) if v6 and rng.random() < 0.5 else None
    return (
        packets.frame(client, resolver, protocol, query, extensions=extensions),
        packets.frame(resolver, client, protocol, answer, extensions=extensions),
    )


def extension_chain(rng: random.Random, protocol: Protocol) -> tuple[int, bytes]:
    """One to five extension headers, the last a fragment header or options: (its first number, its bytes)."""
    if rng.random() < 0.5:
        kind, chain = packets.FRAGMENT, packets.fragment(protocol, more=rng.random() < 0.2)
    else:
        kind, chain = packets.DESTINATION_OPTIONS, packets.extension(protocol, words=rng.randrange(3))
    for _ in range(rng.randrange(5)):
        kind, chain = packets.HOP_BY_HOP, packets.extension(kind) + chain
    return kind, chain


def damage(rng: random.Random, frame: bytes) -> bytes:
    """One to three bytes of the headers or of the message's beginning are others, or the end is missing."""
    if rng.random() < 0.15:
        return frame[: rng.randrange(SHORTEST_FRAME[frame[14] >> 4], len(frame) + 1)]
    damaged = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 3))):
        damaged[rng.randrange(14, min(len(damaged), rng.choice((80, 160))))] = rng.choice(
            (rng.randrange(256), *INTERESTING)
        )
    return bytes(damaged)
