"""What the daemon, the BPF programs and the ruleset agree on: marks, limits, layouts.

Everything is owned here. `bpf/shared.h` is rendered from this module (`python -m enforcer.kernel_abi > bpf/shared.h`)
and committed; a test compares byte for byte, and the C compiler asserts each size and offset.

Numbers in structures are in host byte order unless the field says "network order". Addresses are 16 bytes; IPv4 is
mapped into IPv6 (::ffff:a.b.c.d), so that one map serves both families.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address


# --- marks -----------------------------------------------------------------------------------------------------------
class MarkedScope(enum.IntEnum):
    """Whose socket it is, stamped by the connect hooks into the mark; 0 is a packet that no hook has seen.

    The number of a scope is what maps hold; what a mark holds is `Marks.of` it.
    """

    UNSTAMPED = 0
    HOST = 1
    ENGINE = 2
    CONTAINER = 3


@dataclass(frozen=True, slots=True)
class Marks:
    """Which three bits of skb->mark are ours: the highest vouches, the lower two are the number of a scope.

    Any three, side by side or not, since others leave no other choice on some hosts. ValueError for another count.
    """

    mask: int

    def __post_init__(self) -> None:
        if not 0 < self.mask < 1 << 32 or self.mask.bit_count() != MARK_BITS:
            raise ValueError(f"{self.mask:#x} is not {MARK_BITS} of 32 bits")

    @property
    def vouched(self) -> int:
        """The bit that lets a SYN pass before the sets know its address."""
        return 1 << self.mask.bit_length() - 1

    @property
    def scope_mask(self) -> int:
        """The two bits of the scope."""
        return self.mask & ~self.vouched

    def of(self, scope: MarkedScope) -> int:
        """The bits that say `scope`."""
        low = self.scope_mask & -self.scope_mask
        return (low if scope & 1 else 0) | (self.scope_mask & ~low if scope & 2 else 0)

    def scope(self, mark: int) -> MarkedScope:
        """The scope that a packet's mark says."""
        return next(scope for scope in MarkedScope if self.of(scope) == mark & self.scope_mask)

    @property
    def settings(self) -> tuple[int, ...]:
        """The fields mark_... of SETTINGS, in their order."""
        stamped = MarkedScope.HOST, MarkedScope.ENGINE, MarkedScope.CONTAINER
        return self.mask, self.vouched, *map(self.of, stamped)


MARK_BITS = 3
# Clear of the bits of kube-proxy (0xC000), Tailscale (0xFF0000), Calico's eBPF data plane (0x1FF00000) and portmap
# (0x2000); other_marks has who is not.
DEFAULT_MARKS = Marks(0xE0000000)
SCOPES = len(MarkedScope)


# --- places -----------------------------------------------------------------------------------------------------------
BPFFS = "/sys/fs/bpf/registry-enforcer"  # where BPF state is pinned, unless somebody says otherwise

# --- limits ----------------------------------------------------------------------------------------------------------
MAX_WIRE_BYTES = 2048  # a DNS message that BPF reads whole; longer ones the daemon resolves itself
MAX_NAME_BYTES = 256  # kernel: LPM_DATA_SIZE_MAX (kernel/bpf/lpm_trie.c); a name is 253 characters and a NUL
MAX_PORTS_PER_NAME = 8
MAX_NAMES = 131_072
MAX_RESOLVERS = 64
MAX_RANGES = 4_096
MAX_QUERIES = 16_384
MAX_LEARNED = 262_144  # all that the daemon holds: the guard lets out what is here and nothing else
MAX_PROGRAM_NAMES = 256
MAX_CGROUPS = 16_384
MAX_REGISTRY_PORTS = 1_024
MAX_LISTED = 16_384  # (network, port) that a policy names
MAX_CONNECTS = 8_192  # each is needed for the milliseconds until its refusal is reported
LOOPBACK_IFINDEX = 1  # of lo in every network namespace (include/net/flow.h)
NETNS_ANY = 0xFFFFFFFFFFFFFFFF  # no kernel counts that far
MAX_FLOWS = 65_536  # connections to learned addresses; one that is forgotten is ended with its next byte
MAX_HELLOS = 4_096  # of these, within their ClientHello
MAX_STRAYS = 16_384  # connections whose beginning the guard did not see, to what nothing permits
LET_BE = 0  # value of `strays`: nobody's to judge
STRAY_SECONDS = 5  # such a one is held up, as long as the nftables table may be away, before it is ended
MAX_UPLINKS = 4_096
MAX_CATALOGUE = 4_096
MAX_ANSWER_BYTES = 1_024
EVENT_BYTES = 1 << 20  # the ring
ENDING_BYTES = 1 << 18  # the guard's
COMM_BYTES = 16  # kernel: TASK_COMM_LEN
LIFETIME_FLOOR_SECONDS = 300  # a learned address lives max(TTL, this): clients cache answers longer than they should
LIFETIME_CEILING_SECONDS = 86_400
REFRESH_MARGIN_SECONDS = 60  # a repeated answer that extends the lifetime by less is not reported again
QUERY_WINDOW_SECONDS = 10  # an answer later than this after its query teaches nothing
USE_GRAIN_SECONDS = 1  # how exactly `learned_value.used_at` is kept: a busy connection does not write it at each packet


