"""The BPF programs and maps in the kernel: load, pin, adopt, read, write, attach to cgroups, receive events.

The only module, with its child `bpf_loader`, that speaks bpf(2). Everything is pinned below a directory of a bpffs, so
that learning and marking go on without the daemon and the next daemon adopts them without a gap:

    <bpffs>/generation-<digest>/{maps,programs}/NAME, report    one loaded build; whole if it has a report
    <bpffs>/links/NAME                                          attachments to the cgroup; they outlive a generation
    <bpffs>/attached/NAME                                       before 5.7, which has no links: the attached program

bpf(2) is called directly (layouts: include/uapi/linux/bpf.h, `union bpf_attr`): removing everything must work without
libbpf. libbpf reads the event buffers, whose memory ordering it knows.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import hashlib
import itertools
import json
import logging
import mmap
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from . import kernel_abi, trusted_files

# enum bpf_cmd
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY = 0, 1, 2, 3, 4
PROG_LOAD = 5  # used by bpf_loader
_OBJ_PIN, _OBJ_GET, _PROG_ATTACH, _PROG_DETACH, _PROG_TEST_RUN, _GET_INFO, _PROG_QUERY = 6, 7, 8, 9, 10, 15, 16
_MAP_LOOKUP_BATCH, _MAP_UPDATE_BATCH, _LINK_CREATE, _LINK_UPDATE, _LINK_DETACH = 24, 26, 28, 29, 34
# enum bpf_map_type
_ARRAY, _PERF_EVENT_ARRAY, _RINGBUF = 2, 4, 27
_PER_CPU_TYPES = frozenset({5, 6, 10, 21})  # hash, array, LRU hash, cgroup storage

_SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280}  # asm/unistd.h
_BPFFS_MAGIC = 0xCAFE4A11  # BPF_FS_MAGIC, linux/magic.h
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_F_ALLOW_MULTI = 2
_NOEXIST = 1  # BPF_NOEXIST
_ENOTSUPP = 524  # leaks out of the kernel; errno.h of user space does not know it
_BATCH = 4096
_LOAD_DEADLINE_SECONDS = 180  # emulated processors verify in a minute what others do in one second
_EVENTS_A_READ = 512
# Of the child that loads. What root's shell happens to have (TMPDIR, BCC_*, LIBBPF_*, LD_*, PYTHON*) is not for it.
LOADER_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_REPORT_FIELDS = "ids"  # what reports have learned to say: those of an earlier version are not ours to adopt

log = logging.getLogger("registry-enforcer")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint)
_libc.syscall.restype = ctypes.c_long


class BpfError(Exception):
    """The kernel or the host cannot do what is asked; the text says what to do about it."""


class Loader(enum.Enum):
    """Who brings the programs into the kernel."""

    LIBBPF = "libbpf"  # the object built ahead of time
    BCC = "bcc"  # compiled on this host


class ProgramType(enum.IntEnum):
    """enum bpf_prog_type."""

    SCHED_CLS = 3
    CGROUP_SOCK = 9
    SOCK_OPS = 13
    CGROUP_SOCK_ADDR = 18
    CGROUP_SOCKOPT = 25


class CgroupHook(enum.IntEnum):
    """enum bpf_attach_type; a member's name in lower case is the program's name."""

    SOCK_CREATE = 2
    SOCK_OPS = 3
    CONNECT4 = 10
    CONNECT6 = 11
    SENDMSG4 = 14
    SENDMSG6 = 15
    SETSOCKOPT = 22


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one load brought into the kernel; kept beside the pins, so that who adopts them knows it too."""

    generation: Path
    loader: Loader
    adopted: bool  # True: nothing was loaded, the pins of an earlier run are used
    clock: int  # time.CLOCK_*: what "now" is in the maps and events of this build
    programs: Mapping[str, str]  # name -> the C function that the verifier accepted for it (NAME or NAME_pidns)
    refused: Mapping[str, str]  # C function -> the verifier's last lines
    ids: Mapping[str, int]  # maps/NAME, programs/NAME -> the kernel's id of what was pinned there
    seconds: float  # of the load
    peak_kib: int  # resident memory of the child that loaded


@dataclass(frozen=True, slots=True)
class Program:
    """A loaded program; `fd` is what a tc filter is attached by."""

    fd: int
    name: str
    id: int
    type: int
    tag: str  # hash of its instructions
    verified_instructions: int  # 0 before 5.16: the kernel does not say


@dataclass(frozen=True, slots=True)
class PacketRun:
    """Result of `run_packet`."""

    verdict: int  # the program's return value
    packet: bytes
    mark: int
    duration_ns: int  # mean of the repetitions


