"""Own questions: the right resolver's answer is taken, anything else is waited out or named."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from typing import cast

import pytest

from enforcer import resolver

QUERY = struct.pack("!HHHHHH", 0x1234, 0x0100, 1, 0, 0, 0) + b"\x01a\x00\x00\x01\x00\x01"
LOCAL = ip_address("127.0.0.1")
OTHER = ip_address("127.0.0.2")


def answer_to(query: bytes, *, flags: int = 0x8180, transaction_id: bytes | None = None) -> bytes:
    return (transaction_id or query[:2]) + struct.pack("!H", flags) + query[4:]


@contextlib.asynccontextmanager
async def serve_udp(
    reply: Callable[[bytes], list[bytes]], host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[int]:
    """A DNS server that answers each query with the datagrams of `reply`; the value is its port."""

    class Server(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.DatagramTransport, transport)  # it is one, though not by inheritance

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            for datagram in reply(data):
                self.transport.sendto(datagram, addr)

    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Server, local_addr=(host, port))
    try:
        yield transport.get_extra_info("sockname")[1]
    finally:
        transport.close()


def test_the_answer_comes_with_the_resolver_that_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        async with serve_udp(lambda query: [answer_to(query)]) as port:
            monkeypatch.setattr(resolver, "DNS_PORT", port)
            assert await resolver.ask(QUERY, [LOCAL]) == (answer_to(QUERY), LOCAL)

    asyncio.run(ask())


def test_an_answer_with_another_transaction_id_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def forged_first(query: bytes) -> list[bytes]:
        return [answer_to(query, transaction_id=b"zz"), b"short", answer_to(query)]

    async def ask() -> None:
        async with serve_udp(forged_first) as port:
            monkeypatch.setattr(resolver, "DNS_PORT", port)
            wire, _ = await resolver.ask(QUERY, [LOCAL])
            assert wire[:2] == QUERY[:2]

    asyncio.run(ask())


def test_only_forged_answers_are_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        async with serve_udp(lambda query: [answer_to(query, transaction_id=b"zz")]) as port:
            monkeypatch.setattr(resolver, "DNS_PORT", port)
            monkeypatch.setattr(resolver, "UDP_DEADLINE_SECONDS", 0.3)
            with pytest.raises(resolver.NoAnswerError, match="no answer in time"):
                await resolver.ask(QUERY, [LOCAL])

    asyncio.run(ask())


def test_the_next_resolver_is_asked_when_one_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        async with serve_udp(lambda query: [answer_to(query)], host=str(OTHER)) as port:
            monkeypatch.setattr(resolver, "DNS_PORT", port)
            assert (await resolver.ask(QUERY, [LOCAL, OTHER]))[1] == OTHER

    asyncio.run(ask())


def test_without_a_resolver_there_is_no_answer() -> None:
    with pytest.raises(resolver.NoAnswerError, match="no resolver is known"):
        asyncio.run(resolver.ask(QUERY, []))


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_a_truncated_answer_is_asked_for_again_over_tcp(monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    whole = answer_to(QUERY) + b"\0" * 3_000

    async def serve_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        assert await reader.readexactly(length) == QUERY
        message = struct.pack("!H", len(whole)) + whole
        writer.write(message[:100] if cut else message)
        await writer.drain()
        writer.close()

    async def ask() -> None:
        listener = socket.create_server((str(LOCAL), 0))
        port = listener.getsockname()[1]
        monkeypatch.setattr(resolver, "DNS_PORT", port)
        async with (
            await asyncio.start_server(serve_tcp, sock=listener),
            serve_udp(lambda query: [answer_to(query, flags=0x8380)], port=port),
        ):
            if cut:
                with pytest.raises(resolver.NoAnswerError):
                    await resolver.ask(QUERY, [LOCAL])
            else:
                assert await resolver.ask(QUERY, [LOCAL]) == (whole, LOCAL)

    asyncio.run(ask())
