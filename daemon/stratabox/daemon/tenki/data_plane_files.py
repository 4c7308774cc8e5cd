"""Files of a session's guest, as Tenki's data plane names them.

They are read and written as the guest's root, and what is new belongs to the user that commands run
as: so each can go on with what the other has made.
"""

from __future__ import annotations

import stat
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from stratabox.daemon.lifecycle.inside.accounts import Accounts
from stratabox.daemon.lifecycle.inside.file_records import FileInfo, New, WriteMode
from stratabox.daemon.lifecycle.inside.files import Files
from stratabox.daemon.tenki.guest_paths import HOME, absolute, path_from
from stratabox.storage.model.errors import (
    ForbiddenError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    StrataboxError,
)
from stratabox.tenki.v1 import data_plane_pb2 as pb

WHOLE_BYTES = 60 << 20
"""Of a file that is sent in one message: what the largest message holds, and room."""
_CHUNK, _LARGEST_CHUNK = 1 << 20, 2 << 20
_ENTRIES = 200_000
_MODE = 0o7777
_SECOND = 1_000_000_000
_FIRST_NS, _LAST_NS = -(1 << 63), (1 << 63) - 1
_MOST = (1 << 63) - 1

_SAID = {
    "FILE_EXISTS": "file exists",
    "NOT_A_DIRECTORY": "not a directory",
    "IS_A_DIRECTORY": "is a directory",
    "DIRECTORY_NOT_EMPTY": "directory not empty",
    "READ_ONLY_FILE_SYSTEM": "read-only file system",
}
"""Of errors that keep their class: what the C library says."""


