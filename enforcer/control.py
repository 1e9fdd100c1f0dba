"""The control socket: how `status` and `explain` ask the running daemon.

One JSON object in, one out, each on a line of at most MAX_REQUEST_BYTES, then the connection ends. The socket lies in
the run directory, which only root may enter; its mode says so again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_REQUEST_BYTES = 65_536
REQUEST_DEADLINE_SECONDS = 5.0
SOCKET_NAME = "control.sock"
LOCK_NAME = "lock"

Answer = dict[str, Any]
Handler = Callable[[Mapping[str, Any]], Answer]


class NotRunningError(Exception):
    """No daemon serves this run directory."""


class AlreadyRunningError(Exception):
    """Another daemon holds this run directory; the message names its process."""


class RequestError(Exception):
    """The daemon refused a request; the message says why."""


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Be the only daemon of `run_dir` (made if missing, mode 0700); AlreadyRunningError otherwise."""
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise AlreadyRunningError(f"process {owner} already enforces with --run-dir {run_dir}") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextlib.asynccontextmanager
async def serve(run_dir: Path, handler: Handler) -> AsyncIterator[None]:
    """Answer requests with `handler`, whose ValueError becomes an error for the asker, until the context ends."""
    path = run_dir / SOCKET_NAME
    path.unlink(missing_ok=True)  # a killed daemon's; the lock says that it is nobody's now
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Whatever the asker does wrong is its own fault: it is told, and nobody else notices.
        try:
            async with asyncio.timeout(REQUEST_DEADLINE_SECONDS):
                reply: Answer
                try:
                    message = json.loads(await reader.readuntil(b"\n"))
                    reply = handler(message) if isinstance(message, dict) else {"error": "a request is a JSON object"}
                except (ValueError, RecursionError, asyncio.LimitOverrunError, asyncio.IncompleteReadError) as error:
                    reply = {"error": str(error)}
                writer.write(json.dumps(reply).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, sock=listener, limit=MAX_REQUEST_BYTES)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def request(run_dir: Path, message: Mapping[str, Any]) -> Answer:
    """Ask the daemon of `run_dir`; NotRunningError if there is none, RequestError if it refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(REQUEST_DEADLINE_SECONDS)
        try:
            client.connect(str(run_dir / SOCKET_NAME))
            client.sendall(json.dumps(message).encode() + b"\n")
            with client.makefile("rb") as stream:
                line = stream.readline()
        except (FileNotFoundError, ConnectionError) as error:
            raise NotRunningError(f"no daemon answers at {run_dir / SOCKET_NAME}: {error.strerror}") from None
        except PermissionError:
            raise RequestError(f"{run_dir / SOCKET_NAME}: permission denied; run this as root") from None
        except TimeoutError:
            raise RequestError(f"the daemon did not answer within {REQUEST_DEADLINE_SECONDS:.0f} s") from None
    if not line:
        raise RequestError("the daemon closed the connection; see its log")
    reply: Answer = json.loads(line)
    if "error" in reply:
        raise RequestError(reply["error"])
    return reply