class Outcome(enum.IntEnum):
    """What became of a packet from port 53: index into the `counters` map and label of enforcer_dns_answers_total."""

    LEARNED = 0  # at least one address is new or lives longer now
    REPEATED = 1  # all of its addresses were known already
    UNREADABLE = 2  # BPF could not read it whole; the daemon was asked to resolve the name
    NO_ADDRESS = 3  # an allowed name without an address that may be learned: negative, other type, loopback ...
    UNLISTED = 4  # the name is not in the policy
    UNTRUSTED = 5  # not from a trusted resolver
    UNSOLICITED = 6  # no query was seen that it answers (resolver, addresses, port, transaction id, time)
    MISMATCHED = 7  # answers another question than the one that was asked
    MALFORMED = 8  # not a DNS answer
    EVENT_LOST = 9  # learned, but the ring was full: the daemon reads the `learned` map instead


class RangeClass(enum.IntEnum):
    """Value of the `ranges` map: addresses of an answer that need more than an allowed name."""

    NEVER = 1  # loopback, link-local, multicast, unspecified, this host's own
    PRIVATE = 2  # only for names the operator wrote


class ResolverTrust(enum.IntEnum):
    """Value of the `resolvers` map; a server that is not in it is not trusted."""

    TRUSTED = 1
    RETIRED = 2  # this host's until a moment ago: answers the questions that are under way, and no new ones


class Judging(enum.IntEnum):
    """What BPF does beside nftables where nftables cannot count or can only drop (`settings.judging`)."""

    NOT = 0
    COUNT = 1  # connections that would be refused
    REFUSE = 2  # count, and tell the client at once: EPERM from connect(2), a reset to a container


class JudgedPorts(enum.IntEnum):
    """Value of the `levels` map: where connections of a scope need permission."""

    # Ascending: of several witnesses for a packet's scope the guard believes the strictest.
    NONE = 0
    RECOGNISED = 1  # nowhere; what is recognised as a registry by its first bytes is refused
    REGISTRY = 2  # the registry ports
    EVERY = 3  # every TCP port but DNS; of UDP the registry ports


class Listed(enum.IntEnum):
    """Value of the `listed` map: what is at an address that the policy names."""

    REGISTRY = 1  # or a destination: reachable, whatever is said there
    PROXY = 2  # reachable, and whom it is asked for is judged


class GuardMode(enum.IntEnum):
    """What the guard expects of a connection's first bytes (`flow.mode`)."""

    NAME = 0  # a server name that the policy allows
    PROXY = 1  # a request to a proxy for such a name, or such a name
    RECOGNISE = 2  # anything but a registry that the policy does not allow


class FlowState(enum.IntEnum):
    """How far the guard has read a connection (`flow.state`)."""

    BEGUN = 0
    HELLO = 1  # within a ClientHello, or between two
    CONNECT = 2  # within the head of a CONNECT, behind its target
    TUNNEL = 3  # behind that head
    ALLOWED = 4
    ENDED = 5


