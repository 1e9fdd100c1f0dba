"""Real clients on the lab's host: a dockerd of its own, podman, skopeo, curl; and what they say as an `Outcome`."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from tests.lab.internet import CLIENT_IMAGE, REPOSITORY, Internet
from tests.lab.lab import DOCKER_BRIDGE, DOCKER_NET6, Lab, Outcome, accepts, poll

PLAIN_REGISTRIES = ("plain.allowed.test:5000", "evil.test:5000")
CLIENT_DEADLINE = 40.0  # podman tries three times

# What clients print when a connection was refused to their face: reset, ICMP, TLS alert, HTTP 403.
_REFUSALS = re.compile(
    r"connection refused|connection reset|no route to host|host is unreachable|access denied"
    r'|: 40[13]\b|registry 40[13]\b|denied:|"DENIED"'
    r"|could not connect to server|failed to connect|can't connect to remote host",
    re.IGNORECASE,
)
_SILENCE = re.compile(r"i/o timeout|timed out|timeout|request canceled|deadline exceeded", re.IGNORECASE)


class Clients:
    """The engines and commands of namespace "host"."""

    def __init__(self, lab: Lab, internet: Internet) -> None:
        self._lab = lab
        self._socket = str(lab.directory / "docker.sock")
        self._docker = ["docker", "--host", f"unix://{self._socket}"]
        storage = lab.directory / "podman"
        self._podman = ["podman", "--root", f"{storage}/root", "--runroot", f"{storage}/run", "--cgroup-manager",
                        "cgroupfs", "--storage-driver", "vfs", "--events-backend", "none"]  # fmt: skip
        self._configure_docker()
        self._dockerd = self._start_docker()
        self._docker_do("load", "--input", str(internet.image))

    def _configure_docker(self) -> None:
        directory = self._lab.directory
        (directory / "home" / "docker").mkdir()
        (directory / "home" / "docker" / "config.json").write_text("{}")
        (directory / "daemon.json").write_text("{}")

    def _start_docker(self) -> subprocess.Popen[bytes]:
        lab, directory = self._lab, self._lab.directory
        command = ["dockerd", "--config-file", f"{directory}/daemon.json", "--host", f"unix://{self._socket}",
                   "--data-root", f"{directory}/docker", "--exec-root", f"{directory}/docker-exec",
                   "--pidfile", f"{directory}/docker.pid", "--userland-proxy=false",
                   # Containers below the host's cgroup, as they are below the root's on a real host.
                   "--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", f"/{lab.name}/host/docker",
                   "--bip", DOCKER_BRIDGE, "--ipv6", "--fixed-cidr-v6", DOCKER_NET6]  # fmt: skip
        for registry in PLAIN_REGISTRIES:
            command += ["--insecure-registry", registry]
        daemon = lab.spawn("host", command, "dockerd")
        poll("dockerd", lambda: accepts(self._socket, 0) or daemon.poll() is not None)
        if daemon.poll() is not None:
            raise RuntimeError(f"dockerd ended: {lab.log('dockerd')[-2000:]}")
        return daemon

    def restart_docker(self) -> None:
        """As `systemctl restart docker`."""
        self._dockerd.terminate()
        self._dockerd.wait(20)
        self._dockerd = self._start_docker()
        self._docker_do("info")  # answered when its networks and rules are there

    @property
    def podman(self) -> list[str]:
        """What runs podman, with storage of its own."""
        return self._podman

    def _try(self, argv: Sequence[str], timeout: float = CLIENT_DEADLINE) -> Outcome:
        started = time.monotonic()
        done = self._lab.run("host", argv, timeout=timeout)
        return Outcome(_verdict(done.returncode, done.stdout), time.monotonic() - started, _last_line(done.stdout))

    # --- pulls ---
    def docker_pull(self, registry: str) -> Outcome:
        """`docker pull`: the connections are dockerd's."""
        reference = f"{registry}/{REPOSITORY}"
        self._lab.run("host", [*self._docker, "rmi", "--force", reference])
        return self._try([*self._docker, "pull", reference])

    def podman_pull(self, registry: str) -> Outcome:
        """`podman pull`: the connections are the command's own."""
        tls = ["--tls-verify=false"] if registry in PLAIN_REGISTRIES else []
        return self._try([*self._podman, "pull", "--quiet", *tls, f"docker://{registry}/{REPOSITORY}"])

    def skopeo_copy(self, registry: str) -> Outcome:
        """`skopeo copy` into a directory."""
        tls = ["--src-tls-verify=false"] if registry in PLAIN_REGISTRIES else []
        target = f"dir:{self._lab.directory}/skopeo"
        return self._try(["skopeo", "copy", "--insecure-policy", *tls, f"docker://{registry}/{REPOSITORY}", target])

    # --- connections ---
    def curl(self, url: str) -> Outcome:
        """Any program of the host."""
        return self._try(["curl", "--silent", "--show-error", "--fail", "--max-time", "10", url])

    def in_container(self, network: str, name: str, port: int) -> Outcome:
        """A request by busybox in a docker container on the network "bridge", "host" or one of `network`.

        Over plain HTTP, which TLS servers answer with 400.
        """
        return self.request([*self._docker, "run", "--rm", "--network", network, CLIENT_IMAGE], name, port)

    def request(self, inside: Sequence[str], name: str, port: int) -> Outcome:
        """The same by busybox, which the command `inside` runs somewhere."""
        # nc closes at once where its input ends, and the answer is lost.
        request = f"(printf 'GET / HTTP/1.0\\r\\nHost: {name}\\r\\n\\r\\n'; sleep 0.2) | nc -w 10 {name} {port}"
        outcome = self._try([*inside, "sh", "-c", request])
        return replace(outcome, verdict="refused") if _REFUSALS.search(outcome.message) else outcome

    def run_in_container(self, network: str, argv: Sequence[str]) -> Outcome:
        """Any busybox command in such a container."""
        return self._try([*self._docker, "run", "--rm", "--network", network, CLIENT_IMAGE, *argv])

    @contextmanager
    def service(self, publish: str) -> Iterator[str]:
        """A container on docker's bridge that listens on TCP port 443; the value is its own address."""
        listen = ["nc", "-ll", "-p", "443", "-e", "cat"]
        container = self._docker_do("run", "--detach", "--publish", publish, CLIENT_IMAGE, *listen)
        try:
            address = self._docker_do("inspect", "--format", "{{.NetworkSettings.IPAddress}}", container)
            listening = [*self._docker, "exec", container, "nc", "-w", "1", "127.0.0.1", "443"]
            poll("the service", lambda: self._lab.run("host", listening).returncode == 0)
            yield address
        finally:
            self._docker_do("rm", "--force", container)

    @contextmanager
    def network(self, name: str) -> Iterator[None]:
        """A docker network with a bridge of its own, on which docker itself answers DNS."""
        self._docker_do("network", "create", name)
        try:
            yield
        finally:
            self._docker_do("network", "rm", name)

    def _docker_do(self, *arguments: str) -> str:
        done = self._lab.run("host", [*self._docker, *arguments])
        if done.returncode != 0:
            raise RuntimeError(f"docker {' '.join(arguments)}: {done.stdout}")
        return done.stdout.strip()


def _verdict(exit_code: int, output: str) -> str:
    if exit_code == 0:
        return "reached"
    if _REFUSALS.search(output):
        return "refused"
    return "timed out" if exit_code == 124 or _SILENCE.search(output) else "error"


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else ""
