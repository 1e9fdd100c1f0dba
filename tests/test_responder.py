"""The responder among clients that are honest, slow, silent, many or hostile; redirected by the real kernel.

client ── 192.0.2.7:443 (nobody is there) ── nft redirect ── responder
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer import authority, responder
from enforcer.denial import MAX_REQUEST_BYTES, TLS_ALERT, Answered, Refusal
from enforcer.kernel_abi import Protocol
from enforcer.policy import AuthorityFiles, NameIndex, Reason, default_policy, host_pattern
from enforcer.responder import DECISION_SECONDS, FIRST_BYTE_SECONDS, MAX_CLIENTS, Responder
from tests.test_denial import HELLO, HELLO_NAME
from tests.test_nft import inside, new_namespace, run

pytestmark = pytest.mark.root

REGISTRY = {4: "192.0.2.7", 6: "2001:db8::7"}
REQUEST = b"GET /v2/x HTTP/1.1\r\nHost: evil.example\r\n\r\n"
LINKS = """\
link set lo up
link add out type veth peer name far
link set far up
address add 192.0.2.1/24 dev out
address add 192.0.2.2/24 dev out
address add 2001:db8::1/64 dev out nodad
link set out up
"""
REDIRECT = """\
table inet redirecting {{
	chain output {{
		type nat hook output priority -90;
		meta l4proto tcp oifname "out" redirect to :{port}
	}}
}}
"""
POLICY = default_policy()
HALF_OPEN = 10_000


@pytest.fixture(scope="module")
def namespace() -> Iterator[int]:
    namespace = new_namespace()
    run(namespace, "ip", "-batch", "-", text=LINKS)
    run(namespace, "nft", "-f", "-", text=REDIRECT.format(port=responder.PORTS[0]))
    yield namespace
    os.close(namespace)


class Answering:
    """A responder that runs, and what it reported."""

    def __init__(self, namespace: int) -> None:
        self._namespace = namespace
        self.refusals: list[Refusal] = []
        self.asked = 0
        with inside(namespace):
            self.responder = Responder(lambda: (POLICY, NameIndex(POLICY)), self.refusals.append, self._original_source)
            self.responder.__enter__()

    def _original_source(self, *_: object) -> None:
        self.asked += 1
        raise OSError(errno.EOPNOTSUPP, "no such module")

    def close(self) -> None:
        self.responder.__exit__(None, None, None)

    def told(self) -> Counter[Answered]:
        return Counter(refusal.answered for refusal in self.refusals)

    async def connect(self, version: int = 4, port: int = 443, source: str | None = None) -> socket.socket:
        with inside(self._namespace):
            client = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
        client.setblocking(False)
        if source is not None:
            client.bind((source, 0))
        await asyncio.get_running_loop().sock_connect(client, (REGISTRY[version], port))
        return client

    async def ask(self, data: bytes, version: int = 4) -> bytes:
        """Everything that comes back for `data`."""
        with await self.connect(version) as client:
            await asyncio.get_running_loop().sock_sendall(client, data)
            return await everything(client)


class Turns:
    """How long the event loop is kept from others.

    In processor time of this process: what else runs on the machine is not its doing.
    """

    def __init__(self) -> None:
        self.slowest = 0.0  # seconds

    async def measure(self) -> None:
        while True:
            started = time.process_time()
            await asyncio.sleep(0.01)
            self.slowest = max(self.slowest, time.process_time() - started)


async def everything(client: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 65_536), 5):
            received += part
    return received


Scenario = Callable[[Answering], Awaitable[None]]


@pytest.fixture
def answering(namespace: int) -> Callable[[Scenario], None]:
    """Runs a scenario against a responder."""

    def run_scenario(scenario: Scenario) -> None:
        @contextlib.asynccontextmanager
        async def running() -> AsyncIterator[Answering]:
            answering = Answering(namespace)
            try:
                yield answering
            finally:
                answering.close()

        async def main() -> None:
            async with running() as answering:
                await scenario(answering)

        asyncio.run(main())

    return run_scenario


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"
        await asyncio.sleep(0.01)


# --- honest clients --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [4, 6])
def test_client_gets_its_own_protocols_answer_and_is_reported(
    answering: Callable[[Scenario], None], version: int
) -> None:
    async def scenario(answering: Answering) -> None:
        assert await answering.ask(HELLO, version) == TLS_ALERT
        reply = await answering.ask(REQUEST, version)
        assert reply.startswith(b"HTTP/1.1 403 your organization does not allow evil.example; ")
        tls, http = answering.refusals
        assert tls.requested_name == HELLO_NAME
        assert http.requested_name == "evil.example"
        assert http.reference in reply.decode()
        for refusal in answering.refusals:
            assert refusal.destination == (ip_address(REGISTRY[version]), 443)
            assert refusal.source[0] == ip_address("192.0.2.1" if version == 4 else "2001:db8::1")
            assert (refusal.protocol, refusal.scope) == (Protocol.TCP, None)
            assert refusal.reason is Reason.UNLISTED_NAME
            assert abs(refusal.at - time.time()) < 5
        assert answering.told() == {Answered.TLS_ALERT: 1, Answered.HTTP: 1}
        assert tls.reference != http.reference
        await until(lambda: len(answering.responder) == 0)

    answering(scenario)


def test_clients_are_answered_where_the_kernel_does_not_tell_their_ports(
    answering: Callable[[Scenario], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(answering: Answering) -> None:
        for _ in range(3):
            assert await answering.ask(HELLO) == TLS_ALERT
        assert answering.asked == 1
        assert caplog.text.count("does not tell what it tracks: [Errno 95] no such module") == 1

    answering(scenario)


def test_request_in_pieces_is_waited_for(answering: Callable[[Scenario], None]) -> None:
    async def scenario(answering: Answering) -> None:
        loop = asyncio.get_running_loop()
        for data, answer in ((HELLO, TLS_ALERT), (REQUEST, b"HTTP/1.1 403 ")):
            with await answering.connect() as client:
                for piece in (data[:1], data[1:40], data[40:]):
                    await loop.sock_sendall(client, piece)
                    await asyncio.sleep(0.05)
                assert (await everything(client)).startswith(answer)

    answering(scenario)


def test_answer_arrives_although_the_client_sent_more_than_was_read(answering: Callable[[Scenario], None]) -> None:
    async def scenario(answering: Answering) -> None:
        upload = b"POST /v2/x HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000)
        assert b"DENIED" in await answering.ask(upload)

    answering(scenario)


# --- others ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("data", [b"SSH-2.0-x\r\n", b"\0" * 100, b"\x16\x03\x01\x00\x05\x02\0\0\1\0"])
def test_other_protocols_are_closed(answering: Callable[[Scenario], None], data: bytes) -> None:
    async def scenario(answering: Answering) -> None:
        assert await answering.ask(data) == b""
        assert answering.told() == {Answered.CLOSED: 1}
        assert answering.refusals[0].requested_name is None

    answering(scenario)


@pytest.mark.parametrize(("data", "seconds"), [(b"", FIRST_BYTE_SECONDS), (b"GET /", DECISION_SECONDS)])
def test_client_that_waits_is_closed(answering: Callable[[Scenario], None], data: bytes, seconds: float) -> None:
    async def scenario(answering: Answering) -> None:
        started = time.monotonic()
        assert await answering.ask(data) == b""
        assert seconds - 0.2 < time.monotonic() - started < seconds + 0.5
        assert answering.told() == {Answered.CLOSED: 1}

    answering(scenario)


def test_client_that_dribbles_is_closed(answering: Callable[[Scenario], None]) -> None:
    async def scenario(answering: Answering) -> None:
        loop = asyncio.get_running_loop()
        with await answering.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < started + 4:
                    await loop.sock_sendall(client, b"G" if time.monotonic() == started else b"E")
                    await asyncio.sleep(0.005)
            assert time.monotonic() - started < DECISION_SECONDS + 0.5
        assert answering.told() == {Answered.CLOSED: 1}

    answering(scenario)


def test_endless_request_is_closed_at_its_bound(answering: Callable[[Scenario], None]) -> None:
    async def scenario(answering: Answering) -> None:
        endless = b"GET / HTTP/1.1\r\nHost: evil.example\r\n" + b"a: b\r\n" * MAX_REQUEST_BYTES
        assert await answering.ask(endless) == b""
        assert answering.told() == {Answered.CLOSED: 1}

    answering(scenario)


def test_direct_connection_is_closed_and_not_reported(answering: Callable[[Scenario], None], namespace: int) -> None:
    async def scenario(answering: Answering) -> None:
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET, "192.0.2.1")):
            with inside(namespace):
                client = socket.socket(family, socket.SOCK_STREAM)
            client.setblocking(False)
            with client:
                await asyncio.get_running_loop().sock_connect(client, (address, answering.responder.port))
                assert await everything(client) == b""
        assert answering.refusals == []

    answering(scenario)


def test_client_that_resets_is_forgotten(answering: Callable[[Scenario], None]) -> None:
    async def scenario(answering: Answering) -> None:
        client = await answering.connect()
        await until(lambda: len(answering.responder) == 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        await until(lambda: len(answering.responder) == 0)

    answering(scenario)


def test_next_free_port_is_taken(namespace: int, answering: Callable[[Scenario], None]) -> None:
    with inside(namespace):
        taken = socket.create_server(("0.0.0.0", responder.PORTS[0]))

    async def scenario(answering: Answering) -> None:
        assert answering.responder.port == responder.PORTS[1]

    with taken:
        answering(scenario)


# --- TLS -------------------------------------------------------------------------------------------------------------
def hello_for(name: str) -> bytes:
    """The first flight of an OpenSSL client."""
    outgoing = ssl.MemoryBIO()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.fixture
def certificates(tmp_path: Path) -> AuthorityFiles:
    return authority.create(tmp_path, "Example Corp", [host_pattern("allowed.example")])


async def https(answering: Answering, files: AuthorityFiles | None, name: str, request: bytes) -> bytes:
    """What comes back for `request` over TLS; with no files, to a client that does not trust the CA."""
    connection = await answering.connect()
    context = ssl.create_default_context(cafile=files.certificate if files else None)
    reader, writer = await asyncio.open_connection(sock=connection, ssl=context, server_hostname=name)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


def test_client_that_trusts_the_ca_reads_the_sentence(
    answering: Callable[[Scenario], None], certificates: AuthorityFiles
) -> None:
    async def scenario(answering: Answering) -> None:
        answering.responder.contexts = authority.Authority(certificates).context
        reply = await https(answering, certificates, "evil.example", REQUEST)
        assert reply.startswith(b"HTTP/1.1 403 your organization does not allow evil.example; ")
        # The name of SNI is what the certificate is for, and what counts.
        reply = await https(answering, certificates, "evil.example", REQUEST.replace(b"evil", b"other"))
        assert b"does not allow evil.example; " in reply
        assert answering.told() == {Answered.TLS_HTTP: 2}
        await until(lambda: len(answering.responder) == 0)

    answering(scenario)


def test_client_that_does_not_trust_the_ca_is_closed(
    answering: Callable[[Scenario], None], certificates: AuthorityFiles
) -> None:
    async def scenario(answering: Answering) -> None:
        answering.responder.contexts = authority.Authority(certificates).context
        with pytest.raises(ssl.SSLCertVerificationError):
            await https(answering, None, "evil.example", REQUEST)
        await until(lambda: answering.told() == {Answered.CLOSED: 1})
        assert answering.refusals[0].requested_name == "evil.example"

    answering(scenario)


def test_name_that_the_ca_may_not_sign_gets_an_alert(
    answering: Callable[[Scenario], None], certificates: AuthorityFiles
) -> None:
    async def scenario(answering: Answering) -> None:
        answering.responder.contexts = authority.Authority(certificates).context
        assert await answering.ask(hello_for("allowed.example")) == TLS_ALERT
        assert answering.told() == {Answered.TLS_ALERT: 1}

    answering(scenario)


def test_flood_of_names_is_answered_and_the_loop_goes_on(
    answering: Callable[[Scenario], None], certificates: AuthorityFiles
) -> None:
    async def scenario(answering: Answering) -> None:
        answering.responder.contexts = authority.Authority(certificates).context
        turns = Turns()

        async def flood(name: str) -> bytes:
            with await answering.connect() as client:
                await asyncio.get_running_loop().sock_sendall(client, hello_for(name))
                return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 5), 5)

        measuring = asyncio.create_task(turns.measure())
        answers = await asyncio.gather(*(flood(f"n{number}.example") for number in range(300)))
        measuring.cancel()
        kinds = Counter(answer[:1] for answer in answers)
        assert kinds.keys() <= {b"\x15", b"\x16"}  # an alert, or a ServerHello
        assert kinds[b"\x15"]
        assert kinds[b"\x16"]
        assert 0 < turns.slowest < 0.5

    answering(scenario)


# --- many ------------------------------------------------------------------------------------------------------------
def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_one_containers_crowd_drops_its_own_and_not_the_slow_client_of_another(
    answering: Callable[[Scenario], None],
) -> None:
    async def scenario(answering: Answering) -> None:
        with await answering.connect(source="192.0.2.2") as slow:
            crowd = [await answering.connect() for _ in range(MAX_CLIENTS * 3 // 2)]
            await until(lambda: answering.told()[Answered.DROPPED] >= MAX_CLIENTS // 2)
            assert len(answering.responder) <= MAX_CLIENTS
            room = answering.responder.room
            assert (room.held, room.limit) == (len(answering.responder), MAX_CLIENTS)
            assert room.turned_away >= MAX_CLIENTS // 2
            await asyncio.get_running_loop().sock_sendall(slow, REQUEST)
            assert (await everything(slow)).startswith(b"HTTP/1.1 403 ")
            for client in crowd:
                client.close()
        dropped = {refusal.source[0] for refusal in answering.refusals if refusal.answered is Answered.DROPPED}
        assert dropped == {ip_address("192.0.2.1")}
        await until(lambda: len(answering.responder) == 0)
        assert answering.responder._crowds == {}

    answering(scenario)


@pytest.mark.timeout(60)
def test_ten_thousand_half_open_clients_take_no_memory_and_no_answer_from_others(
    answering: Callable[[Scenario], None],
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = min(HALF_OPEN, hard - MAX_CLIENTS - 500)  # those that would be too many for this process are closed again
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    async def scenario(answering: Answering) -> None:
        loop = asyncio.get_running_loop()
        clients: list[socket.socket] = []
        turns, slowest_answer = Turns(), 0.0
        await answering.ask(HELLO)
        before = resident_bytes()
        measuring = asyncio.create_task(turns.measure())
        for number in range(HALF_OPEN):
            client = await answering.connect()
            if number % 3:
                await loop.sock_sendall(client, HELLO[: number % len(HELLO)])  # a third sends nothing
            clients.append(client)
            if len(clients) > held:
                clients.pop(0).close()
            if number % 500 == 0:
                started = time.monotonic()
                assert await answering.ask(HELLO) == TLS_ALERT
                slowest_answer = max(slowest_answer, time.monotonic() - started)
            assert len(answering.responder) <= MAX_CLIENTS
        measuring.cancel()
        grown = resident_bytes() - before
        for client in clients:
            client.close()
        print(f"{grown >> 20} MiB more, slowest turn {turns.slowest:.3f} s, slowest answer {slowest_answer:.3f} s")
        assert grown < 32 << 20  # this process holds the clients, and the reports
        assert 0 < turns.slowest < 0.25
        assert slowest_answer < 0.5
        told = answering.told()
        assert told[Answered.DROPPED] > 0
        assert sum(told.values()) >= HALF_OPEN - MAX_CLIENTS
        await until(lambda: len(answering.responder) == 0)

    try:
        answering(scenario)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
