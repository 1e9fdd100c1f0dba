"""The targets over what was found before, over damaged seeds (hypothesis), and some seconds of libFuzzer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import CORPUS, TARGETS, seeds

FUZZ_MINUTES = 0.02


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_stays_mended(name: str) -> None:
    found = list(seeds(name))
    assert found
    for _, data in found:
        TARGETS[name](data)


def test_every_corpus_belongs_to_a_target_and_is_small() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert all(path.stat().st_size < 5_000 for path in CORPUS.glob("*/*"))


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    """A seed with some bytes taken out, put in, changed, or another seed's end."""
    whole = [data for _, data in seeds(name)]
    wire = draw(st.sampled_from(whole))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(wire)))
        gone = draw(st.sampled_from((0, 0, 1, 2, 4, 12, 1_000)))
        put = draw(st.one_of(st.binary(max_size=8), st.sampled_from((b'"', b"[", b"\xc0\x0c", b"\xff" * 4, b"\r\n"))))
        wire = wire[:at] + put + wire[at + gone :]
    if draw(st.booleans()):
        donor = draw(st.sampled_from(whole))
        wire += donor[draw(st.integers(0, len(donor))) :]
    return wire[:4_096]


def _hold(name: str) -> Callable[[], None]:
    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
    @given(damaged(name))
    def hold(data: bytes) -> None:
        TARGETS[name](data)

    return hold


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_seeds_keep_every_promise(name: str) -> None:
    _hold(name)()


@pytest.mark.slow
def test_libfuzzer_finds_nothing_in_a_moment(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("there is no atheris for this Python and machine")
    command = [sys.executable, "-m", "tests.fuzz", "--minutes", str(FUZZ_MINUTES), "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nothing found") == len(TARGETS)
