"""Imports: an archive that comes in is judged, received aside, and made part of the store at once.

```
 manifest   parsed, judged: policy, sizes, budget, room; its bases are looked for
 row        an operation names all files to be: what a killed daemon leaves is known by it
 members    received into work/ID, verified block by block, into fresh files of ours
 trailer    and nothing behind it
 files      blobs, layers (from below), memory: moved in, durable; qemu-img looks at the layers
 record     one transaction: layers, memory, the snapshot READY, the operation over
```

Nothing of the archive is ever opened by another program: what it says of disks and RAM are states
and bytes, which go into files whose every table is made here. Before the last step nobody sees
anything of it, and whatever fails leaves nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.images.artifact import BuiltImage
from stratabox.daemon.lifecycle import budget
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.threads import in_thread, settle, undone_by
from stratabox.daemon.lifecycle.images import Images
from stratabox.daemon.lifecycle.transfers import portable
from stratabox.daemon.lifecycle.transfers.arriving import (
    Arriving,
    find_again,
    image_of,
    operation_of,
    snapshot_below,
)
from stratabox.daemon.lifecycle.transfers.contents import find, missing_base
from stratabox.daemon.lifecycle.transfers.feed import Feed
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import contents, layers, operations, rams, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Operation
from stratabox.storage.failpoints import hit
from stratabox.storage.files import durable
from stratabox.storage.files.transfer.archive import Block
from stratabox.storage.files.transfer.manifest import (
    Kind,
    Manifest,
    Member,
    needed_blobs,
)
from stratabox.storage.files.transfer.parsing import read_manifest, read_member, read_trailer
from stratabox.storage.files.transfer.targets import (
    DiskTarget,
    FileTarget,
    Nowhere,
    RamTarget,
    Target,
)
from stratabox.storage.model.errors import (
    CorruptError,
    DeniedError,
    NoSpaceError,
)
from stratabox.storage.model.ids import LayerId, Sha256, SnapshotId, mint
from stratabox.storage.model.records import Image, Layer, SavedRam, Snapshot
from stratabox.storage.model.states import LayerState
from stratabox.storage.qcow2 import qemu_img

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A snapshot that came in."""

    snapshot: Snapshot
    left_out: DeniedError | None = None
    """Why its memory was not taken, where it has some. TRUST_REQUIRED."""


