"""What an archive says that it holds: the words, and how they are written.

``strict`` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from stratabox.storage.files.transfer.archive import Unit
from stratabox.storage.model.ids import Sha256
from stratabox.storage.model.records import KernelBoot, Machine
from stratabox.storage.model.states import Level

FORMAT = "stratabox archive"


class Kind(StrEnum):
    """What a member is."""

    LAYER = "layer"
    BLOB = "blob"
    STATE = "state"
    """Of the devices, of a memory snapshot."""
    RAM = "ram"

    @property
    def unit(self) -> Unit:
        """How its content is cut."""
        return {Kind.LAYER: Unit.DISK, Kind.RAM: Unit.RAM}.get(self, Unit.FILE)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One part of an archive."""

    kind: Kind
    size: int
    """Of the disk, the RAM or the file, bytes."""
    data: int
    """Bytes of content at most, without what is absent or zeros."""
    layer: int | None = None
    """Of a layer: its place in `Manifest.layers`."""
    sha256: Sha256 | None = None
    """Of a file."""


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """A layer of the chains, in the archive or presumed at the other side."""

    size: int
    """Virtual size, bytes."""
    parent: int | None
    """The place of the layer below, which is a lower one."""
    base: Sha256 | None = None
    """What it reads as, where it is not in the archive; what is below it is not told then."""


@dataclass(frozen=True, kw_only=True)
class PackedDisk:
    """A disk of a snapshot."""

    index: int
    serial: str
    size: int
    layer: int


@dataclass(frozen=True, kw_only=True)
class PackedRam:
    """What is to be known of saved memory."""

    state_sha256: Sha256
    tracking: str
    pause_us: int
    cpu_features: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PackedMount:
    """A volume that a snapshot's sandbox had."""

    name: str
    path: str
    read_only: bool
    slot: int


@dataclass(frozen=True, kw_only=True)
class PackedSnapshot:
    """What of a snapshot's record means something elsewhere."""

    name: str
    consistency: Level
    source_sandbox_name: str
    image_name: str
    cpus: int
    memory: int
    """MiB."""
    storage: int
    """GiB."""
    frozen: int
    machine: Machine
    disks: tuple[PackedDisk, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    ram: PackedRam | None = None
    volumes: tuple[PackedMount, ...] = ()
    """What its sandbox had; they are no part of it."""


@dataclass(frozen=True, kw_only=True)
class PackedImage:
    """An image."""

    name: str
    origin: str
    kernel_boot: KernelBoot | None = None
    cloud_init: bool = False


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of it. Exactly one of `snapshot` and `image`."""

    layers: tuple[PackedLayer, ...]
    """Whose parents come before them."""
    members: tuple[Member, ...]
    snapshot: PackedSnapshot | None = None
    image: PackedImage | None = None
    base_blobs: tuple[Sha256, ...] = ()
    """Files that are not in the archive."""

    @property
    def data(self) -> int:
        """Bytes of content in all, at most."""
        return sum(member.data for member in self.members)


def dump(manifest: Manifest) -> bytes:
    """A manifest as it stands in an archive; always the same bytes for the same manifest."""
    value: dict[str, Any] = {
        "format": FORMAT,
        "layers": [
            {"size": layer.size, "parent": layer.parent, "base": layer.base}
            for layer in manifest.layers
        ],
        "members": [
            {
                "kind": member.kind,
                "size": member.size,
                "data": member.data,
                "layer": member.layer,
                "sha256": member.sha256,
            }
            for member in manifest.members
        ],
        "base_blobs": list(manifest.base_blobs),
        "snapshot": manifest.snapshot and _dump_snapshot(manifest.snapshot),
        "image": manifest.image and _dump_image(manifest.image),
    }
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def needed_blobs(manifest: Manifest) -> set[Sha256]:
    """The files that the records name."""
    blobs: set[Sha256] = set()
    boot = manifest.image.kernel_boot if manifest.image else None
    if manifest.snapshot:
        blobs |= set(manifest.snapshot.machine.firmware.values())
        boot = manifest.snapshot.machine.kernel_boot
        if manifest.snapshot.machine.seed:
            blobs.add(manifest.snapshot.machine.seed)
    if boot:
        blobs |= {boot.kernel, boot.initrd}
    return blobs


def expected_members(manifest: Manifest) -> list[tuple[Kind, int | None, Sha256 | None]]:
    """What the records need: layers from below, blobs in order, the devices' state, RAM."""
    blobs, snapshot = needed_blobs(manifest), manifest.snapshot
    expected: list[tuple[Kind, int | None, Sha256 | None]] = [
        (Kind.LAYER, at, None) for at, layer in enumerate(manifest.layers) if layer.base is None
    ]
    left_out = set(manifest.base_blobs)
    expected += [(Kind.BLOB, None, blob) for blob in sorted(blobs - left_out)]
    if snapshot and snapshot.ram:
        expected += [(Kind.STATE, None, snapshot.ram.state_sha256), (Kind.RAM, None, None)]
    return expected


def _dump_snapshot(snapshot: PackedSnapshot) -> dict[str, Any]:
    machine, ram = snapshot.machine, snapshot.ram
    return {
        "name": snapshot.name,
        "consistency": snapshot.consistency,
        "source_sandbox_name": snapshot.source_sandbox_name,
        "image_name": snapshot.image_name,
        "cpus": snapshot.cpus,
        "memory": snapshot.memory,
        "storage": snapshot.storage,
        "frozen": snapshot.frozen,
        "machine": {
            "machine_type": machine.machine_type,
            "accelerator": machine.accelerator,
            "cpu_model": machine.cpu_model,
            "qemu_version": machine.qemu_version,
            "firmware": dict(machine.firmware),
            "mac": machine.mac,
            "kernel_boot": machine.kernel_boot and _dump_boot(machine.kernel_boot),
            "volumes": machine.volumes,
            "channel": machine.channel,
            "uplink": machine.uplink,
            # Only where there is one, so that older versions take all others; what boots gets it.
            **({"exec_port": True} if machine.exec_port and ram else {}),
            **({"seed": machine.seed} if machine.seed else {}),
        },
        "volumes": [
            {
                "name": volume.name,
                "path": volume.path,
                "read_only": volume.read_only,
                "slot": volume.slot,
            }
            for volume in snapshot.volumes
        ],
        "disks": [
            {"index": disk.index, "serial": disk.serial, "size": disk.size, "layer": disk.layer}
            for disk in snapshot.disks
        ],
        "env": dict(snapshot.env),
        "metadata": dict(snapshot.metadata),
        "ram": ram and {
            "state_sha256": ram.state_sha256,
            "tracking": ram.tracking,
            "pause_us": ram.pause_us,
            "cpu_features": list(ram.cpu_features),
        },
    }  # fmt: skip


def _dump_image(image: PackedImage) -> dict[str, Any]:
    return {
        "name": image.name,
        "origin": image.origin,
        "kernel_boot": image.kernel_boot and _dump_boot(image.kernel_boot),
        **({"cloud_init": True} if image.cloud_init else {}),
    }


def _dump_boot(boot: KernelBoot) -> dict[str, str]:
    return {"kernel": boot.kernel, "initrd": boot.initrd, "command_line": boot.command_line}
