"""Packet sockets under real packets, in namespaces of our own: real clients, a resolver over veth, a stub on lo."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer.kernel_abi import DnsEvent, Outcome, Protocol
from enforcer.overhearing import Packet
from enforcer.packet_socket import PacketSockets
from enforcer.policy import Address
from tests import dns_vectors
from tests.ear import Ear
from tests.kernel import packets
from tests.kernel.harness import CLIENT_PORT, CLIENT_V4, CLIENT_V6, RESOLVER_V4, RESOLVER_V6
from tests.namespaces import inside, ip, new_namespace, path_of

pytestmark = pytest.mark.root

ROOT = Path(__file__).parent.parent
DEADLINE_SECONDS = 10
STUB_V4, STUB_V6 = ip_address("127.0.0.53"), ip_address("::1")
VECTORS = {vector.name: vector for vector in dns_vectors.load()}
PLAIN = VECTORS["one-address"]
MILLISECOND_NS = 1_000_000
FLOOD_PACKETS, FLOOD_A_SECOND = 10_000, 10_000
MORE_THAN_THE_BUFFER_HOLDS = 40_000


@pytest.fixture
def far() -> Iterator[int]:
    """This test runs on a host with the uplink "near"; the namespace of its other end, where the resolvers are."""
    with new_namespace() as host, inside(host), new_namespace() as elsewhere:
        ip(f"link add near type veth peer name far; link set far netns {path_of(elsewhere)}; link set near up")
        ip(f"address add {CLIENT_V4}/32 dev near; address add {CLIENT_V6}/128 dev near nodad")
        with inside(elsewhere):
            ip(f"link set far up; address add {RESOLVER_V4}/32 dev far; address add {RESOLVER_V6}/128 dev far nodad")
            ip("route add default dev far; -6 route add default dev far")
        ip("route add default dev near; -6 route add default dev near")
        yield elsewhere


class Listener:
    """What packet sockets hear, and what comes of it."""

    def __init__(self) -> None:
        self.ear = Ear()
        self.ear.overhearing.trust((RESOLVER_V4, RESOLVER_V6, STUB_V4, STUB_V6))
        self.packets: list[Packet] = []
        self.events: list[DnsEvent] = []
        self.sockets = PacketSockets(self.hear, time.CLOCK_BOOTTIME)

    def hear(self, heard: list[Packet]) -> None:
        self.packets += heard
        for packet in heard:
            self.events += self.ear.overhearing.hear(packet)

    def outcomes(self) -> dict[Outcome, int]:
        return dict(self.ear.overhearing.outcomes)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for it, under a deadline."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition():  # noqa: ASYNC110 - of the kernel's side too
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def listening(*names: str) -> AsyncIterator[Listener]:
    listener = Listener()
    with listener.sockets:
        listener.sockets.listen_on([socket.if_nametoindex(name) for name in names])
        yield listener


def drive(test: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(test())


def served(namespace: int | None, address: Address, kind: socket.SocketKind) -> socket.socket:
    """A socket on port 53."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with contextlib.nullcontext() if namespace is None else inside(namespace):
        server = socket.socket(family, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.settimeout(DEADLINE_SECONDS)
    server.bind((str(address), 53))
    return server


def exchange(namespace: int | None, address: Address, kind: socket.SocketKind, query: bytes, answer: bytes) -> None:
    """A client of this namespace asks the resolver at `address`, and has its answer."""
    with served(namespace, address, kind) as server, socket.socket(server.family, kind) as client:
        client.settimeout(DEADLINE_SECONDS)
        if kind is socket.SOCK_STREAM:
            server.listen()
            client.connect((str(address), 53))
            accepted, _ = server.accept()
            with accepted:
                client.sendall(packets.message(query))
                assert accepted.recv(4096) == packets.message(query)
                accepted.sendall(packets.message(answer))
                assert client.recv(4096) == packets.message(answer)
        else:
            client.connect((str(address), 53))
            client.sendall(query)
            received, peer = server.recvfrom(4096)
            assert received == query
            server.sendto(answer, peer)
            assert client.recv(65_535) == answer


# --- real clients ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM], ids=["udp", "tcp"])
@pytest.mark.parametrize(
    ("address", "interface"),
    [(RESOLVER_V4, "near"), (RESOLVER_V6, "near"), (STUB_V4, "lo"), (STUB_V6, "lo")],
    ids=["ipv4", "ipv6", "ipv4 stub", "ipv6 stub"],
)
def test_answer_that_a_client_has_is_heard(far: int, address: Address, interface: str, kind: socket.SocketKind) -> None:
    async def test() -> None:
        async with listening("near", "lo") as listener:
            exchange(far if interface == "near" else None, address, kind, PLAIN.query, PLAIN.answer)
            await listener.until(lambda: listener.events)
            (event,) = listener.events
            assert event.wire == PLAIN.answer
            assert (event.resolver, event.outcome, event.inserted) == (address, Outcome.LEARNED, 0)
            assert event.interface == socket.if_nametoindex(interface)
            assert event.protocol is (Protocol.TCP if kind is socket.SOCK_STREAM else Protocol.UDP)
            assert 0 <= time.clock_gettime_ns(time.CLOCK_BOOTTIME) - event.at_ns < DEADLINE_SECONDS * 10**9
            assert len(listener.ear.overhearing) == 0
            assert listener.outcomes() == {Outcome.LEARNED: 1}
            assert listener.sockets.lost == 0

    drive(test)


def test_each_packet_of_lo_is_heard_as_it_leaves_and_as_it_arrives_and_counts_once(far: int) -> None:
    async def test() -> None:
        async with listening("lo") as listener:
            exchange(None, STUB_V4, socket.SOCK_DGRAM, PLAIN.query, PLAIN.answer)
            await listener.until(lambda: len(listener.packets) >= 4)
            assert [packet.leaving for packet in listener.packets] == [True, False, True, False]
            assert [packet.data[28:] for packet in listener.packets] == [PLAIN.query] * 2 + [PLAIN.answer] * 2
            assert listener.outcomes() == {Outcome.LEARNED: 1}

    drive(test)


def test_answer_that_nobody_asked_for_teaches_nothing(far: int) -> None:
    async def test() -> None:
        async with listening("near", "lo") as listener:
            with served(far, RESOLVER_V4, socket.SOCK_DGRAM) as server:
                server.sendto(PLAIN.answer, (str(CLIENT_V4), CLIENT_PORT))
            await listener.until(listener.outcomes)
            assert listener.outcomes() == {Outcome.UNSOLICITED: 1}
            assert listener.events == []

    drive(test)


def test_forged_answer_with_another_id_teaches_nothing_and_the_right_one_does(far: int) -> None:
    async def test() -> None:
        async with listening("near") as listener:
            forged = b"\x99\x99" + PLAIN.answer[2:]
            with (
                served(far, RESOLVER_V4, socket.SOCK_DGRAM) as server,
                socket.socket(type=socket.SOCK_DGRAM) as client,
            ):
                client.settimeout(DEADLINE_SECONDS)
                client.sendto(PLAIN.query, (str(RESOLVER_V4), 53))
                _, peer = server.recvfrom(4096)
                for wire in forged, PLAIN.answer, PLAIN.answer:
                    server.sendto(wire, peer)
            await listener.until(lambda: sum(listener.outcomes().values()) == 3)
            assert listener.outcomes() == {Outcome.UNSOLICITED: 2, Outcome.LEARNED: 1}
            assert [event.wire for event in listener.events] == [PLAIN.answer]

    drive(test)


def test_answer_in_fragments_is_left_to_the_daemon_by_its_first(far: int) -> None:
    async def test() -> None:
        async with listening("near") as listener:
            answer = PLAIN.answer + bytes(4_000)
            exchange(far, RESOLVER_V4, socket.SOCK_DGRAM, PLAIN.query, answer)
            await listener.until(lambda: listener.events)
            (event,) = listener.events
            assert event.outcome is Outcome.UNREADABLE
            assert event.message_length == len(answer) > len(event.wire)
            assert len(listener.packets) == 2  # the query, the first fragment

    drive(test)


# --- rights ----------------------------------------------------------------------------------------------------------
CHILD = """
import asyncio, socket, sys, time
from enforcer.packet_socket import PacketSockets

async def main():
    heard = asyncio.Event()
    with PacketSockets(lambda packets: heard.set(), time.CLOCK_BOOTTIME) as sockets:
        sockets.listen_on([socket.if_nametoindex("lo")])
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.sendto(b"anything", ("127.0.0.1", 53))
        await asyncio.wait_for(heard.wait(), 10)

asyncio.run(main())
"""


def child_with(capabilities: str) -> subprocess.CompletedProcess[str]:
    """Listens on lo, in this namespace, with these capabilities and no others."""
    only = ["setpriv", f"--bounding-set=-all{capabilities}", "--inh-caps=-all"]
    return subprocess.run(
        [*only, sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_two_capabilities_suffice(far: int) -> None:
    finished = child_with(",+net_admin,+net_raw")
    assert finished.returncode == 0, finished.stderr


def test_without_the_right_to_raw_sockets_it_says_which_is_missing(far: int) -> None:
    finished = child_with(",+net_admin")
    assert finished.returncode != 0
    assert "PacketSocketError: no packet socket: Operation not permitted; run as root, or with CAP_NET_RAW" in (
        finished.stderr
    )


# --- the filter ------------------------------------------------------------------------------------------------------
DATAGRAM = packets.udp(53, CLIENT_PORT, PLAIN.answer)
PASSED = {
    "ipv4": packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, DATAGRAM),
    "ipv4 options": packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, DATAGRAM, options=b"\x94\x04\0\0" * 10),
    "ipv4 tcp": packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.TCP, packets.tcp(CLIENT_PORT, 53)),
    "ipv4 first fragment": packets.frame(
        RESOLVER_V4, CLIENT_V4, Protocol.UDP, DATAGRAM, fragmentation=packets.MORE_FRAGMENTS
    ),
    "ipv6": packets.frame(RESOLVER_V6, CLIENT_V6, Protocol.UDP, DATAGRAM),
    "ipv6 tcp": packets.frame(RESOLVER_V6, CLIENT_V6, Protocol.TCP, packets.tcp(53, CLIENT_PORT)),
    "ipv6 extensions": packets.frame(
        RESOLVER_V6,
        CLIENT_V6,
        Protocol.UDP,
        DATAGRAM,
        extensions=(
            packets.HOP_BY_HOP,
            packets.extension(packets.DESTINATION_OPTIONS, words=1) + packets.extension(Protocol.UDP),
        ),
    ),
    "ipv6 first fragment": packets.frame(
        RESOLVER_V6,
        CLIENT_V6,
        Protocol.UDP,
        DATAGRAM,
        extensions=(packets.FRAGMENT, packets.fragment(Protocol.UDP, more=True)),
    ),
}
DROPPED = {
    "other ports": packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, packets.udp(5353, 443, PLAIN.answer)),
    "other ports behind options": packets.frame(
        RESOLVER_V4, CLIENT_V4, Protocol.UDP, packets.udp(5353, 443, PLAIN.answer), options=bytes([1, 1, 0, 53]) * 5
    ),
    "other protocol": packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, DATAGRAM).replace(b"\x40\x11", b"\x40\x84"),
    "ipv4 later fragment": packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, DATAGRAM, fragmentation=100),
    "ipv6 other ports": packets.frame(RESOLVER_V6, CLIENT_V6, Protocol.TCP, packets.tcp(443, 5353)),
    "ipv6 later fragment": packets.frame(
        RESOLVER_V6,
        CLIENT_V6,
        Protocol.UDP,
        DATAGRAM,
        extensions=(packets.FRAGMENT, packets.fragment(Protocol.UDP, offset=100)),
    ),
    "ipv6 extension of icmp": packets.frame(
        RESOLVER_V6, CLIENT_V6, Protocol.UDP, DATAGRAM, extensions=(packets.HOP_BY_HOP, packets.extension(58))
    ),
    "ipv4 in ipv6": packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, DATAGRAM).replace(
        b"\x08\x00\x45", b"\x86\xdd\x45"
    ),
    "arp": packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, DATAGRAM).replace(b"\x08\x00\x45", b"\x08\x06\x45"),
}


