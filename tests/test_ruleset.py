"""The ruleset as text. tests/test_nft.py loads the same goldens into the kernel and sends packets through them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer import baseline
from enforcer.kernel_abi import DEFAULT_MARKS, MarkedScope, Marks, Protocol
from enforcer.ladder import Capabilities, Feature
from enforcer.policy import DnsOverTls, HostPattern, Level, Mode, Policy, Resolvers, Rule, RuleKind, Scope
from enforcer.ruleset import (
    LEARNED_SETS,
    CountedScope,
    Element,
    Responder,
    counter_name,
    marks_of,
    render_cgroups,
    render_elements,
    render_internal,
    render_removal,
    render_ruleset,
)

GOLDEN = Path(__file__).parent / "golden"
FULL = Capabilities()
HOSTILE_NAME = '"; flush ruleset\n}\ntable inet other { } #' + "é" * 200


def rule(name: str, *networks: str, kind: RuleKind = RuleKind.REGISTRY, ports: tuple[int, ...] = (443,)) -> Rule:
    return Rule(name, kind, (HostPattern("a.example", False),), ports, tuple(map(ip_network, networks)))


DEFAULT = Policy(
    organization="",
    contact="",
    mode=Mode.ENFORCE,
    ports=(443, 5000),
    scope=Scope(containers=Level.STRICT, engines=Level.STRICT, host=Level.OFF),
    rules=(rule("docker-hub", kind=RuleKind.PRESET),),
    resolvers=Resolvers(auto=True, addresses=()),
    source="built-in default",
    digest="0" * 64,
)
POLICIES = {
    "default": DEFAULT,
    "observe": replace(DEFAULT, mode=Mode.OBSERVE),
    "strict-host": replace(DEFAULT, scope=Scope(Level.STRICT, Level.STRICT, Level.STRICT)),
    "everything-off": replace(DEFAULT, scope=Scope(Level.OFF, Level.OFF, Level.OFF)),
    "addresses": replace(
        DEFAULT,
        ports=(443,),
        rules=(
            rule("corp", "10.20.0.0/16", "10.20.30.0/24", "2001:db8:20::/48", ports=(443, 8443)),
            rule("everywhere", "0.0.0.0/0", "::/0", ports=(5000,)),
            rule("mirror", "192.0.2.7", kind=RuleKind.DESTINATION),
        ),
    ),
    "registries": replace(DEFAULT, scope=Scope(Level.STRICT, Level.STRICT, Level.REGISTRIES)),
    "proxy": replace(
        DEFAULT,
        scope=Scope(Level.REGISTRIES, Level.REGISTRIES, Level.OFF),
        rules=(rule("corp-proxy", "10.30.0.7", "2001:db8::30/127", kind=RuleKind.PROXY, ports=(3128, 8080)),),
    ),
    "hostile-names": replace(
        DEFAULT, rules=(rule(HOSTILE_NAME, "10.0.0.0/8"),), source=HOSTILE_NAME, digest=HOSTILE_NAME
    ),
    "marks": replace(DEFAULT, marks=Marks(0x80000101)),
    "responder": DEFAULT,
    "responder-dns-over-tls": replace(DEFAULT, resolvers=Resolvers(True, (), DnsOverTls.REFUSE)),
    "responder-observe": replace(DEFAULT, mode=Mode.OBSERVE),
}
RESPONDER = Responder(942, interfaces4=frozenset({"docker0"}))


def without(*features: Feature) -> Capabilities:
    return replace(FULL, features=FULL.features - set(features))


SETS = {Feature.PLAIN_SETS, Feature.TIMED_SETS, Feature.DYNAMIC_SETS, Feature.INTERVALS}
RUNGS = {
    **{f"without-{feature.name.lower()}": without(feature) for feature in Feature if feature is not Feature.BASE},
    "without-sets": without(*SETS),
    "bare": without(*set(Feature) - SETS - {Feature.BASE}),  # WSL 2 before 5.15.57.1
    "barest": without(*set(Feature) - {Feature.BASE}),  # the smallest 5.4
    "without-bpf": replace(FULL, programs=frozenset()),
    "without-bpf-hybrid": replace(FULL, programs=frozenset(), unified=False),
    "without-tc": replace(FULL, traffic_control=False),
    "without-cgroup": replace(FULL, cgroup=False),
    "baseline": baseline.CAPABILITIES,  # before the daemon
    "bare-without-bpf": replace(without(*set(Feature) - SETS - {Feature.BASE}), programs=frozenset()),
}
RUNG_POLICY = replace(POLICIES["addresses"], ports=(443, 5000))


@pytest.mark.parametrize("name", POLICIES)
def test_ruleset_is_the_golden(name: str) -> None:
    path = GOLDEN / f"{name}.nft"
    responder = RESPONDER if name.startswith("responder") else None
    text = render_ruleset(POLICIES[name], FULL, ["docker0", "veth1"], responder)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_only_the_mask_of_the_policy_is_read() -> None:
    text = render_ruleset(replace(DEFAULT, marks=Marks(0x700)), FULL, [], RESPONDER)
    assert sorted(re.findall(r"meta mark (\S.*?) (?:accept|goto)", text)) == [
        "& 0x00000300 != 0x00000300",
        "& 0x00000300 == 0x00000100",
        "& 0x00000300 == 0x00000200",
        "& 0x00000300 == 0x00000300",
        "& 0x00000400 == 0x00000400",
    ]


@pytest.mark.parametrize("marks", [DEFAULT_MARKS, Marks(0x80000101), Marks(7)])
def test_table_says_which_bits_it_reads(marks: Marks) -> None:
    text = render_ruleset(replace(DEFAULT, marks=marks), FULL, [])
    chains = re.findall(r"chain (\w+)", text)
    assert marks_of(chains) == marks
    before = re.findall(r"chain (\w+)", render_ruleset(replace(DEFAULT, marks=Marks(0x700)), baseline.CAPABILITIES, []))
    assert marks_of(before) is None  # nobody sets marks before the daemon
    assert marks_of([*before, *chains]) == marks  # its chains stay in the daemon's table


CGROUPS = [
    ("system.slice/docker.service", MarkedScope.ENGINE),
    ("docker/0a1b", MarkedScope.CONTAINER),
    ("machine.slice", MarkedScope.CONTAINER),
    ('"; flush ruleset', MarkedScope.HOST),
]


def rung_text(name: str, cgroups: Sequence[tuple[str, MarkedScope]] = CGROUPS) -> str:
    return render_ruleset(RUNG_POLICY, RUNGS[name], ["docker0", "veth1"], RESPONDER, cgroups=cgroups)


@pytest.mark.parametrize("name", RUNGS)
def test_rung_is_the_golden(name: str) -> None:
    path = GOLDEN / "rungs" / f"{name}.nft"
    text = rung_text(name)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_every_golden_has_its_policy_or_its_rung() -> None:
    assert {path.stem for path in GOLDEN.glob("*.nft")} == set(POLICIES)
    assert {path.stem for path in (GOLDEN / "rungs").glob("*.nft")} == set(RUNGS)


def test_kernel_that_cannot_refuse_gets_no_ruleset() -> None:
    with pytest.raises(ValueError, match=r"lacks CONFIG_NF_TABLES"):
        render_ruleset(DEFAULT, without(Feature.BASE), [])


# What nft compiles each feature to, as `nft --debug=netlink` spells it.
EXPRESSIONS = {
    Feature.COUNTER: r"\[ objref type 1 ",
    Feature.CT: r"\[ ct load ",
    Feature.LIMIT: r"\[ limit ",
    Feature.LOG: r"\[ log (?!.*group)",
    Feature.AUDIT: r"\[ log .*group",
    Feature.REDIRECT: r"\[ (redir|fib|rt) ",
    Feature.REJECT: r"\[ reject ",
    Feature.SOCKET: r"\[ socket ",
    Feature.DYNAMIC_SETS: r"\[ dynset ",
    Feature.PLAIN_SETS: r"\[ lookup .*set (__set|internal|answered)",
    Feature.TIMED_SETS: r"\[ lookup .*set (learned|revoked)",
}


def compiled(text: str) -> str:
    """The expressions of a ruleset, as nft would send them; checked by nothing but nft itself."""
    nft = ["nft", "--check", "--debug=netlink", "--file", "-"]
    done = subprocess.run(["unshare", "--net", *nft], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.root
@pytest.mark.parametrize("name", RUNGS)
def test_rung_uses_nothing_that_its_kernel_lacks(name: str) -> None:
    used = compiled(rung_text(name, cgroups=()))
    for feature, pattern in EXPRESSIONS.items():
        if feature not in RUNGS[name].features:
            assert not re.search(pattern, used), feature


@pytest.mark.root
def test_full_ruleset_uses_all_of_it() -> None:
    kernel_log = compiled(render_ruleset(RUNG_POLICY, RUNGS["without-audit"], [], RESPONDER))
    used = compiled(render_ruleset(RUNG_POLICY, FULL, [], RESPONDER)) + kernel_log
    used += compiled(render_ruleset(RUNG_POLICY, RUNGS["without-bpf"], []))
    assert [feature for feature, pattern in EXPRESSIONS.items() if not re.search(pattern, used)] == []


def test_cgroups_are_told_by_the_same_rules_when_they_change() -> None:
    capabilities = RUNGS["without-bpf"]
    text = render_cgroups(DEFAULT_MARKS, capabilities, CGROUPS)
    rules = re.findall(r"^add rule inet registry_enforcer own_mark (.*)$", text, re.MULTILINE)
    assert rules
    assert "\n".join(f"\t\t{rule}" for rule in rules) in rung_text("without-bpf")
    assert render_cgroups(DEFAULT_MARKS, FULL, CGROUPS) == ""


def test_kernel_without_a_reporting_log_writes_a_few_lines_into_its_own_log_instead() -> None:
    text = render_ruleset(DEFAULT, without(Feature.AUDIT), [])
    reported, logged = (re.compile(pattern) for pattern in (r"\tlog prefix .* group", r"\tlimit rate .* log prefix"))
    assert logged.search(text)
    assert not reported.search(text)
    full = render_ruleset(DEFAULT, FULL, [])
    assert reported.search(full)
    assert not logged.search(full)


def test_kernel_without_redirect_resets_as_without_a_responder() -> None:
    lacking = without(Feature.REDIRECT)
    assert render_ruleset(DEFAULT, lacking, ["docker0"], RESPONDER) == render_ruleset(DEFAULT, FULL, ["docker0"])


def test_observe_mode_redirects_nothing() -> None:
    assert "redirect to :942" in render_ruleset(DEFAULT, FULL, [], RESPONDER)
    assert "redirect to" not in render_ruleset(POLICIES["observe"], FULL, [], RESPONDER)


@given(name=st.text(min_size=1))
def test_rule_name_cannot_leave_its_comment(name: str) -> None:
    named = replace(DEFAULT, rules=(rule(name, "10.0.0.0/8"),), source=name, digest=name)
    plain = replace(DEFAULT, rules=(rule("x", "10.0.0.0/8"),), source="x", digest="x")
    lines, plain_lines = (render_ruleset(policy, FULL, []).splitlines() for policy in (named, plain))
    assert len(lines) == len(plain_lines)
    changed = [line.strip() for line, other in zip(lines, plain_lines, strict=True) if line != other]
    for line in changed:
        comment = re.fullmatch(r'ip daddr .* accept comment "([^"\\]*)"', line)
        assert line.startswith("# Policy ") or (comment and len(comment[1].encode()) < 128)


def test_counters_of_both_modes_are_always_declared() -> None:
    text = render_ruleset(POLICIES["everything-off"], FULL, [])
    for mode in Mode:
        for scope in CountedScope:
            for protocol in Protocol:
                assert f"counter {counter_name(mode, scope, protocol)} {{ }}" in text
    assert counter_name(Mode.ENFORCE, CountedScope.HOST, Protocol.UDP) == "refused_host_udp"
    assert counter_name(Mode.OBSERVE, CountedScope.ENGINE, Protocol.TCP) == "observed_engine_tcp"


def test_observe_mode_ends_every_judge_with_accept_and_enforce_mode_does_not() -> None:
    def last_rules(policy: Policy) -> set[str]:
        judges = re.findall(r"chain judge_(?!local)\w+ \{(.*?)\n\t\}", render_ruleset(policy, FULL, []), re.DOTALL)
        assert len(judges) == len(CountedScope)
        return {judge.strip().splitlines()[-1].strip().partition(" ")[0] for judge in judges}

    enforced = POLICIES["strict-host"]
    assert last_rules(replace(enforced, mode=Mode.OBSERVE)) == {"accept"}
    assert last_rules(enforced) == {"log"}


def test_lo_is_always_internal_and_names_nft_cannot_quote_are_not() -> None:
    assert render_internal([], FULL).endswith('internal { "lo" }\n')
    refused = ['a"b', "eth*", "a\\", "a b", "a\nb", "", "sixteen-letters-", "é"]
    assert render_internal(["br-1", "veth@x", *refused], FULL).endswith('internal { "br-1", "lo", "veth@x" }\n')


def test_host_loopback_is_let_pass_for_127_alone() -> None:
    text = render_ruleset(DEFAULT, FULL, [], RESPONDER, host_loopback=["loopback0"])
    assert 'add element inet registry_enforcer host_loopback { "loopback0" }' in text
    assert 'internal { "lo" }' in text
    users = [line.strip() for line in text.splitlines() if "@host_loopback" in line]
    assert users == ["ip daddr 127.0.0.0/8 oifname @host_loopback accept"] * 2
    assert "add element inet registry_enforcer host_loopback" not in render_ruleset(DEFAULT, FULL, [], RESPONDER)


def test_removal_succeeds_with_and_without_the_table() -> None:
    assert render_removal().splitlines() == [
        "add table inet registry_enforcer",
        "delete table inet registry_enforcer",
    ]


V4, V6 = IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1")


def changes(text: str) -> list[tuple[str, str, list[str]]]:
    """(verb, set, elements) of each command."""
    found = re.findall(r"(add|delete) element inet registry_enforcer (\w+) \{\n(.*?)\n\}", text, re.DOTALL)
    return [(verb, name, [element.strip() for element in body.split(",")]) for verb, name, body in found]


def test_no_change_is_no_text() -> None:
    assert render_elements([], []) == ""


def test_permission_is_added_deleted_and_added_again() -> None:
    assert changes(render_elements([Element(V4, 443, 300), Element(V6, 8443, 60)], [])) == [
        ("add", "learned4", ["192.0.2.1 . 443 timeout 300s"]),
        ("delete", "learned4", ["192.0.2.1 . 443"]),
        ("add", "learned4", ["192.0.2.1 . 443 timeout 300s"]),
        ("add", "learned6", ["2001:db8::1 . 8443 timeout 60s"]),
        ("delete", "learned6", ["2001:db8::1 . 8443"]),
        ("add", "learned6", ["2001:db8::1 . 8443 timeout 60s"]),
    ]


def test_permission_that_the_sets_do_not_hold_is_added_once_and_others_as_ever() -> None:
    new, old = Element(V4, 443, 300), Element(V6, 8443, 60)
    assert changes(render_elements([new, old], [], {(V6, 8443): 5})) == [
        ("add", "learned4", ["192.0.2.1 . 443 timeout 300s"]),
        ("add", "learned6", ["2001:db8::1 . 8443 timeout 60s"]),
        ("delete", "learned6", ["2001:db8::1 . 8443"]),
        ("add", "learned6", ["2001:db8::1 . 8443 timeout 60s"]),
    ]
    assert render_elements([new, old], [], ()) == "".join(render_elements([each], [], ()) for each in (new, old))


def test_same_element_twice_is_rendered_once_with_the_longer_lifetime() -> None:
    once = render_elements([Element(V4, 443, 300)], [])
    assert render_elements([Element(V4, 443, 10), Element(V4, 443, 300), Element(V4, 443, 20)], []) == once


def test_withdrawal_comes_after_the_permission_and_once() -> None:
    assert changes(render_elements([Element(V4, 443, 300)], [(V4, 443), (V4, 443)]))[-2:] == [
        ("add", "learned4", ["192.0.2.1 . 443 timeout 60s"]),
        ("delete", "learned4", ["192.0.2.1 . 443"]),
    ]


@pytest.mark.parametrize("seconds", [0, -1])
def test_lifetime_that_nft_would_read_as_for_ever_is_refused(seconds: int) -> None:
    with pytest.raises(ValueError, match="lifetime"):
        Element(V4, 443, seconds)


def test_zone_of_an_address_is_not_rendered() -> None:
    zoned = ip_address("fe80::1%}; flush ruleset")
    assert changes(render_elements([], [(zoned, 443)]))[-1] == ("delete", LEARNED_SETS[1], ["fe80::1 . 443"])
    hostile = replace(DEFAULT, rules=(rule("x", "fe80::1%};flush"),))
    assert "ip6 daddr { fe80::1/128 }" in render_ruleset(hostile, FULL, [])