# --- bpf(2) ----------------------------------------------------------------------------------------------------------
def call(command: int, attributes: bytearray) -> int:
    """bpf(2), which may write into `attributes`; its result (a new fd, or 0). Raises OSError."""
    number = _SYSCALL_NUMBERS.get(os.uname().machine)
    if number is None:
        raise BpfError(f"bpf(2) is not known for {os.uname().machine}: add its number to {__name__}")
    result = int(_libc.syscall(number, command, address(attributes), len(attributes)))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"bpf command {command}: {os.strerror(ctypes.get_errno())}")
    return result


def packed(layout: str, *values: int | bytes) -> bytearray:
    """A part of `union bpf_attr`, or what its pointers lead to, by letters of `struct`; no padding of its own."""
    return bytearray(struct.pack("=" + layout, *values))


def address(memory: bytearray | mmap.mmap) -> int:
    """Where the kernel finds `memory` (not empty); holds as long as it lives and keeps its size."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def pin(fd: int, path: Path) -> None:
    """Pins a map, program or link at `path` of a bpffs, whose directory exists. Raises OSError."""
    name = bytearray(os.fsencode(path) + b"\0")
    call(_OBJ_PIN, packed("QII", address(name), fd, 0))


def _open_pin(path: Path) -> int:
    name = bytearray(os.fsencode(path) + b"\0")
    try:
        return call(_OBJ_GET, packed("QII", address(name), 0, 0))
    except OSError as error:
        error.filename = str(path)
        raise


def _object_info(fd: int, size: int) -> bytes:
    """struct bpf_{map,prog,link}_info; what the kernel does not fill is zero."""
    info = bytearray(size)
    call(_GET_INFO, packed("IIQ", fd, size, address(info)))
    return bytes(info)


def object_id(fd: int) -> int:
    """The kernel's id of a map or program (struct bpf_map_info and bpf_prog_info begin alike)."""
    return int(struct.unpack_from("=II", _object_info(fd, 8))[1])


def _program(fd: int, name: str) -> Program:
    info = _object_info(fd, 232)
    program_type, program_id, tag = struct.unpack_from("=II8s", info)
    (verified_instructions,) = struct.unpack_from("=I", info, 216)
    return Program(fd, name, program_id, program_type, tag.hex(), verified_instructions)


@contextlib.contextmanager
def _opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


