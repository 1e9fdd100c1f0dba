"""The main job on every rung of the ladder, on real packets: this kernel, made to look like one that gives less.

The daemon is told of fewer features, and the loader's child refuses what an older verifier would; tests/vm has the real
kernels. Whatever is missing, what is allowed is reached and the rest is not; how long the one takes, and what the other
is told, is what the rungs differ in.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.kernel.test_stamps import BEFORE_5_8, OLD_KERNEL
from tests.lab.bench import FreshNames
from tests.lab.enforcer import COMMAND, Enforcer, policy, registry
from tests.lab.internet import EVIL_ADDRESS, EVIL_ADDRESS6
from tests.lab.lab import CT_ADDRESS, RESOLVER, Agent, Lab, Outcome, poll

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(180)]

AT_ONCE, SECOND_SYN = 0.5, 3.0  # seconds: a first SYN that was lost comes again after one
PATIENCE = 2.2  # of a client that is told nothing, or at its second SYN

LAUNCHER = """
import sys
from enforcer import bpf, cli, netlink, nft
from enforcer.ladder import Feature
SETS = {Feature.PLAIN_SETS, Feature.TIMED_SETS, Feature.DYNAMIC_SETS, Feature.INTERVALS}
"""
REFUSE = f"""
import pathlib, subprocess
bpf._run_loader = lambda loader, into, inputs: subprocess.run(
    [sys.executable, "-c", {OLD_KERNEL!r}, REFUSED, loader.value, into, *inputs],
    check=True, cwd=pathlib.Path(bpf.__file__).parent.parent)
"""
NO_TC = "netlink.Netlink.takes_filters = lambda self, program_fd: False\n"
BARE = "nft.Nft.probe = lambda self: frozenset(SETS | {Feature.BASE})\n"
BAREST = "nft.Nft.probe = lambda self: frozenset({Feature.BASE})\n"


@dataclass(frozen=True, slots=True)
class Rung:
    """A kernel that lacks something, and what comes of it."""

    patch: str = ""  # of the program, before it starts
    without_rights: bool = False  # with CAP_NET_ADMIN and CAP_NET_RAW alone
    local: str = "refused"  # what a socket of the host is told; "timed out": nothing
    forwarded: str = "refused"
    waits: tuple[str, ...] = ()  # whose first connection to a fresh name may lose its SYN
    unreachable: tuple[str, ...] = ()  # who reaches listed addresses only
    revokes: bool = True
    counts: tuple[str, ...] = ("local", "forwarded")

    @property
    def program(self) -> list[str]:
        if self.without_rights:
            rights = "-all,+net_admin,+net_raw"
            return ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", COMMAND]
        return [sys.executable, "-c", f"{LAUNCHER}{self.patch}\nsys.exit(cli.main())"]


BOTH = ("local", "forwarded")
RUNGS = {
    "before 5.8": Rung(f"REFUSED = {BEFORE_5_8!r}{REFUSE}"),
    "no cgroup hooks": Rung(f"REFUSED = '{BEFORE_5_8},stamp,sock_ops'{REFUSE}", waits=("local",)),
    "no tc": Rung(NO_TC, waits=BOTH),
    "no BPF": Rung(without_rights=True, waits=BOTH),
    "bare": Rung(BARE),
    "bare, before 5.8": Rung(f"{BARE}REFUSED = {BEFORE_5_8!r}{REFUSE}", local="timed out"),
    "bare, no BPF": Rung(
        f"{BARE}bpf.forbidden = lambda: 'forbidden'\n", local="timed out", forwarded="timed out", waits=BOTH, counts=()
    ),
    "barest": Rung(BAREST, revokes=False),
    "the smallest 5.4": Rung(
        f"{BAREST}{NO_TC}REFUSED = {BEFORE_5_8!r}{REFUSE}",
        local="timed out",
        forwarded="timed out",
        waits=("local",),
        unreachable=("forwarded",),
        revokes=False,
        counts=("local",),
    ),
}


@pytest.fixture(scope="module", params=RUNGS)
def rung(request: pytest.FixtureRequest) -> Rung:
    return RUNGS[request.param]


@pytest.fixture(scope="module")
def daemon(any_enforcer: Enforcer, lab: Lab, rung: Rung) -> Iterator[Enforcer]:
    """The daemon on this rung, in place of the lab's own."""
    any_enforcer.leave()
    enforcer = Enforcer(lab, "host", lab.host, rung.program)
    enforcer.start(policy(host="strict"))
    yield enforcer
    enforcer.leave()


