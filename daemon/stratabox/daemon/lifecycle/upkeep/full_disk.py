"""What goes on by itself once a full disk has room again: guests, what was not written down.

A guest is let run where there is clearly more room than before, not more often than its turn comes:
the time until that doubles with every try that came to nothing. Whoever pauses it keeps it paused.
A disk that *failed* is never tried again by us.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.running import reasons
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.running.thawing import thaw_after_full_disk
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.files import reserve
from stratabox.storage.model.errors import NotFoundError, StrataboxError
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.states import SandboxState

log = logging.getLogger(__name__)

PERIOD = 2.0
"""Seconds between two looks."""
FIRST_WAIT = 4.0
LONGEST_WAIT = 300.0
"""Seconds until a guest's next turn, after its first try and at most."""
ROOM = 3
"""How many times the reserve must be free: none of that is what the reserve itself gave back."""


@dataclass
class Turn:
    """When a guest may be tried again."""

    not_before: float
    """By the monotonic clock."""
    wait: float


class Turns:
    """Whose turn it is. Pure: told the time."""

    def __init__(self) -> None:
        self._turns: dict[SandboxId, Turn] = {}

    def is_due(self, sandbox: SandboxId, now: float) -> bool:
        """It may be tried."""
        turn = self._turns.get(sandbox)
        return turn is None or now >= turn.not_before

    def tried(self, sandbox: SandboxId, now: float) -> None:
        """It was let run; when it is stopped again soon, it waits longer."""
        before = self._turns.get(sandbox)
        wait = FIRST_WAIT
        if before is not None and now < before.not_before + LONGEST_WAIT:
            wait = min(before.wait * 2, LONGEST_WAIT)
        self._turns[sandbox] = Turn(not_before=now + wait, wait=wait)


async def keep(world: World, guests: Guests) -> None:
    """Look again and again, until cancelled."""
    turns = Turns()
    while True:
        try:
            await look(world, guests, turns)
        except (StrataboxError, OSError) as error:
            log.warning("guests that a full disk has stopped wait: %s", error)
        await asyncio.sleep(PERIOD)


async def look(world: World, guests: Guests, turns: Turns) -> None:
    """Look once."""
    layout = world.store.layout
    if not await in_thread(_has_room, world):
        return
    await in_thread(reserve.take, layout.reserve)
    await world.pay()
    for guest in guests.in_debt():
        async with guest.lock:
            await guest.settle()
    for sandbox in await world.read(_stopped):
        if turns.is_due(sandbox, time.monotonic()):
            turns.tried(sandbox, time.monotonic())
            await _go_on(guests.of(sandbox))


def _has_room(world: World) -> bool:
    root = world.store.layout.root
    return reserve.free_bytes(root) >= ROOM * reserve.wanted_bytes(root)


def _stopped(tx: Transaction) -> list[SandboxId]:
    rows = tx.rows("SELECT id, state_reason FROM sandboxes WHERE state = 'paused'")
    return [SandboxId(row["id"]) for row in rows if reasons.is_full(row["state_reason"])]


async def _go_on(guest: Guest) -> None:
    try:
        async with guest.lock:
            record = await guest.record()
            if record.state is not SandboxState.PAUSED or not reasons.is_full(record.state_reason):
                return  # somebody has resumed it, or keeps it paused
            domain = guest.domain
            if domain is None or await domain.status() != "io-error":
                return  # its end, or its going on, is being written down
            await guest.go_on()
            await thaw_after_full_disk(guest, record.state_reason)
            log.info("sandbox %s goes on: the host's disk has room again", guest.id)
    except NotFoundError:
        return
    except StrataboxError as error:
        log.warning("sandbox %s cannot go on yet: %s", guest.id, error)
