"""A host's life with the package, on a Debian that systemd boots: installed, reloaded, killed, hung, rebooted,
upgraded, removed, purged.

From the first moment of each boot on two probers try an unlisted registry, one as an engine of the host and one from a
network namespace behind it; the world counts what of them came out. Each test goes on where the one before ended.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enforcer.audit_record import Drifted
from enforcer.policy import read_policy
from tests.booted.conftest import Booted
from tests.booted.guest import BASELINE, UNIT, Guest, World, poll
from tests.lab.internet import ALLOWED_ADDRESS
from tests.lab.lab import RESOLVER

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

POLICY = "/etc/registry-enforcer/policy.toml"
TEXT = """
[[registry]]
name = "corp"
hosts = ["registry.allowed.test"]
"""
WRONG = "registry = 1\n"
PROBERS = ("engine", "container")
ALLOWED, UNLISTED = "registry.allowed.test", "198.18.66.66"
# What the daemon's unit leaves it, as /proc says it: dac_read_search, net_bind_service, net_admin, net_raw, sys_ptrace,
# perfmon, bpf.
CAPABILITIES = sum(1 << bit for bit in (2, 10, 12, 13, 19, 38, 39))
_before: dict[str, set[str]] = {}  # what was on the disk before the package was


@pytest.fixture
def guest(booted: Booted) -> Guest:
    return booted.guest


@pytest.fixture
def world(booted: Booted) -> World:
    return booted.world


# --- what is asked of the guest --------------------------------------------------------------------------------------
def try_once(guest: Guest, destination: str, *, where: str = "host") -> str:
    """What becomes of one connection to port 443, as an engine or in the namespace behind the host."""
    inside = ("ip", "netns", "exec", "ct") if where == "container" else ()
    return guest.run(*inside, "/usr/local/bin/skopeo", destination, "443").stdout.strip()


def both_are(guest: Guest, outcome: str) -> None:
    """Wait until that is what becomes of each prober's attempts."""
    poll(f"both probers: {outcome}", lambda: [guest.attempts(prober)[-1:] for prober in PROBERS] == [[outcome]] * 2)


def never_open(guest: Guest) -> None:
    """Neither prober has reached anybody in this boot."""
    assert [prober for prober in PROBERS if "OPEN" in guest.attempts(prober)] == []


@contextlib.contextmanager
def nothing_gets_out(guest: Guest, world: World, counter: str = "unlisted") -> Iterator[None]:
    """Not one packet of either prober, while both are trying; and that they are."""
    both_are(guest, "told")
    before, tried = world.unlisted(counter), refused(guest)
    yield
    poll("more attempts", lambda: refused(guest) != tried)
    assert world.unlisted(counter) == before


def refused(guest: Guest) -> list[dict[str, Any]]:
    """The counters of the kernel, which no daemon needs to be there for."""
    listed = json.loads(guest.must("nft", "-j", "list", "counters", "table", "inet", "registry_enforcer"))
    return [entry["counter"] for entry in listed["nftables"] if "counter" in entry]


def main_pid(guest: Guest) -> int:
    return int(guest.show(UNIT, "MainPID")[0])


def another_daemon(guest: Guest, pid: int) -> bool:
    return guest.active() and main_pid(guest) not in (0, pid)


def learned(guest: Guest) -> set[str]:
    done = guest.run("registry-enforcer", "status", "--json")
    return {entry["address"] for entry in json.loads(done.stdout)["learned"]} if done.returncode == 0 else set()


def interfaces(guest: Guest) -> dict[str, tuple[str, bool]]:
    """What status says of each: the program, and whether it is guarded."""
    status = json.loads(guest.must("registry-enforcer", "status", "--json"))
    return {entry["name"]: (entry["program"], entry["guarded"]) for entry in status["interfaces"]}


def repairs(guest: Guest, what: Drifted) -> float:
    """How often the daemon that runs has put that back."""
    script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9742/metrics').read().decode())"
    scraped = guest.must("python3", "-c", script)
    found = re.findall(rf'^enforcer_drift_repairs_total\{{what="{what.value}"\}} (\S+)$', scraped, re.MULTILINE)
    return sum(map(float, found))


