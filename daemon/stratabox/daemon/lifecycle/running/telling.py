"""What one guest must still be told: what time it is, and who it is. One for each `Guest`.

A guest that goes on from saved memory has the time and the random numbers of that instant, and a
copy is who its source was. The record's `identity_due` says what is due, from the write by which
the guest runs until it was told; so a daemon that is killed in between leaves it to the next one.

- *renew*: told as soon as the agent answers, and the guest counts as ready only then.
- *keep*: ready at once. The first command brings the time along and is answered only when the
  clock is right; where none comes, the guest is told by itself after `GRACE_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stratabox.daemon.hypervisor.guest import identity
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.guest.exec import ExecResult
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import UnavailableError
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import Identity, SandboxState

log = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
"""How long a first command may take to come. It saves the guest a round of its own."""
TURN_SECONDS = 0.5
"""How long a first command keeps its turn at most: as long as one that does nothing may take."""
PING_SECONDS = 2.0
RETRY_SECONDS = 30.0
"""Until a guest whose agent did not answer is told again."""


class Debt:
    """One thing that is due; a later one takes its place."""

    def __init__(self, what: Identity) -> None:
        self.what = what


class Telling:
    """What is due to one guest."""

    def __init__(self, world: World, sandbox: SandboxId) -> None:
        self.id = sandbox
        self._world = world
        self._debt: Debt | None = None
        self._later: asyncio.Task[None] | None = None
        self._cold = False
        """It goes on from elsewhere, and no command has begun since."""

    @property
    def renews(self) -> bool:
        """It is to become somebody new, and not ready before."""
        return self._debt is not None and self._debt.what is Identity.RENEW

    def owe(self, what: Identity | None) -> None:
        """From now on this is due, whatever was before."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._debt = Debt(what) if what else None
        self._cold = what is not None or self._cold

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Have the first command wait until few others begin: all are answered sooner so.

        With KVM a first command is as short as any other, and waits for nobody.
        """
        if not self._cold or self._world.accelerator.name == "kvm":
            yield
            return
        async with self._world.rush.commands.turn(TURN_SECONDS):
            self._cold = False
            yield

    def first(self) -> Debt | None:
        """What the next command must bring along; to be given to `heard` when it has ended."""
        if self.renews or self._debt is None:
            return None
        if self._later is not None:  # twice at once would only take the guest's time
            self._later.cancel()
            self._later = None
        return self._debt

    async def heard(self, agent: GuestAgent, debt: Debt, result: ExecResult | None) -> None:
        """A command that brought it along has ended. Its answer waits for this.

        :param result: with its report; without one nobody knows, and the guest is told again.
        :raise UnavailableError: AGENT_UNAVAILABLE.
        """
        if debt is not self._debt:
            return
        if result is None or result.first is None:
            self.soon(agent, 0)
            return
        await self.brought(agent, debt, result.first, result.duration)

    async def brought(self, agent: GuestAgent, debt: Debt, failed: str, seconds: float) -> None:
        """A command has brought it along. Its answer waits for this.

        :param failed: what could not be done of it, in words.
        :param seconds: how long that took at most.
        :raise UnavailableError: AGENT_UNAVAILABLE.
        """
        if debt is not self._debt:
            return
        failed = await identity.check_clock(agent, failed, seconds)
        self._world.tasks.spawn(self._told(debt, failed), f"told {self.id}")

    async def now(self, agent: GuestAgent) -> None:
        """Tell the guest what is due, and return when it knows.

        :raise UnavailableError: AGENT_UNAVAILABLE; it is told later, then.
        """
        debt = self.first()
        if debt is None:
            return
        try:
            failed = await identity.tell(agent)
        except BaseException:
            self.soon(agent)
            raise
        await self._told(debt, failed)

    def soon(self, agent: GuestAgent, seconds: float = GRACE_SECONDS) -> None:
        """Tell the guest by itself, unless a command does it first."""
        if self._debt is not None and self._later is None:
            self._later = self._world.tasks.spawn(
                self._tell(agent, self._debt, seconds), f"tell {self.id}"
            )

    async def renew(self, agent: GuestAgent) -> str:
        """Have the guest become somebody new; "", or why it is not all new.

        `owe` and the record are the caller's to change.

        :raise UnavailableError: AGENT_UNAVAILABLE, when the agent stops answering.
        """
        record = await self._world.read(lambda tx: sandboxes.get(tx, self.id))
        new = identity.Renewal.mint(record.name, self.id, record.machine.mac)
        failed = await identity.tell(agent, new)
        hit("identity.told")
        if failed:
            log.warning("sandbox %s is not all new: %s", self.id, failed)
            return f"its identity could not be renewed: {failed}"
        return ""

    async def begin(self, agent: GuestAgent) -> None:
        """Tell a guest that has booted, whom nothing is due.

        A copy of its disk has fresh random numbers by that. And its agent has started a program
        once: without KVM every copy of its memory begins its own first one 40 ms sooner then, and
        takes 6 MB less.

        :raise UnavailableError: AGENT_UNAVAILABLE, when the agent stops answering.
        """
        failed = await identity.tell(agent)
        if failed:  # one whose agent may run nothing, for instance; nobody was promised more
            log.info("sandbox %s was not told all at its start: %s", self.id, failed)

    async def _tell(self, agent: GuestAgent, debt: Debt, seconds: float) -> None:
        while debt is self._debt:
            await asyncio.sleep(seconds)
            try:
                # First of all: an agent that stands still must not be waited for with its turn
                # taken, as somebody may want to know that it does.
                await agent.ping(PING_SECONDS)
                failed = await identity.tell(agent)
            except UnavailableError as error:
                # Still due: the next command brings it along, or the next daemon tells it.
                log.warning("sandbox %s was not told the time yet: %s", self.id, error)
                seconds = RETRY_SECONDS
            else:
                await self._told(debt, failed)

    async def _told(self, debt: Debt, failed: str) -> None:
        """Write that nothing is due any more, and what could not be done."""
        if debt is not self._debt:
            return
        self._debt = None

        def write(tx: Transaction) -> Sandbox | None:
            old = sandboxes.get(tx, self.id)
            if old.state is not SandboxState.RUNNING or old.identity_due is not debt.what:
                return None
            reason = f"the guest could not be told: {failed}" if failed else old.state_reason
            return sandboxes.change(tx, self.id, identity_due=None, state_reason=reason)

        record = await self._world.write(write)
        if record is not None and failed:
            log.warning("sandbox %s was not told all: %s", self.id, failed)
            self._world.bus.publish(Happening.UPDATED, record)
