"""What doctor says of a kernel that lacks something."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from enforcer import bpf, doctor, netlink, procfs
from enforcer.ruleset import Capabilities, Feature

FULL = frozenset(Feature)


@pytest.mark.parametrize("feature", Feature)
def test_feature_that_is_missing_is_named_with_its_cost_and_remedy(feature: Feature) -> None:
    assert [finding.state for finding in doctor._features(Capabilities(FULL))] == [doctor.State.OK]
    _, finding = doctor._features(Capabilities(FULL - {feature}))
    assert finding.subject == f"nftables {feature.name.lower()}"
    assert finding.state is (doctor.State.NOTE if feature.optional else doctor.State.MISSING)
    assert finding.cost
    assert finding.remedy


@pytest.mark.parametrize("feature", Feature)
def test_module_that_could_be_loaded_is_named_with_the_line_that_loads_it(
    monkeypatch: pytest.MonkeyPatch, feature: Feature
) -> None:
    modules = doctor._MODULES[feature]
    monkeypatch.setattr(procfs, "loadable_modules", lambda: frozenset(modules))
    _, finding = doctor._features(Capabilities(FULL - {feature}))
    assert f"modprobe -a {' '.join(modules)};" in finding.remedy
    monkeypatch.setattr(procfs, "loadable_modules", frozenset)
    _, finding = doctor._features(Capabilities(FULL - {feature}))
    assert "modprobe" not in finding.remedy
    assert feature.kernel_option in finding.remedy


def test_only_modules_that_are_there_are_named_and_wsl_is_told_its_own_way() -> None:
    present = frozenset({"cls_bpf"})
    assert "modprobe -a cls_bpf; at each start, by /etc/modules-load.d/" in doctor._bring(
        doctor._TC_MODULES, doctor._TC_OPTIONS, present, wsl=False
    )
    in_wsl = doctor._bring(doctor._TC_MODULES, doctor._TC_OPTIONS, present, wsl=True)
    assert "/etc/wsl.conf" in in_wsl
    without = doctor._bring(doctor._TC_MODULES, doctor._TC_OPTIONS, None, wsl=True)
    assert without == f"this kernel has no modules: wsl.exe --update, or a kernel with {doctor._TC_OPTIONS}"


@pytest.mark.root
def test_tc_is_tried_where_no_packet_passes(tmp_path: Path) -> None:
    outside = Path("/proc/thread-self/ns/net").readlink()
    inside = doctor._in_new_network(lambda: str(Path("/proc/thread-self/ns/net").readlink()))
    assert inside != str(outside)
    assert Path("/proc/thread-self/ns/net").readlink() == outside


@pytest.mark.root
@pytest.mark.parametrize("taken", [True, False])
def test_kernel_without_tc_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool) -> None:
    if not taken:

        def refuse(*_: object) -> bool:
            raise netlink.NetlinkError(2, "Specified qdisc kind is unknown.")

        monkeypatch.setattr(netlink.Netlink, "attach", refuse)
        monkeypatch.setattr(procfs, "loadable_modules", lambda: frozenset({"cls_bpf", "sch_ingress"}))
    bpffs = tmp_path / "bpf"
    assert bpf.ensure_bpffs(bpffs)
    try:
        findings = {finding.subject: finding for finding in doctor._bpf(bpffs, wsl=True)}
    finally:
        subprocess.run(["umount", bpffs], check=True)
    tc = findings["tc"]
    assert tc.state is (doctor.State.OK if taken else doctor.State.MISSING)
    if not taken:
        assert tc.fact == "takes no program: Specified qdisc kind is unknown."
        assert tc.remedy.startswith("load it: modprobe -a sch_ingress cls_bpf;")