def table(guest: Guest) -> set[str]:
    """The parts of ours but for what changes by itself and for the baseline's note, which stays until a flush."""
    listed = guest.run("nft", "--stateless", "--terse", "list", "table", "inet", "registry_enforcer").stdout
    return {part.strip() for part in listed.split("\n\t}\n")} - {"chain unmarked {"}


def write_policy(guest: Guest, text: str) -> None:
    guest.write(POLICY, text)


def files(guest: Guest) -> set[str]:
    """Everything on the disk but what dpkg, the journal and the probers write."""
    left_out = ("/var/lib/dpkg", "/var/log/journal", "/var/lib/systemd", "/root")
    pruned = " -o ".join(f"-path {path}" for path in left_out)
    listed = guest.must("sh", "-c", f"find / -xdev \\( {pruned} \\) -prune -o -print")
    return {line for line in listed.splitlines() if not line.endswith((".pyc", "__pycache__", "/dpkg.log"))}


# --- a host's life ---------------------------------------------------------------------------------------------------
def test_probers_reach_anything_before_the_package_is_there(guest: Guest, world: World) -> None:
    both_are(guest, "OPEN")
    assert world.unlisted() > 0
    _before["files"] = files(guest)


def test_installing_enforces_the_policy_that_comes_with_it(booted: Booted, guest: Guest, world: World) -> None:
    guest.must("dpkg", "-i", booted.first)
    assert guest.active()
    assert guest.active(BASELINE)
    policy = read_policy(guest.root / POLICY.lstrip("/"))
    assert [rule.name for rule in policy.rules] == ["docker-hub"]
    both_are(guest, "told")
    for tried in map(guest.attempts, PROBERS):
        before, *since = tried[tried.index("OPEN") :]
        assert (before, since[0]) == ("OPEN", "refused")  # by the baseline
        assert "OPEN" not in since  # nor while the daemon took over
    assert try_once(guest, ALLOWED) == "told"
    assert try_once(guest, ALLOWED, where="container") == "told"


def test_reload_ends_when_the_new_policy_is_in_force(guest: Guest, world: World) -> None:
    write_policy(guest, TEXT)
    with nothing_gets_out(guest, world):
        guest.must("systemctl", "reload", UNIT)
    assert try_once(guest, ALLOWED) == "OPEN"
    assert try_once(guest, ALLOWED, where="container") == "OPEN"
    assert try_once(guest, UNLISTED) == "told"
    assert "mode enforce, policy /etc/registry-enforcer/policy.toml" in guest.show(UNIT, "StatusText")[0]


def test_reload_of_a_wrong_policy_fails_with_what_is_wrong_and_changes_nothing(guest: Guest, world: World) -> None:
    pid = main_pid(guest)
    write_policy(guest, WRONG)
    with nothing_gets_out(guest, world):
        assert guest.run("systemctl", "reload", UNIT).returncode != 0
    assert f"{POLICY}:1: " in guest.show(UNIT, "StatusText")[0]
    assert f"\n{POLICY}:1: " in guest.journal()
    write_policy(guest, TEXT)
    assert (guest.active(), main_pid(guest), try_once(guest, ALLOWED)) == (True, pid, "OPEN")
    guest.must("systemctl", "reload", UNIT)
    assert POLICY + ":1: " not in guest.show(UNIT, "StatusText")[0]


def test_daemon_has_the_powers_that_it_uses_and_no_others(guest: Guest) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in guest.must("cat", f"/proc/{main_pid(guest)}/status").splitlines()
        if ":\t" in line
    )
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == CAPABILITIES
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    for unit in (UNIT, BASELINE):
        guest.must("systemd-analyze", "security", "--threshold=30", unit)
        assert guest.must("systemd-analyze", "verify", "--man=no", unit) == ""


def test_daemon_guards_the_uplink_and_what_leaves_must_ask_for_an_allowed_host(guest: Guest, world: World) -> None:
    assert interfaces(guest) == {"up0": ("learn", True), "lo": ("learn", False), "ct-port": ("gate", False)}
    assert [name.split("#")[0] for name in filters(guest)] == ["learn", "guard", "track_query"]
    assert try_once(guest, ALLOWED) == "OPEN"
    for where in ("host", "container"):
        assert try_once(guest, f"evil.test@{ALLOWED}", where=where) == "told"


