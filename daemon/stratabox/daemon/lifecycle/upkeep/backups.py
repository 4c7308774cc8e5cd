"""Backs the catalog up, again and again, while it is used, and before replaced layers go.

In a thread that yields to everything else, by a connection of its own: SQLite shows that one the
catalog of one instant, and whoever writes meanwhile is not held up.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from stratabox.daemon.lifecycle.common.threads import be_nice, in_executor
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.files import backups
from stratabox.storage.model.errors import StrataboxError

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
"""After how long it is tried again where it failed."""


async def before_removal(world: World) -> None:
    """A job has replaced layers: only a backup made from now on is good without them.

    To be called while the job still keeps them from being swept. Where no backup can be made, that
    is logged, and they go all the same: on a full disk their room is what is needed.
    """
    await _make(world, backups.MERGED)


async def keep(world: World) -> None:
    """Make a backup now, and then one in each period in which something has changed."""
    backed_up = -1
    while True:
        changes, wait = world.catalog.changes, world.config.backups_every
        if changes != backed_up:
            if await _make(world, ""):
                backed_up = changes
            else:
                wait = min(wait, RETRY_SECONDS)
        await asyncio.sleep(wait)


async def _make(world: World, kind: str) -> bool:
    """Make one; whether that went well."""
    layout = world.store.layout

    def make() -> None:
        made = backups.make(layout, kind)
        if made is not None:
            log.info("the catalog is backed up: %s", made.path.name)
            backups.prune(layout, world.config.backups_keep)

    try:
        async with world.backing_up:
            with ThreadPoolExecutor(1, "backup", initializer=be_nice) as thread:
                await in_executor(thread, make)
    except (StrataboxError, OSError) as error:
        log.error("the catalog could not be backed up: %s", error)
        return False
    return True
