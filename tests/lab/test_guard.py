"""Names and addresses together: real clients and servers, one address behind which everything is.

Every address of the lab's internet is served by the same registry, as a CDN serves all of its customers; so whether a
name is reached says what the guard said, and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.lab.clients import Clients
from tests.lab.enforcer import Enforcer, policy, registry
from tests.lab.internet import ALLOWED_ADDRESS, EVIL_ADDRESS, EVIL_ADDRESS6
from tests.lab.lab import CT_ADDRESS, HOST_ADDRESS, Lab, poll
from tests.lab.test_attacks_marks import behind_a_macvlan

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(180)]

AT_ONCE = 2.0  # seconds; a client whose hello is dropped waits for ten and more
WHERE = ("ct", "host")


def curl(
    lab: Lab, where: str, name: str, address: str, *more: str, port: int = 443
) -> subprocess.CompletedProcess[str]:
    """A request to `address` for `name`, whatever DNS says."""
    scheme = "http" if port == 5000 else "https"
    at = f"[{address}]" if ":" in address else address
    return lab.run(where, ["curl", "-sS", "-k", "-m", "10", "--resolve", f"{name}:{port}:{at}", *more,
                           f"{scheme}://{name}:{port}/v2/"])  # fmt: skip


@pytest.fixture
def strict(enforcer: Enforcer, lab: Lab, clients: Clients) -> Enforcer:
    """Every scope is judged, and the registry's address was learned."""
    enforcer.ensure(policy(host="strict"))
    assert lab.ct.connect("registry.allowed.test").reached
    return enforcer


@pytest.mark.attack("an unlisted name at an allowed name's shared address")
@pytest.mark.parametrize("where", WHERE)
def test_shared_address_opens_the_allowed_names_only(strict: Enforcer, lab: Lab, where: str) -> None:
    before = strict.total("enforcer_guarded_connections_total", outcome="unlisted_name")
    allowed = curl(lab, where, "registry.allowed.test", ALLOWED_ADDRESS)
    assert (allowed.returncode, allowed.stdout) == (0, "{}"), allowed
    started = time.monotonic()
    refused = curl(lab, where, "evil.test", ALLOWED_ADDRESS)
    assert refused.returncode != 0
    assert "access denied" in refused.stdout, refused.stdout
    assert time.monotonic() - started < AT_ONCE
    assert strict.total("enforcer_guarded_connections_total", outcome="unlisted_name") == before + 1


@pytest.mark.attack("a hello of TLS 1.2, with a large key share, for an unlisted name")
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("more", [("--tls-max", "1.2"), ("--curves", "P-521:X25519"), ("--http1.1",)], ids=" ".join)
def test_every_kind_of_hello_is_read(strict: Enforcer, lab: Lab, where: str, more: tuple[str, ...]) -> None:
    assert curl(lab, where, "registry.allowed.test", ALLOWED_ADDRESS, *more).stdout == "{}"
    assert "access denied" in curl(lab, where, "evil.test", ALLOWED_ADDRESS, *more).stdout


@pytest.mark.attack("a hello without a server name")
@pytest.mark.parametrize("where", WHERE)
def test_hello_without_a_name_is_refused_unless_the_rule_says_so(strict: Enforcer, lab: Lab, where: str) -> None:
    client = ["curl", "-sS", "-k", "-m", "10", f"https://{ALLOWED_ADDRESS}/v2/"]
    assert "access denied" in lab.run(where, client).stdout
    lenient = registry("nameless", "registry.allowed.test").rstrip() + '\nverify = "address"\n'
    assert strict.reload(policy(host="strict", more=lenient)) == "ok"
    assert lab.ct.connect("registry.allowed.test").reached
    assert lab.run(where, client).stdout == "{}"
    assert curl(lab, where, "evil.test", ALLOWED_ADDRESS).stdout == "{}"
    assert strict.reload(policy(host="strict")) == "ok"
    assert "access denied" in lab.run(where, client).stdout


