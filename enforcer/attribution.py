"""Whose a socket is: cgroup paths and program names of container engines and of containers, and what engines tell.

Names alone are a convenience, not a boundary: whoever is root on the host can call anything anything. What holds
without names is the network namespace and forwarding; these tables tell engines and containers that share the host's
network from the rest of the host.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, ip_address
from types import MappingProxyType

from enforcer.kernel_abi import COMM_BYTES, MarkedScope
from enforcer.policy import Address

_CONTAINER_ID = "[0-9a-f]{64}"
# One component of a cgroup's path, anywhere in it. A parent that holds nothing but containers counts itself, so that a
# container is known by its ancestor from its first instruction, before its own mkdir has been noticed.
_CONTAINER_COMPONENT = re.compile(
    rf"""
      {_CONTAINER_ID}                                 # cgroupfs drivers, --cgroup-parent, /<containerd namespace>/<id>
    | (docker|crio|cri-containerd|nerdctl)-{_CONTAINER_ID}\.scope              # systemd drivers
    | cri-containerd:.+
    | (machine-|user-)?libpod[-_].+                   # libpod-ID.scope, libpod_parent, machine-libpod_pod_ID.slice
    | (kubelet[-.])?kubepods([-.].+)?                 # kubepods, kubepods.slice, kubepods-burstable-podUID.slice
    | buildah-.+
    | lxc\.payload(\..+)?
    """,
    re.VERBOSE,
)
# Directories that the cgroupfs drivers make at the top of the hierarchy: docker, BuildKit, LXC, and containerd's
# namespaces (ctr, nerdctl, CRI). Deeper down the same words may be anybody's.
_CONTAINER_PARENTS = frozenset({"docker", "buildkit", "lxc", "default", "k8s.io", "moby"})
# k3s.service, rke2-server.service and kubelet.service are not here although k3s has containerd inside: they are the
# cluster's API clients and servers on ports of their own, and for an engine every TCP port counts. Their images are
# pulled by the `containerd` child, which the program names below find.
_ENGINE_COMPONENT = re.compile(
    r"""
      (docker|dockerd|containerd|crio|cri-o|podman|podman-auto-update|buildkit|buildkitd|balena)\.service
    | (stargz|soci)-snapshotter\.service
    | snap\.docker\.dockerd\.service
    | snap\.microk8s\.daemon-containerd\.service
    | podman-(pause-)?[0-9a-f]+\.scope                # podman without a service moves itself there
    | openrc\.(docker|containerd|crio|podman)
    """,
    re.VERBOSE,
)


def classify_cgroup(path: str) -> MarkedScope | None:
    """CONTAINER or ENGINE for a cgroup's path relative to the root of the v2 hierarchy; None for anything else.

    A container inside an engine's cgroup is a container, and so is an engine inside a container.
    """
    components = [component for component in path.split("/") if component]
    if components and components[0] in _CONTAINER_PARENTS:
        return MarkedScope.CONTAINER
    if any(_CONTAINER_COMPONENT.fullmatch(component) for component in components):
        return MarkedScope.CONTAINER
    if any(_ENGINE_COMPONENT.fullmatch(component) for component in components):
        return MarkedScope.ENGINE
    return None


def _by_comm(programs: Mapping[str, MarkedScope]) -> Mapping[str, MarkedScope]:
    """The kernel keeps the first 15 bytes of a program's name (TASK_COMM_LEN less the NUL)."""
    return MappingProxyType({name[: COMM_BYTES - 1]: scope for name, scope in programs.items()})


_ENGINES = (
    "apptainer",
    "buildah",
    "buildkitd",
    "containerd",
    "containerd-stargz-grpc",
    "crane",
    "crio",
    "ctr",
    "docker",  # `docker manifest` and plugins ask registries without the daemon
    "docker-buildx",
    "docker-compose",
    "dockerd",
    "gcrane",
    "nerdctl",
    "oras",
    "podman",
    "regbot",
    "regctl",
    "regsync",
    "singularity",
    "skopeo",
    "soci-snapshotter-grpc",
)
# They carry the packets of rootless containers over ordinary sockets of the host.
_CARRIERS = ("passt", "passt.avx2", "pasta", "pasta.avx2", "rootlesskit", "rootlessport", "slirp4netns")

