"""Reads manifests that anybody may have written.

A `Manifest` comes out whose every value is of its type, within its bounds, and fits the others; or
INVALID_ARCHIVE, naming the place. What the daemon's policy says of names and sizes is asked by its
own functions, later.
"""

from __future__ import annotations

import json
import re
from typing import Any

from stratabox.storage.files.memory.sealed import STATE_BYTES
from stratabox.storage.files.transfer.archive import Unit, invalid
from stratabox.storage.files.transfer.fields import Fields
from stratabox.storage.files.transfer.manifest import (
    FORMAT,
    Kind,
    Manifest,
    Member,
    PackedDisk,
    PackedImage,
    PackedLayer,
    PackedMount,
    PackedRam,
    PackedSnapshot,
    expected_members,
    needed_blobs,
)
from stratabox.storage.model.ids import Sha256
from stratabox.storage.model.records import MIB, KernelBoot, Machine
from stratabox.storage.model.states import Level
from stratabox.storage.qcow2.header import MAX_VIRTUAL_SIZE

MAX_LAYERS = 1024
MAX_DISKS = 16
MAX_BLOB = 1 << 30
_MAX_MEMBERS = MAX_LAYERS + 64
_MAX_RAM = 64 << 40
_MAX_SLOTS = 16
_MAX_BLOBS = 64
_SECTOR = 512

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MACHINE_TYPE = re.compile(r"pc-(q35|i440fx)-\d{1,3}(\.\d{1,3}){1,2}")
_CPU_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_QEMU_VERSION = re.compile(r"\d{1,3}(\.\d{1,3}){1,2}")
_FIRMWARE = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\.bin")
_MAC = re.compile(r"52:54:00(:[0-9a-f]{2}){3}")
_SERIAL = re.compile(r"[A-Za-z0-9_-]{1,20}")
_FEATURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PRINTABLE = re.compile(r"[\x20-\x7e]*")


def parse(content: bytes) -> Manifest:
    """The manifest in these bytes. :raise InvalidArgumentError: INVALID_ARCHIVE, whatever it is."""
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        raise invalid(f"its manifest is not JSON ({type(error).__name__})") from None
    fields = Fields(value, "the manifest")
    if fields.text("format", 64) != FORMAT:
        raise invalid("its manifest is of another format")
    layers = tuple(_layer(each, at) for at, each in enumerate(fields.items("layers", MAX_LAYERS)))
    members = tuple(_member(each) for each in fields.items("members", _MAX_MEMBERS))
    snapshot, image = fields.optional("snapshot"), fields.optional("image")
    base_blobs = tuple(Sha256(blob) for blob in fields.words("base_blobs", _MAX_BLOBS, _SHA256))
    fields.end()
    if (snapshot is None) == (image is None):
        raise invalid("its manifest tells of a snapshot and an image, or of neither")
    manifest = Manifest(
        layers=layers,
        members=members,
        snapshot=None if snapshot is None else _snapshot(snapshot, len(layers)),
        image=None if image is None else _image(image),
        base_blobs=base_blobs,
    )
    _check_members(manifest)
    return manifest


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(text)


def _layer(fields: Fields, at: int) -> PackedLayer:
    size = fields.whole("size", _SECTOR, MAX_VIRTUAL_SIZE)
    layer = PackedLayer(
        size=size,
        parent=fields.whole_or_none("parent", 0, at - 1),
        base=fields.digest_or_none("base"),
    )
    fields.end()
    if size % _SECTOR:
        raise invalid(f"{fields.where} has a disk of {size} bytes, which is not whole sectors")
    return layer


def _member(fields: Fields) -> Member:
    kind = Kind(fields.word("kind", tuple(Kind)))
    most = {Kind.LAYER: MAX_VIRTUAL_SIZE, Kind.RAM: _MAX_RAM, Kind.BLOB: MAX_BLOB}
    size = fields.whole("size", 1, most.get(kind, STATE_BYTES))
    member = Member(
        kind=kind,
        size=size,
        # A disk's last cluster may reach beyond its end.
        data=fields.whole("data", 0, size + kind.unit),
        layer=fields.whole_or_none("layer", 0, MAX_LAYERS),
        sha256=fields.digest_or_none("sha256"),
    )
    fields.end()
    if (member.layer is None) == (kind is Kind.LAYER):
        raise invalid(f"{fields.where} is a layer without a place, or has one and is none")
    if (member.sha256 is None) == (kind.unit is Unit.FILE):
        raise invalid(f"{fields.where} is a file without a SHA-256, or has one and is none")
    return member


