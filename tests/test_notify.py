"""What a supervisor is told, over a real socket of each kind that systemd may name."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer.notify import Supervisor


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """(a socket, its address as NOTIFY_SOCKET has it)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        if request.param == "path":
            sock.bind(str(tmp_path / "notify"))
            yield sock, str(tmp_path / "notify")
        else:
            sock.bind(f"\0registry-enforcer-test-{os.getpid()}")
            yield sock, f"@registry-enforcer-test-{os.getpid()}"


def test_each_message_is_one_datagram(listener: tuple[socket.socket, str]) -> None:
    sock, address = listener
    with Supervisor({"NOTIFY_SOCKET": address}) as supervisor:
        supervisor.ready("mode enforce")
        assert sock.recv(4096) == b"READY=1\nSTATUS=mode enforce"
        supervisor.reloading()
        assert sock.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        supervisor.alive()
        assert sock.recv(4096) == b"WATCHDOG=1"
        supervisor.stopping()
    assert sock.recv(4096).startswith(b"STOPPING=1\nSTATUS=")


def test_text_cannot_say_more_than_a_status(listener: tuple[socket.socket, str]) -> None:
    sock, address = listener
    with Supervisor({"NOTIFY_SOCKET": address}) as supervisor:
        supervisor.ready("policy /etc/x\nMAINPID=1 \udcff")
    assert sock.recv(4096) == b"READY=1\nSTATUS=policy /etc/x MAINPID=1 ?"


def test_children_do_not_inherit_the_socket(listener: tuple[socket.socket, str]) -> None:
    environment = {"NOTIFY_SOCKET": listener[1], "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1", "LANG": "C"}
    Supervisor(environment)
    assert environment == {"LANG": "C"}


def test_watchdog_is_fed_three_times_a_deadline(listener: tuple[socket.socket, str]) -> None:
    environment = {"NOTIFY_SOCKET": listener[1], "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    assert Supervisor(environment).alive_every_seconds == 10


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NOTIFY_SOCKET": "/run/none"},
        {"WATCHDOG_USEC": "30000000"},
        {"NOTIFY_SOCKET": "/run/none", "WATCHDOG_USEC": "0"},
        {"NOTIFY_SOCKET": "/run/none", "WATCHDOG_USEC": "often"},
        {"NOTIFY_SOCKET": "/run/none", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"},  # another's
    ],
)
def test_nobody_watches_unless_they_say_so(environment: dict[str, str]) -> None:
    assert Supervisor(environment).alive_every_seconds is None


def test_without_a_socket_nothing_is_sent() -> None:
    with Supervisor({}) as supervisor:
        supervisor.ready("x")
        supervisor.alive()


def test_supervisor_that_has_gone_is_said_once_and_nothing_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Supervisor({"NOTIFY_SOCKET": str(tmp_path / "gone")}) as supervisor:
        supervisor.alive()
        supervisor.alive()
    assert [record.message for record in caplog.records] == [
        "systemd cannot be told WATCHDOG=1: No such file or directory"
    ]


def test_watchdog_is_fed_without_a_descriptor_to_spare(listener: tuple[socket.socket, str]) -> None:
    sock, address = listener
    with Supervisor({"NOTIFY_SOCKET": address}) as supervisor:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))  # poll(2) takes no more than that
        try:
            supervisor.alive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sock.recv(4096) == b"WATCHDOG=1"
