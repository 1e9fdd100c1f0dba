"""What the policy says to one name or address, in a sentence, and what to do next.

For `registry-enforcer explain`: the reader was refused and wants to know by what, and what to ask for or to write.
"""

from __future__ import annotations

import difflib
import functools
import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Protocol

from enforcer.catalogue import KnownName, registry_of
from enforcer.policy import (
    RULE_PORTS,
    Address,
    Level,
    Mode,
    NameIndex,
    Note,
    Policy,
    Preset,
    PresetHost,
    Reason,
    Rule,
    RuleKind,
    Verify,
    host_pattern,
    load_preset,
    preset_names,
)

DNS_PORT = 53


class Learned(Protocol):
    """What `explain` reads of a learned address."""

    @property
    def address(self) -> Address:
        """Where the name led."""

    @property
    def port(self) -> int:
        """One of the rule's ports."""

    @property
    def name(self) -> str:
        """The name that was asked for."""

    @property
    def rule(self) -> str:
        """The name of the rule that has it."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer to "may this be reached, and why"."""

    subject: str  # a name or an address
    port: int | None  # None: the question named none
    reason: Reason
    rules: tuple[str, ...]  # that know the subject; for one that is allowed those that allow it
    sentence: str
    next_steps: tuple[str, ...]  # a step that quotes TOML has several lines

    @property
    def allowed(self) -> bool:
        """Whether a connection is let through in mode "enforce"."""
        return self.reason.allows


def parse_subject(text: str) -> tuple[str | Address, int | None]:
    """(name or address, port) of NAME, NAME:PORT, ADDRESS, IPV4:PORT or [IPV6]:PORT; the port is None where none is
    written. "::1:443" is an address. ValueError "what is wrong; what to write instead".
    """
    text = text.strip()
    address = _address(text)
    if address is not None:
        return address, None
    host, colon, digits = text.rpartition(":")
    if not (colon and re.fullmatch(r"[0-9]+", digits)):
        host, digits = text, ""
    if digits and not (len(digits) <= 5 and 1 <= int(digits) <= 65535):
        raise ValueError(f"{digits[:20]} is not a port; write a number from 1 to 65535")
    port = int(digits) if digits else None
    if host.startswith("[") and host.endswith("]"):
        address = _address(host[1:-1])
        if address is None:
            raise ValueError(f"{host[:60]!r} is not an IPv6 address; write [2001:db8::1]:443, or NAME:PORT")
        return address, port
    address = _address(host)
    if address is not None:
        if address.version == 6:
            raise ValueError(f"{text} is ambiguous; write [{address}]:{digits}")
        return address, port
    pattern = host_pattern(host)
    if pattern.wildcard:
        raise ValueError(f"{pattern} is a pattern; write one name below {pattern.name}")
    return pattern.name, port


def explain(
    policy: Policy, index: NameIndex, subject: str | Address, port: int | None, learned: Iterable[Learned]
) -> Explanation:
    """Why connections to `subject` are allowed or refused. Without a port: whether any port of it is allowed.

    `subject` as parse_subject gives it; `index` is the policy's. The verdict is the policy's: in mode "observe" what is
    not allowed is let through all the same, and the next steps say so.
    """
    if isinstance(subject, str):
        return _explain_name(policy, index, subject, port, learned)
    return _explain_address(policy, subject, port, learned)


def warnings(policy: Policy) -> tuple[str, ...]:
    """What an operator may not have meant, for a policy that is correct."""
    found = []
    if not policy.rules:
        found.append("it allows nothing: every registry will be refused")
    if policy.scope.strictest is Level.OFF:
        found.append("every scope is off: nothing will be refused")
    lenient = [name for name, level in _levels(policy)[:2] if level is Level.REGISTRIES]
    if lenient:
        found.append(
            f"{_words(lenient)} may reach every registry that is not recognised as one: the level that lets nobody "
            'around it is "strict"'
        )
    if 443 not in policy.ports:
        found.append("443 is not among the registry ports: most registries will not be judged")
    for rule in policy.rules:
        found += [
            f'rule "{rule.name}" allows {host}, every name below a top-level domain'
            for host in rule.hosts
            if host.wildcard and "." not in host.name
        ]
        if rule.verify is Verify.ADDRESS:
            found.append(
                f'rule "{rule.name}" has verify = "address": at an address that others share, every name of theirs is '
                "reachable too"
            )
        if rule.kind is RuleKind.PRESET and rule.name in preset_names():
            shared = [host.name for host in load_preset(rule.name).hosts if host.note is Note.SHARED]
            if shared:
                found.append(f"preset {rule.name} allows hosts that serve other people's content too, as {shared[0]}")
    return tuple(found)


