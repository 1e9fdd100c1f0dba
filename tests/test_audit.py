"""The audit log: what records say, how repeats are folded, where lines go when things break; real nftables reports."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer import audit, nflog, ruleset
from enforcer.attribution import Container
from enforcer.audit import AuditLog
from enforcer.audit_record import (
    FOLD_SECONDS,
    REFERENCES_A_RECORD,
    AuditRecord,
    Folding,
    Kind,
    Origin,
    Process,
    RecentRecords,
    Report,
    as_json,
    as_line,
    as_sentence,
)
from enforcer.auditing import NAME_SECONDS, REPORT_SECONDS, Auditor
from enforcer.bounds import Bounded, Room
from enforcer.cli import EXIT_NOT_RUNNING, main
from enforcer.denial import Answered, Refusal
from enforcer.kernel_abi import DEFAULT_MARKS, MarkedScope, Protocol
from enforcer.nft import Nft
from enforcer.policy import PolicyError, Reason, parse
from enforcer.ruleset import CountedScope
from tests.test_ruleset import FULL, POLICIES

AT = 1_795_470_691.25
SOURCE, DESTINATION = (ip_address("172.17.0.2"), 40_000), (ip_address("198.51.100.7"), 443)
RECORD = AuditRecord(
    at=AT,
    kind=Kind.REFUSED,
    scope=CountedScope.CONTAINER,
    protocol=Protocol.TCP,
    source=SOURCE,
    destination=DESTINATION,
    name="evil.test",
    name_source="client",
    process=Process(17, "curl", "/usr/bin/curl", 0),
    origin=Origin.CONTAINER,
    container=Container("0" * 64, "docker", "web", "nginx:1"),
    reason=Reason.UNLISTED_NAME,
    answered="tls_alert",
    references=("K7QX2M",),
)


def until(condition: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- records ---------------------------------------------------------------------------------------------------------
def test_line_says_what_the_schema_promises() -> None:
    assert json.loads(as_line(RECORD)) == {
        "version": 1,
        "time": "2026-11-23T21:51:31.250Z",
        "kind": "refused",
        "scope": "container",
        "protocol": "tcp",
        "source": {"address": "172.17.0.2", "port": 40000},
        "destination": {"address": "198.51.100.7", "port": 443},
        "name": "evil.test",
        "name_source": "client",
        "origin": "container",
        "process": {"pid": 17, "comm": "curl", "exe": "/usr/bin/curl", "uid": 0},
        "container": {"id": "0" * 64, "name": "web", "image": "nginx:1", "runtime": "docker", "pod": None},
        "reason": "unlisted-name",
        "rule": None,
        "answered": "tls_alert",
        "reference": "K7QX2M",
        "references": ["K7QX2M"],
        "count": 1,
        "since": None,
        "detail": None,
    }


def test_documented_keys_are_those_of_every_line() -> None:
    documented = (Path(__file__).parent.parent / "docs" / "audit.md").read_text()
    for record in (RECORD, AuditRecord(at=AT, kind=Kind.POLICY, detail="x")):
        for key in as_json(record):
            assert f"| `{key}` |" in documented, key
    for kind in Kind:
        assert f"`{kind.value}`" in documented


@given(text=st.text())
def test_no_text_of_a_client_can_forge_a_line(text: str) -> None:
    forged = replace(
        RECORD,
        name=text,
        process=Process(1, text, text, 0),
        container=Container(text, text, text, text, text),
        detail=text,
    )
    line = as_line(forged)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["process"]["comm"] == text[:256]


def test_line_is_bounded_whatever_clients_call_themselves() -> None:
    long = "\U0001f600" * 100_000
    assert len(as_line(replace(RECORD, name=long, process=Process(1, long, long, 0), detail=long))) < 32_768


# --- folding ---------------------------------------------------------------------------------------------------------
def test_first_is_written_at_once_and_repeats_are_counted_into_one_more() -> None:
    folding = Folding()
    assert folding.add(RECORD, 0) == [RECORD]
    for second in range(1, 40):
        repeat = replace(RECORD, at=AT + second, source=(SOURCE[0], 40_000 + second), references=(f"R{second}",))
        assert folding.add(repeat, second) == []
    assert folding.due(FOLD_SECONDS - 1) == []
    (folded,) = folding.due(FOLD_SECONDS)
    assert (folded.count, folded.since, folded.at) == (39, AT + 1, AT + 39)
    assert folded.references == tuple(f"R{second}" for second in range(40 - REFERENCES_A_RECORD, 40))
    # Nothing more in the next minute: the key is forgotten, and the next is a first again.
    assert folding.due(2 * FOLD_SECONDS) == []
    assert folding.add(RECORD, 2 * FOLD_SECONDS) == [RECORD]


@pytest.mark.parametrize(
    "other",
    [
        {"name": "other.test"},
        {"destination": (DESTINATION[0], 5000)},
        {"kind": Kind.OBSERVED},
        {"container": Container("1" * 64)},
        {"process": Process(18, "wget", "/usr/bin/wget", 0)},
        {"source": (ip_address("172.17.0.3"), 40_000)},
        {"protocol": Protocol.UDP},
    ],
)
def test_what_differs_is_no_repeat(other: dict[str, object]) -> None:
    folding = Folding()
    folding.add(RECORD, 0)
    different = replace(RECORD, **other)  # type: ignore[arg-type]
    assert folding.add(different, 0) == [different]


def test_folding_forgets_the_oldest_and_says_its_count() -> None:
    folding = Folding(capacity=10)
    folding.add(RECORD, 0)
    folding.add(RECORD, 0)
    written = [record for n in range(20) for record in folding.add(replace(RECORD, name=f"n{n}.test"), 0)]
    assert len(written) == 21
    assert [record.count for record in written if record.name == "evil.test"] == [1]
    assert folding.rest() == []


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 500)), max_size=60))
def test_every_attempt_is_counted_once(attempts: list[tuple[int, float]]) -> None:
    folding = Folding(capacity=3)
    written = []
    for name, now in sorted(attempts, key=lambda attempt: attempt[1]):
        written += folding.due(now)
        written += folding.add(replace(RECORD, name=f"{name}.test"), now)
    written += folding.rest()
    assert sum(record.count for record in written) == len(attempts)


def test_recent_records_are_followed_by_number_and_bounded() -> None:
    recent = RecentRecords()
    for n in range(2_000):
        recent.add(replace(RECORD, name=f"n{n}.test"))
    number, records = recent.after(0, 10)
    assert number == 2_000
    assert [record["name"] for record in records] == [f"n{n}.test" for n in range(1_990, 2_000)]
    assert recent.after(number, 10) == (2_000, [])
    recent.add(RECORD)
    assert recent.after(number, 10) == (2_001, [as_json(RECORD)])
    assert recent.about("evil.test", None, 5) == [as_json(RECORD)]
    assert recent.about("evil.test", 5000, 5) == []
    assert len(recent.about(DESTINATION[0], 443, 5)) == 5


# --- writing ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        for fd in (reading, writing):
            with contextlib.suppress(OSError):
                os.close(fd)


def test_lines_go_to_standard_output_and_the_file(tmp_path: Path, pipe: tuple[int, int]) -> None:
    path = tmp_path / "made" / "audit.jsonl"
    with AuditLog(path, stdout=pipe[1]) as log:
        log.write("one", 0)
        log.write("two", 0)
    assert os.read(pipe[0], 100) == b"one\ntwo\n"
    assert path.read_text() == "one\ntwo\n"
    assert path.stat().st_mode & 0o777 & ~0o640 == 0
    assert log.dropped == 0


def test_file_survives_rotation_by_others(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path, stdout=None) as log:
        log.write("one", 0)
        until(lambda: path.exists() and path.read_text() == "one\n")
        path.rename(tmp_path / "audit.jsonl.old")
        log.write("two", 0)
        until(lambda: path.exists() and path.read_text() == "two\n")
        path.unlink()
        log.write("three", 0)
        until(lambda: path.exists() and path.read_text() == "three\n")
        log.follow_policy(tmp_path / "elsewhere.jsonl")
        log.write("four", 0)
    assert (tmp_path / "audit.jsonl.old").read_text() == "one\n"
    assert (tmp_path / "elsewhere.jsonl").read_text() == "four\n"


def test_file_never_outgrows_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path, stdout=None, max_bytes=100) as log:
        for number in range(50):
            log.write(f"line {number:02}", 0)
    assert path.stat().st_size <= 100
    assert (tmp_path / "audit.jsonl.1").stat().st_size <= 100
    assert {entry.name for entry in tmp_path.iterdir()} == {"audit.jsonl", "audit.jsonl.1"}
    assert path.read_text().endswith("line 49\n")


@pytest.mark.root
def test_full_disk_is_said_once_and_leaves_whole_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=True)
    try:
        line = json.dumps({"x": "y" * 1_000})
        with caplog.at_level(logging.WARNING), AuditLog(disk / "audit.jsonl", stdout=None) as log:
            for _ in range(40):
                log.write(line, 0)
            until(lambda: log.dropped > 20)
            time.sleep(0.05)
            kept = (disk / "audit.jsonl").read_text().splitlines()
            assert set(kept) == {line}
            assert len(kept) + log.dropped == 40
            assert [record.levelname for record in caplog.records] == ["ERROR"]
            assert "No space left" in caplog.text
            (disk / "audit.jsonl").unlink()
            log.write(line, 0)
            until(lambda: (disk / "audit.jsonl").exists() and (disk / "audit.jsonl").read_text() == line + "\n")
        assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("place", ["link", "fifo", "directory"])
def test_what_is_no_file_of_its_own_is_not_written_to(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, target = tmp_path / "audit.jsonl", tmp_path / "target"
    target.write_text("")
    if place == "link":
        path.symlink_to(target)
    elif place == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with AuditLog(path, stdout=None) as log:
        log.write("line", 0)
        until(lambda: log.dropped == 1)
    assert target.read_text() == ""
    assert "enforcement goes on" in caplog.text


def test_reader_that_has_stopped_reading_holds_nobody_up(pipe: tuple[int, int]) -> None:
    log = AuditLog(None, stdout=pipe[1])
    started = time.monotonic()
    with log:
        for number in range(3_000):
            log.write("x" * 1_000, number)  # as if one a second: no rate is exceeded
        assert time.monotonic() - started < 1
        assert log.dropped > 500
        os.close(pipe[0])  # so that the thread can end
    assert time.monotonic() - started < 4


def test_more_lines_than_anybody_reads_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path, stdout=None) as log:
        for _ in range(audit.BURST_LINES + 500):
            log.write("line", 0)
        until(lambda: path.exists() and len(path.read_text().splitlines()) == audit.BURST_LINES)
        assert log.dropped == log.room.turned_away == 500
        log.write("line", 1)  # a second later there is room again
    assert len(path.read_text().splitlines()) == audit.BURST_LINES + 1


# --- what nftables reports -------------------------------------------------------------------------------------------
UPLINK = """
ip link set lo up; ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up
ip addr add 192.0.2.2/24 dev up0; ip addr add 2001:db8::2/64 dev up0 nodad
ip route add default dev up0; ip -6 route add default dev up0
"""


def in_namespace(action: Callable[[], None]) -> None:
    """Run it in a thread with a network namespace of its own, whose uplink leads nowhere."""
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            assert ctypes.CDLL(None, use_errno=True).unshare(0x40000000) == 0
            subprocess.run(["sh", "-ec", UPLINK], check=True)
            action()
        except BaseException as error:  # noqa: BLE001 - raised again where pytest sees it
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def syn(family: socket.AddressFamily, address: str, scope: MarkedScope, port: int = 443) -> None:
    with socket.socket(family) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", DEFAULT_MARKS.of(scope)))
        sock.connect_ex((address, port))


async def later(condition: Callable[[], object], seconds: float = 5) -> None:
    """Let the event loop run until it holds, or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # noqa: ASYNC110 - of kernel and clock, which set no event
        await asyncio.sleep(0.01)


