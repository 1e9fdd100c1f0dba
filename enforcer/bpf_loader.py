"""Child of `enforcer.bpf`: loads the BPF programs, pins maps, programs and a report, and exits.

A process of its own, because the memory of libbpf's ELF reader (10 MB) and of bcc's LLVM (130 MB) leaves with it, and
because a deadline can end it. Programs are loaded one by one, so that an old kernel which refuses one keeps the others.

    python -m enforcer.bpf_loader libbpf DIRECTORY OBJECT LEGACY_OBJECT
    python -m enforcer.bpf_loader bcc DIRECTORY SOURCE

DIRECTORY is made on a bpffs. If it fails, it says why on standard error and exits 1; what it pinned until then stays
for its parent to remove.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from . import bpf, ladder

_PR_SET_PDEATHSIG = 1
_LOG_BYTES = 0xFFFFFF  # the most that kernels before 5.8 accept: UINT_MAX >> 8, kernel/bpf/verifier.c
# What needs bpf_get_ns_current_pid_tgid in cgroup hooks, since 6.10, and bpf_get_netns_cookie in tc, since 6.15.
_VARIANT = re.compile(r"_(?:pidns|netns)$")


class RefusedError(Exception):
    """The verifier refused one program; the text is its last lines."""


class Unit(Protocol):
    """One compiled BPF unit whose maps exist already."""

    @property
    def maps(self) -> Mapping[str, int]:
        """name -> fd"""

    @property
    def symbols(self) -> Sequence[str]:
        """The C functions that are programs."""

    def load(self, symbol: str) -> int:
        """The program's fd. Raises RefusedError, or OSError if the fault is not the program's."""


# --- libbpf ----------------------------------------------------------------------------------------------------------
class LibbpfUnit:
    """An object file, and each program from a fresh copy of it over the same maps: once the verifier has refused one,
    libbpf can do nothing more with a copy."""

    def __init__(self, path: Path) -> None:
        self._libbpf = _loading_functions()
        self._path = path
        self._log = mmap.mmap(-1, _LOG_BYTES)  # costs the pages that are written
        self._first = self._open()  # stays open: it owns the maps
        self.symbols = [self._name("program", program) for program in self._each("program", self._first)]
        self._load(self._first, keep=None)
        self.maps = {self._name("map", m): int(self._libbpf.bpf_map__fd(m)) for m in self._each("map", self._first)}

    def load(self, symbol: str) -> int:
        """See Unit."""
        copy = self._open()
        try:
            for each in self._each("map", copy):
                _check(self._libbpf.bpf_map__reuse_fd(each, self.maps[self._name("map", each)]), "reusing a map")
            try:
                program = self._load(copy, keep=symbol)
            except OSError as error:
                raise _refusal_or(error, self._log) from error
            return os.dup(self._libbpf.bpf_program__fd(program))
        finally:
            self._libbpf.bpf_object__close(copy)

    def _open(self) -> int:
        opened = self._libbpf.bpf_object__open(os.fsencode(self._path))
        if not opened:
            raise OSError(ctypes.get_errno(), f"{self._path} is not a BPF object: {os.strerror(ctypes.get_errno())}")
        return int(opened)

    def _load(self, opened: int, keep: str | None) -> int | None:
        kept = None
        for program in self._each("program", opened):
            is_kept = self._name("program", program) == keep
            kept = program if is_kept else kept
            self._libbpf.bpf_program__set_autoload(program, is_kept)
            if is_kept:
                self._log[:1] = b"\0"
                self._libbpf.bpf_program__set_log_buf(program, bpf.address(self._log), _LOG_BYTES)
        _check(self._libbpf.bpf_object__load(opened), f"loading {keep or 'the maps'} of {self._path.name}")
        return kept

    def _each(self, kind: str, opened: int) -> Iterator[int]:
        following = getattr(self._libbpf, f"bpf_object__next_{kind}")
        found = following(opened, None)
        while found:
            yield found
            found = following(opened, found)

    def _name(self, kind: str, item: int) -> str:
        return bytes(getattr(self._libbpf, f"bpf_{kind}__name")(item)).decode()


def _loading_functions() -> ctypes.CDLL:
    libbpf = bpf.open_libbpf()
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("bpf_object__open", pointer, (ctypes.c_char_p,)),
        ("bpf_object__load", ctypes.c_int, (pointer,)),
        ("bpf_object__close", None, (pointer,)),
        ("bpf_object__next_program", pointer, (pointer, pointer)),
        ("bpf_object__next_map", pointer, (pointer, pointer)),
        ("bpf_program__name", ctypes.c_char_p, (pointer,)),
        ("bpf_program__fd", ctypes.c_int, (pointer,)),
        ("bpf_program__set_autoload", ctypes.c_int, (pointer, ctypes.c_bool)),
        ("bpf_program__set_log_buf", ctypes.c_int, (pointer, pointer, ctypes.c_size_t)),
        ("bpf_map__name", ctypes.c_char_p, (pointer,)),
        ("bpf_map__fd", ctypes.c_int, (pointer,)),
        ("bpf_map__reuse_fd", ctypes.c_int, (pointer, ctypes.c_int)),
    ):
        function = getattr(libbpf, name)
        function.restype, function.argtypes = result, arguments
    return libbpf


def _check(result: int, doing: str) -> None:
    """libbpf 1.x returns -errno."""
    if result < 0:
        raise OSError(-result, f"{doing}: {os.strerror(-result)}")


# --- bcc -------------------------------------------------------------------------------------------------------------
# What bcc includes of a kernel tree before it compiles anything. Our unit needs UAPI headers only (linux-libc-dev), so
# these stand in for the headers of the running kernel, which WSL 2 and most hosts do not have; they are used even where
# there are some, for one result everywhere. bpf.h is empty because bcc brings its own; any other <uapi/...> is found
# through a link to /usr/include.
_KERNEL_TREE = {
    "include/linux/kconfig.h": """\
