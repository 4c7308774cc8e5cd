"""FilesService."""

from __future__ import annotations

import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from grpc.aio import ServicerContext

from stratabox.daemon.api.errors import streaming, unary
from stratabox.daemon.lifecycle.inside.file_records import FileInfo, Packed, WriteMode
from stratabox.daemon.lifecycle.inside.file_watch import Change, Method, Watches
from stratabox.daemon.lifecycle.inside.files import Files
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.v1 import files_pb2, files_pb2_grpc

Context = ServicerContext[Any, Any]

_WRITE_MODES = {
    files_pb2.WRITE_MODE_UNSPECIFIED: WriteMode.REPLACE,
    files_pb2.WRITE_MODE_REPLACE: WriteMode.REPLACE,
    files_pb2.WRITE_MODE_CREATE: WriteMode.CREATE,
    files_pb2.WRITE_MODE_TRUNCATE: WriteMode.TRUNCATE,
    files_pb2.WRITE_MODE_APPEND: WriteMode.APPEND,
}
_KINDS = {
    stat.S_IFREG: files_pb2.FILE_KIND_REGULAR,
    stat.S_IFDIR: files_pb2.FILE_KIND_DIRECTORY,
    stat.S_IFLNK: files_pb2.FILE_KIND_SYMLINK,
}


@dataclass(frozen=True, kw_only=True)
class FilesServicer(files_pb2_grpc.FilesServiceServicer):
    """Message in, one call, message out."""

    files: Files
    watches: Watches

    @streaming
    async def ReadFile(
        self, request: files_pb2.ReadFileRequest, context: Context
    ) -> AsyncIterator[files_pb2.ReadFileResponse]:
        """Stream a file's content."""
        length = request.length if request.HasField("length") else None
        pieces = self.files.read(
            request.sandbox, request.path, user=request.user, offset=request.offset, length=length
        )
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, bytes):
                    yield files_pb2.ReadFileResponse(data=piece)
                else:
                    yield files_pb2.ReadFileResponse(info=_info(piece))

    @unary
    async def WriteFile(
        self, request_iterator: AsyncIterator[files_pb2.WriteFileRequest], context: Context
    ) -> files_pb2.FileInfo:
        """Write a file."""
        header = await _header(request_iterator)
        how = _WRITE_MODES.get(header.write_mode)
        if how is None:
            raise InvalidArgumentError(
                f"there is no write mode {header.write_mode}", field="write_mode"
            )
        modified = header.modified_at.seconds if header.HasField("modified_at") else None
        return _info(
            await self.files.write(
                header.sandbox,
                header.path,
                _to_the_end(request_iterator),
                user=header.user,
                how=how,
                mode=header.mode if header.HasField("mode") else None,
                modified=modified,
                parents=header.parents,
            )
        )

    @unary
    async def StatFile(
        self, request: files_pb2.StatFileRequest, context: Context
    ) -> files_pb2.FileInfo:
        """Tell of one file."""
        return _info(
            await self.files.stat(
                request.sandbox, request.path, user=request.user, follow=request.follow
            )
        )

    @streaming
    async def ListFiles(
        self, request: files_pb2.ListFilesRequest, context: Context
    ) -> AsyncIterator[files_pb2.ListFilesResponse]:
        """List a directory."""
        pages = self.files.list(request.sandbox, request.path, user=request.user)
        async with aclosing(pages):
            async for page in pages:
                yield files_pb2.ListFilesResponse(files=map(_info, page))

    @unary
    async def MakeDirectory(
        self, request: files_pb2.MakeDirectoryRequest, context: Context
    ) -> files_pb2.FileInfo:
        """Make a directory."""
        return _info(
            await self.files.make_directory(
                request.sandbox,
                request.path,
                user=request.user,
                parents=request.parents,
                mode=request.mode if request.HasField("mode") else None,
            )
        )

    @unary
    async def RemoveFile(
        self, request: files_pb2.RemoveFileRequest, context: Context
    ) -> files_pb2.RemoveFileResponse:
        """Remove a file or a directory."""
        await self.files.remove(
            request.sandbox, request.path, user=request.user, recursive=request.recursive
        )
        return files_pb2.RemoveFileResponse()

    @unary
    async def MoveFile(
        self, request: files_pb2.MoveFileRequest, context: Context
    ) -> files_pb2.FileInfo:
        """Give a file another path."""
        return _info(
            await self.files.move(
                request.sandbox,
                request.source,
                request.target,
                user=request.user,
                keep=request.keep,
            )
        )

    @unary
    async def ChangeFile(
        self, request: files_pb2.ChangeFileRequest, context: Context
    ) -> files_pb2.FileInfo:
        """Change mode or owner."""
        return _info(
            await self.files.change(
                request.sandbox,
                request.path,
                user=request.user,
                mode=request.mode if request.HasField("mode") else None,
                owner=request.owner,
                group=request.group,
                recursive=request.recursive,
            )
        )

    @unary
    async def MakeSymlink(
        self, request: files_pb2.MakeSymlinkRequest, context: Context
    ) -> files_pb2.FileInfo:
        """Make a symbolic link."""
        return _info(
            await self.files.make_symlink(
                request.sandbox, request.path, request.target, user=request.user
            )
        )

    @unary
    async def ReadLink(
        self, request: files_pb2.ReadLinkRequest, context: Context
    ) -> files_pb2.ReadLinkResponse:
        """Tell where a symbolic link leads to."""
        target = await self.files.read_link(request.sandbox, request.path, user=request.user)
        return files_pb2.ReadLinkResponse(target=target)

    @streaming
    async def ReadArchive(
        self, request: files_pb2.ReadArchiveRequest, context: Context
    ) -> AsyncIterator[files_pb2.ReadArchiveResponse]:
        """Stream a directory as a tar."""
        pieces = self.files.pack(request.sandbox, request.path, user=request.user)
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Packed):
                    result = files_pb2.ReadArchiveResult(
                        warnings=piece.warnings, incomplete=piece.incomplete
                    )
                    yield files_pb2.ReadArchiveResponse(result=result)
                else:
                    yield files_pb2.ReadArchiveResponse(data=piece)

    @unary
    async def WriteArchive(
        self, request_iterator: AsyncIterator[files_pb2.WriteArchiveRequest], context: Context
    ) -> files_pb2.WriteArchiveResponse:
        """Unpack a tar in a directory."""
        header = await _header(request_iterator)
        warnings = await self.files.unpack(
            header.sandbox, header.path, _data(request_iterator), user=header.user
        )
        return files_pb2.WriteArchiveResponse(warnings=warnings)

    @streaming
    async def WatchFiles(
        self, request: files_pb2.WatchFilesRequest, context: Context
    ) -> AsyncIterator[files_pb2.WatchFilesResponse]:
        """Tell of changes."""
        told = self.watches.follow(
            request.sandbox, request.path, user=request.user, recursive=request.recursive
        )
        async with aclosing(told):
            async for one in told:
                if isinstance(one, Method):
                    number = files_pb2.WatchMethod.Value(f"WATCH_METHOD_{one.name}")
                    yield files_pb2.WatchFilesResponse(method=number)
                else:
                    yield files_pb2.WatchFilesResponse(change=_change(one))


