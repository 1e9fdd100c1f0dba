"""Prometheus metrics. Labels come from closed enums, the policy's digest and the version; never from traffic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from enforcer import __version__
from enforcer.denial import Answered

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series beside each counter that nobody here would read

# From the microseconds of an idle daemon to the second at which a client would send its SYN again.
LEARN_BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class MetricsError(Exception):
    """The metrics address cannot be served."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a scrape reads from the daemon and the kernel."""

    enforcing: bool
    mode: str
    digest: str
    dns_answers: Mapping[str, int]  # by outcome
    learned: Mapping[str, int]  # by family: ipv4, ipv6
    refused: Mapping[tuple[str, str], int]  # by (scope, protocol)
    observed: Mapping[tuple[str, str], int]  # the same in observe mode: what enforcement would have refused
    evicted: int
    events_lost: int
    audit_dropped: Mapping[str, int]  # by where they got lost


class Metrics(Collector):
    """All metrics of one daemon, on a registry of their own."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self.registry = CollectorRegistry()
        self.reloads = Counter(
            "enforcer_policy_reloads",
            "Policy reloads since the daemon started, by result.",
            ["result"],
            registry=self.registry,
        )
        for result in ("ok", "bad_policy", "failed"):
            self.reloads.labels(result)
        self.disagreements = Counter(
            "enforcer_parser_disagreements",
            "Answers of which BPF learned more than the full parser accepts; the difference was withdrawn.",
            registry=self.registry,
        )
        self.own_queries = Counter(
            "enforcer_own_queries",
            "Questions that the daemon asked for itself, by result.",
            ["result"],
            registry=self.registry,
        )
        for result in ("answered", "no_answer", "unusable"):
            self.own_queries.labels(result)
        self.refusals_answered = Counter(
            "enforcer_refusals_answered",
            "Refused connections that the responder has taken, by what it told them.",
            ["protocol"],
            registry=self.registry,
        )
        for answered in Answered:
            self.refusals_answered.labels(answered.value)
        self.learn_seconds = Histogram(
            "enforcer_learn_seconds",
            "From the arrival of a DNS answer to its addresses being in the nftables set.",
            buckets=LEARN_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The metrics whose truth lies in the kernel or the daemon's state, read at the time of the scrape."""
        now = self._snapshot()
        yield GaugeMetricFamily(
            "enforcer_enforcing", "1 while connections without permission are refused.", int(now.enforcing)
        )
        policy = GaugeMetricFamily("enforcer_policy_info", "The policy in force.", labels=["digest", "mode"])
        policy.add_metric([now.digest, now.mode], 1)
        yield policy
        build = GaugeMetricFamily("enforcer_build_info", "The program that runs.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        answers = CounterMetricFamily(
            "enforcer_dns_answers", "DNS answers that BPF looked at, by what became of them.", labels=["outcome"]
        )
        for outcome, count in now.dns_answers.items():
            answers.add_metric([outcome], count)
        yield answers
        learned = GaugeMetricFamily(
            "enforcer_learned_addresses", "Learned (address, port) pairs that are permitted now.", labels=["family"]
        )
        for family, count in now.learned.items():
            learned.add_metric([family], count)
        yield learned
        yield CounterMetricFamily(
            "enforcer_learned_evicted",
            "Learned permissions that made room for others before their time: too many addresses under one pattern.",
            now.evicted,
        )
        for name, meaning, counts in (
            ("refused", "Connection attempts that were refused.", now.refused),
            ("observed", "Connection attempts that mode enforce would have refused.", now.observed),
        ):
            metric = CounterMetricFamily(f"enforcer_{name}_connections", meaning, labels=["scope", "protocol"])
            for (scope, protocol), count in counts.items():
                metric.add_metric([scope, protocol], count)
            yield metric
        yield CounterMetricFamily(
            "enforcer_kernel_events_lost",
            "Learning packets whose copy did not reach the daemon; it reads what they taught from the kernel instead.",
            now.events_lost,
        )
        dropped = CounterMetricFamily(
            "enforcer_audit_dropped",
            "Refusals that no line of the audit log tells of, by where they got lost.",
            labels=["where"],
        )
        for where, count in now.audit_dropped.items():
            dropped.add_metric([where], count)
        yield dropped


@contextlib.contextmanager
def serve(metrics: Metrics, address: str, port: int) -> Iterator[int]:
    """Serve `/metrics` in a thread until the context ends; the value is the port (as given, or chosen when 0)."""
    server: WSGIServer
    try:
        server, thread = start_http_server(port, address, metrics.registry)
    except OSError as error:
        raise MetricsError(
            f"--metrics {address}:{port}: {error.strerror}; choose a free address and port of this host"
        ) from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
