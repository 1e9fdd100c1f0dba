"""Ways around enforcement through DNS, tried from a container, from the host and from the internet.

Each test's name is what holds. A forgery is beside the genuine packet that does teach, so that what is refused is
refused for the forged part; what BPF makes of single messages is in tests/kernel/test_learn.py and tests/vectors/dns.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import dns.message
import pytest

from enforcer.dns_answer import build_query
from enforcer.kernel_abi import LIFETIME_FLOOR_SECONDS, QUERY_WINDOW_SECONDS, Protocol
from tests.kernel import packets
from tests.lab import bench, odd_resolver
from tests.lab.enforcer import Enforcer, policy, registry
from tests.lab.internet import EVIL_ADDRESS, fresh_address, fresh_name
from tests.lab.lab import AUTHORITY, CT_ADDRESS, HOST_ADDRESS, RESOLVER, Agent, Lab, command, poll
from tests.lab.odd_resolver import address_of, name_of
from tests.lab.test_end_to_end import assert_reached, assert_refused

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(120)]
attack = pytest.mark.attack

ODD, NEW, STRANGER = "198.18.0.54", "198.18.0.55", "198.18.0.66"  # STRANGER is in no policy and no resolv.conf
IDNA = "bücher.allowed.test"
A = 1


def odd_policy(*trusted: str, resolvers: str = "", more: str = "") -> str:
    """The lab's, with names that the odd resolvers know."""
    hosts = registry("odd", "*.odd.allowed.test", "*.xn--bcher-kva.allowed.test", IDNA)
    names = ", ".join(f'"{address}"' for address in ("auto", *trusted))
    return policy(more=f"{hosts}{more}\n[resolvers]\ntrusted = [{names}]\n{resolvers}")


ODD_POLICY = odd_policy(ODD)


@pytest.fixture(scope="module")
def _odd(lab: Lab) -> None:
    odd_resolver.start(lab, ODD, NEW, STRANGER)


@pytest.fixture
def enforcer(any_enforcer: Enforcer, _odd: None) -> Enforcer:
    """The host's enforcer, with a policy that trusts ODD beside the host's resolver."""
    any_enforcer.ensure(ODD_POLICY)
    return any_enforcer


@pytest.fixture(scope="module")
def neighbour(lab: Lab) -> Agent:
    """A second container, on the same bridge as "ct"."""
    command("ip", "netns", "add", lab.namespace("ct2"))
    lab.ip("host", f"link add ct2-port type veth peer name eth0 netns {lab.namespace('ct2')}",
           "link set ct2-port master br-ct", "link set ct2-port up")  # fmt: skip
    lab.ip("ct2", "link set lo up", "addr add 10.77.0.3/24 dev eth0", "link set eth0 up",
           "route add default via 10.77.0.1")  # fmt: skip
    return lab.agent("ct2")


def ask(agent: Agent, server: str, *names: str, tcp: bool = False) -> list[dns.message.Message]:
    """The answers to A questions of one socket."""
    queries = [build_query(name, A).hex() for name in names]
    return [dns.message.from_wire(bytes.fromhex(wire)) for wire in agent.call(
        "exchange", reply_within=10, server=server, queries=queries, tcp=tcp)]  # fmt: skip


_markers = (str(IPv4Address("198.18.94.1") + n) for n in range(250))


def learned(lab: Lab, enforcer: Enforcer, server: str = ODD) -> set[str]:
    """The addresses that are permitted on port 443, after everything that was answered until now."""
    marker = next(_markers)
    ask(lab.host, server, name_of("plain", marker))
    poll("an answer behind them", lambda: (marker, 443) in enforcer.permitted())
    return {address for address, port in enforcer.permitted() if port == 443}


# --- forged answers --------------------------------------------------------------------------------------------------
QUESTION = {"name": "one.silent.allowed.test", "transaction_id": 4_711, "source_port": 40_053}
LATE = {"name": "late.silent.allowed.test", "transaction_id": 4_712, "source_port": 40_054}
_forged_addresses = (str(IPv4Address("198.18.89.1") + n) for n in range(250))


