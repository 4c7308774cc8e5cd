"""The plans of `sandbox.files` that copy files and folders between this host and a guest.

As cp(1) does: what is copied goes *into* a folder that is there, and else takes the name that is
given. A source that ends with "/." is copied without its own name. Folders travel as tars; what a
guest sends is taken as `_tar` and `_extracting` say.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from google.protobuf.message import Message

from stratabox.client import _requests
from stratabox.client._arriving import Arriving, Progress
from stratabox.client._extracting import Extractor, Notes
from stratabox.client._file_requests import SERVICE, encoded, file_info, pieces_of
from stratabox.client._packing import pack
from stratabox.client._plans import Call, Download, Plan, Script, Steps, Stream, Upload
from stratabox.client._tar import Reader
from stratabox.client.errors import InvalidArchiveError, InvalidArgumentError
from stratabox.client.file_errors import (
    GuestFileNotFoundError,
    GuestIsADirectoryError,
    GuestNotADirectoryError,
)
from stratabox.client.file_records import CopyResult, FileInfo, GuestPath
from stratabox.v1 import files_pb2 as pb

LocalPath = str | bytes | PathLike[str]


class CopyPlans:
    """Upload and download: the part of `FilePlans` that copies."""

    def upload(
        self,
        sandbox: str,
        source: LocalPath,
        target: GuestPath,
        *,
        recursive: bool = False,
        user: str | None = None,
        progress: Progress | None = None,
    ) -> Plan[CopyResult]:
        """Copy a file, or a folder with all that is in it, into the guest; as cp(1) does.

        Modes, times and links are kept, owners are not: all belongs to `user`.

        :param target: Copied into it where it is a directory, else the name of the copy.
        :param recursive: Folders, too; links are copied as such then.
        :param progress: Called with bytes sent so far, and in all (0: not known).
        :raise IsADirectoryError: when the source is a folder, without `recursive`.
        :raise OSError: when something cannot be read.
        """
        local = os.fsdecode(source)
        return Script(self._upload(sandbox, local, target, recursive, user, progress))

    def download(
        self,
        sandbox: str,
        source: GuestPath,
        target: LocalPath,
        *,
        recursive: bool = False,
        all_links: bool = False,
        limit: int | None = None,
        user: str | None = None,
        progress: Progress | None = None,
    ) -> Plan[CopyResult]:
        """Copy a file, or a directory with all that is in it, out of the guest; as cp(1) does.

        Modes and times are kept, and links that stay within the copy. Nothing outside of the target
        is touched, whatever the guest sends; devices are left out.

        :param target: Copied into it where it is a folder, else the name of the copy.
        :param recursive: Directories, too.
        :param all_links: Make links that lead out of the copy, too. Nothing follows them here, but
            who works with the copy may.
        :param limit: Bytes of all files at most; None: the room that is free at the target.
        :param progress: Called with bytes received so far, and in all (0: not known).
        :raise GuestIsADirectoryError: without `recursive`.
        :raise InvalidArchiveError: when the guest sends what cannot be taken.
        :raise OSError: when something cannot be written.
        """
        path = Path(os.fsdecode(target))
        return Script(
            self._download(sandbox, source, path, recursive, all_links, limit, user, progress)
        )

    def read_archive(
        self, sandbox: str, path: GuestPath, *, user: str | None = None
    ) -> Stream[bytes]:
        """Read a directory as a tar, piece by piece; its names begin with "./".

        It is what the guest sends: trust nothing in it. `download` does not.
        """
        return Stream(
            SERVICE, "ReadArchive", _archive_request(sandbox, path, user), lambda part: part.data
        )

    def write_archive(
        self,
        sandbox: str,
        path: GuestPath,
        data: bytes | BinaryIO | Iterable[bytes],
        *,
        user: str | None = None,
    ) -> Plan[tuple[str, ...]]:
        """Unpack a tar in a directory of the guest; return what its tar remarked.

        :param path: Made where it is not there; the directory above must be.
        """
        with _requests.checked():
            header = pb.WriteArchiveHeader(sandbox=sandbox, path=encoded(path), user=user or "")

        def requests() -> Iterator[pb.WriteArchiveRequest]:
            yield pb.WriteArchiveRequest(header=header)
            for piece in pieces_of(data):
                yield pb.WriteArchiveRequest(data=piece)

        return Upload(SERVICE, "WriteArchive", requests(), lambda reply: tuple(reply.warnings))

    def _upload(
        self,
        sandbox: str,
        local: str,
        target: GuestPath,
        recursive: bool,
        user: str | None,
        progress: Progress | None,
    ) -> Steps[CopyResult]:
        source = Path(local)
        there = yield from _found(sandbox, target, user)
        base, into = encoded(target), there is not None and there.is_directory
        name = os.fsencode(source.name)  # "" for "/" and "."
        if not source.is_dir() or (recursive and source.is_symlink()):
            if recursive and source.is_symlink():
                return (yield from self._upload_link(sandbox, source, base, into, user))
            if into or base.endswith(b"/"):
                base = base.rstrip(b"/") + b"/" + name
            return (yield from self._upload_file(sandbox, source, base, user, progress))
        if not recursive:
            raise IsADirectoryError(f"{source} is a folder: copy it with recursive")
        if there is not None and not into:
            raise GuestNotADirectoryError(f"{_shown(base)}: it is not a directory")
        contents = local.rstrip("/").rpartition("/")[2] in ("", ".", "..")  # Path drops a "."
        if into and not contents:
            base = base.rstrip(b"/") + b"/" + name
        notes = Notes()
        stream = pack(source, notes, itself=not (into and contents), progress=progress)
        warnings = yield self.write_archive(sandbox, base, stream, user=user)
        for warning in warnings:
            notes.remark(warning)
        return notes.result()

    def _upload_file(
        self,
        sandbox: str,
        source: Path,
        target: bytes,
        user: str | None,
        progress: Progress | None,
    ) -> Steps[CopyResult]:
        sent = 0
        with source.open("rb") as opened:
            found = os.fstat(opened.fileno())
            with _requests.checked():
                header = pb.WriteFileHeader(
                    sandbox=sandbox, path=target, user=user or "", mode=found.st_mode & 0o7777
                )
                header.modified_at.seconds = max(int(found.st_mtime), 0)

            def requests() -> Iterator[pb.WriteFileRequest]:
                nonlocal sent
                yield pb.WriteFileRequest(header=header)
                for piece in pieces_of(opened):
                    yield pb.WriteFileRequest(data=piece)
                    sent += len(piece)
                    if progress is not None:
                        progress(sent, found.st_size)
                yield pb.WriteFileRequest(end=True)

            yield Upload(SERVICE, "WriteFile", requests(), file_info)
        return CopyResult(entries=1, size_bytes=sent, warnings=(), incomplete=False)

    def _upload_link(
        self, sandbox: str, source: Path, target: bytes, into: bool, user: str | None
    ) -> Steps[CopyResult]:
        if into:
            target = target.rstrip(b"/") + b"/" + os.fsencode(source.name)
        with _requests.checked():
            request = pb.MakeSymlinkRequest(
                sandbox=sandbox,
                path=target,
                target=os.fsencode(source.readlink()),
                user=user or "",
            )
        yield Call(SERVICE, "MakeSymlink", request, file_info)
        return CopyResult(entries=1, size_bytes=0, warnings=(), incomplete=False)

    def _download(
        self,
        sandbox: str,
        source: GuestPath,
        target: Path,
        recursive: bool,
        all_links: bool,
        limit: int | None,
        user: str | None,
        progress: Progress | None,
    ) -> Steps[CopyResult]:
        there = yield from _found(sandbox, source, user)
        if there is None:
            raise GuestFileNotFoundError(f"{_shown(encoded(source))}: there is no such file")
        name = os.fsdecode(encoded(source).rstrip(b"/").rpartition(b"/")[2])
        contents = name in ("", ".", "..")
        if there.is_directory and not recursive:
            raise GuestIsADirectoryError(
                f"{_shown(encoded(source))}: it is a directory: copy it with recursive"
            )
        if target.is_dir() and not contents:
            target = target / name
        if not there.is_directory:
            result: CopyResult = yield _download_file(
                sandbox, source, target, limit, user, progress
            )
            return result
        if not target.is_dir() and os.path.lexists(target):
            raise NotADirectoryError(f"{target} is not a folder")
        copied: CopyResult = yield _download_folder(
            sandbox, source, target, limit, all_links, user, progress
        )
        return copied


def _found(sandbox: str, path: GuestPath, user: str | None) -> Steps[FileInfo | None]:
    with _requests.checked():
        request = pb.StatFileRequest(
            sandbox=sandbox, path=encoded(path), user=user or "", follow=True
        )
    try:
        found: FileInfo = yield Call(SERVICE, "StatFile", request, file_info)
    except GuestFileNotFoundError:
        return None
    return found


def _download_file(
    sandbox: str,
    source: GuestPath,
    target: Path,
    limit: int | None,
    user: str | None,
    progress: Progress | None,
) -> Plan[CopyResult]:
    with _requests.checked():
        request = pb.ReadFileRequest(sandbox=sandbox, path=encoded(source), user=user or "")
    arriving = Arriving(target, limit, progress)
    return _guarded("ReadFile", request, arriving.step, arriving.finish, arriving.close)


def _download_folder(
    sandbox: str,
    source: GuestPath,
    target: Path,
    limit: int | None,
    all_links: bool,
    user: str | None,
    progress: Progress | None,
) -> Plan[CopyResult]:
    notes = Notes()
    fresh = not target.is_dir()
    if limit is not None and limit < 0:
        raise InvalidArgumentError(f"{limit} is no limit")
    if fresh:
        target.mkdir(mode=0o700)
    extractor = Extractor(
        target,
        notes,
        fresh=fresh,
        limit=shutil.disk_usage(target).free if limit is None else limit,
        all_links=all_links,
        progress=progress,
    )
    reader = Reader(extractor)
    result: pb.ReadArchiveResult | None = None

    def step(message: pb.ReadArchiveResponse) -> None:
        nonlocal result
        if message.WhichOneof("part") == "data":
            reader.feed(message.data)
        else:
            result = message.result

    def finish() -> CopyResult:
        reader.finish()
        if result is None:
            raise InvalidArchiveError("what the guest sent has no end")
        for warning in result.warnings:
            notes.remark(warning)
        notes.incomplete |= result.incomplete
        return notes.result()

    request = _archive_request(sandbox, source, user)
    return _guarded("ReadArchive", request, step, finish, extractor.close)


def _guarded(
    rpc: str,
    request: Message,
    step: Callable[[Any], None],
    finish: Callable[[], CopyResult],
    close: Callable[[], None],
) -> Download[CopyResult]:
    """A download whose files are not closed while a thread still writes them.

    Who awaits can give up at any moment, and the thread that takes a piece goes on; a descriptor
    that is closed meanwhile may be another file's by then.
    """
    turn, over = Lock(), False

    def guarded_step(message: Any) -> None:
        with turn:
            if not over:
                step(message)

    def guarded_finish() -> CopyResult:
        with turn:
            return finish()

    def guarded_close() -> None:
        nonlocal over
        with turn:
            over = True
            close()

    return Download(SERVICE, rpc, request, guarded_step, guarded_finish, guarded_close)


def _archive_request(sandbox: str, path: GuestPath, user: str | None) -> pb.ReadArchiveRequest:
    with _requests.checked():
        return pb.ReadArchiveRequest(sandbox=sandbox, path=encoded(path), user=user or "")


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
