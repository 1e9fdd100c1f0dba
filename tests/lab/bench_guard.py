"""What the guard costs the connections it lets pass: how many a client makes in a second, with it and without.

Rounds alternate, and the daemon runs throughout: without means that the guard's map of uplinks is empty, so that the
program returns at once. Each connection sends the ClientHello of a real client, is answered, and closed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from enforcer import bpf
from tests.lab import small_internet
from tests.lab.enforcer import Enforcer, policy
from tests.lab.internet import ALLOWED_ADDRESS
from tests.lab.lab import Agent, Lab, missing_tools

ROUNDS = 12  # of each kind
CONNECTIONS = 400  # a round
MOST = 0.03  # of the connections a second


@contextmanager
def unguarded(uplinks: bpf.BpfMap) -> Iterator[None]:
    """The guard lets everything pass unseen."""
    before = dict(uplinks.items())
    uplinks.clear()
    try:
        yield
    finally:
        uplinks.update_many(before.items())


def measure(agent: Agent, uplinks: bpf.BpfMap) -> tuple[float, float]:
    """(connections a second without, with): medians of alternating rounds."""
    results: dict[bool, list[float]] = {False: [], True: []}

    def once() -> float:
        return float(agent.call("connections_per_second", address=ALLOWED_ADDRESS, port=443, count=CONNECTIONS))

    once()
    for _ in range(ROUNDS):
        with unguarded(uplinks):
            results[False].append(once())
        results[True].append(once())
    return statistics.median(results[False]), statistics.median(results[True])


def main() -> int:
    """Print the ratios; 1 if the guard costs more than it may."""
    if missing := missing_tools():
        print(f"bench: needs {', '.join(missing)}: make setup")
        return 2
    worst = 1.0
    with Lab() as lab:
        small_internet.start(lab)
        enforcer = Enforcer(lab, "host", lab.host)
        enforcer.start(policy(host="strict"))
        assert lab.ct.connect("registry.allowed.test").reached
        (generation,) = (lab.bpffs / "host").glob("generation-*")
        with bpf.KernelState(bpf.read_report(generation)) as kernel:
            for who, agent in (("forwarded", lab.ct), ("local", lab.host)):
                without, with_it = measure(agent, kernel.maps["uplinks"])
                worst = min(worst, with_it / without)
                print(f"guard, {who}: {with_it:.0f} connections/s, {without:.0f} without: {with_it / without:.3f}")
            named = sum(any(value[:8]) for _, value in kernel.maps["flows"].items())
            assert named > ROUNDS * CONNECTIONS  # it has read each of them
    return 0 if worst > 1 - MOST else 1


if __name__ == "__main__":
    sys.exit(main())
