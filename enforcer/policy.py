"""The organization's policy: TOML text in, frozen values out.

Parsed once: whoever holds a `Policy` never checks it again. An operator's mistake is a `PolicyError` that names the
file, the line, what is wrong and what to write instead.

    organization = "Example Corp"           # shown to whoever is refused, as is the contact
    contact = "platform@example.com"
    mode = "enforce"                        # or "observe": count and log, refuse nothing
    ports = [443, 5000]                     # registry ports
    presets = ["docker-hub", "ghcr"]        # host lists that ship with the program
    [[preset]]                              # the same for one that has parameters, each a string or a list of them
    name = "ecr"
    account = "123456789012"
    region = ["eu-west-1", "us-east-1"]
    [scope]                                 # "strict": unlisted destinations on registry ports are refused;
    containers = "strict"                   # "registries": only what is recognised as a registry is; or "off"
    engines = "strict"
    host = "registries"                     # "strict" unless written otherwise where the host is WSL 2
    [[registry]]
    name = "corp"
    hosts = ["registry.corp.example", "*.blobs.corp.example"]
    ports = [443, 8443]                     # default [443]
    addresses = ["10.20.0.0/16"]            # reachable without a DNS answer; hosts or addresses, or both
    verify = "name"                         # clients must name a host of a rule (SNI, Host) where a name led them;
                                            # "address": for clients that send no SNI, they may say what they like
    [[destination]]                         # not a registry, yet reachable on registry ports; verify as above
    name = "mirror"
    hosts = ["packages.corp.example"]       # ports: by default the registry ports
    [[proxy]]                               # a forward proxy: reachable, and what it is asked for must be allowed
    name = "corp-proxy"
    hosts = ["proxy.corp.example"]          # hosts or addresses, or both
    ports = [3128]                          # no default
    [resolvers]
    trusted = ["auto"]                      # "auto": whatever this host uses; or addresses
    dns_over_tls = "allow"                  # "refuse": containers reach port 853 of listed destinations only
    [refusal]
    message = "{organization} does not allow {name}; ask {contact} and give reference {reference}"
    ca = { certificate = "/etc/registry-enforcer/ca.crt", key = "/etc/registry-enforcer/ca.key" }  # says it over TLS
    [audit]
    file = "/var/log/registry-enforcer/audit.jsonl"  # beside standard output
    [mark]
    mask = 0xE0000000                       # the three bits of packet marks that nobody else on this host uses
    [limits]
    learned_addresses = 262144              # then the least recently used makes room

Everything is optional, and what is not allowed is refused: a policy without rules refuses every registry.
"""
# No validation library: msgspec and pydantic would check the shapes, a third of this, and word the messages themselves.

from __future__ import annotations

import difflib
import enum
import functools
import hashlib
import importlib.resources
import itertools
import re
import string
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import TypeVar

import idna

from enforcer import trusted_files
from enforcer.kernel_abi import (
    DEFAULT_MARKS,
    MARK_BITS,
    MAX_LEARNED,
    MAX_LISTED,
    MAX_NAMES,
    MAX_PORTS_PER_NAME,
    MAX_RESOLVERS,
    Marks,
)
from enforcer.toml_lines import line_of

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Mode(enum.Enum):
    """What happens to a connection without permission."""

    ENFORCE = "enforce"  # counted, logged, refused
    OBSERVE = "observe"  # counted, logged, let through


class Level(enum.Enum):
    """How much of one scope's traffic the policy judges; from the strictest to the most lenient."""

    STRICT = "strict"  # any unlisted destination on a registry port is refused
    REGISTRIES = "registries"  # only what is recognised as a registry that no rule lists: honest clients are told
    OFF = "off"  # not judged


class DnsOverTls(enum.Enum):
    """What becomes of DNS over TLS and QUIC (RFC 7858, RFC 9250), from containers to servers that no rule lists."""

    ALLOW = "allow"
    REFUSE = "refuse"


class RuleKind(enum.Enum):
    """Where a rule comes from; it decides which ports are its default, whether private addresses count, and what its
    names permit."""

    REGISTRY = "registry"  # the operator's own [[registry]]
    PRESET = "preset"  # a host list that ships with the program
    DESTINATION = "destination"  # not a registry, yet reachable on registry ports
    PROXY = "proxy"  # a forward proxy: reachable, while its own name permits nothing that clients may ask for


class Verify(enum.Enum):
    """What a client has to say on a TCP connection to an address that a rule's names opened."""

    NAME = "name"  # its first bytes name an allowed host, by SNI or Host: a shared address opens allowed names only
    ADDRESS = "address"  # whatever it likes, nothing included: a shared address opens every name behind it


@dataclass(frozen=True, slots=True)
class HostPattern:
    """One entry of `hosts`: an exact name, or every name below one.

    `name` is lower case, in A-label form, without a trailing dot; for a wildcard it is what follows "*.".
    """

    name: str
    wildcard: bool

    def __str__(self) -> str:
        return f"*.{self.name}" if self.wildcard else self.name

    def matches(self, name: str) -> bool:
        """Whether `name` (lower case, no trailing dot) is this name, or below it on a label boundary."""
        return name.endswith("." + self.name) and len(name) > len(self.name) + 1 if self.wildcard else name == self.name


