"""What systemd is told (sd_notify(3)): ready, reloading, stopping, still alive, and one line of status.

A message is one datagram to the socket that NOTIFY_SOCKET names. Without it, nobody has asked and nothing is sent. The
variables leave the environment, so that no child speaks in the daemon's name.

Whoever calls `alive` must be what the watchdog is to watch: the daemon calls it from its event loop, so a loop that
hangs is killed and started again, while the table goes on refusing.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping
from types import TracebackType
from typing import Self

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_SEND_SECONDS = 1.0  # systemd reads at once; one that is being replaced does not, and must not hang the loop
_ALIVES_A_DEADLINE = 3  # two may come late

log = logging.getLogger("registry-enforcer")


class Supervisor:
    """Whoever started this daemon, as far as it wants to be told. Nothing raises: the watchdog sees what is lost.

    A context manager: it keeps one socket, because a watchdog that went hungry for want of a descriptor would end a
    daemon that is well.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        address, deadline, watched = (environment.pop(name, "") for name in _VARIABLES)
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._failed = False
        is_for_us = watched in ("", str(os.getpid()))
        # How often `alive` is to be called; None: nobody watches.
        self.alive_every_seconds: float | None = None
        if address and is_for_us and deadline.isascii() and deadline.isdigit() and int(deadline):
            self.alive_every_seconds = int(deadline) / 1_000_000 / _ALIVES_A_DEADLINE

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(_SEND_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def ready(self, status: str) -> None:
        """The start, or a reload, is over."""
        self._tell("READY=1", _status(status))

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The end has begun."""
        self._tell("STOPPING=1", _status("stopping; what is enforced stays in force"))

    def alive(self) -> None:
        """The event loop goes round."""
        self._tell("WATCHDOG=1")

    def _tell(self, *assignments: str) -> None:
        if not self._address:
            return
        try:
            self._socket.sendto("\n".join(assignments).encode(errors="replace"), self._address)
        except OSError as error:
            if not self._failed:
                log.warning("systemd cannot be told %s: %s", assignments[0], error.strerror or error)
            self._failed = True
        else:
            self._failed = False


def _status(text: str) -> str:
    """One assignment, whatever the text has in it: another line would be another assignment."""
    return "STATUS=" + " ".join(text.split())
