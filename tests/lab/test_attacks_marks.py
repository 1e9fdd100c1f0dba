"""Marks that somebody else than the enforcer sets: each way to forge one, tried with real sockets and packets.

The attacker is a container on the host's network, where no device scrubs marks, with CAP_NET_RAW or CAP_NET_ADMIN
alone; or one behind a veth or a macvlan. Containers are strict and the host is off, so whoever passes for the host, or
as vouched for, gets out. Every attack is a function of an address: it is made on a refused one, then, as its twin, on
an allowed one, and what counts is what arrives at the far end of the uplink. Without the enforcer all arrive.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

import pytest

from enforcer.kernel_abi import DEFAULT_MARKS, MarkedScope, Marks
from tests.lab import attacker
from tests.lab.enforcer import Enforcer, policy
from tests.lab.internet import ALLOWED_ADDRESS, EVIL_ADDRESS, EVIL_ADDRESS6
from tests.lab.lab import CT_ADDRESS, HOST_ADDRESS, Agent, Lab, command, poll

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(120)]

OTHER_MARKS = Marks(0x00700000)
# Vouched for, and the host's, by either mask.
FORGED = sum(marks.vouched | marks.of(MarkedScope.HOST) for marks in (DEFAULT_MARKS, OTHER_MARKS))
REFUSED = {4: EVIL_ADDRESS, 6: EVIL_ADDRESS6}
GATEWAY, CT_GATEWAY = "192.0.2.1", "10.77.0.1"
MACVLAN_NEAR, MACVLAN_FAR = "10.99.0.1", "10.99.0.2"
# Translated by somebody else before the enforcer judges, as a ClusterIP is: refused by silence, so a SYN comes again.
SERVICES = {EVIL_ADDRESS: "10.99.99.1", ALLOWED_ADDRESS: "10.99.99.2"}
HOST_NETWORK = ("net_raw", "net_admin")  # attackers on the host's network, by the capability that is left to them
ALLOWED_ADDRESS6 = "2001:2:0:1::12"  # v6.allowed.test


Act = Callable[[Agent, str], None]


@dataclass(frozen=True, slots=True)
class Field:
    """Who is there: attackers by name, a process of the host, and whoever looks at what arrives."""

    lab: Lab
    enforcer: Enforcer
    attackers: dict[str, Agent]
    host: Agent
    watcher: Agent
    container: str  # the cgroup of those on the host's network
    allowed: dict[int, str]

    def by(self, who: str, act: Act) -> Callable[[str], None]:
        """What this attacker does, as a function of an address."""
        return lambda address: act(self.attackers[who], address)

    def arrives(self, attack: Callable[[str], None], family: int = 4) -> bool:
        """Whether something for the refused address arrives, until something for the allowed one does."""
        self.watcher.call("arrivals")
        attack(REFUSED[family])
        attack(self.allowed[family])
        seen: set[str] = set()

        def twin_came() -> bool:
            seen.update(self.watcher.call("arrivals"))
            return self.allowed[family] in seen

        poll(f"the twin at {self.allowed[family]}", twin_came, 10)
        return REFUSED[family] in seen


@dataclass(frozen=True, slots=True)
class Attack:
    """One forgery, and who tries it."""

    words: str
    act: Act
    by: tuple[str, ...] = HOST_NETWORK
    families: tuple[int, ...] = (4, 6)
    by_ring: bool = False


# --- what is tried ---------------------------------------------------------------------------------------------------
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


def mark_after_connect(length: int) -> Act:
    def act(agent: Agent, address: str) -> None:
        agent.call("make", key="s", kind="udp", family=family_of(address))
        agent.call("connect", key="s", address=address)
        agent.call("mark", key="s", value=FORGED, length=length)
        agent.call("send", key="s")

    return act


def mark_between_syns(agent: Agent, address: str) -> None:
    agent.call("make", key="s", kind="tcp")
    agent.call("connect", key="s", address=SERVICES[address], wait=False)
    agent.call("mark", key="s", value=FORGED)
    agent.call("await_connection", key="s")


def translated(kind: str) -> Act:
    def act(agent: Agent, address: str) -> None:
        agent.call("make", key="s", kind=kind)
        agent.call("mark", key="s", value=FORGED)
        agent.call("connect", key="s", address=SERVICES[address])

    return act


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


def raw_syn(marking: str, source: str = HOST_ADDRESS) -> Act:
    def act(agent: Agent, address: str) -> None:
        agent.call("make", key="s", kind="raw")
        if marking == "socket":
            agent.call("mark", key="s", value=FORGED)
        agent.call("send_raw", key="s", source=source, address=address, mark=FORGED * (marking == "message"))

    return act


def packet_socket(interface: str, gateway: str, source: str, *, around_tc: bool = False) -> Act:
    def act(agent: Agent, address: str) -> None:
        agent.call("make_packet_socket", key="s")
        agent.call("mark", key="s", value=FORGED)
        if around_tc:
            bypass = attacker.PACKET_QDISC_BYPASS
            agent.call("option", key="s", level=attacker.SOL_PACKET, name=bypass, value=1)
        agent.call("send_packet", key="s", interface=interface, gateway=gateway, source=source, address=address)

    return act


def early(key: str) -> Act:
    """With sockets that were made, marked and connected before anything was enforced."""

    def act(agent: Agent, address: str) -> None:
        name = f"early {key} {address}"
        if key == "tcp":
            agent.call("connect", key=name, address=address)
        elif key == "raw":
            agent.call("send_raw", key=name, source=HOST_ADDRESS, address=address)
        else:
            agent.call("send", key=name)

    return act


def make_early(agent: Agent, addresses: Iterable[str]) -> None:
    for address in addresses:
        for kind in ("tcp", "udp", "raw") if ip_address(address).version == 4 else ():
            if not agent.call("make", key=f"early {kind} {address}", kind=kind):
                agent.call("mark", key=f"early {kind} {address}", value=FORGED)
        agent.call("connect", key=f"early udp {address}", address=address)


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


ATTACKS = (
    Attack("SO_MARK before connect, TCP", mark_before_connect("tcp")),
    Attack("SO_MARK before connect, MPTCP", mark_before_connect("mptcp")),
    Attack("SO_MARK before connect, UDP", mark_before_connect("udp")),
    Attack("SO_MARK after connect, UDP", mark_after_connect(4)),
    Attack("SO_MARK of three pages after connect, UDP", mark_after_connect(3 * 4096), families=(4,)),
    Attack("SO_MARK between two SYNs", mark_between_syns, families=(4,)),
    Attack("to a translated address, TCP", translated("tcp"), families=(4,)),
    Attack("to a translated address, MPTCP", translated("mptcp"), families=(4,)),
    Attack("SO_MARK in a race with connect", racing_marks, by=("net_raw",), families=(4,)),
    Attack("SO_MARK behind bind, TCP", bound("tcp")),
    Attack("SO_MARK behind bind, MPTCP", bound("mptcp")),
    Attack("SO_MARK on unconnected UDP", unconnected_udp),
    Attack("v4-mapped IPv6, TCP", v4_mapped("tcp"), families=(4,)),
    Attack("v4-mapped IPv6, UDP", v4_mapped("udp"), families=(4,)),
    Attack("mark of a message, connected UDP", marked_message("connected")),
    Attack("mark of a message, unconnected UDP", marked_message("unconnected")),
    Attack("unconnected UDP, second destination", second_destination),
    Attack("TCP fast open, MSG_FASTOPEN", fast_open("message")),
    Attack("TCP fast open, TCP_FASTOPEN_CONNECT", fast_open("connect")),
    Attack("disconnect and connect, TCP", connect_again("tcp")),
    Attack("disconnect and connect, UDP", connect_again("udp")),
    Attack("io_uring connect", ring("inline"), by_ring=True),
    Attack("io_uring connect by a worker", ring("async"), by_ring=True),
    Attack("io_uring connect by the polling thread", ring("sqpoll"), by_ring=True),
    Attack("io_uring sendmsg, TCP fast open", ring("inline", "fast open"), by_ring=True),
    Attack("io_uring sendmsg, UDP", ring("inline", "datagram"), by_ring=True),
    Attack("io_uring sendmsg, mark of a message", ring_marked_message, by_ring=True),
    Attack("io_uring SO_MARK", ring_mark, by_ring=True),
    Attack("raw socket", raw_syn("none"), by=("net_raw",), families=(4,)),
    Attack("raw socket, SO_MARK", raw_syn("socket"), by=("net_raw",), families=(4,)),
    Attack("raw socket, mark of a message", raw_syn("message"), by=("net_raw",), families=(4,)),
    Attack("packet socket", packet_socket("up0", GATEWAY, HOST_ADDRESS), ("net_raw",), (4,)),
    Attack(
        "packet socket around tc",
        packet_socket("up0", GATEWAY, HOST_ADDRESS, around_tc=True),
        ("net_raw",),
        (4,),
    ),
    Attack("veth, SO_MARK, TCP", mark_before_connect("tcp"), by=("veth",)),
    Attack("veth, SO_MARK, UDP", mark_before_connect("udp"), by=("veth",)),
    Attack("veth, mark of a message", marked_message("unconnected"), by=("veth",)),
    Attack("veth, raw socket", raw_syn("socket", CT_ADDRESS), by=("veth",), families=(4,)),
    Attack("veth, packet socket", packet_socket("eth0", CT_GATEWAY, CT_ADDRESS), by=("veth",), families=(4,)),
    Attack("macvlan, SO_MARK, TCP", mark_before_connect("tcp"), ("macvlan",), (4,)),
    Attack("macvlan, SO_MARK, UDP", mark_before_connect("udp"), ("macvlan",), (4,)),
    Attack("macvlan, raw socket", raw_syn("socket", MACVLAN_FAR), ("macvlan",), (4,)),
)
EARLY = (
    Attack("socket from before, TCP", early("tcp"), families=(4,)),
    Attack("socket from before, UDP", early("udp"), families=(4,)),
    Attack("socket from before, raw", early("raw"), ("net_raw",), (4,)),
)


def attacks(chosen: Iterable[Attack]) -> list[object]:
    """Each with each attacker and family, as parameters of a test."""
    parameters: list[object] = []
    for attack in chosen:
        marks = [pytest.mark.attack(attack.words)]
        parameters += (
            pytest.param(attack, who, family, marks=marks, id=f"{attack.words}-{who}-IPv{family}")
            for who in attack.by
            for family in attack.families
        )
    return parameters


# --- the field -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def undefended(lab: Lab, any_enforcer: Enforcer) -> Iterator[Field]:
    """The field before anything is enforced."""
    any_enforcer.leave()
    services = "".join(f"ip daddr {service} dnat to {address}\n" for address, service in SERVICES.items())
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            nft_table(lab, "ip", "services", f"chain output {{\ntype nat hook output priority -100;\n{services}}}\n")
        )
        container = f"docker/{secrets.token_hex(32)}"
        attackers = {right: on_the_hosts_network(lab, right, container) for right in HOST_NETWORK}
        attackers["veth"] = lab.agent("ct", script="attacker.py")
        attackers["macvlan"] = stack.enter_context(behind_a_macvlan(lab))
        watcher = lab.agent("net", script="attacker.py")
        watcher.call("watch", interface="to-host")
        allowed = {4: ALLOWED_ADDRESS, 6: ALLOWED_ADDRESS6}
        for agent in (lab.host, lab.ct):  # so that their gateways are known to ARP
            assert agent.attempt(EVIL_ADDRESS).reached
        host = lab.agent("host", script="attacker.py")
        yield Field(lab, Enforcer(lab, "host", lab.host), attackers, host, watcher, container, allowed)
        for agent in (*attackers.values(), host, watcher):
            agent.close()


def on_the_hosts_network(lab: Lab, right: str, container: str) -> Agent:
    only = f"-all,+{right}"
    inside = ("setpriv", f"--bounding-set={only}", f"--inh-caps={only}")
    return lab.agent("host", inside=inside, leaf=container, script="attacker.py")


@contextlib.contextmanager
def behind_a_macvlan(lab: Lab, script: str = "attacker.py") -> Iterator[Agent]:
    command("ip", "netns", "add", lab.namespace("macvlan"))
    lab.ip("host", f"link add mv0 link up0 netns {lab.namespace('macvlan')} type macvlan mode bridge")
    lab.ip("macvlan", "link set lo up", f"addr add {MACVLAN_FAR}/24 dev mv0", "link set mv0 up",
           f"route add default via {MACVLAN_NEAR}")  # fmt: skip
    lab.ip("net", f"addr add {MACVLAN_NEAR}/24 dev to-host")
    agent = lab.agent("macvlan", script=script)
    yield agent
    agent.close()
    command("ip", "netns", "del", lab.namespace("macvlan"))
    lab.ip("net", f"addr del {MACVLAN_NEAR}/24 dev to-host")


@contextlib.contextmanager
def nft_table(lab: Lab, kind: str, name: str, chains: str) -> Iterator[None]:
    """Somebody else's table on the host."""
    applied = lab.run("host", ["nft", "-f", "-"], text=f"table {kind} {name} {{\n{chains}}}\n")
    assert applied.returncode == 0, applied.stdout
    try:
        yield
    finally:
        lab.run("host", ["nft", "delete", "table", kind, name])


