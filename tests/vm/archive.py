"""Kernel packages of Debian and Ubuntu, each in one exact version, kept across checkouts.

Debian's come through apt with a configuration of its own, which Debian's keyring checks; Ubuntu's are known by their
SHA-256 alone. The mirrors are those that this machine's apt and debootstrap use. Nothing of the machine's own apt state
is read or changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from tests.vm.kernels import Debian, Kernel, Ubuntu

CACHE = Path(os.environ.get("REGISTRY_ENFORCER_CACHE", "/var/cache/registry-enforcer/vm"))

_DEBIAN_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_DEBOOTSTRAP = Path("/usr/sbin/debootstrap")
_DEBOOTSTRAP_UBUNTU = Path("/usr/share/debootstrap/scripts/gutsy")  # all of Ubuntu's releases are this one
_DOWNLOAD_SECONDS = 300
PAUSES_SECONDS = (5, 15, 45)

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class FetchError(Exception):
    """A package cannot be had; the message says why."""


def patient(fetch: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Tries again while names cannot be resolved, as on any network for a moment; apt retries within seconds."""

    @functools.wraps(fetch)
    def patiently(*arguments: _Parameters.args, **named: _Parameters.kwargs) -> _Result:
        for pause in PAUSES_SECONDS:
            try:
                return fetch(*arguments, **named)
            except FetchError as error:
                if "Temporary failure" not in str(error):
                    raise
                time.sleep(pause)
        return fetch(*arguments, **named)

    return patiently


@dataclass(frozen=True, slots=True)
class Fetched:
    """The packages of one kernel."""

    release: str  # uname -r
    packages: tuple[Path, ...]
    key: str  # names these very packages
    note: str  # empty, or what is not as the table of kernels says


@contextlib.contextmanager
def made_once(path: Path) -> Iterator[Path | None]:
    """Yields where to make `path`, or None if it is there; it gets its name only when it is whole.

    One process makes it, others wait for that. The place is a path that does not exist, beside the final one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
            place = Path(directory, "made")
            yield place
            place.rename(path)


def fetch(kernel: Kernel) -> Fetched:
    """The kernel's packages, from the cache where they are there. Raises FetchError."""
    wanted = _names(kernel, kernel.release, kernel.version)
    if isinstance(kernel.origin, Ubuntu):
        origin = kernel.origin
        paths = [_kept(name, digest, functools.partial(_from_ubuntu, origin, name)) for name, digest in wanted.items()]
        return Fetched(kernel.release, tuple(paths), _key(wanted), "")
    if all((_packages() / name).exists() for name in wanted):
        return Fetched(kernel.release, tuple(_packages() / name for name in wanted), _key(wanted), "")
    with _private_apt(kernel.origin.suite) as apt:
        release, version = _served(kernel, kernel.origin, apt)
        names = _names(kernel, release, version)
        pinned = names == wanted
        paths = [
            _kept(name, names[name] if pinned else "", functools.partial(apt.download, f"{stem}-{release}={version}"))
            for name, stem in zip(names, kernel.packages, strict=True)
        ]
    note = "" if pinned else f"{kernel.release} {kernel.version} is not served any more: this is {release} {version}"
    return Fetched(release, tuple(paths), _key(names), note)


def unpacked(suite: str, *packages: str) -> Path:
    """What these packages of Debian hold, one tree of all. Nothing is installed, so nothing of it starts on this host.

    Their versions are in the file `versions` there. What they depend on is not. Raises FetchError.
    """
    key = hashlib.sha256(repr((suite, packages)).encode()).hexdigest()[:16]
    path = CACHE.parent / "unpacked" / key
    with made_once(path) as place, contextlib.ExitStack() as stack:
        if place is None:
            return path
        place.mkdir()
        (place / "usr").mkdir()
        for name in ("bin", "lib", "sbin"):  # packages of before the merge of /usr
            (place / "usr" / name).mkdir()
            (place / name).symlink_to(f"usr/{name}")
        apt = stack.enter_context(_private_apt(suite))
        for package in packages:
            downloaded = place / "downloaded.deb"
            apt.download(package, downloaded)
            _unpack(downloaded, place)
            shown = subprocess.run(["dpkg-deb", "--show", downloaded], check=True, capture_output=True, text=True)
            with (place / "versions").open("a") as versions:
                versions.write(shown.stdout)
            downloaded.unlink()
        subprocess.run(["/usr/bin/python3", "-m", "compileall", "-q", place / "usr/lib"], check=True)
    return path


def _unpack(package: Path, place: Path) -> None:
    # tar, unlike dpkg-deb --extract, follows the links that are there.
    members = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
    with members:
        subprocess.run(
            ["tar", "--extract", "--keep-directory-symlink", "--directory", place], stdin=members.stdout, check=True
        )
    if members.returncode != 0:
        raise FetchError(f"{package.name} cannot be unpacked")


def _names(kernel: Kernel, release: str, version: str) -> dict[str, str]:
    """File name -> SHA-256."""
    return {f"{stem}-{release}_{version}_amd64.deb": digest for stem, digest in kernel.packages.items()}


