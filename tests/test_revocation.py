"""What a new policy must look at again, and where connections really lead."""

from __future__ import annotations

import socket
import subprocess
from dataclasses import replace
from ipaddress import ip_address

import pytest

from enforcer import conntrack
from enforcer.learned import Destination, LearnedAddress, LearnedAddresses
from enforcer.policy import DnsOverTls, HostPattern, Level, Mode, Policy, Resolvers, Scope
from enforcer.revocation import CROWDED, Revoked, lists, lists_address, narrows, to_judge_again
from tests.test_audit import in_namespace
from tests.test_ruleset import DEFAULT, rule


def at(address: str, port: int = 443) -> Destination:
    return ip_address(address), port


LEARNED = LearnedAddresses()
LEARNED.learn([LearnedAddress(*at("192.0.2.1"), "a.example", "r", HostPattern("a.example", False), 100)])
CONNECTED = [at("192.0.2.1"), at("10.0.0.1"), at("10.0.0.1", 8443), at("198.51.100.7"), at("198.51.100.7", 22),
             at("2001:db8::7", 5000), at("192.0.2.53", 53)]  # fmt: skip
LISTING = replace(DEFAULT, rules=(rule("corp", "10.0.0.0/8", ports=(443, 8443)),))
NOTHING_OFF = replace(DEFAULT, scope=Scope(Level.STRICT, Level.OFF, Level.STRICT))


def again(before: Policy, after: Policy) -> list[str]:
    found = to_judge_again(before, after, LEARNED, CONNECTED)
    return [f"{address} {port}" for address, port in found]


def test_addresses_that_are_listed_no_more_are_judged_again_and_others_are_not() -> None:
    assert narrows(LISTING, DEFAULT)
    assert again(LISTING, DEFAULT) == ["10.0.0.1 443", "10.0.0.1 8443"]
    less = replace(LISTING, rules=(rule("corp", "10.0.0.0/8", ports=(8443,)),))
    assert again(LISTING, less) == ["10.0.0.1 443"]
    assert again(LISTING, replace(LISTING, rules=(rule("corp", "10.0.0.1", ports=(443, 8443)),))) == []


@pytest.mark.parametrize(
    "before",
    [
        replace(DEFAULT, mode=Mode.OBSERVE),
        replace(DEFAULT, scope=Scope(Level.OFF, Level.STRICT, Level.OFF)),
        replace(DEFAULT, ports=(443,)),
    ],
)
def test_what_nobody_judged_is_judged_when_the_policy_does(before: Policy) -> None:
    assert narrows(before, DEFAULT)
    unlisted = ["10.0.0.1 443", "10.0.0.1 8443", "198.51.100.7 22", "198.51.100.7 443", "2001:db8::7 5000"]
    assert again(before, DEFAULT) == unlisted
    without_engines = replace(DEFAULT, scope=NOTHING_OFF.scope)
    assert again(before, without_engines) == [text for text in unlisted if text.split()[1] in ("443", "5000")]


def test_open_dns_over_tls_of_containers_is_judged_when_the_policy_refuses_it() -> None:
    before = replace(DEFAULT, scope=NOTHING_OFF.scope)
    after = replace(before, resolvers=Resolvers(True, (), DnsOverTls.REFUSE))
    assert narrows(before, after)
    assert to_judge_again(before, after, LEARNED, [at("198.51.100.7", 853)]) == (at("198.51.100.7", 853),)
    assert not narrows(after, before)


def test_policy_that_refuses_no_more_than_before_asks_for_nothing() -> None:
    assert not narrows(DEFAULT, DEFAULT)
    assert not narrows(DEFAULT, replace(DEFAULT, mode=Mode.OBSERVE))
    assert not narrows(DEFAULT, replace(DEFAULT, scope=Scope(Level.OFF, Level.OFF, Level.OFF)))
    assert again(DEFAULT, LISTING) == []


def test_listed_addresses_know_their_rule() -> None:
    assert lists(LISTING, at("10.1.2.3")) == "corp"
    assert lists(LISTING, at("10.1.2.3", 5000)) is None
    assert lists_address(LISTING, ip_address("10.1.2.3")) == "corp"
    assert lists_address(LISTING, ip_address("2001:db8::7")) is None


TRACKING = """
table inet x {
	chain track { type filter hook output priority 0; ct state new accept; }
	chain translate {
		type nat hook output priority -100;
		ip daddr 203.0.113.9 tcp dport 443 dnat ip to 127.0.0.1:4443
	}
}
"""


@pytest.mark.root
def test_destinations_of_connections_are_those_after_translation() -> None:
    found: set[Destination] = set()

    def act() -> None:
        subprocess.run(["nft", "-f", "-"], input=TRACKING, text=True, check=True)
        with (
            socket.create_server(("127.0.0.1", 4443)),
            socket.create_server(("::1", 4446), family=socket.AF_INET6),
            socket.create_connection(("203.0.113.9", 443), timeout=5),
            socket.create_connection(("::1", 4446), timeout=5),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        ):
            datagrams.sendto(b"", ("127.0.0.1", 4444))
            found.update(conntrack.tcp_destinations())

    in_namespace(act)
    assert found == {at("127.0.0.1", 4443), at("::1", 4446)}


@pytest.mark.root
def test_reading_nothing_is_no_error() -> None:
    found: set[Destination] = {at("192.0.2.1")}

    def act() -> None:
        found.clear()
        found.update(conntrack.tcp_destinations())

    in_namespace(act)
    assert found == set()


def test_what_is_revoked_ends_in_its_time_and_what_is_permitted_again_at_once() -> None:
    first, second, third = at("192.0.2.1"), at("192.0.2.2"), at("2001:db8::3")
    revoked = Revoked({first: 10.0})
    revoked.revoke([second, third], 20.0)
    revoked.pardon([third, at("192.0.2.9")])
    assert list(revoked) == [first, second]
    revoked.expire(9.9)
    assert first in revoked
    revoked.revoke([first], 30.0)  # later than the second now
    revoked.expire(20.0)
    assert list(revoked) == [first]
    revoked.expire(30.0)
    assert len(revoked) == 0


def test_only_what_has_no_connection_since_it_was_revoked_is_forgotten_early() -> None:
    connected, idle, again, pardoned, later = (at(f"192.0.2.{n}") for n in range(5))
    revoked = Revoked()
    revoked.revoke([connected, idle, again, pardoned], 10.0)
    snapshot = revoked.snapshot()
    revoked.revoke([again, later], 11.0)
    revoked.pardon([pardoned])
    assert revoked.without_connection(snapshot, {connected}) == [idle]


def test_it_is_crowded_long_before_the_table_has_no_room() -> None:
    revoked = Revoked({(ip_address(n), 443): 1.0 for n in range(CROWDED)})
    assert not revoked.is_crowded
    revoked.revoke([at("192.0.2.1")], 2.0)
    assert revoked.is_crowded
