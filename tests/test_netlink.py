"""rtnetlink against the real kernel, in namespaces of our own.

The namespaces have no names and live as long as this process, so that nothing is left after a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest
from pyroute2.netlink.rtnl import RTM_GETROUTE
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from enforcer.netlink import Change, Changes, Direction, Netlink, NetlinkError
from enforcer.topology import Interface, Role, Route, plan_attachments
from tests.namespaces import checked, inside, ip, libc, new_namespace, path_of, run

pytestmark = pytest.mark.root

_SYS_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
_BPF_PROG_LOAD = 5
_BPF_PROG_TYPE_SCHED_CLS = 3
_RTMGRP_TC = 8
_SOL_NETLINK, _NETLINK_EXT_ACK = 270, 11
_MARK = 0x80000000
DEADLINE_SECONDS = 5


# --- a lab -----------------------------------------------------------------------------------------------------------
def tc(command: str) -> str:
    finished = run(f"tc {command}")
    assert finished.returncode == 0, f"tc {command}: {finished.stderr}"
    return finished.stdout


@pytest.fixture
def host() -> Iterator[None]:
    """The test runs in a new network namespace."""
    with new_namespace() as namespace, inside(namespace):
        yield


@pytest.fixture
def elsewhere(host: None) -> Iterator[int]:
    """Another network namespace."""
    with new_namespace() as namespace:
        yield namespace


@pytest.fixture
def netlink(host: None) -> Iterator[Netlink]:
    with Netlink() as opened:
        yield opened


def instruction(opcode: int, destination: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    """struct bpf_insn."""
    return struct.pack("=BBhi", opcode, source << 4 | destination, offset, immediate)


TC_ACT_UNSPEC = instruction(0xB7, immediate=-1) + instruction(0x95)  # r0 = -1; exit
TC_ACT_SHOT = instruction(0xB7, immediate=2) + instruction(0x95)
SET_MARK = (
    instruction(0xB4, destination=2, immediate=_MARK - (1 << 32))  # w2 = mark
    + instruction(0x63, destination=1, source=2, offset=8)  # skb->mark = w2
    + TC_ACT_UNSPEC
)


@contextlib.contextmanager
def program(instructions: bytes) -> Iterator[int]:
    """A descriptor of a loaded sched_cls program."""
    code = ctypes.create_string_buffer(instructions)
    licence = ctypes.create_string_buffer(b"Dual BSD/GPL")
    request = struct.pack(
        "=IIQQ", _BPF_PROG_TYPE_SCHED_CLS, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(licence)
    ).ljust(120, b"\0")
    fd = checked(libc.syscall(_SYS_BPF, _BPF_PROG_LOAD, ctypes.create_string_buffer(request), len(request)))
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def harmless() -> Iterator[int]:
    with program(TC_ACT_UNSPEC) as fd:
        yield fd


def by_name(netlink: Netlink) -> dict[str, Interface]:
    return {interface.name: interface for interface in netlink.interfaces()}


def index_of(name: str) -> int:
    return socket.if_nametoindex(name)


# --- readings --------------------------------------------------------------------------------------------------------
def test_interfaces_are_listed_with_kind_master_peer_and_addresses(netlink: Netlink, elsewhere: int) -> None:
    ip("link add br0 type bridge; link add port type veth peer name far; link set port master br0 up")
    ip(f"link set far netns {path_of(elsewhere)}; link add here type veth peer name there")
    ip("address add 10.9.0.1/24 dev br0; address add fd09::1/64 dev br0")
    ip("address add 10.1.0.1 peer 10.1.0.2/24 dev here")
    listed = by_name(netlink)
    assert listed["lo"].loopback
    assert listed["lo"].kind is None
    assert ip_interface("127.0.0.1/8") in listed["lo"].addresses
    assert listed["br0"].kind == "bridge"
    assert listed["br0"].addresses == (ip_interface("10.9.0.1/24"), ip_interface("fd09::1/64"))
    assert not listed["br0"].up
    assert (listed["port"].kind, listed["port"].master, listed["port"].peer) == ("veth", index_of("br0"), None)
    assert listed["port"].up
    assert (listed["here"].peer, listed["there"].peer) == (index_of("there"), index_of("here"))
    assert listed["here"].addresses == (ip_interface("10.1.0.1/32"),)


def test_each_kind_of_device_this_kernel_makes_has_the_role_of_its_kind(netlink: Netlink) -> None:
    ip("link add under type veth peer name over")
    makers = {
        "veth": ("link add x0 type veth peer name x1", Role.INTERNAL),
        "bridge": ("link add x0 type bridge", Role.INTERNAL),
        "dummy": ("link add x0 type dummy", Role.INTERNAL),
        "tun": ("tuntap add x0 mode tun", Role.UPLINK),
        "vxlan": ("link add x0 type vxlan id 4 dstport 4789", Role.UPLINK),
        "wireguard": ("link add x0 type wireguard", Role.UPLINK),
        "vlan": ("link add link under name x0 type vlan id 5", Role.UPLINK),
        "macvlan": ("link add link under name x0 type macvlan", Role.UPLINK),
        "ipvlan": ("link add link under name x0 type ipvlan", Role.UPLINK),
        "bond": ("link add x0 type bond", Role.UPLINK),
        "vrf": ("link add x0 type vrf table 10", Role.UPLINK),
    }
    made = set()
    for kind, (command, role) in makers.items():
        if run(f"ip {command}").returncode == 0:
            made.add(kind)
            plan = plan_attachments(netlink.interfaces(), netlink.routes(), {})
            entry = next(entry for entry in plan.roles if entry.interface.name == "x0")
            assert (entry.interface.kind, entry.role) == (kind, role)
            ip("link delete x0")
    assert made >= {"veth", "bridge", "tun"}


def test_tap_in_a_bridge_is_internal_and_on_its_own_an_uplink(netlink: Netlink) -> None:
    ip("link add br0 type bridge; tuntap add t0 mode tap; tuntap add t1 mode tap; link set t0 master br0")
    assert plan_attachments(netlink.interfaces(), netlink.routes(), {}).internal == {"lo", "br0", "t0"}


def test_routes_are_listed_from_all_tables_with_each_next_hop(netlink: Netlink) -> None:
    ip("link add left type veth peer name right; link set left up; link set right up")
    ip("address add 10.1.0.1/24 dev left; address add 10.2.0.1/24 dev right; address add fd01::1/64 dev left nodad")
    ip("route add 10.50.0.0/16 via 10.1.0.9 table 77; route add default nexthop via 10.1.0.2 nexthop via 10.2.0.2")
    ip("-6 route add default via fd01::2; route add 10.60.0.0/16 via inet6 fd01::3 dev left")
    ip("route add blackhole 10.70.0.0/16")
    left, right = index_of("left"), index_of("right")
    assert set(netlink.routes()) >= {
        Route(ip_network("10.1.0.0/24"), None, left),
        Route(ip_network("10.50.0.0/16"), ip_address("10.1.0.9"), left),
        Route(ip_network("0.0.0.0/0"), ip_address("10.1.0.2"), left),
        Route(ip_network("0.0.0.0/0"), ip_address("10.2.0.2"), right),
        Route(ip_network("::/0"), ip_address("fd01::2"), left),
        Route(ip_network("10.60.0.0/16"), ip_address("fd01::3"), left),
    }
    destinations = {route.destination for route in netlink.routes()}
    assert ip_network("10.70.0.0/16") not in destinations
    assert ip_network("10.1.0.1/32") not in destinations  # of the table `local`


def test_kernel_is_asked_where_a_resolver_is(netlink: Netlink) -> None:
    ip("link add left type veth peer name right; link set left up; link set right up; address add 10.1.0.1/24 dev left")
    ip("address add fd01::1/64 dev left nodad; route add 10.50.0.0/16 via 10.1.0.9; route add prohibit 10.51.0.0/16")
    ip("-6 route add blackhole fd51::/64")
    left, lo = index_of("left"), index_of("lo")
    places = {
        "127.0.0.53": lo,
        "10.1.0.1": lo,
        "10.1.0.7": left,
        "10.50.3.4": left,
        "10.51.0.1": None,
        "192.0.2.1": None,
        "::1": lo,
        "fd01::7": left,
        "fd51::7": None,
        "2001:db8::1": None,
        "fe80::1%right": index_of("right"),
        "fe80::1%none": None,
    }
    assert {address: netlink.route_to(ip_address(address)) for address in places} == places


def test_plain_veth_that_carries_the_default_route_is_the_uplink(netlink: Netlink, elsewhere: int) -> None:
    ip("link add uplink type veth peer name far")
    ip(f"link set far netns {path_of(elsewhere)}; link set uplink up; address add 10.1.0.2/24 dev uplink")
    ip("link add other type vxlan id 7 dstport 4789")  # else the only way that may lead out is taken for one that does
    resolver = ip_address("9.9.9.9")
    before = plan_attachments(netlink.interfaces(), netlink.routes(), {resolver: netlink.route_to(resolver)})
    assert before.internal == {"lo", "uplink"}
    ip("route add default via 10.1.0.1")
    after = plan_attachments(netlink.interfaces(), netlink.routes(), {resolver: netlink.route_to(resolver)})
    assert after.internal == {"lo"}
    assert after.learn == {index_of("lo"), index_of("uplink")}


# --- tc --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("direction", Direction)
def test_attached_program_is_listed_and_detaching_leaves_nothing(
    netlink: Netlink, harmless: int, direction: Direction
) -> None:
    ip("link add br0 type bridge")
    index = index_of("br0")
    assert netlink.attached(index) == {}
    assert netlink.attach(index, direction, harmless, "learn")
    assert netlink.attached(index) == {direction: "learn"}
    assert "direct-action" in tc(f"filter show dev br0 {direction.name.lower()}")
    netlink.detach(index)
    assert netlink.attached(index) == {}
    assert "clsact" not in tc("qdisc show dev br0")


def test_program_stays_when_its_loader_has_gone(netlink: Netlink) -> None:
    ip("link add br0 type bridge")
    with program(TC_ACT_UNSPEC) as fd, Netlink() as other:
        other.attach(index_of("br0"), Direction.INGRESS, fd, "gate")
    assert netlink.attached(index_of("br0")) == {Direction.INGRESS: "gate"}


def test_same_program_is_not_attached_again_and_another_takes_its_place(netlink: Netlink, harmless: int) -> None:
    ip("link add br0 type bridge")
    index = index_of("br0")

    def told() -> int:
        """Events so far of tc filters, ours among them."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while listener.recv(65_536, socket.MSG_DONTWAIT):
                count += 1
        return count

    def programs() -> list[tuple[str, int]]:
        """(name, id) as tc(8) sees them."""
        filters = [entry.get("options") for entry in json.loads(tc("-j filter show dev br0 ingress"))]
        return [(options["bpf_name"].partition("#")[0], options["prog"]["id"]) for options in filters if options]

    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as listener,
        # The same instructions, and another program: its maps may be others.
        program(TC_ACT_UNSPEC) as twin,
    ):
        listener.bind((0, _RTMGRP_TC))
        assert netlink.attach(index, Direction.INGRESS, harmless, "gate")
        assert told()
        first = programs()
        assert netlink.attach(index, Direction.INGRESS, harmless, "gate")
        assert not told()
        assert programs() == first
        assert netlink.attach(index, Direction.INGRESS, harmless, "learn")
        assert programs() == [("learn", first[0][1])]
        assert netlink.attach(index, Direction.INGRESS, twin, "learn")
        assert told()
    assert netlink.attached(index) == {Direction.INGRESS: "learn"}
    assert len(programs()) == 1
    assert programs()[0][1] != first[0][1]


