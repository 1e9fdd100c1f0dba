"""One lab for all tests of this directory: it takes seconds to build, a policy takes a reload.

With LAB_INTERNET=small it runs without engines and real servers, for the tests that do not ask for `clients`.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.lab import internet, small_internet
from tests.lab.bench import FreshNames
from tests.lab.clients import Clients
from tests.lab.enforcer import COMMAND, Enforcer, policy, trust_refusal_ca
from tests.lab.lab import Lab, missing_tools


@pytest.fixture(scope="session")
def built() -> Iterator[tuple[Lab, Clients | None]]:
    """The lab with its internet and its clients; no enforcer yet."""
    if os.environ.get("LAB_INTERNET") == "small":
        with Lab() as lab:
            small_internet.start(lab)
            yield lab, None
        return
    if missing := missing_tools():
        pytest.skip(f"the lab needs {', '.join(missing)}: make setup")
    with Lab() as lab:
        net = internet.start(lab)
        if Path(COMMAND).exists():
            trust_refusal_ca(lab)
        yield lab, Clients(lab, net)


@pytest.fixture(scope="session")
def lab(built: tuple[Lab, Clients | None]) -> Lab:
    """The lab."""
    return built[0]


@pytest.fixture(scope="session")
def clients(built: tuple[Lab, Clients | None]) -> Clients:
    """Its docker, podman, skopeo and curl."""
    return built[1] or pytest.skip("there are none beside the small internet")


@pytest.fixture(scope="session")
def fresh() -> FreshNames:
    """Allowed names that nobody has asked for."""
    return FreshNames()


@pytest.fixture(scope="session")
def any_enforcer(lab: Lab) -> Enforcer:
    """The host's enforcer, running or not."""
    if not Path(COMMAND).exists():
        pytest.skip(f"{COMMAND} is not installed: make setup")
    return Enforcer(lab, "host", lab.host)


@pytest.fixture
def enforcer(any_enforcer: Enforcer) -> Enforcer:
    """The host's enforcer, running with the lab's policy."""
    any_enforcer.ensure(policy())
    return any_enforcer


@pytest.fixture(scope="module")
def host_as_before(built: tuple[Lab, Clients | None], any_enforcer: Enforcer) -> Iterator[None]:
    """Who flushes the ruleset takes docker's rules along, and whatever comes next may count on no enforcer."""
    yield
    any_enforcer.leave()
    if (clients := built[1]) is not None:
        clients.restart_docker()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the daemon said, beside the test that failed."""
    report = yield
    arguments = getattr(item, "funcargs", {})
    enforcer = arguments.get("daemon") or arguments.get("any_enforcer")
    if report.failed and enforcer is not None:
        report.sections.append(("the enforcer's log", enforcer.log[-4000:]))
    return report
