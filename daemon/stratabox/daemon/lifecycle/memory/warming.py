"""After a start: the memory of what was saved or restored last is made ready again.

What is assembled lives in the daemon's hands, so a new daemon begins with nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from stratabox.daemon.lifecycle.memory.memories import Origin
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes, snapshots
from stratabox.storage.model.records import Sandbox, Snapshot
from stratabox.storage.model.states import SnapshotState

MOST = 4
"""So many are made ready at a start; the others when somebody wants them."""


async def keep(world: World) -> None:
    """Make ready what was used last, then what comes; until cancelled."""
    if world.config.memory_cache:
        found = await world.read(
            lambda tx: last_used(snapshots.lately_saved(tx, MOST), sandboxes.everything(tx))
        )
        for origin in reversed(found):
            world.memories.warm(origin)
    await world.memories.keep_warm(world.rush)


def last_used(snapshots_: Iterable[Snapshot], sandboxes_: Iterable[Sandbox]) -> list[Origin]:
    """The memory snapshots that were taken or restored last, the very last first. Pure."""
    used: dict[str, datetime] = {}
    for sandbox in sandboxes_:
        if sandbox.source_snapshot is not None:
            origin, now = sandbox.source_snapshot, sandbox.created_at
            used[origin] = max(now, used.get(origin, now))
    found: list[tuple[datetime, Origin]] = []
    for snapshot in snapshots_:
        memory = Origin.of(snapshot)
        if memory is not None and snapshot.state is SnapshotState.READY and snapshot.ready_at:
            found.append((used.get(snapshot.id, snapshot.ready_at), memory))
    found.sort(key=lambda each: each[0], reverse=True)
    return [memory for _, memory in found[:MOST]]
