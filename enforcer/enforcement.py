"""Enforcement: the state of one daemon and everything that changes it.

Order is what makes it safe. At start BPF learns before nftables refuses, so that nothing allowed is lost; a restarted
daemon adopts what is pinned and never takes anything away before its successor is in place. A reload narrows first
(names out of BPF, then the ruleset and revoked elements in one transaction) and widens last, so that a failure at any
point leaves at most the intersection of both policies.

Everything here runs on the event loop's thread and one place changes the learned state, so there are no locks.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec

from enforcer import (
    __version__,
    advice,
    attribution,
    auditing,
    bpf,
    conntrack,
    control,
    dns_answer,
    kernel_abi,
    ladder,
    metrics,
    netlink,
    nflog,
    nft,
    procfs,
    responder,
    revocation,
    ruleset,
    state,
    topology,
)
from enforcer.asking import Beside, OwnQuestions
from enforcer.audit import AuditLog
from enforcer.audit_record import Drifted, Kind, Report
from enforcer.bounds import Bounded, Room
from enforcer.bpf import Loader
from enforcer.denial import Refusal, host_name
from enforcer.drift import Repairs, UnannouncedDrift
from enforcer.faults import Faults
from enforcer.guarding import Guard, judged_ports, listed_map, recognises
from enforcer.kernel_abi import (
    DnsEvent,
    GuardOutcome,
    Judging,
    MarkedScope,
    Marks,
    Outcome,
    Protocol,
    RangeClass,
    ResolverTrust,
)
from enforcer.learned import Changes, Destination, LearnedAddress, LearnedAddresses, combined, may_teach, permitted
from enforcer.metrics import Fault
from enforcer.overhearing import Overhearing, Packet
from enforcer.packet_socket import PacketSockets
from enforcer.policy import (
    Address,
    HostPattern,
    Mode,
    NameIndex,
    Policy,
    PolicyError,
    Reason,
    Rule,
    RuleKind,
    Verify,
    name_permissions,
    pattern_id,
)
from enforcer.redirects import Redirects
from enforcer.without_bpf import MemoryState

if TYPE_CHECKING:
    from enforcer.authority import Authority

log = logging.getLogger("registry-enforcer")

REFUSED: Final = (nft.NftError, bpf.BpfError, OSError)  # what the kernel may say to anything, at any time
_Parameters = ParamSpec("_Parameters")
ROOM_SECONDS = 60.0  # between two looks for what was revoked and has no connection any more
CGROUP_ATTEMPTS = 5  # at a text that names cgroups
NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Options:
    """Where the daemon keeps what."""

    run_dir: Path
    state_dir: Path
    bpffs: Path
    cgroup: Path | None  # None: the root of the cgroup v2 hierarchy
    metrics: tuple[str, int]
    loader: Loader


# The scope that a packet's mark tells, by the name under which it is counted.
MARKED = {
    ruleset.CountedScope.UNKNOWN: MarkedScope.UNSTAMPED,
    ruleset.CountedScope.HOST: MarkedScope.HOST,
    ruleset.CountedScope.ENGINE: MarkedScope.ENGINE,
    ruleset.CountedScope.CONTAINER: MarkedScope.CONTAINER,
}

ReadPolicy = Callable[[], Policy]  # raises PolicyError


# --- what the commands share -----------------------------------------------------------------------------------------
def policy_facts(policy: Policy) -> dict[str, Any]:
    """What `check` and `status` say of a policy."""
    kinds = collections.Counter(rule.kind for rule in policy.rules)
    return {
        "source": policy.source,
        "digest": policy.digest,
        "organization": policy.organization,
        "mode": policy.mode.value,
        "registries": kinds[RuleKind.REGISTRY] + kinds[RuleKind.PRESET],
        "destinations": kinds[RuleKind.DESTINATION],
        "proxies": kinds[RuleKind.PROXY],
        "names": sum(len(rule.hosts) for rule in policy.rules),
        "ports": list(policy.ports),
        "mark_mask": f"{policy.marks.mask:#010x}",
        "scope": {
            "containers": policy.scope.containers.value,
            "engines": policy.scope.engines.value,
            "host": policy.scope.host.value,
        },
    }


def explain_by_policy(policy: Policy, text: str, learned: Iterable[LearnedAddress] = ()) -> dict[str, Any]:
    """`advice.explain` as JSON; ValueError if `text` is neither a name nor an address."""
    subject, port = advice.parse_subject(text)
    explanation = advice.explain(policy, NameIndex(policy), subject, port, learned)
    return {
        "subject": str(explanation.subject),
        "port": explanation.port,
        "allowed": explanation.allowed,
        "reason": explanation.reason.value,
        "rules": list(explanation.rules),
        "sentence": explanation.sentence,
        "next_steps": list(explanation.next_steps),
    }


def open_authority(policy: Policy) -> Authority | None:
    """The CA that the policy names, read and checked; PolicyError if it cannot be used, None if there is none."""
    if policy.refusal.ca is None:
        return None
    from enforcer import authority  # noqa: PLC0415 - its library costs 15 MB, which only those pay who have a CA

    try:
        return authority.Authority(policy.refusal.ca)
    except authority.AuthorityError as error:
        raise PolicyError(policy.source, policy.refusal.ca.line, error.problem, error.advice) from None


def keep_marks(in_force: Marks, policy: Policy) -> None:
    """PolicyError if `policy` uses other bits of the mark than the kernel does.

    Sockets carry the bits that they were stamped with until they end, and one mask's scope may be another's permission.
    """
    if policy.marks != in_force:
        raise PolicyError(
            policy.source,
            policy.mark_line,
            f"mark.mask is {policy.marks.mask:#010x} and open sockets carry the bits of {in_force.mask:#010x}",
            f"write mask = {in_force.mask:#010x} below [mark], or stop the daemon, run registry-enforcer remove and "
            "start it again",
        )


# --- the running daemon ----------------------------------------------------------------------------------------------
def name_map(policy: Policy) -> dict[bytes, bytes]:
    """What BPF's `names` holds under `policy`."""
    return {
        kernel_abi.pack_name_key(entry.pattern.name, wildcard=entry.pattern.wildcard): kernel_abi.pack_name_rule(
            pattern_id(entry.pattern),
            entry.ports,
            private_addresses=entry.private_addresses,
            named_ports=entry.named_ports,
            proxy_ports=entry.proxy_ports,
            unnamed_ports=entry.address_ports,
        )
        for entry in name_permissions(policy)
    }


