"""A freeze of a guest's file systems, with its count: proof that it held until the thaw."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from stratabox.daemon.hypervisor.guest.agent import REPLY_SECONDS, GuestAgent
from stratabox.daemon.lifecycle.common.threads import settle
from stratabox.daemon.lifecycle.running.thawing import thaw
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import operations
from stratabox.storage.catalog.operations import Operation
from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import FailedError


class Freeze:
    """File systems held still: begun, counted, and ended whatever happens in between."""

    def __init__(
        self, world: World, agent: GuestAgent, operation: Operation, payload: dict[str, Any]
    ) -> None:
        self.frozen = 0
        self.stall: timedelta | None = None
        self._world = world
        self._agent = agent
        self._operation = operation
        self._payload = payload
        self._begun = 0.0

    async def begin(self) -> None:
        """Freeze all file systems; thawed again when this raises.

        :raise FailedError: FREEZE_FAILED.
        :raise UnavailableError: AGENT_UNAVAILABLE.
        """
        await self._note(freezing=True)
        hit("snapshot.freeze-intended")
        seconds = self._world.config.freeze_timeout
        # Before the freeze is asked for nothing needs to be undone: an agent that is deaf
        # already is not waited for a second time.
        status = await self._agent.fsfreeze_status(min(seconds, REPLY_SECONDS))
        self._begun = time.monotonic()
        try:
            if status != "thawed":
                raise FailedError(
                    f"the guest's file systems were {status} already, by somebody else;"
                    " they have been thawed",
                    reason="FREEZE_FAILED",
                )
            self.frozen = await self._agent.fsfreeze_freeze(seconds)
            if self.frozen == 0:
                raise FailedError("the guest's agent froze no file system", reason="FREEZE_FAILED")
        except BaseException:
            await settle(self.end())
            raise

    async def write_count(self) -> None:
        """Persist how many were frozen, so that a killed daemon can still judge the thaw."""
        await self._note(frozen=self.frozen)

    async def end(self) -> int | None:
        """Thaw, whatever it takes; returns how many file systems were, where the agent said so."""
        thawed = await thaw(self._agent)
        self.stall = timedelta(seconds=time.monotonic() - self._begun)
        return thawed

    def verdict(self, thawed: int | None) -> str | None:
        """What is wrong with the counts; None when they prove that nothing thawed in between."""
        if thawed == self.frozen:
            return None
        if thawed is None:
            return "the guest's agent did not say how many file systems it thawed"
        if thawed > self.frozen:
            return (
                f"{thawed - self.frozen} of the guest's {thawed} file systems were frozen already,"
                " by somebody else; they have been thawed"
            )
        return (
            f"{self.frozen} file systems were frozen but {thawed} were thawed: something in the"
            " guest ended the freeze early"
        )

    async def _note(self, **entries: Any) -> None:
        self._payload.update(entries)
        payload = dict(self._payload)
        await self._world.write(lambda tx: operations.amend(tx, self._operation.id, payload))
