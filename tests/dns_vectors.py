"""DNS messages as text, and what both parsers have to make of them under one small policy.

tests/vectors/dns/NAME.txt: comments that say why, then

    outcome: learned                what BPF counts (kernel_abi.Outcome)
    learned: 192.0.2.1              what BPF learns; a..b is a range, nothing is nothing
    accepted: 192.0.2.1 192.0.2.2   what the Python parser takes, where it is more than BPF learns
    [query]                         if it is another than the answer's own question
    [answer]
    1234 8180 0001 0001 0000 0000   hexadecimal bytes
    registry.example. 0001 0001     a name with its root; 'label alone stands for one label
    33 x c00c 0001 ... c00002{n}    a line 33 times, {n} counts in two digits from 00
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from enforcer import dns_answer
from enforcer.dns_answer import AnswerAddress, DnsAnswer, DnsAnswerError
from enforcer.kernel_abi import Outcome, RangeClass
from enforcer.policy import Address, HostPattern

DIRECTORY = Path(__file__).parent / "vectors" / "dns"
RESOLVER = ip_address("198.51.100.53")
LONGEST_NAME = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])  # 253 characters


@dataclass(frozen=True, slots=True)
class Entry:
    """One pattern of the policy."""

    pattern: HostPattern
    ports: tuple[int, ...]
    private_addresses: bool = False


POLICY = (
    Entry(HostPattern("registry.example", wildcard=False), (443, 5000)),
    Entry(HostPattern("example.com", wildcard=True), (443,)),
    Entry(HostPattern("corp.example", wildcard=True), (443,), private_addresses=True),
    Entry(HostPattern(LONGEST_NAME, wildcard=False), (443,)),
)


@dataclass(frozen=True, slots=True)
class Vector:
    """One case."""

    name: str
    outcome: Outcome
    learned: frozenset[Address]
    accepted: frozenset[Address]
    query: bytes
    answer: bytes


def accepted(wire: bytes) -> tuple[Entry, DnsAnswer, list[AnswerAddress]] | None:
    """What Python permits because of `wire`; None: no answer, or to no question of the policy."""
    try:
        answer = dns_answer.parse_answer(wire, RESOLVER)
    except DnsAnswerError:
        return None
    for entry in POLICY:
        if entry.pattern.matches(answer.question):
            allowed = (None, RangeClass.PRIVATE) if entry.private_addresses else (None,)
            kept = [found for found in answer.addresses if dns_answer.classify_address(found.address) in allowed]
            return entry, answer, kept
    return None


def question_of(answer: bytes) -> bytes:
    """The query with the id and the first question of `answer`, as a client sends it."""
    end = 12
    while answer[end]:
        end += 1 + answer[end]
    return answer[:2] + struct.pack("!5H", 0x0100, 1, 0, 0, 0) + answer[12 : end + 5]


def name_bytes(name: str) -> bytes:
    """Wire form without compression."""
    return b"".join(bytes([len(label)]) + label.encode() for label in name.rstrip(".").split(".")) + b"\0"


def load() -> list[Vector]:
    """All vectors, by name."""
    return [_parse(path) for path in sorted(DIRECTORY.glob("*.txt"))]


def _parse(path: Path) -> Vector:
    facts: dict[str, str] = {}
    messages: dict[str, bytes] = {}
    section = ""
    for line in path.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("["):
            section = text.strip("[]")
            messages[section] = b""
        elif section:
            messages[section] += assemble(text)
        elif text:
            key, _, value = text.partition(":")
            facts[key] = value.strip()
    learned = frozenset(_addresses(facts.get("learned", "")))
    return Vector(
        name=path.stem,
        outcome=Outcome[facts["outcome"].upper()],
        learned=learned,
        accepted=frozenset(_addresses(facts["accepted"])) if "accepted" in facts else learned,
        query=messages.get("query") or question_of(messages["answer"]),
        answer=messages["answer"],
    )


def assemble(line: str) -> bytes:
    """The bytes of one line of a message."""
    count, times, rest = line.partition(" x ")
    if times:
        return b"".join(assemble(rest.replace("{n}", f"{n % 256:02x}")) for n in range(int(count)))
    return b"".join(map(_piece, line.split()))


def _piece(word: str) -> bytes:
    if word == "LONGEST":
        return name_bytes(LONGEST_NAME)
    if word.startswith("'"):
        return bytes([len(word) - 1]) + word[1:].encode()
    return name_bytes(word) if word.endswith(".") else bytes.fromhex(word)


def _addresses(text: str) -> Iterator[Address]:
    for item in text.split():
        first, _, last = item.partition("..")
        start = ip_address(first)
        for offset in range(int(ip_address(last)) - int(start) + 1 if last else 1):
            yield start + offset
