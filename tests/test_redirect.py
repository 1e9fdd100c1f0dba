"""Refused connections led to a responder, by the rules of the goldens and on real packets: the lab of test_nft."""

from __future__ import annotations

import contextlib
import enum
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import pytest

from enforcer.kernel_abi import MarkedScope
from enforcer.nft import Nft
from enforcer.policy import Level, Mode, Policy, Scope
from enforcer.ruleset import CountedScope, Redirected, Responder, render_internal, render_removal, render_ruleset
from tests import test_nft
from tests.test_nft import (
    ALL_STRICT,
    CONTAINER,
    ENGINE,
    HOST,
    INTERNAL,
    MARKS,
    SCOPES,
    Host,
    Lab,
    Plan,
    inside,
    nft_in,
    opened,
    run,
    udp,
)
from tests.test_ruleset import DEFAULT, FULL

pytestmark = pytest.mark.root

lab = test_nft.lab  # the fixtures
plan = test_nft.plan

PORT = 942
BRIDGES = frozenset(INTERNAL)
ANSWERING = Responder(PORT, interfaces4=BRIDGES, interfaces6=BRIDGES)
ANSWER = b"not allowed"
AT_ONCE_SECONDS = 0.9  # before a SYN would be sent again
# What BPF's gate does to what comes from containers, and BPF's vouching for one address.
GATE = f"""\
table inet gate {{
	chain prerouting {{
		type filter hook prerouting priority mangle;
		iifname {{ "br0", "br1" }} meta l4proto tcp meta mark set meta mark | {CONTAINER:#x}
	}}
}}
"""


class Outcome(enum.Enum):
    ANSWERED = "the responder said no"
    OPEN = "the server answered"
    RESET = "connection refused"


class Listener(threading.Thread):
    """A responder that says ANSWER to whoever connects."""

    def __init__(self, namespace: int) -> None:
        super().__init__(daemon=True)
        with inside(namespace):
            self._server = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        self._server.setblocking(False)
        self._wake, self._waker = socket.socketpair()

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while not any(key.fileobj is self._wake for key, _ in selector.select()):
                with contextlib.suppress(OSError):
                    connection, _ = self._server.accept()
                    with connection:
                        connection.recv(100)
                        connection.sendall(ANSWER)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waker.send(b"x")
        self.join(5)
        for end in (self._server, self._wake, self._waker):
            end.close()


@dataclass(frozen=True)
class AnsweringHost(Host):
    """The host of the lab with a policy in force that leads to a responder."""

    nft: Nft

    def enforce(self, policy: Policy, responder: Responder = ANSWERING) -> None:
        self.nft.apply(render_ruleset(policy, FULL, INTERNAL, responder))

    def counted(self) -> dict[str, int]:
        """What has been refused; the responder's own counters are for losses."""
        counters = self.nft.counters()
        for way in Redirected:
            assert counters[way.entered] == counters[way.reached]
        return {
            name: counter.packets
            for name, counter in counters.items()
            if counter.packets and not name.startswith("responder")
        }


@pytest.fixture
def silent_host(lab: Lab) -> Iterator[AnsweringHost]:
    """Nobody listens: the daemon is away."""
    run(lab.host, "nft", "-f", "-", text=GATE)
    with nft_in(lab.host) as nft:
        host = AnsweringHost(lab, nft)
        host.enforce(DEFAULT)
        try:
            yield host
        finally:
            nft.apply(render_removal() + "delete table inet gate\n")


@pytest.fixture
def host(silent_host: AnsweringHost) -> Iterator[AnsweringHost]:
    with Listener(silent_host.lab.host):
        yield silent_host


def tcp(namespace: int, address: str, port: int = 443, mark: int = 0, seconds: float = AT_ONCE_SECONDS) -> Outcome:
    with opened(namespace, socket.SOCK_STREAM, address, mark, seconds) as client:
        try:
            client.connect((address, port))
            client.send(b"hello")
            received = client.recv(100)
        except (ConnectionRefusedError, ConnectionResetError):
            return Outcome.RESET
    return {ANSWER: Outcome.ANSWERED, b"hello": Outcome.OPEN}[received]


