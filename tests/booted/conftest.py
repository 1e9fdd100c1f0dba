"""One guest and two packages of this checkout for all tests here, which go on where the one before ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.booted import image
from tests.booted.guest import Guest, World, new_guest, unable


@dataclass(frozen=True, slots=True)
class Booted:
    """What a test has in hand."""

    world: World
    guest: Guest
    first: str  # path of a package in the guest
    second: str  # of a newer version, with another build of the BPF programs


def _with_other_programs(package: Path) -> None:
    """The same BPF programs in files that differ, which is another build to the daemon."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["dpkg-deb", "--raw-extract", package, directory], check=True)
        for compiled in Path(directory, "usr/lib/registry-enforcer/enforcer/objects").glob("*.o"):
            compiled.write_bytes(compiled.read_bytes() + b"\0")
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", directory, package], check=True)


@pytest.fixture(scope="package")
def booted() -> Iterator[Booted]:
    if why_not := unable():
        pytest.skip(why_not)
    with (
        tempfile.TemporaryDirectory(prefix="registry-enforcer-booted-") as directory,
        new_guest(Path(directory)) as (world, guest),
    ):
        paths = []
        for version in ("0.0.1-1", "0.0.1-2"):
            subprocess.run(["tools/deb.sh"], cwd=image.ROOT, env={**os.environ, "VERSION": version}, check=True)
            made = image.ROOT / f"dist/registry-enforcer_{version}_all.deb"
            if version == "0.0.1-2":
                _with_other_programs(made)
            paths.append(f"/root/{made.name}")
            shutil.move(made, guest.root / "root")
        guest.boot()
        yield Booted(world, guest, *paths)
