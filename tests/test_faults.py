"""What is done about a fault, without a host: said once, counted each time, and never taken for something else."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import errno
import logging
import os
import re
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enforcer import daemon, metrics, procfs, trusted_files
from enforcer.faults import PATIENCE_SECONDS, Faults
from enforcer.metrics import Fault
from tests.test_metrics import SNAPSHOT

ROOT = Path(__file__).parent.parent
DEADLINE_SECONDS = 10.0


def counted(collected: metrics.Metrics, what: Fault) -> float:
    return collected.registry.get_sample_value("enforcer_faults_total", {"what": what.value}) or 0.0


@pytest.fixture
def collected() -> metrics.Metrics:
    return metrics.Metrics(lambda: SNAPSHOT)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Nothing can be opened in this process. What is open stays so, and may be polled."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def until(condition: Any) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.01)


def test_fault_is_counted_each_time_and_said_once(collected: metrics.Metrics, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    faults = Faults(collected)
    for _ in range(3):
        faults.met(Fault.STATE, "No space left on device")
    faults.over(Fault.STATE)
    faults.over(Fault.STATE)
    assert counted(collected, Fault.STATE) == 3
    assert [record.message for record in caplog.records] == [
        "what is learned would be lost in a reboot: No space left on device",
        "what is learned would be lost in a reboot: that is over",
    ]


def test_fault_that_comes_and_goes_is_said_once_a_minute(
    collected: metrics.Metrics, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    faults = Faults(collected)
    for _ in range(180):
        now += 1
        faults.met(Fault.TABLE_EVENTS, "x")
        faults.over(Fault.TABLE_EVENTS)
    assert len(caplog.records) == 3
    assert counted(collected, Fault.TABLE_EVENTS) == 180


def test_fault_lasts_that_has_not_been_over_for_a_minute(
    collected: metrics.Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    faults = Faults(collected)
    faults.met(Fault.KERNEL, "x")
    now += PATIENCE_SECONDS - 1
    faults.met(Fault.KERNEL, "x")
    assert not faults.lasts(Fault.KERNEL)
    now += 2
    assert faults.lasts(Fault.KERNEL)
    faults.over(Fault.KERNEL)
    assert not faults.lasts(Fault.KERNEL)


@pytest.mark.parametrize(
    ("context", "ends"),
    [
        ({"exception": OSError(errno.EMFILE, "Too many open files"), "socket": None, "message": "accept"}, False),
        ({"exception": OSError(errno.EBADF, "Bad file descriptor"), "socket": None, "message": "accept"}, True),
        ({"exception": OSError(errno.EMFILE, "Too many open files"), "message": "a callback"}, True),
        ({"message": "a task"}, True),
    ],
)
def test_client_without_a_descriptor_does_not_end_the_daemon(
    collected: metrics.Metrics, context: dict[str, Any], ends: bool
) -> None:
    async def tell() -> bool:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        daemon._end_on_failure(loop, ended, Faults(collected))
        loop.call_exception_handler(context)
        return ended.done() and ended.exception() is not None

    assert asyncio.run(tell()) == ends
    assert counted(collected, Fault.CLIENTS) == (not ends)


def test_file_that_cannot_be_read_for_want_of_descriptors_is_not_an_empty_one(tmp_path: Path) -> None:
    """Taken for that, a host without descriptors would trust no resolver any more, until the file changes again."""
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    calls: list[str] = []
    refused: list[OSError] = []

    async def watch() -> None:
        with procfs.FileWatch((path,), lambda: calls.append(path.read_text()), refused.append):
            path.write_text("nameserver 192.0.2.2\n")
            with no_descriptors():
                await until(lambda: refused)
                assert calls == []
            await until(lambda: calls)

    asyncio.run(watch())
    assert calls == ["nameserver 192.0.2.2\n"]
    assert refused[0].errno == errno.EMFILE
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        procfs.trusted_resolvers(path, (), wsl=False)


def test_cgroups_that_appear_while_there_are_no_descriptors_are_found_later(tmp_path: Path) -> None:
    container = "docker-" + "a" * 64 + ".scope"
    appeared: list[str] = []
    refused: list[OSError] = []

    async def watch() -> None:
        def changed(new: Any, gone: Any) -> None:
            appeared.extend(cgroup.path for cgroup in new)

        with procfs.CgroupWatch(tmp_path, changed, refused.append):
            # Read together, after the descriptors have gone: the first of them cannot be looked into.
            for name in ("other", container):
                (tmp_path / name).mkdir()
            with no_descriptors():
                await until(lambda: refused)
            await until(lambda: appeared)

    asyncio.run(watch())
    assert appeared == [container]


def test_file_that_did_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    trusted_files.replace(path, (b"old",))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trusted_files.replace(path, (b"new",))
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


def test_prober_of_the_limit_opens_nothing() -> None:
    """What the tests above rely on."""
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        socket.socket()
    socket.socket().close()


# --- the list of faults ----------------------------------------------------------------------------------------------
def markers() -> set[str]:
    found = set()
    for path in (ROOT / "tests" / "faults").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                (words,) = node.args
                assert isinstance(words, ast.Constant)
                found.add(str(words.value))
    return found


def test_readme_has_every_fault_and_their_number() -> None:
    section = (ROOT / "README.md").read_text().partition("## Faults survived\n")[2].partition("\n## ")[0]
    rows = {line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")} - {"fault"}
    assert rows == markers()
    assert re.findall(r"(\d+) faults survived, 0 not", section) == [str(len(markers()))]