@pytest.mark.parametrize(
    ("what", "command"),
    [
        (Drifted.TABLE, "nft flush ruleset"),
        (Drifted.TABLE, "systemctl restart nftables.service"),
        (Drifted.TABLE, "systemctl stop nftables.service"),
        (Drifted.TRAFFIC_CONTROL, "tc qdisc del dev up0 clsact"),
        (Drifted.CGROUP, "rm -r /sys/fs/bpf/registry-enforcer/links"),
        (Drifted.PINS, "rm -r /sys/fs/bpf/registry-enforcer/generation-*/maps"),
        (Drifted.PINS, "rm -r /sys/fs/bpf/registry-enforcer/*"),
    ],
)
def test_drift_is_put_back_within_the_sandbox(guest: Guest, world: World, what: Drifted, command: str) -> None:
    def pins() -> set[str]:
        return set(guest.must("find", "/sys/fs/bpf/registry-enforcer").split())

    whole = interfaces(guest), pins(), table(guest)
    before, pid = repairs(guest, what), main_pid(guest)
    # Whom the responder was telling no loses the translation with the table: his last packet goes where he meant to.
    with nothing_gets_out(guest, world, "begun" if what is Drifted.TABLE else "unlisted"):
        guest.must("sh", "-c", command)
        poll(f"repair of {what.value}", lambda: repairs(guest, what) > before, seconds=2)
        poll("everything as before", lambda: (interfaces(guest), pins(), table(guest)) == whole)
    guest.must("systemctl", "start", "nftables.service")
    assert main_pid(guest) == pid
    assert try_once(guest, ALLOWED) == "OPEN"
    assert try_once(guest, ALLOWED, where="container") == "OPEN"


def test_directory_of_the_pins_is_made_again_by_a_restart(guest: Guest, world: World) -> None:
    """Within the sandbox it was a mount of its own, and the rest of that file system cannot be written."""
    with nothing_gets_out(guest, world):
        guest.must("rm", "-r", "/sys/fs/bpf/registry-enforcer")
        poll("what to do", lambda: "systemctl restart registry-enforcer" in guest.journal())
        assert try_once(guest, ALLOWED, where="container") == "OPEN"
        guest.must("systemctl", "restart", UNIT)
        assert guest.run("ls", "/sys/fs/bpf/registry-enforcer/links").stdout.split()
    assert try_once(guest, ALLOWED) == "OPEN"


def test_guard_refuses_alone_when_the_daemon_is_stopped_and_the_table_flushed(guest: Guest, world: World) -> None:
    """At shutdown, since nftables.service flushes every table when it stops."""
    both_are(guest, "told")
    before = world.unlisted("begun")
    guest.must("systemctl", "stop", UNIT)
    guest.must("systemctl", "stop", "nftables.service")
    assert guest.must("nft", "list", "tables") == ""
    both_are(guest, "refused")
    for where in ("host", "container"):
        assert try_once(guest, ALLOWED, where=where) == "OPEN"
        assert try_once(guest, f"evil.test@{ALLOWED}", where=where) == "told"
    guest.must("systemctl", "start", "nftables.service")
    guest.must("systemctl", "start", UNIT)
    both_are(guest, "told")
    assert world.unlisted("begun") == before


def test_audit_names_processes_of_others_and_containers_under_the_unit(guest: Guest) -> None:
    container = "0123456789abcdef" * 4
    stays = "/usr/local/bin/skopeo", "443", "1"
    guest.must("setpriv", "--reuid=65534", "--clear-groups", stays[0], "198.18.66.71", *stays[1:])
    in_container = "systemd-run", "--scope", "--quiet", f"--unit=docker-{container}"
    guest.must(*in_container, stays[0], "198.18.66.72", *stays[1:])

    def record_of(address: str) -> Any:
        lines = guest.must("registry-enforcer", "log", "-n", "200", "--json").splitlines()
        found = [each for each in map(json.loads, lines) if (each["destination"] or {}).get("address") == address]
        return found[0] if found else None

    poll("both in the audit log", lambda: record_of("198.18.66.71") and record_of("198.18.66.72"))
    process = record_of("198.18.66.71")["process"]
    assert (process["uid"], process["exe"].startswith("/usr/bin/python3")) == (65534, True)
    assert record_of("198.18.66.72")["container"]["id"] == container