# --- who is answered -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("port", [443, 5000])
def test_forwarded_to_an_unlisted_registry_is_answered_and_counted_once(
    host: AnsweringHost, plan: Plan, port: int
) -> None:
    assert tcp(host.lab.box, plan.evil, port) is Outcome.ANSWERED
    assert host.counted() == {"refused_container_tcp": 1}
    assert tcp(host.lab.box, plan.evil, 8000) is Outcome.OPEN
    host.learn(plan.good)
    assert tcp(host.lab.box, plan.good) is Outcome.OPEN
    assert host.counted() == {"refused_container_tcp": 1}


@pytest.mark.parametrize("mark", MarkedScope)
def test_local_socket_of_a_strict_scope_is_answered_and_counted_once(
    host: AnsweringHost, plan: Plan, mark: MarkedScope
) -> None:
    host.enforce(ALL_STRICT)
    assert tcp(host.lab.host, plan.evil, mark=MARKS.of(mark)) is Outcome.ANSWERED
    assert host.counted() == {f"refused_{SCOPES[mark].value}_tcp": 1}
    host.learn(plan.good)
    assert tcp(host.lab.host, plan.good, mark=MARKS.of(mark)) is Outcome.OPEN
    host.enforce(replace(DEFAULT, scope=Scope(Level.OFF, Level.OFF, Level.OFF)))
    assert tcp(host.lab.host, plan.evil, mark=MARKS.of(mark)) is Outcome.OPEN
    assert host.counted() == {f"refused_{SCOPES[mark].value}_tcp": 1}


def test_engine_is_answered_on_every_port(host: AnsweringHost, plan: Plan) -> None:
    assert tcp(host.lab.host, plan.evil, 8443, ENGINE) is Outcome.ANSWERED
    assert tcp(host.lab.host, plan.evil, 53, ENGINE) is Outcome.OPEN
    assert tcp(host.lab.host, plan.evil, 8443, HOST) is Outcome.OPEN


def test_vouched_for_is_let_through_before_the_set_knows(host: AnsweringHost, plan: Plan) -> None:
    assert tcp(host.lab.host, plan.evil, mark=ENGINE | MARKS.vouched) is Outcome.OPEN
    run(host.lab.host, "nft", f"add rule inet gate prerouting meta mark set meta mark | {MARKS.vouched:#x}")
    assert tcp(host.lab.box, plan.evil) is Outcome.OPEN
    assert host.counted() == {}


def test_observe_mode_answers_nobody(host: AnsweringHost, plan: Plan) -> None:
    host.enforce(replace(DEFAULT, mode=Mode.OBSERVE))
    assert tcp(host.lab.box, plan.evil) is Outcome.OPEN
    assert tcp(host.lab.host, plan.evil, mark=ENGINE) is Outcome.OPEN
    assert host.counted() == {"observed_container_tcp": 1, "observed_engine_tcp": 1}


# --- who is reset as before ------------------------------------------------------------------------------------------
def test_without_the_daemon_clients_are_reset_at_once(silent_host: AnsweringHost, plan: Plan) -> None:
    assert tcp(silent_host.lab.box, plan.evil) is Outcome.RESET
    assert tcp(silent_host.lab.host, plan.evil, mark=ENGINE) is Outcome.RESET
    assert silent_host.counted() == {"refused_container_tcp": 1, "refused_engine_tcp": 1}


def test_packet_that_the_gate_has_not_seen_is_judged_in_forward(host: AnsweringHost, plan: Plan) -> None:
    run(host.lab.host, "nft", "flush chain inet gate prerouting")
    assert tcp(host.lab.box, plan.evil) is Outcome.RESET
    assert host.counted() == {"refused_container_tcp": 1}


def test_client_behind_an_interface_without_an_address_is_reset(host: AnsweringHost, plan: Plan) -> None:
    host.nft.apply(render_internal(INTERNAL, FULL, Responder(PORT)))
    assert tcp(host.lab.box, plan.evil) is Outcome.RESET
    assert tcp(host.lab.host, plan.evil, mark=ENGINE) is Outcome.ANSWERED
    host.enforce(DEFAULT, replace(ANSWERING, local=False))
    assert tcp(host.lab.box, plan.evil) is Outcome.ANSWERED
    assert tcp(host.lab.host, plan.evil, mark=ENGINE) is Outcome.RESET