class GuardOutcome(enum.IntEnum):
    """What the guard said: index into the `guarded` map and label of enforcer_guarded_total."""

    PASSED = 0  # the connection's name is allowed
    UNLISTED_NAME = 1
    NO_NAME = 2  # TLS without a server name, HTTP without a host, a host that is an address
    HIDDEN_NAME = 3  # encrypted (ECH): the name outside of it is not the one that counts
    UNREADABLE = 4  # neither TLS nor HTTP, or more of it than is read
    UNKNOWN = 5  # its beginning was not seen, or is forgotten
    UNLISTED_ADDRESS = 6  # a new connection that nftables did not see, or was told to let by
    REPORT_LOST = 7  # ended, but the ring was full
    HELD_UP = 8  # a packet of a connection whose beginning was not seen, to what nothing permits


class Answer(enum.IntEnum):
    """Index into the `answers` map: what a client is told whose connection the guard ends."""

    TLS = 0
    HTTP = 1


class Protocol(enum.IntEnum):
    """IP protocol numbers."""

    TCP = 6
    UDP = 17


# --- structures ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Field:
    """One member of a shared structure: C type, array length (0: scalar) and what it means."""

    c_type: str
    name: str
    count: int
    meaning: str


_FORMATS = {"__u8": "B", "__u16": "H", "__u32": "I", "__u64": "Q", "char": "s"}


@dataclass(frozen=True, slots=True)
class Structure:
    """A C structure without implicit padding, and its Python codec."""

    name: str
    meaning: str
    fields: tuple[Field, ...]
    # The same layout for `struct`: byte arrays are one bytes value, other arrays one value an item.
    codec: struct.Struct = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        parts = []
        for field in self.fields:
            letter = _FORMATS[field.c_type]
            if field.count and letter in "Bs":
                parts.append(f"{field.count}s")
            else:
                parts.append(f"{field.count or 1}{letter}")
        object.__setattr__(self, "codec", struct.Struct("=" + "".join(parts)))

    @property
    def size(self) -> int:
        """Bytes."""
        return self.codec.size

    def offsets(self) -> Iterator[tuple[Field, int]]:
        """Each field with its offset in bytes."""
        at = 0
        for field in self.fields:
            yield field, at
            at += struct.calcsize("=" + _FORMATS[field.c_type]) * (field.count or 1)


