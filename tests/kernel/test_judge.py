"""BPF as a judge beside an nf_tables that can only drop: what it counts, and how it tells a client at once."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from ipaddress import ip_network

import pytest

from enforcer import bpf
from enforcer.kernel_abi import (
    JudgedPorts,
    Judging,
    MarkedScope,
    Protocol,
    RangeClass,
    pack_listed_key,
    pack_range_key,
    pack_refusal_slot,
)
from enforcer.policy import Address
from tests.kernel import packets
from tests.kernel.harness import TC_ACT_UNSPEC, VOUCHED, Harness
from tests.kernel.test_connect import LEARNED, Process, process
from tests.kernel.test_gate import CONTAINER, OTHER, REGISTRY, both_families

pytestmark = pytest.mark.root
__all__ = ["process"]  # a fixture

TC_ACT_REDIRECT = 7
UNROUTED = ("ENETUNREACH", "EADDRNOTAVAIL")  # what comes after the hook, in a namespace without a route
SYN, RST, ACK = 0x02, 0x04, 0x10
OWN = {4: ip_network("203.0.113.0/24"), 6: ip_network("2001:db8:203::/64")}
LISTED = {4: ip_network("198.51.100.0/24"), 6: ip_network("2001:db8:198::/48")}


def u32(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


@pytest.fixture
def judge(harness: Harness) -> Iterator[Harness]:
    """Containers and host are judged on 443 and 5000, engines everywhere; one network is listed, one is the host's."""
    maps = harness.state.maps
    levels = [JudgedPorts.REGISTRY, JudgedPorts.REGISTRY, JudgedPorts.EVERY, JudgedPorts.REGISTRY]
    for number, level in enumerate(levels):
        maps["levels"].update(u32(number), u32(level))
    maps["registry_ports"].update_many((u32(port), b"\1") for port in (443, 5000))
    for version in 4, 6:
        listed, own = LISTED[version], OWN[version]
        maps["listed"].update(pack_listed_key(listed.network_address, listed.prefixlen, 443), b"\1")
        maps["ranges"].update(pack_range_key(own.network_address, own.prefixlen), u32(RangeClass.NEVER))
    harness.configure(judging=Judging.REFUSE)
    yield harness
    maps["levels"].update_many((u32(number), u32(JudgedPorts.NONE)) for number in range(4))
    for name in "registry_ports", "listed":
        maps[name].clear()
    for own in OWN.values():
        maps["ranges"].delete(pack_range_key(own.network_address, own.prefixlen))


def counted(harness: Harness, scope: MarkedScope, protocol: Protocol = Protocol.TCP, *, observing: bool = False) -> int:
    return harness.state.maps["refusals"].sum_u64(pack_refusal_slot(scope, protocol, observing=observing))


def inside(networks: dict[int, object], version: int) -> Address:
    network = networks[version]
    return network[7]  # type: ignore[index, no-any-return]


def syn(destination: Address, port: int = 443, flags: int = SYN, options: bytes = b"") -> bytes:
    transport = bytearray(packets.tcp(50_000, port, flags=flags, options=options))
    transport[4:12] = struct.pack("!II", 0xFFFFFFFF, 0)  # its successor is 0: carries in the sums
    source = CONTAINER[destination.version]
    transport[16:18] = checksum(pseudo(source, destination, len(transport)) + transport)
    return packets.frame(source, destination, Protocol.TCP, bytes(transport))


def pseudo(source: Address, destination: Address, length: int) -> bytes:
    return source.packed + destination.packed + struct.pack("!II", length, Protocol.TCP)