PROGRAM_SCOPES: Mapping[str, MarkedScope] = _by_comm(
    dict.fromkeys(_ENGINES, MarkedScope.ENGINE) | dict.fromkeys(_CARRIERS, MarkedScope.CONTAINER)
)
"""comm of the program that connects -> scope. It finds honest programs started from a shell, outside any engine's
cgroup; a renamed copy passes as the host. Where that matters, the policy's answer is host = "strict"."""


# --- which container -------------------------------------------------------------------------------------------------
MAX_TEXT = 256  # characters of a name, an image, an id: they are chosen by whoever made the container


@dataclass(frozen=True, slots=True)
class Container:
    """One container, as far as it is known; None means that nothing told it."""

    id: str
    runtime: str | None = None  # docker, podman, containerd, cri-o, buildkit, lxc
    name: str | None = None
    image: str | None = None
    pod: str | None = None  # Kubernetes: namespace/name, or the pod's uid where only the cgroup tells


_SCOPE_PREFIXES = {
    "docker": "docker",
    "crio": "cri-o",
    "cri-containerd": "containerd",
    "nerdctl": "containerd",
    "libpod": "podman",
}
_SCOPE = re.compile(rf"({'|'.join(_SCOPE_PREFIXES)})-({_CONTAINER_ID})(?:\.scope)?")
_PARENT_RUNTIMES = {"docker": "docker", "buildkit": "buildkit", "libpod_parent": "podman"}
_CONTAINERD_NAMESPACES = frozenset({"default", "k8s.io", "moby"})
_POD = re.compile(r"(?:kubelet-)?kubepods(?:-\w+)*?-pod([0-9a-f_]{32,36})\.slice|pod([0-9a-f-]{32,36})")


def container_of_cgroup(path: str) -> Container | None:
    """The container whose cgroup `path` is or lies below, of any hierarchy; the outermost, which the host's engine
    knows. None: no container's, or one whose id the path does not tell.
    """
    components = [component for component in path.split("/") if component]
    pod = None
    for depth, component in enumerate(components):
        parent = components[depth - 1] if depth else ""
        if found := _POD.fullmatch(component):
            pod = found[1].replace("_", "-") if found[1] else found[2]
        elif found := _SCOPE.fullmatch(component):
            return Container(found[2], _SCOPE_PREFIXES[found[1]], pod=pod)
        elif re.fullmatch(_CONTAINER_ID, component):
            of_containerd = depth == 1 and parent in _CONTAINERD_NAMESPACES
            return Container(component, "containerd" if of_containerd else _PARENT_RUNTIMES.get(parent), pod=pod)
        elif depth == 1 and parent in _CONTAINERD_NAMESPACES:
            return Container(component[:MAX_TEXT], "containerd")
        elif found := re.fullmatch(rf".+:cri-containerd:({_CONTAINER_ID})", component):
            return Container(found[1], "containerd", pod=pod)
        elif parent == "buildkit":
            return Container(component[:MAX_TEXT], "buildkit")
        elif component.startswith("lxc.payload."):
            return Container(component.removeprefix("lxc.payload.")[:MAX_TEXT], "lxc")
    return None


def container_of_process(cgroups: str) -> Container | None:
    """The same for the text of /proc/PID/cgroup: on a host with cgroup v1 the hierarchies differ, and one may tell."""
    for line in cgroups.splitlines():
        _, _, path = line.partition(":")[2].partition(":")
        if container := container_of_cgroup(path):
            return container
    return None


# --- what engines say of their containers ----------------------------------------------------------------------------
def docker_containers(text: str) -> dict[Container, tuple[Address, ...]]:
    """The reply of docker's GET /containers/json: each container with its addresses. ValueError if it is not one."""
    found = {}
    for entry in _items(json.loads(text)):
        identifier = _text(entry.get("Id"))
        if identifier is None:
            continue
        names = entry.get("Names")
        name = _text(names[0]) if isinstance(names, list) and names else None
        labels = _table(entry.get("Labels"))
        container = Container(
            identifier, "docker", name and name.removeprefix("/"), _text(entry.get("Image")), _pod(labels)
        )
        networks = _table(_table(entry.get("NetworkSettings")).get("Networks"))
        found[container] = tuple(
            address
            for network in networks.values()
            for key in ("IPAddress", "GlobalIPv6Address")
            if (address := _address(_table(network).get(key))) is not None
        )
    return found


