"""Policy in, nftables text out: the table that refuses, and the changes of its sets.

Absence of permission is refusal. What leaves this host through an interface that is not known to be internal, on a
registry port, in a scope that the policy judges, needs one of three permissions: an address that a trusted DNS answer
taught (sets `learned4` and `learned6`), an address that the policy names, or the vouching bit that BPF set in the mark
(TCP only: on an unconnected UDP socket the mark lags one packet behind the destination).

Every text here is one transaction, and every one may be applied over what is there: the table's rules are replaced as
a whole while learned elements and counters stay, and no packet meets a half-built table.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network, collapse_addresses

from enforcer.kernel_abi import MARK_SCOPE_MASK, MARK_VOUCHED, MarkedScope, Protocol
from enforcer.policy import Address, Level, Mode, Network, Policy, Rule

TABLE = "registry_enforcer"  # family inet
BASE_CHAINS = ("forward", "output", "postrouting")
LEARNED_SETS = ("learned4", "learned6")
REVOKED_SETS = ("revoked4", "revoked6")
REVOKED_SECONDS = 432_000  # nf_conntrack_tcp_timeout_established: what is silent for longer is new to the kernel
SET_SIZE = 262_144  # elements; the kernel refuses a transaction that would exceed it
LOG_PREFIX = "registry-enforcer: "
AUDIT_GROUP = 0x5245  # nfnetlink_log: where refusals are reported to the daemon, "RE"
_COMMENT_BYTES = 100  # nft takes 128 with the terminating NUL; the rule's kind goes before the name

# What nft's quoted strings carry literally: they know no escapes, and a trailing * would be a wildcard.
_INTERFACE_NAME = re.compile(r"[!#-)+-.0-9;-\[\]-~]{1,15}")


class Feature(enum.Enum):
    """Something of the kernel's nf_tables that the ruleset needs; the value is rule text that uses it alone."""

    SETS = (
        "set probed { type ipv4_addr . inet_service; flags dynamic, timeout; size 16; }\n"
        " chain probe { delete @probed { ip daddr . tcp dport }; }"
    )
    INTERVALS = "set probed { type ipv4_addr; flags interval; elements = { 192.0.2.0/24 }; }"
    COUNTER = "counter probed { }\n chain probe { counter name probed; }"
    CT = "chain probe { ct state established ct direction reply ct status dnat accept; }"
    LIMIT = "chain probe { limit rate 5/second burst 10 packets accept; }"
    LOG = 'chain probe { log prefix "probe " level info; }'
    AUDIT = f'chain probe {{ log prefix "probe" group {AUDIT_GROUP}; }}'
    REDIRECT = (
        # Dormant: the chain's type is looked up, and no packet meets its hook.
        "flags dormant; chain probe { type nat hook output priority -90;"
        " fib daddr type unicast fib daddr . mark oifname lo rt ip nexthop != 127.0.0.1 accept;"
        " meta l4proto tcp redirect to :9; }"
    )
    REJECT = "chain probe { meta l4proto tcp reject with tcp reset; reject with icmpx admin-prohibited; }"

    @property
    def optional(self) -> bool:
        """Whether the table refuses as well without it."""
        return self in (Feature.AUDIT, Feature.REDIRECT)

    @property
    def kernel_option(self) -> str:
        """The kernel configuration option that brings it."""
        return {
            Feature.COUNTER: "CONFIG_NFT_COUNTER, CONFIG_NFT_OBJREF",
            Feature.CT: "CONFIG_NFT_CT",
            Feature.LIMIT: "CONFIG_NFT_LIMIT",
            Feature.LOG: "CONFIG_NFT_LOG",
            Feature.AUDIT: "CONFIG_NETFILTER_NETLINK_LOG",
            Feature.REDIRECT: "CONFIG_NFT_NAT, CONFIG_NFT_REDIR, CONFIG_NFT_FIB_INET",
            Feature.REJECT: "CONFIG_NFT_REJECT_INET",
        }.get(self, "CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this kernel's nf_tables has."""

    features: frozenset[Feature]

    @property
    def missing(self) -> tuple[Feature, ...]:
        """What the ruleset needs and the kernel lacks; it can do without what is optional."""
        return tuple(feature for feature in Feature if feature not in self.features and not feature.optional)


class CountedScope(enum.Enum):
    """Whose connection was refused: part of a counter's name and a metric label."""

    CONTAINER = "container"
    ENGINE = "engine"
    HOST = "host"
    UNKNOWN = "unknown"  # a local packet that no connect hook has stamped


@dataclass(frozen=True, slots=True)
class Element:
    """One permission of the learned sets."""

    address: Address
    port: int
    lifetime_seconds: int  # from the moment it is applied; at least 1, since nft reads 0 as "for ever"

    def __post_init__(self) -> None:
        if self.lifetime_seconds < 1:
            raise ValueError(f"{self.address} port {self.port}: a lifetime of {self.lifetime_seconds} s")


@dataclass(frozen=True, slots=True)
class Responder:
    """Where refused TCP connections are answered in their own protocol, and whose."""

    port: int
    local: bool = True  # for sockets of this host
    # For forwarded connections: internal interfaces with an address of the family (IPv6: a global one). A redirect
    # leads to an address of the interface by which a packet came, and the kernel drops the packet where there is none.
    interfaces4: frozenset[str] = frozenset()
    interfaces6: frozenset[str] = frozenset()


_RESPONDER_SETS = ("answered4", "answered6", "internal_routes")
_HOST_LOOPBACK = "ip daddr 127.0.0.0/8 oifname @host_loopback accept"
# A flood is reset instead: the responder is the daemon, which has better to do.
_REDIRECT_LIMIT = "limit rate over 1000/second burst 2000 packets accept"


class Redirected(enum.Enum):
    """Which redirected connections: part of the names of the counters that watch over them."""

    LOCAL = "local"
    FORWARDED = "forwarded"

    @property
    def entered(self) -> str:
        """Counts those that entered this host's input."""
        return f"responder_entered_{self.value}"

    @property
    def reached(self) -> str:
        """Counts those of them that no other table's input chain has dropped."""
        return f"responder_reached_{self.value}"


def counter_name(mode: Mode, scope: CountedScope, protocol: Protocol) -> str:
    """The named counter of connections that were refused, or in observe mode would have been."""
    verb = "refused" if mode is Mode.ENFORCE else "observed"
    return f"{verb}_{scope.value}_{protocol.name.lower()}"


def render_ruleset(
    policy: Policy,
    capabilities: Capabilities,
    internal: Iterable[str],
    responder: Responder | None = None,
    host_loopback: Iterable[str] = (),
) -> str:
    """The whole table for `policy`; `internal` are the interfaces that lead only into this host (lo always is one).

    `host_loopback` are those that do so for 127.0.0.0/8 alone.

    Without a responder, and where the kernel has no redirect, every refusal is a reset. ValueError if the kernel lacks
    something that the table needs: half a table would refuse half.
    """
    if capabilities.missing:
        lacking = ", ".join(f"{feature.name.lower()} ({feature.kernel_option})" for feature in capabilities.missing)
        raise ValueError(f"this kernel's nf_tables lacks {lacking}")
    scope = policy.scope
    some_scope = Level.STRICT if Level.STRICT in (scope.containers, scope.engines, scope.host) else Level.OFF
    counters = [
        f"\tcounter {counter_name(mode, counted, protocol)} {{ }}"
        for mode in Mode
        for counted in CountedScope
        for protocol in Protocol
    ]
    judge = functools.partial(_judge, policy.mode, audited=Feature.AUDIT in capabilities.features)
    other_ports = [f"th dport != {_ports(policy.ports)} accept"]
    engine_other_ports = ["tcp dport 53 accept", f"udp dport != {_ports(policy.ports)} accept"]
    if Feature.REDIRECT not in capabilities.features:
        responder = None
    return f"""\
# registry-enforcer: connections to container registries that the policy does not list are refused.
# Policy {_printable(policy.source)}, sha256 {_printable(policy.digest)}, mode {policy.mode.value}.
# Rendered whole and applied in one transaction; change the policy instead.

# Replaces every rule and keeps the learned addresses and the counters.
add table inet {TABLE}
flush table inet {TABLE}

table inet {TABLE} {{
	# Addresses and ports that trusted DNS answers taught, each with its own lifetime.
	set learned4 {{ type ipv4_addr . inet_service; flags timeout; size {SET_SIZE}; }}
	set learned6 {{ type ipv6_addr . inet_service; flags timeout; size {SET_SIZE}; }}

	# Addresses and ports whose permission was taken back: every packet to them is judged, not a connection's first
	# alone. Deleting conntrack entries instead would let the far end's next packet begin a connection of its own.
	set revoked4 {{ type ipv4_addr . inet_service; flags dynamic, timeout; size {SET_SIZE}; }}
	set revoked6 {{ type ipv6_addr . inet_service; flags dynamic, timeout; size {SET_SIZE}; }}

	# Interfaces that lead only into this host. Any other one, known or not, is an uplink.
	set internal {{ type ifname; }}

	# WSL 2's way to 127.0.0.1, which is this host's own as much as Windows'. To nothing else.
	set host_loopback {{ type ifname; }}

{_lines(counters, 0)}
{_responder_chains(policy, responder)}
	# Containers, and whatever else this host routes. Destinations are translated before this priority.
	chain forward {{
		type filter hook forward priority filter + 10; policy accept;
		jump never_judged
		jump judge_container
		goto refuse
	}}

	# Sockets of this host, by the scope that the connect hooks stamped into the mark.
	chain output {{
		type filter hook output priority filter + 10; policy accept;
		jump never_judged
{_lines(_translated(responder))}
		jump judge_local
		goto refuse
	}}

	# What output could not know: where a translated or re-routed packet of this host really leaves. Only a drop is
	# possible here.
	chain postrouting {{
		type filter hook postrouting priority srcnat + 200; policy accept;
		# Forwarded, and judged in forward.
		iif != 0 accept
{_lines(_observed_in_output(policy.mode))}
		jump never_judged
		jump judge_local
		drop
	}}

	# Returns for what leaves this host as, or for, a new connection.
	chain never_judged {{
		# No registry speaks anything else. A packet whose protocol cannot be read is not excused.
		meta l4proto != tcp meta l4proto != udp accept
		# Answers to inbound connections.
		ct direction reply accept
		# Was permitted when it began, and nobody took that back. Not for UDP, which has no end: as long as packets
		# come, it would outlive every permission.
		ct state established ip daddr . tcp dport != @revoked4 accept
		ct state established ip6 daddr . tcp dport != @revoked6 accept
		oifname @internal accept
		{_HOST_LOOPBACK}
	}}

	# Each judge accepts, or returns what is to be refused.
	chain judge_local {{
		# No verdict map: while the table is replaced, the elements of the old map are gone before its rule is.
		meta mark & {MARK_SCOPE_MASK:#010x} == {MarkedScope.HOST:#010x} goto judge_host
		meta mark & {MARK_SCOPE_MASK:#010x} == {MarkedScope.ENGINE:#010x} goto judge_engine
		meta mark & {MARK_SCOPE_MASK:#010x} == {MarkedScope.CONTAINER:#010x} goto judge_container
		goto judge_unknown
	}}

	chain judge_container {{
{_lines(judge(scope.containers, CountedScope.CONTAINER, other_ports))}
	}}

	# An engine talks to registries only, on whatever port: every TCP port but DNS counts.
	chain judge_engine {{
{_lines(judge(scope.engines, CountedScope.ENGINE, engine_other_ports))}
	}}

	chain judge_host {{
{_lines(judge(scope.host, CountedScope.HOST, other_ports))}
	}}

	# No hook has seen it, so it may be of any scope: the strictest one counts.
	chain judge_unknown {{
{_lines(judge(some_scope, CountedScope.UNKNOWN, other_ports))}
	}}

	# Accepts what has permission. Only registry ports are judged for containers and host, so a permission for another
	# port matters to engines alone.
	chain permitted {{
		ip daddr . th dport @learned4 accept
		ip6 daddr . th dport @learned6 accept
		# BPF vouches for the first packets, before the sets hold the address. Never for UDP: on an unconnected socket
		# the mark is that of the packet before.
		# For a SYN only: the socket keeps its mark, and must not outlive a permission that was taken back.
		tcp flags & (fin | syn | rst | ack) == syn meta mark & {MARK_VOUCHED:#010x} == {MARK_VOUCHED:#010x} goto vouched
{_lines(line for rule in policy.rules for line in _rule_addresses(rule))}
	}}

	# Permitted once more, after it was taken back: the next packet of this connection may come before the sets hold it.
	chain vouched {{
		delete @revoked4 {{ ip daddr . tcp dport }}
		delete @revoked6 {{ ip6 daddr . tcp dport }}
		accept
	}}

	# At once, and so that the client gives up: a dropped SYN hangs clients for minutes.
	chain refuse {{
		# A reset would come from the translated address, and the client would go on waiting. ICMP is translated back;
		# over IPv6 a client on this machine heeds it at its first retransmission, after a second.
		ct status dnat reject with icmpx port-unreachable
		meta l4proto tcp reject with tcp reset
		reject with icmpx admin-prohibited
	}}
}}

{render_internal(internal, responder, host_loopback)}"""


def _responder_chains(policy: Policy, responder: Responder | None) -> str:
    if responder is None:
        return ""
    redirected = f"tcp dport {responder.port} ct state new ct status dnat"
    came_by = {Redirected.LOCAL: 'iifname "lo"', Redirected.FORWARDED: 'iifname != "lo"'}
    text = f"""
	# Interfaces whose refused connections are answered, by family; and `internal` again, in the type of routes.
	set answered4 {{ type ifname; }}
	set answered6 {{ type ifname; }}
	set internal_routes {{ typeof fib daddr . mark oifname; }}

{_lines((f"counter {name} {{ }}" for way in Redirected for name in (way.entered, way.reached)), 1)}

	# Nobody but redirected clients reaches the responder. What entered and did not reach it, another table's input
	# chain has dropped.
	chain responder_entrance {{
		type filter hook input priority -400; policy accept;
{_lines(f"{redirected} {came_by[way]} counter name {way.entered}" for way in Redirected)}
	}}
	chain responder_guard {{
		type filter hook input priority 400; policy accept;
		tcp dport {responder.port} ct status & dnat != dnat reject with tcp reset
{_lines(f"{redirected} {came_by[way]} counter name {way.reached}" for way in Redirected)}
	}}
"""
    if policy.mode is Mode.OBSERVE:
        return text
    return f"""{text}
	# Refused connections go to the responder, which says why. Whatever else was translated, at the usual priority,
	# is not looked at here: the first translation counts.
	chain redirect_forwarded {{
		type nat hook prerouting priority dstnat + 10; policy accept;
		meta l4proto != tcp accept
		tcp flags & (fin | syn | rst | ack) != syn accept
		tcp dport != {_ports(policy.ports)} accept
		meta nfproto ipv4 iifname != @answered4 accept
		meta nfproto ipv6 iifname != @answered6 accept
		# Whether anybody vouches is not known before BPF has seen the packet: on a bridge's port, where br_netfilter
		# calls this chain, it may not be attached yet.
		meta mark & {MARK_SCOPE_MASK:#010x} != {MarkedScope.CONTAINER:#010x} accept
		fib daddr type != unicast accept
		fib daddr . mark oifname @internal_routes accept
		{_REDIRECT_LIMIT}
		jump judge_container
		meta l4proto tcp redirect to :{responder.port}
	}}
	chain redirect_local {{
		type nat hook output priority -90; policy accept;
{_lines(_redirect_local(responder))}
	}}
"""


def _translated(responder: Responder | None) -> Iterator[str]:
    if responder is not None:
        yield "# A socket bound to an interface sends there what was redirected, too, and would wait for an answer."
        yield "# Over IPv6 it does: no error finds its way back to it."
        yield f"tcp dport {responder.port} ct status dnat rt ip nexthop != 127.0.0.1 reject with icmp port-unreachable"
    yield "# The outgoing interface is still that of the untranslated destination: postrouting knows better."
    yield "ct status dnat accept"


def _redirect_local(responder: Responder) -> Iterator[str]:
    if responder.local:
        yield "meta l4proto != tcp accept"
        yield "tcp flags & (fin | syn | rst | ack) != syn accept"
        yield "oifname @internal accept"
        yield _HOST_LOOPBACK
        yield _REDIRECT_LIMIT
        yield "jump judge_local"
        yield f"meta l4proto tcp redirect to :{responder.port}"


def render_internal(
    names: Iterable[str], responder: Responder | None = None, host_loopback: Iterable[str] | None = None
) -> str:
    """Replaces the set of internal interfaces with `names` and lo, and with a responder the sets of those it serves.

    `host_loopback` None: the table in force, an earlier build's, has no such set.

    A name that nft's text cannot carry literally is left out: that interface is judged as an uplink.
    """
    names = {"lo", *names}
    sets: dict[str, Iterable[str]] = {"internal": names}
    if responder is not None:
        answered = responder.interfaces4, responder.interfaces6, names
        sets |= dict(zip(_RESPONDER_SETS, answered, strict=True))
    if host_loopback is not None:
        sets["host_loopback"] = host_loopback
    return "".join(_replace(set_name, members) for set_name, members in sets.items())


def _replace(set_name: str, names: Iterable[str]) -> str:
    text = f"flush set inet {TABLE} {set_name}\n"
    quoted = ", ".join(f'"{name}"' for name in sorted(names) if _INTERFACE_NAME.fullmatch(name))
    return text + (f"add element inet {TABLE} {set_name} {{ {quoted} }}\n" if quoted else "")


def render_elements(permit: Iterable[Element], withdraw: Iterable[tuple[Address, int]]) -> str:
    """Grants or refreshes `permit`, then takes back `withdraw`, which wins; empty when there is nothing to do.

    A plain add leaves the lifetime of an element that exists as it is, and deleting one that has expired fails the
    transaction. Hence add, delete, add and add, delete: no packet falls between, since they take effect together.
    """
    lifetimes: dict[tuple[Address, int], int] = {}
    for element in permit:
        key = (element.address, element.port)
        lifetimes[key] = max(lifetimes.get(key, 0), element.lifetime_seconds)
    withdrawn = dict.fromkeys(withdraw)
    text = ""
    for version, set_name in zip((4, 6), LEARNED_SETS, strict=True):
        permitted = {key: seconds for key, seconds in lifetimes.items() if key[0].version == version}
        gone = [key for key in withdrawn if key[0].version == version]
        with_timeout = [f"{_key(key)} timeout {seconds}s" for key, seconds in permitted.items()]
        text += _change("add", set_name, with_timeout)
        text += _change("delete", set_name, map(_key, permitted))
        text += _change("add", set_name, with_timeout)
        text += _change("add", set_name, (f"{_key(key)} timeout 60s" for key in gone))
        text += _change("delete", set_name, map(_key, gone))
    return text


def render_revoked(revoke: Iterable[tuple[Address, int]], pardon: Iterable[tuple[Address, int]] = ()) -> str:
    """Has every packet to `revoke` judged from now on, and to `pardon`, which wins, first packets only."""
    text = ""
    pardoned = dict.fromkeys(pardon)
    revoked = dict.fromkeys(revoke)
    for version, set_name in zip((4, 6), REVOKED_SETS, strict=True):
        with_timeout = [
            f"{_key(key)} timeout {REVOKED_SECONDS}s" for key in {**revoked, **pardoned} if key[0].version == version
        ]
        text += _change("add", set_name, with_timeout)
        text += _change("delete", set_name, (_key(key) for key in pardoned if key[0].version == version))
    return text


def render_removal() -> str:
    """Deletes the table, present or not; only the operator's `remove` applies it."""
    return f"add table inet {TABLE}\ndelete table inet {TABLE}\n"


def _observed_in_output(mode: Mode) -> Iterator[str]:
    if mode is Mode.OBSERVE:
        yield "# Nothing was refused in output, so what was judged there comes by again."
        yield "ct status & dnat != dnat accept"


def _judge(
    mode: Mode, level: Level, scope: CountedScope, out_of_scope: Iterable[str], *, audited: bool
) -> Iterator[str]:
    if level is Level.OFF:
        yield "accept # off in the policy"
        return
    yield from out_of_scope
    yield "jump permitted"
    for protocol in Protocol:
        yield f"meta l4proto {protocol.name.lower()} counter name {counter_name(mode, scope, protocol)}"
    verb = "refused" if mode is Mode.ENFORCE else "observed"
    if audited:
        yield f'log prefix "{verb} {scope.value}" group {AUDIT_GROUP}'
    else:
        yield f'limit rate 5/second burst 10 packets log prefix "{LOG_PREFIX}{verb} {scope.value} " level info'
    if mode is Mode.OBSERVE:
        yield "accept # mode observe"


def _rule_addresses(rule: Rule) -> Iterator[str]:
    comment = f"{rule.kind.value} {_printable(rule.name)}"[:_COMMENT_BYTES]
    # nft takes overlapping networks for a mistake ("conflicting intervals").
    ipv4 = collapse_addresses(network for network in rule.addresses if isinstance(network, IPv4Network))
    ipv6 = collapse_addresses(network for network in rule.addresses if isinstance(network, IPv6Network))
    for keyword, networks in (("ip", ipv4), ("ip6", ipv6)):
        addresses = ", ".join(map(_network, networks))
        if addresses:
            yield f'{keyword} daddr {{ {addresses} }} th dport {_ports(rule.ports)} accept comment "{comment}"'


def _change(verb: str, set_name: str, elements: Iterable[str]) -> str:
    listed = ",\n\t".join(elements)
    return f"{verb} element inet {TABLE} {set_name} {{\n\t{listed}\n}}\n" if listed else ""


def _key(key: tuple[Address, int]) -> str:
    return f"{_address(key[0])} . {key[1]}"


def _address(address: Address) -> str:
    """Without a zone (RFC 4007), which is free text to Python and means nothing in a set."""
    return str(address) if isinstance(address, IPv4Address) else str(type(address)(int(address)))


def _network(network: Network) -> str:
    return f"{_address(network.network_address)}/{network.prefixlen}"


def _ports(ports: Iterable[int]) -> str:
    return "{ " + ", ".join(map(str, ports)) + " }"


def _printable(text: str) -> str:
    """What cannot end a comment or a quoted string."""
    return re.sub(r"[^A-Za-z0-9 ._,:/@+-]", "?", text)


def _lines(lines: Iterable[str], indent: int = 2) -> str:
    return "\n".join("\t" * indent + line for line in lines)
