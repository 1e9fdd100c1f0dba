"""Reloads while everything is busy: what both policies allow loses nothing, what neither allows gets nothing, and a
reload that fails half-way leaves the old policy whole.

The sizes here are what a test may take; `python -m tests.lab.bench_reload` has thousands of names and connections.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.bench import FreshNames
from tests.lab.bench_reload import Busy, many_names
from tests.lab.enforcer import Enforcer, policy
from tests.lab.internet import EVIL_ADDRESS, EVIL_ADDRESS6
from tests.lab.lab import Lab, poll
from tests.lab.soak import come_outside, count_outside
from tests.lab.test_end_to_end import assert_reached, assert_refused, connected_at_once

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(180)]

NAMES = 2_000
RELOADS = 4
LEARNED_ADDRESS = "198.18.1.11"  # of *.blobs.allowed.test, for which the daemon does not ask

# The daemon, whose rulesets have a line that the kernel does not take, in one transaction with all the rest, while a
# file is there.
SABOTAGED = """
import pathlib, sys
from enforcer import cli, nft, ruleset
flag, apply = pathlib.Path(sys.argv.pop(1)), nft.Nft.apply
def sabotage(self, text):
    if flag.exists() and "policy accept" in text:
        text += f"add rule inet {ruleset.TABLE} refuse jump no_such_chain\\n"
    apply(self, text)
nft.Nft.apply = sabotage
sys.exit(cli.main())
"""


def test_reload_of_thousands_of_names_loses_no_connection(enforcer: Enforcer, lab: Lab) -> None:
    texts = [policy(host="strict", more=more) for more in (many_names(NAMES), "")]
    enforcer.ensure(texts[1])
    with Busy(lab) as busy:
        for number in range(RELOADS):
            assert enforcer.reload_and_wait(texts[number % 2]) is None
            time.sleep(0.5)  # who is refused waits for the daemon, which does nothing else meanwhile
    assert busy.met.failed == []
    assert busy.met.passed == 0
    assert busy.met.allowed > 100
    assert busy.met.refused > 10
    assert busy.answers > 10


@pytest.fixture
def sabotaged(any_enforcer: Enforcer, lab: Lab) -> Iterator[tuple[Enforcer, Path]]:
    """A daemon of its own, and the file that has its rulesets refused."""
    if any_enforcer.running:
        any_enforcer.stop()
    flag = lab.directory / "sabotage"
    daemon = Enforcer(lab, "host", lab.host, [sys.executable, "-c", SABOTAGED, str(flag)])
    daemon.start(policy(host="strict"))
    yield daemon, flag
    flag.unlink(missing_ok=True)
    daemon.stop()


def test_reload_that_the_kernel_refuses_leaves_the_old_policy_whole(
    sabotaged: tuple[Enforcer, Path], lab: Lab, fresh: FreshNames
) -> None:
    daemon, flag = sabotaged
    assert_reached(lab.ct.connect("layer.blobs.allowed.test"))
    lab.host.call("hold", key="pull", name="mirror.allowed.test", port=443)
    digest = daemon.status()["policy"]["digest"]
    # Takes away what is learned and what teaches, and would permit others.
    other = policy(host="strict", corp=("evil.test",), more=many_names(10))
    flag.touch()
    with Busy(lab, fresh=False) as busy:
        problem = daemon.reload_and_wait(other)
    flag.unlink()
    assert problem is not None
    assert "no_such_chain" in problem
    assert busy.met.passed == 0
    assert daemon.status()["policy"]["digest"] == digest
    for agent in (lab.ct, lab.host):
        assert_reached(agent.attempt(LEARNED_ADDRESS))  # learned before, and nobody has asked since
        assert connected_at_once(agent, fresh.take(2))
        assert_refused(agent.attempt(EVIL_ADDRESS))
        assert_refused(agent.attempt(EVIL_ADDRESS6))
        assert_refused(agent.connect("evil.test"))
    assert_reached(lab.host.talk("pull"))
    assert daemon.reload_and_wait(other) is None  # what the kernel takes is in force
    assert_refused(lab.ct.attempt(LEARNED_ADDRESS))
    assert_reached(lab.ct.connect("evil.test"))


@pytest.mark.usefixtures("host_as_before")
def test_table_that_cannot_be_put_back_ends_nothing_and_is_put_back_when_it_can(
    sabotaged: tuple[Enforcer, Path], lab: Lab
) -> None:
    daemon, flag = sabotaged
    count_outside(lab)
    flag.touch()
    assert lab.run("host", ["nft", "flush", "ruleset"]).returncode == 0
    poll("the daemon to say so", lambda: "it cannot be put back" in daemon.log)
    until = time.monotonic() + 3  # it is tried every second, and everything else is looked after
    while time.monotonic() < until:
        assert not lab.ct.attempt(EVIL_ADDRESS, timeout=0.2).reached
    assert daemon.running
    assert daemon.total("enforcer_enforcing") == 0
    flag.unlink()
    poll("the table", lambda: daemon.total("enforcer_enforcing") == 1)
    assert_refused(lab.ct.attempt(EVIL_ADDRESS))
    assert not any(come_outside(lab).values())
    assert_reached(lab.ct.connect("registry.allowed.test"))
