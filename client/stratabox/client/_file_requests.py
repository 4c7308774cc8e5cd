"""Pieces of requests about files, and of answers. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import BinaryIO

from stratabox.client import _convert
from stratabox.client.file_records import (
    FileChange,
    FileChangeType,
    FileInfo,
    FileKind,
    GuestPath,
    WatchMethod,
)
from stratabox.v1 import files_pb2 as pb

SERVICE = "files"
CHUNK = 256 << 10
"""Bytes that are sent at once."""


def encoded(path: GuestPath) -> bytes:
    """A path as it is sent; text as UTF-8, with what os.fsdecode makes of other bytes."""
    return path if isinstance(path, bytes) else os.fspath(path).encode("utf-8", "surrogateescape")


def pieces_of(data: bytes | str | BinaryIO | Iterable[bytes]) -> Iterator[bytes]:
    """What is to be written, in pieces that may be sent."""
    if isinstance(data, str):
        data = data.encode()
    if isinstance(data, bytes | bytearray | memoryview):
        view = memoryview(data)
        for at in range(0, len(view), CHUNK):
            yield bytes(view[at : at + CHUNK])
    elif hasattr(data, "read"):
        while piece := data.read(CHUNK):
            yield piece
    else:
        for piece in data:
            yield from pieces_of(piece)


def file_info(message: pb.FileInfo) -> FileInfo:
    """Read what is told of one file."""
    return FileInfo(
        path=message.path,
        kind=_convert.word(FileKind, message.kind),
        size=message.size,
        mode=message.mode,
        uid=message.uid,
        gid=message.gid,
        modified_at=datetime.fromtimestamp(message.modified_at.seconds, UTC),
    )


def file_change(message: pb.WatchFilesResponse) -> WatchMethod | FileChange:
    """Read what a watch tells."""
    if message.WhichOneof("part") == "method":
        return _convert.word(WatchMethod, message.method)
    change = message.change
    return FileChange(
        type=_convert.word(FileChangeType, change.type),
        path=change.path,
        old_path=change.old_path,
        directory=change.directory,
    )
