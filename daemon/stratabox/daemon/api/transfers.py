"""TransfersService."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api import convert, messages
from stratabox.daemon.api.errors import streaming, unary
from stratabox.daemon.lifecycle.transfers.exports import Exports, Piece, Resume
from stratabox.daemon.lifecycle.transfers.imports import Imports
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.v1 import records_pb2, transfers_pb2, transfers_pb2_grpc

Context = ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class TransfersServicer(transfers_pb2_grpc.TransfersServiceServicer):
    """Message in, one call, message out."""

    world: World
    exports: Exports
    imports: Imports

    @streaming
    async def ExportSnapshot(
        self, request: transfers_pb2.ExportSnapshotRequest, context: Context
    ) -> AsyncIterator[transfers_pb2.ExportResponse]:
        """Stream an archive of a snapshot."""
        pieces = self.exports.snapshot(
            request.snapshot,
            since=request.since,
            memory=request.memory,
            env=request.env,
            resume=_resume(request),
        )
        async with aclosing(pieces):
            async for piece in pieces:
                yield _response(piece)

    @streaming
    async def ExportImage(
        self, request: transfers_pb2.ExportImageRequest, context: Context
    ) -> AsyncIterator[transfers_pb2.ExportResponse]:
        """Stream an archive of an image."""
        pieces = self.exports.image(request.image, resume=_resume(request))
        async with aclosing(pieces):
            async for piece in pieces:
                yield _response(piece)

    @unary
    async def ImportSnapshot(
        self,
        request_iterator: AsyncIterator[transfers_pb2.ImportSnapshotRequest],
        context: Context,
    ) -> transfers_pb2.ImportSnapshotResponse:
        """Take an uploaded snapshot."""
        header = (await _first(request_iterator)).header
        done = await self.imports.snapshot(
            _data(request_iterator), name=header.name, trust=header.trust
        )
        (message,) = await self.world.read(
            lambda tx: messages.of_snapshots(tx, self.world, [done.snapshot])
        )
        left_out = None
        if done.left_out is not None:
            left_out = convert.failure(done.left_out)
        return transfers_pb2.ImportSnapshotResponse(snapshot=message, left_out=left_out)

    @unary
    async def ImportImageArchive(
        self,
        request_iterator: AsyncIterator[transfers_pb2.ImportImageArchiveRequest],
        context: Context,
    ) -> records_pb2.Image:
        """Take an uploaded image."""
        header = (await _first(request_iterator)).header
        record = await self.imports.image(_data(request_iterator), name=header.name)
        (message,) = await self.world.read(lambda tx: messages.of_images(tx, self.world, [record]))
        return message


async def _first(requests: AsyncIterator[Any]) -> Any:
    first = await anext(requests, None)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidArgumentError("the first message must be the header", field="header")
    return first


async def _data(requests: AsyncIterator[Any]) -> AsyncGenerator[bytes, None]:
    async for message in requests:
        if message.WhichOneof("part") != "data":
            raise InvalidArgumentError("one header only", field="header")
        yield message.data


def _resume(
    request: transfers_pb2.ExportSnapshotRequest | transfers_pb2.ExportImageRequest,
) -> Resume | None:
    if not request.HasField("resume"):
        return None
    resume = request.resume
    return Resume(manifest=resume.manifest_sha256, member=resume.member, block=resume.block)


def _response(piece: Piece) -> transfers_pb2.ExportResponse:
    return transfers_pb2.ExportResponse(
        data=piece.data, done_bytes=piece.done, total_bytes=piece.total
    )
