"""Taking a memory snapshot: the part of ``capture`` that saves a running domain's RAM and devices.

What the process's memory stands on is persisted with the sandbox: `ram_origin`, the RAM file that
it was started from, and `ram_since`, its last save. The latter is cleared before a save begins and
written again with the READY record, so that after any failure, and for a daemon that was killed,
the next save copies all of the process's own pages: always right, only larger.
"""

from __future__ import annotations

from collections.abc import Sequence

from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.daemon.hypervisor.memory import mapping, reader
from stratabox.daemon.hypervisor.memory.save import Base, Saved, Target, save
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.volumes import settling
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import rams, sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import DeniedError, UnavailableError
from stratabox.storage.model.records import SavedRam, Snapshot


async def require_readable(guest: Guest) -> None:
    """Make sure that the guest's memory can be saved, before anything is done for it.

    :raise DeniedError: MEMORY_UNREADABLE, when the kernel does not let us read it; INVALID_STATE.
    :raise UnavailableError: MEMORY_UNREADABLE, for a QEMU that was started otherwise;
        MONITOR_UNAVAILABLE.
    """
    domain = guest.require_domain()
    path, size = await domain.memory.ram_file()
    where = await in_thread(mapping.find, domain.handle.pid, path, size)
    await in_thread(reader.check_readable, where)


async def is_readable(guest: Guest) -> bool:
    """Whether the guest's memory can be saved, for who has a choice."""
    try:
        await require_readable(guest)
    except (DeniedError, UnavailableError):
        return False
    return True


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
    await settling.check_settled(domain, await guest.record())
    features = await world.memories.features()

    def begin(tx: Transaction) -> Base:
        sandbox = sandboxes.get(tx, guest.id)
        sandboxes.change(tx, guest.id, ram_since=None)
        rams.pin(tx, guest.id, sandbox.ram_since or sandbox.ram_origin)
        return Base(origin=sandbox.ram_origin, since=sandbox.ram_since)

    base = await world.write(begin)

    async def switch() -> None:
        await domain.disks.switch(pairs)
        hit("snapshot.switched")

    with world.rush.hold():
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
    return as_record(saved, tuple(sorted(features)), world.store.ram_bytes([snapshot.id]))


def as_record(saved: Saved, features: tuple[str, ...], taken: int) -> SavedRam:
    """What the catalog keeps of it.

    :param features: of the guest's CPU, by QEMU's names.
    :param taken: what its files take on the disk, bytes.
    """
    return SavedRam(
        parent=saved.file.parent,
        own_bytes=saved.file.own_bytes,
        bytes=taken,
        state_sha256=saved.state_sha256,
        tracking=saved.tracked,
        pause=saved.pause,
        cpu_features=features,
    )