# --- maps ------------------------------------------------------------------------------------------------------------
def _possible_cpus() -> int:
    """How many values an element of a per-CPU map has."""
    ranges = [text.split("-") for text in Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")]
    return sum(int(bounds[-1]) - int(bounds[0]) + 1 for bounds in ranges)


class BpfMap:
    """One map. Keys and values are bytes of exactly `key_size` and `value_size`; not for two threads at once."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        info = _object_info(fd, 80)
        self.type, self.id, self.key_size, self.value_size, self.max_entries = struct.unpack_from("=IIIII", info)
        self._per_cpu = self.type in _PER_CPU_TYPES
        self._value_stride = (self.value_size + 7) // 8 * 8  # of each CPU's copy
        self._value_bytes = self._value_stride * _possible_cpus() if self._per_cpu else self.value_size
        self._key = bytearray(max(self.key_size, 1))
        self._value = bytearray(max(self._value_bytes, self.key_size, 1))
        self._element = packed("I4xQQQ", fd, address(self._key), address(self._value), 0)
        self._key_only = packed("I4xQ", fd, address(self._key))
        self._has_batches = not self._per_cpu

    def lookup(self, key: bytes) -> bytes | None:
        """The value, None if there is none. For an LPM trie: of the longest prefix that matches `key`."""
        assert not self._per_cpu
        return self._lookup(key)

    def lookup_per_cpu(self, key: bytes) -> list[bytes]:
        """Each possible CPU's value of a per-CPU map; empty if there is none."""
        assert self._per_cpu
        values = self._lookup(key) or b""
        return [values[at : at + self.value_size] for at in range(0, len(values), self._value_stride)]

    def sum_u64(self, key: bytes) -> int:
        """The sum of a per-CPU counter over all CPUs."""
        return sum(int.from_bytes(value, sys.byteorder) for value in self.lookup_per_cpu(key))

    def update(self, key: bytes, value: bytes) -> None:
        """Inserts or replaces one element. Raises BpfError if the map is full."""
        self._set_element(key, value)
        try:
            call(_MAP_UPDATE, self._element)
        except OSError as error:
            self._explain(error)

    def add(self, key: bytes, value: bytes) -> bool:
        """Inserts one element and replaces none; whether it is new. Raises BpfError if the map is full."""
        self._set_element(key, value)
        try:
            call(_MAP_UPDATE, packed("I4xQQQ", self.fd, address(self._key), address(self._value), _NOEXIST))
        except OSError as error:
            if error.errno == errno.EEXIST:
                return False
            self._explain(error)
        return True

    def update_many(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        """Inserts or replaces many, in few system calls where the kernel can (5.6; LPM tries later)."""
        remaining = iter(pairs)
        while chunk := list(itertools.islice(remaining, _BATCH)):
            if not (self._has_batches and self._update_batch(chunk)):
                for key, value in chunk:
                    self.update(key, value)

    def delete(self, key: bytes) -> bool:
        """Whether there was such an element."""
        self._set_key(key)
        return self._found(_MAP_DELETE, self._key_only)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every element once; what comes or goes meanwhile may be among them. An LPM trie must not change meanwhile."""
        assert not self._per_cpu
        if self._has_batches:
            try:
                yield from self._items_by_batch()
            except _NoBatchesError:
                self._has_batches = False
            else:
                return
        for key in self._keys():
            if (value := self._lookup(key)) is not None:
                yield key, value

    def clear(self) -> None:
        """Deletes every element."""
        self.replace_all({})

    def replace_all(self, wanted: Mapping[bytes, bytes]) -> None:
        """Makes `wanted` the content. Deletes first: cut off half-way, nothing stays that is not in `wanted`.

        Raises BpfError, and changes nothing, if it does not fit.
        """
        if len(wanted) > self.max_entries:
            raise BpfError(f"BPF map {self.name} holds {self.max_entries} elements, not {len(wanted)}")
        stale = [key for key, _ in self.items() if key not in wanted]
        for key in stale:
            self.delete(key)
        self.update_many(wanted.items())

    def _set_key(self, key: bytes) -> None:
        if len(key) != self.key_size:
            raise ValueError(f"{self.name}: key of {len(key)} bytes, not {self.key_size}")
        self._key[: len(key)] = key

    def _set_element(self, key: bytes, value: bytes) -> None:
        self._set_key(key)
        if len(value) != self.value_size:
            raise ValueError(f"{self.name}: value of {len(value)} bytes, not {self.value_size}")
        self._value[: len(value)] = value

    def _found(self, command: int, attributes: bytearray) -> bool:
        try:
            call(command, attributes)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return True

    def _lookup(self, key: bytes) -> bytes | None:
        self._set_key(key)
        if not self._found(_MAP_LOOKUP, self._element):
            return None
        return bytes(self._value[: self._value_bytes])

    def _explain(self, error: OSError) -> None:
        if error.errno in {errno.ENOSPC, errno.E2BIG}:
            raise BpfError(f"BPF map {self.name} is full: it holds {self.max_entries} elements") from error
        raise error

    def _update_batch(self, chunk: list[tuple[bytes, bytes]]) -> bool:
        keys = bytearray().join(key for key, _ in chunk)
        values = bytearray().join(value for _, value in chunk)
        if len(keys) != self.key_size * len(chunk) or len(values) != self.value_size * len(chunk):
            return False  # element by element says which
        try:
            call(_MAP_UPDATE_BATCH, packed("QQQQIIQQ", 0, 0, address(keys), address(values), len(chunk), self.fd, 0, 0))
        except OSError as error:
            if error.errno in {errno.EINVAL, _ENOTSUPP}:
                self._has_batches = False
                return False
            self._explain(error)
        return True

    def _items_by_batch(self) -> Iterator[tuple[bytes, bytes]]:
        count = min(_BATCH, self.max_entries)
        position = 0  # address of the last answer's cursor; 0: from the beginning
        cursors = [bytearray(max(self.key_size, 4)) for _ in range(2)]
        at_end = False
        while not at_end:
            keys, values = bytearray(self.key_size * count), bytearray(self.value_size * count)
            cursors.reverse()
            next_position = address(cursors[0])
            batch = packed("QQQQIIQQ", position, next_position, address(keys), address(values), count, self.fd, 0, 0)
            try:
                call(_MAP_LOOKUP_BATCH, batch)
            except OSError as error:
                if error.errno == errno.ENOSPC:  # one hash bucket holds more than `count`
                    count *= 2
                    cursors.reverse()
                    continue
                if error.errno in {errno.EINVAL, _ENOTSUPP}:
                    raise _NoBatchesError from None
                if error.errno != errno.ENOENT:
                    raise
                at_end = True
            (filled,) = struct.unpack_from("=I", batch, 32)
            position = next_position
            for index in range(filled):
                key_at, value_at = index * self.key_size, index * self.value_size
                yield bytes(keys[key_at : key_at + self.key_size]), bytes(values[value_at : value_at + self.value_size])

    def _keys(self) -> Iterable[bytes]:
        """By BPF_MAP_GET_NEXT_KEY, which starts over when the key it stands on has gone: bounded, each key once."""
        keys: dict[bytes, None] = {}
        attributes = packed("I4xQQQ", self.fd, 0, address(self._value), 0)
        for _ in range(2 * self.max_entries + 1):
            try:
                call(_MAP_NEXT_KEY, attributes)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                break
            key = bytes(self._value[: self.key_size])
            keys[key] = None
            self._key[: self.key_size] = key
            attributes = self._element
        return keys


class _NoBatchesError(Exception):
    """The kernel has no batched look-up for this kind of map."""


# --- loading ---------------------------------------------------------------------------------------------------------
def ensure_bpffs(path: Path) -> bool:
    """Makes the directory `path` exist on a bpffs; True if one had to be mounted (at /sys/fs/bpf, else at `path`)."""
    standard = Path("/sys/fs/bpf")
    mounted = False
    if not _on_bpffs(path):
        mount_point = standard if path.is_relative_to(standard) else path
        if mount_point != standard:
            mount_point.mkdir(parents=True, exist_ok=True)
        if _libc.mount(b"bpf", os.fsencode(mount_point), b"bpf", _MS_NOSUID_NODEV_NOEXEC, b"mode=0700") != 0:
            raise BpfError(
                f"{path} is not on a bpffs, and mounting one at {mount_point} failed "
                f"({os.strerror(ctypes.get_errno())}); as root run: mount -t bpf bpf {mount_point}"
            )
        mounted = True
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        hint = f"as root run: mkdir -p {path}"
        if error.errno == errno.EROFS:  # for a service that systemd confines, which makes it at its start
            hint = "as root run: systemctl restart registry-enforcer"
        raise BpfError(f"{path} cannot be made ({error.strerror}); {hint}") from None
    _check_owner(path)
    return mounted


def _check_owner(path: Path) -> None:
    """BpfError if others could have pinned what is below `path`: a bpffs is writable for all unless its mount says no,
    and so anybody may have made our directory first."""
    try:
        with trusted_files.directory(path):
            pass
    except trusted_files.UntrustedError as error:
        raise BpfError(f"{error}, or name another --bpffs") from None


def _on_bpffs(path: Path) -> bool:
    while not path.exists():
        path = path.parent
    status = ctypes.create_string_buffer(256)  # struct statfs; f_type is its first long
    if _libc.statfs(os.fsencode(path), status) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return ctypes.c_long.from_buffer(status).value & 0xFFFFFFFF == _BPFFS_MAGIC


def build_inputs(loader: Loader) -> list[Path]:
    """What `loader` reads: of the installed package, else of the checkout. Raises BpfError if it is not there.

    libbpf: the object with a ring buffer, and the one with perf buffers for kernels before 5.8. bcc: the C unit.
    """
    package = Path(__file__).parent
    directories = package / "objects", package.parent / "build"
    names = ["enforcer.bpf.o", "enforcer-legacy.bpf.o"]
    if loader is Loader.BCC:
        directories = package / "objects" / "bpf", package.parent / "bpf"
        names = ["enforcer.bpf.c"]
    for directory in directories:
        if all((directory / name).is_file() for name in names):
            return [directory / name for name in names]
    raise BpfError(
        f"no {' and '.join(names)} in {' or '.join(map(str, directories))}; "
        + ("run `make bpf` in the checkout" if loader is Loader.LIBBPF else "reinstall registry-enforcer")
    )


def load(bpffs: Path, *, loader: Loader = Loader.LIBBPF, inputs: list[Path] | None = None) -> LoadReport:
    """Loads and pins the programs below `bpffs`, or adopts the pins if this very build is there already.

    A program that the verifier refuses is left out and reported; anything else that fails raises BpfError and leaves
    nothing behind. Other generations stay: attach this one, then `remove_other_generations`.
    """
    inputs = inputs or build_inputs(loader)
    generation = bpffs / f"generation-{_digest(loader, inputs)}"
    if (generation / "report").exists():
        try:
            report = read_report(generation)
            with KernelState(report):
                return report
        except (ForeignPinError, OSError, ValueError, TypeError, KeyError) as error:
            log.warning("the BPF pins at %s are not adopted, and loaded anew: %s", generation, error)
    _remove_generation(generation)  # half of one: a loader, or its removal, was killed
    try:
        _run_loader(loader, generation, inputs)
    except BaseException:
        _remove_generation(generation)
        raise
    return read_report(generation, adopted=False)


def read_report(generation: Path, *, adopted: bool = True) -> LoadReport:
    """The report that was pinned with `generation`. Raises OSError if there is none."""
    with _opened(_open_pin(generation / "report")) as fd:
        text = BpfMap(fd, "report").lookup(bytes(4)) or b""
    facts = json.loads(text.rstrip(b"\0"))
    return LoadReport(generation, Loader(facts.pop("loader")), adopted, **facts)


def pin_report(facts: Mapping[str, object], path: Path) -> None:
    """Keeps `facts` as the one element of a map pinned at `path`: a bpffs has no files."""
    text = json.dumps(facts).encode()
    with _opened(call(_MAP_CREATE, packed("IIIII", _ARRAY, 4, len(text), 1, 0))) as fd:
        BpfMap(fd, "report").update(bytes(4), text)
        pin(fd, path)


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


def has_ring_buffer() -> bool:
    """Whether the kernel has BPF_MAP_TYPE_RINGBUF (5.8). Raises OSError if it lets us create no map at all."""
    try:
        os.close(call(_MAP_CREATE, packed("IIIII", _RINGBUF, 0, 0, mmap.PAGESIZE, 0)))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def forbidden() -> str | None:
    """Why this process may load no program at all; None if it may, whatever else may go wrong then.

    Tried with the smallest program of the type that learns. Raises BpfError on an architecture that is not known.
    """
    raise_memlock()
    instructions = bytearray.fromhex("b7000000000000009500000000000000")  # r0 = 0; exit
    licence = bytearray(b"GPL\0")
    attributes = packed("IIQQIIQII", ProgramType.SCHED_CLS, 2, address(instructions), address(licence), 0, 0, 0, 0, 0)
    try:
        os.close(call(PROG_LOAD, attributes))
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return "this kernel has no bpf(2) (CONFIG_BPF_SYSCALL)"
        if error.errno == errno.EPERM:
            return "BPF programs may not be loaded" + _advice(os.strerror(errno.EPERM))
        raise BpfError(f"the smallest BPF program is refused: {error.strerror}") from error
    return None


def raise_memlock() -> None:
    """Before 5.11 maps and programs count as locked memory; where the limit cannot be raised, loading says so."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _digest(loader: Loader, inputs: list[Path]) -> str:
    digest = hashlib.sha256(f"{loader.value}\n{_REPORT_FIELDS}\n{kernel_abi.render_shared_header()}".encode())
    headers = sorted(inputs[0].parent.glob("*.h")) if loader is Loader.BCC else []
    for path in inputs + headers:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _run_loader(loader: Loader, into: Path, inputs: list[Path]) -> None:
    command = [sys.executable, "-m", "enforcer.bpf_loader", loader.value, into, *(path.resolve() for path in inputs)]
    try:
        child = subprocess.run(
            command,
            cwd=Path(__file__).parent.parent,
            env=LOADER_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_LOAD_DEADLINE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BpfError(f"loading the BPF programs with {loader.value} took over {_LOAD_DEADLINE_SECONDS} s") from None
    if child.returncode != 0:
        lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
        compiler = [line for line in lines[:-2] if "error:" in line]
        said = " | ".join(compiler[:1] + lines[-2:]) or f"exit status {child.returncode}"
        raise BpfError(f"{loader.value} could not load the BPF programs: {said}{_advice(child.stderr)}")


def _advice(stderr: str) -> str:
    """What the operator can do about what the loader said."""
    if "libbpf.so" in stderr:
        return "; install libbpf 1.0 or later (Debian, Ubuntu: apt install libbpf1)"
    if "No module named 'bcc'" in stderr or "libbcc.so" in stderr:
        return "; install bcc of the distribution (Debian, Ubuntu: apt install python3-bpfcc), not what pip calls bcc"
    if "file not found" in stderr:
        return "; install the kernel's user-space headers (Debian, Ubuntu: apt install linux-libc-dev)"
    if "Operation not permitted" not in stderr and "Cannot allocate memory" not in stderr:
        return ""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    capabilities = int(status["CapEff"], 16)
    if not capabilities & (1 << 21 | 1 << 39):  # CAP_SYS_ADMIN, CAP_BPF
        return "; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (before 5.8: CAP_SYS_ADMIN)"
    with contextlib.suppress(OSError):
        if "[none]" not in Path("/sys/kernel/security/lockdown").read_text():
            return "; kernel lockdown forbids it: see /sys/kernel/security/lockdown"
    return "; before Linux 5.11 maps count as locked memory: LimitMEMLOCK=infinity in the unit, or ulimit -l unlimited"


def remove_other_generations(report: LoadReport) -> list[Path]:
    """Unlinks what earlier builds pinned beside `report.generation`; the pins that went."""
    return _remove_generations(report.generation.parent, keep=report.generation)


def remove(bpffs: Path, cgroup: Path | None) -> list[Path]:
    """Detaches everything from `cgroup`, unlinks every pin below `bpffs` and the directory; the pins that went.

    `cgroup` None: nothing is attached to any.

    tc filters hold programs of their own: they stay until they are deleted.
    """
    removed = []
    if bpffs.is_dir():
        _check_owner(bpffs)
    if cgroup is not None and any(bpffs.glob(f"generation-*/programs/{_STAMP}*")):
        _remove_stamps(cgroup)
    for directory in bpffs / "links", bpffs / "attached":
        if directory.is_dir() and cgroup is not None:
            for path in sorted(directory.iterdir()):
                detach_cgroup(path.name, cgroup, bpffs)
                removed.append(path)
            directory.rmdir()
    removed += _remove_generations(bpffs, keep=None)
    if bpffs.is_dir() and not bpffs.is_mount():
        bpffs.rmdir()
    return removed


def _remove_generations(bpffs: Path, keep: Path | None) -> list[Path]:
    generations = sorted(bpffs.glob("generation-*"))
    return [pinned for generation in generations if generation != keep for pinned in _remove_generation(generation)]


def _remove_generation(generation: Path) -> list[Path]:
    (generation / "report").unlink(missing_ok=True)  # first: whoever is killed in the middle leaves no whole one
    return _remove_tree(generation)


def _remove_tree(top: Path) -> list[Path]:
    removed = []
    for directory, _, names in os.walk(top, topdown=False):
        for name in sorted(names):
            path = Path(directory, name)
            path.unlink()
            removed.append(path)
        Path(directory).rmdir()
    return removed


# --- what is loaded --------------------------------------------------------------------------------------------------
class ForeignPinError(BpfError):
    """A pin is not what was pinned there when its generation was loaded."""


class KernelState:
    """Maps and programs of one generation, by name. Closing it ends nothing in the kernel.

    ForeignPinError if something else stands in for one of them, or one is missing.
    """

    def __init__(self, report: LoadReport) -> None:
        self.report = report
        self.maps: dict[str, BpfMap] = {}
        self.programs: dict[str, Program] = {}
        self._pins: dict[Path, tuple[int, int]] = {}  # path -> (descriptor, inode)
        self._fds = contextlib.ExitStack()
        try:
            for path in sorted((report.generation / "maps").iterdir()):
                self.maps[path.name] = BpfMap(self._open(path), path.name)
            for path in sorted((report.generation / "programs").iterdir()):
                self.programs[path.name] = _program(self._open(path), path.name)
            self._open(report.generation / "report")  # last: whoever finds it finds the others
            found = {f"maps/{name}": each.id for name, each in self.maps.items()}
            found |= {f"programs/{name}": each.id for name, each in self.programs.items()}
            # The kernel never gives an id twice before it has given four billion others.
            if wrong := sorted(name for name, _ in found.items() ^ report.ids.items()):
                raise ForeignPinError(f"{', '.join(dict.fromkeys(wrong))} below {report.generation} was replaced")
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> int:
        fd = _open_pin(path)
        self._fds.callback(os.close, fd)
        self._pins[path] = fd, path.lstat().st_ino
        return fd

    def restore_pins(self) -> list[str]:
        """Pins again what is not there any more, or what something else stands in for; their names. Raises BpfError."""
        lost = [path for path, (_, inode) in self._pins.items() if _inode(path) != inode]
        if not lost:
            return []
        generation = self.report.generation
        try:
            ensure_bpffs(generation.parent)
            for path in lost:
                fd, _ = self._pins[path]
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                pin(fd, path)
                self._pins[path] = fd, path.lstat().st_ino
        except OSError as error:
            raise BpfError(f"{generation} cannot be pinned: {error.strerror}") from error
        return [str(path.relative_to(generation)) for path in lost]

    def now_ns(self) -> int:
        """Now on the clock that this build's maps and events count in."""
        return time.clock_gettime_ns(self.report.clock)

    def close(self) -> None:
        """Closes every descriptor."""
        self._fds.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


# --- cgroups ---------------------------------------------------------------------------------------------------------
def _opened_cgroup(cgroup: Path) -> contextlib.AbstractContextManager[int]:
    return _opened(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def attach_cgroup(program: Program, cgroup: Path, bpffs: Path) -> None:
    """Attaches `program` to the v2 cgroup at the hook of its name, in place of what `bpffs` had attached there.

    Connections never find the hook empty in between: an existing link is updated, what replaces one is attached first.
    Outlives this process. Raises BpfError.
    """
    hook = CgroupHook[program.name.upper()]
    try:
        with _opened_cgroup(cgroup) as cgroup_fd:
            link_path = bpffs / "links" / program.name
            if not (link_path.exists() and _update_link(program, cgroup_fd, link_path)):
                _attach(program, cgroup_fd, hook, bpffs)
    except OSError as error:
        hints = {
            errno.EBADF: "; it is not of cgroup v2: name one with --cgroup",
            errno.EPERM: "; another program may hold the hook for itself, here or above: see bpftool cgroup tree",
        }
        hint = hints.get(error.errno or 0, "")
        raise BpfError(f"{program.name} cannot be attached to cgroup {cgroup}: {error.strerror}{hint}") from error


def detach_cgroup(name: str, cgroup: Path, bpffs: Path) -> bool:
    """Takes the attachment `name` away; whether there was one. `cgroup` matters before 5.7 only."""
    link_path, program_path = bpffs / "links" / name, bpffs / "attached" / name
    found = link_path.exists() or program_path.exists()
    if link_path.exists():
        # Unlinking detaches some milliseconds later; this does it now. Since 5.9, EINVAL before.
        with _opened(_open_pin(link_path)) as link, contextlib.suppress(OSError):
            call(_LINK_DETACH, packed("I", link))
        link_path.unlink()
    if program_path.exists():
        if cgroup.exists():  # else its attachments have gone with it
            with _opened_cgroup(cgroup) as cgroup_fd, _opened(_open_pin(program_path)) as fd:
                _detach_program(fd, cgroup_fd, CgroupHook[name.upper()])
        program_path.unlink()
    return found


def attached_programs(cgroup: Path, hook: CgroupHook) -> list[int]:
    """Ids of all programs attached to this very cgroup at `hook`, other tools' too."""
    with _opened_cgroup(cgroup) as cgroup_fd:
        return _attached(cgroup_fd, hook)


def is_attached(program: Program, cgroup: Path, hook: CgroupHook) -> bool:
    """Whether `program` is at `hook` of this very cgroup; False also if there is no such cgroup. Raises BpfError."""
    try:
        return program.id in attached_programs(cgroup, hook)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BpfError(f"what is attached to cgroup {cgroup} cannot be read: {error.strerror}") from error


def _attached(cgroup_fd: int, hook: CgroupHook) -> list[int]:
    ids = bytearray(4 * 64)  # BPF_CGROUP_MAX_PROGS
    query = packed("IIIIQI4x", cgroup_fd, hook, 0, 0, address(ids), 64)
    call(_PROG_QUERY, query)
    (count,) = struct.unpack_from("=I", query, 24)
    return list(struct.unpack_from(f"={count}I", ids))


def _update_link(program: Program, cgroup_fd: int, path: Path) -> bool:
    """Whether the link pinned at `path` belongs to this cgroup; if so it runs `program` now."""
    with _opened(_open_pin(path)) as link:
        _, _, program_id, cgroup_id = struct.unpack_from("=IIIxxxxQ", _object_info(link, 32))
        if cgroup_id != os.fstat(cgroup_fd).st_ino:  # another one, or 0: it was removed
            return False
        if program_id != program.id:
            call(_LINK_UPDATE, packed("IIII", link, program.fd, 0, 0))
    return True


def _attach(program: Program, cgroup_fd: int, hook: CgroupHook, bpffs: Path) -> None:
    try:
        link = call(_LINK_CREATE, packed("IIII", program.fd, cgroup_fd, hook, 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _attach_without_link(program, cgroup_fd, hook, bpffs)
        return
    with _opened(link):
        path = bpffs / "links" / program.name
        path.unlink(missing_ok=True)
        _pin_in(link, path)


def _attach_without_link(program: Program, cgroup_fd: int, hook: CgroupHook, bpffs: Path) -> None:
    """Before 5.7."""
    path = bpffs / "attached" / program.name
    if program.id in _attached(cgroup_fd, hook):
        return
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(_opened(_open_pin(path))) if path.exists() else None
        call(_PROG_ATTACH, packed("IIIII", cgroup_fd, program.fd, hook, _F_ALLOW_MULTI, 0))
        path.unlink(missing_ok=True)
        _pin_in(program.fd, path)
        if old is not None and _program(old, program.name).id != program.id:
            _detach_program(old, cgroup_fd, hook)


def _detach_program(fd: int, cgroup_fd: int, hook: CgroupHook) -> None:
    try:
        call(_PROG_DETACH, packed("IIIII", cgroup_fd, fd, hook, 0, 0))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _pin_in(fd: int, path: Path) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    pin(fd, path)


# --- stamps: a program for each scope, attached to the cgroups of that scope; before 5.8 -----------------------------
_STAMP = "stamp_"
_PROG_GET_FD_BY_ID = 13


def stamp_cgroup(program: Program | None, cgroup: Path) -> bool:
    """Attaches `program` (stamp_...) to the v2 cgroup, in place of any other stamp; None: takes it away.

    Connections never find the cgroup without a stamp in between. False if there is no such cgroup. Raises BpfError.
    """
    try:
        with _opened_cgroup(cgroup) as cgroup_fd:
            hook = CgroupHook.SOCK_CREATE
            present = [number for number in _attached(cgroup_fd, hook) if _is_stamp(number)]
            if program is not None and program.id not in present:
                call(_PROG_ATTACH, packed("IIIII", cgroup_fd, program.fd, hook, _F_ALLOW_MULTI, 0))
            for number in present:
                if program is None or number != program.id:
                    with _opened(_program_by_id(number)) as fd:
                        _detach_program(fd, cgroup_fd, hook)
    except FileNotFoundError:
        return False
    except OSError as error:
        name = "stamps" if program is None else program.name
        raise BpfError(f"{name} cannot be attached to cgroup {cgroup}: {error.strerror}") from error
    return True


def _program_by_id(number: int) -> int:
    return call(_PROG_GET_FD_BY_ID, packed("III", number, 0, 0))


def _is_stamp(number: int) -> bool:
    with _opened(_program_by_id(number)) as fd:
        return _object_info(fd, 232)[64:80].startswith(_STAMP.encode())  # struct bpf_prog_info, name


def _remove_stamps(cgroup: Path) -> None:
    for directory, _, _ in os.walk(cgroup):
        stamp_cgroup(None, Path(directory))


# --- events ----------------------------------------------------------------------------------------------------------
class EventReader:
    """What BPF reports, read without a thread: `fileno()` is readable when `read()` has something.

    The buffer in the kernel is the only queue. Where it is full the kernel tells the program, which counts the loss
    (perf buffers: since 5.1).
    """

    def __init__(self, events: BpfMap) -> None:
        self.lost = 0  # events that there was no memory for in this process
        self._records: list[bytes] = []
        self._libbpf = _event_functions()
        self._perf = events.type == _PERF_EVENT_ARRAY
        if self._perf:
            pages = max(8, min(64, kernel_abi.EVENT_BYTES // _possible_cpus() // mmap.PAGESIZE))
            pages = 1 << (pages.bit_length() - 1)
            self._callback: object = _PERF_SAMPLE(self._take_perf)
            self._buffer = self._libbpf.perf_buffer__new(events.fd, pages, self._callback, None, None, None)
        else:
            self._callback = _RING_SAMPLE(self._take_ring)
            self._buffer = self._libbpf.ring_buffer__new(events.fd, self._callback, None, None)
        if not self._buffer:
            number = ctypes.get_errno()
            raise BpfError(f"cannot read the BPF events: {os.strerror(number)}{_advice(os.strerror(number))}")
        epoll_fd = self._libbpf.perf_buffer__epoll_fd if self._perf else self._libbpf.ring_buffer__epoll_fd
        self._fd = int(epoll_fd(self._buffer))

    def fileno(self) -> int:
        """For select, epoll and asyncio's add_reader."""
        return self._fd

    def read(self) -> list[bytes]:
        """The oldest waiting events: some hundred at most, so that a flood cannot hold up the caller; [] if none."""
        consume = self._libbpf.perf_buffer__consume if self._perf else self._libbpf.ring_buffer__consume
        result = consume(self._buffer)
        if result < 0 and result != -errno.EAGAIN:
            raise OSError(-result, f"reading BPF events: {os.strerror(-result)}")
        records, self._records = self._records, []
        return records

    def close(self) -> None:
        """Unmaps the buffer; events wait in the ring for the next reader."""
        if self._buffer:
            free = self._libbpf.perf_buffer__free if self._perf else self._libbpf.ring_buffer__free
            free(self._buffer)
            self._buffer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _take_ring(self, _context: int | None, data: int, size: int) -> int:
        self._take(data, size)
        return -errno.EAGAIN if len(self._records) >= _EVENTS_A_READ else 0  # negative: stop after this one

    def _take_perf(self, _context: int | None, _cpu: int, data: int, size: int) -> None:
        self._take(data, size)

    def _take(self, data: int, size: int) -> None:
        try:
            self._records.append(ctypes.string_at(data, size))
        except MemoryError:  # libbpf has called: nobody above would see it, and the event is gone from the buffer
            self.lost += 1


_RING_SAMPLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_PERF_SAMPLE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32)


def _event_functions() -> ctypes.CDLL:
    libbpf = open_libbpf()
    libbpf.ring_buffer__new.argtypes = (ctypes.c_int, _RING_SAMPLE, ctypes.c_void_p, ctypes.c_void_p)
    pointer = ctypes.c_void_p
    libbpf.perf_buffer__new.argtypes = (ctypes.c_int, ctypes.c_size_t, _PERF_SAMPLE, pointer, pointer, pointer)
    for kind in "ring", "perf":
        getattr(libbpf, f"{kind}_buffer__new").restype = ctypes.c_void_p
        for operation in "epoll_fd", "consume", "free":
            getattr(libbpf, f"{kind}_buffer__{operation}").argtypes = (ctypes.c_void_p,)
        getattr(libbpf, f"{kind}_buffer__free").restype = None
    return libbpf


def open_libbpf() -> ctypes.CDLL:
    """libbpf 1.x of the distribution. Raises BpfError if there is none."""
    try:
        return ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise BpfError(f"{error}{_advice(str(error))}") from error


# --- one packet, without a network -----------------------------------------------------------------------------------
def run_packet(program: Program, packet: bytes, *, mark: int = 0, interface: int = 0, repeat: int = 1) -> PacketRun:
    """Runs a tc program over an Ethernet frame (BPF_PROG_TEST_RUN, 5.2 for the context). Raises OSError.

    `mark` and `interface` (an index that exists, 0: lo) are the skb's before the run.
    """
    frame, returned = bytearray(packet), bytearray(len(packet) + 256)
    # struct __sk_buff: mark at 8, ingress_ifindex at 36, ifindex at 40
    context = packed("8xI24xII148x", mark, interface, interface)
    context_out = bytearray(len(context))
    run = packed(
        "IIIIQQIIIIQQ",
        *(program.fd, 0, len(frame), len(returned), address(frame), address(returned)),
        *(repeat, 0, len(context), len(context_out), address(context), address(context_out)),
    )
    call(_PROG_TEST_RUN, run)
    verdict, _, size = struct.unpack_from("=III", run, 4)
    (duration_ns,) = struct.unpack_from("=I", run, 36)
    (mark_after,) = struct.unpack_from("=I", context_out, 8)
    return PacketRun(verdict, bytes(returned[:size]), mark_after, duration_ns)
