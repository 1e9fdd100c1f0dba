"""Files, inotify, cgroups and identities, with real files and the real kernel."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterator
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

from enforcer import procfs
from enforcer.kernel_abi import MarkedScope
from enforcer.procfs import Cgroup, CgroupWatch, FileWatch

DEADLINE_SECONDS = 5
ID = "0123456789abcdef" * 4


def addresses(*texts: str) -> tuple[object, ...]:
    return tuple(ip_address(text) for text in texts)


# --- resolvers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nameserver 192.0.2.1\nnameserver 2001:db8::1\n", ["192.0.2.1", "2001:db8::1"]),
        ("nameserver\t127.0.0.53 # stub\noptions edns0\n", ["127.0.0.53"]),
        ("nameserver fe80::1%eth0", ["fe80::1%eth0"]),
        ("nameserver ::ffff:192.0.2.7", ["192.0.2.7"]),
        ("nameserver 192.0.2.1\nnameserver 192.0.2.1\n", ["192.0.2.1"]),
        ("#nameserver 192.0.2.1\n; nameserver 192.0.2.2\nnameserver 192.0.2.3", ["192.0.2.3"]),
        (
            "nameserver\nnameserver resolver.example\nnameserver 1.2.3\nserver 192.0.2.1\nnameserver 192.0.2.3",
            ["192.0.2.3"],
        ),
        ("", ["127.0.0.1"]),
        ("search example.com\n", ["127.0.0.1"]),
        ("\x00\xff\xfe garbage \r\n nameserver 192.0.2.9\r\n", ["192.0.2.9"]),
    ],
)
def test_resolvers_are_read_as_the_resolver_library_reads_them(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "resolv.conf"
    path.write_bytes(text.encode("latin-1"))
    assert procfs.trusted_resolvers(path, (), wsl=False) == addresses(*expected)


def test_resolvers_behind_the_stub_and_wsls_are_trusted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.53\n")
    (tmp_path / "upstream").write_text("nameserver 192.0.2.1\nnameserver fe80::1%eth0\n")
    files = (tmp_path / "resolv.conf", (tmp_path / "upstream", tmp_path / "missing"))
    assert procfs.trusted_resolvers(*files, wsl=False) == addresses("127.0.0.53", "192.0.2.1", "fe80::1%eth0")
    own = set[IPv4Address]()
    monkeypatch.setattr(procfs, "is_own_address", own.__contains__)
    assert procfs.WSL_RESOLVER not in procfs.trusted_resolvers(*files, wsl=True)  # DNS tunnelling is off
    own.add(procfs.WSL_RESOLVER)
    assert procfs.trusted_resolvers(*files, wsl=True)[-1] == procfs.WSL_RESOLVER


def test_own_addresses_are_told_from_others() -> None:
    assert procfs.is_own_address(IPv4Address("127.0.0.1"))
    assert not procfs.is_own_address(IPv4Address("192.0.2.1"))


def test_resolver_file_that_cannot_be_read_is_an_empty_one(tmp_path: Path) -> None:
    assert procfs.trusted_resolvers(tmp_path, (tmp_path / "no" / "such",), wsl=False) == addresses("127.0.0.1")


def test_endless_resolver_file_is_read_up_to_a_bound() -> None:
    assert procfs.trusted_resolvers(Path("/dev/zero"), (), wsl=False) == addresses("127.0.0.1")


# --- identity --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("release", "version", "run_wsl", "expected"),
    [
        ("5.15.167.4-microsoft-standard-WSL2", "", False, True),
        ("6.18.40.1-microsoft-standard-WSL2+", "", False, True),
        ("", "Linux version 6.6.87.2-microsoft-standard-WSL2 (root@439a258ad544) (gcc 11.2.0)", False, True),
        ("6.9.1-locietta-WSL2-xanmod1", "", False, True),
        ("6.6.0-own", "Linux version 6.6.0 (me@home)", True, True),
        ("6.6.0-own", "Linux version 6.6.0 (me@home)", False, False),
        ("6.1.0-28-amd64", "Linux version 6.1.0-28-amd64 (debian-kernel@lists.debian.org)", False, False),
        # Docker Desktop's own machine, and kernels that Microsoft builds for Azure.
        ("6.10.14-linuxkit", "Linux version 6.10.14-linuxkit (root@buildkitsandbox)", False, False),
        ("6.8.0-1018-azure", "Linux version 6.8.0-1018-azure (buildd@lcy02-amd64-037)", False, False),
        ("6.6.47.1-1.azl3", "Linux version 6.6.47.1-1.azl3 (root@build.microsoft.com)", False, False),
        ("6.6.0-newslab", "Linux version 6.6.0-newslab (me@home)", False, False),
    ],
)
def test_wsl_is_recognized_by_kernel_or_run_directory(
    tmp_path: Path, release: str, version: str, run_wsl: bool, expected: bool
) -> None:
    (tmp_path / "osrelease").write_text(release)
    (tmp_path / "version").write_text(version)
    if run_wsl:
        (tmp_path / "WSL").mkdir()
    assert procfs.is_wsl(tmp_path / "osrelease", tmp_path / "version", tmp_path / "WSL") is expected


def test_a_file_in_the_place_of_wsls_run_directory_is_not_it(tmp_path: Path) -> None:
    (tmp_path / "WSL").touch()
    assert not procfs.is_wsl(tmp_path / "osrelease", tmp_path / "version", tmp_path / "WSL")


def test_modules_that_could_be_loaded_are_those_that_modprobe_knows(tmp_path: Path) -> None:
    assert procfs.loadable_modules(tmp_path / "missing") is None
    (tmp_path / "modules.dep").write_text(
        "kernel/net/sched/cls_bpf.ko:\nkernel/net/netfilter/nft_ct.ko.xz: kernel/net/netfilter/nf_conntrack.ko.xz\n"
        "kernel/net/netfilter/nft-fib-inet.ko.zst:\nnonsense\n"
    )
    assert procfs.loadable_modules(tmp_path) == frozenset({"cls_bpf", "nft_ct", "nft_fib_inet"})


def test_no_pid_namespace_is_the_hosts_where_each_distribution_is_one() -> None:
    assert procfs.pidns_of_host(wsl=False) == procfs.pidns_identity()
    assert procfs.pidns_of_host(wsl=True) == (0, 0)


_SYS_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
_BPF_PROG_LOAD, _BPF_PROG_TEST_RUN = 5, 10
_RAW_TRACEPOINT = 17
_GET_NS_CURRENT_PID_TGID = 120


def ns_current_pid(device: int, inode: int) -> int:
    """What bpf_get_ns_current_pid_tgid says for this process: 0, or a negative errno."""
    libc = ctypes.CDLL(None, use_errno=True)

    def instruction(opcode: int, registers: int, offset: int, immediate: int) -> bytes:
        return struct.pack("=BBhI", opcode, registers, offset, immediate & 0xFFFFFFFF)

    def load64(register: int, value: int) -> bytes:
        return instruction(0x18, register, 0, value) + instruction(0, 0, 0, value >> 32)

    code = ctypes.create_string_buffer(
        load64(1, device)
        + load64(2, inode)
        + instruction(0xBF, 0xA3, 0, 0)  # r3 = frame pointer
        + instruction(0x07, 0x03, 0, -8)
        + instruction(0xB7, 0x04, 0, 8)
        + instruction(0x85, 0, 0, _GET_NS_CURRENT_PID_TGID)
        + instruction(0x95, 0, 0, 0)
    )
    licence = ctypes.create_string_buffer(b"GPL")
    load = struct.pack(
        "=IIQQ", _RAW_TRACEPOINT, (len(code) - 1) // 8, ctypes.addressof(code), ctypes.addressof(licence)
    ).ljust(120, b"\0")
    program = libc.syscall(_SYS_BPF, _BPF_PROG_LOAD, ctypes.create_string_buffer(load), len(load))
    assert program >= 0, os.strerror(ctypes.get_errno())
    try:
        test = ctypes.create_string_buffer(struct.pack("=II", program, 0).ljust(80, b"\0"))
        assert libc.syscall(_SYS_BPF, _BPF_PROG_TEST_RUN, test, 80) == 0, os.strerror(ctypes.get_errno())
        return int(struct.unpack_from("=i", test.raw, 4)[0])
    finally:
        os.close(program)


@pytest.mark.root
def test_pid_namespace_is_the_one_that_bpf_compares_with() -> None:
    device, inode = procfs.pidns_identity()
    assert ns_current_pid(device, inode) == 0


@pytest.mark.root
def test_another_pid_namespace_is_not() -> None:
    device, inode = procfs.pidns_identity()
    assert ns_current_pid(device, inode - 1) < 0
    assert ns_current_pid(device + 1, inode) < 0


@pytest.mark.root
def test_network_namespaces_have_different_cookies() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    own = procfs.netns_cookie()
    assert own
    assert own == procfs.netns_cookie()
    try:
        assert libc.unshare(0x40000000) == 0
        assert procfs.netns_cookie() not in (own, None)
    finally:
        assert libc.setns(here, 0x40000000) == 0
        os.close(here)


# --- cgroups ---------------------------------------------------------------------------------------------------------
V1 = "31 23 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


@pytest.mark.parametrize(
    ("mountinfo", "expected"),
    [
        ("30 23 0:25 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup"),
        (V1 + "32 23 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup/unified"),
        (V1, None),
        ("", None),
        ("30 23 0:25 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", None),
        ("30 23 0:25 / /mnt/my\\040cgroups rw - cgroup2 none rw\n", "/mnt/my cgroups"),
        (
            "30 23 0:25 / /mnt rw - cgroup2 none rw\n31 23 0:25 / /sys/fs/cgroup/unified rw - cgroup2 none rw\n",
            "/sys/fs/cgroup/unified",
        ),
    ],
)
def test_cgroup_root_is_the_mount_of_the_whole_v2_hierarchy(
    tmp_path: Path, mountinfo: str, expected: str | None
) -> None:
    (tmp_path / "mountinfo").write_text(mountinfo)
    assert procfs.cgroup_root(tmp_path / "mountinfo") == (Path(expected) if expected else None)


@pytest.fixture
def cgroups() -> Iterator[Path]:
    """A cgroup of our own; whatever the test makes in it is removed."""
    root = procfs.cgroup_root()
    if root is None:
        pytest.skip("cgroup v2 is not mounted")
    own = root / f"re-test-{uuid.uuid4().hex[:8]}"
    own.mkdir()
    yield own
    for directory, _, _ in os.walk(own, topdown=False):
        with contextlib.suppress(FileNotFoundError):
            Path(directory).rmdir()


@pytest.mark.root
def test_cgroup_id_is_the_kernels_and_unlike_any_others(cgroups: Path) -> None:
    (cgroups / "other").mkdir()
    assert procfs.cgroup_id(cgroups) == cgroups.stat().st_ino  # on 64 bits since Linux 5.5
    assert procfs.cgroup_id(cgroups) != procfs.cgroup_id(cgroups / "other")
    with pytest.raises(FileNotFoundError):
        procfs.cgroup_id(cgroups / "missing")


# --- changes ---------------------------------------------------------------------------------------------------------
async def until(condition: Callable[[], bool]) -> None:
    """The condition comes true while the event loop runs, before the deadline."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110  (of files and the kernel; nobody could set an event)
            await asyncio.sleep(0.001)