def test_no_packet_passes_while_a_program_is_replaced(netlink: Netlink) -> None:
    ip("link add left type veth peer name right; link set left up; link set right up; address add 10.1.0.1/24 dev left")
    ip("neighbour add 10.1.0.2 lladdr 02:00:00:00:00:01 dev left")
    index = index_of("left")

    def sent() -> int:
        return int(Path("/proc/thread-self/net/dev").read_text().split("left:")[1].split()[9])

    with (
        program(TC_ACT_SHOT) as one,
        program(TC_ACT_SHOT) as two,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        netlink.attach(index, Direction.EGRESS, one, "one")
        before = sent()
        for turn in range(200):
            netlink.attach(index, Direction.EGRESS, (one, two)[turn % 2], ("one", "two")[turn % 2])
            for _ in range(20):
                with contextlib.suppress(OSError):  # ENOBUFS: dropped
                    sock.sendto(b"x", ("10.1.0.2", 9))
        assert sent() == before
        netlink.detach(index)
        sock.sendto(b"x", ("10.1.0.2", 9))
        assert sent() > before


def test_filters_and_clsact_of_another_owner_are_left_alone(netlink: Netlink, harmless: int) -> None:
    ip("link add br0 type bridge")
    index = index_of("br0")
    tc("qdisc add dev br0 clsact")
    tc("filter add dev br0 ingress pref 1 protocol ip u32 match u32 0 0 flowid 1:1")
    tc("filter add dev br0 egress pref 1 protocol all u32 match u32 0 0 flowid 1:1")
    theirs = {direction: tc(f"filter show dev br0 {direction}") for direction in ("ingress", "egress")}
    for direction in Direction:
        assert netlink.attach(index, direction, harmless, "gate")
    assert set(netlink.attached(index)) == set(Direction)
    with_ours = tc("filter show dev br0 ingress")
    assert "u32" in with_ours
    assert "gate" in with_ours
    netlink.detach(index)
    assert {direction: tc(f"filter show dev br0 {direction}") for direction in ("ingress", "egress")} == theirs
    assert "clsact" in tc("qdisc show dev br0")


def test_clsact_that_we_made_stays_while_another_uses_it(netlink: Netlink, harmless: int) -> None:
    ip("link add br0 type bridge")
    index = index_of("br0")
    netlink.attach(index, Direction.INGRESS, harmless, "gate")
    tc("filter add dev br0 egress u32 match u32 0 0 flowid 1:1")
    netlink.detach(index)
    assert "clsact" in tc("qdisc show dev br0")
    assert "u32" in tc("filter show dev br0 egress")


def test_clsact_that_an_earlier_process_made_goes_and_anothers_stays(netlink: Netlink, harmless: int) -> None:
    ip("link add br0 type bridge; link add br1 type bridge")
    tc("qdisc add dev br1 clsact")
    with Netlink() as earlier:
        for name in ("br0", "br1"):
            for direction in Direction:
                earlier.attach(index_of(name), direction, harmless, "gate")
    for name in ("br0", "br1"):
        netlink.detach(index_of(name))
        assert netlink.attached(index_of(name)) == {}
    assert "clsact" not in tc("qdisc show dev br0")
    assert "clsact" in tc("qdisc show dev br1")


def test_program_of_another_at_our_priority_stays_beside_ours(netlink: Netlink, harmless: int) -> None:
    ip("link add br0 type bridge")
    index = index_of("br0")
    tc("qdisc add dev br0 clsact")
    bytecode = ("bytecode", "1,6 0 0 0", "flowid", "1:1")
    command = "tc filter add dev br0 ingress pref 1 protocol all bpf"
    subprocess.run([*command.split(), *bytecode], check=True)
    theirs = tc("filter show dev br0 ingress")
    netlink.attach(index, Direction.INGRESS, harmless, "ours")
    assert netlink.attached(index) == {Direction.INGRESS: "ours"}
    assert tc("filter show dev br0 ingress").count("pref 1 bpf chain 0 handle") == 2
    netlink.detach(index)
    assert tc("filter show dev br0 ingress") == theirs


def test_older_ingress_qdisc_serves_ingress_and_refuses_egress(netlink: Netlink, harmless: int) -> None:
    ip("link add br0 type bridge")
    tc("qdisc add dev br0 ingress")
    assert netlink.attach(index_of("br0"), Direction.INGRESS, harmless, "gate")
    with pytest.raises(NetlinkError, match="another program's ingress qdisc"):
        netlink.attach(index_of("br0"), Direction.EGRESS, harmless, "track")
    assert tc("filter show dev br0 ingress").count("handle") == 1


def test_interface_that_has_vanished_is_counted_and_no_error(netlink: Netlink, harmless: int) -> None:
    ip("link add br0 type bridge")
    index = index_of("br0")
    ip("link delete br0")
    assert not netlink.attach(index, Direction.INGRESS, harmless, "gate")
    assert netlink.vanished == 1
    assert netlink.attached(index) == {}
    netlink.detach(index)


def test_refusal_carries_the_kernels_error_and_its_explanation(netlink: Netlink, harmless: int) -> None:
    ip("link add br0 type bridge; link add br1 type bridge")
    with pytest.raises(NetlinkError, match="Invalid argument") as refused:
        netlink.attach(index_of("br0"), Direction.INGRESS, harmless, "a name that is too long" * 20)
    assert refused.value.errno == errno.EINVAL
    tc("qdisc add dev br1 ingress")
    with pytest.raises(NetlinkError) as refused:
        netlink.attach(index_of("br1"), Direction.EGRESS, harmless, "track")
    explained = refused.value.__cause__
    assert isinstance(explained, NetlinkError)
    assert explained.errno == errno.EEXIST
    assert explained.strerror != os.strerror(errno.EEXIST)
    assert "xclusiv" in str(explained)


def test_listing_that_fails_is_no_shorter_listing(netlink: Netlink) -> None:
    unknown_table = rtmsg()
    unknown_table.update(family=socket.AF_INET, attrs=[("RTA_TABLE", 77)])
    with pytest.raises(NetlinkError, match="table does not exist") as refused:
        netlink._dump(RTM_GETROUTE, unknown_table, dict)
    assert refused.value.errno == errno.ENOENT
    netlink._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 0)
    with pytest.raises(NetlinkError, match="No such file") as refused:
        netlink._dump(RTM_GETROUTE, unknown_table, dict)
    assert refused.value.errno == errno.ENOENT


