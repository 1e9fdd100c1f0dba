"""Whether refused connections that are redirected reach the responder: another table's input chain may drop them, and
then clients hang. So these are reset instead.

Firewalls also drop whatever is new for a moment while they load their rules. So what was given up is tried again: after
five seconds, and after twice as long each time that it fails again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from enforcer.ruleset import Redirected

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 5, 3600

# Connections that have entered this host's input, and those of them that no other chain has dropped.
Readings = Mapping[Redirected, tuple[int, int]]


class Redirects:
    """Which redirects are in force, by what the table's counters say of them; `now` is any clock in seconds."""

    def __init__(self) -> None:
        self.in_force = set(Redirected)
        self._lost: dict[Redirected, int] = {}
        self._wait_seconds: dict[Redirected, float] = {}
        self._tried_at: dict[Redirected, float] = {}  # when what was given up was, or will be, taken up again

    def take_up(self, readings: Readings) -> None:
        """All of them: the operator may have let them in. What was lost until now is."""
        self._lost = _lost(readings)
        self.in_force = set(Redirected)
        self._wait_seconds.clear()
        self._tried_at.clear()

    def table_written(self, readings: Readings) -> None:
        """What the counters say of a new table."""
        self._lost = _lost(readings)

    def tried_again(self, now: float) -> frozenset[Redirected]:
        """What is in force once more from now on."""
        due = frozenset(way for way, at in self._tried_at.items() if way not in self.in_force and now >= at)
        self.in_force |= due
        return due

    def given_up(self, read: Callable[[], Readings], now: float) -> frozenset[Redirected]:
        """What is not in force any more, since something has dropped it since the last look."""
        before, lost = self._lost, _lost(read())
        if lost.keys() == before.keys() and any(lost[way] > before[way] for way in self.in_force & lost.keys()):
            # A packet may have come between the readings of its two counters; what was dropped stays so.
            again = _lost(read())
            lost = {way: min(lost[way], again[way]) for way in lost.keys() & again.keys()}
        if not lost.keys() == before.keys() == set(Redirected):
            self._lost = lost  # somebody has just taken counters away, or they have been put back
            return frozenset()
        self._lost = {way: max(lost[way], before[way]) for way in lost}
        dropped = frozenset(way for way in self.in_force if lost[way] > before[way])
        self.in_force -= dropped
        for way in dropped:
            has_held = way not in self._tried_at or now - self._tried_at[way] >= LONGEST_WAIT_SECONDS
            wait = FIRST_WAIT_SECONDS if has_held else min(2 * self._wait_seconds[way], LONGEST_WAIT_SECONDS)
            self._wait_seconds[way] = wait
            self._tried_at[way] = now + wait
        return dropped

    def wait_seconds(self, ways: frozenset[Redirected]) -> float:
        """How long it takes until the first of these is tried again."""
        return min(self._wait_seconds[way] for way in ways)


def _lost(readings: Readings) -> dict[Redirected, int]:
    return {way: entered - reached for way, (entered, reached) in readings.items()}
