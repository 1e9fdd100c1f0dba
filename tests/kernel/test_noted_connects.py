"""What the connect hooks keep for the audit log: who asked for a connection that nobody vouches for."""

from __future__ import annotations

import os
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

from enforcer import kernel_abi, procfs
from enforcer.kernel_abi import Connect, MarkedScope, Protocol
from tests.kernel.harness import Harness
from tests.kernel.test_connect import Process, process, scope_of

__all__ = ["process"]
pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def _nothing_noted(harness: Harness, process: Process) -> None:
    harness.state.maps["connects"].clear()
    harness.configure(netns_cookie=process.netns_cookie, pidns=procfs.pidns_identity())


def noted(
    harness: Harness,
    address: IPv4Address | IPv6Address,
    port: int = 443,
    protocol: Protocol = Protocol.TCP,
    scope: MarkedScope = MarkedScope.HOST,
) -> Connect | None:
    key = kernel_abi.pack_connect_key(address, port, protocol, scope, os.getuid())
    value = harness.state.maps["connects"].lookup(key)
    return None if value is None else kernel_abi.decode_connect(value)


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7", "::ffff:192.0.2.7"])
def test_connection_without_a_voucher_is_noted_with_its_process(
    harness: Harness, process: Process, address: str
) -> None:
    before = harness.state.now_ns()
    process.mark(address=address, comm="curious")
    parsed = ip_address(address)
    connect = noted(harness, getattr(parsed, "ipv4_mapped", None) or parsed)
    assert connect is not None
    assert connect.process == process.child.pid
    assert connect.comm == b"curious"
    assert connect.cgroup_id == procfs.cgroup_id(process.cgroup)
    assert before <= connect.at_ns <= harness.state.now_ns()
    assert connect.other_at_ns == 0


def test_connection_that_is_vouched_for_is_not_noted(harness: Harness, process: Process) -> None:
    harness.vouch(ip_address("192.0.2.1"), 443, seconds=60)
    process.mark(address="192.0.2.1")
    assert noted(harness, ip_address("192.0.2.1")) is None
    process.mark(address="192.0.2.1", port=5000)
    assert noted(harness, ip_address("192.0.2.1"), 5000) is not None


def test_udp_and_scopes_are_kept_apart(harness: Harness, process: Process) -> None:
    scope_of(harness, process.cgroup, MarkedScope.CONTAINER)
    process.mark(address="192.0.2.7", kind="udp")
    address = ip_address("192.0.2.7")
    assert noted(harness, address, protocol=Protocol.UDP, scope=MarkedScope.CONTAINER) is not None
    assert noted(harness, address, protocol=Protocol.UDP) is None
    assert noted(harness, address, scope=MarkedScope.CONTAINER) is None


def test_another_process_for_the_same_destination_shows(harness: Harness, process: Process) -> None:
    process.mark(address="192.0.2.7")
    first = noted(harness, ip_address("192.0.2.7"))
    assert first is not None
    key = kernel_abi.pack_connect_key(ip_address("192.0.2.7"), 443, Protocol.TCP, MarkedScope.HOST, os.getuid())
    as_if_of_another = kernel_abi.CONNECT.codec.pack(first.at_ns, 0, 1, first.process + 1, 0, b"other")
    harness.state.maps["connects"].update(key, as_if_of_another)
    process.mark(address="192.0.2.7")
    second = noted(harness, ip_address("192.0.2.7"))
    assert second is not None
    assert (second.process, second.other_at_ns) == (process.child.pid, first.at_ns)
    process.mark(address="192.0.2.7")
    third = noted(harness, ip_address("192.0.2.7"))
    assert third is not None
    assert third.other_at_ns == first.at_ns


def test_process_of_another_pid_namespace_is_known_by_the_first_ones_numbers_only(
    harness: Harness, process: Process
) -> None:
    if Path("/proc/self/ns/pid").stat().st_ino != 0xEFFFFFFC:
        pytest.skip("these tests run in a pid namespace of their own")
    process.mark(address="192.0.2.7", place="pidns")
    container = MarkedScope.CONTAINER if "_pidns" in harness.state.report.programs["connect4"] else MarkedScope.HOST
    connect = noted(harness, ip_address("192.0.2.7"), scope=container)
    assert connect is not None
    assert connect.process > 2  # it is 2 where it lives
    # Whoever enforces from such a namespace cannot know it by the number of another one.
    device, inode = procfs.pidns_identity()
    harness.configure(netns_cookie=process.netns_cookie, pidns=(device, inode - 1))
    process.mark(address="192.0.2.8")
    foreign = [
        kernel_abi.decode_connect(value).process
        for key, value in harness.state.maps["connects"].items()
        if key.startswith(kernel_abi.pack_address(ip_address("192.0.2.8")) + struct.pack("=H", 443))
    ]
    assert foreign == [0]
