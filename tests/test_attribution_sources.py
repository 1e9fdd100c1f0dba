"""Whose a connection was: cgroup paths, what engines and files say, and processes of this very host."""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer import containers, procfs
from enforcer.attribution import (
    Container,
    bundled_container,
    container_of_cgroup,
    container_of_process,
    docker_containers,
    namespace_addresses,
    parse_conmon,
    stored_containers,
)

ID, OTHER_ID = "0123456789abcdef" * 4, "fedcba9876543210" * 4
POD = "6f2b3c4d-1111-2222-3333-444455556666"


# --- cgroups ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "container"),
    [
        (f"/docker/{ID}", Container(ID, "docker")),
        (f"/re-lab/host/docker/{ID}", Container(ID, "docker")),
        (f"/system.slice/docker-{ID}.scope", Container(ID, "docker")),
        (f"/system.slice/docker-{ID}.scope/docker/{OTHER_ID}", Container(ID, "docker")),  # docker in docker
        (f"/machine.slice/libpod-{ID}.scope/container", Container(ID, "podman")),
        (f"/libpod_parent/libpod-{ID}", Container(ID, "podman")),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope", Container(ID, "podman")),
        (
            f"/kubepods.slice/kubepods-burstable-pod{POD.replace('-', '_')}.slice/cri-containerd-{ID}.scope",
            Container(ID, "containerd", pod=POD),
        ),
        (f"/kubepods/besteffort/pod{POD}/{ID}", Container(ID, pod=POD)),
        (f"/kubepods.slice/kubepods-pod{POD.replace('-', '_')}.slice/crio-{ID}.scope", Container(ID, "cri-o", pod=POD)),
        (f"/system.slice/containerd.service/kubepods-x:cri-containerd:{ID}", Container(ID, "containerd")),
        ("/default/my-task", Container("my-task", "containerd")),
        (f"/k8s.io/{ID}", Container(ID, "containerd")),
        ("/buildkit/abc123", Container("abc123", "buildkit")),
        ("/lxc.payload.web", Container("web", "lxc")),
        (f"/somewhere/{ID}", Container(ID)),
    ],
)
def test_container_is_read_from_its_cgroup(path: str, container: Container) -> None:
    assert container_of_cgroup(path) == container


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "/system.slice/docker.service",
        "/user.slice/user-1000.slice/session-2.scope",
        f"/docker/{ID[:-1]}",
        f"/docker/{ID}x",
        f"/machine.slice/libpod-conmon-{ID}.scope",  # the monitor, which is the host's
        "/system.slice/default/my-task",
    ],
)
def test_other_cgroups_are_no_containers(path: str) -> None:
    assert container_of_cgroup(path) is None


def test_any_hierarchy_of_a_hybrid_host_may_tell() -> None:
    cgroups = f"12:pids:/user.slice\n4:memory:/docker/{ID}\n1:name=systemd:/\n0::/\n"
    assert container_of_process(cgroups) == Container(ID, "docker")
    assert container_of_process("1:name=systemd:/init.scope\n0::/init.scope\n") is None
    assert container_of_process("nonsense") is None


# --- engines ---------------------------------------------------------------------------------------------------------
DOCKER_REPLY = [
    {
        "Id": ID,
        "Names": ["/web"],
        "Image": "nginx:1",
        "Labels": {},
        "NetworkSettings": {"Networks": {"bridge": {"IPAddress": "172.17.0.2", "GlobalIPv6Address": "fd00::2"}}},
    },
    {
        "Id": OTHER_ID,
        "Names": ["/k8s_app"],
        "Image": "app",
        "Labels": {"io.kubernetes.pod.name": "app-1", "io.kubernetes.pod.namespace": "prod"},
        "NetworkSettings": {"Networks": {"host": {"IPAddress": "", "GlobalIPv6Address": ""}}},
    },
    {"Id": None},
    "nonsense",
]
WEB = Container(ID, "docker", "web", "nginx:1")


def test_docker_tells_names_images_addresses_and_pods() -> None:
    assert docker_containers(json.dumps(DOCKER_REPLY)) == {
        WEB: (ip_address("172.17.0.2"), ip_address("fd00::2")),
        Container(OTHER_ID, "docker", "k8s_app", "app", "prod/app-1"): (),
    }


def test_podman_and_cri_o_tell_by_their_storage() -> None:
    stored = [
        {"id": ID, "names": ["db"], "metadata": json.dumps({"image-name": "quay.io/pg:1", "name": "db"})},
        {"id": OTHER_ID, "metadata": json.dumps({"pod-name": "p", "name": "k8s_db"})},
    ]
    assert stored_containers(json.dumps(stored)) == {
        ID: Container(ID, "podman", "db", "quay.io/pg:1"),
        OTHER_ID: Container(OTHER_ID, "cri-o", "k8s_db"),
    }


