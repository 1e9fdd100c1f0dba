"""The guard's half of enforcement: what its maps hold, where it is attached, and what it reports.

The guard (bpf/guard.h) stands at the tc egress of every uplink. It permits nothing that nftables refuses; it refuses
what nftables cannot see: names in first bytes, and packets that never met the table.

Invariant: it begins to judge when it knows everything, and not before. A connection that is older than the guard is
told to it as allowed, since its name is past; one that begins later and is unknown is ended. Where nothing permits it,
it is held up first: the table that refuses it may be away for a moment.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping

from enforcer import bpf, catalogue, conntrack, kernel_abi, netlink, procfs
from enforcer.bounds import Room
from enforcer.denial import TLS_ALERT, Endpoint
from enforcer.kernel_abi import (
    Answer,
    Ending,
    FlowState,
    GuardOutcome,
    JudgedPorts,
    Listed,
    MarkedScope,
)
from enforcer.policy import Level, Mode, Policy, RuleKind, pattern_id
from enforcer.topology import AttachmentPlan

log = logging.getLogger("registry-enforcer")

_LET_BE = kernel_abi.LET_BE.to_bytes(8, sys.byteorder)

# By level: where connections of a scope need permission, and where those of an engine, which talks to registries only.
_JUDGED = {
    Level.OFF: (JudgedPorts.NONE, JudgedPorts.NONE),
    Level.REGISTRIES: (JudgedPorts.RECOGNISED, JudgedPorts.RECOGNISED),
    Level.STRICT: (JudgedPorts.REGISTRY, JudgedPorts.EVERY),
}


def judged_ports(policy: Policy) -> dict[MarkedScope, JudgedPorts]:
    """Value of BPF's `levels` for each scope."""
    scope = policy.scope
    return {
        MarkedScope.UNSTAMPED: _JUDGED[scope.strictest][0],
        MarkedScope.HOST: _JUDGED[scope.host][0],
        MarkedScope.ENGINE: _JUDGED[scope.engines][1],
        MarkedScope.CONTAINER: _JUDGED[scope.containers][0],
    }


def listed_map(policy: Policy) -> dict[bytes, bytes]:
    """What BPF's `listed` holds. Who may say what he likes at an address may do so where a proxy is, too."""
    kinds = sorted(policy.rules, key=lambda rule: rule.kind is not RuleKind.PROXY)
    return {
        kernel_abi.pack_listed_key(network.network_address, network.prefixlen, port): bytes(
            [Listed.PROXY if rule.kind is RuleKind.PROXY else Listed.REGISTRY]
        )
        for rule in kinds
        for network in rule.addresses
        for port in rule.ports
    }


