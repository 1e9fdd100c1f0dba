"""Hosts and rights that enforcement cannot do without: one sentence, exit code 2, and nothing half-applied."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from enforcer import procfs
from tests.lab.enforcer import COMMAND

POLICY = "[scope]\n"


@pytest.mark.parametrize(
    ("release", "machine", "why"),
    [
        ("4.15.0-20-generic", "x86_64", "this is Linux 4.15.0-20-generic, and 5.4 is the oldest"),
        ("5.3.18-default", "x86_64", "5.4 is the oldest"),
        ("6.1.0", "s390x", "this is a s390x, and enforcement runs on aarch64, riscv64, x86_64"),
    ],
)
def test_old_kernel_and_other_machine_are_named(release: str, machine: str, why: str) -> None:
    assert why in (procfs.unsupported(release, machine) or "")


@pytest.mark.parametrize("release", ["5.4.0-26-generic", "5.10.16.3-microsoft-standard-WSL2", "10.0.0"])
def test_kernel_that_is_new_enough_is_asked_what_it_has(release: str) -> None:
    assert procfs.unsupported(release, "x86_64") is None


def started(tmp_path: Path, rights: str, *patches: str) -> tuple[int, list[str], str]:
    """`run` in a network namespace of its own with these rights: exit code, its errors, and the tables it left."""
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    places = ["--run-dir", tmp_path / "run", "--state-dir", tmp_path / "state", "--bpffs", tmp_path / "bpf"]
    program = [COMMAND]
    if patches:
        program = [sys.executable, "-c", "\n".join(["import sys", *patches, "sys.exit(cli.main())"])]
    run = [*program, "run", "--policy", policy, *places, "--cgroup", "/sys/fs/cgroup", "--metrics", "127.0.0.1:0"]
    limited = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *run]
    script = 'ip link set lo up; "$@"; code=$?; nft list tables; exit $code'
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", script, "sh", *map(str, limited)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr.splitlines(), done.stdout


@pytest.mark.root
@pytest.mark.parametrize(
    ("rights", "patches", "sentence"),
    [
        ("-net_admin", (), r"nf_tables may not be changed \(.*\); run as root, or with CAP_NET_ADMIN"),
        (
            "-all,+net_admin",
            (),
            r"neither BPF nor a packet socket can read DNS answers: no packet socket: .*; run .*CAP_NET_RAW",
        ),
        ("-sys_admin", (), r"is not on a bpffs, and mounting one at .* failed .*; as root run: mount -t bpf bpf"),
        (
            "+sys_admin",
            ("from enforcer import cli, nft", "nft.Nft.probe = lambda self: frozenset()"),
            r"this kernel has no nf_tables \(CONFIG_NF_TABLES.*modprobe nf_tables",
        ),
        (
            "+sys_admin",
            ("from enforcer import cli, procfs", "procfs.unsupported = lambda: 'this is Linux 4.15'"),
            r"this is Linux 4.15; boot another kernel",
        ),
    ],
    ids=["no right to change nf_tables", "no right to hear DNS", "no right to mount", "no nf_tables", "old kernel"],
)
def test_host_that_cannot_enforce_is_told_in_one_sentence(
    tmp_path: Path, rights: str, patches: tuple[str, ...], sentence: str
) -> None:
    code, errors, tables = started(tmp_path, rights, *patches)
    assert code == 2, errors
    assert re.search(sentence, errors[-1]), errors
    assert not any(line.startswith("Traceback") for line in errors)
    assert tables == ""
