"""The records of files in guests."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

#: A path in a guest: text, or bytes where it is no UTF-8.
GuestPath = str | bytes | os.PathLike[str]


class FileKind(StrEnum):
    """What a file is."""

    REGULAR = "regular"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    #: A socket, a FIFO, a device.
    OTHER = "other"
    UNKNOWN = "unknown"


class WriteMode(StrEnum):
    """How a file is written."""

    #: Aside, and renamed into its place when all is there.
    REPLACE = "replace"
    #: As REPLACE, but no file may be there.
    CREATE = "create"
    #: In place, from its beginning.
    TRUNCATE = "truncate"
    #: In place, behind its end.
    APPEND = "append"
    UNKNOWN = "unknown"


class WatchMethod(StrEnum):
    """How changes are noticed."""

    #: By the guest's inotify, at once.
    INOTIFY = "inotify"
    #: By looking every second.
    POLLING = "polling"
    UNKNOWN = "unknown"


class FileChangeType(StrEnum):
    """What has happened to a file."""

    CREATED = "created"
    CHANGED = "changed"
    REMOVED = "removed"
    MOVED = "moved"
    #: More has changed than could be told: look again.
    OVERFLOW = "overflow"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """One file in a guest."""

    #: As it was asked for; in lists the name alone.
    path: bytes
    kind: FileKind
    size: int
    #: The twelve permission bits.
    mode: int
    uid: int
    gid: int
    #: To the second.
    modified_at: datetime

    @property
    def name(self) -> str:
        """The last part of the path; what is no UTF-8 as os.fsdecode has it."""
        return os.fsdecode(self.path.rstrip(b"/").rpartition(b"/")[2])

    @property
    def is_directory(self) -> bool:
        """It is a directory, and no link to one."""
        return self.kind is FileKind.DIRECTORY


@dataclass(frozen=True, kw_only=True)
class FileChange:
    """One change of what is watched."""

    type: FileChangeType
    #: Absolute; empty for OVERFLOW.
    path: bytes
    #: Of what moved, what it was called before.
    old_path: bytes
    directory: bool


@dataclass(frozen=True, kw_only=True)
class CopyResult:
    """What was copied from or to a guest."""

    #: Files, directories and links.
    entries: int
    #: Bytes of files.
    size_bytes: int
    #: What was left out or went wrong with single files, at most the first 100 of it.
    warnings: tuple[str, ...]
    #: Something is not there that should be.
    incomplete: bool
