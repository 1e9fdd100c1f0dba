"""A Debian that systemd boots as its process 1, in namespaces and a cgroup of its own (systemd-nspawn), beside a world.

What a reboot loses is lost here too: each boot has a new network namespace, so no table, filter or socket of the one
before, and new mounts, so no pin. What a disk keeps is kept. The network interface is there from the beginning and has
no address until the guest's own network unit gives it one, after network-pre.target, as everywhere.

Whatever leaves the guest is counted outside of it, packet by packet, in the world's network namespace.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.booted import image
from tests.lab.lab import RESOLVER, RESOLVER6
from tests.namespaces import inside, ip, new_namespace, path_of

PATIENCE = float(os.environ.get("LAB_PATIENCE", "1"))
UNIT = "registry-enforcer.service"
BASELINE = "registry-enforcer-baseline.service"
_FILES = Path(__file__).with_name("files")
_NEAR, _FAR = "192.0.2.1", "192.0.2.2"
_CONTAINERS = "10.77.0.0/24"
_REBOOTED = 133  # systemd-nspawn(1), of --keep-unit
_DEADLINE_SECONDS = 30 * PATIENCE
_COUNTING = """
table inet world {
    counter unlisted { }
    counter begun { }
    chain came {
        type filter hook prerouting priority -300;
        iifname "cable" ip daddr 198.18.66.0/24 counter name unlisted;
        iifname "cable" ip daddr 198.18.66.0/24 tcp flags & (syn | ack) == syn counter name begun;
    }
}
"""


def unable() -> str:
    """Why nothing can be booted here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    tools = ("debootstrap", "dpkg-deb", "systemd-nspawn", "nft", "ip", "nsenter")
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        return f"booting needs {', '.join(missing)}: make booted"
    return ""


