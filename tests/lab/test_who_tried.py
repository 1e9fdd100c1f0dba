"""Who tried: real clients are refused and the audit log names them; what is revoked ends, whatever it was doing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from tests.lab.clients import Clients
from tests.lab.enforcer import Enforcer, policy, registry
from tests.lab.internet import CLIENT_IMAGE, EVIL_ADDRESS, REPOSITORY
from tests.lab.lab import CT_ADDRESS, HOST_ADDRESS, Lab, Outcome, poll

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(180)]

Record = Mapping[str, Any]

SHORT_LIVED = """
import socket, sys
open("/proc/self/comm", "w").write(sys.argv[1])
s = socket.socket()
s.setblocking(False)
s.connect_ex((sys.argv[2], int(sys.argv[3])))
"""


FROM_ONE_PORT = """
import socket, sys
name, port, *addresses = sys.argv[1:]
for address in addresses:
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("", int(port)))
    s.settimeout(5)
    s.connect((address, 5000))
    s.sendall(f"GET /v2/ HTTP/1.1\\r\\nHost: {name}\\r\\n\\r\\n".encode())
    print(s.recv(9999).decode())
    s.close()
"""


class Audit:
    """What the audit log says from now on."""

    def __init__(self, enforcer: Enforcer) -> None:
        self._enforcer = enforcer
        self._seen = self._lines()

    def _lines(self) -> list[str]:
        return self._enforcer.command("log", "--json", "-n", "200").splitlines()

    def first(self, condition: Callable[[Record], bool], within: float = 5) -> Record:
        """The first new record of which it holds, `within` seconds."""
        found: list[Record] = []

        def look() -> bool:
            new = [line for line in self._lines() if line not in self._seen]
            found[:] = [record for record in map(json.loads, new) if condition(record)]
            return bool(found)

        poll("an audit record", look, within)
        return found[0]


@pytest.fixture
def audit(enforcer: Enforcer) -> Iterator[Audit]:
    # Another daemon's fold of the same refusals would keep them from being firsts.
    enforcer.stop()
    enforcer.start(policy())
    yield Audit(enforcer)
    enforcer.ensure(policy())


def refused(record: Record) -> bool:
    return bool(record["kind"] == "refused" and record["count"])


# --- who tried -------------------------------------------------------------------------------------------------------
def test_docker_pull_is_the_daemons(audit: Audit, clients: Clients) -> None:
    assert clients.docker_pull("evil.test").refused
    record = audit.first(refused)
    assert (record["scope"], record["origin"], record["protocol"]) == ("engine", "host", "tcp")
    assert record["process"]["comm"] == "dockerd"
    assert record["process"]["exe"].endswith("/dockerd")
    assert record["process"]["uid"] == 0
    assert record["destination"] == {"address": EVIL_ADDRESS, "port": 443}
    assert record["source"]["address"] == HOST_ADDRESS
    assert (record["name"], record["name_source"], record["reason"]) == ("evil.test", "client", "unlisted-name")
    assert record["reference"]


@pytest.mark.parametrize(
    ("pull", "registry_name", "comm"),
    [(Clients.podman_pull, "v6.evil.test", "podman"), (Clients.skopeo_copy, "evil.test:5000", "skopeo")],
)
def test_command_that_pulls_is_named_itself(
    audit: Audit, clients: Clients, pull: Callable[[Clients, str], Outcome], registry_name: str, comm: str
) -> None:
    assert pull(clients, registry_name).refused
    record = audit.first(refused)
    assert (record["scope"], record["origin"], record["process"]["comm"]) == ("engine", "host", comm)


@pytest.fixture
def container(clients: Clients, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """(network, name) of a docker container that stays."""
    network = request.param
    name = f"re-lab-{network}-client"
    clients._docker_do("run", "--detach", "--name", name, "--network", network, CLIENT_IMAGE, "sleep", "1000")
    yield network, name
    clients._docker_do("rm", "--force", name)


@pytest.mark.parametrize("container", ["bridge", "host"], indirect=True)
def test_docker_container_is_named_with_its_image(audit: Audit, clients: Clients, container: tuple[str, str]) -> None:
    network, name = container
    # It lives for a moment after its refusal: on a hybrid hierarchy only /proc knows its container.
    attempt = ["sh", "-c", "wget -O - http://evil.test:5000/v2/; sleep 1"]
    done = clients._lab.run("host", [*clients._docker, "exec", name, *attempt])
    assert "Lab does not allow evil.test" in done.stdout
    record = audit.first(refused)
    assert (record["scope"], record["origin"]) == ("container", "container")
    assert (record["container"]["name"], record["container"]["image"]) == (name, CLIENT_IMAGE)
    assert record["container"]["runtime"] == "docker"
    assert record["name"] == "evil.test"
    if network == "host":
        assert record["process"]["comm"] in ("wget", "busybox")
    else:
        assert record["process"] is None
        assert record["source"]["address"].startswith("10.78.0.")


def test_podman_container_is_named_with_its_image(audit: Audit, clients: Clients, lab: Lab) -> None:
    assert clients.podman_pull("registry.allowed.test").reached
    image, name = f"registry.allowed.test/{REPOSITORY}", "re-lab-podman-client"
    # crun refuses a hybrid hierarchy. The parent is below what the lab's enforcer sees.
    options = ["--name", name, "--network", "host", "--cgroup-parent", f"/{lab.name}/host/libpod_parent"]
    limits = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1024:1024"]
    attempt = ["sh", "-c", "wget -O - http://evil.test:5000/v2/; sleep 2"]
    run = [*clients._podman, "--runtime", "runc", "run", "--rm", *options, *limits, image, *attempt]
    done = lab.run("host", run)
    assert "Lab does not allow evil.test" in done.stdout
    record = audit.first(lambda record: refused(record) and record["scope"] == "container")
    assert record["container"]
    assert (record["container"]["name"], record["container"]["runtime"]) == (name, "podman")
    assert record["container"]["image"] == image


def test_container_without_an_engine_is_not_guessed(audit: Audit, lab: Lab) -> None:
    assert lab.ct.attempt(EVIL_ADDRESS).refused
    record = audit.first(refused)
    assert record["source"]["address"] == CT_ADDRESS
    assert (record["scope"], record["origin"], record["container"]) == ("container", "unknown", None)


def test_client_that_ends_at_once_is_named_all_the_same(audit: Audit, lab: Lab) -> None:
    lab.run("host", ["/usr/bin/python3", "-I", "-c", SHORT_LIVED, "skopeo", EVIL_ADDRESS, "8443"])
    record = audit.first(refused)
    assert (record["process"]["comm"], record["process"]["uid"]) == ("skopeo", 0)
    assert record["process"]["pid"] > 0


def test_second_connection_from_one_port_is_the_clients_too(audit: Audit, lab: Lab, enforcer: Enforcer) -> None:
    """Redirected to one place they would be the same connection, so the kernel gives one of them another port."""
    enforcer.ensure(policy(host="strict"))
    addresses, port = (EVIL_ADDRESS, "198.18.66.67"), 23_456
    done = lab.run("host", ["/usr/bin/python3", "-I", "-c", FROM_ONE_PORT, "evil.test", str(port), *addresses])
    assert done.stdout.count("HTTP/1.1 401 Lab does not allow evil.test") == len(addresses)
    for address in addresses:
        record = audit.first(lambda record: refused(record) and record["destination"]["address"] == address)  # noqa: B023
        assert record["source"] == {"address": HOST_ADDRESS, "port": port}
        assert (record["scope"], record["name"], record["answered"]) == ("host", "evil.test", "http")


def test_comm_with_control_characters_forges_no_line(audit: Audit, lab: Lab, enforcer: Enforcer) -> None:
    enforcer.ensure(policy(host="strict"))
    name = 'a\n{"b\x1b[2J'
    lab.run("host", ["/usr/bin/python3", "-I", "-c", SHORT_LIVED, name, EVIL_ADDRESS, "443"])
    record = audit.first(refused)
    assert record["process"]["comm"] == name
    assert "\x1b" not in enforcer.command("log")
    assert all(line.isprintable() for line in enforcer.command("log").splitlines())


# --- what the operator reads -----------------------------------------------------------------------------------------
def test_log_follow_and_explain_show_who_tried(audit: Audit, lab: Lab, enforcer: Enforcer) -> None:
    assert lab.engine.attempt(EVIL_ADDRESS).refused
    audit.first(refused)
    follower = lab.spawn("host", enforcer.argv("log", "--follow"), "follower")
    poll("what was before", lambda: f"refused {EVIL_ADDRESS} port 443/tcp" in lab.log("follower"))
    assert "the host, /usr/bin/python3" in lab.log("follower")
    assert lab.engine.attempt(EVIL_ADDRESS, 5000).refused
    poll("what comes", lambda: f"refused {EVIL_ADDRESS} port 5000/tcp" in lab.log("follower"))
    assert lab.log("follower").count("port 443/tcp") == 1
    follower.terminate()
    explained = enforcer.command("explain", EVIL_ADDRESS, exit_code=1)
    assert f"refused {EVIL_ADDRESS} port 443/tcp" in explained


def test_observed_connections_are_audited_and_let_through(audit: Audit, lab: Lab, enforcer: Enforcer) -> None:
    enforcer.ensure(policy(mode="observe"))
    assert lab.engine.attempt(EVIL_ADDRESS, 8443).reached
    record = audit.first(lambda record: record["kind"] == "observed")
    assert (record["destination"]["port"], record["process"]["comm"]) == (8443, "skopeo")


def test_policy_changes_are_in_the_log(audit: Audit, enforcer: Enforcer) -> None:
    assert enforcer.reload(policy(host="strict")) == "ok"
    assert "is in force" in audit.first(lambda record: record["kind"] == "policy")["detail"]
    assert enforcer.reload("nonsense") == "bad_policy"
    assert "stays" in audit.first(lambda r: r["kind"] == "policy" and "stays" in r["detail"])["detail"]


def test_audit_file_is_written_and_follows_the_policy(audit: Audit, lab: Lab, enforcer: Enforcer) -> None:
    path = lab.directory / "audit" / "audit.jsonl"
    enforcer.ensure(policy(more=f'\n[audit]\nfile = "{path}"\n'))
    assert lab.engine.attempt(EVIL_ADDRESS, 8443).refused
    record = audit.first(refused)
    poll("the file's line", lambda: path.exists() and path.read_text().count("\n") >= 2)
    assert record in [json.loads(line) for line in path.read_text().splitlines()]


# --- established connections -----------------------------------------------------------------------------------------
DOWNLOAD = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)
print("open", flush=True)
received = 0
try:
    while chunk := s.recv(65536):
        received += len(chunk)
        time.sleep(0.01)
    print("ended", flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""
FOUNTAIN = """
import socket, sys, threading
listener = socket.create_server(("", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
def pour(s):
    try:
        while True:
            s.sendall(bytes(65536))
    except OSError:
        pass
while True:
    threading.Thread(target=pour, args=(listener.accept()[0],), daemon=True).start()
"""
FOUNTAIN_PORT = 9443
REVOKED, KEPT = "198.18.9.9", "198.18.9.10"


@pytest.fixture(scope="module")
def fountain(lab: Lab) -> None:
    """A server on every address of the internet that sends for ever and reads nothing."""
    lab.spawn("net", ["/usr/bin/python3", "-I", "-c", FOUNTAIN, str(FOUNTAIN_PORT)], "fountain")
    poll("the fountain", lambda: lab.net.attempt("127.0.0.1", FOUNTAIN_PORT).reached)


def listed(*addresses: str, **more: Any) -> str:
    """The lab's policy, with addresses that need no DNS answer, on the fountain's port among the registry ports."""
    rules = "".join(
        f'\n[[registry]]\nname = "r{n}"\naddresses = ["{address}"]\nports = [{FOUNTAIN_PORT}]\n'
        for n, address in enumerate(addresses)
    )
    return policy(more=rules, **more).replace("[443, 5000]", f"[443, 5000, {FOUNTAIN_PORT}]", 1)


@pytest.mark.parametrize("where", ["host", "ct"])
def test_running_transfer_ends_when_its_address_is_not_listed_any_more(
    enforcer: Enforcer, lab: Lab, fountain: None, where: str
) -> None:
    both = listed(REVOKED, KEPT, host="strict")
    enforcer.ensure(both)
    logs = {}
    for address in (REVOKED, KEPT):
        log = logs[address] = f"download-{where}-{address}-{time.monotonic_ns()}"
        lab.spawn(where, ["/usr/bin/python3", "-I", "-c", DOWNLOAD, address, str(FOUNTAIN_PORT)], log)
        poll("a download", lambda log=log: "open" in lab.log(log))  # type: ignore[misc]
    enforcer.ensure(listed(KEPT, host="strict"))
    poll("the revoked one's end", lambda: "Connection" in lab.log(logs[REVOKED]), 10)
    assert "ConnectionResetError" in lab.log(logs[REVOKED])
    time.sleep(1)
    assert lab.log(logs[KEPT]) == "open\n"
    enforcer.ensure(policy())


@pytest.mark.parametrize("agent_name", ["engine", "ct"])
def test_idle_connection_is_refused_at_its_next_word(enforcer: Enforcer, lab: Lab, agent_name: str) -> None:
    agent = getattr(lab, agent_name)
    enforcer.ensure(policy(more=registry("later", "later.allowed.test", ports=(5000,))))
    agent.call("hold", key="revoked", name="later.allowed.test", port=5000)
    agent.call("hold", key="kept", name="plain.allowed.test", port=5000)
    enforcer.ensure(policy())
    assert agent.talk("revoked").refused
    assert agent.talk("kept").reached
    # Permitted once more, it is no longer looked at.
    enforcer.ensure(policy(more=registry("later", "later.allowed.test", ports=(5000,))))
    agent.call("hold", key="again", name="later.allowed.test", port=5000)
    assert agent.talk("again").reached


def test_connection_of_a_scope_that_was_off_is_judged_when_the_scope_is_strict(enforcer: Enforcer, lab: Lab) -> None:
    enforcer.ensure(policy())
    lab.host.call("hold", key="open", name="evil.test", port=5000)
    lab.host.call("hold", key="allowed", name="plain.allowed.test", port=5000)
    before = enforcer.log.count("are judged again")
    enforcer.ensure(policy(host="strict"))
    poll("its refusal", lambda: enforcer.log.count("are judged again") > before)
    assert lab.host.talk("open").refused
    assert lab.host.talk("allowed").reached


def test_observed_connection_ends_when_the_mode_is_enforce(enforcer: Enforcer, lab: Lab) -> None:
    enforcer.ensure(policy(mode="observe"))
    lab.ct.call("hold", key="observed", name="evil.test", port=5000)
    before = enforcer.log.count("are judged again")
    enforcer.ensure(policy())
    poll("its refusal", lambda: enforcer.log.count("are judged again") > before)
    assert lab.ct.talk("observed").refused
