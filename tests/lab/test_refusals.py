"""What each client prints when it is refused, word for word, and how long that takes.

Three ways to be refused: an alert (TLS), 403 (plain HTTP), and 403 under the certificate of a CA that the host trusts.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.lab.clients import Clients
from tests.lab.enforcer import Enforcer, policy, refusal_ca
from tests.lab.internet import CLIENT_IMAGE, EVIL_ADDRESS, EVIL_ADDRESS6, REPOSITORY
from tests.lab.lab import Lab, poll

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(180)]

SECONDS = 1.0  # the most that a refusal may take, with the start of the client
TLS, PLAIN = "evil.test", "evil.test:5000"
SENTENCE = "Lab does not allow evil.test; ask platform@lab.test and give reference <reference>"
ALERT = "remote error: tls: access denied"

Run = Callable[[str, str], subprocess.CompletedProcess[str]]  # (client, registry) -> what it printed


@dataclass(frozen=True, slots=True)
class Client:
    """A command that connects to a registry."""

    argv: tuple[str, ...]  # {ref} and {registry} are filled in
    plain: tuple[str, ...] = ()  # what it needs for a registry without TLS, before the last argument
    text: str = ""  # standard input


BUILD = "FROM {ref}\n"
CLIENTS = {
    "docker pull": Client(("docker", "pull", "{ref}")),
    "docker push": Client(("docker", "push", "{ref}")),
    "docker login": Client(("docker", "login", "-u", "me", "--password-stdin", "{registry}"), text="secret"),
    "docker build, classic": Client(("env", "DOCKER_BUILDKIT=0", "docker", "build", "-"), text=BUILD),
    "docker build, BuildKit": Client(("env", "DOCKER_BUILDKIT=1", "docker", "build", "-"), text=BUILD),
    "podman pull": Client(("podman", "pull", "{ref}"), ("--tls-verify=false",)),
    "buildah pull": Client(("buildah", "pull", "--policy=always", "{ref}"), ("--tls-verify=false",)),
    "skopeo inspect": Client(("skopeo", "inspect", "docker://{ref}"), ("--tls-verify=false",)),
    "ctr": Client(("ctr", "images", "pull", "{ref}"), ("--plain-http",)),
    "curl": Client(("curl", "-sS", "https://{registry}/v2/x"), ()),
}
# The line that tells of the refusal, or its end: by an alert, and by 403 in plain or under the CA.
_GO = f'Get "https://evil.test/v2/": {ALERT}'
_PING = f"pinging container registry evil.test: {_GO}"
_MANIFEST = f"reading manifest 1 in <name>: denied: {SENTENCE}"
_HEAD_ALERT = f'failed to do request: Head "https://evil.test/v2/lib/hello/manifests/1": {ALERT}'
_HEAD_403 = f"pulling from host <registry> failed with status code [manifests 1]: 403 {SENTENCE}"
PRINTED = {
    "docker pull": (
        f"Error response from daemon: {_GO}",
        f'Error response from daemon: Head "<url>/v2/lib/hello/manifests/1": denied: {SENTENCE}',
    ),
    "docker push": (_GO, f"denied: {SENTENCE}"),
    "docker login": (
        f"Error response from daemon: {_GO}",
        f'Error response from daemon: Get "<url>/v2/": denied: {SENTENCE}',
    ),
    "docker build, classic": (_GO, f'Head "<url>/v2/lib/hello/manifests/1": denied: {SENTENCE}'),
    "docker build, BuildKit": (_HEAD_ALERT, _HEAD_403),
    "podman pull": (
        f"Error: initializing source docker://<ref>: {_PING}",
        f"Error: initializing source docker://<ref>: {_MANIFEST}",
    ),
    "buildah pull": (
        f"Error: initializing source docker://<ref>: {_PING}",
        f"Error: initializing source docker://<ref>: {_MANIFEST}",
    ),
    "skopeo inspect": (_PING.replace('"', '\\"') + '"', _MANIFEST + '"'),
    "ctr": (
        f'ctr: failed to resolve reference "<ref>": {_HEAD_ALERT}',
        f'ctr: failed to resolve reference "<ref>": {_HEAD_403}',
    ),
    "curl": ("SSL routines::tlsv1 alert access denied", f'"code": "DENIED", "message": "{SENTENCE}"}}]}}'),
}
NO_PLAIN = {"docker build, BuildKit"}  # it knows nothing of dockerd's insecure registries, and gets an alert


@pytest.fixture(scope="module")
def run(lab: Lab, clients: Clients) -> Run:
    """Runs a client on the host."""
    docker = ("docker", "--host", f"unix://{lab.directory}/docker.sock")
    storage = ("--root", f"{lab.directory}/podman/root", "--runroot", f"{lab.directory}/podman/run")
    commands = {
        "docker": docker,
        "podman": ("podman", *storage, "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"),
        "buildah": ("buildah", *storage, "--storage-driver", "vfs"),
        "ctr": ("ctr", "--address", f"{lab.directory}/docker-exec/containerd/containerd.sock"),
    }

    def run(name: str, registry: str) -> subprocess.CompletedProcess[str]:
        client = CLIENTS[name]
        reference = f"{registry}/{REPOSITORY}"
        *before, last = client.argv
        plain = client.plain if registry == PLAIN else ()
        argv: list[str] = []
        for word in (*before, *plain, last):
            argv += commands.get(word, (word.format(ref=reference, registry=registry),))
        if registry == PLAIN and name == "curl":
            argv[-1] = argv[-1].replace("https", "http")
        lab.run("host", [*docker, "tag" if name == "docker push" else "rmi", *(
            (CLIENT_IMAGE, reference) if name == "docker push" else ("--force", reference))])  # fmt: skip
        return lab.run("host", argv, text=client.text.format(ref=reference))

    return run


def assert_told(name: str, registry: str, scheme: str, run: Run, expected: str) -> None:
    """The client fails with this line, within a second."""
    reference = f"{registry}/{REPOSITORY}"
    known = {
        "ref": reference,
        "name": reference.removesuffix(":1"),
        "registry": registry,
        "url": f"{scheme}://{registry}",
    }
    for placeholder, value in known.items():
        expected = expected.replace(f"<{placeholder}>", value)
    line = re.escape(expected).replace("<reference>", "[2-9A-Z]{8}") + "$"
    started = time.monotonic()
    done = run(name, registry)
    took = time.monotonic() - started
    assert re.search(line, done.stdout, re.MULTILINE), f"{line}\n{done.stdout}"
    assert took < SECONDS, took
    print(f"{name}: {took:.2f} s\n{done.stdout}")


@pytest.fixture
def strict(any_enforcer: Enforcer) -> Enforcer:
    """The host's own programs are judged, too: curl is one."""
    any_enforcer.ensure(policy(host="strict"))
    return any_enforcer


