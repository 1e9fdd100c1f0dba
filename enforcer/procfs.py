"""What the host says about itself in files: resolvers, WSL, namespaces, the cgroup hierarchy; and changes of it.

Files are read whole, up to a bound, and a file that is missing or unreadable is an empty one; what is unreadable for
want of descriptors or memory is not, but an OSError. Changes come from inotify; a lost notification is answered by
reading everything again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import re
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from enforcer.attribution import classify_cgroup
from enforcer.bounds import Room
from enforcer.kernel_abi import MarkedScope
from enforcer.policy import Address

RESOLV_CONF: Final = Path("/etc/resolv.conf")
# Where the resolvers behind a local stub are listed: systemd-resolved's and NetworkManager's. Container engines give
# these to their containers, which cannot reach a stub on 127.0.0.53.
UPSTREAM_RESOLV_CONFS: Final = (
    Path("/run/systemd/resolve/resolv.conf"),
    Path("/run/NetworkManager/no-stub-resolv.conf"),
)
WSL_RESOLVER: Final = IPv4Address("10.255.255.254")  # on lo since WSL 2.2.1, unless DNS tunnelling is off

UNIFIED: Final = Path("/sys/fs/cgroup")  # where the v2 hierarchy is when there is no other

MAX_WATCHES = Path("/proc/sys/fs/inotify/max_user_watches")
_READ_BYTES = 65_536
_MODULES_READ_BYTES = 4_194_304  # a distribution's modules.dep has 0.7 MB
_SYMLINK_HOPS = 40  # the kernel's own limit, MAXSYMLINKS
_SO_NETNS_COOKIE = 71  # Linux 5.14
_KERNEL_MINOR_BITS = 20  # include/linux/kdev_t.h, MINORBITS

# include/uapi/linux/inotify.h
_IN_ATTRIB, _IN_CLOSE_WRITE, _IN_MOVED_FROM, _IN_MOVED_TO = 0x4, 0x8, 0x40, 0x80
_IN_CREATE, _IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
_IN_Q_OVERFLOW, _IN_IGNORED, _IN_ONLYDIR, _IN_ISDIR = 0x4000, 0x8000, 0x01000000, 0x40000000
# Not IN_MODIFY: between a writer's truncating and closing, the file says that there are no resolvers.
_FILE_CHANGES = (_IN_ATTRIB | _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO) | (
    _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF
)
_INOTIFY_EVENT = struct.Struct("=iIII")  # watch, mask, cookie, length of the name
_FILE_HANDLE = struct.Struct("=Iiq")  # struct file_handle with a 64-bit handle: bytes, type, cgroup id

# What says nothing of the file, and passes.
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
RETRY_SECONDS = 1.0

_libc = ctypes.CDLL(None, use_errno=True)


def _read(path: Path, limit: int = _READ_BYTES) -> str:
    try:
        with path.open("rb") as file:
            return file.read(limit).decode(errors="replace")
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise
        return ""


# --- resolvers -------------------------------------------------------------------------------------------------------
def trusted_resolvers(
    resolv_conf: Path = RESOLV_CONF, upstream: Iterable[Path] = UPSTREAM_RESOLV_CONFS, *, wsl: bool | None = None
) -> tuple[Address, ...]:
    """The resolvers that this host uses: those it names, those behind its stub, and WSL's; each once, in that order.

    Local stubs are among them and are heard on lo. An IPv6 address keeps its scope ("fe80::1%eth0"). `wsl` None: see
    for yourself. WSL's counts where DNS is tunnelled, even if this distribution asks another one, since others may ask
    it. Without the tunnel it is anybody's on the networks behind Windows.
    """
    # Without any, the resolver library asks the local host (resolv.conf(5)).
    resolvers: list[Address] = list(_name_servers(resolv_conf)) or [IPv4Address("127.0.0.1")]
    for path in upstream:
        resolvers += _name_servers(path)
    if (is_wsl() if wsl is None else wsl) and is_own_address(WSL_RESOLVER):
        resolvers.append(WSL_RESOLVER)
    return tuple(dict.fromkeys(resolvers))


def _name_servers(path: Path) -> Iterator[Address]:
    for line in _read(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            with contextlib.suppress(ValueError):  # the resolver library skips such lines too
                address = ip_address(words[1])
                yield (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def is_own_address(address: IPv4Address) -> bool:
    """Whether an interface of this network namespace has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((str(address), 0))
        except OSError:
            return False
    return True