@pytest.fixture(scope="module", autouse=True)
def late_question(any_enforcer: Enforcer, lab: Lab, _odd: None) -> float:
    """When a question was asked that nobody answers, before everything else here."""
    any_enforcer.ensure(ODD_POLICY)
    lab.host.call("ask", reply_within=5, server=RESOLVER, **LATE)
    return time.monotonic()


@pytest.fixture(params=["host", "container"])
def asker(request: pytest.FixtureRequest, enforcer: Enforcer, lab: Lab) -> Iterator[str]:
    """The address of who has asked for an allowed name, and waits for the answer."""
    agent, address = (lab.host, HOST_ADDRESS) if request.param == "host" else (lab.ct, CT_ADDRESS)
    agent.call("ask", reply_within=5, server=RESOLVER, **QUESTION)
    yield address
    agent.call("hang_up", source_port=QUESTION["source_port"])


def answer_to(question: dict[str, object], address: str) -> bytes:
    """The genuine answer."""
    query = dns.message.make_query(str(question["name"]), "A", id=int(str(question["transaction_id"])))
    return next(odd_resolver.Odd(query, address).plain())


def forge(
    sender: Agent,
    to: str,
    address: str,
    *,
    question: dict[str, object] = QUESTION,
    source: str = RESOLVER,
    source_port: int = 53,
    **changed: object,
) -> None:
    """Send the answer that is waited for, but for what is changed, as a packet with whatever source."""
    claimed = question | changed
    datagram = packets.udp(source_port, int(str(claimed["source_port"])), answer_to(claimed, address))
    frame = packets.frame(IPv4Address(source), IPv4Address(to), Protocol.UDP, datagram)
    sender.call("send_packet", reply_within=5, packet=frame[14:].hex())


def assert_taught_nothing(lab: Lab, address: str) -> None:
    """For container and engine alike."""
    assert_refused(lab.ct.attempt(address))
    assert_refused(lab.engine.attempt(address))


@attack("DNS: one unsolicited answer from the resolver's port 53")
@pytest.mark.parametrize("sender", ["internet", "container", "root on the host"])
def test_answer_to_no_question_teaches_nothing(enforcer: Enforcer, lab: Lab, sender: str) -> None:
    address = next(_forged_addresses)
    agent = {"internet": lab.net, "container": lab.ct, "root on the host": lab.host}[sender]
    for to in HOST_ADDRESS, CT_ADDRESS:
        for transaction_id in range(20):
            forge(agent, to, address, transaction_id=transaction_id)
    assert address not in learned(lab, enforcer)
    assert_taught_nothing(lab, address)


@attack("DNS: a forged answer with a wrong transaction id, port, server or question")
@pytest.mark.parametrize(
    "forged",
    [
        {"transaction_id": 4_713},
        {"source_port": 40_055},
        {"source": AUTHORITY},
        {"source": STRANGER},
        {"name": "two.silent.allowed.test"},
        {"name": "evil.test"},
    ],
    ids=lambda forged: " ".join(f"{key} {value}" for key, value in forged.items()),
)
def test_answer_that_differs_from_what_was_asked_teaches_nothing(
    enforcer: Enforcer, lab: Lab, asker: str, forged: dict[str, object]
) -> None:
    address = next(_forged_addresses)
    forge(lab.net, asker, address, **forged)  # type: ignore[arg-type]
    assert address not in learned(lab, enforcer)
    assert_taught_nothing(lab, address)


@attack("DNS: a second answer to one query")
def test_answer_teaches_once(enforcer: Enforcer, lab: Lab, asker: str) -> None:
    first, second = next(_forged_addresses), next(_forged_addresses)
    forge(lab.net, asker, first)
    assert_reached(lab.ct.attempt(first))
    assert_reached(lab.engine.attempt(first))
    forge(lab.net, asker, second)
    assert second not in learned(lab, enforcer)
    assert_taught_nothing(lab, second)


@attack("DNS: a second answer to one query")
def test_second_answer_that_a_trusted_resolver_sends_teaches_nothing(enforcer: Enforcer, lab: Lab) -> None:
    ask(lab.ct, ODD, name_of("twice", "198.18.90.20"))
    known = learned(lab, enforcer)
    assert "198.18.90.20" in known
    assert "198.18.90.21" not in known


