"""Hours in minutes (`make soak MINUTES=n`): everything at once, sampled every second, and what must not grow does not.

All the time: fresh allowed names at 200 a second, connections that are allowed and that are not, reloads of policies
that take rules away and give them back, interfaces that come and go, the table flushed by somebody else. In the first
sixth of the run the daemon is restarted again and again, by SIGTERM and SIGKILL; the rest belongs to one process, since
what leaks shows in a process that lives. Its first measure is taken when it is a sixth of the run old, or five minutes.

Samples go to build/soak.csv and build/soak.png, the verdicts to standard output; the exit code is 1 if a bound broke.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from enforcer import bpf, nft
from enforcer.ruleset import LEARNED_SET_SIZE
from tests.lab import small_internet
from tests.lab.enforcer import METRICS_PORT, Enforcer, policy, registry
from tests.lab.internet import ALLOWED_ADDRESS, EVIL_ADDRESS, EVIL_ADDRESS6, fresh_name
from tests.lab.lab import RESOLVER, Agent, Lab, missing_tools
from tests.namespaces import inside

MINUTES = 5.0
NAMES_A_SECOND = 200
FIRST_NAMES = 20_000  # before the first sample: what a wildcard may hold is held from the beginning
CONNECTED_NAMES = 4  # of these, by a container and by the host each
RELOAD_SECONDS = 10.0
FLUSH_SECONDS = 47.0
CHURN_SECONDS = 1.0
PROBE_PAUSE_SECONDS = 0.02
SIZES_SECONDS = 10.0  # between two looks at maps and sets, which cost something
SETTLED_SECONDS = 300.0  # age of the process at its first measure, where the run is long enough
WINDOW_SECONDS = 60.0  # a measure is the middle of so many seconds at most

RSS_GROWTH = 0.10
FAILING_RATE = 0.001  # of allowed connections; none is expected
# Of these maps the kernel makes room by itself; the others are filled by the policy and by what there is on the host.
GROWING_MAPS = ("learned", "queries", "flows", "hellos", "strays", "connects")


# --- what is measured, and what it must be ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Sample:
    """One second of the daemon."""

    at_seconds: float  # since the run began
    pid: int
    rss_kb: int
    descriptors: int
    threads: int
    sizes: Mapping[str, int] = field(default_factory=dict)  # of maps, sets and what the daemon tells; not every second


@dataclass(slots=True)
class Traffic:
    """What clients met."""

    allowed: int = 0
    failed: list[str] = field(default_factory=list)  # of the allowed ones: what went wrong
    refused: int = 0
    passed: int = 0  # of those that must be refused
    outside: Mapping[str, int] = field(default_factory=dict)  # packets of these that came out of the host, by kind

    def add(self, verdicts: Mapping[str, int], address: str, *, allowed: bool) -> None:
        """A prober's account."""
        if allowed:
            self.allowed += sum(verdicts.values())
            self.failed += [
                f"{address}: {verdict}"
                for verdict, count in verdicts.items()
                if verdict != "reached"
                for _ in range(count)
            ]
        else:
            self.refused += sum(verdicts.values())
            self.passed += verdicts.get("reached", 0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bound."""

    what: str
    measured: str
    bound: str
    holds: bool


def measures(samples: Sequence[Sample], run_seconds: float) -> tuple[list[Sample], list[Sample]]:
    """(the samples of the last process when it had settled, those at its end): the windows that are compared."""
    last = [sample for sample in samples if sample.pid == samples[-1].pid]
    begun, end = last[0].at_seconds, last[-1].at_seconds
    settled = begun + min(SETTLED_SECONDS, run_seconds / 6)
    window = min(WINDOW_SECONDS, (end - settled) / 4)
    return (
        [sample for sample in last if settled <= sample.at_seconds <= settled + window],
        [sample for sample in last if sample.at_seconds >= end - window],
    )


def verdicts(
    samples: Sequence[Sample], limits: Mapping[str, int], traffic: Traffic, run_seconds: float
) -> list[Verdict]:
    """What the samples say of each bound; `limits` are the most of each size."""
    settled, end = measures(samples, run_seconds)
    rss, rss_end = (statistics.median(sample.rss_kb for sample in window) for window in (settled, end))
    fds, fds_end = (min(sample.descriptors for sample in window) for window in (settled, end))
    threads, threads_end = (max(sample.threads for sample in window) for window in (settled, end))
    since = f"after {settled[0].at_seconds:.0f} s"
    found = [
        Verdict("RSS", f"{rss_end / 1024:.1f} MB", f"{rss / 1024:.1f} MB {since}, and {RSS_GROWTH:.0%}",
                rss_end <= rss * (1 + RSS_GROWTH)),
        # The least: a client of a moment has one too, and a descriptor that leaks is there all the time.
        Verdict("descriptors", str(fds_end), f"{fds} {since}", fds_end <= fds),
        Verdict("threads", str(threads_end), f"{threads} {since}", threads_end <= threads),
    ]  # fmt: skip
    largest: dict[str, int] = {}
    for sample in samples:
        for name, size in sample.sizes.items():
            largest[name] = max(size, largest.get(name, 0))
    for name, limit in limits.items():
        # What was never seen is not known to hold.
        found.append(Verdict(name, str(largest.get(name, "?")), str(limit), 0 <= largest.get(name, -1) <= limit))
    rate = len(traffic.failed) / traffic.allowed if traffic.allowed else 1.0
    found.append(
        Verdict("allowed, failing", f"{len(traffic.failed)} of {traffic.allowed}", f"{FAILING_RATE:.1%}",
                rate <= FAILING_RATE)
    )  # fmt: skip
    found.append(
        Verdict("refused, passing", f"{traffic.passed} of {traffic.refused}", "0",
                traffic.passed == 0 and traffic.refused > 0)
    )  # fmt: skip
    outside = ", ".join(f"{count} {kind}" for kind, count in traffic.outside.items() if count)
    found.append(Verdict("refused, packets outside", outside or "0", "0", not outside))
    return found


def table(found: Sequence[Verdict]) -> str:
    """The verdicts, a line each."""
    rows = [
        ("", "measured", "bound", ""),
        *((v.what, v.measured, v.bound, "holds" if v.holds else "BROKEN") for v in found),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{what:<{widths[0]}}  {measured:>{widths[1]}}  {bound:<{widths[2]}}  {verdict}".rstrip()
        for what, measured, bound, verdict in rows
    )


# --- the load ---------------------------------------------------------------------------------------------------------
def policies() -> list[str]:
    """What reloads alternate between: rules go and come back, and with them hundreds of names; one is wrong."""
    many = registry("many", *(f"n{index}.many.test" for index in range(500)))
    return [
        policy(host="strict"),
        policy(host="strict", more=many),
        policy(host="strict", corp=("registry.allowed.test", "*.fresh.allowed.test"), more=many),
        "mode = 'neither'\n",
    ]


# What a TCP packet does, as nft says it; the first that holds.
_KINDS = {
    "begins": "tcp flags & (syn | ack) == syn",
    "resets": "tcp flags & rst == rst",
    "ends": "tcp flags & fin == fin",
    "carries": "tcp flags & psh == psh",
    "acknowledges": "meta l4proto tcp",
}


def count_outside(lab: Lab) -> None:
    """Have the lab's internet count, from 0, what comes to those whom nobody may reach: an eye outside of the host."""
    counters = "\n".join(f"counter {kind} {{ }}" for kind in _KINDS)
    rules = "\n".join(f"{matched} counter name {kind} accept" for kind, matched in _KINDS.items())
    counting = f"""table inet outside {{ }}
    delete table inet outside
    table inet outside {{
        {counters}
        chain evil {{
            {rules}
        }}
        chain arriving {{
            type filter hook prerouting priority -400;
            ip daddr {EVIL_ADDRESS} jump evil
            ip6 daddr {EVIL_ADDRESS6} jump evil
        }}
    }}"""
    counted = lab.run("net", ["nft", "-f", "-"], text=counting)
    assert counted.returncode == 0, counted.stdout


def come_outside(lab: Lab) -> dict[str, int]:
    """How many packets of each kind have come since."""
    listed = json.loads(lab.run("net", ["nft", "-j", "list", "counters", "table", "inet", "outside"]).stdout)
    return {
        each["counter"]["name"]: int(each["counter"]["packets"]) for each in listed["nftables"] if "counter" in each
    }


class Load:
    """Everything that goes on at once, each in a thread of its own; a context manager that ends it."""

    def __init__(self, lab: Lab, enforcer: Enforcer, run_seconds: float) -> None:
        self.traffic = Traffic()
        self.counts = dict.fromkeys(("reloads", "restarts", "flushes", "interfaces", "names"), 0)
        self.problems: list[str] = []  # of the run itself
        self.slowest_reload = 0.0
        self._lab = lab
        self._enforcer = enforcer
        self._run_seconds = run_seconds
        self._stopping = threading.Event()
        self._counting = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._probers: list[tuple[Agent, str, bool]] = []

    def __enter__(self) -> Load:
        count_outside(self._lab)
        for agent, address, allowed in (
            (self._lab.agent("ct"), EVIL_ADDRESS, False),
            (self._lab.agent("ct"), EVIL_ADDRESS6, False),
            (self._lab.agent("host", comm="skopeo"), EVIL_ADDRESS, False),
            (self._lab.agent("ct"), ALLOWED_ADDRESS, True),
        ):
            agent.call("probe_start", key="p", address=address, port=443, pause=PROBE_PAUSE_SECONDS)
            self._probers.append((agent, address, allowed))
        asking = self._lab.agent("ct")
        self._flood(asking, FIRST_NAMES)
        for work in (
            lambda: self._every(1.0, lambda: self._flood(asking)),
            self._connecting(self._lab.agent("ct")),
            self._connecting(self._lab.agent("host")),
            self._change_policies,
            lambda: self._every(CHURN_SECONDS, self._churn),
        ):
            thread = threading.Thread(target=self._guarded, args=(work,))
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        for agent, address, allowed in self._probers:
            self.traffic.add(agent.call("probe_stop", key="p")["verdicts"], address, allowed=allowed)
        self.traffic.outside = come_outside(self._lab)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - what it is the report says
            self.problems.append(f"{type(error).__name__}: {error}")
            self._stopping.set()

    @property
    def stopped(self) -> bool:
        """Whether a part of it could not go on."""
        return self._stopping.is_set()

    def _every(self, seconds: float, action: Callable[[], None]) -> None:
        due = time.monotonic()
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            action()
            due = max(due + seconds, time.monotonic() - seconds)  # a moment's delay is made up for

    def _take(self, count: int) -> int:
        """The number of the first of so many fresh names."""
        with self._counting:
            first = self.counts["names"]
            self.counts["names"] += count
        return first

    def _flood(self, agent: Agent, count: int = NAMES_A_SECOND - 2 * CONNECTED_NAMES) -> None:
        asked = {"first": self._take(count), "count": count}
        agent.call("flood_names", server=RESOLVER, suffix="fresh.allowed.test", reply_within=120, **asked)

    def _connecting(self, agent: Agent) -> Callable[[], None]:
        def connect() -> None:
            first = self._take(CONNECTED_NAMES)
            names = [fresh_name(index) for index in range(first, first + CONNECTED_NAMES)]
            replies = agent.call("connect_each", names=names, port=443, families=[4, 6])
            with self._counting:
                self.traffic.allowed += len(replies)
                self.traffic.failed += [
                    f"{name}: {reply['verdict']}: {reply['message']}"
                    for name, reply in zip(names, replies, strict=True)
                    if reply["verdict"] != "reached"
                ]

        return lambda: self._every(1.0, connect)

    def _change_policies(self) -> None:
        """Reloads, restarts and flushes, one after the other: each alone has to lose nothing."""
        texts = policies()
        began = time.monotonic()
        restarting = self._run_seconds / 6
        restart_every = min(60.0, restarting / 4)
        due = {"reload": RELOAD_SECONDS, "restart": restart_every, "flush": FLUSH_SECONDS / 2}
        signals = itertools.cycle((signal.SIGTERM, signal.SIGKILL))
        turns = itertools.cycle(range(len(texts)))
        good = texts[0]
        while not self._stopping.wait(0.1):
            at = time.monotonic() - began
            if at >= due["reload"]:
                due["reload"] = at + RELOAD_SECONDS
                text = texts[next(turns)]
                started = time.monotonic()
                problem = self._enforcer.reload_and_wait(text)
                self.slowest_reload = max(self.slowest_reload, time.monotonic() - started)
                if (problem is None) == (text is texts[-1]):
                    raise RuntimeError(f"a reload: {problem}")
                good = text if problem is None else good
                self.counts["reloads"] += 1
            if at >= due["flush"]:
                due["flush"] = at + FLUSH_SECONDS
                self._lab.run("host", ["nft", "flush", "ruleset"])
                self.counts["flushes"] += 1
            if at >= due["restart"]:
                due["restart"] = at + restart_every if at + restart_every < restarting else float("inf")
                self._enforcer.stop(next(signals))
                self._enforcer.start(good)
                self.counts["restarts"] += 1

    def _churn(self) -> None:
        number = self.counts["interfaces"]
        self._lab.ip("host", f"link add soak{number} type veth peer name peer{number}",
                     f"link add soakbr{number} type bridge", f"link set soak{number} master soakbr{number} up",
                     f"addr add 10.99.{number % 250}.1/24 dev soakbr{number}",
                     f"link set soakbr{number} up", f"link set peer{number} up")  # fmt: skip
        self._stopping.wait(0.3)
        self._lab.ip("host", f"link del soak{number}", f"link del soakbr{number}")
        self.counts["interfaces"] += 3


# --- the samples ------------------------------------------------------------------------------------------------------
class Sampler:
    """Reads what the daemon and the kernel hold; a context manager."""

    def __init__(self, lab: Lab, enforcer: Enforcer) -> None:
        self.limits: dict[str, int] = {}
        self._lab = lab
        self._enforcer = enforcer
        self._scraper = lab.agent("host")
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Sampler:
        (generation,) = (self._lab.bpffs / "host").glob("generation-*")
        kernel = self._resources.enter_context(bpf.KernelState(bpf.read_report(generation)))
        self._maps = {f"map {name}": kernel.maps[name] for name in GROWING_MAPS}
        self.limits = {name: each.max_entries for name, each in self._maps.items()}
        self.limits |= {"set learned": 2 * LEARNED_SET_SIZE, "set revoked": 2 * LEARNED_SET_SIZE}
        namespace = os.open(f"/run/netns/{self._lab.namespace('host')}", os.O_RDONLY)
        with inside(namespace):
            self._firewall = self._resources.enter_context(nft.Nft())
        os.close(namespace)
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def take(self, at_seconds: float, *, sizes: bool) -> Sample | None:
        """One sample; None while no daemon runs."""
        pid = self._enforcer.pid
        try:
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
            )
            descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - counted only
            rss_kb, threads = int(status["VmRSS"].split()[0]), int(status["Threads"])
        except (OSError, KeyError):
            return None  # it has just ended
        return Sample(at_seconds, pid, rss_kb, descriptors, threads, self._sizes() if sizes else {})

    def _sizes(self) -> dict[str, int]:
        sizes = {name: sum(1 for _ in each.items()) for name, each in self._maps.items()}
        with contextlib.suppress(nft.NftError):  # changes during each reading, or somebody has just flushed it
            sizes["set learned"] = len(self._firewall.learned())
            sizes["set revoked"] = len(self._firewall.revoked())
        with contextlib.suppress(OSError):  # between two daemons
            text = self._scraper.call("http_get", address="127.0.0.1", port=METRICS_PORT, path="/metrics")["body"]
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name == "enforcer_learned_addresses":
                        sizes[f"daemon learned {sample.labels['family']}"] = int(sample.value)
                    elif sample.name == "enforcer_held":
                        sizes[f"daemon {sample.labels['what']}"] = int(sample.value)
                    elif sample.name == "enforcer_held_limit":
                        self.limits[f"daemon {sample.labels['what']}"] = int(sample.value)
        return sizes