def test_killed_daemon_comes_back_and_the_table_refuses_meanwhile(guest: Guest, world: World) -> None:
    with nothing_gets_out(guest, world):
        pid = main_pid(guest)
        guest.must("systemctl", "kill", "--signal=SIGKILL", UNIT)
        assert "registry_enforcer" in guest.must("nft", "list", "tables")
        poll("another daemon", lambda: another_daemon(guest, pid))
    assert try_once(guest, ALLOWED) == "OPEN"


def test_hung_daemon_is_ended_by_the_watchdog_and_says_where_it_hung(guest: Guest, world: World) -> None:
    drop_in = "/run/systemd/system/registry-enforcer.service.d"
    guest.must("mkdir", "-p", drop_in)
    guest.must("sh", "-c", f"printf '[Service]\\nWatchdogSec=2\\n' > {drop_in}/soon.conf; systemctl daemon-reload")
    guest.must("systemctl", "restart", UNIT)
    both_are(guest, "told")
    with nothing_gets_out(guest, world):
        pid = main_pid(guest)
        time.sleep(2.5)
        assert main_pid(guest) == pid  # it is fed
        guest.must("systemctl", "kill", "--signal=SIGSTOP", UNIT)
        poll("another daemon", lambda: another_daemon(guest, pid))
    assert "Watchdog timeout" in guest.journal()
    assert "Fatal Python error: Aborted" in guest.journal()
    guest.must("sh", "-c", f"rm -r {drop_in}; systemctl daemon-reload; systemctl restart {UNIT}")
    assert try_once(guest, ALLOWED) == "OPEN"


def test_boot_is_guarded_before_there_is_a_network_and_what_was_learned_is_known(guest: Guest, world: World) -> None:
    poll("a learned address", lambda: ALLOWED_ADDRESS in learned(guest))
    before = world.unlisted()
    world.fall_silent()  # so that nothing can be learned anew
    guest.reboot()
    assert guest.active()
    moments = [int(guest.show(unit, "ActiveEnterTimestampMonotonic")[0]) for unit in (BASELINE, UNIT, "lab-network")]
    assert moments == sorted(moments)
    assert "table inet filter" in guest.must("nft", "list", "tables")  # nftables.service has flushed, before us
    assert ALLOWED_ADDRESS in learned(guest)
    world.serve()
    poll("an allowed connection", lambda: try_once(guest, ALLOWED_ADDRESS) == "OPEN")
    both_are(guest, "told")
    never_open(guest)
    assert "no-network" in guest.attempts("engine")  # it was trying before there was one
    assert world.unlisted() == before


@pytest.mark.parametrize("resolver", [RESOLVER, "127.0.0.1"])
def test_names_are_asked_for_as_soon_as_there_is_a_network(guest: Guest, resolver: str) -> None:
    """By the resolver itself, and through a stub that answered before that it could not."""
    resolv_conf = (guest.root / "etc/resolv.conf").read_text()
    guest.write("/etc/resolv.conf", resolv_conf.replace(RESOLVER, resolver))
    guest.must("systemctl", "stop", UNIT)
    (guest.root / "var/lib/registry-enforcer/learned.json").unlink()
    guest.must("systemctl", "mask", "--runtime", UNIT)  # nothing is saved at the end
    guest.must("registry-enforcer", "remove")
    # As late as a real one: when the daemon's own questions have failed.
    slow = guest.root / "etc/systemd/system/lab-network.service.d/slow.conf"
    slow.parent.mkdir()
    slow.write_text("[Service]\nExecStartPre=sleep 2\n")
    guest.reboot()
    shutil.rmtree(slow.parent)
    poll("an address that nobody else has asked for", lambda: ALLOWED_ADDRESS in learned(guest), seconds=10)
    guest.write("/etc/resolv.conf", resolv_conf)


