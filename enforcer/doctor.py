"""What this host offers to enforcement: each feature tried, what is missing, what that costs and what to do about it.

Everything is probed by trying and nothing by version. It enforces nothing: nft features are tried in a table without
hooks, BPF programs are loaded beside a running daemon's and unlinked again. A bpffs that is missing is mounted, since
`run` needs it as well.
"""

from __future__ import annotations

import ctypes
import enum
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
# What brings a feature where it is no part of the kernel itself. The kernel asks for most of them by itself, if its
# modprobe finds them.
_MODULES = {
    ruleset.Feature.SETS: ("nf_tables",),
    ruleset.Feature.INTERVALS: ("nf_tables",),
    ruleset.Feature.COUNTER: ("nft_counter", "nft_objref"),  # parts of nf_tables since 5.17 and 6.2
    ruleset.Feature.CT: ("nft_ct",),
    ruleset.Feature.LIMIT: ("nft_limit",),
    ruleset.Feature.LOG: ("nft_log", "nf_log_syslog"),
    ruleset.Feature.AUDIT: ("nft_log", "nfnetlink_log"),
    ruleset.Feature.REDIRECT: ("nft_chain_nat", "nft_nat", "nft_redir", "nft_fib_inet"),
    ruleset.Feature.REJECT: ("nft_reject_inet",),
}
_TC_MODULES = ("sch_ingress", "cls_bpf")
_TC_OPTIONS = "CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF"
_CLONE_NEWNET = 0x40000000


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
    wsl = procfs.is_wsl()
    if wsl:
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
    findings += _bpf(bpffs, wsl=wsl)
    findings += _sockets(cgroup)
    findings += _network(wsl=wsl)
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
    loadable = procfs.loadable_modules()
    present = sorted(feature.name.lower() for feature in capabilities.features)
    if present:
        yield Finding("nftables", State.OK, ", ".join(present))
    for feature in capabilities.missing:
        yield Finding(
            f"nftables {feature.name.lower()}",
            State.MISSING,
            "the kernel refuses it",
            "the ruleset cannot be loaded",
            _bring(_MODULES[feature], feature.kernel_option, loadable, wsl=procfs.is_wsl()),
        )
    for feature, cost in _OPTIONAL_FEATURES.items():
        if feature not in capabilities.features:
            yield Finding(
                f"nftables {feature.name.lower()}",
                State.NOTE,
                "the kernel refuses it",
                cost,
                _bring(_MODULES[feature], feature.kernel_option, loadable, wsl=procfs.is_wsl()),
            )


def _bring(modules: Iterable[str], options: str, loadable: frozenset[str] | None, *, wsl: bool) -> str:
    """What to do about something that the kernel lacks and `modules` or kernel `options` would bring."""
    found = [module for module in modules if loadable is not None and module in loadable]
    if found:
        keep = "the command of [boot] in /etc/wsl.conf" if wsl else "/etc/modules-load.d/"
        return f"load it: modprobe -a {' '.join(found)}; at each start, by {keep}"
    lacking = "this kernel has no modules" if loadable is None else "this kernel's modules do not have it"
    newer = "wsl.exe --update, or " if wsl else ""
    return f"{lacking}: {newer}a kernel with {options}"


def _bpf(bpffs: Path, *, wsl: bool) -> Iterator[Finding]:
    trial = bpffs / f"doctor-{os.getpid()}"
    try:
        if bpf.ensure_bpffs(bpffs):
            yield Finding("bpffs", State.OK, f"was not mounted; mounted now, for {bpffs}")
        bpf.ensure_bpffs(trial)
        report = bpf.load(trial)
        refused = _in_new_network(lambda: _attach(report))
    except bpf.BpfError as error:
        yield Finding("bpf", State.MISSING, str(error), "addresses cannot be learned before the client uses them")
        return
    finally:
        bpf.remove(trial, Path("/"))  # nothing of it is attached to any cgroup
    yield Finding("bpf", State.OK, f"{', '.join(sorted(report.programs))} verified in {report.seconds:.2f} s")
    if refused is None:
        yield Finding("tc", State.OK, "takes programs at ingress and egress")
    else:
        yield Finding(
            "tc",
            State.MISSING,
            f"takes no program: {refused}",
            "nothing is learned from DNS answers, and containers are vouched for by nothing",
            _bring(_TC_MODULES, _TC_OPTIONS, procfs.loadable_modules(), wsl=wsl),
        )
    for name, meaning in _HOOKS.items():
        if name not in report.programs:
            yield Finding(
                f"bpf {name}",
                State.NOTE,
                f"refused: {report.refused.get(name, 'not in this build')}",
                f"{meaning}: no scope is known, they are judged as unknown, the strictest scope in force",
                "a kernel of 5.8 or newer has it",
            )
    if wsl and "connect4" in report.programs:
        yield Finding(
            "host-network containers",
            State.NOTE,
            "told apart by cgroup only: each distribution is a pid namespace of its own",
            "on cgroup v1 a --network host container counts as host",
            'leave [scope] host = "strict", the default in WSL 2',
        )
    elif report.programs.get("connect4", "").endswith("_pidns"):
        yield Finding("host-network containers", State.OK, "told apart by pid namespace and cgroup")
    elif "connect4" in report.programs:
        yield Finding(
            "host-network containers",
            State.NOTE,
            "told apart by cgroup only",
            "on a cgroup v1 or hybrid host a --network host container counts as host",
            'boot with systemd.unified_cgroup_hierarchy=1, or write [scope] host = "strict"',
        )


def _attach(report: bpf.LoadReport) -> str | None:
    """Attach to lo as the daemon does; what the kernel says if it refuses."""
    with bpf.KernelState(report) as kernel, netlink.Netlink() as links:
        loopback = next(interface.index for interface in links.interfaces() if interface.loopback)
        try:
            for direction, name in ((netlink.Direction.INGRESS, "learn"), (netlink.Direction.EGRESS, "track_query")):
                if name in kernel.programs:
                    links.attach(loopback, direction, kernel.programs[name].fd, name)
        except netlink.NetlinkError as error:
            return str(error.strerror)
    return None


def _in_new_network(look: Callable[[], str | None]) -> str | None:
    """`look` in a network namespace of its own, which ends with the thread: nothing there carries a packet."""

    def enter_and_look() -> str | None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            return f"no network namespace to try it in: {os.strerror(ctypes.get_errno())}"
        return look()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter_and_look).result()


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


def _network(*, wsl: bool) -> Iterator[Finding]:
    resolvers = procfs.trusted_resolvers()
    with netlink.Netlink() as links:
        routes = {resolver: links.route_to(resolver) for resolver in resolvers}
        plan = topology.plan_attachments(links.interfaces(), links.routes(), routes, wsl=wsl)
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
        if entry.role is topology.Role.HOST_LOOPBACK:
            yield Finding(
                f"interface {entry.interface.name}",
                State.NOTE,
                f"{entry.role.value}: {entry.why}",
                "programs on Windows are reached at 127.0.0.1 unjudged; a proxy among them can reach any registry",
                "have the proxies on Windows judge names themselves",
            )
            continue
        yield Finding(f"interface {entry.interface.name}", State.OK, f"{entry.role.value}: {entry.why}")
