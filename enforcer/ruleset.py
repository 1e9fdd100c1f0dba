"""Policy in, nftables text out: the table that refuses, and the changes of its sets.

Absence of permission is refusal. What leaves this host through an interface that is not known to be internal, on a
registry port, in a scope that the policy judges, needs one of three permissions: an address that a trusted DNS answer
taught (sets `learned4` and `learned6`), an address that the policy names, or the vouching bit that BPF set in the mark.
UDP needs the second: nobody can check the server name of QUIC, and on an unconnected socket the mark lags one packet
behind the destination.

Every text here is one transaction, and every one may be applied over what is there: the table's rules are replaced as
a whole while learned elements and counters stay, and no packet meets a half-built table.

Kernels that lack expressions get what says the same without them, or less that refuses the same (`ladder`): without
conntrack the packet that begins a connection is judged, without sets ports are ranges and the mark is the only memory,
without reject a refused packet is dropped.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network, collapse_addresses

from enforcer.kernel_abi import DEFAULT_MARKS, MarkedScope, Marks, Protocol
from enforcer.ladder import AUDIT_GROUP, Capabilities, Feature, Origin
from enforcer.policy import Address, Level, Mode, Network, Policy, Rule, RuleKind

TABLE = "registry_enforcer"  # family inet
BASE_CHAINS = ("forward", "output", "postrouting")
LEARNED_SETS = ("learned4", "learned6")
REVOKED_SETS = ("revoked4", "revoked6")
REVOKED_SECONDS = 432_000  # nf_conntrack_tcp_timeout_established: what is silent for longer is new to the kernel
SET_SIZE = 262_144  # elements; the kernel refuses a transaction that would exceed it
# Twice what the memory holds: within a transaction what makes room is still there when the others come. All of that may
# be revoked at once, beside what is before there is a look for room (revocation.CROWDED).
LEARNED_SET_SIZE = 524_288
LOG_PREFIX = "registry-enforcer: "
_MARKS_NOTE = "marks_"  # and the mask: an empty chain, since every kernel has those
_NO_MARKS_NOTE = "unmarked"  # the baseline's, and then beside the daemon's: flushing a table leaves its chains
_COMMENT_BYTES = 100  # nft takes 128 with the terminating NUL; the rule's kind goes before the name

# What nft's quoted strings carry literally: they know no escapes, and a trailing * would be a wildcard.
_INTERFACE_NAME = re.compile(r"[!#-)+-.0-9;-\[\]-~]{1,15}")
_CGROUP_PATH = re.compile(r"[!#-)+-\[\]-~]{1,1000}")  # the same, with slashes and colons


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


SEEN_SECONDS = 30  # for a connection's second SYN, which comes after one
_SYN = "tcp flags & (fin | syn | rst | ack) == syn"
_NO_SYN = "tcp flags & (fin | syn | rst | ack) != syn"
_CONNECTION4 = "ipv4_addr . inet_service . ipv4_addr . inet_service"
_CONNECTION6 = "ipv6_addr . inet_service . ipv6_addr . inet_service"
_CONNECTION_OF = {version: f"{version} saddr . tcp sport . {version} daddr . tcp dport" for version in ("ip", "ip6")}
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
    *,
    host_loopback: Iterable[str] = (),
    cgroups: Iterable[tuple[str, MarkedScope]] = (),
) -> str:
    """The whole table for `policy`; `internal` are the interfaces that lead only into this host (lo always is one).

    `host_loopback` are those that do so for 127.0.0.0/8 alone.

    `cgroups` are the paths whose sockets have a scope of their own; they matter where nftables tells scopes, must exist
    then, and are looked up when the text is applied.

    Without a responder, and where the kernel cannot redirect to it, every refusal is a reset, and where it cannot do
    that either, silence. ValueError if the kernel cannot refuse at all.
    """
    if not capabilities.enforceable:
        raise ValueError(f"this kernel's nf_tables lacks {Feature.BASE.kernel_option}")
    if not capabilities.answers:
        responder = None
    return f"""\
# registry-enforcer: connections to container registries that the policy does not list are refused.
# Policy {_printable(policy.source)}, sha256 {_printable(policy.digest)}, mode {policy.mode.value}.
# Rendered whole and applied in one transaction; change the policy instead.

# Replaces every rule and keeps the learned addresses and the counters.
add table inet {TABLE}
flush table inet {TABLE}

