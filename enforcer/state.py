"""The state file: what was learned, for after a reboot. Between restarts of the daemon the kernel itself remembers.

The file is a hint, never an authority: whoever reads it asks the policy about every entry again. It is written whole
beside the old one and renamed over it, so a full disk or a crash leaves the old one. Times in it are Unix seconds.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from enforcer.policy import Address, HostPattern, host_pattern

FILE_NAME = "learned.json"
VERSION = 1
MAX_BYTES = 128 << 20  # more than the largest memory takes; a larger file is not ours


class StateError(Exception):
    """The file cannot be used or written; the message says why. Nothing is lost that the kernel still knows."""


@dataclass(frozen=True, slots=True)
class SavedAddress:
    """One entry of the file, well-formed but not yet believed."""

    address: Address
    port: int
    name: str
    rule: str
    pattern: HostPattern
    expires_at: float  # Unix seconds


def save(state_dir: Path, entries: Iterable[SavedAddress]) -> None:
    """Replace the file in `state_dir` (made if missing, mode 0700); StateError leaves the old one."""
    document = {
        "version": VERSION,
        "learned": [
            [str(entry.address), entry.port, entry.name, entry.rule, str(entry.pattern), round(entry.expires_at)]
            for entry in entries
        ],
    }
    new = state_dir / f"{FILE_NAME}.new"
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(state_dir / FILE_NAME)
    except OSError as error:
        raise StateError(f"{state_dir / FILE_NAME} cannot be written: {error.strerror}") from None


def load(state_dir: Path) -> list[SavedAddress]:
    """What the file holds; empty without a file.

    StateError if it is damaged or somebody else could have written it; it is then set aside as FILE.bad.
    """
    path = state_dir / FILE_NAME
    try:
        text = _read(path)
        return [] if text is None else _parse(text)
    except OSError as error:
        problem = error.strerror or str(error)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"damaged: {error}"
    aside = path.with_name(f"{FILE_NAME}.bad")
    try:
        path.replace(aside)
    except OSError as error:
        raise StateError(f"{path}: {problem}; it cannot be set aside: {error.strerror}") from None
    raise StateError(f"{path}: {problem}; set aside as {aside.name}")


def _read(path: Path) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise ValueError("not a file that this user alone may write")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes")
        return file.read().decode()


def _parse(text: str) -> list[SavedAddress]:
    document = json.loads(text)
    if document["version"] != VERSION:
        raise ValueError(f"version {document['version']!r} is not {VERSION}")
    entries = []
    for address, port, name, rule, pattern, expires_at in document["learned"]:
        if not (
            all(isinstance(field, str) for field in (address, name, rule, pattern))
            and isinstance(port, int)
            and isinstance(expires_at, int)
        ):
            raise TypeError("an entry's field has another type than it should")
        entries.append(SavedAddress(ip_address(address), port, name, rule, host_pattern(pattern), expires_at))
    return entries
