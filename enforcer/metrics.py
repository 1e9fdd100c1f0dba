"""Prometheus metrics. Labels come from closed enums, the policy's digest and the version; never from traffic."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import logging
import math
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from enforcer import __version__
from enforcer.audit_record import Drifted
from enforcer.bounds import Bounded, Room
from enforcer.denial import Answered

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series beside each counter that nobody here would read

# From the microseconds of an idle daemon to the second at which a client would send its SYN again.
LEARN_BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


MAX_CLIENTS = 32
MAX_HEAD_BYTES = 8_192
CLIENT_SECONDS = 5.0  # from accept to close
RETRY_SECONDS = 2.0  # at a port that somebody holds
_ACCEPTS_AT_ONCE = 32  # then the loop's other work gets its turn
# However often somebody asks, making the text takes that much of the loop's time, and so many seconds at once.
_SHARE, _SECONDS_AT_ONCE = 0.05, 0.5
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]{1,1000}) HTTP/1\.[01]\r\n")

log = logging.getLogger("registry-enforcer")


class Fault(enum.Enum):
    """What was refused for a moment, and is tried again."""

    NFTABLES = "nftables"  # a transaction
    KERNEL = "kernel"  # any other request: BPF, netlink, a descriptor, a file of /proc or /sys
    LINK_EVENTS = "link-events"  # lost, and everything is read anew
    TABLE_EVENTS = "table-events"  # the same of nftables
    STATE = "state"  # the state file
    CLIENTS = "clients"  # a connection to the metrics or the control socket


class MetricsError(Exception):
    """The metrics address cannot be served."""


class SnapshotError(Exception):
    """The kernel does not tell now what a scrape asks."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a scrape reads from the daemon and the kernel."""

    enforcing: bool
    mode: str
    digest: str
    dns_answers: Mapping[str, int]  # by outcome
    learned: Mapping[str, int]  # by family: ipv4, ipv6
    refused: Mapping[tuple[str, str], int]  # by (scope, protocol)
    observed: Mapping[tuple[str, str], int]  # the same in observe mode: what enforcement would have refused
    guarded: Mapping[str, int]  # by outcome; empty without a guard
    evicted: int
    events_lost: int
    audit_dropped: Mapping[str, int]  # by where they got lost
    rooms: Mapping[Bounded, Room] = field(default_factory=dict)  # those that this kernel has a use for