def checksum(data: bytes) -> bytes:
    """RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def gate(harness: Harness, frame: bytes) -> bpf.PacketRun:
    return bpf.run_packet(harness.state.programs["gate"], frame)


@both_families
@pytest.mark.parametrize("options", [b"", bytes((2, 4, 5, 0xB4, 4, 2, 1, 1))], ids=["plain", "options"])
def test_container_is_answered_with_the_reset_that_its_syn_deserves(
    judge: Harness, version: int, options: bytes
) -> None:
    before = counted(judge, MarkedScope.CONTAINER)
    frame = syn(OTHER[version], options=options)
    run = gate(judge, frame)
    assert run.verdict == TC_ACT_REDIRECT
    assert counted(judge, MarkedScope.CONTAINER) == before + 1
    head = 14 + (20 if version == 4 else 40)
    transport = run.packet[head:]
    assert struct.unpack_from("!HHII", transport) == (443, 50_000, 0, 0)
    assert transport[13] == RST | ACK
    assert (run.packet[:6], run.packet[6:12]) == (frame[6:12], frame[:6])
    packed = len(CONTAINER[version].packed)
    assert run.packet[head - 2 * packed : head] == OTHER[version].packed + CONTAINER[version].packed
    assert checksum(pseudo(OTHER[version], CONTAINER[version], len(transport)) + transport) == b"\0\0"


@both_families
@pytest.mark.parametrize("why", ["learned", "listed", "own", "other port", "not first"])
def test_what_is_permitted_or_not_judged_is_left_to_nftables(judge: Harness, version: int, why: str) -> None:
    judge.vouch(REGISTRY[version], 443, 60)
    frame = {
        "learned": syn(REGISTRY[version]),
        "listed": syn(inside(LISTED, version)),  # type: ignore[arg-type]
        "own": syn(inside(OWN, version)),  # type: ignore[arg-type]
        "other port": syn(OTHER[version], 80),
        "not first": syn(OTHER[version], flags=ACK),
    }[why]
    before = counted(judge, MarkedScope.CONTAINER)
    run = gate(judge, frame)
    assert (run.verdict, run.packet) == (TC_ACT_UNSPEC, frame)
    assert counted(judge, MarkedScope.CONTAINER) == before
    if judge.tests_marks:
        assert bool(run.mark & VOUCHED) == (why == "learned")


@both_families
def test_listed_address_on_another_port_is_refused(judge: Harness, version: int) -> None:
    assert gate(judge, syn(inside(LISTED, version), 5000)).verdict == TC_ACT_REDIRECT  # type: ignore[arg-type]


@both_families
def test_counting_alone_answers_nobody(judge: Harness, version: int) -> None:
    judge.configure(judging=Judging.COUNT)
    before = counted(judge, MarkedScope.CONTAINER)
    assert gate(judge, syn(OTHER[version])).verdict == TC_ACT_UNSPEC
    assert counted(judge, MarkedScope.CONTAINER) == before + 1


def test_observe_mode_counts_apart(judge: Harness) -> None:
    judge.configure(judging=Judging.COUNT, observing=True)
    refused, observed = (counted(judge, MarkedScope.CONTAINER, observing=each) for each in (False, True))
    gate(judge, syn(OTHER[4]))
    assert counted(judge, MarkedScope.CONTAINER) == refused
    assert counted(judge, MarkedScope.CONTAINER, observing=True) == observed + 1


def test_without_judging_nothing_is_counted(harness: Harness) -> None:
    before = counted(harness, MarkedScope.CONTAINER)
    assert gate(harness, syn(OTHER[4])).verdict == TC_ACT_UNSPEC
    assert counted(harness, MarkedScope.CONTAINER) == before


@pytest.mark.parametrize("address", ["192.0.2.2", "2001:db8::2", "::ffff:192.0.2.2"])
def test_socket_of_the_host_is_told_by_connect_itself(judge: Harness, process: Process, address: str) -> None:
    judge.configure(netns_cookie=process.netns_cookie, judging=Judging.REFUSE)
    for known in LEARNED.values():
        judge.vouch(known, 443, 60)
    before = counted(judge, MarkedScope.HOST)
    assert process.error(address=address) == "EPERM"
    assert counted(judge, MarkedScope.HOST) == before + 1
    assert process.error(address=address, port=80) in UNROUTED
    assert process.error(address=address.replace("2.2", "2.1").replace("::2", "::1")) in UNROUTED
    judge.configure(netns_cookie=process.netns_cookie, judging=Judging.COUNT)
    assert process.error(address=address) in UNROUTED
    assert counted(judge, MarkedScope.HOST) == before + 2


def test_engine_is_judged_on_every_tcp_port_but_dns(judge: Harness, process: Process) -> None:
    judge.configure(netns_cookie=process.netns_cookie, judging=Judging.REFUSE)
    judge.state.maps["programs"].update(b"skopeo".ljust(16, b"\0"), u32(MarkedScope.ENGINE))
    assert process.error(address="192.0.2.2", port=8443, comm="skopeo") == "EPERM"
    assert process.error(address="192.0.2.2", port=53, comm="skopeo") in UNROUTED
    assert process.error(address="192.0.2.2", port=8443, comm="curl") in UNROUTED
    assert process.error(address="192.0.2.2", port=443, kind="udp", comm="skopeo") == "EPERM"
    assert process.error(address="192.0.2.2", port=8443, kind="udp", comm="skopeo") in UNROUTED
