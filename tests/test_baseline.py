"""Before the daemon: what the baseline refuses and lets through, with real packets in namespaces of our own."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from enforcer import baseline, control, nft
from enforcer.kernel_abi import DEFAULT_MARKS, MarkedScope, Marks
from enforcer.policy import Policy, PolicyError, parse
from enforcer.ruleset import TABLE, Element, render_elements, render_ruleset
from tests.namespaces import inside, ip, new_namespace, path_of, run

pytestmark = pytest.mark.root

UNLISTED, LISTED, PROXY = "198.51.100.20", "198.51.100.30", "198.51.100.40"
TEXT = f"""
[scope]
{{scopes}}
[[registry]]
name = "corp"
hosts = ["registry.corp.example"]
addresses = ["{LISTED}"]
[[proxy]]
name = "proxy"
addresses = ["{PROXY}"]
ports = [443]
"""
RIGHT = parse(TEXT.format(scopes=""), "policy")
OBSERVING = parse('mode = "observe"\n', "policy")
EVERYTHING_OFF = parse(TEXT.format(scopes='containers = "off"\nengines = "off"\nhost = "off"'), "policy")


def wrong() -> Policy:
    return parse("registry = 1", "policy")


class Host:
    """A host with an uplink to whom everything is local."""

    def __init__(self, namespace: int, run_dir: Path) -> None:
        self.namespace = namespace
        self.run_dir = run_dir

    def lay(self, policy: Policy) -> str:
        with inside(self.namespace):
            return baseline.lay(self.run_dir, lambda: policy)

    def reaches(self, address: str, port: int = 443, mark: int = 0) -> bool:
        with inside(self.namespace), socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark.to_bytes(4, sys.byteorder))
            client.settimeout(2)
            try:
                client.connect((address, port))
            except ConnectionRefusedError:
                return False
            return True


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with new_namespace() as world, new_namespace() as namespace, contextlib.ExitStack() as stack:
        with inside(world):
            ip(f"link add near type veth peer name far netns {path_of(namespace)}; link set near up")
            ip("addr add 192.0.2.1/30 dev near; route add local 198.51.100.0/24 dev lo")
            servers = [stack.enter_context(socket.create_server(("", port))) for port in (443, 5000, 8443)]
        for server in servers:
            threading.Thread(target=_accept, args=(server,), daemon=True).start()
        with inside(namespace):
            ip("addr add 192.0.2.2/30 dev far; link set far up; route add default via 192.0.2.1")
        yield Host(namespace, tmp_path / "run")


def _accept(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()


def test_only_what_is_listed_by_address_passes_whoever_asks(host: Host) -> None:
    assert host.reaches(UNLISTED)
    assert "refuses what policy does not list by address" in host.lay(RIGHT)
    for scope in MarkedScope:
        # Nobody sets marks yet, so they say nothing: neither whose a socket is, nor that its address was learned.
        assert not host.reaches(UNLISTED, mark=DEFAULT_MARKS.of(scope) | DEFAULT_MARKS.vouched)
        assert host.reaches(LISTED, mark=DEFAULT_MARKS.of(scope))
    assert not host.reaches(UNLISTED, 5000)
    assert not host.reaches(PROXY)  # what it is asked for is read when the daemon is there
    assert host.reaches(UNLISTED, 8443)  # no registry port


def test_policy_that_was_put_right_may_have_any_mask(host: Host) -> None:
    with inside(host.namespace), pytest.raises(PolicyError):
        baseline.lay(host.run_dir, wrong)
    with inside(host.namespace), nft.Nft() as firewall:
        assert firewall.marks() is None  # so the daemon does not compare it with its own
        masked = replace(RIGHT, marks=Marks(0x700))
        firewall.apply(render_ruleset(masked, replace(baseline.CAPABILITIES, learning=True), internal=()))
        assert firewall.marks() == masked.marks


def test_what_observes_does_so_from_the_beginning(host: Host) -> None:
    assert "observes" in host.lay(OBSERVING)
    assert host.reaches(UNLISTED)


def test_policy_that_judges_nobody_refuses_nobody(host: Host) -> None:
    host.lay(EVERYTHING_OFF)
    assert host.reaches(UNLISTED)


def test_policy_that_cannot_be_used_has_everything_refused_and_is_said(host: Host) -> None:
    with inside(host.namespace), pytest.raises(PolicyError, match=r"^policy:1: "):
        baseline.lay(host.run_dir, wrong)
    for address in (UNLISTED, LISTED):
        assert not host.reaches(address)
        assert not host.reaches(address, 5000)
    assert host.reaches(UNLISTED, 8443)


def test_table_that_is_there_stays_as_it_is(host: Host) -> None:
    host.lay(RIGHT)
    with inside(host.namespace), nft.Nft() as firewall:
        firewall.apply(render_elements([Element(IPv4Address(UNLISTED), 443, 300)], []))
    assert "stays" in host.lay(EVERYTHING_OFF)
    assert host.reaches(UNLISTED)  # learned
    assert not host.reaches(UNLISTED, 5000)
    with inside(host.namespace):
        assert "it stays" in baseline.lay(host.run_dir, wrong)  # no reason to take away what is in force
    assert host.reaches(UNLISTED)


def test_table_without_its_chains_is_none(host: Host) -> None:
    with inside(host.namespace):
        assert run(f"nft add table inet {TABLE}").returncode == 0
    host.lay(RIGHT)
    assert not host.reaches(UNLISTED)


def test_running_daemon_is_left_alone(host: Host) -> None:
    with inside(host.namespace), control.hold(host.run_dir):
        assert f"process {os.getpid()} already enforces" in host.lay(RIGHT)
    assert host.reaches(UNLISTED)


def test_kernel_is_asked_for_nothing_but_nftables(host: Host) -> None:
    """CAP_NET_ADMIN is all that the unit leaves it."""
    (host.run_dir.parent / "policy.toml").write_text(TEXT.format(scopes=""))
    with inside(host.namespace):
        done = run(
            "setpriv --bounding-set -all,+net_admin --inh-caps -all .venv/bin/registry-enforcer baseline "
            f"--run-dir {host.run_dir} --policy {host.run_dir.parent}/policy.toml"
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert not host.reaches(UNLISTED)
