"""WSL 2, as far as a Linux machine can be it: distributions over one network, its release, resolver and networking.

A distribution is a mount, pid, UTS and IPC namespace (main.cpp of microsoft/WSL), here over the lab's host "two". The
release is a file over /proc/sys/kernel/osrelease; the kernel is this machine's. Windows is the lab's internet.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.lab.enforcer import COMMAND, policy
from tests.lab.internet import EVIL_ADDRESS, fresh_name
from tests.lab.lab import RESOLVER, Agent, Lab, Outcome, poll

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(180)]

RELEASE = "6.6.87.2-microsoft-standard-WSL2"
TUNNEL = "10.255.255.254"
GATEWAY = "192.0.2.5"  # of host "two": what the vEthernet adapter of Windows is with NAT
LOOPBACK_GATEWAY = "169.254.73.152"
BOOT = Path(__file__).parents[2] / "wsl" / "registry-enforcer-boot.sh"
REFUSED_WITHIN = 5.0
HOST = "two"
WSL_POLICY = policy().replace('host = "off"\n', "")  # the default decides

BOUND = """
import socket, sys
with socket.socket() as client:
    client.settimeout(5)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, sys.argv[1].encode())
    client.connect((sys.argv[2], 443))
"""
DNSMASQ = ("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--no-hosts", "--no-resolv",
           "--pid-file", "--bind-interfaces")  # fmt: skip


class Distribution:
    """Namespaces of its own over the network that all share."""

    def __init__(self, lab: Lab, name: str, *, resolver: str = TUNNEL, release: str = RELEASE) -> None:
        self._lab = lab
        self.directory = lab.directory / "wsl" / name
        self.directory.mkdir(parents=True)
        for file, text in (("osrelease", release), ("version", f"Linux version {release} (root@b) (gcc) #1 SMP"),
                           ("resolv.conf", f"nameserver {resolver}\noptions timeout:2 attempts:2")):  # fmt: skip
            (self.directory / file).write_text(text + "\n")
        script = f"""set -e
            hostname {name}
            mount -t tmpfs tmpfs /run
            mount --bind {self.directory}/osrelease /proc/sys/kernel/osrelease
            mount --bind {self.directory}/version /proc/version
            mount --bind {self.directory}/resolv.conf /etc/resolv.conf
            echo ready > {self.directory}/ready
            exec sleep infinity"""
        apart = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        self._parent = lab.spawn(HOST, [*apart, "sh", "-c", script], f"wsl-{name}")
        poll(f"distribution {name}", lambda: (self.directory / "ready").exists() or self._parent.poll() is not None)
        assert self._parent.poll() is None, lab.log(f"wsl-{name}")
        self._init = child_of(self._parent.pid)

    @property
    def enter(self) -> list[str]:
        """Goes before a command."""
        return ["nsenter", f"--target={self._init}", "--mount", "--pid", "--uts", "--ipc", "--"]

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """A command in it."""
        return self._lab.run(HOST, [*self.enter, *argv])

    def agent(self, comm: str = "") -> Agent:
        """A client in it."""
        return self._lab.agent(HOST, comm=comm, inside=self.enter)

    def ask(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One of the program's commands, at its usual places."""
        return self.run(COMMAND, command, *arguments)

    def status(self) -> Mapping[str, Any]:
        """Of the daemon that runs here."""
        asked = self.ask("status", "--json")
        assert asked.returncode == 0, asked.stdout
        status: Mapping[str, Any] = json.loads(asked.stdout)
        return status

    def audited(self) -> list[Mapping[str, Any]]:
        """The records of its daemon."""
        return [json.loads(line) for line in self.ask("log", "--json", "-n", "200").stdout.splitlines()]

    def stop(self) -> None:
        """`wsl --terminate`."""
        self._parent.kill()
        self._parent.wait()


