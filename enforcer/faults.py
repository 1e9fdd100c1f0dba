"""Faults that are survived: the kernel or a disk refuses for a moment what it takes otherwise.

Nothing opens meanwhile, since what has no permission is refused without this daemon. So it goes on, tries again every
second, and says so once. What lasts ends it all the same: a daemon that has lost a part of itself is started anew.
"""

from __future__ import annotations

import logging
import time

from enforcer.audit_record import FOLD_SECONDS
from enforcer.metrics import Fault, Metrics

log = logging.getLogger("registry-enforcer")

PATIENCE_SECONDS = 60.0  # with a kernel that refuses every second

_SAID = {
    Fault.NFTABLES: "the kernel refused a change of the nftables table",
    Fault.KERNEL: "the kernel refused what it takes otherwise",
    Fault.LINK_EVENTS: "more links, addresses or routes have changed than the kernel keeps for us",
    Fault.TABLE_EVENTS: "more of nftables has changed than the kernel keeps for us",
    Fault.STATE: "what is learned would be lost in a reboot",
    Fault.CLIENTS: "a client cannot be let in",
}


class Faults:
    """Counts them, and says each once until it is over, or once a minute where they come and go."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._since: dict[Fault, float] = {}
        self._open: set[Fault] = set()  # said, and not yet that it is over
        self._said_at: dict[Fault, float] = {}

    def met(self, what: Fault, detail: object) -> None:
        """It has happened, perhaps again."""
        self._metrics.faults.labels(what.value).inc()
        now = time.monotonic()
        if what not in self._since and now >= self._said_at.get(what, now - FOLD_SECONDS) + FOLD_SECONDS:
            self._said_at[what] = now
            self._open.add(what)
            log.warning("%s: %s", _SAID[what], detail)
        self._since.setdefault(what, now)

    def lasts(self, what: Fault) -> bool:
        """Whether it has been there for longer than anybody should wait."""
        return what in self._since and time.monotonic() > self._since[what] + PATIENCE_SECONDS

    def over(self, what: Fault) -> None:
        """It is over, if it was there at all."""
        self._since.pop(what, None)
        if what in self._open:
            self._open.discard(what)
            if what not in (Fault.LINK_EVENTS, Fault.TABLE_EVENTS):  # which are over at once
                log.info("%s: that is over", _SAID[what])