class Enforcement:
    """The state of one daemon and everything that changes it; all methods run on the event loop's thread."""

    def __init__(
        self,
        options: Options,
        policy: Policy,
        *,
        firewall: nft.Nft,
        capabilities: ladder.Capabilities,
        kernel: bpf.KernelState | MemoryState,
        links: netlink.Netlink,
        cgroup: Path | None,
        audit_log: AuditLog,
        saved: state.StateFile,
    ) -> None:
        self.options = options
        self.policy = policy
        self.index = NameIndex(policy)
        self._rules = {rule.name: rule for rule in policy.rules}
        self._names: dict[bytes, bytes] = {}  # what BPF knows of them, from start() on
        self.learned = LearnedAddresses(policy.learned_addresses, last_used=self._last_used)
        self.resolvers: tuple[Address, ...] = ()
        self._retired: dict[Address, int] = {}  # resolvers until a moment ago -> when their last answers are too late
        self.plan: topology.AttachmentPlan | None = None
        self.metrics = metrics.Metrics(self._snapshot_for_scrape)
        self.metrics_server: metrics.Server | None = None  # None: nobody is to be served
        self.auditor = auditing.Auditor(audit_log, kernel, cgroup, self._known_name)
        self.reports: nflog.RefusalReader | None = None  # None: the kernel reports no refused packets
        self.cgroup_watch: procfs.CgroupWatch | None = None  # None: there is no cgroup v2
        self._audit_log = audit_log
        self._repairs = Repairs(self.metrics, self.auditor)
        self.faults = Faults(self.metrics)
        self._behind = False  # something was refused half-way, and not everything that is held is in the kernel
        # What is revoked, and when the kernel's element ends, the first to end first; None: the table is not ours yet.
        self._revoked: revocation.Revoked | None = None
        self._looked_for_room_at = -math.inf
        self._saved = saved
        self._firewall = firewall
        self._capabilities = capabilities
        self._kernel = kernel
        self._links = links
        self._cgroup = cgroup
        self._loop = asyncio.get_running_loop()
        self._overhearing = Overhearing(
            lambda name: bool(self.index.match(name)),
            self._permissions,
            lambda entry: self.learned.holds(entry),  # noqa: PLW0108 - a reload replaces `learned`
        )
        self._drift: UnannouncedDrift | None = None  # None: nothing of ours is in BPF
        if isinstance(kernel, bpf.KernelState):
            self._drift = UnannouncedDrift(kernel, cgroup, options.bpffs, self._repairs)
        self.guard: Guard | None = None  # None: this kernel has no place for it
        if capabilities.guards and isinstance(kernel, bpf.KernelState):
            self.guard = Guard(kernel, links, self._ended)
        self._ears: PacketSockets | None = None  # None: BPF reads the answers
        self._cgroups: dict[str, procfs.Cgroup] = {}  # by path, those with a scope of their own, as BPF knows them
        self._cgroups_waiting: dict[str, procfs.Cgroup] = {}  # for a place in BPF's map
        self._table_present = firewall.present()  # an earlier daemon's
        self._ruleset_applied = False  # this one's
        self._responder: responder.Responder | None = None
        self._redirects = Redirects()
        self._table_uncertain = False  # somebody may have changed it unseen
        self._interfaces = ""  # the text that told the table of them last
        self._lost_seen = 0
        self._lost_unread = 0  # of the ring's events, for want of memory
        self._ways_out: frozenset[topology.Route] = frozenset()
        self._ranges: dict[bytes, bytes] = {}
        self._attached: dict[int, str] = {}  # interface index -> the program at its ingress
        self._unattachable: set[int] = set()  # interfaces that refused it, each logged once
        self.askers = Room(control.MAX_ASKERS)
        # What does not fit into a map of BPF is left out: to fail would end the daemon at the will of others.
        self._in_bpf = {
            Bounded.RESOLVERS: Room(kernel_abi.MAX_RESOLVERS),
            Bounded.CGROUPS: Room(kernel_abi.MAX_CGROUPS),
            Bounded.OWN_RANGES: Room(kernel_abi.MAX_RANGES),
        }
        self._reached: set[Bounded] = set()  # each said once
        self._beside = Beside()
        self.questions = OwnQuestions(
            lambda: _exact_names(self.policy), self._teachers, self.surviving(self._hold), self.metrics, self._beside
        )

    # --- start -------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Bring the kernel under `self.policy`, from nothing or from what an earlier daemon left there.

        Until the ruleset is applied at the very end, an earlier daemon's goes on refusing.
        """
        maps = self._kernel.maps
        self._write_settings()
        maps["programs"].replace_all(
            {
                name.encode().ljust(kernel_abi.COMM_BYTES, b"\0"): _u32(scope)
                for name, scope in attribution.PROGRAM_SCOPES.items()
            }
        )
        self._names = name_map(self.policy)
        maps["names"].replace_all(self._names)
        self.follow_resolvers()
        # Held now, brought to the table below: an earlier daemon's has nearly all of it.
        adopted = combined((self._adopt_learned(), self._adopt_saved()))
        self._stop_vouching(adopted.forget)
        self._refresh_learned()  # a new build's maps, or those of before a reboot, know nothing
        self._attach_hooks()
        await self.questions.begin()
        elements = self._elements() if self._table_present else {}
        difference = self._difference(elements, frozenset(adopted.forget))
        assert self.plan is not None  # follow_resolvers made it
        self._revoked = revocation.Revoked(self._revoked_elements() if self._table_present else {})
        self._apply_ruleset(self.policy, self._render(difference, elements))
        self._remember_revoked(difference)
        self._write_judge(self.policy)
        self._table_present = self._ruleset_applied = True
        if self.guard is not None:
            self.guard.begin()
        self._redirects.table_written(self._count_redirects())

    def _attach_hooks(self) -> None:
        if self._cgroup is None or not self._kernel.programs:
            return
        for hook in bpf.CgroupHook:
            name = hook.name.lower()
            if (program := self._kernel.programs.get(name)) is not None:
                bpf.attach_cgroup(program, self._cgroup, self.options.bpffs)
            elif bpf.detach_cgroup(name, self._cgroup, self.options.bpffs):
                log.warning("an earlier build's %s is detached: this one has none", name)
        if self._capabilities.stamps_sockets:
            bpf.stamp_cgroup(self._kernel.programs["stamp_host"], self._cgroup)

    def _write_judge(self, policy: Policy) -> None:
        """What BPF judges by."""
        maps = self._kernel.maps
        for scope, judged in judged_ports(policy).items():
            maps["levels"].update(_u32(scope), _u32(judged))
        if self._capabilities.counts_in_bpf or self.guard is not None:
            # Not DNS over TLS: these are the host's ports too, and nftables alone refuses that one to containers.
            maps["registry_ports"].replace_all({_u32(port): b"\1" for port in policy.ports})
            maps["listed"].replace_all(listed_map(policy))
        if self.guard is not None:
            self.guard.follow_policy(policy)
        self._write_settings(policy)

    def _judging(self, policy: Policy) -> Judging:
        if not self._capabilities.counts_in_bpf:
            return Judging.NOT
        can_only_drop = ladder.Feature.REJECT not in self._capabilities.features
        # A packet socket is behind the client: its first connection would be told no, and not wait for the answer.
        certain = self._capabilities.learns_in_kernel
        return Judging.REFUSE if policy.mode is Mode.ENFORCE and can_only_drop and certain else Judging.COUNT

    def _write_settings(self, policy: Policy | None = None) -> None:
        policy = policy or self.policy
        settings = self._kernel.maps["settings"]
        slot = bytes(4)
        before = kernel_abi.SETTINGS.codec.unpack(settings.lookup(slot) or bytes(kernel_abi.SETTINGS.size))
        pidns_device, pidns_inode = procfs.pidns_of_host()
        settings.update(
            slot,
            kernel_abi.SETTINGS.codec.pack(
                before[0] or secrets.randbits(64),  # another key would orphan the questions that are under way
                kernel_abi.LIFETIME_FLOOR_SECONDS * NANOSECONDS,
                kernel_abi.LIFETIME_CEILING_SECONDS * NANOSECONDS,
                kernel_abi.REFRESH_MARGIN_SECONDS * NANOSECONDS,
                kernel_abi.QUERY_WINDOW_SECONDS * NANOSECONDS,
                procfs.netns_cookie() or (0 if procfs.in_initial_netns() else kernel_abi.NETNS_ANY),
                pidns_device,
                pidns_inode,
                *policy.marks.settings,
                1,
                self._judging(policy),
                policy.mode is Mode.OBSERVE,
                recognises(policy),
                0,
            ),
        )

    def _adopt_learned(self) -> Changes:
        """Hold what BPF has learned while nobody listened, as far as the policy still allows it."""
        learned = self._kernel.maps["learned"]
        patterns = {pattern_id(entry.pattern): entry.pattern for entry in name_permissions(self.policy)}

        @functools.cache  # patterns are few, what they taught is not
        def covering(pattern: HostPattern) -> tuple[tuple[Rule, HostPattern], ...]:
            """The rules, and their patterns, that permit every name that `pattern` covers."""
            return tuple(self.index.covering(pattern.name, wildcard=pattern.wildcard))

        entries = []
        now_ns = self._kernel.now_ns()
        for key, value in list(learned.items()):
            address, port = kernel_abi.unpack_learned_key(key)
            expires_ns, taught_by, *_ = kernel_abi.LEARNED.codec.unpack(value)
            if (address, port) in self.learned:
                continue
            pattern = patterns.get(taught_by)
            found = False
            if pattern is not None and expires_ns > now_ns:
                range_class = self._classify(address)
                for rule, matched in covering(pattern):
                    if port in rule.ports and may_teach(range_class, rule):
                        found = True
                        entries.append(
                            LearnedAddress(address, port, str(pattern), rule.name, matched, expires_ns / NANOSECONDS)
                        )
            if not found:
                learned.delete(key)
        if entries:
            log.info("took over %d learned permissions from the kernel", len(entries))
        return self.learned.learn(entries, self._now())

    def _adopt_saved(self) -> Changes:
        """Hold what the state file remembers from before a reboot, as far as the policy still allows it."""
        try:
            saved = self._saved.load()
        except state.StateError as error:
            log.warning("%s; registries are learned anew", error)
            return Changes()
        now, wall_clock = self._now(), time.time()
        still_held = self._still_held(self.index)
        entries = []
        for entry in saved:
            # The clock may have stepped: nothing lives longer than it would have when it was saved.
            left = min(entry.expires_at - wall_clock, entry.seconds_left, kernel_abi.LIFETIME_CEILING_SECONDS)
            if left > 0 and still_held(entry):
                entries.append(
                    LearnedAddress(entry.address, entry.port, entry.name, entry.rule, entry.pattern, now + left)
                )
        return self.learned.learn(entries, now)

    def _still_held(self, index: NameIndex) -> Callable[[LearnedAddress | state.SavedAddress], bool]:
        """Whether the policy of `index` would permit an entry for the same reason."""

        @functools.cache  # holders are few, what they hold is not
        def rule_of(name: str, pattern: HostPattern) -> Rule | None:
            """The rule of this name, if it has the pattern."""
            covering = index.covering(pattern.name, wildcard=pattern.wildcard)
            return next((rule for rule, covered in covering if covered == pattern and rule.name == name), None)

        def still_held(entry: LearnedAddress | state.SavedAddress) -> bool:
            rule = rule_of(entry.rule, entry.pattern)
            return rule is not None and entry.port in rule.ports and may_teach(self._classify(entry.address), rule)

        return still_held

    def _now(self) -> float:
        """Seconds on the clock of the BPF programs."""
        return self._kernel.now_ns() / NANOSECONDS

    def _used_at_ns(self, destination: Destination) -> int:
        """When a connection went there last, as far as BPF knows; 0: never."""
        value = self._kernel.maps["learned"].lookup(kernel_abi.pack_learned_key(*destination))
        return 0 if value is None else _used_at_ns(value)

    def _last_used(self, destination: Destination) -> float:
        return (self._used_at_ns(destination) or -math.inf) / NANOSECONDS

    def _wall_clock_offset(self) -> float:
        """What makes Unix seconds of seconds on the clock of the BPF programs, now."""
        return time.time() - self._now()

    def save(self) -> None:
        """Write the state file; a failure is counted, said once, and enforcement goes on."""
        now, wall_clock = self._now(), time.time()
        try:
            self._saved.save(
                state.SavedAddress(
                    entry.address,
                    entry.port,
                    entry.name,
                    entry.rule,
                    entry.pattern,
                    expires_at=wall_clock + entry.expires_at - now,
                    seconds_left=entry.expires_at - now,
                )
                for entry in self.learned
            )
        except state.StateError as error:
            self.faults.met(Fault.STATE, error)
        else:
            self.faults.over(Fault.STATE)

    def _elements(self) -> dict[Destination, int]:
        """What the learned sets hold, and the seconds that are left; NftError if they are gone."""
        elements = self._firewall.learned() if self._capabilities.remembers else []
        return {(element.address, element.port): element.lifetime_seconds for element in elements}

    def _difference(
        self, seconds_left: Mapping[Destination, int], forgotten: frozenset[Destination] = frozenset()
    ) -> Changes:
        """What makes of these elements of the table those that are held; who made room keeps his connections."""
        now = self._now()
        permit = (
            entry
            for entry in self.learned.longest_of_each()
            if abs(entry.expires_at - now - seconds_left.get(entry.destination, -math.inf))
            > kernel_abi.REFRESH_MARGIN_SECONDS
        )
        strange = [held for held in seconds_left if held not in self.learned]
        return Changes(
            tuple(permit),
            withdraw=tuple(held for held in strange if held not in forgotten),
            forget=tuple(held for held in strange if held in forgotten),
        )

    # --- DNS events --------------------------------------------------------------------------------------------------
    def take_events(self, reader: bpf.EventReader) -> None:
        """Everything that BPF has reported: parse, judge, and tell the kernel in one transaction."""
        records = reader.read()
        self._lost_unread = reader.lost
        self._take(list(map(kernel_abi.decode_event, records)))

    def listen(self, ears: PacketSockets) -> None:
        """Have answers read by `ears` and not by BPF; before start()."""
        self._ears = ears

    def hear(self, packets: list[Packet]) -> None:
        """Packets of the uplinks and lo: what the kernel would have read itself where tc has BPF."""
        self._take([event for packet in packets for event in self._overhearing.hear(packet)])

    def _take(self, events: list[DnsEvent]) -> None:
        if not events:
            return
        changes = combined(map(self._judge, events))
        if self._ears is not None:
            self._vouch(changes.permit)
        self._apply(changes)
        now = self._kernel.now_ns()
        for event in events:
            self.metrics.learn_seconds.observe((now - event.at_ns) / NANOSECONDS)

    def _judge(self, event: DnsEvent) -> Changes:
        """What one learning packet changes. BPF's view of it is checked against the full parser's."""
        if event.resolver not in self.resolvers and event.resolver not in self._retired:
            # The packet came before this resolver was dropped; BPF does not know that it has been.
            return self._disagree(event, "its resolver is no longer trusted")
        try:
            answer = dns_answer.parse_answer(event.wire, event.resolver)
        except dns_answer.DnsAnswerError as error:
            if not event.inserted:
                self._ask_for_question(event)
                return Changes()
            return self._disagree(event, str(error))
        entries = self._permissions(answer, event.at_ns / NANOSECONDS)
        if event.outcome is Outcome.UNREADABLE and (answer.truncated or event.message_length > len(event.wire)):
            self._ask_for_question(event)
        if event.inserted > len({entry.destination for entry in entries}):
            return self._disagree(event, f"{answer.question}: fewer permissions in it than BPF learned", entries)
        return self.learned.learn(entries, self._now())

    def _permissions(self, answer: dns_answer.DnsAnswer, now: float) -> list[LearnedAddress]:
        return list(permitted(answer, self.index.covering(answer.question), self._classify, now))

    def _disagree(self, event: DnsEvent, why: str, accepted: Iterable[LearnedAddress] = ()) -> Changes:
        """Take back whatever BPF knows and this daemon cannot account for."""
        self.metrics.disagreements.inc()
        log.warning("a DNS answer from %s taught too much (%s); withdrawn", event.resolver, why)
        self.auditor.disagreed(f"a DNS answer from {event.resolver} taught too much ({why}); withdrawn")
        changes = self.learned.learn(accepted, self._now())
        learned = self._kernel.maps["learned"]
        orphans = [key for key, _ in list(learned.items()) if kernel_abi.unpack_learned_key(key) not in self.learned]
        for key in orphans:
            learned.delete(key)
        orphaned = tuple(kernel_abi.unpack_learned_key(key) for key in orphans)
        return combined((changes, Changes(withdraw=orphaned)))

    def _classify(self, address: Address) -> RangeClass | None:
        assert self.plan is not None
        return RangeClass.NEVER if self.plan.is_own(address) else dns_answer.classify_address(address)

    def _apply(self, changes: Changes) -> None:
        if changes:
            self._stop_vouching((*changes.withdraw, *changes.forget))
            if self._table_present:  # else start(), or the repair, brings everything that is held by then
                text = self._render(changes)
                self._remember_revoked(changes)
                self._change_table(text)

    def _change_table(self, text: str) -> None:
        """A part of the table. If the kernel refuses it the table is not what it was, and is written whole."""
        try:
            if text:
                self._firewall.apply(text)
        except nft.NftError as error:
            if not self._ruleset_applied:
                raise
            self.faults.met(Fault.NFTABLES, str(error).partition("\n")[0])
            self.restore_table(str(error).partition("\n")[0])
        else:
            self.faults.over(Fault.NFTABLES)

    def _apply_ruleset(self, policy: Policy, elements: str = "", *, afresh: bool = False) -> None:
        """The whole table for `policy` and changes of its sets, in one transaction. Raises NftError.

        `afresh`: whatever has the table's name goes first, in the same transaction.
        """
        assert self.plan is not None
        plan, answering = self.plan, self._answering()
        self._apply_with_cgroups(
            lambda cgroups: (
                (ruleset.render_removal() if afresh else "")
                + ruleset.render_ruleset(
                    policy,
                    self._capabilities,
                    plan.internal,
                    answering,
                    host_loopback=plan.host_loopback,
                    cgroups=cgroups,
                )
                + elements
            )
        )

    def _stop_vouching(self, withdraw: Iterable[Destination]) -> None:
        """Before the table takes a permission back: a SYN that BPF vouches for would give it back again."""
        learned = self._kernel.maps["learned"]
        for destination in withdraw:
            learned.delete(kernel_abi.pack_learned_key(*destination))

    def _render(self, changes: Changes, elements: Mapping[Destination, int] | None = None) -> str:
        """The changes as nft takes them; `elements` are those of the table, where they have been read for this."""
        if not self._capabilities.remembers:
            return ""
        now = self._now()
        permit = [
            ruleset.Element(entry.address, entry.port, seconds)
            for entry in changes.permit
            if (seconds := int(entry.expires_at - now)) > 0
        ]
        text = ruleset.render_elements(permit, (*changes.withdraw, *changes.forget), elements)
        if self._revoked is not None:
            pardoned = (entry.destination for entry in changes.permit if entry.destination in self._revoked)
            text += ruleset.render_revoked(changes.withdraw, pardoned)
        return text

    def _remember_revoked(self, changes: Changes) -> None:
        if self._revoked is not None:
            self._revoked.pardon(entry.destination for entry in changes.permit)
            self._revoke(changes.withdraw)

    def _revoke(self, destinations: Iterable[Destination]) -> None:
        """Note what the table is told to judge at every packet, as long as the kernel keeps it."""
        assert self._revoked is not None
        self._revoked.revoke(destinations, self._now() + ruleset.REVOKED_SECONDS)

    def _known_name(self, address: Address) -> tuple[str | None, str] | None:
        """(name, rule) of a permission that the address has on any port."""
        for port in {port for rule in self.policy.rules for port in rule.ports}:
            if (address, port) in self.learned:
                entry = self.learned.longest((address, port))
                return entry.name, entry.rule
        rule_name = revocation.lists_address(self.policy, address)
        return None if rule_name is None else (None, rule_name)

    # --- what is held ------------------------------------------------------------------------------------------------
    def _hold(self, answer: dns_answer.DnsAnswer) -> None:
        """What an answer to this daemon's own question permits."""
        now = self._now()
        entries = self._permissions(answer, now)
        changes = self.learned.learn(entries, now)
        # All of them: a holder that is new may let clients say more at an address that is not.
        self._vouch(self.learned.longest(each.destination) for each in entries if each.destination in self.learned)
        self._apply(changes)

    def _vouch(self, entries: Iterable[LearnedAddress]) -> None:
        """Have the hooks that are there vouch for these before the table knows them."""
        self._kernel.maps["learned"].update_many(
            (
                kernel_abi.pack_learned_key(*entry.destination),
                self._learned_value(entry, self._used_at_ns(entry.destination)),
            )
            for entry in entries
        )

    def _learned_value(self, entry: LearnedAddress, used_at_ns: int) -> bytes:
        """What BPF's `learned` holds of a destination; of what may be said there the most lenient holder decides."""
        unnamed_until = proxy_until = 0.0
        for holder in self.learned.holders(entry.destination) or (entry,):
            rule = self._rules.get(holder.rule)
            if rule is not None and rule.verify is Verify.ADDRESS:
                unnamed_until = max(unnamed_until, holder.expires_at)
            if rule is not None and rule.kind is RuleKind.PROXY:
                proxy_until = max(proxy_until, holder.expires_at)
        return kernel_abi.pack_learned(
            int(entry.expires_at * NANOSECONDS),
            pattern_id(entry.pattern),
            used_at=used_at_ns,
            unnamed_until=int(unnamed_until * NANOSECONDS),
            proxy_until=int(proxy_until * NANOSECONDS),
        )

    def _refresh_learned(self) -> None:
        """Bring BPF to what is held: after a change of policy other things may be said at the addresses that stay."""
        if self._ears is None:
            learned = self._kernel.maps["learned"]
            known = dict(learned.items())  # at once: a look-up for each would take most of a reload's time
            changed = {}
            for entry in self.learned.longest_of_each():
                key = kernel_abi.pack_learned_key(*entry.destination)
                before = known.get(key)
                used_at = 0 if before is None else _used_at_ns(before)
                value = self._learned_value(entry, used_at)
                if before is None or _says_other(value, before):
                    changed[key] = value
            learned.update_many(changed.items())

    def _teachers(self) -> tuple[Address, ...]:
        """The trusted resolvers but those behind an internal interface, where a container could answer for them."""
        assert self.plan is not None
        mute = dict(self.plan.unlearnable)
        return tuple(address for address in self.resolvers if address not in mute)

    def _ask_for_question(self, event: DnsEvent) -> None:
        """BPF could not read this answer whole: ask for its name."""
        try:
            name = dns_answer.parse_question(event.wire)
        except dns_answer.DnsAnswerError:
            return  # BPF matched a listed name before it gave up, so this was cut on the way: nothing was permitted
        if self.index.match(name):
            self.questions.ask_beside(name)

    # --- changes around the daemon -----------------------------------------------------------------------------------
    def fit_interfaces(self, changed: netlink.Change = netlink.Change.EVERYTHING) -> None:
        """Attach the programs where the interfaces, routes and resolvers of this moment want them."""
        routes = {address: self._links.route_to(address) for address in (*self.resolvers, *self._retired)}
        routes = {address: at for address, at in routes.items() if at is not None or address in self.resolvers}
        before = self.plan
        known_routes = self._links.routes()
        self.plan = topology.plan_attachments(self._links.interfaces(), known_routes, routes, wsl=procfs.is_wsl())
        look_again = bool(changed & netlink.Change.TRAFFIC_CONTROL)  # somebody touched filters
        known = (*dns_answer.SPECIAL_RANGES, *((network, RangeClass.NEVER) for network in self.plan.own_ranges))
        ranges = {
            kernel_abi.pack_range_key(network.network_address, network.prefixlen): _u32(range_class)
            for network, range_class in self._in_bpf[Bounded.OWN_RANGES].fit(known)
        }
        if ranges != self._ranges:
            self._kernel.maps["ranges"].replace_all(ranges)
            self._ranges = ranges
        if self._ears is None:
            taken = self._attach_programs(look_again=look_again)
            if self.guard is not None:
                taken |= self.guard.fit(self.plan, look_again=look_again)
            if taken:
                self._repairs.made(Drifted.TRAFFIC_CONTROL, ", ".join(sorted(taken)))
        else:
            self._ears.listen_on(self.plan.learn)
        if self._table_present:
            self._tell_interfaces()
        ways_out = frozenset(route for route in known_routes if route.destination.prefixlen == 0)
        if before is not None and (self.plan.learn - before.learn or ways_out - self._ways_out):
            self.questions.again.set()  # at boot, nobody could be asked before, or who was asked could not say
        self._ways_out = ways_out
        if before is None or before.unlearnable != self.plan.unlearnable:
            for address, why in self.plan.unlearnable:
                log.warning("answers of the resolver %s cannot teach: %s", address, why)

    def _attach_programs(self, *, look_again: bool) -> set[str]:
        """The interfaces whose programs somebody had taken away; `look_again` is to find them."""
        assert self.plan is not None
        programs = self._kernel.programs
        taken = set()
        for index in self.plan.learn | self.plan.gate:
            name = self._program_at(index)
            was_there = self._attached.get(index) == name
            if was_there and not look_again:
                continue
            wanted = [(netlink.Direction.INGRESS, name)]
            if name == "learn":
                wanted.append((netlink.Direction.EGRESS, "track_query"))
            try:
                results = [self._links.attach(index, at, programs[program].fd, program) for at, program in wanted]
                if all(results):
                    self._attached[index] = name
                    if was_there and netlink.Attachment.MADE in results:
                        taken.add(self.plan.name_of(index))
            except netlink.NetlinkError as error:
                if error.errno in procfs.EXHAUSTED:
                    raise
                # Nothing opens: without the program no answer teaches here and no packet is vouched for.
                if index not in self._unattachable:
                    self._unattachable.add(index)
                    log.warning("interface %d takes no BPF program (%s): nothing is learned there", index, error)
        for index in self._attached.keys() - (self.plan.learn | self.plan.gate):
            del self._attached[index]
        self._unattachable &= self.plan.learn | self.plan.gate
        return taken

    def _tell_interfaces(self) -> None:
        assert self.plan is not None
        internal, host_loopback = self.plan.internal, self.plan.host_loopback
        if self._ruleset_applied:
            text = ruleset.render_internal(internal, self._capabilities, self._answering(), host_loopback)
        else:
            # An earlier daemon's table may have none of the other sets.
            text = ruleset.render_internal(internal, self._capabilities)
        if text != self._interfaces:
            self._interfaces = text
            self._change_table(text)

    async def follow_links(self) -> None:
        """Fit the programs to every change of interfaces, addresses, routes and filters."""
        with self._links.changes() as changes:
            async for changed in changes:
                if netlink.Change.LOST in changed:
                    self.faults.met(Fault.LINK_EVENTS, "all of them are read anew")
                    self.faults.over(Fault.LINK_EVENTS)
                self.surviving(self.fit_interfaces)(changed)

    def follow_resolvers(self, *, at_once: bool = False) -> None:
        """Trust the resolvers that the policy means now, and no others.

        What was asked of the host's former ones while they were trusted may still be answered, unless `at_once`: else
        every change of a network would refuse whoever is waiting for an answer.
        """
        wanted = list(self.policy.resolvers.addresses)
        if self.policy.resolvers.auto:
            wanted += procfs.trusted_resolvers()
        resolvers = tuple(self._in_bpf[Bounded.RESOLVERS].fit(tuple(dict.fromkeys(wanted))))
        if resolvers == self.resolvers and self.plan is not None:
            return
        now = self._kernel.now_ns()
        too_late = dict.fromkeys(self.resolvers, now + kernel_abi.QUERY_WINDOW_SECONDS * NANOSECONDS)
        self.resolvers = resolvers
        self._retire({} if at_once else self._retired | too_late)
        self.questions.again.set()
        log.info("trusted resolvers: %s", ", ".join(map(str, resolvers)) or "none")

    def _retire(self, too_late: Mapping[Address, int]) -> None:
        """Trust `resolvers`, and for what is under way those that were, as many as there is room for."""
        room = kernel_abi.MAX_RESOLVERS - len(self.resolvers)
        former = [address for address in too_late if address not in self.resolvers]
        self._retired = {address: too_late[address] for address in former[:room]}
        trust = {
            **dict.fromkeys(self._retired, ResolverTrust.RETIRED),
            **dict.fromkeys(self.resolvers, ResolverTrust.TRUSTED),
        }
        self._kernel.maps["resolvers"].replace_all(
            {kernel_abi.pack_address(address): bytes((value,)) for address, value in trust.items()}
        )
        self._overhearing.trust(self.resolvers, self._retired)
        self.fit_interfaces()

    def know_cgroups(self, known: Iterable[procfs.Cgroup]) -> None:
        """Tell BPF which cgroups hold containers and engines: these and no others."""
        self._cgroups, self._cgroups_waiting = {}, {cgroup.path: cgroup for cgroup in known}
        self._seat_cgroups()
        self._write_cgroups()

    def _seat_cgroups(self) -> list[procfs.Cgroup]:
        """Who gets a place in BPF's map now: what a user makes by the thousand is judged as what it is made in."""
        wanted = [*self._cgroups, *self._cgroups_waiting]
        fitting = self._in_bpf[Bounded.CGROUPS].fit(wanted)
        entering = [self._cgroups_waiting.pop(path) for path in fitting[len(self._cgroups) :]]
        self._cgroups |= {cgroup.path: cgroup for cgroup in entering}
        return entering

    def _write_cgroups(self) -> None:
        known = self._cgroups.values()
        self._kernel.maps["cgroups"].replace_all({_cgroup_key(cgroup): _u32(cgroup.scope) for cgroup in known})
        self._stamp(known)

    def cgroups_changed(self, appeared: Iterable[procfs.Cgroup], vanished: Iterable[procfs.Cgroup]) -> None:
        """Tell BPF of the difference."""
        left = []
        for cgroup in vanished:
            self._cgroups_waiting.pop(cgroup.path, None)
            if self._cgroups.pop(cgroup.path, None) is not None:
                left.append(cgroup)
        self._cgroups_waiting |= {cgroup.path: cgroup for cgroup in appeared}
        entering = self._seat_cgroups()
        cgroups = self._kernel.maps["cgroups"]
        for cgroup in left:
            cgroups.delete(_cgroup_key(cgroup))
        cgroups.update_many((_cgroup_key(cgroup), _u32(cgroup.scope)) for cgroup in entering)
        self._stamp(entering)
        if self._table_present and self._capabilities.scopes_in_nft:
            try:
                self._apply_with_cgroups(
                    functools.partial(ruleset.render_cgroups, self.policy.marks, self._capabilities)
                )
            except nft.NftError as error:
                self.restore_table(str(error).partition("\n")[0])

    def _apply_with_cgroups(self, render: Callable[[Iterable[tuple[str, MarkedScope]]], str]) -> None:
        """Apply what names cgroups, which may vanish before nft has looked them up: then without those."""
        for _ in range(CGROUP_ATTEMPTS):
            present = [
                (path, cgroup.scope)
                for path, cgroup in self._cgroups.items()
                if self._cgroup and (self._cgroup / path).exists()
            ]
            try:
                self._firewall.apply(render(present if self._capabilities.scopes_in_nft else ()))
            except nft.NftError as error:
                refusal = error
            else:
                return
            if not self._capabilities.scopes_in_nft:
                break
        raise refusal

    def _stamp(self, cgroups: Iterable[procfs.Cgroup]) -> None:
        """Before 5.8: have the sockets that are made in these cgroups stamped."""
        if self._capabilities.stamps_sockets:
            assert self._cgroup is not None
            for cgroup in cgroups:
                name = f"stamp_{cgroup.scope.name.lower()}"
                bpf.stamp_cgroup(self._kernel.programs[name], self._cgroup / cgroup.path)

    def reload(self, read_policy: ReadPolicy) -> str | None:
        """Enforce the policy as it is written now. A bad policy, or a kernel that refuses it, leaves the old one.

        The value is what was wrong; None: it is in force.
        """
        try:
            policy = read_policy()
            authority = open_authority(policy)
            keep_marks(self.policy.marks, policy)
        except PolicyError as error:
            self.metrics.reloads.labels("bad_policy").inc()
            log.error("%s: the policy in force stays", error)
            self.auditor.policy_changed(f"{error}: the policy in force stays")
            return str(error)
        index = NameIndex(policy)
        before, after = self._names, name_map(policy)
        names = self._kernel.maps["names"]
        narrowed = [key for key, value in before.items() if after.get(key) != value]
        kept, changes = self.learned.narrowed(self._still_held(index), policy.learned_addresses, self._now())
        assert self.plan is not None
        try:
            self._redirects.take_up(self._count_redirects())
            for key in narrowed:
                names.delete(key)
            self._stop_vouching((*changes.withdraw, *changes.forget))
            self._apply_ruleset(policy, self._render(changes))
        except REFUSED as error:
            self.faults.met(Fault.NFTABLES if isinstance(error, nft.NftError) else Fault.KERNEL, error)
            self.surviving(self._widen_again)()
            self.metrics.reloads.labels("failed").inc()
            log.error("the kernel refused the new ruleset, the policy in force stays: %s", error)
            self.auditor.policy_changed("the kernel refused the new ruleset, the policy in force stays")
            return f"the kernel refused the new ruleset: {error}"
        self.faults.over(Fault.NFTABLES)
        before_it, self.policy, self.index, self.learned = self.policy, policy, index, kept
        self._names = after
        self._rules = {rule.name: rule for rule in policy.rules}
        self._remember_revoked(changes)
        self._audit_log.follow_policy(policy.audit_file)
        if self._responder is not None:
            self._responder.contexts = None if authority is None else authority.context
        self.questions.again.set()
        self.surviving(self._widen)(before_it, before)
        self.metrics.reloads.labels("ok").inc()
        in_force = f"policy {policy.source} ({policy.digest[:12]}) is in force, mode {policy.mode.value}"
        log.info("%s", in_force)
        self.auditor.policy_changed(in_force)
        return None

    def _widen(self, before_it: Policy, names_before: Mapping[bytes, bytes]) -> None:
        """What a new policy allows, now that its table is in force and refuses the rest."""
        policy = self.policy
        self._refresh_learned()
        if self.guard is not None and (ended := self.guard.end_what_lost_its_name(before_it, policy)):
            log.info("%d open connections are ended: their names are not allowed any more", ended)
        if revocation.narrows(before_it, policy):
            self._beside.start(self._judge_connections_again(before_it))
        self._kernel.maps["names"].update_many(
            (key, value) for key, value in self._names.items() if names_before.get(key) != value
        )
        self._write_judge(policy)
        self.follow_resolvers(at_once=True)

    def _widen_again(self) -> None:
        """A reload that failed had narrowed BPF already; nobody asks again for what a client has cached."""
        self._kernel.maps["names"].replace_all(self._names)
        self._refresh_learned()

    async def _judge_connections_again(self, before: Policy) -> None:
        """Have the rules look at connections that `before` let through without a learned address."""
        try:
            destinations, inbound = await asyncio.to_thread(_connected, frozenset(self.policy.ports))
        except OSError as error:
            log.warning("the kernel does not tell its connections (%s): those that are open stay open", error)
            return
        if self.guard is not None:
            self.guard.judge_strays_again(inbound)
        again = revocation.to_judge_again(before, self.policy, self.learned, destinations)
        if again and self._revoked is not None and self._capabilities.remembers:
            self._revoke(again)
            self._change_table(ruleset.render_revoked(again))
            log.info("connections to %d destinations are judged again", len(again))

    async def _make_room_for_revoked(self, revoked: revocation.Revoked) -> None:
        """Forget that permission ended where no connection is left of when it had not."""
        before = revoked.snapshot()
        try:
            connected = await asyncio.to_thread(conntrack.tcp_destinations)
        except OSError as error:
            log.warning(
                "the kernel does not tell its connections (%s): there may be no room to revoke more; load the module "
                "nf_conntrack_netlink",
                error,
            )
            return
        gone = revoked.without_connection(before, connected)
        revoked.pardon(gone)
        if gone and self._capabilities.remembers:
            self._change_table(ruleset.render_revoked((), gone))
            log.info("%d destinations without connections are not judged at every packet any more", len(gone))

    def housekeeping(self) -> None:
        """Forget what has expired; read from the kernel what its events could not carry; put right what went wrong."""
        self.auditor.housekeeping()
        try:
            if self._behind:
                self._catch_up()
            self._keep_house()
        except REFUSED as error:
            self.refused_now(error)
        else:
            self._behind = False
            self.faults.over(Fault.KERNEL)

    def _keep_house(self) -> None:
        now = self._now()
        if self._retired and min(self._retired.values()) <= now * NANOSECONDS:
            self._retire({address: at for address, at in self._retired.items() if at > now * NANOSECONDS})
        learned = self._kernel.maps["learned"]
        for destination in self.learned.expire(now):
            learned.delete(kernel_abi.pack_learned_key(*destination))
        if self._revoked is not None:
            self._revoked.expire(now)
            if self._revoked.is_crowded and now > self._looked_for_room_at + ROOM_SECONDS:
                self._looked_for_room_at = now
                self._beside.start(self._make_room_for_revoked(self._revoked))
        lost = self._lost()
        if lost > self._lost_seen:
            log.warning(
                "%d learning packets did not reach the daemon; reading the kernel's map", lost - self._lost_seen
            )
            self._lost_seen = lost
            self._apply(self._adopt_learned())
            if self._ears is not None:
                self.questions.again.set()  # nobody else has read what was lost
        if self._drift is not None:
            scopes = {path: cgroup.scope for path, cgroup in self._cgroups.items()}
            self._drift.repair(scopes if self._capabilities.stamps_sockets else {})
        if self._table_uncertain or not self._table_present:
            self.restore_table("the kernel had more events of nftables than it keeps")
        self.watch_redirects()
        for what, room in self._rooms().items():
            if room.turned_away and what not in self._reached:
                self._reached.add(what)
                log.warning(
                    "%s: all %d places are taken; enforcer_bound_reached_total counts what finds none",
                    what.value,
                    room.limit,
                )

    # --- what the kernel refuses for a moment ------------------------------------------------------------------------
    def surviving(self, action: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
        """`action` for the event loop: what the kernel refuses in it ends nothing; housekeeping makes up for it."""

        @functools.wraps(action)
        def survived(*arguments: _Parameters.args, **named: _Parameters.kwargs) -> None:
            try:
                action(*arguments, **named)
            except REFUSED as error:
                if not self._ruleset_applied:
                    raise
                self.refused_now(error)

        return survived

    def refused_now(self, error: Exception) -> None:
        """Something was refused, perhaps half-way. Raises `error` if that has been so for a minute."""
        self._behind = True
        self.faults.met(Fault.KERNEL, str(error).partition("\n")[0])
        if self.faults.lasts(Fault.KERNEL):
            raise error

    def _catch_up(self) -> None:
        """Tell the kernel all that is held, whatever it was told when it refused; the narrower first."""
        self._kernel.maps["names"].replace_all(self._names)
        self._adopt_learned()  # and deletes what nobody allows
        self._write_cgroups()
        self._ranges = {}
        self.follow_resolvers()
        self._retire(self._retired)
        self._write_table()
        self._refresh_learned()
        self._write_judge(self.policy)
        self.questions.again.set()

    # --- drift of the table ------------------------------------------------------------------------------------------
    def suspect_table(self) -> None:
        """Events of nftables were lost: somebody may have changed the table."""
        self._table_uncertain = True
        self.faults.met(Fault.TABLE_EVENTS, "the table is written anew")
        self.faults.over(Fault.TABLE_EVENTS)

    def restore_table(self, detail: str = "its rules or elements") -> None:
        """Somebody else has changed the table, or taken it away: write it whole, with everything that is held."""
        self._table_uncertain = False
        try:
            self._write_table()
        except nft.NftError as error:
            self._table_present = False
            self.faults.met(Fault.NFTABLES, str(error).partition("\n")[0])
            self._repairs.failed(Drifted.TABLE, error)
        else:
            self.faults.over(Fault.NFTABLES)
            self._repairs.made(Drifted.TABLE, detail)

    def _write_table(self) -> None:
        try:
            elements, held = self._elements(), self._revoked_elements().keys()
        except nft.NftError:  # gone, with the sets or the table
            elements, held = {}, {}.keys()
        difference = self._difference(elements)
        text = self._render(difference, elements) + ruleset.render_revoked(set(self._revoked or ()) - held)
        try:
            self._apply_ruleset(self.policy, text)
        except nft.NftError:
            # Something of another kind has the name of a part of it.
            difference = self._difference({})
            text = self._render(difference, {}) + ruleset.render_revoked(self._revoked or ())
            self._apply_ruleset(self.policy, text, afresh=True)
        self._remember_revoked(difference)
        self._table_present = True
        self._interfaces = ""
        self._redirects.table_written(self._count_redirects())

    def _revoked_elements(self) -> dict[Destination, float]:
        """What the table judges at every packet, and when it ends."""
        held = self._firewall.revoked() if self._capabilities.remembers else []
        now = self._now()
        return {
            (element.address, element.port): now + element.lifetime_seconds
            for element in sorted(held, key=lambda element: element.lifetime_seconds)
        }

    def _lost(self) -> int:
        return self._count(Outcome.EVENT_LOST) + self._lost_unread + (self._ears.lost if self._ears is not None else 0)

    def _count(self, outcome: Outcome) -> int:
        return self._kernel.maps["counters"].sum_u64(_u32(outcome)) + self._overhearing.outcomes[outcome]

    # --- refusals ----------------------------------------------------------------------------------------------------
    def answer_refused(self, listener: responder.Responder) -> None:
        """Have refused connections answered by `listener`, once the ruleset is applied."""
        self._responder = listener
        self.auditor.responding = True

    def refused(self, refusal: Refusal) -> None:
        """The responder has answered."""
        self.metrics.refusals_answered.labels(refusal.answered.value).inc()
        self.auditor.answered(refusal)

    def _answering(self) -> ruleset.Responder | None:
        """What the ruleset has to know of the responder; None without one."""
        if self._responder is None:
            return None
        assert self.plan is not None
        addressed: dict[int, set[str]] = {4: set(), 6: set()}
        if ruleset.Redirected.FORWARDED in self._redirects.in_force:
            for entry in self.plan.roles:
                if entry.role is topology.Role.INTERNAL:
                    for address in entry.interface.addresses:
                        if not address.is_link_local:
                            addressed[address.version].add(entry.interface.name)
        return ruleset.Responder(
            self._responder.port,
            local=ruleset.Redirected.LOCAL in self._redirects.in_force,
            interfaces4=frozenset(addressed[4]),
            interfaces6=frozenset(addressed[6]),
        )

    def _count_redirects(self) -> dict[ruleset.Redirected, tuple[int, int]]:
        if self._responder is None:
            return {}
        counters = self._firewall.counters()
        return {
            way: (counters[way.entered].packets, counters[way.reached].packets)
            for way in ruleset.Redirected
            if counters.keys() >= {way.entered, way.reached}  # else somebody has just taken them away
        }

    def watch_redirects(self) -> None:
        """Go back to resets where another table's input chain drops what is redirected: clients would hang."""
        if self._responder is None:
            return
        assert self.plan is not None
        now = self._now()
        again = self._redirects.tried_again(now)
        if again:
            self._apply_ruleset(self.policy)
        dropped = self._redirects.given_up(self._count_redirects, now)
        if not dropped:
            return
        self._apply_ruleset(self.policy)
        log.warning(
            "another table's input chain drops the %s connections that are redirected to the responder, so they are "
            "reset for %d s: let 'ct status dnat tcp dport %d' in there, then reload the policy (SIGHUP)",
            " and ".join(sorted(way.value for way in dropped)),
            self._redirects.wait_seconds(dropped),
            self._responder.port,
        )

    def _ended(self, ending: kernel_abi.Ending, observed: bool) -> None:
        """The guard has ended a connection, or would have."""
        assert self.plan is not None
        source, destination = (ending.source, ending.source_port), (ending.destination, ending.destination_port)
        try:
            source = (ending.protocol is Protocol.TCP and conntrack.original_source(source, destination)) or source
        except OSError as error:
            log.warning("the kernel does not tell where a connection came from: %s", error)
        name = host_name(ending.name)
        if ending.outcome is GuardOutcome.UNLISTED_ADDRESS:
            reason = Reason.UNLISTED_ADDRESS
        elif name is not None and ending.outcome is GuardOutcome.UNLISTED_NAME:
            reason = Reason.UNLISTED_PORT if self.index.match(name) else Reason.UNLISTED_NAME
        else:
            reason = Reason.UNNAMED
        self.auditor.ended(
            Report(
                at=time.time(),
                kind=Kind.OBSERVED if observed else Kind.REFUSED,
                scope=next(scope for scope, marked in MARKED.items() if marked is ending.scope),
                protocol=ending.protocol,
                source=source,
                destination=destination,
                forwarded=ending.scope is MarkedScope.CONTAINER and source[0] not in self.plan.own_addresses,
                marked_scope=ending.scope,
                uid=None,
            ),
            name,
            reason,
        )

    # --- what it tells -----------------------------------------------------------------------------------------------
    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request of the control socket; ValueError names what is wrong with it."""
        match request.get("command"):
            case "status":
                return self.status()
            case "explain":
                subject = request.get("subject")
                if not isinstance(subject, str):
                    raise ValueError("explain takes a subject: a name or an address, with or without :PORT")
                refusals = self.auditor.last_refusals(subject)
                return explain_by_policy(self.policy, subject, self.learned) | {"last_refusals": refusals}
            case "log":
                return self.auditor.answer_log(request)
            case other:
                raise ValueError(f"unknown command {other!r}; this daemon knows status, explain, log and reload")

    def status(self) -> dict[str, Any]:
        """Everything an operator asks first. Times are Unix seconds."""
        assert self.plan is not None
        wall_clock_offset = self._wall_clock_offset()
        return {
            "state": "enforcing" if self.policy.mode is Mode.ENFORCE else "observing",
            "version": __version__,
            "pid": os.getpid(),
            "policy": policy_facts(self.policy),
            "learned": [
                {
                    "address": str(entry.address),
                    "port": entry.port,
                    "name": entry.name,
                    "rule": entry.rule,
                    "expires_at": round(entry.expires_at + wall_clock_offset, 3),
                }
                for entry in self.learned
            ],
            **{
                verb: [
                    {"scope": scope, "protocol": protocol, "count": count}
                    for (scope, protocol), count in self._refusals(mode).items()
                ]
                for verb, mode in (("refused", Mode.ENFORCE), ("observed", Mode.OBSERVE))
            },
            "responder": None
            if self._responder is None
            else {
                "port": self._responder.port,
                "clients": len(self._responder),
                "answers": sorted(way.value for way in self._redirects.in_force),
            },
            "metrics": None
            if self.metrics_server is None
            else {"address": self.metrics_server.served_at, "problem": self.metrics_server.problem},
            "resolvers": [str(address) for address in self.resolvers],
            "unlearnable_resolvers": [{"address": str(address), "why": why} for address, why in self.plan.unlearnable],
            "interfaces": [
                {
                    "name": entry.interface.name,
                    "role": entry.role.value,
                    "why": entry.why,
                    "program": self._program_at(entry.interface.index),
                    "guarded": self.guard is not None and entry.interface.index in self.guard.interfaces,
                }
                for entry in self.plan.roles
            ],
            "capabilities": {
                "nftables": sorted(feature.name.lower() for feature in self._capabilities.features),
                "shortfalls": [shortfall.subject for shortfall in ladder.shortfalls(self._capabilities)],
                "loader": self._kernel.report.loader.value,
                "programs": dict(self._kernel.report.programs),
                "refused_programs": dict(self._kernel.report.refused),
                "cgroup": None if self._cgroup is None else str(self._cgroup),
            },
        }

    def _program_at(self, index: int) -> str:
        """The program that belongs at the ingress of an interface; "" for a bridge's port."""
        assert self.plan is not None
        if index in self.plan.learn:
            return "learn" if self._ears is None else "packet socket"
        return "gate" if index in self.plan.gate else ""

    def _snapshot(self) -> metrics.Snapshot:
        families = collections.Counter(f"ipv{entry.address.version}" for entry in self.learned.longest_of_each())
        return metrics.Snapshot(
            enforcing=self.policy.mode is Mode.ENFORCE and self._table_present,
            mode=self.policy.mode.value,
            digest=self.policy.digest,
            dns_answers={
                outcome.name.lower(): self._count(outcome) for outcome in Outcome if outcome is not Outcome.EVENT_LOST
            },
            learned={family: families[family] for family in ("ipv4", "ipv6")},
            refused=self._refusals(Mode.ENFORCE),
            observed=self._refusals(Mode.OBSERVE),
            guarded={outcome.name.lower(): count for outcome, count in self.guard.counts().items()}
            if self.guard is not None
            else {},
            evicted=self.learned.evicted,
            events_lost=self._lost(),
            audit_dropped=self.auditor.dropped(self.reports.lost if self.reports else 0),
            rooms=self._rooms(),
        )

    def _rooms(self) -> dict[Bounded, Room]:
        rooms = {
            Bounded.LEARNED: Room(self.learned.capacity, self.learned.permissions, self.learned.evicted),
            Bounded.OWN_QUESTIONS: self.questions.room,
            Bounded.CONTROL_CLIENTS: self.askers,
            **self._in_bpf,
            **self.auditor.rooms(),
        }
        if self.guard is not None:
            rooms[Bounded.INTERFACES] = self.guard.room
        if self.cgroup_watch is not None:
            rooms[Bounded.CGROUP_WATCHES] = self.cgroup_watch.room
        if self._responder is not None:
            rooms[Bounded.RESPONDER_CLIENTS] = self._responder.room
        if self.metrics_server is not None:
            rooms[Bounded.METRICS_CLIENTS] = self.metrics_server.room
        return rooms

    def _refusals(self, mode: Mode) -> dict[tuple[str, str], int]:
        """How often each (scope, protocol) was refused, by whoever of nftables and BPF counts."""
        if self._capabilities.counts_in_bpf:
            return {
                (scope.value, protocol.name.lower()): self._kernel.maps["refusals"].sum_u64(
                    kernel_abi.pack_refusal_slot(MARKED[scope], protocol, observing=mode is Mode.OBSERVE)
                )
                for scope in ruleset.CountedScope
                for protocol in Protocol
            }
        counters = self._firewall.counters()
        return {
            (scope.value, protocol.name.lower()): counter.packets
            for scope in ruleset.CountedScope
            for protocol in Protocol
            if (counter := counters.get(ruleset.counter_name(mode, scope, protocol))) is not None
        }

    def _snapshot_for_scrape(self) -> metrics.Snapshot:
        try:
            return self._snapshot()
        except (nft.NftError, bpf.BpfError, OSError) as error:
            raise metrics.SnapshotError(str(error)) from None


def _connected(ports: frozenset[int]) -> tuple[set[Destination], list[tuple[Destination, Destination]]]:
    """Where connections lead, and (source, destination) of what comes from one of `ports`. Blocks as conntrack does."""
    connected = conntrack.tcp_connections()
    return {destination for _, destination in connected}, [ends for ends in connected if ends[0][1] in ports]


def _exact_names(policy: Policy) -> set[str]:
    return {host.name for rule in policy.rules for host in rule.hosts if not host.wildcard}


def _cgroup_key(cgroup: procfs.Cgroup) -> bytes:
    return cgroup.cgroup_id.to_bytes(8, sys.byteorder)


def _used_at_ns(learned: bytes) -> int:
    return int(kernel_abi.LEARNED.codec.unpack(learned)[2])


def _says_other(value: bytes, before: bytes) -> bool:
    """Whether two values of `learned` differ in more than when it was used, and a second of their ends."""
    pattern, *ends = _pattern_and_ends(value)
    pattern_before, *ends_before = _pattern_and_ends(before)
    return pattern != pattern_before or any(
        abs(end - end_before) > NANOSECONDS for end, end_before in zip(ends, ends_before, strict=True)
    )


def _pattern_and_ends(learned: bytes) -> tuple[int, int, int, int]:
    expires_ns, pattern, _, unnamed_until, proxy_until = kernel_abi.LEARNED.codec.unpack(learned)
    return pattern, expires_ns, unnamed_until, proxy_until


def _u32(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)
