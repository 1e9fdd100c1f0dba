"""Other people's firewalls on the lab's host: firewalld, ufw and netavark of Debian, with a dbus-daemon of their own.

They are unpacked and not installed, since the package of firewalld has it started at the next boot. In the lab's mount
namespace they lie over /usr, and where they keep their settings is the lab's own /etc.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.lab.lab import Lab, poll
from tests.vm.archive import unpacked

_PACKAGES = ("firewalld", "python3-firewall", "ufw", "netavark")
_BUS = "/run/dbus/system_bus_socket"
_BUS_CONFIG = f"""
<busconfig>
  <type>system</type>
  <listen>unix:path={_BUS}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow own="*"/> <allow send_destination="*"/> <allow receive_sender="*"/>
  </policy>
</busconfig>
"""
_SET_UP = """set -e
mount -t overlay -o "lowerdir=$1/usr:/usr" overlay /usr
cp -r "$1"/etc/. /etc/
cp /usr/share/ufw/iptables/*.rules /usr/share/ufw/*.init /usr/share/ufw/ufw.conf /etc/ufw/
chmod 640 /etc/ufw/*.rules /etc/ufw/*.init
mkdir -p /run/dbus"""


class Firewalls:
    """What the packages bring, ready to be started. A context manager; nothing runs afterwards."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._running = contextlib.ExitStack()
        self.versions = ""

    def __enter__(self) -> Firewalls:
        tree = unpacked("bookworm", *_PACKAGES)
        self.versions = (tree / "versions").read_text()
        self.do("sh", "-c", _SET_UP, "sh", str(tree))
        self._running.callback(self.do, "umount", "-l", "/usr")
        self._start_bus()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _start_bus(self) -> None:
        config = self._lab.directory / "bus.conf"
        config.write_text(_BUS_CONFIG)
        self._running.enter_context(self._spawned("dbus-daemon", f"--config-file={config}", "--nofork"))
        poll("the bus", lambda: self._lab.run("host", ["test", "-S", _BUS]).returncode == 0)

    @contextlib.contextmanager
    def _spawned(self, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
        process = self._lab.spawn("host", argv, Path(argv[0]).name)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)

    def do(self, *argv: str) -> str:
        """A command on the host, which must succeed."""
        done = self._lab.run("host", argv)
        assert done.returncode == 0, f"{' '.join(argv)}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    @contextlib.contextmanager
    def firewalld(self) -> Iterator[None]:
        """firewalld, with nftables behind it; it takes its rules out when it ends."""
        with self._spawned("firewalld", "--nofork", "--nopid", "--log-target=console") as daemon:
            poll("firewalld", lambda: self._is_running() or daemon.poll() is not None)
            assert daemon.poll() is None, self._lab.log("firewalld")
            yield

    def _is_running(self) -> bool:
        return self._lab.run("host", ["firewall-cmd", "--state"]).returncode == 0
