"""A sample of tests/faults, where all of them are (`make faults`): short enough for every run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import test_killed, test_overflows, test_refused
from tests.faults.world import World
from tests.lab.bench import FreshNames
from tests.lab.enforcer import Enforcer
from tests.lab.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(180)]

HUNG_SECONDS = 4.0
LINKS = 100  # pairs


@pytest.fixture(scope="module")
def module_world(any_enforcer: Enforcer, lab: Lab, fresh: FreshNames) -> Iterator[World]:
    """In place of the lab's own enforcer."""
    if any_enforcer.running:
        any_enforcer.stop()
    any_enforcer.remove()
    world = World(lab, fresh)
    yield world
    world.close()


@pytest.fixture
def world(module_world: World) -> World:
    module_world.ready()
    return module_world


def test_killed_while_starting_again(world: World) -> None:
    test_killed.restart(world, test_killed.three)


def test_killed_while_reloading(world: World) -> None:
    test_killed.reload(world, test_killed.three)


def test_reload_that_nftables_refuses_changes_nothing(world: World) -> None:
    test_refused.reload_refused(world, "nftables")


def test_what_nftables_refuses_to_learn_it_is_told_again(world: World) -> None:
    test_refused.while_learning(world, "nftables", "nftables", test_refused.ONCE)


def test_interfaces_come_and_go(world: World) -> None:
    test_overflows.churn(world, LINKS)


def test_hung_daemon(world: World) -> None:
    test_overflows.hang(world, HUNG_SECONDS)


def test_event_finds_no_memory(world: World) -> None:
    test_overflows.starve_events(world)
