"""Policies: what is understood, what each mistake says, and what names a rule covers."""

from __future__ import annotations

import random
import re
import string
import time
from dataclasses import replace
from datetime import date
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer.guarding import listed_map
from enforcer.kernel_abi import (
    DEFAULT_MARKS,
    MAX_LEARNED,
    MAX_LISTED,
    MAX_NAMES,
    MAX_PORTS_PER_NAME,
    Marks,
    pack_name_key,
)
from enforcer.policy import (
    MAX_POLICY_BYTES,
    AuthorityFiles,
    DnsOverTls,
    HostPattern,
    Level,
    Mode,
    NameIndex,
    Note,
    Policy,
    PolicyError,
    Reason,
    Resolvers,
    Rule,
    RuleKind,
    Scope,
    Verdict,
    Verify,
    default_policy,
    host_pattern,
    load_preset,
    name_permissions,
    parse,
    pattern_id,
    preset_names,
    read_policy,
)
from enforcer.toml_lines import line_of

FULL = """\
organization = "Example Corp"
contact = "platform@example.com"
mode = "observe"
ports = [5000, 443]
presets = ["docker-hub", "ghcr"]
[[preset]]
name = "ecr"
account = "123456789012"
region = ["eu-west-1", "us-east-1"]
[scope]
containers = "strict"
engines = "off"
host = "registries"
[[registry]]
name = "corp"
hosts = ["Registry.Corp.Example.", "*.blobs.corp.example"]
ports = [8443, 443, 443]
addresses = ["10.20.0.0/16", "2001:db8::1"]
[[destination]]
name = "mirror"
hosts = ["packages.corp.example"]
verify = "address"
[[proxy]]
name = "corp-proxy"
hosts = ["proxy.corp.example"]
addresses = ["10.30.0.7", "2001:db8::30/127"]
ports = [8080, 3128]
[resolvers]
trusted = ["auto", "10.0.0.53"]
dns_over_tls = "refuse"
[refusal]
message = "{name} is not allowed {{here}}: {contact}"
ca = { certificate = "/etc/corp/ca.crt", key = "/etc/corp/ca.key" }
[mark]
mask = 0x00000700
"""


def mistake(text: str | bytes) -> PolicyError:
    with pytest.raises(PolicyError) as raised:
        parse(text, "policy.toml")
    return raised.value


def mistake_or_none(text: str | bytes) -> PolicyError | None:
    try:
        parse(text, "policy.toml")
    except PolicyError as error:
        return error
    return None


def registry(hosts: str) -> str:
    return f'[[registry]]\nname = "corp"\nhosts = ["registry.corp.example",\n  {hosts}]\n'


def of_rules(*rules: Rule) -> Policy:
    return replace(default_policy(), rules=rules)


# --- what is understood ----------------------------------------------------------------------------------------------
def test_a_full_policy_is_read_as_written() -> None:
    policy = parse(FULL, "policy.toml")
    assert (policy.organization, policy.contact) == ("Example Corp", "platform@example.com")
    assert policy.mode is Mode.OBSERVE
    assert policy.ports == (443, 5000)
    assert policy.scope == Scope(containers=Level.STRICT, engines=Level.OFF, host=Level.REGISTRIES)
    assert policy.resolvers == Resolvers(True, (ip_address("10.0.0.53"),), DnsOverTls.REFUSE)
    assert policy.container_ports == (443, 853, 5000)
    assert policy.refusal.message == "{name} is not allowed {{here}}: {contact}"
    assert policy.marks == Marks(0x700)
    assert policy.mark_line == FULL.count("\n")
    line_of_ca = FULL[: FULL.index("ca = {")].count("\n") + 1
    assert policy.refusal.ca == AuthorityFiles("/etc/corp/ca.crt", "/etc/corp/ca.key", line_of_ca)
    assert [(rule.name, rule.kind) for rule in policy.rules] == [
        ("docker-hub", RuleKind.PRESET),
        ("ghcr", RuleKind.PRESET),
        ("ecr", RuleKind.PRESET),
        ("corp", RuleKind.REGISTRY),
        ("mirror", RuleKind.DESTINATION),
        ("corp-proxy", RuleKind.PROXY),
    ]
    assert policy.rules[3] == Rule(
        name="corp",
        kind=RuleKind.REGISTRY,
        hosts=(HostPattern("registry.corp.example", False), HostPattern("blobs.corp.example", True)),
        ports=(443, 8443),
        addresses=(IPv4Network("10.20.0.0/16"), IPv6Network("2001:db8::1/128")),
    )
    assert policy.rules[5] == Rule(
        name="corp-proxy",
        kind=RuleKind.PROXY,
        hosts=(HostPattern("proxy.corp.example", False),),
        ports=(3128, 8080),
        addresses=(IPv4Network("10.30.0.7/32"), IPv6Network("2001:db8::30/127")),
    )
    assert {rule.name: rule.verify for rule in policy.rules if rule.verify is not Verify.NAME} == {
        "mirror": Verify.ADDRESS
    }


def test_the_proxies_listed_addresses_are_found_with_each_port() -> None:
    v4, v6 = IPv4Network("10.30.0.7/32"), IPv6Network("2001:db8::30/127")
    assert list(parse(FULL, "p").proxy_addresses) == [(v4, 3128), (v4, 8080), (v6, 3128), (v6, 8080)]
    assert list(default_policy().proxy_addresses) == []


def test_a_registry_is_reachable_on_443_and_a_destination_on_the_registry_ports_unless_written_otherwise() -> None:
    text = (
        "ports = [443, 5000]\n[[registry]]\nname = 'a'\nhosts = ['a.b']\n[[destination]]\nname = 'b'\nhosts = ['b.c']"
    )
    assert [rule.ports for rule in parse(text, "p").rules] == [(443,), (443, 5000)]