NAME_KEY = Structure(
    "name_key",
    "Key of `names`: a reversed, lower-case name. Exact: all of it and a NUL. Wildcard *.x: reversed x and a dot.",
    (
        Field("__u32", "prefix_bits", 0, "length of `reversed` that counts, in bits"),
        Field("__u8", "reversed", MAX_NAME_BYTES, "moc.elpmaxe.a NUL, or moc.elpmaxe."),
    ),
)
NAME_RULE = Structure(
    "name_rule",
    "Value of `names`: what an answer for this name permits.",
    (
        Field("__u64", "pattern_id", 0, "names the pattern across restarts: see pattern_id()"),
        Field("__u16", "ports", MAX_PORTS_PER_NAME, "host order; the first port_count count"),
        Field("__u8", "port_count", 0, "1 .. MAX_PORTS_PER_NAME"),
        Field("__u8", "private_addresses", 0, "1: an answer in a private range may teach"),
        Field("__u8", "named_ports", 0, "bit i: clients may name it on ports[i]; 0: it is a proxy's there and no more"),
        Field("__u8", "proxy_ports", 0, "bit i: a proxy is at the addresses on ports[i]"),
        Field("__u8", "unnamed_ports", 0, "bit i: what is said at the addresses on ports[i] is not looked at"),
        Field("__u8", "padding", 3, "zero"),
    ),
)
RANGE_KEY = Structure(
    "range_key",
    "Key of `ranges`; the value is a __u32 RANGE_*.",
    (
        Field("__u32", "prefix_bits", 0, "of the mapped address: an IPv4 prefix is 96 longer"),
        Field("__u8", "address", 16, "network order, IPv4 mapped"),
    ),
)
QUERY_KEY = Structure(
    "query_key",
    "Key of `queries`: one question that left this host through an uplink or lo.",
    (
        Field("__u8", "resolver", 16, "network order, IPv4 mapped"),
        Field("__u8", "client", 16, "the address that asked, after source NAT"),
        Field("__u16", "client_port", 0, "network order, as on the wire"),
        Field("__u16", "transaction_id", 0, "network order, as on the wire"),
        Field("__u32", "protocol", 0, "IPPROTO_UDP or IPPROTO_TCP"),
        Field("__u32", "loopback", 0, "1: it left through lo, and so is answered; 0: through any other interface"),
    ),
)
QUERY = Structure(
    "query",
    "Value of `queries`.",
    (
        Field("__u64", "question_hash", 0, "of the lower-case question name, type and class, keyed with question_key"),
        Field("__u64", "asked_at", 0, "nanoseconds, clock of this build"),
    ),
)
LISTED_KEY = Structure(
    "listed_key",
    "Key of `listed`, an address that the policy names; there is no value to speak of.",
    (
        Field("__u32", "prefix_bits", 0, "32 for the port, and those of the mapped address that count"),
        Field("__u16", "port", 0, "host order"),
        Field("__u16", "padding", 0, "zero"),
        Field("__u8", "address", 16, "network order, IPv4 mapped"),
    ),
)
LEARNED_KEY = Structure(
    "learned_key",
    "Key of `learned`: where a connection may go.",
    (
        Field("__u8", "address", 16, "network order, IPv4 mapped"),
        Field("__u16", "port", 0, "host order"),
        Field("__u16", "padding", 0, "zero"),
    ),
)
LEARNED = Structure(
    "learned_value",
    "Value of `learned`.",
    (
        Field("__u64", "expires_at", 0, "nanoseconds, clock of this build; later: no permission"),
        Field("__u64", "pattern_id", 0, "the pattern that taught it last"),
        Field("__u64", "used_at", 0, "when a connection went there, to USE_GRAIN_SECONDS, same clock; 0: never"),
        Field("__u64", "unnamed_until", 0, "as expires_at: until then nobody looks what name is asked for there"),
        Field("__u64", "proxy_until", 0, "as expires_at: until then a proxy is there"),
    ),
)
SETTINGS = Structure(
    "settings",
    "The one value of `settings`; all zero (not configured) means: learn nothing, vouch for nothing.",
    (
        Field("__u64", "question_key", 0, "secret; a forged question cannot be fitted to a hash"),
        Field("__u64", "lifetime_floor", 0, "nanoseconds"),
        Field("__u64", "lifetime_ceiling", 0, "nanoseconds"),
        Field("__u64", "refresh_margin", 0, "nanoseconds"),
        Field("__u64", "query_window", 0, "nanoseconds"),
        Field(
            "__u64",
            "netns_cookie",
            0,
            "of the namespace that is enforced; sockets of others are left alone. 0: the initial one; NETNS_ANY: all",
        ),
        Field("__u64", "pidns_device", 0, "st_dev of /proc/1/ns/pid as the kernel counts it; 0: not known"),
        Field("__u64", "pidns_inode", 0, "st_ino of the same"),
        Field("__u32", "mark_mask", 0, "our bits; others survive"),
        Field("__u32", "mark_vouched", 0, "the vouching bit"),
        Field("__u32", "mark_host", 0, "scope bits: host"),
        Field("__u32", "mark_engine", 0, "scope bits: engine"),
        Field("__u32", "mark_container", 0, "scope bits: container"),
        Field("__u32", "configured", 0, "1 when the above counts"),
        Field("__u32", "judging", 0, "JUDGING_*"),
        Field("__u32", "observing", 0, "1: mode observe, which has counters of its own"),
        Field("__u32", "recognising", 0, "1: some scope's level is JUDGED_RECOGNISED"),
        Field("__u32", "padding", 0, "zero"),
    ),
)
EVENT = Structure(
    "dns_event",
    "Head of an event; `wire_length` bytes of the DNS message follow.",
    (
        Field("__u64", "at", 0, "nanoseconds, clock of this build"),
        Field("__u32", "interface", 0, "index of the interface it arrived on"),
        Field("__u32", "message_length", 0, "bytes of the whole message; more than wire_length if it was cut"),
        Field("__u16", "wire_length", 0, "bytes that follow, at most MAX_WIRE_BYTES"),
        Field("__u8", "outcome", 0, "OUTCOME_*"),
        Field("__u8", "protocol", 0, "IPPROTO_UDP or IPPROTO_TCP"),
        Field("__u32", "inserted", 0, "how many (address, port) this packet added or extended"),
        Field("__u8", "resolver", 16, "network order, IPv4 mapped"),
    ),
)
CONNECT_KEY = Structure(
    "connect_key",
    "Key of `connects`: what a connect() without a voucher and the report of its refusal have in common.",
    (
        Field("__u8", "address", 16, "network order, IPv4 mapped"),
        Field("__u16", "port", 0, "host order"),
        Field("__u16", "protocol", 0, "IPPROTO_TCP or IPPROTO_UDP"),
        Field("__u32", "scope", 0, "SCOPE_*"),
        Field("__u32", "uid", 0, "as the host's user namespace counts"),
    ),
)
CONNECT = Structure(
    "connect_value",
    "Value of `connects`: who called it last.",
    (
        Field("__u64", "at", 0, "nanoseconds, clock of this build"),
        Field("__u64", "other_at", 0, "when another process did the same, the last time; 0: never"),
        Field("__u64", "cgroup_id", 0, "of cgroup v2"),
        Field("__u32", "process", 0, "in the pid namespace of the settings; 0: not known"),
        Field("__u32", "padding", 0, "zero"),
        Field("char", "comm", COMM_BYTES, "of the thread, ends in NUL"),
    ),
)
FLOW_KEY = Structure(
    "flow_key",
    "Key of `flows`, `hellos` and `strays`: a TCP connection as it leaves through an uplink, translated.",
    (
        Field("__u8", "source", 16, "network order, IPv4 mapped"),
        Field("__u8", "destination", 16, "network order, IPv4 mapped"),
        Field("__u16", "source_port", 0, "host order"),
        Field("__u16", "destination_port", 0, "host order"),
    ),
)
FLOW = Structure(
    "flow",
    "Value of `flows`.",
    (
        Field("__u64", "pattern_id", 0, "the pattern that allowed its name; 0: none yet"),
        Field("__u32", "next", 0, "sequence number of the first byte that was not read"),
        Field("__u32", "head_bytes", 0, "of a CONNECT's head, so far"),
        Field("__u16", "port", 0, "host order; a proxy is asked for another one than its own"),
        Field("__u8", "state", 0, "FLOW_*"),
        Field("__u8", "mode", 0, "GUARD_NAME, GUARD_PROXY or GUARD_RECOGNISE"),
        Field("__u32", "padding", 0, "zero"),
    ),
)
UPLINK = Structure(
    "uplink",
    "Value of `uplinks`, by index of the interface; one that is not there is not guarded.",
    (
        Field("__u32", "any_port", 0, "one of the registry ports, for packets that hide theirs"),
        Field("__u32", "link_bytes", 0, "of the link layer's header: 14, or 0"),
    ),
)
LINK = Structure(
    "link",
    "Key of `own_links`: an address of this host's own on the link layer; what leaves with another is a stranger's.",
    (
        Field("__u8", "address", 6, "as on the wire"),
        Field("__u8", "padding", 2, "zero"),
    ),
)
ENDING = Structure(
    "ending",
    "One record of the ring `endings`: a connection that the guard ended, or in mode observe would have.",
    (
        Field("__u64", "at", 0, "nanoseconds, clock of this build"),
        Field("__u8", "source", 16, "network order, IPv4 mapped; translated, as all of this"),
        Field("__u8", "destination", 16, "network order, IPv4 mapped"),
        Field("__u16", "source_port", 0, "host order"),
        Field("__u16", "destination_port", 0, "host order"),
        Field("__u32", "interface", 0, "index of the uplink"),
        Field("__u32", "scope", 0, "SCOPE_*"),
        Field("__u16", "name_length", 0, "bytes of `name` that count"),
        Field("__u8", "protocol", 0, "IPPROTO_TCP or IPPROTO_UDP"),
        Field("__u8", "verdict", 0, "GUARD_*"),
        Field("__u8", "name", 256, "what was asked for, as it was written"),
    ),
)
ANSWER = Structure(
    "answer",
    "Value of `answers`.",
    (
        Field("__u32", "length", 0, "of `bytes` that count; 1 .. MAX_ANSWER_BYTES"),
        Field("__u32", "sum", 0, "of these as 16-bit words in memory's order, not folded (RFC 1071)"),
        Field("__u8", "bytes", MAX_ANSWER_BYTES, "what follows the TCP header"),
    ),
)
STRUCTURES = (
    *(NAME_KEY, NAME_RULE, RANGE_KEY, QUERY_KEY, QUERY, LISTED_KEY, LEARNED_KEY, LEARNED, SETTINGS),
    *(EVENT, CONNECT_KEY, CONNECT, FLOW_KEY, FLOW, UPLINK, LINK, ENDING, ANSWER),
)

