"""The guard at an uplink's egress: what a connection's first bytes may name, and where a new one may go."""

from __future__ import annotations

import dataclasses
import itertools
import socket
import ssl
import struct
import sys
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from random import Random

import pytest

from enforcer import bpf, kernel_abi
from enforcer.denial import TlsHello, read_request
from enforcer.kernel_abi import (
    DEFAULT_MARKS,
    Answer,
    FlowState,
    GuardOutcome,
    JudgedPorts,
    Listed,
    MarkedScope,
    Protocol,
)
from enforcer.policy import Address
from tests.kernel import packets
from tests.kernel.harness import TC_ACT_UNSPEC, Harness
from tests.kernel.test_judge import checksum, pseudo
from tests.namespaces import inside, new_namespace
from tests.test_denial import VECTORS, hello_with, in_records, vector

pytestmark = pytest.mark.root

HERE = {4: ip_address("203.0.113.9"), 6: ip_address("2001:db8:9::9")}
REGISTRY = {4: ip_address("192.0.2.1"), 6: ip_address("2001:db8::1")}
UNLISTED = {4: ip_address("192.0.2.2"), 6: ip_address("2001:db8::2")}
LISTED = {4: ip_network("198.51.100.0/24"), 6: ip_network("2001:db8:198::/48")}
PROXY = {4: ip_address("198.51.100.77"), 6: ip_address("2001:db8:198::77")}
FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
TC_ACT_SHOT = 2
LO = 1
SEQUENCE, ACKNOWLEDGED = 0xFFFFFF00, 0x01020304  # carries over 0 in the middle of a ClientHello
ALERT = b"\x15\x03\x03\0\x02\x02\x31"
PAGE = b'HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\n{"no":1}\n'

both_families = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


