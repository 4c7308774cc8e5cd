"""Records as messages, with what other tables and the disk say of them: space, depths of chains.

Inside the transaction that the records were read in, a page of them at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from stratabox.daemon.api import convert, networks, probes
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import layers, rams, space
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.records import Image, Sandbox, Snapshot
from stratabox.v1 import records_pb2


def of_sandboxes(
    tx: Transaction, world: World, records: Sequence[Sandbox]
) -> list[records_pb2.Sandbox]:
    """Sandboxes' messages, in their order."""
    messages = []
    spaces = space.of_sandboxes(tx, records, world.taken, world.known_chains)
    for record, takes in zip(records, spaces, strict=True):
        depths = {disk.index: layers.depth(tx, disk.layer) for disk in record.disks}
        parked = rams.find(tx, record.ram_parked) if record.ram_parked else None
        memory_bytes = parked.own_bytes if parked else 0
        message = convert.sandbox(record, depths, memory_bytes, takes)
        message.workspace = record.workspace
        probes.put(message, record.probe)
        networks.put(message, record.network)
        messages.append(message)
    return messages


def of_snapshots(
    tx: Transaction, world: World, records: Sequence[Snapshot]
) -> list[records_pb2.Snapshot]:
    """Snapshots' messages, in their order."""
    found = []
    spaces = space.of_snapshots(tx, records, world.taken, world.known_chains)
    for record, takes in zip(records, spaces, strict=True):
        message = convert.snapshot(record, takes)
        message.workspace = record.workspace
        probes.put(message, record.probe)
        networks.put(message, record.network)
        message.compressed_bytes = layers.compressed_bytes(tx, [d.layer for d in record.disks])
        found.append(message)
    return found


def of_images(tx: Transaction, world: World, records: Sequence[Image]) -> list[records_pb2.Image]:
    """Images' messages, in their order."""
    return [
        convert.image(record, takes.logical, takes)
        for record, takes in zip(records, space.of_images(tx, records, world.taken), strict=True)
    ]
