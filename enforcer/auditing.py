"""From a refused packet to a line of the audit log: who it was is asked at once, its name and container take a moment.

A report of nftables says what was refused; the connect hooks know the process; the responder hears the name. They meet
here by the connection's addresses and ports. Whatever is missing when the moment is over is unknown, and never guessed.
"""

from __future__ import annotations

import asyncio
import collections
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from enforcer import containers
from enforcer.advice import parse_subject
from enforcer.attribution import Container
from enforcer.audit import AuditLog
from enforcer.audit_record import (
    RECORDS_A_REPLY,
    AuditRecord,
    Folding,
    Kind,
    Origin,
    Process,
    RecentRecords,
    Report,
    as_line,
)
from enforcer.bounds import Bounded, Room
from enforcer.bpf import KernelState
from enforcer.denial import Refusal
from enforcer.kernel_abi import Protocol, decode_connect, pack_connect_key
from enforcer.policy import Address, Reason
from enforcer.ruleset import CountedScope
from enforcer.without_bpf import MemoryState

# How long an answer waits for the report of its packet. The kernel holds it back for 10 ms, and a timer of a virtual
# CPU that its host does not run fires a second late.
REPORT_SECONDS = 2.0
NAME_SECONDS = 2.0  # how long a record waits for the name that the responder hears
LOOKUP_PAUSE_SECONDS = 0.25  # between two questions to the engines
LOOKUP_DEADLINE_SECONDS = 5.0
PENDING_ATTEMPTS = 4_096
WRITTEN_ATTEMPTS = 1_024
CONNECT_SECONDS = 1.0  # between a connect() and the report of its packet; another process's since then may be meant
NANOSECONDS = 1_000_000_000

Flow = tuple[Protocol, tuple[Address, int], tuple[Address, int]]
KnownName = Callable[[Address], tuple[str | None, str] | None]


@dataclass(slots=True)
class _Attempt:
    """One refused connection whose record is not written yet."""

    report: Report
    process: Process | None
    container: Container | None  # as far as the process's cgroup tells it
    expires_at: float  # when it is written without a name
    refusal: Refusal | None = None
    said: tuple[str | None, Reason] | None = None  # the guard's account: the name that was asked for


