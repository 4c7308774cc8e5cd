"""All guests: one `Guest` for each sandbox that is not over."""

from __future__ import annotations

from stratabox.daemon.lifecycle.guest import Guest
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Sandbox


class Guests:
    """Hands out the one `Guest` of each sandbox."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._guests: dict[SandboxId, Guest] = {}

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
        return self.of(record.id), record

    def forget(self, sandbox: SandboxId) -> None:
        """Drop the guest of a sandbox that is over."""
        self._guests.pop(sandbox, None)

    def let_go(self) -> None:
        """Stop watching all of them; they run on."""
        for guest in self._guests.values():
            guest.let_go()