def _key(names: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _packages() -> Path:
    return CACHE / "packages"


def _kept(name: str, digest: str, download: functools.partial[None]) -> Path:
    """The package `name` in the cache; `digest` "" trusts whom it was downloaded from."""
    path = _packages() / name
    with made_once(path) as place:
        if place is not None:
            download(place)
            found = hashlib.sha256(place.read_bytes()).hexdigest()
            if digest not in ("", found):
                raise FetchError(f"{name} has SHA-256 {found}, not {digest}")
    return path


# --- Ubuntu ----------------------------------------------------------------------------------------------------------
@patient
def _from_ubuntu(origin: Ubuntu, name: str, place: Path) -> None:
    url = f"{ubuntu_mirror()}/pool/main/l/{origin.pool}/{name}"
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_SECONDS) as response, place.open("wb") as file:  # noqa: S310
            shutil.copyfileobj(response, file)
    except (urllib.error.URLError, OSError) as error:
        raise FetchError(f"{url}: {error}") from error


def ubuntu_mirror() -> str:
    """Ubuntu's mirror that debootstrap uses."""
    mirrors = re.findall(r"default_mirror (\S+)", _DEBOOTSTRAP_UBUNTU.read_text())
    return str(next(mirror for mirror in mirrors if "old" not in mirror and "ports" not in mirror))


# --- Debian ----------------------------------------------------------------------------------------------------------
@functools.cache
def debian_mirror() -> str:
    """Debian's mirror of this machine; on another distribution the one that debootstrap uses."""
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", "Label: Debian"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if sites := targets.stdout.split():
        return sites[0]
    return str(re.findall(r'^DEF_MIRROR="(.*)"', _DEBOOTSTRAP.read_text(), re.MULTILINE)[0])


class _PrivateApt:
    """apt with sources, lists and downloads of its own; proxies and the like are still the machine's."""

    def __init__(self, directory: Path, suite: str) -> None:
        self._directory = directory
        for part in ("lists/partial", "archives/partial"):
            (directory / part).mkdir(parents=True)
        (directory / "status").touch()
        (directory / "sources.list").write_text(
            f"deb [arch=amd64 signed-by={_DEBIAN_KEYRING}] {debian_mirror()} {suite} main\n"
        )
        settings = {
            "Dir::State": directory, "Dir::State::status": directory / "status", "Dir::Cache": directory,
            "Dir::Etc::sourcelist": directory / "sources.list", "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferencesparts": "-", "APT::Architecture": "amd64", "APT::Sandbox::User": "root",
            "Acquire::Languages": "none", "Acquire::Retries": "2",
        }  # fmt: skip
        self._options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        self.run("apt-get", "update", "--error-on=any")

    @patient
    def run(self, command: str, *arguments: str, cwd: Path | None = None) -> str:
        """apt's output. Raises FetchError."""
        done = subprocess.run(
            [command, "-q", *self._options, *arguments],
            check=False, capture_output=True, text=True, cwd=cwd or self._directory, timeout=_DOWNLOAD_SECONDS,
        )  # fmt: skip
        if done.returncode != 0:
            raise FetchError(f"{command} {' '.join(arguments)}: {' '.join(done.stderr.split())}")
        return done.stdout

    def versions(self, names: str) -> list[tuple[str, str]]:
        """(package, version) of all packages whose name matches, best last."""
        found = self.run("apt-cache", "search", "--names-only", names)
        packages = [line.split()[0] for line in found.splitlines()]
        shown = self.run("apt-cache", "show", *packages) if packages else ""
        pairs: list[tuple[str, str]] = re.findall(r"^Package: (\S+)\n(?:.+\n)*?Version: (\S+)", shown, re.MULTILINE)
        return sorted(pairs, key=functools.cmp_to_key(_by_version))

    def download(self, package: str, place: Path) -> None:
        """One package, `name=version`, checked by apt."""
        with tempfile.TemporaryDirectory(dir=place.parent) as directory:
            self.run("apt-get", "download", package, cwd=Path(directory))
            (downloaded,) = Path(directory).glob("*.deb")
            downloaded.rename(place)


def _by_version(one: tuple[str, str], other: tuple[str, str]) -> int:
    """Whether (package, version) sorts before, with or after another."""
    if one[1] == other[1]:
        return 0
    greater = subprocess.run(["dpkg", "--compare-versions", one[1], "gt", other[1]], check=False).returncode == 0
    return 1 if greater else -1


@contextlib.contextmanager
def _private_apt(suite: str) -> Iterator[_PrivateApt]:
    with tempfile.TemporaryDirectory(prefix="registry-enforcer-apt-") as directory:
        yield _PrivateApt(Path(directory), suite)


def _served(kernel: Kernel, origin: Debian, apt: _PrivateApt) -> tuple[str, str]:
    """(release, version) that the suite has: the pinned one, else the newest of the series."""
    stem = next(iter(kernel.packages))
    served = apt.versions(f"^{stem}-{origin.series.pattern}$")
    if not served:
        raise FetchError(f"{origin.suite} has neither {stem}-{kernel.release} nor another {origin.series.pattern}")
    pinned = f"{stem}-{kernel.release}", kernel.version
    package, version = pinned if pinned in served else served[-1]
    return package.removeprefix(f"{stem}-"), version
