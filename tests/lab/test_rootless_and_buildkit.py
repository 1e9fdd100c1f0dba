"""BuildKit's kept connections end with their permission, and engines without root are judged as those with it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from enforcer.auditing import CONNECT_SECONDS
from tests.lab.clients import Clients
from tests.lab.enforcer import Enforcer, policy, registry
from tests.lab.internet import REPOSITORY, image_archive
from tests.lab.lab import HOST_ADDRESS, Lab, Outcome, poll

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(180)]

REVOKED, KEPT = "later.allowed.test", "registry.allowed.test"
REVOKED_ADDRESS = "198.18.1.17"
WITH_REVOKED = policy(more=registry("later", REVOKED))


# --- BuildKit --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Builds:
    """dockerd's own BuildKit, and images that it has never seen: each has a layer of its own."""

    lab: Lab
    docker: tuple[str, ...]

    def publish(self, tag: str) -> None:
        """A new image under lib/hello:`tag` in every registry."""
        content, archive = self.lab.directory / f"content-{tag}", self.lab.directory / f"image-{tag}.tar"
        content.write_text(tag)
        archive.write_bytes(image_archive(content))
        copy = ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false"]
        to = f"docker://127.0.0.1:5000/lib/hello:{tag}"
        pushed = self.lab.run("net", [*copy, f"docker-archive:{archive}", to])
        assert pushed.returncode == 0, pushed.stdout

    def build(self, name: str, tag: str) -> subprocess.CompletedProcess[str]:
        """`docker build` of an image that begins with the registry's."""
        command = ["env", "DOCKER_BUILDKIT=1", *self.docker, "build", "--no-cache", "--tag", f"built:{tag}", "-"]
        return self.lab.run("host", command, text=f"FROM {name}/lib/hello:{tag}\n")

    def exists(self, tag: str) -> bool:
        """Whether such a build has left an image."""
        return self.lab.run("host", [*self.docker, "image", "inspect", f"built:{tag}"]).returncode == 0

    def requests(self) -> list[str]:
        """The registry's access log, as far as it was asked as the revoked one."""
        return [line for line in self.lab.log("registry-443").splitlines() if f"request.host={REVOKED} " in line]

    def kept_connections(self) -> set[str]:
        """Own ends of the connections to the revoked registry that are established on the host."""
        listing = self.lab.run("host", ["ss", "-Htn", "state", "established", "dst", REVOKED_ADDRESS]).stdout
        return {line.split()[2] for line in listing.splitlines()}


@pytest.fixture
def builds(lab: Lab, clients: Clients) -> Builds:
    return Builds(lab, tuple(clients._docker))


def test_buildkits_kept_connection_serves_the_next_build_while_it_is_permitted(
    any_enforcer: Enforcer, builds: Builds
) -> None:
    any_enforcer.ensure(WITH_REVOKED)
    for tag in ("permitted-1", "permitted-2"):
        builds.publish(tag)
    assert builds.build(REVOKED, "permitted-1").returncode == 0
    kept = builds.kept_connections()
    before = len(builds.requests())
    done = builds.build(REVOKED, "permitted-2")
    assert done.returncode == 0, done.stdout
    # A registry logs what it has answered, and so after the client has it.
    poll("the access log", lambda: any("/blobs/" in line for line in builds.requests()[before:]))
    # The next test is about a connection that is used again: it is.
    (end,) = kept
    assert all(f'remoteaddr="{end}"' in line for line in builds.requests()[before:])


def test_buildkits_kept_connection_fetches_nothing_from_a_registry_that_is_not_listed_any_more(
    any_enforcer: Enforcer, builds: Builds
) -> None:
    any_enforcer.ensure(WITH_REVOKED)
    for tag in ("revoked-1", "revoked-2", "kept"):
        builds.publish(tag)
    assert builds.build(REVOKED, "revoked-1").returncode == 0
    assert any(end.startswith(f"{HOST_ADDRESS}:") for end in builds.kept_connections())
    any_enforcer.ensure(policy())
    before = builds.requests()
    refused = builds.build(REVOKED, "revoked-2")
    assert refused.returncode != 0
    url = f"https://{REVOKED}/v2/lib/hello/manifests/revoked-2"
    assert f'Head "{url}": remote error: tls: access denied' in refused.stdout
    assert builds.requests() == before
    assert not builds.exists("revoked-2")
    kept = builds.build(KEPT, "kept")
    assert kept.returncode == 0, kept.stdout
    assert builds.exists("kept")


# --- without root ----------------------------------------------------------------------------------------------------
USER, UID, HOME = "re-user", 64321, "/run/re-user"  # nobody's but the lab's: its /etc, /run and /dev/net are private
SECONDS = 1.0  # the most that a refusal may take, with the start of the client

_MAKE_USER = f"""
    echo '{USER}:x:{UID}:{UID}::{HOME}:/bin/sh' >> /etc/passwd
    echo '{USER}:x:{UID}:' >> /etc/group
    for ids in /etc/subuid /etc/subgid; do echo '{USER}:200000:65536' >> $ids; done
    mkdir -p {HOME}/run {HOME}/.docker {HOME}/docker
    echo '{{}}' | tee {HOME}/daemon.json > {HOME}/.docker/config.json
    chown -R {UID}:{UID} {HOME}
    mount -t tmpfs -o mode=755 tmpfs /dev/net
    mknod -m 666 /dev/net/tun c 10 200
"""
_PODMAN = ("podman", "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none")
_DOCKER = ("docker", "--host", f"unix://{HOME}/docker.sock")
# As dockerd-rootless.sh does: copies of /etc and /run, without what root's own docker has there. A copy is full of
# links, and runc takes no root file system below one: dockerd resolves its data root if that exists when it starts.
_DOCKERD = (
    "rootlesskit", "--net=slirp4netns", "--disable-host-loopback", "--copy-up=/etc", "--copy-up=/run",
    "--state-dir", f"{HOME}/rootlesskit",
    "sh", "-c", 'rm -f /run/docker /run/containerd /run/xtables.lock; exec "$@"', "sh",
    "dockerd", "--rootless", "--storage-driver", "vfs", "--config-file", f"{HOME}/daemon.json",
    "--host", f"unix://{HOME}/docker.sock", "--pidfile", f"{HOME}/docker.pid",
    "--data-root", f"{HOME}/docker", "--exec-root", f"{HOME}/docker-exec",
)  # fmt: skip

