"""What this kernel gives, and what enforcement makes of it: the one place that knows the rungs.

Each fact was found by trying (`nft.Nft.probe`, the loader's report, a filter on lo), nothing by version: distributions
take features back into old kernels and leave them out of new ones. From the top of the ladder down:

    learning     BPF at tc ingress; else a packet socket, and the answer is ahead of the permission
    vouching     connect hooks that set the mark; else sock_ops (before 5.8); else a second look: the first SYN of each
                 connection is dropped and judged when it comes again, a second later, so that refusal stays exact
    scopes       connect hooks; else programs on the cgroups of each scope (before 5.8); else nftables, by the cgroup of
                 a packet's socket (5.13, and no hybrid hierarchy); else none: "unknown"
    judging      connections, by conntrack; else the packet that begins one
    memory       sets of learned addresses; else the mark alone
    refusing     the responder; else a reset; else, where BPF judges as well, EPERM from connect(2); else silence
    counting     nftables; else BPF
    audit        nfnetlink_log; else a few lines in the kernel's log; else none

What is missing costs comfort or exactness, as `shortfalls` says. It never opens anything.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

AUDIT_GROUP = 0x5245  # nfnetlink_log: where refusals are reported to the daemon, "RE"

LEARNING_PROGRAMS = frozenset({"learn", "track_query", "gate"})
CONNECT_HOOKS = frozenset({"connect4", "connect6"})
STAMPS = frozenset({"stamp_host", "stamp_engine", "stamp_container"})
PROGRAMS = LEARNING_PROGRAMS | CONNECT_HOOKS | {"sendmsg4", "sendmsg6", "sock_create", "guard"}


class Feature(enum.Enum):
    """Something of the kernel's nf_tables that the ruleset uses; the value is rule text that uses it alone."""

    BASE = (
        'chain probe { tcp flags & (fin | syn | rst | ack) == syn meta mark & 0x80000000 == 0x80000000 oifname "lo"'
        " th dport 444-4999 ip daddr 192.0.2.0/24 drop; }"
    )
    PLAIN_SETS = "set probed { type ifname; }\n chain probe { oifname @probed tcp dport { 443, 5000 } accept; }"
    TIMED_SETS = (
        "set probed { type ipv4_addr . inet_service; flags timeout; size 16; }\n"
        " chain probe { ip daddr . tcp dport @probed accept; }"
    )
    DYNAMIC_SETS = (
        "set probed { type ipv4_addr . inet_service; flags dynamic, timeout; size 16; }\n"
        " chain probe { add @probed { ip daddr . tcp dport timeout 5s }; delete @probed { ip daddr . tcp dport }; }"
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
    SOCKET = 'chain probe { socket cgroupv2 level 0 "." accept; }'  # 5.13

    @property
    def kernel_option(self) -> str:
        """The kernel configuration options that bring it."""
        return _OPTIONS[self][0]

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that bring it, where these options are modules."""
        return _OPTIONS[self][1]


_OPTIONS: dict[Feature, tuple[str, tuple[str, ...]]] = {
    Feature.BASE: ("CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET", ("nf_tables",)),
    Feature.PLAIN_SETS: ("CONFIG_NF_TABLES_SET", ("nf_tables_set",)),
    Feature.TIMED_SETS: ("CONFIG_NF_TABLES_SET", ("nf_tables_set",)),
    Feature.DYNAMIC_SETS: ("CONFIG_NF_TABLES_SET", ("nf_tables_set",)),
    Feature.INTERVALS: ("CONFIG_NF_TABLES_SET", ("nf_tables_set",)),
    Feature.COUNTER: ("CONFIG_NFT_COUNTER, CONFIG_NFT_OBJREF", ("nft_counter", "nft_objref")),
    Feature.CT: ("CONFIG_NFT_CT", ("nft_ct",)),
    Feature.LIMIT: ("CONFIG_NFT_LIMIT", ("nft_limit",)),
    Feature.LOG: ("CONFIG_NFT_LOG", ("nft_log", "nf_log_syslog")),
    Feature.AUDIT: ("CONFIG_NFT_LOG, CONFIG_NETFILTER_NETLINK_LOG", ("nft_log", "nfnetlink_log")),
    Feature.REDIRECT: (
        "CONFIG_NFT_NAT, CONFIG_NFT_REDIR, CONFIG_NFT_FIB_INET",
        ("nft_chain_nat", "nft_nat", "nft_redir", "nft_fib_inet"),
    ),
    Feature.REJECT: ("CONFIG_NFT_REJECT_INET", ("nft_reject_inet",)),
    Feature.SOCKET: ("CONFIG_NFT_SOCKET, CONFIG_SOCK_CGROUP_DATA", ("nft_socket",)),
}

# A redirect is watched by counters, bounded by a limit, and guarded by resets.
_ANSWERING = frozenset(
    {Feature.REDIRECT, Feature.CT, Feature.REJECT, Feature.COUNTER, Feature.LIMIT, Feature.PLAIN_SETS}
)


class Origin(enum.Enum):
    """Where a connection begins."""

    LOCAL = "local"  # a socket of this network namespace
    FORWARDED = "forwarded"  # a container's, or whatever else is routed


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Something that this kernel does not give."""

    subject: str
    missing: str  # what was tried and refused
    cost: str
    remedy: str = ""  # "": what is below brings it
    modules: tuple[str, ...] = ()
    kernel_option: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What was found. The default is everything, which is what a kernel of 5.8 or newer with its modules gives."""

    features: frozenset[Feature] = frozenset(Feature)
    programs: frozenset[str] = PROGRAMS  # BPF programs that are loaded
    traffic_control: bool = True  # tc takes BPF filters
    cgroup: bool = True  # there is a cgroup v2 hierarchy to attach to
    unified: bool = True  # it is at /sys/fs/cgroup, where nft looks for it
    learning: bool = True  # False: there is no daemon yet, and a second look would see no more than the first

    @property
    def enforceable(self) -> bool:
        """Whether refusing is possible at all."""
        return Feature.BASE in self.features

    @property
    def learns_in_kernel(self) -> bool:
        """Whether BPF reads DNS answers before their readers do."""
        return self.traffic_control and self.programs >= LEARNING_PROGRAMS

    @property
    def vouched(self) -> frozenset[Origin]:
        """Whose first packets carry BPF's permission before the client has its answer."""
        return self.marked if self.learns_in_kernel else frozenset()

    @property
    def marked(self) -> frozenset[Origin]:
        """Whose marks are ours: set or cleared by a program on every connection, whatever a client put there."""
        marked = set()
        if self.traffic_control and "gate" in self.programs:
            marked.add(Origin.FORWARDED)
        if self.stamps:
            marked.add(Origin.LOCAL)
        return frozenset(marked)

    @property
    def stamps(self) -> bool:
        """Whether BPF stamps scopes, in either way."""
        return self.stamps_connections or self.stamps_sockets

    @property
    def stamps_connections(self) -> bool:
        """Whether connect(2) stamps the scope of its caller."""
        return self.cgroup and self.programs >= CONNECT_HOOKS

    @property
    def stamps_sockets(self) -> bool:
        """Whether sockets are stamped where they are made instead, and vouched for by sock_ops."""
        return self.cgroup and not self.stamps_connections and self.programs >= STAMPS | {"sock_ops"}

    @property
    def scopes_in_nft(self) -> bool:
        """Whether nftables tells scopes by the cgroup of a packet's socket, since BPF does not."""
        return not self.stamps and self.cgroup and self.unified and Feature.SOCKET in self.features

    @property
    def looks_twice(self) -> frozenset[Origin]:
        """Whose first packets are dropped once; where refusing is silence, that gives the second look by itself."""
        if not self.learning or Feature.REJECT not in self.features:
            return frozenset()
        if not self.features >= {Feature.TIMED_SETS, Feature.DYNAMIC_SETS}:
            return frozenset()
        return frozenset(Origin) - self.vouched

    @property
    def guards(self) -> bool:
        """Whether BPF looks at first bytes where packets leave, and at what nftables never saw."""
        return self.learns_in_kernel and "guard" in self.programs

    @property
    def remembers(self) -> bool:
        """Whether sets hold what was learned."""
        return self.features >= {Feature.PLAIN_SETS, Feature.TIMED_SETS}

    @property
    def answers(self) -> bool:
        """Whether refused connections can be led to the responder."""
        return self.features >= _ANSWERING

    @property
    def counts_in_bpf(self) -> bool:
        """Whether BPF judges as well, since nftables cannot count, or can refuse by silence only."""
        return bool(self.programs) and not self.features >= {Feature.COUNTER, Feature.REJECT}


def shortfalls(capabilities: Capabilities) -> Iterator[Shortfall]:
    """What is missing, what that costs and what to do; nothing on a kernel that gives everything."""
    features = capabilities.features
    for feature, cost in _COSTS.items():
        if feature not in features and not (feature is Feature.SOCKET and capabilities.stamps):
            yield Shortfall(
                f"nftables {feature.name.lower()}",
                "the kernel refuses it",
                cost,
                modules=feature.modules,
                kernel_option=feature.kernel_option,
            )
    if not capabilities.traffic_control:
        yield Shortfall(
            "tc filters",
            "the kernel takes no BPF filter on an interface",
            _WITHOUT_LEARNING,
            modules=("sch_ingress", "cls_bpf"),
            kernel_option="CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF",
        )
    elif not capabilities.learns_in_kernel:
        yield Shortfall(
            "bpf learning",
            "the kernel takes no BPF program that reads DNS answers",
            _WITHOUT_LEARNING,
            "run as root, and where the kernel is locked down allow BPF",
        )
    if capabilities.learns_in_kernel and not capabilities.guards:
        yield Shortfall(
            "bpf guard",
            "nothing looks at first bytes where packets leave",
            "a shared address opens every name behind it, macvlan and raw sockets pass unseen, proxies may be asked "
            'for anything, and the level "registries" refuses nothing',
            "let the daemon load BPF programs, and give the kernel tc filters",
        )
    if not capabilities.cgroup:
        yield Shortfall(
            "cgroup v2",
            "not mounted",
            "local connections have no scope and are judged as unknown, the strictest scope in force",
            "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified",
        )
    elif capabilities.stamps_sockets:
        yield Shortfall(
            "bpf connect hooks",
            "may not set a mark (5.8)",
            "engines are told by their cgroup where a socket is made, not by program name: podman, skopeo and ctr in a "
            "user's shell count as the host; refusals do not name the process",
            'a newer kernel, or [scope] host = "strict"',
        )
    elif capabilities.scopes_in_nft:
        yield Shortfall(
            "bpf connect hooks",
            "refused",
            "nftables tells engines by their cgroup, not by program name: podman, skopeo and ctr in a user's shell "
            "count as the host; refusals do not name the process",
            'let the daemon load BPF programs, or write [scope] host = "strict"',
        )
    elif not capabilities.stamps_connections:
        yield Shortfall(
            "bpf connect hooks",
            "refused",
            "local connections have no scope and are judged as unknown, the strictest scope in force",
            "let the daemon load BPF programs",
        )


_WITHOUT_LEARNING = (
    "addresses are learned by a packet socket: a first connection may wait a second for them; nothing looks at first "
    'bytes: a shared address opens every name behind it, and the level "registries" refuses nothing'
)
_COSTS: dict[Feature, str] = {
    Feature.BASE: "nothing can be refused",
    Feature.PLAIN_SETS: "ports and interfaces are spelled out in rules",
    Feature.TIMED_SETS: "learned addresses live in BPF only, and taking one back does not end its open connections",
    Feature.DYNAMIC_SETS: "a registry that is allowed once more may lose a packet of a connection that was open",
    Feature.INTERVALS: "each listed network is a rule of its own",
    Feature.COUNTER: "BPF counts refusals, nftables does not",
    Feature.CT: "a connection is judged by its first packet only, and nobody answers refused clients",
    Feature.LIMIT: "nobody answers refused clients, and refusals are not in the kernel's log",
    Feature.LOG: "refusals are not in the kernel's log",
    Feature.AUDIT: "refusals are not audited; some are in the kernel's log, of its first network namespace",
    Feature.REDIRECT: "refused clients are reset, and not told by whom",
    Feature.REJECT: "refused packets are dropped: clients wait for their own deadline, unless BPF can tell them",
    Feature.SOCKET: "nftables cannot tell engines and containers from the host either",
}
