"""What setsockopt(2) does to our bits of a mark once a program looks at it, and to everything else: nothing."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer import bpf, procfs
from enforcer.kernel_abi import NETNS_ANY, JudgedPorts, MarkedScope, Marks
from tests.kernel.conftest import loaded
from tests.kernel.harness import ENGINE, FOREIGN_MARK, HOST, MASK, Harness
from tests.kernel.test_connect import scope_of
from tests.lab import attacker
from tests.lab.lab import Agent

pytestmark = pytest.mark.root

SOMEBODY_ELSES = 1  # a network namespace's cookie that this one does not have
PAGES = 3 * 4096


@pytest.fixture(scope="module", params=["libbpf", "bcc"])
def own_harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """Of the builds that have the program."""
    with loaded(request.param, tmp_path_factory.mktemp(request.param)) as state:
        harness = Harness(state)
        with harness.events_reader:
            yield harness


@pytest.fixture
def harness(own_harness: Harness) -> Iterator[Harness]:
    own_harness.reset()
    if "setsockopt" not in own_harness.state.programs:
        pytest.skip("bpf_get_current_ancestor_cgroup_id is not for programs on setsockopt here (6.1)")
    own_harness.configure(netns_cookie=NETNS_ANY)
    yield own_harness
    set_level(own_harness, JudgedPorts.NONE)


def set_level(harness: Harness, ports: JudgedPorts) -> None:
    harness.state.maps["levels"].update(struct.pack("=I", MarkedScope.CONTAINER), struct.pack("=I", ports))


@pytest.fixture
def cgroup(harness: Harness) -> Iterator[Path]:
    """With the hooks that stamp sockets where they are made, and where their options are set."""
    root = procfs.cgroup_root()
    assert root is not None
    path = root / f"re-setsockopt-{os.getpid()}"
    path.mkdir()
    bpffs = harness.state.report.generation.parent
    names = ("sock_create", "setsockopt")
    try:
        for name in names:
            bpf.attach_cgroup(harness.state.programs[name], path, bpffs)
        yield path
    finally:
        for name in names:
            bpf.detach_cgroup(name, path, bpffs)
        path.rmdir()


@pytest.fixture
def agent(cgroup: Path, tmp_path: Path) -> Iterator[Agent]:
    """A process in that cgroup, in a network namespace of its own."""
    script = Path(attacker.__file__)
    join = f'echo $$ > {cgroup}/cgroup.procs && exec unshare --net "$@"'
    command = ["sh", "-c", join, "sh", sys.executable, "-I", str(script), ""]
    with (tmp_path / "errors").open("wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    agent = Agent(process, tmp_path / "errors")
    yield agent
    agent.close()


def marked(agent: Agent, value: int, kind: str = "tcp") -> int:
    """The mark of a fresh socket for which `value` was asked."""
    agent.call("make", key="s", kind=kind)
    assert agent.call("mark", key="s", value=value) == ""
    return int(agent.call("marked", key="s"))


@pytest.mark.parametrize("kind", ["tcp", "udp", "raw"])
def test_our_bits_stay_and_others_are_what_was_asked_for(
    harness: Harness, agent: Agent, cgroup: Path, kind: str
) -> None:
    assert marked(agent, MASK | FOREIGN_MARK, kind) == HOST | FOREIGN_MARK
    scope_of(harness, cgroup, MarkedScope.ENGINE)
    assert marked(agent, FOREIGN_MARK, kind) == ENGINE | FOREIGN_MARK
    assert agent.call("mark", key="s", value=0) == ""
    assert agent.call("marked", key="s") == ENGINE


@pytest.mark.parametrize("length", [4, 5, 4096, 4097, PAGES])
def test_mark_of_any_length_is_held(harness: Harness, agent: Agent, length: int) -> None:
    agent.call("make", key="s", kind="udp")
    assert agent.call("mark", key="s", value=MASK | FOREIGN_MARK, length=length) == ""
    assert agent.call("marked", key="s") == HOST | FOREIGN_MARK
    harness.configure(netns_cookie=SOMEBODY_ELSES)
    assert agent.call("mark", key="s", value=MASK | FOREIGN_MARK, length=length) == ""
    assert agent.call("marked", key="s") == MASK | FOREIGN_MARK


def test_any_three_bits_serve(harness: Harness, agent: Agent) -> None:
    marks = Marks(0x80000101)
    harness.configure(netns_cookie=NETNS_ANY, marks=marks)
    assert marked(agent, 0xFFFFFFFF) == 0xFFFFFFFF & ~marks.mask | marks.of(MarkedScope.HOST)


def test_packet_sockets_have_none_of_our_bits(harness: Harness, agent: Agent) -> None:
    agent.call("make_packet_socket", key="s")
    assert agent.call("mark", key="s", value=MASK | FOREIGN_MARK) == ""
    assert agent.call("marked", key="s") == FOREIGN_MARK


@pytest.mark.parametrize("settings", [{"netns_cookie": SOMEBODY_ELSES}, {"configured": False}])
def test_marks_of_other_network_namespaces_are_their_own(
    harness: Harness, agent: Agent, settings: dict[str, int]
) -> None:
    harness.configure(**settings)  # type: ignore[arg-type]
    assert marked(agent, MASK | FOREIGN_MARK) == MASK | FOREIGN_MARK


@pytest.mark.parametrize(
    ("ports", "observing", "scope", "told"),
    [
        (JudgedPorts.REGISTRY, False, MarkedScope.CONTAINER, "EPERM"),
        (JudgedPorts.REGISTRY, True, MarkedScope.CONTAINER, ""),
        (JudgedPorts.NONE, False, MarkedScope.CONTAINER, ""),
        (JudgedPorts.REGISTRY, False, MarkedScope.ENGINE, ""),
        (JudgedPorts.REGISTRY, False, MarkedScope.HOST, ""),
    ],
)
def test_what_goes_around_tc_is_refused_to_containers_that_are_judged(
    harness: Harness,
    agent: Agent,
    cgroup: Path,
    ports: JudgedPorts,
    observing: bool,
    scope: MarkedScope,
    told: str,
) -> None:
    harness.configure(netns_cookie=NETNS_ANY, observing=observing)
    set_level(harness, ports)
    scope_of(harness, cgroup, scope)
    agent.call("make_packet_socket", key="s")
    around = {"level": attacker.SOL_PACKET, "name": attacker.PACKET_QDISC_BYPASS, "value": 1}
    assert agent.call("option", key="s", **around) == told
    assert agent.call("umem") == told
    assert agent.call("option", key="s", **around | {"name": 8}) == ""  # PACKET_RESERVE


def test_other_options_are_set_as_ever(harness: Harness, agent: Agent, cgroup: Path) -> None:
    scope_of(harness, cgroup, MarkedScope.CONTAINER)
    agent.call("make", key="s", kind="tcp")
    no_delay = {"level": socket.IPPROTO_TCP, "name": socket.TCP_NODELAY}
    assert agent.call("option", key="s", **no_delay, value=1) == ""
    assert agent.call("option", key="s", level=socket.SOL_SOCKET, name=10_000, value=1) == "ENOPROTOOPT"
    assert agent.call("long_option", key="s", name=socket.SO_BINDTODEVICE, text="lo", length=PAGES) == ""
    assert agent.call("long_option", key="s", name=socket.SO_BINDTODEVICE, text="none", length=PAGES) == "ENODEV"
    assert agent.call("long_option", key="s", name=socket.SO_MARK, text="", length=2) == "EINVAL"  # too short


def test_cost_is_that_of_a_system_call_at_most(harness: Harness, agent: Agent, cgroup: Path) -> None:
    agent.call("make", key="s", kind="tcp")
    each = {
        "another option": agent.call("option_ns", key="s", level=socket.IPPROTO_TCP, name=socket.TCP_NODELAY),
        "SO_MARK": agent.call("option_ns", key="s", level=socket.SOL_SOCKET, name=socket.SO_MARK),
    }
    bpf.detach_cgroup("setsockopt", cgroup, harness.state.report.generation.parent)
    each["without the program"] = agent.call("option_ns", key="s", level=socket.IPPROTO_TCP, name=socket.TCP_NODELAY)
    print(harness.state.report.loader.value, each)
    assert max(each.values()) < 20_000