@attack("DNS: guesses, until one fits")
def test_wrong_guess_of_the_question_costs_the_right_answer_too(enforcer: Enforcer, lab: Lab, asker: str) -> None:
    address = next(_forged_addresses)
    forge(lab.net, asker, address, name="two.silent.allowed.test")
    forge(lab.net, asker, address)
    assert address not in learned(lab, enforcer)


@attack("DNS: a container answers, source address forged, port and id leaked by a colluding one")
@pytest.mark.parametrize("sender", ["ct", "its neighbour"])
def test_right_answer_from_a_container_teaches_nothing(
    enforcer: Enforcer, lab: Lab, neighbour: Agent, asker: str, sender: str
) -> None:
    address = next(_forged_addresses)
    for to in {asker, HOST_ADDRESS, CT_ADDRESS}:
        forge(lab.ct if sender == "ct" else neighbour, to, address)
    assert address not in learned(lab, enforcer)
    assert_taught_nothing(lab, address)


@attack("DNS: a container on the host's network answers itself over lo")
def test_right_answer_over_lo_to_what_was_asked_through_the_uplink_teaches_nothing(
    enforcer: Enforcer, lab: Lab, asker: str
) -> None:
    address, genuine = next(_forged_addresses), next(_forged_addresses)
    forge(lab.host, HOST_ADDRESS, address)
    forge(lab.host, asker, address)
    assert address not in learned(lab, enforcer)
    assert_taught_nothing(lab, address)
    forge(lab.net, asker, genuine)  # the question was not used up
    assert_reached(lab.ct.attempt(genuine))


@attack("DNS: a user of the host answers himself")
def test_user_without_rights_can_forge_nothing_or_what_he_forges_teaches_nothing(
    enforcer: Enforcer, lab: Lab, asker: str
) -> None:
    user = lab.agent("host", inside=["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"])
    address = next(_forged_addresses)
    with pytest.raises(OSError, match="not permitted"):
        forge(user, asker, address)
    packet: dict[str, object] = {
        "source": RESOLVER, "source_port": 53, "destination": HOST_ADDRESS,
        "destination_port": QUESTION["source_port"], "payload": answer_to(QUESTION, address).hex(),
    }  # fmt: skip
    with pytest.raises(OSError, match="denied"):
        user.call("send_from", reply_within=5, **packet)
    # Where the administrator gave every user every port, the address is still not his to send from.
    everybody = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
    assert lab.run("host", ["sh", "-c", f"echo 0 > {everybody}"]).returncode == 0
    try:
        with pytest.raises(OSError, match="unreachable"):
            user.call("send_from", reply_within=5, **packet)
    finally:
        assert lab.run("host", ["sh", "-c", f"echo 1024 > {everybody}"]).returncode == 0
    assert address not in learned(lab, enforcer)
    assert_taught_nothing(lab, address)


@attack("DNS: the workload asks its own server")
@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_allowed_name_asked_of_another_server_teaches_nothing(enforcer: Enforcer, lab: Lab, tcp: bool) -> None:
    address = "198.18.90.30"
    for agent in lab.ct, lab.engine:
        (answer,) = ask(agent, STRANGER, name_of("plain", address), tcp=tcp)
        assert address in str(answer)
    assert address not in learned(lab, enforcer)
    assert_taught_nothing(lab, address)


@attack("DNS: a container takes the address of a trusted resolver")
def test_right_answer_of_a_resolver_that_is_reached_through_a_bridge_teaches_nothing(
    enforcer: Enforcer, lab: Lab, neighbour: Agent
) -> None:
    """The bridge leads into this host only: whoever runs a container could answer there."""

    def unlearnable() -> bool:
        return ODD in {each["address"] for each in enforcer.status()["unlearnable_resolvers"]}

    address, bridge = "198.18.90.31", "10.77.0.1"
    lab.ip("host", f"route add {ODD} dev br-ct")
    try:
        poll("the daemon to see it", unlearnable)
        lab.host.call("ask", reply_within=5, server=ODD, **QUESTION)
        forge(neighbour, bridge, address, source=ODD)
        assert lab.host.call("hang_up", source_port=QUESTION["source_port"]) == {"received": 1}
        assert_taught_nothing(lab, address)
    finally:
        lab.ip("host", f"route del {ODD}")
    poll("the daemon to see it", lambda: not unlearnable())