table inet {TABLE} {{
{_marks_note(policy.marks, capabilities)}{_lines(_sets(capabilities), 1)}
{_lines(_counters(capabilities), 1)}
{_responder_chains(policy, capabilities, responder)}
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
{_lines(_output(policy.marks, capabilities, responder))}
	}}
{_own_mark(policy.marks, capabilities, cgroups)}
	# What output could not know: where a translated or re-routed packet of this host really leaves. Only a drop is
	# possible here.
	chain postrouting {{
		type filter hook postrouting priority srcnat + 200; policy accept;
		# Forwarded, and judged in forward. Before 5.7 only the missing socket tells.
		iif != 0 accept
		meta skuid >= 0 goto leaving
	}}
	chain leaving {{
{_lines([*_observed_in_output(policy.mode, capabilities), "jump never_judged", "jump judge_local", "drop"])}
	}}

	# Returns for what leaves this host as, or for, a new connection.
	chain never_judged {{
		# No registry speaks anything else. A packet whose protocol cannot be read is not excused.
		meta l4proto != tcp meta l4proto != udp accept
{_lines(_never_judged(capabilities))}
	}}

	# Each judge accepts, or returns what is to be refused.
	chain judge_local {{
{_lines(_judge_local(policy.marks, capabilities))}
	}}

{_judges(policy, capabilities)}

	# Accepts what has permission. Only registry ports are judged for containers and host, so a permission for another
	# port matters to engines alone.
	chain permitted {{
{_lines(_permitted(policy, capabilities))}
	}}

	# Permitted once more, after it was taken back: the next packet of this connection may come before the sets hold it.
	chain vouched {{
{_lines(_vouched(capabilities))}
	}}

	# At once, and so that the client gives up: a dropped SYN hangs clients for minutes.
	chain refuse {{
{_lines(_refuse(capabilities))}
	}}
}}

{render_internal(internal, capabilities, responder, host_loopback)}"""


def marks_of(chains: Iterable[str]) -> Marks | None:
    """The bits of the mark that a table of these chains reads; None: it is a baseline, and nobody has set any yet."""
    names = set(chains)
    noted = (name.removeprefix(_MARKS_NOTE) for name in names if name.startswith(_MARKS_NOTE))
    return next((Marks(int(mask, 16)) for mask in noted), None if _NO_MARKS_NOTE in names else DEFAULT_MARKS)


# --- the parts of the table ------------------------------------------------------------------------------------------
def _marks_note(marks: Marks, capabilities: Capabilities) -> str:
    if not capabilities.learning:
        return f"""\
	# Says to the daemon that nobody has set marks yet: it may take the bits that its policy says.
	chain {_NO_MARKS_NOTE} {{
	}}

"""
    return f"""\
	# Says which bits of the mark are ours, to the next daemon: it must not read them otherwise.
	chain {_MARKS_NOTE}{marks.mask:08x} {{
	}}