def test_without_a_file_docker_hub_alone_is_enforced() -> None:
    policy = default_policy()
    assert policy.source == "the built-in default"
    assert policy.mode is Mode.ENFORCE
    assert [rule.name for rule in policy.rules] == ["docker-hub"]
    assert NameIndex(policy).match("registry-1.docker.io")
    assert not NameIndex(policy).match("ghcr.io")


@pytest.mark.parametrize(("wsl", "level"), [(False, Level.REGISTRIES), (True, Level.STRICT)])
def test_the_host_is_refused_registries_by_default_and_in_wsl_everything(wsl: bool, level: Level) -> None:
    assert default_policy(wsl=wsl).scope == Scope(Level.STRICT, Level.STRICT, level)


@pytest.mark.parametrize("wsl", [False, True])
@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("scope", ["containers", "engines", "host"])
def test_every_scope_takes_every_level(scope: str, level: Level, wsl: bool) -> None:
    read = parse(f'[scope]\n{scope} = "{level.value}"', "p", wsl=wsl).scope
    assert read == replace(default_policy(wsl=wsl).scope, **{scope: level})


@pytest.mark.parametrize(
    ("levels", "strictest"),
    [
        ((Level.OFF, Level.REGISTRIES, Level.STRICT), Level.STRICT),
        ((Level.REGISTRIES, Level.OFF, Level.OFF), Level.REGISTRIES),
        ((Level.OFF, Level.OFF, Level.REGISTRIES), Level.REGISTRIES),
        ((Level.OFF, Level.OFF, Level.OFF), Level.OFF),
    ],
)
def test_the_strictest_level_is_strict_then_registries_then_off(
    levels: tuple[Level, Level, Level], strictest: Level
) -> None:
    assert Scope(*levels).strictest is strictest


def test_names_are_verified_unless_a_rule_says_otherwise() -> None:
    for key in ("registry", "destination"):
        rule = f'[[{key}]]\nname = "a"\nhosts = ["a.b"]\n'
        assert [read.verify for read in parse(rule, "p").rules] == [Verify.NAME]
        assert [read.verify for read in parse(rule + 'verify = "name"', "p").rules] == [Verify.NAME]
        assert [read.verify for read in parse(rule + 'verify = "address"', "p").rules] == [Verify.ADDRESS]
    assert {rule.verify for rule in default_policy().rules} == {Verify.NAME}


@pytest.mark.parametrize("place", ['hosts = ["proxy.corp.example"]', 'addresses = ["10.0.0.7"]'])
def test_a_proxy_is_found_by_name_or_by_address(place: str) -> None:
    (rule,) = parse(f'[[proxy]]\nname = "a"\nports = [3128]\n{place}', "p").rules
    assert (rule.kind, rule.ports, rule.private_addresses) == (RuleKind.PROXY, (3128,), True)
    assert bool(rule.hosts) != bool(rule.addresses)


def test_bound_on_learned_addresses_is_the_policys() -> None:
    assert parse("[limits]\nlearned_addresses = 1024", "policy.toml").learned_addresses == 1_024
    for text in ("[limits]", "[limits]\nlearned_addresses = 262144", "mode = 'enforce'"):
        assert parse(text, "policy.toml").learned_addresses == MAX_LEARNED == 262_144