def test_mark_set_at_ingress_of_the_bridge_reaches_forward(netlink: Netlink, elsewhere: int) -> None:
    """The gate sits on the bridge, not on its ports: what a container sends must pass it before nftables looks."""
    ip("link add br0 type bridge; link add port type veth peer name eth0; link set port master br0 up")
    ip(f"link set eth0 netns {path_of(elsewhere)}; link set br0 up; address add 10.9.0.1/24 dev br0")
    ip("link add uplink type veth peer name far; link set uplink up; link set far up")
    ip("address add 10.8.0.1/24 dev uplink; neighbour add 10.8.0.2 lladdr 02:00:00:00:00:01 dev uplink")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    with inside(elsewhere):
        ip("link set eth0 up; address add 10.9.0.2/24 dev eth0; route add default via 10.9.0.1")
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    table = "table ip t { counter marked { }; counter plain { }; chain f { type filter hook forward priority 0;"
    table += f" meta mark & {_MARK} != 0 counter name marked accept; counter name plain; }}; }}"
    subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)

    def packets(counter: str) -> int:
        return int(run(f"nft list counter ip t {counter}").stdout.split("packets ")[1].split()[0])

    def send_until(arrived: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not arrived() and time.monotonic() < deadline:
            sock.sendto(b"x", ("10.8.0.2", 443))
            time.sleep(0.02)  # paces the sender while the bridge's port comes up; the deadline ends it
        return arrived()

    with sock, program(SET_MARK) as marking:
        assert send_until(lambda: packets("plain") > 0)
        assert packets("marked") == 0
        assert netlink.attach(index_of("br0"), Direction.INGRESS, marking, "gate")
        plain = packets("plain")
        assert send_until(lambda: packets("marked") > 0)
        assert packets("plain") == plain


# --- events ----------------------------------------------------------------------------------------------------------
async def next_change(changes: Changes, wanted: Change, deadline_seconds: float = DEADLINE_SECONDS) -> Change:
    """The first item that contains `wanted`."""
    async with asyncio.timeout(deadline_seconds):
        async for change in changes:
            if wanted in change:
                return change
    raise AssertionError("the iterator is endless")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ip link add br1 type bridge", Change.LINK),
        ("ip link set br0 name renamed", Change.LINK),
        ("ip address add 10.3.0.1/24 dev br0", Change.ADDRESS),
        ("ip route add 10.4.0.0/16 dev br0", Change.ROUTE),
        ("ip route del 10.5.0.0/16", Change.ROUTE),
        ("ip rule add fwmark 7 table 7", Change.ROUTE),
        ("tc qdisc add dev br0 clsact", Change.TRAFFIC_CONTROL),
    ],
)
def test_change_is_told_once(netlink: Netlink, command: str, expected: Change) -> None:
    ip("link add br0 type bridge; link set br0 up; address add 10.1.0.1/24 dev br0; route add 10.5.0.0/16 dev br0")

    async def scenario() -> None:
        with netlink.changes() as changes:
            assert await anext(changes) == Change.EVERYTHING
            assert run(command).returncode == 0
            assert expected in await next_change(changes, expected)
            with pytest.raises(TimeoutError):
                await next_change(changes, expected, 0.1)

    asyncio.run(scenario())


