"""The control socket: one daemon a run directory, and an asker that does wrong hurts itself only."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from enforcer import control


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    if request.get("command") != "status":
        raise ValueError("unknown command")
    return {"state": "enforcing"}


async def ask_raw(run_dir: Path, line: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(run_dir / control.SOCKET_NAME)
    writer.write(line)
    writer.write_eof()
    reply = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return reply


def serve_and(run_dir: Path, *lines: bytes) -> list[bytes]:
    async def ask_all() -> list[bytes]:
        async with control.serve(run_dir, answer):
            return [await ask_raw(run_dir, line) for line in lines]

    return asyncio.run(ask_all())


def test_a_request_gets_its_answer(tmp_path: Path) -> None:
    async def ask() -> dict[str, Any]:
        async with control.serve(tmp_path, answer):
            return await asyncio.to_thread(control.request, tmp_path, {"command": "status"})

    assert asyncio.run(ask()) == {"state": "enforcing"}


@pytest.mark.parametrize(
    "line",
    [b"\n", b"{}\n", b"[]\n", b"{\n", b"\xff\n", b"[" * 60_000 + b"\n", b'{"command": "stop"}\n', b"x" * 200_000, b""],
    ids=["empty", "nothing", "list", "cut", "not-utf8", "deep", "unknown", "huge", "eof"],
)
def test_a_wrong_request_is_refused_and_the_next_one_is_served(tmp_path: Path, line: bytes) -> None:
    wrong, right = serve_and(tmp_path, line, b'{"command": "status"}\n')
    assert "error" in json.loads(wrong)
    assert json.loads(right) == {"state": "enforcing"}


def test_the_refusal_reaches_the_asker_as_an_error(tmp_path: Path) -> None:
    async def ask() -> None:
        async with control.serve(tmp_path, answer):
            with pytest.raises(control.RequestError, match="unknown command"):
                await asyncio.to_thread(control.request, tmp_path, {"command": "x"})

    asyncio.run(ask())


def test_only_the_owner_may_open_the_socket(tmp_path: Path) -> None:
    async def mode() -> int:
        async with control.serve(tmp_path, answer):
            return stat.S_IMODE((tmp_path / control.SOCKET_NAME).stat().st_mode)

    assert asyncio.run(mode()) == 0o600


def test_without_a_daemon_the_asker_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(control.NotRunningError):
        control.request(tmp_path, {"command": "status"})


def test_a_killed_daemons_socket_counts_as_not_running_and_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / control.SOCKET_NAME))
    with pytest.raises(control.NotRunningError):
        control.request(tmp_path, {"command": "status"})
    (reply,) = serve_and(tmp_path, b'{"command": "status"}\n')
    assert json.loads(reply) == {"state": "enforcing"}


def test_a_second_daemon_is_refused_and_told_who_holds_the_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with control.hold(run_dir):
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        with pytest.raises(control.AlreadyRunningError, match=r"process \d+"), control.hold(run_dir):
            pass
    with control.hold(run_dir):
        pass


def test_a_lock_that_is_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / control.LOCK_NAME).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), control.hold(run_dir):
        pass
    assert victim.read_text() == "precious"