def test_no_more_addresses_and_ports_are_listed_than_the_kernel_holds() -> None:
    listed = [f"10.{number >> 8}.{number & 255}.0/32" for number in range(MAX_LISTED // 2)]
    text = f"[[registry]]\nname = 'corp'\nports = [443, 5000]\naddresses = {listed}\n"
    assert len(listed_map(parse(text, "policy.toml"))) == MAX_LISTED
    with pytest.raises(PolicyError, match=r"^policy.toml:6: more than 16384 pairs.*; write networks, such as"):
        parse(text + "[[registry]]\nname = 'more'\naddresses = ['10.200.0.1']\n", "policy.toml")


@pytest.mark.parametrize("text", ["[mark]", "[mark]\nmask = 0xE0000000", "[mark]\nmask = 3758096384"])
def test_marks_are_the_default_unless_written_otherwise(text: str) -> None:
    assert parse(text, "policy.toml").marks == DEFAULT_MARKS == default_policy().marks


def test_a_policy_without_rules_is_legal_and_permits_nothing() -> None:
    policy = parse('mode = "enforce"', "p")
    assert policy.rules == ()
    assert list(name_permissions(policy)) == []


def test_the_digest_is_that_of_the_bytes() -> None:
    assert parse(FULL, "p").digest == parse(FULL.encode(), "p").digest
    assert parse(FULL, "p").digest != parse(FULL + "\n", "p").digest


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfmode = 'observe'", b"mode = 'observe'\r\n"])
def test_what_windows_editors_write_is_read(text: bytes) -> None:
    assert parse(text, "p").mode is Mode.OBSERVE


def test_addresses_alone_make_a_rule() -> None:
    (rule,) = parse('[[registry]]\nname = "a"\naddresses = ["10.1.2.3"]', "p").rules
    assert (rule.hosts, rule.addresses) == ((), (IPv4Network("10.1.2.3/32"),))


@pytest.mark.parametrize(
    ("written", "pattern"),
    [
        ("ghcr.io", "ghcr.io"),
        ("GHCR.io.", "ghcr.io"),
        ("*.Example.COM", "*.example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("*.BÜCHER.example", "*.xn--bcher-kva.example"),
        ("straße.example", "xn--strae-oqa.example"),
        ("日本。example", "xn--wgv71a.example"),
        ("build_cache.corp.example", "build_cache.corp.example"),
        ("a--b.r2.example", "a--b.r2.example"),
        ("registry", "registry"),
        ("x" * 63 + ".example", "x" * 63 + ".example"),
        (".".join(["x" * 49] * 5) + ".abc", ".".join(["x" * 49] * 5) + ".abc"),
    ],
)
def test_host_names_are_normalized(written: str, pattern: str) -> None:
    assert str(host_pattern(written)) == pattern
    assert str(host_pattern(pattern)) == pattern


# --- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "line", "problem", "advice"),
    [
        ("", 1, "empty", 'presets = ["docker-hub"]'),
        ("# nothing\n\n", 1, "empty", 'presets = ["docker-hub"]'),
        ("\nmodes = 'enforce'", 2, 'unknown key "modes"', "write mode"),
        ("[scope]\nhosts = 'off'", 2, 'unknown key "hosts"', "write host"),
        ("[[registry]]\nname = 'a'\nhost = ['a.b']", 3, 'unknown key "host"', "write hosts"),
        ("[resolvers]\nservers = []", 2, 'unknown key "servers"', "write trusted"),
        ("zzz = 1", 1, "unknown key", "organization, contact, mode"),
        ("mode = 'enforce'\nmode = 'observe'", 2, "not TOML", "once"),
        ("mode = 'enforce'\nmode", 2, "not TOML", "key = value"),
        ("mode = 'enforce'\ncontact = 'a", 2, "not TOML", "double quotes"),
        ("mode = 'enforced'", 1, '"enforced"', '"enforce" or "observe"'),
        ("mode = true", 1, "true", '"enforce" or "observe"'),
        ("[scope]\n\nhost = 'on'", 3, '"on"', '"strict", "registries" or "off"'),
        ("ports = [443]\r\n[scope]\r\nhost = 'on'\r\n", 3, '"on"', '"strict", "registries" or "off"'),
        ("[scope]\nengines = 'registry'", 2, '"registry"', '"strict", "registries" or "off"'),
        ("[[registry]]\nname = 'a'\nhosts = ['a.b']\nverify = 'sni'", 4, '"sni"', '"name" or "address"'),
        ("[[destination]]\nname = 'a'\nhosts = ['a.b']\nverify = false", 4, "false", '"name" or "address"'),
        (
            "[[registry]]\nname = 'a'\naddresses = ['10.0.0.1']\nverify = 'name'",
            4,
            "verify says nothing without hosts",
            "remove it",
        ),
        ("[[preset]]\nname = 'ghcr'\nverify = 'address'", 3, 'unknown key "verify"', "write name"),
        ("[[proxy]]\nname = 'a'\nhosts = ['a.b']\nports = [1]\nverify = 'name'", 5, "unknown key", "write name, hosts"),
        ("[[proxy]]\nname = 'a'\nhosts = ['a.b']", 1, "ports is missing", "ports = [3128]"),
        ("[[proxy]]\nname = 'a'\nhosts = ['a.b']\nports = []", 4, "0 ports", "1 to 8"),
        ("[[proxy]]\nname = 'a'\nhosts = ['a.b']\nports = ['3128']", 4, '"3128" is not a port', "without quotes"),
        ("[[proxy]]\nname = 'a'\nports = [3128]", 1, '"a" is nowhere', 'hosts = ["proxy.example.com"]'),
        ("[[proxy]]\nhosts = ['a.b']\nports = [3128]", 1, "name is missing", 'name = "corp-proxy"'),
        ("[[proxy]]\nname = 'a'\nhosts = ['http://a.b:3128']\nports = [3128]", 3, "a URL", 'only the host: "a.b"'),
        ("[[proxy]]\nname = 'a'\naddresses = ['0.0.0.0/0']\nports = [3128]", 3, "permits every address", "networks"),
        ("proxy = 'http://a.b:3128'", 1, "not a list", "[[proxy]]"),
        ("[proxy]\nname = 'a'", 1, "not a list", "[[proxy]]"),
        (
            "[[registry]]\nname = 'a'\nhosts = ['a.b']\n[[proxy]]\nname = 'a'\nhosts = ['a.c']\nports = [1]",
            5,
            "a second rule",
            "its own name",
        ),
        ("scope = 'strict'", 1, "not a table", "containers, engines or host"),
        ("limits = 5", 1, "5 is not a table", "a table with learned_addresses"),
        ("[limits]\nlearned = 5", 2, 'unknown key "learned"', "write learned_addresses"),
        ("[limits]\nlearned_addresses = '5000'", 2, '"5000" is not a number', "without quotes, such as 262144"),
        ("[limits]\nlearned_addresses = true", 2, "true is not a number", "without quotes"),
        ("[limits]\n\nlearned_addresses = 1023", 3, "1023 learned addresses", "write 1024 to 262144, the default"),
        ("[limits]\nlearned_addresses = 262145", 2, "262145 learned addresses", "write 1024 to 262144"),
        ("[limits]\nlearned_addresses = 1e4", 2, "10000.0 is not a number", "such as 262144"),
        ("mark = 0xE0000000", 1, "3758096384 is not a table", "a table with mask"),
        ("[mark]\nbits = 3", 2, 'unknown key "bits"', "write mask"),
        ("[mark]\n\nmask = '0xE0000000'", 3, '"0xE0000000" is not a number', "without quotes, such as 0xe0000000"),
        ("[mark]\nmask = true", 2, "true is not a number", "without quotes"),
        ("[mark]\nmask = 0xF0000000", 2, "0xf0000000 is not a mask of 3 bits", "3 of 32 bits set"),
        ("[mark]\nmask = 0xffffffff", 2, "0xffffffff is not a mask of 3 bits", "such as 0xe0000000"),
        ("[mark]\nmask = 0x1C0000000", 2, "0x1c0000000 is not a mask of 3 bits", "3 of 32 bits set"),
        ("[mark]\nmask = 0", 2, "0x0 is not a mask of 3 bits", "3 of 32 bits set"),
        ("[mark]\nmask = -7", 2, "-0x7 is not a mask of 3 bits", "3 of 32 bits set"),
        ("ports = 443", 1, "443 is not a list", "ports = [443]"),
        ("ports = []", 1, "0 ports", "1 to 8"),
        ("ports = [1, 2, 3, 4, 5, 6, 7, 8, 9]", 1, "9 ports", "1 to 8"),
        ("ports = [\n443,\n0]", 3, "0 is not a port", "from 1 to 65535"),
        ("ports = [\n443,\n65536]", 3, "65536 is not a port", "from 1 to 65535"),
        ("ports = ['443']", 1, '"443" is not a port', "without quotes"),
        ("ports = [true]", 1, "true is not a port", "from 1 to 65535"),
        ("ports = [443.0]", 1, "443.0 is not a port", "from 1 to 65535"),
        (f"ports = [{'9' * 5000}]", 1, "not a number that fits", "key = value"),
        ("contact = ''", 1, "cannot be shown", "1 to 200 characters"),
        (f"contact = '{'x' * 201}'", 1, "cannot be shown", "1 to 200 characters"),
        ('organization = "a\\u001b[31m"', 1, "cannot be shown", "without control characters"),
        ('organization = "a\\u202eb"', 1, "cannot be shown", "without control characters"),
        ('organization = "a\\nb"', 1, "cannot be shown", "one line"),
        ("organization = 7", 1, "7 is not a string", "double quotes"),
        ("presets = 'ghcr'", 1, "not a list", 'presets = ["ghcr"]'),
        ("presets = ['ghcr',\n 'dockerhub']", 2, 'unknown preset "dockerhub"', 'write "docker-hub"'),
        ("presets = ['nope']", 1, 'unknown preset "nope"', '"docker-hub", "ecr"'),
        ("presets = ['../policy']", 1, "unknown preset", '"ghcr"'),
        ("presets = ['ghcr', 'ghcr']", 1, 'a second rule is called "ghcr"', "its own name"),
        ("presets = ['ecr']", 1, "needs account and region", 'account = "123456789012"'),
        ("[[preset]]\nname = 'ecr'\nregion = 'eu-west-1'", 1, "account is missing", 'account = "123456789012"'),
        ("[[preset]]\nname = 'ecr'\naccount = '12'\nregion = 'eu-west-1'", 3, '"12" is not', "123456789012"),
        (
            "[[preset]]\nname = 'ecr'\naccount = '123456789012'\nregion = ['eu-west-1', 'x']",
            4,
            '"x" is not',
            "eu-west-1",
        ),
        ("[[preset]]\nname = 'ecr'\naccount = '123456789012'\nregion = 'cn-north-1'", 4, "not China's", "eu-west-1"),
        ("[[preset]]\nname = 'ecr'\naccount = '123456789012'\nregion = []", 4, "region is empty", "eu-west-1"),
        ("[[preset]]\nname = 'ghcr'\nregion = 'eu-west-1'", 3, 'unknown key "region"', "write name"),
        ("[[preset]]\naccount = '1'", 1, "name is missing", 'name = "ecr"'),
        ("preset = ['ecr']", 1, "not a table", "[[preset]]"),
        ("[registry]\nname = 'a'\nhosts = ['a.b']", 1, "not a list", "[[registry]]"),
        ("registry = ['a']", 1, "not a table", "name, hosts"),
        ("[[registry]]\nhosts = ['a.b']", 1, "name is missing", 'name = "corp"'),
        ("[[registry]]\nname = 'a b'\nhosts = ['a.b']", 2, '"a b" is not a rule\'s name', "letters"),
        ("[[registry]]\nname = ''\nhosts = ['a.b']", 2, '"" is not a rule\'s name', "letters"),
        ("[[registry]]\nname = 'a'", 1, '"a" permits nothing', "hosts = "),
        ("[[registry]]\nname = 'a'\nhosts = []", 1, '"a" permits nothing', "hosts = "),
        ("[[registry]]\nname = 'a'\nhosts = 'a.b'", 3, '"a.b" is not a list', 'hosts = ["registry.example.com"]'),
        (
            "[[registry]]\nname = 'a'\nhosts = ['a.b']\n[[destination]]\nname = 'a'\nhosts = ['a.c']",
            5,
            'a second rule is called "a"',
            "its own name",
        ),
        ("presets = ['ghcr']\n[[registry]]\nname = 'ghcr'\nhosts = ['a.b']", 3, "a second rule", "its own name"),
        ("[[registry]]\nname = 'a'\naddresses = ['10.0.0.0/33']", 3, "not an address or a network", "10.20.0.0/16"),
        ("[[registry]]\nname = 'a'\naddresses = ['a.b']", 3, "not an address or a network", "10.20.0.0/16"),
        (
            "[[registry]]\nname = 'a'\naddresses = ['10.1.2.3/8']",
            3,
            "bits set",
            '"10.0.0.0/8" for the network or "10.1.2.3"',
        ),
        ("[[registry]]\nname = 'a'\naddresses = ['0.0.0.0/0']", 3, "permits every address", "observe"),
        ("[[registry]]\nname = 'a'\naddresses = ['::/0']", 3, "permits every address", "observe"),
        ("[[registry]]\nname = 'a'\naddresses = ['::ffff:10.0.0.1']", 3, "never occurs", "IPv4"),
        ("[[registry]]\nname = 'a'\naddresses = ['fe80::1%eth0']", 3, "never occurs", "IPv6"),
        ("[[registry]]\nname = 'a'\naddresses = [10]", 3, "10 is not a string", "double quotes"),
        ("[resolvers]\ntrusted = 'auto'", 2, "not a list", 'trusted = ["auto"]'),
        ("[resolvers]\ndns_over_tls = 'off'", 2, '"off" is not known', '"allow" or "refuse"'),
        ("[resolvers]\ndns_over_tls = true", 2, "true is not known", '"allow" or "refuse"'),
        ("[scope]\ncontainers = 'off'\n[resolvers]\ndns_over_tls = 'refuse'", 4, "their scope is off", '"strict"'),
        ("[resolvers]\ntrusted = []", 2, "0 resolvers", '["auto"]'),
        ("[resolvers]\ntrusted = ['dns.corp.example']", 2, "not a resolver", '"auto"'),
        ("[resolvers]\ntrusted = ['0.0.0.0']", 2, "no host's address", '"auto"'),
        (f"[resolvers]\ntrusted = {[f'10.0.0.{n}' for n in range(1, 66)]}", 2, "65 resolvers", "1 to 64"),
        ('[refusal]\nmessage = "{nmae}"', 2, "no placeholder", "{name}"),
        ('[refusal]\nmessage = "{name!r}"', 2, "{name!r}", "{name}"),
        ('[refusal]\nmessage = "{name.__class__}"', 2, "no placeholder", "{name}"),
        ('[refusal]\nmessage = "{name:{port}}"', 2, "no placeholder", "{name}"),
        ('[refusal]\nmessage = "{}"', 2, "no placeholder", "{name}"),
        ('[refusal]\nmessage = "50% {"', 2, "brace without its other half", "{{ for a brace"),
        ('[refusal]\nmessage = "a\\u001b[2J"', 2, "cannot be shown", "without control characters"),
        (f'[refusal]\nmessage = "{"a" * 501}"', 2, "cannot be shown", "500 characters"),
        ('[refusal]\ntext = "no"', 2, "unknown key", "message"),
        ('[refusal]\nca = "/ca"', 2, "not a table", "certificate"),
        ('[refusal]\nca = { certificate = "/ca" }', 2, "key is missing", 'add key = "/etc'),
        ('[refusal]\nca = { certificate = "ca", key = "/k" }', 2, "not an absolute path", "/etc"),
    ],
)
def test_a_mistake_names_its_line_and_what_to_write(text: str, line: int, problem: str, advice: str) -> None:
    error = mistake(text)
    assert str(error) == f"policy.toml:{error.line}: {error.problem}; {error.advice}"
    assert problem in error.problem
    assert advice in error.advice
    assert error.line == line


@pytest.mark.parametrize(
    ("host", "problem", "advice"),
    [
        ('"foo.*"', "wildcard", "*.example.com"),
        ('"*"', "wildcard", "*.example.com"),
        ('"*."', "wildcard", "*.example.com"),
        ('"a*b"', "wildcard", "*.example.com"),
        ('"*.*.example.com"', "wildcard", "*.example.com"),
        ('"**.example.com"', "wildcard", "*.example.com"),
        ('"*example.com"', "wildcard", "*.example.com"),
        ('"https://ghcr.io/v2/"', "a URL", 'only the host: "ghcr.io"'),
        ('"docker://user@ghcr.io/x"', "a URL", 'only the host: "ghcr.io"'),
        ('"ghcr.io:5000"', "with a port", '"ghcr.io", and ports = [5000]'),
        ('"*.ghcr.io:5000"', "with a port", '"*.ghcr.io", and ports = [5000]'),
        ('"ghcr.io/library/alpine"', "with a path", 'only the host: "ghcr.io"'),
        ('".ghcr.io"', "begins with a dot", '"*.ghcr.io"'),
        ('"10.1.2.3"', "is an address", 'addresses = ["10.1.2.3"]'),
        ('"10.1.2.3:5000"', "is an address", 'addresses = ["10.1.2.3"]'),
        ('"10.0.0.0/8"', "is an address", 'addresses = ["10.0.0.0/8"]'),
        ('"2001:db8::1"', "is an address", 'addresses = ["2001:db8::1"]'),
        ('"[2001:db8::1]:443"', "is an address", 'addresses = ["2001:db8::1"]'),
        ('"https://10.1.2.3/v2/"', "is an address", 'addresses = ["10.1.2.3"]'),
        ('"\\uff11\\uff10.1.2.3"', "is an address", 'addresses = ["10.1.2.3"]'),
        ('"registry.123"', "not a host name", "registry.example.com"),
        ('""', "not a host name", "registry.example.com"),
        ('" ghcr.io"', "not a host name", "registry.example.com"),
        ('"a..b"', "not a host name", "registry.example.com"),
        ('"-a.example"', "not a host name", "registry.example.com"),
        ('"a-.example"', "not a host name", "registry.example.com"),
        ('"a\\u0000.example"', "not a host name", "registry.example.com"),
        ('"ü-.example"', "not a host name", "as DNS has it"),
        (f'"{"x" * 64}.example"', "too long", "63 characters"),
        (f'"{".".join(["x" * 49] * 5)}.abcd"', "too long", "253 in all"),
        (f'"{"ü" * 5000}"', "too long", "253 in all"),
        ("7", "7 is not a string", "double quotes"),
    ],
)
def test_a_wrong_host_names_its_line_and_what_to_write(host: str, problem: str, advice: str) -> None:
    error = mistake(registry(host))
    assert problem in error.problem
    assert advice in error.advice
    assert error.line == 4
    assert str(error).isprintable()


@given(st.one_of(st.text(), st.text("*.:/[]@-_a0\u00fc\uff11\u3002", max_size=20)))
def test_any_text_is_a_host_or_a_mistake_that_can_be_shown(text: str) -> None:
    try:
        pattern = host_pattern(text)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
        assert host_pattern(str(pattern)) == pattern
    assert message.isprintable()
    assert message == "" or "; write" in message


def test_more_names_than_the_kernel_holds_are_a_mistake_of_the_rule_that_adds_them() -> None:
    def rule(name: str, count: int) -> str:
        hosts = ", ".join(f'"{name}{number}.test"' for number in range(count))
        return f'[[registry]]\nname = "{name}"\nhosts = [{hosts}]\n'

    assert len(parse(rule("a", MAX_NAMES - 1) + rule("b", 1), "p").rules) == 2
    error = mistake(rule("a", MAX_NAMES - 1) + rule("b", 2))
    assert error.line == 5
    assert "wildcards" in error.advice


def test_text_that_is_not_utf8_names_its_line() -> None:
    error = mistake(b'mode = "enforce"\ncontact = "\xff"\n')
    assert (error.line, error.advice) == (2, "save the file as UTF-8")
    assert mistake('mode = "enforce"'.encode("utf-16")).line == 1


GARBAGE = random.Random(1)  # noqa: S311 - the same garbage in every run


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(GARBAGE.randbytes(10 << 20), id="bytes"),
        pytest.param("".join(GARBAGE.choices(string.printable, k=10 << 20)), id="printable"),
        pytest.param("x" * (10 << 20), id="one-word"),
        pytest.param("a." * (5 << 20), id="dotted-key"),
        pytest.param("[" + "a." * (5 << 20), id="dotted-table"),
        pytest.param("a = " + "[" * (10 << 20), id="brackets"),
        pytest.param("a = '" + "\0" * (10 << 20), id="nulls"),
        pytest.param(f"{'a' * (10 << 20)} = 1", id="long-key"),
    ],
)
def test_ten_megabytes_of_garbage_are_a_mistake_soon(text: str | bytes) -> None:
    started = time.process_time()
    error = mistake(text)
    assert time.process_time() - started < 5
    assert len(str(error)) < 1000
    assert str(error).isprintable()