def poll(what: str, condition: Callable[[], object], seconds: float = _DEADLINE_SECONDS) -> None:
    """Wait until `condition` holds; AssertionError at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)


class World:
    """What the guest's uplink leads to: a resolver, registries on every address, and a count of what came."""

    def __init__(self, namespace: int) -> None:
        self.namespace = namespace
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> World:
        with inside(self.namespace):
            ip(f"addr add {RESOLVER}/32 dev lo; addr add {RESOLVER6}/128 dev lo nodad")
            ip("route add local 198.18.0.0/15 dev lo; route add local 2001:2::/48 dev lo")
            ip("link add cable type veth peer name wire; link set wire up; link set cable up")
            ip(f"addr add {_NEAR}/30 dev cable; route add {_CONTAINERS} via {_FAR}")
            subprocess.run(["nft", "-f", "-"], input=_COUNTING, text=True, check=True)
        self.serve()
        return self

    def __exit__(self, *_: object) -> None:
        self.fall_silent()

    def serve(self) -> None:
        """DNS answers and registries, from now on."""
        with inside(self.namespace):
            self._server = subprocess.Popen([sys.executable, "-m", "tests.lab.small_internet"], cwd=image.ROOT)

    def fall_silent(self) -> None:
        """No answers any more; packets are counted all the same."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()

    def unlisted(self, counter: str = "unlisted") -> int:
        """Packets to addresses that no policy lists, ever; or `begun`: those that begin a connection."""
        with inside(self.namespace):
            listed = subprocess.run(
                ["nft", "list", "counter", "inet", "world", counter], check=True, capture_output=True, text=True
            ).stdout
        (packets,) = re.findall(r"packets (\d+)", listed)
        return int(packets)

    def connect(self, guest: int) -> None:
        """An interface `up0` in the network namespace of one boot, with which it ends."""
        with inside(self.namespace):
            # A veth would be taken for a container's until it has a default route; hardware never is.
            ip("link add link wire name new type macvlan mode private")
            ip(f"link set new netns {path_of(guest)} name up0")


class Guest:
    """One installation, and its boots. A context manager; nothing of it stays."""

    def __init__(self, world: World, directory: Path) -> None:
        self._world = world
        self._directory = directory
        self._name = f"re-booted-{secrets.token_hex(2)}"
        self._cgroup = _cgroup_root() / self._name
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._boots = 0
        self._of_boot = contextlib.ExitStack()
        self.root = directory / "root"
        self._probed = self.root / "var/log/prober"

    def __enter__(self) -> Guest:
        upper, work = self._directory / "upper", self._directory / "work"
        for path in (upper, work, self.root):
            path.mkdir()
        options = f"lowerdir={image.root()},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", self.root], check=True)
        shutil.copytree(_FILES, self.root, dirs_exist_ok=True)
        (self.root / "etc/machine-id").write_text(secrets.token_hex(16) + "\n")  # not a first boot
        (self.root / "etc/resolv.conf").write_text(f"nameserver {RESOLVER}\noptions timeout:1 attempts:1\n")
        self._enable("local-fs.target", "bpffs.service")
        self._enable("sysinit.target", "nftables.service", "prober.service", "stub.service")
        self._enable("multi-user.target", "lab-network.service", "prober-container.service")
        (self.root / "etc/systemd/system/console-getty.service").symlink_to("/dev/null")
        self._cgroup.mkdir()
        return self

    def _enable(self, target: str, *units: str) -> None:
        wants = self.root / f"etc/systemd/system/{target}.wants"
        wants.mkdir(parents=True, exist_ok=True)
        for unit in units:
            where = "etc" if (self.root / f"etc/systemd/system/{unit}").exists() else "usr/lib"
            (wants / unit).symlink_to(f"/{where}/systemd/system/{unit}")

    def __exit__(self, *_: object) -> None:
        try:
            self.power_off()
        finally:
            subprocess.run(["umount", self.root], check=True)
        # On hybrid hosts systemd-nspawn makes the same in systemd's own hierarchy.
        for top in (self._cgroup, Path("/sys/fs/cgroup/systemd") / self._name):
            for path, *_rest in os.walk(top, topdown=False):
                Path(path).rmdir()

    # --- power -------------------------------------------------------------------------------------------------------
    def boot(self) -> None:
        """Start, and wait until the boot is over."""
        assert self._nspawn is None
        self._boots += 1
        for path in self._probed.glob("*"):
            path.unlink()
        namespace = self._of_boot.enter_context(new_namespace())
        self._world.connect(namespace)
        console = self._of_boot.enter_context((self._directory / f"console-{self._boots}").open("wb"))
        nspawn = [
            "systemd-nspawn", "--quiet", f"--directory={self.root}", f"--machine={self._name}",
            "--register=no", "--keep-unit", f"--network-namespace-path={path_of(namespace)}",
            # A host's own powers: the units are to narrow them, not the container.
            "--capability=all", "--system-call-filter=bpf @mount @module perf_event_open", "--console=pipe",
            "--link-journal=no", "--resolv-conf=off", "--timezone=off", "--boot",
        ]  # fmt: skip
        join = f'echo $$ > {self._cgroup}/cgroup.procs && exec "$@"'
        self._nspawn = subprocess.Popen(
            ["sh", "-c", join, "sh", *nspawn],
            stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
            env={"PATH": os.environ["PATH"], "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
                 "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "1"},
        )  # fmt: skip
        poll("process 1 of the guest", self._find_init)
        poll("the boot", lambda: self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"))

    def _find_init(self) -> bool:
        assert self._nspawn is not None
        assert self._nspawn.poll() is None, self.console()
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        for child in children:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    self._pid = int(child)
                    return True
        return False

    def reboot(self) -> None:
        """As an administrator does."""
        self.run("systemctl", "reboot", "--no-block")
        self._wait(_REBOOTED)
        self.boot()

    def power_off(self) -> None:
        """At once, and for good."""
        if self._nspawn is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._nspawn.pid, signal.SIGKILL)
        self._wait()

    def _wait(self, exit_code: int | None = None) -> None:
        assert self._nspawn is not None
        try:
            ended = self._nspawn.wait(_DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._nspawn.pid, signal.SIGKILL)
            ended = self._nspawn.wait()
        self._nspawn = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        poll("the end of every process", lambda: not _populated(self._cgroup))
        self._of_boot.close()
        assert exit_code in (None, ended), self.console()

    def console(self) -> str:
        """The end of what the boot has said."""
        return (self._directory / f"console-{self._boots}").read_text(errors="replace")[-3000:]

    # --- use ---------------------------------------------------------------------------------------------------------
    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A command inside, as root; standard error comes with standard output."""
        enter = ["nsenter", f"--target={self._pid}", "--all", "--", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        join = f'echo $$ > {self._cgroup}/payload/init.scope/cgroup.procs && exec "$@"'
        return subprocess.run(
            ["sh", "-c", join, "sh", *enter, *command],
            check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout * PATIENCE,
        )  # fmt: skip

    def must(self, *command: str, timeout: float = 60) -> str:
        """The same, and it must succeed."""
        done = self.run(*command, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{self.journal()}"
        return done.stdout

    def show(self, unit: str, *properties: str) -> list[str]:
        """Properties of a unit."""
        shown = self.must("systemctl", "show", unit, *(f"--property={name}" for name in properties))
        values = dict(line.split("=", 1) for line in shown.splitlines())
        return [values[name] for name in properties]

    def active(self, unit: str = UNIT) -> bool:
        """Whether it runs."""
        return self.run("systemctl", "is-active", unit).stdout.strip() == "active"

    def journal(self, unit: str = UNIT) -> str:
        """What a unit has said since this boot."""
        return self.run("journalctl", "--no-pager", "--boot", "--output=cat", f"--unit={unit}").stdout[-4000:]

    def write(self, path: str, text: str) -> None:
        """A file."""
        (self.root / path.lstrip("/")).write_text(text)

    def attempts(self, prober: str) -> list[str]:
        """What became of each attempt of a prober in this boot, equal ones in a row once."""
        path = self._probed / prober
        return path.read_text().split() if path.exists() else []


def _cgroup_root() -> Path:
    unified = Path("/sys/fs/cgroup/unified")
    return unified if unified.is_dir() else Path("/sys/fs/cgroup")


def _populated(cgroup: Path) -> bool:
    return "populated 1" in (cgroup / "cgroup.events").read_text()


@contextlib.contextmanager
def new_guest(directory: Path) -> Iterator[tuple[World, Guest]]:
    """A world, and a guest in it that has not been booted."""
    with new_namespace() as namespace, World(namespace) as world, Guest(world, directory) as guest:
        yield world, guest


def command_line(*words: str) -> Sequence[str]:
    """A shell line inside."""
    return ["sh", "-c", " ".join(words)]