#define CONFIG_BPF_SYSCALL 1
#define PAGE_SIZE 4096
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef short s16;
typedef int s32;
typedef long long s64;
typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef _Bool bool;
""",
    "include/linux/log2.h": "",
    "include/linux/bpf.h": "",
    "include/uapi/linux/bpf.h": "",
    "include/asm/page.h": "",
}


class BccUnit:
    """A C source: bcc compiles it and makes the maps; its programs are loaded directly, for the verifier's log."""

    def __init__(self, source: Path, legacy: bool) -> None:
        compile_unit, self._libbcc = _import_bcc()
        with tempfile.TemporaryDirectory(prefix="registry-enforcer-") as tree:
            for name, text in _KERNEL_TREE.items():
                path = Path(tree, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            Path(tree, "uapi").symlink_to("/usr/include")
            os.environ["BCC_KERNEL_SOURCE"] = tree
            system = "/usr/include", f"/usr/include/{sysconfig.get_config_var('MULTIARCH')}", tree
            flags = [f"-I{source.parent}", *(f"-idirafter{directory}" for directory in system)]
            try:
                self._module = compile_unit(src_file=str(source), cflags=flags + ["-DLEGACY_KERNEL"] * legacy)
            except Exception as error:  # bcc raises nothing else; the cause is on standard error
                raise bpf.BpfError(str(error)) from error
        module, names = self._module.module, self._libbcc.bpf_function_name
        self.symbols = [names(module, n).decode() for n in range(self._libbcc.bpf_num_functions(module))]
        self.maps = {
            self._libbcc.bpf_table_name(module, n).decode(): int(self._libbcc.bpf_table_fd_id(module, n))
            for n in range(self._libbcc.bpf_num_tables(module))
        }

    def load(self, symbol: str) -> int:
        """See Unit."""
        program_type, attach_type = _kind(_VARIANT.sub("", symbol))
        instructions = bytearray(self._module.dump_func(symbol.encode()))
        licence = bytearray(self._libbcc.bpf_module_license(self._module.module) + b"\0")
        log = mmap.mmap(-1, _LOG_BYTES)
        for level in 0, 1:  # the log only of what is refused: writing it takes most of the time
            attributes = bpf.packed(
                "IIQQIIQII16sII",
                *(program_type, len(instructions) // 8, bpf.address(instructions), bpf.address(licence)),
                *(level, _LOG_BYTES * level, bpf.address(log) * level, 0, 0, symbol[:15].encode(), 0, attach_type),
            )
            try:
                return bpf.call(bpf.PROG_LOAD, attributes)
            except OSError as error:
                refusal = error
        raise _refusal_or(refusal, log) from refusal


def _kind(name: str) -> tuple[bpf.ProgramType, int]:
    """Type and attach type of a program, which bcc does not read from its section."""
    if name in ladder.STAMPS:
        return bpf.ProgramType.CGROUP_SOCK, bpf.CgroupHook.SOCK_CREATE
    if name.upper() not in bpf.CgroupHook.__members__:
        return bpf.ProgramType.SCHED_CLS, 0
    hook = bpf.CgroupHook[name.upper()]
    types = {
        bpf.CgroupHook.SOCK_CREATE: bpf.ProgramType.CGROUP_SOCK,
        bpf.CgroupHook.SOCK_OPS: bpf.ProgramType.SOCK_OPS,
        bpf.CgroupHook.SETSOCKOPT: bpf.ProgramType.CGROUP_SOCKOPT,
    }
    # Before 4.17 the kernel knows no expected attach type, and of sock_ops it wants none.
    return types.get(hook, bpf.ProgramType.CGROUP_SOCK_ADDR), 0 if hook is bpf.CgroupHook.SOCK_OPS else hook


def _import_bcc() -> tuple[Any, Any]:
    """bcc.BPF and the library below it, some of whose functions bcc does not declare."""
    # A venv does not see the distribution's modules; bcc's are pure Python over ctypes and serve any version.
    sys.path.append("/usr/lib/python3/dist-packages")
    try:
        from bcc import BPF
        from bcc.libbcc import lib
    except (ImportError, OSError) as error:
        raise bpf.BpfError(str(error)) from error
    module, index = ctypes.c_void_p, ctypes.c_size_t
    lib.bpf_num_tables.restype, lib.bpf_num_tables.argtypes = ctypes.c_size_t, (module,)
    lib.bpf_table_name.restype, lib.bpf_table_name.argtypes = ctypes.c_char_p, (module, index)
    lib.bpf_table_fd_id.restype, lib.bpf_table_fd_id.argtypes = ctypes.c_int, (module, index)
    return BPF, lib


# --- both ------------------------------------------------------------------------------------------------------------
def _refusal_or(error: OSError, log: mmap.mmap) -> Exception:
    """RefusedError, unless permission or memory is lacking: then nothing else would load either."""
    if error.errno in {errno.EPERM, errno.ENOMEM}:
        return error
    lines = [line for line in log[: log.find(b"\0")].decode(errors="replace").splitlines() if line.strip()]
    return RefusedError(" | ".join([os.strerror(error.errno or 0), *lines[-4:]]))


def load_and_pin(loader: bpf.Loader, into: Path, inputs: list[Path]) -> None:
    """Does all of the child's work. Raises BpfError or OSError."""
    started = time.monotonic()
    for directory in into, into / "maps", into / "programs":
        directory.mkdir(mode=0o700)
    # The ring buffer and bpf_ktime_get_boot_ns came together.
    legacy = not bpf.has_ring_buffer()
    clock = time.CLOCK_MONOTONIC if legacy else time.CLOCK_BOOTTIME
    unit: Unit = BccUnit(inputs[0], legacy) if loader is bpf.Loader.BCC else LibbpfUnit(inputs[legacy])
    ids: dict[str, int] = {}
    for name, fd in unit.maps.items():
        bpf.pin(fd, into / "maps" / name)
        ids[f"maps/{name}"] = bpf.object_id(fd)
    programs: dict[str, str] = {}
    refused: dict[str, str] = {}
    # A variant before the plain program, which is not needed where the variant loads; last what replaces the connect
    # hooks where they do not.
    last = ladder.STAMPS | {"sock_ops"}
    for symbol in sorted(unit.symbols, key=lambda symbol: (symbol in last, not _VARIANT.search(symbol))):
        name = _VARIANT.sub("", symbol)
        if name in programs or (name in last and programs.keys() >= ladder.CONNECT_HOOKS):
            continue
        try:
            fd = unit.load(symbol)
        except RefusedError as refusal:
            refused[symbol] = str(refusal)
            continue
        bpf.pin(fd, into / "programs" / name)
        ids[f"programs/{name}"] = bpf.object_id(fd)
        os.close(fd)
        programs[name] = symbol
    facts = {
        "loader": loader.value,
        "clock": clock,
        "programs": programs,
        "refused": refused,
        "ids": ids,
        "seconds": round(time.monotonic() - started, 3),
        "peak_kib": _peak_kib(),
    }
    bpf.pin_report(facts, into / "report")


def _peak_kib() -> int:
    """Peak resident memory of this program; ru_maxrss would include the parent's, from before exec."""
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1])


def main(arguments: list[str]) -> int:
    """Exit status."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody would rename or remove what an orphan pins
    loader, into, *inputs = arguments
    bpf.raise_memlock()
    try:
        load_and_pin(bpf.Loader(loader), Path(into), [Path(text) for text in inputs])
    except (bpf.BpfError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
