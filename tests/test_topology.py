"""Roles of interfaces and where the programs go: as a table of hosts, and as laws over random ones."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.attribution import PROGRAM_SCOPES, classify_cgroup
from enforcer.kernel_abi import COMM_BYTES, MarkedScope
from enforcer.topology import AttachmentPlan, Interface, Role, Route, plan_attachments

RESOLVER = IPv4Address("9.9.9.9")
WSL_RESOLVER = IPv4Address("10.255.255.254")
ID = "0123456789abcdef" * 4

LO = Interface(1, "lo", None, loopback=True, addresses=(ip_interface("127.0.0.1/8"), ip_interface("::1/128")))
ETH0 = Interface(2, "eth0", None, addresses=(ip_interface("192.0.2.10/24"), ip_interface("2001:db8::10/64")))
DOCKER0 = Interface(3, "docker0", "bridge", addresses=(ip_interface("172.17.0.1/16"),))
CONTAINER = Interface(4, "veth4", "veth", master=3)
DEFAULT = Route(ip_network("0.0.0.0/0"), ip_address("192.0.2.1"), 2)
HOST = (LO, ETH0, DOCKER0, CONTAINER)


def role_of(plan: AttachmentPlan, name: str) -> Role:
    return next(entry.role for entry in plan.roles if entry.interface.name == name)


def why(plan: AttachmentPlan, name: str) -> str:
    return next(entry.why for entry in plan.roles if entry.interface.name == name)


def route(destination: str, interface: int, gateway: str | None = None) -> Route:
    return Route(ip_network(destination), ip_address(gateway) if gateway else None, interface)


def test_usual_host_learns_on_the_uplink_and_lo_and_gates_the_bridge_and_its_ports() -> None:
    plan = plan_attachments(HOST, [DEFAULT], {RESOLVER: 2, IPv4Address("127.0.0.53"): 1})
    assert plan.internal == {"lo", "docker0", "veth4"}
    assert plan.learn == {1, 2}
    assert plan.gate == {3, 4}
    assert plan.unlearnable == ()


def test_uplink_without_a_resolver_behind_it_is_gated_and_does_not_learn() -> None:
    vpn = Interface(5, "wg0", "wireguard")
    plan = plan_attachments((*HOST, vpn), [DEFAULT], {RESOLVER: 2})
    assert role_of(plan, "wg0") is Role.UPLINK
    assert 5 in plan.gate
    assert 5 not in plan.learn


@pytest.mark.parametrize(
    ("kind", "role"),
    [
        (None, Role.UPLINK),
        ("wireguard", Role.UPLINK),
        ("tun", Role.UPLINK),
        ("vlan", Role.UPLINK),
        ("macvlan", Role.UPLINK),
        ("ipvlan", Role.UPLINK),
        ("bond", Role.UPLINK),
        ("vxlan", Role.UPLINK),
        ("invented-next-year", Role.UPLINK),
        ("veth", Role.INTERNAL),
        ("netkit", Role.INTERNAL),
        ("dummy", Role.INTERNAL),
        ("bridge", Role.INTERNAL),
    ],
)
def test_only_kinds_known_to_end_on_this_host_are_internal(kind: str | None, role: Role) -> None:
    plan = plan_attachments((LO, Interface(2, "eth0", None), Interface(7, "new0", kind)), [], {})
    assert role_of(plan, "new0") is role


def test_one_end_of_a_pair_is_an_uplink_while_no_way_out_is_known() -> None:
    """A system in a container, at boot: what has no route yet gets one a moment later, and packets use it at once."""
    host0 = Interface(2, "host0", "veth")
    plan = plan_attachments((LO, host0, DOCKER0, CONTAINER), [], {})
    assert why(plan, "host0") == "veth, and no way out is known"
    assert plan.internal == {"lo", "docker0", "veth4"}
    both_ends = Interface(8, "left", "veth", peer=9), Interface(9, "right", "veth", peer=8)
    assert plan_attachments((LO, *both_ends), [], {}).internal == {"lo", "left", "right"}
    known = plan_attachments((LO, Interface(7, "eth0", None), host0), [], {})
    assert known.internal == {"lo", "host0"}


@pytest.mark.parametrize(
    ("through", "reason"),
    [
        (route("0.0.0.0/0", 7), "route to 0.0.0.0/0"),
        (route("::/0", 7, "fe80::1"), "route to ::/0"),
        (route("128.0.0.0/1", 7), "route to 128.0.0.0/1"),
        (route("10.0.0.0/8", 7, "172.18.0.2"), "route to 10.0.0.0/8 via 172.18.0.2"),
        (route("10.1.2.3/32", 7, "fe80::2"), "route to 10.1.2.3/32 via fe80::2"),
    ],
)
@pytest.mark.parametrize("kind", ["veth", "bridge", "dummy"])
def test_route_onward_makes_any_interface_an_uplink(kind: str, through: Route, reason: str) -> None:
    plan = plan_attachments((LO, Interface(7, "x0", kind)), [through], {RESOLVER: 7})
    assert role_of(plan, "x0") is Role.UPLINK
    assert why(plan, "x0") == reason
    assert plan.learn == {1, 7}


def test_route_on_the_link_leaves_a_veth_internal() -> None:
    interfaces = LO, Interface(2, "eth0", None), Interface(7, "cali7", "veth")
    plan = plan_attachments(interfaces, [route("10.0.0.7/32", 7)], {})
    assert role_of(plan, "cali7") is Role.INTERNAL


def test_bridge_with_a_hardware_port_is_an_uplink_and_so_are_its_ports() -> None:
    interfaces = (
        LO,
        Interface(2, "eth0", None, master=3),
        Interface(3, "br0", "bridge", addresses=(ip_interface("192.0.2.10/24"),)),
        Interface(4, "veth4", "veth", master=3),
    )
    plan = plan_attachments(interfaces, [Route(DEFAULT.destination, DEFAULT.gateway, 3)], {RESOLVER: 3})
    assert plan.internal == {"lo"}
    assert plan.learn == {1, 3}
    assert plan.gate == frozenset()
    without_routes = plan_attachments(interfaces, [], {})
    assert without_routes.internal == {"lo"}
    assert why(without_routes, "br0") == "its port eth0 is an uplink (hardware)"
    assert why(without_routes, "veth4") == "port of br0, an uplink"


def test_bridge_of_veths_taps_and_dummies_is_internal() -> None:
    ports = [Interface(10 + n, f"p{n}", kind, master=3) for n, kind in enumerate(("veth", "tun", "dummy", "netkit"))]
    plan = plan_attachments((LO, DOCKER0, *ports), [], {})
    assert plan.internal == {"lo", "docker0", "p0", "p1", "p2", "p3"}
    assert why(plan, "docker0") == "bridge of local ports only: p0, p1, p2, p3"


def test_tap_outside_a_bridge_is_an_uplink() -> None:
    plan = plan_attachments((LO, Interface(7, "tap0", "tun")), [], {})
    assert role_of(plan, "tap0") is Role.UPLINK


def test_bridge_behind_a_veth_pair_into_a_hardware_bridge_is_an_uplink() -> None:
    interfaces = (
        LO,
        Interface(2, "eth0", None, master=3),
        Interface(3, "br0", "bridge"),
        Interface(4, "left", "veth", master=3, peer=5),
        Interface(5, "right", "veth", master=6, peer=4),
        Interface(6, "br1", "bridge"),
        Interface(7, "local", "bridge"),
    )
    plan = plan_attachments(interfaces, [], {})
    assert plan.internal == {"lo", "local"}


def test_ports_of_bonds_are_covered_by_the_bond_and_ports_of_a_vrf_stand_for_themselves() -> None:
    interfaces = (
        LO,
        Interface(2, "bond0", "bond"),
        Interface(3, "eth0", None, master=2),
        Interface(4, "blue", "vrf"),
        Interface(5, "eth1", None, master=4),
    )
    assert plan_attachments(interfaces, [], {}).gate == {2, 4, 5}


def test_interface_whose_master_is_not_listed_is_gated() -> None:
    assert plan_attachments((LO, Interface(5, "veth5", "veth", master=99)), [], {}).gate == {5}


def test_resolver_inside_a_container_never_teaches() -> None:
    plan = plan_attachments(HOST, [DEFAULT], {IPv4Address("172.17.0.2"): 3})
    assert plan.learn == {1}
    assert plan.unlearnable == (
        (
            IPv4Address("172.17.0.2"),
            "reached through docker0, which is internal: bridge of local ports only: veth4",
        ),
    )


@pytest.mark.parametrize("index", [None, 99])
def test_resolver_without_a_route_is_reported(index: int | None) -> None:
    plan = plan_attachments(HOST, [], {RESOLVER: index})
    assert plan.learn == {1}
    assert plan.unlearnable == ((RESOLVER, "no route to it"),)


def test_own_ranges_are_addresses_of_uplinks_and_whole_links_of_internal_interfaces() -> None:
    routes = [DEFAULT, route("192.0.2.0/24", 2), route("172.17.0.0/16", 3), route("10.88.0.7/32", 4)]
    assert set(plan_attachments(HOST, routes, {}).own_ranges) == {
        ip_network("127.0.0.0/8"),
        ip_network("192.0.2.10/32"),
        ip_network("172.17.0.0/16"),
        ip_network("10.88.0.7/32"),
        ip_network("::1/128"),
        ip_network("2001:db8::10/128"),
    }


def test_own_ranges_do_not_repeat_what_a_wider_one_covers() -> None:
    inner = Interface(8, "dummy0", "dummy", addresses=(ip_interface("172.17.5.1/24"), ip_interface("172.17.6.1/32")))
    ranges = plan_attachments((DOCKER0, inner), [], {}).own_ranges
    assert ranges == (ip_network("172.17.0.0/16"),)


# As WSL makes them with mirrored networking: both are Hyper-V's network devices, and all TCP and UDP for 127.0.0.1 goes
# to a gateway on loopback0 (microsoft/WSL, NetworkManager.cpp: table 127).
MIRRORED = Interface(2, "eth0", None, addresses=(ip_interface("192.168.1.20/24"),))
LOOPBACK0 = Interface(3, "loopback0", None)
TO_WINDOWS = route("127.0.0.1/32", 3, "169.254.73.152")
OWN_ADDRESS = route("192.168.1.20/32", 2, "169.254.73.152")  # table 128: Windows has a say in these, too
MIRRORED_ROUTES = (route("0.0.0.0/0", 2, "192.168.1.1"), OWN_ADDRESS, TO_WINDOWS)


def test_wsls_loopback0_is_no_uplink_for_127_and_internal_for_nothing() -> None:
    plan = plan_attachments((LO, MIRRORED, LOOPBACK0), MIRRORED_ROUTES, {WSL_RESOLVER: 1}, wsl=True)
    assert role_of(plan, "loopback0") is Role.HOST_LOOPBACK
    assert plan.host_loopback == {"loopback0"}
    assert plan.internal == {"lo"}
    assert role_of(plan, "eth0") is Role.UPLINK
    assert plan.learn == {1}
    assert plan.gate == {2, 3}
    assert plan.unlearnable == ()


@pytest.mark.parametrize(
    ("device", "routes", "wsl"),
    [
        (LOOPBACK0, MIRRORED_ROUTES, False),  # somebody's own, on a host that is not WSL
        (LOOPBACK0, MIRRORED_ROUTES[:2], True),  # nothing leads to 127.0.0.1 there: not mirrored
        (LOOPBACK0, (*MIRRORED_ROUTES[:2], route("10.0.0.0/8", 3, "169.254.73.152")), True),
        (LOOPBACK0, (*MIRRORED_ROUTES[:2], route("::1/128", 3, "fe80::1")), True),
        (replace(LOOPBACK0, name="loopback1"), MIRRORED_ROUTES, True),
        (replace(LOOPBACK0, master=4), MIRRORED_ROUTES, True),
    ],
    ids=["not WSL", "no route", "other route", "IPv6", "other name", "port of a bridge"],
)
def test_what_is_only_called_loopback0_is_an_uplink(device: Interface, routes: tuple[Route, ...], wsl: bool) -> None:
    bridge = Interface(4, "br0", "bridge")
    plan = plan_attachments((LO, MIRRORED, device, bridge), routes, {}, wsl=wsl)
    assert role_of(plan, device.name) is Role.UPLINK
    assert plan.host_loopback == frozenset()


def test_wsl_with_nat_learns_on_eth0_from_the_gateway_and_on_lo_from_the_tunnel() -> None:
    eth0 = Interface(2, "eth0", None, addresses=(ip_interface("172.24.16.5/20"),))
    routes = [route("0.0.0.0/0", 2, "172.24.16.1"), route("172.24.16.0/20", 2)]
    plan = plan_attachments((LO, eth0), routes, {IPv4Address("172.24.16.1"): 2, WSL_RESOLVER: 1}, wsl=True)
    assert plan.learn == {1, 2}
    assert plan.internal == {"lo"}


def interfaces_strategy() -> st.SearchStrategy[list[Interface]]:
    indexes = st.integers(2, 9)
    kinds = st.sampled_from([None, "veth", "bridge", "dummy", "tun", "vrf", "wireguard", "bond"])
    other = st.none() | indexes
    one = st.builds(Interface, indexes, st.just(""), kinds, other, other, st.booleans())
    return st.lists(one, unique_by=lambda interface: interface.index).map(
        lambda drawn: [
            LO,
            *(
                Interface(drew.index, f"if{drew.index}", drew.kind, drew.master, drew.peer, drew.up)
                for drew in drawn
                if drew.index not in (drew.master, drew.peer)
            ),
        ]
    )


@settings(deadline=None)
@given(
    interfaces_strategy(),
    st.lists(
        st.builds(
            Route,
            st.sampled_from([ip_network("0.0.0.0/0"), ip_network("10.0.0.0/8"), ip_network("fd00::/64")]),
            st.sampled_from([None, IPv4Address("10.0.0.1"), IPv6Address("fe80::1")]),
            st.integers(1, 9),
        )
    ),
    st.dictionaries(st.ip_addresses(), st.none() | st.integers(1, 9)),
)
def test_laws_of_a_plan(
    interfaces: list[Interface], routes: list[Route], resolvers: dict[IPv4Address | IPv6Address, int | None]
) -> None:
    plan = plan_attachments(interfaces, routes, resolvers)
    by_index = {interface.index: interface for interface in interfaces}
    uplinks = {entry.interface.index for entry in plan.roles if entry.role is Role.UPLINK}
    assert [entry.interface for entry in plan.roles] == interfaces
    assert not plan.learn & plan.gate
    assert plan.learn <= uplinks | {1}
    # What is neither learned on nor gated is covered by its master.
    assert all(by_index[index].master in by_index for index in by_index.keys() - plan.learn - plan.gate)
    # Everything that a route leads onward through is an uplink, whatever else is the case.
    onward = {r.interface for r in routes if r.gateway is not None or r.destination.prefixlen == 0}
    assert onward & by_index.keys() - {1} <= uplinks
    # A bridge is never better than its ports, a port never better than its master.
    for interface in interfaces:
        if interface.master in by_index and interface.index in uplinks:
            assert interface.master in uplinks
        if interface.index in by_index and interface.master in uplinks:
            assert interface.index in uplinks
    assert {resolver for resolver, _ in plan.unlearnable} <= resolvers.keys()


# --- attribution -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path",
    [
        "docker",
        f"docker/{ID}",
        f"/docker/{ID}",
        f"system.slice/docker-{ID}.scope",
        f"any/parent/{ID}",
        "libpod_parent",
        f"libpod_parent/libpod-{ID}",
        f"machine.slice/libpod-{ID}.scope",
        f"machine.slice/libpod-{ID}.scope/container",
        f"machine.slice/machine-libpod_pod_{ID}.slice",
        f"user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope",
        "kubepods",
        "kubepods.slice",
        f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-{ID}.scope",
        "kubelet.slice/kubelet-kubepods.slice",
        f"system.slice/crio-{ID}.scope",
        f"default/{ID}",
        "default/any-name-for-ctr",
        f"k8s.io/{ID}",
        f"user.slice/nerdctl-{ID}.scope",
        "buildkit/abcdef",
        "lxc.payload.web",
        f"system.slice/docker.service/docker/{ID}",
    ],
)
def test_cgroup_of_a_container_is_recognized(path: str) -> None:
    assert classify_cgroup(path) is MarkedScope.CONTAINER


@pytest.mark.parametrize(
    "path",
    [
        "system.slice/docker.service",
        "system.slice/containerd.service",
        "system.slice/crio.service",
        "system.slice/podman.service",
        "system.slice/buildkit.service",
        "system.slice/snap.docker.dockerd.service",
        "user.slice/user-1000.slice/user@1000.service/app.slice/docker.service",
        "user.slice/user-1000.slice/user@1000.service/user.slice/podman-4711.scope",
        "openrc.docker",
    ],
)
def test_cgroup_of_an_engine_is_recognized(path: str) -> None:
    assert classify_cgroup(path) is MarkedScope.ENGINE


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "init.scope",
        "system.slice",
        "system.slice/ssh.service",
        "system.slice/docker.socket",
        "system.slice/mydocker.service",
        "system.slice/docker.service.d",
        "system.slice/default",  # the name means something at the top only
        "user.slice/docker",
        f"system.slice/docker-{ID[:-1]}.scope",
        f"system.slice/{ID}0",
        f"system.slice/{ID.upper()}",
        "system.slice/k3s.service",
        "system.slice/kubelet.service",
        "user.slice/user-1000.slice/session-1.scope",
    ],
)
def test_cgroup_of_anybody_else_is_not(path: str) -> None:
    assert classify_cgroup(path) is None


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="/")), st.sampled_from(["docker", "kubepods", f"x/{ID}"]))
def test_everything_below_a_container_is_a_container(name: str, parent: str) -> None:
    assert classify_cgroup(f"{parent}/{name}") is MarkedScope.CONTAINER


def test_program_names_are_as_the_kernel_cuts_them() -> None:
    assert all(0 < len(name.encode()) < COMM_BYTES for name in PROGRAM_SCOPES)
    assert PROGRAM_SCOPES["containerd-star"] is MarkedScope.ENGINE
    assert PROGRAM_SCOPES["slirp4netns"] is MarkedScope.CONTAINER
    assert "curl" not in PROGRAM_SCOPES
