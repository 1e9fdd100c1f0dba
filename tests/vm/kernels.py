"""The kernels that must hold, oldest first, and what is expected of each. Data only.

Where a kernel has less than the newest, `Expected` says what and why; a surprise in either direction is a failure, so
that this table stays true. x86-64 only, like the packages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from enforcer.ladder import Feature


@dataclass(frozen=True, slots=True)
class Debian:
    """A suite; Debian's keyring vouches for it. It drops what is superseded: then the newest of `series` will do."""

    suite: str
    series: re.Pattern[str]  # of releases (uname -r) that are as good


@dataclass(frozen=True, slots=True)
class Ubuntu:
    """A release pocket, which never changes any more: the SHA-256 is what is trusted."""

    pool: str  # directory below pool/main/l/


@dataclass(frozen=True, slots=True)
class Expected:
    """What this kernel does, and what it does not, each with the reason."""

    programs_missing: Mapping[str, str] = field(default_factory=dict)  # BPF program -> why it does not load
    nft_missing: Mapping[str, str] = field(default_factory=dict)  # nftables feature as doctor names it -> why not
    failing: Mapping[str, str] = field(default_factory=dict)  # pattern of test names (fnmatch) -> why they fail
    skipped: Mapping[str, str] = field(default_factory=dict)  # step -> why it is not tried
    memlock: bool = False  # BPF maps count as locked memory: before 5.11
    refused: str | None = None  # `run` ends with exit code 2 and one sentence: a pattern that is found in it


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel."""

    name: str
    origin: Debian | Ubuntu
    release: str  # uname -r
    version: str  # of the packages
    packages: Mapping[str, str]  # package without "-release" -> SHA-256
    parameters: tuple[str, ...] = ()  # on the kernel's command line
    expected: Expected = Expected()
    in_ci: bool = False


# What WSL 2's own kernels before 5.15.57.1 lack of netfilter, on a kernel that has it. Only the netdev and bridge
# families differ from the real thing.
_BARE_WSL = (
    "module_blacklist=nft_ct,nft_counter,nft_log,nft_limit,nft_masq,nft_redir,nft_nat,nft_objref,nft_reject,"
    "nft_reject_inet,nft_reject_ipv4,nft_reject_ipv6,nft_chain_nat,nft_socket,nft_tproxy,nft_quota,nft_queue,nft_fib,"
    "nft_fib_inet,nft_fib_ipv4,nft_fib_ipv6,nft_numgen,nft_compat,nf_flow_table,nf_flow_table_inet,ifb,cls_flower"
)

_SINCE_5_8 = "bpf_get_netns_cookie and ring buffers came later (5.7, 5.8)"
_HOOKS_MISSING = dict.fromkeys(("connect4", "connect6", "sendmsg4", "sendmsg6", "sock_create"), _SINCE_5_8)
_NO_MARK_IN_TEST_RUN = "BPF_PROG_TEST_RUN takes and gives no mark yet"
_SETSOCKOPT_MISSING = {"setsockopt": "bpf_get_current_ancestor_cgroup_id is not for programs on setsockopt"}
_SENDMSG_MISSING = {
    **dict.fromkeys(("sendmsg4", "sendmsg6"), "bpf_setsockopt is for connect hooks only"),
    **_SETSOCKOPT_MISSING,
}
# By expected failures of tests.
_NO_PIDNS = {
    "kernel/test_connect.py::test_process_outside_*": "bpf_get_ns_current_pid_tgid is for these hooks since 6.10"
}
_NO_SENDMSG = {
    "kernel/test_connect.py::test_sockets_of_other_network_*": "no cookie tells network namespaces (5.14)",
    "kernel/test_connect.py::test_udp_gets_its_scope_*-sendto]": "an unconnected UDP socket keeps its own mark",
    **_NO_PIDNS,
}
_LOCAL_UNKNOWN = "without connect hooks local sockets have no scope, and are not vouched for"

# Where BPF tells scopes, nftables need not.
_ALL_BUT_SOCKET = tuple(feature.name.lower() for feature in Feature if feature is not Feature.SOCKET)

KERNELS = (
    Kernel(
        name="4.15",
        origin=Ubuntu("linux"),
        release="4.15.0-20-generic",
        version="4.15.0-20.21",
        packages={
            "linux-image-unsigned": "377279cf295f84104208449a8a83246cb4af607dc58a77d21092c3cfbf500128",
            "linux-modules": "c829da8d8fc3f4941ee7f2972b5c932bf728279c49cad0836a48238cb2875217",
        },
        expected=Expected(
            skipped=dict.fromkeys(("libbpf", "vectors", "lab"), "too old"),
            refused=r"this is Linux 4\.15.*, and 5\.4 is the oldest",
        ),
    ),
    Kernel(
        name="5.4-kvm",
        origin=Ubuntu("linux-kvm"),
        release="5.4.0-1009-kvm",
        version="5.4.0-1009.9",
        packages={
            "linux-image": "f667c524877e0316d1d5b8185e63c346d209e25a53aa85868ad4d0999c58f0c2",
            "linux-modules": "ca82632bd0b071c9a6562853b56b778f46811de7c86e66d3637152b760b07fa4",
        },
        expected=Expected(
            nft_missing=dict.fromkeys(_ALL_BUT_SOCKET, "it has no nf_tables"),
            skipped=dict.fromkeys(("libbpf", "vectors", "lab"), "it has no nf_tables"),
            refused="this kernel has no nf_tables .*modprobe nf_tables",
        ),
    ),
    Kernel(
        name="5.4",
        origin=Ubuntu("linux"),
        release="5.4.0-26-generic",
        version="5.4.0-26.30",
        packages={
            "linux-image-unsigned": "ce10287973c2ec9925a11c6cc5f86e9faa28591962f34e94a8c586f8df01e821",
            "linux-modules": "82cf8aa4ab5d8b4bb78f452c7069ffc7429fe1d0e2eef13f4b35ebe0b848b1a4",
        },
        expected=Expected(
            memlock=True,
            programs_missing=_HOOKS_MISSING,
            failing={
                "kernel/test_connect.py::*": "skipped: no connect hook",
                "kernel/test_noted_connects.py::*": "skipped: no connect hook",
                "kernel/test_gate.py::*": _NO_MARK_IN_TEST_RUN,
                "kernel/test_learn.py::test_nothing_is_learned_or_cleared_*": _NO_MARK_IN_TEST_RUN,
                "kernel/test_learn.py::test_marks_from_outside_*": _NO_MARK_IN_TEST_RUN,
            },
        ),
        in_ci=True,
    ),
    Kernel(
        name="5.10",
        origin=Debian("bullseye", re.compile(r"5\.10\.0-[0-9]+-cloud-amd64")),
        release="5.10.0-32-cloud-amd64",
        version="5.10.223-1",
        packages={"linux-image": "fb4a1229952d892138532c1d9f40a7fd0bd408e4dcf969c12e4524b6a89fdcb8"},
        expected=Expected(memlock=True, programs_missing=_SENDMSG_MISSING, failing=_NO_SENDMSG),
    ),
    Kernel(
        name="5.10-wsl",
        origin=Debian("bullseye", re.compile(r"5\.10\.0-[0-9]+-cloud-amd64")),
        release="5.10.0-32-cloud-amd64",
        version="5.10.223-1",
        packages={"linux-image": "fb4a1229952d892138532c1d9f40a7fd0bd408e4dcf969c12e4524b6a89fdcb8"},
        parameters=(_BARE_WSL,),
        expected=Expected(
            memlock=True,
            programs_missing=_SENDMSG_MISSING,
            failing={
                **_NO_SENDMSG,
                "lab/test_end_to_end.py::test_udp_is_refused_*": "without reject it is dropped",
                "lab/test_end_to_end.py::test_revoking_a_registry_*": "without reject it ends in silence",
            },
            nft_missing=dict.fromkeys(
                ("audit", "counter", "ct", "limit", "log", "redirect", "reject"), "none of WSL 2's before 5.15.57.1"
            ),
        ),
    ),
    Kernel(
        name="5.15",
        origin=Ubuntu("linux"),
        release="5.15.0-25-generic",
        version="5.15.0-25.25",
        packages={
            "linux-image-unsigned": "ac69df20790c48217eb1386ef81fd10d3f20a4ede4dab81cc107c65d29549fa0",
            "linux-modules": "d0ba4087d9e1d497925b3481d3531fba6c2a852855f8019d73b0b1385aa4da1f",
        },
        expected=Expected(programs_missing=_SETSOCKOPT_MISSING, failing=_NO_PIDNS),
    ),
    Kernel(
        name="6.1",
        origin=Debian("bookworm", re.compile(r"6\.1\.0-[0-9]+-cloud-amd64")),
        release="6.1.0-50-cloud-amd64",
        version="6.1.176-1",
        packages={"linux-image": "efe19f605b6f54a8352e68d85a629abb2d30b72a085faef603a9152590baa791"},
        expected=Expected(failing=_NO_PIDNS),
    ),
    Kernel(
        name="6.8",
        origin=Ubuntu("linux"),
        release="6.8.0-31-generic",
        version="6.8.0-31.31",
        packages={
            "linux-image-unsigned": "35115ceb5ddc1e73034a73d6b064b9c6d38c534f20279fd7229c510515b931d8",
            "linux-modules": "3f17f2c279257eb50e40da44390bdf8272c440ca078831c348773d1314b5c2fe",
        },
        expected=Expected(failing=_NO_PIDNS),
    ),
    Kernel(
        name="6.12",
        origin=Debian("trixie", re.compile(r"6\.12\.[0-9.]+\+deb13[0-9.]*-cloud-amd64")),
        release="6.12.117+deb13-cloud-amd64",
        version="6.12.117-1",
        packages={"linux-image": "e9893e5295d0549b8852611f12a4b8b5f6cc4b8128dcc2086b9847793b904ab7"},
    ),
    Kernel(
        name="7.3",
        origin=Debian("trixie-backports", re.compile(r"[0-9.]+\+deb13[0-9.]*-cloud-amd64")),
        release="7.3.4+deb13-cloud-amd64",
        version="7.3.4-1~bpo13+1",
        packages={
            "linux-binary": "c4fbc8e404958693b28825474c20742d70594d65ca58aea7be6a279c81eb6fa0",
            "linux-modules": "359f04c363b7d3c5f9ce999ccb7351e00cc8eec0a30d6bc1cda37734987fc43d",
        },
        in_ci=True,
    ),
)
