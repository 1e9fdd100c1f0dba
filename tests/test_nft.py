"""The goldens and the ruleset's promises in the real kernel, with real packets between namespaces of our own.

    wan ("the internet": registries on its lo) ── uplink ─ host ─ br0 ── box
                                                            └──── br1 ── box2

Every namespace is held by a descriptor alone, so nothing is left behind whatever happens to the tests. Sockets on the
host carry the marks that the connect hooks would have set.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import re
import selectors
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple, Self

import pytest

from enforcer.kernel_abi import DEFAULT_MARKS, MarkedScope, Protocol
from enforcer.ladder import Feature
from enforcer.nft import Counter, Nft, NftError
from enforcer.policy import Level, Mode, Policy, RuleKind, Scope
from enforcer.ruleset import (
    TABLE,
    CountedScope,
    Element,
    counter_name,
    render_elements,
    render_internal,
    render_removal,
    render_ruleset,
)
from tests.test_ruleset import DEFAULT, FULL, GOLDEN, RUNG_POLICY, RUNGS, rule

pytestmark = pytest.mark.root

INTERNAL = ["br0", "br1"]
ALL_STRICT = replace(DEFAULT, scope=Scope(Level.STRICT, Level.STRICT, Level.STRICT))
CLONE_NEWNET = 0x40000000
PATIENCE_SECONDS = 1.0  # a refusal that takes longer is none: clients would hang

_libc = ctypes.CDLL(None, use_errno=True)


# --- namespaces ------------------------------------------------------------------------------------------------------
def new_namespace() -> int:
    """A descriptor of a fresh network namespace, which lives as long as it is open."""
    opened: list[int] = []

    def unshare() -> None:
        assert _libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        opened.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=unshare)
    thread.start()
    thread.join()
    return opened[0]


@contextlib.contextmanager
def inside(namespace: int) -> Iterator[None]:
    """This thread, and what it starts, in `namespace`; sockets stay where they were opened."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert _libc.setns(namespace, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        yield
    finally:
        assert _libc.setns(home, CLONE_NEWNET) == 0
        os.close(home)


def run(namespace: int, *command: str, text: str = "") -> str:
    with inside(namespace):
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def nft_in(namespace: int) -> Iterator[Nft]:
    with contextlib.ExitStack() as stack:
        with inside(namespace):
            nft = stack.enter_context(Nft())
        yield nft


# --- the lab ---------------------------------------------------------------------------------------------------------
class Plan(NamedTuple):
    """The addresses of one family."""

    evil: str  # in no policy
    good: str  # what the tests learn
    static: str  # named by the policy
    rerouted: str  # routed to br1, and to the uplink by a mark
    wan: str  # the net's end of the uplink
    uplink: str  # the host's end
    bridge: str  # the host on br0
    box: str
    box2: str
    service: str  # translated to box2:443, for box and host alike
    evil_service: str  # translated to evil:443
    good_service: str  # translated to good:443


V4 = Plan(
    *("198.51.100.20", "198.51.100.10", "198.51.100.30", "203.0.113.1", "192.0.2.2", "192.0.2.1"),
    *("172.30.0.1", "172.30.0.2", "172.31.0.2", "10.96.0.1", "10.96.0.2", "10.96.0.3"),
)
V6 = Plan(
    *("2001:db8:51::20", "2001:db8:51::10", "2001:db8:51::30", "2001:db8:71::1", "2001:db8:2::2", "2001:db8:2::1"),
    *("fd30::1", "fd30::2", "fd31::2", "fd96::1", "fd96::2", "fd96::3"),
)
TCP_PORTS = (53, 443, 5000, 8000, 8443)


