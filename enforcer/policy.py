"""The organization's policy: TOML text in, frozen values out.

Parsed once: whoever holds a `Policy` never checks it again. An operator's mistake is a `PolicyError` that names the
file, the line, what is wrong and what to write instead.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Mode(enum.Enum):
    """What happens to a connection without permission."""

    ENFORCE = "enforce"  # counted, logged, refused
    OBSERVE = "observe"  # counted, logged, let through


class Level(enum.Enum):
    """How much of one scope's traffic the policy judges."""

    STRICT = "strict"  # any unlisted destination on a registry port is refused
    OFF = "off"  # not judged


class RuleKind(enum.Enum):
    """Where a rule comes from; it decides which ports are its default and whether private addresses count."""

    REGISTRY = "registry"  # the operator's own [[registry]]
    PRESET = "preset"  # a host list that ships with the program
    DESTINATION = "destination"  # not a registry, yet reachable on registry ports


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
    addresses: tuple[Network, ...] = ()  # reachable without a DNS answer

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


@dataclass(frozen=True, slots=True)
class Resolvers:
    """Who may teach addresses."""

    auto: bool  # whatever this host uses, followed as it changes
    addresses: tuple[Address, ...]  # and these


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
    source: str  # the file's path, or "built-in default"
    digest: str  # SHA-256 of the text, hex