_LIMITS = (
    "MAX_WIRE_BYTES",
    "MAX_NAME_BYTES",
    "MAX_PORTS_PER_NAME",
    "MAX_NAMES",
    "MAX_RESOLVERS",
    "MAX_RANGES",
    "MAX_QUERIES",
    "MAX_LEARNED",
    "MAX_PROGRAM_NAMES",
    "MAX_CGROUPS",
    "MAX_REGISTRY_PORTS",
    "MAX_LISTED",
    "MAX_CONNECTS",
    "MAX_FLOWS",
    "MAX_HELLOS",
    "MAX_STRAYS",
    "LET_BE",
    "STRAY_SECONDS",
    "MAX_UPLINKS",
    "MAX_CATALOGUE",
    "MAX_ANSWER_BYTES",
    "USE_GRAIN_SECONDS",
    "LOOPBACK_IFINDEX",
    "EVENT_BYTES",
    "ENDING_BYTES",
    "COMM_BYTES",
)


# --- codecs ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class DnsEvent:
    """One learning packet, as BPF saw it."""

    at_ns: int
    interface: int
    message_length: int
    outcome: Outcome
    protocol: Protocol
    inserted: int
    resolver: IPv4Address | IPv6Address
    wire: bytes  # at most MAX_WIRE_BYTES