class Servers(threading.Thread):
    """Echo servers, in any namespaces."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ, None)

    def listen(self, namespace: int, kind: socket.SocketKind, address: str, port: int) -> None:
        with inside(namespace):
            server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        if kind is socket.SOCK_STREAM:
            server.listen(64)
        server.setblocking(False)
        self._selector.register(
            server, selectors.EVENT_READ, self._accept if kind is socket.SOCK_STREAM else self._echo
        )

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            self._selector.register(connection, selectors.EVENT_READ, self._reply)

    def _reply(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65_536)
            if data:
                connection.sendall(data)
                return
        except OSError:
            pass
        self._selector.unregister(connection)
        connection.close()

    def _echo(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            data, client = server.recvfrom(65_536)
            server.sendto(data, client)

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                key.data(key.fileobj)

    def close(self) -> None:
        self._waker.send(b"x")
        self.join(5)
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._waker.close()
        self._selector.close()


@dataclass(frozen=True)
class Lab:
    wan: int
    host: int
    box: int
    box2: int


HOST_LINKS = """\
link set lo up
link add uplink type veth peer name uplink netns /proc/{pid}/fd/{wan}
link add br0 type bridge
link add br1 type bridge
link add port0 master br0 type veth peer name eth0 netns /proc/{pid}/fd/{box}
link add port1 master br1 type veth peer name eth0 netns /proc/{pid}/fd/{box2}
address add 192.0.2.1/24 dev uplink
address add 2001:db8:2::1/64 dev uplink nodad
address add 172.30.0.1/24 dev br0
address add fd30::1/64 dev br0 nodad
address add 172.31.0.1/24 dev br1
address add fd31::1/64 dev br1 nodad
link set uplink up
link set br0 up
link set br1 up
link set port0 up
link set port1 up
route add default via 192.0.2.2
route add default via 2001:db8:2::2
route add 203.0.113.1 dev br1
route add 2001:db8:71::1 dev br1
route add default via 192.0.2.2 table 100
route add default via 2001:db8:2::2 table 100
rule add fwmark 1/1 table 100
neigh add 203.0.113.1 lladdr 02:00:00:00:00:01 dev br1
neigh add 2001:db8:71::1 lladdr 02:00:00:00:00:01 dev br1
"""
WAN_LINKS = """\
link set lo up
address add 192.0.2.2/24 dev uplink
address add 2001:db8:2::2/64 dev uplink nodad
link set uplink up
address add 198.51.100.10/32 dev lo
address add 198.51.100.20/32 dev lo
address add 198.51.100.30/32 dev lo
address add 203.0.113.1/32 dev lo
address add 2001:db8:51::10/128 dev lo nodad
address add 2001:db8:51::20/128 dev lo nodad
address add 2001:db8:51::30/128 dev lo nodad
address add 2001:db8:71::1/128 dev lo nodad
route add default via 192.0.2.1
route add default via 2001:db8:2::1
"""
BOX_LINKS = """\
link set lo up
address add {v4}.2/24 dev eth0
address add {v6}::2/64 dev eth0 nodad
link set eth0 up
route add default via {v4}.1
route add default via {v6}::1
"""
# What docker and kube-proxy would have installed: a published port, cluster services; and a re-route by mark.
TRANSLATIONS = """\
table inet lab {
	map service4 { type ipv4_addr : ipv4_addr; elements = {
		10.96.0.1 : 172.31.0.2, 10.96.0.2 : 198.51.100.20, 10.96.0.3 : 198.51.100.10, 192.0.2.1 : 172.30.0.2 } }
	map service6 { type ipv6_addr : ipv6_addr; elements = {
		fd96::1 : fd31::2, fd96::2 : 2001:db8:51::20, fd96::3 : 2001:db8:51::10, 2001:db8:2::1 : fd30::2 } }
	chain prerouting {
		type nat hook prerouting priority dstnat;
		tcp dport 443 dnat ip to ip daddr map @service4
		tcp dport 443 dnat ip6 to ip6 daddr map @service6
	}
	chain output {
		type nat hook output priority -100;
		tcp dport 443 dnat ip to ip daddr map @service4
		tcp dport 443 dnat ip6 to ip6 daddr map @service6
	}
	chain reroute {
		type route hook output priority mangle;
		ip daddr 203.0.113.1 meta mark set meta mark | 1
		ip6 daddr 2001:db8:71::1 meta mark set meta mark | 1
	}
}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab(*(new_namespace() for _ in range(4)))
    run(lab.host, "ip", "-batch", "-", text=HOST_LINKS.format(pid=os.getpid(), **vars(lab)))
    run(lab.host, "ip", "-6", "rule", "add", "fwmark", "1/1", "table", "100")
    run(lab.wan, "ip", "-batch", "-", text=WAN_LINKS)
    run(lab.box, "ip", "-batch", "-", text=BOX_LINKS.format(v4="172.30.0", v6="fd30"))
    run(lab.box2, "ip", "-batch", "-", text=BOX_LINKS.format(v4="172.31.0", v6="fd31"))
    run(lab.host, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    # ICMP errors are rate-limited, for each target and (a namespace's own setting on newer kernels only) in all; the
    # tests ask for many.
    run(lab.host, "sysctl", "-qw", "net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0")
    run(lab.host, "sysctl", "-eqw", "net.ipv4.icmp_msgs_per_sec=100000", "net.ipv4.icmp_msgs_burst=100000")
    run(lab.host, "nft", "-f", "-", text=TRANSLATIONS)
    servers = Servers()
    for namespace in (lab.wan, lab.host, lab.box, lab.box2):
        for port in TCP_PORTS:
            servers.listen(namespace, socket.SOCK_STREAM, "::", port)
    for plan in (V4, V6):
        for address in (plan.evil, plan.good, plan.static):
            servers.listen(lab.wan, socket.SOCK_DGRAM, address, 443)
            servers.listen(lab.wan, socket.SOCK_DGRAM, address, 8000)
        servers.listen(lab.box2, socket.SOCK_DGRAM, plan.box2, 443)
        servers.listen(lab.host, socket.SOCK_DGRAM, plan.bridge, 443)
    servers.start()
    try:
        for plan in (V4, V6):
            # Neighbours and link-local addresses take a moment to settle.
            for namespace, address in ((lab.box, plan.evil), (lab.box2, plan.evil), (lab.wan, plan.box2)):
                until(lambda: tcp(namespace, address, 8000) is Outcome.OPEN, 10)  # noqa: B023 - used at once
        yield lab
    finally:
        servers.close()
        for namespace in vars(lab).values():
            os.close(namespace)


@dataclass(frozen=True)
class Host:
    """The host of the lab with a policy in force."""

    lab: Lab
    nft: Nft

    def enforce(self, policy: Policy) -> None:
        self.nft.apply(render_ruleset(policy, FULL, INTERNAL))

    def learn(self, address: str, port: int = 443, lifetime_seconds: int = 300) -> None:
        self.nft.apply(render_elements([Element(ip_address(address), port, lifetime_seconds)], []))

    def withdraw(self, address: str, port: int = 443) -> None:
        self.nft.apply(render_elements([], [(ip_address(address), port)]))

    def packets(self, scope: CountedScope, protocol: Protocol = Protocol.TCP, mode: Mode = Mode.ENFORCE) -> int:
        return self.nft.counters()[counter_name(mode, scope, protocol)].packets


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    with nft_in(lab.host) as nft:
        host = Host(lab, nft)
        host.enforce(DEFAULT)
        try:
            yield host
        finally:
            nft.apply(render_removal())


@pytest.fixture(params=[V4, V6], ids=["ipv4", "ipv6"])
def plan(request: pytest.FixtureRequest) -> Plan:
    assert isinstance(request.param, Plan)
    return request.param


# --- clients ---------------------------------------------------------------------------------------------------------
class Outcome(enum.Enum):
    OPEN = "the server answered"
    RESET = "connection refused, at once"
    PROHIBITED = "administratively prohibited, at once"
    SILENCE = "nothing came back"


_ERRORS = {
    errno.ECONNREFUSED: Outcome.RESET,
    errno.EHOSTUNREACH: Outcome.PROHIBITED,  # ICMP type 3 code 13
    errno.EACCES: Outcome.PROHIBITED,  # ICMPv6 type 1 code 1
}


def opened(
    namespace: int, kind: socket.SocketKind, address: str, mark: int = 0, patience: float = PATIENCE_SECONDS
) -> socket.socket:
    with inside(namespace):
        client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
    client.settimeout(patience)
    return client


def outcome(exchange: Callable[[], bytes]) -> Outcome:
    try:
        assert exchange()
    except TimeoutError:
        return Outcome.SILENCE
    except OSError as error:
        return _ERRORS[error.errno or 0]
    return Outcome.OPEN


def tcp(namespace: int, address: str, port: int = 443, mark: int = 0, patience: float = PATIENCE_SECONDS) -> Outcome:
    with opened(namespace, socket.SOCK_STREAM, address, mark, patience) as client:

        def exchange() -> bytes:
            client.connect((address, port))
            client.send(b"hello")
            return client.recv(100)

        return outcome(exchange)


def udp(namespace: int, address: str, port: int = 443, mark: int = 0, size: int = 100) -> Outcome:
    with opened(namespace, socket.SOCK_DGRAM, address, mark) as client:

        def exchange() -> bytes:
            client.connect((address, port))
            # Where the packet is refused in output, send says EPERM; the ICMP error comes to recv all the same.
            with contextlib.suppress(PermissionError):
                client.send(b"x" * size)
            return client.recv(10_000)

        return outcome(exchange)


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.05)


