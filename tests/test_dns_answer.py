"""The Python parser: the vectors it shares with BPF, what it makes of bytes in general, and the ranges of addresses."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, ip_address

import dns.flags
import dns.message
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer import dns_answer
from enforcer.dns_answer import DnsAnswerError
from enforcer.kernel_abi import Outcome, RangeClass
from enforcer.policy import Address
from tests import dns_vectors
from tests.dns_vectors import RESOLVER, Vector

VECTORS = {vector.name: vector for vector in dns_vectors.load()}
A, AAAA = 1, 28


def response(question: str, rdtype: str, *records: str) -> bytes:
    """An answer as dnspython writes it; records as zone-file lines."""
    message = dns.message.make_response(dns.message.make_query(question, rdtype))
    for record in records:
        owner, ttl_seconds, rdclass, kind, value = record.split(maxsplit=4)
        message.answer.append(dns.rrset.from_text(owner, int(ttl_seconds), rdclass, kind, value))
    return bytes(message.to_wire())


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_vector_is_accepted_as_it_says(vector: Vector) -> None:
    found = dns_vectors.accepted(vector.answer)
    assert {record.address for record in found[2]} == vector.accepted if found else not vector.accepted


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_vector_never_makes_bpf_believe_more_than_python(vector: Vector) -> None:
    assert vector.learned <= vector.accepted


def test_vectors_cover_every_outcome_of_one_answer() -> None:
    elsewhere = {Outcome.REPEATED, Outcome.UNTRUSTED, Outcome.EVENT_LOST}  # of packets and state, not of a message
    assert {vector.outcome for vector in VECTORS.values()} == set(Outcome) - elsewhere


def test_answer_names_question_aliases_and_addresses() -> None:
    wire = response(
        "WWW.Example.COM",
        "A",
        "www.example.com. 60 IN CNAME cdn.example.NET.",
        "cdn.example.net. 60 IN CNAME edge.example.org.",
        "edge.example.org. 30 IN A 192.0.2.1",
        "stranger.example.org. 30 IN A 192.0.2.9",
    )
    answer = dns_answer.parse_answer(wire, RESOLVER)
    assert (answer.question, answer.rdtype, answer.resolver) == ("www.example.com", A, RESOLVER)
    assert answer.aliases == ("cdn.example.net", "edge.example.org")
    assert [(str(record.address), record.ttl_seconds) for record in answer.addresses] == [("192.0.2.1", 30)]
    assert not answer.truncated


def test_aliases_that_go_in_circles_end() -> None:
    wire = response("a.example", "A", "a.example. 60 IN CNAME b.example.", "b.example. 60 IN CNAME a.example.")
    assert dns_answer.parse_answer(wire, RESOLVER).aliases == ("b.example",)


def test_truncated_answer_says_so() -> None:
    assert dns_answer.parse_answer(VECTORS["truncated"].answer, RESOLVER).truncated


def test_ttl_beyond_31_bits_counts_as_zero() -> None:
    (record,) = dns_answer.parse_answer(VECTORS["ttl-negative"].answer, RESOLVER).addresses
    assert record.ttl_seconds == 0


@pytest.mark.parametrize(
    "name", ["two-questions", "no-question", "a-query", "notify", "question-cut", "class-of-question", "dot-in-label"]
)
def test_what_is_no_answer_is_an_error(name: str) -> None:
    with pytest.raises(DnsAnswerError):
        dns_answer.parse_answer(VECTORS[name].answer, RESOLVER)


def test_question_of_a_cut_message_is_read() -> None:
    wire = VECTORS["33-records"].answer
    assert dns_answer.parse_question(wire[:40]) == "registry.example"
    with pytest.raises(DnsAnswerError):
        dns_answer.parse_question(wire[:30])


@pytest.mark.parametrize("rdtype", [A, AAAA])
def test_query_asks_for_the_name_recursively(rdtype: int) -> None:
    query = dns.message.from_wire(dns_answer.build_query("xn--bcher-kva.example", rdtype))
    assert query.question[0].to_text() == f"xn--bcher-kva.example. IN {'A' if rdtype == A else 'AAAA'}"
    assert query.flags == dns.flags.RD
    assert query.edns == 0


def test_transaction_ids_differ() -> None:
    assert len({dns_answer.build_query("a.example", A)[:2] for _ in range(64)}) > 32


@given(st.binary(max_size=600))
def test_any_bytes_are_an_answer_or_an_error(wire: bytes) -> None:
    for parse in (lambda: dns_answer.parse_answer(wire, RESOLVER), lambda: dns_answer.parse_question(wire)):
        with contextlib.suppress(DnsAnswerError):
            parse()


@given(st.binary(max_size=600), st.sampled_from([A, AAAA]), st.integers(0, 5))
def test_any_records_behind_a_good_question_are_read_without_an_error(tail: bytes, rdtype: int, count: int) -> None:
    head = b"\x12\x34\x81\x80\0\1" + count.to_bytes(2) + bytes(4)
    wire = head + dns_vectors.name_bytes("registry.example") + rdtype.to_bytes(2) + b"\0\1" + tail
    answer = dns_answer.parse_answer(wire, RESOLVER)
    assert answer.question == "registry.example"
    assert len(answer.addresses) <= count


# --- addresses -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0", RangeClass.NEVER),
        ("127.0.0.53", RangeClass.NEVER),
        ("169.254.169.254", RangeClass.NEVER),
        ("224.0.0.251", RangeClass.NEVER),
        ("255.255.255.255", RangeClass.NEVER),
        ("10.0.0.1", RangeClass.PRIVATE),
        ("172.31.255.255", RangeClass.PRIVATE),
        ("172.32.0.0", None),
        ("192.168.1.1", RangeClass.PRIVATE),
        ("100.127.255.255", RangeClass.PRIVATE),
        ("100.128.0.0", None),
        ("1.1.1.1", None),
        ("::", RangeClass.NEVER),
        ("::1", RangeClass.NEVER),
        ("fe80::1", RangeClass.NEVER),
        ("ff02::1", RangeClass.NEVER),
        ("::ffff:1.1.1.1", RangeClass.NEVER),
        ("64:ff9b::127.0.0.1", RangeClass.NEVER),
        ("64:ff9b::10.0.0.1", RangeClass.PRIVATE),
        ("64:ff9b::1.1.1.1", None),
        ("2002:7f00:1::", RangeClass.NEVER),
        ("fd00::1", RangeClass.PRIVATE),
        ("2606:4700::1111", None),
    ],
)
def test_address_class(text: str, expected: RangeClass | None) -> None:
    assert dns_answer.classify_address(ip_address(text)) is expected


def test_special_ranges_are_disjoint_so_that_first_and_longest_match_agree() -> None:
    networks = [network for network, _ in dns_answer.SPECIAL_RANGES]
    for index, one in enumerate(networks):
        assert not any(one.version == other.version and one.overlaps(other) for other in networks[index + 1 :])


@given(st.ip_addresses())
def test_what_is_not_global_is_not_public(address: Address) -> None:
    documentation = ("192.0.2.0", "198.51.100.0", "203.0.113.0")
    if isinstance(address, IPv4Address) and not address.is_global and str(address)[:9] not in documentation:
        mapped = [text for text in documentation if str(address).rpartition(".")[0] == text.rpartition(".")[0]]
        assert mapped or dns_answer.classify_address(address) is not None
