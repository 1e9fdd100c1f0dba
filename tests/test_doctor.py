"""What doctor says of a kernel that lacks something."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enforcer import doctor
from enforcer.ladder import LEARNING_PROGRAMS, STAMPS, Capabilities, Feature

FULL = Capabilities()


@pytest.mark.parametrize("feature", [feature for feature in Feature if feature is not Feature.SOCKET])
def test_feature_that_is_missing_is_named_with_its_cost_and_remedy(feature: Feature) -> None:
    assert [finding.state for finding in doctor._capabilities(FULL)] == [doctor.State.OK]
    _, finding = doctor._capabilities(replace(FULL, features=FULL.features - {feature}))
    assert finding.subject == f"nftables {feature.name.lower()}"
    assert finding.state is (doctor.State.MISSING if feature is Feature.BASE else doctor.State.NOTE)
    assert finding.cost
    assert feature.kernel_option in finding.remedy
    assert all(module in finding.remedy for module in feature.modules)


@pytest.mark.parametrize(
    ("capabilities", "subject"),
    [
        (replace(FULL, programs=LEARNING_PROGRAMS, unified=False), "bpf connect hooks"),
        (replace(FULL, traffic_control=False), "tc filters"),
        (replace(FULL, programs=FULL.programs - {"learn"}), "bpf learning"),
        (replace(FULL, cgroup=False), "cgroup v2"),
        (replace(FULL, programs=LEARNING_PROGRAMS | STAMPS | {"sock_ops"}), "bpf connect hooks"),
        (replace(FULL, programs=LEARNING_PROGRAMS), "bpf connect hooks"),
    ],
)
def test_rung_below_the_top_is_named_with_its_cost_and_remedy(capabilities: Capabilities, subject: str) -> None:
    _, finding = doctor._capabilities(capabilities)
    assert (finding.subject, finding.state) == (subject, doctor.State.NOTE)
    assert finding.cost
    assert finding.remedy
