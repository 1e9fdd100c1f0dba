"""The bound that a policy sets on what is learned, kept by memory, nftables and BPF alike."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from enforcer import bpf
from tests.lab.enforcer import Enforcer, policy, registry
from tests.lab.internet import fresh_address, fresh_name
from tests.lab.lab import RESOLVER, Lab, poll
from tests.lab.test_drift import FLUSH_CONNTRACK, of_root
from tests.lab.test_end_to_end import assert_reached, assert_refused

pytestmark = [pytest.mark.root, pytest.mark.lab]

# The daemon, to whom one revoked destination is a crowd, and who looks for room every second.
CROWDED = """
import sys
from enforcer import cli, enforcement, revocation
revocation.CROWDED = enforcement.ROOM_SECONDS = 0
sys.exit(cli.main())
"""
BOUND = 1_024
FIRST, COUNT = 12_000, 1_500


def test_no_more_is_learned_than_the_policy_says(enforcer: Enforcer, lab: Lab) -> None:
    def flood() -> None:
        lab.ct.call("flood_names", server=RESOLVER, suffix="fresh.allowed.test", first=FIRST, count=COUNT)

    def reached_bound() -> float:
        return enforcer.total("enforcer_bound_reached_total", what="learned_permissions")

    flood()
    poll("all of them", lambda: enforcer.total("enforcer_held", what="learned_permissions") >= COUNT)
    lab.ct.call("hold", key="pull", name=fresh_name(FIRST), port=443)
    enforcer.ensure(policy(more=f"[limits]\nlearned_addresses = {BOUND}\n"))
    assert enforcer.total("enforcer_held_limit", what="learned_permissions") == BOUND
    before = reached_bound()
    assert before >= COUNT - BOUND
    assert len(enforcer.permitted()) <= BOUND
    (generation,) = (lab.bpffs / "host").glob("generation-*")
    with bpf.KernelState(bpf.read_report(generation)) as kernel:
        assert len(list(kernel.maps["learned"].items())) <= BOUND
        flood()
        poll("room for what was not held", lambda: reached_bound() >= before + COUNT - BOUND)
        assert len(enforcer.permitted()) <= BOUND
        assert len(list(kernel.maps["learned"].items())) <= BOUND
    poll("the end of learning", lambda: enforcer.permitted() == enforcer.permitted())
    held = enforcer.permitted()
    gone = next(n for n in range(FIRST, FIRST + COUNT) if (fresh_address(n), 443) not in held)
    assert_refused(lab.ct.attempt(fresh_address(gone)))  # has made room
    assert_reached(lab.ct.connect(fresh_name(gone)))  # and is asked for again
    assert_reached(lab.ct.talk("pull"))  # what was open stays so


@pytest.fixture
def crowded(any_enforcer: Enforcer, lab: Lab) -> Iterator[Enforcer]:
    """A daemon of its own, not running."""
    if any_enforcer.running:
        any_enforcer.stop()
    daemon = Enforcer(lab, "host", lab.host, [sys.executable, "-c", CROWDED])
    yield daemon
    daemon.stop()


def test_what_was_revoked_is_forgotten_where_no_connection_is_left(crowded: Enforcer, lab: Lab) -> None:
    """Else the sets that hold it would be full one day, and the kernel would refuse the next policy."""
    of_root(lab, sys.executable, "-c", FLUSH_CONNTRACK)  # what earlier tests have open, or have just closed
    names = {"open": "later.allowed.test", "idle": "evil.test"}
    crowded.start(policy(more=registry("later", names["open"]) + registry("more", names["idle"])))
    lab.ct.call("hold", key="open", name=names["open"], port=443)
    assert lab.ct.call("resolve", name=names["idle"])  # and asked for by the daemon; nobody connects
    held = len(crowded.permitted())
    assert crowded.reload_and_wait(policy()) is None

    def revoked() -> int:
        listed = lab.run("host", ["nft", "list", "set", "inet", "registry_enforcer", "revoked4"])
        return listed.stdout.count("timeout 5d")

    poll("room", lambda: revoked() == 1)
    assert "without connections are not judged at every packet any more" in crowded.log
    assert len(crowded.permitted()) < held
    assert_refused(lab.ct.talk("open"))
    for name in names.values():
        assert_refused(lab.ct.connect(name))