@pytest.mark.attack("another Host in plain HTTP")
@pytest.mark.parametrize("where", WHERE)
def test_plain_registry_is_judged_by_its_host(strict: Enforcer, lab: Lab, where: str) -> None:
    address = lab.ct.call("resolve", name="plain.allowed.test", family=4)[0]
    assert curl(lab, where, "plain.allowed.test", address, port=5000).stdout == "{}"
    refused = curl(lab, where, "evil.test", address, "-i", port=5000).stdout
    assert "403" in refused
    (error,) = json.loads(refused[refused.index("{") :])["errors"]
    assert error["code"] == "DENIED"
    assert "Lab does not allow this registry; ask platform@lab.test" in error["message"]


def test_refused_name_is_audited_with_its_container(strict: Enforcer, lab: Lab) -> None:
    curl(lab, "ct", "audited.evil.test", ALLOWED_ADDRESS)

    def recorded() -> list[dict[str, object]]:
        asked = strict.command("log", "--json", "-n", "200")
        return [record for record in map(json.loads, asked.splitlines()) if record["name"] == "audited.evil.test"]

    poll("the record", lambda: bool(recorded()))
    (record,) = recorded()
    assert record["kind"] == "refused"
    assert record["scope"] == "container"
    assert (record["reason"], record["name_source"]) == ("unlisted-name", "client")
    assert record["source"]["address"] == CT_ADDRESS  # type: ignore[index]


def test_connection_that_is_older_than_the_guard_stays_open(any_enforcer: Enforcer, lab: Lab) -> None:
    any_enforcer.leave()
    for agent in (lab.ct, lab.engine):
        agent.call("hold", key="old", name="registry.allowed.test", port=443)
    any_enforcer.start(policy(host="strict"))
    for agent in (lab.ct, lab.engine):
        assert agent.talk("old").reached


def test_reload_that_takes_a_name_away_ends_its_connections_at_a_shared_address(strict: Enforcer, lab: Lab) -> None:
    shared = ("dual.allowed.test", "registry.allowed.test")
    lab.ct.call("hold", key="kept", name="registry.allowed.test", port=443)
    assert strict.reload(policy(host="strict", corp=shared)) == "ok"
    assert lab.ct.talk("kept").reached


@pytest.fixture
def recognising(enforcer: Enforcer) -> Enforcer:
    enforcer.ensure(policy(host="registries"))
    return enforcer


def test_recognised_registries_are_refused_to_the_host_and_nothing_else_is(recognising: Enforcer, lab: Lab) -> None:
    assert "access denied" in curl(lab, "host", "ghcr.io", EVIL_ADDRESS).stdout
    assert "access denied" in curl(lab, "host", "quay.io", EVIL_ADDRESS6).stdout
    assert curl(lab, "host", "evil.test", EVIL_ADDRESS).stdout == "{}"
    plain = curl(lab, "host", "evil.test", EVIL_ADDRESS, "-i", port=5000).stdout
    assert "403" in plain  # /v2/ in plain HTTP
    assert curl(lab, "host", "registry.allowed.test", ALLOWED_ADDRESS).stdout == "{}"
    assert not lab.ct.attempt(EVIL_ADDRESS).reached


@pytest.mark.attack("another table's notrack, or its accept before ours")
@pytest.mark.parametrize("rule", ["notrack", "accept"])
def test_another_tables_earlier_verdict_opens_nothing(strict: Enforcer, lab: Lab, rule: str) -> None:
    chains = "".join(
        f"chain {hook} {{ type filter hook {hook} priority -300; policy accept; {rule}; }}\n"
        for hook in ("prerouting", "output")
    )
    added = lab.run("host", ["nft", f"table inet others {{ {chains} }}"])
    assert added.returncode == 0, added.stdout
    try:
        for agent in (lab.ct, lab.host):
            assert not agent.attempt(EVIL_ADDRESS).reached
            assert not agent.attempt(EVIL_ADDRESS6).reached
        assert "access denied" in curl(lab, "host", "evil.test", ALLOWED_ADDRESS).stdout
    finally:
        lab.run("host", ["nft", "delete", "table", "inet", "others"])
    assert lab.ct.connect("registry.allowed.test").reached