def agents(lab: Lab) -> dict[str, Agent]:
    return {"local": lab.host, "forwarded": lab.ct}


def assert_refused(outcome: Outcome, told: str) -> None:
    assert outcome.verdict == told, outcome
    assert told == "timed out" or outcome.seconds < SECOND_SYN


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("where", BOTH)
def test_fresh_name_is_reached(
    daemon: Enforcer, lab: Lab, rung: Rung, fresh: FreshNames, where: str, family: int
) -> None:
    for name in fresh.take(2):
        outcome = agents(lab)[where].connect(name, 443, family, timeout=SECOND_SYN if where in rung.waits else AT_ONCE)
        assert outcome.reached == (where not in rung.unreachable), outcome


@pytest.mark.parametrize("address", [EVIL_ADDRESS, EVIL_ADDRESS6])
@pytest.mark.parametrize("where", BOTH)
def test_other_address_is_refused_and_counted(daemon: Enforcer, lab: Lab, rung: Rung, where: str, address: str) -> None:
    before = daemon.total("enforcer_refused_connections_total")
    told = rung.local if where == "local" else rung.forwarded
    assert_refused(agents(lab)[where].attempt(address, timeout=PATIENCE), told)
    if where in rung.counts:
        poll("it to be counted", lambda: daemon.total("enforcer_refused_connections_total") > before)


def test_forged_answer_teaches_nothing(daemon: Enforcer, lab: Lab, rung: Rung) -> None:
    address = "198.18.88.77"
    for transaction_id in range(20):
        for sender, destination in ((lab.net, "192.0.2.2"), (lab.net, CT_ADDRESS), (lab.ct, "192.0.2.2")):
            sender.call(
                "forge",
                reply_within=5,
                source=RESOLVER,
                destination=destination,
                source_port=53,
                destination_port=50_001,
                transaction_id=transaction_id,
                name="x.fresh.allowed.test",
                address=address,
            )
    assert_refused(lab.ct.attempt(address, timeout=PATIENCE), rung.forwarded)
    assert_refused(lab.host.attempt(address, timeout=PATIENCE), rung.local)
    assert address not in {entry for entry, _ in daemon.permitted()}


def test_reload_adds_and_revokes(daemon: Enforcer, lab: Lab, rung: Rung) -> None:
    told = rung.local
    assert_refused(lab.host.connect("later.allowed.test", 5000, timeout=PATIENCE), told)
    more = policy(host="strict", more=registry("later", "later.allowed.test", ports=(5000,)))
    assert daemon.reload(more) == "ok"
    assert lab.host.connect("later.allowed.test", 5000, timeout=SECOND_SYN).reached
    lab.host.call("hold", key="revoked", name="later.allowed.test", port=5000)
    assert daemon.reload(policy(host="strict")) == "ok"
    assert_refused(lab.host.connect("later.allowed.test", 5000, timeout=PATIENCE), told)
    assert lab.host.talk("revoked").reached != rung.revokes


def test_killed_daemon_leaves_refusing_and_its_successor_goes_on(
    daemon: Enforcer, lab: Lab, rung: Rung, fresh: FreshNames
) -> None:
    lab.host.call("probe_start", key="evil", address=EVIL_ADDRESS, port=443, timeout=PATIENCE)
    daemon.stop(signal.SIGKILL)
    told = {"local": rung.local, "forwarded": rung.forwarded}
    for where, agent in agents(lab).items():
        assert_refused(agent.attempt(EVIL_ADDRESS, timeout=PATIENCE), told[where])
    daemon.start(policy(host="strict"))
    assert lab.host.connect(fresh.take(1)[0], 443, timeout=SECOND_SYN).reached
    assert lab.host.call("probe_stop", key="evil")["verdicts"].keys().isdisjoint({"reached", "unanswered"})


def test_status_names_what_is_missing(daemon: Enforcer, rung: Rung) -> None:
    assert daemon.status()["capabilities"]["shortfalls"]


def test_removal_leaves_everything_reachable(daemon: Enforcer, lab: Lab) -> None:
    daemon.stop()
    daemon.remove()
    for agent in agents(lab).values():
        assert agent.attempt(EVIL_ADDRESS).reached
    daemon.start(policy(host="strict"))