def u32(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def hello(name: str | None) -> bytes:
    """The first flight of this Python's TLS."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = name is not None
    context.verify_mode = ssl.CERT_NONE if name is None else ssl.CERT_REQUIRED
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def name_extension(*names: bytes, kind: int = 0) -> bytes:
    entries = b"".join(bytes([kind]) + len(name).to_bytes(2, "big") + name for name in names)
    body = len(entries).to_bytes(2, "big") + entries
    return b"\0\0" + len(body).to_bytes(2, "big") + body


def extension(number: int, size: int) -> bytes:
    return struct.pack("!HH", number, size) + bytes(size)


@dataclasses.dataclass
class Outcome:
    """What became of a packet."""

    verdict: int
    packet: bytes  # as it leaves
    answers: list[bytes]  # what came back to its sender, as frames


class Guarded:
    """One connection from the host's network after another, through the guard of lo."""

    def __init__(self, harness: Harness, sniffer: socket.socket) -> None:
        self.harness = harness
        self.maps = harness.state.maps
        self._sniffer = sniffer
        self._ports = itertools.count(20_000)

    def count(self, outcome: GuardOutcome) -> int:
        return self.maps["guarded"].sum_u64(u32(outcome))

    def send(self, frame: bytes, mark: int = MarkedScope.CONTAINER) -> Outcome:
        bits = DEFAULT_MARKS.of(mark) if isinstance(mark, MarkedScope) else mark
        run = bpf.run_packet(self.harness.state.programs["guard"], frame, mark=bits)
        answers = []
        while True:
            try:
                answers.append(self._sniffer.recv(65_536))
            except BlockingIOError:
                break
        return Outcome(run.verdict, run.packet, answers)

    def connection(
        self, destination: Address, port: int = 443, *, mark: int = MarkedScope.CONTAINER, began: bool = True
    ) -> Connection:
        connection = Connection(self, destination, port, next(self._ports), mark)
        if began:
            connection.open()
        return connection

    def endings(self) -> list[kernel_abi.Ending]:
        records = []
        while found := self.harness.endings_reader.read():
            records += [kernel_abi.decode_ending(record) for record in found]
        return records


@dataclasses.dataclass
class Connection:
    guarded: Guarded
    destination: Address
    port: int
    own_port: int
    mark: int
    next: int = SEQUENCE

    def frame(self, payload: bytes = b"", flags: int = PSH | ACK, sequence: int | None = None) -> bytes:
        source = HERE[self.destination.version]
        transport = bytearray(packets.tcp(self.own_port, self.port, payload, flags=flags))
        number = self.next if sequence is None else sequence
        struct.pack_into("!II", transport, 4, number & 0xFFFFFFFF, 0 if flags == SYN else ACKNOWLEDGED)
        padded = bytes(transport) + bytes(len(transport) % 2)
        transport[16:18] = checksum(pseudo(source, self.destination, len(transport)) + padded)
        return packets.frame(source, self.destination, Protocol.TCP, bytes(transport))

    def open(self) -> Outcome:
        outcome = self.guarded.send(self.frame(flags=SYN), self.mark)
        self.next += 1
        return outcome

    def send(self, payload: bytes, *, at: int | None = None, flags: int = PSH | ACK) -> Outcome:
        """`at`: bytes from the connection's first instead of the next."""
        sequence = self.next if at is None else SEQUENCE + 1 + at
        outcome = self.guarded.send(self.frame(payload, flags, sequence), self.mark)
        if at is None and outcome.verdict == TC_ACT_UNSPEC and outcome.packet[14:] == self.frame(payload, flags)[14:]:
            self.next += len(payload)
        return outcome


@pytest.fixture(scope="session")
def lo(state: bpf.KernelState) -> Iterator[socket.socket]:
    """A network namespace of its own, and what its lo receives."""
    with (
        new_namespace() as namespace,
        inside(namespace),
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sniffer,
    ):
        sniffer.bind(("lo", 3))
        sniffer.setblocking(False)
        yield sniffer


@pytest.fixture
def guarded(harness: Harness, lo: socket.socket) -> Iterator[Guarded]:
    """The host is off, engines are judged everywhere, containers and whatever is unknown on 443 and 5000."""
    harness.need_marks()
    maps = harness.state.maps
    levels = (JudgedPorts.REGISTRY, JudgedPorts.NONE, JudgedPorts.EVERY, JudgedPorts.REGISTRY)
    maps["levels"].update_many((u32(number), u32(level)) for number, level in enumerate(levels))
    maps["registry_ports"].update_many((u32(port), b"\1") for port in (443, 5000))
    maps["uplinks"].update(u32(LO), kernel_abi.pack_uplink(443, ethernet=True))
    maps["own_links"].update(kernel_abi.pack_link(bytes(6)), b"\1")
    maps["answers"].update(u32(Answer.TLS), kernel_abi.pack_answer(ALERT))
    maps["answers"].update(u32(Answer.HTTP), kernel_abi.pack_answer(PAGE))
    for pattern, wildcard, ports in (
        ("registry.example", False, (443, 5000, 80)),
        ("blobs.example", True, (443,)),
        ("proxy.example", False, (3128,)),
    ):
        rule = kernel_abi.pack_name_rule(
            7, ports, private_addresses=True, named_ports=set(ports) - {3128}, proxy_ports={3128}
        )
        maps["names"].update(kernel_abi.pack_name_key(pattern, wildcard=wildcard), rule)
    for version in 4, 6:
        network = LISTED[version]
        key = kernel_abi.pack_listed_key(network.network_address, network.prefixlen, 443)
        maps["listed"].update(key, bytes([Listed.REGISTRY]))
        key = kernel_abi.pack_listed_key(PROXY[version], PROXY[version].max_prefixlen, 3128)
        maps["listed"].update(key, bytes([Listed.PROXY]))
        for port in 443, 5000:
            harness.vouch(REGISTRY[version], port, 60)
    harness.configure(netns_cookie=kernel_abi.NETNS_ANY)
    made = Guarded(harness, lo)
    made.endings()
    yield made
    maps["levels"].update_many((u32(number), u32(JudgedPorts.NONE)) for number in range(4))
    for name in "registry_ports", "listed", "uplinks", "own_links", "flows", "hellos", "strays", "catalogue":
        maps[name].clear()
    harness.write_names()


def transport_of(frame: bytes, version: int) -> tuple[bytes, bytes]:
    """(TCP header, payload); the packet's lengths and sums must be right."""
    head = 14 + (20 if version == 4 else 40)
    if version == 4:
        assert struct.unpack_from("!H", frame, 16)[0] == len(frame) - 14
        source, destination = (ip_address(frame[at : at + 4]) for at in (26, 30))
    else:
        assert struct.unpack_from("!H", frame, 18)[0] == len(frame) - head
        source, destination = (ip_address(frame[at : at + 16]) for at in (22, 38))
    transport = frame[head:]
    padded = transport + bytes(len(transport) % 2)
    assert checksum(pseudo(source, destination, len(transport)) + padded) == b"\0\0"
    return transport[:20], transport[20:]


def assert_passed(outcome: Outcome, connection: Connection) -> None:
    assert outcome.verdict == TC_ACT_UNSPEC
    assert outcome.answers == []


def assert_ended(
    outcome: Outcome, connection: Connection, payload: bytes, said: bytes, reset_at: int | None = None
) -> None:
    """The client has its answer, which acknowledges `payload` at the connection's end; the server is reset."""
    version = connection.destination.version
    assert outcome.verdict == TC_ACT_UNSPEC
    (answer,) = outcome.answers
    header, body = transport_of(answer, version)
    ports = struct.unpack_from("!HH", header)
    assert ports == (connection.port, connection.own_port)
    assert struct.unpack_from("!II", header, 4) == (ACKNOWLEDGED, connection.next + len(payload) & 0xFFFFFFFF)
    assert header[13] == FIN | PSH | ACK
    assert body == said
    header, body = transport_of(outcome.packet, version)
    assert struct.unpack_from("!HHI", header) == (connection.own_port, connection.port, connection.next & 0xFFFFFFFF)
    assert (header[13], body) == (RST, b"")


# --- ClientHello -----------------------------------------------------------------------------------------------------
@both_families
@pytest.mark.parametrize("name", ["registry.example", "REGISTRY.Example", "registry.example.", "a.b.blobs.example"])
def test_allowed_name_passes(guarded: Guarded, version: int, name: str) -> None:
    connection = guarded.connection(REGISTRY[version])
    data = hello_with(name_extension(name.encode()))
    assert_passed(connection.send(data), connection)
    assert_passed(connection.send(b"\x14\x03\x03\0\1\1\x17\x03\x03\0\x05abcde"), connection)
    assert_passed(connection.send(bytes(1_400)), connection)
    assert guarded.endings() == []


@both_families
@pytest.mark.parametrize(
    "name",
    ["evil.example", "blobs.example", "evilblobs.example", "registry.example.evil", "proxy.example", "x" * 63],
)
def test_other_name_ends_the_connection_with_an_alert(guarded: Guarded, version: int, name: str) -> None:
    before = guarded.count(GuardOutcome.UNLISTED_NAME)
    connection = guarded.connection(REGISTRY[version])
    data = hello_with(name_extension(name.encode()))
    assert_ended(connection.send(data), connection, data, ALERT)
    assert guarded.count(GuardOutcome.UNLISTED_NAME) == before + 1
    (ending,) = guarded.endings()
    assert ending.name == name.encode()
    assert (ending.destination, ending.destination_port) == (REGISTRY[version], 443)
    assert (ending.source, ending.source_port) == (HERE[version], connection.own_port)
    assert (ending.outcome, ending.scope) == (GuardOutcome.UNLISTED_NAME, MarkedScope.CONTAINER)
    # What comes after is swallowed, and a FIN is answered.
    assert connection.send(b"more").verdict == TC_ACT_SHOT
    assert connection.send(b"", flags=ACK).verdict == TC_ACT_SHOT
    closing = connection.send(b"", flags=FIN | ACK)
    assert closing.verdict == TC_ACT_SHOT
    (answer,) = closing.answers
    assert transport_of(answer, version)[0][13] == RST


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.txt")), ids=lambda path: path.stem)
def test_first_flights_of_real_clients_are_read(guarded: Guarded, path: Path) -> None:
    data, name = vector(path)
    connection = guarded.connection(REGISTRY[4])
    assert_ended(connection.send(data), connection, data, ALERT)
    (ending,) = guarded.endings()
    expected = GuardOutcome.NO_NAME if name is None else GuardOutcome.UNLISTED_NAME
    assert (ending.outcome, ending.name.lower()) == (expected, (name or "").lower().encode())
    if name is not None:
        rule = kernel_abi.pack_name_rule(9, (443,), private_addresses=True)
        guarded.maps["names"].update(key := kernel_abi.pack_name_key(name.lower(), wildcard=False), rule)
        connection = guarded.connection(REGISTRY[4])
        assert_passed(connection.send(data), connection)
        guarded.maps["names"].delete(key)


@pytest.mark.parametrize("cut", [1, 2, 5, 6, 9, 43, 44, 60, 100, 200, 300, 500])
@pytest.mark.parametrize("name", ["registry.example", "evil.example"])
def test_hello_in_segments_is_read_to_its_end(guarded: Guarded, cut: int, name: str) -> None:
    data = hello(name)
    assert len(data) > 500
    connection = guarded.connection(REGISTRY[4])
    ended = False
    for at in range(0, len(data), cut):
        outcome = connection.send(data[at : at + cut])
        if outcome.answers:
            ended = True
            break
        assert outcome.verdict == TC_ACT_UNSPEC
    assert ended == (name == "evil.example")


@pytest.mark.parametrize("name", ["registry.example", "evil.example"])
@pytest.mark.parametrize("size", [1, 4, 7, 40, 130])
def test_hello_in_several_records_is_read(guarded: Guarded, name: str, size: int) -> None:
    message = hello_with(extension(10, 4) + name_extension(name.encode()) + extension(0x33, 36))[5:]
    data = in_records(message, [size] * (len(message) // size))
    assert len(data) < 2_048
    connection = guarded.connection(REGISTRY[4])
    outcome = connection.send(data)
    if size < 4:  # more records than anybody sends in one segment
        assert outcome.answers
    else:
        assert bool(outcome.answers) == (name == "evil.example")


@pytest.mark.parametrize("name", ["registry.example", "evil.example"])
@pytest.mark.parametrize("padding", [1_500, 4_000, 12_000], ids=str)
def test_large_key_shares_before_the_name_are_passed_over(guarded: Guarded, name: str, padding: int) -> None:
    data = hello_with(extension(0x33, padding) + name_extension(name.encode()))
    connection = guarded.connection(REGISTRY[4])
    if padding <= 1_500:  # BPF_PROG_TEST_RUN takes a page at most
        assert bool(connection.send(data).answers) == (name == "evil.example")
        connection = guarded.connection(REGISTRY[4])
    answers = [connection.send(data[at : at + 1_448]).answers for at in range(0, len(data), 1_448)]
    assert any(answers) == (name == "evil.example")


REFUSED_HELLOS = {
    "no name": (hello_with(extension(10, 4)), GuardOutcome.NO_NAME),
    "no extensions": (
        in_records(b"\1\0\0\x29" + b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0", []),
        GuardOutcome.NO_NAME,
    ),
    "an empty name": (hello_with(name_extension(b"")), GuardOutcome.UNREADABLE),
    "two names": (hello_with(name_extension(b"registry.example", b"evil.example")), GuardOutcome.UNREADABLE),
    "two extensions": (
        hello_with(name_extension(b"registry.example") + name_extension(b"evil.example")),
        GuardOutcome.UNREADABLE,
    ),
    "another type of name": (hello_with(name_extension(b"registry.example", kind=1)), GuardOutcome.UNREADABLE),
    "a NUL": (hello_with(name_extension(b"evil\0.blobs.example")), GuardOutcome.NO_NAME),
    "a dot alone": (hello_with(name_extension(b".")), GuardOutcome.UNLISTED_NAME),
    "encrypted": (hello_with(name_extension(b"registry.example") + extension(0xFE0D, 120)), GuardOutcome.HIDDEN_NAME),
    "encrypted, first": (
        hello_with(extension(0xFE0D, 120) + name_extension(b"registry.example")),
        GuardOutcome.HIDDEN_NAME,
    ),
    "another message": (b"\x16\x03\x01\0\x05\2\0\0\1\0", GuardOutcome.UNREADABLE),
    "something behind it": (
        in_records(hello_with(name_extension(b"registry.example"))[5:] + b"\1\0\0\1\0", []),
        GuardOutcome.UNREADABLE,
    ),
    "an alert first": (b"\x15\x03\x03\0\2\1\0", GuardOutcome.UNREADABLE),
    "ssh": (b"SSH-2.0-OpenSSH_9.2\r\n", GuardOutcome.UNREADABLE),
    "nothing known": (bytes(40), GuardOutcome.UNREADABLE),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED_HELLOS)
def test_what_names_nobody_for_certain_is_refused(guarded: Guarded, what: str) -> None:
    data, expected = REFUSED_HELLOS[what]
    connection = guarded.connection(REGISTRY[4])
    outcome = connection.send(data)
    assert outcome.answers
    (ending,) = guarded.endings()
    assert ending.outcome is expected


@pytest.mark.parametrize("name", ["registry.example", "evil.example"])
@pytest.mark.parametrize("compatible", [True, False])
def test_second_hello_is_judged_like_the_first(guarded: Guarded, name: str, compatible: bool) -> None:
    connection = guarded.connection(REGISTRY[4])
    assert_passed(connection.send(hello_with(name_extension(b"registry.example"))), connection)
    again = (b"\x14\x03\x03\0\1\1" if compatible else b"") + hello_with(name_extension(name.encode()))
    outcome = connection.send(again)
    assert bool(outcome.answers) == (name == "evil.example")


def test_order_is_kept(guarded: Guarded) -> None:
    data = hello_with(name_extension(b"evil.example"))
    connection = guarded.connection(REGISTRY[4])
    assert connection.send(data[10:], at=10).verdict == TC_ACT_SHOT  # too early
    assert_passed(connection.send(data[:10]), connection)
    assert_passed(connection.send(data[:10], at=0), connection)  # sent again
    outcome = connection.send(data[5:], at=5)  # overlaps
    assert outcome.answers


def test_data_on_a_syn_is_dropped(guarded: Guarded) -> None:
    connection = guarded.connection(REGISTRY[4], began=False)
    outcome = guarded.send(connection.frame(hello("registry.example"), SYN), connection.mark)
    assert outcome.verdict == TC_ACT_SHOT
    assert_passed(connection.open(), connection)


def test_forgotten_connection_is_ended_and_not_let_be(guarded: Guarded) -> None:
    connection = guarded.connection(REGISTRY[4])
    assert_passed(connection.send(hello_with(name_extension(b"registry.example"))), connection)
    assert_passed(connection.send(b"\x17\x03\x03\0\1x"), connection)
    guarded.maps["flows"].clear()
    data = b"\x17\x03\x03\0\1x"
    assert connection.send(data).answers
    assert guarded.endings()[-1].outcome is GuardOutcome.UNKNOWN


# --- strays ----------------------------------------------------------------------------------------------------------
SEGMENTS = {"an acknowledgement": (b"", ACK), "its end": (b"", FIN | ACK), "bytes": (b"GET /v2/ HTTP/1.1", PSH | ACK)}


@both_families
@pytest.mark.parametrize("what", SEGMENTS)
@pytest.mark.parametrize("scope", [MarkedScope.ENGINE, MarkedScope.CONTAINER, 0])
def test_connection_that_never_began_here_is_held_up(guarded: Guarded, version: int, what: str, scope: int) -> None:
    before = guarded.count(GuardOutcome.HELD_UP)
    connection = guarded.connection(UNLISTED[version], began=False, mark=scope)
    payload, flags = SEGMENTS[what]
    for _ in range(2):
        outcome = connection.send(payload, flags=flags)
        assert (outcome.verdict, outcome.answers) == (TC_ACT_SHOT, [])
    assert guarded.count(GuardOutcome.HELD_UP) == before + 2
    assert guarded.endings() == []


@both_families
def test_what_stays_astray_is_ended(guarded: Guarded, version: int) -> None:
    connection = guarded.connection(UNLISTED[version], began=False)
    request = b"GET /v2/ HTTP/1.1\r\n"
    assert connection.send(request).verdict == TC_ACT_SHOT
    (key,) = (key for key, _ in guarded.maps["strays"].items())
    held_since = int.from_bytes(guarded.maps["strays"].lookup(key) or b"", sys.byteorder)
    earlier = held_since - (kernel_abi.STRAY_SECONDS + 1) * 1_000_000_000
    guarded.maps["strays"].update(key, earlier.to_bytes(8, sys.byteorder))
    assert connection.send(b"", flags=ACK).verdict == TC_ACT_SHOT  # nothing that could be answered
    assert_ended(connection.send(request), connection, request, PAGE)
    assert guarded.endings()[-1].outcome is GuardOutcome.UNKNOWN
    assert connection.send(b"more").verdict == TC_ACT_SHOT


@pytest.mark.parametrize("what", SEGMENTS)
def test_connection_that_nobody_judges_or_that_is_permitted_is_not_held_up(guarded: Guarded, what: str) -> None:
    payload, flags = SEGMENTS[what]
    unjudged = (
        guarded.connection(UNLISTED[4], began=False, mark=MarkedScope.HOST),
        guarded.connection(UNLISTED[4], 8080, began=False),
        guarded.connection(LISTED[4][9], began=False),
    )
    guarded.harness.vouch(REGISTRY[4], 5000, 60, unnamed=True)
    for connection in (*unjudged, guarded.connection(REGISTRY[4], 5000, began=False)):
        for _ in range(2):
            assert_passed(connection.send(payload, flags=flags), connection)
    guarded.harness.configure(netns_cookie=kernel_abi.NETNS_ANY, observing=True)
    connection = guarded.connection(UNLISTED[4], began=False)
    assert_passed(connection.send(payload, flags=flags), connection)


def test_inbound_connection_from_a_registrys_port_goes_on(guarded: Guarded) -> None:
    connection = guarded.connection(UNLISTED[4], began=False)
    assert_passed(connection.send(b"", flags=SYN | ACK), connection)
    assert_passed(connection.send(b"SSH-2.0-OpenSSH_9.2\r\n"), connection)


def test_forged_answer_to_nobody_opens_no_permitted_connection(guarded: Guarded) -> None:
    connection = guarded.connection(REGISTRY[4])
    assert_passed(connection.send(b"", flags=SYN | ACK), connection)
    data = hello_with(name_extension(b"evil.example"))
    assert_ended(connection.send(data), connection, data, ALERT)
    guarded.maps["flows"].clear()
    again = guarded.connection(REGISTRY[4], began=False)
    assert_passed(again.send(b"", flags=SYN | ACK), again)
    assert_ended(again.send(data), again, data, ALERT)


def test_stray_that_is_not_judged_any_more_goes_on(guarded: Guarded) -> None:
    connection = guarded.connection(UNLISTED[4], began=False)
    assert connection.send(b"bytes").verdict == TC_ACT_SHOT
    guarded.maps["levels"].update(u32(MarkedScope.CONTAINER), u32(JudgedPorts.NONE))
    assert_passed(connection.send(b"bytes"), connection)


@pytest.mark.parametrize("opened", ["listed", "unnamed", "off"])
def test_second_connection_from_one_port_has_nothing_of_the_first(guarded: Guarded, opened: str) -> None:
    first = guarded.connection(REGISTRY[4])
    assert first.send(hello_with(name_extension(b"evil.example"))).answers
    assert first.send(b"more").verdict == TC_ACT_SHOT
    if opened == "listed":
        guarded.maps["listed"].update(kernel_abi.pack_listed_key(REGISTRY[4], 32, 443), bytes([Listed.REGISTRY]))
    elif opened == "unnamed":
        guarded.harness.vouch(REGISTRY[4], 443, 60, unnamed=True)
    else:
        guarded.maps["levels"].update(u32(MarkedScope.CONTAINER), u32(JudgedPorts.NONE))
    second = dataclasses.replace(first, next=SEQUENCE)
    assert_passed(second.open(), second)
    assert_passed(second.send(b"anything"), second)


def test_connection_to_an_address_without_a_name_outlives_its_permission(guarded: Guarded) -> None:
    guarded.harness.vouch(REGISTRY[4], 443, 60, unnamed=True)
    connection = guarded.connection(REGISTRY[4])
    assert_passed(connection.send(b"anything"), connection)
    guarded.maps["learned"].clear()
    assert_passed(connection.send(b"more"), connection)


def test_hello_that_others_pushed_out_is_refused(guarded: Guarded) -> None:
    data = hello_with(name_extension(b"registry.example"))
    connection = guarded.connection(REGISTRY[4])
    assert_passed(connection.send(data[:20]), connection)
    guarded.maps["hellos"].clear()
    assert connection.send(data[20:]).answers
    assert guarded.endings()[-1].outcome is GuardOutcome.UNKNOWN


def test_address_that_is_opened_without_a_name_is_not_looked_at(guarded: Guarded) -> None:
    guarded.harness.vouch(REGISTRY[4], 443, 60, unnamed=True)
    connection = guarded.connection(REGISTRY[4])
    assert_passed(connection.send(hello_with(name_extension(b"evil.example"))), connection)


def test_listed_address_is_not_looked_at(guarded: Guarded) -> None:
    connection = guarded.connection(LISTED[4][9])
    assert_passed(connection.send(hello_with(name_extension(b"evil.example"))), connection)


@pytest.mark.parametrize(
    ("scope", "looked_at"),
    [(MarkedScope.HOST, False), (MarkedScope.ENGINE, True), (MarkedScope.CONTAINER, True), (0, True)],
)
def test_scope_decides_whether_names_are_looked_at(guarded: Guarded, scope: int, looked_at: bool) -> None:
    connection = guarded.connection(REGISTRY[4], mark=scope)
    assert bool(connection.send(hello_with(name_extension(b"evil.example"))).answers) == looked_at


def test_observe_mode_reports_and_lets_pass(guarded: Guarded) -> None:
    guarded.harness.configure(netns_cookie=kernel_abi.NETNS_ANY, observing=True)
    connection = guarded.connection(REGISTRY[4])
    assert_passed(connection.send(hello_with(name_extension(b"evil.example"))), connection)
    assert_passed(connection.send(b"more"), connection)
    (ending,) = guarded.endings()
    assert ending.outcome is GuardOutcome.UNLISTED_NAME


@pytest.mark.parametrize("seed", range(4))
def test_guard_believes_no_more_than_the_full_parser(guarded: Guarded, seed: int) -> None:
    """Damaged hellos: what passes as one for an allowed name is one to Python, too."""
    random = Random(seed)  # noqa: S311 - repeatable, not secret
    whole = hello_with(extension(10, 4) + name_extension(b"registry.example") + extension(0x33, 8))
    judged = 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            data[random.randrange(len(data))] = random.choice((0, 1, 3, 22, 255, random.randrange(256)))
        connection = guarded.connection(REGISTRY[4])
        if connection.send(bytes(data)).answers or connection.send(b"\x17\x03\x03\0\1x").answers:
            continue
        key = kernel_abi.pack_flow_key(HERE[4], connection.own_port, REGISTRY[4], 443)
        flow = guarded.maps["flows"].lookup(key)
        assert flow is not None
        _, _, _, _, state, _, _ = kernel_abi.FLOW.codec.unpack(flow)
        if state == FlowState.ALLOWED:
            judged += 1
            assert read_request(bytes(data)) == TlsHello("registry.example")
    assert judged > 20


# --- HTTP ------------------------------------------------------------------------------------------------------------
def head(line: str, *fields: str) -> bytes:
    return "\r\n".join([line, *fields, "", ""]).encode()


@both_families
@pytest.mark.parametrize(
    "request_head",
    [
        head("GET /v2/ HTTP/1.1", "Host: registry.example:5000", "User-Agent: x"),
        head("PUT /v2/x/blobs/uploads/1 HTTP/1.1", "User-Agent: x", "HOST:registry.example"),
        head("GET /" + "x" * 900 + " HTTP/1.1", "A: b", "host: \t registry.example "),
        head("GET http://registry.example:5000/v2/ HTTP/1.1", "Host: registry.example:5000"),
    ],
)
def test_allowed_host_passes(guarded: Guarded, version: int, request_head: bytes) -> None:
    connection = guarded.connection(REGISTRY[version], 5000)
    assert_passed(connection.send(request_head), connection)
    assert_passed(connection.send(bytes(100)), connection)


@both_families
@pytest.mark.parametrize(
    "request_head",
    [
        head("GET /v2/ HTTP/1.1", "Host: evil.example"),
        head("GET /v2/ HTTP/1.1", "X-Host: registry.example", "Host: evil.example"),
        head("GET /*host:registry.example HTTP/1.1", "Host: evil.example"),
        head("GET http://evil.example/v2/ HTTP/1.1", "Host: registry.example"),
        head("GET http://registry.example@evil.example/ HTTP/1.1", "Host: registry.example"),
        head("GET /v2/ HTTP/1.1", "Host: 192.0.2.1"),
        head("GET /v2/ HTTP/1.1", "Host: [2001:db8::1]"),
        head("GET /v2/ HTTP/1.1", "Host:"),
        head("GET /v2/ HTTP/1.0"),
        head("GET /v2/ HTTP/1.1", "") + b"Host: registry.example\r\n\r\n",
        head("CONNECT registry.example:443 HTTP/1.1", "Host: registry.example"),
        b"GET /v2/",
        b"get /v2/ HTTP/1.1\r\nHost: registry.example\r\n\r\n",
    ],
)
def test_other_host_ends_the_connection_with_a_page(guarded: Guarded, version: int, request_head: bytes) -> None:
    connection = guarded.connection(REGISTRY[version], 5000)
    assert_ended(connection.send(request_head), connection, request_head, PAGE)


# --- proxies ---------------------------------------------------------------------------------------------------------
@both_families
@pytest.mark.parametrize("name", ["registry.example", "evil.example"])
def test_tunnel_through_a_proxy_is_judged_by_its_target_and_by_what_is_said_in_it(
    guarded: Guarded, version: int, name: str
) -> None:
    connection = guarded.connection(PROXY[version], 3128)
    request_head = head(f"CONNECT {name}:443 HTTP/1.1", f"Host: {name}:443", "Proxy-Authorization: Negotiate x")
    if name == "evil.example":
        assert_ended(connection.send(request_head), connection, request_head, PAGE)
        return
    assert_passed(connection.send(request_head), connection)
    data = hello_with(name_extension(b"evil.example"))
    assert_ended(connection.send(data), connection, data, ALERT)
    connection = guarded.connection(PROXY[version], 3128)
    assert_passed(connection.send(request_head[:-10]), connection)  # the head in two segments
    assert_passed(connection.send(request_head[-10:]), connection)
    assert_passed(connection.send(hello_with(name_extension(b"registry.example"))), connection)


@pytest.mark.parametrize(
    "request_head",
    [
        head("CONNECT registry.example:8443 HTTP/1.1"),
        head("CONNECT registry.example HTTP/1.1"),
        head("CONNECT 192.0.2.1:443 HTTP/1.1"),
        head("GET / HTTP/1.1", "Host: registry.example"),
        head("GET http://evil.example/ HTTP/1.1"),
        head("GET https://registry.example/ HTTP/1.1"),
        head("POST http://registry.example/ HTTP/1.1", "Content-Length: 5"),
        head("GET http://registry.example/ HTTP/1.1") + head("GET http://evil.example/ HTTP/1.1"),
        hello_with(name_extension(b"proxy.example")),
        b"\5\1\0",
    ],
)
def test_proxy_is_asked_for_allowed_names_only(guarded: Guarded, request_head: bytes) -> None:
    connection = guarded.connection(PROXY[4], 3128)
    assert connection.send(request_head).answers


def test_each_request_to_a_proxy_is_judged(guarded: Guarded) -> None:
    connection = guarded.connection(PROXY[4], 3128)
    allowed = head("GET http://registry.example/v2/ HTTP/1.1", "Host: registry.example")
    assert_passed(connection.send(allowed), connection)
    assert_passed(connection.send(allowed), connection)
    refused = head("GET http://evil.example/v2/ HTTP/1.1", "Host: evil.example")
    assert_ended(connection.send(refused), connection, refused, PAGE)


def test_tunnel_carries_tls_only(guarded: Guarded) -> None:
    connection = guarded.connection(PROXY[4], 3128)
    assert_passed(connection.send(head("CONNECT registry.example:443 HTTP/1.1")), connection)
    assert connection.send(b"GET / HTTP/1.1\r\nHost: registry.example\r\n\r\n").answers


# --- what is recognised as a registry --------------------------------------------------------------------------------
@pytest.fixture
def recognising(guarded: Guarded) -> Guarded:
    """The host's scope refuses what is recognised as a registry."""
    guarded.maps["levels"].update(u32(MarkedScope.HOST), u32(JudgedPorts.RECOGNISED))
    guarded.maps["catalogue"].update(kernel_abi.pack_name_key("public.example", wildcard=False), b"\1")
    guarded.maps["catalogue"].update(kernel_abi.pack_name_key("registry.example", wildcard=False), b"\1")
    guarded.harness.configure(netns_cookie=kernel_abi.NETNS_ANY, recognising=True)
    return guarded


@both_families
@pytest.mark.parametrize("port", [443, 8443])
@pytest.mark.parametrize(
    ("name", "passes"), [("public.example", False), ("registry.example", True), ("news.example", True)]
)
def test_known_registry_is_recognised_by_name(
    recognising: Guarded, version: int, port: int, name: str, passes: bool
) -> None:
    if (name, port) == ("registry.example", 8443):
        passes = False  # allowed on 443 only
    connection = recognising.connection(UNLISTED[version], port, mark=MarkedScope.HOST)
    data = hello(name)
    outcome = connection.send(data)
    if passes:
        assert_passed(outcome, connection)
        assert_passed(connection.send(b"more"), connection)
    else:
        assert_ended(outcome, connection, data, ALERT)


@pytest.mark.parametrize(
    ("request_head", "passes"),
    [
        (head("GET /v2/ HTTP/1.1", "Host: evil.example:8080"), False),
        (head("HEAD /v2/x/manifests/1 HTTP/1.1", "Host: 192.0.2.9"), False),
        (head("POST /v2/x/blobs/uploads/ HTTP/1.1", "Host: evil.example"), False),
        (head("GET /v1/ HTTP/1.1", "Host: evil.example"), True),
        (head("GET /v2 HTTP/1.1", "Host: evil.example"), True),
        (b"\0" * 40, True),
    ],
)
def test_registry_protocol_is_recognised_on_any_port(recognising: Guarded, request_head: bytes, passes: bool) -> None:
    connection = recognising.connection(UNLISTED[4], 8080, mark=MarkedScope.HOST)
    outcome = connection.send(request_head)
    if passes:
        assert_passed(outcome, connection)
    else:
        assert_ended(outcome, connection, request_head, PAGE)


@pytest.mark.attack("another name on a second connection from one port, where the first one's was allowed")
def test_second_connection_from_one_port_is_recognised_like_the_first(recognising: Guarded) -> None:
    first = recognising.connection(REGISTRY[4], mark=MarkedScope.HOST)
    assert_passed(first.send(hello("registry.example")), first)
    second = dataclasses.replace(first, next=SEQUENCE)
    assert_passed(second.open(), second)
    data = hello("public.example")
    assert_ended(second.send(data), second, data, ALERT)


@pytest.mark.parametrize("what", ["no name", "encrypted", "two names"])
def test_what_is_not_recognised_passes_there(recognising: Guarded, what: str) -> None:
    connection = recognising.connection(UNLISTED[4], mark=MarkedScope.HOST)
    assert_passed(connection.send(REFUSED_HELLOS[what][0]), connection)


# --- new connections -------------------------------------------------------------------------------------------------
@both_families
@pytest.mark.parametrize("scope", [MarkedScope.CONTAINER, MarkedScope.ENGINE, 0])
def test_new_connection_that_nobody_permitted_is_reset(guarded: Guarded, version: int, scope: int) -> None:
    connection = guarded.connection(UNLISTED[version], began=False, mark=scope)
    outcome = connection.open()
    assert outcome.verdict == TC_ACT_SHOT
    (answer,) = outcome.answers
    header, body = transport_of(answer, version)
    assert (header[13], body) == (RST | ACK, b"")
    assert struct.unpack_from("!II", header, 4) == (0, SEQUENCE + 1 & 0xFFFFFFFF)
    (ending,) = guarded.endings()
    assert ending.outcome is GuardOutcome.UNLISTED_ADDRESS


@both_families
@pytest.mark.parametrize(
    ("where", "port", "scope"),
    [
        (UNLISTED, 443, MarkedScope.HOST),
        (UNLISTED, 80, MarkedScope.CONTAINER),
        (REGISTRY, 443, MarkedScope.CONTAINER),
        (UNLISTED, 53, MarkedScope.ENGINE),
    ],
)
def test_new_connection_passes_where_it_may(
    guarded: Guarded, version: int, where: dict[int, Address], port: int, scope: int
) -> None:
    connection = guarded.connection(where[version], port, began=False, mark=scope)
    assert_passed(connection.open(), connection)


def test_vouching_bit_of_a_local_packet_is_not_believed(guarded: Guarded) -> None:
    connection = guarded.connection(
        UNLISTED[4], began=False, mark=DEFAULT_MARKS.of(MarkedScope.CONTAINER) | DEFAULT_MARKS.vouched
    )
    assert connection.open().verdict == TC_ACT_SHOT


def test_strange_link_address_is_no_socket_of_the_host(guarded: Guarded) -> None:
    connection = guarded.connection(UNLISTED[4], began=False, mark=MarkedScope.HOST)
    frame = connection.frame(flags=SYN)
    assert guarded.send(frame, MarkedScope.HOST).verdict == TC_ACT_UNSPEC
    strange = frame[:6] + b"\x02\0\0\0\0\x07" + frame[12:]
    assert guarded.send(strange, MarkedScope.HOST).verdict == TC_ACT_SHOT


def test_socket_of_another_network_namespace_is_no_socket_of_the_host(guarded: Guarded) -> None:
    if guarded.harness.state.report.programs["guard"] != "guard_netns":
        pytest.skip("a packet does not tell its network namespace here (6.15)")
    guarded.harness.configure(netns_cookie=0)  # the initial one
    connection = guarded.connection(UNLISTED[4], began=False, mark=MarkedScope.HOST)
    assert connection.open().verdict == TC_ACT_SHOT


@both_families
def test_datagrams_need_a_listed_address(guarded: Guarded, version: int) -> None:
    for where, verdict in (
        (UNLISTED[version], TC_ACT_SHOT),
        (REGISTRY[version], TC_ACT_SHOT),
        (LISTED[version][9], TC_ACT_UNSPEC),
    ):
        frame = packets.frame(HERE[version], where, Protocol.UDP, packets.udp(40_000, 443, b"x" * 30))
        assert guarded.send(frame).verdict == verdict
    frame = packets.frame(HERE[version], UNLISTED[version], Protocol.UDP, packets.udp(40_000, 123, b"x"))
    assert guarded.send(frame).verdict == TC_ACT_UNSPEC


def test_fragment_that_hides_its_ports_is_refused(guarded: Guarded) -> None:
    transport = packets.tcp(40_000, 443, flags=SYN)[:8]
    first = packets.frame(HERE[4], UNLISTED[4], Protocol.TCP, transport, fragmentation=packets.MORE_FRAGMENTS)
    assert guarded.send(first + bytes(32)).verdict == TC_ACT_SHOT
    assert guarded.send(first + bytes(32), MarkedScope.HOST).verdict == TC_ACT_UNSPEC


def test_interface_that_is_no_uplink_is_not_guarded(guarded: Guarded) -> None:
    guarded.maps["uplinks"].clear()
    connection = guarded.connection(UNLISTED[4], began=False)
    assert_passed(connection.open(), connection)
