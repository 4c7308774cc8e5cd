"""Taking a memory snapshot: the part of ``capture`` that saves a running domain's RAM and devices.

What the process's memory stands on is persisted with the sandbox: `ram_origin`, the RAM file that
it was started from, and `ram_since`, its last save. The latter is cleared before a save begins and
written again with the READY record, so that after any failure, and for a daemon that was killed,
the next save copies all of the process's own pages: always right, only larger.
"""

from __future__ import annotations

from collections.abc import Sequence

from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.daemon.hypervisor.memory.save import Base, Saved, Target, save
from stratabox.daemon.lifecycle.guest import Guest
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.model.records import SavedRam, Snapshot


async def save_memory(
    world: World,
    guest: Guest,
    snapshot: Snapshot,
    pairs: Sequence[tuple[ChainLayer, ChainLayer]],
) -> SavedRam:
    """Save memory, devices and, in the same pause, switch the disks to their prepared overlays.

    Durable on return; the guest runs on, if it ran. When this raises, no file of it is left.

    :raise StrataboxError: as ``memory.save.save``.
    """
    domain, layout = guest.require_domain(), world.store.layout
    features = await world.memories.features()

    def begin(tx: Transaction) -> Base:
        sandbox = sandboxes.get(tx, guest.id)
        sandboxes.change(tx, guest.id, ram_since=None)
        return Base(origin=sandbox.ram_origin, since=sandbox.ram_since)

    base = await world.write(begin)

    async def switch() -> None:
        await domain.disks.switch(pairs)
        hit("snapshot.switched")

    saved = await save(
        domain,
        base,
        Target(
            id=snapshot.id,
            ram=layout.ram_file(snapshot.id),
            state=layout.state_file(snapshot.id),
        ),
        overlays=[old.path for old, _ in pairs],
        at_pause=switch,
    )
    hit("snapshot.memory-saved")
    return _record(saved, tuple(sorted(features)))


def _record(saved: Saved, features: tuple[str, ...]) -> SavedRam:
    return SavedRam(
        parent=saved.file.parent,
        own_bytes=saved.file.own_bytes,
        state_sha256=saved.state_sha256,
        tracking=saved.tracked,
        pause=saved.pause,
        cpu_features=features,
    )
