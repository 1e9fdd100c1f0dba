"""Who else uses the marks of packets on this host, read from its rules; and whose bits are known without looking.

A mark is 32 bits for everybody. Three kinds of neighbours matter: whoever uses bits of ours, whoever compares whole
marks (which match no more once our bits are in them), and whoever sets whole marks (which takes our bits out again).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from enforcer.kernel_abi import MARK_BITS, Marks
from enforcer.ruleset import TABLE

EVERY_BIT = 0xFFFFFFFF


class How(enum.Enum):
    """What a rule does with marks."""

    BITS = "uses"  # some bits, under a mask
    COMPARES = "compares whole marks with"
    SETS = "sets whole marks, as in"


@dataclass(frozen=True, slots=True)
class Use:
    """What one rule does."""

    how: How
    bits: int  # under the mask; of the value, for whole marks
    rule: str  # the operator's own words for it


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Software that is known to use marks."""

    name: str
    bits: int  # it may use
    signs: tuple[str, ...]  # words in a listing of rules that tell of it


# From their sources and documentation; docs/marks.md has this as a table.
NEIGHBOURS = (
    Neighbour("Kubernetes (kube-proxy, kubelet)", 0x0000C000, ("KUBE-MARK-", "KUBE-SERVICES", "table ip kube-proxy")),
    Neighbour("CNI portmap", 0x00002000, ("CNI-HOSTPORT-", "cni_hostport")),
    Neighbour("Calico", 0xFFFF0000, ("cali-FORWARD", "cali-OUTPUT")),
    Neighbour("Cilium", 0xFFFF1FFF, ("CILIUM_",)),
    Neighbour("Antrea", 0x800000FF, ("ANTREA-",)),
    Neighbour("Weave Net", 0x00060000, ("WEAVE-",)),
    Neighbour("AWS VPC CNI", 0x00000080, ("AWS-SNAT-CHAIN", "AWS-CONNMARK-CHAIN")),
    Neighbour("Tailscale", 0x00FF0000, ("ts-forward", "ts-input")),
)


def neighbours(listing: str) -> Iterator[Neighbour]:
    """The known ones of which this listing of rules tells."""
    return (neighbour for neighbour in NEIGHBOURS if any(sign in listing for sign in neighbour.signs))


# --- nft -------------------------------------------------------------------------------------------------------------
_NUMBER = r"(0x[0-9a-f]+|[0-9]+)"
_TABLE = re.compile(r"table (\S+) (\S+) \{")
_SET = re.compile(r"(?<!ct )\bmark set (.+)")
_OWN_MARK_AND = re.compile(rf"(?:meta )?mark (?:and|&) {_NUMBER}(?: (?:or|xor|\||\^) {_NUMBER})?\b")
_OWN_MARK_OR = re.compile(rf"(?:meta )?mark (?:or|xor|\||\^) {_NUMBER}\b")
_MATCH_BITS = re.compile(rf"\bmeta mark (?:and|&) {_NUMBER} (?:==|!=)? ?\S")
_MATCH_WHOLE = re.compile(rf"\bmeta mark (?:== |!= )?(?:\{{ ?)?{_NUMBER}")
_OF_IPTABLES = frozenset({"raw", "mangle", "nat", "filter", "security"})  # which lists them better


def in_nft(listing: str, *, iptables_too: bool = False) -> Iterator[Use]:
    """What the rules of `nft list ruleset` do with marks, but for our own table and, if it was asked, iptables'."""
    table = ""
    for line in map(str.strip, listing.splitlines()):
        if opened := _TABLE.match(line):
            table = opened[2]
            theirs = opened[1] in {"ip", "ip6"} and table in _OF_IPTABLES
            table = "" if table == TABLE or (theirs and not iptables_too) else f"{opened[1]} {table}"
        elif table and "mark" in line:
            yield from (Use(how, bits, f"{line} (nft, table {table})") for how, bits in _in_nft_rule(line))


def _in_nft_rule(rule: str) -> Iterator[tuple[How, int]]:
    rule = rule.partition(" comment ")[0]
    matching = _SET.sub("", rule)
    for found in _MATCH_BITS.finditer(matching):
        yield How.BITS, int(found[1], 0)
    for found in _MATCH_WHOLE.finditer(matching):
        yield How.COMPARES, int(found[1], 0)
    if setting := _SET.search(rule):
        value = setting[1]
        if kept := _OWN_MARK_AND.match(value):
            yield How.BITS, EVERY_BIT & ~int(kept[1], 0) | int(kept[2] or "0", 0)
        elif added := _OWN_MARK_OR.match(value):
            yield How.BITS, int(added[1], 0)
        else:
            number = re.match(_NUMBER, value)
            yield How.SETS, int(number[1], 0) if number else 0


# --- iptables --------------------------------------------------------------------------------------------------------
_XT_SET = re.compile(rf"--(?:set-xmark|set-mark|tproxy-mark) {_NUMBER}(?:/{_NUMBER})?")
_XT_MATCH = re.compile(rf"(?<!connmark) (?:! )?--mark {_NUMBER}(?:/{_NUMBER})?")
_XT_RESTORE = re.compile(rf"--restore-mark(?: --nfmask {_NUMBER})?")


def in_iptables(saved: str) -> Iterator[Use]:
    """What the rules of iptables-save do with marks."""
    for line in saved.splitlines():
        if not line.startswith("-A "):
            continue
        marks = line.replace("-m connmark --mark", "").replace("-m connmark ! --mark", "")
        found_set = None if "-j CONNMARK" in marks else _XT_SET.search(marks)
        for found, whole in ((found_set, How.SETS), (_XT_MATCH.search(marks), How.COMPARES)):
            if found:
                yield _masked(whole, int(found[1], 0), int(found[2] or "0xffffffff", 0), f"{line} (iptables)")
        if restored := _XT_RESTORE.search(marks):
            yield _masked(How.SETS, 0, int(restored[1] or "0xffffffff", 0), f"{line} (iptables)")


# --- ip rule ---------------------------------------------------------------------------------------------------------
def in_routing(rules: Iterable[tuple[int, int, int, bool]]) -> Iterator[Use]:
    """What policy routing does: (priority, mark, mask, whether it is for all other marks)."""
    for priority, mark, mask, inverted in rules:
        word = "not fwmark" if inverted else "fwmark"
        told = f"{mark:#x}" if mask == EVERY_BIT else f"{mark:#x}/{mask:#x}"
        yield _masked(How.COMPARES, mark, mask, f"{word} {told} (ip rule {priority})")


def _masked(whole: How, value: int, mask: int, rule: str) -> Use:
    return Use(whole, value, rule) if mask == EVERY_BIT else Use(How.BITS, mask | value, rule)


# --- what comes of it ------------------------------------------------------------------------------------------------
_MODEST_BITS = 8  # of a neighbour that leaves room for others


def free_marks(used: int) -> Marks | None:
    """The highest bits that are not in use; clear of those of modest neighbours, who may come later, if that can be.

    None if there are too few.
    """
    modest = 0
    for neighbour in NEIGHBOURS:
        if neighbour.bits.bit_count() <= _MODEST_BITS:
            modest |= neighbour.bits
    for taken in (used | modest, used):
        free = [1 << number for number in reversed(range(32)) if not taken >> number & 1][:MARK_BITS]
        if len(free) == MARK_BITS:
            return Marks(sum(free))
    return None