def test_filter_passes_what_may_be_dns_and_drops_the_rest(far: int) -> None:
    async def test() -> None:
        async with listening("near") as listener:
            with inside(far), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
                raw.bind(("far", 0))
                for frame in (*DROPPED.values(), *PASSED.values()):
                    raw.send(b"\xff" * 6 + frame[6:])
            await listener.until(lambda: len(listener.packets) >= len(PASSED))
            heard = [packet.data for packet in listener.packets]
            assert heard == [frame[14:] for frame in PASSED.values()]
            assert not any(packet.leaving for packet in listener.packets)

    drive(test)


# --- interfaces come and go ------------------------------------------------------------------------------------------
def test_other_interfaces_are_not_heard_until_they_are_asked_for(far: int) -> None:
    async def test() -> None:
        near, lo = socket.if_nametoindex("near"), socket.if_nametoindex("lo")
        async with listening("near") as listener:
            exchange(None, STUB_V4, socket.SOCK_DGRAM, PLAIN.query, PLAIN.answer)
            exchange(far, RESOLVER_V4, socket.SOCK_DGRAM, PLAIN.query, PLAIN.answer)
            await listener.until(lambda: listener.events)
            assert {packet.interface for packet in listener.packets} == {near}
            listener.sockets.listen_on([lo, 999_999])
            assert listener.sockets.interfaces == {lo}
            listener.packets.clear()
            listener.events.clear()
            exchange(far, RESOLVER_V4, socket.SOCK_DGRAM, PLAIN.query, PLAIN.answer)
            exchange(None, STUB_V4, socket.SOCK_DGRAM, PLAIN.query, PLAIN.answer)
            await listener.until(lambda: listener.events)
            assert {packet.interface for packet in listener.packets} == {lo}

    drive(test)


