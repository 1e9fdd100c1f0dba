"""What doctor says of a kernel that lacks something."""

from __future__ import annotations

import pytest

from enforcer import doctor
from enforcer.ruleset import Capabilities, Feature

FULL = frozenset(Feature)


@pytest.mark.parametrize("feature", Feature)
def test_feature_that_is_missing_is_named_with_its_cost_and_remedy(feature: Feature) -> None:
    assert [finding.state for finding in doctor._features(Capabilities(FULL))] == [doctor.State.OK]
    _, finding = doctor._features(Capabilities(FULL - {feature}))
    assert finding.subject == f"nftables {feature.name.lower()}"
    assert finding.state is (doctor.State.NOTE if feature.optional else doctor.State.MISSING)
    assert finding.cost
    assert feature.kernel_option in finding.remedy