def test_annotations_tell_what_the_cgroup_leaves_open() -> None:
    annotations = {
        "io.kubernetes.cri.container-name": "app",
        "io.kubernetes.cri.image-name": "ghcr.io/a/app:1",
        "io.kubernetes.cri.sandbox-name": "app-1",
        "io.kubernetes.cri.sandbox-namespace": "prod",
    }
    container = bundled_container(json.dumps({"annotations": annotations}), Container(ID, "containerd", pod=POD))
    assert container == Container(ID, "containerd", "app", "ghcr.io/a/app:1", "prod/app-1")
    assert bundled_container("{}", Container(ID, "containerd", pod=POD)) == Container(ID, "containerd", pod=POD)


def test_command_line_of_the_monitor_tells_its_container() -> None:
    words = ["/usr/bin/conmon", "--api-version", "1", "-c", ID, "-u", ID, "-b", "/s/overlay-containers/x/userdata"]
    conmon = parse_conmon(b"\0".join(word.encode() for word in [*words, "-n", "web", ""]))
    assert conmon is not None
    assert (conmon.id, conmon.name, conmon.bundle) == (ID, "web", "/s/overlay-containers/x/userdata")
    assert parse_conmon(b"\0".join(word.encode() for word in ["/bin/sh", *words[1:]])) is None
    assert parse_conmon(b"conmon\0-c\0short\0-b\0/s\0") is None
    assert parse_conmon(b"") is None


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(
            st.sampled_from(["Id", "id", "Names", "names", "metadata", "annotations", "NetworkSettings", "Networks"]),
            inner,
        ),
    )
)  # fmt: skip
def test_whatever_an_engine_says_is_read_or_refused(reply: object) -> None:
    for reader in (docker_containers, stored_containers, lambda text: bundled_container(text, WEB)):
        with contextlib.suppress(ValueError):
            reader(json.dumps(reply))


def test_addresses_of_a_namespace_are_its_own_and_not_loopback() -> None:
    fib_trie = Path("/proc/self/net/fib_trie").read_text()
    if_inet6 = "fd000000000000000000000000000002 02 40 00 80 eth0\n" + Path("/proc/self/net/if_inet6").read_text()
    found = namespace_addresses(fib_trie, if_inet6)
    assert ip_address("fd00::2") in found
    assert not [address for address in found if address.is_loopback or address.is_link_local]
    listed = subprocess.run(["ip", "-j", "addr"], capture_output=True, text=True, check=True).stdout
    mine = {
        ip_address(address["local"])
        for link in json.loads(listed)
        for address in link["addr_info"]
        if address["scope"] == "global"
    }
    assert found == mine | {ip_address("fd00::2")}


# --- this host -------------------------------------------------------------------------------------------------------
class _Engine(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    reply = b"[]"
    seconds = 0.0


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, _Engine)
        time.sleep(self.server.seconds)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.reply)

    def address_string(self) -> str:
        return "unix"

    def log_request(self, code: object = "-", size: object = "-") -> None:
        pass


@contextlib.contextmanager
def engine(path: Path, reply: bytes, seconds: float = 0) -> Iterator[None]:
    with _Engine(str(path), _Handler) as server:
        server.reply, server.seconds = reply, seconds
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.root
def test_docker_is_found_by_its_socket_and_asked(tmp_path: Path) -> None:
    with engine(tmp_path / "docker.sock", json.dumps(DOCKER_REPLY).encode()):
        directory = containers.Containers()
        seen = Container(ID, "docker")
        assert directory.named(frozenset({seen})) == {seen: WEB}
        assert directory.at(frozenset({ip_address("172.17.0.2")})) == {ip_address("172.17.0.2"): WEB}
        assert directory.at(frozenset({ip_address("172.17.0.99")})) == {}


@pytest.mark.root
def test_socket_that_a_user_could_have_made_is_not_asked(tmp_path: Path) -> None:
    with engine(tmp_path / "docker.sock", json.dumps(DOCKER_REPLY).encode()):
        os.chown(tmp_path / "docker.sock", 65534, 65534)
        seen = Container(ID, "docker")
        assert containers.Containers().named(frozenset({seen})) == {seen: seen}


@pytest.mark.root
@pytest.mark.parametrize("reply", [b"", b"{", b"[" * 100_000, b"{}", b"[" + b" " * (17 << 20)])
def test_reply_that_is_none_leaves_the_container_unnamed(tmp_path: Path, reply: bytes) -> None:
    with engine(tmp_path / "docker.sock", reply):
        seen = Container(ID, "docker")
        assert containers.Containers().named(frozenset({seen})) == {seen: seen}


@pytest.mark.root
def test_engine_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with engine(tmp_path / "docker.sock", b"[]", seconds=containers.DEADLINE_SECONDS + 1):
        started = time.monotonic()
        containers.Containers().at(frozenset({ip_address("172.17.0.2")}))
        assert time.monotonic() - started < containers.DEADLINE_SECONDS + 0.9


