"""The state file: what it remembers is permitted after a reboot before any resolver has answered, nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from enforcer import state
from tests.faults.test_host import _SILENT
from tests.faults.test_killed import lay_baseline
from tests.faults.world import World
from tests.lab.enforcer import policy
from tests.lab.internet import EVIL_ADDRESS
from tests.lab.lab import poll

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(300)]

Numbers = Callable[[str], None]


def reboot(world: World, text: str = "") -> None:
    """Stop, lose all that the kernel knows, and start again among resolvers that say nothing."""
    if world.enforcer.running:
        assert world.enforcer.stop() == 0
    lay_baseline(world)
    world.outside_of("nft", "-f", "-", text=_SILENT)
    try:
        world.start(text)
    finally:
        world.outside_of("nft", "delete", "table", "inet", "silent")


def edit(world: World, change: Callable[[dict[str, object]], None]) -> None:
    """Rewrite the state file as root alone could."""
    path = world.enforcer.state_dir / state.FILE_NAME
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.fault("a reboot, with a resolver that is silent")
def test_what_was_learned_survives_a_reboot(world: World, numbers: Numbers) -> None:
    learned = world.learn(50)
    reboot(world)
    with world.nothing_gets_out() as probes:
        took = world.reached(*learned)
        world.refused()
        world.learns()
    numbers(f"{len(learned)} learned addresses reached within {took:.1f} s, {probes.tried} attempts refused")


@pytest.mark.fault("a state file that has expired, or that the policy does not allow")
def test_what_has_expired_or_is_not_allowed_is_dropped(world: World, numbers: Numbers) -> None:
    expired, forged_port, kept = world.learn(3)
    assert world.enforcer.stop() == 0

    def change(document: dict[str, object]) -> None:
        entries = document["learned"]
        assert isinstance(entries, list)
        for entry in entries:
            if entry[0] == expired:
                entry[5] = int(time.time()) - 1
        now = int(time.time())
        until = now + 10_000
        entries.append([EVIL_ADDRESS, 443, "evil.test", "corp", "evil.test", until])  # a name of no rule
        entries.append([EVIL_ADDRESS, 443, "x.fresh.allowed.test", "nobody", "*.fresh.allowed.test", until])
        entries.append([forged_port, 5000, "x.fresh.allowed.test", "corp", "*.fresh.allowed.test", until])
        entries.append(["127.0.0.1", 443, "x.fresh.allowed.test", "corp", "*.fresh.allowed.test", until])

    edit(world, change)
    reboot(world)
    with world.nothing_gets_out() as probes:
        world.reached(kept)
        world.refused(expired)
        permitted = world.enforcer.permitted()
        assert permitted.isdisjoint({(EVIL_ADDRESS, 443), (forged_port, 5000), ("127.0.0.1", 443), (expired, 443)})
        world.refused()
    numbers(f"5 entries dropped, {probes.tried} attempts refused")


@pytest.mark.fault("a state file that is damaged, or could have been forged")
@pytest.mark.parametrize("how", ["damaged", "forged"])
def test_state_file_that_cannot_be_believed_is_set_aside(world: World, numbers: Numbers, how: str) -> None:
    (learned,) = world.learn(1)
    assert world.enforcer.stop() == 0
    path = world.enforcer.state_dir / state.FILE_NAME
    if how == "damaged":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.chmod(0o666)
    reboot(world)
    with world.nothing_gets_out() as probes:
        assert world.said("set aside as learned.json.bad") == 1
        assert (world.enforcer.state_dir / "learned.json.bad").exists()
        world.refused(learned)
        world.learns()
        world.enforcer.stop()
        assert path.exists()
        world.start()
        assert "set aside" not in world.enforcer.log
    numbers(f"{how}: set aside and said once, {probes.tried} attempts refused")


@pytest.mark.fault("a reboot with another clock")
@pytest.mark.parametrize("hours", [-24, 24], ids=["behind", "ahead"])
def test_clock_that_is_wrong_at_boot_makes_nothing_eternal(world: World, numbers: Numbers, hours: int) -> None:
    """Behind: what is saved lives as long as it had left. Ahead: it is taken for expired, and learned anew."""
    (learned,) = world.learn(1)
    assert world.enforcer.stop() == 0

    def shift(document: dict[str, object]) -> None:
        entries, saved_at = document["learned"], document["saved_at"]
        assert isinstance(entries, list)
        assert isinstance(saved_at, int)
        document["saved_at"] = saved_at - hours * 3_600
        for entry in entries:
            entry[5] -= hours * 3_600

    edit(world, shift)
    reboot(world)
    left = {entry["address"]: entry["expires_at"] - time.time() for entry in world.enforcer.status()["learned"]}
    with world.nothing_gets_out() as probes:
        if hours < 0:
            assert 0 < left[learned] <= 301
            world.reached(learned)
        else:
            assert learned not in left
        world.learns()
    longest = max(left.values(), default=0.0)
    poll("the policy", lambda: world.enforcer.status()["state"] == "enforcing")
    numbers(f"{hours:+} h: nothing lives longer than {longest:.0f} s, {probes.tried} attempts refused")
    world.ready(policy())