# --- what an answer may look like ------------------------------------------------------------------------------------
def test_each_of_several_messages_in_one_tcp_stream_teaches(enforcer: Enforcer, lab: Lab) -> None:
    ask(lab.ct, ODD, name_of("plain", "198.18.90.40"), name_of("plain", "198.18.90.41"), tcp=True)
    assert_reached(lab.ct.attempt("198.18.90.40"))
    assert_reached(lab.ct.attempt("198.18.90.41"))


@attack("DNS over TCP: a message behind an allowed one in the same stream")
def test_evil_message_behind_an_allowed_one_in_a_tcp_stream_teaches_nothing(enforcer: Enforcer, lab: Lab) -> None:
    ask(lab.ct, ODD, name_of("plain", "198.18.90.42"), "evil.test", tcp=True)
    ask(lab.ct, ODD, name_of("plain", "198.18.90.43"), name_of("stray", "198.18.90.44"), tcp=True)
    known = learned(lab, enforcer)
    assert {"198.18.90.42", "198.18.90.43"} <= known
    assert not {address_of("evil.test"), "198.18.90.44"} & known


@attack("DNS over TCP: one message in many segments")
def test_message_in_many_tcp_segments_is_asked_for_by_the_daemon(enforcer: Enforcer, lab: Lab) -> None:
    (answer,) = ask(lab.ct, ODD, name_of("split", "198.18.90.45"), tcp=True)
    assert "198.18.90.45" in str(answer)
    # Its segments teach nothing, and a client may be refused until the daemon, which saw the first, has asked.
    assert "198.18.90.45" not in learned(lab, enforcer)


@attack("DNS: a truncated answer")
def test_truncated_answer_is_asked_for_over_tcp(enforcer: Enforcer, lab: Lab) -> None:
    ask(lab.ct, ODD, name_of("truncated", "198.18.90.46"))
    poll("the daemon's own question", lambda: ("198.18.90.46", 443) in enforcer.permitted())
    assert_reached(lab.ct.attempt("198.18.90.46"))


@attack("DNS: an answer in IP fragments")
def test_answer_in_fragments_is_asked_for_by_the_daemon(enforcer: Enforcer, lab: Lab) -> None:
    (answer,) = ask(lab.ct, ODD, name_of("fragments", "198.18.90.47"))
    assert len(answer.answer[0]) + len(answer.answer) > 100
    poll("the daemon's own question", lambda: ("198.18.90.47", 443) in enforcer.permitted())


@attack("DNS: two questions in one message")
@attack("DNS: CNAME chains that do not begin at the question")
@attack("DNS: compression loops")
@pytest.mark.parametrize("kind", ["questions", "other", "stray", "loop", "pointers"])
def test_address_that_the_question_does_not_lead_to_is_not_learned(enforcer: Enforcer, lab: Lab, kind: str) -> None:
    address = f"198.18.90.{50 + len(kind)}"
    lab.ct.call("exchange", server=ODD, queries=[build_query(name_of(kind, address), A).hex()])
    assert address not in learned(lab, enforcer)
    assert_taught_nothing(lab, address)


@pytest.mark.parametrize("kind", ["alias", "swapped", "many"])
def test_address_that_the_question_leads_to_is_learned_before_the_client_has_it(
    enforcer: Enforcer, lab: Lab, kind: str
) -> None:
    address = f"198.18.90.{60 + len(kind)}"
    ask(lab.ct, ODD, name_of(kind, address))
    assert_reached(lab.ct.attempt(address))