"""


def _sets(capabilities: Capabilities) -> Iterator[str]:
    dynamic = "dynamic, timeout" if Feature.DYNAMIC_SETS in capabilities.features else "timeout"
    if capabilities.remembers:
        yield "# Addresses and ports that trusted DNS answers taught, each with its own lifetime."
        yield f"set learned4 {{ type ipv4_addr . inet_service; flags timeout; size {LEARNED_SET_SIZE}; }}"
        yield f"set learned6 {{ type ipv6_addr . inet_service; flags timeout; size {LEARNED_SET_SIZE}; }}"
        yield ""
        yield "# Addresses and ports whose permission was taken back: every packet to them is judged, not the first of"
        yield "# a connection. Deleting conntrack entries instead would let the far end's next packet begin one."
        yield f"set revoked4 {{ type ipv4_addr . inet_service; flags {dynamic}; size {LEARNED_SET_SIZE}; }}"
        yield f"set revoked6 {{ type ipv6_addr . inet_service; flags {dynamic}; size {LEARNED_SET_SIZE}; }}"
        yield ""
    if capabilities.looks_twice:
        yield "# Connections whose first packet has been dropped, until it comes again."
        yield f"set seen4 {{ type {_CONNECTION4}; flags dynamic, timeout; size {SET_SIZE}; }}"
        yield f"set seen6 {{ type {_CONNECTION6}; flags dynamic, timeout; size {SET_SIZE}; }}"
        yield ""
    yield "# Interfaces that lead only into this host. Any other one, known or not, is an uplink."
    if Feature.PLAIN_SETS in capabilities.features:
        yield "set internal { type ifname; }"
        yield ""
        yield "# WSL 2's way to 127.0.0.1, which is this host's own as much as Windows'. To nothing else."
        yield "set host_loopback { type ifname; }"
    else:
        yield "chain internal { }"
    if capabilities.looks_twice:
        yield ""
        yield "# Nobody vouches for first packets: their address may be on its way from a DNS answer into the sets."
        yield "# Refusing the packet that comes again, a second later, refuses the same connections and no other."
        yield "chain second_look {"
        yield f"\t{_NO_SYN} return"
        yield f"\t{_CONNECTION_OF['ip']} @seen4 return"
        yield f"\t{_CONNECTION_OF['ip6']} @seen6 return"
        yield f"\tadd @seen4 {{ {_CONNECTION_OF['ip']} timeout {SEEN_SECONDS}s }}"
        yield f"\tadd @seen6 {{ {_CONNECTION_OF['ip6']} timeout {SEEN_SECONDS}s }}"
        yield "\tdrop"
        yield "}"


def _counters(capabilities: Capabilities) -> Iterator[str]:
    if Feature.COUNTER in capabilities.features:
        yield ""
        for mode in Mode:
            for counted in CountedScope:
                for protocol in Protocol:
                    yield f"counter {counter_name(mode, counted, protocol)} {{ }}"


def _asks_sockets(capabilities: Capabilities) -> bool:
    """Whether the table knows a socket's scope from what its packets carry."""
    stamped = capabilities.scopes_in_nft or Origin.LOCAL in capabilities.marked
    return Feature.SOCKET in capabilities.features and stamped


def _own_mark(marks: Marks, capabilities: Capabilities, cgroups: Iterable[tuple[str, MarkedScope]]) -> str:
    if not _asks_sockets(capabilities):
        return ""
    if capabilities.scopes_in_nft:
        rules = [
            "# No connect hook stamps sockets: their cgroup tells the scope, the deepest that is known.",
            *_mark_by_cgroup(marks, cgroups),
        ]
    else:
        rules = [
            "# A control message may have given the packet another one, or somebody's rule; on unconnected UDP it is",
            "# that of the packet before.",
            *_mark_by_socket(marks),
        ]
    return f"""
	# Our bits of a packet's mark, from its socket, of which postrouting may not ask.
	chain own_mark {{
{_lines(rules)}
	}}
"""


def _mark_by_socket(marks: Marks) -> Iterator[str]:
    bits = [1 << number for number in range(32) if marks.mask >> number & 1]
    for bit in bits:
        yield f"socket mark & {bit:#010x} == {bit:#010x} meta mark set meta mark | {bit:#010x}"
    for bit in bits:
        yield f"socket mark & {bit:#010x} == 0 meta mark set meta mark & {0xFFFFFFFF ^ bit:#010x}"


def _mark_by_cgroup(marks: Marks, cgroups: Iterable[tuple[str, MarkedScope]]) -> Iterator[str]:
    others = f"{0xFFFFFFFF ^ marks.mask:#010x}"
    for path, scope in sorted(cgroups, key=lambda each: (-each[0].count("/"), each)):
        if _CGROUP_PATH.fullmatch(path):
            told = f'socket cgroupv2 level {path.count("/") + 1} "{path}"'
            yield f"{told} meta mark set meta mark & {others} | {marks.of(scope):#010x} return"
    yield f"meta mark set meta mark & {others} | {marks.of(MarkedScope.HOST):#010x}"


def _restore_mark(marks: Marks, capabilities: Capabilities) -> Iterator[str]:
    if not _asks_sockets(capabilities):
        return
    if capabilities.scopes_in_nft:
        yield f"meta mark set meta mark & {0xFFFFFFFF ^ marks.mask:#010x}"
    yield "# Where there is a socket: looking for one that has gone crashed kernels before 5.18."
    yield "meta skuid >= 0 jump own_mark"