def run(minutes: float, say: Callable[[str], None]) -> tuple[list[Sample], dict[str, int], Load]:
    """The whole run; its samples, the limits of sizes, and what the load met."""
    run_seconds = minutes * 60
    samples: list[Sample] = []
    with Lab() as lab:
        small_internet.start(lab)
        enforcer = Enforcer(lab, "host", lab.host)
        enforcer.start(policies()[0])
        assert lab.ct.connect("registry.allowed.test").reached
        with Sampler(lab, enforcer) as sampler:
            with Load(lab, enforcer, run_seconds) as load:
                for at in _seconds(run_seconds):
                    if load.stopped:
                        break
                    looks = not samples or at - max(s.at_seconds for s in samples if s.sizes) >= SIZES_SECONDS
                    if (sample := sampler.take(at, sizes=looks)) is not None:
                        samples.append(sample)
                        if looks and len(samples) % 60 < SIZES_SECONDS:
                            say(f"soak: {at:.0f} s: {sample.rss_kb / 1024:.1f} MB, {sample.descriptors} descriptors, "
                                f"{len(load.traffic.failed)} failed, {load.counts}")  # fmt: skip
            limits = dict(sampler.limits)
        if load.problems:
            say(enforcer.log[-4000:])
        enforcer.stop()
    return samples, limits, load