async def reported(expected: int, reports: list[Report], send: Callable[[], None]) -> int:
    """How many were lost on the way to `reports`."""
    with nflog.RefusalReader(reports.extend, DEFAULT_MARKS) as reader:
        send()
        await later(lambda: len(reports) >= expected)
        return reader.lost


@pytest.mark.root
@pytest.mark.parametrize(("name", "kind"), [("strict-host", Kind.REFUSED), ("observe", Kind.OBSERVED)])
def test_what_is_refused_is_reported_with_scope_addresses_and_user(name: str, kind: Kind) -> None:
    reports: list[Report] = []

    def send() -> None:
        syn(socket.AF_INET, "198.51.100.7", MarkedScope.CONTAINER)
        syn(socket.AF_INET6, "2001:db8:7::7", MarkedScope.ENGINE, 5000)
        syn(socket.AF_INET, "198.51.100.7", MarkedScope.CONTAINER, 80)  # not judged
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as quic, contextlib.suppress(OSError):
            quic.sendto(b"", ("198.51.100.7", 443))

    def act() -> None:
        with Nft() as firewall:
            firewall.apply(ruleset.render_ruleset(POLICIES[name], FULL, []))
            assert asyncio.run(reported(3, reports, send)) == 0

    in_namespace(act)
    assert [(r.kind, r.scope, r.protocol, str(r.destination[0]), r.destination[1]) for r in reports] == [
        (kind, CountedScope.CONTAINER, Protocol.TCP, "198.51.100.7", 443),
        (kind, CountedScope.ENGINE, Protocol.TCP, "2001:db8:7::7", 5000),
        (kind, CountedScope.UNKNOWN, Protocol.UDP, "198.51.100.7", 443),
    ]
    assert str(reports[0].source[0]) == "192.0.2.2"
    assert [report.uid for report in reports] == [os.getuid()] * 3
    assert not any(report.forwarded for report in reports)
    assert reports[0].marked_scope is MarkedScope.CONTAINER