# --- goldens and libnftables -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("*.nft")), ids=lambda path: path.stem)
def test_golden_loads_twice_and_its_listing_is_the_same_ruleset(golden: Path) -> None:
    listings = []
    text = golden.read_text()
    for _ in range(2):
        namespace = new_namespace()
        with nft_in(namespace) as nft:
            nft.apply(text)
            nft.apply(text)
            assert nft.present()
        listings.append(run(namespace, "nft", "-s", "list", "ruleset"))
        text = "flush ruleset\n" + listings[-1]
        os.close(namespace)
    assert listings[0] == listings[1]
    written = [line.strip() for line in golden.read_text().splitlines()]
    rules = [line.strip() for line in listings[0].splitlines()]
    for prefix in (
        "chain ",
        "jump ",
        "goto ",
        "drop",
        "meta l4proto tcp counter",
        "limit rate",
        "ip daddr",
        "tcp dport",
    ):
        assert sum(line.startswith(prefix) for line in rules) == sum(line.startswith(prefix) for line in written)


def test_hostile_rule_name_makes_no_table_of_its_own() -> None:
    namespace = new_namespace()
    run(namespace, "nft", "add table ip bystander")
    with nft_in(namespace) as nft:
        nft.apply((GOLDEN / "hostile-names.nft").read_text())
    assert run(namespace, "nft", "list tables").splitlines() == ["table ip bystander", f"table inet {TABLE}"]
    os.close(namespace)


def test_any_interface_name_that_is_rendered_is_taken_literally_by_the_kernel() -> None:
    printable = "".join(map(chr, range(0x21, 0x7F)))
    names = [printable[start : start + 8] for start in range(0, len(printable), 3)]
    namespace = new_namespace()
    with nft_in(namespace) as nft:
        nft.apply(render_ruleset(DEFAULT, FULL, names))
    listed = set(re.findall(r'"([^"]+)"', run(namespace, "nft", "list", "set", "inet", TABLE, "internal")))
    assert listed == {"lo", *(name for name in names if not set(name) & set('"*/:\\'))}
    os.close(namespace)


