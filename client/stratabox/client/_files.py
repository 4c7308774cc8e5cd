"""The plans of `sandbox.files`: files in a guest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import BinaryIO

from stratabox.client import _convert, _requests
from stratabox.client._copying import CopyPlans
from stratabox.client._file_requests import (
    CHUNK,
    SERVICE,
    encoded,
    file_change,
    file_info,
    pieces_of,
)
from stratabox.client._plans import Call, Download, Plan, Stream, Upload
from stratabox.client.file_records import (
    FileChange,
    FileInfo,
    GuestPath,
    WatchMethod,
    WriteMode,
)
from stratabox.v1 import files_pb2 as pb

__all__ = ["CHUNK", "FilePlans"]

_MOST_LISTED = 1_000_000


class FilePlans(CopyPlans):
    """Files in the guest of one sandbox: looked at, read, written, changed, copied, watched.

    Paths are absolute; text, or bytes where they are no UTF-8. `user` is as whom it is done, root
    where it is not given; a user that the guest does not have raises UserNotFoundError. What is not
    there raises GuestFileNotFoundError, what may not be done GuestPermissionError, a full file
    system in the guest GuestNoSpaceError; whatever else the guest says, GuestFileError. A sandbox
    that does not run raises InvalidStateError, one without sshd NoSshdError.
    """

    def stat(
        self, sandbox: str, path: GuestPath, *, follow: bool = True, user: str | None = None
    ) -> Plan[FileInfo]:
        """Tell of one file.

        :param follow: Of a link, tell of what it leads to.
        """
        with _requests.checked():
            request = pb.StatFileRequest(
                sandbox=sandbox, path=encoded(path), user=user or "", follow=follow
            )
        return Call(SERVICE, "StatFile", request, file_info)

    def list(
        self,
        sandbox: str,
        path: GuestPath,
        *,
        user: str | None = None,
        limit: int = _MOST_LISTED,
    ) -> Plan[list[FileInfo]]:
        """List a directory, by name. Links are told of themselves.

        :param limit: How many entries at most; `iterate` has no limit.
        """
        with _requests.checked():
            request = pb.ListFilesRequest(sandbox=sandbox, path=encoded(path), user=user or "")
        found: list[FileInfo] = []

        def step(message: pb.ListFilesResponse) -> None:
            if len(found) < limit:
                found.extend(map(file_info, message.files[: limit - len(found)]))

        def finish() -> list[FileInfo]:
            return sorted(found, key=lambda one: one.path)

        return Download(SERVICE, "ListFiles", request, step, finish, _nothing)

    def iterate(
        self, sandbox: str, path: GuestPath, *, user: str | None = None
    ) -> Stream[tuple[FileInfo, ...]]:
        """List a directory in pages, in no order, for as long as the caller reads."""
        with _requests.checked():
            request = pb.ListFilesRequest(sandbox=sandbox, path=encoded(path), user=user or "")
        return Stream(SERVICE, "ListFiles", request, lambda page: tuple(map(file_info, page.files)))

    def read(
        self,
        sandbox: str,
        path: GuestPath,
        *,
        offset: int = 0,
        length: int | None = None,
        user: str | None = None,
    ) -> Plan[bytes]:
        """Read a file, or a part of it, into memory; `stream` and `download` need none."""
        request = _read_request(sandbox, path, offset, length, user)
        pieces: list[bytes] = []

        def step(message: pb.ReadFileResponse) -> None:
            pieces.append(message.data)

        return Download(SERVICE, "ReadFile", request, step, lambda: b"".join(pieces), _nothing)

    def stream(
        self,
        sandbox: str,
        path: GuestPath,
        *,
        offset: int = 0,
        length: int | None = None,
        user: str | None = None,
    ) -> Stream[bytes]:
        """Read a file piece by piece, of 256 KiB at most; the first piece may be empty."""
        request = _read_request(sandbox, path, offset, length, user)
        return Stream(SERVICE, "ReadFile", request, lambda message: bytes(message.data))

    def write(
        self,
        sandbox: str,
        path: GuestPath,
        data: bytes | str | BinaryIO | Iterable[bytes],
        *,
        write_mode: WriteMode | str = WriteMode.REPLACE,
        mode: int | None = None,
        modified_at: datetime | None = None,
        parents: bool = False,
        user: str | None = None,
    ) -> Plan[FileInfo]:
        """Write a file. It is there whole in the end, or is as it was before.

        A file that is there keeps its mode and owner; a link is followed.

        :param data: All of it; or something to read it from, piece by piece. Text is UTF-8.
        :param write_mode: CREATE: no file may be there. TRUNCATE, APPEND: in place, where a write
            that is broken off leaves what came of it.
        :param mode: The permission bits; None: those that it has, or 0644.
        :param modified_at: When it says that it was changed; None: now.
        :param parents: Make the directories above that are missing.
        :raise GuestFileExistsError: with CREATE.
        """
        with _requests.checked():
            header = pb.WriteFileHeader(
                sandbox=sandbox,
                path=encoded(path),
                user=user or "",
                write_mode=_convert.number(WriteMode, write_mode),
                mode=mode,
                modified_at=_requests.timestamp(modified_at),
                parents=parents,
            )

        def requests() -> Iterator[pb.WriteFileRequest]:
            yield pb.WriteFileRequest(header=header)
            for piece in pieces_of(data):
                yield pb.WriteFileRequest(data=piece)
            yield pb.WriteFileRequest(end=True)

        return Upload(SERVICE, "WriteFile", requests(), file_info)

    def make_directory(
        self,
        sandbox: str,
        path: GuestPath,
        *,
        parents: bool = False,
        mode: int | None = None,
        user: str | None = None,
    ) -> Plan[FileInfo]:
        """Make a directory.

        :param parents: Those above that are missing, too; then it may be there already.
        :param mode: The permission bits; None: 0755.
        :raise GuestFileExistsError: when something is there.
        """
        with _requests.checked():
            request = pb.MakeDirectoryRequest(
                sandbox=sandbox, path=encoded(path), user=user or "", parents=parents, mode=mode
            )
        return Call(SERVICE, "MakeDirectory", request, file_info)

    def remove(
        self, sandbox: str, path: GuestPath, *, recursive: bool = False, user: str | None = None
    ) -> Plan[None]:
        """Remove a file, a link, or an empty directory.

        :param recursive: A directory with all that is in it.
        :raise GuestFileError: DIRECTORY_NOT_EMPTY.
        """
        with _requests.checked():
            request = pb.RemoveFileRequest(
                sandbox=sandbox, path=encoded(path), user=user or "", recursive=recursive
            )
        return Call(SERVICE, "RemoveFile", request, lambda message: None)

    def move(
        self,
        sandbox: str,
        source: GuestPath,
        target: GuestPath,
        *,
        keep: bool = False,
        user: str | None = None,
    ) -> Plan[FileInfo]:
        """Give a file or directory another path, never moving it *into* a directory.

        :param keep: What is at the target stays: GuestFileExistsError.
        """
        with _requests.checked():
            request = pb.MoveFileRequest(
                sandbox=sandbox,
                source=encoded(source),
                target=encoded(target),
                user=user or "",
                keep=keep,
            )
        return Call(SERVICE, "MoveFile", request, file_info)

    def change(
        self,
        sandbox: str,
        path: GuestPath,
        *,
        mode: int | None = None,
        owner: str | int | None = None,
        group: str | int | None = None,
        recursive: bool = False,
        user: str | None = None,
    ) -> Plan[FileInfo]:
        """Change mode or owner. A link is followed.

        :param owner: A name or a number; None: as it is.
        :param recursive: With all that is in it; links in there are not followed.
        """
        with _requests.checked():
            request = pb.ChangeFileRequest(
                sandbox=sandbox,
                path=encoded(path),
                user=user or "",
                mode=mode,
                owner="" if owner is None else str(owner),
                group="" if group is None else str(group),
                recursive=recursive,
            )
        return Call(SERVICE, "ChangeFile", request, file_info)

    def symlink(
        self, sandbox: str, path: GuestPath, target: GuestPath, *, user: str | None = None
    ) -> Plan[FileInfo]:
        """Make a symbolic link.

        :param target: Where it leads to; need not be there, and may be relative.
        :raise GuestFileExistsError: when something is there.
        """
        with _requests.checked():
            request = pb.MakeSymlinkRequest(
                sandbox=sandbox, path=encoded(path), target=encoded(target), user=user or ""
            )
        return Call(SERVICE, "MakeSymlink", request, file_info)

    def read_link(self, sandbox: str, path: GuestPath, *, user: str | None = None) -> Plan[bytes]:
        """Tell where a symbolic link leads to, as it was made."""
        with _requests.checked():
            request = pb.ReadLinkRequest(sandbox=sandbox, path=encoded(path), user=user or "")
        return Call(SERVICE, "ReadLink", request, lambda message: bytes(message.target))

    def watch(
        self, sandbox: str, path: GuestPath, *, recursive: bool = False, user: str | None = None
    ) -> Stream[WatchMethod | FileChange]:
        """Follow changes of a directory's entries, or of one file, for as long as the caller reads.

        The first that comes is how changes are noticed: those after it are told. It ends when the
        directory is gone.

        :param recursive: With all directories in it, also those to come.
        """
        with _requests.checked():
            request = pb.WatchFilesRequest(
                sandbox=sandbox, path=encoded(path), user=user or "", recursive=recursive
            )
        return Stream(SERVICE, "WatchFiles", request, file_change)


def _read_request(
    sandbox: str, path: GuestPath, offset: int, length: int | None, user: str | None
) -> pb.ReadFileRequest:
    with _requests.checked():
        return pb.ReadFileRequest(
            sandbox=sandbox, path=encoded(path), user=user or "", offset=offset, length=length
        )


def _nothing() -> None:
    pass
