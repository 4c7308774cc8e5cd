"""The use cases of images: build, import, delete.

An image's row is CREATING from the beginning, so that its name is taken; a daemon that was killed
removes it at its next start. Builders work in a folder of their own under ``work/``.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.images.artifact import BuiltImage, Progress
from stratabox.daemon.images.cache import cached
from stratabox.daemon.images.debian import build_debian
from stratabox.daemon.images.importer import import_disk
from stratabox.daemon.images.tiny import build_tiny
from stratabox.daemon.lifecycle import budget, policy
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.threads import in_thread, settle, undone_by
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import images, layers, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import DeniedError
from stratabox.storage.model.ids import ImageId, LayerId, mint
from stratabox.storage.model.records import Image, KernelBoot, Layer
from stratabox.storage.model.states import ImageState, LayerState
from stratabox.storage.qcow2 import qemu_img

log = logging.getLogger(__name__)

Builder = Callable[[Path], Awaitable[BuiltImage]]


@dataclass(frozen=True, kw_only=True)
class DeletedImage:
    """What came free."""

    id: ImageId
    freed_bytes: int


class Images:
    """Builds, imports and deletes images."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._busy: set[ImageId] = set()

    async def build_debian(
        self, name: str, *, release: str, include: Sequence[str], replace: bool, progress: Progress
    ) -> Image:
        """Build a Debian guest. Cancelled, it leaves nothing.

        :param progress: is told each step, and 0 to 1 where that is known.
        :raise AlreadyExistsError: IMAGE_ALREADY_EXISTS.
        :raise InvalidArgumentError: for a release or package that cannot be.
        :raise FailedError: IMAGE_BUILD_FAILED.
        :raise NoSpaceError: NO_SPACE.
        """
        release = release or "bookworm"

        async def build(work: Path) -> BuiltImage:
            return await cached(
                self._world.config.build_cache,
                work,
                recipe="debian",
                arguments={"release": release, "include": sorted(include)},
                build=lambda: build_debian(
                    work, release=release, include=include, progress=progress
                ),
                progress=progress,
            )

        return await self._make(name or "debian", f"debian {release}", build, replace=replace)

    async def build_tiny(self, name: str, *, replace: bool, progress: Progress) -> Image:
        """Build a guest of a few MB. Cancelled, it leaves nothing.

        :param progress: is told each step, and 0 to 1 where that is known.
        :raise AlreadyExistsError: IMAGE_ALREADY_EXISTS.
        :raise FailedError: IMAGE_BUILD_FAILED.
        :raise NoSpaceError: NO_SPACE.
        """

        async def build(work: Path) -> BuiltImage:
            return await cached(
                self._world.config.build_cache,
                work,
                recipe="tiny",
                arguments={},
                build=lambda: build_tiny(work, progress=progress),
                progress=progress,
            )

        return await self._make(name or "tiny", "tiny", build, replace=replace)

    async def import_file(
        self,
        name: str,
        declared: str,
        receive: Callable[[Path], Awaitable[None]],
        *,
        cloud_init: bool = False,
    ) -> Image:
        """Take a disk image that boots by itself.

        :param declared: "qcow2" or "raw": how to read it; never guessed.
        :param cloud_init: its guests set themselves up by a seed.
        :param receive: writes the file's bytes to the path that it is given.
        :raise AlreadyExistsError: IMAGE_ALREADY_EXISTS.
        :raise InvalidArgumentError: INVALID_IMAGE.
        :raise NoSpaceError: NO_SPACE.
        """

        async def build(work: Path) -> BuiltImage:
            source = work / "upload"
            await receive(source)
            built = await import_disk(
                source, declared, work, max_bytes=self._world.config.max_image_bytes
            )
            return dataclasses.replace(built, cloud_init=cloud_init)

        return await self._make(name, "import", build, replace=False)

    async def import_archive(self, name: str, builder: Builder) -> Image:
        """Take an image that comes as an archive.

        :param builder: receives it into the folder that it is given.
        :raise AlreadyExistsError: IMAGE_ALREADY_EXISTS.
        :raise InvalidArgumentError: INVALID_ARCHIVE.
        :raise NoSpaceError: NO_SPACE.
        """
        return await self._make(name, "import", builder, replace=False)

    @contextmanager
    def keeping_blobs(self) -> Iterator[None]:
        """Meanwhile no blob is removed: some are stored whose record is not written yet."""
        holder = ImageId(mint())
        self._busy.add(holder)
        try:
            yield
        finally:
            self._busy.discard(holder)

    async def delete(self, reference: str) -> DeletedImage:
        """Remove an image that nothing needs.

        :raise NotFoundError: IMAGE_NOT_FOUND.
        :raise DeniedError: IMAGE_IN_USE, naming what needs it; INVALID_STATE while it is made.
        """
        return await settle(self._world.tasks.spawn(self._delete(reference), "delete image"))

    async def discard(self, image: ImageId) -> None:
        """Undo the making of an image."""

        def write(tx: Transaction) -> Image | None:
            if tx.row("SELECT id FROM images WHERE id = ?", (image,)) is None:
                return None
            record = images.get(tx, image)
            images.delete(tx, image)
            return record

        record = await self._world.write(write)
        if record is not None:
            self._world.bus.publish(Happening.DELETED, record)
        await self._world.sweep()

    async def _make(self, name: str, origin: str, builder: Builder, *, replace: bool) -> Image:
        world = self._world
        policy.check_image_name(name)
        image = Image(
            id=ImageId(mint()),
            # While it is being made, the one that it replaces keeps the name.
            name=f"{name}-new-{mint()[:8]}" if replace else name,
            state=ImageState.CREATING,
            origin=origin,
            created_at=await world.read(lambda tx: tx.now),
        )

        def write(tx: Transaction) -> None:
            budget.check(tx, world.config, world.store.layout, "an image")
            images.insert(tx, image)

        await world.write(write)
        work = world.store.layout.work / image.id
        self._busy.add(image.id)
        try:
            hit("image.row-written")
            world.bus.publish(Happening.CREATED, image)
            try:
                await in_thread(work.mkdir, mode=0o700)
                built = await builder(work)
                hit("image.built")
                record, replaced = await settle(self._store(image.id, name, built))
            finally:
                # First of all: on a full disk the catalog can take nothing before this is gone.
                await in_thread(shutil.rmtree, work, ignore_errors=True)
        except BaseException:
            what = f"the undoing of image {image.id}"
            await settle(world.surely(lambda: self.discard(image.id), what))
            raise
        finally:
            self._busy.discard(image.id)
        if replaced is not None:
            await self._retire(replaced)
        return record

    async def _store(
        self, image: ImageId, name: str, built: BuiltImage
    ) -> tuple[Image, ImageId | None]:
        store = self._world.store

        def take() -> tuple[Layer, KernelBoot | None]:
            boot = None
            if built.kernel and built.initrd:
                boot = KernelBoot(
                    kernel=store.put_blob(built.kernel),
                    initrd=store.put_blob(built.initrd),
                    command_line=built.command_line,
                )
            size = qemu_img.virtual_size(built.disk)
            layer = store.adopt_image_layer(built.disk, LayerId(image))
            created = image_record.created_at
            return Layer(
                id=layer, parent=None, state=LayerState.SEALED, size=size,
                created_at=created, sealed_at=created, bytes=store.bytes_of([layer]),
            ), boot  # fmt: skip

        # Before a blob is stored: see World.sweep_blobs.
        image_record = await self._world.read(lambda tx: images.get(tx, image))
        layer, boot = await in_thread(take)

        def write(tx: Transaction) -> tuple[Image, ImageId | None]:
            replaced = _take_name(tx, name, image)
            layers.insert(tx, layer)
            ready = images.change(
                tx,
                image,
                name=name,
                state=ImageState.READY,
                layer=layer.id,
                size=layer.size,
                kernel_boot=boot,
                cloud_init=built.cloud_init,
            )
            return ready, replaced

        async with undone_by(lambda: in_thread(store.remove_overlays, [layer.id])):
            hit("image.files-stored")
            record, replaced = await self._world.write(write)
        hit("image.ready-written")
        self._world.bus.publish(Happening.UPDATED, record)
        return record, replaced

    async def _retire(self, image: ImageId) -> None:
        """Delete an image that lost its name, or leave it under its id while it is needed."""
        try:
            await self._delete(image)
        except DeniedError as error:
            log.info("the replaced image stays: %s", error.message)

    async def _delete(self, reference: str) -> DeletedImage:
        def write(tx: Transaction) -> Image:
            record = images.get(tx, images.resolve(tx, reference))
            if record.state is ImageState.CREATING:
                raise DeniedError(
                    f"image {record.name!r} is being made: cancel that instead", image=record.id
                )
            needed_by = sandboxes.users_of_image(tx, record.id)
            needed_by += snapshots.users_of_image(tx, record.id)
            if needed_by:
                raise DeniedError(
                    f"image {record.name!r} is needed by {len(needed_by)} sandboxes or snapshots:"
                    f" {', '.join(needed_by[:5])}{', ...' if len(needed_by) > 5 else ''};"
                    " delete those first",
                    reason="IMAGE_IN_USE",
                    image=record.id,
                    needed_by=",".join(needed_by[:20]),
                )
            images.delete(tx, record.id)
            return record

        record = await self._world.write(write)
        hit("delete-image.row-written")
        freed = await self._world.sweep()
        if not self._busy:
            await self._world.sweep_blobs(self._busy)
        self._world.bus.publish(Happening.DELETED, record)
        return DeletedImage(id=record.id, freed_bytes=freed)


def _take_name(tx: Transaction, name: str, image: ImageId) -> ImageId | None:
    """Make the name free for `image`; returns the image that had it."""
    row = tx.row("SELECT id FROM images WHERE name = ? AND id != ?", (name, image))
    if row is None:
        return None
    replaced = ImageId(row["id"])
    images.change(tx, replaced, name=f"{name}-{replaced[:8]}")
    return replaced
