"""The user-space learner under the policy of dns_vectors, with the daemon's own memory behind it."""

from __future__ import annotations

from enforcer import dns_answer
from enforcer.dns_answer import DnsAnswer
from enforcer.kernel_abi import DnsEvent, Outcome, Protocol
from enforcer.learned import LearnedAddress, LearnedAddresses, permitted
from enforcer.overhearing import Overhearing, Packet
from enforcer.policy import Address, Rule, RuleKind
from tests import dns_vectors
from tests.kernel import packets
from tests.kernel.harness import CLIENT_PORT, CLIENT_V4, CLIENT_V6, RESOLVER_V4, RESOLVER_V6, SECOND_NS

INTERFACE = 3
ETHERNET_HEADER_BYTES = 14
RULES = [
    (
        Rule(
            str(entry.pattern),
            RuleKind.REGISTRY if entry.private_addresses else RuleKind.PRESET,
            (entry.pattern,),
            entry.ports,
        ),
        entry.pattern,
    )
    for entry in dns_vectors.POLICY
]


class Ear:
    """Ethernet frames in, as the BPF harness takes them; outcomes, learned addresses and events out."""

    def __init__(self) -> None:
        self.now_ns = 1_000 * SECOND_NS
        self.learned = LearnedAddresses()
        self.overhearing = Overhearing(self._listed, self.permissions, self.learned.holds)
        self.overhearing.trust((RESOLVER_V4, RESOLVER_V6))
        self.events: list[DnsEvent] = []

    def _listed(self, name: str) -> bool:
        return any(pattern.matches(name) for _, pattern in RULES)

    def permissions(self, answer: DnsAnswer, now: float) -> list[LearnedAddress]:
        matches = [(rule, pattern) for rule, pattern in RULES if pattern.matches(answer.question)]
        return list(permitted(answer, matches, dns_answer.classify_address, now))

    def leave(self, frame: bytes) -> None:
        """A packet leaves."""
        assert self.overhearing.hear(Packet(self.now_ns, INTERFACE, True, frame[ETHERNET_HEADER_BYTES:])) == []

    def learn(self, frame: bytes) -> list[Outcome]:
        """What became of the messages in an arriving packet; the daemon reads the events at once."""
        before = self.overhearing.outcomes.copy()
        events = self.overhearing.hear(Packet(self.now_ns, INTERFACE, False, frame[ETHERNET_HEADER_BYTES:]))
        for event in events:
            answer = dns_answer.parse_answer(event.wire, event.resolver)
            self.learned.learn(self.permissions(answer, event.at_ns / SECOND_NS))
        self.events += events
        return list((self.overhearing.outcomes - before).elements())

    def ask(self, query: bytes, *, port: int = CLIENT_PORT, v6: bool = False) -> None:
        """A query leaves over UDP."""
        client, resolver = (CLIENT_V6, RESOLVER_V6) if v6 else (CLIENT_V4, RESOLVER_V4)
        self.leave(packets.frame(client, resolver, Protocol.UDP, packets.udp(port, 53, query)))

    def answer(self, wire: bytes, *, port: int = CLIENT_PORT, v6: bool = False) -> Outcome:
        """An answer arrives over UDP."""
        client, resolver = (CLIENT_V6, RESOLVER_V6) if v6 else (CLIENT_V4, RESOLVER_V4)
        (outcome,) = self.learn(packets.frame(resolver, client, Protocol.UDP, packets.udp(53, port, wire)))
        return outcome

    def addresses(self) -> set[Address]:
        """What the daemon holds because of the events, whatever the port."""
        return {entry.address for entry in self.learned}