class Metrics(Collector):
    """All metrics of one daemon, on a registry of their own."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self.registry = CollectorRegistry()
        self.reloads = Counter(
            "enforcer_policy_reloads",
            "Policy reloads since the daemon started, by result.",
            ["result"],
            registry=self.registry,
        )
        for result in ("ok", "bad_policy", "failed"):
            self.reloads.labels(result)
        self.disagreements = Counter(
            "enforcer_parser_disagreements",
            "Answers of which BPF learned more than the full parser accepts; the difference was withdrawn.",
            registry=self.registry,
        )
        self.own_queries = Counter(
            "enforcer_own_queries",
            "Questions that the daemon asked for itself, by result.",
            ["result"],
            registry=self.registry,
        )
        for result in ("answered", "no_answer", "unusable"):
            self.own_queries.labels(result)
        self.refusals_answered = Counter(
            "enforcer_refusals_answered",
            "Refused connections that the responder has taken, by what it told them.",
            ["protocol"],
            registry=self.registry,
        )
        for answered in Answered:
            self.refusals_answered.labels(answered.value)
        self.drift_repairs = Counter(
            "enforcer_drift_repairs",
            "What somebody else had changed or taken away in the kernel, and was put back, by what it was.",
            ["what"],
            registry=self.registry,
        )
        for what in Drifted:
            self.drift_repairs.labels(what.value)
        self.faults = Counter(
            "enforcer_faults",
            "What the kernel or a disk refused for a moment, and was or will be tried again, by what it was.",
            ["what"],
            registry=self.registry,
        )
        for fault in Fault:
            self.faults.labels(fault.value)
        self.learn_seconds = Histogram(
            "enforcer_learn_seconds",
            "From the arrival of a DNS answer to its addresses being in the nftables set.",
            buckets=LEARN_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The metrics whose truth lies in the kernel or the daemon's state, read at the time of the scrape."""
        now = self._snapshot()
        yield GaugeMetricFamily(
            "enforcer_enforcing", "1 while connections without permission are refused.", int(now.enforcing)
        )
        policy = GaugeMetricFamily("enforcer_policy_info", "The policy in force.", labels=["digest", "mode"])
        policy.add_metric([now.digest, now.mode], 1)
        yield policy
        build = GaugeMetricFamily("enforcer_build_info", "The program that runs.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        answers = CounterMetricFamily(
            "enforcer_dns_answers", "DNS answers that BPF looked at, by what became of them.", labels=["outcome"]
        )
        for outcome, count in now.dns_answers.items():
            answers.add_metric([outcome], count)
        yield answers
        learned = GaugeMetricFamily(
            "enforcer_learned_addresses", "Learned (address, port) pairs that are permitted now.", labels=["family"]
        )
        for family, count in now.learned.items():
            learned.add_metric([family], count)
        yield learned
        yield CounterMetricFamily(
            "enforcer_learned_evicted",
            "Learned permissions that made room for others before their time: too many addresses under one pattern.",
            now.evicted,
        )
        for name, meaning, counts in (
            ("refused", "Connection attempts that were refused.", now.refused),
            ("observed", "Connection attempts that mode enforce would have refused.", now.observed),
        ):
            metric = CounterMetricFamily(f"enforcer_{name}_connections", meaning, labels=["scope", "protocol"])
            for (scope, protocol), count in counts.items():
                metric.add_metric([scope, protocol], count)
            yield metric
        guarded = CounterMetricFamily(
            "enforcer_guarded_connections",
            "Connections whose first bytes, or first packet, the guard of the uplinks has judged, by what it said.",
            labels=["outcome"],
        )
        for outcome, count in now.guarded.items():
            guarded.add_metric([outcome], count)
        yield guarded
        yield CounterMetricFamily(
            "enforcer_kernel_events_lost",
            "Learning packets whose copy did not reach the daemon; it reads what they taught from the kernel instead.",
            now.events_lost,
        )
        dropped = CounterMetricFamily(
            "enforcer_audit_dropped",
            "Refusals that no line of the audit log tells of, by where they got lost.",
            labels=["where"],
        )
        for where, count in now.audit_dropped.items():
            dropped.add_metric([where], count)
        yield dropped
        held = GaugeMetricFamily("enforcer_held", "What is held of everything that has a bound.", labels=["what"])
        limit = GaugeMetricFamily("enforcer_held_limit", "The bound: so many at most.", labels=["what"])
        reached = CounterMetricFamily(
            "enforcer_bound_reached",
            "What found no place because a bound was reached, or cost another one its place.",
            labels=["what"],
        )
        for what, room in now.rooms.items():
            held.add_metric([what.value], room.held)
            limit.add_metric([what.value], room.limit)
            reached.add_metric([what.value], room.turned_away)
        yield from (held, limit, reached)