@pytest.mark.parametrize("name", CLIENTS)
def test_alert_is_shown_at_once(strict: Enforcer, run: Run, name: str) -> None:
    assert_told(name, TLS, "https", run, PRINTED[name][0])


@pytest.mark.parametrize("name", [name for name in CLIENTS if name not in NO_PLAIN])
def test_sentence_is_shown_at_once_over_plain_http(strict: Enforcer, run: Run, name: str) -> None:
    assert_told(name, PLAIN, "http", run, PRINTED[name][1])


@pytest.fixture
def trusted_ca(lab: Lab, any_enforcer: Enforcer) -> Iterator[Enforcer]:
    """Refusals under a CA that the host trusts, and dockerd's registry client by its own directory."""
    certificate, lines = refusal_ca(lab)
    for_docker = f"/etc/docker/certs.d/{TLS}"
    assert lab.run("host", ["sh", "-ec", f"mkdir -p {for_docker}; cp {certificate} {for_docker}"]).returncode == 0
    any_enforcer.ensure(policy(host="strict") + lines)
    yield any_enforcer
    lab.run("host", ["rm", "-r", for_docker])


@pytest.mark.parametrize("name", CLIENTS)
def test_sentence_is_shown_at_once_under_a_trusted_ca(trusted_ca: Enforcer, run: Run, name: str) -> None:
    assert_told(name, TLS, "https", run, PRINTED[name][1])


def test_allowed_registry_is_never_answered_under_the_ca(trusted_ca: Enforcer, lab: Lab) -> None:
    name = "registry.allowed.test"
    reached = lab.run("host", ["curl", "-sS", f"https://{name}/v2/"])
    assert (reached.returncode, reached.stdout) == (0, "{}"), reached.stdout
    # Somebody's hosts file sends an allowed name elsewhere: refused, yet not in the registry's own name.
    elsewhere = lab.run("host", ["curl", "-sS", "--resolve", f"{name}:443:{EVIL_ADDRESS}", f"https://{name}/v2/"])
    assert "alert access denied" in elsewhere.stdout