@pytest.mark.root
def test_reports_beyond_the_bound_are_counted_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nflog, "_BUFFER_BYTES", 4_096)
    reports: list[Report] = []

    async def act() -> None:
        with nflog.RefusalReader(reports.extend, DEFAULT_MARKS) as reader:
            for _ in range(2_000):
                syn(socket.AF_INET, "198.51.100.7", MarkedScope.CONTAINER)
            deadline = time.monotonic() + 5
            while len(reports) + reader.lost < 2_001 and time.monotonic() < deadline:
                syn(socket.AF_INET, "198.51.100.8", MarkedScope.CONTAINER)  # its number tells of the others
                await asyncio.sleep(0.05)
            sent = 2_000 + sum(str(report.destination[0]) == "198.51.100.8" for report in reports)
            assert reader.lost > 100
            assert len(reports) + reader.lost == sent

    def in_it() -> None:
        with Nft() as firewall:
            firewall.apply(ruleset.render_ruleset(POLICIES["default"], FULL, []))
            asyncio.run(act())

    in_namespace(in_it)


@pytest.mark.root
def test_second_listener_is_told_so() -> None:
    async def act() -> None:
        second = nflog.RefusalReader(lambda _: None, DEFAULT_MARKS)
        with (
            nflog.RefusalReader(lambda _: None, DEFAULT_MARKS),
            pytest.raises(nflog.NflogError, match="not permitted"),
            second,
        ):
            pass

    in_namespace(lambda: asyncio.run(act()))


