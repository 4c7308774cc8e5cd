"""`stratabox sandbox cp` from one guest to another, through this host and past its disk.

Neither guest is trusted with what the other sends: a tar is read as strictly as one that is
unpacked here, and made anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from stratabox.client._extracting import Notes
from stratabox.client._tar import Member, Reader, Repacker
from stratabox.client.cli.copy import Progress, counted
from stratabox.client.cli.guest_paths import InGuest
from stratabox.client.file_errors import (
    GuestFileNotFoundError,
    GuestIsADirectoryError,
    GuestNotADirectoryError,
)
from stratabox.client.file_records import CopyResult, FileInfo

if TYPE_CHECKING:
    from stratabox.client.sync import Client


def between(
    client: Client,
    source: InGuest,
    target: InGuest,
    recursive: bool,
    user: str | None,
    progress: Progress,
) -> CopyResult:
    """Copy a file or directory of one guest into another, or within one."""
    found = client.files.stat(source.sandbox, source.path, user=user)
    if found.is_directory and not recursive:
        raise GuestIsADirectoryError(f"{source.path}: it is a directory: copy it with -r")
    there = _stat(client, target, user)
    name = os.fsdecode(found.path.rstrip(b"/").rpartition(b"/")[2])
    contents = name in ("", ".", "..")
    path = target.path
    if there is not None and there.is_directory and not contents:
        path = f"{path.rstrip('/')}/{name}"
    if not found.is_directory:
        pieces = client.files.stream(source.sandbox, source.path, user=user)
        info = client.files.write(
            target.sandbox, path, counted(pieces, progress, found.size),
            mode=found.mode, modified_at=found.modified_at, user=user,
        )  # fmt: skip
        return CopyResult(entries=1, size_bytes=info.size, warnings=(), incomplete=False)
    if there is not None and not there.is_directory:
        raise GuestNotADirectoryError(f"{target.path}: it is not a directory")
    notes = Notes()
    stream = client.files.read_archive(source.sandbox, source.path, user=user)
    again = counted(_repacked(stream, notes), progress, 0)
    for warning in client.files.write_archive(target.sandbox, path, again, user=user):
        notes.remark(warning)
    return notes.result()


def _stat(client: Client, place: InGuest, user: str | None) -> FileInfo | None:
    try:
        return client.files.stat(place.sandbox, place.path, user=user)
    except GuestFileNotFoundError:
        return None


class _Counting(Repacker):
    """Repacks, and counts what goes through."""

    def __init__(self, held: bytearray, notes: Notes) -> None:
        super().__init__(held.extend, lambda member, why: notes.warn(member.path, why))
        self._notes = notes

    def member(self, member: Member) -> None:
        """As `Sink` says."""
        self._notes.entries += 1
        self._notes.size += member.size
        super().member(member)


def _repacked(stream: Iterator[bytes], notes: Notes) -> Iterator[bytes]:
    held = bytearray()
    reader = Reader(_Counting(held, notes))
    with closing(stream):  # type: ignore[type-var]  # it is a generator
        for piece in stream:
            reader.feed(piece)
            if held:
                yield bytes(held)
                held.clear()
    reader.finish()
