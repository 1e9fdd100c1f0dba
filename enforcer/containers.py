"""Which container: what is running on this host, by the engines' own state and by /proc.

Nothing is believed of an engine that is not root's: a socket or a file that a user could have made names nobody. Every
reading is bounded in time and size, and what cannot be read is unknown. Addresses are looked up anew each time, since
engines give them away again at once; what an id means never changes, and is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from enforcer.attribution import (
    Conmon,
    Container,
    bundled_container,
    container_of_cgroup,
    container_of_process,
    docker_containers,
    namespace_addresses,
    parse_conmon,
    stored_containers,
)
from enforcer.policy import Address

DEADLINE_SECONDS = 1.0
CACHED_CONTAINERS = 1_024
_REPLY_BYTES = 16 << 20
_FILE_BYTES = 1 << 20
_CONTAINERD_TASKS = Path("/run/containerd/io.containerd.runtime.v2.task")
_UNIX_LISTENING = "00010000"  # __SO_ACCEPTCON, of the flags in /proc/net/unix
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_FILE_HANDLE = struct.Struct("=Iiq")  # struct file_handle with a 64-bit handle: bytes, type, cgroup id
_FILEID_KERNFS = 0xFE
_libc = ctypes.CDLL(None, use_errno=True)
_PEER = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class Containers:
    """The running containers. Blocking; for one thread at a time that is not the event loop's."""

    def __init__(self) -> None:
        self._named: dict[str, Container] = {}

    def named(self, containers: frozenset[Container]) -> dict[Container, Container]:
        """Each of `containers`, known by id, with what its engine says of it."""
        unknown = containers - self._named_already(containers)
        if unknown:
            deadline = time.monotonic() + DEADLINE_SECONDS
            for described in _docker(deadline):
                self._keep(described)
            for container in unknown:
                if container.id not in self._named:
                    self._keep(_described_by_files(container))
        return {container: _merged(self._named.get(container.id, container), container) for container in containers}

    def at(self, addresses: frozenset[Address]) -> dict[Address, Container]:
        """The container that has each of these addresses now, on a network of its own; what has none is missing."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        found: dict[Address, Container] = {}
        for container, held in _docker(deadline).items():
            self._keep(container)
            found.update(dict.fromkeys(addresses.intersection(held), container))
        missing = addresses - found.keys()
        if missing:
            for address, container in _namespaces_with(missing, deadline):
                found[address] = self.named(frozenset({container}))[container]
        return found

    def _named_already(self, containers: frozenset[Container]) -> frozenset[Container]:
        return frozenset(container for container in containers if container.id in self._named)

    def _keep(self, container: Container) -> None:
        self._named.pop(container.id, None)
        self._named[container.id] = container
        while len(self._named) > CACHED_CONTAINERS:
            del self._named[next(iter(self._named))]


def _merged(described: Container, seen: Container) -> Container:
    """What an engine says, and from the cgroup what the engine leaves open."""
    return Container(
        seen.id,
        described.runtime or seen.runtime,
        described.name,
        described.image,
        described.pod or seen.pod,
    )


# --- docker ----------------------------------------------------------------------------------------------------------
def _docker(deadline: float) -> dict[Container, tuple[Address, ...]]:
    """The running containers of every docker daemon of this network namespace."""
    found: dict[Container, tuple[Address, ...]] = {}
    for path in _docker_sockets():
        with contextlib.suppress(OSError, HTTPException, ValueError, RecursionError):
            found |= docker_containers(_ask(path, "/containers/json", deadline))
    return found


def _docker_sockets() -> Iterator[str]:
    paths = dict.fromkeys(("/run/docker.sock",))
    for line in _read(Path("/proc/net/unix")).splitlines():
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[3] == _UNIX_LISTENING and fields[7].endswith("/docker.sock"):
            paths[fields[7]] = None
    seen = set()
    for path in paths:
        with contextlib.suppress(OSError):
            status = Path(path).stat()
            if status.st_uid == 0 and (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                yield path


def _ask(path: str, resource: str, deadline: float) -> str:
    """GET over a Unix socket whose server is root. OSError, HTTPException; OSError too when time or size run out."""
    connection = HTTPConnection("docker", timeout=max(0.01, deadline - time.monotonic()))
    with contextlib.closing(connection), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(connection.timeout)
        client.connect(path)
        _, uid, _ = _PEER.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid != 0:
            raise PermissionError(f"{path}: served by uid {uid}")
        connection.sock = client
        connection.request("GET", resource)
        response = connection.getresponse()
        received = b""
        while chunk := response.read1(1 << 16):
            received += chunk
            if len(received) > _REPLY_BYTES or time.monotonic() > deadline:
                raise TimeoutError(f"{path}: too long")
            client.settimeout(max(0.01, deadline - time.monotonic()))
        if response.status != 200:
            raise HTTPException(f"{path}: status {response.status}")
        return received.decode(errors="replace")


# --- the others ------------------------------------------------------------------------------------------------------
def _described_by_files(container: Container) -> Container:
    """podman and CRI-O by their monitor process, containerd by its tasks."""
    if container.runtime in (None, "podman", "cri-o"):
        conmon = _conmon_of(container.id)
        if conmon is not None:
            bundle = Path(conmon.bundle)
            described = Container(container.id, container.runtime or "podman", conmon.name, None, container.pod)
            # <storage>/<driver>-containers/<id>/userdata, beside <storage>/<driver>-containers/containers.json.
            with contextlib.suppress(ValueError, RecursionError):
                stored = stored_containers(_read_roots(bundle.parent.parent / "containers.json"))
                described = _merged(stored.get(container.id, described), described)
            return _with_bundle(described, bundle)
    if container.runtime in (None, "containerd") and "/" not in container.id:
        with contextlib.suppress(OSError):
            for namespace in _CONTAINERD_TASKS.iterdir():
                if (namespace / container.id).is_dir():
                    described = Container(container.id, "containerd", None, None, container.pod)
                    return _with_bundle(described, namespace / container.id)
    return container


def _with_bundle(container: Container, bundle: Path) -> Container:
    with contextlib.suppress(ValueError, RecursionError):
        return bundled_container(_read_roots(bundle / "config.json"), container)
    return container


def _conmon_of(identifier: str) -> Conmon | None:
    for pid in _processes():
        with contextlib.suppress(OSError):
            conmon = parse_conmon((pid / "cmdline").read_bytes())
            if conmon is not None and conmon.id == identifier and pid.stat().st_uid == 0:
                return conmon
    return None


def _namespaces_with(addresses: frozenset[Address], deadline: float) -> Iterator[tuple[Address, Container]]:
    """Containers whose network namespace has one of `addresses`, by any process in it."""
    seen = {_namespace(Path("/proc/self"))}
    for pid in _processes():
        if time.monotonic() > deadline:
            return
        namespace = _namespace(pid)
        if namespace is None or namespace in seen:
            continue
        container = container_of_process(_read(pid / "cgroup"))
        if container is None:
            continue  # another process of the namespace may tell
        seen.add(namespace)
        held = namespace_addresses(_read(pid / "net" / "fib_trie"), _read(pid / "net" / "if_inet6"))
        for address in addresses & held:
            yield address, container


def _processes() -> list[Path]:
    return [Path("/proc", name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - no objects for all


def _namespace(pid: Path) -> str | None:
    try:
        return str((pid / "ns" / "net").readlink())
    except OSError:
        return None


# --- one process -----------------------------------------------------------------------------------------------------
def program_of(pid: int, connected_at_ns: int) -> tuple[str | None, Container | None] | None:
    """(path of the program, container) of a process that called connect at `connected_at_ns` (CLOCK_BOOTTIME).

    None if it has gone, or its number belongs to a younger one now.
    """
    process = Path("/proc") / str(pid)
    try:
        exe: str | None = str((process / "exe").readlink())
    except OSError:
        exe = None
    cgroups = _read(process / "cgroup")
    # Read last: if it is still the same process now, it was when the above was read.
    fields = _read(process / "stat").rpartition(")")[2].split()
    if len(fields) < 20 or int(fields[19]) * 1_000_000_000 // _CLOCK_TICKS > connected_at_ns:
        return None
    return exe, container_of_process(cgroups)


def container_of_cgroup_id(root: Path, cgroup_id: int) -> Container | None:
    """The container of a cgroup of the cgroup v2 mounted at `root`, by its id; None for a gone or another one.

    Needs CAP_DAC_READ_SEARCH, and a kernel whose cgroups have file handles (5.5).
    """
    handle = ctypes.create_string_buffer(_FILE_HANDLE.pack(8, _FILEID_KERNFS, cgroup_id), _FILE_HANDLE.size)
    try:
        mount = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        opened = _libc.open_by_handle_at(mount, handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if opened < 0:
            return None
        try:
            return container_of_cgroup(str(Path(f"/proc/self/fd/{opened}").readlink()).removeprefix(str(root)))
        except OSError:
            return None
        finally:
            os.close(opened)
    finally:
        os.close(mount)


# --- files -----------------------------------------------------------------------------------------------------------
def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_FILE_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _read_roots(path: Path) -> str:
    """The same for a file that only root could have written."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != 0:
                return ""
            # Not the bound itself: a read takes that much memory first, and the heap keeps it.
            return file.read(min(status.st_size, _REPLY_BYTES)).decode(errors="replace")
    except OSError:
        return ""