@given(prefix=st.binary(max_size=40), packet=st.binary(max_size=64), mark=st.binary(max_size=8))
def test_any_report_is_read_or_passed_over(prefix: bytes, packet: bytes, mark: bytes) -> None:
    nflog.decode_report({10: b"refused container\0", 9: packet, 2: mark[:4], 1: b""}, AT, DEFAULT_MARKS)
    assert nflog.decode_report({10: prefix + b"!\0", 9: packet}, AT, DEFAULT_MARKS) is None


# --- what meets ------------------------------------------------------------------------------------------------------
REPORT = Report(
    at=AT,
    kind=Kind.REFUSED,
    scope=CountedScope.ENGINE,
    protocol=Protocol.TCP,
    source=SOURCE,
    destination=DESTINATION,
    forwarded=False,
    marked_scope=MarkedScope.ENGINE,
    uid=0,
)
REFUSAL = Refusal(
    at=AT,
    scope=None,
    protocol=Protocol.TCP,
    source=SOURCE,
    destination=DESTINATION,
    requested_name="evil.test",
    reason=Reason.UNLISTED_NAME,
    reference="K7QX2M",
    answered=Answered.TLS_ALERT,
)


def audited(*events: tuple[float, object], responding: bool = True) -> list[dict[str, object]]:
    """The records of what happens at these seconds."""

    async def act() -> list[dict[str, object]]:
        auditor = Auditor(AuditLog(None, stdout=None), None, None)
        auditor.responding = responding
        task = asyncio.create_task(auditor.run())
        began = time.monotonic()
        for at, event in events:
            await asyncio.sleep(max(0, began + at - time.monotonic()))
            if isinstance(event, Refusal):
                auditor.answered(event)
            elif isinstance(event, Report):
                auditor.refused_packets([event])
        await later(lambda: auditor.recent.last, max(NAME_SECONDS, REPORT_SECONDS) + 1)
        await asyncio.sleep(0.05)
        records = auditor.recent.after(0, 100)[1]
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return records

    return asyncio.run(act())


