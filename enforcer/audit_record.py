"""Audit records: who tried to reach what, and what became of it. docs/audit.md is the contract of the JSON lines.

Repeats are folded: the first refusal of a kind is a record at once, what follows within a minute is counted into one
more. Nothing here grows with what clients send: texts are cut, keys, references and recent records are bounded.
"""

from __future__ import annotations

import collections
import enum
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from enforcer.attribution import MAX_TEXT, Container
from enforcer.kernel_abi import MarkedScope, Protocol
from enforcer.policy import Address, Reason
from enforcer.ruleset import CountedScope

SCHEMA_VERSION = 1
FOLD_SECONDS = 60.0
FOLDED_KEYS = 4_096
REFERENCES_A_RECORD = 32
RECENT_RECORDS = 1_000
RECORDS_A_REPLY = 200

Endpoint = tuple[Address, int]  # (address, port)


class Kind(enum.Enum):
    """What a record tells of."""

    REFUSED = "refused"
    OBSERVED = "observed"  # mode "observe": would have been refused
    DISAGREEMENT = "disagreement"  # BPF learned more from a DNS answer than the daemon accepts; withdrawn
    POLICY = "policy"  # another policy is in force, or a new one was not taken
    DRIFT = "drift"  # somebody else took away what enforces, or changed it; put back


class Drifted(enum.Enum):
    """What of this daemon's somebody else changed or took away."""

    TABLE = "table"
    TRAFFIC_CONTROL = "tc"
    CGROUP = "cgroup"
    PINS = "pins"


class Origin(enum.Enum):
    """Where a connection came from."""

    HOST = "host"
    CONTAINER = "container"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Report:
    """One refused packet, as nftables reports it."""

    at: float  # Unix seconds
    kind: Kind
    scope: CountedScope
    protocol: Protocol
    source: Endpoint
    destination: Endpoint
    forwarded: bool  # False: of a socket of this host's own network
    marked_scope: MarkedScope
    uid: int | None  # of the socket; None: the kernel knows none, as for whatever is forwarded

    @property
    def flow(self) -> tuple[Protocol, Endpoint, Endpoint]:
        """What it has in common with the responder's account of the same connection."""
        return self.protocol, self.source, self.destination


@dataclass(frozen=True, slots=True)
class Process:
    """Who called connect(2); None is not known."""

    pid: int | None
    comm: str | None  # what the thread calls itself
    exe: str | None
    uid: int | None


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One line of the audit log; None means not known, or that a record of this kind has no such thing."""

    at: float  # Unix seconds; of a folded record: of its last repeat
    kind: Kind
    scope: CountedScope | None = None
    protocol: Protocol | None = None
    source: Endpoint | None = None
    destination: Endpoint | None = None
    name: str | None = None  # what the client asked for, else what the address was learned for
    name_source: str | None = None  # "client" or "learned"
    process: Process | None = None
    origin: Origin = Origin.UNKNOWN
    container: Container | None = None
    reason: Reason | None = None
    rule: str | None = None
    answered: str | None = None  # how the responder refused; None: the kernel did, or nobody
    references: tuple[str, ...] = ()  # shown to the clients; of a folded record the last ones
    count: int = 1  # how many attempts this line stands for
    since: float | None = None  # of a folded record: when its first repeat was
    detail: str | None = None  # of other kinds than refused and observed

    @property
    def key(self) -> object:
        """Records with the same key are repeats of each other."""
        process = self.process and (self.process.exe or self.process.comm, self.process.uid)
        source = self.source and self.source[0]
        container = self.container and self.container.id
        about = self.scope, self.protocol, source, self.destination, self.name, self.reason, self.detail
        return self.kind, about, process, self.origin, container


def as_json(record: AuditRecord) -> dict[str, object]:
    """The object of one line, every key in every line."""
    process, container = record.process, record.container
    return {
        "version": SCHEMA_VERSION,
        "time": _time(record.at),
        "kind": record.kind.value,
        "scope": record.scope and record.scope.value,
        "protocol": record.protocol and record.protocol.name.lower(),
        "source": _endpoint(record.source),
        "destination": _endpoint(record.destination),
        "name": _cut(record.name),
        "name_source": record.name_source,
        "origin": record.origin.value,
        "process": process
        and {"pid": process.pid, "comm": _cut(process.comm), "exe": _cut(process.exe), "uid": process.uid},
        "container": container
        and {
            "id": container.id,
            "name": container.name,
            "image": container.image,
            "runtime": container.runtime,
            "pod": container.pod,
        },
        "reason": record.reason and record.reason.value,
        "rule": record.rule,
        "answered": record.answered,
        "reference": record.references[-1] if record.references else None,
        "references": list(record.references),
        "count": record.count,
        "since": None if record.since is None else _time(record.since),
        "detail": None if record.detail is None else record.detail[: 4 * MAX_TEXT],
    }


def as_line(record: AuditRecord) -> str:
    """One line without its end; ASCII, so that no text in it can begin another or move a terminal's cursor."""
    return json.dumps(as_json(record), separators=(",", ":"))


