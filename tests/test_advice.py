"""What users are told about a name or an address, and that what they are told to write does what is said."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer.advice import Explanation, explain, parse_subject, presets_with, warnings
from enforcer.policy import (
    Address,
    Level,
    NameIndex,
    Policy,
    Reason,
    Scope,
    default_policy,
    load_preset,
    parse,
    preset_names,
)

POLICY = """\
organization = "Example Corp"
contact = "platform@example.com"
presets = ["docker-hub", "ghcr"]
[[registry]]
name = "corp"
hosts = ["registry.corp.example", "*.blobs.corp.example"]
ports = [443, 8443]
addresses = ["10.20.0.0/16"]
[[destination]]
name = "mirror"
hosts = ["packages.corp.example"]
"""


@dataclass(frozen=True)
class Seen:
    """A learned address."""

    address: Address
    port: int
    name: str
    rule: str


LEARNED = (Seen(ip_address("198.51.100.7"), 443, "ghcr.io", "ghcr"),)


def told(subject: str, text: str = POLICY) -> Explanation:
    policy = parse(text, "policy.toml")
    return explain(policy, NameIndex(policy), *parse_subject(subject), LEARNED)


def steps(explanation: Explanation) -> str:
    return "\n".join(explanation.next_steps)


def toml_in(step: str) -> str:
    return "\n".join(line.strip() for line in step.splitlines()[1:])


# --- verdicts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("subject", "allowed", "reason", "rules"),
    [
        ("ghcr.io", True, Reason.LISTED_NAME, ("ghcr",)),
        ("GHCR.IO.:443", True, Reason.LISTED_NAME, ("ghcr",)),
        ("ghcr.io:5000", False, Reason.UNLISTED_PORT, ("ghcr",)),
        ("registry.corp.example:8443", True, Reason.LISTED_NAME, ("corp",)),
        ("registry.corp.example:5000", False, Reason.UNLISTED_PORT, ("corp",)),
        ("eu.blobs.corp.example", True, Reason.LISTED_NAME, ("corp",)),
        ("blobs.corp.example", False, Reason.UNLISTED_NAME, ()),
        ("packages.corp.example:5000", True, Reason.LISTED_NAME, ("mirror",)),
        ("evil.test", False, Reason.UNLISTED_NAME, ()),
        ("evil.test:443", False, Reason.UNLISTED_NAME, ()),
        ("evil.test:8443", True, Reason.NOT_JUDGED, ()),
        ("10.20.0.1", True, Reason.LISTED_ADDRESS, ("corp",)),
        ("10.20.0.1:8443", True, Reason.LISTED_ADDRESS, ("corp",)),
        ("10.20.0.1:5000", False, Reason.UNLISTED_PORT, ("corp",)),
        ("10.21.0.1:443", False, Reason.UNLISTED_ADDRESS, ()),
        ("198.51.100.7", True, Reason.LEARNED_ADDRESS, ("ghcr",)),
        ("198.51.100.7:443", True, Reason.LEARNED_ADDRESS, ("ghcr",)),
        ("::ffff:198.51.100.7", True, Reason.LEARNED_ADDRESS, ("ghcr",)),
        ("198.51.100.7:5000", False, Reason.UNLISTED_PORT, ("ghcr",)),
        ("198.51.100.8", False, Reason.UNLISTED_ADDRESS, ()),
        ("[2001:db8::1]:443", False, Reason.UNLISTED_ADDRESS, ()),
        ("[2001:db8::1]:22", True, Reason.NOT_JUDGED, ()),
    ],
)
def test_the_verdict_is_the_policys(subject: str, allowed: bool, reason: Reason, rules: tuple[str, ...]) -> None:
    explanation = told(subject)
    assert (explanation.allowed, explanation.reason, explanation.rules) == (allowed, reason, rules)
    assert explanation.subject in explanation.sentence


@given(
    name=st.sampled_from(["ghcr.io", "registry.corp.example", "a.blobs.corp.example", "evil.test"]),
    port=st.integers(1, 65535),
)
def test_a_judged_port_is_explained_as_the_index_judges_it(name: str, port: int) -> None:
    policy = parse(POLICY, "policy.toml")
    index = NameIndex(policy)
    explanation = explain(policy, index, name, port, ())
    if explanation.reason is Reason.NOT_JUDGED:
        assert port not in policy.ports
        assert not index.judge(name, port).allowed
    else:
        assert explanation.reason is index.judge(name, port).reason


def test_an_allowed_name_is_told_with_rule_pattern_and_ports() -> None:
    assert told("eu.blobs.corp.example").sentence == (
        'eu.blobs.corp.example is allowed on ports 443 and 8443 by registry "corp", which lists *.blobs.corp.example.'
    )
    assert steps(told("ghcr.io")) == "It resolved to 198.51.100.7."
    assert "from the moment" in steps(told("registry.corp.example"))


def test_a_port_that_is_not_a_registry_port_is_not_judged_except_for_engines() -> None:
    explanation = told("evil.test:22")
    assert explanation.sentence == "evil.test is not judged on port 22: the registry ports are 443 and 5000."
    assert "Engines" in steps(explanation)
    assert told("evil.test:53").next_steps == ()
    assert told("evil.test:22", POLICY + '[scope]\nengines = "off"').next_steps == ()


def test_dns_over_tls_is_explained_as_refused_where_the_policy_refuses_it() -> None:
    host_too = POLICY + '[scope]\nhost = "strict"\n'
    assert told("198.18.9.9:853", host_too).reason is Reason.NOT_JUDGED
    explanation = told("198.18.9.9:853", host_too + '[resolvers]\ndns_over_tls = "refuse"\n')
    assert explanation.reason is Reason.UNLISTED_ADDRESS
    assert "it is refused for containers and engines." in explanation.sentence


def test_who_is_refused_depends_on_the_scopes() -> None:
    assert "it is refused for containers and engines." in told("evil.test").sentence
    assert (
        "for containers, engines and this host's programs."
        in told("evil.test", POLICY + '[scope]\nhost = "strict"').sentence
    )
    off = told("evil.test", POLICY + '[scope]\ncontainers = "off"\nengines = "off"\nhost = "off"')
    assert (off.reason, off.next_steps) == (Reason.NOT_JUDGED, ())


ALL = "containers, engines and this host's programs"


def test_a_registry_of_the_catalogue_is_refused_to_the_lenient_too() -> None:
    known = told("quay.io")
    assert known.sentence == f"quay.io is not listed by any rule of policy.toml: it is refused for {ALL}."
    assert "This host's programs are refused it, on whatever port, as a registry" in steps(known)
    assert "known by its name: Quay." in steps(known)
    elsewhere = told("quay.io:8443")
    assert (elsewhere.allowed, elsewhere.reason) == (False, Reason.UNLISTED_NAME)
    assert "it is refused for this host's programs." in elsewhere.sentence
    assert "Engines" in steps(elsewhere)
    assert told("ghcr.io:8443").reason is Reason.UNLISTED_PORT  # listed, and known for a registry
    assert told("registry.corp.example:22").reason is Reason.NOT_JUDGED
    other = told("evil.test")
    assert other.sentence.endswith("it is refused for containers and engines.")
    assert "This host's programs may reach it, but for the registry protocol" in steps(other)
    for level in ("strict", "off"):
        assert "his host's programs" not in steps(told("evil.test", f'{POLICY}[scope]\nhost = "{level}"'))


def test_where_nobody_is_strict_only_what_is_recognised_is_refused() -> None:
    lenient = POLICY + '[scope]\ncontainers = "registries"\nengines = "registries"'
    known = told("quay.io:443", lenient)
    assert (known.allowed, known.reason) == (False, Reason.UNLISTED_NAME)
    assert f"it is refused for {ALL}." in known.sentence
    for subject in ("evil.test", "evil.test:443", "evil.test:8443", "192.0.2.1", "192.0.2.1:443"):
        other = told(subject, lenient)
        assert (other.allowed, other.reason) == (True, Reason.NOT_JUDGED)
        assert f"{ALL} are refused only what is recognised as a registry." in other.sentence
    assert told("ghcr.io", lenient).reason is Reason.LISTED_NAME


PROXY = '[[proxy]]\nname = "corp-proxy"\nhosts = ["proxy.corp.example"]\naddresses = ["10.30.0.7"]\nports = [3128]\n'


def test_a_proxy_is_told_as_one() -> None:
    explanation = told("proxy.corp.example", POLICY + PROXY)
    assert explanation.sentence == (
        'proxy.corp.example is allowed on port 3128 by proxy "corp-proxy", which lists proxy.corp.example.'
    )
    assert "forward proxy" in explanation.next_steps[-1]
    assert "forward proxy" not in steps(told("ghcr.io", POLICY + PROXY))
    assert "forward proxy" in steps(told("10.30.0.7:3128", POLICY + PROXY))
    refused = told("proxy.corp.example:443", POLICY + PROXY)
    assert (refused.allowed, refused.reason) == (False, Reason.UNLISTED_PORT)
    assert told("proxy.corp.example:443", f"{POLICY}{PROXY}{toml_in(refused.next_steps[-1])}\n").allowed


def test_a_rule_that_verifies_addresses_only_is_told_as_such() -> None:
    lenient = POLICY.replace(
        'hosts = ["packages.corp.example"]', 'hosts = ["packages.corp.example"]\nverify = "address"'
    )
    assert "clients may ask for any name" in steps(told("packages.corp.example", lenient))
    assert "clients may ask for any name" not in steps(told("packages.corp.example"))
    assert "clients may ask for any name" not in steps(told("registry.corp.example", lenient))


def test_in_observe_mode_the_policy_refuses_and_the_connection_is_let_through() -> None:
    explanation = told("evil.test", 'mode = "observe"\n' + POLICY)
    assert not explanation.allowed
    assert "would be refused" in explanation.sentence
    assert "let through" in explanation.next_steps[-1]
    assert "let through" not in steps(told("evil.test"))


# --- next steps ------------------------------------------------------------------------------------------------------
def test_a_refused_user_learns_whom_to_ask() -> None:
    for subject in ("evil.test", "evil.test:5000", "ghcr.io:5000", "10.20.0.1:5000", "192.0.2.1"):
        assert "Ask platform@example.com if Example Corp should allow it." in told(subject).next_steps, subject
    assert "platform@example.com" not in steps(told("ghcr.io"))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("registry.crop.example", "Did you mean registry.corp.example?"),
        ("ghcr.oi", "Did you mean ghcr.io?"),
        ("registry1.docker.io", "Did you mean registry-1.docker.io"),
        ("blobs.corp.example", "*.blobs.corp.example lists the names below blobs.corp.example, not"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_listed_one(wrong: str, right: str) -> None:
    assert told(wrong).next_steps[0].startswith(right)
    assert not any("Did you mean" in step for step in told("unrelated.test").next_steps)


@pytest.mark.parametrize(
    "subject",
    ["evil.test", "evil.test:5000", "_a.test", f"{'x' * 60}.{'y' * 60}.test", "192.0.2.1", "[2001:db8::1]:5000"],
)
def test_the_toml_that_is_offered_allows_what_was_asked_for(subject: str) -> None:
    offered = toml_in(told(subject).next_steps[-1])
    assert not told(subject).allowed
    assert told(subject, f"{POLICY}{offered}\n").allowed


def test_the_ports_that_are_offered_extend_the_rule() -> None:
    step = told("registry.corp.example:5000").next_steps[-1]
    assert 'under registry "corp"' in step
    assert toml_in(step) == "ports = [443, 5000, 8443]"
    offered = toml_in(told("ghcr.io:5000").next_steps[-1])  # a preset's ports are not the operator's to change
    assert told("ghcr.io:5000", f"{POLICY}{offered}\n").allowed


def test_a_preset_that_has_the_name_is_offered_beside_those_that_are_there() -> None:
    (step,) = (step for step in told("quay.io").next_steps if "preset" in step)
    assert toml_in(step) == 'presets = ["docker-hub", "ghcr", "quay"]'
    assert told("quay.io", POLICY.replace('presets = ["docker-hub", "ghcr"]', toml_in(step))).allowed


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("999999999999.dkr.ecr.us-east-2.amazonaws.com", {"account": "999999999999", "region": "us-east-2"}),
        ("prod-us-east-2-starport-layer-bucket.s3.us-east-2.amazonaws.com", {"region": "us-east-2"}),
    ],
)
def test_a_presets_parameters_are_read_off_the_name(name: str, known: dict[str, str]) -> None:
    ((preset, _, values),) = presets_with(name)
    assert (preset.name, values) == ("ecr", known)
    (step,) = (step for step in told(name).next_steps if "[[preset]]" in step)
    assert told(name, f"{POLICY}{toml_in(step)}\n").allowed
    assert ("write yours" in step) == ("account" not in known)


def test_a_name_that_only_looks_like_a_presets_is_in_none() -> None:
    for name in (
        "99999.dkr.ecr.us-east-2.amazonaws.com",
        "prod-us-east-2-starport-layer-bucket.s3.us-east-1.amazonaws.com",
        "pkg.dev",
        "ghcr.io.evil.test",
        "ghcrxio",
    ):
        assert list(presets_with(name)) == [], name


@pytest.mark.parametrize("preset_name", preset_names())
def test_every_host_of_every_preset_is_found_by_its_name(preset_name: str) -> None:
    preset = load_preset(preset_name)
    for host in preset.hosts:
        name = host.name.format_map({parameter.name: parameter.example for parameter in preset.parameters})
        assert preset_name in {found.name for found, _, _ in presets_with(name.replace("*", "any.thing"))}


def test_a_shared_host_is_offered_with_a_caution() -> None:
    assert "other people's content" in steps(told("storage.googleapis.com"))
    assert "other people's content" not in steps(told("eu-docker.pkg.dev"))


def test_a_near_name_is_found_among_a_hundred_thousand_in_a_second() -> None:
    hosts = ", ".join(f'"host-{number}.region-{number % 100}.corp.example"' for number in range(100_000))
    policy = parse(f'[[registry]]\nname = "corp"\nhosts = [{hosts}]', "policy.toml")
    index = NameIndex(policy)
    started = time.process_time()
    explanation = explain(policy, index, "hots-4217.region-17.corp.example", None, ())
    assert time.process_time() - started < 1
    assert "host-4217.region-17.corp.example" in explanation.next_steps[0]


# --- what is asked ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "subject", "port"),
    [
        ("ghcr.io", "ghcr.io", None),
        (" GHCR.io.:443\n", "ghcr.io", 443),
        ("bücher.example:5000", "xn--bcher-kva.example", 5000),
        ("10.0.0.1", ip_address("10.0.0.1"), None),
        ("10.0.0.1:5000", ip_address("10.0.0.1"), 5000),
        ("2001:db8::1", ip_address("2001:db8::1"), None),
        ("::1:443", ip_address("::1:443"), None),
        ("[2001:db8::1]", ip_address("2001:db8::1"), None),
        ("[2001:db8::1]:443", ip_address("2001:db8::1"), 443),
        ("::ffff:10.0.0.1", ip_address("10.0.0.1"), None),
        ("[::ffff:10.0.0.1]:443", ip_address("10.0.0.1"), 443),
    ],
)
def test_names_addresses_and_ports_are_told_apart(text: str, subject: str | Address, port: int | None) -> None:
    assert parse_subject(text) == (subject, port)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a host name; write"),
        ("ghcr.io:0", "0 is not a port; write a number from 1 to 65535"),
        ("ghcr.io:65536", "65536 is not a port; write a number from 1 to 65535"),
        (f"ghcr.io:{'9' * 5000}", "9 is not a port; write a number from 1 to 65535"),
        ("ghcr.io/library/alpine:3", 'with a path; write only the host: "ghcr.io"'),
        ("https://ghcr.io/v2/", 'a URL; write only the host: "ghcr.io"'),
        ("*.ghcr.io", "is a pattern; write one name below ghcr.io"),
        ("[ghcr.io]:443", "not an IPv6 address; write"),
        ("1:2:3:4:5:6:7:8:443", r"ambiguous; write \[1:2:3:4:5:6:7:8\]:443"),
    ],
)
def test_a_wrong_subject_is_told_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_subject(text)


@given(st.one_of(st.ip_addresses(), st.sampled_from(["ghcr.io", "a.b.c"])), st.one_of(st.none(), st.integers(1, 65535)))
def test_a_subject_reads_back_from_its_text(subject: str | Address, port: int | None) -> None:
    text = f"[{subject}]" if port and ":" in str(subject) else str(subject)
    found, found_port = parse_subject(text if port is None else f"{text}:{port}")
    mapped = getattr(subject, "ipv4_mapped", None)
    assert (found, found_port) == (mapped or subject, port)


@given(st.text())
def test_any_text_is_a_subject_or_a_value_error(text: str) -> None:
    try:
        subject, port = parse_subject(text)
    except ValueError:
        return
    assert explain_default(subject, port).sentence.isprintable()


def explain_default(subject: str | Address, port: int | None) -> Explanation:
    policy = default_policy()
    return explain(policy, NameIndex(policy), subject, port, ())


# --- warnings --------------------------------------------------------------------------------------------------------
def test_a_policy_that_means_what_it_says_has_no_warnings() -> None:
    assert warnings(default_policy()) == ()
    assert warnings(parse(POLICY, "policy.toml")) == ()


@pytest.mark.parametrize(
    ("policy", "warning"),
    [
        (replace(default_policy(), rules=()), "it allows nothing"),
        (replace(default_policy(), scope=Scope(Level.OFF, Level.OFF, Level.OFF)), "every scope is off"),
        (parse('presets = ["ghcr"]\n[scope]\nengines = "registries"', "p"), "engines may reach every registry that"),
        (
            parse('[[registry]]\nname = "a"\nhosts = ["a.b"]\nverify = "address"', "p"),
            'rule "a" has verify = "address"',
        ),
        (parse('presets = ["ghcr"]\nports = [5000]', "p"), "443 is not among the registry ports"),
        (parse('[[registry]]\nname = "a"\nhosts = ["*.com"]', "p"), 'rule "a" allows *.com'),
        (parse('presets = ["google"]', "p"), "other people's content too, as storage.googleapis.com"),
    ],
)
def test_what_an_operator_may_not_have_meant_is_said(policy: Policy, warning: str) -> None:
    (found,) = warnings(policy)
    assert warning in found