@dataclass(frozen=True, slots=True)
class Rule:
    """One permission: these names, and these addresses, on these ports."""

    name: str  # unique in the policy; a metric label and the name in every explanation
    kind: RuleKind
    hosts: tuple[HostPattern, ...]
    ports: tuple[int, ...]  # ascending, distinct; never empty
    # Reachable without a DNS answer. No name led there, so none is asked for, and UDP may go there (not to a proxy).
    addresses: tuple[Network, ...] = ()
    verify: Verify = Verify.NAME  # of a proxy always NAME, and then of what the proxy is asked for

    @property
    def private_addresses(self) -> bool:
        """Whether an answer in a private range may teach: only for names the operator wrote, never for presets."""
        return self.kind is not RuleKind.PRESET


@dataclass(frozen=True, slots=True)
class Scope:
    """Which traffic of this host is judged."""

    containers: Level  # forwarded traffic, other network namespaces, container cgroups
    engines: Level  # programs that pull images; for them every TCP port but DNS counts
    host: Level  # everything else on the host

    @property
    def strictest(self) -> Level:
        """What holds for traffic whose scope is not known."""
        levels = (self.containers, self.engines, self.host)
        return next(level for level in Level if level in levels)  # Level is in this order


@dataclass(frozen=True, slots=True)
class Resolvers:
    """Who may teach addresses."""

    auto: bool  # whatever this host uses, followed as it changes
    addresses: tuple[Address, ...]  # and these
    dns_over_tls: DnsOverTls = DnsOverTls.ALLOW


@dataclass(frozen=True, slots=True)
class AuthorityFiles:
    """Where the CA is that hosts trust and refusals over TLS are signed by; nobody has read the files yet."""

    certificate: str  # absolute path of a PEM file, as is the key's
    key: str
    line: int  # of the policy, for whoever finds that the files are wrong; 1-based


@dataclass(frozen=True, slots=True)
class RefusalText:
    """What refused clients are told."""

    message: str | None = None  # a str.format template over REFUSAL_PLACEHOLDERS; None: the program's own words
    ca: AuthorityFiles | None = None  # None: TLS clients get an alert, which has no words


@dataclass(frozen=True, slots=True)
class Policy:
    """The whole policy, as it is enforced."""

    organization: str
    contact: str
    mode: Mode
    ports: tuple[int, ...]  # registry ports, ascending, distinct; never empty
    scope: Scope
    rules: tuple[Rule, ...]
    resolvers: Resolvers
    source: str  # the file's path, or "the built-in default"
    digest: str  # SHA-256 of the text, hex
    refusal: RefusalText = RefusalText()
    audit_file: Path | None = None  # beside standard output
    marks: Marks = DEFAULT_MARKS
    learned_addresses: int = MAX_LEARNED  # how many are held at most; above the least recently used one goes
    mark_line: int = 1  # of mark.mask, for whoever finds that it cannot be had; 1-based

    @property
    def proxy_addresses(self) -> Iterator[tuple[Network, int]]:
        """Every listed (network, port) at which a forward proxy answers."""
        for rule in self.rules:
            if rule.kind is RuleKind.PROXY:
                yield from itertools.product(rule.addresses, rule.ports)

    @property
    def container_ports(self) -> tuple[int, ...]:
        """Where connections of containers are judged; ascending, distinct."""
        if self.resolvers.dns_over_tls is DnsOverTls.ALLOW:
            return self.ports
        return tuple(sorted({*self.ports, DNS_OVER_TLS_PORT}))


