"""Every fault, one line each: survived, and with what numbers (`make faults`).

A fault is survived if its tests (`@pytest.mark.fault("...")`) pass: while it lasts nothing unlisted gets out, and what
is allowed is reached once it is over.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest


class Survivals:
    """Collects, as a plugin of pytest, what became of the tests of each fault."""

    def __init__(self) -> None:
        self._words: dict[str, list[str]] = {}  # node id -> faults
        self._outcomes: dict[str, dict[str, str]] = defaultdict(dict)  # fault -> node id -> outcome
        self._numbers: dict[str, list[str]] = defaultdict(list)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Which tests are of which fault."""
        for item in session.items:
            self._words[item.nodeid] = [str(marker.args[0]) for marker in item.iter_markers("fault")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test."""
        if report.when != "call" and report.outcome == "passed":
            return
        for words in self._words.get(report.nodeid, ()):
            self._outcomes[words][report.nodeid] = report.outcome
            self._numbers[words] += [str(value) for name, value in report.user_properties if name == "numbers"]

    def lines(self) -> tuple[list[str], int]:
        """(a line for each fault, how many were not survived)."""
        lines, bad = [], 0
        for words, outcomes in self._outcomes.items():
            failed = [node.rpartition("::")[2] for node, outcome in outcomes.items() if outcome == "failed"]
            if failed:
                lines.append(f"NOT SURVIVED  {words}: {', '.join(failed)}")
            elif "passed" not in outcomes.values():
                lines.append(f"not tried     {words}: every test was skipped")
            else:
                lines.append(f"survived      {words}: {'; '.join(self._numbers[words])}")
                continue
            bad += 1
        return lines, bad


def main(arguments: list[str]) -> int:
    """Let everything happen, and print what became of it; 1 if something was not survived."""
    survivals = Survivals()
    here = str(Path(__file__).parent)
    status = pytest.main(["-q", "--no-header", "-m", "fault", here, *arguments], plugins=[survivals])
    lines, bad = survivals.lines()
    print()
    for line in lines:
        print(line)
    print(f"{len(lines) - bad} faults survived, {bad} not")
    return 1 if bad or status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