def test_packet_and_answer_make_one_record() -> None:
    (record,) = audited((0, REPORT), (0.05, REFUSAL))
    assert (record["name"], record["name_source"], record["reason"]) == ("evil.test", "client", "unlisted-name")
    assert (record["scope"], record["origin"], record["reference"]) == ("engine", "host", "K7QX2M")
    assert record["count"] == 1


@pytest.mark.parametrize("later", [0.1, 1.2])
def test_answer_may_come_before_the_report_of_its_packet(later: float) -> None:
    (record,) = audited((0, REFUSAL), (later, REPORT))
    assert (record["name"], record["scope"], record["reference"], record["count"]) == (
        "evil.test",
        "engine",
        "K7QX2M",
        1,
    )


def test_without_an_answer_there_is_a_record_all_the_same() -> None:
    (record,) = audited((0, REPORT))
    assert (record["name"], record["reference"], record["reason"]) == (None, None, "unlisted-address")


def test_without_a_responder_nothing_waits() -> None:
    started = time.monotonic()
    (record,) = audited((0, REPORT), responding=False)
    assert time.monotonic() - started < 1
    assert record["name"] is None


def test_late_answer_adds_its_name_and_is_not_counted_again() -> None:
    first, second = audited((0, REPORT), (NAME_SECONDS + 0.3, REFUSAL))
    assert (first["name"], first["count"]) == (None, 1)
    assert (second["name"], second["reference"], second["count"]) == ("evil.test", "K7QX2M", 0)


def test_answer_without_a_packet_is_a_record() -> None:
    (record,) = audited((0, REFUSAL))
    assert (record["name"], record["scope"], record["origin"]) == ("evil.test", "unknown", "unknown")


def test_second_packet_of_an_attempt_is_no_attempt() -> None:
    (record,) = audited((0, REPORT), (0, REPORT), (0.1, REFUSAL))
    assert record["count"] == 1