@dataclass(frozen=True, slots=True)
class Connect:
    """The last connect() to one destination, as a hook saw it."""

    at_ns: int
    other_at_ns: int  # when a process other than `process` did the same; 0: never
    cgroup_id: int
    process: int  # 0: not known
    comm: bytes  # whatever the process calls itself


@dataclass(frozen=True, slots=True)
class Ending:
    """A connection that the guard ended, or in mode observe would have."""

    at_ns: int
    source: IPv4Address | IPv6Address  # as on the wire: after source NAT
    destination: IPv4Address | IPv6Address
    source_port: int
    destination_port: int
    interface: int
    scope: MarkedScope
    protocol: Protocol
    outcome: GuardOutcome
    name: bytes  # what was asked for, as the client wrote it; empty: nothing was read


def pack_address(address: IPv4Address | IPv6Address) -> bytes:
    """16 bytes, network order; IPv4 mapped into IPv6 (RFC 4291 section 2.5.5.2)."""
    if isinstance(address, IPv4Address):
        return b"\0" * 10 + b"\xff\xff" + address.packed
    return address.packed


def unpack_address(packed: bytes) -> IPv4Address | IPv6Address:
    """The inverse of `pack_address`: a mapped address becomes an IPv4Address."""
    address = IPv6Address(packed)
    return address.ipv4_mapped or address


def pack_name_key(name: str, *, wildcard: bool) -> bytes:
    """Key of `names` for an ASCII, lower-case name without trailing dot; ValueError if it does not fit."""
    reversed_name = name.encode("ascii")[::-1] + (b"." if wildcard else b"\0")
    if len(reversed_name) > MAX_NAME_BYTES - 2:
        raise ValueError(f"{name}: longer than 253 characters")
    return NAME_KEY.codec.pack(len(reversed_name) * 8, reversed_name)


def pack_name_rule(
    pattern_id: int,
    ports: Iterable[int],
    *,
    private_addresses: bool,
    named_ports: Collection[int] | None = None,
    proxy_ports: Collection[int] = (),
    unnamed_ports: Collection[int] = (),
) -> bytes:
    """Value of `names`; ValueError for no port or more than MAX_PORTS_PER_NAME. None: `named_ports` are all."""
    ports = list(ports)
    if not 1 <= len(ports) <= MAX_PORTS_PER_NAME:
        raise ValueError(f"{len(ports)} ports: 1 to {MAX_PORTS_PER_NAME} fit")
    padded = ports + [0] * (MAX_PORTS_PER_NAME - len(ports))
    named_ports = ports if named_ports is None else named_ports
    bits = [
        sum(1 << i for i, port in enumerate(ports) if port in some)
        for some in (named_ports, proxy_ports, unnamed_ports)
    ]
    return NAME_RULE.codec.pack(pattern_id, *padded, len(ports), int(private_addresses), *bits, b"")