class Reason(enum.Enum):
    """Why something is permitted or refused: one vocabulary for audit, metrics, explain and the documentation."""

    LISTED_NAME = "listed-name"  # a rule has the name, on this port
    LISTED_ADDRESS = "listed-address"  # a rule's `addresses` hold it, on this port
    LEARNED_ADDRESS = "learned-address"  # a trusted resolver gave it for a listed name
    NOT_JUDGED = "not-judged"  # not a registry port, or every scope is off
    UNLISTED_NAME = "unlisted-name"
    UNLISTED_ADDRESS = "unlisted-address"  # no rule lists it, and no trusted answer for a listed name held it
    UNLISTED_PORT = "unlisted-port"  # a rule has the name or address, on other ports
    UNNAMED = "unnamed"  # the address was opened by a name, and the client asked for none there, or hid it

    @property
    def allows(self) -> bool:
        """Whether it is a reason to let a connection through."""
        return self in (Reason.LISTED_NAME, Reason.LISTED_ADDRESS, Reason.LEARNED_ADDRESS, Reason.NOT_JUDGED)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the policy says to one destination."""

    rule: str | None  # the name of the rule that decides; None: no rule knows the destination
    reason: Reason

    @property
    def allowed(self) -> bool:
        """Whether a connection is let through in mode "enforce"."""
        return self.reason.allows


class PolicyError(Exception):
    """A policy that cannot be used; str() is `FILE:LINE: what is wrong; what to write instead`."""

    def __init__(self, source: str, line: int, problem: str, advice: str) -> None:
        super().__init__(f"{source}:{line}: {problem}; {advice}")
        self.source = source
        self.line = line  # 1-based
        self.problem = problem
        self.advice = advice


# --- parsing ---------------------------------------------------------------------------------------------------------
MAX_POLICY_BYTES = 32 << 20  # MAX_NAMES of the longest names
MAX_TEXT_CHARACTERS = 200  # of organization and contact: they go into every refusal
MAX_MESSAGE_CHARACTERS = 500
LEARNED_ADDRESSES = MAX_LEARNED  # more the guard could not know of
MIN_LEARNED_ADDRESSES = 1_024
REFUSAL_PLACEHOLDERS = ("name", "address", "port", "organization", "contact", "reference")
REGISTRY_PORTS: tuple[int, ...] = (443, 5000)
RULE_PORTS: tuple[int, ...] = (443,)
DNS_OVER_TLS_PORT = 853

_DEFAULT = 'presets = ["docker-hub"]\n'
_TOP_KEYS = ("organization", "contact", "mode", "ports", "presets", "preset", "scope", "registry", "destination",
             "proxy", "resolvers", "refusal", "audit", "mark", "limits")  # fmt: skip
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
# Underscores are no host name's (RFC 952), but occur in DNS names that engines do ask for.
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_RULE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
# tomllib joins the parts of a dotted key in quadratic time: a megabyte of "a.a.a." would take hours.
_ENDLESS_KEY = re.compile(r"^[ \t\[]*(?:[A-Za-z0-9_-]+[ \t]*\.[ \t]*){32}", re.MULTILINE)
_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")

Table = dict[str, object]
T = TypeVar("T")
E = TypeVar("E", bound=enum.Enum)


def parse(text: str | bytes, source: str, *, wsl: bool = False) -> Policy:
    """The policy that `text` holds; `source` names it in errors, `wsl` decides the default of scope.host.

    Raises PolicyError, and nothing else whatever the text is.
    """
    wire = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")  # Windows editors put a byte order mark first
        except UnicodeDecodeError as error:
            line = wire.count(b"\n", 0, error.start) + 1
            raise PolicyError(source, line, "this is not UTF-8 text", "save the file as UTF-8") from None
    document = _toml(text, source)
    try:
        policy = _policy(document, source, hashlib.sha256(wire).hexdigest(), wsl)
        if policy.marks != DEFAULT_MARKS:
            policy = replace(policy, mark_line=line_of(text, ("mark", "mask")))
        if policy.refusal.ca is None:
            return policy
        ca = replace(policy.refusal.ca, line=line_of(text, ("refusal", "ca")))
        return replace(policy, refusal=replace(policy.refusal, ca=ca))
    except _UnplacedError as error:
        raise PolicyError(source, line_of(text, error.path), error.problem, error.advice) from None


def default_policy(*, wsl: bool = False) -> Policy:
    """What is enforced without a policy file: Docker Hub alone."""
    return parse(_DEFAULT, "the built-in default", wsl=wsl)


def read_policy(path: Path, *, wsl: bool = False, trusting: bool = False) -> Policy:
    """Parse a policy file that nobody could have written but root or who runs this; PolicyError as `parse`.

    `trusting`: whoever wrote it.
    """
    try:
        text = trusted_files.read(path, MAX_POLICY_BYTES + 1, trusting=trusting)
    except trusted_files.UntrustedError as error:
        raise PolicyError(str(path), 1, error.problem, error.advice) from None
    except OSError as error:
        raise PolicyError(
            str(path), 1, f"cannot be read: {error.strerror or error}", "name a TOML file that this user may read"
        ) from None
    if len(text) > MAX_POLICY_BYTES:
        raise PolicyError(
            str(path), 1, f"longer than {MAX_POLICY_BYTES >> 20} MiB", f"list at most {MAX_NAMES} names, once each"
        )
    return parse(text, str(path), wsl=wsl)


def host_pattern(text: str) -> HostPattern:
    """One entry of `hosts`: a name in any case, Unicode or A-labels, or "*." and a name.

    ValueError "what is wrong; what to write instead". UTS 46 (non-transitional) for Unicode, RFC 1035 for lengths.
    """
    wildcard = text.startswith("*.")
    name = text[2:] if wildcard else text
    if not name.isascii() and len(name) <= 1024:
        try:
            name = idna.encode(name, uts46=True).decode("ascii")
        except UnicodeError as error:
            raise _UnplacedError(
                f"{_shown(text)} is not a host name ({error})", "write the name as DNS has it"
            ) from None
    name = name.lower().removesuffix(".")
    if not _NAME.fullmatch(name) or len(name) > 253 or name.rpartition(".")[2].isdigit():
        raise _host_mistake(text, name, "*." if wildcard else "")
    return HostPattern(name, wildcard)


class _UnplacedError(ValueError):
    """A PolicyError whose place is not known yet: `path` grows outwards while it rises."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}; {advice}")
        self.problem = problem
        self.advice = advice
        self.path: tuple[str | int, ...] = ()

    def inside(self, *place: str | int) -> _UnplacedError:
        """The same, seen from outside `place`."""
        self.path = place + self.path
        return self


def _shown(value: object) -> str:
    """A value as messages quote it: short, printable, strings in double quotes."""
    if isinstance(value, str):
        text = f'"{repr(value)[1:-1]}"'
    else:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-10:]}"


