"""Drift: what somebody else changes in the kernel or takes out of it, while this daemon runs, is put back.

The kernel tells of nftables and of tc at once, and of cgroup programs and pins never: those are looked at every second,
with two microseconds for each. Every repair is counted and audited; the log says it once a minute for each kind.

What cannot be put back ends nothing: it is tried again every second, and what is left goes on refusing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from enforcer import bpf, procfs
from enforcer.audit_record import FOLD_SECONDS, Drifted
from enforcer.auditing import Auditor
from enforcer.kernel_abi import MarkedScope
from enforcer.metrics import Metrics

log = logging.getLogger("registry-enforcer")

_SAID = {
    Drifted.TABLE: "another program changed the nftables table",
    Drifted.TRAFFIC_CONTROL: "another program took tc filters away",
    Drifted.CGROUP: "another program detached cgroup programs",
    Drifted.PINS: "another program took BPF pins away",
}


class Repairs:
    """Tells of what was put back, and of what could not be."""

    def __init__(self, metrics: Metrics, auditor: Auditor) -> None:
        self._metrics = metrics
        self._auditor = auditor
        self._failing: set[Drifted] = set()
        self._said_at: dict[Drifted, float] = {}

    def made(self, what: Drifted, detail: str) -> None:
        """One repair; `detail` says of what."""
        self._failing.discard(what)
        self._metrics.drift_repairs.labels(what.value).inc()
        self._auditor.drifted(f"{_SAID[what]} ({detail}): put back")
        now = time.monotonic()
        if now >= self._said_at.get(what, now) + FOLD_SECONDS or what not in self._said_at:
            self._said_at[what] = now
            log.warning("%s (%s): put back", _SAID[what], detail)

    def failed(self, what: Drifted, error: Exception) -> None:
        """It cannot be put back now; said once until it can."""
        if what not in self._failing:
            self._failing.add(what)
            self._auditor.drifted(f"{_SAID[what]}, and it cannot be put back: {error}")
            log.error("%s, and it cannot be put back: %s; tried again every second", _SAID[what], error)


class UnannouncedDrift:
    """What no event tells of: programs at cgroups, and pins."""

    def __init__(self, kernel: bpf.KernelState, cgroup: Path | None, bpffs: Path, repairs: Repairs) -> None:
        self._kernel = kernel
        self._cgroup = cgroup
        self._bpffs = bpffs
        self._repairs = repairs

    def repair(self, stamped: Mapping[str, MarkedScope]) -> None:
        """Look at everything once; `stamped` are the cgroups below ours whose sockets a program stamps, if any.

        Raises BpfError where there are no descriptors or memory to look: then nothing is known to have drifted.
        """
        try:
            if self._cgroup is not None and (detached := list(self._hooks_again(self._cgroup, stamped))):
                self._repairs.made(Drifted.CGROUP, ", ".join(detached))
        except bpf.BpfError as error:
            _raise_exhausted(error)
            self._repairs.failed(Drifted.CGROUP, error)
        try:
            if lost := self._kernel.restore_pins():
                self._repairs.made(Drifted.PINS, f"{lost[0]} and {len(lost) - 1} more" if lost[1:] else lost[0])
        except bpf.BpfError as error:
            _raise_exhausted(error)
            self._repairs.failed(Drifted.PINS, error)

    def _hooks_again(self, cgroup: Path, stamped: Mapping[str, MarkedScope]) -> Iterator[str]:
        programs = self._kernel.programs
        for hook in bpf.CgroupHook:
            program = programs.get(hook.name.lower())
            if program is not None and not bpf.is_attached(program, cgroup, hook):
                bpf.attach_cgroup(program, cgroup, self._bpffs)
                yield program.name
        for path, scope in stamped.items():
            program = programs[f"stamp_{scope.name.lower()}"]
            there = cgroup / path
            if not bpf.is_attached(program, there, bpf.CgroupHook.SOCK_CREATE) and bpf.stamp_cgroup(program, there):
                yield f"{program.name} of {path or '/'}"


def _raise_exhausted(error: bpf.BpfError) -> None:
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in procfs.EXHAUSTED:
        raise error
