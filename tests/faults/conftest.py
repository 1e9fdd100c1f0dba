"""A lab of its own with the small internet, and one world for all faults, which leave it whole."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import pytest

from tests.faults.world import World
from tests.lab import small_internet
from tests.lab.bench import FreshNames
from tests.lab.lab import Lab


@pytest.fixture(scope="session")
def session_world() -> Iterator[World]:
    with Lab() as lab:
        small_internet.start(lab)
        world = World(lab, FreshNames())
        yield world
        world.close()


@pytest.fixture
def world(session_world: World) -> World:
    """The host, enforced."""
    session_world.ready()
    return session_world


@pytest.fixture
def numbers(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """What the line of a survived fault says after its name."""
    return lambda text: record_property("numbers", text)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the daemon said, beside the test that failed."""
    report = yield
    world = getattr(item, "funcargs", {}).get("session_world")
    if report.failed and world is not None:
        report.sections.append(("the enforcer's log", world.enforcer.log[-4000:]))
    return report
