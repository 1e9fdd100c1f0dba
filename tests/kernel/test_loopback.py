"""Real sockets through real hooks: a stub resolver on lo, in a network namespace of its own.

What a socket sends over TCP lies in pages, not in the linear part of the packet: BPF_PROG_TEST_RUN does not show that.
"""

from __future__ import annotations

import json
import subprocess
import sys
from ipaddress import ip_address

import pytest

from enforcer import kernel_abi
from enforcer.kernel_abi import Outcome
from tests import dns_vectors
from tests.kernel.harness import Harness

pytestmark = pytest.mark.root

STUB = ip_address("127.0.0.53")
CHILD = """
import json, socket, subprocess, sys, threading

task = json.loads(sys.stdin.read())
address, query, answer = task["address"], bytes.fromhex(task["query"]), bytes.fromhex(task["answer"])
for command in task["commands"]:
    subprocess.run(command.split(), check=True)
kind = socket.SOCK_STREAM if task["tcp"] else socket.SOCK_DGRAM
with socket.socket(type=kind) as server, socket.socket(type=kind) as client:
    server.bind((address, 53))
    for sock in server, client:
        sock.settimeout(10)
    if task["tcp"]:
        server.listen()
    client.connect((address, 53))
    if task["tcp"]:
        accepted, _ = server.accept()
        with accepted:
            client.sendall(len(query).to_bytes(2, "big") + query)
            assert accepted.recv(4096) == len(query).to_bytes(2, "big") + query
            accepted.sendall(len(answer).to_bytes(2, "big") + answer)
            assert client.recv(4096)[2:] == answer
    else:
        client.sendall(query)
        received, peer = server.recvfrom(4096)
        assert received == query
        server.sendto(answer, peer)
        assert client.recv(4096) == answer
"""


@pytest.mark.parametrize("name", ["one-address", "cname-three-hops", "32-records"])
@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_answer_that_a_client_has_read_is_learned_already(harness: Harness, name: str, tcp: bool) -> None:
    vector = next(vector for vector in dns_vectors.load() if vector.name == name)
    programs = harness.state.report.generation / "programs"
    commands = [
        "ip link set lo up",
        "tc qdisc add dev lo clsact",
        f"tc filter add dev lo ingress bpf direct-action object-pinned {programs}/learn",
        f"tc filter add dev lo egress bpf direct-action object-pinned {programs}/track_query",
    ]
    resolvers = harness.state.maps["resolvers"]
    resolvers.update(kernel_abi.pack_address(STUB), b"\x01")
    before = harness.outcomes()
    try:
        subprocess.run(
            ["unshare", "--net", sys.executable, "-c", CHILD],
            input=json.dumps(
                {
                    "address": str(STUB),
                    "tcp": tcp,
                    "query": vector.query.hex(),
                    "answer": vector.answer.hex(),
                    "commands": commands,
                }
            ),
            text=True,
            check=True,
            timeout=60,
        )
    finally:
        resolvers.delete(kernel_abi.pack_address(STUB))
    assert harness.addresses() == vector.learned
    after = harness.outcomes()
    assert {outcome: after[outcome] - before[outcome] for outcome in Outcome if after[outcome] != before[outcome]} == {
        Outcome.LEARNED: 1
    }
    (event,) = harness.events()
    assert event.wire == vector.answer
    assert event.resolver == STUB