def _seconds(run_seconds: float) -> Iterator[float]:
    began = time.monotonic()
    while (at := time.monotonic() - began) < run_seconds:
        yield at
        time.sleep(max(0.0, 1.0 - (time.monotonic() - began - at)))


# --- reports ----------------------------------------------------------------------------------------------------------
def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    """A row for each sample; sizes that were not looked at are empty."""
    names = sorted({name for sample in samples for name in sample.sizes})
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["seconds", "pid", "rss_kb", "descriptors", "threads", *names])
        for sample in samples:
            sizes = (sample.sizes.get(name, "") for name in names)
            rows.writerow(
                [f"{sample.at_seconds:.1f}", sample.pid, sample.rss_kb, sample.descriptors, sample.threads, *sizes]
            )


def plot(path: Path, samples: Sequence[Sample], limits: Mapping[str, int]) -> None:
    """Three panels above each other: memory, descriptors and threads, sizes as parts of their limits."""
    import matplotlib  # noqa: PLC0415 - seconds and megabytes, for this picture alone

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, (memory, counts, sizes) = pyplot.subplots(3, 1, sharex=True, figsize=(11, 10), layout="constrained")
    minutes = [sample.at_seconds / 60 for sample in samples]
    memory.plot(minutes, [sample.rss_kb / 1024 for sample in samples], linewidth=1)
    memory.set_ylabel("RSS, MB")
    memory.set_ylim(bottom=0)
    counts.plot(minutes, [sample.descriptors for sample in samples], linewidth=1, label="descriptors")
    counts.plot(minutes, [sample.threads for sample in samples], linewidth=1, label="threads")
    counts.set_ylim(bottom=0)
    counts.legend(loc="upper left")
    for name, limit in sorted(limits.items()):
        seen = [(sample.at_seconds / 60, sample.sizes[name] / limit) for sample in samples if name in sample.sizes]
        if any(part for _, part in seen):
            sizes.plot(*zip(*seen, strict=True), linewidth=1, label=f"{name} (of {limit:,})")
    sizes.set_ylabel("part of the limit")
    sizes.set_ylim(0, 1.05)
    sizes.set_xlabel("minutes")
    sizes.legend(loc="upper left", fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> int:
    """Run, report; 1 if a bound broke."""
    arguments = argparse.ArgumentParser(prog="make soak", description=__doc__)
    arguments.add_argument("--minutes", type=float, default=MINUTES)
    minutes = arguments.parse_args().minutes
    if missing := missing_tools():
        print(f"soak: needs {', '.join(missing)}: make setup")
        return 2
    if minutes < 1:
        print("soak: takes a minute at least; write MINUTES=1 or more")
        return 2
    build = Path("build")
    build.mkdir(exist_ok=True)
    samples, limits, load = run(minutes, lambda line: print(line, flush=True))
    write_csv(build / "soak.csv", samples)
    plot(build / "soak.png", samples, limits)
    if load.problems:
        print("\n".join(f"soak: {problem}" for problem in load.problems))
        return 1
    if minutes * 10 < SETTLED_SECONDS:
        print(
            f"soak: a short run: the first measure is of a process {minutes * 10:.0f} s old, not {SETTLED_SECONDS:.0f}"
        )
    print(", ".join(f"{count} {what}" for what, count in load.counts.items()), end="; ")
    print(f"slowest reload {load.slowest_reload:.2f} s")
    found = verdicts(samples, limits, load.traffic, minutes * 60)
    print(table(found))
    for failure in load.traffic.failed[:10]:
        print(f"soak: failed: {failure}")
    print(f"soak: {build}/soak.csv, {build}/soak.png")
    return 0 if all(verdict.holds for verdict in found) else 1


if __name__ == "__main__":
    sys.exit(main())