def follow_file(path: Path, scenario: Callable[[list[str | None]], Awaitable[None]]) -> None:
    """Run `scenario` with a list that grows by the file's text with each callback."""

    async def follow() -> None:
        seen: list[str | None] = []
        with FileWatch([path], lambda: seen.append(path.read_text() if path.exists() else None)):
            await scenario(seen)

    asyncio.run(follow())


def test_file_written_in_place_is_noticed_once_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("old")

    async def scenario(seen: list[str | None]) -> None:
        with path.open("w") as file:
            file.write("half")
            file.flush()
            await asyncio.sleep(0.02)
            assert seen == []
            file.write(" and half")
        await until(lambda: bool(seen))
        assert seen == ["half and half"]

    follow_file(path, scenario)


def test_file_renamed_over_again_and_again_is_noticed_each_time(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("0")

    async def scenario(seen: list[str | None]) -> None:
        for number in range(1, 6):
            (tmp_path / "new").write_text(str(number))
            (tmp_path / "new").rename(path)
            await until(lambda: len(seen) == number)  # noqa: B023
        assert seen == ["1", "2", "3", "4", "5"]

    follow_file(path, scenario)


def test_link_turned_elsewhere_is_noticed_and_its_new_target_followed(tmp_path: Path) -> None:
    for directory, text in (("a", "A"), ("b", "B")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "resolv.conf").write_text(text)
    path = tmp_path / "etc" / "resolv.conf"
    path.parent.mkdir()
    path.symlink_to("../a/resolv.conf")

    async def scenario(seen: list[str | None]) -> None:
        (path.parent / "new").symlink_to("../b/resolv.conf")
        (path.parent / "new").rename(path)
        await until(lambda: seen == ["B"])
        (tmp_path / "b" / "resolv.conf").write_text("BB")
        await until(lambda: seen == ["B", "BB"])
        (tmp_path / "a" / "resolv.conf").write_text("nobody's")
        await asyncio.sleep(0.02)
        assert seen == ["B", "BB"]

    follow_file(path, scenario)


def test_file_in_a_directory_that_is_made_later_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run" / "systemd" / "resolve" / "resolv.conf"

    async def scenario(seen: list[str | None]) -> None:
        path.parent.mkdir(parents=True)
        path.write_text("1")
        await until(lambda: seen[-1:] == ["1"])
        path.unlink()
        path.parent.rmdir()
        await until(lambda: seen[-1:] == [None])
        path.parent.mkdir()
        path.write_text("2")
        await until(lambda: seen[-1:] == ["2"])

    follow_file(path, scenario)


def test_another_file_in_the_directory_is_nobodys_business(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("same")

    async def scenario(seen: list[str | None]) -> None:
        (tmp_path / "hosts").write_text("other")
        path.write_text("same")
        await asyncio.sleep(0.02)
        assert seen == []
        path.write_text("another")
        await until(lambda: seen == ["another"])

    follow_file(path, scenario)


def test_watches_leave_no_descriptor_behind(tmp_path: Path) -> None:
    async def open_and_close() -> None:
        with FileWatch([tmp_path / "x"], lambda: None), CgroupWatch(tmp_path, lambda *_: None):
            pass

    asyncio.run(open_and_close())
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        asyncio.run(open_and_close())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


Told = list[tuple[str, MarkedScope | None]]


def follow_cgroups(root: Path, scenario: Callable[[CgroupWatch, Told], Awaitable[None]]) -> None:
    """Run `scenario` with a list of what was told: path and scope, no scope for what has vanished."""

    async def follow() -> None:
        told: Told = []

        def note(appeared: Collection[Cgroup], vanished: Collection[Cgroup]) -> None:
            told.extend((cgroup.path, None) for cgroup in sorted(vanished, key=lambda one: one.path))
            told.extend((cgroup.path, cgroup.scope) for cgroup in sorted(appeared, key=lambda one: one.path))

        with CgroupWatch(root, note) as watch:
            await scenario(watch, told)

    asyncio.run(follow())


@pytest.mark.root
def test_cgroups_that_are_there_at_the_start_are_known(cgroups: Path) -> None:
    service, scope = "system.slice/docker.service", f"system.slice/docker-{ID}.scope"
    for path in (service, scope, f"{scope}/inner", f"docker/{ID}", "system.slice/ssh.service"):
        (cgroups / path).mkdir(parents=True)

    async def scenario(watch: CgroupWatch, told: Told) -> None:
        assert {cgroup.path: cgroup.scope for cgroup in watch.known.values()} == {
            service: MarkedScope.ENGINE,
            scope: MarkedScope.CONTAINER,
            "docker": MarkedScope.CONTAINER,  # and with it all that is below
        }
        assert watch.known[scope].cgroup_id == procfs.cgroup_id(cgroups / scope)
        assert told == []

    follow_cgroups(cgroups, scenario)


@pytest.mark.root
def test_cgroups_that_come_and_go_are_told(cgroups: Path) -> None:
    async def scenario(watch: CgroupWatch, told: Told) -> None:
        nested = f"user.slice/user@1000.service/user.slice/libpod-{ID}.scope"
        (cgroups / nested).mkdir(parents=True)
        await until(lambda: told == [(nested, MarkedScope.CONTAINER)])
        first = watch.known[nested].cgroup_id
        (cgroups / nested).rmdir()
        await until(lambda: told[1:] == [(nested, None)])
        assert watch.known == {}
        (cgroups / nested).mkdir()
        await until(lambda: told[2:] == [(nested, MarkedScope.CONTAINER)])
        assert watch.known[nested].cgroup_id != first
        (cgroups / "user.slice" / "ssh.service").mkdir()
        (cgroups / "system.slice").mkdir()
        (cgroups / "system.slice" / "containerd.service").mkdir()
        await until(lambda: told[3:] == [("system.slice/containerd.service", MarkedScope.ENGINE)])

    follow_cgroups(cgroups, scenario)


@pytest.mark.root
def test_deep_trees_made_at_once_are_found_whole(cgroups: Path) -> None:
    """mkdir -p is faster than adding a watch: what was made before the watch is found by listing after it."""

    async def scenario(watch: CgroupWatch, told: Told) -> None:
        paths = {f"a{number}/b/c/d/libpod-{number:064x}.scope" for number in range(100)}
        for path in sorted(paths):
            (cgroups / path).mkdir(parents=True)
            if path.startswith("a5"):
                await asyncio.sleep(0)  # lets the watch run in between
        await until(lambda: watch.known.keys() == paths)
        for path in sorted(paths):
            (cgroups / path).rmdir()
        await until(lambda: not watch.known)
        assert watch.room.turned_away == 0
        assert 0 < watch.room.held <= watch.room.limit

    follow_cgroups(cgroups, scenario)


@pytest.mark.root
def test_more_events_than_inotify_keeps_lose_nothing(cgroups: Path) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())

    async def scenario(watch: CgroupWatch, told: Told) -> None:
        flapping = cgroups / "flapping"
        (cgroups / "last.slice").mkdir()
        await until(lambda: "last.slice" in set(watch._watched.values()))
        for _ in range(limit // 2 + 10):
            flapping.mkdir()
            flapping.rmdir()
        (cgroups / "last.slice" / "docker.service").mkdir()
        await until(lambda: watch.known.keys() == {"last.slice/docker.service"})

    follow_cgroups(cgroups, scenario)
