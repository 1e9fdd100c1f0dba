"""The daemon: one instance put together, run until it is told to stop, and taken out of the kernel again.

An unexpected exception ends the process; the kernel goes on learning and refusing. Nothing removes the table but
`remove`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from enforcer import (
    bpf,
    conntrack,
    control,
    kernel_abi,
    ladder,
    metrics,
    netlink,
    nflog,
    nft,
    nft_events,
    notify,
    packet_socket,
    procfs,
    responder,
    ruleset,
    state,
    trusted_files,
)
from enforcer.audit import AuditLog
from enforcer.enforcement import REFUSED, Enforcement, Options, ReadPolicy, keep_marks, open_authority
from enforcer.faults import Faults
from enforcer.metrics import Fault
from enforcer.policy import Policy
from enforcer.without_bpf import MemoryState

log = logging.getLogger("registry-enforcer")

HOUSEKEEPING_SECONDS = 1.0
SAVE_SECONDS = 60.0
# New objects before Python looks for cycles among the youngest. What is learned has none, and to look through 262,144
# permissions again and again while they are made takes a third of a reload.
_COLLECT_EVERY = 50_000


Announce = Callable[[Policy, str], None]
_Handle = TypeVar("_Handle")


class Wrap(Protocol):
    """Puts something in front of a handle on the world outside, of which whoever uses it need not know."""

    def __call__(self, handle: _Handle, /) -> _Handle: ...


def _as_it_is(handle: _Handle, /) -> _Handle:
    return handle


class UnsupportedHostError(Exception):
    """This host lacks what enforcement needs; the message says what and what to do. Nothing was changed."""


async def run(options: Options, read_policy: ReadPolicy, announce: Announce, wrap: Wrap = _as_it_is) -> None:
    """Enforce until SIGTERM or SIGINT; enforcement stays in the kernel. SIGHUP reads the policy again.

    `wrap` is put around each handle on nftables, BPF, rtnetlink and the state file: where tests of faults come in.
    Raises PolicyError, AlreadyRunningError, MetricsError, BpfError or UnsupportedHostError before anything is attached.
    """
    gc.set_threshold(_COLLECT_EVERY)
    policy = read_policy()
    authority = open_authority(policy)
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        systemd = stack.enter_context(notify.Supervisor())
        if (why_not := procfs.unsupported()) is not None:
            raise UnsupportedHostError(f"{why_not}; boot another kernel")
        stack.enter_context(control.hold(options.run_dir))
        firewall = wrap(stack.enter_context(nft.Nft()))
        features = probe(firewall)
        if firewall.present() and (in_force := firewall.marks()) is not None:
            keep_marks(in_force, policy)
        cgroup = options.cgroup or procfs.cgroup_root()
        kernel = wrap(_open_kernel(options))
        stack.callback(kernel.close)
        links = wrap(stack.enter_context(netlink.Netlink()))
        learn = kernel.programs.get("learn")
        takes_filters = links.takes_filters(None if learn is None else learn.fd)
        capabilities = ladder.Capabilities(
            features, frozenset(kernel.programs), takes_filters, cgroup is not None, cgroup == procfs.UNIFIED
        )
        for shortfall in ladder.shortfalls(capabilities):
            log.warning("%s: %s; %s", shortfall.subject, shortfall.missing, shortfall.cost)
        audit_log = stack.enter_context(AuditLog(policy.audit_file))
        enforcement = Enforcement(
            options,
            policy,
            firewall=firewall,
            capabilities=capabilities,
            kernel=kernel,
            links=links,
            cgroup=cgroup,
            audit_log=audit_log,
            saved=wrap(state.StateFile(options.state_dir)),
        )
        surviving = enforcement.surviving
        if capabilities.answers:
            answering = responder.Responder(
                lambda: (enforcement.policy, enforcement.index), enforcement.refused, conntrack.original_source
            )
            answering.contexts = None if authority is None else authority.context
            try:
                enforcement.answer_refused(stack.enter_context(answering))
            except OSError as error:
                log.warning("refused connections are reset, without a word: %s", error.strerror)
        served = stack.enter_context(metrics.Server(enforcement.metrics, *options.metrics))
        enforcement.metrics_server = served
        _remember_instance(options, cgroup)

        ended: asyncio.Future[None] = loop.create_future()
        _end_on_failure(loop, ended, enforcement.faults)
        enforcement.reports = _hear_refusals(stack, capabilities, enforcement)
        if isinstance(kernel, bpf.KernelState) and capabilities.learns_in_kernel:
            reader = stack.enter_context(bpf.EventReader(kernel.maps["events"]))
            loop.add_reader(reader.fileno(), surviving(enforcement.take_events), reader)
            stack.callback(loop.remove_reader, reader.fileno())
            if enforcement.guard is not None:
                endings = stack.enter_context(bpf.EventReader(kernel.maps["endings"]))
                loop.add_reader(endings.fileno(), surviving(enforcement.guard.take), endings)
                stack.callback(loop.remove_reader, endings.fileno())
        else:
            enforcement.listen(_open_ears(stack, enforcement, kernel))
        if cgroup is not None:
            watch = stack.enter_context(
                procfs.CgroupWatch(cgroup, surviving(enforcement.cgroups_changed), enforcement.refused_now)
            )
            enforcement.cgroup_watch = watch
            enforcement.know_cgroups(watch.known.values())
        resolver_files = procfs.RESOLV_CONF, *procfs.UPSTREAM_RESOLV_CONFS
        stack.enter_context(
            procfs.FileWatch(resolver_files, surviving(enforcement.follow_resolvers), enforcement.refused_now)
        )
        table_watch = stack.enter_context(
            nft_events.TableWatch(surviving(enforcement.restore_table), enforcement.suspect_table)
        )
        await enforcement.start()
        table_watch.follow()
        if isinstance(kernel, bpf.KernelState):
            bpf.remove_other_generations(kernel.report)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _end, ended)

        def reload() -> str | None:
            systemd.reloading()
            problem = enforcement.reload(read_policy)
            systemd.ready(_in_force(enforcement.policy, problem))
            return problem

        def answer(request: Mapping[str, Any]) -> dict[str, Any]:
            if request.get("command") == "reload":
                return {"problem": reload()}
            try:
                return enforcement.answer(request)
            except REFUSED as error:
                raise ValueError(f"the kernel does not tell now: {error}; ask again") from None

        loop.add_signal_handler(signal.SIGHUP, reload)
        async with control.serve(options.run_dir, answer, enforcement.askers):
            announce(policy, f"no metrics: {served.problem}" if served.problem else f"metrics at {served.url}")
            systemd.ready(_in_force(policy))
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(enforcement.questions.keep_asking()),
                    group.create_task(enforcement.follow_links()),
                    group.create_task(enforcement.auditor.run()),
                    group.create_task(served.run()),
                    group.create_task(_every(HOUSEKEEPING_SECONDS, enforcement.housekeeping)),
                    group.create_task(_every(SAVE_SECONDS, enforcement.save)),
                ]
                if systemd.alive_every_seconds is not None:
                    tasks.append(group.create_task(_every(systemd.alive_every_seconds, systemd.alive)))
                await ended
                systemd.stopping()
                for task in tasks:
                    task.cancel()
        enforcement.save()
        log.info("stopped; what the kernel was told stays in force, `registry-enforcer remove` takes it out")


def _in_force(policy: Policy, problem: str | None = None) -> str:
    """The line that `systemctl status` shows."""
    text = f"mode {policy.mode.value}, policy {policy.source} ({policy.digest[:12]})"
    return text if problem is None else f"{text}; the last reload changed nothing: {problem}"


def probe(firewall: nft.Nft) -> frozenset[ladder.Feature]:
    """What this kernel's nf_tables has; UnsupportedHostError where it cannot refuse anything."""
    try:
        features = firewall.probe()
    except nft.NftError as error:
        raise UnsupportedHostError(
            f"nf_tables may not be changed ({error}); run as root, or with CAP_NET_ADMIN"
        ) from None
    if ladder.Feature.BASE not in features:
        raise UnsupportedHostError(
            f"this kernel has no nf_tables ({ladder.Feature.BASE.kernel_option}), so nothing can be refused: "
            "load the module (modprobe nf_tables) or boot a kernel that has it"
        )
    return features