def test_ttl_of_zero_lasts_as_long_as_a_client_may_keep_it(enforcer: Enforcer, lab: Lab) -> None:
    ask(lab.ct, ODD, name_of("immortal", "198.18.90.70"))
    assert "198.18.90.70" in learned(lab, enforcer)
    (entry,) = (each for each in enforcer.status()["learned"] if each["address"] == "198.18.90.70")
    assert LIFETIME_FLOOR_SECONDS - 30 < entry["expires_at"] - time.time() <= LIFETIME_FLOOR_SECONDS + 1


def test_name_of_253_characters_is_learned_and_a_longer_one_is_none(enforcer: Enforcer, lab: Lab) -> None:
    ending = "." + name_of("plain", "198.18.90.71")
    labels = ".".join(["x" * 49] * 5)
    name = labels[-(253 - len(ending)) :].lstrip(".") + ending
    longest = "y" * (253 - len(name)) + name
    assert len(longest) == 253
    ask(lab.ct, ODD, longest)
    assert_reached(lab.ct.attempt("198.18.90.71"))


@attack("DNS: names beside a wildcard: evilx, the apex, a prefix")
@attack("DNS: look-alikes in IDNA")
def test_names_beside_a_pattern_are_not_in_it(enforcer: Enforcer, lab: Lab) -> None:
    outside = [
        "odd.allowed.test", "evilodd.allowed.test", "odd.allowed.test.evil.test", "x.odd.allowed.test.evil.test",
        "xn--bcher-kva.evil.test", "xn--bcher-0va.allowed.test", "bucher.allowed.test", "x\\.odd.allowed.test",
    ]  # fmt: skip
    inside = ["a.b.c.odd.allowed.test", "xn--bcher-kva.allowed.test", "x.XN--BCHER-KVA.allowed.test"]
    for name in outside + inside:
        ask(lab.ct, ODD, name)
    known = learned(lab, enforcer)
    assert [name for name in outside if address_of(name) in known] == []
    assert [name for name in inside if address_of(name.lower()) not in known] == []


@attack("DNS: answers of loopback, metadata services, the host's and its containers' own addresses")
@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.8.8", "169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255", HOST_ADDRESS, "10.77.0.1",
     CT_ADDRESS, "10.78.0.1"],
)  # fmt: skip
def test_address_that_no_registry_has_is_learned_for_no_name(enforcer: Enforcer, lab: Lab, address: str) -> None:
    ask(lab.ct, ODD, name_of("plain", address))
    assert address not in learned(lab, enforcer)


@attack("DNS: private addresses for a public name (rebinding)")
def test_private_address_is_learned_for_the_operators_names_and_for_no_presets(enforcer: Enforcer, lab: Lab) -> None:
    enforcer.ensure('presets = ["docker-hub"]\n' + ODD_POLICY)
    ask(lab.ct, ODD, "registry-1.docker.io")
    ask(lab.ct, ODD, name_of("plain", "10.9.9.9"))
    known = learned(lab, enforcer)
    assert address_of("registry-1.docker.io") not in known  # 198.18.0.0/15 is nobody's on the internet
    assert "10.9.9.9" in known


# --- answers that no packet shows ------------------------------------------------------------------------------------
@attack("DNS over HTTPS at an unlisted server")
def test_dns_over_https_to_an_unlisted_server_is_refused(enforcer: Enforcer, lab: Lab) -> None:
    assert_refused(lab.ct.attempt(EVIL_ADDRESS, 443))
    assert_refused(lab.engine.attempt(EVIL_ADDRESS, 443))
    assert lab.ct.call("send_datagram", address=EVIL_ADDRESS, port=443)  # DoH over HTTP/3


@pytest.fixture(scope="module")
def _listening_on_853(lab: Lab) -> None:
    lab.spawn("net", [sys.executable, "-m", "http.server", "853"], "http-853")
    poll("a server on 853", lambda: lab.net.attempt("127.0.0.1", 853).reached)


