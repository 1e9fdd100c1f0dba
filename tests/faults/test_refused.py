"""The kernel refuses what it takes otherwise: a transaction of nftables, a request of rtnetlink, elements of maps."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from enforcer.audit_record import Drifted
from enforcer.ruleset import TABLE
from tests.faults.injected import Orders
from tests.faults.world import SOON_SECONDS, World
from tests.lab.enforcer import policy, registry
from tests.lab.internet import ALLOWED_ADDRESS
from tests.lab.lab import poll

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(300)]

Numbers = Callable[[str], None]

REFUSED_SECONDS = 3.0
ONCE, A_WHILE = {"refuse_times": 1}, {"refuse_seconds": REFUSED_SECONDS}
BLOB = "198.18.1.11"
WITHOUT_BLOBS = policy(
    corp=("registry.allowed.test", "*.fresh.allowed.test"), more=registry("later", "later.allowed.test")
)


def reload_refused(world: World, step: str) -> str:
    """The old policy stays whole: what it allows is reached, what it does not is refused, and it goes on learning."""
    outcome = world.lab.ct.connect("x.blobs.allowed.test")
    assert outcome.reached, outcome
    digest = world.enforcer.status()["policy"]["digest"]
    with world.nothing_gets_out() as probes:
        for _ in range(3):
            poll("everything to be told", lambda: in_table(world, known(world)))  # which else would be refused
            world.enforcer.order(Orders(refuse=step, refuse_times=1))
            assert world.enforcer.reload(WITHOUT_BLOBS) == "failed"
            world.reached(ALLOWED_ADDRESS, BLOB)  # the second: what the new one had taken back already
            assert world.enforcer.status()["policy"]["digest"] == digest
            assert world.lab.ct.connect("y.blobs.allowed.test").reached
            assert world.lab.ct.connect("later.allowed.test").refused
            world.learns()
        world.enforcer.order(Orders())
        assert world.enforcer.reload(WITHOUT_BLOBS) == "ok"
        world.refused(BLOB)
    world.ready()
    assert world.enforcer.reload(policy()) == "ok"
    return f"3 times, {probes.tried} attempts refused"


@pytest.mark.fault("nftables refuses a reload")
def test_reload_that_nftables_refuses_changes_nothing(world: World, numbers: Numbers) -> None:
    numbers(reload_refused(world, "nftables"))


@pytest.mark.fault("BPF refuses a reload half-way")
def test_reload_that_bpf_refuses_changes_nothing(world: World, numbers: Numbers) -> None:
    numbers(reload_refused(world, "map names.delete"))


def known(world: World) -> list[str]:
    """The IPv4 addresses that the daemon holds."""
    return [address for address, _ in world.enforcer.permitted() if ":" not in address]


def in_table(world: World, addresses: list[str]) -> bool:
    """Whether the learned set holds them."""
    listed = world.lab.run("host", ["nft", "list", "set", "inet", TABLE, "learned4"])
    return listed.returncode == 0 and all(address in listed.stdout for address in addresses)


def while_learning(world: World, step: str, fault: str, orders: dict[str, float]) -> str:
    """Clients connect all the same, since BPF vouches; the table has the addresses once the fault is over."""
    before, said = world.faults(fault), world.said("the kernel refused")
    with world.nothing_gets_out() as probes:
        world.enforcer.order(Orders(refuse=step, **orders))  # type: ignore[arg-type]
        started = time.monotonic()
        learned: list[str] = []
        while time.monotonic() < started + orders.get("refuse_seconds", 0.5):
            learned += world.learn(1)
            world.reached(learned[-1], within=0)
            time.sleep(0.2)
        world.enforcer.order(Orders())
        poll("the elements", lambda: in_table(world, learned), SOON_SECONDS)
        took = world.reached(*learned)
    assert world.enforcer.running
    assert world.faults(fault) > before
    assert world.said("the kernel refused") - said <= 2, world.enforcer.log  # that it did, and that it is over
    return f"{len(learned)} addresses in the table {took:.1f} s later, {probes.tried} attempts refused"


@pytest.mark.fault("nftables refuses what is learned, once and for 3 s")
@pytest.mark.parametrize("orders", [ONCE, A_WHILE], ids=["once", "a while"])
def test_what_nftables_refuses_to_learn_it_is_told_again(
    world: World, numbers: Numbers, orders: dict[str, float]
) -> None:
    numbers(while_learning(world, "nftables", "nftables", orders))


@pytest.mark.fault("nftables refuses a repair for 3 s")
def test_repair_that_nftables_refuses_is_made_later(world: World, numbers: Numbers) -> None:
    def repairs() -> float:
        return world.enforcer.total("enforcer_drift_repairs_total", what=Drifted.TABLE.value)

    failed = "ERROR another program changed the nftables table, and it cannot be put back"
    before, faults, said = repairs(), world.faults("nftables"), world.said(failed)
    with world.nothing_gets_out("timed out") as probes:  # nftables' answers are what was taken away
        world.enforcer.order(Orders(refuse="nftables", refuse_seconds=REFUSED_SECONDS))
        world.run("host", "nft", "flush", "ruleset")
        poll("the refusal", lambda: world.faults("nftables") > faults)
        assert world.enforcer.total("enforcer_enforcing") == 0
        poll("the repair", lambda: repairs() > before, REFUSED_SECONDS + 2)
        world.reached()
        world.refused()
    assert world.enforcer.total("enforcer_enforcing") == 1
    assert world.said(failed) == said + 1
    numbers(f"repaired, {probes.tried} attempts, none got out")


@pytest.mark.fault("rtnetlink refuses to attach at a new interface for 3 s")
def test_interface_that_takes_no_filter_for_a_moment_is_tried_again(world: World, numbers: Numbers) -> None:
    before = world.faults("kernel")

    def gated() -> bool:
        return "gate#" in world.run("host", "tc", "filter", "show", "dev", "new0", "ingress")

    with world.nothing_gets_out() as probes:
        world.enforcer.order(Orders(refuse="links", refuse_seconds=REFUSED_SECONDS))
        world.lab.ip("host", "link add new0 type bridge", "link set new0 up")
        try:
            poll("the refusal", lambda: world.faults("kernel") > before)
            assert not gated()
            poll("the gate", gated, REFUSED_SECONDS + 3)
        finally:
            world.lab.ip("host", "link del new0")
        world.learns()
    assert world.enforcer.running
    numbers(f"attached, {probes.tried} attempts refused")


@pytest.mark.fault("BPF maps take nothing for 3 s")
def test_maps_that_take_nothing_for_a_moment_are_written_again(world: World, numbers: Numbers) -> None:
    before = world.faults("kernel")
    with world.nothing_gets_out() as probes:
        world.enforcer.order(Orders(refuse="map", refuse_seconds=REFUSED_SECONDS))
        world.lab.set_resolvers("198.18.0.53", "198.18.0.54")
        poll("the refusal", lambda: world.faults("kernel") > before)
        world.reached()
        poll("the resolvers", lambda: world.said("what it takes otherwise: that is over"), REFUSED_SECONDS + 3)
        world.lab.set_resolvers("198.18.0.53")
        world.learns()
    assert world.enforcer.running
    numbers(f"{world.faults('kernel') - before:.0f} refusals, {probes.tried} attempts refused")


@pytest.mark.fault("the kernel refuses for longer than a minute")
def test_what_lasts_ends_the_daemon_and_another_one_starts(world: World, numbers: Numbers) -> None:
    """It has lost a part of itself: systemd starts it anew."""
    with world.nothing_gets_out() as probes:
        world.enforcer.order(Orders(refuse="map", refuse_seconds=600))
        world.lab.set_resolvers("198.18.0.53", "198.18.0.54")
        started = time.monotonic()
        poll("the end", lambda: not world.enforcer.running, 90)
        took = time.monotonic() - started
        assert took > 50
        world.refused()
        world.reached()
        world.lab.set_resolvers("198.18.0.53")
        world.start()
        world.learns()
    numbers(f"ended after {took:.0f} s and started again, {probes.tried} attempts refused")
