"""Network namespaces without names: they live as long as this process, so that nothing is left after a crash."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000

libc = ctypes.CDLL(None, use_errno=True)


def checked(status: int) -> int:
    """The result of a C function, or its error."""
    if status < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return status


@contextlib.contextmanager
def inside(namespace: int) -> Iterator[None]:
    """This thread, and what it starts, in the network namespace behind a descriptor."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    checked(libc.setns(namespace, _CLONE_NEWNET))
    try:
        yield
    finally:
        checked(libc.setns(before, _CLONE_NEWNET))
        os.close(before)


@contextlib.contextmanager
def new_namespace() -> Iterator[int]:
    """A descriptor of a new network namespace, lo up."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    checked(libc.unshare(_CLONE_NEWNET))
    try:
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        ip("link set lo up")
    finally:
        checked(libc.setns(before, _CLONE_NEWNET))
        os.close(before)
    try:
        yield namespace
    finally:
        os.close(namespace)


def run(command: str) -> subprocess.CompletedProcess[str]:
    """A command without quoting; whether it succeeds is the caller's to look at."""
    return subprocess.run(command.split(), capture_output=True, text=True, check=False)


def ip(command: str) -> None:
    """One command of ip(8), or several separated by semicolons; they must succeed."""
    for line in command.split(";"):
        finished = run(f"ip {line}")
        assert finished.returncode == 0, f"ip {line}: {finished.stderr}"


def path_of(namespace: int) -> str:
    """How iproute2 finds it."""
    return f"/proc/{os.getpid()}/fd/{namespace}"
