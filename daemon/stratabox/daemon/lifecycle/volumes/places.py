"""Volumes as a domain has them: on what they stand, and what stands in for them."""

from __future__ import annotations

from pathlib import Path

from stratabox.daemon.hypervisor.machine import ChainLayer, DomainVolume
from stratabox.storage.catalog import attachments, layers, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.files.layout import Layout
from stratabox.storage.model.errors import CorruptError
from stratabox.storage.model.ids import LayerId, SandboxId, VolumeId
from stratabox.storage.model.records import Attachment, Mount

SERIAL_BYTES = 20


def serial_of(volume: VolumeId) -> str:
    """What a guest sees as a volume's serial number."""
    return volume[:SERIAL_BYTES]


def chain_of(tx: Transaction, layout: Layout, layer: LayerId) -> list[ChainLayer]:
    """A layer and all that it stands on."""
    return [ChainLayer(id=each.id, path=layout.layer(each.id)) for each in layers.chain(tx, layer)]


def plugged(tx: Transaction, layout: Layout, attachment: Attachment) -> DomainVolume:
    """An attached volume as it is to be plugged in.

    :raise CorruptError: LAYER_MISSING.
    """
    volume = volumes.get(tx, attachment.volume)
    if volume.layer is None:
        raise CorruptError(f"volume {volume.name!r} has no disk", reason="LAYER_MISSING")
    chain = chain_of(tx, layout, volume.layer)
    for layer in chain:
        if not layer.path.exists():
            raise CorruptError(
                f"volume {volume.name!r} needs layer {layer.id}, whose file is gone",
                reason="LAYER_MISSING",
                layer=layer.id,
            )
    return DomainVolume(
        slot=attachment.slot,
        serial=serial_of(volume.id),
        chain=chain,
        read_only=attachment.read_only,
    )


def stand_in(mount: Mount) -> DomainVolume:
    """What is in a volume's place where saved memory knows it and its sandbox does not get it."""
    return DomainVolume(slot=mount.slot, serial=serial_of(mount.volume), chain=(), read_only=False)


def written(tx: Transaction, layout: Layout, sandbox: SandboxId) -> list[Path]:
    """Files of the volumes that a sandbox has to write."""
    tops = [
        volumes.get(tx, each.volume).layer
        for each in attachments.of_sandbox(tx, sandbox)
        if not each.read_only
    ]
    return [layout.layer(top) for top in tops if top]


def shared_nodes(tx: Transaction, layout: Layout, sandbox: SandboxId, volume: VolumeId) -> set[str]:
    """Nodes that a sandbox's other volumes stand on."""
    tops = [
        volumes.get(tx, each.volume).layer
        for each in attachments.of_sandbox(tx, sandbox)
        if each.volume != volume
    ]
    return {layer.node for top in tops if top for layer in chain_of(tx, layout, top)}
