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
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from enforcer import bpf, ladder, netlink, nft, other_marks, procfs, topology
from enforcer.kernel_abi import Marks
from enforcer.ladder import Feature
from enforcer.other_marks import How, Use

_CLONE_NEWNET = 0x40000000
_SAVERS = ("iptables-save", "ip6tables-save", "iptables-legacy-save", "ip6tables-legacy-save")
_SAVE_SECONDS = 10


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


def examine(bpffs: Path, cgroup: Path | None, marks: Marks) -> list[Finding]:
    """Everything, in the order in which an operator would mend it; `marks` are what the policy says."""
    findings = [Finding("kernel", State.OK, f"Linux {platform.release()} on {platform.machine()}")]
    if (why_not := procfs.unsupported()) is not None:
        return [replace(findings[0], state=State.MISSING, cost=why_not, remedy="boot another kernel")]
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
    try:
        with nft.Nft() as firewall:
            features = firewall.probe()
            asked = Feature.BASE in features  # else there is nothing to list either
            present = asked and firewall.present()
            listing = firewall.listing() if asked else ""
            if present and (in_force := firewall.marks()) is not None:
                marks = in_force
    except (ImportError, OSError, nft.NftError) as error:
        findings.append(
            Finding(
                "nftables",
                State.MISSING,
                f"libnftables cannot be used: {error}",
                "nothing can be refused",
                "install the packages nftables and python3-nftables",
            )
        )
        return findings
    root = cgroup or procfs.cgroup_root()
    programs, takes_filters = _try_programs(bpffs, findings, wsl=wsl)
    capabilities = ladder.Capabilities(features, programs, takes_filters, root is not None, root == procfs.UNIFIED)
    findings += _capabilities(capabilities, wsl=wsl)
    findings.append(Finding("table", State.OK, "in force" if present else "not there: nothing is enforced now"))
    findings += _sockets(root)
    findings += _network(wsl=wsl)
    findings += _marks(marks, listing, _saved_rules())
    return findings


def _capabilities(capabilities: ladder.Capabilities, *, wsl: bool = False) -> Iterator[Finding]:
    """One finding for all that is there, one for each thing that is not."""
    present = sorted(feature.name.lower() for feature in capabilities.features)
    if present:
        yield Finding("nftables", State.OK, ", ".join(present))
    loadable = procfs.loadable_modules()
    for shortfall in ladder.shortfalls(capabilities):
        state = State.NOTE if capabilities.enforceable else State.MISSING
        remedy = shortfall.remedy or _bring(shortfall.modules, shortfall.kernel_option, loadable, wsl=wsl)
        yield Finding(shortfall.subject, state, shortfall.missing, shortfall.cost, remedy)


def _bring(modules: Iterable[str], options: str, loadable: frozenset[str] | None, *, wsl: bool) -> str:
    """What to do about something that the kernel lacks and `modules` or kernel `options` would bring."""
    found = [module for module in modules if loadable is not None and module in loadable]
    if found:
        keep = "the command of [boot] in /etc/wsl.conf" if wsl else "/etc/modules-load.d/"
        return f"load it: modprobe -a {' '.join(found)}; at each start, by {keep}"
    lacking = "this kernel has no modules" if loadable is None else "this kernel's modules do not have it"
    newer = "wsl.exe --update, or " if wsl else ""
    return f"{lacking}: {newer}a kernel with {options}"


def _try_programs(bpffs: Path, findings: list[Finding], *, wsl: bool) -> tuple[frozenset[str], bool]:
    """The BPF programs that this kernel takes, and whether tc takes them as filters; adds what there is to say."""
    trial = bpffs / f"doctor-{os.getpid()}"
    try:
        if bpf.ensure_bpffs(bpffs):
            findings.append(Finding("bpffs", State.OK, f"was not mounted; mounted now, for {bpffs}"))
        bpf.ensure_bpffs(trial)
        report = bpf.load(trial)
        takes_filters = _in_new_network(lambda: _takes_filters(report))
    except bpf.BpfError as error:
        findings.append(
            Finding("bpf", State.NOTE, str(error), "addresses cannot be learned before the client uses them")
        )
        return frozenset(), False
    finally:
        bpf.remove(trial, None)
    names = ", ".join(sorted(report.programs))
    findings.append(Finding("bpf", State.OK, f"{names} verified in {report.seconds:.2f} s"))
    if takes_filters:
        findings.append(Finding("tc", State.OK, "takes programs at ingress and egress"))
    for symbol, why in report.refused.items():
        if symbol not in report.programs and symbol.rpartition("_")[0] not in report.programs:
            findings.append(Finding(f"bpf {symbol}", State.NOTE, f"refused: {why}"))
    if wsl and "connect4" in report.programs:
        findings.append(
            Finding(
                "host-network containers",
                State.NOTE,
                "told apart by cgroup only: each distribution is a pid namespace of its own",
                "on cgroup v1 a --network host container counts as host",
                'leave [scope] host = "strict", the default in WSL 2',
            )
        )
    elif report.programs.get("connect4", "").endswith("_pidns"):
        findings.append(Finding("host-network containers", State.OK, "told apart by pid namespace and cgroup"))
    elif report.programs:
        findings.append(
            Finding(
                "host-network containers",
                State.NOTE,
                "told apart by cgroup only",
                "on a cgroup v1 or hybrid host a --network host container counts as host",
                'boot with systemd.unified_cgroup_hierarchy=1, or write [scope] host = "strict"',
            )
        )
    return frozenset(report.programs), takes_filters