def as_sentence(record: Mapping[str, Any]) -> str:
    """The object of a line in words, for a terminal: one line, no control characters."""
    when = str(record["time"])
    if record["destination"] is None:
        return _printable(f"{when} {record['kind']}: {record['detail']}")
    destination = record["destination"]
    where = f"{destination['address']} port {destination['port']}/{record['protocol']}"
    said = f"{when} {record['kind']} {record['name'] or where}"
    if record["name"]:
        said += f" ({where})"
    said += f": {record['reason']}, from {_who(record)}"
    if record["reference"]:
        said += f", reference {record['reference']}"
    if record["count"] > 1:
        said += f", {record['count']} times"
    return _printable(said)


def _who(record: Mapping[str, Any]) -> str:
    container, process = record["container"], record["process"]
    parts = []
    if container:
        names = [str(container[key]) for key in ("image", "pod") if container[key]]
        known = f" ({', '.join(names)})" if names else ""
        parts.append(f"{container['runtime'] or 'a'} container {container['name'] or container['id'][:12]}{known}")
    elif record["origin"] == Origin.CONTAINER.value:
        parts.append("a container")
    elif record["origin"] == Origin.HOST.value:
        parts.append("the host")
    if process and (process["exe"] or process["comm"]):
        user = "" if process["uid"] is None else f" of uid {process['uid']}"
        parts.append(f"{process['exe'] or process['comm']}{user}")
    return ", ".join(parts) or str(record["source"]["address"])


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _endpoint(endpoint: Endpoint | None) -> dict[str, object] | None:
    return None if endpoint is None else {"address": str(endpoint[0]), "port": endpoint[1]}


def _cut(text: str | None) -> str | None:
    return None if text is None else text[:MAX_TEXT]


# --- folding ---------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Repeats:
    began: float
    last: AuditRecord
    since: float = 0.0
    count: int = 0
    references: tuple[str, ...] = ()


@dataclass(slots=True)
class Folding:
    """Lets the first of each key through and counts the others; `now` is any clock that does not step."""

    window_seconds: float = FOLD_SECONDS
    capacity: int = FOLDED_KEYS
    closed_early: int = 0  # keys that others took the place of: the next of their kind is a line of its own again
    _open: collections.OrderedDict[object, _Repeats] = field(default_factory=collections.OrderedDict)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, record: AuditRecord, now: float) -> list[AuditRecord]:
        """What is to be written now: the record itself, unless it is a repeat."""
        repeats = self._open.get(record.key)
        if repeats is None:
            self._open[record.key] = _Repeats(now, record)
            written = [record]
            if len(self._open) > self.capacity:
                _, oldest = self._open.popitem(last=False)
                self.closed_early += 1
                written += _folded(oldest)
            return written
        if not repeats.count:
            repeats.since = record.at
        repeats.last = record
        repeats.count += record.count
        repeats.references = (repeats.references + record.references)[-REFERENCES_A_RECORD:]
        return []

    def due(self, now: float) -> list[AuditRecord]:
        """One record for each key that had repeats and whose window is over; without repeats the key is forgotten."""
        written: list[AuditRecord] = []
        while self._open:
            key, repeats = next(iter(self._open.items()))
            if now < repeats.began + self.window_seconds:
                break
            del self._open[key]
            if repeats.count:
                written += _folded(repeats)
                self._open[key] = _Repeats(now, repeats.last)
        return written

    def rest(self) -> list[AuditRecord]:
        """What has been counted and not been written yet; forgets everything."""
        written = [record for repeats in self._open.values() for record in _folded(repeats)]
        self._open.clear()
        return written


def _folded(repeats: _Repeats) -> Iterator[AuditRecord]:
    if repeats.count:
        yield replace(repeats.last, count=repeats.count, since=repeats.since, references=repeats.references)


@dataclass(slots=True)
class RecentRecords:
    """The last records, numbered, so that whoever follows asks for what comes after a number; given as JSON objects."""

    _records: collections.deque[tuple[int, AuditRecord]] = field(
        default_factory=lambda: collections.deque(maxlen=RECENT_RECORDS)
    )
    last: int = 0  # number of the newest

    def add(self, record: AuditRecord) -> None:
        """Keep one, and forget the oldest when there are too many."""
        self.last += 1
        self._records.append((self.last, record))

    def after(self, number: int, limit: int) -> tuple[int, list[dict[str, object]]]:
        """(number to ask with next, the newest `limit` records at most that are newer than `number`)."""
        newer = [record for n, record in self._records if n > number][-limit:] if limit else []
        return self.last, [as_json(record) for record in newer]

    def about(self, subject: str | Address, port: int | None, limit: int) -> list[dict[str, object]]:
        """The newest `limit` refusals of a name or an address, the newest first."""
        found = (record for _, record in reversed(self._records) if _is_about(record, subject, port))
        return [as_json(record) for record in itertools.islice(found, limit)]


def _is_about(record: AuditRecord, subject: str | Address, port: int | None) -> bool:
    if record.destination is None:
        return False
    matches = record.name == subject if isinstance(subject, str) else record.destination[0] == subject
    return matches and port in (None, record.destination[1])
