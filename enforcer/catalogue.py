"""Names by which public container registries are known: what the level "registries" recognises.

A list is behind what it lists: this one finds honest clients of well-known registries, and nobody who hides. Whoever
must be kept from registries is judged by the level "strict", which knows what is allowed and nothing else.
"""

from __future__ import annotations

import functools
import importlib.resources
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

from enforcer.policy import HostPattern, Note, host_pattern


@dataclass(frozen=True, slots=True)
class KnownName:
    """One name of a public registry and where it is known from."""

    pattern: HostPattern
    registry: str  # whose it is, as users know it
    source: str  # URL
    date: date  # when the source said so, or was last read
    note: Note | None  # None: the registry's own documents name it


@functools.cache
def known_names() -> tuple[KnownName, ...]:
    """The catalogue, each pattern once. The file is the program's own: a fault in it is found by a test."""
    text = (importlib.resources.files("enforcer") / "catalogue.toml").read_text("utf-8")
    document = tomllib.loads(text)
    names = {name.pattern: name for group in document["registry"] for name in _names(group, document["regions"])}
    return tuple(names.values())


@functools.cache
def catalogue() -> tuple[HostPattern, ...]:
    """The patterns that recognise a registry's name, each once."""
    return tuple(known.pattern for known in known_names())


def registry_of(name: str) -> KnownName | None:
    """The most specific entry that covers `name` (any case, with or without trailing dot); None: not recognised."""
    name = name.lower().removesuffix(".")
    by_pattern = _by_pattern()
    if (exact := by_pattern.get(HostPattern(name, wildcard=False))) is not None:
        return exact
    parent = name
    while "." in parent:
        parent = parent.partition(".")[2]
        pattern = HostPattern(parent, wildcard=True)
        if pattern in by_pattern and pattern.matches(name):
            return by_pattern[pattern]
    return None


@functools.cache
def _by_pattern() -> dict[HostPattern, KnownName]:
    return {known.pattern: known for known in known_names()}


def _names(group: dict[str, Any], regions: dict[str, list[str]]) -> Iterator[KnownName]:
    note = Note(group["note"]) if "note" in group else None
    for name in group["names"]:
        for region in regions[group["regions"]] if "regions" in group else [""]:
            pattern = host_pattern(name.format(region=region))
            yield KnownName(pattern, group["name"], group["source"], group["date"], note)
