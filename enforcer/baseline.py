"""Before the daemon: a table that refuses, from the policy alone, so that no host is unguarded while it starts.

It holds what the policy lists by address and nobody learns for it. No BPF program stamps scopes yet, so sockets of this
host are judged by the strictest scope in force. The daemon finds a table and takes it over like an earlier daemon's, in
one transaction; whatever keeps the daemon from starting leaves this one in force.

Forward proxies are left out, listed by address or not: the guard, which reads what they are asked for, comes with the
daemon, and until then a proxy would open every registry.

A policy that cannot be used is no reason to open: then nothing is permitted on the usual registry ports.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from enforcer import control, daemon, ladder, nft, ruleset
from enforcer.enforcement import ReadPolicy
from enforcer.policy import Level, Mode, Policy, PolicyError, RuleKind, Scope, default_policy

CAPABILITIES = ladder.Capabilities(programs=frozenset(), traffic_control=False, cgroup=False, learning=False)


def lay(run_dir: Path, read_policy: ReadPolicy) -> str:
    """Have the kernel refuse what the policy does not permit, if nothing of ours does yet; says what was done.

    PolicyError after refusing everything, if the policy cannot be used. UnsupportedHostError where nothing can refuse.
    """
    try:
        policy, mistake = read_policy(), None
    except PolicyError as error:
        policy, mistake = refuse_everything(), error
    try:
        with control.hold(run_dir), nft.Nft() as firewall:
            features = daemon.probe(firewall)
            if firewall.present():
                return "a table of registry-enforcer refuses already; it stays"
            capabilities = replace(CAPABILITIES, features=features)
            rules = tuple(rule for rule in policy.rules if rule.kind is not RuleKind.PROXY)
            firewall.apply(ruleset.render_ruleset(replace(policy, rules=rules), capabilities, internal=()))
    except control.AlreadyRunningError as error:
        return f"{error}: nothing to do"
    if mistake is not None:
        raise mistake
    verb = "refuses" if policy.mode is Mode.ENFORCE else "observes"
    return f"the kernel {verb} what {policy.source} does not list by address, until the daemon has taken over"


def refuse_everything() -> Policy:
    """What stands for a policy that cannot be used."""
    return replace(
        default_policy(),
        rules=(),
        scope=Scope(containers=Level.STRICT, engines=Level.STRICT, host=Level.STRICT),
        source="the refusal of everything",
    )
