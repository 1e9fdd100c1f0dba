"""The real programs, loaded every way they are shipped."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer import bpf
from enforcer.bpf import Loader
from tests.kernel.harness import Harness


@contextlib.contextmanager
def loaded(build: str, directory: Path) -> Iterator[bpf.KernelState]:
    """The programs of one build, pinned on a private bpffs while the context lasts."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    inputs = None
    if build == "legacy":
        inputs = bpf.build_inputs(Loader.LIBBPF)[1:] * 2
    path = directory / "bpffs"
    assert bpf.ensure_bpffs(path)
    try:
        report = bpf.load(path, loader=Loader.BCC if build == "bcc" else Loader.LIBBPF, inputs=inputs)
        with bpf.KernelState(report) as state:
            yield state
    finally:
        bpf.remove(path, None)
        subprocess.run(["umount", path], check=True)


@pytest.fixture(scope="session", params=["libbpf", "legacy", "bcc"])
def state(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bpf.KernelState]:
    with loaded(request.param, tmp_path_factory.mktemp(request.param)) as kernel_state:
        yield kernel_state


@pytest.fixture(scope="session")
def _harness(state: bpf.KernelState) -> Iterator[Harness]:
    harness = Harness(state)
    with harness.events_reader, harness.endings_reader:
        yield harness


@pytest.fixture
def harness(_harness: Harness) -> Harness:
    _harness.reset()
    return _harness
