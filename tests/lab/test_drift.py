"""Somebody else takes away, or changes, what enforces: seen within two seconds, put back, counted and audited, and
nothing gets out meanwhile, because the guard of the uplinks stands by itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import pytest

from enforcer.audit_record import Drifted
from enforcer.ruleset import TABLE
from tests.lab.bench import FreshNames
from tests.lab.enforcer import Enforcer
from tests.lab.internet import ALLOWED_ADDRESS, EVIL_ADDRESS
from tests.lab.lab import Lab, poll
from tests.lab.soak import come_outside, count_outside
from tests.lab.test_end_to_end import assert_reached, assert_refused, connected_at_once

pytestmark = [
    pytest.mark.root,
    pytest.mark.lab,
    pytest.mark.timeout(180),
    pytest.mark.usefixtures("host_as_before"),
]

SEEN_SECONDS = 2.0
_OURS = f"inet {TABLE}"
# What an attacker with root, a careless script or another firewall does -> one transaction of nft.
OF_THE_TABLE = {
    "nft flush ruleset": "flush ruleset",
    "the table deleted": f"delete table {_OURS}",
    "the table flushed": f"flush table {_OURS}",
    "one chain flushed": f"flush chain {_OURS} forward",
    "a rule inserted that accepts everything": f"insert rule {_OURS} judge_container accept",
    "a rule that accepts every engine": f"insert rule {_OURS} judge_engine accept",
    "learned addresses flushed": f"flush set {_OURS} learned4",
    "an address added": f"add element {_OURS} learned4 {{ {EVIL_ADDRESS} . 443 timeout 1h }}",
    "a set of another type in its place": (
        f"delete table {_OURS}\nadd table {_OURS}\nadd set {_OURS} learned4 {{ type ipv4_addr; }}"
    ),
}
FLUSH_CONNTRACK = (
    "import socket; from enforcer import nfnetlink as n;"
    "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, n.NETLINK_NETFILTER);"
    "s.send(n.request(1 << 8 | 2, n.ACK)); (code, *_), = [n.error_number(b) for _, _, b in n.messages(s.recv(4096))],;"
    "raise SystemExit(code)"
)


@pytest.fixture
def world(enforcer: Enforcer, lab: Lab) -> Iterator[Enforcer]:
    """An enforcer that has learned the allowed registry, while a container and an engine try another without pause."""
    assert_reached(lab.ct.connect("registry.allowed.test"))
    probers = [lab.agent("ct"), lab.agent("host", comm="skopeo")]
    for prober in probers:
        prober.call("probe_start", key="p", address=EVIL_ADDRESS, port=443)
    yield enforcer
    stopped = [prober.call("probe_stop", key="p")["verdicts"] for prober in probers]  # whatever they have met
    for verdicts in stopped:
        assert "refused" in verdicts
        # Who was being told no as the rules went hears nothing, for as long as he waits: that is not to have got out.
        assert verdicts.keys() <= {"refused", "unanswered"}


def repairs(enforcer: Enforcer, what: Drifted) -> float:
    return enforcer.total("enforcer_drift_repairs_total", what=what.value)


def repaired(enforcer: Enforcer, what: Drifted, before: float) -> None:
    """Wait for the repair; the deadline is the promise."""
    poll(f"repair of {what.value}", lambda: repairs(enforcer, what) > before, SEEN_SECONDS)


def rules(lab: Lab) -> str:
    """Our table but for what changes by itself."""
    listed = lab.run("host", ["nft", "--stateless", "--terse", "list", "table", "inet", TABLE])
    assert listed.returncode == 0, listed.stdout
    return listed.stdout


def of_root(lab: Lab, *argv: str, text: str = "") -> None:
    done = lab.run("host", argv, text=text)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("what", OF_THE_TABLE)
def test_table_is_written_again(world: Enforcer, lab: Lab, what: str) -> None:
    whole, before = rules(lab), repairs(world, Drifted.TABLE)
    of_root(lab, "nft", "-f", "-", text=OF_THE_TABLE[what])
    repaired(world, Drifted.TABLE, before)
    assert rules(lab) == whole
    assert_reached(lab.ct.attempt(ALLOWED_ADDRESS))  # held, without a DNS answer
    assert_refused(lab.ct.attempt(EVIL_ADDRESS))
    assert "another program changed the nftables table" in world.log
    audited = world.command("log", "--json")
    assert any(json.loads(line)["kind"] == "drift" for line in audited.splitlines())


def test_repair_takes_milliseconds(world: Enforcer, lab: Lab) -> None:
    """Seen by the kernel's notice: looking every second would take longer."""
    whole = rules(lab)
    asked = f"nft list chain {_OURS} refuse >/dev/null 2>&1"
    script = f"nft flush ruleset; for i in $(seq 100); do {asked} && exit 0; done; exit 1"
    started = time.monotonic()
    of_root(lab, "sh", "-c", script)
    assert time.monotonic() - started < 0.9
    poll("the whole table", lambda: rules(lab) == whole)


