"""What the cgroup hooks write into the marks of real sockets, of a process in a cgroup and a namespace of its own."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer import bpf, procfs
from enforcer.kernel_abi import COMM_BYTES, NETNS_ANY, MarkedScope, Marks
from tests.kernel.harness import CONTAINER, ENGINE, FOREIGN_MARK, HOOKS, HOST, MASK, VOUCHED, Harness

pytestmark = pytest.mark.root

# Reads one JSON object a line, answers each with the mark of the socket it used. Nothing leaves: its namespace has no
# interface that is up, and the hooks run before routing fails.
CHILD = """
import ctypes, errno, json, os, socket, subprocess, sys

CLONE_NEWNET, CLONE_NEWPID, SO_MARK, SO_NETNS_COOKIE = 0x40000000, 0x20000000, 36, 71
NETNS_ANY = 0xFFFFFFFFFFFFFFFF
libc = ctypes.CDLL(None, use_errno=True)


def unshare(flag):
    if libc.unshare(flag):
        raise OSError(ctypes.get_errno(), "unshare")


def mark_of(family, kind, operation, mark, address, port, answer):
    result = "0"
    families = {4: socket.AF_INET, 6: socket.AF_INET6}
    with socket.socket(families[family], socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        if mark is not None:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark.to_bytes(4, sys.byteorder))
        try:
            if operation == "connect":
                sock.connect((address, port))
            elif operation == "sendto":
                sock.sendto(b"x", (address, port))
        except OSError as error:
            result = errno.errorcode[error.errno]
        return result if answer == "error" else sock.getsockopt(socket.SOL_SOCKET, SO_MARK) & 0xFFFFFFFF


def in_child(flag, request):
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        unshare(flag)
        grandchild = os.fork()  # a pid namespace holds children only
        if not grandchild:
            os.write(writing, str(mark_of(**request)).encode())
            os._exit(0)
        os.waitpid(grandchild, 0)
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    return int(os.read(reading, 64))


unshare(CLONE_NEWNET)
for command in sys.argv[1:]:
    subprocess.run(["ip", *command.split()], check=True)
with socket.socket() as sock:
    try:
        cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), sys.byteorder)
    except OSError:  # before 5.14
        cookie = NETNS_ANY
print(cookie, flush=True)
for line in sys.stdin:
    request = json.loads(line)
    with open("/proc/self/comm", "w") as comm:
        comm.write(request.pop("comm"))
    place = request.pop("place")
    if place == "here":
        print(mark_of(**request), flush=True)
    else:
        print(in_child({"netns": CLONE_NEWNET, "pidns": CLONE_NEWPID}[place], request), flush=True)