def pack_range_key(network_address: IPv4Address | IPv6Address, prefix_length: int) -> bytes:
    """Key of `ranges`."""
    mapped_bits = prefix_length + (96 if isinstance(network_address, IPv4Address) else 0)
    return RANGE_KEY.codec.pack(mapped_bits, pack_address(network_address))


def pack_listed_key(network_address: IPv4Address | IPv6Address, prefix_length: int, port: int) -> bytes:
    """Key of `listed`."""
    mapped_bits = prefix_length + (96 if isinstance(network_address, IPv4Address) else 0)
    return LISTED_KEY.codec.pack(32 + mapped_bits, port, 0, pack_address(network_address))


def pack_refusal_slot(scope: MarkedScope, protocol: Protocol, *, observing: bool) -> bytes:
    """Key of `refusals`."""
    return struct.pack("=I", (observing * SCOPES + scope) * 2 + (protocol == Protocol.UDP))


def pack_learned_key(address: IPv4Address | IPv6Address, port: int) -> bytes:
    """Key of `learned`."""
    return LEARNED_KEY.codec.pack(pack_address(address), port, 0)


def unpack_learned_key(key: bytes) -> tuple[IPv4Address | IPv6Address, int]:
    """(address, port) of a key of `learned`."""
    packed, port, _ = LEARNED_KEY.codec.unpack(key)
    return unpack_address(packed), port


def pack_connect_key(
    address: IPv4Address | IPv6Address, port: int, protocol: Protocol, scope: MarkedScope, uid: int
) -> bytes:
    """Key of `connects`."""
    return CONNECT_KEY.codec.pack(pack_address(address), port, protocol, scope, uid)


def decode_connect(value: bytes) -> Connect:
    """One value of `connects`."""
    at_ns, other_at_ns, cgroup_id, process, _, comm = CONNECT.codec.unpack(value)
    return Connect(at_ns, other_at_ns, cgroup_id, process, comm.partition(b"\0")[0])


def pack_learned(
    expires_ns: int, pattern_id: int, *, used_at: int = 0, unnamed_until: int = 0, proxy_until: int = 0
) -> bytes:
    """Value of `learned`; nanoseconds."""
    return LEARNED.codec.pack(expires_ns, pattern_id, used_at, unnamed_until, proxy_until)


def pack_uplink(any_port: int, *, ethernet: bool) -> bytes:
    """Value of `uplinks`; without Ethernet a packet begins with its network header (tun, WireGuard, PPP)."""
    return UPLINK.codec.pack(any_port, 14 if ethernet else 0)


def pack_link(address: bytes) -> bytes:
    """Key of `own_links`; ValueError for an address that is not 6 bytes long."""
    if len(address) != 6:
        raise ValueError(f"a link layer's address of {len(address)} bytes")
    return LINK.codec.pack(address, b"")


def pack_flow_key(
    source: IPv4Address | IPv6Address,
    source_port: int,
    destination: IPv4Address | IPv6Address,
    destination_port: int,
) -> bytes:
    """Key of `flows`."""
    return FLOW_KEY.codec.pack(pack_address(source), pack_address(destination), source_port, destination_port)


def pack_flow(state: FlowState, mode: GuardMode = GuardMode.NAME, *, pattern_id: int = 0, port: int = 0) -> bytes:
    """Value of `flows`, of a connection whose bytes are not read any more."""
    return FLOW.codec.pack(pattern_id, 0, 0, port, state, mode, 0)


def pack_answer(answer: bytes) -> bytes:
    """Value of `answers`; ValueError unless 1 .. MAX_ANSWER_BYTES bytes."""
    if not 1 <= len(answer) <= MAX_ANSWER_BYTES:
        raise ValueError(f"an answer of {len(answer)} bytes")
    padded = answer + bytes(len(answer) % 2)
    return ANSWER.codec.pack(len(answer), sum(struct.unpack(f"={len(padded) // 2}H", padded)), answer)