def http_answer(policy: Policy) -> bytes:
    """What a client is told in plain HTTP; it fits MAX_ANSWER_BYTES whatever the policy's texts are."""
    contact = f"; ask {policy.contact}" if policy.contact else ""
    message = f"{policy.organization} does not allow this registry{contact}"
    body = json.dumps({"errors": [{"code": "DENIED", "message": message}]})
    while len(body) > 600:  # escapes of what is not ASCII take six bytes a character
        message = message[: len(message) * 3 // 4]
        body = json.dumps({"errors": [{"code": "DENIED", "message": message}]})
    return (
        "HTTP/1.1 403 Forbidden\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n"
        "\r\n"
        f"{body}"
    ).encode("ascii")


class Guard:
    """The guard of one daemon; on the event loop's thread."""

    def __init__(self, kernel: bpf.KernelState, links: netlink.Netlink, report: Callable[[Ending, bool], None]) -> None:
        """`report(ending, observed)` is called for every connection that was ended, or in mode observe was not."""
        self._kernel = kernel
        self._links = links
        self._report = report
        self._program = kernel.programs["guard"]
        self._attached: set[int] = set()
        self._unattachable: set[int] = set()  # each logged once
        self.room = Room(kernel_abi.MAX_UPLINKS)  # for interfaces with a link address
        self._uplinks: dict[bytes, bytes] = {}
        self._own_links: dict[bytes, bytes] = {}
        self._observing = False
        self._begun = bool(kernel.report.adopted)  # an earlier daemon's guard goes on
        if self._begun:
            self._uplinks = dict(kernel.maps["uplinks"].items())
        self._plan: AttachmentPlan | None = None
        self._any_port = 0
        self._registry_ports: frozenset[int] = frozenset()
        self._unread = 0  # reports that were in the ring, and could not be read
        self._malformed = 0

    # --- policy ------------------------------------------------------------------------------------------------------
    def follow_policy(self, policy: Policy) -> None:
        """Tell the guard what is judged, listed and known. Names, which it shares with the learner, are not here."""
        maps = self._kernel.maps
        for number, answer in ((Answer.TLS, TLS_ALERT), (Answer.HTTP, http_answer(policy))):
            maps["answers"].update(_u32(number), kernel_abi.pack_answer(answer))
        maps["catalogue"].replace_all(
            {
                kernel_abi.pack_name_key(pattern.name, wildcard=pattern.wildcard): b"\1"
                for pattern in catalogue.catalogue()
            }
            if recognises(policy)
            else {}
        )
        self._observing = policy.mode is Mode.OBSERVE
        self._registry_ports = frozenset(policy.ports)
        if policy.ports[0] != self._any_port:
            self._any_port = policy.ports[0]
            if self._plan is not None:
                self.fit(self._plan)

    def end_what_lost_its_name(self, before: Policy, after: Policy) -> int:
        """End the open connections that `after` would not begin: whose name no pattern allows any more."""
        had, has = ({host for rule in policy.rules for host in rule.hosts} for policy in (before, after))
        lost = set(map(pattern_id, had - has))
        if not lost:
            return 0
        flows = self._kernel.maps["flows"]
        ended = 0
        for key, value in list(flows.items()):
            named_by, *_, state, mode, _ = kernel_abi.FLOW.codec.unpack(value)
            if named_by in lost and state == FlowState.ALLOWED:
                flows.update(
                    key, kernel_abi.pack_flow(FlowState.ENDED, kernel_abi.GuardMode(mode), pattern_id=named_by)
                )
                ended += 1
        return ended

    # --- interfaces --------------------------------------------------------------------------------------------------
    def fit(self, plan: AttachmentPlan, *, look_again: bool = False) -> set[str]:
        """Be at the egress of every uplink, and of nothing else. `look_again`: somebody touched filters.

        The value are the interfaces whose guard somebody had taken away.
        """
        self._plan = plan
        taken = set()
        maps = self._kernel.maps
        interfaces = (*plan.uplinks, *(entry.interface for entry in plan.roles))  # what leaves has an uplink's
        links = {each.link_address: None for each in interfaces if len(each.link_address) == 6}
        own_links = {kernel_abi.pack_link(link): b"\1" for link in self.room.fit(tuple(links))}
        if own_links != self._own_links:
            maps["own_links"].replace_all(own_links)
            self._own_links = own_links
        for interface in plan.uplinks:
            was_there = interface.index in self._attached
            if was_there and not look_again:
                continue
            at = interface.index, netlink.Direction.EGRESS
            try:
                attachment = self._links.attach(*at, self._program.fd, netlink.GUARD)
                if attachment:
                    self._attached.add(interface.index)
                if was_there and attachment is netlink.Attachment.MADE:
                    taken.add(interface.name)
            except netlink.NetlinkError as error:
                if error.errno in procfs.EXHAUSTED:
                    raise
                if interface.index not in self._unattachable:
                    self._unattachable.add(interface.index)
                    log.warning(
                        "interface %s takes no guard (%s): names are not looked at there, and what nftables does not "
                        "see leaves through it",
                        interface.name,
                        error,
                    )
        present = {interface.index for interface in plan.uplinks}
        self._attached &= present
        self._unattachable &= present
        uplinks = _judged_uplinks(plan, self._any_port)
        if self._begun and not uplinks.keys() <= self._uplinks.keys():
            self._begin_at(uplinks, lambda: self._let_strays_be(self._connected()))
        elif self._begun and uplinks != self._uplinks:
            self._judge_at(uplinks)
        return taken

    def begin(self) -> None:
        """Judge from now on, once everything else is in place; what is open already stays open."""
        if self._begun:
            return
        assert self._plan is not None
        self._begin_at(_judged_uplinks(self._plan, self._any_port), self._let_be)
        self._begun = True

    def _begin_at(self, uplinks: dict[bytes, bytes], let_be: Callable[[], None]) -> None:
        """Judge where nobody did, and `let_be` what is open there."""
        let_be()
        self._judge_at(uplinks)
        let_be()  # what began between the two

    def _judge_at(self, uplinks: dict[bytes, bytes]) -> None:
        self._kernel.maps["uplinks"].replace_all(uplinks)
        self._uplinks = uplinks

    def _let_be(self) -> None:
        """Every connection that is open goes on, and is not read."""
        connected = self._connected()
        allowed = kernel_abi.pack_flow(FlowState.ALLOWED)
        for source, destination in connected:
            self._kernel.maps["flows"].add(kernel_abi.pack_flow_key(*source, *destination), allowed)
        self._let_strays_be(connected)

    def judge_strays_again(self, inbound: Iterable[tuple[Endpoint, Endpoint]]) -> None:
        """A policy refuses more: of what is astray only answers go on, to what was begun from a registry's port.

        `inbound` are those connections, as far as nftables sees them. Others that it sees are its to refuse.
        """
        self._kernel.maps["strays"].clear()
        for source, destination in inbound:
            self._let_stray_be(destination, source)

    def _let_strays_be(self, connected: Iterable[tuple[Endpoint, Endpoint]]) -> None:
        """What is open where the guard has not been goes on, as far as nothing permits it; else its name is unknown.

        It includes the answers to those that were begun from outside.
        """
        strays = (
            ends
            for source, destination in connected
            for ends in ((source, destination), (destination, source))
            if ends[1][1] in self._registry_ports
        )
        for source, destination in itertools.islice(strays, kernel_abi.MAX_STRAYS):
            self._let_stray_be(source, destination)

    def _let_stray_be(self, source: Endpoint, destination: Endpoint) -> None:
        self._kernel.maps["strays"].update(kernel_abi.pack_flow_key(*source, *destination), _LET_BE)

    @staticmethod
    def _connected() -> list[tuple[Endpoint, Endpoint]]:
        """Open connections as they leave, as many as can be remembered beside others."""
        try:
            connected = conntrack.tcp_connections()
        except OSError as error:
            log.warning("the kernel does not tell its connections (%s): open ones to registries are ended", error)
            return []
        return list(itertools.islice(connected, kernel_abi.MAX_FLOWS // 2))

    # --- what it says ------------------------------------------------------------------------------------------------
    def take(self, reader: bpf.EventReader) -> None:
        """Everything that the guard has reported."""
        for record in reader.read():
            try:
                ending = kernel_abi.decode_ending(record)
            except ValueError as error:
                self._malformed += 1
                log.warning("a report of the guard cannot be read: %s", error)
                continue
            self._report(ending, self._observing)
        self._unread = reader.lost + self._malformed

    def counts(self) -> Mapping[GuardOutcome, int]:
        """How often it said what."""
        guarded = self._kernel.maps["guarded"]
        counts = {outcome: guarded.sum_u64(_u32(outcome)) for outcome in GuardOutcome}
        counts[GuardOutcome.REPORT_LOST] += self._unread
        return counts

    @property
    def interfaces(self) -> frozenset[int]:
        """Indexes of the uplinks that are guarded."""
        return frozenset(self._attached)


def recognises(policy: Policy) -> bool:
    """Whether some scope's level asks for a look at every connection's first bytes."""
    return any(
        level is Level.REGISTRIES for level in (policy.scope.containers, policy.scope.engines, policy.scope.host)
    )


def _judged_uplinks(plan: AttachmentPlan, any_port: int) -> dict[bytes, bytes]:
    """What BPF's `uplinks` holds; `any_port`, a registry port, is that of what hides its own."""
    return {
        _u32(interface.index): kernel_abi.pack_uplink(any_port, ethernet=bool(interface.link_address))
        for interface in plan.uplinks[: kernel_abi.MAX_UPLINKS]
    }


def _u32(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)
