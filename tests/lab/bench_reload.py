"""What a reload of 10,000 names costs those who are connecting (part of `make bench`).

Connections that both policies allow, and some that none does, as many as this machine makes, and 1,000 DNS answers a
second, while the daemon goes from a small policy to a large one and back. Lost: none; passed: none.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from types import TracebackType
from typing import Self

from tests.lab import small_internet
from tests.lab.enforcer import Enforcer, policy, registry
from tests.lab.internet import ALLOWED_ADDRESS, EVIL_ADDRESS
from tests.lab.lab import RESOLVER, Agent, Lab, missing_tools
from tests.lab.soak import Traffic

NAMES = 10_000
RELOADS = 10
ANSWERS_A_SECOND = 1_000
BLOCKED_SECONDS = 2.0  # that a reload may hold up the daemon's loop; the kernel goes on by itself meanwhile


def many_names(count: int) -> str:
    """Lines of a policy: a registry with so many names."""
    return registry("many", *(f"n{number}.many.test" for number in range(count)))


class Busy:
    """Clients that connect without a pause, and DNS answers; a context manager. What they met is known at its end."""

    def __init__(self, lab: Lab, *, probers: int = 1, answers_a_second: int = 100, fresh: bool = True) -> None:
        """`fresh`: with clients that are allowed, under every policy of the test."""
        self.met = Traffic()
        self.answers = 0
        self.seconds = 0.0
        self._stopping = threading.Event()
        self._rate = answers_a_second
        self._asking = lab.agent("host")
        self._probers: list[tuple[Agent, str, bool]] = [
            (lab.agent(where), address, allowed)
            for where in ("ct", "host")
            for address, allowed in ((ALLOWED_ADDRESS, True), (EVIL_ADDRESS, False))
            for _ in range(probers if allowed else 1)
            if fresh or not allowed
        ]

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        for agent, address, _ in self._probers:
            agent.call("probe_start", key="p", address=address, port=443, pause=0)
        self._asker = threading.Thread(target=self._ask)
        self._asker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._asker.join()
        for agent, address, allowed in self._probers:
            self.met.add(agent.call("probe_stop", key="p")["verdicts"], address, allowed=allowed)
            agent.close()
        self.seconds = time.monotonic() - self._began
        self._asking.close()

    def _ask(self) -> None:
        while not self._stopping.is_set():
            self.answers += self._asking.call(
                "flood", server=RESOLVER, name="registry.allowed.test", rate=self._rate, seconds=0.25
            )["answers"]


def main() -> int:
    """Print what it cost; 1 if something was lost, or passed, or the loop stood still for too long."""
    if missing := missing_tools():
        print(f"bench: needs {', '.join(missing)}: make setup")
        return 2
    texts = policy(host="strict", more=many_names(NAMES)), policy(host="strict")
    took: dict[int, list[float]] = {0: [], 1: []}
    with Lab() as lab:
        small_internet.start(lab)
        enforcer = Enforcer(lab, "host", lab.host)
        enforcer.start(texts[1])
        with Busy(lab, probers=2, answers_a_second=ANSWERS_A_SECOND) as busy:
            for number in range(2 * RELOADS):
                started = time.monotonic()
                problem = enforcer.reload_and_wait(texts[number % 2])
                took[number % 2].append(time.monotonic() - started)
                assert problem is None, problem
                time.sleep(0.5)
    for which, what in ((0, f"to {NAMES} names"), (1, "and back")):
        print(f"reload, {what}: {statistics.median(took[which]):.2f} s, {max(took[which]):.2f} s at most")
    met = busy.met
    print(
        f"meanwhile: {(met.allowed + met.refused) / busy.seconds:.0f} connections/s, "
        f"{busy.answers / busy.seconds:.0f} DNS answers/s; allowed {met.allowed}, failed {len(met.failed)}; "
        f"refused {met.refused}, passed {met.passed}"
    )
    for failure in met.failed[:5]:
        print(f"bench: {failure}")
    return 1 if met.failed or met.passed or max(took[0]) > BLOCKED_SECONDS else 0


if __name__ == "__main__":
    sys.exit(main())
