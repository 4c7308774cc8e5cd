"""ImagesService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api import messages
from stratabox.daemon.api.errors import streaming, unary
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.images import Images
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import images, lookup
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import InvalidArgumentError, NoSpaceError
from stratabox.storage.model.records import Image
from stratabox.v1 import images_pb2, images_pb2_grpc, records_pb2

Context = ServicerContext[Any, Any]

_FORMATS = {images_pb2.DISK_FORMAT_QCOW2: "qcow2", images_pb2.DISK_FORMAT_RAW: "raw"}


@dataclass(frozen=True, kw_only=True)
class ImagesServicer(images_pb2_grpc.ImagesServiceServicer):
    """Message in, one call, message out."""

    world: World
    images: Images

    @streaming
    async def BuildImage(
        self, request: images_pb2.BuildImageRequest, context: Context
    ) -> AsyncIterator[images_pb2.BuildImageResponse]:
        """Build an image, telling each step."""
        steps: asyncio.Queue[images_pb2.BuildProgress | None] = asyncio.Queue()

        def progress(step: str, fraction: float | None) -> None:
            steps.put_nowait(images_pb2.BuildProgress(step=step, fraction=fraction))

        match request.WhichOneof("recipe"):
            case "debian":
                building = self.images.build_debian(
                    request.name,
                    release=request.debian.release,
                    include=tuple(request.debian.include),
                    replace=request.replace,
                    progress=progress,
                )
            case "tiny":
                building = self.images.build_tiny(
                    request.name, replace=request.replace, progress=progress
                )
            case _:
                raise InvalidArgumentError("no recipe is named: debian or tiny", field="recipe")
        task = self.world.tasks.spawn(building, "build image")
        task.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (step := await steps.get()) is not None:
                yield images_pb2.BuildImageResponse(progress=step)
            yield images_pb2.BuildImageResponse(image=await self._message(await task))
        finally:
            if not task.done():
                # The caller has gone: nobody wants the image any more.
                task.cancel()
                await asyncio.wait({task})

    @unary
    async def ImportImage(
        self, request_iterator: AsyncIterator[images_pb2.ImportImageRequest], context: Context
    ) -> records_pb2.Image:
        """Take an uploaded disk image."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgumentError("the first message must be the header", field="header")
        header = first.header
        if header.format not in _FORMATS:
            raise InvalidArgumentError("format must be named: qcow2 or raw", field="format")
        limit = self.world.config.max_image_bytes

        async def receive(path: Path) -> None:
            size = 0
            with path.open("xb") as file:
                async for message in request_iterator:
                    if message.WhichOneof("part") != "data":
                        raise InvalidArgumentError("one header only", field="header")
                    size += len(message.data)
                    if size > limit:
                        raise NoSpaceError(
                            f"the image has more than {limit} bytes (max_image_bytes)",
                            reason="IMAGE_TOO_LARGE",
                        )
                    await in_thread(file.write, message.data)

        record = await self.images.import_file(
            header.name, _FORMATS[header.format], receive, cloud_init=header.cloud_init
        )
        return await self._message(record)

    @unary
    async def GetImage(
        self, request: images_pb2.GetImageRequest, context: Context
    ) -> records_pb2.Image:
        """Return one image."""
        record = await self.world.read(lambda tx: images.get(tx, images.resolve(tx, request.image)))
        return await self._message(record)

    @unary
    async def ListImages(
        self, request: images_pb2.ListImagesRequest, context: Context
    ) -> images_pb2.ListImagesResponse:
        """List images, newest first."""
        page = lookup.Page(size=request.page_size, token=request.page_token)

        def look(tx: Transaction) -> tuple[list[records_pb2.Image], str]:
            records, token = images.list_page(tx, page)
            return messages.of_images(tx, self.world, records), token

        found, token = await self.world.read(look)
        return images_pb2.ListImagesResponse(images=found, next_page_token=token)

    @unary
    async def DeleteImage(
        self, request: images_pb2.DeleteImageRequest, context: Context
    ) -> images_pb2.DeleteImageResponse:
        """Remove an image that nothing needs."""
        done = await self.images.delete(request.image)
        return images_pb2.DeleteImageResponse(id=done.id, freed_bytes=done.freed_bytes)

    async def _message(self, record: Image) -> records_pb2.Image:
        return (await self.world.read(lambda tx: messages.of_images(tx, self.world, [record])))[0]