class Auditor:
    """Puts records together, folds them, remembers the last ones and writes them; on the event loop's thread."""

    def __init__(
        self,
        log: AuditLog,
        kernel: KernelState | MemoryState | None,
        cgroup: Path | None,
        known_name: KnownName = lambda _: None,
    ) -> None:
        """`known_name(address)`: (name, rule) of a permission that the address has, on whatever port."""
        self.responding = False  # the responder hears names: records of TCP wait for them
        self.recent = RecentRecords()
        self.unrecorded = 0  # attempts for which there was no place
        self._unheard = 0  # of these the answers that came before their reports
        self._log = log
        self._kernel = kernel
        self._cgroup = cgroup
        self._known_name = known_name
        self._directory = containers.Containers()
        self._thread = ThreadPoolExecutor(1, "containers")  # what hangs there holds up names, nothing else
        self._folding = Folding()
        self._pending: dict[Flow, _Attempt] = {}
        self._early: dict[Flow, tuple[Refusal, float]] = {}  # answers without a report, and when they are written so
        self._written: collections.OrderedDict[Flow, AuditRecord] = collections.OrderedDict()
        self._wake = asyncio.Event()

    # --- what happens ------------------------------------------------------------------------------------------------
    def refused_packets(self, reports: Iterable[Report]) -> None:
        """nftables has refused, or in mode "observe" would have refused, these."""
        for report in reports:
            if not self._has_place(report):
                continue
            process, container = self._who(report)
            named_later = self.responding and report.protocol is Protocol.TCP and report.kind is Kind.REFUSED
            expires_at = time.monotonic() + (NAME_SECONDS if named_later else 0)
            refusal, _ = self._early.pop(report.flow, (None, 0.0))
            self._pending[report.flow] = _Attempt(report, process, container, expires_at, refusal)
            self._wake.set()

    def answered(self, refusal: Refusal) -> None:
        """The responder has refused a connection to its face."""
        flow = refusal.protocol, refusal.source, refusal.destination
        attempt = self._pending.get(flow)
        if attempt is not None:
            attempt.refusal = refusal
            self._wake.set()
        elif flow in self._written:
            # Counted already: only what it was about, and the reference, was not known.
            self._write(replace(self._told(self._written[flow], refusal), count=0))
        elif len(self._early) < PENDING_ATTEMPTS:
            self._early[flow] = refusal, time.monotonic() + REPORT_SECONDS
            self._wake.set()
        else:
            self.unrecorded += 1
            self._unheard += 1

    def ended(self, report: Report, name: str | None, reason: Reason) -> None:
        """The guard has ended a connection, or in mode "observe" would have, since it asked for `name`."""
        if not self._has_place(report):
            return
        process, container = self._who(report)
        self._pending[report.flow] = _Attempt(report, process, container, 0.0, said=(name, reason))
        self._wake.set()

    def _has_place(self, report: Report) -> bool:
        if report.flow in self._pending:
            return False  # another packet of the same attempt
        if len(self._pending) >= PENDING_ATTEMPTS:
            self.unrecorded += 1
            return False
        return True

    def disagreed(self, detail: str) -> None:
        """BPF and the full parser did not agree about a DNS answer."""
        self._write(AuditRecord(at=time.time(), kind=Kind.DISAGREEMENT, detail=detail))

    def policy_changed(self, detail: str) -> None:
        """Another policy is in force, or a new one was not taken."""
        self._write(AuditRecord(at=time.time(), kind=Kind.POLICY, detail=detail))

    def drifted(self, detail: str) -> None:
        """Somebody else changed what enforces, or took it away."""
        self._write(AuditRecord(at=time.time(), kind=Kind.DRIFT, detail=detail))

    # --- what becomes of it ------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Write what is known well enough, until cancelled; then what is left."""
        try:
            while True:
                self._write_early(time.monotonic())
                ready = self._ready()
                if ready:
                    started = time.monotonic()
                    await self._record(ready)
                    await asyncio.sleep(max(0, started + LOOKUP_PAUSE_SECONDS - time.monotonic()))
                    continue
                self._wake.clear()
                ends = [attempt.expires_at for attempt in self._pending.values()]
                ends += [expires_at for _, expires_at in self._early.values()]
                timeout = max(0, min(ends) - time.monotonic()) if ends else None
                try:
                    async with asyncio.timeout(timeout):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            for attempt in self._pending.values():
                self._finish(attempt, {}, {})
            self._write_early(math.inf)
            self._emit(self._folding.rest())
            self._thread.shutdown(wait=False, cancel_futures=True)

    def housekeeping(self) -> None:
        """Write the counts of repeats whose window is over; call it every second or so."""
        self._emit(self._folding.due(time.monotonic()))

    def _write_early(self, now: float) -> None:
        """Answers to connections of which the kernel reported no packet: it cannot, or the report was lost."""
        for flow, (refusal, expires_at) in list(self._early.items()):
            if expires_at <= now:
                del self._early[flow]
                record = AuditRecord(
                    at=refusal.at,
                    kind=Kind.REFUSED,
                    scope=refusal.scope or CountedScope.UNKNOWN,
                    protocol=refusal.protocol,
                    source=refusal.source,
                    destination=refusal.destination,
                )
                self._write(self._told(record, refusal))

    def _ready(self) -> list[Flow]:
        now = time.monotonic()
        return [
            flow for flow, attempt in self._pending.items() if attempt.refusal is not None or attempt.expires_at <= now
        ]

    async def _record(self, flows: list[Flow]) -> None:
        attempts = [self._pending[flow] for flow in flows]
        addresses = frozenset(attempt.report.source[0] for attempt in attempts if attempt.report.forwarded)
        seen = frozenset(attempt.container for attempt in attempts if attempt.container is not None)
        loop = asyncio.get_running_loop()
        at: dict[Address, Container] = {}
        named: dict[Container, Container] = {}
        try:
            async with asyncio.timeout(LOOKUP_DEADLINE_SECONDS):
                if addresses:
                    at = await loop.run_in_executor(self._thread, self._directory.at, addresses)
                if seen:
                    named = await loop.run_in_executor(self._thread, self._directory.named, seen)
        except TimeoutError:
            pass
        for flow, attempt in zip(flows, attempts, strict=True):
            del self._pending[flow]
            self._finish(attempt, at, named)

    def _finish(self, attempt: _Attempt, at: Mapping[Address, Container], named: Mapping[Container, Container]) -> None:
        report = attempt.report
        if report.forwarded:
            container = at.get(report.source[0])
            origin = Origin.CONTAINER if container else Origin.UNKNOWN
        else:
            container = attempt.container and named.get(attempt.container, attempt.container)
            if container or report.scope is CountedScope.CONTAINER:
                origin = Origin.CONTAINER
            else:
                origin = Origin.UNKNOWN if report.scope is CountedScope.UNKNOWN else Origin.HOST
        known = self._known_name(report.destination[0])
        record = AuditRecord(
            at=report.at,
            kind=report.kind,
            scope=report.scope,
            protocol=report.protocol,
            source=report.source,
            destination=report.destination,
            name=known and known[0],
            name_source="learned" if known and known[0] else None,
            process=attempt.process,
            origin=origin,
            container=container,
            reason=Reason.UNLISTED_PORT if known else Reason.UNLISTED_ADDRESS,
            rule=known and known[1],
        )
        if attempt.said is not None:
            name, reason = attempt.said
            record = replace(
                record,
                name=name or record.name,
                name_source="client" if name else record.name_source,
                reason=reason,
                rule=record.rule if reason is Reason.UNNAMED else None,
            )
        if attempt.refusal is not None:
            record = self._told(record, attempt.refusal)
        self._written[report.flow] = record
        while len(self._written) > WRITTEN_ATTEMPTS:
            self._written.popitem(last=False)
        self._write(record)

    @staticmethod
    def _told(record: AuditRecord, refusal: Refusal) -> AuditRecord:
        """`record` with what only the responder knows."""
        named = refusal.requested_name is not None
        return replace(
            record,
            name=refusal.requested_name if named else record.name,
            name_source="client" if named else record.name_source,
            reason=refusal.reason if named else record.reason or refusal.reason,
            answered=refusal.answered.value,
            references=(refusal.reference,),
        )

    def _write(self, record: AuditRecord) -> None:
        self._emit(self._folding.add(record, time.monotonic()))

    def _emit(self, records: Iterable[AuditRecord]) -> None:
        for record in records:
            self.recent.add(record)
            self._log.write(as_line(record), time.monotonic())

    # --- who ---------------------------------------------------------------------------------------------------------
    def _who(self, report: Report) -> tuple[Process | None, Container | None]:
        """The process that called connect(2) for this packet, and its container as far as cgroups tell."""
        if report.forwarded or report.uid is None or self._kernel is None:
            return None, None
        nobody = Process(None, None, None, report.uid)
        key = pack_connect_key(*report.destination, report.protocol, report.marked_scope, report.uid)
        value = self._kernel.maps["connects"].lookup(key)
        if value is None:
            return nobody, None
        connect = decode_connect(value)
        now = self._kernel.now_ns()
        if now - connect.at_ns > CONNECT_SECONDS * NANOSECONDS:
            return nobody, None
        if connect.other_at_ns and now - connect.other_at_ns < CONNECT_SECONDS * NANOSECONDS:
            return nobody, None  # two processes at the same time: either may be it
        container = None
        if self._cgroup is not None:
            container = containers.container_of_cgroup_id(self._cgroup, connect.cgroup_id)
        exe = None
        if connect.process:
            since_boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            alive = containers.program_of(connect.process, since_boot - (now - connect.at_ns))
            if alive is not None:
                exe, by_process = alive
                container = container or by_process
        comm = connect.comm.decode(errors="replace")
        return Process(connect.process or None, comm, exe, report.uid), container

    # --- what it tells -----------------------------------------------------------------------------------------------
    def dropped(self, lost_reports: int) -> dict[str, int]:
        """Refusals that no line tells of, by where they got lost."""
        return {"kernel": lost_reports, "pending": self.unrecorded, "output": self._log.dropped}

    def rooms(self) -> dict[Bounded, Room]:
        """What is held on its way to the log."""
        return {
            Bounded.PENDING_REFUSALS: Room(PENDING_ATTEMPTS, len(self._pending), self.unrecorded - self._unheard),
            Bounded.EARLY_ANSWERS: Room(PENDING_ATTEMPTS, len(self._early), self._unheard),
            Bounded.FOLDED_REFUSALS: Room(self._folding.capacity, len(self._folding), self._folding.closed_early),
            Bounded.AUDIT_LINES: self._log.room,
        }

    def answer_log(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The records after number `after` (absent: the last), `limit` at most; ValueError if they are no numbers."""
        after, limit = request.get("after", 0), request.get("limit", RECORDS_A_REPLY)
        if not (isinstance(after, int) and isinstance(limit, int)) or after < 0 or limit < 0:
            raise ValueError("log takes after and limit, both numbers")
        last, records = self.recent.after(after, min(limit, RECORDS_A_REPLY))
        return {"last": last, "records": records}

    def last_refusals(self, subject: str, limit: int = 5) -> list[dict[str, object]]:
        """The newest refusals of a name or address as `explain` takes it; ValueError as parse_subject."""
        return self.recent.about(*parse_subject(subject), limit)