def test_error_names_the_line_and_nothing_of_the_transaction_is_kept(lab: Lab) -> None:
    with nft_in(lab.wan) as nft:
        with pytest.raises(NftError, match=r"line 3:.*No such file") as raised:
            nft.apply("add table inet half\nadd chain inet half c\ndelete chain inet half absent\n")
        assert "delete chain inet half absent" in str(raised.value)
        with pytest.raises(NftError, match=r"line 2:.*syntax error"):
            nft.apply("add table inet half\nfrobnicate\n")
    assert run(lab.wan, "nft", "list tables") == ""


def test_full_kernel_lacks_nothing_and_probing_leaves_nothing() -> None:
    namespace = new_namespace()
    with nft_in(namespace) as nft:
        assert nft.probe() == FULL.features
    assert run(namespace, "nft", "list tables") == ""
    os.close(namespace)


def test_feature_that_the_kernel_refuses_is_missing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_log(nft: Nft, text: str, apply: Callable[[Nft, str], None] = Nft.apply) -> None:
        apply(nft, re.sub("log prefix .* level", "frobnicate", text))

    with nft_in(lab.wan) as nft:
        monkeypatch.setattr(Nft, "apply", without_log)
        assert nft.probe() == FULL.features - {Feature.LOG}


def test_probing_without_privilege_is_an_error_and_not_a_kernel_without_features(lab: Lab) -> None:
    with nft_in(lab.wan) as nft:
        os.seteuid(65_534)
        try:
            with pytest.raises(NftError, match="Operation not permitted"):
                nft.probe()
        finally:
            os.seteuid(0)
        assert nft.probe() == FULL.features


def test_nft_stays_in_the_namespace_where_it_was_entered(lab: Lab) -> None:
    namespace = new_namespace()
    with nft_in(namespace) as nft, inside(lab.wan):
        nft.apply(render_ruleset(DEFAULT, FULL, []))
        assert nft.present()
        assert nft.counters()
        with Nft() as other:
            assert not other.present()
            assert not other.counters()
    os.close(namespace)


def test_table_without_a_base_chain_is_not_present(host: Host) -> None:
    assert host.nft.present()
    host.nft.apply(f"flush chain inet {TABLE} postrouting\ndelete chain inet {TABLE} postrouting\n")
    assert not host.nft.present()
    host.enforce(DEFAULT)
    assert host.nft.present()
    host.nft.apply(render_removal())
    assert not host.nft.present()


def test_learned_without_the_table_is_an_error(host: Host) -> None:
    assert host.nft.learned() == []
    host.nft.apply(render_removal())
    with pytest.raises(NftError, match="No such file"):
        host.nft.learned()


def test_learned_lists_both_families_with_what_is_left_of_their_lifetimes(host: Host) -> None:
    permitted = [Element(ip_address(f"10.0.{n >> 8}.{n & 255}"), 443, 300) for n in range(3000)]
    permitted.append(Element(ip_address("2001:db8::1"), 8443, 3600))
    host.nft.apply(render_elements(permitted, []))
    learned = {(element.address, element.port): element.lifetime_seconds for element in host.nft.learned()}
    assert learned.keys() == {(element.address, element.port) for element in permitted}
    assert all(290 <= learned[element.address, element.port] <= 300 for element in permitted[:-1])
    assert 3590 <= learned[ip_address("2001:db8::1"), 8443] <= 3600


def test_element_in_its_last_second_is_listed_and_refreshed(host: Host) -> None:
    address = ip_address("10.0.0.1")
    host.nft.apply(render_elements([Element(address, 443, 1)], []))
    last = host.nft.learned()
    assert last == [Element(address, 443, 1)]
    host.nft.apply(
        render_elements([Element(address, 443, 300)], [], [(element.address, element.port) for element in last])
    )
    assert [element.lifetime_seconds >= 290 for element in host.nft.learned()] == [True]


# --- forwarded -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("port", [443, 5000])
def test_forwarded_to_an_unlisted_registry_is_reset_and_counted(host: Host, plan: Plan, port: int) -> None:
    assert tcp(host.lab.box, plan.evil, port) is Outcome.RESET
    assert host.packets(CountedScope.CONTAINER) == 1
    assert tcp(host.lab.box, plan.evil, 8000) is Outcome.OPEN
    assert host.packets(CountedScope.CONTAINER) == 1


def test_learned_address_is_reached_on_its_port_and_no_other(host: Host, plan: Plan) -> None:
    host.learn(plan.good)
    assert tcp(host.lab.box, plan.good) is Outcome.OPEN
    assert tcp(host.lab.box, plan.good, 5000) is Outcome.RESET
    assert tcp(host.lab.box, plan.evil) is Outcome.RESET


def test_address_of_the_policy_is_reached_on_the_rules_ports(host: Host, plan: Plan) -> None:
    assert tcp(host.lab.box, plan.static) is Outcome.RESET
    host.enforce(replace(DEFAULT, rules=(rule("corp", plan.static),)))
    assert tcp(host.lab.box, plan.static) is Outcome.OPEN
    assert udp(host.lab.box, plan.static) is Outcome.OPEN
    assert tcp(host.lab.box, plan.static, 5000) is Outcome.RESET
    assert tcp(host.lab.box, plan.good) is Outcome.RESET


