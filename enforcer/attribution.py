"""Whose a socket is: cgroup paths and program names of container engines and of containers.

Names alone are a convenience, not a boundary: whoever is root on the host can call anything anything. What holds
without names is the network namespace and forwarding; these tables tell engines and containers that share the host's
network from the rest of the host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from enforcer.kernel_abi import COMM_BYTES, MarkedScope

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