def test_own_attaching_tells_nothing_and_anothers_removal_of_it_does(netlink: Netlink, harmless: int) -> None:
    ip("link add br0 type bridge")

    async def scenario() -> None:
        with netlink.changes() as changes:
            await anext(changes)
            netlink.attach(index_of("br0"), Direction.INGRESS, harmless, "gate")
            with pytest.raises(TimeoutError):
                await next_change(changes, Change.TRAFFIC_CONTROL, 0.1)
            tc("qdisc del dev br0 clsact")
            assert await next_change(changes, Change.TRAFFIC_CONTROL)
            assert netlink.attached(index_of("br0")) == {}

    asyncio.run(scenario())


def test_burst_is_a_few_items_and_none_is_missed(netlink: Netlink) -> None:
    names = [f"v{number}" for number in range(200)]
    batch = "".join(f"link add {name} type veth peer name p{name}\n" for name in names)

    async def scenario() -> int:
        items = 0
        with netlink.changes() as changes:
            creating = await asyncio.create_subprocess_exec("ip", "-batch", "-", stdin=asyncio.subprocess.PIPE)
            creating_done = asyncio.create_task(creating.communicate(batch.encode()))
            async with asyncio.timeout(30):
                async for _ in changes:
                    items += 1
                    if names[-1] in by_name(netlink):
                        break
            await creating_done
        return items

    items = asyncio.run(scenario())
    assert set(names) <= by_name(netlink).keys()
    assert items < 200


