"""Marks that somebody else than the enforcer sets: each way to forge one, tried with real sockets and packets.

The attacker is a container on the host's network, where no device scrubs marks, with CAP_NET_RAW or CAP_NET_ADMIN; and
containers behind a veth and a macvlan. Containers are strict and the host is off, so whoever passes for the host, or as
vouched for, gets out. Every attack is a function of an address: it is made on one that is refused, then, as its twin, on
one that is allowed, and what counts is what arrives at the far end of the uplink. Without the enforcer all arrive.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from enforcer.kernel_abi import DEFAULT_MARKS, MarkedScope
from tests.lab import attacker
from tests.lab.enforcer import COMMAND, Enforcer, policy
from tests.lab.internet import ALLOWED_ADDRESS, EVIL_ADDRESS, EVIL_ADDRESS6
from tests.lab.lab import HOST_ADDRESS, Agent, Lab, poll

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(120)]

FORGED = DEFAULT_MARKS.vouched | DEFAULT_MARKS.of(MarkedScope.HOST)
GATEWAY = "192.0.2.1"
MACVLAN = ("10.99.0.1", "10.99.0.2")
# Translated by somebody else before the enforcer judges, as a ClusterIP is: refused by silence, so that the SYN comes again.
SERVICES = {EVIL_ADDRESS: "10.99.99.1", ALLOWED_ADDRESS: "10.99.99.2"}
UPLINK_GUARD = "uplink guard"  # at tc egress of uplinks, which is not merged yet
RIGHTS = {"net_raw": "NET_RAW", "net_admin": "NET_ADMIN"}


@dataclass(slots=True)
class Field:
    """Who is there: attackers by name, and whoever looks at what arrives."""

    lab: Lab
    enforcer: Enforcer
    attackers: dict[str, Agent]
    watcher: Agent
    allowed: dict[int, str]
    refused: dict[int, str] = field(default_factory=lambda: {4: EVIL_ADDRESS, 6: EVIL_ADDRESS6})

    def arrived(self, address: str, after: Callable[[], None]) -> bool:
        """Whether something for `address` came in, up to the moment when what `after` sends to the allowed one does."""
        allowed = self.allowed[6 if ":" in address else 4]
        after()
        seen: set[str] = set()

        def twin_came() -> bool:
            seen.update(self.watcher.call("arrivals"))
            return allowed in seen

        poll(f"the twin at {allowed}", twin_came, 10)
        return address in seen


Act = Callable[[Agent, str], None]


@dataclass(frozen=True, slots=True)
class Attack:
    """One forgery, whoever tries it."""

    words: str
    act: Act
    by: tuple[str, ...] = ("net_raw", "net_admin")
    families: tuple[int, ...] = (4, 6)
    waits_for: str = ""  # what will refuse it; "": it is refused


# --- what is tried ---------------------------------------------------------------------------------------------------
def call(agent: Agent, operation: str, **arguments: object) -> str:
    return str(agent.call(operation, **arguments))


def family_of(address: str) -> int:
    return 6 if ":" in address else 4


def mark_before_connect(kind: str) -> Act:
    def act(agent: Agent, address: str) -> None:
        agent.call("make", key="s", kind=kind, family=family_of(address))
        agent.call("mark", key="s", value=FORGED)
        agent.call("connect", key="s", address=address)
        if kind == "udp":
            agent.call("send", key="s")

    return act


def mark_after_connect(agent: Agent, address: str) -> None:
    agent.call("make", key="s", kind="udp", family=family_of(address))
    agent.call("connect", key="s", address=address)
    agent.call("mark", key="s", value=FORGED)
    agent.call("send", key="s")


def mark_between_syns(agent: Agent, address: str) -> None:
    agent.call("make", key="s", kind="tcp")
    agent.call("connect", key="s", address=SERVICES[address], wait=False)
    agent.call("mark", key="s", value=FORGED)
    agent.call("await_connection", key="s")


def racing_marks(agent: Agent, address: str) -> None:
    agent.call("race", address=address, forged=FORGED, count=1_000)


def v4_mapped(kind: str) -> Act:
    def act(agent: Agent, address: str) -> None:
        agent.call("make", key="s", kind=kind, family=6)
        agent.call("mark", key="s", value=FORGED)
        agent.call("connect", key="s", address=f"::ffff:{address}")
        if kind == "udp":
            agent.call("send", key="s")

    return act


def unconnected_udp(agent: Agent, address: str) -> None:
    agent.call("make", key="s", kind="udp", family=family_of(address))
    agent.call("mark", key="s", value=FORGED)
    agent.call("send", key="s", address=address)


def marked_message(kind: str) -> Act:
    def act(agent: Agent, address: str) -> None:
        agent.call("make", key="s", kind="udp", family=family_of(address))
        if kind == "connected":
            agent.call("connect", key="s", address=address)
        agent.call("send", key="s", address="" if kind == "connected" else address, mark=FORGED)

    return act


def second_destination(agent: Agent, address: str) -> None:
    agent.call("make", key="s", kind="udp", family=family_of(address))
    agent.call("send", key="s", address="2001:2::1" if ":" in address else "198.18.0.1", port=9)
    agent.call("send", key="s", address=address)


def fast_open(how: str) -> Act:
    def act(agent: Agent, address: str) -> None:
        agent.call("make", key="s", kind="tcp", family=family_of(address))
        agent.call("mark", key="s", value=FORGED)
        if how == "message":
            agent.call("send", key="s", address=address, flags=attacker.MSG_FASTOPEN)
        else:
            agent.call("option", key="s", level=socket.IPPROTO_TCP, name=attacker.TCP_FASTOPEN_CONNECT, value=1)
            agent.call("connect", key="s", address=address)
            agent.call("send", key="s")

    return act


def ring(how: str, operation: str = "connect") -> Act:
    def act(agent: Agent, address: str) -> None:
        if not agent.call("ring_is_there"):
            pytest.skip("io_uring is disabled here")
        agent.call("make", key="s", kind="udp" if operation == "datagram" else "tcp", family=family_of(address))
        agent.call("mark", key="s", value=FORGED)
        if operation == "connect":
            agent.call("ring_connect", key="s", address=address, how=how)
        else:
            flags = attacker.MSG_FASTOPEN if operation == "fast open" else 0
            agent.call("ring_send", key="s", address=address, how=how, flags=flags)

    return act


def ring_marked_message(agent: Agent, address: str) -> None:
    agent.call("make", key="s", kind="udp", family=family_of(address))
    agent.call("ring_send", key="s", address=address, how="inline", mark=FORGED)


def ring_mark(agent: Agent, address: str) -> None:
    agent.call("make", key="s", kind="udp", family=family_of(address))
    agent.call("connect", key="s", address=address)
    agent.call("ring_mark", key="s", value=FORGED)
    agent.call("send", key="s")


def raw_syn(marking: str) -> Act:
    def act(agent: Agent, address: str) -> None:
        agent.call("make", key="s", kind="raw")
        if marking == "socket":
            agent.call("mark", key="s", value=FORGED)
        agent.call("send_raw", key="s", source=HOST_ADDRESS, address=address, mark=FORGED * (marking == "message"))

    return act


def packet_socket(agent: Agent, address: str) -> None:
    agent.call("make_packet_socket", key="s")
    agent.call("send_packet", key="s", interface="up0", gateway=GATEWAY, source=HOST_ADDRESS, address=address)


def packet_socket_around_tc(agent: Agent, address: str) -> None:
    agent.call("make_packet_socket", key="s")
    bypass = attacker.SOL_PACKET, attacker.PACKET_QDISC_BYPASS
    agent.call("option", key="s", level=bypass[0], name=bypass[1], value=1)
    agent.call("send_packet", key="s", interface="up0", gateway=GATEWAY, source=HOST_ADDRESS, address=address)


def connect_again(kind: str) -> Act:
    def act(agent: Agent, address: str) -> None:
        agent.call("make", key="s", kind=kind, family=family_of(address))
        agent.call("connect", key="s", address="::1" if ":" in address else "127.0.0.1", port=9)
        agent.call("disconnect", key="s")
        agent.call("mark", key="s", value=FORGED)
        agent.call("connect", key="s", address=address)
        if kind == "udp":
            agent.call("send", key="s")

    return act


def bound(kind: str) -> Act:
    def act(agent: Agent, address: str) -> None:
        agent.call("make", key="s", kind=kind, family=family_of(address))
        agent.call("bind_port", key="s")
        agent.call("mark", key="s", value=FORGED)
        agent.call("connect", key="s", address=address)

    return act


HOST_NETWORK = (
    Attack("SO_MARK before connect, TCP", mark_before_connect("tcp")),
    Attack("SO_MARK before connect, MPTCP", mark_before_connect("mptcp")),
    Attack("SO_MARK before connect, UDP", mark_before_connect("udp")),
    Attack("SO_MARK after connect, UDP", mark_after_connect),
    Attack("SO_MARK between two SYNs", mark_between_syns, families=(4,)),
    Attack("SO_MARK in a race with connect", racing_marks, families=(4,)),
    Attack("v4-mapped IPv6, TCP", v4_mapped("tcp"), families=(4,)),
    Attack("v4-mapped IPv6, UDP", v4_mapped("udp"), families=(4,)),
    Attack("SO_MARK on unconnected UDP", unconnected_udp),
    Attack("mark of a message, connected UDP", marked_message("connected")),
    Attack("mark of a message, unconnected UDP", marked_message("unconnected")),
    Attack("unconnected UDP, second destination", second_destination),
    Attack("TCP fast open, MSG_FASTOPEN", fast_open("message")),
    Attack("TCP fast open, TCP_FASTOPEN_CONNECT", fast_open("connect")),
    Attack("io_uring connect", ring("inline")),
    Attack("io_uring connect by a worker", ring("async")),
    Attack("io_uring connect by the polling thread", ring("sqpoll")),
    Attack("io_uring sendmsg, TCP fast open", ring("inline", "fast open")),
    Attack("io_uring sendmsg, UDP", ring("inline", "datagram")),
    Attack("io_uring sendmsg, mark of a message", ring_marked_message),
    Attack("io_uring SO_MARK", ring_mark),
    Attack("raw socket", raw_syn("none"), by=("net_raw",), families=(4,)),
    Attack("raw socket, SO_MARK", raw_syn("socket"), by=("net_raw",), families=(4,)),
    Attack("raw socket, mark of a message", raw_syn("message"), by=("net_raw",), families=(4,)),
    Attack("AF_PACKET", packet_socket, by=("net_raw",), families=(4,)),
    Attack("AF_PACKET around tc", packet_socket_around_tc, by=("net_raw",), families=(4,)),
    Attack("disconnect and connect, TCP", connect_again("tcp")),
    Attack("disconnect and connect, UDP", connect_again("udp")),
    Attack("SO_MARK behind bind, TCP", bound("tcp")),
    Attack("SO_MARK behind bind, MPTCP", bound("mptcp")),
)


@pytest.fixture(scope="module")
def field_before(lab: Lab, any_enforcer: Enforcer) -> Iterator[Field]:
    """The field before anything is enforced."""
    if any_enforcer.running:
        any_enforcer.stop()
    any_enforcer.remove()
    services = "".join(f"ip daddr {service} dnat to {address}\n" for address, service in SERVICES.items())
    nat = f"table ip services {{\nchain output {{\ntype nat hook output priority -100;\n{services}}}\n}}\n"
    applied = lab.run("host", ["nft", "-f", "-"], text=nat)
    assert applied.returncode == 0, applied.stdout
    container = f"docker/{secrets.token_hex(32)}"
    attackers = {}
    for right in RIGHTS:
        only = f"-all,+{right}"
        inside = ("setpriv", f"--bounding-set={only}", f"--inh-caps={only}")
        attackers[right] = lab.agent("host", inside=inside, leaf=container, script="attacker.py")
    watcher = lab.agent("net", script="attacker.py")
    watcher.call("watch", interface="to-host")
    allowed = {4: ALLOWED_ADDRESS, 6: str(lab.host.call("resolve", name="v6.allowed.test", family=6)[0])}
    assert lab.host.attempt(EVIL_ADDRESS).reached  # and the gateway is known to ARP
    yield Field(lab, Enforcer(lab, "host", lab.host), attackers, watcher, allowed)
    lab.run("host", ["nft", "delete", "table", "ip", "services"])
