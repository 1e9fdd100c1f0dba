"""The lab itself: what a crash leaves is found by name and removed; what is alive is left alone."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.lab.lab import Lab, cgroup_root, remove_leftovers

pytestmark = [pytest.mark.root, pytest.mark.lab]

_ROOT = Path(__file__).parents[2]
_CRASHING = """
import os, sys, time
from tests.lab.lab import Lab
with Lab() as lab:
    lab.spawn("host", ["sleep", "600"], "sleep")
    (lab.bpffs / "pins" / "below").mkdir(parents=True)
    print(lab.name, flush=True)
    time.sleep(600)
"""


def _traces(name: str) -> list[str]:
    namespaces = [path.name for path in Path("/run/netns").glob(f"{name}-*")]
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if name in line]
    return [
        *namespaces,
        *mounts,
        *map(str, cgroup_root().glob(name)),
        *map(str, Path(tempfile.gettempdir()).glob(name)),
    ]


def test_what_a_killed_lab_leaves_is_removed_by_the_next_and_a_living_lab_is_not() -> None:
    with (
        Lab() as living,
        subprocess.Popen([sys.executable, "-c", _CRASHING], cwd=_ROOT, stdout=subprocess.PIPE, text=True) as crashing,
    ):
        assert crashing.stdout is not None
        name = crashing.stdout.readline().strip()
        crashing.kill()
        crashing.wait()
        assert len(_traces(name)) >= 6
        remove_leftovers()
        assert _traces(name) == []
        assert living.ct.attempt("198.18.0.1").refused  # nobody listens, but the packets still go there and back
    assert _traces(living.name) == []