def with_mask(marks: Marks) -> str:
    listed = (
        f'[[destination]]\nname = "twins"\naddresses = ["{ALLOWED_ADDRESS}", "{ALLOWED_ADDRESS6}"]\nports = [443]\n'
    )
    return policy(more=f"{listed}[mark]\nmask = {marks.mask:#010x}\n")


@pytest.fixture(scope="module", params=[DEFAULT_MARKS, OTHER_MARKS], ids=lambda marks: f"{marks.mask:#010x}")
def marks(request: pytest.FixtureRequest) -> Marks:
    """Which bits are ours."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def defended(undefended: Field, marks: Marks) -> Iterator[Field]:
    """The field with containers judged, and the host not."""
    enforcer = undefended.enforcer
    for right in HOST_NETWORK:
        make_early(undefended.attackers[right], (EVIL_ADDRESS, ALLOWED_ADDRESS))
    enforcer.start(with_mask(marks))
    for address in undefended.allowed.values():
        poll("the allowed addresses", lambda address=address: (address, 443) in enforcer.permitted())  # type: ignore[misc]
    yield undefended
    enforcer.stop()
    enforcer.remove()


def need_ring(field: Field, attack: Attack) -> None:
    if attack.by_ring and not field.host.call("ring_is_there"):
        pytest.skip("io_uring is disabled here")


THEIRS = 0x1034  # none of our bits, by either mask


@contextlib.contextmanager
def rule(lab: Lab, selector: str) -> Iterator[None]:
    """A rule of policy routing that leads nowhere."""
    lab.ip("host", "route add unreachable default table 77", f"rule add {selector} lookup 77 priority 77")
    try:
        yield
    finally:
        lab.ip("host", "rule del priority 77", "route flush table 77")


def reaches(agent: Agent, mark: int, kind: str) -> bool:
    """Whether the routes lead a socket with this mark to the allowed address."""
    agent.call("make", key="s", kind=kind)
    if mark:
        agent.call("mark", key="s", value=mark)
    told = agent.call("connect", key="s", address=ALLOWED_ADDRESS)
    assert told in {"", "EHOSTUNREACH"}
    return not told


# --- before: these come first, since the enforcer is there afterwards -------
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.words)
def test_without_the_enforcer_it_arrives(undefended: Field, attack: Attack) -> None:
    need_ring(undefended, attack)
    for who in attack.by:
        for family in attack.families:
            assert undefended.arrives(undefended.by(who, attack.act), family)


def test_without_the_enforcer_a_rule_needs_no_mask(undefended: Field) -> None:
    assert not undefended.enforcer.running
    with rule(undefended.lab, f"fwmark {THEIRS:#x}"):
        assert not reaches(undefended.host, THEIRS, "tcp")
    with rule(undefended.lab, f"not fwmark {THEIRS:#x}"):
        assert reaches(undefended.host, THEIRS, "tcp")


# --- forgeries ------
@pytest.mark.parametrize(("attack", "who", "family"), attacks((*EARLY, *ATTACKS)))
def test_forgery_does_not_arrive(defended: Field, attack: Attack, who: str, family: int) -> None:
    need_ring(defended, attack)
    assert not defended.arrives(defended.by(who, attack.act), family)


@pytest.mark.attack("PACKET_QDISC_BYPASS and AF_XDP")
def test_container_may_not_send_around_tc_and_the_host_may(defended: Field) -> None:
    for agent, told in ((defended.attackers["net_raw"], "EPERM"), (defended.host, "")):
        agent.call("make_packet_socket", key="s")
        bypass = {"level": attacker.SOL_PACKET, "name": attacker.PACKET_QDISC_BYPASS, "value": 1}
        assert agent.call("option", key="s", **bypass) == told
        assert agent.call("umem") == told


@pytest.mark.attack("a socket of the host in a container's hands")
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_socket_that_is_handed_over_is_judged_as_the_stricter_of_both(defended: Field, kind: str) -> None:
    """The connect hook sees who uses it, the guard who made it. A connection that the host has made and gives away
    stays the host's: see THREATMODEL.md."""
    container, host = defended.attackers["net_raw"], defended.host
    place = str(defended.lab.directory / "handed-over")

    def hand_over_and_use(giver: Agent, taker: Agent, address: str) -> None:
        giver.call("make", key="gift", kind=kind)
        giver.call("mark", key="gift", value=FORGED)
        taker.call("wait_at", path=place)
        giver.call("hand_over", key="gift", path=place)
        taker.call("take", key="gift")
        if kind == "tcp":
            taker.call("connect", key="gift", address=address)
        else:
            taker.call("send", key="gift", address=address)

    assert not defended.arrives(lambda address: hand_over_and_use(host, container, address))
    assert not defended.arrives(lambda address: hand_over_and_use(container, host, address))


