"""Beside other people's firewalls: whatever docker, podman, firewalld, ufw and tables of others do, what is not listed
stays refused meanwhile, what is listed is reached again afterwards, and neither side harms the other's rules.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator

import pytest

from enforcer.audit_record import Drifted
from enforcer.redirects import FIRST_WAIT_SECONDS
from enforcer.ruleset import TABLE
from tests.lab.clients import Clients
from tests.lab.enforcer import Enforcer, policy
from tests.lab.firewalls import Firewalls
from tests.lab.internet import EVIL_ADDRESS, EVIL_ADDRESS6, REPOSITORY
from tests.lab.lab import Lab, poll
from tests.lab.test_drift import FLUSH_CONNTRACK, of_root, repairs, rules
from tests.lab.test_end_to_end import assert_reached, assert_refused

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(180)]

ALLOWED, UNLISTED = "registry.allowed.test", "evil.test"
_TOLD = "403 Forbidden"  # by the responder, as the lab's agents see it


@pytest.fixture(scope="module")
def firewalls(lab: Lab, clients: Clients) -> Iterator[Firewalls]:
    """firewalld, ufw and netavark, not running."""
    with Firewalls(lab) as firewalls:
        yield firewalls
    clients.restart_docker()  # firewalld has taken docker's rules along


@pytest.fixture
def watched(enforcer: Enforcer, lab: Lab) -> Iterator[Enforcer]:
    """An enforcer whose table must be whole at the end, while containers and an engine try without pause to get out.

    Others may refuse them, too, in ways of their own; nobody may let them through.
    """
    whole = rules(lab)
    assert_reached(lab.ct.connect(ALLOWED))
    tried = (
        (lab.agent("ct"), EVIL_ADDRESS),
        (lab.agent("ct"), EVIL_ADDRESS6),
        (lab.agent("host", comm="skopeo"), EVIL_ADDRESS),
    )
    for prober, address in tried:
        prober.call("probe_start", key="p", address=address, port=443, timeout=0.5)
    yield enforcer
    stopped = [prober.call("probe_stop", key="p")["verdicts"] for prober, _ in tried]  # whatever they have met
    for verdicts in stopped:
        assert "reached" not in verdicts
        assert verdicts["refused"] > 0
    assert rules(lab) == whole
    for agent in (lab.ct, lab.engine):
        assert_reached(agent.connect(ALLOWED))
        assert_refused(agent.connect(UNLISTED))
    assert "cannot be put back" not in enforcer.log


def others(lab: Lab) -> str:
    """The rules of everybody else."""
    listed = lab.run("host", ["nft", "--stateless", "list", "ruleset"]).stdout
    return re.sub(rf"table inet {TABLE} \{{\n.*?\n\}}\n", "", listed, flags=re.DOTALL)


def drifts(enforcer: Enforcer) -> dict[Drifted, float]:
    """How often what of ours was put back."""
    return {what: repairs(enforcer, what) for what in Drifted}


# --- docker, with iptables-nft ---------------------------------------------------------------------------------------
def on_dockers_bridge(clients: Clients) -> None:
    """Containers there reach what is listed and nothing else."""
    assert_reached(clients.in_container("bridge", ALLOWED, 443))
    assert_refused(clients.in_container("bridge", UNLISTED, 443))


def test_docker_restarts_and_its_rules_are_flushed(watched: Enforcer, lab: Lab, clients: Clients) -> None:
    before = drifts(watched)
    for command in ("iptables -F", "iptables -t nat -F", "ip6tables -F", "iptables -P FORWARD DROP"):
        of_root(lab, *command.split())
        assert_refused(lab.engine.connect(UNLISTED))
    clients.restart_docker()
    of_root(lab, "iptables", "-P", "FORWARD", "ACCEPT")
    for pull in (clients.docker_pull, clients.podman_pull):
        assert_reached(pull(ALLOWED))
        assert_refused(pull(UNLISTED))
    on_dockers_bridge(clients)
    assert drifts(watched) == before


def test_what_iptables_drops_of_the_redirected_is_reset(watched: Enforcer, lab: Lab) -> None:
    assert lab.ct.attempt(EVIL_ADDRESS).message == _TOLD
    of_root(lab, "iptables", "-A", "INPUT", "!", "-i", "br-ct", "-j", "ACCEPT")
    of_root(lab, "iptables", "-P", "INPUT", "DROP")
    try:
        poll("resets", lambda: watched.status()["responder"]["answers"] == ["local"], 3)
        outcome = lab.ct.attempt(EVIL_ADDRESS)
        assert_refused(outcome)
        assert outcome.message != _TOLD
        assert lab.engine.attempt(EVIL_ADDRESS).message == _TOLD
        translated = "-p tcp --dport 942 -m conntrack --ctstate DNAT"
        of_root(lab, *f"iptables -I INPUT {translated} -j ACCEPT".split())
        assert watched.reload(watched.policy) == "ok"
        assert lab.ct.attempt(EVIL_ADDRESS).message == _TOLD
        assert lab.ct.attempt("10.77.0.1", 942, timeout=0.5).verdict == "timed out"  # not translated, so not let in
    finally:
        of_root(lab, "iptables", "-P", "INPUT", "ACCEPT")
        of_root(lab, "iptables", "-F", "INPUT")


# --- firewalld -------------------------------------------------------------------------------------------------------
def test_firewalld_starts_reloads_and_stops(watched: Enforcer, lab: Lab, firewalls: Firewalls) -> None:
    before = drifts(watched)
    with firewalls.firewalld():
        firewalls.do("firewall-cmd", "--permanent", "--zone=trusted", "--change-interface=br-ct")
        for reload in ("--reload", "--complete-reload"):
            firewalls.do("firewall-cmd", reload)
            assert_reached(lab.ct.connect(ALLOWED))
            assert_refused(lab.ct.attempt(EVIL_ADDRESS))
        assert watched.reload(watched.policy) == "ok"  # while it loaded its rules, it has dropped what was redirected
        # It drops all that enters, but for what was translated.
        firewalls.do("firewall-cmd", "--zone=drop", "--change-interface=br-ct")
        assert lab.ct.attempt("10.77.0.1", 22, timeout=0.5).verdict == "timed out"
        assert lab.ct.attempt(EVIL_ADDRESS).message == _TOLD
        assert watched.status()["responder"]["answers"] == ["forwarded", "local"]
    assert watched.reload(watched.policy) == "ok"
    assert drifts(watched) == before


def test_docker_beside_firewalld(watched: Enforcer, lab: Lab, firewalls: Firewalls, clients: Clients) -> None:
    with firewalls.firewalld():
        clients.restart_docker()  # so that it finds it
        assert "docker0" in firewalls.do("firewall-cmd", "--get-active-zones")
        firewalls.do("firewall-cmd", "--reload")
        poll("docker's rules", lambda: "DOCKER" in others(lab))
        on_dockers_bridge(clients)
    assert "DOCKER" not in others(lab)  # theirs to settle: docker is to be restarted
    assert watched.reload(watched.policy) == "ok"


# --- ufw -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def ufw(firewalls: Firewalls, lab: Lab) -> Iterator[Firewalls]:
    """ufw, which lets the host's containers out; disabled afterwards, and without the chains that it leaves."""
    firewalls.do("ufw", "default", "allow", "routed")
    yield firewalls
    firewalls.do("ufw", "--force", "disable")
    for version in ("", "6"):
        of_root(lab, "sh", "-c", f"ip{version}tables-save | grep -v ufw | ip{version}tables-restore")