OLDEST_KERNEL: Final = (5, 4)
# As uname(2) calls them: little-endian, as bpf/build.h wants, and with a number of bpf(2) that bpf.py knows.
ARCHITECTURES: Final = ("aarch64", "riscv64", "x86_64")


def unsupported(release: str | None = None, machine: str | None = None) -> str | None:
    """Why nobody has tried enforcement on this kernel; None if they have. All else is found by trying."""
    release, machine = release or os.uname().release, machine or os.uname().machine
    numbers = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if numbers < OLDEST_KERNEL:
        oldest = ".".join(map(str, OLDEST_KERNEL))
        return f"this is Linux {release}, and {oldest} is the oldest that can be enforced on"
    if machine not in ARCHITECTURES:
        return f"this is a {machine}, and enforcement runs on {', '.join(ARCHITECTURES)}"
    return None


# --- identity --------------------------------------------------------------------------------------------------------
# What WSL's kernels are called, 5.10.102.1-microsoft-standard-WSL2 for one. /proc/version also names who built it and
# where: a kernel that was built at Microsoft, as Azure's are, is not yet one of WSL.
_WSL_RELEASE = re.compile(r"microsoft|\bwsl", re.IGNORECASE)
_WSL_VERSION = re.compile(r"microsoft-standard|\bwsl2", re.IGNORECASE)


def is_wsl(
    release: Path = Path("/proc/sys/kernel/osrelease"),
    version: Path = Path("/proc/version"),
    run_wsl: Path = Path("/run/WSL"),
) -> bool:
    """Whether this is a WSL 2 distribution; a kernel of the user's own may not say so, WSL's run directory does."""
    named = _WSL_RELEASE.search(_read(release)) or _WSL_VERSION.search(_read(version))
    return named is not None or run_wsl.is_dir()


def loadable_modules(directory: Path | None = None) -> frozenset[str] | None:
    """Names of the modules that modprobe finds for the running kernel; None if it has no directory of them.

    `directory` is /lib/modules/<release> unless told. In WSL 2 it is mounted into each distribution where the kernel
    comes with modules (6.6 and newer; microsoft/WSL, main.cpp).
    """
    directory = directory or Path("/lib/modules") / os.uname().release
    if not directory.is_dir():
        return None
    listed = (line.partition(":") for line in _read(directory / "modules.dep", _MODULES_READ_BYTES).splitlines())
    files = (Path(path).name for path, separator, _ in listed if separator)
    return frozenset(name.partition(".ko")[0].replace("-", "_") for name in files)


def netns_cookie() -> int | None:
    """The kernel's number for the current network namespace; None before Linux 5.14."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")
        except OSError:
            return None


def in_initial_netns(proc: Path = Path("/proc")) -> bool:
    """Whether this is provably the network namespace that the kernel began with: kthreadd's."""
    try:
        is_kthreadd = (proc / "2/comm").read_text() == "kthreadd\n"
        return is_kthreadd and (proc / "self/ns/net").stat().st_ino == (proc / "2/ns/net").stat().st_ino
    except OSError:
        return False


def pidns_identity(namespace: Path = Path("/proc/self/ns/pid")) -> tuple[int, int]:
    """(device, inode) of a pid namespace, our own unless told, as bpf_get_ns_current_pid_tgid compares them.

    The helper compares with the superblock's dev_t (fs/nsfs.c, ns_match), which has the minor in its lower 20 bits;
    stat(2) splits it. /proc/1/ns/pid is not for everyone: root with fewer capabilities than init is refused (EACCES).
    """
    status = namespace.stat()
    return os.major(status.st_dev) << _KERNEL_MINOR_BITS | os.minor(status.st_dev), status.st_ino


def pidns_of_host(*, wsl: bool | None = None) -> tuple[int, int]:
    """`pidns_identity` of the one pid namespace whose processes are no containers; (0, 0) where there is not one.

    Each of WSL 2's distributions is a pid namespace, and the daemon lives in one of them: to call the others'
    processes containers would excuse their engines on every port but the registries', and put "container" into each
    audit line of somebody's shell. So cgroup and program name decide there, as on kernels that cannot ask (before
    6.10). What that loses is a --network host container on cgroup v1; it counts as host, and scope.host is strict by
    default in WSL 2. `wsl` None: see for yourself.
    """
    return (0, 0) if (is_wsl() if wsl is None else wsl) else pidns_identity()