def _snapshot(fields: Fields, layers: int) -> PackedSnapshot:
    ram = fields.optional("ram")
    snapshot = PackedSnapshot(
        name=fields.text("name", 255),
        consistency=Level(fields.word("consistency", tuple(Level))),
        source_sandbox_name=fields.text("source_sandbox_name", 255),
        image_name=fields.text("image_name", 255),
        cpus=fields.whole("cpus", 1, 1024),
        memory=fields.whole("memory", 1, _MAX_RAM // MIB),
        storage=fields.whole("storage", 1, 1 << 20),
        frozen=fields.whole("frozen", 0, 1 << 20),
        machine=_machine(fields.inner("machine")),
        disks=tuple(_disk(each, layers) for each in fields.items("disks", MAX_DISKS)),
        env=fields.texts("env", 1024, 128 << 10),
        metadata=fields.texts("metadata", 1024, 16 << 10),
        ram=None if ram is None else _ram(ram),
        volumes=tuple(_mount(each) for each in fields.items("volumes", _MAX_SLOTS)),
    )
    fields.end()
    slots = {volume.slot for volume in snapshot.volumes}
    if len(slots) != len(snapshot.volumes):
        raise invalid("two of its volumes have one slot")
    indexes = [disk.index for disk in snapshot.disks]
    if not indexes or indexes != list(range(len(indexes))):
        raise invalid(f"its disks are numbered {indexes}")
    if (snapshot.consistency is Level.MEMORY) != (snapshot.ram is not None):
        raise invalid("its level and its memory do not fit each other")
    return snapshot


def _disk(fields: Fields, layers: int) -> PackedDisk:
    disk = PackedDisk(
        index=fields.whole("index", 0, MAX_DISKS - 1),
        serial=fields.text("serial", 20, _SERIAL),
        size=fields.whole("size", _SECTOR, MAX_VIRTUAL_SIZE),
        layer=fields.whole("layer", 0, layers - 1),
    )
    fields.end()
    return disk


def _mount(fields: Fields) -> PackedMount:
    mount = PackedMount(
        name=fields.text("name", 255),
        path=fields.text("path", 1024),
        read_only=fields.flag("read_only"),
        slot=fields.whole("slot", 0, _MAX_SLOTS - 1),
    )
    fields.end()
    return mount


def _machine(fields: Fields) -> Machine:
    boot = fields.optional("kernel_boot")
    firmware = fields.texts("firmware", 16, 4096)
    for name, digest in firmware.items():
        if not _FIRMWARE.fullmatch(name) or not _SHA256.fullmatch(digest):
            raise invalid(f"{fields.where} has firmware {name[:64]!r}")
    machine = Machine(
        machine_type=fields.text("machine_type", 64, _MACHINE_TYPE),
        accelerator=fields.word("accelerator", ("kvm", "tcg")),
        cpu_model=fields.text("cpu_model", 64, _CPU_MODEL),
        qemu_version=fields.text("qemu_version", 16, _QEMU_VERSION),
        firmware={name: Sha256(digest) for name, digest in firmware.items()},
        mac=fields.text("mac", 17, _MAC),
        kernel_boot=None if boot is None else _kernel_boot(boot),
        volumes=fields.flag("volumes"),
        channel=fields.flag_or("channel", default=False),
        exec_port=fields.flag_or("exec_port", default=False),
        uplink=fields.flag_or("uplink", default=False),
        seed=fields.digest_if_there("seed"),
    )
    fields.end()
    return machine


def _kernel_boot(fields: Fields) -> KernelBoot:
    boot = KernelBoot(
        kernel=fields.digest("kernel"),
        initrd=fields.digest("initrd"),
        command_line=fields.text("command_line", 2048, _PRINTABLE),
    )
    fields.end()
    return boot


def _ram(fields: Fields) -> PackedRam:
    ram = PackedRam(
        state_sha256=fields.digest("state_sha256"),
        tracking=fields.word("tracking", ("written", "soft_dirty", "none")),
        pause_us=fields.whole("pause_us", 0, 1 << 40),
        cpu_features=tuple(fields.words("cpu_features", 2048, _FEATURE)),
    )
    fields.end()
    return ram


def _image(fields: Fields) -> PackedImage:
    boot = fields.optional("kernel_boot")
    image = PackedImage(
        name=fields.text("name", 255),
        origin=fields.text("origin", 255, _PRINTABLE),
        kernel_boot=None if boot is None else _kernel_boot(boot),
        cloud_init=fields.flag_or("cloud_init", default=False),
    )
    fields.end()
    return image


def _check_members(manifest: Manifest) -> None:
    """The members are just what the records need, each once, in the order of an export."""
    if not set(manifest.base_blobs) <= needed_blobs(manifest):
        raise invalid("it presumes files that its records do not need")
    expected = expected_members(manifest)
    found = [(each.kind, each.layer, each.sha256) for each in manifest.members]
    if found != expected:
        raise invalid("its members are not those that its records need")
    for member in manifest.members:
        if member.layer is not None and member.size != manifest.layers[member.layer].size:
            raise invalid(f"layer {member.layer} has two sizes")
        if member.kind is Kind.RAM:
            assert manifest.snapshot is not None
            if member.size != manifest.snapshot.memory * MIB:
                raise invalid("its RAM is not of the size that its record says")
    if manifest.image and (
        len(manifest.layers) != 1 or manifest.layers[0].base or manifest.base_blobs
    ):
        raise invalid("an image is one layer, and presumes nothing")
    if manifest.snapshot:
        _check_chains(manifest, manifest.snapshot)


def _check_chains(manifest: Manifest, snapshot: PackedSnapshot) -> None:
    """Every layer is some disk's; bases are at the bottom; tops are as large as their disks."""
    needed: set[int] = set()
    for disk in snapshot.disks:
        if manifest.layers[disk.layer].size != disk.size:
            raise invalid(f"disk {disk.index} and its layer are not of one size")
        at: int | None = disk.layer
        while at is not None:
            needed.add(at)
            layer = manifest.layers[at]
            at = layer.parent
            if layer.base and at is not None:
                raise invalid("it tells what lies below a layer that it does not hold")
    if len(needed) != len(manifest.layers):
        raise invalid("it has layers that no disk needs")
