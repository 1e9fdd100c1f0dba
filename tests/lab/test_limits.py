"""The bound that a policy sets on what is learned, kept by memory, nftables and BPF alike."""

from __future__ import annotations

import pytest

from enforcer import bpf
from tests.lab.enforcer import Enforcer, policy
from tests.lab.internet import fresh_address, fresh_name
from tests.lab.lab import RESOLVER, Lab, poll
from tests.lab.test_end_to_end import assert_reached, assert_refused

pytestmark = [pytest.mark.root, pytest.mark.lab]

BOUND = 1_024
FIRST, COUNT = 12_000, 1_500


def test_no_more_is_learned_than_the_policy_says(enforcer: Enforcer, lab: Lab) -> None:
    def flood() -> None:
        lab.ct.call("flood_names", server=RESOLVER, suffix="fresh.allowed.test", first=FIRST, count=COUNT)

    flood()
    poll("all of them", lambda: enforcer.total("enforcer_held", what="learned_permissions") >= COUNT)
    lab.ct.call("hold", key="pull", name=fresh_name(FIRST), port=443)
    enforcer.ensure(policy(more=f"[limits]\nlearned_addresses = {BOUND}\n"))
    assert enforcer.total("enforcer_held_limit", what="learned_permissions") == BOUND
    before = enforcer.total("enforcer_bound_reached_total", what="learned_permissions")
    assert before >= COUNT - BOUND
    assert len(enforcer.permitted()) <= BOUND
    (generation,) = (lab.bpffs / "host").glob("generation-*")
    with bpf.KernelState(bpf.read_report(generation)) as kernel:
        assert len(list(kernel.maps["learned"].items())) <= BOUND
        flood()
        poll("room", lambda: enforcer.total("enforcer_bound_reached_total", what="learned_permissions") > before)
        poll("what is newest", lambda: (fresh_address(FIRST + COUNT - 1), 443) in enforcer.permitted())
        assert len(enforcer.permitted()) <= BOUND
        assert len(list(kernel.maps["learned"].items())) <= BOUND
    assert_reached(lab.ct.attempt(fresh_address(FIRST + COUNT - 1)))
    assert_refused(lab.ct.attempt(fresh_address(FIRST + 1)))  # has made room
    assert_reached(lab.ct.connect(fresh_name(FIRST + 1)))  # and is asked for again
    assert_reached(lab.ct.talk("pull"))  # what was open stays so
