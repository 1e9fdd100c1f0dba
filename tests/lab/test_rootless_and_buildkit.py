"""BuildKit's kept connections end with their permission, and engines without root are judged as those with it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

import pytest

from tests.lab.clients import Clients
from tests.lab.enforcer import Enforcer, policy, registry
from tests.lab.internet import image_archive
from tests.lab.lab import HOST_ADDRESS, Lab, poll

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