def _open_kernel(options: Options) -> bpf.KernelState | MemoryState:
    """The BPF programs and maps, loaded or an earlier daemon's, or what stands for them where BPF is forbidden.

    UnsupportedHostError where BPF is allowed and the host lacks something that is easily brought.
    """
    try:
        why_not = bpf.forbidden()
        if why_not is not None:
            log.warning("%s", why_not)
            return MemoryState(why_not)
        if bpf.ensure_bpffs(options.bpffs):
            log.info("mounted a bpffs for %s", options.bpffs)
        report = bpf.load(options.bpffs, loader=options.loader)
        kernel = bpf.KernelState(report)
    except bpf.BpfError as error:
        raise UnsupportedHostError(str(error)) from None
    for program, why in report.refused.items():
        log.info("this kernel does not take the BPF program %s: %s", program, why)
    return kernel


def _open_ears(
    stack: contextlib.ExitStack, enforcement: Enforcement, kernel: bpf.KernelState | MemoryState
) -> packet_socket.PacketSockets:
    try:
        return stack.enter_context(
            packet_socket.PacketSockets(enforcement.surviving(enforcement.hear), kernel.report.clock)
        )
    except packet_socket.PacketSocketError as error:
        raise UnsupportedHostError(f"neither BPF nor a packet socket can read DNS answers: {error}") from None


