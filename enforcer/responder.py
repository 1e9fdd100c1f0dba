"""Answers refused clients in their own protocol: a TLS alert, an HTTP 403, or the latter over TLS.

It serves redirected connections only, whose original destination conntrack remembers, and never connects anywhere. What
it holds is bounded whatever clients do: the number of clients (of the address that has most, the oldest goes, so that
one container's crowd costs the others nothing), the bytes and the reads of each, and the time. A client that is refused
here was refused by the ruleset before; when this ends, it is reset instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from types import TracebackType
from typing import Self

from enforcer.bounds import Room
from enforcer.denial import (
    MAX_REQUEST_BYTES,
    TLS_ALERT,
    Answered,
    Endpoint,
    HttpRequest,
    Refusal,
    TlsHello,
    Undecided,
    http_reply,
    read_request,
    refusal_reason,
    refusal_sentence,
)
from enforcer.kernel_abi import Protocol
from enforcer.policy import Address, NameIndex, Policy
from enforcer.ruleset import CountedScope

# Privileged, so that no other user's program takes the port while the daemon is away, and assigned to nobody by IANA.
PORTS = range(942, 949)
MAX_CLIENTS = 512
# After the accept; the first for protocols in which the server speaks first, and clients that only want to connect.
FIRST_BYTE_SECONDS = 1.0
DECISION_SECONDS = 2.0
LINGER_SECONDS = 1.0  # for the client to read its answer; closed earlier with unread bytes, it would see a reset
EXHAUSTED_SECONDS = 0.25  # between two attempts to accept where there are no descriptors
MAX_READS = 64  # of one client: each parses all over again
_BACKLOG = 4_096
_ACCEPTS_AT_ONCE = 64  # then the loop's other work gets its turn
_READ_BYTES = 16_384
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
# include/uapi/linux/netfilter_ipv4.h, netfilter_ipv6/ip6_tables.h
_SO_ORIGINAL_DST = 80
_IP6T_SO_ORIGINAL_DST = 80
_SOCKADDR_IN = struct.Struct("!2xH4s8x")
_SOCKADDR_IN6 = struct.Struct("!2xH4x16s4x")
# Without the letters and digits that are taken for each other when somebody reads them out.
_REFERENCE_LETTERS = "23456789ABCDEFGHJKMNPQRSTVWXYZ"
_REFERENCE_LENGTH = 8

log = logging.getLogger("registry-enforcer")

Report = Callable[[Refusal], None]
# Of a connection as it arrives here, from its source to the listener, where it comes from; None if that is not known,
# OSError if it never will be.
OriginalSource = Callable[[Endpoint, Endpoint], Endpoint | None]
# The context for a server name, or an address where the client gave none; None where no certificate can be had.
Contexts = Callable[[str], Awaitable[ssl.SSLContext | None]]


class Responder:
    """The listener of one network namespace, while it is entered; on one event loop."""

    def __init__(
        self, policy: Callable[[], tuple[Policy, NameIndex]], report: Report, original_source: OriginalSource
    ) -> None:
        self.contexts: Contexts | None = None  # None: TLS clients get an alert
        self._policy = policy
        self._report = report
        self._ask_source: OriginalSource | None = original_source
        self._clients: dict[_Client, None] = {}  # undecided ones and those that read their answer, the oldest first
        self._crowds: dict[Address, dict[_Client, None]] = {}  # the same by address
        self._tasks: set[asyncio.Task[None]] = set()
        self._turned_away = 0
        self._resume: dict[socket.socket, asyncio.TimerHandle] = {}  # listeners that wait for a descriptor

    def __enter__(self) -> Self:
        self._listeners = _listen()
        self.port: int = self._listeners[0].getsockname()[1]
        self._loop = asyncio.get_running_loop()
        for listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for timer in self._resume.values():
            timer.cancel()
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        for client in list(self._clients):
            client.close()
        for task in self._tasks:
            task.cancel()

    def __len__(self) -> int:
        """How many clients there are."""
        return len(self._clients)

    @property
    def room(self) -> Room:
        """How many there are, and how many had to go for others."""
        return Room(MAX_CLIENTS, len(self._clients), self._turned_away)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    continue  # that connection's fault, accept(2)
                if not self._clients:
                    # Nobody here can make room: asked at once again, the socket would keep the loop busy for nothing.
                    self._loop.remove_reader(listener)
                    self._resume[listener] = self._loop.call_later(EXHAUSTED_SECONDS, self._listen_again, listener)
                    return
                self._make_room()
                continue
            connection.setblocking(False)
            try:
                source, destination, scope = _endpoints(connection, self._original_source)
            except OSError:  # not redirected, or gone again
                connection.close()
                continue
            if len(self._clients) >= MAX_CLIENTS:
                self._make_room()
            client = _Client(self, connection, source, destination, scope)
            self._clients[client] = None
            self._crowds.setdefault(source[0], {})[client] = None

    def _listen_again(self, listener: socket.socket) -> None:
        del self._resume[listener]
        self._loop.add_reader(listener, self._accept, listener)

    def _original_source(self, source: Endpoint, here: Endpoint) -> Endpoint:
        """The port by which the kernel's report and the connect hooks know the client, which may have been translated.

        Of two connections from one port to different destinations, both redirected here, the second gets another.
        """
        if self._ask_source is not None:
            try:
                return self._ask_source(source, here) or source
            except OSError as error:
                self._ask_source = None  # each time that it is asked in vain the kernel looks for a module
                log.warning(
                    "some records will name no client (load the module nf_conntrack_netlink): the kernel does not tell "
                    "what it tracks: %s",
                    error,
                )
        return source

    def _make_room(self) -> None:
        largest: dict[_Client, None] = max(self._crowds.values(), key=len)
        next(iter(largest)).drop()
        self._turned_away += 1

    # --- what clients call -------------------------------------------------------------------------------------------
    def refuse(self, client: _Client, name: str | None, answered: Answered) -> str:
        """Report one refusal; the value is its sentence."""
        policy, index = self._policy()
        refusal = Refusal(
            at=time.time(),
            scope=client.scope,
            protocol=Protocol.TCP,
            source=client.source,
            destination=client.destination,
            requested_name=name,
            reason=refusal_reason(index, name, client.destination),
            reference="".join(secrets.choice(_REFERENCE_LETTERS) for _ in range(_REFERENCE_LENGTH)),
            answered=answered,
        )
        self._report(refusal)
        return refusal_sentence(policy, refusal)

    def gone(self, client: _Client) -> None:
        """Forget a client whose socket is closed."""
        if client in self._clients:
            del self._clients[client]
            crowd = self._crowds[client.source[0]]
            del crowd[client]
            if not crowd:
                del self._crowds[client.source[0]]

    def start(self, work: Awaitable[None]) -> None:
        """Run something for a client that takes more than a moment."""

        async def run() -> None:
            await work

        task = self._loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Client:
    """One refused connection, from its accept to its close."""

    def __init__(
        self,
        responder: Responder,
        connection: socket.socket,
        source: Endpoint,
        destination: Endpoint,
        scope: CountedScope | None,
    ) -> None:
        self.source = source
        self.destination = destination
        self.scope = scope
        self._responder = responder
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._reads = 0
        self._answered = False
        self._tls: _Tls | None = None
        self._loop.add_reader(connection, self._readable)
        self._accepted_at = self._loop.time()
        self._deadline = self._loop.call_at(self._accepted_at + FIRST_BYTE_SECONDS, self._give_up)

    # --- ends --------------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Without a word."""
        self._deadline.cancel()
        if self._connection.fileno() >= 0:
            self._loop.remove_reader(self._connection)
            self._connection.close()
        self._responder.gone(self)

    def drop(self) -> None:
        """Make room for another one."""
        if not self._answered:
            self._answered = True
            self._responder.refuse(self, self._tls.server_name if self._tls else None, Answered.DROPPED)
        self.close()

    def _give_up(self) -> None:
        if not self._answered:
            self._answered = True
            self._responder.refuse(self, self._tls.server_name if self._tls else None, Answered.CLOSED)
        self.close()

    def _say(self, data: bytes) -> None:
        """The last bytes of this connection; they fit into the socket's buffer, which nothing has filled."""
        self._deadline.cancel()
        try:
            self._connection.send(data)
            self._connection.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._deadline = self._loop.call_later(LINGER_SECONDS, self.close)

    # --- reading -----------------------------------------------------------------------------------------------------
    def _readable(self) -> None:
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._reads += 1
        if self._answered:
            if not data or self._reads > MAX_READS:
                self.close()
        elif not data or self._reads > MAX_READS:
            self._give_up()
        elif self._tls is not None:
            self._advance(data)
        else:
            if not self._received:
                self._deadline.cancel()
                self._deadline = self._loop.call_at(self._accepted_at + DECISION_SECONDS, self._give_up)
            self._received += data
            self._decide()

    def _decide(self) -> None:
        match read_request(self._received):
            case Undecided.NEED_MORE:
                if len(self._received) > MAX_REQUEST_BYTES:
                    self._give_up()
            case Undecided.UNRECOGNISED:
                self._give_up()
            case HttpRequest() as request:
                self._answered = True
                sentence = self._responder.refuse(self, request.host, Answered.HTTP)
                self._say(http_reply(request, sentence, tls=False))
            case TlsHello(server_name):
                if self._responder.contexts is None:
                    self._alert(server_name)
                else:
                    self._loop.remove_reader(self._connection)  # until the certificate is there
                    self._responder.start(self._certify(server_name, self._responder.contexts))

    def _alert(self, server_name: str | None) -> None:
        self._answered = True
        self._responder.refuse(self, server_name, Answered.TLS_ALERT)
        self._say(TLS_ALERT)

    # --- TLS ---------------------------------------------------------------------------------------------------------
    async def _certify(self, server_name: str | None, contexts: Contexts) -> None:
        context = await contexts(server_name or str(self.destination[0]))
        if self._connection.fileno() < 0:
            return
        self._loop.add_reader(self._connection, self._readable)
        if context is None:
            self._alert(server_name)
            return
        self._tls = _Tls(context, server_name)
        received, self._received = self._received, b""
        self._advance(received)

    def _advance(self, data: bytes) -> None:
        assert self._tls is not None
        try:
            clear = self._tls.receive(data)
            self._send_pending()
        except (ssl.SSLError, OSError):  # it does not trust the certificate, or has gone
            self._give_up()
            return
        self._received += clear
        match read_request(self._received):
            case HttpRequest() as request:
                self._answered = True
                name = self._tls.server_name or request.host
                sentence = self._responder.refuse(self, name, Answered.TLS_HTTP)
                self._say(self._tls.close_with(http_reply(request, sentence, tls=True)))
            case Undecided.NEED_MORE:
                pass
            case _:
                self._give_up()

    def _send_pending(self) -> None:
        assert self._tls is not None
        pending = self._tls.outgoing.read()
        if pending:
            self._connection.send(pending)  # a handshake's few kilobytes into an empty buffer