@pytest.mark.parametrize("size", [100, 4000], ids=["whole", "fragmented"])
def test_forwarded_udp_is_prohibited_at_once_so_that_quic_falls_back(host: Host, plan: Plan, size: int) -> None:
    host.learn(plan.good)
    host.enforce(replace(DEFAULT, rules=(rule("corp", plan.static),)))
    assert udp(host.lab.box, plan.evil, size=size) is Outcome.PROHIBITED
    assert host.packets(CountedScope.CONTAINER, Protocol.UDP) == 1
    assert udp(host.lab.box, plan.static, size=size) is Outcome.OPEN
    assert udp(host.lab.box, plan.evil, 8000, size=size) is Outcome.OPEN


def test_what_a_name_taught_is_for_tcp_and_a_listed_address_for_udp_too(host: Host, plan: Plan) -> None:
    host.learn(plan.good)
    host.enforce(replace(DEFAULT, rules=(rule("corp", plan.static),)))
    assert tcp(host.lab.box, plan.good) is Outcome.OPEN
    assert udp(host.lab.box, plan.good) is Outcome.PROHIBITED
    assert udp(host.lab.box, plan.static) is Outcome.OPEN


def test_a_listed_proxy_is_reached_by_tcp_on_its_port_and_no_other(host: Host, plan: Plan) -> None:
    host.enforce(replace(ALL_STRICT, rules=(rule("proxy", plan.static, kind=RuleKind.PROXY, ports=(5000,)),)))
    assert tcp(host.lab.box, plan.static, 5000) is Outcome.OPEN
    assert udp(host.lab.box, plan.static, 5000) is Outcome.PROHIBITED
    assert tcp(host.lab.box, plan.static) is Outcome.RESET
    assert tcp(host.lab.host, plan.static, 5000, MarkedScope.ENGINE) is Outcome.OPEN
    assert tcp(host.lab.host, plan.evil, 5000, MarkedScope.ENGINE) is Outcome.RESET


def test_unknown_interface_is_an_uplink_until_it_is_known_to_be_internal(host: Host, plan: Plan) -> None:
    host.nft.apply(render_internal(["br0"], FULL))
    assert tcp(host.lab.box, plan.box2) is Outcome.RESET
    host.nft.apply(render_internal(INTERNAL, FULL))
    assert tcp(host.lab.box, plan.box2) is Outcome.OPEN


# --- lifetimes -------------------------------------------------------------------------------------------------------
def test_expired_element_is_refused(host: Host, plan: Plan) -> None:
    host.learn(plan.good, lifetime_seconds=1)
    assert tcp(host.lab.box, plan.good) is Outcome.OPEN
    until(lambda: tcp(host.lab.box, plan.good) is Outcome.RESET)


def test_refreshed_element_lives_longer(host: Host, plan: Plan) -> None:
    host.learn(plan.good, lifetime_seconds=1)
    host.learn(plan.evil, lifetime_seconds=1)
    host.learn(plan.good, lifetime_seconds=60)
    until(lambda: tcp(host.lab.box, plan.evil) is Outcome.RESET)
    assert tcp(host.lab.box, plan.good) is Outcome.OPEN
    (element,) = host.nft.learned()
    assert 50 <= element.lifetime_seconds <= 60


def test_withdrawn_element_is_refused_and_withdrawing_an_absent_one_is_no_error(host: Host, plan: Plan) -> None:
    host.learn(plan.good)
    host.learn(plan.static)
    assert tcp(host.lab.box, plan.good) is Outcome.OPEN
    for _ in range(2):
        host.withdraw(plan.good)
        assert tcp(host.lab.box, plan.good) is Outcome.RESET
    assert tcp(host.lab.box, plan.static) is Outcome.OPEN


# --- local sockets, by scope -----------------------------------------------------------------------------------------
MARKS = DEFAULT_MARKS
HOST, ENGINE, CONTAINER = map(MARKS.of, (MarkedScope.HOST, MarkedScope.ENGINE, MarkedScope.CONTAINER))
SCOPES = {
    MarkedScope.HOST: CountedScope.HOST,
    MarkedScope.ENGINE: CountedScope.ENGINE,
    MarkedScope.CONTAINER: CountedScope.CONTAINER,
    MarkedScope.UNSTAMPED: CountedScope.UNKNOWN,
}


@pytest.mark.parametrize("mark", MarkedScope)
def test_local_socket_of_a_strict_scope_is_refused(host: Host, plan: Plan, mark: MarkedScope) -> None:
    host.enforce(ALL_STRICT)
    assert tcp(host.lab.host, plan.evil, mark=MARKS.of(mark)) is Outcome.RESET
    assert udp(host.lab.host, plan.evil, mark=MARKS.of(mark)) is Outcome.PROHIBITED
    counted = {name: counter for name, counter in host.nft.counters().items() if counter.packets}
    assert set(counted) == {counter_name(Mode.ENFORCE, SCOPES[mark], protocol) for protocol in Protocol}
    assert counted[counter_name(Mode.ENFORCE, SCOPES[mark], Protocol.TCP)] == Counter(1, 80 if ":" in plan.evil else 60)
    host.learn(plan.good)
    assert tcp(host.lab.host, plan.good, mark=MARKS.of(mark)) is Outcome.OPEN
    assert udp(host.lab.host, plan.good, mark=MARKS.of(mark)) is Outcome.PROHIBITED
    host.enforce(replace(ALL_STRICT, rules=(rule("corp", plan.static),)))
    assert udp(host.lab.host, plan.static, mark=MARKS.of(mark)) is Outcome.OPEN