def _toml(text: str, source: str) -> Table:
    endless = _ENDLESS_KEY.search(text)
    if endless:
        line = text.count("\n", 0, endless.start()) + 1
        raise PolicyError(source, line, "a key without end", 'write key = value, with strings in "double quotes"')
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise PolicyError(source, 1, "lists nested without end", "write lists of strings or numbers") from None
    except ValueError as error:  # TOMLDecodeError, and a plain one for a number of thousands of digits
        place = _PLACE.search(str(error))
        line = int(place[1]) if place and place[1] else text.rstrip("\n").count("\n") + 1
        problem = str(error)[: place.start()] if place else "not a number that fits"
        if "overwrite" in problem or "twice" in problem:
            advice = "write each key and each [table] once"
        else:
            advice = 'write key = value, with strings in "double quotes" and lists in [brackets]'
        raise PolicyError(source, line, f"not TOML: {problem}", advice) from None
    if not document:
        raise PolicyError(
            source, 1, "the policy is empty", f"write at least {_DEFAULT.strip()}, or remove the file to get just that"
        )
    return document


def _policy(document: Table, source: str, digest: str, wsl: bool) -> Policy:
    table = _table(document, *_TOP_KEYS)
    ports = _read(table, "ports", _ports, REGISTRY_PORTS)
    read_scope = functools.partial(_scope, host_default=Level.STRICT if wsl else Level.REGISTRIES)
    scope = _read(table, "scope", read_scope, read_scope({}))
    return Policy(
        organization=_read(table, "organization", _sentence, "your organization"),
        contact=_read(table, "contact", _sentence, "your administrator"),
        mode=_read(table, "mode", _choice(Mode), Mode.ENFORCE),
        ports=ports,
        scope=scope,
        rules=_rules(table, ports),
        resolvers=_read(table, "resolvers", functools.partial(_resolvers, scope=scope), Resolvers(True, ())),
        source=source,
        digest=digest,
        refusal=_read(table, "refusal", _refusal, RefusalText()),
        audit_file=_read(table, "audit", _audit_file, None),
        marks=_read(table, "mark", _mark, DEFAULT_MARKS),
        learned_addresses=_read(table, "limits", _limits, LEARNED_ADDRESSES),
    )


def _table(value: object, *keys: str) -> Table:
    """A table without any other key; closed, because a misspelt key would silently mean its default."""
    if not isinstance(value, dict):
        raise _UnplacedError(f"{_shown(value)} is not a table", f"write a table with {_either(keys)}")
    for key in value:
        if key not in keys:
            raise _UnplacedError(f"unknown key {_shown(key)}", f"write {_nearest(key, keys)}").inside(key)
    return value


def _read(table: Table, key: str, reader: Callable[[object], T], default: T) -> T:
    """What `reader` makes of a key's value, or `default` without the key."""
    if key not in table:
        return default
    try:
        return reader(table[key])
    except _UnplacedError as error:
        error.inside(key)
        raise


def _require(table: Table, key: str, reader: Callable[[object], T], example: str) -> T:
    if key not in table:
        raise _UnplacedError(f"{key} is missing", f"add {key} = {example}")
    try:
        return reader(table[key])
    except _UnplacedError as error:
        error.inside(key)
        raise


def _items(value: object, reader: Callable[[object], T], example: str) -> list[T]:
    """What `reader` makes of each item of a list."""
    if not isinstance(value, list):
        raise _UnplacedError(f"{_shown(value)} is not a list", f"write {example}")
    items: list[T] = []
    try:
        for item in value:
            items.append(reader(item))  # noqa: PERF401 - its length is the place of a mistake
    except _UnplacedError as error:
        error.inside(len(items))
        raise
    return items


def _list(table: Table, key: str, reader: Callable[[object], T], example: str) -> list[T]:
    """The items of a list that need not be there."""
    return _read(table, key, lambda value: _items(value, reader, example), [])


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise _UnplacedError(f"{_shown(value)} is not a string", 'write it in "double quotes"')
    return value


def _sentence(value: object, max_characters: int = MAX_TEXT_CHARACTERS) -> str:
    text = _string(value)
    # Printable: it goes into terminals, HTTP headers and log lines of others.
    if not text.strip() or not text.isprintable() or len(text) > max_characters:
        raise _UnplacedError(
            f"{_shown(text)} cannot be shown to users",
            f"write 1 to {max_characters} characters in one line, without control characters",
        )
    return text.strip()


def _choice(choices: type[E]) -> Callable[[object], E]:
    values = {member.value: member for member in choices}

    def reader(value: object) -> E:
        if not isinstance(value, str) or value not in values:
            raise _UnplacedError(
                f"{_shown(value)} is not known here", f"write {_either(_shown(known) for known in values)}"
            )
        return values[value]

    return reader


def _ports(value: object) -> tuple[int, ...]:
    ports = tuple(sorted(set(_items(value, _port, "ports = [443]"))))
    if not 1 <= len(ports) <= MAX_PORTS_PER_NAME:
        raise _UnplacedError(f"{len(ports)} ports", f"write 1 to {MAX_PORTS_PER_NAME} ports, such as [443]")
    return ports


