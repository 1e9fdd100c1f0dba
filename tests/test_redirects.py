"""Redirects that other chains drop: given up at once, and tried again less and less often."""

from __future__ import annotations

from enforcer.redirects import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, Redirects
from enforcer.ruleset import Redirected

BOTH = frozenset(Redirected)
FORWARDED = frozenset({Redirected.FORWARDED})
NOTHING: frozenset[Redirected] = frozenset()


class Counters:
    """The table's counters, and a clock."""

    def __init__(self) -> None:
        self.entered = dict.fromkeys(Redirected, 0)
        self.reached = dict.fromkeys(Redirected, 0)
        self.now = 1000.0
        self.present = True
        self.redirects = Redirects()
        self.redirects.table_written(self.read())

    def read(self) -> dict[Redirected, tuple[int, int]]:
        return {way: (self.entered[way], self.reached[way]) for way in Redirected} if self.present else {}

    def connect(self, *, dropped: frozenset[Redirected] = NOTHING) -> frozenset[Redirected]:
        """One connection each way, and a look; what was given up by it."""
        for way in Redirected:
            self.entered[way] += 1
            self.reached[way] += way not in dropped
        return self.redirects.given_up(self.read, self.now)

    def wait(self, seconds: float) -> frozenset[Redirected]:
        """What is tried again then."""
        self.now += seconds
        return self.redirects.tried_again(self.now)


def test_what_arrives_stays_in_force() -> None:
    counters = Counters()
    assert counters.connect() == NOTHING
    assert counters.redirects.in_force == BOTH


def test_what_is_dropped_is_given_up_and_the_other_way_is_not() -> None:
    counters = Counters()
    assert counters.connect(dropped=FORWARDED) == FORWARDED
    assert counters.redirects.in_force == BOTH - FORWARDED
    assert counters.connect(dropped=FORWARDED) == NOTHING  # known


def test_packet_between_the_readings_of_two_counters_is_not_lost() -> None:
    counters = Counters()
    readings = [dict.fromkeys(Redirected, (1, 0)), dict.fromkeys(Redirected, (1, 1))]
    assert counters.redirects.given_up(lambda: readings.pop(0), counters.now) == NOTHING
    assert counters.redirects.in_force == BOTH


def test_what_was_dropped_for_a_moment_is_back_after_the_first_wait() -> None:
    counters = Counters()
    counters.connect(dropped=FORWARDED)
    assert counters.wait(FIRST_WAIT_SECONDS - 1) == NOTHING
    assert counters.wait(1) == FORWARDED
    assert counters.connect() == NOTHING
    assert counters.redirects.in_force == BOTH


def test_what_goes_on_being_dropped_is_tried_less_and_less_often() -> None:
    counters = Counters()
    counters.connect(dropped=FORWARDED)
    waits = []
    for _ in range(12):
        waits.append(counters.redirects.wait_seconds(FORWARDED))
        assert counters.wait(waits[-1]) == FORWARDED
        assert counters.connect(dropped=FORWARDED) == FORWARDED
    assert waits[:3] == [FIRST_WAIT_SECONDS, 2 * FIRST_WAIT_SECONDS, 4 * FIRST_WAIT_SECONDS]
    assert waits[-1] == LONGEST_WAIT_SECONDS


def test_what_has_held_for_long_is_given_the_first_wait_again() -> None:
    counters = Counters()
    for _ in range(2):
        counters.connect(dropped=BOTH)
        counters.wait(counters.redirects.wait_seconds(BOTH))
    counters.wait(LONGEST_WAIT_SECONDS)
    assert counters.connect(dropped=BOTH) == BOTH
    assert counters.redirects.wait_seconds(BOTH) == FIRST_WAIT_SECONDS


def test_operator_has_everything_tried_at_once() -> None:
    counters = Counters()
    counters.connect(dropped=BOTH)
    counters.entered[Redirected.LOCAL] += 1  # dropped since the last look
    counters.redirects.take_up(counters.read())
    assert counters.redirects.given_up(counters.read, counters.now) == NOTHING
    assert counters.redirects.in_force == BOTH
    assert counters.connect(dropped=BOTH) == BOTH
    assert counters.redirects.wait_seconds(BOTH) == FIRST_WAIT_SECONDS


def test_counters_that_are_gone_and_back_tell_nothing() -> None:
    counters = Counters()
    counters.connect(dropped=FORWARDED)
    counters.redirects.take_up(counters.read())
    for present in (False, False, True):
        counters.present = present
        assert counters.connect(dropped=FORWARDED) == NOTHING
    assert counters.connect(dropped=FORWARDED) == FORWARDED