@pytest.mark.parametrize(
    ("mark", "scope"),
    [
        (MarkedScope.HOST, Scope(containers=Level.STRICT, engines=Level.STRICT, host=Level.OFF)),
        (MarkedScope.ENGINE, Scope(containers=Level.STRICT, engines=Level.OFF, host=Level.STRICT)),
        (MarkedScope.CONTAINER, Scope(containers=Level.OFF, engines=Level.STRICT, host=Level.STRICT)),
        (MarkedScope.UNSTAMPED, Scope(containers=Level.OFF, engines=Level.OFF, host=Level.OFF)),
        (MarkedScope.HOST, Scope(containers=Level.STRICT, engines=Level.STRICT, host=Level.REGISTRIES)),
        (MarkedScope.UNSTAMPED, Scope(containers=Level.OFF, engines=Level.OFF, host=Level.REGISTRIES)),
    ],
)
def test_local_socket_of_a_scope_that_is_not_strict_is_not_judged_here(
    host: Host, plan: Plan, mark: MarkedScope, scope: Scope
) -> None:
    host.enforce(ALL_STRICT)
    assert tcp(host.lab.host, plan.evil, mark=MARKS.of(mark)) is Outcome.RESET
    host.enforce(replace(DEFAULT, scope=scope))
    assert tcp(host.lab.host, plan.evil, mark=MARKS.of(mark)) is Outcome.OPEN
    assert udp(host.lab.host, plan.evil, mark=MARKS.of(mark)) is Outcome.OPEN


@pytest.mark.parametrize("strict", ["containers", "engines", "host"])
def test_unstamped_packet_is_refused_if_any_scope_is_strict(host: Host, plan: Plan, strict: str) -> None:
    levels = dict.fromkeys(("containers", "engines", "host"), Level.OFF) | {strict: Level.STRICT}
    host.enforce(replace(DEFAULT, scope=Scope(**levels)))
    assert tcp(host.lab.host, plan.evil) is Outcome.RESET
    assert tcp(host.lab.box, plan.evil) is (Outcome.RESET if strict == "containers" else Outcome.OPEN)


def test_every_tcp_port_but_dns_counts_for_engines_and_for_nobody_else(host: Host, plan: Plan) -> None:
    host.enforce(ALL_STRICT)
    assert tcp(host.lab.host, plan.evil, 8443, ENGINE) is Outcome.RESET
    assert tcp(host.lab.host, plan.evil, 53, ENGINE) is Outcome.OPEN
    assert udp(host.lab.host, plan.evil, 8000, ENGINE) is Outcome.OPEN
    for mark in set(MarkedScope) - {MarkedScope.ENGINE}:
        assert tcp(host.lab.host, plan.evil, 8443, MARKS.of(mark)) is Outcome.OPEN
    host.learn(plan.good, 8443)
    assert tcp(host.lab.host, plan.good, 8443, ENGINE) is Outcome.OPEN


@pytest.mark.parametrize("scope", MarkedScope)
def test_vouching_mark_permits_tcp_and_never_udp(host: Host, plan: Plan, scope: MarkedScope) -> None:
    host.enforce(ALL_STRICT)
    assert tcp(host.lab.host, plan.evil, mark=MARKS.of(scope) | MARKS.vouched) is Outcome.OPEN
    assert udp(host.lab.host, plan.evil, mark=MARKS.of(scope) | MARKS.vouched) is Outcome.PROHIBITED
    assert tcp(host.lab.host, plan.evil, mark=MARKS.of(scope)) is Outcome.RESET


def test_other_bits_of_the_mark_do_not_matter(host: Host, plan: Plan) -> None:
    others = 0x1FFFFFFE  # bit 0 re-routes in this lab
    assert tcp(host.lab.host, plan.evil, mark=ENGINE | others) is Outcome.RESET
    assert tcp(host.lab.host, plan.evil, mark=HOST | others) is Outcome.OPEN
    assert tcp(host.lab.host, plan.evil, mark=ENGINE | MARKS.vouched | others) is Outcome.OPEN


