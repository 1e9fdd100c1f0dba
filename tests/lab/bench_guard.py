"""What the guard costs the connections it lets pass: how many a client makes in a second, with it and without.

Rounds come in pairs, and the daemon runs throughout: without means that the guard's map of uplinks is empty, so that
the program returns at once. Each connection sends the ClientHello of a real client, is answered, and closed.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Iterator

from enforcer import bpf
from tests.lab import small_internet
from tests.lab.enforcer import Enforcer, policy
from tests.lab.internet import ALLOWED_ADDRESS
from tests.lab.lab import Agent, Lab, missing_tools

PAIRS = 60  # of rounds, one of each kind
CONNECTIONS = 100  # a round
MOST = 0.03  # of the connections a second


@contextlib.contextmanager
def unguarded(uplinks: bpf.BpfMap) -> Iterator[None]:
    """The guard lets everything pass unseen."""
    before = dict(uplinks.items())
    uplinks.clear()
    try:
        yield
    finally:
        uplinks.update_many(before.items())


def measure(agent: Agent, uplinks: bpf.BpfMap) -> tuple[float, float, float]:
    """(connections a second without, with, with over without): medians of the rounds and of their pairs.

    A pair is over in a tenth of a second, so that both of its rounds meet the same machine, and each kind is as often
    the first of it.
    """
    results: dict[bool, list[float]] = {False: [], True: []}

    def once(*, guarded: bool) -> None:
        with contextlib.nullcontext() if guarded else unguarded(uplinks):
            results[guarded].append(
                agent.call("connections_per_second", address=ALLOWED_ADDRESS, port=443, count=CONNECTIONS)
            )

    for number in range(PAIRS):
        for guarded in (False, True) if number % 2 else (True, False):
            once(guarded=guarded)
    ratios = (with_it / without for without, with_it in zip(results[False], results[True], strict=True))
    return statistics.median(results[False]), statistics.median(results[True]), statistics.median(ratios)


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
                without, with_it, ratio = measure(agent, kernel.maps["uplinks"])
                worst = min(worst, ratio)
                print(f"guard, {who}: {with_it:.0f} connections/s, {without:.0f} without: {ratio:.3f}")
            named = sum(any(value[:8]) for _, value in kernel.maps["flows"].items())
            assert named > PAIRS * CONNECTIONS  # it has read each of them
    return 0 if worst > 1 - MOST else 1


if __name__ == "__main__":
    sys.exit(main())
