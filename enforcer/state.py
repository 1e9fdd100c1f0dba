"""The state file: what was learned, for after a reboot. Between restarts of the daemon the kernel itself remembers.

The file is a hint, never an authority: whoever reads it asks the policy about every entry again. Even so it is believed
only where root alone could have written it. It is written whole beside the old one and renamed over it, so a full disk
or a crash leaves the old one. Times in it are Unix seconds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from enforcer import trusted_files
from enforcer.policy import Address, HostPattern, host_pattern
from enforcer.trusted_files import UntrustedError

FILE_NAME = "learned.json"
VERSION = 1
MAX_BYTES = 128 << 20  # more than the largest memory takes; a larger file is not ours


MAX_NAME = (
    1_100  # 253 characters, each as backslash and three digits (RFC 1035 section 5.1), and a wildcard's beginning
)


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
    seconds_left: float  # until then, when it was saved: what it may live at most, whatever the clock says by now


class StateFile:
    """The file of one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def save(self, entries: Iterable[SavedAddress]) -> None:
        """Replace it; StateError leaves the old one."""
        save(self._state_dir, entries)

    def load(self) -> list[SavedAddress]:
        """What it holds; StateError if it is not to be believed."""
        return load(self._state_dir)


def render(entries: Iterable[SavedAddress], saved_at: float) -> bytes:
    """The content of the file."""
    document = {
        "version": VERSION,
        "saved_at": round(saved_at),
        "learned": [
            [str(entry.address), entry.port, entry.name, entry.rule, str(entry.pattern), round(entry.expires_at)]
            for entry in entries
        ],
    }
    return json.dumps(document).encode()


def save(state_dir: Path, entries: Iterable[SavedAddress]) -> None:
    """Replace the file in `state_dir` (made if missing, mode 0700); StateError leaves the old one."""
    try:
        trusted_files.replace(state_dir / FILE_NAME, (render(entries, time.time()),), make=True)
    except UntrustedError as error:
        raise StateError(f"{state_dir / FILE_NAME} is not written: {error}") from None
    except OSError as error:
        raise StateError(f"{state_dir / FILE_NAME} cannot be written: {error.strerror}") from None


def load(state_dir: Path) -> list[SavedAddress]:
    """What the file holds; empty without a file.

    StateError if it is damaged, or somebody else could have written it; it is then set aside as FILE.bad.
    """
    path = state_dir / FILE_NAME
    try:
        text = trusted_files.read(path, MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"longer than {MAX_BYTES} bytes")
        return parse(text)
    except FileNotFoundError:
        return []
    except UntrustedError as error:
        problem = error.problem
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:
        problem = f"damaged: {error}"
    aside = f"{FILE_NAME}.bad"
    try:
        with trusted_files.directory(state_dir) as parent:
            os.replace(FILE_NAME, aside, src_dir_fd=parent, dst_dir_fd=parent)
    except UntrustedError:
        raise StateError(f"{path}: {problem}") from None  # it would be moved at the other's bidding
    except OSError as error:
        raise StateError(f"{path}: {problem}; it cannot be set aside: {error.strerror}") from None
    raise StateError(f"{path}: {problem}; set aside as {aside}")


def parse(text: bytes) -> list[SavedAddress]:
    """The entries of what `render` wrote; ValueError, and nothing else, for whatever else it is."""
    try:
        document = json.loads(text)
        if document["version"] != VERSION:
            raise ValueError(f"version {str(document['version'])[:20]!r} is not {VERSION}")
        saved_at = document.get("saved_at", 0)  # earlier versions did not say
        if type(saved_at) is not int or not 0 <= saved_at < 1 << 40:
            raise ValueError("saved_at is no time")
        return [_entry(saved_at, *fields) for fields in document["learned"]]
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _entry(
    saved_at: int, address: object, port: object, name: object, rule: object, pattern: object, expires_at: object
) -> SavedAddress:
    """Nothing that a packet, a set of nftables or a terminal could not hold."""
    if not (isinstance(address, str) and isinstance(name, str) and isinstance(rule, str) and isinstance(pattern, str)):
        raise TypeError("an entry's field is no string")
    if type(port) is not int or not 0 < port < 1 << 16 or type(expires_at) is not int or not 0 < expires_at < 1 << 40:
        raise TypeError("an entry's port or time is none")
    if "%" in address or len(name) > MAX_NAME or not (name + rule).isprintable():
        raise ValueError("an entry's address or name is none")
    return SavedAddress(ip_address(address), port, name, rule, host_pattern(pattern), expires_at, expires_at - saved_at)