def test_what_others_do_to_their_own_tables_is_no_drift(world: Enforcer, lab: Lab) -> None:
    before = {what: repairs(world, what) for what in Drifted}
    of_root(lab, "nft", "-f", "-", text="table inet other { chain c { }\n set s { type ipv4_addr; }\n }\n" * 50)
    of_root(lab, "nft", "-f", "-", text=f"table ip {TABLE} {{ chain c {{ }}\n }}\ndelete table ip {TABLE}")
    of_root(lab, "nft", "delete", "table", "inet", "other")
    assert_reached(lab.ct.connect("registry.allowed.test"))  # a change of ours
    time.sleep(SEEN_SECONDS)
    assert {what: repairs(world, what) for what in Drifted} == before


def test_nothing_of_refused_clients_leaves_while_the_table_is_flushed(world: Enforcer, lab: Lab) -> None:
    """With the table goes the translation to the responder: what it is telling no would go on to where it wanted."""
    probers = lab.agent("ct"), lab.agent("host", comm="skopeo")
    count_outside(lab)
    held_up = {"outcome": "held_up"}
    before = world.total("enforcer_guarded_connections_total", **held_up)
    for prober in probers:
        prober.call("probe_start", key="p", address=EVIL_ADDRESS, port=443, timeout=0.5, pause=0.001)
    until = time.monotonic() + 30
    while world.total("enforcer_guarded_connections_total", **held_up) < before + 3 and time.monotonic() < until:
        of_root(lab, "nft", "flush", "ruleset")
        time.sleep(0.2)
    verdicts = [prober.call("probe_stop", key="p")["verdicts"] for prober in probers]
    assert all("reached" not in met and met["refused"] > 0 for met in verdicts)
    assert world.total("enforcer_guarded_connections_total", **held_up) >= before + 3  # else nothing was tried
    assert not any(come_outside(lab).values())


def test_learning_goes_on_while_the_table_is_flushed_again_and_again(
    world: Enforcer, lab: Lab, fresh: FreshNames
) -> None:
    before = repairs(world, Drifted.TABLE)
    flushing = lab.spawn("host", ["sh", "-c", "for i in $(seq 60); do nft flush ruleset; sleep 0.05; done"], "flushing")
    while flushing.poll() is None:
        assert connected_at_once(lab.ct, fresh.take(1))
    assert flushing.returncode == 0
    assert repairs(world, Drifted.TABLE) > before + 10
    assert_refused(lab.ct.attempt(EVIL_ADDRESS))


@pytest.mark.parametrize(
    "command",
    [
        "tc qdisc del dev up0 clsact",
        "tc filter del dev up0 egress",
        "tc filter del dev up0 ingress",
        "tc qdisc del dev br-ct clsact",
    ],
)
def test_tc_filters_are_attached_again(enforcer: Enforcer, lab: Lab, fresh: FreshNames, command: str) -> None:
    def attached() -> dict[str, tuple[str, bool]]:
        return {entry["name"]: (entry["program"], entry["guarded"]) for entry in enforcer.status()["interfaces"]}

    whole, before = attached(), repairs(enforcer, Drifted.TRAFFIC_CONTROL)
    of_root(lab, *command.split())
    repaired(enforcer, Drifted.TRAFFIC_CONTROL, before)
    assert attached() == whole
    listed = lab.run("host", ["sh", "-c", "for at in ingress egress; do tc filter show dev up0 $at; done"]).stdout
    assert all(program in listed for program in ("learn#", "track_query#", "guard#"))
    assert connected_at_once(lab.ct, fresh.take(2))
    for agent in (lab.ct, lab.engine):
        assert_refused(agent.attempt(EVIL_ADDRESS))


def test_cgroup_programs_are_attached_again(world: Enforcer, lab: Lab, fresh: FreshNames) -> None:
    """Unlinking the link's pin detaches it some milliseconds later; where there are no links it takes the pin only."""
    before = repairs(world, Drifted.CGROUP)
    of_root(lab, "sh", "-c", f"rm -r {lab.bpffs}/host/links")
    repaired(world, Drifted.CGROUP, before)
    assert connected_at_once(lab.engine, fresh.take(2))
    assert_refused(lab.engine.attempt(EVIL_ADDRESS))


def test_pins_are_made_again_and_the_next_daemon_adopts_them(world: Enforcer, lab: Lab) -> None:
    def pins() -> set[str]:
        return {str(path.relative_to(lab.bpffs)) for path in (lab.bpffs / "host").glob("generation-*/*/*")}

    whole, before = pins(), repairs(world, Drifted.PINS)
    of_root(lab, "sh", "-c", f"rm -r {lab.bpffs}/host/generation-*/maps; rm {lab.bpffs}/host/generation-*/report")
    repaired(world, Drifted.PINS, before)
    assert pins() == whole
    before = repairs(world, Drifted.PINS)
    one = f"{lab.bpffs}/host/generation-*/maps/"
    of_root(lab, "sh", "-c", f"rm {one}names && ln $(echo {one}ranges) $(dirname {one}ranges)/names || exit 0")
    repaired(world, Drifted.PINS, before)
    assert pins() == whole
    world.stop()
    world.start(world.policy)
    assert "not adopted" not in world.log


def test_open_connections_survive_a_flush_of_connection_tracking(enforcer: Enforcer, lab: Lab) -> None:
    lab.ct.call("hold", key="pull", name="registry.allowed.test", port=443)
    of_root(lab, sys.executable, "-c", FLUSH_CONNTRACK)
    assert_reached(lab.ct.talk("pull"))
    assert_refused(lab.ct.attempt(EVIL_ADDRESS))
