"""What is bounded: everything that grows with what clients, networks or other programs do has a limit, and says so.

docs/bounds.md tells of each, of those too that the kernel keeps by itself. What reaches its bound refuses or forgets,
and is counted; nothing waits and nothing opens.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


class Bounded(enum.Enum):
    """What the daemon holds a limited number of; the values are labels of metrics."""

    LEARNED = "learned_permissions"
    OWN_QUESTIONS = "own_questions"
    RESOLVERS = "resolvers"
    CGROUPS = "cgroups"
    CGROUP_WATCHES = "cgroup_watches"
    INTERFACES = "interfaces"
    OWN_RANGES = "own_ranges"
    RESPONDER_CLIENTS = "responder_clients"
    CONTROL_CLIENTS = "control_clients"
    METRICS_CLIENTS = "metrics_clients"
    PENDING_REFUSALS = "pending_refusals"
    EARLY_ANSWERS = "early_answers"
    FOLDED_REFUSALS = "folded_refusals"
    AUDIT_LINES = "audit_lines"


@dataclass(slots=True)
class Room:
    """A place for so many, now and ever."""

    limit: int
    held: int = 0
    turned_away: int = 0  # how many found no place, or cost another one its own
    _waiting: int = field(default=0, repr=False)

    def fit(self, wanted: Sequence[T]) -> Sequence[T]:
        """The first of `wanted`, which is all that shall be held; who goes on waiting is counted once."""
        waiting = max(0, len(wanted) - self.limit)
        self.turned_away += max(0, waiting - self._waiting)
        self._waiting = waiting
        self.held = len(wanted) - waiting
        return wanted[: self.limit]