def test_ufw_is_enabled_reloaded_and_disabled(watched: Enforcer, lab: Lab, ufw: Firewalls) -> None:
    before = drifts(watched)
    ufw.do("ufw", "--force", "enable")
    poll("resets", lambda: watched.status()["responder"]["answers"] == ["local"], 3)
    assert_refused(lab.ct.attempt(EVIL_ADDRESS))
    assert_reached(lab.ct.connect(ALLOWED))
    ufw.do("ufw", "allow", "942/tcp")  # only what was redirected gets there
    poll("words again", lambda: lab.ct.attempt(EVIL_ADDRESS).message == _TOLD, 2 * FIRST_WAIT_SECONDS)
    ufw.do("ufw", "reload")
    assert_reached(lab.ct.connect(ALLOWED))
    ufw.do("ufw", "--force", "disable")
    assert watched.reload(watched.policy) == "ok"
    assert drifts(watched) == before


# --- podman ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def netavark_container(clients: Clients, lab: Lab) -> Iterator[list[str]]:
    """A container of podman on a bridge that netavark has made; the value is what runs podman."""
    config = lab.directory / "containers.conf"
    config.write_text('[network]\nnetwork_backend = "netavark"\n[engine]\nruntime = "runc"\n')
    podman = ["env", f"CONTAINERS_CONF={config}", *clients.podman]
    podman[podman.index("--root") + 1] += "-netavark"  # it remembers with which backend it was made
    options = ["--cgroup-parent", f"/{lab.name}/host/libpod_parent", "--ulimit", "nofile=20000:20000",
               "--ulimit", "nproc=1024:1024"]  # fmt: skip
    image = f"{ALLOWED}/{REPOSITORY}"
    of_root(lab, *podman, "run", "--detach", "--name", "client", *options, image, "sleep", "600")
    try:
        yield podman
    finally:
        of_root(lab, *podman, "rm", "--force", "--time", "0", "client")