@attack("DNS over TLS and QUIC at an unlisted server, from containers, by option")
@pytest.mark.usefixtures("_listening_on_853")
def test_dns_over_tls_of_containers_is_refused_by_option_and_nobody_elses(enforcer: Enforcer, lab: Lab) -> None:
    assert_reached(lab.ct.attempt(EVIL_ADDRESS, 853))
    listed = '\n[[destination]]\nname = "dot"\naddresses = ["198.18.90.80"]\nports = [853]\n'
    enforcer.ensure(odd_policy(ODD, resolvers='dns_over_tls = "refuse"\n', more=listed))
    assert_refused(lab.ct.attempt(EVIL_ADDRESS, 853))
    assert lab.ct.call("send_datagram", address=EVIL_ADDRESS, port=853)  # DNS over QUIC
    assert_reached(lab.ct.attempt("198.18.90.80", 853))
    assert_reached(lab.host.attempt(EVIL_ADDRESS, 853))
    enforcer.ensure(ODD_POLICY)
    assert_reached(lab.ct.attempt(EVIL_ADDRESS, 853))


@attack("DNS over TLS and QUIC at an unlisted server, from containers, by option")
@pytest.mark.usefixtures("_listening_on_853")
def test_open_dns_over_tls_ends_when_it_is_refused(enforcer: Enforcer, lab: Lab) -> None:
    lab.ct.call("hold", key="dot", name=EVIL_ADDRESS, port=853)
    enforcer.ensure(odd_policy(ODD, resolvers='dns_over_tls = "refuse"\n'))
    assert_refused(lab.ct.talk("dot"))


@attack("an address from DoH, a Unix socket (nss-resolve), a cache or a hosts file")
def test_address_whose_answer_no_packet_showed_is_refused_until_one_does(enforcer: Enforcer, lab: Lab) -> None:
    """However the client came by it: what is not seen teaches nothing, and nothing is opened on a client's word."""
    name = fresh_name(16_000)
    assert_refused(lab.ct.attempt(fresh_address(16_000)))
    assert_refused(lab.engine.attempt(fresh_address(16_000)))
    ask(lab.host, RESOLVER, name)  # as systemd-resolved asks its upstream for a client of its Unix socket
    assert_reached(lab.engine.attempt(fresh_address(16_000)))
    assert_reached(lab.ct.attempt(fresh_address(16_000)))


# --- a stub on this host ---------------------------------------------------------------------------------------------
@pytest.fixture
def _stub(enforcer: Enforcer, lab: Lab, _own_resolver_afterwards: None) -> Iterator[None]:
    """The host's programs ask a caching resolver on lo, as they do with systemd-resolved."""
    with bench.stub_resolver(lab):
        yield


@attack("DNS: a stub on lo that is not trusted is answered for by a container on the host's network")
@pytest.mark.usefixtures("_stub")
def test_stub_that_is_not_trusted_cannot_be_forged_and_its_names_are_learned_from_those_behind_it(
    enforcer: Enforcer, lab: Lab
) -> None:
    enforcer.ensure(ODD_POLICY.replace('"auto"', f'"{RESOLVER}"'))
    assert enforcer.status()["resolvers"] == [RESOLVER, ODD]
    for index in 16_010, 16_011:
        ask(lab.host, bench.STUB, fresh_name(index))
        assert_reached(lab.engine.attempt(fresh_address(index)))  # at once
        ask(lab.host, bench.STUB, fresh_name(index))  # and when it comes out of the stub's cache
        assert_reached(lab.engine.attempt(fresh_address(index)))
    address = next(_forged_addresses)
    lab.host.call("ask", reply_within=5, server=bench.STUB, **QUESTION)
    forge(lab.host, "127.0.0.1", address, source=bench.STUB)
    assert lab.host.call("hang_up", source_port=QUESTION["source_port"]) == {"received": 1}
    assert_taught_nothing(lab, address)


# --- other resolvers -------------------------------------------------------------------------------------------------
def in_place(lab: Lab, address: str) -> None:
    """As dhclient's hook does it."""
    lab.set_resolvers(address)


def renamed(lab: Lab, address: str) -> None:
    """As NetworkManager, openresolv and careful editors do it."""
    script = f"echo nameserver {address} > /etc/resolv.conf.new && mv /etc/resolv.conf.new /etc/resolv.conf"
    assert lab.run("host", ["sh", "-ec", script]).returncode == 0


