"""The Debian that is booted: by debootstrap, with systemd and what the package's control file depends on."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from tests.vm.archive import CACHE, debian_mirror, made_once, ubuntu_mirror

ROOT = Path(__file__).parents[2]
CONTROL = ROOT / "packaging/debian/control"

_SUITE = os.environ.get("BOOTED_SUITE", "bookworm")  # trixie, or noble
# iproute2 and nftables for the tests. debootstrap does not look through what python3-cryptography calls its cffi.
_PACKAGES = ("iproute2", "nftables", "python3-cffi-backend", "systemd-sysv")
_LEFT_OUT = ("usr/share/doc", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists")
_UNUSED_SECONDS = 7 * 86_400


def depends() -> list[str]:
    """Names of the packages that ours depends on."""
    (line,) = re.findall(r"^Depends: (.*)$", CONTROL.read_text(), re.MULTILINE)
    return [dependency.split()[0] for dependency in line.split(",")]


def root() -> Path:
    """The tree, made if it is not there yet (a minute or two, root, network). Never written to: it is a lower layer."""
    packages = ",".join([*_PACKAGES, *depends()])
    key = hashlib.sha256(repr((_SUITE, packages, _LEFT_OUT, inspect.getsource(_make))).encode()).hexdigest()[:16]
    path = CACHE.parent / "booted" / f"root-{key}"
    with made_once(path) as place:
        if place is not None:
            _make(place, packages)
            for other in path.parent.glob("root-*"):
                if other != path and time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                    shutil.rmtree(other)
    return path


def _make(place: Path, packages: str) -> None:
    # In a mount namespace: what debootstrap mounts ends with it, however it ends.
    command = ["unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={packages}"]
    source: list[str | Path] = [_SUITE, place, debian_mirror()]
    if _SUITE == "noble":
        command.append("--components=main,universe")
        source = [
            _SUITE,
            place,
            ubuntu_mirror(),
            "/usr/share/debootstrap/scripts/gutsy",
        ]  # serves all
    done = subprocess.run(
        [*command, *source],
        check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"debootstrap: {done.stdout[-2000:]}")
    for name in _LEFT_OUT:
        shutil.rmtree(place / name)
        (place / name).mkdir()
    (place / "etc/resolv.conf").unlink(missing_ok=True)  # debootstrap leaves the machine's
