"""Running guests go over to layers that have taken the place of others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import chains
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import StrataboxError
from stratabox.storage.model.ids import SandboxId

log = logging.getLogger(__name__)

LOCK_SECONDS = 10.0
"""How long a guest is waited for with which somebody is busy; then it comes later."""


class Takeover:
    """Brings guests to where the catalog has their chains; remembers those that could not be.

    Nothing depends on its having been done: a guest that still has old layers open reads the same
    from them, and only keeps their space taken.
    """

    def __init__(self, world: World, guests: Guests) -> None:
        self._world = world
        self._guests = guests
        self._late: set[SandboxId] = set()

    @property
    def is_late(self) -> bool:
        """Some guest is still to come."""
        return bool(self._late)

    async def all(self) -> None:
        """Every guest that runs: after the daemon's start."""
        await self.of([guest.id for guest in self._guests.running()])

    async def late(self) -> None:
        """Those that could not come when it was their turn."""
        await self.of(())

    async def of(self, sandboxes: Iterable[SandboxId]) -> None:
        """These, and those that are late. Nobody waits for one that is busy."""
        due = {*sandboxes, *self._late}
        self._late = set()
        results = await asyncio.gather(*(self._one(sandbox) for sandbox in due))
        self._late |= {sandbox for sandbox, done in zip(due, results, strict=True) if not done}

    async def _one(self, sandbox: SandboxId) -> bool:
        guest = self._guests.of(sandbox)
        total = 0
        while True:
            try:
                async with asyncio.timeout(LOCK_SECONDS):
                    await guest.lock.acquire()
            except TimeoutError:
                return False
            try:
                changed = await self._go_over(guest)
            finally:
                # After every step: a snapshot, for instance, does not wait for all of them.
                guest.lock.release()
            if changed is None:
                return False
            if not changed:
                break
            total += changed
        if total:
            log.info("sandbox %s: %d nodes changed for replaced layers", sandbox, total)
        return True

    async def _go_over(self, guest: Guest) -> int | None:
        """One step; how many nodes were changed, and None where that cannot be done now."""
        domain, layout = guest.domain, self._world.store.layout
        if domain is None:
            return 0

        def look(tx: Transaction) -> list[list[ChainLayer]]:
            return [
                [ChainLayer(id=layer.id, path=layout.layer(layer.id)) for layer in chain]
                for chain in chains.chains_of(tx, guest.id)
            ]

        try:
            await guest.settle()
            with self._world.opening.hold():
                return await domain.take_over(await self._world.read(look))
        except StrataboxError as error:
            if domain.exited.done():
                return 0
            log.warning("sandbox %s keeps replaced layers for now: %s", guest.id, error)
            return None