def systemd(lab: Lab, address: str) -> None:
    """As systemd-resolved does it, for all links in one file; resolv.conf is a link to another one, with its stub."""
    where = "/run/systemd/resolve"
    script = (
        f"mkdir -p {where}; echo nameserver {address} > {where}/new; mv {where}/new {where}/resolv.conf;"
        f"test -L /etc/resolv.conf || {{ echo nameserver 127.0.0.53 > {where}/stub-resolv.conf;"
        f"ln -sf {where}/stub-resolv.conf /etc/resolv.conf; }}"
    )
    assert lab.run("host", ["sh", "-ec", script]).returncode == 0


CHANGES: list[Callable[[Lab, str], None]] = [in_place, renamed, systemd]


@pytest.fixture
def _own_resolver_afterwards(lab: Lab, any_enforcer: Enforcer) -> Iterator[None]:
    yield
    assert lab.run("host", ["rm", "-rf", "/etc/resolv.conf", "/run/systemd/resolve"]).returncode == 0
    lab.set_resolvers(RESOLVER)
    poll("the lab's resolver", lambda: RESOLVER in any_enforcer.status()["resolvers"])


@attack("DNS: the host's former resolver goes on answering after DHCP or a VPN")
@pytest.mark.usefixtures("_own_resolver_afterwards")
@pytest.mark.parametrize("change", CHANGES)
def test_new_resolver_teaches_at_once_and_the_old_one_no_more(
    enforcer: Enforcer, lab: Lab, change: Callable[[Lab, str], None]
) -> None:
    n = 100 + 10 * CHANGES.index(change)
    enforcer.ensure(odd_policy())
    change(lab, ODD)
    poll("the old resolver", lambda: ODD in enforcer.status()["resolvers"])
    ask(lab.ct, ODD, name_of("plain", f"198.18.90.{n}"))
    assert_reached(lab.ct.attempt(f"198.18.90.{n}"))

    change(lab, NEW)
    ask(lab.ct, NEW, name_of("slow", f"198.18.90.{n + 1}"))
    assert_reached(lab.ct.attempt(f"198.18.90.{n + 1}"))
    assert ODD not in enforcer.status()["resolvers"]

    for agent in lab.ct, lab.engine:
        (answer,) = ask(agent, ODD, name_of("plain", f"198.18.90.{n + 2}"))
        assert f"198.18.90.{n + 2}" in str(answer)
    assert f"198.18.90.{n + 2}" not in learned(lab, enforcer, NEW)
    assert_taught_nothing(lab, f"198.18.90.{n + 2}")
    assert_reached(lab.ct.attempt(f"198.18.90.{n}"))  # for as long as its answer said


@pytest.mark.usefixtures("_own_resolver_afterwards")
def test_question_in_the_moment_of_the_change_is_learned_when_it_is_answered(enforcer: Enforcer, lab: Lab) -> None:
    enforcer.ensure(odd_policy())
    for turn, server in enumerate((ODD, NEW)):
        lab.ct.call("replace_file", path="/etc/resolv.conf", text=f"nameserver {server}\n")
        ask(lab.ct, server, name_of("slow", f"198.18.90.{140 + turn}"))
        assert_reached(lab.ct.attempt(f"198.18.90.{140 + turn}"))


@attack("DNS: the answer of a resolver that the operator has taken away")
@pytest.mark.usefixtures("_own_resolver_afterwards")
@pytest.mark.parametrize("by", ["the network", "the policy"])
def test_question_under_way_is_answered_unless_the_operator_took_the_resolver_away(
    enforcer: Enforcer, lab: Lab, by: str
) -> None:
    address = "198.18.90.130" if by == "the network" else "198.18.90.131"
    waiting = lab.agent("ct")
    if by == "the network":
        enforcer.ensure(odd_policy())
        in_place(lab, ODD)
        poll("the old resolver", lambda: ODD in enforcer.status()["resolvers"])
    query = build_query(name_of("slower", address), A)
    port = 40_060
    datagram = packets.udp(port, 53, query)
    frame = packets.frame(IPv4Address(CT_ADDRESS), IPv4Address(ODD), Protocol.UDP, datagram)
    waiting.call("send_packet", packet=frame[14:].hex())
    if by == "the network":
        in_place(lab, NEW)
    else:
        assert enforcer.reload(odd_policy(NEW)) == "ok"
    poll("the new resolver", lambda: ODD not in enforcer.status()["resolvers"], 0.4)
    time.sleep(odd_resolver.SLOW_SECONDS["slower"])
    if by == "the network":
        assert address in learned(lab, enforcer, NEW)
        assert_reached(lab.ct.attempt(address))
    else:
        assert address not in learned(lab, enforcer, NEW)
        assert_taught_nothing(lab, address)