@given(st.one_of(st.binary(), st.text()))
def test_arbitrary_text_is_a_policy_or_a_mistake(text: str | bytes) -> None:
    error = mistake_or_none(text)
    lines = text.encode().count(b"\n") if isinstance(text, str) else text.count(b"\n")
    assert error is None or 1 <= error.line <= lines + 1


WORDS = st.sampled_from(
    ["organization", "mode", "ports", "presets", "preset", "scope", "registry", "destination", "proxy", "resolvers",
     "name", "hosts", "verify", "registries", "addresses", "address", "trusted", "auto", "dns_over_tls", "refuse",
     "enforce", "strict", "ghcr", "ecr", "account", "region", "*.example.com"]
)  # fmt: skip
SCALARS = st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False), WORDS, st.text(max_size=20))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=12,
)


def toml(value: object) -> str:
    """`value` as TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {toml(item)}' for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"'
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


@given(st.dictionaries(WORDS, VALUES, min_size=1, max_size=6))
def test_any_value_in_any_place_is_understood_or_a_mistake_on_its_line(document: dict[str, object]) -> None:
    text = "".join(f"{key} = {toml(value)}\n" for key, value in document.items() if not key.startswith("*"))
    error = mistake_or_none(text)
    assert error is None or (str(error).isprintable() and error.line <= max(1, len(document)))


@given(
    st.lists(
        st.tuples(
            st.text("abc#'[]{}=, \n", max_size=8), st.sampled_from(['"""{}"""', '"{}"', "'''{}'''", "[[1, 2],\n '{}']"])
        ),
        max_size=8,
    )
)
def test_a_line_is_found_whatever_stands_before_it(before: list[tuple[str, str]]) -> None:
    text = ""
    for number, (content, form) in enumerate(before):
        if form in ('"{}"', "[[1, 2],\n '{}']"):
            content = content.replace("\n", "").replace("'", "")
        if form == "'''{}'''":
            content = content.replace("'", "")
        text += f"key{number} = {form.format(content)} # [x] = '\n"
    line = text.count("\n") + 1
    text += "[table.inner]\n[[array]]\n[[array]]\na.b = [ # one\n 'x',\n [1, { c = 2 }],\n]\n"
    assert line_of(text, ("table", "inner")) == line
    assert line_of(text, ("array", 0)) == line + 1
    assert line_of(text, ("array", 1)) == line + 2
    assert line_of(text, ("array", 1, "a", "b", 0)) == line + 4
    assert line_of(text, ("array", 1, "a", "b", 1, 1, "c")) == line + 5
    assert line_of(text, ("array", 1, "missing")) == line + 2
    assert line_of(text, ("missing",)) == 1


# --- files -----------------------------------------------------------------------------------------------------------
def test_a_file_is_read_and_names_itself_in_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(FULL)
    path.chmod(0o644)
    assert read_policy(path) == parse(FULL, str(path))
    path.write_text("mode = 1")
    with pytest.raises(PolicyError, match=re.escape(f"{path}:1: 1 is not known here; ")):
        read_policy(path)


def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"missing\.toml:1: cannot be read: No such file or directory; "):
        read_policy(tmp_path / "missing.toml")
    with pytest.raises(PolicyError, match=r":1: .* is not a regular file; "):
        read_policy(tmp_path)
    path = tmp_path / "empty.toml"
    path.touch()
    with pytest.raises(PolicyError, match=r"empty\.toml:1: the policy is empty; "):
        read_policy(path)


def test_a_file_without_end_is_read_to_the_limit_only(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="/dev/zero:1: longer than 32 MiB; "):
        read_policy(Path("/dev/zero"), trusting=True)
    path = tmp_path / "sparse.toml"
    path.write_text("mode = 'observe' #")
    with path.open("r+b") as file:
        file.truncate(MAX_POLICY_BYTES)
    with pytest.raises(PolicyError, match="not TOML"):  # a comment may not hold NUL: it was read
        read_policy(path)


def test_a_file_that_others_may_write_is_a_mistake_unless_nobody_enforces_by_it(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(FULL)
    path.chmod(0o666)
    refusal = re.escape(f"{path}:1: {path} can be written by others (mode 0666); chmod go-w {path}")
    with pytest.raises(PolicyError, match=refusal):
        read_policy(path)
    assert read_policy(path, trusting=True) == parse(FULL, str(path))


# --- presets ---------------------------------------------------------------------------------------------------------
VALUES_OF = {"account": ("123456789012",), "region": ("eu-west-1", "us-gov-west-1")}


def test_the_presets_of_the_documentation_ship() -> None:
    assert preset_names() == ("docker-hub", "ecr", "ghcr", "gitlab", "google", "kubernetes", "mcr", "quay")


@pytest.mark.parametrize("name", preset_names())
def test_every_host_of_a_preset_is_valid_and_says_where_it_is_known_from(name: str) -> None:
    preset = load_preset(name)
    assert preset.name == name
    assert preset.description
    assert preset.hosts
    for parameter in preset.parameters:
        assert re.fullmatch(parameter.pattern, parameter.example)
        assert parameter.meaning
    for host in preset.hosts:
        assert host.source.startswith("https://")
        assert date(2025, 1, 1) < host.date < date(2100, 1, 1)
        assert set(re.findall(r"{(\w+)}", host.name)) <= {parameter.name for parameter in preset.parameters}
    patterns = preset.patterns({parameter.name: VALUES_OF[parameter.name] for parameter in preset.parameters})
    assert len(patterns) == len(set(patterns)) >= len(preset.hosts)


def test_what_no_registry_documents_is_marked() -> None:
    notes = {host.name: host.note for host in load_preset("docker-hub").hosts}
    assert notes["production.cloudflare.docker.com"] is Note.LEGACY
    assert notes["registry-1.docker.io"] is None
    assert {host.note for host in load_preset("google").hosts if host.name == "storage.googleapis.com"} == {Note.SHARED}


def test_parameters_are_filled_in_every_combination() -> None:
    (rule,) = (rule for rule in parse(FULL, "p").rules if rule.name == "ecr")
    names = {str(host) for host in rule.hosts}
    for region in ("eu-west-1", "us-east-1"):
        assert f"123456789012.dkr.ecr.{region}.amazonaws.com" in names
        assert f"prod-{region}-starport-layer-bucket.s3.{region}.amazonaws.com" in names
    assert not any("{" in name or "eu-central-1" in name for name in names)


def test_several_accounts_make_rules_of_their_own() -> None:
    entry = "[[preset]]\nname = 'ecr'\naccount = '{}'\nregion = 'eu-west-1'\n"
    rules = parse(entry.format("1" * 12) + entry.format("2" * 12), "p").rules
    assert [rule.name for rule in rules] == ["ecr-111111111111", "ecr-222222222222"]
    error = mistake(entry.format("1" * 12) * 2)
    assert (error.line, "as one" in error.advice) == (6, True)


def test_an_answer_in_a_private_range_teaches_for_the_operators_rules_only() -> None:
    assert {rule.name: rule.private_addresses for rule in parse(FULL, "p").rules} == {
        "docker-hub": False,
        "ghcr": False,
        "ecr": False,
        "corp": True,
        "mirror": True,
        "corp-proxy": True,
    }


# --- matching --------------------------------------------------------------------------------------------------------
# Few letters and labels, so that names often meet patterns.
LABELS = st.text("ab", min_size=1, max_size=2)
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
PATTERNS = st.builds(HostPattern, NAMES, st.booleans())
RULES = st.lists(
    st.builds(
        Rule,
        name=st.just(""),
        kind=st.sampled_from(RuleKind),
        hosts=st.lists(PATTERNS, min_size=1, max_size=6, unique=True).map(tuple),
        ports=st.lists(st.integers(1, 20), min_size=1, max_size=6, unique=True).map(lambda ports: tuple(sorted(ports))),
        verify=st.sampled_from(Verify),
    ),
    max_size=6,
).map(lambda rules: [replace(rule, name=f"rule-{number}") for number, rule in enumerate(rules)])


def covers(pattern: HostPattern, name: str) -> bool:
    """What *.x means, by labels."""
    labels, below = name.split("."), pattern.name.split(".")
    if pattern.wildcard:
        return len(labels) > len(below) and labels[-len(below) :] == below
    return labels == below


@given(PATTERNS, NAMES)
def test_a_wildcard_covers_every_name_below_on_label_boundaries_and_not_itself(pattern: HostPattern, name: str) -> None:
    assert pattern.matches(name) == covers(pattern, name)


def test_a_wildcard_does_not_cover_what_only_ends_alike() -> None:
    pattern = host_pattern("*.example.com")
    assert pattern.matches("a.example.com")
    assert pattern.matches("a.b.example.com")
    for name in ("example.com", "badexample.com", ".example.com", "example.com.evil.test", "a.example.co"):
        assert not pattern.matches(name), name


@given(PATTERNS)
def test_a_pattern_reads_back_from_its_text(pattern: HostPattern) -> None:
    assert host_pattern(str(pattern)) == pattern
    assert host_pattern(str(pattern).upper() + ".") == pattern
    assert pack_name_key(pattern.name, wildcard=pattern.wildcard)


@given(RULES, NAMES)
def test_the_index_finds_what_a_search_through_all_rules_finds(rules: list[Rule], name: str) -> None:
    index = NameIndex(of_rules(*rules))
    found = index.match(name)
    assert sorted(rule.name for rule in found) == [
        rule.name for rule in rules if any(pattern.matches(name) for pattern in rule.hosts)
    ]
    assert index.match(name.upper() + ".") == found
    covering = list(index.covering(name))
    assert {(rule.name, pattern) for rule, pattern in covering} == {
        (rule.name, pattern) for rule in rules for pattern in rule.hosts if pattern.matches(name)
    }
    specificity = [(not pattern.wildcard, len(pattern.name)) for _, pattern in covering]
    assert specificity == sorted(specificity, reverse=True)


@pytest.mark.parametrize("name", ["", ".", "..", ".b", "..b", "b.", "a.", "a..b", "*.b"])
def test_the_index_takes_any_text_for_a_name(name: str) -> None:
    policy = parse('[[registry]]\nname = "a"\nhosts = ["a", "*.b"]', "p")
    expected = any(pattern.matches(name.removesuffix(".")) for pattern in policy.rules[0].hosts)
    assert bool(NameIndex(policy).match(name)) == expected


@given(RULES, NAMES, st.integers(1, 20))
def test_a_verdict_allows_what_some_rule_allows_and_no_proxys_own_name(rules: list[Rule], name: str, port: int) -> None:
    verdict = NameIndex(of_rules(*rules)).judge(name, port)
    covering = [
        rule
        for rule in rules
        if rule.kind is not RuleKind.PROXY and any(pattern.matches(name) for pattern in rule.hosts)
    ]
    allowing = [rule.name for rule in covering if port in rule.ports]
    assert verdict.allowed == bool(allowing)
    if allowing:
        assert (verdict.rule in allowing, verdict.reason) == (True, Reason.LISTED_NAME)
    else:
        assert verdict.reason is (Reason.UNLISTED_PORT if covering else Reason.UNLISTED_NAME)
        assert (verdict.rule is None) == (not covering)


@given(RULES, NAMES)
def test_the_longest_pattern_alone_permits_what_all_rules_permit_and_no_more(rules: list[Rule], name: str) -> None:
    permissions = list(name_permissions(of_rules(*rules)))
    assert len({permission.pattern for permission in permissions}) == len(permissions)
    matching = [permission for permission in permissions if permission.pattern.matches(name)]
    covering = [rule for rule in rules if any(pattern.matches(name) for pattern in rule.hosts)]
    assert bool(matching) == bool(covering)
    if not matching:
        return
    longest = max(matching, key=lambda found: (not found.pattern.wildcard, len(found.pattern.name)))  # as the trie does
    assert sorted(longest.rules) == [rule.name for rule in covering]
    ports = sorted({port for rule in covering for port in rule.ports})
    assert list(longest.ports) == ports[:MAX_PORTS_PER_NAME]
    assert longest.private_addresses == all(rule.kind is not RuleKind.PRESET for rule in covering)

    def ports_of(*chosen: Rule) -> set[int]:
        return {port for rule in chosen for port in rule.ports} & set(longest.ports)

    proxies = [rule for rule in covering if rule.kind is RuleKind.PROXY]
    assert longest.proxy_ports == ports_of(*proxies)
    assert longest.named_ports == ports_of(*(rule for rule in covering if rule not in proxies))
    assert longest.address_ports == ports_of(*(rule for rule in covering if rule.verify is Verify.ADDRESS))
    assert longest.proxy_ports | longest.named_ports == set(longest.ports)
    assert (longest.proxy, longest.verify_address) == (bool(longest.proxy_ports), bool(longest.address_ports))


def test_a_proxy_below_a_registrys_wildcard_keeps_its_ports_apart() -> None:
    policy = parse(
        '[[registry]]\nname = "corp"\nhosts = ["*.corp.example"]\nverify = "address"\n'
        '[[proxy]]\nname = "proxy"\nhosts = ["proxy.corp.example"]\nports = [3128]\n',
        "p",
    )
    by_name = {str(permission.pattern): permission for permission in name_permissions(policy)}
    proxy, other = by_name["proxy.corp.example"], by_name["*.corp.example"]
    assert (proxy.ports, other.ports) == ((443, 3128), (443,))
    assert [sorted(ports) for ports in (proxy.named_ports, proxy.address_ports, proxy.proxy_ports)] == [
        [443],
        [443],
        [3128],
    ]
    assert [sorted(ports) for ports in (other.named_ports, other.address_ports, other.proxy_ports)] == [
        [443],
        [443],
        [],
    ]
    index = NameIndex(policy)
    assert index.judge("proxy.corp.example", 443).allowed
    assert index.judge("proxy.corp.example", 3128) == Verdict("corp", Reason.UNLISTED_PORT)
    proxy_alone = NameIndex(of_rules(*(rule for rule in policy.rules if rule.kind is RuleKind.PROXY)))
    for port in (443, 3128):
        assert proxy_alone.judge("proxy.corp.example", port) == Verdict(None, Reason.UNLISTED_NAME)


def test_a_pattern_keeps_its_number_across_runs() -> None:
    assert pattern_id(HostPattern("example.com", False)) == 0x13C51305C1CF2666
    assert pattern_id(HostPattern("example.com", True)) == 0x4AB6D24A0754B9C0


def test_a_hundred_thousand_names_are_parsed_and_indexed_in_three_seconds() -> None:
    names = [f"host-{number}.region-{number % 100}.registry.example.com" for number in range(100_000)]
    hosts = "".join(f'  "{name}",\n' for name in names)
    text = (
        f'[[registry]]\nname = "corp"\nhosts = [\n{hosts}]\n[[destination]]\nname = "all"\nhosts = ["*.example.com"]\n'
    )
    started = time.process_time()
    policy = parse(text, "p")
    index = NameIndex(policy)
    permissions = list(name_permissions(policy))
    assert time.process_time() - started < 3
    assert len(permissions) == 100_001
    assert {permission.ports for permission in permissions} == {(443, 5000)}
    started = time.process_time()
    assert all(len(index.match(name)) == 2 for name in names)
    assert time.process_time() - started < 2
