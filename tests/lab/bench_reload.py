"""What a reload of 10,000 names costs those who are connecting (part of `make bench`).

Connections that both policies allow, as many as this machine makes, some that none does, and 1,000 DNS answers a
second, while the daemon goes from a small policy to a large one and back. Lost: none; passed: none.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import Counter
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType
from typing import Self

from enforcer import state
from enforcer.kernel_abi import MAX_LEARNED
from enforcer.learned import LearnedAddresses
from enforcer.policy import HostPattern
from tests.lab import small_internet
from tests.lab.enforcer import Enforcer, policy, registry
from tests.lab.internet import ALLOWED_ADDRESS, EVIL_ADDRESS
from tests.lab.lab import RESOLVER, Agent, Lab, missing_tools, poll
from tests.lab.soak import Traffic, come_outside, count_outside

STORM_ADDRESS, STORM_PORT = "198.18.1.13", 9_000  # of dual.allowed.test; a listener that does nothing else
STORM_RULE = registry("storm", "dual.allowed.test", ports=(STORM_PORT,))
ACCEPTING = f"""
import socket
with socket.create_server(("{STORM_ADDRESS}", {STORM_PORT}), backlog=4096) as listener:
    while True:
        listener.accept()[0].close()
"""
NAMES = 10_000
HELD = 16_384  # learned addresses, which a reload looks through
RELOADS = 10
ANSWERS_A_SECOND = 1_000
FULL_RULES = 16  # with as many addresses as one pattern may hold each: together as many as are held at most
FULL_SECONDS = 10.0  # of a reload or repair then: a third of what systemd's watchdog allows
BLOCKED_SECONDS = 2.0  # that a reload may hold up the daemon's loop; the kernel goes on by itself meanwhile


def many_names(count: int) -> str:
    """Lines of a policy: a registry with so many names."""
    return registry("many", *(f"n{number}.many.test" for number in range(count)))


class Busy:
    """Clients that connect without a pause, and DNS answers; a context manager. What they met is known at its end."""

    def __init__(self, lab: Lab, *, pause: float = 0, answers_a_second: int = 100, fresh: bool = True) -> None:
        """`fresh`: with clients that are allowed, under every policy of the test."""
        self.met = Traffic()
        self.answers = 0
        self.seconds = 0.0
        self._stopping = threading.Event()
        self._pause = pause
        self._rate = answers_a_second
        self._asking = lab.agent("host")
        self._probers: list[tuple[Agent, str, bool]] = [
            (lab.agent(where), address, allowed)
            for where in ("ct", "host")
            for address, allowed in ((ALLOWED_ADDRESS, True), (EVIL_ADDRESS, False))
            if fresh or not allowed
        ]

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        for agent, address, _ in self._probers:
            agent.call("probe_start", key="p", address=address, port=443, pause=self._pause)
        self._asker = threading.Thread(target=self._ask)
        self._asker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._asker.join()
        for agent, address, allowed in self._probers:
            self.met.add(agent.call("probe_stop", key="p")["verdicts"], address, allowed=allowed)
            agent.close()
        self.seconds = time.monotonic() - self._began
        self._asking.close()

    def _ask(self) -> None:
        while not self._stopping.is_set():
            self.answers += self._asking.call(
                "flood", server=RESOLVER, name="registry.allowed.test", rate=self._rate, seconds=0.25
            )["answers"]


class Storm:
    """An engine that connects as fast as it can; a context manager."""

    def __init__(self, lab: Lab) -> None:
        self.made = 0
        self.failed: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._agent = lab.agent("host", comm="skopeo", inside=["nice", "-n", "10"])  # what the others leave
        self._thread = threading.Thread(target=self._connect)

    def __enter__(self) -> Self:
        self._agent.call("resolve", name="dual.allowed.test")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _connect(self) -> None:
        while not self._stopping.is_set():
            told = self._agent.call("storm", address=STORM_ADDRESS, port=STORM_PORT, seconds=0.5)
            self.made += told["made"]
            self.failed.update(told["failed"])


def full_memory(lab: Lab, enforcer: Enforcer) -> tuple[float, list[float], float, float]:
    """What it is to hold as much as is ever held: seconds of a start that takes it over, of reloads that look through
    it, and of a repair of the table; and MiB of memory."""
    enforcer.stop()
    enforcer.remove()
    first = int(IPv4Address("11.0.0.0"))
    state.save(
        enforcer.state_dir,
        (
            state.SavedAddress(
                IPv4Address(first + number), 443, f"n.p{rule}.full.test", f"full{rule}",
                HostPattern(f"p{rule}.full.test", wildcard=True), time.time() + 3_600, 3_600,
            )
            for number, rule in enumerate(sorted(list(range(FULL_RULES)) * LearnedAddresses().per_holder))
        ),
    )  # fmt: skip
    rules = "".join(registry(f"full{rule}", f"*.p{rule}.full.test") for rule in range(FULL_RULES))
    texts = [policy(host="strict", more=rules + more) for more in (STORM_RULE, "")]
    started = time.monotonic()
    enforcer.start(texts[1])
    took = time.monotonic() - started
    reloads = []
    for number in range(4):
        started = time.monotonic()
        problem = enforcer.reload_and_wait(texts[number % 2])
        reloads.append(time.monotonic() - started)
        assert problem is None, problem
    held = enforcer.total("enforcer_held", what="learned_permissions")
    assert held > 0.98 * MAX_LEARNED, held
    started = time.monotonic()
    assert lab.run("host", ["nft", "flush", "ruleset"]).returncode == 0
    poll("the repair", lambda: ": put back" in enforcer.log)  # whose loop answers nobody meanwhile
    repaired = time.monotonic() - started
    status = Path(f"/proc/{enforcer.pid}/status").read_text()
    (kibibytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
    return took, reloads, repaired, int(kibibytes) / 1024


def main() -> int:
    """Print what it cost; 1 if something was lost, or passed, or the loop stood still for too long."""
    if missing := missing_tools():
        print(f"bench: needs {', '.join(missing)}: make setup")
        return 2
    texts = [policy(host="strict", more=STORM_RULE + more) for more in (many_names(NAMES), "")]
    took: dict[int, list[float]] = {0: [], 1: []}
    with Lab() as lab:
        small_internet.start(lab)
        enforcer = Enforcer(lab, "host", lab.host)
        lab.spawn("net", [sys.executable, "-c", ACCEPTING], "accepting")
        enforcer.start(texts[1])
        count_outside(lab)
        lab.ct.call("flood_names", server=RESOLVER, suffix="fresh.allowed.test", first=0, count=HELD, reply_within=120)
        with Busy(lab, pause=0.02, answers_a_second=ANSWERS_A_SECOND) as busy, Storm(lab) as storm:
            for number in range(2 * RELOADS):
                started = time.monotonic()
                problem = enforcer.reload_and_wait(texts[number % 2])
                took[number % 2].append(time.monotonic() - started)
                assert problem is None, problem
                time.sleep(0.2)
        busy.met.outside = come_outside(lab)
        start, full, repair, memory = full_memory(lab, enforcer)
    for which, what in ((0, f"to {NAMES} names"), (1, "and back")):
        print(f"reload, {what}: {statistics.median(took[which]):.2f} s, {max(took[which]):.2f} s at most")
    met, made = busy.met, busy.met.allowed + storm.made
    print(
        f"meanwhile: {(made + met.refused) / busy.seconds:.0f} connections/s, {busy.answers / busy.seconds:.0f} DNS "
        f"answers/s; allowed {made}, failed {len(met.failed) + sum(storm.failed.values())}; "
        f"refused {met.refused}, passed {met.passed}, packets outside {sum(met.outside.values())}"
    )
    print(
        f"{MAX_LEARNED} learned permissions, as many as are ever held: start in {start:.1f} s, "
        f"reload {statistics.median(full):.1f} s, {max(full):.1f} s at most, repair {repair:.1f} s, {memory:.0f} MiB"
    )
    for failure in (*met.failed[:5], *storm.failed):
        print(f"bench: {failure}")
    lost, through = met.failed or storm.failed, met.passed or any(met.outside.values())
    return 1 if lost or through or max(took[0]) > BLOCKED_SECONDS or max(*full, repair) > FULL_SECONDS else 0


if __name__ == "__main__":
    sys.exit(main())
