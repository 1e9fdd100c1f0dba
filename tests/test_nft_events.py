"""Who changed our table: the kernel's own notices, in a namespace of its own."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from enforcer.nft import Nft
from enforcer.nft_events import TableWatch, own_ports
from enforcer.ruleset import TABLE
from tests.namespaces import inside, new_namespace

pytestmark = pytest.mark.root

HEARD_SECONDS = 0.3


@pytest.fixture
def firewall() -> Iterator[Nft]:
    """In a new namespace, for as long as the test runs."""
    with new_namespace() as namespace, inside(namespace), Nft() as nft:
        nft.apply(f"table inet {TABLE} {{ set s {{ type ipv4_addr; }}\n chain c {{ }}\n }}")
        yield nft


def by_another(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True, capture_output=True)


class Heard:
    """What a watch has called back."""

    def __init__(self) -> None:
        self.changes = self.losses = 0
        self.seconds = 0.0  # that each call takes

    def changed(self) -> None:
        self.changes += 1
        time.sleep(self.seconds)

    def lost(self) -> None:
        self.losses += 1


def watched(work: Callable[[Heard], Awaitable[None]]) -> Heard:
    """What is heard while `work` is done, and a moment longer."""

    async def run() -> Heard:
        heard = Heard()
        with TableWatch(heard.changed, heard.lost) as watch:
            watch.follow()
            await work(heard)
            await asyncio.sleep(HEARD_SECONDS)
        return heard

    return asyncio.run(run())


@pytest.mark.parametrize(
    "text",
    [
        f"flush chain inet {TABLE} c\nadd rule inet {TABLE} c accept",
        f"add element inet {TABLE} s {{ 192.0.2.1 }}",
        f"add chain inet {TABLE} d",
        f"delete table inet {TABLE}",
        "flush ruleset",
        f"table ip other {{ chain c {{ }}\n }}\nadd element inet {TABLE} s {{ 192.0.2.1 }}",
    ],
)
def test_changes_of_others_are_heard(firewall: Nft, text: str) -> None:
    async def work(heard: Heard) -> None:
        by_another(text)
        await asyncio.sleep(0.05)
        assert heard.changes == 1

    assert watched(work).losses == 0


def test_own_changes_are_not(firewall: Nft) -> None:
    async def work(_: Heard) -> None:
        firewall.apply(f"add element inet {TABLE} s {{ 192.0.2.1 }}")
        firewall.apply(f"flush chain inet {TABLE} c")
        with Nft() as second:  # opened later: whose it is, is asked when it is heard of first
            second.apply(f"add element inet {TABLE} s {{ 192.0.2.2 }}")
            await asyncio.sleep(0.05)

    assert watched(work).changes == 0


def test_what_others_do_elsewhere_is_not(firewall: Nft) -> None:
    async def work(_: Heard) -> None:
        by_another(f"table ip {TABLE} {{ chain c {{ }}\n }}\ntable inet {TABLE}_not {{ chain c {{ }}\n }}")
        by_another(f"delete table ip {TABLE}")

    assert watched(work).changes == 0


def test_what_came_before_it_followed_is_heard_then(firewall: Nft) -> None:
    async def run() -> tuple[int, int]:
        heard = Heard()
        with TableWatch(heard.changed, heard.lost) as watch:
            by_another(f"add chain inet {TABLE} d")
            await asyncio.sleep(0.05)
            before = heard.changes
            watch.follow()
            await asyncio.sleep(0.05)
            return before, heard.changes

    assert asyncio.run(run()) == (0, 1)


def test_lost_events_are_told(firewall: Nft) -> None:
    chains = "".join(f"add chain inet other c{number}\n" for number in range(60_000))

    async def work(_: Heard) -> None:
        by_another("add table inet other\n" + chains)

    assert watched(work).losses > 0


def test_storm_takes_no_more_than_half_of_the_time(firewall: Nft) -> None:
    storm = subprocess.Popen(["sh", "-c", f"for i in $(seq 200); do nft add rule inet {TABLE} c accept; done"])

    async def work(heard: Heard) -> None:
        heard.seconds = 0.05
        started, rounds = time.monotonic(), 0
        while storm.poll() is None:
            rounds += 1
            await asyncio.sleep(0.001)
        lasted = time.monotonic() - started
        assert 1 < heard.changes <= 1 + lasted / (2 * heard.seconds)
        assert rounds > heard.changes

    watched(work)


def test_own_ports_are_of_netfilter_and_have_an_address(firewall: Nft) -> None:
    before = own_ports()
    assert before
    assert 0 not in before
    with Nft() as second:
        second.apply("add table inet second\n")
        assert own_ports() > before
    assert own_ports() == before
