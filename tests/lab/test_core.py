"""The main job with nothing but namespaces and agents: what must hold on every kernel (tests/vm runs it there too).

The order matters twice: the first test finds everything reachable without the enforcer, the last takes it out again.
"""

from __future__ import annotations

import signal

import pytest

from tests.lab.bench import FreshNames
from tests.lab.enforcer import Enforcer, policy, registry
from tests.lab.internet import ALLOWED_ADDRESS, EVIL_ADDRESS, EVIL_ADDRESS6
from tests.lab.lab import Agent, Lab, poll
from tests.lab.test_end_to_end import assert_reached, assert_refused, connected_at_once

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(180)]

WHO = ("container", "engine")
_ALLOWED = (
    ("registry.allowed.test", 443),
    ("layer7.blobs.allowed.test", 443),
    ("cname.allowed.test", 443),
    ("v6.allowed.test", 443),
    ("plain.allowed.test", 5000),
)
_REFUSED = (
    ("evil.test", 443),
    ("v6.evil.test", 443),
    ("evil.test", 5000),
    ("blobs.allowed.test", 443),
    ("registry.allowed.test", 5000),
)


def client(lab: Lab, who: str) -> Agent:
    """The agent that stands for a container or an engine."""
    return {"container": lab.ct, "engine": lab.engine}[who]


def test_without_enforcement_everything_is_reachable(lab: Lab, any_enforcer: Enforcer) -> None:
    assert not any_enforcer.running
    for agent in (lab.host, lab.engine, lab.ct):
        for address in (EVIL_ADDRESS, EVIL_ADDRESS6):
            outcome = agent.attempt(address)
            assert_reached(outcome)
            assert "no answer" not in outcome.message  # else probers could not tell who got out


@pytest.mark.parametrize("who", WHO)
def test_allowed_is_reached_at_once(enforcer: Enforcer, lab: Lab, fresh: FreshNames, who: str) -> None:
    for name, port in _ALLOWED:
        assert_reached(client(lab, who).connect(name, port))
    assert connected_at_once(client(lab, who), fresh.take(10))


@pytest.mark.parametrize("who", WHO)
def test_other_registries_are_refused_at_once(enforcer: Enforcer, lab: Lab, who: str) -> None:
    for name, port in _REFUSED:
        assert_refused(client(lab, who).connect(name, port))
    assert_refused(client(lab, who).attempt(EVIL_ADDRESS))
    assert_refused(client(lab, who).attempt(EVIL_ADDRESS6))


@pytest.mark.parametrize(("who", "scope"), [("container", "container"), ("engine", "engine")])
def test_refusal_is_counted_for_its_scope(enforcer: Enforcer, lab: Lab, who: str, scope: str) -> None:
    before = enforcer.total("enforcer_refused_connections_total", scope=scope, protocol="tcp")
    assert_refused(client(lab, who).attempt(EVIL_ADDRESS))
    assert enforcer.total("enforcer_refused_connections_total", scope=scope, protocol="tcp") == before + 1


def test_host_is_judged_only_in_scope(enforcer: Enforcer, lab: Lab) -> None:
    assert_reached(lab.host.attempt(EVIL_ADDRESS))
    enforcer.ensure(policy(host="strict"))
    assert_refused(lab.host.attempt(EVIL_ADDRESS))
    assert_reached(lab.host.connect("registry.allowed.test"))


@pytest.mark.parametrize("who", WHO)
def test_reload_adds_and_takes_away_a_registry(enforcer: Enforcer, lab: Lab, who: str) -> None:
    assert_refused(client(lab, who).connect("later.allowed.test"))
    assert enforcer.reload(policy(more=registry("later", "later.allowed.test"))) == "ok"
    assert_reached(client(lab, who).connect("later.allowed.test"))
    assert enforcer.reload(policy()) == "ok"
    assert_refused(client(lab, who).connect("later.allowed.test"))


@pytest.fixture
def killed(any_enforcer: Enforcer) -> Enforcer:
    """The enforcer, killed while it enforced the lab's policy."""
    if not any_enforcer.killed:
        any_enforcer.ensure(policy())
        any_enforcer.stop(signal.SIGKILL)
    return any_enforcer


@pytest.mark.parametrize("who", WHO)
def test_killed_daemon_leaves_learning_and_refusing(killed: Enforcer, lab: Lab, fresh: FreshNames, who: str) -> None:
    assert connected_at_once(client(lab, who), fresh.take(4))
    assert_refused(client(lab, who).attempt(EVIL_ADDRESS))


def test_successor_of_a_killed_daemon_takes_over_without_a_gap(killed: Enforcer, lab: Lab, fresh: FreshNames) -> None:
    assert_reached(lab.ct.connect("registry.allowed.test"))
    learned_meanwhile = lab.ct.call("resolve", name=fresh.take(1)[0], family=4)[0]

    probers = {"reached": (lab.agent("ct"), ALLOWED_ADDRESS), "refused": (lab.agent("ct"), EVIL_ADDRESS)}
    for prober, address in probers.values():
        prober.call("probe_start", key="p", address=address, port=443)
    killed.start(policy())
    met = {expected: prober.call("probe_stop", key="p")["verdicts"] for expected, (prober, _) in probers.items()}
    for expected, verdicts in met.items():
        # The server of an emulated machine may be slower than the prober is patient, while a daemon starts beside it.
        assert verdicts.keys() - {"unanswered"} == {expected}
    poll("adoption", lambda: (learned_meanwhile, 443) in killed.permitted())
    assert_refused(lab.ct.attempt(EVIL_ADDRESS))


def test_remove_leaves_nothing(enforcer: Enforcer, lab: Lab) -> None:
    assert enforcer.stop() == 0
    assert_refused(lab.ct.attempt(EVIL_ADDRESS))
    assert "removed" in enforcer.remove()
    for agent in (lab.ct, lab.engine):
        assert_reached(agent.attempt(EVIL_ADDRESS))
    assert "registry_enforcer" not in lab.run("host", ["nft", "list", "tables"]).stdout
    assert [path for path in (lab.bpffs / "host").rglob("*") if path.is_file()] == []
    every_filter = (
        'for i in /sys/class/net/*; do for at in ingress egress; do tc filter show dev "${i##*/}" $at; done; done'
    )
    assert lab.run("host", ["sh", "-ec", every_filter]).stdout == ""
    assert lab.engine.call("attempt", address=EVIL_ADDRESS, port=443, timeout=5)["mark"] == 0
    assert "nothing" in enforcer.remove()
