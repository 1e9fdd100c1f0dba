"""The catalogue of ways around the gate: one line for each, and what becomes of it (`make attack`).

A way is tried by the tests that bear its name (`@pytest.mark.attack("...")`), or it is out of reach and a section of
THREATMODEL.md says why and what an operator can do. Nothing is in between.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

THREAT_MODEL = Path(__file__).parent.parent / "THREATMODEL.md"

# What no test can refuse -> the section of THREATMODEL.md that says so.
OUT_OF_SCOPE = {
    "root removes the table, detaches programs, patches the kernel": "Root on the host",
    "a container with CAP_BPF, or CAP_NET_ADMIN on the host's network": "Capabilities in the host's namespaces",
    "group docker mounts the host's root": "Group docker",
    "LD_PRELOAD and PYTHONPATH in the shell that starts the daemon": "What root starts",
    "the Windows side of WSL 2, the owner of the hypervisor": "Under the kernel: WSL 2, virtual machines",
    "a mirror or cache behind an allowed name that fetches for others": "An allowed host that fetches for others",
    "VPN, SSH, DoH, websockets inside an allowed host": "Tunnels inside allowed hosts",
    "domain fronting: an allowed server name, another Host inside TLS": "Domain fronting and encrypted names",
    "the operator of a trusted resolver": "Who answers for a trusted resolver",
    "DNS: a forger outside who is told port and id": "Who answers for a trusted resolver",
    "DNS: host network and CAP_NET_RAW answer for a trusted stub on lo": "A stub resolver on this host",
    "DNS: whoever owns a name below an allowed wildcard": "Names below a wildcard",
    "DNS: data inside questions and answers": "Tunnels inside allowed hosts",
    "another Host in a later request of a plain HTTP connection": "Plain HTTP after its first request",
    "segments that the server drops (checksum, TTL) and the guard reads": "Segments that only the guard reads",
    "a flood that fills CPUs, disks or the connection table": "Load",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tried:
    """The tests of one way around."""

    refused: int
    failed: tuple[str, ...]
    skipped: int

    def line(self, words: str) -> str:
        """For the catalogue."""
        if self.failed:
            return f"NOT REFUSED   {words}: {', '.join(self.failed)}"
        if not self.refused:
            return f"not tried     {words}: every test was skipped"
        return f"refused       {words}"


class Catalogue:
    """Collects, as a plugin of pytest, what became of the tests that try an attack."""

    def __init__(self) -> None:
        self._words: dict[str, list[str]] = {}  # node id -> attacks
        self._outcomes: dict[str, dict[str, str]] = defaultdict(dict)  # attack -> node id -> outcome

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Which tests try what."""
        for item in session.items:
            self._words[item.nodeid] = [str(marker.args[0]) for marker in item.iter_markers("attack")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test."""
        if report.when == "call" or report.outcome != "passed":
            for words in self._words.get(report.nodeid, ()):
                self._outcomes[words][report.nodeid] = report.outcome

    def tried(self) -> Mapping[str, Tried]:
        """By attack."""
        return {
            words: Tried(
                refused=sum(outcome == "passed" for outcome in outcomes.values()),
                failed=tuple(node.rpartition("::")[2] for node, outcome in outcomes.items() if outcome == "failed"),
                skipped=sum(outcome == "skipped" for outcome in outcomes.values()),
            )
            for words, outcomes in self._outcomes.items()
        }


def sections() -> set[str]:
    """The headings of THREATMODEL.md."""
    return set(re.findall(r"^#+ (.+)$", THREAT_MODEL.read_text(), re.MULTILINE))


def main(arguments: list[str]) -> int:
    """Try everything and print the catalogue; 1 if something was not refused."""
    catalogue = Catalogue()
    status = pytest.main(["-q", "--no-header", "-m", "attack", "tests", *arguments], plugins=[catalogue])
    tried = catalogue.tried()
    print()
    for words in sorted(tried):
        print(tried[words].line(words))
    for words, section in sorted(OUT_OF_SCOPE.items()):
        print(f"out of scope  {words} (THREATMODEL.md: {section})")
    bad = sum(bool(each.failed) or not each.refused for each in tried.values())
    print(f"{len(tried) - bad} refused, {len(OUT_OF_SCOPE)} out of scope, {bad} not refused")
    return 1 if bad or status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