def _output(marks: Marks, capabilities: Capabilities, responder: Responder | None) -> Iterator[str]:
    if Feature.CT in capabilities.features:
        yield "jump never_judged"
    yield from _restore_mark(marks, capabilities)
    if Feature.CT not in capabilities.features:
        yield "# Whether a packet was translated is not known, and so not where it leaves: postrouting judges."
        yield "accept"
        return
    if responder is not None:
        yield "# A socket bound to an interface sends there what was redirected, too, and would wait for an answer."
        yield "# Over IPv6 it does: no error finds its way back to it."
        yield f"tcp dport {responder.port} ct status dnat rt ip nexthop != 127.0.0.1 reject with icmp port-unreachable"
    yield "# The outgoing interface is still that of the untranslated destination: postrouting knows better."
    yield "ct status dnat accept"
    yield "jump judge_local"
    yield "goto refuse"


def _observed_in_output(mode: Mode, capabilities: Capabilities) -> Iterator[str]:
    if mode is Mode.OBSERVE and Feature.CT in capabilities.features:
        yield "# Nothing was refused in output, so what was judged there comes by again."
        yield "ct status & dnat != dnat accept"


def _never_judged(capabilities: Capabilities) -> Iterator[str]:
    if Feature.CT in capabilities.features:
        began = f"{_NO_SYN} ct state established"
        yield "# Answers to inbound connections."
        yield "ct direction reply accept"
        yield "# Was permitted when it began, and nobody took that back. A SYN begins another one, whatever conntrack"
        yield "# remembers of its ports. Not for UDP, which has no end: as long as packets come, it would outlive every"
        yield "# permission."
    else:
        began = _NO_SYN
        yield "# Only the packet that begins a connection is judged, and every one to where permission was taken back."
    if capabilities.remembers:
        yield f"{began} ip daddr . tcp dport != @revoked4 accept"
        yield f"{began} ip6 daddr . tcp dport != @revoked6 accept"
    else:
        yield f"{began} meta l4proto tcp accept"
    if Feature.PLAIN_SETS in capabilities.features:
        yield "oifname @internal accept"
        yield _HOST_LOOPBACK
    else:
        yield "jump internal"


def _judge_local(marks: Marks, capabilities: Capabilities) -> Iterator[str]:
    if Origin.LOCAL in capabilities.marked or capabilities.scopes_in_nft:
        yield "# No verdict map: while the table is replaced, the elements of the old map are gone before its rule is."
        for scope in (MarkedScope.HOST, MarkedScope.ENGINE, MarkedScope.CONTAINER):
            told = f"meta mark & {marks.scope_mask:#010x} == {marks.of(scope):#010x}"
            yield f"{told} goto judge_{scope.name.lower()}"
    yield "goto judge_unknown"


def _judges(policy: Policy, capabilities: Capabilities) -> str:
    scope = policy.scope
    judge = functools.partial(_judge, policy.mode, capabilities)
    other_ports = list(_other_ports("th", policy.ports, capabilities))
    container_other_ports = list(_other_ports("th", policy.container_ports, capabilities))
    engine_other_ports = ["tcp dport 53 accept", *_other_ports("udp", policy.ports, capabilities)]
    return f"""\
	chain judge_container {{
{_lines(judge(scope.containers, CountedScope.CONTAINER, container_other_ports))}
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
{_lines(judge(scope.strictest, CountedScope.UNKNOWN, other_ports))}
	}}"""


def _permitted(policy: Policy, capabilities: Capabilities) -> Iterator[str]:
    if capabilities.remembers:
        yield "# What a name taught is for TCP: which host behind the address QUIC asks for cannot be read."
        yield "ip daddr . tcp dport @learned4 accept"
        yield "ip6 daddr . tcp dport @learned6 accept"
    if capabilities.marked:
        yield "# BPF vouches for the first packets, before the sets hold the address. Never for UDP: on an unconnected"
        yield "# socket the mark is that of the packet before."
        yield "# For a SYN only: the socket keeps its mark, and must not outlive a permission that was taken back."
        only = _only(capabilities.marked)
        vouched = f"{policy.marks.vouched:#010x}"
        yield f"{only}{_SYN} meta mark & {vouched} == {vouched} goto vouched"
    for rule in policy.rules:
        yield from _rule_addresses(rule, capabilities)


def _vouched(capabilities: Capabilities) -> Iterator[str]:
    if capabilities.remembers and Feature.DYNAMIC_SETS in capabilities.features:
        yield "delete @revoked4 { ip daddr . tcp dport }"
        yield "delete @revoked6 { ip6 daddr . tcp dport }"
    yield "accept"


