"""The real program, whose handles on the world outside kill it, or refuse, at the step that a test has ordered.

    python tests/faults/injected.py DIRECTORY run --policy ...

A step is a call that changes something outside. Each leaves a line in DIRECTORY/steps; DIRECTORY/orders says what is to
happen at which, is read at the start and at SIGUSR1, and steps count from then on.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from enforcer import bpf, cli, daemon, kernel_abi, learned, netlink, nft, state

_Handle = TypeVar("_Handle")

# Of the handles; what only reads is no step.
_STEPS = {"apply", "update", "add", "update_many", "delete", "replace_all", "attach", "detach", "save"}


@dataclass(frozen=True, slots=True)
class Orders:
    """What a test wants; the numbers count steps from 1, 0 is never."""

    kill_before: int = 0
    refuse: str = ""  # the beginning of the steps' names, as in DIRECTORY/steps
    refuse_times: int = 0
    refuse_seconds: float = 0.0
    starve_events: int = 0  # so many find no memory when they are taken out of the ring; no steps
    clock_seconds: float = 0.0  # what the wall clock is wrong by
    save_seconds: float = daemon.SAVE_SECONDS
    floor_seconds: int = kernel_abi.LIFETIME_FLOOR_SECONDS

    def write(self, directory: Path) -> None:
        """For the program to read."""
        (directory / "orders.new").write_text(json.dumps(asdict(self)))
        (directory / "orders.new").replace(directory / "orders")


class _Steps:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._trace = os.open(directory / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._wall_clock = time.time
        time.time = lambda: self._wall_clock() + self.orders.clock_seconds
        self._fsync = os.fsync  # of the state file: before it, and before its renaming, nothing is there
        self._copied = ctypes.string_at  # each event, and nothing else of this program
        ctypes.string_at = self._copy_event
        self.heed()
        signal.signal(signal.SIGUSR1, lambda *_: self.heed())

    def heed(self) -> None:
        """Read the orders."""
        self.orders = Orders(**json.loads((self._directory / "orders").read_text()))
        self._number = 0
        self._refused = self._starved = 0
        self._refusing_until = time.monotonic() + self.orders.refuse_seconds
        daemon.SAVE_SECONDS = self.orders.save_seconds
        os.ftruncate(self._trace, 0)
        (self._directory / "orders").rename(self._directory / "heeded")

    def _copy_event(self, ptr: Any, size: int = -1) -> bytes:
        if self._starved < self.orders.starve_events:
            self._starved += 1
            raise MemoryError
        return self._copied(ptr, size)

    def take(self, name: str, action: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """One step."""
        self._number += 1
        at_last = self._number == self.orders.kill_before  # new orders may come within the next line
        os.write(self._trace, f"{name}\n".encode())
        if at_last:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.orders.refuse and name.startswith(self.orders.refuse):
            self._refused += 1
            if self._refused <= self.orders.refuse_times or time.monotonic() < self._refusing_until:
                raise _refusal(name)
        return action(*arguments, **named)


def _refusal(name: str) -> Exception:
    """As the kernel would refuse this step for want of memory."""
    said = os.strerror(errno.ENOMEM)
    if name.startswith("nftables"):
        return nft.NftError(f"Error: Could not process rule: {said}")
    if name.startswith("links"):
        return netlink.NetlinkError(errno.ENOMEM, said)
    if name.startswith("state"):
        return state.StateError(said)
    return bpf.BpfError(said)


class _Watched:
    """Stands before a handle, and is of its class to whoever asks."""

    def __init__(self, real: Any, name: str, steps: _Steps) -> None:
        self._real, self._name, self._steps = real, name, steps
        if isinstance(real, bpf.KernelState):
            self.maps = {key: _Watched(each, f"map {key}", steps) for key, each in real.maps.items()}

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance asks
        return type(self._real)

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._real, attribute)
        if attribute in _STEPS and callable(value):
            return functools.partial(self._steps.take, f"{self._name}.{attribute}", value)
        return value


_NAMES = {nft.Nft: "nftables", netlink.Netlink: "links", bpf.KernelState: "bpf", state.StateFile: "state"}


def main(directory: Path) -> int:
    """The command of the arguments, with orders."""
    steps = _Steps(directory)

    def wrap(handle: _Handle, /) -> _Handle:
        watched: Any = _Watched(handle, _NAMES[type(handle)], steps)
        return watched  # type: ignore[no-any-return] # it is whatever it is taken for

    daemon.run = functools.partial(daemon.run, wrap=wrap)
    for module, name in ((bpf, "load"), (bpf, "attach_cgroup"), (bpf, "pin"), (os, "fsync"), (os, "replace")):
        setattr(module, name, functools.partial(steps.take, f"{module.__name__}.{name}", getattr(module, name)))
    changed = {"LIFETIME_FLOOR_SECONDS": steps.orders.floor_seconds}
    if steps.orders.floor_seconds < kernel_abi.REFRESH_MARGIN_SECONDS:
        changed["REFRESH_MARGIN_SECONDS"] = 1
    for module, (name, value) in itertools.product((kernel_abi, learned), changed.items()):
        setattr(module, name, value)
    return cli.main()


if __name__ == "__main__":
    where = Path(sys.argv.pop(1))
    sys.exit(main(where))
