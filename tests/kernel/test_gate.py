"""Marks of packets that arrive from containers."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from enforcer.kernel_abi import Protocol
from enforcer.policy import Address
from tests.kernel import packets
from tests.kernel.harness import CONTAINER as SEEN
from tests.kernel.harness import FOREIGN_MARK, MASK, VOUCHED, Harness

pytestmark = pytest.mark.root

CONTAINER = {4: ip_address("10.88.0.2"), 6: ip_address("fd00:88::2")}
REGISTRY = {4: ip_address("192.0.2.1"), 6: ip_address("2001:db8::1")}
OTHER = {4: ip_address("192.0.2.2"), 6: ip_address("2001:db8::2")}
SYN, ACK = 0x02, 0x10
PERMITTED = SEEN | VOUCHED  # SEEN alone: by the gate, which does not vouch

both_families = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture(autouse=True)
def _marks_are_testable(harness: Harness) -> None:
    harness.need_marks()


def segment(destination: Address, port: int = 443, *, flags: int = SYN, options: bytes = b"") -> bytes:
    transport = packets.tcp(50_000, port, flags=flags)
    return packets.frame(CONTAINER[destination.version], destination, Protocol.TCP, transport, options=options)


@both_families
@pytest.mark.parametrize("flags", [SYN, ACK])
def test_segment_to_a_learned_address_is_vouched_for(harness: Harness, version: int, flags: int) -> None:
    harness.vouch(REGISTRY[version], 443, 60)
    assert harness.run("gate", segment(REGISTRY[version], flags=flags)) == PERMITTED


@both_families
def test_segment_to_another_address_or_port_is_not(harness: Harness, version: int) -> None:
    harness.vouch(REGISTRY[version], 443, 60)
    assert harness.run("gate", segment(OTHER[version])) == SEEN
    assert harness.run("gate", segment(REGISTRY[version], 5000)) == SEEN


@both_families
def test_segment_from_a_learned_address_is_not(harness: Harness, version: int) -> None:
    harness.vouch(REGISTRY[version], 443, 60)
    answer = packets.tcp(443, 50_000, flags=SYN)
    frame = packets.frame(REGISTRY[version], CONTAINER[version], Protocol.TCP, answer)
    assert harness.run("gate", frame) == SEEN


@both_families
def test_expired_address_is_not_vouched_for(harness: Harness, version: int) -> None:
    harness.vouch(REGISTRY[version], 443, -0.001)
    assert harness.run("gate", segment(REGISTRY[version])) == SEEN


@both_families
def test_packet_of_a_connection_says_that_its_address_is_in_use(harness: Harness, version: int) -> None:
    harness.vouch(REGISTRY[version], 443, 60)
    harness.vouch(OTHER[version], 443, -0.001)
    before = harness.state.now_ns()
    for address in REGISTRY[version], OTHER[version]:
        harness.run("gate", segment(address))
    first = harness.used_at(REGISTRY[version], 443)
    assert before <= first <= harness.state.now_ns()
    assert harness.used_at(OTHER[version], 443) == 0
    harness.run("gate", segment(REGISTRY[version]))
    assert harness.used_at(REGISTRY[version], 443) == first  # to the second


@both_families
def test_udp_is_never_vouched_for(harness: Harness, version: int) -> None:
    harness.vouch(REGISTRY[version], 443, 60)
    datagram = packets.udp(50_000, 443, bytes(40))
    assert harness.run("gate", packets.frame(CONTAINER[version], REGISTRY[version], Protocol.UDP, datagram)) == 0


@both_families
def test_forged_marks_are_cleared_and_other_bits_stay(harness: Harness, version: int) -> None:
    harness.vouch(REGISTRY[version], 443, 60)
    mark = MASK | FOREIGN_MARK
    assert harness.run("gate", segment(OTHER[version]), mark) == FOREIGN_MARK | SEEN
    assert harness.run("gate", segment(REGISTRY[version]), mark) == FOREIGN_MARK | PERMITTED
    assert harness.run("gate", segment(REGISTRY[version]), SEEN) == PERMITTED


def test_forged_mark_of_what_is_no_ip_packet_is_cleared(harness: Harness) -> None:
    arp = bytes(12) + b"\x08\x06" + bytes(46)
    assert harness.run("gate", arp, MASK | FOREIGN_MARK) == FOREIGN_MARK


def test_fragment_without_ports_is_not_vouched_for(harness: Harness) -> None:
    harness.vouch(REGISTRY[4], 443, 60)
    transport = packets.tcp(50_000, 443, flags=SYN)
    frame = packets.frame(CONTAINER[4], REGISTRY[4], Protocol.TCP, transport, fragmentation=1)
    assert harness.run("gate", frame) == 0


def test_options_and_extension_headers_are_passed_over(harness: Harness) -> None:
    for address in REGISTRY.values():
        harness.vouch(address, 443, 60)
    assert harness.run("gate", segment(REGISTRY[4], options=bytes([1]) * 8)) == PERMITTED
    transport = packets.tcp(50_000, 443, flags=SYN)
    chain = (packets.DESTINATION_OPTIONS, packets.extension(Protocol.TCP, words=1))
    frame = packets.frame(CONTAINER[6], REGISTRY[6], Protocol.TCP, transport, extensions=chain)
    assert harness.run("gate", frame) == PERMITTED


def test_nothing_is_changed_before_the_settings_are_written(harness: Harness) -> None:
    harness.vouch(REGISTRY[4], 443, 60)
    harness.configure(configured=False)
    assert harness.run("gate", segment(REGISTRY[4])) == 0
    assert harness.run("gate", segment(OTHER[4]), MASK) == MASK