def child_of(parent: int) -> int:
    """The one process that `parent` has started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[1]) == parent:
            return int(stat.parent.name)
    raise AssertionError(f"{parent} has no child")


def assert_refused(outcome: Outcome) -> None:
    assert outcome.refused, outcome
    assert outcome.seconds < REFUSED_WITHIN, outcome


def assert_reached(outcome: Outcome) -> None:
    assert outcome.reached, outcome


# --- one daemon, started as WSL starts it ----------------------------------------------------------------------------
class Daemon:
    """The boot script of one distribution, and the daemon that it keeps."""

    def __init__(self, lab: Lab, inside: Distribution, text: str = WSL_POLICY) -> None:
        self._lab = lab
        self._in = inside
        self.log_file = inside.directory / "boot.log"
        (inside.directory / "policy.toml").write_text(text)
        self.places = [
            "--bpffs",
            str(lab.bpffs / f"wsl-{inside.directory.name}"),
            "--cgroup",
            str(lab.host_cgroup(HOST)),
        ]

    def boot(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the boot script."""
        return self._in.run(
            "env", f"REGISTRY_ENFORCER={COMMAND}", f"REGISTRY_ENFORCER_LOG={self.log_file}", str(BOOT), *arguments
        )

    def start(self) -> None:
        """As [boot] command does."""
        self.command_line = ["--policy", f"{self._in.directory}/policy.toml",
                             "--state-dir", f"{self._in.directory}/state", *self.places]  # fmt: skip
        booted = self.boot(*self.command_line)
        assert booted.returncode == 0, booted.stdout
        self.wait_until_ready(1)

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def wait_until_ready(self, times: int) -> None:
        try:
            poll("the daemon", lambda: self.log.count("\nready after ") + self.log.startswith("ready after ") >= times)
        except TimeoutError as error:
            raise AssertionError(self.log[-3000:]) from error

    def process(self) -> str:
        """Its id in the distribution."""
        return self._in.run("cat", "/run/registry-enforcer/lock").stdout.strip()

    def remove(self) -> None:
        """End it and take all out."""
        self.boot("stop")
        removed = self._in.ask("remove", *self.places)
        assert removed.returncode == 0, removed.stdout


@pytest.fixture(scope="module")
def network(lab: Lab) -> Iterator[Lab]:
    """The network of WSL 2 with NAT: a resolver on lo that tunnels, and one on the gateway that forwards."""
    if not Path(COMMAND).exists():
        pytest.skip(f"{COMMAND} is not installed: make setup")
    lab.ip(HOST, f"addr add {TUNNEL}/32 dev lo")
    servers = [
        lab.spawn(HOST, [*DNSMASQ, f"--listen-address={TUNNEL}", f"--server={RESOLVER}"], "wsl-tunnel"),
        lab.spawn("net", [*DNSMASQ, f"--listen-address={GATEWAY}", f"--server={RESOLVER}"], "wsl-gateway"),
    ]
    yield lab
    for server in servers:
        server.terminate()
        server.wait()
    lab.ip(HOST, f"addr del {TUNNEL}/32 dev lo")


@pytest.fixture(scope="module")
def ubuntu(network: Lab) -> Iterator[Distribution]:
    """Where the daemon runs."""
    distribution = Distribution(network, "ubuntu")
    yield distribution
    distribution.stop()


@pytest.fixture(scope="module")
def debian(network: Lab) -> Iterator[Distribution]:
    """Another one."""
    distribution = Distribution(network, "debian")
    yield distribution
    distribution.stop()


@pytest.fixture
def daemon(network: Lab, ubuntu: Distribution) -> Iterator[Daemon]:
    daemon = Daemon(network, ubuntu)
    daemon.log_file.unlink(missing_ok=True)
    daemon.start()
    yield daemon
    daemon.remove()


# --- distributions ---------------------------------------------------------------------------------------------------
def test_without_a_daemon_every_distribution_reaches_everything(ubuntu: Distribution, debian: Distribution) -> None:
    for distribution in (ubuntu, debian):
        for comm in ("", "skopeo"):
            assert_reached(distribution.agent(comm).connect("evil.test"))
            assert_reached(distribution.agent(comm).connect("registry.allowed.test"))


def test_one_daemon_restricts_all_distributions_by_their_scopes(
    daemon: Daemon, ubuntu: Distribution, debian: Distribution
) -> None:
    assert ubuntu.run("readlink", "/proc/self/ns/pid").stdout != debian.run("readlink", "/proc/self/ns/pid").stdout
    for distribution in (ubuntu, debian):
        shell, engine = distribution.agent(), distribution.agent("skopeo")
        for client in (shell, engine):
            assert_reached(client.connect("registry.allowed.test"))
            assert_refused(client.connect("evil.test"))
            assert_refused(client.attempt(EVIL_ADDRESS, 5000))
        # A process of another distribution is not a container: an engine is judged on every port, a shell is not.
        assert_refused(engine.attempt(EVIL_ADDRESS, 8443))
        assert_reached(shell.attempt(EVIL_ADDRESS, 8443))


