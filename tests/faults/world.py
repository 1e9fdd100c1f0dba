"""The host that faults befall: its enforcer takes orders, and two probers try an unlisted registry without pause.

What a prober is told is one thing. The other is what comes out: the lab's internet counts the packets to that registry,
so that no lost answer hides one.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from enforcer import state
from tests.faults import injected
from tests.faults.injected import Orders
from tests.lab.bench import FreshNames
from tests.lab.enforcer import Enforcer, policy
from tests.lab.internet import ALLOWED_ADDRESS, EVIL_ADDRESS
from tests.lab.lab import Agent, Lab, Outcome, poll

SOON_SECONDS = 5.0  # within which everything allowed is reached again
CONNECT_SECONDS = 3.0
ATTEMPT_SECONDS = 0.1
_IN_FORCE = "is in force, mode"
_OUTSIDE = """
table inet outside {
    counter unlisted { }
    counter stray { }
    chain prerouting {
        type filter hook prerouting priority -300;
        iifname "to-host" ip daddr 198.18.66.0/24 goto count
        iifname "to-host" ip6 daddr 2001:2:0:66::/64 goto count
    }
    chain count {
        tcp flags & (syn | ack) == syn counter name unlisted return
        meta l4proto != tcp counter name unlisted return
        counter name stray
    }
}
"""


class OrderedEnforcer(Enforcer):
    """An enforcer that a test orders to fail."""

    def __init__(self, lab: Lab, scraper: Agent) -> None:
        self.directory = lab.directory / "orders"
        self.directory.mkdir(exist_ok=True)
        super().__init__(lab, "host", scraper, [sys.executable, injected.__file__, str(self.directory)])

    def start(self, text: str, *, loader: str = "libbpf", orders: Orders | None = None) -> str:
        """Start it; RuntimeError if it ends before it is ready, as ordered."""
        (orders or Orders()).write(self.directory)
        return super().start(text, loader=loader)

    def order(self, orders: Orders) -> None:
        """Give new orders to the one that runs."""
        orders.write(self.directory)
        self.send(signal.SIGUSR1)
        poll("orders to be heeded", lambda: not (self.directory / "orders").exists())

    def change(self, text: str) -> bool:
        """SIGHUP with a new policy file; whether the daemon lived to say that it is in force."""
        self._write_policy(text)
        before = self.log.count(_IN_FORCE)
        self.send(signal.SIGHUP)
        poll("a reload", lambda: self.log.count(_IN_FORCE) > before or not self.running)
        return self.log.count(_IN_FORCE) > before

    @property
    def steps(self) -> list[str]:
        """What it has done since its orders."""
        return (self.directory / "steps").read_text().splitlines()


def answered(outcome: Outcome) -> bool:
    """Whether a registry has answered; who is accepted by a responder that hangs has reached nobody."""
    return outcome.reached and outcome.message.startswith("HTTP/")


@dataclass(slots=True)
class Probes:
    """What the probers met, once they have stopped."""

    verdicts: dict[str, int] = field(default_factory=dict)
    slowest: float = 0.0
    odd: list[object] = field(default_factory=list)  # some that were neither reached nor refused

    @property
    def tried(self) -> int:
        return sum(self.verdicts.values())


class World:
    """One lab and what is tried in it."""

    def __init__(self, lab: Lab, fresh: FreshNames) -> None:
        self.lab = lab
        self.fresh = fresh
        self.enforcer = OrderedEnforcer(lab, lab.host)
        self._probers = [lab.agent("ct"), lab.agent("host", comm="skopeo")]
        self.outside_of("nft", "-f", "-", text=_OUTSIDE)

    def close(self) -> None:
        """Leave the lab as it was."""
        if self.enforcer.running:
            self.enforcer.stop(signal.SIGKILL)
        self.enforcer.remove()
        self.outside_of("nft", "delete", "table", "inet", "outside")

    def run(self, where: str, *argv: str, text: str = "") -> str:
        """A command that succeeds."""
        done = self.lab.run(where, argv, text=text)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def outside_of(self, *argv: str, text: str = "") -> str:
        """A command on the other side of the uplink."""
        return self.run("net", *argv, text=text)

    def packets_outside(self) -> int:
        """How many packets to unlisted registries have ever left the host."""
        listed = json.loads(self.outside_of("nft", "--json", "list", "counter", "inet", "outside", "unlisted"))
        return next(int(entry["counter"]["packets"]) for entry in listed["nftables"] if "counter" in entry)

    @contextlib.contextmanager
    def nothing_gets_out(self, *told: str) -> Iterator[Probes]:
        """A container and an engine try an unlisted registry all the time, and are only told "refused", or `told`.

        Or nothing, by a responder that has just gone: what counts is that no packet of a new connection comes out.
        """
        probes, before = Probes(), self.packets_outside()
        for prober in self._probers:
            prober.call("probe_start", key="p", address=EVIL_ADDRESS, port=443)
        try:
            yield probes
        finally:
            time.sleep(ATTEMPT_SECONDS)  # what is over at once is tried, too
            for prober in self._probers:
                stopped = prober.call("probe_stop", key="p")
                for verdict, count in stopped["verdicts"].items():
                    probes.verdicts[verdict] = probes.verdicts.get(verdict, 0) + count
                probes.slowest = max(probes.slowest, stopped["slowest"])
                probes.odd += stopped["odd"]
        assert probes.verdicts.keys() <= {"refused", "unanswered", *told}, probes
        assert probes.tried > 0, probes
        assert self.packets_outside() == before

    @property
    def clients(self) -> Sequence[Agent]:
        """A container and an engine."""
        return self.lab.ct, self.lab.engine

    def refused(self, address: str = EVIL_ADDRESS) -> None:
        """Both are refused an address."""
        for client in self.clients:
            outcome = client.attempt(address)
            assert outcome.refused, outcome

    def reached(self, *addresses: str, within: float = SOON_SECONDS) -> float:
        """Both reach these addresses without asking for a name, within so many seconds; how many it took."""
        started = time.monotonic()
        for client in self.clients:
            for address in addresses or (ALLOWED_ADDRESS,):
                left = max(0.0, started + within - time.monotonic())
                poll(f"{address} is reached", lambda c=client, a=address: answered(c.attempt(a)), left)  # type: ignore[misc]
        return time.monotonic() - started

    def learns(self) -> None:
        """A name that nobody has asked for is reached at once by both."""
        for client in self.clients:
            (name,) = self.fresh.take(1)
            outcome = client.connect(name, timeout=CONNECT_SECONDS)
            assert answered(outcome), outcome
            assert outcome.seconds < SOON_SECONDS / 10, outcome

    def learn(self, count: int) -> list[str]:
        """The addresses of so many names that a container has just asked for."""
        addresses: list[str] = []
        for name in self.fresh.take(count):
            addresses += self.lab.ct.call("resolve", name=name, family=4)
        return addresses

    def start(self, text: str = "", orders: Orders | None = None) -> None:
        """Start the enforcer; `killed` tells whether it was, as ordered, before it was ready."""
        with contextlib.suppress(RuntimeError) if orders and orders.kill_before else contextlib.nullcontext():
            self.enforcer.start(text or policy(), orders=orders)

    def ready(self, text: str = "") -> None:
        """Running without orders, with this policy, and knowing the allowed registry."""
        text = text or policy()
        if self.enforcer.running:
            self.enforcer.order(Orders())
        if not self.enforcer.running:
            self.start(text)
        self.enforcer.ensure(text)
        for client in self.clients:
            outcome = client.connect("registry.allowed.test")
            assert outcome.reached, outcome

    def afresh(self) -> None:
        """A daemon, a kernel and a state file that know nothing of what was."""
        if self.enforcer.running:
            self.enforcer.stop(signal.SIGKILL)
        self.enforcer.remove()
        (self.enforcer.state_dir / state.FILE_NAME).unlink(missing_ok=True)
        self.start()

    def faults(self, what: str) -> float:
        """How many of a kind were counted by the daemon that runs."""
        return self.enforcer.total("enforcer_faults_total", what=what)

    def said(self, text: str) -> int:
        """How often the daemon's log says something."""
        return self.enforcer.log.count(text)


def mount_small(world: World, path: Path, size: str) -> None:
    """A file system of its own at a directory of the host."""
    path.mkdir(parents=True, exist_ok=True)
    world.run("host", "mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path))