def _takes_filters(report: bpf.LoadReport) -> bool:
    with bpf.KernelState(report) as kernel, netlink.Netlink() as links:
        learn = kernel.programs.get("learn")
        return links.takes_filters(None if learn is None else learn.fd)


def _in_new_network(look: Callable[[], bool]) -> bool:
    """`look` in a network namespace of its own, which ends with the thread: nothing there carries a packet.

    Where the kernel has no other than ours to give, False: not everything that we need is there.
    """

    def enter_and_look() -> bool:
        return ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0 and look()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter_and_look).result()


def _sockets(root: Path | None) -> Iterator[Finding]:
    if root is not None and root.name == "unified":
        yield Finding(
            "cgroup v2",
            State.NOTE,
            f"hybrid, at {root}",
            "engines put containers into cgroup v1; they are told apart by namespaces instead",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    elif root is not None:
        yield Finding("cgroup v2", State.OK, str(root))
    if procfs.netns_cookie() is None and not procfs.in_initial_netns():
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


# --- marks -----------------------------------------------------------------------------------------------------------
def _saved_rules() -> str:
    """What iptables of either kind has in force. Asking loads no module: each lists the tables that are there."""
    saved = ""
    for program in filter(None, map(shutil.which, _SAVERS)):
        try:
            done = subprocess.run(
                [program], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SAVE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue  # nft lists the rules of the one kind, and /proc/net tells that the other is not there
        saved += done.stdout
    return saved


def _marks(marks: Marks, listing: str, saved: str) -> Iterator[Finding]:
    """Who else uses the bits of packet marks that are ours, or whole marks."""
    with netlink.Netlink() as links:
        routing = list(other_marks.in_routing(links.mark_rules()))
    uses = [*other_marks.in_nft(listing, iptables_too=not saved), *other_marks.in_iptables(saved), *routing]
    neighbours = list(other_marks.neighbours(f"{listing}\n{saved}"))
    known, seen = 0, 0
    for neighbour in neighbours:
        known |= neighbour.bits
    for use in uses:
        seen |= use.bits
    free = other_marks.free_marks(known | seen)
    move = (
        "move one of the two: no three bits are left that nobody uses"
        if free is None
        else f"write mask = {free.mask:#010x} below [mark] in the policy"
    )
    findings = [
        Finding(
            f"marks of {neighbour.name}",
            State.NOTE,
            f"it may use {neighbour.bits:#010x}, and our mask is {marks.mask:#010x}",
            "one may take the other's marks for its own",
            move,
        )
        for neighbour in neighbours
        if neighbour.bits & marks.mask
    ]
    findings += (_finding(marks, use, move) for use in dict.fromkeys(uses) if _matters(marks, use))
    yield from findings or [Finding("marks", State.OK, f"nobody else is seen to use bits of {marks.mask:#010x}")]


def _matters(marks: Marks, use: Use) -> bool:
    return use.how is not How.BITS or bool(use.bits & marks.mask)


def _finding(marks: Marks, use: Use, move: str) -> Finding:
    others = 0xFFFFFFFF ^ marks.mask
    costs = {
        How.BITS: (f"they are bits of our mask, {marks.mask:#010x}", move),
        How.COMPARES: (
            "it does not match sockets that set this mark by SO_MARK any more, since they carry our bits as well",
            f"compare it under the mask {others:#010x}",
        ),
        How.SETS: (
            "it takes our bits away: a first connection may be refused before the rules know its address",
            f"set it under the mask {others:#010x}",
        ),
    }
    cost, remedy = costs[use.how]
    return Finding("marks", State.NOTE, f"somebody {use.how.value} {use.bits:#010x}: {use.rule}", cost, remedy)