def test_interface_that_is_removed_leaves_the_set_and_others_are_heard_on(far: int) -> None:
    async def test() -> None:
        lo = socket.if_nametoindex("lo")
        async with listening("near", "lo") as listener:
            ip("link delete near")
            await listener.until(lambda: listener.sockets.interfaces == {lo})
            exchange(None, STUB_V4, socket.SOCK_DGRAM, PLAIN.query, PLAIN.answer)
            await listener.until(lambda: listener.events)

    drive(test)


def test_interface_that_was_removed_is_opened_again_under_its_index(far: int) -> None:
    async def test() -> None:
        index = socket.if_nametoindex("near")
        async with listening("near") as listener:
            ip(f"link delete near; link add near index {index} type veth peer name other; link set near up")
            listener.sockets.listen_on([index])  # before the loop has told of the removal
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
                ip("link set other up")
                raw.bind(("other", 0))
                raw.send(PASSED["ipv4"])
            await listener.until(lambda: listener.packets)
            assert listener.sockets.interfaces == {index}

    drive(test)


def test_interface_that_was_down_is_heard_when_it_is_up(far: int) -> None:
    async def test() -> None:
        near = socket.if_nametoindex("near")
        async with listening("near") as listener:
            ip("link set near down")
            await asyncio.sleep(0)
            listener.sockets.listen_on([near])
            assert listener.sockets.interfaces == {near}
            ip("link set near up; route add default dev near")
            exchange(far, RESOLVER_V4, socket.SOCK_DGRAM, PLAIN.query, PLAIN.answer)
            await listener.until(lambda: listener.events)
            assert listener.sockets.interfaces == {near}

    drive(test)


