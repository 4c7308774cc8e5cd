"""All guests: one `Guest` for each sandbox that is not over."""

from __future__ import annotations

from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import SandboxState
from stratabox.storage.model.workspaces import acting


class Guests:
    """Hands out the one `Guest` of each sandbox."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._guests: dict[SandboxId, Guest] = {}
        self._owners: dict[SandboxId, str] = {}
        """Workspaces of those that somebody has asked for; it never changes."""

    def of(self, sandbox: SandboxId) -> Guest:
        """The guest of a sandbox whose record exists."""
        guest = self._guests.get(sandbox)
        if guest is None:
            guest = self._guests[sandbox] = Guest(self._world, sandbox)
        return guest

    async def find(self, reference: str) -> tuple[Guest, Sandbox]:
        """The guest and record behind an id, name or start of an id.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise DeniedError: AMBIGUOUS_NAME.
        """
        record = await self._world.read(
            lambda tx: sandboxes.get(tx, sandboxes.resolve(tx, reference))
        )
        self._owners[record.id] = record.workspace
        return self.of(record.id), record

    async def named(self, reference: str) -> Guest:
        """As `find`, without another look at the catalog for a full id; its record may be gone."""
        known = self._guests.get(SandboxId(reference))
        if known is not None and self._owners.get(known.id) == acting.get():
            return known
        return (await self.find(reference))[0]

    def running(self) -> list[Guest]:
        """Those that have a domain now."""
        return [guest for guest in self._guests.values() if guest.domain is not None]

    def processes(self) -> dict[SandboxId, int]:
        """Pid of each that has a domain now. From any thread."""
        return {
            sandbox: domain.handle.pid
            for sandbox, guest in self._guests.copy().items()
            if (domain := guest.domain) is not None
        }

    def forget(self, sandbox: SandboxId) -> None:
        """Drop the guest of a sandbox that is over."""
        self._guests.pop(sandbox, None)
        self._owners.pop(sandbox, None)

    async def set_clocks_soon(self) -> None:
        """Have the clocks set of all guests that run; paused ones are told when they go on."""

        def look(tx: Transaction) -> set[SandboxId]:
            return {
                record.id
                for record in sandboxes.everything(tx)
                if record.state is SandboxState.RUNNING
            }

        for sandbox in await self._world.read(look):
            if guest := self._guests.get(sandbox):
                guest.set_clock_soon()

    def in_debt(self) -> list[Guest]:
        """Those of whose disks the catalog was not told all."""
        return [guest for guest in self._guests.values() if guest.owes]

    def let_go(self) -> None:
        """Stop watching all of them; they run on."""
        for guest in self._guests.values():
            guest.let_go()