def test_attempts_beyond_the_bound_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enforcer.auditing.PENDING_ATTEMPTS", 10)

    async def act() -> None:
        auditor = Auditor(AuditLog(None, stdout=None), None, None)
        auditor.refused_packets(replace(REPORT, source=(SOURCE[0], port)) for port in range(25))
        assert auditor.dropped(lost_reports=3) == {"kernel": 3, "pending": 15, "output": 0}
        assert auditor.rooms()[Bounded.PENDING_REFUSALS] == Room(10, 10, 15)
        for port in range(1_000, 1_012):
            auditor.answered(replace(REFUSAL, source=(SOURCE[0], port)))
        assert auditor.rooms()[Bounded.EARLY_ANSWERS] == Room(10, 10, 2)
        assert auditor.rooms()[Bounded.PENDING_REFUSALS].turned_away == 15

    asyncio.run(act())


def test_more_kinds_of_refusals_than_are_folded_are_counted() -> None:
    folding = Folding(capacity=2)
    for port in range(5):
        folding.add(AuditRecord(at=0, kind=Kind.REFUSED, destination=(SOURCE[0], port)), 0)
    assert (len(folding), folding.closed_early) == (2, 3)


def test_forwarded_packet_of_nobody_known_is_of_unknown_origin() -> None:
    (record,) = audited((0, replace(REPORT, forwarded=True, scope=CountedScope.CONTAINER, uid=None)), responding=False)
    assert (record["origin"], record["container"], record["process"]) == ("unknown", None, None)


# --- what the operator writes ----------------------------------------------------------------------------------------
def test_policy_names_the_file() -> None:
    assert parse('[audit]\nfile = "/var/log/audit.jsonl"', "p").audit_file == Path("/var/log/audit.jsonl")
    assert parse('mode = "enforce"', "p").audit_file is None
    assert parse("[audit]", "p").audit_file is None


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ('[audit]\nfile = "audit.jsonl"', 2, "not an absolute path"),
        ('[audit]\nfile = "/a\\u0000b"', 2, "not an absolute path"),
        ("[audit]\nfile = 1", 2, "1"),
        ('[audit]\npath = "/a"', 2, 'unknown key "path"'),
    ],
)
def test_mistake_about_the_file_is_named_with_its_line(text: str, line: int, problem: str) -> None:
    with pytest.raises(PolicyError) as error:
        parse(text, "p")
    assert error.value.line == line
    assert problem in str(error.value)


def test_log_without_a_daemon_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["log", "--run-dir", str(tmp_path)]) == EXIT_NOT_RUNNING
    assert "registry-enforcer run" in capsys.readouterr().err


def test_sentences_are_one_printable_line_each() -> None:
    hostile = replace(RECORD, name="a\nb\x1b[2J", container=Container("0" * 64, "docker", "x\u202ey", "i\tj"))
    for record in (RECORD, hostile, AuditRecord(at=AT, kind=Kind.POLICY, detail="a\nb")):
        assert as_sentence(as_json(record)).isprintable()
    assert as_sentence(as_json(replace(RECORD, count=7))) == (
        "2026-11-23T21:51:31.250Z refused evil.test (198.51.100.7 port 443/tcp): unlisted-name, "
        "from docker container web (nginx:1), /usr/bin/curl of uid 0, reference K7QX2M, 7 times"
    )


@given(number=st.one_of(st.integers(), st.text(), st.none(), st.booleans(), st.floats()), limit=st.integers())
def test_any_question_for_the_log_is_answered_or_refused(number: object, limit: int) -> None:
    async def act() -> None:
        auditor = Auditor(AuditLog(None, stdout=None), None, None)
        with contextlib.suppress(ValueError):
            assert auditor.answer_log({"after": number, "limit": limit}) == {"last": 0, "records": []}

    asyncio.run(act())