def _refuse(capabilities: Capabilities) -> Iterator[str]:
    if Feature.REJECT not in capabilities.features:
        yield "# This kernel knows no better."
        yield "drop"
        return
    if Feature.CT in capabilities.features:
        yield "# A reset would come from the translated address, and the client would go on waiting. ICMP is translated"
        yield "# back; over IPv6 a client on this machine heeds it at its first retransmission, after a second."
        yield "ct status dnat reject with icmpx port-unreachable"
    yield "meta l4proto tcp reject with tcp reset"
    yield "reject with icmpx admin-prohibited"


def _responder_chains(policy: Policy, capabilities: Capabilities, responder: Responder | None) -> str:
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
		{_NO_SYN} accept
		tcp dport != {_ports(policy.container_ports)} accept
		meta nfproto ipv4 iifname != @answered4 accept
		meta nfproto ipv6 iifname != @answered6 accept
{_lines(_seen_by_the_gate(policy.marks, capabilities))}
		fib daddr type != unicast accept
		fib daddr . mark oifname @internal_routes accept
		{_REDIRECT_LIMIT}
		jump judge_container
		meta l4proto tcp redirect to :{responder.port}
	}}
	chain redirect_local {{
		type nat hook output priority -90; policy accept;
{_lines(_redirect_local(policy.marks, responder, capabilities))}
	}}
"""


def _seen_by_the_gate(marks: Marks, capabilities: Capabilities) -> Iterator[str]:
    if Origin.FORWARDED in capabilities.vouched:
        yield "# Whether anybody vouches is not known before BPF has seen the packet: on a bridge's port, where"
        yield "# br_netfilter calls this chain, it may not be attached yet."
        yield f"meta mark & {marks.scope_mask:#010x} != {marks.of(MarkedScope.CONTAINER):#010x} accept"


def _redirect_local(marks: Marks, responder: Responder, capabilities: Capabilities) -> Iterator[str]:
    if responder.local:
        yield "meta l4proto != tcp accept"
        yield f"{_NO_SYN} accept"
        yield "oifname @internal accept"
        yield _HOST_LOOPBACK
        yield _REDIRECT_LIMIT
        yield from _restore_mark(marks, capabilities)
        yield "jump judge_local"
        yield f"meta l4proto tcp redirect to :{responder.port}"


def render_internal(
    names: Iterable[str],
    capabilities: Capabilities,
    responder: Responder | None = None,
    host_loopback: Iterable[str] | None = None,
) -> str:
    """Replaces the set of internal interfaces with `names` and lo, and with a responder the sets of those it serves.

    `host_loopback` None: the table in force, an earlier build's, has no such set.

    A name that nft's text cannot carry literally is left out: that interface is judged as an uplink.
    """
    names = {"lo", *names}
    if Feature.PLAIN_SETS not in capabilities.features:
        rules = [f"oifname {name} accept" for name in _quotable(names)]
        rules += [f"ip daddr 127.0.0.0/8 oifname {name} accept" for name in _quotable(host_loopback or ())]
        return _replace_rules("internal", rules)
    sets: dict[str, Iterable[str]] = {"internal": names}
    if responder is not None:
        answered = responder.interfaces4, responder.interfaces6, names
        sets |= dict(zip(_RESPONDER_SETS, answered, strict=True))
    if host_loopback is not None:
        sets["host_loopback"] = host_loopback
    return "".join(_replace(set_name, members) for set_name, members in sets.items())


def _replace(set_name: str, names: Iterable[str]) -> str:
    text = f"flush set inet {TABLE} {set_name}\n"
    quoted = ", ".join(_quotable(names))
    return text + (f"add element inet {TABLE} {set_name} {{ {quoted} }}\n" if quoted else "")


def _quotable(names: Iterable[str]) -> list[str]:
    """Interface names as nft takes them, sorted, without those that it could not carry."""
    return [f'"{name}"' for name in sorted(names) if _INTERFACE_NAME.fullmatch(name)]


def _replace_rules(chain: str, rules: Iterable[str]) -> str:
    added = (f"add rule inet {TABLE} {chain} {rule}\n" for rule in rules)
    return f"flush chain inet {TABLE} {chain}\n" + "".join(added)


def render_cgroups(marks: Marks, capabilities: Capabilities, cgroups: Iterable[tuple[str, MarkedScope]]) -> str:
    """Has scopes told by these cgroups from now on; empty where nftables does not tell them."""
    if not capabilities.scopes_in_nft:
        return ""
    return _replace_rules("own_mark", _mark_by_cgroup(marks, cgroups))


def render_elements(
    permit: Iterable[Element],
    withdraw: Iterable[tuple[Address, int]],
    held: Container[tuple[Address, int]] | None = None,
) -> str:
    """Grants or refreshes `permit`, then takes back `withdraw`, which wins; empty when there is nothing to do.

    A plain add leaves the lifetime of an element that exists as it is, and deleting one that has expired fails the
    transaction. Hence add, delete, add and add, delete: no packet falls between, since they take effect together.
    Where `held` says what the sets hold, the rest of `permit` is added and no more, in a third of the time.
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
        with_timeout = {key: f"{_key(key)} timeout {seconds}s" for key, seconds in permitted.items()}
        again = [key for key in permitted if held is None or key in held]
        text += _change("add", set_name, with_timeout.values())
        text += _change("delete", set_name, map(_key, again))
        text += _change("add", set_name, (with_timeout[key] for key in again))
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