class _Tls:
    """The server's side of one TLS connection, without a socket."""

    def __init__(self, context: ssl.SSLContext, server_name: str | None) -> None:
        self.server_name = server_name
        self.outgoing = ssl.MemoryBIO()
        self._incoming = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self.outgoing, server_side=True)
        self._established = False

    def receive(self, data: bytes) -> bytes:
        """What the client says in `data`, in the clear; ssl.SSLError if it does not go on."""
        self._incoming.write(data)
        clear = b""
        with contextlib.suppress(ssl.SSLWantReadError):
            if not self._established:
                self._tls.do_handshake()
                self._established = True
            while part := self._tls.read(_READ_BYTES):
                clear += part
        return clear

    def close_with(self, reply: bytes) -> bytes:
        """The last bytes to send."""
        self._tls.write(reply)
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()  # wants the client's close_notify, for which nobody waits
        return self.outgoing.read()


def _listen() -> Sequence[socket.socket]:
    """Listeners of both families, or of IPv4 alone where the host has no IPv6, on the first port that is free."""
    for port in PORTS:
        with contextlib.ExitStack() as stack:
            listeners: list[socket.socket] = []
            try:
                for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
                    try:
                        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                    except OSError as error:
                        if error.errno == errno.EAFNOSUPPORT and listeners:
                            continue
                        raise
                    # A daemon that was just replaced leaves connections behind that linger on its port.
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    listener.setblocking(False)
                    listener.bind((any_address, port))
                    listener.listen(_BACKLOG)
                    listeners.append(listener)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise
            stack.pop_all()
            return listeners
    raise OSError(errno.EADDRINUSE, f"ports {PORTS.start} to {PORTS.stop - 1} are all in use")


def _endpoints(
    connection: socket.socket, original_source: Callable[[Endpoint, Endpoint], Endpoint]
) -> tuple[Endpoint, Endpoint, CountedScope | None]:
    """(source, what it meant to reach, scope); OSError if it was not redirected here."""
    source = _endpoint(connection.getpeername())
    here = _endpoint(connection.getsockname())
    if connection.family == socket.AF_INET6:
        wire = connection.getsockopt(socket.IPPROTO_IPV6, _IP6T_SO_ORIGINAL_DST, _SOCKADDR_IN6.size)
        port, packed = _SOCKADDR_IN6.unpack(wire)
    else:
        wire = connection.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, _SOCKADDR_IN.size)
        port, packed = _SOCKADDR_IN.unpack(wire)
    destination = ip_address(packed), port
    if destination == here:
        raise ConnectionRefusedError
    # A forwarded one is redirected to the interface by which it came, a local one to the loopback address.
    scope = None if here[0].is_loopback else CountedScope.CONTAINER
    return original_source(source, here), destination, scope


def _endpoint(name: tuple[str, int]) -> Endpoint:
    """Of a socket's name, which has more to say about IPv6."""
    return ip_address(name[0].partition("%")[0]), name[1]