# --- names -----------------------------------------------------------------------------------------------------------
def _explain_name(
    policy: Policy, index: NameIndex, name: str, port: int | None, learned: Iterable[Learned]
) -> Explanation:
    covering = list(index.covering(name))
    allowing = [(rule, pattern) for rule, pattern in covering if port is None or port in rule.ports]
    if allowing:
        rule, pattern = allowing[0]
        sentence = f"{name} is allowed on {_ports(port or rule.ports)} by {_rule(rule)}, which lists {pattern}."
        addresses = dict.fromkeys(str(entry.address) for entry in learned if entry.name == name)
        step = "Its addresses are allowed from the moment that a trusted resolver answers with them."
        if addresses:
            step = f"It resolved to {_words(addresses)}."
        steps = (step, *_said_there([rule for rule, _ in allowing]))
        return Explanation(name, port, Reason.LISTED_NAME, _names(rule for rule, _ in allowing), sentence, steps)
    recognised = registry_of(name)
    refused = _refused(policy, port, recognised)
    if not refused:
        return _unjudged(policy, name, port)
    if covering:
        rule, _ = covering[0]
        elsewhere = f"{name} is allowed by {_rule(rule)} on {_ports(rule.ports)}"
        sentence = f"{elsewhere}, but not on {port}: {refused}."
        steps = (*_engines_too(policy, port), *_contact(policy), _toml_for_port(rule, name, port), *_observed(policy))
        return Explanation(name, port, Reason.UNLISTED_PORT, _names(rule for rule, _ in covering), sentence, steps)
    steps = (
        *_did_you_mean(policy, name),
        *_recognition(policy, recognised),
        *_engines_too(policy, port),
        *_contact(policy),
        *(_toml_for_preset(policy, *found) for found in presets_with(name)),
        _toml_for_name(name, port),
        *_observed(policy),
    )
    sentence = f"{name} is not listed by any rule of {policy.source}: {refused}."
    return Explanation(name, port, Reason.UNLISTED_NAME, (), sentence, steps)


def presets_with(name: str) -> Iterator[tuple[Preset, PresetHost, dict[str, str]]]:
    """Each preset that would allow `name`: the preset, the host of it, and the parameters that the name tells."""
    for preset_name in preset_names():
        preset = load_preset(preset_name)
        for host, expression in _expressions(preset):
            found = expression.fullmatch(name)
            if found:
                yield preset, host, found.groupdict()
                break


@functools.cache
def _expressions(preset: Preset) -> tuple[tuple[PresetHost, re.Pattern[str]], ...]:
    patterns = {parameter.name: parameter.pattern for parameter in preset.parameters}

    def expression(template: str) -> str:
        text = ""
        seen: set[str] = set()
        for part in re.split(r"(\{\w+\}|^\*)", template):
            if part == "*":
                text += ".+"
            elif part.startswith("{"):
                parameter = part[1:-1]
                text += f"(?P={parameter})" if parameter in seen else f"(?P<{parameter}>{patterns[parameter]})"
                seen.add(parameter)
            else:
                text += re.escape(part)
        return text

    return tuple((host, re.compile(expression(host.name))) for host in preset.hosts)


def _did_you_mean(policy: Policy, name: str) -> tuple[str, ...]:
    listed = {host.name: host for rule in policy.rules for host in rule.hosts}
    if name in listed:  # or else it would be allowed
        return (f"{listed[name]} lists the names below {name}, not {name} itself.",)
    # difflib takes seconds for 100,000 names: only those that share the most triples of letters.
    triples = {name[at : at + 3] for at in range(len(name) - 2)}
    likely = heapq.nlargest(50, listed, key=lambda other: sum(triple in other for triple in triples))
    near = difflib.get_close_matches(name, likely, 3, cutoff=0.75)
    return (f"Did you mean {' or '.join(str(listed[close]) for close in near)}?",) if near else ()


