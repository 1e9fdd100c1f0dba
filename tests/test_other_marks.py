"""Who else uses marks: read from the listings that the real programs give, and what doctor says of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer import doctor, other_marks
from enforcer.kernel_abi import DEFAULT_MARKS, Marks
from enforcer.netlink import Netlink
from enforcer.nft import Nft
from enforcer.other_marks import EVERY_BIT, NEIGHBOURS, How, Use, free_marks, in_iptables, in_nft, in_routing
from tests.namespaces import inside, ip, new_namespace

DOCUMENT = Path(__file__).parent.parent / "docs" / "marks.md"

NFT_RULES = {
    "meta mark set meta mark | 0x00008000": {(How.BITS, 0x8000)},
    "meta mark set meta mark and 0xffff01ff or 0x100": {(How.BITS, 0xFE00 | 0x100)},
    "meta mark set meta mark & 0xffff00ff": {(How.BITS, 0xFF00)},
    "meta mark & 0x00ff0000 == 0x00040000 accept": {(How.BITS, 0xFF0000)},
    "meta mark & 0x00008000 != 0x00000000 counter drop": {(How.BITS, 0x8000)},
    "meta mark set 0x1e7700ce": {(How.SETS, 0x1E7700CE)},
    "meta mark set ct mark": {(How.SETS, 0)},
    "meta mark 0x00000010-0x00000020 accept": {(How.COMPARES, 0x10)},
    "meta mark { 0x00000001, 0x00000002 } accept": {(How.COMPARES, 1)},
    "meta mark != 0x0000ca6c accept": {(How.COMPARES, 0xCA6C)},
    "meta mark 0x0000ca6c ct mark set meta mark": {(How.COMPARES, 0xCA6C)},
    "ct mark set meta mark": set(),
    "ct mark 0x00000001 accept": set(),
    'tcp dport 443 accept comment "mark set 0x80000000"': set(),
}
IPTABLES_RULES = {
    "-j MARK --set-xmark 0x4000/0x4000": {(How.BITS, 0x4000)},
    "-j MARK --set-mark 0x539": {(How.SETS, 0x539)},
    "-m mark --mark 0x8000/0x8000 -j ACCEPT": {(How.BITS, 0x8000)},
    "-m mark ! --mark 0x4000/0xf000 -j ACCEPT": {(How.BITS, 0xF000)},
    "-m mark --mark 0x1 -j ACCEPT": {(How.COMPARES, 1)},
    "-j CONNMARK --restore-mark --nfmask 0xff0000 --ctmask 0xff0000": {(How.BITS, 0xFF0000)},
    "-j CONNMARK --restore-mark": {(How.SETS, 0)},
    "-j CONNMARK --set-xmark 0x1/0xffffffff": set(),
    "-m connmark --mark 0x1/0xe0000000 -j ACCEPT": set(),
}


def told(uses: Iterable[Use]) -> set[tuple[How, int]]:
    return {(use.how, use.bits) for use in uses}


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# --- what the programs list ------------------------------------------------------------------------------------------
@pytest.mark.root
def test_rules_of_nft_are_read_as_it_lists_them() -> None:
    with new_namespace() as namespace, inside(namespace), Nft() as firewall:
        firewall.apply("table inet registry_enforcer { chain c { meta mark set 0xe0000000; }; }")
        for rule, uses in NFT_RULES.items():
            firewall.apply(f"table inet theirs {{ chain c {{ {rule}; }}; }}")
            assert told(in_nft(firewall.listing())) == uses, rule
            firewall.apply("delete table inet theirs")


@pytest.mark.root
@pytest.mark.parametrize("program", ["iptables", "ip6tables"])
def test_rules_of_iptables_are_read_as_it_saves_them(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    with new_namespace() as namespace, inside(namespace):
        for rule, uses in IPTABLES_RULES.items():
            run(program, "-t", "mangle", "-F", "OUTPUT")
            run(program, "-t", "mangle", "-A", "OUTPUT", *rule.split())
            assert told(in_iptables(doctor._saved_rules())) == uses, rule


@pytest.mark.root
def test_rules_of_routing_are_read_as_the_kernel_lists_them() -> None:
    with new_namespace() as namespace, inside(namespace), Netlink() as links:
        assert links.mark_rules() == ()
        ip("rule add fwmark 0xca6c lookup 5 priority 10; -6 rule add not fwmark 0x80000/0xff0000 lookup 5 priority 11")
        assert links.mark_rules() == ((10, 0xCA6C, EVERY_BIT, False), (11, 0x80000, 0xFF0000, True))
        whole, masked = in_routing(links.mark_rules())
        assert (whole.how, whole.bits, whole.rule) == (How.COMPARES, 0xCA6C, "fwmark 0xca6c (ip rule 10)")
        assert (masked.how, masked.bits) == (How.BITS, 0xFF0000)
        assert masked.rule == "not fwmark 0x80000/0xff0000 (ip rule 11)"


@given(st.text())
def test_any_listing_is_read_or_passed_over(text: str) -> None:
    for listing in (
        text,
        f"table inet x {{\nmeta mark {text}\nmeta mark set {text}\n}}",
        f"-A x -m mark --mark {text}",
    ):
        for use in (*in_nft(listing), *in_iptables(listing)):
            assert use.bits >= 0


# --- what doctor makes of it -----------------------------------------------------------------------------------------
def findings(rules: str, marks: Marks = DEFAULT_MARKS) -> list[doctor.Finding]:
    return list(doctor._marks(marks, f"table inet theirs {{\n{rules}\n}}", ""))


@pytest.fixture
def _elsewhere() -> Iterable[None]:
    """Where nobody has rules of routing."""
    with new_namespace() as namespace, inside(namespace):
        yield


@pytest.mark.root
@pytest.mark.usefixtures("_elsewhere")
def test_overlap_is_noted_with_a_mask_that_does_not() -> None:
    rule = "meta mark set meta mark | 0x80000000"
    (finding,) = findings(rule)
    assert finding.state is doctor.State.NOTE
    assert rule in finding.fact
    mask = re.search("write mask = (0x[0-9a-f]+)", finding.remedy)
    assert mask is not None
    assert [other.state for other in findings(rule, Marks(int(mask[1], 0)))] == [doctor.State.OK]


@pytest.mark.root
@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("rule", ["meta mark 0x1 accept", "meta mark set 0x539"])
def test_whole_marks_are_noted_whatever_the_mask(rule: str) -> None:
    for marks in (DEFAULT_MARKS, Marks(0x700)):
        (finding,) = findings(rule, marks)
        assert f"under the mask {0xFFFFFFFF ^ marks.mask:#010x}" in finding.remedy


@pytest.mark.root
@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=lambda neighbour: neighbour.name)
def test_neighbour_is_known_by_its_rules_and_noted_where_it_overlaps(neighbour: other_marks.Neighbour) -> None:
    for sign in neighbour.signs:
        (finding,) = findings(f"{sign} {{" if sign.startswith("table") else f"chain {sign} {{")
        assert (finding.state is doctor.State.NOTE) == bool(neighbour.bits & DEFAULT_MARKS.mask)
    if neighbour.name != "Cilium":  # which leaves three bits, and Kubernetes has two of them
        free = free_marks(neighbour.bits | 0xC000)
        assert free is not None
        assert free.mask & neighbour.bits == 0


@given(st.integers(0, EVERY_BIT))
def test_free_bits_are_free(used: int) -> None:
    free = free_marks(used)
    assert (free is None) == (used.bit_count() > 29)
    assert free is None or free.mask & used == 0


# --- the document ----------------------------------------------------------------------------------------------------
def test_document_names_the_neighbours_and_says_which_overlap() -> None:
    rows = re.findall(r"^\| ([^|]+) \| `(0x[0-9A-F]{8})` \|([^|]+)\|", DOCUMENT.read_text(), re.MULTILINE)
    assert {name: int(bits, 16) for name, bits, _ in rows} == {each.name: each.bits for each in NEIGHBOURS}
    for name, bits, overlap in rows:
        assert ("yes" in overlap) == bool(int(bits, 16) & DEFAULT_MARKS.mask), name