@pytest.mark.attack("a cgroup below the container's that has an engine's name")
def test_cgroup_inside_a_container_is_the_containers(defended: Field) -> None:
    agent = defended.attackers["net_admin"]
    outside = str(defended.lab.host_cgroup() / defended.container)
    agent.call("enter_cgroup", path=f"{outside}/a/b/system.slice/podman.service")
    before = defended.enforcer.total("enforcer_refused_connections_total", scope="container")
    assert not defended.arrives(lambda address: mark_before_connect("tcp")(agent, address))
    assert defended.enforcer.total("enforcer_refused_connections_total", scope="container") == before + 1
    agent.call("enter_cgroup", path=outside)


@pytest.mark.attack("another cgroup after connect")
def test_socket_of_a_process_that_moves_stays_whose_it_was(defended: Field) -> None:
    agent = defended.attackers["net_admin"]

    def connect_and_move(address: str, first: str, then: str) -> None:
        agent.call("enter_cgroup", path=str(defended.lab.host_cgroup() / first))
        agent.call("make", key="s", kind="udp")
        agent.call("connect", key="s", address=address)
        agent.call("enter_cgroup", path=str(defended.lab.host_cgroup() / then))
        agent.call("send", key="s")

    container = defended.container
    assert not defended.arrives(lambda address: connect_and_move(address, container, "leaf"))
    assert defended.arrives(lambda address: mark_before_connect("tcp")(agent, address))  # it is the host now
    assert defended.arrives(lambda address: connect_and_move(address, "leaf", container))
    assert not defended.arrives(lambda address: mark_before_connect("tcp")(agent, address))


