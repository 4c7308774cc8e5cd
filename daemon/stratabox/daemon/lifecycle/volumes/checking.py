"""Compares the bus of volumes of a running guest with the catalog, for `stratabox check`."""

from __future__ import annotations

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.records import Attachment, Sandbox
from stratabox.storage.model.states import AttachmentState


async def differences(world: World, record: Sandbox, domain: Domain) -> list[str]:
    """What is not as the catalog has it, in words; the guest's lock is held.

    :raise UnavailableError: MONITOR_UNAVAILABLE.
    """
    if not (record.machine.volumes and record.answers):
        return []  # what is on its way is seen to before it is ready

    def look(tx: Transaction) -> list[tuple[Attachment, str]]:
        found = []
        for each in record.volumes:
            layer = volumes.get(tx, each.volume).layer
            if each.state is AttachmentState.ATTACHED and layer is not None:
                top = ChainLayer(id=layer, path=world.store.layout.layer(layer))
                found.append((each, top.node))
        return found

    expected = await world.read(look)
    present, nodes = await domain.volumes.present(), await domain.disks.nodes()
    found = []
    for each, top in expected:
        node, name = present.get(each.slot), each.volume_name
        if node is None:
            found.append(f"it has volume {name!r} by its record, and not on its bus of volumes")
        elif each.read_only and nodes.get(node) is False:
            found.append(f"it could write volume {name!r}, which it has only to read")
        elif not each.read_only and node != top:
            found.append(f"it writes {node} as volume {name!r}, not {top}")
    own = {each.slot for each in record.volumes}
    found += [
        f"slot {slot} of its bus of volumes holds {node}, which is none of its volumes"
        for slot, node in present.items()
        if slot not in own
    ]
    return found