def test_socket_that_is_bound_to_the_uplink_is_refused_at_once(host: AnsweringHost) -> None:
    address = test_nft.V4.evil  # over IPv6 it would wait
    with opened(host.lab.host, socket.SOCK_STREAM, address, ENGINE, AT_ONCE_SECONDS) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"uplink")
        with pytest.raises(ConnectionRefusedError):
            client.connect((address, 443))
    assert host.counted() == {"refused_engine_tcp": 1}


def test_udp_is_prohibited_as_before(host: AnsweringHost, plan: Plan) -> None:
    assert udp(host.lab.box, plan.evil) is test_nft.Outcome.PROHIBITED
    assert host.counted() == {"refused_container_udp": 1}


# --- what is none of its business ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("client", "server"),
    [
        ("box", "box2"),
        ("box", "bridge"),
        ("box2", "uplink"),
        ("box", "service"),
        ("host", "box"),
        ("host", "service"),
        ("host", "uplink"),
        ("host", "bridge"),
        ("wan", "uplink"),
        ("wan", "bridge"),
        ("wan", "box2"),
    ],
)
def test_what_stays_in_this_host_or_comes_in_is_never_answered(
    host: AnsweringHost, plan: Plan, client: str, server: str
) -> None:
    host.enforce(ALL_STRICT)
    assert tcp(getattr(host.lab, client), getattr(plan, server)) is Outcome.OPEN
    assert host.counted() == {}


def test_earlier_translation_wins_and_is_judged_by_where_it_leads(host: AnsweringHost, plan: Plan) -> None:
    host.learn(plan.good)
    assert tcp(host.lab.box, plan.good_service) is Outcome.OPEN
    assert tcp(host.lab.host, plan.good_service, mark=ENGINE) is Outcome.OPEN
    assert tcp(host.lab.box, plan.evil_service, seconds=3) is Outcome.RESET
    assert host.packets(CountedScope.CONTAINER) >= 1


def test_direct_connection_to_the_responder_is_reset(host: AnsweringHost, plan: Plan) -> None:
    loopback = "::1" if ":" in plan.evil else "127.0.0.1"
    for namespace, address in (
        (host.lab.box, plan.bridge),
        (host.lab.wan, plan.uplink),
        (host.lab.host, loopback),
        (host.lab.host, plan.uplink),
    ):
        assert tcp(namespace, address, PORT) is Outcome.RESET
    assert host.counted() == {}


def test_established_connection_survives_a_reload_that_answers_its_like(host: AnsweringHost, plan: Plan) -> None:
    host.learn(plan.good)
    with opened(host.lab.box, socket.SOCK_STREAM, plan.good) as client:
        client.connect((plan.good, 443))
        host.withdraw(plan.good)
        host.enforce(ALL_STRICT)
        client.send(b"still here")
        assert client.recv(100) == b"still here"
    assert tcp(host.lab.box, plan.good) is Outcome.ANSWERED


def test_reload_under_traffic_opens_nothing_and_loses_nothing(host: AnsweringHost, plan: Plan) -> None:
    host.learn(plan.good)
    stop = threading.Event()
    seen: dict[str, set[Outcome]] = {"good": set(), "evil": set(), "engine": set()}

    def probe() -> None:
        while not stop.is_set():
            seen["good"].add(tcp(host.lab.box, plan.good))
            seen["evil"].add(tcp(host.lab.box, plan.evil))
            seen["engine"].add(tcp(host.lab.host, plan.evil, mark=ENGINE))

    prober = threading.Thread(target=probe)
    prober.start()
    for turn in range(60):
        host.enforce(ALL_STRICT if turn % 2 else DEFAULT)
        host.learn(plan.good)
    stop.set()
    prober.join(10)
    assert seen["good"] == {Outcome.OPEN}
    assert seen["evil"] <= {Outcome.ANSWERED, Outcome.RESET}
    assert seen["engine"] <= {Outcome.ANSWERED, Outcome.RESET}


# Last: its ports stay in conntrack for a while, and a direct connection from one of them would be dropped there.
def test_flood_is_reset_and_every_connection_is_counted_once(host: AnsweringHost, plan: Plan) -> None:
    started = time.monotonic()
    outcomes = [tcp(host.lab.box, plan.evil) for _ in range(4_000)]
    if time.monotonic() - started < 1.5:  # a slower machine makes no flood
        assert Outcome.RESET in outcomes
    assert Outcome.OPEN not in outcomes
    assert outcomes[0] is Outcome.ANSWERED
    assert host.counted() == {"refused_container_tcp": len(outcomes)}
