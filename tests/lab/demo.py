"""`make demo`: what the enforcer does, shown with real clients in namespaces of their own.

Builds the lab, shows that everything is reachable, starts the program with a policy, and lets docker, podman, skopeo
and containers try allowed and other registries. Exit code 1 if anything was not as expected.
"""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.lab import internet
from tests.lab.clients import Clients
from tests.lab.enforcer import Enforcer, policy
from tests.lab.internet import EVIL_ADDRESS
from tests.lab.lab import Lab, Outcome, missing_tools

REFUSED_WITHIN = 5.0  # seconds
SHOWN_METRICS = (
    "enforcer_enforcing",
    "enforcer_policy_info",
    "enforcer_learned_addresses",
    "enforcer_dns_answers_total",
    "enforcer_refused_connections_total",
    "enforcer_learn_seconds_count",
    "enforcer_learn_seconds_sum",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One attempt: who, whereto, what the policy says of it, and how to try."""

    client: str
    destination: str
    allowed: bool
    attempt: Callable[[], Outcome]

    def as_expected(self, outcome: Outcome) -> bool:
        """Allowed: got it. Otherwise: told no, before the client loses patience."""
        return outcome.reached if self.allowed else outcome.refused and outcome.seconds < REFUSED_WITHIN


def checks(lab: Lab, clients: Clients) -> list[Check]:
    """Every client against the allowed registry and the other one."""
    pulls = (
        ("docker pull", clients.docker_pull),
        ("podman pull", clients.podman_pull),
        ("skopeo copy", clients.skopeo_copy),
    )
    planned = []
    for allowed, registries in (
        (True, ("registry.allowed.test", "layer7.blobs.allowed.test", "cname.allowed.test", "v6.allowed.test",
                "alt.allowed.test:8443", "plain.allowed.test:5000")),
        (False, ("evil.test", "v6.evil.test", "evil.test:5000")),
    ):  # fmt: skip
        for client, pull in pulls:
            planned += [Check(client, name, allowed, partial(pull, name)) for name in registries]
        for network in ("bridge", "host"):
            for name, port in (
                (("registry.allowed.test", 443), ("v6.allowed.test", 443), ("plain.allowed.test", 5000))
                if allowed
                else (("evil.test", 443), ("v6.evil.test", 443), ("evil.test", 5000), (EVIL_ADDRESS, 443))
            ):
                planned.append(
                    Check(
                        f"container, --network {network}", f"{name}:{port}", allowed,
                        partial(clients.in_container, network, name, port),
                    )
                )  # fmt: skip
    planned.append(
        Check("curl (host is off)", "evil.test", allowed=True, attempt=partial(clients.curl, "https://evil.test/v2/"))
    )
    return planned


def run(lab: Lab) -> tuple[int, int]:
    """The demo in a fresh lab; the value is how many checks there were, and how many went as expected."""
    _say("starting DNS (knot, unbound), registries and dockerd ...")
    clients = Clients(lab, internet.start(lab))
    planned = checks(lab, clients)
    _say(f"{len(planned)} attempts without the enforcer, which must all get through ...")
    before = [check.attempt() for check in planned]

    text = policy()
    _say("the policy:")
    print(textwrap.indent(text, "    "))
    enforcer = Enforcer(lab, "host", lab.host)
    _say(f"registry-enforcer run: {enforcer.start(text)}")
    _say("the same attempts, enforced:")
    print(_row("client", "destination", "without", "expected", "happened", "seconds", "what the client said"))
    good = 0
    for check, without in zip(planned, before, strict=True):
        outcome = check.attempt()
        expected = without.reached and check.as_expected(outcome)
        good += expected
        row = _row(check.client, check.destination, without.verdict, "reached" if check.allowed else "refused",
                   outcome.verdict, f"{outcome.seconds:.2f}", outcome.message)  # fmt: skip
        print(row if expected else f"{row}   <-- NOT AS EXPECTED", flush=True)
    _say("metrics, as Prometheus sees them:")
    for line in enforcer.metrics_text().splitlines():
        if line.startswith(SHOWN_METRICS) and not line.endswith(" 0.0"):
            print(f"    {line}")
    enforcer.stop()
    _say("registry-enforcer remove:")
    print(textwrap.indent(enforcer.remove(), "    "))
    return len(planned), good


def main() -> int:
    """Build the lab, run the demo, clean up."""
    if os.geteuid() != 0:
        _say("needs root, for network namespaces of its own")
        return 2
    if missing := missing_tools():
        _say(f"needs {', '.join(missing)}: make setup")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the lab is taken down
    _say("building namespaces ...")
    with Lab() as lab:
        total, good = run(lab)
        _say("cleaning up ...")
    _say(f"{total} checks, {good} as expected")
    return 0 if good == total else 1


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)


def _row(client: str, destination: str, without: str, expected: str, happened: str, seconds: str, message: str) -> str:
    # The end of a client's sentence is where it says why.
    shortened = message if len(message) <= 60 else "..." + message[-57:]
    return f"    {client:<29}{destination:<28}{without:<9}{expected:<10}{happened:<11}{seconds:>7}  {shortened}"


if __name__ == "__main__":
    sys.exit(main())