def _hear_refusals(
    stack: contextlib.ExitStack, capabilities: ladder.Capabilities, enforcement: Enforcement
) -> nflog.RefusalReader | None:
    """The reader of what the table reports; None where the kernel or somebody else's reader stands in the way."""
    if ladder.Feature.AUDIT not in capabilities.features:
        return None
    refused = enforcement.surviving(enforcement.auditor.refused_packets)
    try:
        return stack.enter_context(nflog.RefusalReader(refused, enforcement.policy.marks))
    except nflog.NflogError as error:
        log.warning("refused packets are counted and not audited: %s", error)
        return None


def _end_on_failure(loop: asyncio.AbstractEventLoop, ended: asyncio.Future[None], faults: Faults) -> None:
    """Make an exception in a callback or a task end the process: a daemon that lost a part of itself must not go on.

    That there is no descriptor for a client is none: asyncio tells it here, and listens again a second later.
    """

    def handle(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception") or RuntimeError(context["message"])
        if isinstance(error, OSError) and error.errno in procfs.EXHAUSTED and "socket" in context:
            faults.met(Fault.CLIENTS, error.strerror)
            return
        if not ended.done():
            ended.set_exception(error)

    loop.set_exception_handler(handle)


def _end(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


async def _every(seconds: float, action: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        action()


# --- remove ----------------------------------------------------------------------------------------------------------
INSTANCE_NAME = "instance.json"
MAX_INSTANCE_BYTES = 16_384


def _remember_instance(options: Options, cgroup: Path | None) -> None:
    """Note where this instance keeps its state in the kernel, for `remove`."""
    places = {"bpffs": str(options.bpffs), "cgroup": None if cgroup is None else str(cgroup)}
    trusted_files.replace(options.run_dir / INSTANCE_NAME, (json.dumps(places).encode(),))


def parse_instance(text: bytes) -> tuple[Path | None, Path | None]:
    """(bpffs, cgroup) of what `_remember_instance` wrote; nothing of what else it may be: `remove` deletes there."""
    try:
        places = json.loads(text)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(places, dict):
        return None, None
    bpffs, cgroup = (
        Path(place) if isinstance(place, str) and place.startswith("/") and "\0" not in place else None
        for place in (places.get("bpffs"), places.get("cgroup"))
    )
    return bpffs, cgroup


def remove(run_dir: Path, bpffs: Path | None, cgroup: Path | None) -> list[str]:
    """Take the instance of `run_dir` out of the kernel: filters, attachments, pins, then the table; says what went.

    AlreadyRunningError while its daemon runs, which would only put everything back.
    """
    removed = []
    with control.hold(run_dir), nft.Nft() as firewall, netlink.Netlink() as links:
        noted_bpffs = noted_cgroup = None
        try:
            noted_bpffs, noted_cgroup = parse_instance(trusted_files.read(run_dir / INSTANCE_NAME, MAX_INSTANCE_BYTES))
        except FileNotFoundError:
            pass
        except trusted_files.UntrustedError as error:
            raise control.RunDirectoryError(str(error)) from None
        bpffs = bpffs or noted_bpffs or Path(kernel_abi.BPFFS)
        cgroup = cgroup or noted_cgroup or procfs.cgroup_root()
        # The table goes last: while anything is left, what has no permission is refused.
        for interface in links.interfaces():
            if links.attached(interface.index) or links.guarded(interface.index):
                links.detach(interface.index)
                removed.append(f"tc filters of {interface.name}")
        pins = bpf.remove(bpffs, cgroup)
        if pins:
            removed.append(f"{len(pins)} BPF pins below {bpffs}")
        if firewall.present():
            firewall.apply(ruleset.render_removal())
            removed.append(f"nftables table inet {ruleset.TABLE}")
    for name in (INSTANCE_NAME, control.SOCKET_NAME, control.LOCK_NAME):
        (run_dir / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: it holds something that is not ours
        run_dir.rmdir()
    return removed