def test_more_events_than_fit_are_told_as_lost_with_everything(netlink: Netlink) -> None:
    ip("link add br0 type bridge")

    async def scenario() -> None:
        with netlink.changes() as changes:
            await anext(changes)
            flapping = "".join(f"link set br0 {state}\n" for state in ("up", "down")) * 500
            subprocess.run(["ip", "-batch", "-"], input=flapping, text=True, check=True)  # noqa: ASYNC221
            assert await next_change(changes, Change.LOST) == Change.LOST | Change.EVERYTHING
            assert run("ip link add br1 type bridge").returncode == 0
            assert Change.LINK in await next_change(changes, Change.LINK)

    asyncio.run(scenario())


def test_new_bridge_is_covered_within_fifty_milliseconds(netlink: Netlink, harmless: int) -> None:
    """Measured from before the system call that makes it, with twenty there already.

    Median 15 to 20 ms on a busy machine, nearly all of it in pyroute2's decoder. Until then the interface vouches for
    nothing: what comes from it is refused unless the sets already permit it.
    """
    for number in range(20):
        ip(f"link add old{number} type bridge")
    listing = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)

    def create_bridge(name: str) -> None:
        # RTM_NEWLINK without the milliseconds that starting ip(8) takes.
        named = struct.pack("=HH16s", 20, 3, name.encode())
        kind = struct.pack("=HHHH8s", 16, 18, 12, 1, b"bridge")
        body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + named + kind
        listing.send(struct.pack("=IHHII", 16 + len(body), 16, 0x605, 1, 0) + body)
        assert struct.unpack_from("=i", listing.recv(4096), 16)[0] == 0

    async def scenario() -> list[float]:
        seconds = []
        with netlink.changes() as changes:
            for number in range(20):
                with contextlib.suppress(TimeoutError):
                    await next_change(changes, Change.LOST, 0.05)  # until it is silent
                started = time.monotonic()
                create_bridge(f"br{number}")
                covered = False
                while not covered:
                    await next_change(changes, Change.LINK)
                    plan = plan_attachments(netlink.interfaces(), netlink.routes(), {})
                    for index in plan.gate:
                        netlink.attach(index, Direction.INGRESS, harmless, "gate")
                    covered = f"br{number}" in {entry.interface.name for entry in plan.roles}
                seconds.append(time.monotonic() - started)
                assert Direction.INGRESS in netlink.attached(index_of(f"br{number}"))
        return sorted(seconds)

    with listing:
        seconds = asyncio.run(scenario())
    print(f"covered after {1000 * seconds[10]:.1f} ms (median), {1000 * seconds[-1]:.1f} ms (worst)")
    assert seconds[0] < 0.050  # the best: what else this machine is doing is not measured