class Imports:
    """Takes archives in."""

    def __init__(self, world: World, images: Images) -> None:
        self._world = world
        self._images = images

    async def snapshot(self, pieces: AsyncIterator[bytes], *, name: str, trust: bool) -> Imported:
        """Take a snapshot. Cancelled, it leaves nothing.

        :param name: what it is called here; "": as it was.
        :param trust: take its memory, too, which nothing can judge: who made the archive could
            have put anything in it.
        :raise InvalidArgumentError: INVALID_ARCHIVE, naming the place; INVALID_ARGUMENT.
        :raise DeniedError: MISSING_BASE, when it stands on layers that are not here.
        :raise ConflictError: INTERRUPTED, when what it stands on went while it came.
        :raise NoSpaceError: NO_SPACE, BUDGET_EXCEEDED, STORE_NEARLY_FULL.
        """
        feed = Feed(pieces)
        with self._images.keeping_blobs():
            return await self._snapshot(feed, name, trust=trust)

    async def _snapshot(self, feed: Feed, name: str, *, trust: bool) -> Imported:
        manifest, digest = await feed.run(read_manifest())
        packed = portable.check_snapshot(manifest, name, self._world.config.max_image_bytes)
        memory = trust and packed.ram is not None
        snapshot = SnapshotId(mint())
        arriving = Arriving(
            manifest=manifest,
            packed=packed,
            memory=memory,
            work=self._world.store.layout.work / snapshot,
            id=snapshot,
            ids=await self._bases(manifest),
            names=[layer.base for layer in manifest.layers],
        )
        operation = operation_of(arriving)
        async with undone_by(lambda: self._give_up(arriving, operation)):
            await self._write_down(arriving, operation)
            hit("import.row-written")
            await in_thread(arriving.work.mkdir, mode=0o700)
            await self._receive(feed, arriving, digest)
            hit("import.received")
            record = await settle(self._store(arriving, operation, name))
            await in_thread(shutil.rmtree, arriving.work, ignore_errors=True)
        self._world.bus.publish(Happening.CREATED, record)
        self._world.chains_changed.set()  # what came may be longer than chains are to be here
        left_out = None
        if packed.ram is not None and not memory:
            left_out = DeniedError(
                "its memory was left out, as it was not said that the archive can be trusted:"
                " its disks are as after a power cut. Import it with trust to go on from memory",
                reason="TRUST_REQUIRED",
                snapshot=record.id,
            )
        return Imported(snapshot=record, left_out=left_out)

    async def image(self, pieces: AsyncIterator[bytes], *, name: str) -> Image:
        """Take an image. Cancelled, it leaves nothing.

        :param name: what it is called here; "": as it was.
        :raise InvalidArgumentError: INVALID_ARCHIVE, naming the place; INVALID_ARGUMENT.
        :raise AlreadyExistsError: IMAGE_ALREADY_EXISTS.
        :raise NoSpaceError: NO_SPACE, BUDGET_EXCEEDED, STORE_NEARLY_FULL.
        """
        feed = Feed(pieces)
        manifest, digest = await feed.run(read_manifest())
        packed = portable.check_image(manifest, self._world.config.max_image_bytes)
        boot = packed.kernel_boot
        await self._world.read(lambda tx: self._check_room(tx, manifest, memory=False))
        held: list[Sha256] = []

        async def receive(work: Path) -> BuiltImage:
            ends: list[Block] = []
            for at, member in enumerate(manifest.members):
                async with _open(_image_target(member, work)) as target:
                    ends.append(await feed.run(read_member(at, member, target)))
            await feed.run(read_trailer(digest, ends))
            await feed.end()
            held.append(Sha256(ends[0].sum.hex()))
            return BuiltImage(
                disk=work / "disk.qcow2",
                kernel=work / boot.kernel if boot else None,
                initrd=work / boot.initrd if boot else None,
                command_line=boot.command_line if boot else "",
                origin="import",
                cloud_init=packed.cloud_init,
            )

        record = await self._images.import_archive(name or packed.name, receive)
        await self._world.write(lambda tx: _note(tx, record.layer, held[0]))
        return record

    # Before anything is written

    async def _bases(self, manifest: Manifest) -> list[LayerId]:
        """Ids for all layers: of those that must be here, and new ones.

        :raise DeniedError: MISSING_BASE, also for kernel, initrd or firmware.
        """
        for blob in manifest.base_blobs:
            if not self._world.store.layout.blob(blob).exists():
                raise missing_base(f"file {blob}")
        ids = []
        for layer in manifest.layers:
            if layer.base is None:
                ids.append(LayerId(mint()))
                continue
            found = await find(self._world, layer.base, layer.size, bottom=True)
            if found is None:
                raise missing_base(f"layer that reads as {layer.base}")
            ids.append(found)
        return ids

    def _check_room(self, tx: Transaction, manifest: Manifest, *, memory: bool) -> None:
        """:raise NoSpaceError: NO_SPACE, BUDGET_EXCEEDED, STORE_NEARLY_FULL."""
        layout = self._world.store.layout
        wanted = portable.bytes_to_take(manifest, memory=memory)
        budget.check(tx, self._world.config, layout, "an import", wanted)
        free = shutil.disk_usage(layout.work).free
        if free < wanted:
            raise NoSpaceError(
                f"the archive declares {wanted} bytes, and {free} are free on the host's disk",
                wanted=wanted,
                free=free,
            )

    async def _write_down(self, arriving: Arriving, operation: Operation) -> None:
        def write(tx: Transaction) -> None:
            self._check_room(tx, arriving.manifest, memory=arriving.memory)
            operations.begin(tx, operation)
            # The layers come before any record does: a catalog that knows of no record at all
            # would pass for one that was lost.
            tx.next_generation()

        await self._world.write(write)

    # The archive's members

    async def _receive(self, feed: Feed, arriving: Arriving, digest: bytes) -> None:
        ends: list[Block] = []
        for at, member in enumerate(arriving.manifest.members):
            async with _open(self._target(arriving, member)) as target:
                end = await feed.run(read_member(at, member, target))
            ends.append(end)
            if isinstance(target, RamTarget) and target.file is not None:
                arriving.own_bytes = target.file.own_bytes
            if member.layer is not None:
                await self._settle_layer(arriving, member.layer, Sha256(end.sum.hex()))
        await feed.run(read_trailer(digest, ends))
        await feed.end()

    def _target(self, arriving: Arriving, member: Member) -> Callable[[], Target]:
        match member.kind:
            case Kind.LAYER:
                assert member.layer is not None
                path, parent = arriving.layer_file(member.layer), arriving.parent(member.layer)
                arriving.backing[member.layer] = parent
                name = self._world.store.layout.layer_name(parent) if parent else None
                return lambda: DiskTarget(path, member.size, name)
            case Kind.BLOB:
                assert member.sha256 is not None
                path = arriving.work / member.sha256
                arriving.blobs.append(path)
                return lambda: FileTarget(path, member)
            case _ if not arriving.memory:
                return Nowhere
            case Kind.STATE:
                return lambda: FileTarget(arriving.state_file, member)
            case Kind.RAM:
                return lambda: RamTarget(arriving.ram_file, id=arriving.id, ram_bytes=member.size)

    async def _settle_layer(self, arriving: Arriving, place: int, digest: Sha256) -> None:
        """Take the layer that is here already, where one reads as the same."""
        layer = arriving.manifest.layers[place]
        name = contents.name_of(digest, arriving.name_below(place))
        arriving.names[place] = name
        found = await find(self._world, name, layer.size, bottom=layer.parent is None)
        if found is None:
            arriving.fresh[place] = digest
            return
        await in_thread(arriving.layer_file(place).unlink)
        arriving.ids[place] = found

    # The store

    async def _store(self, arriving: Arriving, operation: Operation, name: str) -> Snapshot:
        world = self._world
        sizes = await in_thread(self._move_in, arriving)
        ram = None
        if arriving.memory and arriving.packed.ram:
            ram = portable.unpack_ram(
                arriving.packed.ram,
                own_bytes=arriving.own_bytes,
                taken=world.store.ram_bytes([arriving.id]),
            )
        hit("import.files-stored")
        record = await world.write(
            lambda tx: self._write_record(tx, arriving, operation, name, ram, sizes)
        )
        hit("import.ready-written")
        return record

    def _move_in(self, arriving: Arriving) -> dict[int, int]:
        """Make all files part of the store, durably; returns bytes of the layers by place.

        :raise CorruptError: LAYER_CORRUPT, when qemu-img finds fault with what was written.
        """
        store = self._world.store
        for blob in arriving.blobs:
            store.put_blob(blob)
        sizes = {}
        for place in sorted(arriving.fresh):
            target = store.layout.layer(arriving.ids[place])
            arriving.layer_file(place).rename(target)
            if not qemu_img.check(target).clean:
                raise CorruptError(
                    f"layer {arriving.ids[place]} was written wrong", reason="LAYER_CORRUPT"
                )
            sizes[place] = durable.allocated_bytes(target)
        durable.sync_folder(store.layout.layers)
        if arriving.memory:
            arriving.state_file.chmod(0o400)
            arriving.state_file.rename(store.layout.state_file(arriving.id))
            arriving.ram_file.rename(store.layout.ram_file(arriving.id))
            durable.sync_folder(store.layout.ram)
        return sizes

    def _write_record(
        self,
        tx: Transaction,
        arriving: Arriving,
        operation: Operation,
        name: str,
        ram: SavedRam | None,
        sizes: dict[int, int],
    ) -> Snapshot:
        find_again(tx, arriving)
        for blob in needed_blobs(arriving.manifest):
            if not self._world.store.layout.blob(blob).exists():
                raise missing_base(f"file {blob}")
        for place, digest in sorted(arriving.fresh.items()):
            parent = arriving.parent(place)
            layers.insert(
                tx,
                Layer(
                    id=arriving.ids[place],
                    parent=parent,
                    state=LayerState.SEALED,
                    size=arriving.manifest.layers[place].size,
                    created_at=tx.now,
                    sealed_at=tx.now,
                    backing=arriving.backing[place],
                    bytes=sizes[place],
                    content=digest,
                    reads_as=arriving.names[place],
                ),
            )
        qemu = self._world.qemu
        root = arriving.packed.disks[0].layer
        record = portable.unpack_snapshot(
            arriving.packed,
            arriving.id,
            arriving.ids,
            workspace=tx.home,
            name=name,
            image=image_of(tx, arriving.ids[root]),
            ram=ram,
            machine_types=qemu.machine_types,
            machine_type=qemu.machine_type,
            now=tx.now,
            layer_bytes=sum(sizes.get(disk.layer, 0) for disk in arriving.packed.disks),
            parent=snapshot_below(tx, arriving.parent(root)),
        )
        record = snapshots.insert(tx, record)
        if ram is not None:
            rams.insert(tx, record.id, ram)
        operations.end(tx, operation.id)
        return record

    async def _give_up(self, arriving: Arriving, operation: Operation) -> None:
        """Leave nothing of it, not even where it was READY before its caller had gone."""
        world = self._world

        def take_back(tx: Transaction) -> bool:
            if any(each.id == operation.id for each in operations.unfinished(tx)):
                return False
            snapshots.delete(tx, arriving.id)
            return True

        def remove() -> None:
            world.store.remove_overlays(operation.payload["layers"])
            world.store.remove_ram(arriving.id)

        # The files first: on a full disk the catalog can take nothing before they are gone.
        await in_thread(shutil.rmtree, arriving.work, ignore_errors=True)
        if await world.write(take_back):
            await world.sweep()
            return
        await in_thread(remove)
        await world.write(lambda tx: operations.end(tx, operation.id))


@asynccontextmanager
async def _open(make: Callable[[], Target]) -> AsyncIterator[Target]:
    """A target that is opened, and closed or removed, in a thread."""
    target = await in_thread(make)
    try:
        yield target
    finally:
        await in_thread(target.__exit__, None, None, None)


def _image_target(member: Member, work: Path) -> Callable[[], Target]:
    """Where a member of an image goes."""
    if member.sha256 is None:
        return lambda: DiskTarget(work / "disk.qcow2", member.size, None)
    path = work / member.sha256
    return lambda: FileTarget(path, member)


def _note(tx: Transaction, layer: LayerId | None, digest: Sha256) -> None:
    if layer is not None:
        contents.note(tx, layer, digest, below=None)
