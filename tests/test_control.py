"""The control socket: one daemon a run directory and network namespace; an asker that does wrong hurts itself only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from enforcer import control
from enforcer.bounds import Room

OTHER = 65_533
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
HOLDER = """
import contextlib, ctypes, os, signal, sys, time
from pathlib import Path
from enforcer import control
run_dir, name, flags, uid = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
control.NAMESPACE_LOCK = "\\0" + name
if flags:
    assert ctypes.CDLL(None).unshare(flags) == 0
if pid := os.fork():
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
if uid:
    os.setuid(uid)
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent
try:
    with control._hold_network_namespace() if uid else control.hold(run_dir):
        print("held", flush=True)
        time.sleep(60)
except control.AlreadyRunningError as error:
    print(error, flush=True)
"""


@pytest.fixture(autouse=True)
def lock_name(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name of this test's own: other daemons, other test runs, a killed holder may be in this namespace."""
    name = f"registry-enforcer-test-{secrets.token_hex(8)}"
    monkeypatch.setattr(control, "NAMESPACE_LOCK", f"\0{name}")
    return name


def hold_elsewhere(run_dir: Path, name: str, *, flags: int = 0, uid: int = 0) -> subprocess.Popen[str]:
    """A process that takes the locks, in new namespaces or as another user, and says how that went."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir), name, str(flags), str(uid)], stdout=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    """Its next line."""
    assert process.stdout is not None
    return process.stdout.readline()


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    if request.get("command") != "status":
        raise ValueError("unknown command")
    return {"state": "enforcing"}


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


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
    with pytest.raises(control.RunDirectoryError, match="symbolic links"), control.hold(run_dir):
        pass
    assert victim.read_text() == "precious"


def test_a_second_daemon_in_the_network_namespace_is_refused_whatever_its_directory(tmp_path: Path) -> None:
    with control.hold(tmp_path / "one"):
        message = f"process {os.getpid()} .*network namespace"
        with pytest.raises(control.AlreadyRunningError, match=message), control.hold(tmp_path / "two"):
            pass
    with control.hold(tmp_path / "two"):
        pass


@pytest.mark.root
def test_a_daemon_of_another_pid_namespace_is_told_from_a_process_here(tmp_path: Path, lock_name: str) -> None:
    with hold_elsewhere(tmp_path / "one", lock_name, flags=CLONE_NEWPID) as holder:
        assert said(holder) == "held\n"
        with hold_elsewhere(tmp_path / "two", lock_name, flags=CLONE_NEWPID) as second:
            assert "another distribution" in said(second)
        holder.kill()
    deadline = time.monotonic() + 10
    while control._lock_holder() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    # Nothing of a killed daemon is in the way.
    with hold_elsewhere(tmp_path / "two", lock_name, flags=CLONE_NEWPID) as second:
        assert said(second) == "held\n"
        second.kill()


@pytest.mark.root
def test_daemons_of_two_network_namespaces_do_not_see_each_other(tmp_path: Path, lock_name: str) -> None:
    with control.hold(tmp_path / "one"):
        with hold_elsewhere(tmp_path / "two", lock_name, flags=CLONE_NEWNET) as other:
            assert said(other) == "held\n"
            other.kill()
        with hold_elsewhere(tmp_path / "two", lock_name) as neighbour:
            assert "already enforces" in said(neighbour)


@pytest.mark.root
@pytest.mark.parametrize(("flags", "uid"), [(0, 65_534), (CLONE_NEWPID, 0)], ids=["other user", "container's root"])
def test_who_cannot_be_a_daemon_cannot_keep_it_away(
    tmp_path: Path, lock_name: str, caplog: pytest.LogCaptureFixture, flags: int, uid: int
) -> None:
    with hold_elsewhere(tmp_path / "one", lock_name, flags=flags, uid=uid) as stranger:
        assert said(stranger) == "held\n"
        with control.hold(tmp_path / "two"):
            pass
        stranger.kill()
    assert "not root, or is in a container" in caplog.text


def test_name_that_nobody_listens_at_is_no_daemon(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        bound.bind(control.NAMESPACE_LOCK)
        with control.hold(tmp_path / "two"):
            pass
    assert "not root, or is in a container" in caplog.text


# --- who asks, and how -----------------------------------------------------------------------------------------------
@pytest.mark.root
@pytest.mark.parametrize(("owner", "mode"), [(OTHER, 0o700), (0, 0o777), (0, 0o1777)])
def test_a_run_directory_that_others_may_write_is_refused_with_what_to_do(
    tmp_path: Path, owner: int, mode: int
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_dir.chmod(mode)
    os.chown(run_dir, owner, -1)
    with pytest.raises(control.RunDirectoryError, match=r"--run-dir .*; ch(own|mod)"), control.hold(run_dir):
        pass
    assert list(run_dir.iterdir()) == []


def test_a_run_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(control.RunDirectoryError, match="Not a directory; name"), control.hold(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize("name", ["directory", "x" * 120])
def test_a_socket_that_cannot_be_made_is_one_sentence(tmp_path: Path, name: str) -> None:
    run_dir = tmp_path / name
    run_dir.mkdir()
    if name == "directory":
        (run_dir / control.SOCKET_NAME).mkdir()

    async def start() -> None:
        async with control.serve(run_dir, answer):
            pass

    with pytest.raises(control.RunDirectoryError, match=r"cannot be made: .*; remove what is there, or name another"):
        asyncio.run(start())


def test_a_link_in_the_sockets_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / control.SOCKET_NAME).symlink_to(victim)
    (reply,) = serve_and(tmp_path, b'{"command": "status"}\n')
    assert json.loads(reply) == {"state": "enforcing"}
    assert victim.read_text() == "precious"


ASK = """
import json, os, sys
from pathlib import Path
from enforcer import control
os.chdir(sys.argv[1])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
try:
    print(json.dumps(control.request(Path("."), {"command": "status"})))
