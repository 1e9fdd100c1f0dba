"""Files that decide what is allowed: read and written only where nobody but root, or who runs this, could change them.

Whoever may write a policy, the key of its CA or what was learned, or a directory on the way there, says what root
enforces. So each directory from / on is looked at through the descriptor by which the next one is opened, and what is
read is the descriptor that was judged: nothing that is renamed or linked meanwhile comes in between. A symbolic link is
as good as the directory that holds it.

A directory that others may write is passed where it is sticky (/tmp): there nobody moves what is root's. POSIX ACLs
need no look of their own, since their mask stands in the group's bits.

Of the core, though it opens files: all layers read through it, so that each words what is wrong alike.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

_MAX_STEPS = 200  # directories and links of one way
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class UntrustedError(Exception):
    """Somebody else could have written this: what is wrong, and what to do instead."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}; {advice}")
        self.problem = problem
        self.advice = advice


def read(path: Path, max_bytes: int, *, private: bool = False, trusting: bool = False) -> bytes:
    """The first `max_bytes` of a regular file; `private`: that nobody else may read either.

    Raises OSError if it cannot be read and UntrustedError if it should not be. `trusting` takes whatever has that name,
    for whoever enforces nothing by it.
    """
    if trusting:
        with path.open("rb") as file:
            return file.read(max_bytes)
    with contextlib.ExitStack() as stack:
        parent, name = stack.enter_context(_parent(path))
        # A FIFO in its place must not wait for somebody who writes.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        stack.callback(os.close, descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UntrustedError(f"{path} is not a regular file", "name a file, or a link to one")
        _judge(status, path)
        if private and status.st_mode & 0o077:
            raise UntrustedError(f"{path} can be read by others than its owner", f"chmod 600 {path}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes)


@contextlib.contextmanager
def directory(path: Path, *, make: bool = False) -> Iterator[int]:
    """A descriptor (O_PATH, for dir_fd=) of a directory that nobody else may write; `make`: with mode 0700 if missing.

    Raises OSError and UntrustedError.
    """
    if make:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _parent(path) as (parent, name):
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        _judge(os.fstat(descriptor), path)
        yield descriptor
    finally:
        os.close(descriptor)


def replace(path: Path, data: Iterable[bytes], *, make: bool = False) -> None:
    """Write a file (mode 0600) whole beside the old one and rename it over that; `make`: its directory too.

    OSError and UntrustedError leave the old one.
    """
    new = f"{path.name}.new"
    with directory(path.parent, make=make) as parent:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new, dir_fd=parent)  # of somebody who was killed
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(new, flags, 0o600, dir_fd=parent), "wb") as file:
                file.writelines(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=parent)  # half a file on a full disk is in everybody's way
            raise


def append(path: Path, mode: int) -> int:
    """A descriptor that appends to a regular file of our own, made with `mode` if missing; OSError or UntrustedError.

    The directory is ours alone, or sticky. Those above it may belong to a group, as Ubuntu has /var/log: what that
    group could put in our way is no link that is followed, and no directory that is not root's.
    """
    with _parent(path, shared=True) as (parent, name):
        status = os.fstat(parent)
        if not status.st_mode & stat.S_ISVTX:
            _judge(status, path.parent)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(name, flags, mode, dir_fd=parent)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UntrustedError(f"{path} is not a regular file", "move it away")
        _judge(status, path)
        if status.st_nlink > 1:
            raise UntrustedError(f"{path} has another name, under which it may be something else", "move it away")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


# --- the way there ---------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _parent(path: Path, *, shared: bool = False) -> Iterator[tuple[int, str]]:
    """(descriptor of the directory that holds what `path` leads to, its name there, which is no link).

    Nobody else could have led it elsewhere. `shared`: a group may write the directories on the way; then the name is
    the last of `path`, and may be a link.
    """
    here, at = os.open("/", _DIRECTORY), Path("/")
    try:
        _judge_owner(os.fstat(here), at)
        names = list(reversed(path.absolute().parts[1:])) or ["."]
        for _ in range(_MAX_STEPS):
            name = names.pop()
            try:
                status = os.stat(name, dir_fd=here, follow_symlinks=False)
            except FileNotFoundError:
                if names:
                    raise
                break  # it may be made
            if name not in (".", ".."):
                _judge_entry(os.fstat(here), at, status, shared=shared)
            if stat.S_ISLNK(status.st_mode) and (names or not shared):
                target = Path(os.readlink(name, dir_fd=here))
                names += reversed(target.parts[1:] if target.is_absolute() else target.parts)
                names = names or ["."]
                step, at = ("/", Path("/")) if target.is_absolute() else (".", at)
            elif names:
                step, at = name, (at.parent if name == ".." else at / name)
            else:
                break
            below = os.open(step, _DIRECTORY, dir_fd=here)
            os.close(here)
            here = below
            _judge_owner(os.fstat(here), at)
        else:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        yield here, name
    finally:
        os.close(here)


def _judge(status: os.stat_result, path: Path) -> None:
    """Of what is to be read, or of a directory in which we write."""
    _judge_owner(status, path)
    if status.st_mode & _OTHERS_WRITE:
        raise UntrustedError(f"{path} can be written by others (mode {_mode(status)})", f"chmod go-w {path}")


def _judge_owner(status: os.stat_result, path: Path) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise UntrustedError(
            f"{path} belongs to user {status.st_uid} and not to root",
            f"chown root {path}, or keep what root acts on below directories of root's",
        )


def _judge_entry(holder: os.stat_result, at: Path, status: os.stat_result, *, shared: bool) -> None:
    """Whether others could have put an entry into the directory `at`, or could replace it."""
    if not holder.st_mode & _OTHERS_WRITE:
        return
    ours = status.st_uid in (0, os.geteuid())
    if holder.st_mode & stat.S_ISVTX and ours:
        return
    if shared and not holder.st_mode & stat.S_IWOTH and ours and stat.S_ISDIR(status.st_mode):
        return
    raise UntrustedError(
        f"what is in {at} can be replaced by others (mode {_mode(holder)})",
        f"chmod go-w {at}, or keep what root acts on below directories that root alone may write",
    )


def _mode(status: os.stat_result) -> str:
    return f"{stat.S_IMODE(status.st_mode):04o}"