@dataclass(frozen=True, kw_only=True)
class SessionFiles:
    """The file calls. All raise as `Files`, with Tenki's texts."""

    files: Files
    accounts: Accounts

    async def read(self, request: pb.ReadFileRequest) -> pb.ReadFileResponse:
        """A whole file.

        :raise InvalidArgumentError: when it is larger than `WHOLE_BYTES`.
        """
        content = bytearray()
        with _told("open", request.path):
            async with aclosing(self._reading(request.session_id, request.path, 0, 0)) as pieces:
                async for piece in pieces:
                    size = piece.size if isinstance(piece, FileInfo) else len(content) + len(piece)
                    if size > WHOLE_BYTES:
                        raise InvalidArgumentError(
                            f"the file is larger than {WHOLE_BYTES} bytes: read it as a stream",
                            field="path",
                        )
                    if isinstance(piece, bytes):
                        content += piece
        return pb.ReadFileResponse(path=absolute(request.path), content=bytes(content))

    async def read_stream(
        self, request: pb.ReadFileStreamRequest
    ) -> AsyncGenerator[pb.ReadFileStreamResponse, None]:
        """Part of a file, in pieces of the size that was asked for; the last says so."""
        if request.offset < 0 or request.length < 0:
            raise InvalidArgumentError("offset and length cannot be negative", field="offset")
        chunk = min(request.chunk_bytes or _CHUNK, _LARGEST_CHUNK)
        total, held = 0, bytearray()
        reading = self._reading(request.session_id, request.path, request.offset, request.length)
        with _told("open", request.path):
            async with aclosing(reading) as pieces:
                async for piece in pieces:
                    if isinstance(piece, FileInfo):
                        total = min(piece.size, _MOST)
                        continue
                    held += piece
                    while len(held) >= chunk:
                        yield pb.ReadFileStreamResponse(data=bytes(held[:chunk]), total_size=total)
                        del held[:chunk]
        yield pb.ReadFileStreamResponse(data=bytes(held), eof=True, total_size=total)

    async def write(self, start: pb.WriteFileStreamStart, pieces: AsyncIterator[bytes]) -> FileInfo:
        """Write a file: a new one gets the mode, another keeps its own.

        Where it is truncated it is there whole or not at all; else it is written in place, from
        its beginning on. When `pieces` raises, as `Files.write`.
        """
        with _told("open", start.path):
            path = path_from(start.path)
            owner = await self.accounts.ensure(start.session_id)
            return await self.files.write(
                start.session_id,
                path,
                pieces,
                user="",
                how=WriteMode.REPLACE if start.truncate else WriteMode.OVERWRITE,
                mode=None,
                modified=None,
                parents=False,
                new=New(owner=str(owner), mode=(start.mode & _MODE) or None),
                sync=start.sync,
            )

    async def stat(self, request: pb.StatRequest) -> pb.StatResponse:
        """What a file is. Of a link: what it leads to; of one that leads nowhere, its own."""
        session, path = request.session_id, path_from(request.path)
        if path == HOME.encode():
            await self.accounts.ensure(session)
        with _told("stat", request.path):
            try:
                info = await self.files.stat(session, path, user="", follow=False)
                link = stat.S_ISLNK(info.mode)
                target = b""
                if link:
                    target = await self.files.read_link(session, path, user="")
                    info = await self._followed(session, path) or info
            except NotFoundError as error:
                if error.reason != "FILE_NOT_FOUND":
                    raise
                return pb.StatResponse(exists=False)
        return pb.StatResponse(
            exists=True,
            size=min(info.size, _MOST),
            mode=info.mode & _MODE,
            modified_unix_ns=_nanoseconds(info),
            is_dir=stat.S_ISDIR(info.mode),
            is_symlink=link,
            symlink_target=target.decode("utf-8", "backslashreplace"),
        )

    async def make_directory(self, request: pb.MkdirRequest) -> pb.MkdirResponse:
        """Make a directory."""
        with _told("mkdir", request.path):
            path = path_from(request.path)
            owner = await self.accounts.ensure(request.session_id)
            info = await self.files.make_directory(
                request.session_id,
                path,
                user="",
                parents=request.recursive,
                mode=(request.mode & _MODE) or None,
                owner=str(owner),
            )
        return pb.MkdirResponse(modified_unix_ns=_nanoseconds(info))

    async def remove(self, request: pb.RemoveRequest) -> pb.RemoveResponse:
        """Remove a file, an empty directory, or with all that is in it."""
        with _told("remove", request.path):
            removed = await self.files.remove(
                request.session_id,
                path_from(request.path),
                user="",
                recursive=request.recursive,
                count=True,
            )
        return pb.RemoveResponse(removed=True, entries_removed=min(removed, _MOST))

    async def list(self, request: pb.ListRequest) -> pb.ListResponse:
        """The entries of a directory, by name. Links are told of themselves.

        :raise NoSpaceError: LISTING_TOO_LONG.
        """
        path = absolute(request.path).encode()
        if path == HOME.encode():
            await self.accounts.ensure(request.session_id)
        entries: list[pb.ListEntry] = []
        with _told("open", request.path):
            async with aclosing(self.files.list(request.session_id, path, user="")) as pages:
                async for page in pages:
                    entries += map(_entry, page)
                    if len(entries) > _ENTRIES:
                        raise NoSpaceError(
                            f"the directory has more than {_ENTRIES} entries: list it by a command",
                            reason="LISTING_TOO_LONG",
                        )
        if not request.include_hidden:
            entries = [entry for entry in entries if not entry.name.startswith(".")]
        return pb.ListResponse(entries=sorted(entries, key=lambda entry: entry.name))

    async def _reading(
        self, session: str, path: str, offset: int, length: int
    ) -> AsyncGenerator[FileInfo | bytes, None]:
        reading = self.files.read(
            session, path_from(path), user="", offset=offset, length=length or None
        )
        async with aclosing(reading) as pieces:
            async for piece in pieces:
                yield piece

    async def _followed(self, session: str, path: bytes) -> FileInfo | None:
        try:
            return await self.files.stat(session, path, user="", follow=True)
        except NotFoundError as error:
            if error.reason != "FILE_NOT_FOUND":
                raise
            return None


@contextmanager
def _told(verb: str, path: str) -> Iterator[None]:
    """Say of a file what Tenki's clients know: "open /a: no such file or directory"."""
    about = f"{verb} {absolute(path)}"
    try:
        yield
    except StrataboxError as error:
        kind: type[StrataboxError]
        match error.reason:
            case "FILE_NOT_FOUND":
                kind, words = NotFoundError, "no such file or directory"
            case "PERMISSION_DENIED":
                kind, words = ForbiddenError, "permission denied"
            case "GUEST_NO_SPACE":
                kind, words = NoSpaceError, "no space left on device"
            case reason if reason in _SAID:
                kind, words = type(error), _SAID[reason]
            case _:
                raise
        raise kind(f"{about}: {words}", reason=error.reason) from error


def _entry(info: FileInfo) -> pb.ListEntry:
    return pb.ListEntry(
        name=info.path.decode("utf-8", "backslashreplace"),
        is_dir=stat.S_ISDIR(info.mode),
        size=min(info.size, _MOST),
        mode=info.mode & _MODE,
        modified_unix_ns=_nanoseconds(info),
    )


def _nanoseconds(info: FileInfo) -> int:
    return max(_FIRST_NS, min(info.modified * _SECOND, _LAST_NS))
