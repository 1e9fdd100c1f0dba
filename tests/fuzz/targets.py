"""What strangers' bytes may do to the parsers of the daemon: each target says what must hold, beyond that nothing ends.

A target takes any bytes and raises AssertionError, or whatever escapes the parser, where that is a finding. `seeds` is
what is known to lead deep: the vectors of the other tests, and tests/fuzz/corpus/TARGET, where each finding stays.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

import dns.flags
import dns.name
import dns.rdataclass
import dns.rdatatype

from enforcer import advice, attribution, control, daemon, denial, dns_answer, nflog, nfnetlink, ruleset, state
from enforcer.audit_record import RecentRecords
from enforcer.auditing import Auditor
from enforcer.dns_answer import DnsAnswer, DnsAnswerError
from enforcer.enforcement import Enforcement, name_map
from enforcer.kernel_abi import DEFAULT_MARKS, MAX_QUERIES, Protocol
from enforcer.ladder import Capabilities
from enforcer.learned import LearnedAddresses, permitted
from enforcer.overhearing import Overhearing, Packet
from enforcer.policy import NameIndex, PolicyError, Reason, RuleKind, host_pattern, parse
from tests import dns_vectors
from tests.kernel import packets

CORPUS = Path(__file__).parent / "corpus"
CLIENT_HELLOS = Path(__file__).parent.parent / "vectors" / "client_hello"
RESOLVER = dns_vectors.RESOLVER
CLIENT = ip_address("198.51.100.7")
POLICY = parse(
    'organization = "Corp"\ncontact = "ops"\npresets = ["docker-hub"]\n[[registry]]\nname = "corp"\n'
    'hosts = ["registry.corp.example", "*.blobs.corp.example"]\naddresses = ["10.20.0.0/16"]\n',
    "policy.toml",
)
INDEX = NameIndex(POLICY)
CAPABILITIES = Capabilities()
REFERENCE = "23456789"


def printable_line(text: str, most: int) -> bool:
    """Whether it can be shown in a terminal, a header, a log line."""
    return text.isprintable() and len(text) <= most


def check_shown(error: Exception) -> None:
    """Its text goes into logs and terminals."""
    assert printable_line(str(error), 2_000), ascii(str(error))


# --- DNS -------------------------------------------------------------------------------------------------------------
def dns_message(data: bytes) -> None:
    """What the full parser accepts is what it says when it is said again."""
    try:
        answer = dns_answer.parse_answer(data, RESOLVER)
    except DnsAnswerError as error:
        check_shown(error)
        return
    assert dns_answer.parse_question(data) == answer.question
    # A record of an address takes 1 byte of name, 10 of head and 4 of address at least.
    assert len(answer.addresses) <= min(len(data) // 15, int.from_bytes(data[6:8], "big"))
    names = (answer.question, *answer.aliases)
    assert len(set(names)) == len(names)
    for name in names:
        assert name == name.lower()
        assert printable_line(name, state.MAX_NAME), ascii(name)
    for record in answer.addresses:
        assert 0 <= record.ttl_seconds < 1 << 31
        assert record.address.version == (4 if answer.rdtype == dns.rdatatype.A else 6)
        dns_answer.classify_address(record.address)
    assert dns_answer.parse_answer(said_again(answer), RESOLVER) == answer


def said_again(answer: DnsAnswer) -> bytes:
    """A message that says what `answer` does: one chain of aliases, the addresses at its end."""
    names = [dns.name.from_text(name).to_wire() or b"" for name in (answer.question, *answer.aliases)]
    flags = dns.flags.QR | (dns.flags.TC if answer.truncated else 0)
    wire = bytearray(dns_answer.HEADER.pack(1, flags, 1, 0, 0, 0))
    wire += names[0] + struct.pack("!HH", answer.rdtype, dns.rdataclass.IN)
    records = 0
    for owner, target in itertools.pairwise(names):
        wire += owner + struct.pack("!HHIH", dns.rdatatype.CNAME, dns.rdataclass.IN, 60, len(target)) + target
        records += 1
    for record in answer.addresses:
        packed = record.address.packed
        wire += (
            names[-1] + struct.pack("!HHIH", answer.rdtype, dns.rdataclass.IN, record.ttl_seconds, len(packed)) + packed
        )
        records += 1
    wire[6:8] = records.to_bytes(2, "big")
    return bytes(wire)


def overheard_packets(data: bytes) -> None:
    """Packets, each behind its direction and length: who asked nothing teaches nothing, no question counts twice."""
    rule = POLICY.rules[0]
    taught = [(rule, rule.hosts[0])]
    heard = Overhearing(
        lambda _: True,
        lambda answer, now: list(permitted(answer, taught, dns_answer.classify_address, now)),
        lambda _: False,
    )
    heard.trust([RESOLVER])
    asked = read = at = number = 0
    while at + 3 <= len(data):
        leaving, length = data[at] & 1, int.from_bytes(data[at + 1 : at + 3], "big")
        packet = Packet(number * 1_000_000, 1, bool(leaving), data[at + 3 : at + 3 + length])
        at += 3 + length
        number += 1
        events = heard.hear(packet)
        if leaving:
            assert not events
            asked += 2  # two messages in a TCP segment at most
        for event in events:
            assert event.resolver == RESOLVER
            assert len(event.wire) <= len(packet.data)
            read += 1
        assert read <= asked
        assert len(heard) <= min(asked, MAX_QUERIES)


# --- refused clients -------------------------------------------------------------------------------------------------
def client_bytes(data: bytes) -> None:
    """What is decided stays decided when more comes, and nothing of a client's gets into a reply as it is."""
    found = denial.read_request(data)
    for cut in {0, 1, 2, 5, len(data) // 4, len(data) // 2, max(0, len(data) - 1)}:
        earlier = denial.read_request(data[:cut])
        assert earlier is denial.Undecided.NEED_MORE or earlier == found, (cut, earlier, found)
    if found is denial.Undecided.NEED_MORE:
        assert len(data) < denial.MAX_REQUEST_BYTES + 1
    if not isinstance(found, denial.TlsHello | denial.HttpRequest):
        return
    name = found.server_name if isinstance(found, denial.TlsHello) else found.host
    assert name is None or (name.isascii() and printable_line(name, 253) and not set(name) & set(" \"'<>\\;"))
    destination = ip_address("192.0.2.1"), 443
    refusal = denial.Refusal(
        at=0.0,
        scope=None,
        protocol=Protocol.TCP,
        source=(CLIENT, 1_024),
        destination=destination,
        requested_name=name,
        reason=denial.refusal_reason(INDEX, name, destination),
        reference=REFERENCE,
        answered=denial.Answered.HTTP,
    )
    assert isinstance(refusal.reason, Reason)
    assert not refusal.reason.allows
    sentence = denial.refusal_sentence(POLICY, refusal)
    assert printable_line(sentence, 1_000)
    if isinstance(found, denial.HttpRequest):
        for tls in (False, True):
            check_reply(denial.http_reply(found, sentence, tls=tls), found, sentence)


def check_reply(reply: bytes, request: denial.HttpRequest, sentence: str) -> None:
    """Just the lines that are ours, whatever was asked."""
    head, _, body = reply.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    assert status in (f"HTTP/1.1 401 {sentence}", f"HTTP/1.1 403 {sentence}")
    names = [field.partition(": ")[0] for field in fields]
    expected = ["Content-Type", "Content-Length", "Docker-Distribution-Api-Version", "Cache-Control", "Connection"]
    assert names in (expected, [*expected, "WWW-Authenticate", "WWW-Authenticate"])
    assert all(field.isprintable() and field.count('"') in (0, 2) for field in fields)
    if request.method == "HEAD":
        assert body == b""
    else:
        assert json.loads(body) == {"errors": [{"code": "DENIED", "message": sentence}]}
        assert fields[1] == f"Content-Length: {len(body)}"


# --- policy ----------------------------------------------------------------------------------------------------------
def policy_text(data: bytes) -> None:
    """A policy, or one line that says what to write instead; and what is a policy says of itself what it allows."""
    try:
        policy = parse(data, "policy.toml")
    except PolicyError as error:
        check_shown(error)
        check_place(error, data)
        return
    assert parse(data, "policy.toml") == policy
    index = NameIndex(policy)
    entries = 0
    for rule in policy.rules:
        for pattern in rule.hosts:
            assert host_pattern(str(pattern)) == pattern
            name = f"x.{pattern.name}" if pattern.wildcard else pattern.name
            if len(name) <= 253:
                # A proxy's own name is nothing that clients may ask for, but by another rule.
                assert rule.kind is RuleKind.PROXY or index.judge(name, rule.ports[0]).allowed
                assert advice.explain(policy, index, name, rule.ports[0], ()).allowed
            entries += 1
    assert len(name_map(policy)) <= entries
    text = ruleset.render_ruleset(policy, CAPABILITIES, "")
    for line in text.splitlines():
        assert printable_line(line.replace("\t", ""), 1 << 20)
        assert line.count('"') % 2 == 0, line


def check_place(error: PolicyError, data: bytes) -> None:
    """An editor can jump there."""
    assert 1 <= error.line <= data.count(b"\n") + 1


# --- the control socket ----------------------------------------------------------------------------------------------
class _Asked(Enforcement):
    """As much of a daemon as a question about names needs."""

    def status(self) -> dict[str, Any]:
        """Takes nothing from the request, and all of a daemon."""
        return {}


def _answering() -> _Asked:
    answering = _Asked.__new__(_Asked)
    answering.policy, answering.index, answering.learned = POLICY, INDEX, LearnedAddresses()
    answering.auditor = Auditor.__new__(Auditor)
    answering.auditor.recent = RecentRecords()
    return answering


def control_request(data: bytes) -> None:
    """An answer, or a ValueError that says what is wrong; either fits into a line of JSON."""
    try:
        reply = ANSWERING.answer(control.parse_request(data))
    except ValueError as error:
        reply = {"error": str(error)}
    line = json.dumps(reply)
    assert "\n" not in line
    assert len(line) < 100_000 + 12 * len(data)


# --- files of our own ------------------------------------------------------------------------------------------------
def state_file(data: bytes) -> None:
    """Whatever it is: entries that nftables and a terminal can hold and that are saved as they are, or a ValueError."""
    try:
        entries = state.parse(data)
    except ValueError:
        return
    saved_at = entries[0].expires_at - entries[0].seconds_left if entries else 0
    assert state.parse(state.render(entries, saved_at)) == entries
    for entry in entries:
        assert not (isinstance(entry.address, IPv6Address) and entry.address.scope_id)
        assert 0 < entry.port < 65_536
        assert printable_line(entry.name, state.MAX_NAME)
        assert 0 < float(entry.expires_at) < 1e13


def instance_file(data: bytes) -> None:
    """What `remove` deletes below is an absolute path, or not told."""
    for place in daemon.parse_instance(data):
        assert place is None or (place.is_absolute() and "\0" not in str(place))


# --- what the kernel and engines say ---------------------------------------------------------------------------------
def refused_packet(data: bytes) -> None:
    """Reports of nftables, in which the packet is a stranger's."""
    for _, _, body in nfnetlink.messages(data):
        report = nflog.decode_report(nfnetlink.message_attributes(body), 0.0, DEFAULT_MARKS)
        if report is not None:
            assert report.source[0].version == report.destination[0].version
            assert 0 <= report.destination[1] < 65_536


def engine_texts(data: bytes) -> None:
    """What engines and /proc say of containers, whose names and labels users choose; the first byte says which text."""
    if not data:
        return
    which, wire = data[0] % len(ENGINE_TEXTS), data[1:]
    # What their callers are ready for of an engine's JSON.
    with contextlib.suppress(*((ValueError, RecursionError) if which < ENGINE_JSON else ())):
        ENGINE_TEXTS[which](wire.decode(errors="replace"))


ENGINE_JSON = 3
ENGINE_TEXTS: tuple[Callable[[str], object], ...] = (
    attribution.docker_containers,
    attribution.stored_containers,
    lambda text: attribution.bundled_container(text, attribution.Container("ab" * 32)),
    attribution.container_of_process,
    lambda text: [(attribution.classify_cgroup(path), attribution.container_of_cgroup(path)) for path in text.split()],
    lambda text: attribution.parse_conmon(text.encode()),
    lambda text: attribution.namespace_addresses(text, text),
)


ANSWERING = _answering()
TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        dns_message,
        overheard_packets,
        client_bytes,
        policy_text,
        control_request,
        state_file,
        instance_file,
        refused_packet,
        engine_texts,
    )
}