def decode_ending(record: bytes) -> Ending:
    """One record of the guard's ring; ValueError if it is not one. What perf's buffer adds behind it is left out."""
    if len(record) < ENDING.size:
        raise ValueError(f"record of {len(record)} bytes, {ENDING.size} expected")
    at, source, destination, source_port, destination_port, interface, scope, length, protocol, outcome, name = (
        ENDING.codec.unpack_from(record)
    )
    return Ending(
        at,
        unpack_address(source),
        unpack_address(destination),
        source_port,
        destination_port,
        interface,
        MarkedScope(scope),
        Protocol(protocol),
        GuardOutcome(outcome),
        name[:length],
    )


def decode_event(record: bytes) -> DnsEvent:
    """One ring record; ValueError if it is not one (a lost half of a perf record, another ABI)."""
    if len(record) < EVENT.size:
        raise ValueError(f"event of {len(record)} bytes, at least {EVENT.size} expected")
    at, interface, message_length, wire_length, outcome, protocol, inserted, resolver = EVENT.codec.unpack_from(record)
    wire = bytes(record[EVENT.size : EVENT.size + wire_length])
    if len(wire) != wire_length:
        raise ValueError(f"event announces {wire_length} bytes of DNS and carries {len(wire)}")
    return DnsEvent(
        at, interface, message_length, Outcome(outcome), Protocol(protocol), inserted, unpack_address(resolver), wire
    )


# --- bpf/shared.h ----------------------------------------------------------------------------------------------------
def render_shared_header() -> str:
    """The text of bpf/shared.h."""
    lines = [
        "/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */",
        "/* Rendered by `python -m enforcer.kernel_abi > bpf/shared.h`; change enforcer/kernel_abi.py instead. */",
        "#ifndef REGISTRY_ENFORCER_SHARED_H",
        "#define REGISTRY_ENFORCER_SHARED_H",
        "",
    ]
    lines += [f"#define {name} {globals()[name]}" for name in _LIMITS]
    lines.append("")
    for outcome in Outcome:
        lines.append(f"#define OUTCOME_{outcome.name} {outcome.value}")
    lines.append(f"#define OUTCOMES {len(Outcome)}")
    lines.append("")
    for range_class in RangeClass:
        lines.append(f"#define RANGE_{range_class.name} {range_class.value}")
    lines.append("")
    for trust in ResolverTrust:
        lines.append(f"#define RESOLVER_{trust.name} {trust.value}")
    lines.append("")
    for judging in Judging:
        lines.append(f"#define JUDGING_{judging.name} {judging.value}")
    for ports in JudgedPorts:
        lines.append(f"#define JUDGED_{ports.name} {ports.value}")
    for prefix, members in (
        ("LISTED", Listed),
        ("GUARD", GuardMode),
        ("FLOW", FlowState),
        ("GUARD", GuardOutcome),
        ("ANSWER", Answer),
    ):
        lines += [f"#define {prefix}_{member.name} {member.value}" for member in members]
    lines += [f"#define GUARD_OUTCOMES {len(GuardOutcome)}", f"#define ANSWERS {len(Answer)}"]
    lines.append(f"#define NETNS_ANY {NETNS_ANY:#x}ULL")
    for scope in MarkedScope:
        lines.append(f"#define SCOPE_{scope.name} {scope.value}")
    lines.append(f"#define SCOPES {SCOPES}")
    for structure in STRUCTURES:
        lines += ["", f"/* {structure.meaning} */", f"struct {structure.name} {{"]
        for field in structure.fields:
            array = f"[{field.count}]" if field.count else ""
            lines.append(f"\t{field.c_type} {field.name}{array}; /* {field.meaning} */")
        lines.append("};")
        lines.append(
            f'_Static_assert(sizeof(struct {structure.name}) == {structure.size}, "size of {structure.name}");'
        )
        for field, offset in structure.offsets():
            lines.append(
                f"_Static_assert(__builtin_offsetof(struct {structure.name}, {field.name}) == {offset}, "
                f'"{structure.name}.{field.name}");'
            )
    lines += ["", "#endif"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_shared_header(), end="")
