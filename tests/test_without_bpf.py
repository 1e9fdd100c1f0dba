"""Maps in this process behave as the kernel's do: the same claims against both, where the kernel lets us."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer import bpf, kernel_abi
from enforcer.bpf import BpfError, BpfMap
from enforcer.kernel_abi import MAX_RESOLVERS, Outcome
from enforcer.without_bpf import Full, MemoryMap, MemoryState, NoLoader
from tests.kernel.conftest import loaded

Map = BpfMap | MemoryMap


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bpf.KernelState]:
    with loaded("libbpf", tmp_path_factory.mktemp("without_bpf")) as state:
        yield state


@pytest.fixture(params=["memory", pytest.param("kernel", marks=pytest.mark.root)])
def state(request: pytest.FixtureRequest) -> Iterator[bpf.KernelState | MemoryState]:
    found: bpf.KernelState | MemoryState
    if request.param == "memory":
        with MemoryState("a test") as memory:
            yield memory
        return
    found = request.getfixturevalue("kernel")
    for name in "resolvers", "learned", "cgroups", "names":
        found.maps[name].clear()
    yield found


def resolver(number: int) -> bytes:
    return number.to_bytes(16, "big")


def contents(opened: Map) -> dict[bytes, bytes]:
    return dict(opened.items())


@pytest.mark.root
def test_every_map_that_user_space_uses_is_there_with_the_layout_of_the_kernels(kernel: bpf.KernelState) -> None:
    for name, memory in MemoryState("a test").maps.items():
        real = kernel.maps[name]
        assert (memory.key_size, memory.value_size) == (real.key_size, real.value_size), name
        assert memory.max_entries == real.max_entries, name
    of_bpf_alone = {"queries", "events", "scratches", "registry_ports", "listed", "refusals"}
    of_the_guard = {"flows", "hellos", "strays", "own_links", "uplinks", "catalogue", "answers", "guarded", "endings"}
    assert kernel.maps.keys() - MemoryState("a test").maps.keys() == of_bpf_alone | of_the_guard


def test_what_is_written_is_read_until_it_is_deleted(state: bpf.KernelState | MemoryState) -> None:
    opened: Map = state.maps["resolvers"]
    assert opened.lookup(resolver(1)) is None
    opened.update(resolver(1), b"\1")
    opened.update_many([(resolver(1), b"\2"), (resolver(2), b"\3")])
    assert opened.lookup(resolver(1)) == b"\2"
    assert contents(opened) == {resolver(1): b"\2", resolver(2): b"\3"}
    assert opened.delete(resolver(1))
    assert not opened.delete(resolver(1))
    opened.replace_all({resolver(3): b"\4"})
    assert contents(opened) == {resolver(3): b"\4"}
    opened.clear()
    assert contents(opened) == {}


def test_full_map_refuses_and_stays_as_it_is(state: bpf.KernelState | MemoryState) -> None:
    opened: Map = state.maps["resolvers"]
    full = {resolver(number): b"\1" for number in range(MAX_RESOLVERS)}
    opened.replace_all(full)
    with pytest.raises(BpfError, match="full"):
        opened.update(resolver(MAX_RESOLVERS), b"\1")
    with pytest.raises(BpfError, match="holds 64"):
        opened.replace_all(full | {resolver(MAX_RESOLVERS): b"\1"})
    assert contents(opened) == full
    opened.update(resolver(0), b"\2")  # no new element


def test_keys_and_values_of_other_sizes_are_refused(state: bpf.KernelState | MemoryState) -> None:
    opened: Map = state.maps["resolvers"]
    for key, value in (bytes(15), b"\1"), (bytes(16), b"\1\1"):
        with pytest.raises(ValueError, match="resolvers"):
            opened.update(key, value)
    assert contents(opened) == {}


def test_map_may_change_while_it_is_read(state: bpf.KernelState | MemoryState) -> None:
    opened: Map = state.maps["learned"]
    for number in range(8):
        opened.update(number.to_bytes(20, "big"), bytes(kernel_abi.LEARNED.size))
    for key, _ in list(opened.items()):
        opened.delete(key)
    assert contents(opened) == {}


def test_least_recently_used_element_makes_room() -> None:
    opened = MemoryMap("three", 1, 1, 3, Full.EVICTS)
    opened.update_many((bytes([number]), b"\0") for number in range(3))
    opened.lookup(b"\0")
    opened.update(b"\1", b"\1")
    opened.update(b"\3", b"\0")
    assert contents(opened).keys() == {b"\0", b"\1", b"\3"}


def test_counter_that_nobody_counted_is_zero(state: bpf.KernelState | MemoryState) -> None:
    assert state.maps["counters"].sum_u64(int(Outcome.REPEATED).to_bytes(4, "little")) == 0


def test_clock_is_the_one_that_goes_on_in_sleep(state: bpf.KernelState | MemoryState) -> None:
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert before <= state.now_ns() <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def test_nothing_is_loaded_and_status_can_say_why() -> None:
    state = MemoryState("lockdown")
    assert (state.report.loader, state.report.why) == (NoLoader.NONE, "lockdown")
    assert not state.programs
    assert not state.report.programs
    assert not state.report.refused


def test_bpf_is_not_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("bpf(2)")

    monkeypatch.setattr(bpf, "call", refuse)
    state = MemoryState("a test")
    state.maps["names"].replace_all({})
    for hook in bpf.CgroupHook:  # as a start without programs does, for those of an earlier build
        assert not bpf.detach_cgroup(hook.name.lower(), tmp_path, tmp_path)