# --- seeds -----------------------------------------------------------------------------------------------------------
def seeds(name: str) -> Iterator[tuple[str, bytes]]:
    """(where it comes from, bytes) of all that a run over `name` begins with."""
    if name == "dns_message":
        for vector in dns_vectors.load():
            yield vector.name, vector.answer
    if name == "overheard_packets":
        for vector in dns_vectors.load():
            yield vector.name, conversation(vector)
    if name == "client_bytes":
        for path in sorted(CLIENT_HELLOS.glob("*.txt")):
            yield path.stem, bytes.fromhex("".join(path.read_text().splitlines()[2:]))
    for path in sorted((CORPUS / name).iterdir()):
        yield path.name, path.read_bytes()


def conversation(vector: dns_vectors.Vector) -> bytes:
    """Question and answer as overheard_packets reads them."""
    ether = 14
    asking = packets.frame(CLIENT, RESOLVER, Protocol.UDP, packets.udp(4_000, 53, vector.query))[ether:]
    telling = packets.frame(RESOLVER, CLIENT, Protocol.UDP, packets.udp(53, 4_000, vector.answer))[ether:]
    return b"".join(
        bytes([leaving]) + len(packet).to_bytes(2, "big") + packet for leaving, packet in ((1, asking), (0, telling))
    )
