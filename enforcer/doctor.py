"""What this host offers to enforcement: each feature tried, what is missing, what that costs and what to do about it.

Everything is probed by trying and nothing by version. It enforces nothing: nft features are tried in a table without
hooks, BPF programs are loaded beside a running daemon's and unlinked again. A bpffs that is missing is mounted, since
`run` needs it as well.
"""

from __future__ import annotations

import enum
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enforcer import bpf, netlink, nft, procfs, ruleset, topology

_HOOKS = {
    "connect4": "IPv4 connections of this host's sockets",
    "connect6": "IPv6 connections of this host's sockets",
    "sendmsg4": "UDP over IPv4",
    "sendmsg6": "UDP over IPv6",
    "sock_create": "raw sockets and the first UDP packet",
}


_OPTIONAL_FEATURES = {
    ruleset.Feature.AUDIT: "refusals are not audited; some are in the kernel's log, of its first network namespace",
    ruleset.Feature.REDIRECT: "refused clients are reset, and not told by whom",
}


class State(enum.Enum):
    """How a finding ends."""

    OK = "ok"
    NOTE = "note"  # works, with less than the best
    MISSING = "missing"  # registry-enforcer cannot do its job without it


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    state: State
    fact: str
    cost: str = ""
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "subject": self.subject,
            "state": self.state.value,
            "fact": self.fact,
            "cost": self.cost,
            "remedy": self.remedy,
        }


def examine(bpffs: Path, cgroup: Path | None) -> list[Finding]:
    """Everything, in the order in which an operator would mend it."""
    findings = [Finding("kernel", State.OK, f"Linux {platform.release()} on {platform.machine()}")]
    if procfs.is_wsl():
        findings.append(
            Finding("wsl", State.OK, "WSL 2: one daemon restricts every distribution; scope.host defaults to strict")
        )
    if os.geteuid() != 0:
        findings.append(
            Finding(
                "rights",
                State.MISSING,
                "not root",
                "the kernel cannot be asked what it offers",
                "run: sudo registry-enforcer doctor",
            )
        )
        return findings
    findings += _nftables()
    findings += _bpf(bpffs)
    findings += _sockets(cgroup)
    findings += _network()
    return findings


def _nftables() -> Iterator[Finding]:
    try:
        with nft.Nft() as firewall:
            capabilities = firewall.probe()
            present = firewall.present()
    except (ImportError, OSError) as error:
        yield Finding(
            "nftables",
            State.MISSING,
            f"libnftables cannot be used: {error}",
            "nothing can be refused",
            "install the packages nftables and python3-nftables",
        )
        return
    yield from _features(capabilities)
    yield Finding("table", State.OK, "in force" if present else "not there: nothing is enforced now")


def _features(capabilities: ruleset.Capabilities) -> Iterator[Finding]:
    """One finding for all features that are there, one for each that is not."""
    present = sorted(feature.name.lower() for feature in capabilities.features)
    if present:
        yield Finding("nftables", State.OK, ", ".join(present))
    for feature in capabilities.missing:
        yield Finding(
            f"nftables {feature.name.lower()}",
            State.MISSING,
            "the kernel refuses it",
            "the ruleset cannot be loaded",
            f"load the module or enable {feature.kernel_option}",
        )
    for feature, cost in _OPTIONAL_FEATURES.items():
        if feature not in capabilities.features:
            yield Finding(
                f"nftables {feature.name.lower()}",
                State.NOTE,
                "the kernel refuses it",
                cost,
                f"load the module or enable {feature.kernel_option}",
            )


def _bpf(bpffs: Path) -> Iterator[Finding]:
    trial = bpffs / f"doctor-{os.getpid()}"
    try:
        if bpf.ensure_bpffs(bpffs):
            yield Finding("bpffs", State.OK, f"was not mounted; mounted now, for {bpffs}")
        bpf.ensure_bpffs(trial)
        report = bpf.load(trial)
    except bpf.BpfError as error:
        yield Finding("bpf", State.MISSING, str(error), "addresses cannot be learned before the client uses them")
        return
    finally:
        bpf.remove(trial, Path("/"))  # nothing of it is attached to any cgroup
    yield Finding("bpf", State.OK, f"{', '.join(sorted(report.programs))} verified in {report.seconds:.2f} s")
    for name, meaning in _HOOKS.items():
        if name not in report.programs:
            yield Finding(
                f"bpf {name}",
                State.NOTE,
                f"refused: {report.refused.get(name, 'not in this build')}",
                f"{meaning}: no scope is known, they are judged as unknown, the strictest scope in force",
                "a kernel of 5.8 or newer has it",
            )
    if report.programs.get("connect4", "").endswith("_pidns"):
        yield Finding("host-network containers", State.OK, "told apart by pid namespace and cgroup")
    elif "connect4" in report.programs:
        yield Finding(
            "host-network containers",
            State.NOTE,
            "told apart by cgroup only",
            "on a cgroup v1 or hybrid host a --network host container counts as host",
            'boot with systemd.unified_cgroup_hierarchy=1, or write [scope] host = "strict"',
        )


def _sockets(cgroup: Path | None) -> Iterator[Finding]:
    root = cgroup or procfs.cgroup_root()
    if root is None:
        yield Finding(
            "cgroup v2",
            State.NOTE,
            "not mounted",
            "local connections have no scope and are judged as unknown, the strictest scope in force",
            "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified",
        )
    elif root.name == "unified":
        yield Finding(
            "cgroup v2",
            State.NOTE,
            f"hybrid, at {root}",
            "engines put containers into cgroup v1; they are told apart by namespaces instead",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    else:
        yield Finding("cgroup v2", State.OK, str(root))
    if procfs.netns_cookie() is None:
        yield Finding(
            "network namespace cookie",
            State.NOTE,
            "the kernel has no SO_NETNS_COOKIE (5.14)",
            "sockets of other network namespaces are stamped like this one's",
            "a newer kernel, if two instances share a cgroup",
        )


def _network() -> Iterator[Finding]:
    resolvers = procfs.trusted_resolvers()
    with netlink.Netlink() as links:
        routes = {resolver: links.route_to(resolver) for resolver in resolvers}
        plan = topology.plan_attachments(links.interfaces(), links.routes(), routes)
    unlearnable = dict(plan.unlearnable)
    for resolver in resolvers:
        if resolver in unlearnable:
            yield Finding(
                f"resolver {resolver}",
                State.NOTE,
                unlearnable[resolver],
                "its answers teach nothing",
                "name another one in [resolvers] trusted, or route to it through an uplink",
            )
        else:
            yield Finding(f"resolver {resolver}", State.OK, "its answers teach")
    for entry in plan.roles:
        yield Finding(f"interface {entry.interface.name}", State.OK, f"{entry.role.value}: {entry.why}")
