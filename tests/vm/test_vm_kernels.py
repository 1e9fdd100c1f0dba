"""The oldest and the newest kernel hold; `make kernels` asks the others as well."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import dns_vectors
from tests.vm import archive
from tests.vm.kernels import KERNELS, Debian, Expected, Kernel
from tests.vm.run import layers, run, unable
from tests.vm.verdict import Verdict, judge, steps_of

OLD = Kernel(
    name="old",
    origin=Debian("some", KERNELS[-1].origin.series),  # type: ignore[union-attr]
    release="1.0",
    version="1",
    packages={},
    expected=Expected(
        programs_missing={"connect4": "why"}, nft_missing={"ct": "why"}, failing={"lab/test_core.py::test_x[*]": "why"}
    ),
)


IN_CI = [kernel for kernel in KERNELS if kernel.in_ci]


@pytest.fixture(scope="session")
def outcomes() -> dict[str, tuple[Verdict, str]]:
    """Of all of them, beside each other: an emulated guest keeps hardly more than one processor busy."""
    if why_not := unable():
        pytest.skip(why_not)
    with layers() as made, ThreadPoolExecutor(len(IN_CI)) as pool:
        done = pool.map(lambda kernel: run(kernel, *made), IN_CI)
        return dict(zip((kernel.name for kernel in IN_CI), done, strict=True))


@pytest.mark.root
@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [kernel.name for kernel in IN_CI])
def test_kernel_does_what_is_expected_of_it(outcomes: dict[str, tuple[Verdict, str]], name: str) -> None:
    verdict, console = outcomes[name]
    print(console)
    print(verdict.row())
    assert verdict.surprises == ()


def report(**changed: Any) -> list[dict[str, Any]]:
    """What a guest with the kernel OLD reports, as expected but for what is changed."""
    facts: dict[str, dict[str, Any]] = {
        "boot": {"release": "1.0"},
        "doctor": {"findings": [{"subject": "nftables ct", "state": "missing"}]},
        "libbpf": {"programs": {"learn": 200_000}, "refused": {"connect4_pidns": "why", "connect4": "why"}},
        "vectors": {},
        "lab": {},
    }
    steps = [
        {"step": name, "result": "ok", "detail": "", "seconds": 1.0, "facts": facts[name]}
        for name in ("boot", *steps_of(OLD))
    ]
    names = [f"kernel/test_learn.py::test_vector_teaches_what_it_says[{n}]" for n in range(2 * len(_vectors()))]
    results = dict.fromkeys(names, "ok") | {"lab/test_core.py::test_x[engine]": "failed"}
    tests = [{"test": name, "result": result, "detail": "", "seconds": 0.1} for name, result in results.items()]
    records = {record.get("step") or record["test"]: record for record in (*steps, *tests)}
    for name, change in changed.items():
        records[name] = records[name] | change
    return list(records.values())


def _vectors() -> list[dns_vectors.Vector]:
    return dns_vectors.load()


def surprises(records: list[dict[str, Any]], *, ended: bool = True) -> tuple[str, ...]:
    return judge(OLD, records, ended=ended, seconds=1.0).surprises


def test_report_as_expected_is_no_surprise() -> None:
    assert surprises(report()) == ()


def test_guest_that_does_not_come_up_or_does_not_end_is_a_failure() -> None:
    assert surprises([]) != ()
    assert surprises(report(), ended=False) != ()
    assert surprises(report()[:-40]) != ()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"libbpf": {"facts": {"programs": {}, "refused": {"connect4": "", "learn": ""}}}}, "libbpf: learn"),
        ({"libbpf": {"facts": {"programs": {"connect4": 1}, "refused": {}}}}, "not so any more"),
        ({"libbpf": {"facts": {"programs": {"learn": 600_000}, "refused": {"connect4": ""}}}}, "600000 instructions"),
        ({"doctor": {"facts": {"findings": []}}}, "not so any more"),
        ({"lab": {"result": "failed", "detail": "no namespaces"}}, "no namespaces"),
        ({"lab/test_core.py::test_x[engine]": {"result": "ok"}}, "expected to fail, and does not"),
        ({"kernel/test_learn.py::test_vector_teaches_what_it_says[1]": {"result": "skipped"}}, "skipped"),
    ],
)
def test_surprise_in_either_direction_is_a_failure(changed: dict[str, Any], said: str) -> None:
    found = surprises(report(**changed))
    assert any(said in surprise for surprise in found), found


@pytest.mark.parametrize(
    ("why", "tries"), [("Temporary failure in name resolution", 1 + len(archive.PAUSES_SECONDS)), ("404 Not Found", 1)]
)
def test_only_what_passes_by_itself_is_fetched_again(monkeypatch: pytest.MonkeyPatch, why: str, tries: int) -> None:
    tried: list[str] = []
    paused: list[float] = []
    monkeypatch.setattr(time, "sleep", paused.append)

    def fetch(name: str) -> None:
        tried.append(name)
        raise archive.FetchError(why)

    with pytest.raises(archive.FetchError, match=why):
        archive.patient(fetch)("linux")
    assert tried == ["linux"] * tries
    assert len(paused) == tries - 1
