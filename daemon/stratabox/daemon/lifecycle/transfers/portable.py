"""Records as they stand in an archive, and what may come in from one. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from stratabox.daemon.hypervisor.qemu_host import BIOS
from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.policy import Resources
from stratabox.daemon.lifecycle.volumes import claims
from stratabox.storage.files.transfer.archive import invalid
from stratabox.storage.files.transfer.manifest import (
    Kind,
    Manifest,
    PackedDisk,
    PackedImage,
    PackedMount,
    PackedRam,
    PackedSnapshot,
)
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.ids import (
    ImageId,
    LayerId,
    SandboxId,
    SnapshotId,
    VolumeId,
    mint,
)
from stratabox.storage.model.records import Disk, Image, Machine, Mount, SavedRam, Snapshot
from stratabox.storage.model.states import Level, SnapshotState

MAX_FIRMWARE = 32 << 20
"""Bytes of one file of firmware: SeaBIOS has 256 KiB."""


def pack_snapshot(
    snapshot: Snapshot, places: Mapping[LayerId, int], *, env: bool, memory: bool
) -> PackedSnapshot:
    """What an archive says of a snapshot.

    :param places: of the layers in the manifest.
    :param memory: it is in there. The disks alone are as after a power cut.
    """
    consistency = snapshot.consistency or Level.CRASH
    if not memory and consistency is Level.MEMORY:
        consistency = Level.CRASH
    ram = None
    if memory and snapshot.ram:
        ram = PackedRam(
            state_sha256=snapshot.ram.state_sha256,
            tracking=snapshot.ram.tracking,
            pause_us=snapshot.ram.pause // timedelta(microseconds=1),
            cpu_features=snapshot.ram.cpu_features,
        )
    return PackedSnapshot(
        name=snapshot.name,
        consistency=consistency,
        source_sandbox_name=snapshot.source_sandbox_name,
        image_name=snapshot.image_name,
        cpus=snapshot.cpus,
        memory=snapshot.memory,
        storage=snapshot.storage,
        frozen=snapshot.frozen,
        machine=machine_to_pack(snapshot, memory=memory),
        disks=tuple(
            PackedDisk(
                index=disk.index, serial=disk.serial, size=disk.size, layer=places[disk.layer]
            )
            for disk in snapshot.disks
        ),
        env=dict(snapshot.env) if env else {},
        metadata=dict(snapshot.metadata),
        ram=ram,
        volumes=tuple(
            PackedMount(
                name=mount.volume_name,
                path=mount.path,
                read_only=mount.read_only,
                slot=mount.slot,
            )
            for mount in snapshot.volumes
        ),
    )


def machine_to_pack(snapshot: Snapshot, *, memory: bool) -> Machine:
    """The machine as an archive has it: with its seed only where saved memory knows that.

    What cloud-init did by it is on the disks.
    """
    return snapshot.machine if memory else replace(snapshot.machine, seed=None)


def pack_image(image: Image) -> PackedImage:
    """What an archive says of an image."""
    return PackedImage(
        name=image.name,
        origin=image.origin,
        kernel_boot=image.kernel_boot,
        cloud_init=image.cloud_init,
    )


def check_snapshot(manifest: Manifest, name: str, max_bytes: int) -> PackedSnapshot:
    """Let a snapshot in that one of ours could be.

    :param name: what it is to be called; "": as it was.
    :param max_bytes: that a disk of it may have.
    :raise InvalidArgumentError: INVALID_ARCHIVE, INVALID_ARGUMENT for `name`.
    """
    packed = manifest.snapshot
    if packed is None:
        raise invalid("it holds an image, not a snapshot: use image import --format archive")
    if name:
        policy.check_name(name)
    try:
        policy.check_name(packed.name)
        policy.check_env(packed.env)
        policy.check_metadata(packed.metadata)
        policy.check_resources(
            Resources(cpus=packed.cpus, memory=packed.memory, storage=packed.storage)
        )
        for text in (packed.source_sandbox_name, packed.image_name):
            if text:
                policy.check_name(text)
        for mount in packed.volumes:
            policy.check_name(mount.name)
            if claims.check_path(mount.path) != mount.path:
                raise invalid(f"a volume was at {mount.path[:80]!r}")
    except InvalidArgumentError as error:
        raise invalid(f"its record cannot be: {error.message}") from error
    if len(packed.disks) > 1 + policy.MAX_DATA_DISKS:
        raise invalid(f"it has {len(packed.disks)} disks")
    for layer in manifest.layers:
        if layer.size > max_bytes:
            raise invalid(
                f"a disk of it has {layer.size} bytes, {max_bytes} are allowed (max_image_bytes)"
            )
    if BIOS not in packed.machine.firmware:
        raise invalid(f"its machine has no {BIOS}")
    firmware = set(packed.machine.firmware.values())
    for member in manifest.members:
        if member.sha256 in firmware and member.size > MAX_FIRMWARE:
            raise invalid(f"its firmware {member.sha256} has {member.size} bytes")
    return packed


def check_image(manifest: Manifest, max_bytes: int) -> PackedImage:
    """Let an image in that one of ours could be.

    :param max_bytes: that its disk may have.
    :raise InvalidArgumentError: INVALID_ARCHIVE.
    """
    if manifest.image is None:
        raise invalid("it holds a snapshot, not an image: use snapshot import")
    if manifest.layers[0].size > max_bytes:
        raise invalid(
            f"its disk has {manifest.layers[0].size} bytes, {max_bytes} are allowed"
            " (max_image_bytes)"
        )
    return manifest.image


def unpack_snapshot(
    packed: PackedSnapshot,
    id: SnapshotId,
    layers: Sequence[LayerId],
    *,
    workspace: str,
    name: str,
    image: ImageId | None,
    ram: SavedRam | None,
    machine_types: frozenset[str],
    machine_type: str,
    now: datetime,
    layer_bytes: int,
    parent: SnapshotId | None,
) -> Snapshot:
    """The record of an imported snapshot, whose bytes are in the store.

    It has no sandbox here, and maybe no image: what stood on that stands on layers of its own.

    :param layers: ids by their places in the manifest.
    :param ram: its memory, where that was taken.
    :param machine_types: that this host's QEMU knows. Where a guest only boots, it gets
        `machine_type` instead of one that is not known.
    """
    consistency = packed.consistency
    if consistency is Level.MEMORY and ram is None:
        consistency = Level.CRASH
    machine = packed.machine
    if ram is None:
        machine = replace(machine, seed=None)
        if machine.machine_type not in machine_types:
            machine = replace(machine, machine_type=machine_type)
    return Snapshot(
        id=id,
        workspace=workspace,
        name=name or packed.name,
        state=SnapshotState.READY,
        requested_level=None,
        consistency=consistency,
        source_sandbox=SandboxId(""),
        source_sandbox_name=packed.source_sandbox_name,
        image=image or ImageId(""),
        image_name=packed.image_name,
        cpus=packed.cpus,
        memory=packed.memory,
        storage=packed.storage,
        machine=machine,
        created_at=now,
        ready_at=now,
        disks=tuple(
            Disk(index=disk.index, layer=layers[disk.layer], size=disk.size, serial=disk.serial)
            for disk in packed.disks
        ),
        env=dict(packed.env),
        metadata=dict(packed.metadata),
        frozen=packed.frozen,
        layer_bytes=layer_bytes,
        parent=parent,
        ram=ram,
        volumes=tuple(
            Mount(
                volume=VolumeId(mint()),
                volume_name=mount.name,
                path=mount.path,
                read_only=mount.read_only,
                slot=mount.slot,
            )
            for mount in packed.volumes
        ),
    )


def unpack_ram(packed: PackedRam, *, own_bytes: int, taken: int) -> SavedRam:
    """What is known of imported memory: it stands alone.

    :param own_bytes: of its pages, as they are stored.
    :param taken: by its files on the disk.
    """
    return SavedRam(
        parent=None,
        own_bytes=own_bytes,
        bytes=taken,
        state_sha256=packed.state_sha256,
        tracking=packed.tracking,
        pause=timedelta(microseconds=packed.pause_us),
        cpu_features=packed.cpu_features,
    )


def bytes_to_take(manifest: Manifest, *, memory: bool) -> int:
    """Bytes that an import writes, at most, by what the archive declares."""
    kept = [
        member.data
        for member in manifest.members
        if memory or member.kind not in (Kind.STATE, Kind.RAM)
    ]
    return sum(kept) + sum(kept) // 256 + len(kept) * (1 << 20)  # tables, and whole clusters
