"""What holds for every test: a known environment, root tests only as root, and skips that CI does not accept."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import TypeVar

import pytest

from tests.attacks import Catalogue

_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)

# Where the machine's own settings would send the lab's clients elsewhere than a test says.
_REDIRECTING = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "DOCKER_HOST",
    "DOCKER_CONTEXT",
    "CONTAINER_HOST",
    "REGISTRY_AUTH_FILE",
)
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")

# CI runs where everything can run. What cannot, on any machine of ours, is named here with the reason it gives.
_ACCEPTED_SKIPS: tuple[str, ...] = ()


_catalogue = Catalogue()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_catalogue)
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import settings  # noqa: PLC0415 - seconds of an emulated processor, where nobody uses it

        # What takes 2 ms takes 300 where the processors are busy; pytest's own time limit ends what hangs.
        settings.register_profile("any machine", deadline=None)
        settings.load_profile("any machine")
    for name in (*_REDIRECTING, *_PROXIES, *(proxy.upper() for proxy in _PROXIES)):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """What a command sets for its process is not for the tests that follow it."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root") or item.get_closest_marker("lab"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


def _refuse_skip(report: _Report) -> _Report:
    """In CI (CI_NO_SKIP=1) a skip is a failure, unless its reason is an accepted one."""
    if os.environ.get("CI_NO_SKIP") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if reason not in _ACCEPTED_SKIPS:
        report.outcome = "failed"
        report.longrepr = f"skipped, and CI accepts no skip for this reason: {reason}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if tried := _catalogue.tried():
        terminalreporter.section("attacks")
        for words in sorted(tried):
            terminalreporter.write_line(tried[words].line(words))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _refuse_skip((yield))
