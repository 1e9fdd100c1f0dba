"""First connections to fresh allowed names, beside a run without enforcement (`make bench`).

Every name is asked for once and connected to at once after its answer. A lost race between answer and permission costs
a whole second, until the SYN is sent again, so what counts is how many connections take over 500 ms: none may.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.lab import internet
from tests.lab.enforcer import Enforcer, policy
from tests.lab.internet import fresh_name
from tests.lab.lab import RESOLVER, Agent, Lab, missing_tools, poll

STUB = "127.0.0.53"
NAMES = 1_000
SLOW_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Measurement:
    """The connections of one run, in seconds."""

    seconds: tuple[float, ...]
    failed: tuple[str, ...]  # what went wrong with those that were not made

    @property
    def slow(self) -> int:
        """How many took longer than a connection that lost no packet can take."""
        return sum(took > SLOW_SECONDS for took in self.seconds)

    def row(self) -> str:
        """One line of the table."""
        ordered = sorted(self.seconds) or [0.0]
        return (
            f"{len(self.seconds):>6}{len(self.failed):>8}{statistics.median(ordered) * 1e3:>11.2f}"
            f"{ordered[len(ordered) * 99 // 100] * 1e3:>9.2f}{ordered[-1] * 1e3:>9.2f}{self.slow:>13}"
        )


HEADER = f"{'':<28}{'made':>6}{'failed':>8}{'median ms':>11}{'p99 ms':>9}{'max ms':>9}{'over 500 ms':>13}"


class FreshNames:
    """Hands out names that nobody has asked for yet in this lab."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, count: int) -> list[str]:
        """The next `count` names."""
        first, self._next = self._next, self._next + count
        assert self._next <= internet.FRESH_NAMES
        return [fresh_name(index) for index in range(first, self._next)]


def measure(agent: Agent, names: list[str]) -> Measurement:
    """Connect to each name on port 443, IPv4 and IPv6 in turn."""
    replies = agent.call("connect_each", names=names, port=443, families=[4, 6], reply_within=120)
    return Measurement(
        tuple(reply["seconds"] for reply in replies if reply["verdict"] == "reached"),
        tuple(f"{reply['verdict']}: {reply['message']}" for reply in replies if reply["verdict"] != "reached"),
    )


@contextmanager
def stub_resolver(lab: Lab) -> Iterator[None]:
    """A forwarding resolver on 127.0.0.53 that the host asks instead of the real one."""
    isolated = [
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--user=root",
        "--no-hosts",
        "--no-resolv",
        "--pid-file",
    ]
    forwarding = [f"--listen-address={STUB}", "--bind-interfaces", "--no-resolv", f"--server={RESOLVER}"]
    stub = lab.spawn("host", ["dnsmasq", *isolated, *forwarding], "stub")
    lab.set_resolvers(STUB)
    try:
        poll("the stub resolver", lambda: lab.run("host", ["getent", "hosts", "mirror.allowed.test"]).returncode == 0)
        yield
    finally:
        lab.set_resolvers(RESOLVER)
        stub.terminate()
        stub.wait()


def main() -> int:
    """Print the table; 1 if a connection with enforcement was slow or failed."""
    if missing := missing_tools():
        print(f"bench: needs {', '.join(missing)}: make setup")
        return 2
    fresh = FreshNames()
    results: dict[str, Measurement] = {}
    with Lab() as lab:
        print("bench: building the lab ...", flush=True)
        internet.start(lab)
        enforcer = Enforcer(lab, "host", lab.host)
        for enforced in (False, True):
            label = "enforced" if enforced else "without"
            print(f"bench: {NAMES} names each: forwarded, local, stub resolver; {label} ...", flush=True)
            if enforced:
                enforcer.start(policy(host="strict"))
            results[f"forwarded, {label}"] = measure(lab.ct, fresh.take(NAMES))
            results[f"local, {label}"] = measure(lab.host, fresh.take(NAMES))
            with stub_resolver(lab):
                if enforced:
                    poll("the stub to be trusted", lambda: STUB in enforcer.status()["resolvers"])
                results[f"stub on {STUB}, {label}"] = measure(lab.agent("host"), fresh.take(NAMES))
    print(HEADER)
    for label, result in sorted(results.items()):
        print(f"{label:<28}{result.row()}")
    bad = [label for label, result in results.items() if "enforced" in label and (result.slow or result.failed)]
    for label in bad:
        print(f"bench: {label}: slow or failed: {results[label].failed[:3]}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
