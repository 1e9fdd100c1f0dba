"""Where audit lines go: standard output (the journal, under systemd) and, if the policy names one, a file.

One thread writes, so that neither a full disk nor a reader that has stopped reading can hold up enforcement. What does
not fit into its short queue, or on the disk, is dropped and counted. The file survives rotation by others (another
inode, or none, is opened anew), and is rotated here, once, before it can fill a disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from enforcer import trusted_files
from enforcer.bounds import Room

log = logging.getLogger("registry-enforcer")

QUEUED_LINES = 2_000
MAX_FILE_BYTES = 64 << 20  # then it becomes FILE.1, in place of the one before
BURST_LINES = 1_000
LINES_A_SECOND = 50.0  # 4 million lines a day at most
CLOSE_SECONDS = 2.0


class AuditLog:
    """Takes lines and never blocks; a context manager, whose end waits a moment for what is queued."""

    def __init__(self, file: Path | None = None, *, stdout: int | None = 1, max_bytes: int = MAX_FILE_BYTES) -> None:
        self.dropped = 0  # lines that were written nowhere, or not everywhere
        self._turned_away = 0  # of these the ones for which there was no room
        self._path = file
        self._stdout = stdout
        self._max_bytes = max_bytes
        self._queue: queue.Queue[str | None] = queue.Queue(QUEUED_LINES)
        self._tokens, self._refilled_at = float(BURST_LINES), 0.0
        self._broken = {"file": False, "standard output": False}  # each failure is said once
        self._thread = threading.Thread(target=self._write_all, name="audit", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)  # a daemon thread: one that hangs in a write dies with the process

    @property
    def room(self) -> Room:
        """Lines that wait; those over the rate count as turned away too."""
        return Room(QUEUED_LINES, self._queue.qsize(), self._turned_away)

    def follow_policy(self, file: Path | None) -> None:
        """Write to `file` from now on."""
        self._path = file

    def write(self, line: str, now: float) -> None:
        """Queue one line without its end; `now` is any clock that does not step."""
        self._tokens = min(BURST_LINES, self._tokens + (now - self._refilled_at) * LINES_A_SECOND)
        self._refilled_at = now
        if self._tokens < 1:
            self.dropped += 1
            self._turned_away += 1
            return
        self._tokens -= 1
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.dropped += 1
            self._turned_away += 1

    def _write_all(self) -> None:
        opened = _File(self._max_bytes)
        try:
            while (line := self._queue.get()) is not None:
                data = line.encode() + b"\n"
                kept = True
                if self._stdout is not None:
                    stdout = self._stdout
                    kept = self._try("standard output", lambda: _write_to(stdout, data))  # noqa: B023 - runs at once
                path = self._path
                if path is not None:
                    kept &= self._try("file", lambda: opened.append(path, data))  # noqa: B023
                self.dropped += not kept
        finally:
            opened.close()

    def _try(self, what: str, action: object) -> bool:
        assert callable(action)
        try:
            action()
        except OSError as error:
            if not self._broken[what]:
                self._broken[what] = True
                where = self._path if what == "file" else what
                log.error("audit lines cannot be written to %s (%s); enforcement goes on", where, error.strerror)
            return False
        if self._broken[what]:
            self._broken[what] = False
            log.warning("audit lines are written to the %s again", what)
        return True


def _write_to(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


class _File:
    """The audit file, whichever inode has its name now."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._fd = -1
        self._path: Path | None = None
        self._identity: tuple[int, int] = (0, 0)

    def append(self, path: Path, line: bytes) -> None:
        """One whole line or, with OSError, nothing of it."""
        size = self._open(path)
        if size + len(line) > self._max_bytes and size:
            path.replace(path.with_name(path.name + ".1"))
            size = self._open(path)
        try:
            _write_to(self._fd, line)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)  # half a line would spoil the next one too
            raise

    def close(self) -> None:
        """Close it; appending opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, path: Path) -> int:
        """Make `path` the open file; its size."""
        try:
            named = path.stat(follow_symlinks=False)
        except FileNotFoundError:
            named = None
        if named is None or self._fd < 0 or path != self._path or (named.st_dev, named.st_ino) != self._identity:
            self.close()
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            try:
                self._fd = trusted_files.append(path, 0o640)
            except trusted_files.UntrustedError as error:
                raise OSError(0, str(error)) from None
            self._path = path
        status = os.fstat(self._fd)
        self._identity = status.st_dev, status.st_ino
        return status.st_size
