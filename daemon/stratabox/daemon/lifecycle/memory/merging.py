"""Merging saved memory in the background: deleted snapshots' pages go when newer ones replace them.

After a sweep, whatever RAM file is only stood on by one other is merged into that
(``storage.files.merging``). One at a time, in a thread that yields to everything else, started in
a quiet moment; given up at once when the daemon ends, and until the next sweep when the disk is
full. Nobody waits for it, and no restore, save or check is held up by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from stratabox.daemon.lifecycle.common.threads import in_executor
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import rams
from stratabox.storage.catalog.rams import Merge
from stratabox.storage.files import merging
from stratabox.storage.model.errors import CorruptError, StrataboxError

log = logging.getLogger(__name__)

_NICE = 10
_QUIET = 1.0
_LONGEST = 30.0
"""Seconds without another sweep before it begins; and with others, at most."""


async def keep(world: World) -> None:
    """Merge what there is to merge after every sweep, until cancelled; nothing half-made stays."""
    task = asyncio.current_task()
    assert task is not None
    damaged: set[str] = set()  # another try would find the same; a check tells more
    with ThreadPoolExecutor(1, "merging", initializer=_be_nice) as thread:
        while True:
            await _wait_until_swept(world)
            while wanted := await _next(world, damaged):
                await world.rush.calm()
                try:
                    await _merge(world, thread, wanted, lambda: not task.cancelling())
                except CorruptError as error:
                    log.error("deleted snapshots' memory stays on the disk: %s", error)
                    damaged.add(wanted.child)
                except (StrataboxError, OSError) as error:
                    log.warning("deleted snapshots' memory stays until the next sweep: %s", error)
                    break


async def _wait_until_swept(world: World) -> None:
    """Return a while after a sweep: who deletes one snapshot may be about to delete the next."""
    await world.swept.wait()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LONGEST):
            while world.swept.is_set():
                world.swept.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(world.swept.wait(), _QUIET)


async def _next(world: World, damaged: set[str]) -> Merge | None:
    found = await world.read(rams.merges)
    return next((each for each in found if each.child not in damaged), None)


async def _merge(
    world: World, thread: ThreadPoolExecutor, wanted: Merge, go_on: Callable[[], bool]
) -> None:
    layout, catalog = world.store.layout, world.catalog
    try:
        written = await in_executor(thread, lambda: merging.write(layout, wanted, go_on))
        if written is not None:
            await in_executor(world.worker, lambda: merging.swap(layout, catalog, written))
    finally:
        layout.merging(wanted.child).unlink(missing_ok=True)
    await world.sweep()


def _be_nice() -> None:
    """Lower this thread's priority, and so that of the threads that it starts (Linux)."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
