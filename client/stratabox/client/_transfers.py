"""The plans of `client.snapshots` and `client.images` that export and import archives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import BinaryIO

from stratabox.client import _convert, _requests
from stratabox.client._archives import open_sink
from stratabox.client._plans import Download, Plan, Upload
from stratabox.client.archives import ExportResult, ImportResult
from stratabox.client.records import Image
from stratabox.v1 import transfers_pb2 as pb

_SERVICE = "transfers"
_CHUNK = 1 << 20  # bytes

Progress = Callable[[int, int], None]


class SnapshotTransfers:
    """Export and import: the part of `SnapshotPlans` that goes to other daemons."""

    def export(
        self,
        snapshot: str,
        target: str | PathLike[str] | BinaryIO,
        *,
        since: str | None = None,
        memory: bool = False,
        env: bool = False,
        progress: Progress | None = None,
    ) -> Plan[ExportResult]:
        """Receive an archive of a snapshot, which stands alone.

        Broken off, it leaves FILE.part; the same call again goes on there. The snapshot may be
        deleted meanwhile.

        :param target: A file, which is not there yet; or one that is open for writing.
        :param since: Another snapshot that the importer has: its layers are left out.
        :param memory: With its saved memory. That holds all that the guest had in it.
        :param env: With the environment of its commands, which may hold secrets.
        :param progress: Called with bytes of content received, and in all at most.
        :raise InvalidArgumentError: when it has no memory, or the file is there already.
        :raise ResumeMismatchError: when FILE.part is of something else, or of a record that has
            changed since.
        :raise SnapshotNotReadyError: when it is not ready.
        :raise CorruptError: when what is kept of it is damaged.
        :raise OSError: when the file cannot be written.
        """
        with _requests.checked():
            request = pb.ExportSnapshotRequest(
                snapshot=snapshot, since=since or "", memory=memory, env=env
            )
        return _export("ExportSnapshot", request, target, progress)

    def import_file(
        self,
        source: str | PathLike[str] | BinaryIO,
        *,
        name: str | None = None,
        trust: bool = False,
        progress: Progress | None = None,
    ) -> Plan[ImportResult]:
        """Send an archive; its snapshot is made part of the daemon's store.

        Nothing in it is trusted. All ids are new; it has no sandbox here, and an image only where
        one is here that holds the same.

        :param source: A file, or one that is open for reading.
        :param name: What it is called here; None: as it was.
        :param trust: Take its memory, too. Nobody can tell what is in there, so only from somebody
            who could as well log in to the guest. Without it, its disks come as after a power cut,
            and `left_out` says so.
        :param progress: Called with bytes sent, and in all (0: not known).
        :raise InvalidArchiveError: when it is no archive, or damaged; says where.
        :raise MissingBaseError: when it stands on layers that are not there.
        :raise NoSpaceError: when the host has no room.
        :raise OSError: when the file cannot be read.
        """
        with _requests.checked():
            header = pb.ImportSnapshotHeader(name=name or "", trust=trust)

        def requests() -> Iterator[pb.ImportSnapshotRequest]:
            yield pb.ImportSnapshotRequest(header=header)
            for data in _pieces(source, progress):
                yield pb.ImportSnapshotRequest(data=data)

        return Upload(_SERVICE, "ImportSnapshot", requests(), _convert.snapshot_import)


class ImageTransfers:
    """Export and import: the part of `ImagePlans` that goes to other daemons."""

    def export(
        self,
        image: str,
        target: str | PathLike[str] | BinaryIO,
        *,
        progress: Progress | None = None,
    ) -> Plan[ExportResult]:
        """Receive an archive of an image.

        Broken off, it leaves FILE.part; the same call again goes on there.

        :param target: A file, which is not there yet; or one that is open for writing.
        :param progress: Called with bytes of content received, and in all at most.
        :raise InvalidArgumentError: when the file is there already.
        :raise ResumeMismatchError: when FILE.part is of something else.
        :raise CorruptError: when what is kept of it is damaged.
        :raise OSError: when the file cannot be written.
        """
        with _requests.checked():
            request = pb.ExportImageRequest(image=image)
        return _export("ExportImage", request, target, progress)

    def import_archive(
        self,
        source: str | PathLike[str] | BinaryIO,
        *,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> Plan[Image]:
        """Send an archive of an image. Nothing in it is trusted.

        :param source: A file, or one that is open for reading.
        :param name: What it is called here; None: as it was.
        :param progress: Called with bytes sent, and in all (0: not known).
        :raise InvalidArchiveError: when it is no archive, or damaged; says where.
        :raise ImageAlreadyExistsError: when the name is taken.
        :raise NoSpaceError: when the host has no room.
        :raise OSError: when the file cannot be read.
        """
        with _requests.checked():
            header = pb.ImportImageArchiveHeader(name=name or "")

        def requests() -> Iterator[pb.ImportImageArchiveRequest]:
            yield pb.ImportImageArchiveRequest(header=header)
            for data in _pieces(source, progress):
                yield pb.ImportImageArchiveRequest(data=data)

        return Upload(_SERVICE, "ImportImageArchive", requests(), _convert.image)


def _export(
    rpc: str,
    request: pb.ExportSnapshotRequest | pb.ExportImageRequest,
    target: str | PathLike[str] | BinaryIO,
    progress: Progress | None,
) -> Plan[ExportResult]:
    sink = open_sink(target)
    if sink.resume is not None:
        request.resume.CopyFrom(sink.resume)
    content = 0

    def step(message: pb.ExportResponse) -> None:
        nonlocal content
        sink.write(message.data)
        content = message.done_bytes
        if progress is not None:
            progress(message.done_bytes, message.total_bytes)

    return Download(_SERVICE, rpc, request, step, lambda: sink.finish(content), sink.close)


def _pieces(source: str | PathLike[str] | BinaryIO, progress: Progress | None) -> Iterator[bytes]:
    """Read what is sent. It is opened when it is first asked for, which another thread does."""
    if isinstance(source, str | PathLike):
        with Path(fspath(source)).open("rb") as opened:
            yield from _pieces(opened, progress)
        return
    sent = total = 0
    if source.seekable():
        begin = source.tell()
        total = source.seek(0, os.SEEK_END) - begin
        source.seek(begin)
    while data := source.read(_CHUNK):
        yield data
        sent += len(data)
        if progress is not None:
            progress(sent, total)