# --- addresses -------------------------------------------------------------------------------------------------------
def _explain_address(policy: Policy, address: Address, port: int | None, learned: Iterable[Learned]) -> Explanation:
    subject = str(address)
    static = [(rule, network) for rule in policy.rules for network in rule.addresses if address in network]
    named = [entry for entry in learned if entry.address == address]
    for rule, network in static:
        if port is None or port in rule.ports:
            sentence = f"{subject} is allowed on {_ports(port or rule.ports)} by {_rule(rule)}, which lists {network}."
            return Explanation(subject, port, Reason.LISTED_ADDRESS, (rule.name,), sentence, _said_there([rule]))
    for entry in named:
        if port is None or port == entry.port:
            sentence = (
                f'{subject} is allowed on {_ports(entry.port)} by rule "{entry.rule}": {entry.name} resolved to it.'
            )
            return Explanation(subject, port, Reason.LEARNED_ADDRESS, (entry.rule,), sentence, ())
    refused = _refused(policy, port)
    if not refused:
        return _unjudged(policy, subject, port)
    if static or named:
        rules = dict.fromkeys([rule.name for rule, _ in static] + [entry.rule for entry in named])
        ports = {port for rule, _ in static for port in rule.ports} | {entry.port for entry in named}
        sentence = f"{subject} is allowed on {_ports(sorted(ports))}, but not on {port}: {refused}."
        steps = (*_contact(policy), *_observed(policy))
        return Explanation(subject, port, Reason.UNLISTED_PORT, tuple(rules), sentence, steps)
    sentence = f"{subject} is not listed by any rule of {policy.source}, and no listed name resolved to it: {refused}."
    text = f'[[registry]]\nname = "NAME"\naddresses = ["{subject}"]{_ports_line(port)}'
    ask_name = "Where it belongs to a name, explain that: a listed name's addresses are allowed once it is resolved."
    steps = (ask_name, *_contact(policy), _toml("To allow it whatever its name", text), *_observed(policy))
    return Explanation(subject, port, Reason.UNLISTED_ADDRESS, (), sentence, steps)


def _address(text: str) -> Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


_HOST = "this host's programs"


# --- words -----------------------------------------------------------------------------------------------------------
def _levels(policy: Policy) -> tuple[tuple[str, Level], ...]:
    """The scopes, as users know them."""
    scope = policy.scope
    return (("containers", scope.containers), ("engines", scope.engines), (_HOST, scope.host))


def _lenient(policy: Policy) -> list[str]:
    """The scopes that are refused recognised registries only."""
    return [name for name, level in _levels(policy) if level is Level.REGISTRIES]


def _refused(policy: Policy, port: int | None, recognised: KnownName | None = None) -> str:
    """For whom an unlisted destination is refused because of its port, or because it is `recognised` as a registry,
    which it is on every port; empty: for nobody."""
    for_host = port is None or port in policy.ports
    for_others = for_host or port in policy.container_ports
    scopes = [
        name
        for name, level in _levels(policy)
        if (level is Level.STRICT and (for_host if name == _HOST else for_others))
        or (level is Level.REGISTRIES and recognised is not None)
    ]
    verb = "would be refused" if policy.mode is Mode.OBSERVE else "is refused"
    return f"it {verb} for {_words(scopes)}" if scopes else ""


def _recognition(policy: Policy, recognised: KnownName | None) -> tuple[str, ...]:
    """What the level "registries" makes of a name that no rule lists."""
    lenient = _lenient(policy)
    if not lenient:
        return ()
    who = _words(lenient)
    who = who[:1].upper() + who[1:]
    if recognised is not None:
        return (
            f"{who} are refused it, on whatever port, as a registry that is known by its name: {recognised.registry}.",
        )
    return (f"{who} may reach it, but for the registry protocol (/v2/) over plain HTTP: its name is in no catalogue.",)