async def _header(requests: AsyncIterator[Any]) -> Any:
    first = await anext(requests, None)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidArgumentError("the first message must be the header", field="header")
    return first.header


async def _data(requests: AsyncIterator[Any]) -> AsyncGenerator[bytes, None]:
    async for message in requests:
        if message.WhichOneof("part") != "data":
            raise InvalidArgumentError("one header only", field="header")
        yield message.data


async def _to_the_end(requests: AsyncIterator[Any]) -> AsyncGenerator[bytes, None]:
    """The bytes up to the message that says that there are no more.

    A caller who goes away can look like one whose stream is over.
    """
    async for message in requests:
        part = message.WhichOneof("part")
        if part == "end":
            return
        if part != "data":
            raise InvalidArgumentError("one header only", field="header")
        yield message.data
    raise InvalidArgumentError("the stream was broken off: its end is missing", field="end")


def _info(record: FileInfo) -> files_pb2.FileInfo:
    return files_pb2.FileInfo(
        path=record.path,
        kind=_KINDS.get(stat.S_IFMT(record.mode), files_pb2.FILE_KIND_OTHER),
        size=record.size,
        mode=stat.S_IMODE(record.mode),
        uid=record.uid,
        gid=record.gid,
        modified_at=Timestamp(seconds=record.modified),
    )


def _change(change: Change) -> files_pb2.FileChange:
    return files_pb2.FileChange(
        type=files_pb2.FileChangeType.Value(f"FILE_CHANGE_TYPE_{change.type.name}"),
        path=change.path,
        old_path=change.old_path,
        directory=change.directory,
    )