def _judge(
    mode: Mode, capabilities: Capabilities, level: Level, scope: CountedScope, out_of_scope: Iterable[str]
) -> Iterator[str]:
    if level is not Level.STRICT:
        elsewhere = ", and BPF refuses what it recognises as one" if level is Level.REGISTRIES else ""
        yield f"accept # {level.value} in the policy{elsewhere}"
        return
    features = capabilities.features
    yield from out_of_scope
    yield "jump permitted"
    origins = {Origin.FORWARDED, Origin.LOCAL} if scope is CountedScope.CONTAINER else {Origin.LOCAL}
    if mode is Mode.ENFORCE and capabilities.looks_twice & origins:
        yield f"{_only(capabilities.looks_twice & origins, origins)}jump second_look"
    if Feature.COUNTER in features:
        for protocol in Protocol:
            yield f"meta l4proto {protocol.name.lower()} counter name {counter_name(mode, scope, protocol)}"
    verb = "refused" if mode is Mode.ENFORCE else "observed"
    if Feature.AUDIT in features:
        yield f'log prefix "{verb} {scope.value}" group {AUDIT_GROUP}'
    elif features >= {Feature.LOG, Feature.LIMIT}:
        yield f'limit rate 5/second burst 10 packets log prefix "{LOG_PREFIX}{verb} {scope.value} " level info'
    if mode is Mode.OBSERVE:
        yield "accept # mode observe"


def _only(origins: Collection[Origin], among: Collection[Origin] = frozenset(Origin)) -> str:
    """The match that leaves, of packets that begin `among` these, those of `origins`."""
    if set(origins) == set(among):
        return ""
    (origin,) = origins
    return "iif 0 " if origin is Origin.LOCAL else "iif != 0 "


def _rule_addresses(rule: Rule, capabilities: Capabilities) -> Iterator[str]:
    comment = f"{rule.kind.value} {_printable(rule.name)}"[:_COMMENT_BYTES]
    transport = "tcp" if rule.kind is RuleKind.PROXY else "th"
    # nft takes overlapping networks for a mistake ("conflicting intervals").
    ipv4 = collapse_addresses(network for network in rule.addresses if isinstance(network, IPv4Network))
    ipv6 = collapse_addresses(network for network in rule.addresses if isinstance(network, IPv6Network))
    for keyword, networks in (("ip", ipv4), ("ip6", ipv6)):
        addresses = list(map(_network, networks))
        if capabilities.features >= {Feature.PLAIN_SETS, Feature.INTERVALS}:
            one_of, ports = [f"{{ {', '.join(addresses)} }}"] if addresses else [], [_ports(rule.ports)]
        else:
            one_of, ports = addresses, list(map(str, rule.ports))
        for address in one_of:
            for port in ports:
                yield f'{keyword} daddr {address} {transport} dport {port} accept comment "{comment}"'


def _other_ports(protocol: str, ports: Iterable[int], capabilities: Capabilities) -> Iterator[str]:
    """Accepts what goes to none of `ports`."""
    if Feature.PLAIN_SETS in capabilities.features:
        yield f"{protocol} dport != {_ports(ports)} accept"
        return
    below = 0
    for port in [*sorted(set(ports)), 65_536]:
        if port > below:
            last = f"-{port - 1}" if port - 1 > below else ""
            yield f"{protocol} dport {below}{last} accept"
        below = port + 1


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
    return "\n".join("\t" * indent + line if line else "" for line in lines)