@pytest.mark.parametrize(("comm", "scope"), [("", "host"), ("skopeo", "engine")])
def test_refusal_in_another_distribution_is_audited_as_what_it_is(
    daemon: Daemon, ubuntu: Distribution, debian: Distribution, comm: str, scope: str
) -> None:
    client = debian.agent(comm)
    assert_refused(client.attempt(EVIL_ADDRESS, 5000))

    def of_client() -> list[Mapping[str, Any]]:
        return [record for record in ubuntu.audited() if record["kind"] == "refused" and record["scope"] == scope]

    poll("the record", of_client)
    record = of_client()[-1]
    assert record["origin"] == "host"
    assert record["destination"] == {"address": EVIL_ADDRESS, "port": 5000}
    assert record["process"]["uid"] == 0
    # Ids of another distribution would name somebody else in this one.
    assert record["process"]["pid"] is None
    assert record["process"]["exe"] is None
    if comm:
        assert record["process"]["comm"] == comm
    assert not [record for record in ubuntu.audited() if record["scope"] == "container"]


def test_fresh_names_lose_no_packet_in_any_distribution(
    daemon: Daemon, ubuntu: Distribution, debian: Distribution
) -> None:
    assert ubuntu.status()["resolvers"] == [TUNNEL]
    for start, distribution in ((15_000, ubuntu), (15_020, debian)):
        names = [fresh_name(start + offset) for offset in range(20)]
        replies = distribution.agent().call("connect_each", names=names, port=443, families=[4, 6])
        assert {reply["verdict"] for reply in replies} == {"reached"}
        assert max(reply["seconds"] for reply in replies) < 0.5


def test_second_daemon_in_another_distribution_is_refused_and_says_what_to_do(
    network: Lab, daemon: Daemon, debian: Distribution
) -> None:
    second = debian.ask(
        "run", "--state-dir", f"{debian.directory}/state", "--metrics", "127.0.0.1:9743", *daemon.places
    )
    assert second.returncode == 2
    assert "another distribution" in second.stdout
    assert "wsl.exe --list --running" in second.stdout
    removed = debian.ask("remove", *daemon.places)
    assert removed.returncode == 2
    assert "another distribution" in removed.stdout
    assert_refused(debian.agent().connect("evil.test"))


def test_default_scope_of_the_host_is_strict_only_with_wsls_release(network: Lab, ubuntu: Distribution) -> None:
    policy_file = ubuntu.directory / "scope.toml"
    policy_file.write_text(WSL_POLICY)
    ordinary = Distribution(network, "ordinary", release="6.1.0-28-amd64")
    try:
        scopes = [
            json.loads(distribution.ask("check", str(policy_file), "--json").stdout)["scope"]["host"]
            for distribution in (ubuntu, ordinary)
        ]
    finally:
        ordinary.stop()
    assert scopes == ["strict", "registries"]


def test_doctor_says_what_wsl_makes_different(network: Lab, ubuntu: Distribution) -> None:
    bpffs = network.bpffs / "doctor"
    said = ubuntu.ask("doctor", "--bpffs", str(bpffs), "--cgroup", str(network.host_cgroup(HOST))).stdout
    for line in (
        "ok      wsl: WSL 2: one daemon restricts every distribution; scope.host defaults to strict",
        f"ok      resolver {TUNNEL}: its answers teach",
        "ok      tc: takes programs at ingress and egress",
        "note    host-network containers: told apart by cgroup only: each distribution is a pid namespace of its own",
        "ok      interface up0: uplink: route to 0.0.0.0/0",
    ):
        assert line in said.splitlines(), said


# --- the boot script -------------------------------------------------------------------------------------------------
def test_killed_daemon_is_started_again_and_a_second_boot_changes_nothing(
    daemon: Daemon, ubuntu: Distribution, debian: Distribution
) -> None:
    before = daemon.process()
    assert daemon.boot(*daemon.command_line).returncode == 0
    assert ubuntu.run("kill", "-KILL", before).returncode == 0
    assert_refused(debian.agent().connect("evil.test"))  # nobody is there, and it is refused
    daemon.wait_until_ready(2)
    assert daemon.process() != before
    assert "the daemon ended (137); again in 1 s" in daemon.log
    assert "already enforces" not in daemon.log
    assert_refused(debian.agent().connect("evil.test"))
    assert_reached(debian.agent().connect("registry.allowed.test"))