# --- cgroups ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Cgroup:
    """A cgroup whose sockets, and whose descendants' sockets, have a scope of their own."""

    path: str  # relative to the root of the hierarchy, without a leading slash
    cgroup_id: int  # as bpf_get_current_cgroup_id and its ancestor form give it
    scope: MarkedScope


def cgroup_root(mountinfo: Path = Path("/proc/self/mountinfo")) -> Path | None:
    """Where the whole cgroup v2 hierarchy is mounted, alone or beside v1; None if it is not."""
    mounts = []
    for line in _read(mountinfo).splitlines():
        mount, separator, source = line.partition(" - ")
        fields = mount.split()
        if separator and source.split()[0] == "cgroup2" and fields[3] == "/":  # proc(5): the root of the mount
            mounts.append(Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])))
    # systemd's own place before a copy that somebody mounted elsewhere.
    return min(mounts, key=lambda path: (not path.is_relative_to("/sys/fs/cgroup"), len(path.parts)), default=None)


def cgroup_id(path: Path) -> int:
    """The 64-bit id by which BPF knows this cgroup; OSError if it is not there.

    The file handle is the id on every kernel since 4.18; the inode number is it only since 5.5 and on 64 bits.
    """
    handle = ctypes.create_string_buffer(_FILE_HANDLE.pack(8, 0, 0), _FILE_HANDLE.size)
    mount_id = ctypes.c_int()
    at_cwd = -100
    if _libc.name_to_handle_at(at_cwd, os.fsencode(path), handle, ctypes.byref(mount_id), 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return int(_FILE_HANDLE.unpack(handle.raw)[2])


def _walk(root: Path, start: str, found: dict[str, Cgroup]) -> Iterator[str]:
    """Add to `found` the cgroups with a scope at and below `start`; yield each directory just before it is listed."""
    pending = [start]
    while pending:
        path = pending.pop()
        scope = classify_cgroup(path)
        try:
            if scope is not None:
                found[path] = Cgroup(path, cgroup_id(root / path), scope)
            if scope is MarkedScope.CONTAINER:
                continue  # BPF looks at ancestors, so what is below it is covered
            yield path
            with os.scandir(root / path) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            found.pop(path, None)  # removed meanwhile
        else:
            pending += [f"{path}/{name}" if path else name for name in names]


# --- changes ---------------------------------------------------------------------------------------------------------
Refused = Callable[[OSError], None]


def _raise(error: OSError) -> None:
    raise error


class _Inotify:
    """An inotify descriptor, read by the running event loop.

    Where there are no descriptors to look at what changed, `refused` is told, and `on_events` called again in a second.
    """

    def __init__(self, mask: int, on_events: Callable[[], None], refused: Refused) -> None:
        self._mask = mask
        self._on_events = on_events
        self._refused = refused
        self._again: asyncio.TimerHandle | None = None
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._run)

    def _run(self) -> None:
        try:
            self._on_events()
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            self._refused(error)
            if self._again is not None:
                self._again.cancel()
            self._again = self._loop.call_later(RETRY_SECONDS, self._run)

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def add(self, path: Path) -> int | None:
        """The watch of this file or directory, the old one if there is one; None if it cannot be watched."""
        watch = int(_libc.inotify_add_watch(self._fd, os.fsencode(path), self._mask))
        return watch if watch >= 0 else None

    def remove(self, watch: int) -> None:
        _libc.inotify_rm_watch(self._fd, watch)  # fails if the kernel has removed it, which is as good

    def events(self) -> Iterator[tuple[int, int, str]]:
        """(watch, mask, name in the watched directory) of what is there to be read now."""
        while True:
            try:
                received = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                return
            while received:
                watch, mask, _, length = _INOTIFY_EVENT.unpack_from(received)
                name = received[_INOTIFY_EVENT.size : _INOTIFY_EVENT.size + length].rstrip(b"\0")
                received = received[_INOTIFY_EVENT.size + length :]
                yield watch, mask, os.fsdecode(name)


