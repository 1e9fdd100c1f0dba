"""The daemon among users who would keep it from starting, change what it enforces, or have it run what is theirs.

A real daemon, in network and mount namespaces of its own, with a cgroup that nobody else is in.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import enforcer
from enforcer import procfs
from tests.lab.enforcer import COMMAND

pytestmark = pytest.mark.root

OTHER = 65_533
DEADLINE_SECONDS = 30
PORT = 9742
POLICY = """\
[resolvers]
trusted = ["192.0.2.53"]
[[registry]]
name = "{name}"
addresses = ["192.0.2.1"]
"""
# Of another user: holds the port of the metrics until its input ends.
HOLDER = f"""
import os, socket, sys
os.setgid({OTHER}); os.setuid({OTHER})
taken = socket.socket()
taken.bind(("127.0.0.1", {PORT}))
taken.listen()
print("held", flush=True)
sys.stdin.read()
"""
# What somebody might look up by name instead of by path.
START = "from enforcer import cli; sys.exit(cli.main())"
NO_FUZZ = shutil.ignore_patterns("fuzz", "vm", "*.log")
PROGRAMS = ("nft", "modprobe", "mount", "ip", "tc", "bpftool", "cc", "gcc", "clang", "ld", "ldconfig", "uname",
            "sh", "python3", "which", "openssl", "hostname", "docker")  # fmt: skip
MODULES = ("json", "ctypes", "nftables", "pyroute2", "dns", "cryptography", "sitecustomize", "usercustomize")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    root = procfs.cgroup_root()
    assert root is not None
    path = root / f"re-itself-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


class Daemon:
    """One that is started in new namespaces, which end with it."""

    def __init__(self, directory: Path, cgroup: Path) -> None:
        self.directory = directory
        self.policy = directory / "policy.toml"
        self._run = [
            *("run", "--policy", str(self.policy), "--run-dir", str(directory / "run")),
            *("--state-dir", str(directory / "state"), "--bpffs", str(directory / "bpf"), "--cgroup", str(cgroup)),
        ]
        self._log = directory / "log"
        self.write("first")

    def write(self, name: str) -> None:
        self.policy.write_text(POLICY.format(name=name))
        self.policy.chmod(0o644)

    @property
    def log(self) -> str:
        return self._log.read_text()

    @contextlib.contextmanager
    def running(
        self,
        holder: str = "",
        *,
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
        program: Sequence[str] = (COMMAND,),
        closed: bool = False,
    ) -> Iterator[int]:
        """Its process id, once it is ready; the holder's input stays open until `let_go`."""
        waiting = f"exec 3<&0; {sys.executable} -c '{holder}' <&3 & sleep 1; " if holder else ""
        streams = "<&- >&-" if closed else "</dev/null"
        script = f'ip link set lo up; {waiting}exec "$@" {streams}'
        cleanly = ["env", *(f"{name}={value}" for name, value in (environment or {}).items()), sys.executable]
        with self._log.open("wb") as log:
            daemon = subprocess.Popen(
                ["unshare", "--net", "--mount", "sh", "-c", script, "sh", *cleanly, *program, *self._run],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
            )
        self._process = daemon
        try:
            until(lambda: self._ready() or daemon.poll() is not None, "ready")
            assert daemon.poll() is None, self.log
            yield daemon.pid
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(DEADLINE_SECONDS) == 0, self.log
        finally:
            daemon.kill()
            daemon.wait()
            self.let_go()

    def _ready(self) -> bool:
        return "\nready " in f"\n{self.log}" or (self.directory / "run" / "control.sock").exists()

    def let_go(self) -> None:
        """End the holder."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def refused(self) -> tuple[int, list[str], str]:
        """Exit code, errors and nftables' tables of a start that is to fail."""
        script = 'ip link set lo up; "$@"; code=$?; nft list tables; exit $code'
        done = subprocess.run(
            ["unshare", "--net", "--mount", "sh", "-c", script, "sh", COMMAND, *self._run],
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
        return done.returncode, done.stderr.splitlines(), done.stdout

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [COMMAND, *arguments, "--run-dir", str(self.directory / "run")],
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )

    def status(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.command("status", "--json").stdout)
        return facts

    def scraped(self, pid: int) -> bool:
        """Whether metrics are served where the daemon is."""
        asking = ["nsenter", "-t", str(pid), "-n", "curl", "-sS", "-m", "1", f"http://127.0.0.1:{PORT}/metrics"]
        done = subprocess.run(asking, capture_output=True, text=True, check=False)
        return "enforcer_enforcing 1.0" in done.stdout


@pytest.fixture
def daemon(tmp_path: Path, cgroup: Path) -> Daemon:
    return Daemon(tmp_path, cgroup)