def test_mark_of_a_message_is_not_its_sockets(host: Host, plan: Plan) -> None:
    def send(mark: int, told: int) -> Outcome:
        with opened(host.lab.host, socket.SOCK_DGRAM, plan.evil, mark) as client:
            marking = [(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", told))]

            def exchange() -> bytes:
                client.connect((plan.evil, 443))
                with contextlib.suppress(PermissionError):
                    client.sendmsg([b"x"], marking)
                return client.recv(100)

            return outcome(exchange)

    assert send(ENGINE, HOST) is Outcome.PROHIBITED
    assert send(ENGINE, MARKS.vouched | HOST) is Outcome.PROHIBITED
    assert send(HOST, ENGINE) is Outcome.OPEN


@pytest.mark.parametrize("name", RUNGS)
def test_every_rung_is_taken_by_the_kernel(host: Host, name: str) -> None:
    host.nft.apply(render_removal() + render_ruleset(RUNG_POLICY, RUNGS[name], INTERNAL))


@pytest.mark.parametrize("level", [Level.STRICT, Level.OFF])
def test_without_bpf_the_cgroup_tells_the_scope_whatever_the_mark(host: Host, plan: Plan, level: Level) -> None:
    policy = replace(DEFAULT, scope=Scope(containers=Level.STRICT, engines=Level.STRICT, host=level))
    host.nft.apply(render_removal() + render_ruleset(policy, RUNGS["without-bpf"], INTERNAL))
    for mark in (0, ENGINE, MARKS.vouched | HOST):
        assert (udp(host.lab.host, plan.evil, mark=mark) is Outcome.OPEN) == (level is Level.OFF)


@pytest.mark.parametrize(("protocol", "refused"), [(socket.IPPROTO_UDP, True), (socket.IPPROTO_SCTP, False)])
def test_raw_packet_is_refused_in_the_protocols_that_registries_speak(host: Host, protocol: int, refused: bool) -> None:
    with inside(host.lab.host):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol)
    to_443 = (40_000).to_bytes(2, "big") + (443).to_bytes(2, "big") + (12).to_bytes(2, "big") + b"\0" * 6
    with raw, pytest.raises(PermissionError) if refused else contextlib.nullcontext():
        raw.sendto(to_443, (V4.evil, 0))


# --- direction -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("client", "server"),
    [
        pytest.param("box", "box2", id="container to container"),
        pytest.param("box", "bridge", id="container to host"),
        pytest.param("box2", "uplink", id="hairpin through a published port"),
        pytest.param("box", "service", id="container to a service in this host"),
        pytest.param("host", "box", id="host to container"),
        pytest.param("host", "service", id="host to a service in this host"),
        pytest.param("host", "uplink", id="host to its own published port"),
        pytest.param("host", "bridge", id="host to itself"),
        pytest.param("wan", "uplink", id="inbound to a published port"),
        pytest.param("wan", "bridge", id="inbound to the host"),
        pytest.param("wan", "box2", id="inbound routed to a container"),
    ],
)
def test_what_stays_in_this_host_or_comes_in_is_never_refused(host: Host, plan: Plan, client: str, server: str) -> None:
    host.enforce(ALL_STRICT)
    namespace = getattr(host.lab, client)
    assert tcp(namespace, getattr(plan, server)) is Outcome.OPEN
    assert all(counter.packets == 0 for counter in host.nft.counters().values())
    if client != "wan":
        assert tcp(namespace, plan.evil) is Outcome.RESET


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_answer_to_an_inbound_client_on_a_registry_port_is_never_refused(
    host: Host, plan: Plan, kind: socket.SocketKind
) -> None:
    host.enforce(replace(ALL_STRICT, ports=(443, 6000)))
    for server in (plan.bridge, plan.box2):
        with opened(host.lab.wan, kind, plan.wan) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind((plan.wan, 6000))
            client.connect((server, 443))
            client.send(b"hello")
            assert client.recv(100) == b"hello"
    assert tcp(host.lab.host, plan.wan, 6000) is Outcome.RESET
    assert udp(host.lab.host, plan.wan, 6000) is Outcome.PROHIBITED


def test_loopback_is_never_refused(host: Host) -> None:
    host.enforce(ALL_STRICT)
    for address in ("127.0.0.1", "::1", V4.bridge):
        assert tcp(host.lab.host, address, mark=ENGINE) is Outcome.OPEN
    assert tcp(host.lab.host, V4.wan, mark=ENGINE) is Outcome.RESET


def test_forwarded_to_a_service_is_judged_by_where_it_leads(host: Host, plan: Plan) -> None:
    # Linux takes an ICMPv6 error for a hard one at the first retransmission, if it comes before connect() has let go
    # of the socket, as it does on one machine.
    patience = 3 if ":" in plan.evil else PATIENCE_SECONDS
    for address in (plan.evil_service, plan.good_service):
        assert tcp(host.lab.box, address, patience=patience) is Outcome.RESET
    assert host.packets(CountedScope.CONTAINER) >= 2
    host.learn(plan.good)
    assert tcp(host.lab.box, plan.good_service) is Outcome.OPEN
    host.learn(plan.evil_service)
    assert tcp(host.lab.box, plan.evil_service, patience=patience) is Outcome.RESET


def test_local_to_a_service_is_judged_in_postrouting_by_where_it_leads(host: Host, plan: Plan) -> None:
    assert tcp(host.lab.host, plan.evil_service, mark=ENGINE) is Outcome.SILENCE
    assert host.packets(CountedScope.ENGINE) >= 1
    host.learn(plan.good)
    assert tcp(host.lab.host, plan.good_service, mark=ENGINE) is Outcome.OPEN
    assert tcp(host.lab.host, plan.evil_service, mark=HOST) is Outcome.OPEN


def test_packet_rerouted_from_an_internal_interface_to_the_uplink_is_refused(host: Host, plan: Plan) -> None:
    assert tcp(host.lab.host, plan.rerouted, mark=ENGINE) is Outcome.SILENCE
    assert tcp(host.lab.host, plan.rerouted, mark=HOST) is Outcome.OPEN
    host.learn(plan.rerouted)
    assert tcp(host.lab.host, plan.rerouted, mark=ENGINE) is Outcome.OPEN