"""

LEARNED = {4: ip_address("192.0.2.1"), 6: ip_address("2001:db8::1")}


@dataclass(slots=True)
class Process:
    """A process that makes sockets on demand, in a cgroup below `cgroup`."""

    child: subprocess.Popen[str]
    cgroup: Path
    netns_cookie: int

    def mark(
        self,
        operation: str = "connect",
        address: str = "192.0.2.1",
        *,
        port: int = 443,
        kind: str = "tcp",
        mark: int | None = None,
        comm: str = "client",
        place: str = "here",
    ) -> int:
        """SO_MARK of a fresh socket behind `operation`: connect, sendto or none; `mark` is set before it."""
        request = {"operation": operation, "address": address, "port": port, "kind": kind, "mark": mark}
        return int(self._ask(comm=comm, place=place, answer="mark", **request))

    def error(self, *, address: str, port: int = 443, kind: str = "tcp", comm: str = "client") -> str:
        """The name of what connect(2) said to a fresh socket, "0" if nothing."""
        request = {"operation": "connect", "address": address, "port": port, "kind": kind, "mark": None}
        return self._ask(comm=comm, place="here", answer="error", **request).strip()

    def _ask(self, **request: object) -> str:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        family = ip_address(str(request["address"])).version
        self.child.stdin.write(json.dumps({"family": family, **request}) + "\n")
        self.child.stdin.flush()
        return self.child.stdout.readline()

    def enter(self, name: str) -> Path:
        """Moves it into the cgroup `name` below its own."""
        path = self.cgroup / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "cgroup.procs").write_text(str(self.child.pid))
        return path


def need_programs(harness: Harness, *names: str) -> None:
    absent = set(names) - harness.state.programs.keys()
    if absent:
        pytest.skip(f"this kernel does not take {', '.join(sorted(absent))}")


@pytest.fixture
def process(harness: Harness) -> Iterator[Process]:
    need_programs(harness, "connect4", "connect6")
    root = procfs.cgroup_root()
    assert root is not None
    cgroup = root / f"re-connect-{os.getpid()}"
    cgroup.mkdir()
    bpffs = harness.state.report.generation.parent
    hooks = [name for name in HOOKS if name in harness.state.programs]
    command = [sys.executable, "-c", CHILD]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            try:
                (cgroup / "cgroup.procs").write_text(str(child.pid))
                assert child.stdout is not None
                netns_cookie = int(child.stdout.readline())
                for name in hooks:
                    bpf.attach_cgroup(harness.state.programs[name], cgroup, bpffs)
                harness.configure(netns_cookie=netns_cookie)
                yield Process(child, cgroup, netns_cookie)
            finally:
                child.kill()
    finally:
        for name in hooks:
            bpf.detach_cgroup(name, cgroup, bpffs)
        for directory, _, _ in os.walk(cgroup, topdown=False):
            Path(directory).rmdir()


def scope_of(harness: Harness, path: Path, scope: MarkedScope) -> None:
    key = struct.pack("=Q", procfs.cgroup_id(path))
    harness.state.maps["cgroups"].update(key, struct.pack("=I", scope))


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"])
def test_connect_to_a_learned_address_is_vouched_for(harness: Harness, process: Process, address: str) -> None:
    for known in LEARNED.values():
        harness.vouch(known, 443, 60)
    assert process.mark(address=address) == VOUCHED | HOST
    assert process.mark(address=address, port=5000) == HOST


@pytest.mark.parametrize("address", ["192.0.2.2", "2001:db8::2", "::ffff:192.0.2.2"])
def test_connect_elsewhere_is_not_vouched_for_whatever_the_socket_claims(
    harness: Harness, process: Process, address: str
) -> None:
    for known in LEARNED.values():
        harness.vouch(known, 443, 60)
    assert process.mark(address=address, mark=MASK | FOREIGN_MARK) == HOST | FOREIGN_MARK


def test_connect_says_that_its_address_is_in_use(harness: Harness, process: Process) -> None:
    harness.vouch(LEARNED[4], 443, 60)
    harness.vouch(LEARNED[4], 5000, 60)
    before = harness.state.now_ns()
    process.mark()
    assert before <= harness.used_at(LEARNED[4], 443) <= harness.state.now_ns()
    assert harness.used_at(LEARNED[4], 5000) == 0


def test_expired_address_is_not_vouched_for(harness: Harness, process: Process) -> None:
    harness.vouch(LEARNED[4], 443, -0.001)
    assert process.mark() == HOST


def test_marks_of_others_survive(harness: Harness, process: Process) -> None:
    harness.vouch(LEARNED[4], 443, 60)
    assert process.mark(mark=FOREIGN_MARK) == VOUCHED | HOST | FOREIGN_MARK


@pytest.mark.parametrize("mask", [0x00000700, 0x80000101, 0x00000007])
def test_any_three_bits_serve(harness: Harness, process: Process, mask: int) -> None:
    marks = Marks(mask)
    others = 0x0F0F0F0F & ~mask
    harness.vouch(LEARNED[4], 443, 60)
    harness.configure(netns_cookie=process.netns_cookie, marks=marks)
    for name, scope in ("host", MarkedScope.HOST), ("engine", MarkedScope.ENGINE), ("ct", MarkedScope.CONTAINER):
        scope_of(harness, process.enter(name), scope)
        assert process.mark(mark=mask | others) == marks.vouched | marks.of(scope) | others
        assert process.mark(port=5000, mark=mask | others) == marks.of(scope) | others


@pytest.mark.parametrize("operation", ["connect", "sendto"])
@pytest.mark.parametrize("version", [4, 6])
def test_udp_gets_its_scope_and_is_never_vouched_for(
    harness: Harness, process: Process, version: int, operation: str
) -> None:
    if operation == "sendto":
        need_programs(harness, "sendmsg4", "sendmsg6")  # 5.10 lets connect hooks mark, and not these
    harness.vouch(LEARNED[version], 443, 60)
    forged = VOUCHED | CONTAINER | FOREIGN_MARK
    mark = process.mark(operation, str(LEARNED[version]), kind="udp", mark=forged)
    assert mark == HOST | FOREIGN_MARK


def test_new_socket_has_its_scope_already(harness: Harness, process: Process) -> None:
    scope_of(harness, process.enter("engine"), MarkedScope.ENGINE)
    assert process.mark("none", kind="udp") == ENGINE
    harness.configure(configured=False)
    assert process.mark("none", kind="udp") == 0


def test_scope_is_that_of_the_cgroup_or_of_one_above(harness: Harness, process: Process) -> None:
    scope_of(harness, process.enter("engine"), MarkedScope.ENGINE)
    assert process.mark() == ENGINE
    process.enter("engine/a/b/c")
    assert process.mark() == ENGINE
    process.enter("other")
    assert process.mark() == HOST


def test_deepest_known_cgroup_decides(harness: Harness, process: Process) -> None:
    scope_of(harness, process.enter("engine"), MarkedScope.ENGINE)
    scope_of(harness, process.enter("engine/containers/one"), MarkedScope.CONTAINER)
    process.enter("engine/containers/one/init")
    assert process.mark() == CONTAINER
    process.enter("engine/containers")
    assert process.mark() == ENGINE


def test_program_name_decides_where_no_cgroup_does(harness: Harness, process: Process) -> None:
    key = b"skopeo".ljust(COMM_BYTES, b"\0")
    harness.state.maps["programs"].update(key, struct.pack("=I", MarkedScope.ENGINE))
    assert process.mark(comm="skopeo") == ENGINE
    assert process.mark(comm="skopeo2") == HOST
    scope_of(harness, process.enter("one"), MarkedScope.CONTAINER)
    assert process.mark(comm="skopeo") == CONTAINER


def test_process_outside_the_hosts_pid_namespace_is_a_container(harness: Harness, process: Process) -> None:
    if harness.state.report.programs["connect4"] != "connect4_pidns":
        pytest.skip("bpf_get_ns_current_pid_tgid is not allowed in cgroup hooks here (6.10)")
    identity = procfs.pidns_identity()
    harness.configure(netns_cookie=process.netns_cookie, pidns=identity)
    assert process.mark(place="pidns") == CONTAINER
    assert process.mark(address="2001:db8::1", place="pidns") == CONTAINER
    assert process.mark("sendto", kind="udp", place="pidns") == CONTAINER
    assert process.mark() == HOST
    harness.configure(netns_cookie=process.netns_cookie)  # not known: cgroups and names decide
    assert process.mark(place="pidns") == HOST


@pytest.mark.parametrize("operation", ["connect", "sendto"])
def test_sockets_of_other_network_namespaces_are_left_alone(harness: Harness, process: Process, operation: str) -> None:
    if process.netns_cookie == NETNS_ANY:
        pytest.skip("nobody can ask for the cookie of a network namespace here (5.14): all count")
    harness.vouch(LEARNED[4], 443, 60)
    kind = "tcp" if operation == "connect" else "udp"
    forged = MASK | FOREIGN_MARK
    assert process.mark(operation, kind=kind, mark=forged, place="netns") == forged
    assert process.mark(operation, kind=kind, place="netns") == 0


def test_nothing_is_changed_before_the_settings_are_written(harness: Harness, process: Process) -> None:
    harness.vouch(LEARNED[4], 443, 60)
    harness.configure(configured=False)
    assert process.mark(mark=MASK) == MASK
    assert process.mark() == 0
