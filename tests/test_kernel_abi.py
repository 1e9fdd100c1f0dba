"""The layouts that daemon, BPF and ruleset share."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer import kernel_abi
from enforcer.kernel_abi import EVENT, MarkedScope, Marks, Outcome, Protocol, Structure
from enforcer.policy import Address

HEADER = Path(__file__).parent.parent / "bpf" / "shared.h"


def test_header_of_the_bpf_programs_is_what_this_module_renders() -> None:
    assert HEADER.read_text() == kernel_abi.render_shared_header(), "python -m enforcer.kernel_abi > bpf/shared.h"


@pytest.mark.parametrize("structure", kernel_abi.STRUCTURES, ids=lambda structure: structure.name)
def test_structure_has_no_hole_that_c_would_fill(structure: Structure) -> None:
    aligned = structure.codec.format.removeprefix("=")
    assert struct.calcsize("@" + aligned) == structure.size
    largest = max(struct.calcsize("=" + letter) for letter in aligned if letter.isalpha())
    assert structure.size % largest == 0, "C would pad the end"


@pytest.mark.parametrize("structure", kernel_abi.STRUCTURES, ids=lambda structure: structure.name)
def test_offsets_are_where_the_codec_reads(structure: Structure) -> None:
    for field, offset in structure.offsets():
        assert f"__builtin_offsetof(struct {structure.name}, {field.name}) == {offset}" in HEADER.read_text()


_BITS = st.sets(st.integers(0, 31), min_size=3, max_size=3)


@given(_BITS, st.integers(0, 0xFFFFFFFF))
def test_scopes_and_vouching_share_the_mask_and_no_bit(bits: set[int], others: int) -> None:
    marks = Marks(sum(1 << bit for bit in bits))
    assert marks.vouched == 1 << max(bits)
    assert marks.scope_mask ^ marks.vouched == marks.mask
    assert {marks.of(scope) & ~marks.scope_mask for scope in MarkedScope} == {0}
    for scope in MarkedScope:
        assert marks.scope(others & ~marks.scope_mask | marks.of(scope)) is scope


@pytest.mark.parametrize("mask", [0, 0x80000000, 0xC0000000, 0xF0000000, 0xFFFFFFFF, 0x700000000, 0x1C0000000, -7])
def test_mask_is_three_bits_of_thirty_two(mask: int) -> None:
    with pytest.raises(ValueError, match="is not 3 of 32 bits"):
        Marks(mask)


@given(st.ip_addresses())
def test_address_survives_packing(address: Address) -> None:
    packed = kernel_abi.pack_address(address)
    assert len(packed) == 16
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    assert kernel_abi.unpack_address(packed) == (mapped or address)


def test_ipv4_is_mapped() -> None:
    assert kernel_abi.pack_address(IPv4Address("192.0.2.1")).hex() == "00000000000000000000ffffc0000201"


def test_exact_name_and_wildcard_have_different_keys() -> None:
    bits, exact = kernel_abi.NAME_KEY.codec.unpack(kernel_abi.pack_name_key("a.example", wildcard=False))
    assert (bits, exact[:11]) == (80, b"elpmaxe.a\0\0")
    bits, wildcard = kernel_abi.NAME_KEY.codec.unpack(kernel_abi.pack_name_key("a.example", wildcard=True))
    assert (bits, wildcard[:11]) == (80, b"elpmaxe.a.\0")


def test_longest_name_fits_and_one_character_more_does_not() -> None:
    kernel_abi.pack_name_key("a" * 253, wildcard=False)
    with pytest.raises(ValueError, match="longer"):
        kernel_abi.pack_name_key("a" * 254, wildcard=False)


@given(st.lists(st.integers(1, 65_535), min_size=1, max_size=8), st.booleans(), st.integers(0, 2**64 - 1))
def test_rule_carries_its_ports(ports: list[int], private: bool, pattern_id: int) -> None:
    packed = kernel_abi.pack_name_rule(pattern_id, ports, private_addresses=private)
    identity, *rest = kernel_abi.NAME_RULE.codec.unpack(packed)
    assert (identity, rest[: len(ports)], rest[8], rest[9]) == (pattern_id, ports, len(ports), private)


@pytest.mark.parametrize("ports", [[], list(range(1, 10))])
def test_no_port_or_too_many_are_an_error(ports: list[int]) -> None:
    with pytest.raises(ValueError, match="ports"):
        kernel_abi.pack_name_rule(1, ports, private_addresses=False)


def test_range_of_ipv4_is_96_bits_longer() -> None:
    bits, address = kernel_abi.RANGE_KEY.codec.unpack(kernel_abi.pack_range_key(IPv4Address("10.0.0.0"), 8))
    assert (bits, address) == (104, kernel_abi.pack_address(IPv4Address("10.0.0.0")))
    bits, _ = kernel_abi.RANGE_KEY.codec.unpack(kernel_abi.pack_range_key(IPv6Address("fc00::"), 7))
    assert bits == 7


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6, network="2001:db8::/32"), st.integers(0, 65_535))
def test_learned_key_survives_packing(address: Address, port: int) -> None:
    assert kernel_abi.unpack_learned_key(kernel_abi.pack_learned_key(address, port)) == (address, port)


def record(wire: bytes, announced: int) -> bytes:
    resolver = kernel_abi.pack_address(ip_address("198.51.100.53"))
    return EVENT.codec.pack(7, 3, 4_000, announced, Outcome.UNREADABLE, Protocol.TCP, 2, resolver) + wire


def test_event_is_decoded() -> None:
    event = kernel_abi.decode_event(record(b"wire", 4) + b"perf pads")
    assert (event.at_ns, event.interface, event.message_length, event.inserted, event.wire) == (7, 3, 4_000, 2, b"wire")
    assert (event.outcome, event.protocol) == (Outcome.UNREADABLE, Protocol.TCP)
    assert event.resolver == ip_address("198.51.100.53")


@pytest.mark.parametrize(
    "damaged", [b"", record(b"", 0)[:-1], record(b"wir", 4)], ids=["empty", "cut head", "cut wire"]
)
def test_damaged_event_is_an_error(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="event"):
        kernel_abi.decode_event(damaged)