def test_churn_of_two_hundred_veths_ends_with_every_one_covered(netlink: Netlink, harmless: int) -> None:
    ip("link add br0 type bridge")
    # Half of them are gone again before anyone could attach to them.
    batch = "".join(
        f"link add v{number} type veth peer name p{number}\n" + (f"link delete v{number}\n" if number % 2 else "")
        for number in range(200)
    )

    async def scenario() -> None:
        creating = await asyncio.create_subprocess_exec("ip", "-batch", "-", stdin=asyncio.subprocess.PIPE)
        done = asyncio.create_task(creating.communicate(batch.encode()))
        with netlink.changes() as changes:
            async with asyncio.timeout(60):
                async for _ in changes:
                    interfaces = netlink.interfaces()
                    plan = plan_attachments(interfaces, netlink.routes(), {})
                    covered = [netlink.attach(i, Direction.INGRESS, harmless, "gate") for i in sorted(plan.gate)]
                    if "p198" in {interface.name for interface in interfaces} and done.done() and all(covered):
                        break
                    if "p198" in {interface.name for interface in interfaces} and not done.done():
                        await done
                        ip("link set br0 up")  # one more event, after the last of theirs
        assert creating.returncode == 0

    asyncio.run(scenario())
    uncovered = [
        entry.name for entry in netlink.interfaces() if not entry.loopback and not netlink.attached(entry.index)
    ]
    assert uncovered == []
    assert len(netlink.interfaces()) == 202


@pytest.mark.parametrize(("number", "found"), [(errno.EOPNOTSUPP, False), (errno.EPERM, None)])
def test_kernel_without_filters_takes_none_and_other_refusals_are_errors(
    netlink: Netlink, monkeypatch: pytest.MonkeyPatch, number: int, found: bool | None
) -> None:
    def refuse(*_: object) -> list[object]:
        raise NetlinkError(number, os.strerror(number))

    monkeypatch.setattr(Netlink, "_exchange", refuse)
    monkeypatch.setattr("enforcer.netlink._program_id", lambda _: 1)
    if found is None:
        with pytest.raises(NetlinkError):
            netlink.takes_filters(0)
    else:
        assert netlink.takes_filters(0) is found