# --- floods ----------------------------------------------------------------------------------------------------------
BOUND = 64  # of addresses under one pattern, in place of 16,384
_SMALL = f"""
import functools, sys
from enforcer import cli, enforcement, learned

learned.IN_USE_SECONDS = 2.0
enforcement.LearnedAddresses = functools.partial(enforcement.LearnedAddresses, per_holder={BOUND})
sys.exit(cli.main())
"""


@pytest.fixture
def small(any_enforcer: Enforcer, lab: Lab) -> Iterator[Enforcer]:
    """A daemon with a small memory, from nothing, in place of the host's."""
    if any_enforcer.running:
        any_enforcer.stop()
    any_enforcer.remove()
    daemon = Enforcer(lab, "host", lab.host, (sys.executable, "-c", _SMALL))
    assert lab.run("host", ["rm", "-rf", f"{lab.directory}/state/host"]).returncode == 0
    daemon.start(odd_policy(ODD))
    yield daemon
    daemon.stop()
    daemon.remove()
    any_enforcer.start(odd_policy(ODD))


@attack("DNS: a flood of fresh allowed names that evicts others or fills the memory")
def test_flood_of_fresh_allowed_names_evicts_nothing_in_use_and_cuts_nothing(small: Enforcer, lab: Lab) -> None:
    flood = functools.partial(lab.ct.call, "flood_names", server=RESOLVER, suffix="fresh.allowed.test")
    ask(lab.ct, ODD, name_of("plain", "198.18.90.160"))  # another pattern's
    busy, idle = fresh_address(15_000), fresh_address(15_001)
    for index in 15_000, 15_001:
        ask(lab.ct, RESOLVER, fresh_name(index))
    probers = {address: lab.agent("ct") for address in (busy, "198.18.90.160")}
    for address, prober in probers.items():
        prober.call("probe_start", key="p", address=address, port=443)
    for agent in lab.ct, lab.engine:
        agent.call("hold", key="idle", name=idle, port=443)
    time.sleep(2.5)

    flooded = flood(first=12_000, count=1_000, reply_within=60)
    assert flooded["answers"] == 1_000
    poll("the daemon to have read them", lambda: small.total("enforcer_learned_evicted_total") >= 1_000 - BOUND)

    known = [entry for entry in small.status()["learned"] if entry["port"] == 443]
    assert sum(entry["address"].startswith("198.19.") for entry in known) <= BOUND
    for prober in probers.values():
        assert set(prober.call("probe_stop", key="p")["verdicts"]) == {"reached"}
    assert_refused(lab.ct.attempt(idle))  # nobody went there: it made room, until somebody asks again
    for agent in lab.ct, lab.engine:
        assert agent.talk("idle").message != "closed without an answer"
    ask(lab.ct, RESOLVER, fresh_name(15_001))
    assert_reached(lab.ct.attempt(idle))
    assert_reached(lab.ct.connect("registry.allowed.test"))
    assert_reached(lab.ct.attempt(fresh_address(12_999)))


# --- last: it has to be late -----------------------------------------------------------------------------------------
@attack("DNS: a late answer")
def test_answer_that_comes_late_teaches_nothing(enforcer: Enforcer, lab: Lab, late_question: float) -> None:
    time.sleep(max(0.0, late_question + QUERY_WINDOW_SECONDS + 0.5 - time.monotonic()))
    address = next(_forged_addresses)
    forge(lab.net, HOST_ADDRESS, address, question=LATE)
    lab.host.call("hang_up", source_port=LATE["source_port"])
    assert address not in learned(lab, enforcer)
    assert_taught_nothing(lab, address)