@pytest.mark.attack("a connection of a macvlan that is older than the daemon, or than the policy that refuses it")
@pytest.mark.parametrize("older_than", ["the daemon", "the policy"])
def test_open_connection_that_nftables_never_sees_is_ended(any_enforcer: Enforcer, lab: Lab, older_than: str) -> None:
    def ended() -> float:
        return any_enforcer.total("enforcer_guarded_connections_total", outcome="unknown")

    any_enforcer.leave()
    if older_than == "the policy":
        any_enforcer.start(policy().replace('containers = "strict"', 'containers = "off"'))
    with behind_a_macvlan(lab, "agent.py") as agent:
        agent.call("hold", key="open", name=EVIL_ADDRESS, port=5000)
        any_enforcer.ensure(policy())
        time.sleep(1)  # what is open is looked at beside everything else
        before = ended()
        assert not agent.talk("open").reached
        poll("its end", lambda: ended() > before, 15)  # by then it is sure not to be a refused client's


SERVING = """
import socket
served, _ = socket.create_server(("", 7000)).accept()
while said := served.recv(99):
    served.sendall(said.upper())
"""
ASKING = """
import socket, sys
s = socket.create_connection((sys.argv[1], 7000), 5, ("", int(sys.argv[2])))
for line in sys.stdin:
    s.sendall(line.encode())
    print(s.recv(99).decode(), end="", flush=True)
"""


@pytest.mark.parametrize(("enforced", "port"), [("from the beginning", 7443), ("later", 7444)])
def test_inbound_connection_from_a_registrys_port_is_answered(
    any_enforcer: Enforcer, lab: Lab, tmp_path: Path, enforced: str, port: int
) -> None:
    """What the host answers goes to a registry port of somebody to whom nothing leads; but it has not begun there."""
    strict = policy(host="strict").replace("[443, 5000]", f"[443, 5000, {port}]", 1)
    any_enforcer.leave()
    if enforced == "from the beginning":
        any_enforcer.start(strict)
    words = tmp_path / "words"
    os.mkfifo(words)
    log = f"asking {enforced}"
    serving = lab.spawn("host", ["/usr/bin/python3", "-I", "-c", SERVING], "serving")
    poll("the server", lambda: ":7000 " in lab.run("host", ["ss", "-Hltn"]).stdout)
    asking = lab.spawn("net", ["sh", "-c", f"exec python3 -I -c '{ASKING}' {HOST_ADDRESS} {port} < {words}"], log)
    with words.open("w", buffering=1) as said:
        said.write("one\n")
        poll("an answer", lambda: lab.log(log) == "ONE\n", 5)
        any_enforcer.ensure(strict)
        before = any_enforcer.total("enforcer_guarded_connections_total", outcome="held_up")
        said.write("two\n")
        poll("another answer", lambda: lab.log(log) == "ONE\nTWO\n", 5)
        for text in (strict.replace('host = "strict"', 'host = "off"'), strict):
            any_enforcer.ensure(text)
        time.sleep(1)  # what is open is looked at beside everything else
        said.write("three\n")
        poll("one more", lambda: lab.log(log) == "ONE\nTWO\nTHREE\n", 5)
    assert (asking.wait(10), serving.wait(10)) == (0, 0)
    assert any_enforcer.total("enforcer_guarded_connections_total", outcome="held_up") == before


def test_observe_mode_ends_nothing_and_counts(enforcer: Enforcer, lab: Lab) -> None:
    enforcer.ensure(policy(mode="observe", host="strict"))
    assert lab.ct.connect("registry.allowed.test").reached
    before = enforcer.total("enforcer_guarded_connections_total", outcome="unlisted_name")
    assert curl(lab, "ct", "evil.test", ALLOWED_ADDRESS).stdout == "{}"
    assert enforcer.total("enforcer_guarded_connections_total", outcome="unlisted_name") == before + 1
