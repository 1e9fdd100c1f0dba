"""The verdicts of `make soak`, on samples that are made up: each bound holds, and breaks."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.lab.soak import Sample, Traffic, Verdict, measures, verdicts, write_csv

RUN_SECONDS = 3_600
LIMITS = {"map learned": 100, "set learned": 200}


def hour(**changes: int) -> list[Sample]:
    """An hour: a process for ten minutes, and a second one whose last ten minutes differ by `changes`."""
    samples = []
    for at in range(RUN_SECONDS):
        sample = Sample(at, 1 if at < 600 else 2, 60_000 if at < 600 else 80_000, 57, 3)
        if at % 10 == 0:
            sample = replace(sample, sizes={"map learned": 100, "set learned": 20})
        if at >= RUN_SECONDS - 600:
            sample = replace(sample, **{key: getattr(sample, key) + more for key, more in changes.items()})
        samples.append(sample)
    return samples


def traffic(failed: int = 0, passed: int = 0, ended: int = 0, refused: int = 500) -> Traffic:
    return Traffic(10_000, ["n1: timed out"] * failed, refused, passed, {"begins": 0, "ends": ended})


def broken(found: list[Verdict]) -> set[str]:
    return {verdict.what for verdict in found if not verdict.holds}


def judged(samples: list[Sample], met: Traffic | None = None, limits: Mapping[str, int] = LIMITS) -> set[str]:
    return broken(verdicts(samples, limits, met or traffic(), RUN_SECONDS))


def test_what_does_not_grow_holds() -> None:
    assert judged(hour()) == set()
    assert judged(hour(rss_kb=7_900)) == set()
    assert judged(hour(rss_kb=-20_000, descriptors=-1, threads=-1)) == set()


@pytest.mark.parametrize(
    ("changes", "what"), [({"rss_kb": 8_100}, "RSS"), ({"descriptors": 1}, "descriptors"), ({"threads": 1}, "threads")]
)
def test_what_grows_breaks(changes: dict[str, int], what: str) -> None:
    assert judged(hour(**changes)) == {what}


def test_last_process_is_measured_when_it_had_settled() -> None:
    settled, end = measures(hour(), RUN_SECONDS)
    assert {sample.pid for sample in settled + end} == {2}
    assert settled[0].at_seconds == 600 + 300
    assert end[-1].at_seconds == RUN_SECONDS - 1


def test_clients_of_a_moment_are_no_leak() -> None:
    samples = hour()
    samples[-5:] = [replace(sample, descriptors=400) for sample in samples[-5:]]
    assert judged(samples) == set()


def test_size_over_its_limit_breaks_whenever_it_was() -> None:
    samples = hour()
    samples[100] = replace(samples[100], sizes={"map learned": 101, "set learned": 20})
    assert judged(samples) == {"map learned"}


def test_size_that_was_never_seen_does_not_hold() -> None:
    assert judged(hour(), limits=LIMITS | {"set revoked": 9}) == {"set revoked"}


def test_traffic_is_judged() -> None:
    assert judged(hour(), traffic(failed=10)) == set()  # one in a thousand
    assert judged(hour(), traffic(failed=11)) == {"allowed, failing"}
    assert judged(hour(), traffic(passed=1)) == {"refused, passing"}
    assert judged(hour(), traffic(ended=1)) == {"refused, packets outside"}
    assert judged(hour(), traffic(refused=0)) == {"refused, passing"}  # nobody has tried
    assert judged(hour(), Traffic()) == {"allowed, failing", "refused, passing"}


def test_prober_that_nobody_answers_has_reached_nothing() -> None:
    met = Traffic()
    met.add({"reached": 3, "unanswered": 1}, "198.18.1.10", allowed=True)
    met.add({"refused": 3, "unanswered": 1, "reached": 1}, "198.18.66.66", allowed=False)
    assert (met.allowed, met.failed) == (4, ["198.18.1.10: unanswered"])
    assert (met.refused, met.passed) == (5, 1)


def test_csv_has_a_row_a_second(tmp_path: Path) -> None:
    write_csv(tmp_path / "soak.csv", hour()[:11])
    with (tmp_path / "soak.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["seconds", "pid", "rss_kb", "descriptors", "threads", "map learned", "set learned"]
    assert rows[1] == ["0.0", "1", "60000", "57", "3", "100", "20"]
    assert rows[2] == ["1.0", "1", "60000", "57", "3", "", ""]
    assert len(rows) == 12
