"""What takes the connect hooks' place before 5.8: sockets stamped where they are made, vouched for before their SYN.

This kernel takes the connect hooks; the loader's child is told that it does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer import bpf, procfs
from enforcer.bpf import CgroupHook, Loader
from enforcer.kernel_abi import DEFAULT_MARKS, JudgedPorts, Judging, MarkedScope, Protocol, pack_refusal_slot
from enforcer.ladder import Capabilities
from tests.kernel.harness import CONTAINER, ENGINE, FOREIGN_MARK, HOST, MASK, VOUCHED, Harness
from tests.kernel.test_connect import CHILD, LEARNED, Process

pytestmark = pytest.mark.root

# In place of enforcer.bpf_loader: `refused` are the beginnings of names that the verifier turns down.
OLD_KERNEL = """
import sys
from enforcer import bpf, bpf_loader
bpf.has_ring_buffer = lambda: False
for unit in bpf_loader.LibbpfUnit, bpf_loader.BccUnit:
    def load(self, symbol, load=unit.load):
        if symbol.startswith(tuple(sys.argv[1].split(","))):
            raise bpf_loader.RefusedError("as an older kernel does")
        return load(self, symbol)
    unit.load = load
sys.exit(bpf_loader.main(sys.argv[2:]))
"""
BEFORE_5_8 = "connect,sendmsg,sock_create"


# Only where there is a route does TCP come as far as sock_ops. What leaves is lost: nobody is at the other end.
ROUTES = (
    "link add sink type veth peer drain",
    "link set drain up",
    "link set sink up",
    "address add 203.0.113.1/24 dev sink",
    "address add 2001:db8:203::1/64 dev sink nodad",
    "route add default dev sink",
    "-6 route add default dev sink",
)


@pytest.fixture(scope="module", params=[Loader.LIBBPF, Loader.BCC], ids=lambda loader: loader.value)
def old_harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    path = tmp_path_factory.mktemp("old") / "bpffs"
    assert bpf.ensure_bpffs(path)
    generation = path / "generation-old"
    arguments = [request.param.value, str(generation), *map(str, bpf.build_inputs(request.param))]
    try:
        subprocess.run([sys.executable, "-c", OLD_KERNEL, BEFORE_5_8, *arguments], check=True)
        with bpf.KernelState(bpf.read_report(generation)) as state:
            harness = Harness(state)
            with harness.events_reader:
                yield harness
    finally:
        bpf.remove(path, None)
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def harness(old_harness: Harness) -> Harness:
    old_harness.reset()
    return old_harness


@pytest.fixture
def process(harness: Harness) -> Iterator[Process]:
    """A process in a cgroup whose sockets are the host's."""
    root = procfs.cgroup_root()
    assert root is not None
    cgroup = root / f"re-stamps-{os.getpid()}"
    cgroup.mkdir()
    bpffs = harness.state.report.generation.parent
    try:
        command = [sys.executable, "-c", CHILD, *ROUTES]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            try:
                (cgroup / "cgroup.procs").write_text(str(child.pid))
                assert child.stdout is not None
                netns_cookie = int(child.stdout.readline())
                bpf.attach_cgroup(harness.state.programs["sock_ops"], cgroup, bpffs)
                bpf.stamp_cgroup(harness.state.programs["stamp_host"], cgroup)
                yield Process(child, cgroup, netns_cookie)
            finally:
                child.kill()
    finally:
        bpf.detach_cgroup("sock_ops", cgroup, bpffs)
        for directory, _, _ in os.walk(cgroup, topdown=False):
            bpf.stamp_cgroup(None, Path(directory))
            Path(directory).rmdir()


def stamp(harness: Harness, path: Path, scope: MarkedScope) -> None:
    assert bpf.stamp_cgroup(harness.state.programs[f"stamp_{scope.name.lower()}"], path)


def test_old_kernel_is_given_stamps_in_place_of_the_connect_hooks(harness: Harness) -> None:
    capabilities = Capabilities(programs=frozenset(harness.state.programs))
    assert capabilities.stamps_sockets
    assert not capabilities.stamps_connections
    assert capabilities.vouched == Capabilities().vouched


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"])
def test_connect_to_a_learned_address_is_vouched_for(harness: Harness, process: Process, address: str) -> None:
    for known in LEARNED.values():
        harness.vouch(known, 443, 60)
    assert process.mark(address=address) == VOUCHED | HOST
    assert process.mark(address=address, port=5000) == HOST


@pytest.mark.parametrize("address", ["192.0.2.2", "2001:db8::2", "::ffff:192.0.2.2"])
def test_connect_elsewhere_loses_the_voucher_that_the_socket_claims(
    harness: Harness, process: Process, address: str
) -> None:
    for known in LEARNED.values():
        harness.vouch(known, 443, 60)
    assert process.mark(address=address, mark=VOUCHED | FOREIGN_MARK) == FOREIGN_MARK


def test_expired_address_is_not_vouched_for(harness: Harness, process: Process) -> None:
    harness.vouch(LEARNED[4], 443, -0.001)
    assert process.mark() == HOST


def test_scope_is_that_of_the_deepest_stamped_cgroup(harness: Harness, process: Process) -> None:
    stamp(harness, process.enter("engine"), MarkedScope.ENGINE)
    assert process.mark("none") == ENGINE
    process.enter("engine/a/b")
    assert process.mark() == ENGINE
    stamp(harness, process.enter("engine/a/containers"), MarkedScope.CONTAINER)
    assert process.mark() == CONTAINER
    assert process.mark("sendto", kind="udp") == CONTAINER
    process.enter("other")
    assert process.mark() == HOST


def test_stamping_again_replaces_and_removing_leaves_nothing(harness: Harness, process: Process) -> None:
    path = process.enter("one")
    for scope in MarkedScope.ENGINE, MarkedScope.ENGINE, MarkedScope.CONTAINER:
        stamp(harness, path, scope)
        assert len(bpf.attached_programs(path, CgroupHook.SOCK_CREATE)) == 1
        assert process.mark("none") == DEFAULT_MARKS.of(scope)
    assert not bpf.stamp_cgroup(harness.state.programs["stamp_engine"], path / "gone")
    bpf._remove_stamps(process.cgroup)
    assert bpf.attached_programs(path, CgroupHook.SOCK_CREATE) == []
    assert process.mark("none") == 0


def test_nothing_is_changed_before_the_settings_are_written(harness: Harness, process: Process) -> None:
    harness.vouch(LEARNED[4], 443, 60)
    harness.configure(configured=False)
    assert process.mark(mark=MASK) == MASK
    assert process.mark() == 0


def test_connection_that_nothing_permits_is_counted(harness: Harness, process: Process) -> None:
    maps = harness.state.maps
    maps["levels"].update(bytes([1, 0, 0, 0]), bytes([JudgedPorts.REGISTRY, 0, 0, 0]))
    maps["registry_ports"].update((443).to_bytes(4, sys.byteorder), b"\1")
    harness.configure(judging=Judging.COUNT)
    slot = pack_refusal_slot(MarkedScope.HOST, Protocol.TCP, observing=False)
    before = maps["refusals"].sum_u64(slot)
    harness.vouch(LEARNED[4], 443, 60)
    process.mark()
    assert maps["refusals"].sum_u64(slot) == before
    process.mark(address="192.0.2.2")
    assert maps["refusals"].sum_u64(slot) == before + 1