# --- the table changes under traffic ---------------------------------------------------------------------------------
def test_established_connection_survives_withdrawal_and_reload_and_a_new_one_does_not(host: Host, plan: Plan) -> None:
    host.learn(plan.good)
    with opened(host.lab.box, socket.SOCK_STREAM, plan.good) as client:
        client.connect((plan.good, 443))
        host.withdraw(plan.good)
        host.enforce(ALL_STRICT)
        client.send(b"still here")
        assert client.recv(100) == b"still here"
    assert tcp(host.lab.box, plan.good) is Outcome.RESET


def test_udp_is_refused_as_soon_as_its_permission_is_gone(host: Host, plan: Plan) -> None:
    host.enforce(replace(DEFAULT, rules=(rule("corp", plan.good),)))
    with opened(host.lab.box, socket.SOCK_DGRAM, plan.good) as client:
        client.connect((plan.good, 443))
        for _ in range(2):
            client.send(b"permitted")
            assert client.recv(100) == b"permitted"
        host.enforce(DEFAULT)
        client.send(b"not permitted")
        with pytest.raises(OSError, match=r"No route to host|Permission denied"):
            client.recv(100)


def test_reload_keeps_learned_elements_and_counters(host: Host, plan: Plan) -> None:
    host.learn(plan.good)
    assert tcp(host.lab.box, plan.evil) is Outcome.RESET
    before = host.nft.counters()
    for policy in (ALL_STRICT, replace(DEFAULT, mode=Mode.OBSERVE), DEFAULT):
        host.enforce(policy)
        assert host.nft.counters() == before
        assert [(element.address, element.port) for element in host.nft.learned()] == [(ip_address(plan.good), 443)]
    assert tcp(host.lab.box, plan.good) is Outcome.OPEN


def test_reload_replaces_the_internal_interfaces(host: Host, plan: Plan) -> None:
    assert tcp(host.lab.box, plan.box2) is Outcome.OPEN
    host.nft.apply(render_ruleset(DEFAULT, FULL, ["br0"]))
    assert tcp(host.lab.box, plan.box2) is Outcome.RESET


def test_observe_mode_lets_through_and_counts_once(host: Host, plan: Plan) -> None:
    host.enforce(replace(DEFAULT, mode=Mode.OBSERVE))
    assert tcp(host.lab.box, plan.evil) is Outcome.OPEN
    assert udp(host.lab.box, plan.evil) is Outcome.OPEN
    assert tcp(host.lab.host, plan.evil, mark=ENGINE) is Outcome.OPEN
    assert tcp(host.lab.host, plan.evil_service, mark=CONTAINER) is Outcome.OPEN
    assert {name: counter.packets for name, counter in host.nft.counters().items() if counter.packets} == {
        "observed_container_tcp": 2,
        "observed_container_udp": 1,
        "observed_engine_tcp": 1,
    }
    host.enforce(DEFAULT)
    assert tcp(host.lab.box, plan.evil) is Outcome.RESET


class Prober(threading.Thread):
    """Connects again and again, from the container and from the host, and keeps what is not as expected."""

    def __init__(self, lab: Lab, address: str, over_tcp: Outcome, over_udp: Outcome) -> None:
        super().__init__(daemon=True)
        self.rounds = 0
        self.surprises: list[tuple[str, Outcome]] = []  # (which probe, what came)
        self._stop_asked = threading.Event()
        self._probes: dict[str, tuple[Outcome, Callable[[], Outcome]]] = {
            "forwarded TCP": (over_tcp, lambda: tcp(lab.box, address)),
            "engine's TCP": (over_tcp, lambda: tcp(lab.host, address, mark=ENGINE)),
            "forwarded UDP": (over_udp, lambda: udp(lab.box, address)),
        }

    def run(self) -> None:
        while not self._stop_asked.is_set():
            found = [(name, expected, probe()) for name, (expected, probe) in self._probes.items()]
            self.surprises += [(name, came) for name, expected, came in found if came is not expected]
            self.rounds += 1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join(10)


def test_reload_and_refresh_under_traffic_lose_nothing_and_open_nothing(host: Host, plan: Plan) -> None:
    listing = replace(DEFAULT, rules=(rule("corp", plan.static),))
    host.learn(plan.good)
    host.enforce(listing)
    with (
        Prober(host.lab, plan.good, Outcome.OPEN, Outcome.PROHIBITED) as good,
        Prober(host.lab, plan.static, Outcome.OPEN, Outcome.OPEN) as listed,
        Prober(host.lab, plan.box2, Outcome.OPEN, Outcome.OPEN) as internal,
        Prober(host.lab, plan.evil, Outcome.RESET, Outcome.PROHIBITED) as evil,
    ):
        for turn in range(100):
            host.enforce(replace(listing, scope=ALL_STRICT.scope) if turn % 2 else listing)
            host.learn(plan.good)
        until(lambda: min(good.rounds, listed.rounds, internal.rounds, evil.rounds) > 50, 20)
        for _ in range(100):
            host.learn(plan.good)
            host.enforce(listing)
    assert good.surprises == []
    assert listed.surprises == []
    assert internal.surprises == []
    assert evil.surprises == []
