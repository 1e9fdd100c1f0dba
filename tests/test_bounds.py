"""Every bound of docs/bounds.md: what is held says how much, and what finds no place ends nothing and is counted."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from enforcer import asking, kernel_abi
from enforcer.bounds import Bounded, Room
from enforcer.enforcement import Enforcement
from enforcer.kernel_abi import DnsEvent, MarkedScope, Outcome, Protocol
from enforcer.ladder import Capabilities
from enforcer.metrics import Metrics, Snapshot
from enforcer.policy import NameIndex, parse
from enforcer.procfs import Cgroup
from enforcer.without_bpf import MemoryState
from tests.dns_vectors import RESOLVER

DOCUMENT = (Path(__file__).parent.parent / "docs" / "bounds.md").read_text()


def test_document_tells_of_every_bound_that_has_a_metric() -> None:
    for what in Bounded:
        assert f"`{what.value}`" in DOCUMENT


def test_document_tells_the_bounds_of_the_kernels_maps() -> None:
    for name in kernel_abi._LIMITS:
        if name.startswith("MAX_") and not name.endswith("_BYTES") and name != "MAX_PORTS_PER_NAME":
            assert f"{getattr(kernel_abi, name):,}" in DOCUMENT, name


def test_who_waits_for_a_place_is_counted_once() -> None:
    room = Room(2)
    assert room.fit("ab") == "ab"
    assert (room.held, room.turned_away) == (2, 0)
    assert room.fit("abcd") == "ab"
    assert (room.held, room.turned_away) == (2, 2)
    assert room.fit("abcd") == "ab"
    assert room.turned_away == 2
    room.fit("abcde")
    assert room.turned_away == 3
    room.fit("a")
    assert (room.held, room.turned_away) == (1, 3)
    room.fit("abc")
    assert room.turned_away == 4


def nothing_to_tell() -> Snapshot:
    raise NotImplementedError


def daemon(**more: Any) -> Enforcement:
    """As much of one as these need: no kernel, and a policy with a wildcard."""
    made = Enforcement.__new__(Enforcement)
    made.policy = parse("[[registry]]\nname = 'corp'\nhosts = ['*.corp.example']\n", "policy.toml")
    made.index = NameIndex(made.policy)
    made._kernel = MemoryState("a test")
    made._capabilities = Capabilities()
    made._table_present = False
    made._in_bpf = {Bounded.CGROUPS: Room(3)}
    made._cgroups, made._cgroups_waiting = {}, {}
    for name, value in more.items():
        setattr(made, name, value)
    return made


def cgroup(number: int) -> Cgroup:
    return Cgroup(f"user.slice/libpod-{number}.scope", number, MarkedScope.CONTAINER)


def known(enforcement_: Enforcement) -> set[int]:
    return {int.from_bytes(key, "little") for key, _ in enforcement_._kernel.maps["cgroups"].items()}


def test_cgroups_beyond_the_kernels_map_wait_and_end_nothing() -> None:
    made = daemon()
    made.know_cgroups(map(cgroup, range(1, 6)))  # an earlier daemon's user made more than there is room for
    assert known(made) == {1, 2, 3}
    assert made._in_bpf[Bounded.CGROUPS] == Room(3, 3, 2, 2)
    made.cgroups_changed([cgroup(6)], [])
    assert known(made) == {1, 2, 3}
    assert made._in_bpf[Bounded.CGROUPS].turned_away == 3
    made.cgroups_changed([], [cgroup(2), cgroup(4)])  # one that had a place, one that waited
    assert known(made) == {1, 3, 5}
    made.cgroups_changed([cgroup(7)], [cgroup(1), cgroup(3), cgroup(5), cgroup(6)])
    assert known(made) == {7}
    assert made._in_bpf[Bounded.CGROUPS] == Room(3, 1, 3)


def test_no_more_resolvers_are_trusted_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    named = tuple(ip_address("192.0.2.0") + number for number in range(5))
    monkeypatch.setattr("enforcer.procfs.trusted_resolvers", lambda: named)
    questions = asking.OwnQuestions(set, tuple, lambda _: None, Metrics(nothing_to_tell), asking.Beside())
    made = daemon(resolvers=(), plan=None, _retired={}, _retire=lambda _: None, questions=questions)
    made._in_bpf[Bounded.RESOLVERS] = Room(3)
    made.follow_resolvers()
    assert made.resolvers == named[:3]
    assert made._in_bpf[Bounded.RESOLVERS].turned_away == 2
    assert questions.again.is_set()


def unreadable(name: str) -> DnsEvent:
    wire = bytes(4) + b"\0\1" + bytes(6)
    wire += b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0\0\1\0\1"
    return DnsEvent(0, 2, len(wire), Outcome.UNREADABLE, Protocol.UDP, 0, ip_address(RESOLVER), wire)


def test_owner_of_a_wildcard_has_the_daemon_ask_so_many_questions_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "UNREADABLE_AT_ONCE", 3)

    async def flood() -> None:
        asked: list[str] = []
        answer = asyncio.Event()

        async def ask(name: str) -> None:
            asked.append(name)
            await answer.wait()

        beside = asking.Beside()
        questions = asking.OwnQuestions(set, tuple, lambda _: None, Metrics(nothing_to_tell), beside)
        monkeypatch.setattr(questions, "_ask", ask)
        made = daemon(questions=questions)
        for number in range(5):
            made._ask_for_question(unreadable(f"n{number}.corp.example"))
            made._ask_for_question(unreadable(f"n{number}.evil.example"))
        await asyncio.sleep(0)
        assert asked == ["n0.corp.example", "n1.corp.example", "n2.corp.example"]
        assert questions.room == Room(3, 3, 2)
        answer.set()
        await asyncio.gather(*beside.tasks)
        assert questions.room == Room(3, 0, 2)
        made._ask_for_question(unreadable("n9.corp.example"))
        await asyncio.gather(*beside.tasks)
        assert asked[-1] == "n9.corp.example"

    asyncio.run(flood())