except control.RequestError as error:
    print(error)
"""


@pytest.mark.root
@pytest.mark.parametrize(
    ("uid", "opened", "said_to_them"),
    [
        (OTHER, False, "permission denied; run this as root"),
        (OTHER, True, f"user {OTHER} may not ask; run this as root"),
        (0, True, '{"state": "enforcing"}'),
    ],
    ids=["another user", "another user whom the modes let through", "root"],
)
def test_root_alone_is_answered(tmp_path: Path, uid: int, opened: bool, said_to_them: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)

    async def ask() -> str:
        async with control.serve(run_dir, answer):
            if opened:
                run_dir.chmod(0o711)
                (run_dir / control.SOCKET_NAME).chmod(0o666)
            asker = await asyncio.create_subprocess_exec(
                sys.executable, "-c", ASK, run_dir, str(uid), stdout=asyncio.subprocess.PIPE
            )
            said, _ = await asker.communicate()
            return said.decode()

    assert said_to_them in asyncio.run(ask())


@pytest.mark.root
def test_what_another_user_serves_is_not_believed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    os.chown(run_dir, OTHER, OTHER)
    code = (
        "import os, socket, sys, time; os.chdir(sys.argv[1]); "
        "os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2])); "
        "s = socket.socket(socket.AF_UNIX); s.bind('control.sock'); s.listen(); print('up', flush=True); "
        'c, _ = s.accept(); c.sendall(b\'{"state": "enforcing"}\\n\'); time.sleep(60)'
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, run_dir, str(OTHER)], stdout=subprocess.PIPE, text=True
    ) as impostor:
        assert said(impostor) == "up\n"
        with pytest.raises(control.RequestError, match=f"served by user {OTHER} and not by root"):
            control.request(run_dir, {"command": "status"})
        impostor.kill()


def test_more_askers_than_there_is_room_for_are_told_and_the_slow_ones_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "REQUEST_DEADLINE_SECONDS", 1.0)

    async def crowd() -> None:
        askers = Room(control.MAX_ASKERS)
        async with control.serve(tmp_path, answer, askers):
            slow = [
                await asyncio.open_unix_connection(tmp_path / control.SOCKET_NAME) for _ in range(control.MAX_ASKERS)
            ]
            for _, writer in slow:
                writer.write(b'{"comm')
            with pytest.raises(control.RequestError, match="others are asking"):
                await asyncio.to_thread(control.request, tmp_path, {"command": "status"})
            assert (askers.held, askers.turned_away) == (control.MAX_ASKERS, 1)
            for reader, writer in slow:
                with contextlib.suppress(ConnectionResetError):  # it had not read all that they said
                    assert await asyncio.wait_for(reader.read(), 10) == b""
                writer.close()
            assert json.loads(await ask_raw(tmp_path, b'{"command": "status"}\n')) == {"state": "enforcing"}
            assert (askers.held, askers.turned_away) == (0, 1)

    asyncio.run(crowd())


# A little more than a socket takes at once, and much more.
@pytest.mark.parametrize("size", [230_000, 260_000, 8_000_000])
def test_a_long_answer_arrives_whole_and_leaves_no_exception_behind(tmp_path: Path, size: int) -> None:
    faults: list[dict[str, Any]] = []

    async def ask() -> dict[str, Any]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        async with control.serve(tmp_path, lambda _: {"learned": "x" * size}):
            reply = await asyncio.to_thread(control.request, tmp_path, {"command": "status"})
            await asyncio.sleep(0.1)
            return reply

    assert len(asyncio.run(ask())["learned"]) == size
    assert faults == []  # any would end the daemon


def test_who_does_not_read_a_long_answer_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_DEADLINE_SECONDS", 0.5)

    async def linger() -> None:
        async with control.serve(tmp_path, lambda _: {"learned": "x" * 8_000_000}):
            before = open_descriptors()
            _, writer = await asyncio.open_unix_connection(tmp_path / control.SOCKET_NAME, limit=1)
            writer.write(b"{}\n")
            await asyncio.sleep(0.1)
            assert open_descriptors() == before + 2
            async with asyncio.timeout(10):
                while open_descriptors() != before + 1:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            writer.close()

    asyncio.run(linger())