def test_boot_without_the_daemon_is_guarded_by_the_baseline(guest: Guest, world: World) -> None:
    write_policy(guest, TEXT + f'addresses = ["{ALLOWED_ADDRESS}"]\n')
    before = world.unlisted()
    guest.must("systemctl", "mask", UNIT)
    guest.reboot()
    assert (guest.active(), guest.active(BASELINE)) == (False, True)
    both_are(guest, "refused")
    never_open(guest)
    assert try_once(guest, ALLOWED_ADDRESS) == "OPEN"  # listed by address
    assert world.unlisted() == before
    guest.must("systemctl", "unmask", UNIT)
    guest.must("systemctl", "start", UNIT)
    assert world.unlisted() == before
    never_open(guest)


def test_boot_with_a_wrong_policy_refuses_everything_and_the_right_one_needs_no_command(
    guest: Guest, world: World
) -> None:
    write_policy(guest, WRONG)
    before = world.unlisted()
    guest.reboot()
    assert not guest.active()
    assert guest.show(BASELINE, "ActiveState") == ["failed"]
    assert f"{POLICY}:1: " in guest.journal(BASELINE)
    assert "every connection to a registry port is refused" in guest.journal(BASELINE)
    assert f"{POLICY}:1: " in guest.journal()
    assert try_once(guest, ALLOWED_ADDRESS) == "refused"
    assert try_once(guest, ALLOWED_ADDRESS, where="container") == "refused"
    write_policy(guest, TEXT)
    poll("the daemon", guest.active)
    assert try_once(guest, ALLOWED) == "OPEN"
    never_open(guest)
    assert world.unlisted() == before


def filters(guest: Guest) -> list[str]:
    """Ours on the uplink, each with the number of its program."""
    shown = [guest.must("tc", "filter", "show", "dev", "up0", direction) for direction in ("ingress", "egress")]
    return re.findall(r"\w+#\d+", "".join(shown))


def test_upgrade_has_no_gap_and_keeps_the_policy(booted: Booted, guest: Guest, world: World) -> None:
    both_are(guest, "told")
    before, generations = filters(guest), guest.must("ls", "/sys/fs/bpf/registry-enforcer")
    assert [name.split("#")[0] for name in before] == ["learn", "guard", "track_query"]
    with nothing_gets_out(guest, world):
        pid = main_pid(guest)
        guest.must("dpkg", "-i", booted.second)
        assert another_daemon(guest, pid)
    after = filters(guest)
    assert [name.split("#")[0] for name in after] == ["learn", "guard", "track_query"]
    assert not set(after) & set(before)  # another build's, in the place of the old ones
    assert guest.must("ls", "/sys/fs/bpf/registry-enforcer") != generations
    assert (guest.root / POLICY.lstrip("/")).read_text() == TEXT
    assert try_once(guest, ALLOWED) == "OPEN"
    assert try_once(guest, ALLOWED, where="container") == "OPEN"


def test_reinstalling_takes_over_what_is_in_the_kernel(booted: Booted, guest: Guest, world: World) -> None:
    before = filters(guest)
    with nothing_gets_out(guest, world):
        guest.must("dpkg", "-i", booted.second)
        assert guest.active()
    assert filters(guest) == before


def test_removing_the_package_takes_enforcement_out_and_says_so(guest: Guest) -> None:
    assert "enforcement ends" in guest.must("dpkg", "--remove", "registry-enforcer")
    assert "registry_enforcer" not in guest.must("nft", "list", "tables")
    assert filters(guest) == []
    assert not guest.run("ls", "/sys/fs/bpf").stdout.replace("maps.debug", "").replace("progs.debug", "").strip()
    both_are(guest, "OPEN")
    assert (guest.root / POLICY.lstrip("/")).read_text() == TEXT


def test_purging_leaves_nothing(guest: Guest) -> None:
    guest.must("dpkg", "--purge", "registry-enforcer")
    assert files(guest) - _before["files"] == set()
    assert not Path(guest.root, "etc/registry-enforcer").exists()