class Server:
    """Serves `/metrics` on the running loop, in the task `run`; a context manager that owns the listening socket.

    Anybody on this host may connect, so what connections cost is bounded: their number (the oldest goes), the bytes and
    the seconds of each, and the share of the loop's time that making the text may take.

    And anybody may hold a port that is not privileged. That must not keep enforcement away: `problem` says what is in
    the way, and it is tried again.
    """

    def __init__(self, metrics: Metrics, address: str, port: int) -> None:
        self.problem: str | None = None  # why nobody is served; None: they are
        self.served_at = f"{f'[{address}]' if ':' in address else address}:{port}"
        self._metrics = metrics
        self._place = address, port
        self._listener: socket.socket | None = None
        self._clients: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._turned_away = 0
        self._text = b""
        self._making = asyncio.Lock()
        self._made_at = self._refilled_at = -math.inf
        self._seconds = _SECONDS_AT_ONCE

    def __enter__(self) -> Self:
        """MetricsError if there is no such address; a port in use is a `problem`."""
        try:
            self._listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise MetricsError(
                    f"--metrics {self.served_at}: {error.strerror}; choose an address and port of this host"
                ) from None
            self.problem = f"another program holds {self.served_at}"
            log.error(
                "%s: metrics are not served until it lets go; a port below 1024 (--metrics) is root's alone",
                self.problem,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._listener is not None:
            self._listener.close()

    @property
    def room(self) -> Room:
        """How many ask."""
        return Room(MAX_CLIENTS, len(self._clients), self._turned_away)

    @property
    def url(self) -> str:
        """Where Prometheus asks."""
        return f"http://{self.served_at}/metrics"

    @property
    def port(self) -> int:
        """As given, or what the kernel chose for 0."""
        return self._place[1] if self._listener is None else int(self._listener.getsockname()[1])

    async def run(self) -> None:
        """Serve until cancelled, from when the port is free."""
        while self._listener is None:
            await asyncio.sleep(RETRY_SECONDS)
            with contextlib.suppress(OSError):
                self._listen()
        if self.problem is not None:
            self.problem = None
            log.info("metrics are served at %s now", self.served_at)
        server = await asyncio.start_server(
            self._answer, sock=self._listener, limit=MAX_HEAD_BYTES, backlog=_ACCEPTS_AT_ONCE
        )
        async with server:
            await server.serve_forever()

    def _listen(self) -> None:
        family, _, _, _, place = socket.getaddrinfo(*self._place, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a daemon before this one leaves TIME_WAITs
            listener.bind(place)
            listener.listen(_ACCEPTS_AT_ONCE)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        self._listener = listener

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients[writer] = None
        writer.transport.set_write_buffer_limits(high=0)  # drained is: with the kernel, and may be closed
        if len(self._clients) > MAX_CLIENTS:
            oldest = next(iter(self._clients))
            del self._clients[oldest]
            oldest.transport.abort()
            self._turned_away += 1
        try:
            async with asyncio.timeout(CLIENT_SECONDS):
                try:
                    reply = await self._reply(await reader.readuntil(b"\r\n\r\n"))
                except (asyncio.LimitOverrunError, asyncio.IncompleteReadError):
                    reply = _reply("400 Bad Request")
                writer.write(reply)
                await writer.drain()
        except (TimeoutError, ConnectionError):
            pass  # its own fault
        finally:
            self._clients.pop(writer, None)
            writer.transport.abort()

    async def _reply(self, head: bytes) -> bytes:
        request = _REQUEST_LINE.match(head)
        if request is None:
            return _reply("400 Bad Request")
        method, path = request.groups()
        if method not in (b"GET", b"HEAD"):
            return _reply("405 Method Not Allowed")
        if path not in (b"/metrics", b"/"):
            return _reply("404 Not Found")
        try:
            body = await self._text_from(asyncio.get_running_loop().time())
        except SnapshotError as error:
            log.warning("metrics cannot be told: %s", error)
            return _reply("503 Service Unavailable")
        return _reply("200 OK", body, with_body=method == b"GET")

    async def _text_from(self, asked_at: float) -> bytes:
        """The text as it was at `asked_at` or later: who comes too often waits, and all who wait get the same one."""
        async with self._making:
            if self._made_at >= asked_at:
                return self._text
            loop = asyncio.get_running_loop()
            self._seconds = min(_SECONDS_AT_ONCE, self._seconds + (loop.time() - self._refilled_at) * _SHARE)
            if self._seconds < 0:
                await asyncio.sleep(-self._seconds / _SHARE)
                self._seconds = 0.0
            self._made_at = loop.time()
            self._text = generate_latest(self._metrics.registry)
            self._refilled_at = loop.time()
            self._seconds -= self._refilled_at - self._made_at
            return self._text


def _reply(status: str, body: bytes = b"", *, with_body: bool = True) -> bytes:
    lines = f"HTTP/1.1 {status}", f"Content-Type: {_TEXT}", f"Content-Length: {len(body)}", "Connection: close"
    return "\r\n".join((*lines, "\r\n")).encode() + (body if with_body else b"")
