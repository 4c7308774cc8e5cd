"""Deleting what is over: snapshots past their expiry, and old idempotency keys."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from stratabox.daemon.lifecycle.snapshots import Snapshots
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import idempotency, snapshots
from stratabox.storage.model.errors import StrataboxError

log = logging.getLogger(__name__)

PERIOD = 5.0
"""Seconds between two looks; an expiry is late by at most this."""


async def run(world: World, snapshots_: Snapshots) -> None:
    """Look again and again, until cancelled. What was due while the daemon was away goes first."""
    kept = timedelta(hours=world.config.idempotency_hours)
    while True:
        try:
            await _look(world, snapshots_, kept)
        except (StrataboxError, OSError) as error:
            log.warning("what has expired stays for now: %s", error)
        await asyncio.sleep(PERIOD)


async def _look(world: World, snapshots_: Snapshots, kept: timedelta) -> None:
    await world.write(lambda tx: idempotency.expire(tx, kept))
    for snapshot in await world.read(snapshots.expired):
        try:
            await snapshots_.delete(snapshot)
            log.info("snapshot %s has expired", snapshot)
        except StrataboxError as error:
            # Something needs it right now, or somebody was quicker: next time.
            log.info("expired snapshot %s stays for now: %s", snapshot, error.message)