def test_another_users_hold_on_the_metrics_port_keeps_no_enforcement_away(daemon: Daemon) -> None:
    with daemon.running(HOLDER) as pid:
        listed = ["nsenter", "-t", str(pid), "-n", "nft", "list", "tables"]
        assert "registry_enforcer" in subprocess.check_output(listed, text=True)
        problem = f"another program holds 127.0.0.1:{PORT}"
        assert f"ERROR {problem}: metrics are not served until it lets go" in daemon.log
        assert f"no metrics: {problem}" in daemon.log
        assert daemon.status()["metrics"] == {"address": f"127.0.0.1:{PORT}", "problem": problem}
        assert f"metrics are not served: {problem}" in daemon.command("status").stdout
        assert not daemon.scraped(pid)
        daemon.let_go()
        until(lambda: daemon.scraped(pid), "metrics")
        assert daemon.status()["metrics"]["problem"] is None
        sockets = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
        listening = {fields[1] for fields in sockets if fields[3] == "0A" and int(fields[1][9:], 16) == PORT}
        assert listening == {f"0100007F:{PORT:04X}"}  # 127.0.0.1 alone


def test_start_looks_nothing_up_by_path_nor_where_it_is_started(daemon: Daemon, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    (hostile / "enforcer").mkdir(parents=True)
    marker = tmp_path / "marker"
    for program in PROGRAMS:
        (hostile / program).write_text(f"#!/bin/dash\necho {program} >>{marker}\n")
        (hostile / program).chmod(0o755)
    trap = f"open({str(marker)!r}, 'a').write(__name__)\n"
    for module in (*MODULES, "enforcer/__init__"):
        (hostile / f"{module}.py").write_text(trap)
    environment = {
        "PATH": str(hostile),
        "TMPDIR": str(hostile),
        "BCC_KERNEL_SOURCE": str(hostile),
        "LIBBPF_LOG_LEVEL": "debug",
        "POLICY": "/nowhere",
    }
    with daemon.running(environment=environment, cwd=hostile):
        assert daemon.status()["state"] == "enforcing"
    assert not marker.exists(), marker.read_text()
    # The traps do catch whoever walks into them.
    subprocess.run([sys.executable, "-c", "import json"], cwd=hostile, check=False)
    subprocess.run(["nft"], env=environment, check=False, cwd="/")
    assert marker.read_text().split() == ["jsonnft"]


def test_closed_standard_streams_are_nobody_elses(daemon: Daemon) -> None:
    with daemon.running(closed=True) as pid:
        for descriptor in 0, 1:
            assert Path(f"/proc/{pid}/fd/{descriptor}").readlink() == Path("/dev/null")
        os.kill(pid, signal.SIGHUP)  # an audit line
        until(lambda: "is in force" in daemon.log, "a reload")
        assert (daemon.directory / "run" / "lock").read_text() == f"{pid}\n"
        assert daemon.status()["state"] == "enforcing"


def test_a_program_that_others_may_change_says_so(daemon: Daemon, tmp_path: Path) -> None:
    copy = tmp_path / "checkout" / "enforcer"
    shutil.copytree(Path(enforcer.__file__).parent, copy)
    shutil.copytree(Path(enforcer.__file__).parent.parent / "build", copy.parent / "build", ignore=NO_FUZZ)
    os.chown(copy, OTHER, -1)
    with daemon.running(program=("-c", f"import sys; sys.path.insert(0, {str(copy.parent)!r}); {START}")):
        warning = f"WARNING whoever may change this program enforces: {copy} belongs to user {OTHER}"
        assert warning in daemon.log
    with daemon.running():
        assert "whoever may change" not in daemon.log


@pytest.mark.parametrize("who", ["mode", "owner", "directory"])
def test_reload_of_a_policy_that_others_may_write_leaves_the_old_one_whole(daemon: Daemon, who: str) -> None:
    with daemon.running() as pid:
        before = daemon.status()["policy"]["digest"]
        daemon.write("second")
        if who == "mode":
            daemon.policy.chmod(0o666)
        elif who == "owner":
            os.chown(daemon.policy, OTHER, -1)
        else:
            daemon.directory.chmod(0o777)
        os.kill(pid, signal.SIGHUP)
        until(lambda: "the policy in force stays" in daemon.log, "refusal")
        refusal = next(line for line in daemon.log.splitlines() if "the policy in force stays" in line)
        assert re.match(rf"ERROR {daemon.policy}:1: .* (written|replaced|belongs) .*; ch(own|mod) ", refusal)
        daemon.directory.chmod(0o700)
        assert daemon.status()["policy"]["digest"] == before
        os.chown(daemon.policy, 0, -1)
        daemon.policy.chmod(0o644)
        os.kill(pid, signal.SIGHUP)
        until(lambda: daemon.status()["policy"]["digest"] != before, "the new policy")


@pytest.mark.parametrize("place", ["policy.toml", "run", "ca.key"])
def test_start_is_refused_in_one_sentence_where_others_may_write(daemon: Daemon, place: str) -> None:
    path = daemon.directory / place
    if place == "ca.key":
        made = daemon.command("ca", "init", "--directory", str(daemon.directory), "--policy", str(daemon.policy))
        path = daemon.directory / "refusal-ca.key"
        daemon.policy.write_text(daemon.policy.read_text() + made.stdout[made.stdout.index("[refusal]") :])
    elif place != "policy.toml":
        path.mkdir()
    os.chown(path, OTHER, -1)
    code, errors, tables = daemon.refused()
    assert (code, tables) == (2, ""), errors
    assert re.search(rf"{path} belongs to user {OTHER} and not to root; chown root {path}", errors[-1])
    assert not any("Traceback" in line for line in errors)
