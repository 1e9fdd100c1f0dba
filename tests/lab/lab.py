"""Namespaces, cgroups and processes of one lab; what lives in them is in internet, clients and enforcer.

    namespace "net"   the internet: DNS and registries on addresses of its lo, behind one uplink
    namespace "host"  the enforced host: default routes over the uplink, a bridge for "ct", docker's own bridge
    namespace "ct"    a container without an engine: behind the bridge, routed, not translated
    namespace "two"   a second host, with an uplink of its own

Everything of a lab carries its name (re-XXXX) and can be found by it: `destroy` needs nothing else, and so also clears
what a crashed run has left. The processes are members of the lab's cgroup and end with it. A lab that is alive holds a
lock on its directory, so two labs never touch each other.

With LAB_HOST=initial the enforced host is the initial network namespace, as it is outside of labs: before Linux 5.14
only its sockets can be told from others. What the lab puts there stays, so this is for guests that end with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

# 198.18.0.0/15 and 2001:2::/48 are for benchmarks (RFC 2544, RFC 5180): nobody's, and no host's own.
RESOLVER = "198.18.0.53"
RESOLVER6 = "2001:2::53"
AUTHORITY = "198.18.0.2"

_UPLINK = {"host": ("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"),
           "two": ("192.0.2.5", "192.0.2.6", "2001:db8:2::1", "2001:db8:2::2")}  # fmt: skip
HOST_ADDRESS = _UPLINK["host"][1]
CT_ADDRESS = "10.77.0.2"
DOCKER_BRIDGE = "10.78.0.1/24"
DOCKER_NET6 = "fd00:78::/64"

# What the lab runs, beside what every Debian has.
_TOOLS = (
    "buildah", "busybox", "ctr", "curl", "dnsmasq", "docker", "docker-registry", "dockerd", "ip", "knotd", "newuidmap",
    "nft", "openssl", "pasta", "podman", "promtool", "rootlesskit", "skopeo", "slirp4netns", "tinyproxy", "unbound",
)  # fmt: skip

_PREFIX = "re-lab-"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"  # the distribution's clients, not another docker that may come first
_DEADLINE = 30.0 * float(os.environ.get("LAB_PATIENCE", "1"))  # more where the processor is emulated, and shared


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client met: reached, refused, timed out or error; how long it took; what it said."""

    verdict: str
    seconds: float
    message: str

    @property
    def reached(self) -> bool:
        """Whether the client got what it asked for."""
        return self.verdict == "reached"

    @property
    def refused(self) -> bool:
        """Whether it was told no, at once and in words of its own protocol."""
        return self.verdict == "refused"


def poll(what: str, condition: Callable[[], object], deadline_seconds: float = _DEADLINE) -> None:
    """Wait until `condition()` is true; TimeoutError that names `what` otherwise."""
    deadline = time.monotonic() + deadline_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {deadline_seconds:.0f} s")
        time.sleep(0.02)


def missing_tools() -> list[str]:
    """What the lab needs and this machine lacks."""
    return [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]


def _in_guest() -> bool:
    """Whether the enforced host is the initial network namespace."""
    return os.environ.get("LAB_HOST") == "initial"


class Agent:
    """A process inside a namespace that does single operations on request: see agent.py."""

    def __init__(self, process: subprocess.Popen[bytes], errors: Path) -> None:
        self._process = process
        self._errors = errors
        self._receive(_DEADLINE)

    def _receive(self, timeout: float) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"agent: no reply within {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the agent has ended:\n{self._errors.read_text()}")
        return json.loads(line)

    def call(self, operation: str, *, reply_within: float = _DEADLINE, **arguments: Any) -> Any:
        """One operation of agent.py; OSError if it failed with one there."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"operation": operation, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        reply = self._receive(reply_within)
        if "error" in reply:
            raise OSError(reply["error"])
        return reply["value"]

    def connect(self, name: str, port: int = 443, family: int = 0, timeout: float = 5) -> Outcome:
        """Resolve and connect once."""
        return outcome_of(self.call("connect", name=name, port=port, family=family, timeout=timeout))

    def attempt(self, address: str, port: int = 443, timeout: float = 5, mark: int = 0) -> Outcome:
        """Connect once, without a DNS question."""
        return outcome_of(self.call("attempt", address=address, port=port, timeout=timeout, mark=mark))

    def talk(self, key: str) -> Outcome:
        """Speak over a connection that `hold` opened."""
        return outcome_of(self.call("talk", key=key))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def outcome_of(reply: dict[str, Any]) -> Outcome:
    """An agent's reply as an Outcome."""
    return Outcome(reply["verdict"], reply["seconds"], reply["message"] or reply["address"])


