"""The kernel has more to tell than it keeps for a daemon that does not read, or the daemon hangs altogether."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from enforcer.learned import LearnedAddresses
from tests.faults.injected import Orders
from tests.faults.world import SOON_SECONDS, World
from tests.lab.internet import EVIL_ADDRESS, fresh_address
from tests.lab.lab import RESOLVER, poll

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(300)]

Numbers = Callable[[str], None]

HUNG_SECONDS = 60.0
FLOODED_NAMES = 15_000  # several times what the ring holds, and fewer than one pattern may hold
FLOOD_FROM = 20_000  # of the fresh names, beyond those that are taken one by one
LINKS = 1_000  # pairs
SAMPLED = 60


@contextlib.contextmanager
def hung(world: World) -> Iterator[None]:
    """The daemon stands still."""
    world.enforcer.send(signal.SIGSTOP)
    try:
        yield
    finally:
        world.enforcer.send(signal.SIGCONT)


def hang(world: World, seconds: float) -> str:
    """What is redirected to the responder waits for it; BPF goes on learning, and nftables and BPF refusing."""
    learned: list[str] = []
    lost = world.enforcer.total("enforcer_kernel_events_lost_total")
    with world.nothing_gets_out("timed out") as probes:
        with hung(world):
            started = time.monotonic()
            while time.monotonic() < started + seconds:
                learned += world.learn(1)
                world.reached(learned[-1], within=0)
                time.sleep(0.5)
        resumed = time.monotonic()
        poll("what was learned", lambda: {(each, 443) for each in learned} <= world.enforcer.permitted(), SOON_SECONDS)
        took = time.monotonic() - resumed
        world.reached(*learned)
        world.learns()
        poll("an answer", lambda: world.lab.ct.attempt(EVIL_ADDRESS).message == "403 Forbidden")
    assert world.enforcer.running
    assert world.enforcer.total("enforcer_kernel_events_lost_total") == lost
    return f"{len(learned)} names learned, all known {took:.1f} s later; {probes.tried} attempts, none got out"


def fill_ring(world: World, names: int) -> str:
    """Nothing allowed stays refused: what did not reach the daemon is read from the map."""
    before = world.enforcer.total("enforcer_kernel_events_lost_total")
    flooded = [fresh_address(FLOOD_FROM + index) for index in range(names)]
    sample = flooded[:: max(1, names // SAMPLED)]
    with world.nothing_gets_out("timed out") as probes:
        with hung(world):
            reply = world.lab.ct.call(
                "flood_names", server=RESOLVER, suffix="fresh.allowed.test", first=FLOOD_FROM, count=names, window=32,
                reply_within=120,
            )  # fmt: skip
            assert reply["answers"] == names
        resumed = time.monotonic()
        wanted = {(address, 443) for address in flooded}
        poll("everything to be adopted", lambda: wanted <= world.enforcer.permitted(), 20)
        took = time.monotonic() - resumed
        world.reached(*sample)
        world.learns()
    lost = world.enforcer.total("enforcer_kernel_events_lost_total") - before
    assert lost > 0
    assert 1 <= world.said("learning packets did not reach the daemon") <= 3
    return (
        f"{names} answers at {names / reply['seconds']:.0f}/s, {lost:.0f} of them lost and all {names} addresses known "
        f"{took:.1f} s later; {probes.tried} attempts, none got out"
    )


def starve_events(world: World) -> str:
    """What BPF has learned is read from its map, and what the guard has ended stays ended."""

    def lost() -> tuple[float, float]:
        return (
            world.enforcer.total("enforcer_kernel_events_lost_total"),
            world.enforcer.total("enforcer_guarded_connections_total", outcome="report_lost"),
        )

    events, reports = lost()
    with world.nothing_gets_out() as probes:
        world.enforcer.order(Orders(starve_events=1))
        started = time.monotonic()
        (address,) = world.learn(1)
        poll("what was lost", lambda: (address, 443) in world.enforcer.permitted(), SOON_SECONDS)
        took = time.monotonic() - started
        assert lost() == (events + 1, reports)
        world.reached(address)
        world.enforcer.order(Orders(starve_events=1))
        wrong_name = world.lab.ct.call("attempt", address=address, port=443, timeout=5, host="evil.test")
        assert wrong_name["message"] == "403 Forbidden", wrong_name
        poll("the loss to be counted", lambda: lost() == (events + 1, reports + 1))
        world.learns()
    assert world.enforcer.running
    return f"a name known {took:.1f} s later, a connection ended without a line; {probes.tried} attempts, none got out"


@pytest.mark.fault("no memory for what BPF reports")
def test_event_finds_no_memory(world: World, numbers: Numbers) -> None:
    numbers(starve_events(world))


@pytest.mark.fault("the daemon hangs for a minute")
def test_hung_daemon(world: World, numbers: Numbers) -> None:
    numbers(hang(world, HUNG_SECONDS))


@pytest.mark.fault("the BPF ring overflows")
def test_ring_overflows(world: World, numbers: Numbers) -> None:
    assert LearnedAddresses().per_holder > FLOODED_NAMES
    numbers(fill_ring(world, FLOODED_NAMES))
    world.afresh()  # without them, for those that follow


@pytest.mark.fault("rtnetlink overflows (ENOBUFS)")
def test_rtnetlink_overflows(world: World, numbers: Numbers) -> None:
    before = world.faults("link-events")
    addresses = [f"10.99.{number // 250}.{number % 250 + 1}/32 dev up0" for number in range(3_000)]
    with world.nothing_gets_out("timed out") as probes:
        with hung(world):
            world.lab.ip("host", *(f"addr add {address}" for address in addresses))
            world.lab.ip("host", *(f"addr del {address}" for address in addresses))
            world.lab.ip("host", "link add late0 type bridge", "addr add 10.98.0.1/24 dev late0", "link set late0 up")
        resumed = time.monotonic()
        poll("the new interface", lambda: "late0" in _gated(world), SOON_SECONDS)
        took = time.monotonic() - resumed
        world.lab.ip("host", "link del late0")
        world.learns()
    assert world.faults("link-events") > before
    assert world.said("all of them are read anew") == 1
    numbers(f"{2 * len(addresses)} changes, all of it known {took:.1f} s later; {probes.tried} attempts, none got out")


def _gated(world: World) -> set[str]:
    return {each["name"] for each in world.enforcer.status()["interfaces"] if each["program"] == "gate"}


@pytest.mark.fault("nftables' events overflow (ENOBUFS)")
def test_nftables_events_overflow(world: World, numbers: Numbers) -> None:
    before = world.faults("table-events")
    chains = "".join(f"add chain inet other c{number}\n" for number in range(10_000))
    with world.nothing_gets_out("timed out") as probes:
        with hung(world):
            for _ in range(4):
                world.run("host", "nft", "-f", "-", text=f"add table inet other\n{chains}delete table inet other\n")
            world.run("host", "nft", "flush", "set", "inet", "registry_enforcer", "learned4")
        resumed = time.monotonic()
        world.reached()
        took = time.monotonic() - resumed
        world.learns()
    assert world.faults("table-events") > before
    assert world.said("the table is written anew") == 1
    numbers(f"80,000 changes, the table written anew {took:.1f} s later; {probes.tried} attempts, none got out")


@pytest.mark.fault("reports of refusals overflow (nflog)")
def test_reports_overflow(world: World, numbers: Numbers) -> None:
    def lost() -> float:
        return world.enforcer.total("enforcer_audit_dropped_total", where="kernel")

    before = lost()
    with world.nothing_gets_out("timed out") as probes:
        with hung(world):
            flooded = world.lab.ct.call(
                "flood_connects", address=EVIL_ADDRESS, port=443, count=20_000, reply_within=120
            )
        poll("the loss to be counted", lambda: lost() > before)  # what is kept is read first, a thousand a second
        world.reached()
        world.learns()
    assert world.enforcer.running
    numbers(f"{flooded} refused at once, {lost() - before:.0f} reports lost; {probes.tried} attempts, none got out")


def churn(world: World, pairs: int) -> str:
    """Interfaces come and go by thousands; container and engine go on, and the last one to come is gated."""
    before = world.enforcer.total("enforcer_refused_connections_total")
    with world.nothing_gets_out() as probes:
        started = time.monotonic()
        for verb in ("add churn{0} type veth peer name churned{0}", "del churn{0}"):
            world.lab.ip("host", *(f"link {verb.format(number)}" for number in range(pairs)))
            world.learns()
        world.lab.ip("host", "link add late0 type bridge", "addr add 10.98.0.1/24 dev late0", "link set late0 up")
        resumed = time.monotonic()
        poll("the last interface", lambda: "late0" in _gated(world), SOON_SECONDS)
        took = time.monotonic() - resumed
        world.lab.ip("host", "link del late0")
        world.reached()
    assert world.enforcer.running
    assert world.enforcer.total("enforcer_refused_connections_total") > before
    return (
        f"{2 * pairs} interfaces came and went in {resumed - started:.0f} s, the next was known {took:.1f} s later; "
        f"{probes.tried} attempts refused, the slowest in {probes.slowest:.1f} s"
    )


@pytest.mark.fault("thousands of interfaces come and go")
def test_interfaces_come_and_go(world: World, numbers: Numbers) -> None:
    numbers(churn(world, LINKS))
