"""SIGKILL before each thing that the daemon does to the world outside: at start, in a reload, while learning, at stop.

Each time another daemon is started over what is left, as systemd does, and nothing got out in between.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence

import pytest

from enforcer import state
from tests.faults.injected import Orders
from tests.faults.world import World
from tests.lab.enforcer import policy, registry
from tests.lab.internet import ALLOWED_ADDRESS
from tests.lab.lab import poll
from tests.lab.test_drift import FLUSH_CONNTRACK

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(1_200)]

Numbers = Callable[[str], None]
Choose = Callable[[Sequence[int]], Sequence[int]]

_BLOB, _LATER = "198.18.1.11", "198.18.1.17"
_HOSTS = ("registry.allowed.test", "*.fresh.allowed.test")
BEFORE = policy(corp=(*_HOSTS, "*.blobs.allowed.test"))
AFTER = policy(corp=_HOSTS, more=registry("later", "later.allowed.test"))


def every(steps: Sequence[int]) -> Sequence[int]:
    """All of them."""
    return steps


def three(steps: Sequence[int]) -> Sequence[int]:
    """The first, the last and one between: for a run that must be short."""
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]})


def _at(choose: Choose, steps: Sequence[str]) -> list[int]:
    assert steps
    return list(choose(range(1, len(steps) + 1)))


def lay_baseline(world: World) -> None:
    """The kernel as early boot leaves it: nothing of a daemon, and everything that is not listed refused.

    And no connections: one that was redirected to a responder that has gone is established for conntrack, and the SYN
    that has its port again would be taken for a packet of it.
    """
    world.enforcer.remove()
    world.run("host", sys.executable, "-c", FLUSH_CONNTRACK)
    world.enforcer.lay_baseline(policy())


def start_after_boot(world: World, choose: Choose) -> tuple[int, int]:
    """(kills, attempts of the probers)."""
    tried = 0
    world.enforcer.stop(signal.SIGKILL)
    lay_baseline(world)
    world.start()
    steps = world.enforcer.steps
    at = _at(choose, steps)
    for number in at:
        world.enforcer.stop(signal.SIGKILL)
        lay_baseline(world)
        with world.nothing_gets_out() as probes:
            world.start(orders=Orders(kill_before=number))
            if world.enforcer.running:  # some steps less than the last time: how often a start asks depends on answers
                assert number > len(steps) - 8, f"{number} of {len(steps)} steps"
            else:
                world.refused()
                world.start()
            world.reached()
            world.learns()
        tried += probes.tried
    return len(at), tried


def restart(world: World, choose: Choose) -> tuple[int, int]:
    """The same over what an earlier daemon left, whose learned addresses are reached all the time."""
    world.enforcer.stop(signal.SIGKILL)
    world.start()
    steps = world.enforcer.steps
    learned = world.learn(2)
    at = _at(choose, steps)
    with world.nothing_gets_out() as probes:
        for number in at:
            world.enforcer.stop(signal.SIGKILL)
            world.start(orders=Orders(kill_before=number))
            if world.enforcer.running:  # one step less than the last time: not every start asks as often
                assert number > len(steps) - 3
                continue
            world.reached(*learned, within=0)
            world.learns()
            world.start()
            world.reached(*learned, within=0)
    return len(at), probes.tried


def reload(world: World, choose: Choose) -> tuple[int, int]:
    """What both policies allow is reached all the time, and afterwards the new one is in force."""
    world.ready(BEFORE)
    world.enforcer.order(Orders())
    assert world.enforcer.reload(AFTER) == "ok"
    steps = world.enforcer.steps
    at = _at(choose, steps)
    with world.nothing_gets_out() as probes:
        for number in at:
            world.ready(BEFORE)
            assert world.lab.ct.connect("x.blobs.allowed.test").reached
            world.enforcer.order(Orders(kill_before=number))
            if world.enforcer.change(AFTER):  # the last steps, own questions, come at their own time
                world.lab.ct.call("resolve", name="later.allowed.test")
            world.reached(ALLOWED_ADDRESS, within=0)
            if not world.enforcer.running:
                world.start(AFTER)
            world.reached(ALLOWED_ADDRESS, within=0)
            world.refused(_BLOB)
            assert world.lab.ct.connect("later.allowed.test").reached
            world.reached(_LATER, within=0)
    world.ready()
    return len(at), probes.tried


def learning(world: World, choose: Choose) -> tuple[int, int]:
    """The client whose answer it was connects all the same, and goes on to."""
    world.ready()
    world.enforcer.order(Orders())
    world.learn(1)
    poll("the learning", lambda: world.enforcer.steps)
    at = _at(choose, world.enforcer.steps)
    with world.nothing_gets_out() as probes:
        for number in at:
            world.ready()
            world.enforcer.order(Orders(kill_before=number))
            (address,) = world.learn(1)
            world.reached(address, within=0)
            # Own questions, if any were counted, come at their own time: another lesson is as good.
            poll("the daemon is killed", lambda: world.learn(1) and world.enforcer.killed)
            world.reached(address, within=0)
            world.start()
            world.reached(address, within=0)
            assert (address, 443) in world.enforcer.permitted()
    return len(at), probes.tried


def stop(world: World, choose: Choose) -> tuple[int, int]:
    """The state file is the old one or the new one, never half of it."""
    world.ready()
    world.enforcer.order(Orders())
    assert world.enforcer.stop() == 0
    at = _at(choose, world.enforcer.steps)
    learned = world.learn(2)
    with world.nothing_gets_out() as probes:
        for number in at:
            world.ready()
            world.enforcer.order(Orders(kill_before=number))
            world.enforcer.stop()
            assert world.enforcer.killed
            assert state.load(world.enforcer.state_dir)
            world.reached(*learned, within=0)
            world.learns()
            world.start()
            world.reached(*learned, within=0)
    return len(at), probes.tried


@pytest.mark.fault("SIGKILL at each step of a start after boot")
def test_killed_while_starting_after_boot(world: World, numbers: Numbers) -> None:
    numbers("{} kills, {} attempts refused".format(*start_after_boot(world, every)))


@pytest.mark.fault("SIGKILL at each step of a restart")
def test_killed_while_starting_again(world: World, numbers: Numbers) -> None:
    numbers("{} kills, {} attempts refused".format(*restart(world, every)))


@pytest.mark.fault("SIGKILL at each step of a reload")
def test_killed_while_reloading(world: World, numbers: Numbers) -> None:
    numbers("{} kills, {} attempts refused".format(*reload(world, every)))


@pytest.mark.fault("SIGKILL at each step of learning")
def test_killed_while_learning(world: World, numbers: Numbers) -> None:
    numbers("{} kills, {} attempts refused".format(*learning(world, every)))


@pytest.mark.fault("SIGKILL at each step of a stop")
def test_killed_while_stopping(world: World, numbers: Numbers) -> None:
    numbers("{} kills, {} attempts refused".format(*stop(world, every)))