# --- load ------------------------------------------------------------------------------------------------------------
def test_packet_passed_when_the_kernel_says_and_not_when_it_is_read(far: int) -> None:
    async def test() -> None:
        async with listening("lo") as listener:
            with (
                served(None, STUB_V4, socket.SOCK_DGRAM) as server,
                socket.socket(type=socket.SOCK_DGRAM) as client,
            ):
                client.settimeout(DEADLINE_SECONDS)
                client.sendto(PLAIN.query, (str(STUB_V4), 53))
                _, peer = server.recvfrom(4096)
                time.sleep(0.3)  # noqa: ASYNC251 - the loop is held up
                server.sendto(PLAIN.answer, peer)
                client.recv(4096)
            await listener.until(lambda: listener.events)
            query, _, _, answer = listener.packets
            assert answer.at_ns - query.at_ns > 290 * MILLISECOND_NS

    drive(test)


def flood(server: socket.socket) -> None:
    """A second of answers that nobody asked for, of a trusted resolver."""
    began = time.monotonic()
    for number in range(FLOOD_PACKETS):
        wire = (number % 65_536).to_bytes(2) + PLAIN.answer[2:]
        server.sendto(wire, (str(CLIENT_V4), CLIENT_PORT))
        ahead = began + number / FLOOD_A_SECOND - time.monotonic()
        if ahead > 0.001:
            time.sleep(ahead)


def test_flood_neither_holds_up_the_loop_nor_hides_an_answer(far: int) -> None:
    async def test() -> None:
        async with listening("near", "lo") as listener:
            with served(far, RESOLVER_V4, socket.SOCK_DGRAM) as server:
                thread = threading.Thread(target=flood, args=(server,))
                thread.start()
                try:
                    exchange(None, STUB_V4, socket.SOCK_DGRAM, PLAIN.query, PLAIN.answer)
                    longest = 0.0
                    while thread.is_alive():
                        before = time.monotonic()
                        await asyncio.sleep(0)
                        longest = max(longest, time.monotonic() - before)
                finally:
                    thread.join()
            await listener.until(lambda: len(listener.packets) + listener.sockets.lost >= FLOOD_PACKETS + 4)
            assert len(listener.packets) + listener.sockets.lost == FLOOD_PACKETS + 4
            assert len(listener.events) == 1
            assert longest < 0.5
            print(f"{FLOOD_PACKETS} packets: {listener.sockets.lost} lost, the loop was held up {longest * 1e3:.1f} ms")

    drive(test)


def test_what_the_buffer_cannot_hold_is_counted_to_the_packet(far: int) -> None:
    async def test() -> None:
        async with listening("near") as listener:
            with served(far, RESOLVER_V4, socket.SOCK_DGRAM) as server:
                for _ in range(MORE_THAN_THE_BUFFER_HOLDS):  # the loop is held up meanwhile
                    server.sendto(PLAIN.answer, (str(CLIENT_V4), CLIENT_PORT))
            assert listener.packets == []
            first_look = listener.sockets.lost
            assert first_look > 0
            await listener.until(lambda: len(listener.packets) + first_look == MORE_THAN_THE_BUFFER_HOLDS)
            assert listener.sockets.lost == first_look
            listener.sockets.listen_on([])
            assert listener.sockets.lost == first_look
            print(f"{first_look} of {MORE_THAN_THE_BUFFER_HOLDS} packets lost while nobody read")

    drive(test)
