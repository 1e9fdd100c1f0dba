"""What doctor says of a kernel that lacks something."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from enforcer import bpf, doctor, netlink, procfs
from enforcer.ladder import LEARNING_PROGRAMS, STAMPS, Capabilities, Feature, shortfalls

FULL = Capabilities()


AFTER_HOOKS = [feature for feature in Feature if feature is not Feature.SOCKET]  # the hooks make it needless


@pytest.mark.parametrize("feature", AFTER_HOOKS)
def test_feature_that_is_missing_is_named_with_its_cost_and_remedy(feature: Feature) -> None:
    assert [finding.state for finding in doctor._capabilities(FULL)] == [doctor.State.OK]
    _, finding = doctor._capabilities(replace(FULL, features=FULL.features - {feature}))
    assert finding.subject == f"nftables {feature.name.lower()}"
    assert finding.state is (doctor.State.MISSING if feature is Feature.BASE else doctor.State.NOTE)
    assert finding.cost
    assert finding.remedy


@pytest.mark.parametrize("feature", AFTER_HOOKS)
def test_module_that_could_be_loaded_is_named_with_the_line_that_loads_it(
    monkeypatch: pytest.MonkeyPatch, feature: Feature
) -> None:
    lacking = replace(FULL, features=FULL.features - {feature})
    monkeypatch.setattr(procfs, "loadable_modules", lambda: frozenset(feature.modules))
    _, finding = doctor._capabilities(lacking)
    assert f"modprobe -a {' '.join(feature.modules)};" in finding.remedy
    monkeypatch.setattr(procfs, "loadable_modules", frozenset)
    _, finding = doctor._capabilities(lacking)
    assert "modprobe" not in finding.remedy
    assert feature.kernel_option in finding.remedy


def test_only_modules_that_are_there_are_named_and_wsl_is_told_its_own_way() -> None:
    (tc,) = shortfalls(replace(FULL, traffic_control=False))
    present = frozenset({"cls_bpf"})
    assert "modprobe -a cls_bpf; at each start, by /etc/modules-load.d/" in doctor._bring(
        tc.modules, tc.kernel_option, present, wsl=False
    )
    assert "/etc/wsl.conf" in doctor._bring(tc.modules, tc.kernel_option, present, wsl=True)
    without = doctor._bring(tc.modules, tc.kernel_option, None, wsl=True)
    assert without == f"this kernel has no modules: wsl.exe --update, or a kernel with {tc.kernel_option}"


@pytest.mark.root
def test_tc_is_tried_where_no_packet_passes() -> None:
    outside = Path("/proc/thread-self/ns/net").readlink()
    assert doctor._in_new_network(lambda: Path("/proc/thread-self/ns/net").readlink() != outside)
    assert Path("/proc/thread-self/ns/net").readlink() == outside


@pytest.mark.root
@pytest.mark.parametrize("taken", [True, False])
def test_kernel_without_tc_is_found_by_trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool) -> None:
    if not taken:

        def refuse(*_: object) -> bool:
            raise netlink.NetlinkError(2, "Specified qdisc kind is unknown.")

        monkeypatch.setattr(netlink.Netlink, "attach", refuse)
    bpffs = tmp_path / "bpf"
    assert bpf.ensure_bpffs(bpffs)
    try:
        programs, takes_filters = doctor._try_programs(bpffs, [], wsl=True)
    finally:
        subprocess.run(["umount", bpffs], check=True)
    assert takes_filters is taken
    assert Capabilities(programs=programs, traffic_control=takes_filters).learns_in_kernel is taken


@pytest.mark.parametrize(
    ("capabilities", "subject"),
    [
        (replace(FULL, programs=LEARNING_PROGRAMS | {"guard"}, unified=False), "bpf connect hooks"),
        (replace(FULL, traffic_control=False), "tc filters"),
        (replace(FULL, programs=FULL.programs - {"learn"}), "bpf learning"),
        (replace(FULL, cgroup=False), "cgroup v2"),
        (replace(FULL, programs=LEARNING_PROGRAMS | STAMPS | {"sock_ops", "guard"}), "bpf connect hooks"),
        (replace(FULL, programs=LEARNING_PROGRAMS | {"guard"}), "bpf connect hooks"),
        (replace(FULL, programs=FULL.programs - {"guard"}), "bpf guard"),
    ],
)
def test_rung_below_the_top_is_named_with_its_cost_and_remedy(capabilities: Capabilities, subject: str) -> None:
    _, finding = doctor._capabilities(capabilities)
    assert (finding.subject, finding.state) == (subject, doctor.State.NOTE)
    assert finding.cost
    assert finding.remedy
