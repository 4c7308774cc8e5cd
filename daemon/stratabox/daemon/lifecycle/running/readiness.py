"""Whether one guest's agent has answered since its start, and its probe passed; the record's word
of it.

One for each `Guest`, which runs `watch` for as long as its domain lives and its guest is not held
at its first instant.

```
 started ──▶ waits for the agent ──answers──▶ volumes ──▶ told who it is, where it is renewed
                ▲   ▲                          mounted                         │
                │   └── nothing for `ready_timeout`: the record says so        ▼ it answers
                │                                                       its probe is tried
                │                                                              │ passes
                └────────────────────────────── reset ◀────────────────────── ready
```

From "it answers" on it can be worked with; only the record, and whoever waits, want the probe too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.running.telling import Telling
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import (
    FailedError,
    NoSpaceError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.probes import Probe
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import SandboxState

log = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE_SECONDS = 0.05
"""Between two tries of a probe at least, however long they take."""
_WRITE_SECONDS = 2.0
"""Until what the catalog did not take is written again."""


class Readiness:
    """Ready or not, of one guest.

    :param prepare: does what must be done for it first; what it could not do.
    :param answered: called when it has answered and can be worked with.
    :param attempt: tries a probe once; "" when it passed, else why not.
    """

    def __init__(
        self,
        world: World,
        telling: Telling,
        prepare: Callable[[], Awaitable[StrataboxError | None]],
        answered: Callable[[], None],
        attempt: Callable[[Probe], Awaitable[str]],
    ) -> None:
        self.problem: StrataboxError | None = None
        """What could not be done for it since its last start; it is ready all the same."""
        self.waits_for = ""
        """What has not happened yet, where its agent has answered."""
        self._world = world
        self._telling = telling
        self._prepare = prepare
        self._answered = answered
        self._attempt = attempt
        self._answers = False
        self._passed = False
        self._settled = asyncio.Event()
        """It is ready, or its probe has failed for as long as it may."""
        self._reset = asyncio.Event()
        self._probe: Probe | None = None
        """What it is being tried by."""
        self._failure = ""
        """Why that has not passed yet."""

    @property
    def is_ready(self) -> bool:
        """The agent has answered since this start; it can be worked with."""
        return self._answers

    async def wait(self) -> None:
        """Return when it is ready, or its probe has failed for longer than its start period."""
        await self._settled.wait()

    def probe_failed(self, seconds: float) -> FailedError | None:
        """The error for who has waited so long, where the probe alone is missing."""
        if self._passed or not self._answers or self._probe is None:
            return None
        waited = self._probe.start_period if self._settled.is_set() else seconds
        return FailedError(
            f"its readiness probe ({self._probe}) has not passed within {waited or 0:g} s:"
            f" {self._failure or 'it was not tried to its end'}",
            reason="PROBE_FAILED",
            sandbox=self._telling.id,
            probe=self._probe,
            failure=self._failure,
        )

    def answered(self, *, ready: bool) -> None:
        """It has answered, and is ready or not yet, as an earlier daemon has seen."""
        self._answers, self._passed = True, ready
        if ready:
            self._settled.set()

    def lost(self) -> None:
        """It is not ready (any more)."""
        self._answers = self._passed = False
        self._settled.clear()

    def was_reset(self) -> None:
        """The guest starts over."""
        self._reset.set()

    async def watch(self, domain: Domain, agent: GuestAgent) -> None:
        """See the agent answer after every start and reset, and write it down."""
        limit = self._world.config.ready_timeout
        if not agent.is_asked and await domain.agent_port_open():
            agent.port_changed(is_open=True)
        while True:
            self._reset.clear()
            waiting = asyncio.create_task(self._become_ready(agent, limit))
            reset = asyncio.create_task(self._reset.wait())
            try:
                await asyncio.wait({waiting, reset}, return_when=asyncio.FIRST_COMPLETED)
                if not reset.done():
                    try:
                        remark = waiting.result()
                    except UnavailableError:
                        self.lost()
                        await self._note(
                            ready=False,
                            state_reason=f"the guest's agent has not answered for {limit:g} s",
                        )
                        continue
                    probe = await self._note_answer(remark)
                    passing = asyncio.create_task(self._pass(probe, agent, remark))
                    try:
                        await asyncio.wait({passing, reset}, return_when=asyncio.FIRST_COMPLETED)
                        if passing.done():
                            passing.result()
                        await reset
                    finally:
                        passing.cancel()
            finally:
                waiting.cancel()
                reset.cancel()
            self.lost()
            await self._note(
                ready=False, state_reason="the guest was reset; its agent has not answered yet"
            )

    async def _note_answer(self, remark: str) -> Probe | None:
        """Write that the agent has answered; what must still pass before it is ready."""

        def write(tx: Transaction) -> tuple[Probe | None, Sandbox | None]:
            old = sandboxes.get(tx, self._telling.id)
            if self._passed or old.probe is None:
                return None, self._write(tx, old, ready=True, answers=True, state_reason=remark)
            waits = f"its readiness probe ({old.probe}) has not passed yet"
            return old.probe, self._write(tx, old, ready=False, answers=True, state_reason=waits)

        # Written first: whoever is woken by it reads a record that says so.
        probe, record = await self._written(write)
        if record is not None:
            self._world.bus.publish(Happening.UPDATED, record)
        return probe

    async def _pass(self, probe: Probe | None, agent: GuestAgent, remark: str) -> None:
        """Try the probe until it passes, and write that it is ready."""
        self._probe, self._failure = probe, ""
        if self._telling.renews:
            self._telling.owe(None)
        self._answers = True
        self._answered()
        self._telling.soon(agent)
        if probe is not None:
            await self._try(probe)
            await self._note(ready=True, state_reason=remark)
        self._passed = True
        self._settled.set()

    async def _try(self, probe: Probe) -> None:
        """Return when it has passed; say so meanwhile when that takes longer than it may."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while True:
            tried = loop.time()
            self._failure = await self._attempt(probe)
            now = loop.time()
            if not self._failure:
                return
            limit = probe.start_period
            if limit is not None and now - begun >= limit and not self._settled.is_set():
                failed = f"its readiness probe ({probe}) has not passed within {limit:g} s"
                await self._note(
                    ready=False, answers=True, state_reason=f"{failed}: {self._failure}"
                )
                self._settled.set()
            await asyncio.sleep(max(_PAUSE_SECONDS, tried + probe.interval - now))

    async def _become_ready(self, agent: GuestAgent, limit: float) -> str:
        """Wait for the agent and tell it what must not wait; a remark for the record."""
        self.waits_for = ""
        await agent.wait_ready(limit)
        self.problem = await self._prepare()
        remark = self.problem.message if self.problem else ""
        if self._telling.renews:
            missed = await self._telling.renew(agent)
            return "; ".join(filter(None, (remark, missed)))
        if self._telling.first() is None and not self.is_ready:
            await self._telling.begin(agent)
        return remark

    async def _note(self, *, ready: bool, state_reason: str, answers: bool = False) -> None:
        """Write readiness, unless the record has moved on; a pause's reason is kept.

        :param answers: its agent does, although it is not ready.
        """
        record = await self._written(
            lambda tx: self._write(
                tx,
                sandboxes.get(tx, self._telling.id),
                ready=ready,
                answers=answers or ready,
                state_reason=state_reason,
            )
        )
        if record is not None:
            self._world.bus.publish(Happening.UPDATED, record)

    async def _written(self, change: Callable[[Transaction], T]) -> T:
        """Write it, as soon as the catalog can be written: a disk that was full for a moment must
        not keep a guest from ever being ready.
        """
        while True:
            try:
                return await self._world.write(change)
            except (NoSpaceError, UnavailableError) as error:
                log.warning("whether %s is ready is not written yet: %s", self._telling.id, error)
                await asyncio.sleep(_WRITE_SECONDS)

    def _write(
        self, tx: Transaction, old: Sandbox, *, ready: bool, answers: bool, state_reason: str
    ) -> Sandbox | None:
        if old.state is not SandboxState.RUNNING:
            return None
        due = None if answers and self._telling.renews else old.identity_due
        if (old.ready, old.answers, old.state_reason, old.identity_due) == (
            ready,
            answers,
            state_reason,
            due,
        ):
            return None
        return sandboxes.change(
            tx,
            old.id,
            ready=ready,
            ready_at=tx.now if answers else None,
            state_reason=state_reason,
            identity_due=due,
        )