def stored_containers(text: str) -> dict[str, Container]:
    """containers.json of containers/storage, which podman and CRI-O share, by id. ValueError if it is not one."""
    found = {}
    for entry in _items(json.loads(text)):
        identifier = _text(entry.get("id"))
        if identifier is None:
            continue
        try:
            metadata = _table(json.loads(str(entry.get("metadata") or "{}")))
        except ValueError:
            metadata = {}
        names = entry.get("names")
        name = _text(names[0]) if isinstance(names, list) and names else None
        found[identifier] = Container(
            identifier,
            "cri-o" if "pod-name" in metadata else "podman",
            _text(metadata.get("name")) or name,
            _text(metadata.get("image-name")),
        )
    return found


def bundled_container(text: str, container: Container) -> Container:
    """`container` with what the annotations of its OCI config.json add. ValueError if it is not one."""
    annotations = _table(_table(json.loads(text)).get("annotations"))

    def first(*keys: str) -> str | None:
        return next((value for key in keys if (value := _text(annotations.get(key)))), None)

    return replace(
        container,
        name=container.name
        or first("io.kubernetes.container.name", "io.kubernetes.cri.container-name", "nerdctl/name"),
        image=container.image or first("io.kubernetes.cri-o.ImageName", "io.kubernetes.cri.image-name"),
        pod=_pod(annotations) or container.pod,
    )


@dataclass(frozen=True, slots=True)
class Conmon:
    """What the command line of conmon, the monitor of each container of podman and CRI-O, says."""

    id: str
    name: str | None
    bundle: str  # directory of the OCI config.json, below the storage's own


def parse_conmon(cmdline: bytes) -> Conmon | None:
    """/proc/PID/cmdline; None for any other program."""
    words = [word.decode(errors="replace") for word in cmdline.split(b"\0")]
    if not words or words[0].rpartition("/")[2] != "conmon":
        return None
    options = {name: value for name, value in itertools.pairwise(words) if name in ("-c", "-n", "-b")}
    if not re.fullmatch(_CONTAINER_ID, options.get("-c", "")) or not options.get("-b", "").startswith("/"):
        return None
    return Conmon(options["-c"], _text(options.get("-n")), options["-b"])


def namespace_addresses(fib_trie: str, if_inet6: str) -> set[Address]:
    """The addresses of a network namespace, of /proc/PID/net/{fib_trie,if_inet6}; neither loopback nor link-local."""
    found: set[Address] = set()
    candidate = ""
    for line in fib_trie.splitlines():
        words = line.split()
        if words[:1] == ["|--"]:
            candidate = "".join(words[1:2])
        elif words == ["/32", "host", "LOCAL"] and (address := _address(candidate)) is not None:
            found.add(address)
    for line in if_inet6.splitlines():
        with contextlib.suppress(ValueError):
            found.add(IPv6Address(bytes.fromhex(line.split(" ", 1)[0])))
    return {address for address in found if not (address.is_loopback or address.is_link_local)}


def _pod(labels: Mapping[str, object]) -> str | None:
    for namespace, name in (
        ("io.kubernetes.pod.namespace", "io.kubernetes.pod.name"),
        ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri.sandbox-name"),
    ):
        if (pod := _text(labels.get(name))) is not None:
            return f"{_text(labels.get(namespace)) or 'default'}/{pod}"
    return None


def _items(document: object) -> Iterator[Mapping[str, object]]:
    if not isinstance(document, list):
        raise ValueError("not a list")
    for entry in document:
        if isinstance(entry, dict):
            yield entry


def _table(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value[:MAX_TEXT] if isinstance(value, str) and value else None


def _address(value: object) -> Address | None:
    try:
        return ip_address(str(value))
    except ValueError:
        return None