@pytest.mark.attack("setns into the host's network")
def test_other_network_namespace_does_not_change_the_cgroup(defended: Field) -> None:
    agent = defended.lab.agent("ct", leaf=defended.container, script="attacker.py")
    for address in (EVIL_ADDRESS, ALLOWED_ADDRESS):
        agent.call("make", key=f"made before {address}", kind="udp")
    agent.call("enter_network", path=f"/proc/{defended.host.call('process')}/ns/net")
    assert not defended.arrives(lambda address: mark_before_connect("tcp")(agent, address))
    assert not defended.arrives(lambda address: unconnected_udp(agent, address))
    assert not defended.arrives(lambda address: agent.call("send", key=f"made before {address}", address=address))
    agent.close()


# --- others who use marks --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("who", ["host", *HOST_NETWORK])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_other_bits_of_a_sockets_mark_survive(defended: Field, marks: Marks, who: str, kind: str) -> None:
    agent = defended.host if who == "host" else defended.attackers[who]
    scope = MarkedScope.HOST if who == "host" else MarkedScope.CONTAINER
    agent.call("make", key="s", kind=kind)
    for value in (THEIRS, 0xFFFFFFFF, 0):
        assert agent.call("mark", key="s", value=value) == ""
        assert agent.call("marked", key="s") == value & ~marks.mask | marks.of(scope)
    agent.call("mark", key="s", value=THEIRS)
    agent.call("connect", key="s", address=ALLOWED_ADDRESS)
    assert agent.call("marked", key="s") & ~marks.vouched == THEIRS | marks.of(scope)
    agent.call("mark", key="s", value=0)
    assert agent.call("marked", key="s") & ~marks.vouched == marks.of(scope)


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_masked_rule_routes_as_before_and_one_without_a_mask_matches_no_more(
    defended: Field, marks: Marks, kind: str
) -> None:
    agent = defended.host
    with rule(defended.lab, f"fwmark {THEIRS:#x}/{0xFFFFFFFF ^ marks.mask:#x}"):
        assert not reaches(agent, THEIRS, kind)
        assert reaches(agent, 0, kind)
    with rule(defended.lab, f"fwmark {THEIRS:#x}"):
        assert reaches(agent, THEIRS, kind)
    with rule(defended.lab, f"not fwmark {THEIRS:#x}/{0xFFFFFFFF ^ marks.mask:#x}"):  # as wg-quick's, but for the mask
        assert reaches(agent, THEIRS, kind)
        assert not reaches(agent, 0, kind)
    with rule(defended.lab, f"not fwmark {THEIRS:#x}"):
        assert not reaches(agent, THEIRS, kind)