def test_boot_scripts_stop_ends_the_daemon_and_leaves_enforcement(daemon: Daemon, ubuntu: Distribution) -> None:
    assert daemon.boot("stop").returncode == 0
    assert ubuntu.ask("status").returncode == 3
    assert_refused(ubuntu.agent().connect("evil.test"))
    assert "not running" in daemon.boot("stop").stdout
    assert ubuntu.ask("remove", *daemon.places).returncode == 0
    assert_reached(ubuntu.agent().connect("evil.test"))


def test_second_distribution_stands_by_and_takes_over(network: Lab, daemon: Daemon, debian: Distribution) -> None:
    standby = Daemon(network, debian)
    standby.log_file.unlink(missing_ok=True)
    assert standby.boot("--policy", f"{debian.directory}/policy.toml", "--state-dir", f"{debian.directory}/state",
                        *standby.places).returncode == 0  # fmt: skip
    poll("the refusal", lambda: "another distribution" in standby.log)
    daemon.boot("stop")
    standby.wait_until_ready(1)
    try:
        assert_refused(debian.agent().connect("evil.test"))
        assert_reached(debian.agent().connect("registry.allowed.test"))
    finally:
        standby.remove()


def test_terminated_distribution_leaves_refusal_and_the_next_daemon_takes_over(
    network: Lab, debian: Distribution
) -> None:
    """Its bpffs is mounted in it alone, so the connect hooks go with it; table and tc programs stay."""
    arch = Distribution(network, "arch")
    first = Daemon(network, arch)
    first.places[1] = "/run/bpf/registry-enforcer"
    first.start()
    clients = debian.agent(), debian.agent("skopeo")
    for client in clients:
        assert_reached(client.connect("registry.allowed.test"))
        assert_refused(client.connect("evil.test"))
    arch.stop()
    for client in clients:
        assert_reached(client.connect("registry.allowed.test"))
        assert_refused(client.connect("evil.test"))
        assert_refused(client.attempt(EVIL_ADDRESS, 5000))
    second = Daemon(network, debian)
    second.log_file.unlink(missing_ok=True)
    second.start()
    try:
        for offset, client in enumerate(clients):
            assert_reached(client.connect(fresh_name(15_200 + offset)))
            assert_refused(client.connect("evil.test"))
    finally:
        second.remove()
    assert_reached(clients[0].connect("evil.test"))


def test_log_of_the_boot_script_is_bounded(daemon: Daemon) -> None:
    with daemon.log_file.open("a") as log:
        log.write(("x" * 99 + "\n") * 20_000)
    poll("the log to be turned over", lambda: daemon.log_file.stat().st_size < 1_000_000)
    assert daemon.log_file.with_name("boot.log.1").stat().st_size > 1_000_000


# --- networking modes ------------------------------------------------------------------------------------------------
def test_nat_without_tunnel_learns_from_the_gateway(network: Lab) -> None:
    network.ip(HOST, f"addr del {TUNNEL}/32 dev lo")
    distribution = Distribution(network, "nat", resolver=GATEWAY)
    daemon = Daemon(network, distribution)
    try:
        daemon.start()
        assert distribution.status()["resolvers"] == [GATEWAY]  # and not whoever is 10.255.255.254 behind Windows
        assert_reached(distribution.agent().connect(fresh_name(15_100)))
        assert_refused(distribution.agent().connect("evil.test"))
        assert_refused(distribution.agent("docker").attempt(GATEWAY, 3128))  # Windows, with a proxy for instance
        daemon.remove()
    finally:
        distribution.stop()
        network.ip(HOST, f"addr add {TUNNEL}/32 dev lo")


