"""What the host runs out of, and what it lies about: memory, descriptors, disks, clocks, resolvers."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from enforcer import state
from tests.faults.injected import Orders
from tests.faults.world import SOON_SECONDS, World, mount_small
from tests.lab import odd_resolver
from tests.lab.enforcer import METRICS_PORT, policy, registry
from tests.lab.internet import EVIL_ADDRESS
from tests.lab.lab import RESOLVER, poll

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(300)]

Numbers = Callable[[str], None]

FLOODED_NAMES = 12_000
FLOOD_FROM = 40_000
FOUND_SECONDS = 5.0  # within which a disk with space is found again
_HOURS = 6 * 3_600.0
_MEBIBYTE = 1 << 20


# --- memory ----------------------------------------------------------------------------------------------------------
def _memory_cgroup(world: World, limit_bytes: int) -> Path | None:
    """A memory cgroup with this limit, of whichever version this host has; None without."""
    for root, file in (("memory", "memory.limit_in_bytes"), ("unified", "memory.max"), (".", "memory.max")):
        group = Path("/sys/fs/cgroup", root, world.lab.name)
        if not (group.parent / "cgroup.procs").exists():
            continue
        group.mkdir(exist_ok=True)
        if (group / file).exists():
            (group / file).write_text(str(limit_bytes))
            return group
    return None


def _want_memory(world: World) -> None:
    """Have the daemon hold thousands of addresses more, until it is not there to hold them."""
    world.lab.ct.call(
        "flood_names", server=RESOLVER, suffix="fresh.allowed.test", first=FLOOD_FROM, count=FLOODED_NAMES,
        reply_within=120,
    )  # fmt: skip


@pytest.mark.fault("out of memory: the kernel kills the daemon")
def test_out_of_memory(world: World, numbers: Numbers) -> None:
    group = _memory_cgroup(world, 4 * _MEBIBYTE)  # beyond what it has already
    if group is None:
        pytest.skip("this host has no memory cgroups")
    with world.nothing_gets_out() as probes:
        (group / "cgroup.procs").write_text(str(world.enforcer.pid))
        _want_memory(world)
        poll("the end of the daemon", lambda: not world.enforcer.running)
        assert world.enforcer.killed
        world.refused()
        world.reached()
        world.learns()
        world.start()
        world.reached()
        world.learns()
    numbers(f"killed by the kernel, {probes.tried} attempts refused")


@pytest.mark.fault("out of memory: an allocation fails")
def test_out_of_address_space(world: World, numbers: Numbers) -> None:
    """An exception like any other: the daemon ends, and says why."""
    size = int(Path(f"/proc/{world.enforcer.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    with world.nothing_gets_out() as probes:
        resource.prlimit(world.enforcer.pid, resource.RLIMIT_AS, (size + _MEBIBYTE, size + _MEBIBYTE))
        _want_memory(world)
        poll("the end of the daemon", lambda: not world.enforcer.running)
        world.refused()
        world.reached()
        world.learns()
        world.start()
        world.learns()
    numbers(f"ended and started again, {probes.tried} attempts refused")


# --- descriptors -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _no_descriptors(world: World) -> Iterator[None]:
    pid = world.enforcer.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.fault("no descriptors for 10 s, and clients that want some")
def test_descriptors_run_out(world: World, numbers: Numbers) -> None:
    learned: list[str] = []
    control = str(world.lab.directory / "run" / "host" / "control.sock")
    with world.nothing_gets_out("timed out") as probes, contextlib.ExitStack() as stack:
        with _no_descriptors(world):
            started = time.monotonic()
            for _ in range(40):
                asking = stack.enter_context(socket.socket(socket.AF_UNIX))
                asking.connect(control)
            world.lab.host.call("hold", key="metrics", name="127.0.0.1", port=METRICS_PORT)
            world.lab.set_resolvers(RESOLVER, "198.18.0.54")
            world.lab.ip("host", "link add late0 type bridge", "addr add 10.98.0.1/24 dev late0", "link set late0 up")
            while time.monotonic() < started + 10:
                learned += world.learn(1)
                world.reached(learned[-1], within=0)
                time.sleep(0.5)
            used = _processor_seconds(world.enforcer.pid)
            time.sleep(1)
            assert _processor_seconds(world.enforcer.pid) - used < 0.7  # it does not spin
        resumed = time.monotonic()
        assert world.enforcer.running, world.enforcer.log
        wanted = {(address, 443) for address in learned}
        poll("an answer", lambda: _answers(world), SOON_SECONDS)
        poll("what was learned", lambda: wanted <= world.enforcer.permitted(), SOON_SECONDS)
        took = time.monotonic() - resumed
        poll("the resolvers", lambda: "198.18.0.54" in world.enforcer.status()["resolvers"], SOON_SECONDS)
        poll("the new interface", lambda: "late0" in json.dumps(world.enforcer.status()["interfaces"]), SOON_SECONDS)
        world.lab.set_resolvers(RESOLVER)
        world.lab.ip("host", "link del late0")
        world.reached(*learned)
        world.learns()
        poll("a refusal in words", lambda: world.lab.ct.attempt(EVIL_ADDRESS).message == "403 Forbidden")
    world.lab.host.call("drop", key="metrics")
    counted = world.faults("kernel") + world.faults("clients") + world.faults("nftables")
    assert counted > 0
    assert world.said("Too many open files") <= 8, world.enforcer.log
    numbers(f"{counted:.0f} counted, all known {took:.1f} s later; {probes.tried} attempts, none got out")


def _answers(world: World) -> bool:
    try:
        return bool(world.enforcer.permitted())
    except Exception:  # noqa: BLE001 - whatever it is, it is no answer
        return False


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100  # proc(5): utime and stime


# --- disks -----------------------------------------------------------------------------------------------------------
@pytest.mark.fault("disk full and read-only, for state and audit log")
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_disk_takes_nothing(world: World, numbers: Numbers, how: str) -> None:
    where = world.lab.directory / "small"
    places = where / "state", where / "audit"
    for place in places:
        mount_small(world, place, "256k")
    world.enforcer.stop()
    world.enforcer.state_dir, before = places[0], world.enforcer.state_dir
    audit = f'\n[audit]\nfile = "{places[1]}/audit.jsonl"\n'
    try:
        world.start(policy(more=audit), Orders(save_seconds=0.5))
        poll("the state file", lambda: _lines(world, places[0] / state.FILE_NAME))
        world.refused()
        poll("the audit file", lambda: _lines(world, places[1] / "audit.jsonl"))
        with world.nothing_gets_out() as probes:
            for place in places:
                if how == "full":
                    world.lab.run("host", ["dd", "if=/dev/zero", f"of={place}/filler", "bs=4k"])
                else:
                    world.run("host", "mount", "-o", "remount,ro", str(place))
            poll("the state's fault", lambda: world.faults("state") > 3, FOUND_SECONDS)
            dropped = world.enforcer.total("enforcer_audit_dropped_total", where="output")
            world.lab.ct.attempt("198.18.66.70", 443)
            poll(
                "a line that is lost",
                lambda: (
                    world.lab.ct.attempt(f"198.18.66.{80 + int(time.monotonic() * 10) % 100}")
                    and world.enforcer.total("enforcer_audit_dropped_total", where="output") > dropped
                ),
            )
            world.reached()
            world.learns()
            saved = _lines(world, places[0] / state.FILE_NAME)
            for place in places:
                if how == "full":
                    world.run("host", "rm", f"{place}/filler")
                else:
                    world.run("host", "mount", "-o", "remount,rw", str(place))
            fresh = world.learn(1)
            poll("the new state", lambda: fresh[0] in _lines(world, places[0] / state.FILE_NAME), FOUND_SECONDS)
            poll(
                "the audit file",
                lambda: (
                    world.lab.ct.attempt(f"198.18.66.{80 + int(time.monotonic() * 10) % 100}")
                    and world.said("audit lines are written to the file again") == 1
                ),
            )
        assert json.loads(saved), "the old state file was whole all the time"
        assert world.said("what is learned would be lost in a reboot: ") == 2  # that it begins, and that it is over
        assert world.said("audit lines cannot be written to ") == 1
        numbers(f"{how}: {world.faults('state'):.0f} attempts to save, {probes.tried} attempts refused")
    finally:
        world.enforcer.stop()
        world.enforcer.state_dir = before
        for place in places:
            world.run("host", "umount", "-l", str(place))


def _lines(world: World, path: Path) -> str:
    done = world.lab.run("host", ["cat", str(path)])
    return done.stdout if done.returncode == 0 else ""


# --- clocks ----------------------------------------------------------------------------------------------------------
@pytest.mark.fault("the clock steps by six hours")
@pytest.mark.parametrize("step", [_HOURS, -_HOURS], ids=["forwards", "backwards"])
def test_clock_steps(world: World, numbers: Numbers, step: float) -> None:
    """Learned addresses live by the clock that counts from boot: no longer, no shorter."""
    lifetime_seconds = 6
    world.enforcer.stop()
    world.enforcer.remove()
    # Not the policy's exact names: the daemon asks for those itself, again and again.
    orders = {"floor_seconds": lifetime_seconds, "save_seconds": 0.3}
    world.start(orders=Orders(**orders))  # type: ignore[arg-type]
    with world.nothing_gets_out() as probes:
        assert world.lab.ct.connect("short.blobs.allowed.test").reached
        began = time.monotonic()
        world.enforcer.order(Orders(clock_seconds=step, **orders))  # type: ignore[arg-type]
        world.reached("198.18.1.18", within=0)
        time.sleep(max(0.0, began + lifetime_seconds - 2 - time.monotonic()))
        world.reached("198.18.1.18", within=0)
        assert time.monotonic() < began + lifetime_seconds
        poll("its end", lambda: world.lab.ct.attempt("198.18.1.18").refused, lifetime_seconds + 5)
        ended = time.monotonic() - began
        assert ended > lifetime_seconds - 1
    # What a reboot with the clock put right would find lives no longer than it had left.
    poll("a saved state", (world.enforcer.state_dir / state.FILE_NAME).exists)
    world.enforcer.stop()
    assert all(entry.seconds_left <= 300 for entry in state.load(world.enforcer.state_dir))
    world.start()
    numbers(f"{step / 3600:+.0f} h: a life of {lifetime_seconds} s took {ended:.1f} s, {probes.tried} attempts refused")


# --- resolvers -------------------------------------------------------------------------------------------------------
_SILENT = """
table inet silent {
    counter questions { }
    chain prerouting {
        type filter hook prerouting priority -200;
        iifname "to-host" udp dport 53 counter name questions drop
        iifname "to-host" tcp dport 53 drop
    }
}
"""


@pytest.mark.fault("the resolver is silent")
def test_resolver_is_silent(world: World, numbers: Numbers) -> None:
    """Start and reload end, enforcement holds, and what the daemon asks by itself is bounded."""
    (learned,) = world.learn(1)
    many = registry("many", *(f"n{number:05}.silent.allowed.test" for number in range(500)))
    world.outside_of("nft", "-f", "-", text=_SILENT)
    try:
        with world.nothing_gets_out() as probes:
            world.enforcer.stop(signal.SIGKILL)
            started = time.monotonic()
            world.start(policy(more=many))
            took = time.monotonic() - started
            assert took < 8
            world.reached(learned, within=0)
            reloaded = time.monotonic()
            assert world.enforcer.reload(policy()) == "ok"
            assert world.enforcer.reload(policy(more=many)) == "ok"
            assert time.monotonic() - reloaded < 3
            asked, began = _questions(world), time.monotonic()
            time.sleep(5)
            rate = (_questions(world) - asked) / (time.monotonic() - began)
            assert rate <= 16  # so many at a time, each waits two seconds
    finally:
        world.outside_of("nft", "delete", "table", "inet", "silent")
    world.learns()
    assert world.enforcer.total("enforcer_own_queries_total", result="no_answer") > 0
    world.ready()
    numbers(f"started in {took:.1f} s, {rate:.0f} own questions a second, {probes.tried} attempts refused")


def _questions(world: World) -> int:
    listed = json.loads(world.outside_of("nft", "--json", "list", "counter", "inet", "silent", "questions"))
    return next(int(entry["counter"]["packets"]) for entry in listed["nftables"] if "counter" in entry)


@pytest.mark.fault("the resolver is slow")
def test_resolver_is_slow(world: World, numbers: Numbers) -> None:
    odd_resolver.start(world.lab, "198.18.0.77")
    names = [odd_resolver.name_of("slower", f"198.18.91.{number + 1}") for number in range(60)]
    world.lab.set_resolvers("198.18.0.77")
    try:
        with world.nothing_gets_out() as probes:
            world.enforcer.stop(signal.SIGKILL)
            started = time.monotonic()
            world.start(policy(more=registry("slow", *names)))
            took = time.monotonic() - started
            assert took < 8
            assert world.lab.ct.connect(names[-1]).reached
            world.reached(*(f"198.18.91.{number + 1}" for number in range(60)), within=30)
    finally:
        world.lab.set_resolvers(RESOLVER)
    world.ready()
    numbers(f"started in {took:.1f} s, {len(names)} slow names known, {probes.tried} attempts refused")
