"""Metrics: names, help, closed labels, an address that cannot be served."""

from __future__ import annotations

import shutil
import socket
import subprocess
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from enforcer import __version__, metrics
from enforcer.kernel_abi import Outcome

SNAPSHOT = metrics.Snapshot(
    enforcing=True,
    mode="enforce",
    digest="ab" * 32,
    dns_answers={outcome.name.lower(): 7 for outcome in Outcome},
    learned={"ipv4": 3, "ipv6": 0},
    refused={("container", "tcp"): 5},
    observed={("container", "tcp"): 0},
    evicted=7,
    events_lost=1,
    audit_dropped={"kernel": 2, "pending": 0, "output": 0},
)


def scrape() -> str:
    with (
        metrics.serve(metrics.Metrics(lambda: SNAPSHOT), "127.0.0.1", 0) as port,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response,
    ):
        return str(response.read(), "utf-8")


def test_every_promised_metric_is_there_with_help_and_its_value() -> None:
    families = {family.name: family for family in text_string_to_metric_families(scrape())}
    assert all(family.documentation for family in families.values())
    values = {
        (sample.name, tuple(sorted(sample.labels.values()))): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["enforcer_enforcing", ()] == 1
    assert values["enforcer_policy_info", ("ab" * 32, "enforce")] == 1
    assert values["enforcer_dns_answers_total", ("learned",)] == 7
    assert values["enforcer_learned_addresses", ("ipv4",)] == 3
    assert values["enforcer_refused_connections_total", ("container", "tcp")] == 5
    assert values["enforcer_learned_evicted_total", ()] == 7
    assert values["enforcer_kernel_events_lost_total", ()] == 1
    assert values["enforcer_audit_dropped_total", ("kernel",)] == 2
    assert values["enforcer_policy_reloads_total", ("bad_policy",)] == 0
    assert values["enforcer_learn_seconds_count", ()] == 0
    assert ("enforcer_build_info", (__version__,)) in values


def test_promtool_is_content() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (package prometheus)")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=scrape(), capture_output=True, text=True, timeout=30, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_an_address_in_use_is_refused_with_advice() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(metrics.MetricsError, match=f"--metrics 127.0.0.1:{port}: .*choose a free"),
            metrics.serve(metrics.Metrics(lambda: SNAPSHOT), "127.0.0.1", port),
        ):
            pass
