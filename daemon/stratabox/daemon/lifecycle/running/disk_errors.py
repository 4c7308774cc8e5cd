"""A disk of the host that failed under a guest: written down, and never tried again by us.

The guest is told (QEMU reports the error), and what it makes of that is its own; its disk may lack
what it wrote. The record says so until the next start; that of a volume, too, until it is mounted
anew.
"""

from __future__ import annotations

import logging
from functools import partial

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.events import BlockError
from stratabox.daemon.lifecycle.running import reasons
from stratabox.daemon.lifecycle.volumes import settling
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import volumes
from stratabox.storage.model.errors import StrataboxError
from stratabox.storage.model.records import Sandbox

log = logging.getLogger(__name__)


async def note_failure(world: World, record: Sandbox, domain: Domain, event: BlockError) -> None:
    """Mark the sandbox, and the volume; its lock is held. The first failure is what is told."""
    try:
        active = await domain.disks.active_layers()
        attached = await settling.behind(domain, record, event.node)
    except StrataboxError:
        active, attached = {}, []  # its end is being written down
    for each in attached:
        await world.write(partial(volumes.note_failed, volume=each.volume, what=settling.FAILED))
    which = [f"volume {each.volume_name!r}" for each in attached]
    which += [f"disk {index}" for index, node in active.items() if node == event.node]
    name = which[0] if which else event.node or "a disk"
    log.error("sandbox %s: %s: %s", record.id, name, event.what)
    if reasons.failed_disk(record.state_reason) or not record.has_process:
        return
    mark = (
        f"{reasons.DISK_FAILED}{name}: the host's disk gave an error ({event.what}); the guest was"
        " told, and may have lost what it wrote. Look at the host's disk, then stop and start the"
        " sandbox"
    )
    reason = "; ".join(part for part in (record.state_reason, mark) if part)
    await world.change_sandbox(record.id, state_reason=reason)