# crun refuses a hybrid hierarchy. Without CAP_SYS_RESOURCE limits can only be lowered.
_LIMITS = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1024:1024")
_IMAGE = f"{KEPT}/{REPOSITORY}"
CONTAINERS = {
    "podman": (*_PODMAN, "--runtime", "runc", "run", "--rm", "--network", "slirp4netns", *_LIMITS, _IMAGE),
    "docker": (*_DOCKER, "run", "--rm", *_LIMITS, _IMAGE),
    "pasta": ("pasta", "--config-net", "--"),  # as later versions of podman start it
}
CARRIERS = {
    "podman": {"slirp4netns"},
    "docker": {"slirp4netns"},
    "pasta": {"pasta", "pasta.avx2", "passt", "passt.avx2"},
}
PULLS: Mapping[str, tuple[tuple[str, ...], Callable[[Clients, str], Outcome], str, str]] = {
    # the user's own, root's, and what the audit log names it: the rootless dockerd is behind slirp4netns itself
    "podman": ((*_PODMAN, "pull", "--quiet"), Clients.podman_pull, "engine", "podman"),
    "docker": ((*_DOCKER, "pull", "--quiet"), Clients.docker_pull, "container", "slirp4netns"),
}


@dataclass(frozen=True, slots=True)
class User:
    """Somebody without any privilege on the enforced host, with a dockerd."""

    lab: Lab

    def argv(self, *command: str) -> list[str]:
        """What runs a command as this user."""
        become = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", "--inh-caps=-all"]
        path = self.lab.environment["PATH"]
        environment = [f"HOME={HOME}", f"XDG_RUNTIME_DIR={HOME}/run", f"TMPDIR={HOME}", f"PATH={path}"]
        return [*become, "env", "--ignore-environment", f"--chdir={HOME}", *environment, *command]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return self.lab.run("host", self.argv(*command))


@pytest.fixture(scope="module")
def user(lab: Lab) -> User:
    made = lab.run("host", ["sh", "-ec", _MAKE_USER])
    assert made.returncode == 0, made.stdout
    user = User(lab)
    daemon = lab.spawn("host", user.argv(*_DOCKERD), "rootless-dockerd")
    poll(
        "rootless dockerd",
        lambda: user.run(*_DOCKER, "version").returncode == 0 or daemon.poll() is not None,
    )
    assert daemon.poll() is None, lab.log("rootless-dockerd")[-2000:]
    return user


@pytest.fixture
def fresh_enforcer(any_enforcer: Enforcer) -> Enforcer:
    """With an empty audit log: nothing is folded into what an earlier test has done."""
    if any_enforcer.running:
        any_enforcer.stop()
    time.sleep(CONNECT_SECONDS)  # nor taken for one of two processes of one user that connect at the same time
    any_enforcer.start(policy())
    return any_enforcer


def refusal_of(user: User, enforcer: Enforcer) -> Mapping[str, Any]:
    """The first audit record of a refusal that names the user."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        records = map(json.loads, enforcer.command("log", "--json").splitlines())
        found[:] = [r for r in records if r["kind"] == "refused" and r["process"] and r["process"]["uid"] == UID]
        return bool(found)

    poll("the audit record", look, 5)
    return found[0]


@pytest.mark.parametrize("engine", PULLS)
def test_rootless_pull_from_an_allowed_registry(enforcer: Enforcer, user: User, engine: str) -> None:
    done = user.run(*PULLS[engine][0], _IMAGE)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("engine", PULLS)
def test_rootless_pull_from_another_registry_is_refused_in_the_words_that_root_is_told(
    fresh_enforcer: Enforcer, user: User, clients: Clients, engine: str
) -> None:
    pull, as_root, scope, comm = PULLS[engine]
    started = time.monotonic()
    done = user.run(*pull, f"evil.test/{REPOSITORY}")
    took = time.monotonic() - started
    record = refusal_of(user, fresh_enforcer)
    assert done.returncode != 0
    assert "tls: access denied" in done.stdout
    assert done.stdout.splitlines()[-1] == as_root(clients, "evil.test").message
    assert took < SECONDS
    assert (record["scope"], record["process"]["comm"], record["name"]) == (scope, comm, "evil.test")


@pytest.mark.parametrize("engine", CONTAINERS)
def test_rootless_containers_own_traffic_is_judged_as_a_containers(
    fresh_enforcer: Enforcer, user: User, engine: str
) -> None:
    def get(name: str) -> subprocess.CompletedProcess[str]:
        return user.run(*CONTAINERS[engine], "busybox", "wget", "-q", "-O", "-", f"http://{name}:5000/v2/")

    allowed = get("plain.allowed.test")
    assert allowed.returncode == 0, allowed.stdout
    assert "{}" in allowed.stdout
    refused = get("evil.test")
    assert refused.returncode != 0
    assert "Lab does not allow evil.test" in refused.stdout
    record = refusal_of(user, fresh_enforcer)
    assert (record["scope"], record["name"]) == ("container", "evil.test")
    assert record["process"]["comm"] in CARRIERS[engine]