class Lab:
    """One lab; a context manager. Nothing in it is running yet but namespaces and agents."""

    def __init__(self) -> None:
        self.name = _PREFIX + secrets.token_hex(2)
        self.directory = _root() / self.name
        self.cgroup = cgroup_root() / self.name
        self.bpffs = self.directory / "bpf"
        self._agents: list[Agent] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._holder = 0
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        remove_leftovers()
        with _nobody_else_comes_or_goes():
            self.directory.mkdir(mode=0o700)
            self._lock = (self.directory / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove every trace."""
        for agent in self._agents:
            agent.close()
        _kill_cgroup(self.cgroup)
        for process in self._processes:
            process.wait()
        destroy(self.name)
        if self._lock is not None:
            self._lock.close()

    def _build(self) -> None:
        for leaf in ("net", "host/leaf", "two/leaf"):
            (self.cgroup / leaf).mkdir(parents=True)
        for part in ("logs", "bpf", "home", "state", "run"):
            (self.directory / part).mkdir()
        command("mount", "-t", "bpf", "bpf", str(self.bpffs))
        for namespace in ("net", "host", "ct", "two"):
            if namespace == "host" and _in_guest():
                command("ip", "netns", "attach", self.namespace(namespace), "1")
            else:
                command("ip", "netns", "add", self.namespace(namespace))
        self._wire()
        self._holder = self._hold_mounts()
        self.net = self.agent("net")
        self.host = self.agent("host")
        # In guests by its cgroup as well: before 5.7 the kernel tells no program names.
        self.engine = self.agent("host", comm="skopeo", leaf="podman.service" if _in_guest() else "leaf")
        self.ct = self.agent("ct")

    def namespace(self, short: str) -> str:
        """Full name of a network namespace."""
        return f"{self.name}-{short}"

    def host_cgroup(self, host: str = "host") -> Path:
        """What --cgroup gets: every process of that host is below."""
        return self.cgroup / host

    def _wire(self) -> None:
        forward = "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"
        for namespace in ("net", "host", "ct", "two"):
            settings = "".join(f"echo 1 > {path};" for path in forward)
            # Duplicate address detection would make every new IPv6 address wait for a second.
            settings += "for f in all default; do echo 0 > /proc/sys/net/ipv6/conf/$f/accept_dad; done;"
            settings += "for f in all default; do echo 0 > /proc/sys/net/ipv4/conf/$f/rp_filter; done"
            command("nsenter", f"--net={self._netns(namespace)}", "sh", "-c", settings)
            self.ip(namespace, "link set lo up")
        for host, (near, far, near6, far6) in _UPLINK.items():
            self.ip("net", f"link add to-{host} type veth peer name up0 netns {self.namespace(host)}")
            self.ip("net", f"addr add {near}/30 dev to-{host}", f"addr add {near6}/64 dev to-{host} nodad",
                     f"link set to-{host} up")  # fmt: skip
            self.ip(host, f"addr add {far}/30 dev up0", f"addr add {far6}/64 dev up0 nodad", "link set up0 up",
                     f"route add default via {near}", f"route add default via {near6}")  # fmt: skip
        self.ip("net", f"addr add {RESOLVER}/32 dev lo", f"addr add {RESOLVER6}/128 dev lo nodad",
                 f"addr add {AUTHORITY}/32 dev lo",
                 "route add local 198.18.0.0/15 dev lo", "route add local 2001:2::/48 dev lo",
                 f"route add 10.77.0.0/24 via {HOST_ADDRESS}", "route add fd00:77::/64 via 2001:db8::2",
                 f"route add {DOCKER_NET6} via 2001:db8::2")  # fmt: skip
        self.ip("host", "link add br-ct type bridge", "addr add 10.77.0.1/24 dev br-ct",
                 "addr add fd00:77::1/64 dev br-ct nodad", "link set br-ct up",
                 f"link add ct-port type veth peer name eth0 netns {self.namespace('ct')}",
                 "link set ct-port master br-ct", "link set ct-port up")  # fmt: skip
        self.ip("ct", f"addr add {CT_ADDRESS}/24 dev eth0", "addr add fd00:77::2/64 dev eth0 nodad",
                 "link set eth0 up", "route add default via 10.77.0.1", "route add default via fd00:77::1")  # fmt: skip

    def _netns(self, short: str) -> str:
        return f"/run/netns/{self.namespace(short)}"

    def ip(self, short: str, *lines: str) -> None:
        """Lines of ip(8) in a namespace."""
        command("ip", "-n", self.namespace(short), "-batch", "-", text="\n".join(lines) + "\n")

    def _hold_mounts(self) -> int:
        """A mount namespace of its own for the hosts: private /etc and /run, and /sys of the "host" namespace."""
        # The initial namespace's sysfs is there already, and is not mounted a second time.
        own_sysfs = (
            ""
            if _in_guest()
            else f"""
            mkdir -p {self.directory}/cgroups
            mount --rbind /sys/fs/cgroup {self.directory}/cgroups
            mount -t sysfs sysfs /sys
            mount --rbind {self.directory}/cgroups /sys/fs/cgroup
            umount -l {self.directory}/cgroups"""
        )
        script = f"""set -e{own_sysfs}
            mount -t tmpfs tmpfs /run
            mkdir /run/lock /run/etc-upper /run/etc-work
            mount -t overlay -o lowerdir=/etc,upperdir=/run/etc-upper,workdir=/run/etc-work overlay /etc
            mkdir -p /etc/ssl/certs
            rm -f /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt
            printf 'nameserver {RESOLVER}\\noptions timeout:2 attempts:2\\n' > /etc/resolv.conf
            printf '127.0.0.1 localhost\\n::1 localhost\\n' > /etc/hosts
            echo ready > {self.directory}/holder
            exec sleep infinity"""
        holder = self.spawn("host", ["unshare", "--mount", "sh", "-c", script], "holder", mounts=False)
        poll("private mounts", lambda: (self.directory / "holder").exists() or holder.poll() is not None)
        if holder.poll() is not None:
            raise RuntimeError(f"private mounts: {self.log('holder')}")
        return holder.pid

    # --- processes ---
    def wrap(self, where: str, argv: Sequence[str], *, mounts: bool = True, leaf: str = "leaf") -> list[str]:
        """`argv` inside a namespace and its cgroup. Mounts: those of the hosts, for every namespace but "net"."""
        cgroup = self.cgroup / {"net": "net", "two": "two/leaf"}.get(where, f"host/{leaf}")
        cgroup.mkdir(parents=True, exist_ok=True)
        enter = ["nsenter", f"--net={self._netns(where)}"]
        if mounts and where != "net":
            enter.append(f"--mount=/proc/{self._holder}/ns/mnt")
        join = f'echo $$ > {cgroup}/cgroup.procs && exec "$@"'
        return ["sh", "-c", join, "sh", *enter, "--", *argv]

    @property
    def environment(self) -> dict[str, str]:
        """A clean one: nothing of this machine's proxies, certificates or docker contexts."""
        home = str(self.directory / "home")
        patience = os.environ.get("LAB_PATIENCE", "1")
        return {"PATH": _PATH, "HOME": home, "LANG": "C.UTF-8", "DOCKER_CONFIG": home + "/docker",
                "LAB_PATIENCE": patience}  # fmt: skip

    def spawn(self, where: str, argv: Sequence[str], log: str, *, mounts: bool = True) -> subprocess.Popen[bytes]:
        """Start a process that lives until the lab ends; its output goes to `log`."""
        with (self.directory / "logs" / log).open("ab") as output:
            process = subprocess.Popen(
                self.wrap(where, argv, mounts=mounts),
                env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def run(
        self, where: str, argv: Sequence[str], *, timeout: float = 2 * _DEADLINE, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, stdout and stderr as one text; exit code 124 if it had to be ended."""
        started = subprocess.Popen(
            self.wrap(where, argv), env=self.environment, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with started:
            try:
                output, _ = started.communicate(text, timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                output, _ = started.communicate()
                return subprocess.CompletedProcess(list(argv), 124, output, "")
        return subprocess.CompletedProcess(list(argv), started.returncode, output, "")

    def agent(
        self,
        where: str,
        *,
        comm: str = "",
        inside: Sequence[str] = (),
        leaf: str = "leaf",
        script: str = "agent.py",
        **environment: str,
    ) -> Agent:
        """A new agent in a namespace, started by the command `inside`; the kernel takes it for the program `comm`."""
        log = self.directory / "logs" / f"agent-{where}-{len(self._agents)}"
        with log.open("wb") as errors:
            serve = [sys.executable, "-I", str(Path(__file__).with_name(script)), comm]
            process = subprocess.Popen(
                self.wrap(where, [*inside, *serve], leaf=leaf),
                env=self.environment | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        agent = Agent(process, log)
        self._agents.append(agent)
        return agent

    def log(self, name: str) -> str:
        """What a spawned process has written so far."""
        return (self.directory / "logs" / name).read_text(errors="replace")

    def set_resolvers(self, *addresses: str) -> None:
        """Rewrite the hosts' resolv.conf."""
        text = "".join(f"nameserver {address}\n" for address in addresses)
        written = self.run("host", ["tee", "/etc/resolv.conf"], text=text + "options timeout:2 attempts:2\n")
        assert written.returncode == 0, written.stdout


# --- removal, by name alone ------------------------------------------------------------------------------------------
def destroy(name: str) -> None:
    """Remove all of a lab: processes, namespaces, mounts, pins, cgroups, files. Idempotent."""
    directory = _root() / name
    _kill_cgroup(cgroup_root() / name)
    for namespace in sorted(Path("/run/netns").glob(f"{name}-*")):
        command("ip", "netns", "del", namespace.name)
    for pin in sorted((directory / "bpf").rglob("*"), reverse=True):
        if pin.is_dir():
            pin.rmdir()
        elif pin.suffix != ".debug":  # the file system's own
            pin.unlink()
    for mount in reversed(_mounts_below(directory)):
        command("umount", "-l", mount)
    for hierarchy in {cgroup_root(), *Path("/sys/fs/cgroup").glob("*/")}:
        _remove_cgroup(hierarchy / name)
    shutil.rmtree(directory, ignore_errors=True)


def remove_leftovers() -> None:
    """Destroy labs whose process has gone: nobody holds the lock on their directory."""
    with _nobody_else_comes_or_goes():
        for directory in _root().glob(f"{_PREFIX}*"):
            with contextlib.suppress(BlockingIOError), (directory / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                destroy(directory.name)


@contextlib.contextmanager
def _nobody_else_comes_or_goes() -> Iterator[None]:
    """No lab may be taken for a leftover between its directory and its lock."""
    with (_root() / "re-labs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _root() -> Path:
    return Path(tempfile.gettempdir()).resolve()


def cgroup_root() -> Path:
    """Where the v2 hierarchy is mounted: alone, or beside v1 (hybrid)."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise RuntimeError("no cgroup2 file system is mounted")


def _kill_cgroup(cgroup: Path) -> None:
    if not cgroup.exists():
        return

    def is_empty() -> bool:
        if "populated 0" in (cgroup / "cgroup.events").read_text():
            return True
        if not (cgroup / "cgroup.kill").exists():  # before 5.14; again and again, since they may fork
            for processes in cgroup.rglob("cgroup.procs"):
                for pid in processes.read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
        return False

    if (cgroup / "cgroup.kill").exists():
        (cgroup / "cgroup.kill").write_text("1")
    poll(f"end of all processes in {cgroup}", is_empty)


def _remove_cgroup(cgroup: Path) -> None:
    for below in sorted(cgroup.rglob("*/"), reverse=True):
        below.rmdir()
    if cgroup.exists():
        cgroup.rmdir()


def _mounts_below(directory: Path) -> list[str]:
    mounts = (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines())
    return [mount for mount in mounts if Path(mount).is_relative_to(directory)]


def command(*argv: str, text: str = "") -> str:
    """Run a command of this machine; RuntimeError with its output if it fails."""
    done = subprocess.run(argv, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stdout.strip()}\n{text}")
    return done.stdout


def accepts(address: str, port: int) -> bool:
    """Whether a Unix socket (port 0) or a TCP port accepts a connection now."""
    with socket.socket(socket.AF_INET if port else socket.AF_UNIX) as trial, contextlib.suppress(OSError):
        trial.connect((address, port) if port else address)
        return True
    return False