def _engines_too(policy: Policy, port: int | None) -> tuple[str, ...]:
    """Where the port is no registry port, it is one for engines."""
    if port is None or port in policy.ports or port == DNS_PORT or policy.scope.engines is not Level.STRICT:
        return ()
    return ("Engines that pull images are refused all the same: for them every TCP port but DNS counts.",)


def _unjudged(policy: Policy, subject: str, port: int | None) -> Explanation:
    steps: tuple[str, ...] = ()
    lenient = _lenient(policy)
    if policy.scope.strictest is Level.OFF:
        sentence = f"{subject} is not judged: every scope of {policy.source} is off."
    elif policy.scope.strictest is Level.REGISTRIES:
        sentence = f"{subject} is not judged: {_words(lenient)} are refused only what is recognised as a registry."
    else:
        sentence = f"{subject} is not judged on port {port}: the registry ports are {_words(policy.ports)}."
        if engines := _engines_too(policy, port):
            steps = (*engines, *_observed(policy))
    return Explanation(subject, port, Reason.NOT_JUDGED, (), sentence, steps)


def _said_there(rules: Sequence[Rule]) -> tuple[str, ...]:
    """What clients have to say at addresses that one of these rules opened, where that is not a name alone."""
    steps = []
    if any(rule.kind is RuleKind.PROXY for rule in rules):
        steps.append("It is a forward proxy: what it is asked for, by CONNECT or a whole URL, must be allowed as well.")
    if any(rule.verify is Verify.ADDRESS for rule in rules):
        steps.append("Where it leads clients may ask for any name, or for none.")
    return tuple(steps)


def _observed(policy: Policy) -> tuple[str, ...]:
    if policy.mode is Mode.OBSERVE:
        return ('The mode is "observe": the connection is counted, logged and let through.',)
    return ()


def _contact(policy: Policy) -> tuple[str, ...]:
    return (f"Ask {policy.contact} if {policy.organization} should allow it.",)


def _rule(rule: Rule) -> str:
    return f'{rule.kind.value} "{rule.name}"'


def _names(rules: Iterable[Rule]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rule.name for rule in rules))


def _ports(ports: int | Sequence[int]) -> str:
    ports = [ports] if isinstance(ports, int) else ports
    return f"port{'s' if len(ports) > 1 else ''} {_words(ports)}"


def _words(items: Iterable[object]) -> str:
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def _toml(introduction: str, text: str) -> str:
    return "\n      ".join((f"{introduction}, in the policy:", *text.splitlines()))


def _ports_line(port: int | None) -> str:
    return "" if port is None or port in RULE_PORTS else f"\nports = [{port}]"


def _toml_for_name(name: str, port: int | None) -> str:
    text = f'[[registry]]\nname = "{name[:63].strip("._-")}"\nhosts = ["{name}"]{_ports_line(port)}'
    return _toml("To allow this host alone", text)


def _toml_for_port(rule: Rule, name: str, port: int | None) -> str:
    if rule.kind in (RuleKind.PRESET, RuleKind.PROXY):
        return _toml_for_name(name, port)
    ports = sorted({*rule.ports, port or 0} - {0})
    return _toml(f"To allow the port, under {_rule(rule)}", f"ports = {ports}")


def _toml_for_preset(policy: Policy, preset: Preset, host: PresetHost, values: dict[str, str]) -> str:
    if preset.parameters:
        lines = ["[[preset]]", f'name = "{preset.name}"']
        for parameter in preset.parameters:
            known = parameter.name in values
            comment = "" if known else f"  # write yours: {parameter.meaning}"
            lines.append(f'{parameter.name} = "{values.get(parameter.name, parameter.example)}"{comment}')
    else:
        plain = {name for name in preset_names() if not load_preset(name).parameters}
        present = [rule.name for rule in policy.rules if rule.kind is RuleKind.PRESET and rule.name in plain]
        listed = ", ".join(f'"{name}"' for name in dict.fromkeys((*present, preset.name)))
        lines = [f"presets = [{listed}]"]
    caution = "; this host serves other people's content too" if host.note is Note.SHARED else ""
    return _toml(f'To allow preset "{preset.name}" ({preset.description}{caution})', "\n".join(lines))