@pytest.fixture
def mirrored(network: Lab) -> Iterator[Lab]:
    """Mirrored networking's loopback0, rules and routes (NetworkManager.cpp of microsoft/WSL).

    Windows has registries on its 127.0.0.1, too.
    """
    lab = network
    lab.ip(HOST, f"link add loopback0 type veth peer name windows0 netns {lab.namespace('net')}",
           "link set loopback0 up")  # fmt: skip
    lab.ip("net", "link set windows0 address 00:11:22:33:44:55", "link set windows0 up",
           "rule add pref 90 from 198.18.0.99 lookup 90", "route add default dev windows0 table 90")  # fmt: skip
    settings = "".join(
        f"echo 1 > /proc/sys/net/ipv4/conf/{device}/{setting};"
        for device in ("loopback0", "up0")
        for setting in ("accept_local", "route_localnet")
    )
    assert lab.run(HOST, ["sh", "-ec", settings]).returncode == 0
    # Or "Windows" would not hear who has the address that answers go to.
    localnet = "echo 1 > /proc/sys/net/ipv4/conf/windows0/route_localnet"
    assert lab.run("net", ["sh", "-ec", localnet]).returncode == 0
    translate = """add table ip windows
        add chain ip windows pre { type nat hook prerouting priority dstnat; }
        add rule ip windows pre iifname windows0 ip daddr 127.0.0.1 dnat to 198.18.0.99"""
    assert lab.run("net", ["nft", "-f", "-"], text=translate).returncode == 0
    rules = [
        *(f"pref 0 iif {device} ipproto {protocol} lookup local" for device in ("loopback0", "up0")
          for protocol in ("tcp", "udp")),
        *(f"pref 1 ipproto {protocol} lookup 127" for protocol in ("tcp", "udp")),
    ]  # fmt: skip
    lab.ip(HOST, "rule add pref 2 lookup local", "rule del pref 0 lookup local",
           *(f"rule add {rule}" for rule in rules),
           f"neigh add {LOOPBACK_GATEWAY} lladdr 00:11:22:33:44:55 dev loopback0 nud permanent",
           f"route add 127.0.0.1/32 via {LOOPBACK_GATEWAY} dev loopback0 onlink table 127")  # fmt: skip
    yield lab
    lab.ip(HOST, "rule add pref 0 lookup local", "rule del pref 2 lookup local",
           *(f"rule del {rule}" for rule in rules), "link del loopback0")  # fmt: skip
    lab.ip("net", "rule del pref 90")
    assert lab.run("net", ["nft", "delete", "table", "ip", "windows"]).returncode == 0


def interface(status: Mapping[str, Any], name: str) -> str:
    return str(next(entry["role"] for entry in status["interfaces"] if entry["name"] == name))


def test_mirrored_loopback_is_reached_and_nothing_else_that_way(
    mirrored: Lab, daemon: Daemon, ubuntu: Distribution, debian: Distribution
) -> None:
    assert interface(ubuntu.status(), "loopback0") == "host loopback"
    assert interface(ubuntu.status(), "up0") == "uplink"
    for client in (debian.agent(), debian.agent("dockerd")):
        assert_reached(client.attempt("127.0.0.1", 443))
        assert_reached(client.connect("registry.allowed.test"))
        assert_refused(client.connect("evil.test"))
    # Windows might forward what is sent there: by a route, or by a socket that is bound to the device, as anybody may.
    bound = debian.run(sys.executable, "-Ic", BOUND, "loopback0", EVIL_ADDRESS)
    assert "ConnectionRefusedError" in bound.stdout, bound.stdout
    mirrored.ip(HOST, f"route add {EVIL_ADDRESS}/32 via {LOOPBACK_GATEWAY} dev loopback0 onlink")
    try:
        for client in (debian.agent(), debian.agent("dockerd")):
            assert_refused(client.attempt(EVIL_ADDRESS, 443))
    finally:
        mirrored.ip(HOST, f"route del {EVIL_ADDRESS}/32 dev loopback0")


def test_loopback0_of_a_host_that_is_not_wsl_is_an_uplink(mirrored: Lab) -> None:
    ordinary = Distribution(mirrored, "ordinary-host", release="6.1.0-28-amd64")
    daemon = Daemon(mirrored, ordinary, policy(host="strict"))
    try:
        assert_reached(ordinary.agent("dockerd").attempt("127.0.0.1", 443))
        daemon.start()
        assert interface(ordinary.status(), "loopback0") == "uplink"
        assert_refused(ordinary.agent("dockerd").attempt("127.0.0.1", 443))
        assert_refused(ordinary.agent().attempt("127.0.0.1", 443))
        daemon.remove()
    finally:
        ordinary.stop()
