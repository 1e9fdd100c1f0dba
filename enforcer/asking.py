"""The daemon's own questions: every exact name of the policy before what was learned of it ends, and whatever BPF could
not read.

A client that has cached an answer never asks again, so somebody must. BPF sees the same answers and is first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Set
from typing import Any

from enforcer import dns_answer, kernel_abi, resolver
from enforcer.bounds import Room
from enforcer.metrics import Metrics
from enforcer.policy import Address

log = logging.getLogger("registry-enforcer")

PERIOD_SECONDS = kernel_abi.LIFETIME_FLOOR_SECONDS - 2 * kernel_abi.REFRESH_MARGIN_SECONDS
UNRESOLVED_SECONDS = 15.0  # until it is asked again for what no resolver has answered
CONCURRENCY = 16
PAUSE_SECONDS = 0.1  # of each of them between two names: spares the resolvers when a policy has thousands
FIRST_PASS_SECONDS = 3.0  # how long the start waits for it; the rest follows while enforcing
UNREADABLE_AT_ONCE = 256  # names of answers that BPF could not read, being asked for


class Beside:
    """Work beside everything else; an exception in it is raised in the event loop, which is to end the daemon."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin it now."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


class OwnQuestions:
    """Asks, and has the answers held; on the event loop."""

    def __init__(
        self,
        names: Callable[[], Set[str]],
        teachers: Callable[[], tuple[Address, ...]],
        hold: Callable[[dns_answer.DnsAnswer], None],
        metrics: Metrics,
        beside: Beside,
    ) -> None:
        """`names` are the policy's exact ones, `teachers` the resolvers that may be asked, both as they are now."""
        self.again = asyncio.Event()  # set: the policy or the resolvers changed, ask for every name now
        self._names = names
        self._teachers = teachers
        self._hold = hold
        self._metrics = metrics
        self._beside = beside
        self._unresolved: set[str] = set()  # names whose last question failed, each logged once
        self._asking: set[str] = set()  # names of unreadable answers that are being asked for
        self._turned_away = 0

    @property
    def room(self) -> Room:
        """Of questions for what BPF could not read."""
        return Room(UNREADABLE_AT_ONCE, len(self._asking), self._turned_away)

    async def begin(self) -> None:
        """The first pass, as far as it comes in a moment; the rest goes on beside."""
        first_pass = self._beside.start(self._ask_for_names())
        await asyncio.wait([first_pass], timeout=FIRST_PASS_SECONDS)
        if not first_pass.done():
            log.warning("not all names of the policy are resolved yet; enforcing now, the rest follows")

    async def keep_asking(self) -> None:
        """Ask again before the lifetimes end, and at once when the policy or the resolvers change.

        Sooner for what could not be resolved: clients that cached an answer wait for this daemon to have one.
        """
        loop = asyncio.get_running_loop()
        due_at = loop.time() + PERIOD_SECONDS
        while True:
            left_seconds = due_at - loop.time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_seconds, UNRESOLVED_SECONDS) if self._unresolved else left_seconds):
                    await self.again.wait()
            unresolved = not self.again.is_set() and loop.time() < due_at
            if not unresolved:
                self.again.clear()
                due_at = loop.time() + PERIOD_SECONDS
            await self._ask_for_names(unresolved=unresolved)

    def ask_beside(self, name: str) -> None:
        """Ask for one name now, once at a time."""
        if name in self._asking:
            return
        if len(self._asking) >= UNREADABLE_AT_ONCE:
            # A wildcard's owner has as many names as he likes, and each takes a socket. Nothing was permitted.
            self._turned_away += 1
            return

        async def ask() -> None:
            try:
                await self._ask(name)
            finally:
                self._asking.discard(name)

        self._asking.add(name)
        self._beside.start(ask())

    async def _ask_for_names(self, *, unresolved: bool = False) -> None:
        """Ask for every exact name, a few at a time and no faster than the lifetimes demand.

        `unresolved`: for those alone that could not be resolved the last time.
        """
        if not self._teachers():
            return  # why not is in the log; a way to one has them asked for
        self._unresolved &= self._names()
        names = sorted(self._unresolved if unresolved else self._names())
        pause_seconds = min(PAUSE_SECONDS, PERIOD_SECONDS * CONCURRENCY / (2 * len(names) + 1))
        remaining = iter(names)

        async def ask_in_turn() -> None:
            for name in remaining:
                await self._ask(name)
                await asyncio.sleep(pause_seconds)

        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(ask_in_turn())

    async def _ask(self, name: str) -> None:
        for rdtype in dns_answer.ADDRESS_TYPES:
            try:
                wire, asked = await resolver.ask(dns_answer.build_query(name, rdtype), self._teachers())
                answer = dns_answer.parse_answer(wire, asked)
            except resolver.NoAnswerError as error:
                self._metrics.own_queries.labels("no_answer").inc()
                if name not in self._unresolved:
                    self._unresolved.add(name)
                    log.warning("%s cannot be resolved: %s", name, error)
                return
            except dns_answer.DnsAnswerError:
                self._metrics.own_queries.labels("unusable").inc()
                continue
            if asked not in self._teachers() or answer.question != name:  # the resolvers may have changed meanwhile
                self._metrics.own_queries.labels("unusable").inc()
                continue
            self._metrics.own_queries.labels("answered").inc()
            self._unresolved.discard(name)
            self._hold(answer)