def _port(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
        raise _UnplacedError(f"{_shown(value)} is not a port", "write a number from 1 to 65535 without quotes")
    return value


def _host(value: object) -> HostPattern:
    return host_pattern(_string(value))


def _network(value: object) -> Network:
    text = _string(value)
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise _UnplacedError(
            f"{_shown(text)} is not an address or a network", 'write "10.20.0.0/16", "10.20.1.2" or "2001:db8::/32"'
        ) from None
    if network.prefixlen == 0:
        raise _UnplacedError(
            f"{_shown(text)} permits every address",
            'name the networks that you need, or set mode = "observe" to refuse nothing',
        )
    if "/" in text and ip_address(text.partition("/")[0]) != network.network_address:
        raise _UnplacedError(
            f"{_shown(text)} has bits set behind its prefix",
            f'write "{network}" for the network or "{text.partition("/")[0]}" for the address',
        )
    if isinstance(network, IPv6Network) and (network.network_address.ipv4_mapped or "%" in text):
        raise _UnplacedError(f"{_shown(text)} never occurs in a packet", "write the plain IPv4 or IPv6 form")
    return network


def _scope(value: object, host_default: Level) -> Scope:
    table = _table(value, "containers", "engines", "host")
    return Scope(
        containers=_read(table, "containers", _choice(Level), Level.STRICT),
        engines=_read(table, "engines", _choice(Level), Level.STRICT),
        host=_read(table, "host", _choice(Level), host_default),
    )


def _resolvers(value: object, scope: Scope) -> Resolvers:
    table = _table(value, "trusted", "dns_over_tls")
    dns_over_tls = _read(table, "dns_over_tls", _choice(DnsOverTls), DnsOverTls.ALLOW)
    if dns_over_tls is DnsOverTls.REFUSE and scope.containers is Level.OFF:
        raise _UnplacedError(
            'dns_over_tls = "refuse" is for containers, and their scope is off',
            'write containers = "strict" under [scope], or remove this line',
        ).inside("dns_over_tls")
    trusted = _read(table, "trusted", _trusted, Resolvers(auto=True, addresses=()))
    return replace(trusted, dns_over_tls=dns_over_tls)


def _trusted(value: object) -> Resolvers:
    trusted = list(dict.fromkeys(_items(value, _resolver, 'trusted = ["auto"]')))
    addresses = tuple(address for address in trusted if address is not None)
    if not 1 <= len(trusted) <= MAX_RESOLVERS:
        raise _UnplacedError(
            f"{len(trusted)} resolvers", f'write 1 to {MAX_RESOLVERS}, or ["auto"] for what this host uses'
        )
    return Resolvers(auto=None in trusted, addresses=addresses)


def _resolver(value: object) -> Address | None:
    """None: "auto"."""
    text = _string(value)
    if text == "auto":
        return None
    try:
        address = ip_address(text)
    except ValueError:
        raise _UnplacedError(
            f"{_shown(text)} is not a resolver", 'write "auto", or an address such as "10.0.0.53"'
        ) from None
    if address.is_multicast or address.is_unspecified:
        raise _UnplacedError(f"{_shown(text)} is no host's address", 'write "auto", or an address such as "10.0.0.53"')
    return address


def _refusal(value: object) -> RefusalText:
    table = _table(value, "message", "ca")
    return RefusalText(message=_read(table, "message", _message, None), ca=_read(table, "ca", _authority_files, None))


def _message(value: object) -> str:
    template = _sentence(value, MAX_MESSAGE_CHARACTERS)
    known = _either(f"{{{name}}}" for name in REFUSAL_PLACEHOLDERS)
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError:
        raise _UnplacedError(
            f"{_shown(template)} has a brace without its other half", f"write {known}, and {{{{ for a brace itself"
        ) from None
    for _, name, form, conversion in fields:
        if name is not None and (name not in REFUSAL_PLACEHOLDERS or form or conversion):
            wrong = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise _UnplacedError(f"{_shown(f'{{{wrong}}}')} is no placeholder", f"write {known}")
    return template


def _authority_files(value: object) -> AuthorityFiles:
    table = _table(value, "certificate", "key")
    return AuthorityFiles(
        certificate=_require(table, "certificate", _absolute_path, '"/etc/registry-enforcer/ca.crt"'),
        key=_require(table, "key", _absolute_path, '"/etc/registry-enforcer/ca.key"'),
        line=1,
    )


def _audit_file(value: object) -> Path | None:
    path = _read(_table(value, "file"), "file", _absolute_path, None)
    return None if path is None else Path(path)


def _mark(value: object) -> Marks:
    return _read(_table(value, "mask"), "mask", _mask, DEFAULT_MARKS)


def _limits(value: object) -> int:
    table = _table(value, "learned_addresses")
    return _read(table, "learned_addresses", _learned_addresses, LEARNED_ADDRESSES)


def _learned_addresses(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _UnplacedError(
            f"{_shown(value)} is not a number", f"write it without quotes, such as {LEARNED_ADDRESSES}"
        )
    if not MIN_LEARNED_ADDRESSES <= value <= LEARNED_ADDRESSES:
        raise _UnplacedError(
            f"{_shown(value)} learned addresses", f"write {MIN_LEARNED_ADDRESSES} to {LEARNED_ADDRESSES}, the default"
        )
    return value


def _mask(value: object) -> Marks:
    example = f"such as {DEFAULT_MARKS.mask:#010x}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise _UnplacedError(f"{_shown(value)} is not a number", f"write the mask without quotes, {example}")
    try:
        return Marks(value)
    except ValueError:
        raise _UnplacedError(
            f"{value:#x} is not a mask of {MARK_BITS} bits",
            f"write one with {MARK_BITS} of 32 bits set that nobody else uses, {example}",
        ) from None


def _absolute_path(value: object) -> str:
    path = _string(value)
    if not path.startswith("/") or not path.isprintable():
        raise _UnplacedError(f"{_shown(path)} is not an absolute path", 'write "/etc/registry-enforcer/ca.crt"')
    return path


def _rules(table: Table, registry_ports: tuple[int, ...]) -> tuple[Rule, ...]:
    placed: list[tuple[Rule, tuple[str | int, ...]]] = list(_preset_rules(table))
    readers: tuple[tuple[str, Callable[[object], Rule]], ...] = (
        ("registry", functools.partial(_rule, kind=RuleKind.REGISTRY, default_ports=RULE_PORTS)),
        ("destination", functools.partial(_rule, kind=RuleKind.DESTINATION, default_ports=registry_ports)),
        ("proxy", _proxy),
    )
    for key, reader in readers:
        rules = _list(table, key, reader, f"[[{key}]]")
        placed += [(rule, (key, position, "name")) for position, rule in enumerate(rules)]
    names: set[str] = set()
    patterns: set[HostPattern] = set()
    listed = 0
    for rule, place in placed:
        if rule.name in names:
            raise _UnplacedError(
                f"a second rule is called {_shown(rule.name)}", "give each its own name, or write them as one"
            ).inside(*place)
        names.add(rule.name)
        patterns.update(rule.hosts)
        if len(patterns) > MAX_NAMES:
            too_many = _UnplacedError(f"more than {MAX_NAMES} host names", 'write wildcards, such as "*.corp.example"')
            raise too_many.inside(*place)
        listed += len(rule.addresses) * len(rule.ports)
        if listed > MAX_LISTED:
            raise _UnplacedError(
                f"more than {MAX_LISTED} pairs of an address and a port", 'write networks, such as "10.20.0.0/16"'
            ).inside(*place)
    return tuple(rule for rule, _ in placed)


def _rule(value: object, kind: RuleKind, default_ports: tuple[int, ...]) -> Rule:
    table = _table(value, "name", "hosts", "ports", "addresses", "verify")
    rule = Rule(
        name=_require(table, "name", _rule_name, '"corp"'),
        kind=kind,
        hosts=_hosts(table, "registry.example.com"),
        ports=_read(table, "ports", _ports, default_ports),
        addresses=_addresses(table, "10.20.0.0/16"),
        verify=_read(table, "verify", _choice(Verify), Verify.NAME),
    )
    if not rule.hosts and not rule.addresses:
        raise _UnplacedError(f"{_shown(rule.name)} permits nothing", 'add hosts = ["registry.example.com"]')
    if not rule.hosts and "verify" in table:
        raise _UnplacedError(
            "verify says nothing without hosts", "remove it: at listed addresses clients may name any host"
        ).inside("verify")
    return rule


def _proxy(value: object) -> Rule:
    # No verify: whoever may ask a proxy for anything may reach everything.
    table = _table(value, "name", "hosts", "ports", "addresses")
    rule = Rule(
        name=_require(table, "name", _rule_name, '"corp-proxy"'),
        kind=RuleKind.PROXY,
        hosts=_hosts(table, "proxy.example.com"),
        ports=_require(table, "ports", _ports, "[3128]"),
        addresses=_addresses(table, "10.20.0.7"),
    )
    if not rule.hosts and not rule.addresses:
        raise _UnplacedError(f"{_shown(rule.name)} is nowhere", 'add hosts = ["proxy.example.com"]')
    return rule


def _hosts(table: Table, example: str) -> tuple[HostPattern, ...]:
    return tuple(dict.fromkeys(_list(table, "hosts", _host, f'hosts = ["{example}"]')))


def _addresses(table: Table, example: str) -> tuple[Network, ...]:
    return tuple(dict.fromkeys(_list(table, "addresses", _network, f'addresses = ["{example}"]')))


def _rule_name(value: object) -> str:
    name = _string(value)
    if not _RULE_NAME.fullmatch(name):
        raise _UnplacedError(
            f"{_shown(name)} is not a rule's name", "write up to 63 letters, digits, dots, hyphens and underscores"
        )
    return name


def _host_mistake(text: str, name: str, star: str) -> _UnplacedError:
    """Why `text` is no host name; `name` is its normalized form without the wildcard `star`."""
    shown = _shown(text)
    if "*" in name or (star and not name):
        return _UnplacedError(
            f"{shown} is not a wildcard", 'write "*.example.com" for every name below example.com, or each name in full'
        )
    bare = re.sub(r"^[a-z][a-z0-9+.-]*://(?:[^/@]*@)?", "", name)
    for address in (bare, bare.partition("/")[0], bare.rpartition(":")[0]):
        try:
            network = ip_network(address.strip("[]"), strict=False)
        except ValueError:
            continue
        written = str(network) if "/" in address else str(network.network_address)
        return _UnplacedError(f"{shown} is an address, not a host name", f'write addresses = ["{written}"]')
    host, _, port = bare.partition("/")[0].partition(":")
    if _NAME.fullmatch(host) and host != name:
        kind = "a URL" if "://" in name else "a host with a path" if "/" in name else "a host with a port"
        ports = f", and ports = [{port}]" if port.isdecimal() else ""
        return _UnplacedError(f"{shown} is {kind}", f'write only the host: "{star}{host}"{ports}')
    if _NAME.fullmatch(name.removeprefix(".")) and name.startswith("."):
        return _UnplacedError(f"{shown} begins with a dot", f'write "*{name}" for every name below it')
    if len(name) > 253 or any(len(label) > 63 for label in name.split(".")):
        return _UnplacedError(f"{shown} is too long", "write at most 63 characters between dots and 253 in all")
    return _UnplacedError(f"{shown} is not a host name", 'write it as DNS has it: "registry.example.com"')


def _nearest(wrong: str, known: Iterable[str]) -> str:
    """The one `known` word that `wrong` may be meant for, or all of them."""
    known = list(known)
    return (difflib.get_close_matches(wrong[:64], known, 1) or [_either(known)])[0]


def _either(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


# --- presets ---------------------------------------------------------------------------------------------------------
class Note(enum.Enum):
    """What a reader should know before trusting a preset's host."""

    LEGACY = "legacy"  # the registry no longer documents it, yet may redirect there
    UNVERIFIED = "unverified"  # no document of the registry names it
    SHARED = "shared"  # serves other people's content too: permitting it permits more than this registry


@dataclass(frozen=True, slots=True)
class PresetHost:
    """One host of a preset and where that is known from."""

    name: str  # an entry of `hosts`, possibly with {parameter} in it
    source: str  # URL
    date: date  # when the source said so, or was last read
    note: Note | None  # None: nothing to know


@dataclass(frozen=True, slots=True)
class Parameter:
    """A part of a preset's names that the operator fills in."""

    name: str
    meaning: str
    pattern: str  # regular expression for the whole value
    example: str


@dataclass(frozen=True, slots=True)
class Preset:
    """A host list that ships with the program: enforcer/presets/NAME.toml."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    hosts: tuple[PresetHost, ...]

    def patterns(self, values: Mapping[str, tuple[str, ...]]) -> tuple[HostPattern, ...]:
        """The hosts with each combination of the parameters' values, which are valid."""
        combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
        names = (host.name.format_map(combination) for host in self.hosts for combination in combinations)
        return tuple(host_pattern(name) for name in dict.fromkeys(names))


@functools.cache
def preset_names() -> tuple[str, ...]:
    """The presets that ship with the program, sorted."""
    files = importlib.resources.files("enforcer") / "presets"
    return tuple(sorted(file.name.removesuffix(".toml") for file in files.iterdir() if file.name.endswith(".toml")))


@functools.cache
def load_preset(name: str) -> Preset:
    """One of preset_names(). The files are the program's own: a fault in one is not caught here but by a test."""
    text = (importlib.resources.files("enforcer") / "presets" / f"{name}.toml").read_text("utf-8")
    document = tomllib.loads(text)
    return Preset(
        name=name,
        description=document["description"],
        parameters=tuple(Parameter(name, **fields) for name, fields in document.get("parameters", {}).items()),
        hosts=tuple(
            PresetHost(host, group["source"], group["date"], Note(group["note"]) if "note" in group else None)
            for group in document["hosts"]
            for host in group["names"]
        ),
    )


def _preset_rules(table: Table) -> Iterator[tuple[Rule, tuple[str | int, ...]]]:
    """A rule for each entry of `presets` and each [[preset]], with its place."""
    plain = _list(table, "presets", _plain_preset, 'presets = ["ghcr"]')
    chosen = _list(table, "preset", _chosen_preset, "[[preset]]")
    times = Counter(preset.name for preset, _ in chosen)
    for position, preset in enumerate(plain):
        yield Rule(preset.name, RuleKind.PRESET, preset.patterns({}), RULE_PORTS), ("presets", position)
    for position, (preset, values) in enumerate(chosen):
        # Several of one kind, as two AWS accounts, are told apart by their first parameter: ecr-123456789012.
        first = next(iter(values.values()), ())
        name = "-".join((preset.name, *first)) if times[preset.name] > 1 else preset.name
        yield Rule(name, RuleKind.PRESET, preset.patterns(values), RULE_PORTS), ("preset", position, "name")


def _preset(value: object) -> Preset:
    name = _string(value)
    if name not in preset_names():
        raise _UnplacedError(
            f"unknown preset {_shown(name)}", f"write {_nearest(_shown(name), map(_shown, preset_names()))}"
        )
    return load_preset(name)


def _plain_preset(value: object) -> Preset:
    preset = _preset(value)
    if preset.parameters:
        needs = " ".join(f'{parameter.name} = "{parameter.example}"' for parameter in preset.parameters)
        raise _UnplacedError(
            f"preset {_shown(preset.name)} needs {' and '.join(parameter.name for parameter in preset.parameters)}",
            f'write [[preset]] with the lines name = "{preset.name}" {needs}',
        )
    return preset


def _chosen_preset(value: object) -> tuple[Preset, dict[str, tuple[str, ...]]]:
    if not isinstance(value, dict):
        raise _UnplacedError(f"{_shown(value)} is not a table", 'write [[preset]] and below it name = "ecr"')
    preset = _require(value, "name", _preset, '"ecr"')
    table = _table(value, "name", *(parameter.name for parameter in preset.parameters))
    return preset, {
        parameter.name: _require(table, parameter.name, functools.partial(_values, parameter), f'"{parameter.example}"')
        for parameter in preset.parameters
    }


def _values(parameter: Parameter, value: object) -> tuple[str, ...]:
    """The values of a preset's parameter: one string, or a list of them."""

    def reader(item: object) -> str:
        text = _string(item)
        if not re.fullmatch(parameter.pattern, text):
            raise _UnplacedError(
                f"{_shown(text)} is not {parameter.meaning}", f'write {parameter.name} = "{parameter.example}"'
            )
        return text

    if isinstance(value, str):
        return (reader(value),)
    values = tuple(dict.fromkeys(_items(value, reader, f'{parameter.name} = "{parameter.example}"')))
    if not values:
        raise _UnplacedError(f"{parameter.name} is empty", f'write {parameter.name} = "{parameter.example}"')
    return values


# --- matching --------------------------------------------------------------------------------------------------------
class NameIndex:
    """A policy's rules by name: built once, then a look-up costs one dictionary access a label."""

    def __init__(self, policy: Policy) -> None:
        self._exact: dict[str, tuple[Rule, ...]] = {}
        self._below: dict[str, tuple[Rule, ...]] = {}
        for rule in policy.rules:
            alone = (rule,)  # shared: most names have one rule
            for host in rule.hosts:
                side = self._below if host.wildcard else self._exact
                side[host.name] = side[host.name] + alone if host.name in side else alone

    def covering(self, name: str, *, wildcard: bool = False) -> Iterator[tuple[Rule, HostPattern]]:
        """Each rule and pattern of it that cover `name` (any case, with or without trailing dot) or, for a
        wildcard, every name below `name`; the most specific pattern first, rules of one pattern in policy order."""
        name = name.lower().removesuffix(".")
        side = self._below if wildcard else self._exact
        for rule in side.get(name, ()):
            yield rule, HostPattern(name, wildcard)
        dot = name.find(".", 1)  # a name below "" is below nothing
        while dot != -1:
            parent = name[dot + 1 :]
            for rule in self._below.get(parent, ()):
                yield rule, HostPattern(parent, wildcard=True)
            dot = name.find(".", dot + 1)

    def match(self, name: str) -> tuple[Rule, ...]:
        """The rules that cover `name`, each once, in the order of `covering`."""
        # By name: hashing a rule would hash all of its hosts.
        return tuple({rule.name: rule for rule, _ in self.covering(name)}.values())

    def judge(self, name: str, port: int) -> Verdict:
        """What the policy says to a client that names a host and port (by SNI, Host or CONNECT), whatever the
        addresses of `name` are. That a forward proxy has the name says nothing here: it is where to ask, not for what.
        """
        rules = [rule for rule in self.match(name) if rule.kind is not RuleKind.PROXY]
        for rule in rules:
            if port in rule.ports:
                return Verdict(rule.name, Reason.LISTED_NAME)
        if rules:
            return Verdict(rules[0].name, Reason.UNLISTED_PORT)
        return Verdict(None, Reason.UNLISTED_NAME)


@dataclass(frozen=True, slots=True)
class NamePermission:
    """What the kernel's trie holds for one pattern. The trie finds only the longest pattern that covers a name, so
    this one speaks for every wider pattern too."""

    pattern: HostPattern
    ports: tuple[int, ...]  # of all rules that cover the pattern; ascending, the MAX_PORTS_PER_NAME lowest
    private_addresses: bool  # only if every one of those rules allows them: the kernel permits no more than Python
    rules: tuple[str, ...]  # their names, the most specific pattern's first
    # Of `ports`, which together they make up; one port may be in each of these.
    named_ports: frozenset[int]  # clients may name it with: those of rules other than proxies
    address_ports: frozenset[int]  # clients may say what they like at its addresses: some rule's verify says so
    proxy_ports: frozenset[int]  # a forward proxy answers at its addresses: what it is asked for is judged

    @property
    def verify_address(self) -> bool:
        """Whether some port of its addresses is for clients that name no host."""
        return bool(self.address_ports)

    @property
    def proxy(self) -> bool:
        """Whether a forward proxy answers at some port of its addresses."""
        return bool(self.proxy_ports)


def name_permissions(policy: Policy) -> Iterator[NamePermission]:
    """One permission for each distinct pattern of the policy."""
    index = NameIndex(policy)
    combined: dict[tuple[str, ...], NamePermission] = {}  # of 100,000 names few rules are the sources
    for pattern in dict.fromkeys(host for rule in policy.rules for host in rule.hosts):
        rules = {rule.name: rule for rule, _ in index.covering(pattern.name, wildcard=pattern.wildcard)}
        names = tuple(rules)
        if names not in combined:
            combined[names] = _combined(pattern, rules)
        yield replace(combined[names], pattern=pattern)


def _combined(pattern: HostPattern, rules: Mapping[str, Rule]) -> NamePermission:
    """What `rules`, which are those that cover `pattern`, permit together."""
    ports = tuple(sorted({port for rule in rules.values() for port in rule.ports}))[:MAX_PORTS_PER_NAME]

    def of(which: Callable[[Rule], bool]) -> frozenset[int]:
        return frozenset(ports).intersection(port for rule in rules.values() if which(rule) for port in rule.ports)

    return NamePermission(
        pattern=pattern,
        ports=ports,
        private_addresses=all(rule.private_addresses for rule in rules.values()),
        rules=tuple(rules),
        named_ports=of(lambda rule: rule.kind is not RuleKind.PROXY),
        address_ports=of(lambda rule: rule.verify is Verify.ADDRESS),
        proxy_ports=of(lambda rule: rule.kind is RuleKind.PROXY),
    )


@functools.lru_cache(maxsize=16_384)
def pattern_id(pattern: HostPattern) -> int:
    """64 bits that name the pattern to the kernel, the same in every run."""
    return int.from_bytes(hashlib.blake2b(str(pattern).encode("ascii"), digest_size=8).digest(), "big")