def test_names_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_docker", lambda _: {})
    monkeypatch.setattr(containers, "CACHED_CONTAINERS", 8)
    monkeypatch.setattr(containers, "_described_by_files", lambda container: container)
    directory = containers.Containers()
    for number in range(50):
        directory.named(frozenset({Container(f"{number:064x}")}))
    assert len(directory._named) == 8


def test_program_of_a_process_is_told_unless_its_number_is_anothers() -> None:
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    found = containers.program_of(os.getpid(), now)
    assert found is not None
    assert found[0] == os.path.realpath(sys.executable)
    # Connected before this process began: it was another one, which had the same number.
    assert containers.program_of(os.getpid(), 1) is None
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert containers.program_of(ended.pid, now) is None


@pytest.mark.root
def test_container_is_found_by_the_id_of_its_cgroup() -> None:
    root = procfs.cgroup_root()
    assert root is not None
    cgroup = root / f"docker-{ID}.scope"
    other = root / f"re-other-{os.getpid()}"
    try:
        cgroup.mkdir()
        other.mkdir()
        assert containers.container_of_cgroup_id(root, procfs.cgroup_id(cgroup)) == Container(ID, "docker")
        assert containers.container_of_cgroup_id(root, procfs.cgroup_id(other)) is None
    finally:
        cgroup_id = procfs.cgroup_id(cgroup)
        cgroup.rmdir()
        other.rmdir()
    assert containers.container_of_cgroup_id(root, cgroup_id) is None


@pytest.mark.root
def test_container_of_any_engine_is_found_by_the_address_of_its_namespace() -> None:
    root = procfs.cgroup_root()
    assert root is not None
    cgroup = root / f"libpod-{ID}.scope"
    script = (
        f"echo $$ > {cgroup}/cgroup.procs; ip link set lo up; ip addr add 198.18.7.7/32 dev lo; echo; exec sleep 60"
    )
    cgroup.mkdir()
    # A second namespace has no container: whoever has its address is unknown.
    commands = [script, script.replace(str(cgroup), str(root)).replace("7.7/32", "7.8/32")]
    children = []
    try:
        for command in commands:
            child = subprocess.Popen(["unshare", "--net", "sh", "-ec", command], stdout=subprocess.PIPE)
            children.append(child)
            assert child.stdout is not None
            child.stdout.readline()
        addresses = frozenset({ip_address("198.18.7.7"), ip_address("198.18.7.8")})
        found = containers.Containers().at(addresses)
        assert found == {ip_address("198.18.7.7"): Container(ID, "podman")}
    finally:
        for child in children:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
        cgroup.rmdir()


@pytest.mark.root
def test_podman_container_is_described_by_its_monitor_and_storage(tmp_path: Path) -> None:
    bundle = tmp_path / "overlay-containers" / ID / "userdata"
    bundle.mkdir(parents=True)
    stored = [{"id": ID, "names": ["db"], "metadata": json.dumps({"image-name": "quay.io/pg:1", "name": "db"})}]
    (tmp_path / "overlay-containers" / "containers.json").write_text(json.dumps(stored))
    (bundle / "config.json").write_text("{}")
    words = ["conmon", "-c", ID, "-b", str(bundle), "-n", "db"]
    # Only its command line counts: something that waits under conmon's name.
    waiting = "import sys; print(flush=True); sys.stdin.read()"
    monitor = subprocess.Popen(
        [words[0], "-c", waiting, *words[1:]],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert monitor.stdout is not None
        monitor.stdout.readline()
        seen = Container(ID, "podman")
        assert containers.Containers().named(frozenset({seen})) == {seen: Container(ID, "podman", "db", "quay.io/pg:1")}
        # What a user wrote names nobody.
        os.chown(tmp_path / "overlay-containers" / "containers.json", 65534, 65534)
        assert containers.Containers().named(frozenset({seen})) == {seen: Container(ID, "podman", "db")}
    finally:
        monitor.communicate()


@pytest.mark.root
def test_containerd_task_is_described_by_its_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_CONTAINERD_TASKS", tmp_path)
    bundle = tmp_path / "k8s.io" / ID
    bundle.mkdir(parents=True)
    annotations = {"io.kubernetes.cri.container-name": "app", "io.kubernetes.cri.image-name": "ghcr.io/a/app:1"}
    (bundle / "config.json").write_text(json.dumps({"annotations": annotations}))
    seen = Container(ID, None, pod=POD)
    assert containers.Containers().named(frozenset({seen})) == {
        seen: Container(ID, "containerd", "app", "ghcr.io/a/app:1", POD)
    }
    hostile = Container("../../etc", "containerd")
    assert containers.Containers().named(frozenset({hostile})) == {hostile: hostile}