class FileWatch:
    """Calls back, on the event loop, when the content behind one of these paths has become another.

    Whatever way: written in place and closed, renamed over, a symbolic link turned elsewhere, the file or its directory
    made or removed. Needs a running event loop.
    """

    def __init__(self, paths: Iterable[Path], callback: Callable[[], None], refused: Refused = _raise) -> None:
        """`refused`: there were no descriptors to look; it is tried again."""
        self._paths = tuple(paths)
        self._callback = callback
        self._refused = refused
        self._watches: set[int] = set()

    def __enter__(self) -> Self:
        self._inotify = _Inotify(_FILE_CHANGES, self._look, self._refused)
        self._arm()
        self._content = self._read_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inotify.close()

    def _arm(self) -> None:
        watches = {self._inotify.add(place) for path in self._paths for place in _places_that_decide(path)}
        current = {watch for watch in watches if watch is not None}
        for watch in self._watches - current:
            self._inotify.remove(watch)
        self._watches = current

    def _look(self) -> None:
        for _ in self._inotify.events():
            pass  # which one it was says less than the files do
        self._arm()
        content = self._read_all()
        if content != self._content:
            self._content = content
            self._callback()

    def _read_all(self) -> tuple[str, ...]:
        return tuple(_read(path) for path in self._paths)


def _places_that_decide(path: Path) -> Iterator[Path]:
    """The directories where `path` and the links behind it are, or the next ones above, and the file itself."""
    for _ in range(_SYMLINK_HOPS):
        directory = path.parent
        while not directory.exists():
            directory = directory.parent
        yield directory
        try:
            path = path.parent / path.readlink()
        except OSError:
            break
    yield path  # a file that is bind-mounted here changes without its directory's knowing


class CgroupWatch:
    """Knows every cgroup with a scope of its own below `root`, and calls back when some appear or vanish.

    `callback(appeared, vanished)` runs on the event loop, a few hundred microseconds after mkdir. What is there at the
    start is in `known` and is not called back. Needs a running event loop.
    """

    def __init__(
        self,
        root: Path,
        callback: Callable[[Collection[Cgroup], Collection[Cgroup]], None],
        refused: Refused = _raise,
    ) -> None:
        """`refused`: there were no descriptors to look; it is tried again."""
        self.known: dict[str, Cgroup] = {}
        self.unwatched = 0  # directories for which the kernel had no watch left (fs.inotify.max_user_watches)
        self._root = root
        self._callback = callback
        self._refused = refused
        self._complete = True  # False: a look that has begun did not come to its end
        self._watched: dict[int, str] = {}
        text = _read(MAX_WATCHES).strip()
        self._most = int(text) if text.isdigit() else 0

    def __enter__(self) -> Self:
        self._inotify = _Inotify(_IN_CREATE | _IN_DELETE | _IN_ONLYDIR, self._follow, self._refused)
        self.known = self._look("")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inotify.close()

    @property
    def room(self) -> Room:
        """Directories that are watched, of those that the kernel lets this user watch."""
        return Room(self._most, len(self._watched), self.unwatched)

    def _look(self, start: str) -> dict[str, Cgroup]:
        """Watch and list everything at and below `start`; the watch comes first, so that nothing is missed."""
        found: dict[str, Cgroup] = {}
        for path in _walk(self._root, start, found):
            watch = self._inotify.add(self._root / path)
            if watch is not None:
                self._watched[watch] = path
            elif (self._root / path).exists():
                self.unwatched += 1
        return found

    def _follow(self) -> None:
        known = self.known.copy() if self._complete else self._look("")
        self._complete = False
        for watch, mask, name in self._inotify.events():
            if mask & _IN_Q_OVERFLOW:
                known = self._look("")
            elif mask & _IN_IGNORED:
                self._watched.pop(watch, None)
            elif mask & _IN_ISDIR and watch in self._watched:
                path = f"{self._watched[watch]}/{name}".lstrip("/")
                known.pop(path, None)
                if mask & _IN_CREATE:
                    known |= self._look(path)
        self._complete = True
        before, after = set(self.known.values()), set(known.values())
        self.known = known
        if before != after:
            self._callback(after - before, before - after)
