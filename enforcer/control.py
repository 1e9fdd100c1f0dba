"""The control socket: how `status` and `explain` ask the running daemon; and that there is one daemon only.

One JSON object in, one out, each on a line, of at most MAX_REQUEST_BYTES in, then the connection ends. Root alone asks:
the answers name what each user tried. The run directory says so, the socket's mode says so, and who has got past both
(an inherited directory, a chmod that was meant well) is asked for its credentials and told so.

A lock file keeps a run directory for one daemon, a name among the abstract sockets keeps a network namespace for one:
WSL 2's distributions have a /run each and share one network, so no file would tell the second of the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from enforcer import trusted_files
from enforcer.bounds import Room

MAX_REQUEST_BYTES = 65_536
REQUEST_DEADLINE_SECONDS = 5.0
MAX_ASKERS = 32  # at a time; the next ones are told so at once
SOCKET_NAME = "control.sock"
LOCK_NAME = "lock"
# An abstract name (unix(7)) belongs to the network namespace, is seen from all its mount and pid namespaces, and ends
# with the last process that holds it, however that ends.
NAMESPACE_LOCK = "\0registry-enforcer"
_BACKLOG = 4_096  # nobody accepts: each who asks for the holder stays in the queue
_LOCK_ATTEMPTS = 3  # a holder may end, or may have bound and not listened yet
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid

log = logging.getLogger("registry-enforcer")

Answer = dict[str, Any]
Handler = Callable[[Mapping[str, Any]], Answer]


class NotRunningError(Exception):
    """No daemon serves this run directory."""


class RunDirectoryError(Exception):
    """The run directory cannot be used; the message says why, and what to do."""


class AlreadyRunningError(Exception):
    """Another daemon holds this run directory or network namespace; the message says which, and what to do."""


class RequestError(Exception):
    """The daemon refused a request; the message says why."""


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Be the only daemon of `run_dir` (made if missing, mode 0700) and of this network namespace.

    AlreadyRunningError if there is another one, RunDirectoryError if others could write there.
    """
    try:
        with trusted_files.directory(run_dir, make=True) as parent:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(LOCK_NAME, flags, 0o600, dir_fd=parent)
    except trusted_files.UntrustedError as error:
        raise RunDirectoryError(f"--run-dir {run_dir}: {error}") from None
    except OSError as error:
        raise RunDirectoryError(
            f"--run-dir {run_dir} cannot be used: {error.strerror}; name a directory that root can make"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise AlreadyRunningError(f"process {owner} already enforces with --run-dir {run_dir}") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        with _hold_network_namespace():
            yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _hold_network_namespace() -> Iterator[None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
        for _ in range(_LOCK_ATTEMPTS):
            try:
                lock.bind(NAMESPACE_LOCK)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                lock.listen(_BACKLOG)
                break
            if (holder := _lock_holder()) is not None:
                raise AlreadyRunningError(_held_by(holder))
        else:
            # Anybody may bind an abstract name, a container on the host's network among them. It must not be able to
            # keep enforcement away, so only a holder who could be a daemon counts.
            log.warning(
                "somebody who is not root, or is in a container, holds the lock of this network namespace; "
                "enforcing without it"
            )
        yield


def _lock_holder() -> int | None:
    """Process id of the daemon that holds this network namespace, 0 if it is out of sight; None: no daemon.

    Its credentials are those it had when it began to listen, in the numbers of our own namespaces. Out of sight is who
    is in a pid namespace beside ours, as WSL's distributions are. Who is in one below ours is in a container.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)  # a full queue would block, and says nothing
        try:
            asking.connect(NAMESPACE_LOCK)
        except (ConnectionRefusedError, BlockingIOError):
            return None
        pid, uid, _ = _UCRED.unpack(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid not in (0, os.geteuid()) or (pid and not _in_our_pid_namespace(pid)):
        return None
    return int(pid)


def _in_our_pid_namespace(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/ns/pid").samefile("/proc/self/ns/pid")
    except OSError:
        return True  # ended, or not ours to look at: a daemon until it lets go


def _held_by(pid: int) -> str:
    if pid:
        return f"process {pid} already enforces in this network namespace; stop it, or use it with its own --run-dir"
    return (
        "another process already enforces in this network namespace, out of sight in another pid namespace, in WSL 2 "
        "that of another distribution (wsl.exe --list --running); one is enough, and restricts all of them; stop it "
        "there to have it here"
    )


@contextlib.asynccontextmanager
async def serve(run_dir: Path, handler: Handler, askers: Room | None = None) -> AsyncIterator[None]:
    """Answer requests with `handler`, whose ValueError becomes an error for the asker, until the context ends.

    `askers` counts those who ask. RunDirectoryError if there is no place for the socket.
    """
    askers = askers or Room(MAX_ASKERS)
    path = run_dir / SOCKET_NAME
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # a killed daemon's; the lock says that it is nobody's now
        listener.bind(str(path))
        path.chmod(0o600)
    except OSError as error:
        listener.close()
        why = error.strerror or str(error)  # a path too long for a socket has no number
        raise RunDirectoryError(
            f"{path} cannot be made: {why}; remove what is there, or name another --run-dir"
        ) from None

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Whatever the asker does wrong is its own fault: it is told, and nobody else notices.
        askers.held += 1
        writer.transport.set_write_buffer_limits(high=0)  # drained is: with the kernel, and may be closed
        reply: Answer
        try:
            try:
                if askers.held > askers.limit:
                    askers.turned_away += 1
                    raise ValueError(f"{askers.limit} others are asking; ask again in a moment")
                if (uid := _peer_uid(writer)) not in (0, os.geteuid()):
                    raise ValueError(f"user {uid} may not ask; run this as root")
                async with asyncio.timeout(REQUEST_DEADLINE_SECONDS):
                    line = await reader.readuntil(b"\n")
                reply = handler(parse_request(line))
            except (ValueError, asyncio.LimitOverrunError, asyncio.IncompleteReadError) as error:
                reply = {"error": str(error)}
            # A deadline of its own: the handler may have taken longer, as a reload of many names does.
            async with asyncio.timeout(REQUEST_DEADLINE_SECONDS):
                writer.write(json.dumps(reply).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, ConnectionError):
            pass
        finally:
            askers.held -= 1
            writer.transport.abort()

    server = await asyncio.start_unix_server(answer, sock=listener, limit=MAX_REQUEST_BYTES)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def parse_request(line: bytes) -> Mapping[str, Any]:
    """The JSON object of one line; ValueError, and nothing else, if it is none."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("lists nested without end") from None
    if not isinstance(message, dict):
        raise ValueError("a request is a JSON object")
    return message


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(peer)
    return int(uid)


def request(run_dir: Path, message: Mapping[str, Any], deadline_seconds: float = REQUEST_DEADLINE_SECONDS) -> Answer:
    """Ask the daemon of `run_dir`; NotRunningError if there is none, RequestError if it refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(deadline_seconds)
        try:
            client.connect(str(run_dir / SOCKET_NAME))
            # What answers is shown to whoever asks, often root, as the truth about this host.
            _, uid, _ = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            if uid not in (0, os.geteuid()):
                raise RequestError(f"{run_dir / SOCKET_NAME} is served by user {uid} and not by root: not believed")
            with contextlib.suppress(BrokenPipeError):  # answered already, with why it is not read
                client.sendall(json.dumps(message).encode() + b"\n")
            with client.makefile("rb") as stream:
                line = stream.readline()
        except (FileNotFoundError, ConnectionError) as error:
            raise NotRunningError(f"no daemon answers at {run_dir / SOCKET_NAME}: {error.strerror}") from None
        except PermissionError:
            raise RequestError(f"{run_dir / SOCKET_NAME}: permission denied; run this as root") from None
        except TimeoutError:
            raise RequestError(f"the daemon did not answer within {deadline_seconds:.0f} s") from None
    if not line:
        raise RequestError("the daemon closed the connection; see its log")
    reply: Answer = json.loads(line)
    if "error" in reply:
        raise RequestError(reply["error"])
    return reply
