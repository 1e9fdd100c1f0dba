"""What the programs cost: the verifier at load time, a packet at run time."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest

from enforcer import bpf, kernel_abi
from enforcer.kernel_abi import Protocol
from tests import dns_vectors
from tests.kernel import packets
from tests.kernel.harness import CLIENT_PORT, CLIENT_V4, HOOKS, RESOLVER_V4, Harness

pytestmark = pytest.mark.root

# Old verifiers prune less: half of the limit of 1,000,000 is left to them.
MOST_VERIFIED = {"learn": 500_000, "track_query": 250_000, "gate": 5_000, "guard": 400_000}
MOST_VERIFIED_HOOK = 3_000
RINGBUF = 27  # enum bpf_map_type; the build for kernels before 5.8 has none
MOST_NS = 100_000  # a packet: an order of magnitude over the dearest that was measured, for slow and busy machines


def test_every_program_is_accepted(state: bpf.KernelState) -> None:
    of_5_8 = {"setsockopt"} if state.maps["events"].type == RINGBUF else set()
    assert state.programs.keys() == {*HOOKS, *of_5_8, "learn", "track_query", "gate", "guard"}
    assert all(symbol.endswith(("_pidns", "_netns")) for symbol in state.report.refused)


def test_verified_instructions_leave_a_margin_for_old_kernels(state: bpf.KernelState) -> None:
    verified = {name: program.verified_instructions for name, program in state.programs.items()}
    if not any(verified.values()):
        pytest.skip("the kernel does not say how many instructions it verified (5.16)")
    print(state.report.loader.value, verified)
    for name, count in verified.items():
        assert 0 < count < MOST_VERIFIED.get(name, MOST_VERIFIED_HOOK), name


def median_ns(harness: Harness, program: str, frame: bytes, before: Callable[[], None]) -> float:
    durations = []
    for _ in range(500):
        before()
        durations.append(bpf.run_packet(harness.state.programs[program], frame).duration_ns)
    return statistics.median(durations)


def test_packet_costs_microseconds_at_most(harness: Harness) -> None:
    vectors = {vector.name: vector for vector in dns_vectors.load()}
    costs = {}

    def nothing() -> None:
        pass

    for name in "one-address", "cname-three-hops", "32-records", "wildcard-without-dot":
        vector = vectors[name]
        query = packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.UDP, packets.udp(CLIENT_PORT, 53, vector.query))
        answer = packets.frame(RESOLVER_V4, CLIENT_V4, Protocol.UDP, packets.udp(53, CLIENT_PORT, vector.answer))

        def ask(frame: bytes = query) -> None:
            harness.run("track_query", frame)

        def ask_and_forget(frame: bytes = query) -> None:
            ask(frame)
            for destination in harness.learned():
                harness.state.maps["learned"].delete(kernel_abi.pack_learned_key(*destination))
            list(harness.events())

        costs[f"{name}: query"] = median_ns(harness, "track_query", query, nothing)
        costs[f"{name}: answer"] = median_ns(harness, "learn", answer, ask_and_forget)
        costs[f"{name}: again"] = median_ns(harness, "learn", answer, ask)
    segment = packets.frame(CLIENT_V4, RESOLVER_V4, Protocol.TCP, packets.tcp(CLIENT_PORT, 443, bytes(1_000)))
    for program in "learn", "track_query", "gate":
        costs[f"{program}: other traffic"] = median_ns(harness, program, segment, nothing)
    print(harness.state.report.loader.value, costs)
    assert max(costs.values()) < MOST_NS