def test_podmans_networks_are_loaded_again(watched: Enforcer, lab: Lab, clients: Clients, firewalls: Firewalls) -> None:
    before = drifts(watched)
    with netavark_container(clients, lab) as podman:
        assert "NETAVARK" in others(lab)
        for _ in range(2):
            inside = [*podman, "exec", "client"]
            assert_reached(clients.request(inside, ALLOWED, 443))
            assert_refused(clients.request(inside, UNLISTED, 443))
            of_root(lab, *podman, "network", "reload", "--all")
    assert drifts(watched) == before


# --- tables of anybody -----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def other_table(lab: Lab, verdict: str, *hooks: str) -> Iterator[None]:
    """A table that says `verdict` to every packet, before anybody else."""
    chains = (f"chain {hook} {{ type filter hook {hook} priority -400; {verdict}; }}\n" for hook in hooks)
    of_root(lab, "nft", "-f", "-", text=f"table inet first {{\n{''.join(chains)}}}\n")
    try:
        yield
    finally:
        of_root(lab, "nft", "delete", "table", "inet", "first")


@pytest.mark.parametrize(
    ("verdict", "hooks"),
    [("accept", ("prerouting", "forward", "output", "postrouting")), ("notrack", ("prerouting", "output"))],
)
def test_table_that_comes_first_opens_nothing(
    watched: Enforcer, lab: Lab, verdict: str, hooks: tuple[str, ...]
) -> None:
    with other_table(lab, verdict, *hooks):
        for agent in (lab.ct, lab.engine):
            assert_refused(agent.attempt(EVIL_ADDRESS))
            assert_reached(agent.connect(ALLOWED))


def test_connection_tracking_is_flushed_under_load(watched: Enforcer, lab: Lab) -> None:
    flush = f"for i in $(seq 10); do {sys.executable} -c '{FLUSH_CONNTRACK}' || exit 1; done"
    flushing = lab.spawn("host", ["sh", "-c", flush], "flushing")
    while flushing.poll() is None:
        for agent in (lab.ct, lab.engine):
            agent.call("hold", key="pull", name=ALLOWED, port=443)
            assert_reached(agent.talk("pull"))
    assert flushing.returncode == 0


# --- ours does not touch theirs --------------------------------------------------------------------------------------
def test_rules_of_others_stay_as_they_are(enforcer: Enforcer, lab: Lab, clients: Clients, firewalls: Firewalls) -> None:
    with firewalls.firewalld(), other_table(lab, "accept", "forward", "output"):
        clients.restart_docker()  # else it would still be writing its rules again
        whole = others(lab)
        for table in ("table ip nat", "table ip filter", "table inet firewalld", "table inet first"):
            assert table in whole
        before = repairs(enforcer, Drifted.TABLE)
        of_root(lab, "nft", "delete", "table", "inet", TABLE)
        poll("repair", lambda: repairs(enforcer, Drifted.TABLE) > before)
        assert others(lab) == whole
        assert enforcer.reload(policy(host="strict")) == "ok"
        assert others(lab) == whole
        enforcer.stop()
        enforcer.remove()
        assert others(lab) == whole
        enforcer.start(policy())
        assert others(lab) == whole