def test_policys_own_words_are_shown(any_enforcer: Enforcer, lab: Lab) -> None:
    message = "{name} ({address}:{port}) is not for {organization}: {contact}, {reference}"
    any_enforcer.ensure(policy(host="strict", more=f'[refusal]\nmessage = "{message}"\n'))
    said = lab.run("host", ["curl", "-sS", f"http://{PLAIN}/v2/x"]).stdout
    assert re.search(rf'"evil\.test \({EVIL_ADDRESS}:5000\) is not for Lab: platform@lab\.test, [2-9A-Z]{{8}}"', said)


def test_reference_finds_the_audit_line(strict: Enforcer, lab: Lab) -> None:
    # A name that nothing else asks for: repeats are folded, and written when their minute is over.
    said = lab.run("host", ["curl", "-sS", "-H", "Host: referred.test", f"http://{PLAIN}/v2/x"]).stdout
    reference = re.search(r"reference ([2-9A-Z]{8})", said)
    assert reference
    poll("the audit line", lambda: reference[1] in strict.log)


# --- without the responder --------------------------------------------------------------------------------------------
def test_nobody_but_redirected_clients_reaches_the_responder(strict: Enforcer, lab: Lab) -> None:
    port = strict.status()["responder"]["port"]
    for agent, address in ((lab.host, "127.0.0.1"), (lab.host, "::1"), (lab.ct, "10.77.0.1"), (lab.ct, "fd00:77::1"),
                           (lab.net, "192.0.2.2"), (lab.net, "2001:db8::2")):  # fmt: skip
        outcome = agent.attempt(address, port)
        assert (outcome.verdict, outcome.message) == ("refused", "Connection refused")


def test_refusals_are_counted_once_and_by_what_was_told(strict: Enforcer, lab: Lab) -> None:
    def counts() -> tuple[float, float, float]:
        return (
            strict.total("enforcer_refused_connections_total", scope="container", protocol="tcp"),
            strict.total("enforcer_refusals_answered_total", protocol="http"),
            strict.total("enforcer_refusals_answered_total", protocol="tls_alert"),
        )

    before = counts()
    lab.run("ct", ["curl", "-sS", f"http://{PLAIN}/x"])
    lab.run("ct", ["curl", "-sS", f"https://{TLS}/x"])
    assert counts() == tuple(a + b for a, b in zip(before, (2, 1, 1), strict=True))


def test_killed_daemons_refusals_are_resets_and_as_fast(strict: Enforcer, lab: Lab, run: Run) -> None:
    assert lab.ct.attempt(EVIL_ADDRESS).message == "403 Forbidden"
    strict.stop(signal.SIGKILL)
    for agent in (lab.ct, lab.host, lab.engine):
        for address in (EVIL_ADDRESS, EVIL_ADDRESS6):
            for port in (443, 5000):
                outcome = agent.attempt(address, port)
                assert (outcome.verdict, outcome.message) == ("refused", "Connection refused"), outcome
                assert outcome.seconds < SECONDS
    started = time.monotonic()
    assert "connect: connection refused" in run("docker pull", TLS).stdout
    assert time.monotonic() - started < SECONDS


def test_another_tables_input_chain_is_noticed_and_clients_are_reset_instead(strict: Enforcer, lab: Lab) -> None:
    assert strict.status()["responder"]["answers"] == ["forwarded", "local"]
    other = "add table inet other\nadd chain inet other in { type filter hook input priority 0; policy drop; }\n"
    other += "add rule inet other in iif lo accept\nadd rule inet other in ct state established accept\n"
    try:
        assert lab.run("host", ["nft", "-f", "-"], text=other).returncode == 0
        lab.ct.attempt(EVIL_ADDRESS, timeout=2)  # may have to wait
        poll("resets", lambda: strict.status()["responder"]["answers"] == ["local"])
        outcome = lab.ct.attempt(EVIL_ADDRESS)
        assert (outcome.message, outcome.seconds < SECONDS) == ("Connection refused", True)
        assert lab.engine.attempt(EVIL_ADDRESS).message == "403 Forbidden"
    finally:
        lab.run("host", ["nft", "delete table inet other"])
    assert strict.reload(strict.policy) == "ok"
    assert lab.ct.attempt(EVIL_ADDRESS).message == "403 Forbidden"