def test_somebody_who_sets_whole_marks_changes_no_verdict(defended: Field) -> None:
    chains = "".join(
        f"chain {hook} {{\ntype {kind} hook {hook} priority mangle;\nmeta mark set 0x539\n}}\n"
        for kind, hook in (("filter", "prerouting"), ("route", "output"))
    )
    with nft_table(defended.lab, "inet", "whole", chains):
        for who in ("net_raw", "veth"):
            assert not defended.arrives(defended.by(who, mark_before_connect("tcp")))
        assert defended.arrives(lambda address: mark_before_connect("tcp")(defended.host, address))


def test_bits_of_others_pass_the_gate_and_the_table(defended: Field) -> None:
    chains = """chain prerouting {
        type filter hook prerouting priority mangle; iifname "br-ct" meta mark set meta mark | 0x4000\n}
        chain postrouting {
        type filter hook postrouting priority srcnat; meta mark & 0x4000 == 0x4000 counter comment "kept"\n}\n"""
    with nft_table(defended.lab, "inet", "kube", chains):
        assert not defended.arrives(defended.by("veth", mark_before_connect("tcp")))
        listed = defended.lab.run("host", ["nft", "list", "table", "inet", "kube"]).stdout
        assert "counter packets 0" not in listed


# --- another mask ----------------------------------------------------------------------------------------------------
def test_mask_does_not_change_under_open_sockets(defended: Field, marks: Marks) -> None:
    enforcer = defended.enforcer
    other = OTHER_MARKS if marks == DEFAULT_MARKS else DEFAULT_MARKS
    assert enforcer.reload(with_mask(other)) == "bad_policy"
    assert f"mark.mask is {other.mask:#010x} and open sockets carry the bits of {marks.mask:#010x}" in enforcer.log
    enforcer.stop()
    with pytest.raises(RuntimeError, match=r"write mask = .* or stop the daemon, run registry-enforcer remove"):
        enforcer.start(with_mask(other))
    assert not defended.arrives(defended.by("veth", mark_before_connect("tcp")))
    enforcer.start(with_mask(marks))
    assert enforcer.status()["policy"]["mark_mask"] == f"{marks.mask:#010x}"
